"""Where no equilibrium is found, or none can be asked for: told, with a name, and never a lie."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.solvers import (
    ClosedForm,
    ConjugateGradients,
    ErrorDescent,
    FixedPoint,
    FlowToRest,
    GaussNewton,
    GradientDescent,
    PseudoTransient,
    Solver,
)
from pcdyn.errors import (
    EquilibriumStatus,
    InputError,
    IntegratorError,
    NonFiniteError,
    NotConvergedError,
    NotLinearError,
    PcdynError,
    ShapeError,
    ToleranceError,
)
from pcdyn.integrators import SciPy
from pcdyn.model.activations import Activation
from pcdyn.model.energies.energy import CrossEntropy, Energy, Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import target_propagation
from tests.networks import EPS, Case, assert_close, build_case, least_curvature

pytestmark = pytest.mark.unchecked

CONVERGED, LIMIT = EquilibriumStatus.CONVERGED, EquilibriumStatus.ITERATION_LIMIT
ENDS = {"input": np.ones(2), "output": np.ones(2)}
LINEAR, CURVED = (
    Network([Dense(0.5 * np.ones((3, 2)), None, name), Dense(0.5 * np.ones((2, 3)))])
    for name in ("identity", "tanh")
)


class Quartic(Energy):
    """Σ ε⁴, without a curvature."""

    def value(self, error: Any, target: Any) -> Any:
        return jnp.sum(error**4, axis=-1)


def solve(method: Any = None, *, network: Network = CURVED, **options: Any) -> Any:
    """The equilibrium of widths 2, 3, 2, both ends clamped unless told otherwise."""
    names = ("input", "output", "energy")
    parts = {**ENDS, **{k: v for k, v in options.items() if k in names}}
    rest = {k: v for k, v in options.items() if k not in names}
    return equilibrium(InferenceProblem(network, **parts), method=method, **rest)


def basin(**options: Any) -> Any:
    return solve(network=LINEAR).basin(**options)


Call = Callable[[], Any]

# What is wrong, the call, its error, and what the message must name.
BAD: list[tuple[str, Call, type[InputError], str]] = [
    ("unknown method", lambda: solve("newton"), InputError, "'newton'"),
    ("unknown method in a chain", lambda: solve(["gauss_newton", "newton"]), InputError,
     "'newton'"),
    ("no method", lambda: solve([]), InputError, "method"),
    ("a number for a method", lambda: solve(3), InputError, "3"),
    ("zero tolerance", lambda: solve(tolerance=0.0), ToleranceError, "got 0"),
    ("negative tolerance", lambda: solve(tolerance=-1e-6), ToleranceError, "got -1e-06"),
    ("NaN tolerance", lambda: solve(tolerance=float("nan")), ToleranceError, "got nan"),
    ("infinite tolerance", lambda: solve(tolerance=float("inf")), ToleranceError, "got inf"),
    ("closed form of tanh", lambda: solve("closed_form"), NotLinearError, "layer 1.*'tanh'"),
    ("closed form of another energy", lambda: solve("closed_form", network=LINEAR,
                                                    energy=Quartic()), NotLinearError, "Quartic"),
    ("closed form by an unknown way", lambda: solve(ClosedForm("dense"), network=LINEAR),
     InputError, "'dense'"),
    ("output space with a free output",
     lambda: solve(ClosedForm("output_space"), network=LINEAR, output=None), InputError,
     "both ends clamped"),
    ("Gauss–Newton of another energy", lambda: solve("gauss_newton", energy=Quartic()), InputError,
     "gauss_newton needs the curvature .* layer 1, Quartic, has none: .* `curvature`"),
    ("Nesterov of another energy", lambda: solve("nesterov", energy=Quartic()), InputError,
     "nesterov needs the curvature"),
    ("fixed point of another energy", lambda: solve("fixed_point", energy=Quartic()), InputError,
     "fixed_point needs the curvature"),
    ("Nesterov with a free output", lambda: solve("nesterov", output=None), InputError,
     "nesterov needs both ends clamped"),
    ("Nesterov with a free input",
     lambda: solve(ErrorDescent(nesterov=False), input=None, initial="zeros"), InputError,
     "error_descent needs both ends clamped"),
    ("conjugate gradients of another energy",
     lambda: solve("conjugate_gradients", energy=Quartic()), InputError,
     "conjugate_gradients needs the curvature"),
    ("conjugate gradients with a free output",
     lambda: solve("conjugate_gradients", output=None), InputError,
     "conjugate_gradients needs both ends clamped"),
    ("the last of a chain", lambda: solve(["gauss_newton", "nesterov"], output=None), InputError,
     "nesterov"),
    ("fixed point with a free input", lambda: solve("fixed_point", input=None, initial="zeros"),
     InputError, "clamped input"),
    ("zero dt", lambda: solve(GradientDescent(dt=0.0)), InputError, "above 0, got 0"),
    ("negative dt", lambda: solve(GradientDescent(dt=-0.1)), InputError, "above 0, got -0.1"),
    ("NaN dt", lambda: solve(GradientDescent(dt=float("nan"))), InputError, "above 0, got nan"),
    ("infinite dt", lambda: solve(GradientDescent(dt=np.inf)), InputError, "above 0, got inf"),
    ("negative rate", lambda: solve(ErrorDescent(rate=-1.0)), InputError, "above 0, got -1"),
    ("flow on the host", lambda: solve(FlowToRest(SciPy("LSODA"))), IntegratorError,
     "LSODA runs on the host"),
    ("unknown start", lambda: solve(initial="ones"), InputError, "'ones'"),
    ("feedforward start of a free input", lambda: solve(input=None), InputError, "input is free"),
    ("NaN start", lambda: solve(initial=([np.nan, 0.0, 0.0],)), NonFiniteError, "layer 1"),
    ("infinite start", lambda: solve(initial=([np.inf, 0.0, 0.0],)), NonFiniteError, "layer 1"),
    ("start of another width", lambda: solve(initial=([0.0, 0.0],)), ShapeError, "layer 1"),
    ("clamped layers in the start", lambda: solve(initial=([0.0] * 2, [0.0] * 3, [0.0] * 2)),
     ShapeError, "3 arrays"),
    ("perturbation without a key", lambda: basin(perturbation=0.1), InputError, "key"),
    ("negative perturbation", lambda: basin(perturbation=-0.1, key=jr.key(0)), InputError,
     "perturbation"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "named"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_input_raises_its_error(call: Call, error: type[InputError], named: str) -> None:
    """The error is of the class documented, and its message names what is wrong."""
    pattern = named if ".*" in named else re.escape(named)
    with pytest.raises(InputError, match=pattern) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, PcdynError)


def norms(case: Case, activities: Any) -> np.ndarray:
    """‖∂F/∂x_l‖ of each free layer in NumPy."""
    there = case.replace(activities=tuple(np.asarray(x) for x in activities), time_constants=None)
    return np.stack([np.linalg.norm(g, axis=-1) for g in there.field()], -1)


TANH = build_case(seed=1, widths=(3, 4, 2), activations=("tanh",))


@pytest.mark.parametrize(
    "method",
    [
        GaussNewton(max_iterations=1),
        ConjugateGradients(max_iterations=1),
        ErrorDescent(max_iterations=1),
        PseudoTransient(max_iterations=1),
        FixedPoint(max_iterations=1),
        GradientDescent(dt=0.1, max_iterations=1),
        FlowToRest(t1=0.1),
    ],
    ids=lambda method: method.name,
)
def test_too_few_iterations_are_told(method: Solver) -> None:
    """The status and the error, which holds what was found, with its true residual."""
    found = equilibrium(TANH.problem, method=method, throw=False)
    assert found.status is LIMIT and not found.ok
    ours = norms(TANH, found.activities)
    assert np.max(ours) > 1e-6
    np.testing.assert_allclose(found.residual_norms, ours, rtol=0, atol=1e3 * EPS)
    assert "ITERATION_LIMIT 1 of 1" in found.message
    with pytest.raises(NotConvergedError, match="ITERATION_LIMIT 1 of 1") as caught:
        equilibrium(TANH.problem, method=method)
    kept = caught.value.equilibrium
    assert kept.status is LIMIT
    np.testing.assert_array_equal(kept.activities[1], found.activities[1])
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, PcdynError)


def test_what_failed_is_told_per_sample() -> None:
    """Of three samples the one that starts at rest has converged."""
    case = build_case(seed=1, widths=(3, 4, 2), activations=("tanh",), batch=3)
    rest = equilibrium(case.problem, tolerance=1e-10)
    start = np.array(rest.start[0])
    start[1] = rest.activities[1][1]
    with pytest.raises(
        NotConvergedError, match=r"CONVERGED 1 of 3.*ITERATION_LIMIT 2 of 3"
    ) as told:
        equilibrium(case.problem, method=GaussNewton(max_iterations=1), initial=(start,),
                    tolerance=1e-9)  # fmt: skip
    assert told.value.equilibrium.status == (LIMIT, CONVERGED, LIMIT)


def test_one_layer_at_rest_is_not_enough() -> None:
    """The output is free and as predicted, so that it rests, and the layer below it does not."""
    case = build_case(seed=1, widths=(3, 4, 2), activations=("tanh",), clamp="input")
    hidden = np.ones(4)
    start = (hidden, case.network.predict(2, jnp.asarray(hidden)))
    method = GradientDescent(dt=1e-12, max_iterations=1)
    found = equilibrium(case.problem, method=method, initial=start, tolerance=1e-6, throw=False)
    assert found.residual_norms[1] < 1e-6 < found.residual_norms[0]
    assert found.status is LIMIT


def linear_case(seed: int, scale: float = 1.0, precision: str = "full") -> Case:
    case = build_case(seed=seed, widths=(3, 4, 4, 2), bias=True, precision=precision)
    return case.replace(weights=tuple(scale * w for w in case.weights))


def test_gradient_descent_ends_where_its_step_is_stable() -> None:
    """Below 2/λ_max of numpy.linalg.eigvalsh it converges; above it never says so."""
    for seed in range(3):
        case = linear_case(seed)
        largest = np.linalg.eigvalsh(case.linear_flow()[0])[-1]
        below, above, far = (
            equilibrium(case.problem, method=GradientDescent(dt=f * 2 / largest), throw=False)
            for f in (0.99, 1.001, 1.5)
        )
        assert below.status is CONVERGED
        assert np.all(norms(case, below.activities) <= 1e-6 + 1e3 * EPS)
        assert above.status in (LIMIT, EquilibriumStatus.NON_FINITE)
        assert far.status is EquilibriumStatus.NON_FINITE


def test_the_fixed_point_iteration_converges_below_two() -> None:
    """If the largest eigenvalue of Π⁻¹H is below 2 (numpy.linalg.eigvals), and only then."""
    seen = set()
    for seed in range(12):
        case = linear_case(seed, scale=(0.3, 0.5, 0.9)[seed % 3])
        matrix = case.linear_flow()[0]
        precision = np.zeros_like(matrix)
        precision[:4, :4], precision[4:, 4:] = case.precision(1), case.precision(2)
        largest = np.linalg.eigvals(np.linalg.solve(precision, matrix)).real.max()
        if abs(largest - 2) < 0.01:
            continue  # 10 000 iterations may not suffice.
        found = equilibrium(case.problem, method="fixed_point", throw=False)
        assert found.ok == (largest < 2)
        if found.ok:
            assert np.all(norms(case, found.activities) <= 1e-6 + 1e3 * EPS)
        else:
            assert found.status in (LIMIT, EquilibriumStatus.NON_FINITE)
        seen.add(found.ok)
    assert seen == {True, False}


@pytest.mark.parametrize(
    "method",
    [ConjugateGradients(), GaussNewton(), ErrorDescent(), PseudoTransient(), FixedPoint(),
     FlowToRest()],
    ids=lambda method: method.name,
)  # fmt: skip
def test_an_overflow_is_non_finite(method: Solver) -> None:
    """exp(800) at the start of sample 1; sample 0 rests at x_1 = 1, as T = exp(1)."""
    layers = [Dense(np.eye(1)), Dense(np.eye(1), None, Activation("exp", jnp.exp))]
    problem = InferenceProblem(Network(layers), input=np.ones((2, 1)), output=np.full((2, 1), np.e))
    start = np.array([[1.0], [800.0]])
    found = equilibrium(problem, method=method, initial=(start,), throw=False)
    assert found.status == (CONVERGED, EquilibriumStatus.NON_FINITE)
    np.testing.assert_allclose(found.activities[1][0], 1.0, rtol=1e-14)


@pytest.mark.parametrize("method", [GaussNewton(), PseudoTransient()], ids=lambda m: m.name)
def test_unreachable_targets_are_not_reached(method: Solver) -> None:
    """Input free and T = ±2 beyond the range of tanh: never converged where NumPy sees a slope."""
    case = build_case(seed=3, widths=(3, 3, 3), clamp="output", activations=("tanh",), batch=4)
    beyond = 2 * np.sign(case.activities[-1])
    case = case.replace(activities=(*case.activities[:-1], beyond))
    exists = np.asarray(target_propagation(case.problem).exists)
    assert not np.any(exists)
    found = equilibrium(
        case.problem, method=method, initial=case.state, tolerance=1e-6, throw=False
    )
    ours = norms(case, found.activities)
    assert np.all(np.isfinite(ours))
    np.testing.assert_allclose(found.residual_norms, ours, rtol=1e-6, atol=1e4 * EPS)
    resting = np.all(ours <= 1e-6, axis=-1)
    assert np.array_equal(np.asarray(found.status_codes) == CONVERGED, resting)
    # ½ (2 − 1)² at least of each output stays.
    assert np.all(found.free_energy >= 3 * 0.5 * 0.99)


SINGULAR = {
    "zero weights": lambda: build_case(seed=1, widths=(3, 4, 2), activations=("tanh",)).replace(
        weights=(np.ones((4, 3)), np.zeros((2, 4)))
    ),
    "zero weights, input free": lambda: build_case(
        seed=1, widths=(3, 4, 2), activations=("tanh",), clamp="output"
    ).replace(weights=(np.ones((4, 3)), np.zeros((2, 4)))),
    "wide input free": lambda: build_case(
        seed=1, widths=(3, 2, 2), activations=("tanh",), clamp="output"
    ),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_gauss_newton_matrices_are_damped(name: str) -> None:
    """H has a null space, but F a minimum: a stationary point of it is found."""
    case = SINGULAR[name]()
    found = equilibrium(case.problem, method="gauss_newton", initial=case.state, throw=False)
    assert found.status is CONVERGED
    assert np.all(norms(case, found.activities) <= 1e-6 + 1e3 * EPS)


def test_a_singular_linear_network_has_no_closed_form() -> None:
    """With a wide free input nothing finite is claimed; other solvers end somewhere flat."""
    case = build_case(seed=0, widths=(3, 2, 2), clamp="output")
    found = equilibrium(case.problem, initial=case.state, throw=False)
    assert found.status is EquilibriumStatus.NON_FINITE
    with pytest.raises(NotConvergedError, match="NON_FINITE"):
        equilibrium(case.problem, initial=case.state)
    other = equilibrium(case.problem, method="pseudo_transient", initial=case.state)
    assert other.status is CONVERGED
    assert np.all(norms(case, other.activities) <= 1e-6 + 1e3 * EPS)


def test_a_tolerance_below_round_off_is_not_claimed() -> None:
    """1e-300 is met by a residual of exactly zero only."""
    found = equilibrium(TANH.problem, method="gauss_newton", tolerance=1e-300, throw=False)
    assert found.ok == (np.max(found.residual_norms) == 0)
    assert np.all(norms(TANH, found.activities) < 1e-8)


@pytest.mark.parametrize(("seed", "weight"), [(7, 0.7), (37, 100.0), (38, 100.0)])
def test_digits_that_an_energy_loses_do_not_keep_it_from_converging(
    seed: int, weight: float
) -> None:
    """F of a softmax has fewer digits than its gradient, which NumPy computes once more."""
    case = build_case(seed=seed, widths=(3, 4, 4, 2), activations=("tanh",), bias=True, batch=5)
    case = case.replace(
        weights=tuple(0.5 * w for w in case.weights), activations=("tanh", "tanh", "identity")
    )
    labels = np.eye(2)[[0, 1, 1, 0, 1]]
    energy = [Gaussian(), Gaussian(2.0), CrossEntropy(weight)]
    problem = InferenceProblem(case.network, input=case.input, output=labels, energy=energy)
    found = equilibrium(problem, tolerance=1e-12)
    activities = [np.asarray(x) for x in found.activities]
    first, second, logits = (
        x @ w.T + b for w, b, x in zip(case.weights, case.biases, activities[:-1], strict=True)
    )
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    errors = (
        activities[1] - np.tanh(first),
        2 * (activities[2] - np.tanh(second)),
        weight * (labels - probabilities),
    )
    slopes = (
        errors[0] - (errors[1] / np.cosh(second) ** 2) @ case.weights[1],
        errors[1] - errors[2] @ case.weights[2],
    )
    assert max(np.max(np.linalg.norm(s, axis=-1)) for s in slopes) <= 1e-12 + weight * 1e2 * EPS


def test_under_jit_nothing_is_raised() -> None:
    """The status is there instead, also where a value would be refused on the host."""

    def run(dt: Any, start: Any) -> Any:
        method = GradientDescent(dt=0.1, max_iterations=3)
        found = equilibrium(TANH.problem, method=method, initial=(dt * start,))
        return found.status_codes, found.residual_norms

    start = jnp.ones(4)
    status, _ = jax.jit(run)(jnp.asarray(1.0), start)
    assert EquilibriumStatus(int(status)) is LIMIT
    status, residual = jax.jit(run)(jnp.asarray(jnp.nan), start)
    assert EquilibriumStatus(int(status)) is EquilibriumStatus.NON_FINITE
    assert np.all(np.isnan(residual))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rate", [3.0, 20.0])
def test_a_rate_that_is_too_large_is_halved(rate: float, nesterov: bool) -> None:
    """It goes back to where F was lowest, and from there to the equilibrium."""
    case = build_case(seed=0, widths=(5, 5, 5, 5), activations=("tanh",), batch=4)
    found = equilibrium(case.problem, method=ErrorDescent(nesterov=nesterov, rate=rate))
    expected = equilibrium(case.problem, method="pseudo_transient", tolerance=1e-8)
    assert found.ok
    # Two layers' residuals over half the curvature, for it is that between the points that counts.
    bound = 2**0.5 * (1e-6 + 1e-8) / (least_curvature(case.problem, expected.state) / 2)
    assert 0 < bound < 1e-3
    for ours, theirs in zip(found.state, expected.state, strict=True):
        assert np.max(np.linalg.norm(np.asarray(ours) - theirs, axis=-1)) <= bound


@pytest.mark.parametrize("method", ["conjugate_gradients", "gauss_newton", "nesterov"])
def test_an_output_that_nothing_moves_is_solved(method: str) -> None:
    """With zero output weights the Jacobian of the output is zero, and so is its spectrum."""
    case = build_case(seed=1, widths=(4, 4, 4, 2), activations=("tanh",), batch=3)
    case = case.replace(weights=(*case.weights[:-1], np.zeros((2, 4))))
    found = equilibrium(case.problem, method=method, initial="zeros")
    hidden = case.feedforward(case.activities[0])[1:-1]
    assert_close(found.state, hidden, 1e-5)
