"""`pcdyn.equilibrium`: every solver against NumPy, SciPy and what follows from the gradient.

A gradient g at x and a Hessian with the smallest eigenvalue λ between x and the equilibrium put x
within ‖g‖/λ of it: that is where the tolerances come from. A layer blends the identity with tanh,
so that one compiled program serves linear networks, whose equilibrium is a dense solve, and curved
ones, which SciPy follows along the flow.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

import pcdyn
from pcdyn.equilibria.equilibrium import Equilibrium, equilibrium
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
    default_solvers,
)
from pcdyn.errors import EquilibriumStatus
from pcdyn.linearisation.hessian import free_energy_hessian, solve_hessian
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import linear_equilibrium
from tests.networks import CLAMPS, EPS, Case, assert_close, build_case, random_precision

WIDTHS = (4, 5, 5, 3)
BATCH = 4
TOLERANCE = 1e-9
# Sums of fewer than 100 products of numbers of order 1 (assert_close scales with the largest).
ROUND_OFF = 1e3 * EPS

SOLVERS: dict[str, Solver] = {
    "gauss_newton": GaussNewton(),
    "matrix_free": GaussNewton(explicit_width=1),
    "conjugate_gradients": ConjugateGradients(),
    "nesterov": ErrorDescent(),
    "error_descent": ErrorDescent(nesterov=False),
    "pseudo_transient": PseudoTransient(),
    "flow": FlowToRest(),
    "gradient_descent": GradientDescent(dt=0.05),
    "fixed_point": FixedPoint(),
}


class Blend(eqx.Module):
    """(1 − a) z + a tanh(z) with z = W x + b: linear at a = 0, curved at a = 1."""

    weight: Any
    bias: Any
    curved: Any

    def __call__(self, x: Any) -> Any:
        z = self.weight @ x + self.bias
        return (1 - self.curved) * z + self.curved * jnp.tanh(z)


def blended(case: Case) -> InferenceProblem:
    """`case.problem` for identity or tanh, as one program."""
    layers = [
        Blend(jnp.asarray(w), jnp.asarray(b), jnp.asarray(np.float64(name == "tanh")))
        for w, b, name in zip(case.weights, case.biases, case.activations, strict=True)
    ]
    return InferenceProblem(
        Network(layers, input_width=case.widths[0]),
        input=case.input,
        output=case.output,
        energy=Gaussian(case.precisions),
        time_constants=case.time_constants,
    )


def mild_case(
    seed: int,
    activation: str = "tanh",
    *,
    kinds: tuple[str, ...] | None = ("diagonal", "full", "scalar"),
    scale: float = 0.3,
    slow: bool = True,
    **options: Any,
) -> Case:
    """Weights so small that F has one equilibrium and the fixed-point iteration contracts."""
    options = {"widths": WIDTHS, "batch": BATCH, "bias": True, **options}
    case = build_case(seed=seed, activations=(activation,), slow=slow, **options)
    rng = np.random.default_rng(seed + 1000)
    precisions = None
    if kinds is not None:
        # Between e^-½ and e^½: a ratio of e at most.
        precisions = tuple(
            random_precision(rng, n, kind) ** 0.5 if kind != "full" else
            _root(random_precision(rng, n, kind))
            for n, kind in zip(case.widths[1:], kinds, strict=True)
        )  # fmt: skip
    return case.replace(
        weights=tuple(scale * w for w in case.weights), precisions=precisions
    )  # fmt: skip


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    root = (vectors * np.sqrt(values)) @ vectors.T
    return (root + root.T) / 2


def at(case: Case, activities: Any, *, tau: bool = False) -> Case:
    """The case in another state, with unit time constants unless `tau`."""
    constants = case.time_constants if tau else None
    return case.replace(
        activities=tuple(np.asarray(x) for x in activities), time_constants=constants
    )


def everything(case: Case, free: Any) -> tuple[np.ndarray, ...]:
    """All layers from the free ones."""
    layers = dict(zip(case.free, free, strict=True))
    return tuple(layers.get(i, case.activities[i]) for i in range(case.depth + 1))


def gradient(case: Case, activities: Any) -> list[np.ndarray]:
    """∂F/∂x_l of the free layers in NumPy."""
    return [-g for g in at(case, activities).field()]


def norms(case: Case, activities: Any) -> np.ndarray:
    """‖∂F/∂x_l‖ of each free layer."""
    return np.stack([np.linalg.norm(g, axis=-1) for g in gradient(case, activities)], -1)


def numeric_hessian(case: Case, activities: Any) -> np.ndarray:
    """∂²F/∂x² of one sample by five-point differences of the NumPy gradient: within 1e-10."""
    stacked, h = case.stack([np.asarray(activities[i]) for i in case.free]), 1e-3

    def slope(x: np.ndarray) -> np.ndarray:
        return case.stack(gradient(case, everything(case, case.split(x))))

    columns = []
    for unit in h * np.eye(len(stacked)):
        far = slope(stacked - 2 * unit) - slope(stacked + 2 * unit)
        columns.append((8 * (slope(stacked + unit) - slope(stacked - unit)) + far) / (12 * h))
    return np.stack(columns, -1)


def smallest_eigenvalue(case: Case, activities: Any) -> float:
    """λ_min of the Hessian, over the samples."""
    if not case.batched:
        return float(np.linalg.eigvalsh(numeric_hessian(case, activities))[0])
    rows = range(len(case.activities[0]))
    return min(smallest_eigenvalue(case.sample(r), [x[r] for x in activities]) for r in rows)


def rest_of(case: Case) -> tuple[np.ndarray, ...]:
    """The equilibrium: a dense solve, or where SciPy's flow from the feedforward pass ends."""
    if set(case.activations) == {"identity"}:
        matrix, drive, _ = at(case, case.activities).linear_flow()
        drive = np.broadcast_to(drive, case.stack(case.state).shape)
        return everything(case, case.split(np.linalg.solve(matrix, drive.T).T))
    start = case.feedforward(case.activities[0])
    shape = case.stack([start[i] for i in case.free]).shape

    def field(t: float, flat: np.ndarray) -> np.ndarray:
        layers = everything(case, case.split(flat.reshape(shape)))
        return case.stack(at(case, layers).field()).ravel()

    first = case.stack([start[i] for i in case.free]).ravel()
    run = scipy.integrate.solve_ivp(field, (0, 200), first, "DOP853", rtol=1e-12, atol=1e-13)
    return everything(case, case.split(run.y[:, -1].reshape(shape)))


def assert_at_rest(case: Case, found: Equilibrium, tolerance: float) -> None:
    """What is reported as an equilibrium is one, by NumPy."""
    assert found.ok
    assert np.all(np.asarray(found.status_codes) == EquilibriumStatus.CONVERGED)
    ours = norms(case, found.activities)
    # Round-off of a gradient of numbers of order 1, times precisions.
    round_off = ROUND_OFF * max(1.0, *(np.max(np.abs(p)) for p in case.precisions or (1.0,)))
    assert np.all(ours <= tolerance + round_off)
    np.testing.assert_allclose(found.residual_norms, ours, rtol=0, atol=round_off)


def assert_near(case: Case, found: Equilibrium, expected: Any, tolerance: float) -> None:
    """Within ‖g‖/λ_min, where ‖g‖ ≤ √layers · tolerance; twice that for a λ that varies."""
    rate = smallest_eigenvalue(case, expected)
    assert rate > 0.05
    bound = 2 * np.sqrt(len(case.free)) * tolerance / rate + 1e-11
    squares = [np.sum((np.asarray(a) - b) ** 2, -1)
               for a, b in zip(found.activities, expected, strict=True)]  # fmt: skip
    assert np.max(np.sqrt(sum(squares))) <= bound


# --- Where the solvers end ------------------------------------------------------------------------


@functools.cache
def mild(seed: int, activation: str) -> tuple[Case, tuple[np.ndarray, ...]]:
    case = mild_case(seed, activation)
    return case, rest_of(case)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_ends_at_the_equilibrium(name: str) -> None:
    """Of linear and tanh networks with biases, time constants and precisions of every kind.

    The time constants (from 1/e to e) move neither the equilibrium nor what its residual is.
    """
    for activation in ("identity", "tanh"):
        for seed in range(4):
            case, expected = mild(seed, activation)
            found = equilibrium(blended(case), method=SOLVERS[name], tolerance=TOLERANCE)
            assert_at_rest(case, found, TOLERANCE)
            assert_near(case, found, expected, TOLERANCE)
            start = case.feedforward(case.activities[0])
            begun = case.free_energy((*start[:-1], case.activities[-1]))
            assert np.all(found.free_energy <= begun)
            assert np.all(found.iterations > 0)
            assert np.all(found.passes > 0)
            assert found.method.split()[0] == SOLVERS[name].name.split()[0]


def test_an_equilibrium_holds_what_numpy_derives_from_its_activities() -> None:
    """Errors, energies, residuals, losses and state, of a batch."""
    case, _ = mild(1, "tanh")
    found = equilibrium(blended(case), method=GaussNewton(), tolerance=1e-5)
    errors, energies = case.errors(found.activities), case.layer_energies(found.activities)
    assert_close(found.prediction_errors, errors, ROUND_OFF)
    assert_close(found.energies, energies, ROUND_OFF)
    assert_close(found.free_energy, energies.sum(-1), ROUND_OFF)
    assert_close(found.output_loss, energies[:, -1], ROUND_OFF)
    assert_close(found.residual_energy, energies[:, :-1].sum(-1), ROUND_OFF)
    assert_close(found.output_loss + found.residual_energy, found.free_energy, ROUND_OFF)
    assert_close(found.state, [found.activities[i] for i in case.free], 0)
    assert_close(found.start, case.feedforward(case.activities[0])[1:-1], ROUND_OFF)
    assert_close([found.activities[0], found.activities[-1]], [case.input, case.output], 0)
    assert found.residual_norms.shape == (BATCH, 2)
    # A loose tolerance is not overshot by luck alone: it stopped where it was told to.
    assert_at_rest(case, found, 1e-5)
    assert np.max(found.residual_norms) > 1e-12
    assert np.all(found.tolerance == 1e-5)
    assert {type(x) for x in jax.tree.leaves((found.activities, found.energies))} == {np.ndarray}
    assert found.status == (EquilibriumStatus.CONVERGED,) * BATCH
    assert "CONVERGED 4 of 4" in found.message and "gauss_newton" in repr(found)
    assert found.compile_seconds >= 0 and found.run_seconds > 0


@pytest.mark.parametrize(
    ("name", "unit"),
    [("gauss_newton", True), ("gauss_newton", False), ("matrix_free", False), ("nesterov", False),
     ("conjugate_gradients", False), ("fixed_point", False)],
)  # fmt: skip
def test_solvers_that_weigh_errors_take_every_precision(name: str, unit: bool) -> None:
    """Unit, scalar, diagonal and full in hidden layers and at the output, τ = 1: a dense solve."""
    kinds = None if unit else ("full", "scalar", "diagonal")
    case = mild_case(5, "identity", kinds=kinds, slow=False)
    found = equilibrium(blended(case), method=SOLVERS[name], tolerance=TOLERANCE)
    assert_at_rest(case, found, TOLERANCE)
    assert_near(case, found, rest_of(case), TOLERANCE)


@pytest.mark.parametrize("precision", ["unit", "diagonal", "full"])
@pytest.mark.parametrize("via", ["cholesky", "output_space"])
def test_the_closed_form_is_the_dense_solve(precision: str, via: Any) -> None:
    """To round-off times the condition of H, with weights of order 1; it has no iterations."""
    for seed in range(3):
        case = build_case(
            seed=seed, widths=(3, 4, 4, 2), precision=precision, bias=True, batch=3
        )  # fmt: skip
        found = equilibrium(case.problem, method=ClosedForm(via), tolerance=1e-11)
        expected = rest_of(case)
        condition = np.linalg.cond(case.linear_flow()[0])
        assert condition < 1e3
        assert_close(found.activities, expected, 1e-12)
        assert_at_rest(case, found, 1e-11)
        assert found.method == "closed_form"


def test_the_default_of_a_linear_network_is_the_closed_form() -> None:
    """Of others a chain: in error coordinates first, if both ends are clamped, without kinks."""
    linear, curved, kinked = (build_case(seed=0, widths=(2, 3, 2), activations=(name,))
                              for name in ("identity", "tanh", "relu"))  # fmt: skip
    names = {
        clamp: [s.name for s in default_solvers(curved.replace(clamp=clamp).problem)]
        for clamp in CLAMPS
    }
    assert [s.name for s in default_solvers(linear.problem)] == ["closed_form"]
    assert names["both"] == ["conjugate_gradients", "gauss_newton", "pseudo_transient"]
    kinks = [s.name for s in default_solvers(kinked.problem)]
    assert kinks == ["gauss_newton", "pseudo_transient"]
    for clamp in ("input", "output", "none"):
        assert names[clamp] == ["gauss_newton", "pseudo_transient"]
    found = equilibrium(linear.problem)
    assert found.method == "closed_form"
    assert_close(found.activities, rest_of(linear), 1e-12)


def test_the_default_is_chosen_once_for_each_structure() -> None:
    """Other numbers get what is known; activations, energies, ends, shapes and dtypes do not."""

    def problem(seed: int, dtype: Any = jnp.float64, **options: Any) -> pcdyn.InferenceProblem:
        options = {"widths": (2, 3, 2), "activation": "tanh", "ends": ("input", "output"),
                   "batch": 2, "energy": None} | options  # fmt: skip
        network = pcdyn.mlp(options["widths"], activation=options["activation"], dtype=dtype,
                            key=jax.random.key(seed))  # fmt: skip
        data = np.random.default_rng(seed).normal(size=(options["batch"], 2))
        return pcdyn.InferenceProblem(network, energy=options["energy"],
                                      **dict.fromkeys(options["ends"], data))  # fmt: skip

    first = default_solvers(problem(0))
    assert default_solvers(problem(1)) is first
    for options in ({"dtype": jnp.float32}, {"widths": (2, 4, 2)}, {"batch": 3},
                    {"energy": pcdyn.LogCosh()}):  # fmt: skip
        other = default_solvers(problem(0, **options))
        assert other is not first
        assert [each.name for each in other] == [each.name for each in first]
    for options in ({"activation": "relu"}, {"activation": "identity"}, {"ends": ("output",)}):
        other = default_solvers(problem(0, **options))
        assert [each.name for each in other] != [each.name for each in first]
    assert default_solvers(problem(2)) is first


class _WithoutPrecision(pcdyn.LogCosh):
    """An energy that returns an array where a `Precision` is due."""

    def curvature(self, error: Any, target: Any) -> Any:
        return jnp.ones_like(error)


@pytest.mark.unchecked
def test_an_energy_that_cannot_be_chosen_for_is_refused_each_time() -> None:
    network = pcdyn.mlp([2, 3, 2], activation="tanh", key=jax.random.key(0))
    problem = pcdyn.InferenceProblem(network, input=np.ones(2), output=np.ones(2),
                                     energy=_WithoutPrecision())  # fmt: skip
    for _ in range(2):
        with pytest.raises(pcdyn.errors.InputError, match="must be a pcdyn"):
            equilibrium(problem)


# --- Clamps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gauss_newton", "pseudo_transient", "fixed_point"])
def test_without_output_it_is_the_feedforward_pass(name: str) -> None:
    """Theorem 3.1, from a start far away; F = 0 there."""
    case = mild_case(7, "tanh", clamp="input")
    expected = case.feedforward(case.activities[0])
    found = equilibrium(
        blended(case), method=SOLVERS[name], initial=case.state, tolerance=TOLERANCE
    )
    assert_at_rest(case, found, TOLERANCE)
    assert_near(case, found, expected, TOLERANCE)
    # F ≤ ‖g‖² / 2λ near a minimum with F = 0.
    assert np.max(found.free_energy) < 100 * TOLERANCE**2
    if name == "gauss_newton":
        there = equilibrium(blended(case), method=SOLVERS[name], tolerance=TOLERANCE)
        assert np.all(there.iterations == 0)
        assert_close(there.activities, expected, ROUND_OFF)


@pytest.mark.parametrize("name", ["gauss_newton", "pseudo_transient"])
def test_with_the_input_free_it_is_target_propagation(name: str) -> None:
    """t_{l−1} = W_l⁻¹(atanh(t_l) − b_l) by numpy.linalg.solve, where these exist."""
    case = build_case(
        seed=9, widths=(3, 3, 3), clamp="output", activations=("tanh",), bias=True, batch=3
    )
    case = case.replace(biases=tuple(0.3 * b for b in case.biases))
    reachable = case.feedforward(0.5 * case.activities[0])
    case = case.replace(activities=(*case.activities[:-1], reachable[-1]))
    targets = [case.activities[-1]]
    for weight, bias in zip(reversed(case.weights), reversed(case.biases), strict=True):
        targets.insert(0, np.linalg.solve(weight, (np.arctanh(targets[0]) - bias).T).T)
    near = tuple(x + 0.1 * y for x, y in zip(reachable[:-1], case.activities[:-1], strict=True))
    found = equilibrium(case.problem, method=SOLVERS[name], initial=near, tolerance=1e-12)
    assert_at_rest(case, found, 1e-12)
    rate = smallest_eigenvalue(case, targets)
    assert rate > 1e-3
    gaps = [np.linalg.norm(a - t, axis=-1) for a, t in zip(found.activities, targets, strict=True)]
    # Both the residual and the round-off of atanh are divided by the curvature.
    assert np.max(gaps) <= 2 * np.sqrt(2) * (1e-12 + 100 * EPS) / rate
    assert np.max(found.free_energy) < 1e-15


@pytest.mark.parametrize("name", ["gauss_newton", "pseudo_transient"])
def test_with_both_ends_free_nothing_is_left(name: str) -> None:
    """Every direction of x_0 is flat, so that H is singular: some point with F = 0 is reached."""
    case = mild_case(2, "tanh", clamp="none", slow=False)
    found = equilibrium(
        blended(case), method=SOLVERS[name], initial=case.state, tolerance=TOLERANCE
    )
    assert_at_rest(case, found, TOLERANCE)
    expected = case.feedforward(found.activities[0])
    # Given x_0 the others follow with a Hessian whose smallest eigenvalue is that of Π, roughly.
    for ours, theirs in zip(found.activities, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=20 * TOLERANCE)
    assert np.max(found.free_energy) < 400 * TOLERANCE**2


# --- Samples --------------------------------------------------------------------------------------


def test_a_batch_is_a_loop_over_samples() -> None:
    """The same points after as many iterations and passes; single samples have no batch axis."""
    case, _ = mild(3, "tanh")
    together = equilibrium(blended(case), method=GaussNewton(), tolerance=TOLERANCE)
    for row in range(BATCH):
        sample = case.sample(row)
        alone = equilibrium(blended(sample), method=GaussNewton(), tolerance=TOLERANCE)
        assert alone.status is EquilibriumStatus.CONVERGED
        assert [x.shape for x in alone.activities] == [(n,) for n in WIDTHS]
        assert [x.shape for x in alone.start] == [(5,), (5,)]
        assert [x.shape for x in alone.prediction_errors] == [(n,) for n in WIDTHS[1:]]
        assert alone.energies.shape == (3,) and alone.residual_norms.shape == (2,)
        assert alone.free_energy.shape == alone.iterations.shape == alone.passes.shape == ()
        assert alone.iterations == together.iterations[row]
        assert alone.passes == together.passes[row]
        # Both took the same path, round-off apart.
        assert_close([x[row] for x in together.activities], alone.activities, 1e3 * ROUND_OFF)
        assert_at_rest(sample, alone, TOLERANCE)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_that_starts_at_rest_stays_there(name: str) -> None:
    """Sample 2 does; it is not moved, and the others do not know of it."""
    case, expected = mild(2, "tanh")
    problem = blended(case)
    start = [np.array(x) for x in case.feedforward(case.activities[0])[1:-1]]
    free = equilibrium(problem, method=SOLVERS[name], tolerance=1e-6)
    for layer, rest in zip(start, expected[1:-1], strict=True):
        layer[2] = rest[2]
    found = equilibrium(problem, method=SOLVERS[name], initial=tuple(start), tolerance=1e-6)
    assert found.ok
    if name in ("nesterov", "error_descent"):
        assert found.iterations[2] <= 1  # It counts the look that sees the convergence.
    else:
        assert found.iterations[2] == 0
    others = [0, 1, 3]
    for x, rest, before in zip(found.activities, expected, free.activities, strict=True):
        # In error coordinates activities are computed again from the errors.
        np.testing.assert_allclose(x[2], rest[2], rtol=0, atol=ROUND_OFF)
        np.testing.assert_allclose(x[others], before[others], rtol=0, atol=1e3 * ROUND_OFF)
    assert np.array_equal(found.iterations[others], free.iterations[others])


@pytest.mark.parametrize("name", ["conjugate_gradients", "nesterov", "gauss_newton"])
def test_a_target_that_is_predicted_is_at_rest_exactly(name: str) -> None:
    """No gradient at all, not even round-off: nothing is divided by it while others go on."""
    case, _ = mild(3, "tanh")
    problem = blended(case)
    predicted = problem.network.feedforward(problem.input)[-1]
    target = jnp.asarray(problem.output).at[1].set(predicted[1])
    found = equilibrium(problem.with_data(problem.input, target), method=SOLVERS[name])
    assert found.ok
    for x, start in zip(found.state, found.start, strict=True):
        np.testing.assert_array_equal(x[1], start[1])


# --- Solvers in turn ------------------------------------------------------------------------------


def hard_case(seed: int) -> Case:
    """Deep in saturation: weights of twice the usual size and an output precision of 100."""
    case = build_case(seed=seed, widths=(10, 20, 20, 5), batch=8, activations=("tanh",))
    weights = tuple(2 * w for w in case.weights)
    return case.replace(weights=weights, precisions=(1.0, 1.0, 100.0))


def test_the_default_converges_where_it_is_hard() -> None:
    """Each solver works where those before it did not converge; nobody else is named."""
    for seed in range(4):
        case = hard_case(seed)
        found = equilibrium(case.problem)
        assert_at_rest(case, found, 1e-6)
        start = case.feedforward(case.activities[0])
        assert np.all(found.free_energy <= case.free_energy((*start[:-1], case.activities[-1])))
        first = equilibrium(case.problem, method=default_solvers(case.problem)[0], throw=False)
        done = np.asarray(first.status_codes) == EquilibriumStatus.CONVERGED
        named = found.method.split(", ")
        assert named == ["conjugate_gradients", "gauss_newton", "pseudo_transient"][: len(named)]
        assert done.all() == (len(named) == 1)
        for ours, theirs in zip(found.activities, first.activities, strict=True):
            assert np.array_equal(ours[done], theirs[done])
        assert np.array_equal(found.iterations[done], first.iterations[done])
        assert np.all(found.passes[~done] > first.passes[~done])


def test_a_solver_gets_what_those_before_it_left() -> None:
    """Two Gauss–Newton steps suffice for none but the samples that start at rest."""
    case, expected = mild(0, "tanh")
    start = [np.array(x) for x in case.feedforward(case.activities[0])[1:-1]]
    for layer, rest in zip(start, expected[1:-1], strict=True):
        layer[:2] = rest[:2]
    chain = (GaussNewton(max_iterations=2), PseudoTransient(), ErrorDescent())
    begin = {"initial": tuple(start), "tolerance": TOLERANCE}
    first = equilibrium(blended(case), method=chain[0], throw=False, **begin)
    found = equilibrium(blended(case), method=chain, **begin)
    assert first.status == (EquilibriumStatus.CONVERGED,) * 2 + (
        EquilibriumStatus.ITERATION_LIMIT,) * 2  # fmt: skip
    assert found.method == "gauss_newton, pseudo_transient"
    assert_at_rest(case, found, TOLERANCE)
    assert_near(case, found, expected, TOLERANCE)
    assert np.all(found.iterations[:2] == 0) and np.all(found.iterations[2:] > 0)
    second = equilibrium(
        blended(case), method=chain[1], initial=first.state, tolerance=TOLERANCE
    )  # fmt: skip
    # It began where Gauss–Newton stopped, and costs add up.
    assert np.array_equal(found.iterations[2:], second.iterations[2:])
    assert np.array_equal(found.passes[:2], first.passes[:2])
    assert np.array_equal(found.passes[2:], (first.passes + second.passes)[2:])
    assert_close([x[2:] for x in found.activities], [x[2:] for x in second.activities], 0)


def test_solvers_have_names() -> None:
    """By name or by value, the same result."""
    case, _ = mild(1, "tanh")
    for name in ("gauss_newton", "nesterov", "pseudo_transient", "fixed_point", "flow"):
        by_name = equilibrium(blended(case), method=name, tolerance=TOLERANCE)
        by_value = equilibrium(blended(case), method=SOLVERS[name], tolerance=TOLERANCE)
        assert by_name.method.split()[0] == name
        assert_close(by_name.activities, by_value.activities, 0)


# --- Compilation, precision -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_compiles_again_for_new_numbers(name: str, compilations: list[str]) -> None:
    """New data, weights, precisions, time constants, tolerance, step and start."""
    case = mild(0, "tanh")[0]
    equilibrium(blended(case), method=SOLVERS[name], initial=case.state, tolerance=1e-6)
    other = mild(3, "identity")[0]
    problem, start, solver = blended(other), other.state, SOLVERS[name]
    if isinstance(solver, GradientDescent):
        solver = GradientDescent(dt=0.04)
    if isinstance(solver, FlowToRest):
        solver = FlowToRest(t1=300.0)
    compilations.clear()
    again = equilibrium(problem, method=solver, initial=start, tolerance=1e-8)
    assert compilations == []
    assert again.ok


def test_float32_stays_float32() -> None:
    """The default tolerance of 1e-4 is reached, in float64 NumPy as well."""
    case = mild_case(4, "tanh", kinds=None, slow=False)
    pairs = zip(case.weights, case.biases, strict=True)
    layers = [Dense(w.astype(np.float32), b.astype(np.float32), "tanh") for w, b in pairs]
    data = [x.astype(np.float32) for x in (case.input, case.output)]
    problem = InferenceProblem(Network(layers), input=data[0], output=data[1])
    found = equilibrium(problem)
    single = case.replace(
        weights=tuple(np.asarray(layer.weight, float) for layer in layers),
        biases=tuple(np.asarray(layer.bias, float) for layer in layers),
    )
    assert found.ok and np.all(found.tolerance <= np.float32(1e-4))
    assert {x.dtype for x in (*found.activities, found.energies)} == {np.dtype(np.float32)}
    # Fewer than 100 products of numbers of order 1 in float32.
    noise = 100 * float(np.finfo(np.float32).eps)
    ours = norms(single, [np.asarray(x, float) for x in found.activities])
    assert np.all(ours <= 1e-4 + noise)
    np.testing.assert_allclose(found.residual_norms, ours, rtol=0, atol=noise)


# --- The Hessian ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", CLAMPS)
def test_the_hessian_is_the_derivative_of_the_gradient(clamp: str) -> None:
    """Five-point differences of the NumPy gradient at a random state; products are its products."""
    case = build_case(
        seed=6, widths=(2, 3, 2, 2), clamp=clamp, precision="mixed", bias=True,
        activations=("tanh", "softplus", "sigmoid"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    vector = case.split(rng.normal(size=sum(case.widths[i] for i in case.free)))

    @eqx.filter_jit
    def hessian(problem: InferenceProblem, state: Any, vector: Any) -> Any:
        matrix = free_energy_hessian(problem, state)
        return matrix.dense(), matrix.times(vector)

    found, product = hessian(case.problem, case.state, tuple(jnp.asarray(v) for v in vector))
    expected = numeric_hessian(case, case.activities)
    # h⁴/30 times a fifth derivative, and EPS/h.
    assert_close(found, expected, 1e-10)
    assert_close(product, case.split(expected @ case.stack(vector)), 1e-9)
    # Not Gauss–Newton's: predictions are curved.
    jacobian_free = case.replace(activations=("identity",) * 3)
    assert np.max(np.abs(found - numeric_hessian(jacobian_free, case.activities))) > 0.1


def test_a_hessian_that_is_not_positive_definite_solves_nothing() -> None:
    """1-1-1 with tanh, x_1 = 1 and T = −9: F'' < 0 there gives NaN; where F'' > 0, a quotient."""
    case = Case(
        weights=(np.eye(1), np.eye(1)), biases=(None, None), activations=("identity", "tanh"),
        precisions=None, clamp="both", time_constants=None,
        activities=(np.zeros((2, 1)), np.array([[1.0], [0.1]]), np.array([[-9.0], [0.0]])),
    )  # fmt: skip
    rates = [numeric_hessian(case.sample(r), case.sample(r).activities)[0, 0] for r in (0, 1)]
    assert rates[0] < -1 and rates[1] > 0.5
    solved = eqx.filter_jit(solve_hessian)(case.problem, case.state, (jnp.ones((2, 1)),))[0]
    assert np.isnan(solved[0, 0])
    np.testing.assert_allclose(solved[1, 0], 1 / rates[1], rtol=1e-9)


# --- Derivatives ----------------------------------------------------------------------------------

SMALL = (2, 3, 3, 2)
# Newton steps converge quadratically: far below the tolerance where they pass it.
NEWTON = PseudoTransient(cg_tolerance=1e-8)
Parameters = dict[str, tuple[np.ndarray, ...]]


def parameters(case: Case) -> Parameters:
    """Everything that an equilibrium depends on."""
    return {
        "weights": case.weights,
        "biases": case.biases,
        "precisions": case.precisions,
        "data": (case.activities[0], case.activities[-1]),
    }


def with_parameters(case: Case, values: Parameters) -> Case:
    data = values["data"]
    return case.replace(
        weights=values["weights"], biases=values["biases"], precisions=values["precisions"],
        activities=(data[0], *case.activities[1:-1], data[1]),
    )  # fmt: skip


def of_problem(problem: InferenceProblem) -> dict[str, tuple[Any, ...]]:
    """The same of a problem, or of a derivative with respect to one."""
    return {
        "weights": tuple(layer.weight for layer in problem.network.layers),
        "biases": tuple(layer.bias for layer in problem.network.layers),
        "precisions": tuple(energy.precision for energy in problem.energy),
        "data": (problem.input, problem.output),
    }


def polished(case: Case, start: np.ndarray) -> np.ndarray:
    """The equilibrium of one sample near `start`, by SciPy's root of the NumPy gradient."""

    def slope(x: np.ndarray) -> np.ndarray:
        return case.stack(gradient(case, everything(case, case.split(x))))

    x = scipy.optimize.root(slope, start, tol=1e-13).x
    matrix = numeric_hessian(case, everything(case, case.split(x)))
    for _ in range(3):
        x = x - np.linalg.solve(matrix, slope(x))
    assert np.linalg.norm(slope(x)) < 1e-14
    return x


def derivative_case(activation: str) -> Case:
    """One sample with precisions of every kind; well conditioned."""
    return mild_case(
        8, activation, widths=SMALL, batch=None, scale=0.6, slow=False,
        kinds=("diagonal", "full", "full"),
    )  # fmt: skip


def direction(case: Case, part: str, seed: int = 0) -> Parameters:
    """A random change of one of the parameters; that of a matrix precision is symmetric."""
    rng = np.random.default_rng(seed)
    change = {}
    for name, arrays in parameters(case).items():
        size = 1.0 if name == part else 0.0
        moves = [size * rng.normal(size=np.shape(x)) for x in arrays]
        if name == "precisions":
            moves = [m + m.T if m.ndim == 2 else m for m in moves]
        change[name] = tuple(moves)
    return change


def moved(case: Case, change: Parameters, h: float) -> Case:
    new = {name: tuple(x + h * d for x, d in zip(arrays, change[name], strict=True))
           for name, arrays in parameters(case).items()}  # fmt: skip
    return with_parameters(case, new)


def slope_along(case: Case, change: Parameters) -> np.ndarray:
    """dx*/dh of the stacked free layers by five-point differences of SciPy's roots.

    They carry h⁴/30 times a fifth derivative, and 1e-14/λ/h: 1e-11 each.
    """
    free = [equilibrium_of(case)[i] for i in case.free]
    start, h = case.stack(free), 2e-3
    x = {k: polished(moved(case, change, k * h), start) for k in (-2, -1, 1, 2)}
    return (8 * (x[1] - x[-1]) - (x[2] - x[-2])) / (12 * h)


@functools.cache
def _rest(activation: str) -> tuple[np.ndarray, ...]:
    return rest_of(derivative_case(activation))


def equilibrium_of(case: Case) -> tuple[np.ndarray, ...]:
    return _rest(case.activations[0])


def weighted_sum(state: Any) -> Any:
    """A scalar function of an equilibrium, curved in it."""
    stacked = jnp.concatenate(state, axis=-1)
    return jnp.sum(jnp.cos(jnp.arange(1.0, stacked.shape[-1] + 1)) * stacked**2)


@functools.cache
def gradients(activation: str) -> dict[str, tuple[Any, ...]]:
    def function(problem: InferenceProblem) -> Any:
        return weighted_sum(equilibrium(problem, method=NEWTON, tolerance=1e-12).state)

    problem = derivative_case(activation).problem
    return of_problem(eqx.filter_jit(eqx.filter_grad(function))(problem))


@pytest.mark.parametrize("part", ["weights", "biases", "precisions", "data"])
def test_gradients_are_those_of_the_implicit_function(part: str) -> None:
    """jax.grad through the equilibrium of a tanh network against differences of SciPy's roots."""
    case = derivative_case("tanh")
    found = gradients("tanh")[part]
    rest = case.stack([equilibrium_of(case)[i] for i in case.free])
    for seed in range(3):
        change = direction(case, part, seed)
        pairs = zip(found, change[part], strict=True)
        ours = sum(float(np.sum(np.asarray(g) * d)) for g, d in pairs)
        outer = 2 * np.cos(np.arange(1, len(rest) + 1)) * rest
        expected = float(outer @ slope_along(case, change))
        assert abs(expected) > 1e-3
        # Errors of slope_along, for changes of norm 10 at most (its fifth power is in h⁴f⁽⁵⁾).
        assert abs(ours - expected) < 1e-7 * max(1.0, abs(expected))


def test_gradients_of_a_linear_network_are_those_of_the_closed_form() -> None:
    """Through the iteration, through `ClosedForm`, and through `linear_equilibrium` itself."""
    problem = derivative_case("identity").problem

    @eqx.filter_jit
    @eqx.filter_grad
    def direct(problem: InferenceProblem) -> Any:
        return weighted_sum(linear_equilibrium(problem)[1:-1])

    @eqx.filter_jit
    @eqx.filter_grad
    def default(problem: InferenceProblem) -> Any:
        return weighted_sum(equilibrium(problem).state)

    expected = of_problem(direct(problem))
    for found in (of_problem(default(problem)), gradients("identity")):
        for part in ("weights", "biases", "data"):
            assert_close(found[part], expected[part], 1e-11)
        for ours, theirs in zip(found["precisions"], expected["precisions"], strict=True):
            # Only symmetric changes of a precision mean anything.
            if ours.ndim == 2:
                ours, theirs = ours + ours.T, theirs + theirs.T
            assert_close(ours, theirs, 1e-11)


def test_tangents_are_those_of_the_implicit_function() -> None:
    """jax.jvp of activities, energies and residuals along a change of everything."""
    case = derivative_case("tanh")
    problem = case.problem
    parts = [direction(case, part) for part in parameters(case)]
    change = {name: tuple(sum(p[name][i] for p in parts) for i in range(len(arrays)))
              for name, arrays in parameters(case).items()}  # fmt: skip
    arrays, static = eqx.partition(problem, eqx.is_inexact_array)

    def function(arrays: Any) -> Any:
        found = equilibrium(eqx.combine(arrays, static), method=NEWTON, tolerance=1e-12)
        return found.state, found.free_energy, found.residual_norms

    leaves = [jnp.asarray(x) for part in change.values() for x in part]
    tangent = eqx.tree_at(lambda p: sum(of_problem(p).values(), ()), arrays, leaves)
    _, found = jax.jit(lambda a, t: jax.jvp(function, (a,), (t,)))(arrays, tangent)
    state, free_energy, residuals = found
    assert_close(case.stack(state), slope_along(case, change), 1e-7)
    h, rest = 1e-4, [equilibrium_of(case)[i] for i in case.free]

    def best(step: float) -> float:
        there = moved(case, change, step)
        layers = there.split(polished(there, case.stack(rest)))
        return float(there.free_energy(everything(there, layers)))

    # h²/6 times a third derivative of order 100.
    np.testing.assert_allclose(free_energy, (best(h) - best(-h)) / (2 * h), rtol=1e-5)
    assert np.all(np.isfinite(residuals))


@pytest.mark.slow
def test_networks_are_mapped_over_under_jit() -> None:
    """jax.vmap over three networks, jitted, is a loop on the host; nothing is raised there."""
    made = [mild(s, "tanh")[0] for s in range(3)]
    problems = [blended(case) for case in made]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)

    @eqx.filter_jit
    def run(problems: InferenceProblem, tolerance: float) -> Equilibrium:
        return eqx.filter_vmap(lambda p: equilibrium(p, method=GaussNewton(), tolerance=tolerance))(
            problems
        )

    together = run(stacked, TOLERANCE)
    assert together.status_codes.shape == (3, BATCH)
    assert np.all(np.asarray(together.status_codes) == EquilibriumStatus.CONVERGED)
    assert together.energies.shape == (3, BATCH, 3) and "of 3 networks" in repr(together)
    for row, (case, problem) in enumerate(zip(made, problems, strict=True)):
        alone = equilibrium(problem, method=GaussNewton(), tolerance=TOLERANCE)
        assert np.all(norms(case, [x[row] for x in together.activities]) <= TOLERANCE + ROUND_OFF)
        assert_close([x[row] for x in together.activities], alone.activities, 1e3 * ROUND_OFF)
        assert_close(together.energies[row], alone.energies, 1e3 * ROUND_OFF)
        assert np.array_equal(together.iterations[row], alone.iterations)
    beyond = run(stacked, 1e-30)
    assert not np.any(np.asarray(beyond.status_codes) == EquilibriumStatus.CONVERGED)


# --- Basins ---------------------------------------------------------------------------------------


def test_a_lone_equilibrium_is_the_end_of_the_flow() -> None:
    """From the start and from around it, every sample; `displacement` is the way there."""
    case, expected = mild(3, "tanh")
    found = equilibrium(blended(case), method=GaussNewton(), tolerance=1e-6)
    start = case.feedforward(case.activities[0])
    way = np.sqrt(sum(np.sum((a - b) ** 2, -1) for a, b in zip(start[1:3], expected[1:3],
                                                               strict=True)))  # fmt: skip
    plain = found.basin()
    shaken = found.basin(perturbation=0.1, key=jr.key(3))
    for basin in (plain, shaken):
        assert np.all(basin.agrees) and np.all(basin.settled)
        assert basin.agrees.shape == basin.distance.shape == (BATCH,)
        np.testing.assert_allclose(basin.displacement, way, rtol=1e-5)
        assert np.all(basin.distance <= 4 * np.sqrt(2) * 1e-6 / smallest_eigenvalue(case, expected))
        assert_at_rest(case, basin.rest, 1e-6)
    assert_close(plain.rest.start, found.start, 0)
    noise = np.concatenate([np.ravel(a - b) for a, b in zip(shaken.rest.start, found.start,
                                                            strict=True)])  # fmt: skip
    # 40 normal numbers: five standard errors of the standard deviation are 0.56 of it.
    assert 0.04 < np.std(noise) < 0.16
    assert not np.array_equal(found.basin(perturbation=0.1, key=jr.key(4)).rest.start[0],
                              shaken.rest.start[0])  # fmt: skip


def two_wells() -> Case:
    """1-1-1 with the prediction tanh(8 x_1 − 20) of T = 4, Π_2 = 10: one well near the start at 0,

    the other near x_1 = 2.5 where the tanh rises.
    """
    return Case(
        weights=(np.eye(1), 8 * np.eye(1)), biases=(None, np.array([-20.0])),
        activations=("identity", "tanh"), precisions=(1.0, 10.0), clamp="both",
        time_constants=None,
        activities=(np.zeros((2, 1)), np.array([[0.0], [2.6]]), np.full((2, 1), 4.0)),
    )  # fmt: skip


def test_another_well_than_that_of_the_flow_is_told() -> None:
    """Two starts, two wells (SciPy's minima of the scalar F); then the starts are exchanged."""
    case = two_wells()
    sample = case.sample(0)

    def energy(x: float) -> float:
        return float(sample.free_energy((sample.input, np.array([x]), sample.output)))

    wells = [
        scipy.optimize.minimize_scalar(energy, bounds=b, method="bounded",
                                       options={"xatol": 1e-10}).x
        for b in ((-1.0, 1.0), (2.4, 4.0))
    ]  # fmt: skip
    found = equilibrium(
        case.problem, method=FlowToRest(), initial=(case.activities[1],), tolerance=1e-8
    )
    # A minimum is seen by F to the root of its round-off only.
    np.testing.assert_allclose(found.activities[1][:, 0], wells, rtol=0, atol=1e-6)
    assert np.all(found.basin().agrees)
    assert found.basin().agrees.shape == (2,)
    exchanged = dataclasses.replace(found, start=(case.activities[1][::-1].copy(),))
    basin = exchanged.basin()
    assert not np.any(basin.agrees) and np.all(basin.settled)
    np.testing.assert_allclose(basin.distance, abs(wells[1] - wells[0]), rtol=1e-5)
    half = dataclasses.replace(found, start=(np.full((2, 1), 2.6),))
    assert half.basin().agrees.tolist() == [False, True]
    # Where x_1 = 0 the slope of the tanh is 1e-17.
    assert found.basin(flow=FlowToRest(t1=1e-3)).settled.tolist() == [True, False]


@pytest.mark.slow
def test_gauss_newton_jumps_and_the_basin_tells() -> None:
    """Twenty wide with weights of standard deviation 1: the verdict is that of SciPy's flow.

    It is asked of two samples of each verdict.
    """
    case = build_case(seed=2, widths=(20, 20, 20, 20), batch=8, activations=("tanh",))
    case = case.replace(weights=tuple(np.sqrt(20) * w for w in case.weights))
    found = equilibrium(case.problem, method="gauss_newton", throw=False)
    basin = found.basin()
    assert np.all(basin.settled)
    rows = np.sort([*np.flatnonzero(basin.agrees)[:2], *np.flatnonzero(~basin.agrees)[:2]])
    ends = []
    for row in rows:
        sample = case.sample(row)
        start = sample.feedforward(sample.activities[0])

        def field(t: float, x: np.ndarray, sample: Case = sample) -> np.ndarray:
            return sample.stack(at(sample, everything(sample, sample.split(x))).field())

        first = np.concatenate(start[1:-1])
        run = scipy.integrate.solve_ivp(field, (0, 500), first, "LSODA", rtol=1e-7, atol=1e-9)
        ends.append(run.y[:, -1])
    distance = np.linalg.norm(case.stack(found.state)[rows] - ends, axis=-1)
    # Equilibria are isolated: either the same to the tolerances, or far apart.
    assert np.array_equal(basin.agrees[rows], distance < 0.01)
    assert not np.any((distance > 1e-3) & (distance < 0.1))
    assert np.any(~basin.agrees) and np.any(basin.agrees)
    np.testing.assert_allclose(basin.distance[rows], distance, rtol=0.01, atol=1e-3)
