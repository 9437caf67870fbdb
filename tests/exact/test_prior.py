"""A prior on a free input: F, flow, closed forms, files and derivatives against plain NumPy.

The oracle is F written again as a sum of prediction errors, of which the first is x_0 − m, for
numbers that may be complex: its gradient is a complex step and exact to round-off.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats

import pcdyn
from pcdyn.errors import InputError, PrecisionError, ShapeError
from pcdyn.learning import variational_free_energy

EPS = float(np.finfo(float).eps)
# Sums of fewer than 100 products of numbers of order 1 … 10.
ROUND_OFF = 1e3 * EPS
WIDTHS, BATCH = (3, 4, 2), 2
_RNG = np.random.default_rng(0)
WEIGHTS = [_RNG.normal(size=(n, m)) / m**0.5 for m, n in itertools.pairwise(WIDTHS)]
BIASES = [_RNG.normal(size=n) / 4 for n in WIDTHS[1:]]
MEAN = _RNG.normal(size=3)
_ROTATION = np.linalg.qr(_RNG.normal(size=(3, 3)))[0]
# Full, diagonal and a number: Π_0, Π_1, Π_2.
PRECISIONS = [(_ROTATION * [0.5, 1.0, 2.0]) @ _ROTATION.T, np.array([0.7, 1.0, 1.3, 1.6]), 2.0]
TARGET = _RNG.normal(size=(BATCH, 2)) / 2


def problem_of(activation: str = "tanh", energy: Any = None, **options: Any) -> Any:
    layers = [pcdyn.Dense(w, b, activation) for w, b in zip(WEIGHTS, BIASES, strict=True)]
    energy = pcdyn.Gaussian(PRECISIONS[0]) if energy is None else energy
    given = {"output": TARGET, "prior": pcdyn.Prior(MEAN, energy)} | options
    return pcdyn.InferenceProblem(
        pcdyn.Network(layers), energy=pcdyn.Gaussian(PRECISIONS[1:]), **given
    )


def errors_of(state: Any, f: Any = np.tanh, target: Any = TARGET) -> list[np.ndarray]:
    """ε_0 = x_0 − m, ε_1, ε_2 of a state (x_0, x_1)."""
    activities = [*state, target]
    errors = [activities[0] - MEAN]
    for weight, bias, below, here in zip(WEIGHTS, BIASES, activities, activities[1:], strict=False):
        errors.append(here - f(below @ weight.T + bias))
    return errors


def energies_of(state: Any, f: Any = np.tanh) -> np.ndarray:
    """E_0 … E_2 of each sample."""
    matrices = [np.diag(np.broadcast_to(p, (n,))) if np.ndim(p) < 2 else np.asarray(p)
                for p, n in zip(PRECISIONS, WIDTHS, strict=True)]  # fmt: skip
    pairs = zip(errors_of(state, f), matrices, strict=True)
    return np.stack([0.5 * np.einsum("bi,ij,bj->b", e, p, e) for e, p in pairs], axis=-1)


def gradient_of(state: Any, energies: Any = energies_of, f: Any = np.tanh) -> list[np.ndarray]:
    """∂F/∂x_l by complex steps: no difference is taken, so that it is exact to round-off."""
    slopes = []
    for layer, values in enumerate(state):
        slope = np.zeros_like(values)
        for unit in range(values.shape[-1]):
            moved = [x.astype(complex) for x in state]
            moved[layer][:, unit] += 1e-30j
            slope[:, unit] = energies(moved, f).sum(-1).imag / 1e-30
        slopes.append(slope)
    return slopes


def some_state() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(BATCH, n)) for n in WIDTHS[:-1]]


def linear_map() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, c and Π of the stacked errors A y + c of both samples of the linear network."""

    def stacked(y: np.ndarray) -> np.ndarray:
        rows = np.broadcast_to(y, (BATCH, 7))
        return np.concatenate(errors_of([rows[:, :3], rows[:, 3:]], lambda z: z), axis=-1)

    constant = stacked(np.zeros(7))
    matrix = np.stack([(stacked(unit) - constant)[0] for unit in np.eye(7)], axis=-1)
    blocks = [np.diag(np.broadcast_to(p, (n,))) if np.ndim(p) < 2 else p
              for p, n in zip(PRECISIONS, WIDTHS, strict=True)]  # fmt: skip
    return matrix, constant, np.asarray(scipy.linalg.block_diag(*blocks))


def assert_equal(found: Any, expected: Any, tolerance: float = ROUND_OFF) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_free_energy_and_flow_are_those_of_the_formula() -> None:
    problem, state = problem_of(), some_state()
    assert problem.free_layers == (0, 1) and problem.predicted_layers == (0, 1, 2)
    start = problem.initial_state(state)
    errors, energies = problem.observe(0.0, start)
    assert_equal(errors, errors_of(state))
    np.testing.assert_allclose(energies, energies_of(state), rtol=ROUND_OFF)
    np.testing.assert_allclose(problem.free_energy(start), energies_of(state).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(problem.output_loss(start), energies_of(state)[:, -1], rtol=1e-12)
    assert_equal(problem.vector_field(0.0, start), [-g for g in gradient_of(state)])


def test_the_prior_as_a_layer_is_the_same_problem() -> None:
    problem = problem_of()
    start = problem.initial_state(some_state())
    other = problem.with_prior_as_layer()
    assert other.both_ends_clamped and other.prior is None
    assert_equal(other.observe(0.0, start)[0], problem.observe(0.0, start)[0])
    assert_equal(other.gradient(start), problem.gradient(start))
    assert other.with_prior_as_layer() is other


def test_without_a_prior_nothing_is_added() -> None:
    problem = problem_of(prior=None)
    assert problem.predicted_layers == (1, 2) and problem.with_prior_as_layer() is problem
    found = problem.layer_energies(problem.initial_state(some_state()))
    np.testing.assert_allclose(found, energies_of(some_state())[:, 1:], rtol=1e-12)


def test_another_energy_of_the_prior() -> None:
    def energies(state: Any, f: Any) -> np.ndarray:
        first = np.log(np.cosh(errors_of(state, f)[0])).sum(-1, keepdims=True)
        return np.concatenate([first, energies_of(state, f)[:, 1:]], axis=-1)

    problem, state = problem_of(energy=pcdyn.LogCosh()), some_state()
    start = problem.initial_state(state)
    np.testing.assert_allclose(problem.layer_energies(start), energies(state, np.tanh), rtol=1e-12)
    assert_equal(problem.gradient(start), gradient_of(state, energies))


def test_closed_forms_of_a_linear_network() -> None:
    problem = problem_of("identity")
    matrix, constant, precision = linear_map()
    hessian = matrix.T @ precision @ matrix
    np.testing.assert_allclose(
        pcdyn.linear.hessian(problem).dense(), hessian, rtol=ROUND_OFF, atol=ROUND_OFF
    )
    rates = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(pcdyn.linear.spectrum(problem), rates, rtol=1e-11)
    rest = -np.linalg.solve(hessian, matrix.T @ precision @ constant.T).T
    # Round-off of a solve is multiplied by the condition number, here about 40.
    for method in ("cholesky", "output_space"):
        found = pcdyn.linear_equilibrium(problem, method=method)
        assert_equal(found, [rest[:, :3], rest[:, 3:], TARGET], 100 * ROUND_OFF)
    start = some_state()
    flow = pcdyn.linear.exact_flow(problem, problem.initial_state(start))
    y = np.concatenate(start, axis=-1)
    moved = rest + (y - rest) @ scipy.linalg.expm(-0.7 * hessian)
    np.testing.assert_allclose(np.concatenate(flow(0.7), -1), moved, rtol=1e-11, atol=1e-11)


def test_the_likelihood_is_that_of_the_marginal_gaussian() -> None:
    problem = problem_of("identity")
    mean, covariance = MEAN, np.linalg.inv(PRECISIONS[0])
    for weight, bias, precision in zip(WEIGHTS, BIASES, PRECISIONS[1:], strict=True):
        mean = weight @ mean + bias
        covariance = weight @ covariance @ weight.T
        covariance = covariance + np.diag(1 / np.broadcast_to(precision, (len(weight),)))
    expected = -scipy.stats.multivariate_normal(mean, covariance).logpdf(TARGET)
    found = pcdyn.linear.negative_log_likelihood(problem)
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    np.testing.assert_allclose(pcdyn.linear.output_covariance(problem), covariance, rtol=1e-11)
    rest = problem.state_of(pcdyn.linear_equilibrium(problem))
    np.testing.assert_allclose(variational_free_energy(problem, rest), expected, rtol=1e-11)


SOLVERS = (
    None,
    pytest.param("closed_form", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.slow) for name in
      ("conjugate_gradients", "gauss_newton", "nesterov", "pseudo_transient", "flow")),
    pytest.param(pcdyn.solvers.GradientDescent(dt=0.1), marks=pytest.mark.slow),
)  # fmt: skip


@pytest.mark.parametrize("method", SOLVERS)
def test_every_solver_ends_where_the_gradient_vanishes(method: Any) -> None:
    name = "identity" if method == "closed_form" else "tanh"
    found = pcdyn.equilibrium(problem_of(name), method=method, tolerance=1e-7)
    f = {"identity": lambda z: z, "tanh": np.tanh}[name]
    state = [np.asarray(x) for x in found.state]
    assert max(np.linalg.norm(g, axis=-1).max() for g in gradient_of(state, f=f)) <= 1e-7 + 1e-12
    np.testing.assert_allclose(found.energies, energies_of(state, f), rtol=1e-11, atol=1e-15)
    assert [x.shape[-1] for x in found.prediction_errors] == list(WIDTHS)


@pytest.mark.slow
def test_the_fixed_point_of_a_weak_network_is_its_equilibrium() -> None:
    # With the weights divided by 4 every eigenvalue of Π⁻¹H is below 2, where it converges.
    problem = problem_of()
    network = jax.tree.map(lambda x: x / 4, problem.network)
    weak = pcdyn.InferenceProblem(
        network, output=TARGET, energy=problem.energy, prior=problem.prior
    )
    ends = [pcdyn.equilibrium(weak, method=m, tolerance=1e-9) for m in ("fixed_point", None)]
    assert_equal(ends[0].activities, ends[1].activities, 1e-8)


INTEGRATORS = (
    pcdyn.Diffrax(rtol=1e-9, atol=1e-11),
    *(pytest.param(each, marks=pytest.mark.slow) for each in (
        pcdyn.SciPy("LSODA", rtol=1e-9, atol=1e-11),
        pcdyn.SciPy("Radau", rtol=1e-9, atol=1e-11),
        pcdyn.Diffrax("kvaerno5", rtol=1e-9, atol=1e-11),
        pcdyn.integrators.get_integrator("rodas5p"),
        pcdyn.Euler(dt=1e-4),
    )),
)  # fmt: skip


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_every_integrator_follows_the_flow(integrator: Any) -> None:
    def field(_: float, y: np.ndarray) -> np.ndarray:
        rows = y.reshape(BATCH, 7)
        return -np.concatenate(gradient_of([rows[:, :3], rows[:, 3:]]), axis=-1).ravel()

    start = some_state()
    run = scipy.integrate.solve_ivp(
        field, (0, 1), np.concatenate(start, -1).ravel(), rtol=1e-10, atol=1e-12
    )
    expected = run.y[:, -1].reshape(BATCH, 7)
    found = pcdyn.simulate(problem_of(), t1=1.0, initial=start, integrator=integrator)
    # Euler's error is the largest, of the order of its step.
    tolerance = 1e-3 if isinstance(integrator, pcdyn.Euler) else 1e-4
    tight = 1e-7 if "1e-09" in str(integrator) else tolerance
    ends = np.concatenate(found.final[:2], axis=-1)
    np.testing.assert_allclose(ends, expected, rtol=tight, atol=tight)
    last = [np.asarray(x) for x in found.final[:2]]
    np.testing.assert_allclose(found.energies[-1], energies_of(last), rtol=1e-10)
    assert np.all(np.diff(found.free_energy, axis=0) <= 1e-12)


@pytest.mark.slow
def test_the_exact_integrator_and_the_default_start() -> None:
    problem = problem_of("identity")
    found = pcdyn.simulate(problem, t1=200.0, integrator=pcdyn.Exact(), times=[0.0, 200.0])
    # The feedforward pass starts from the prior's mean.
    assert_equal([found.activities[0][0, 0]], [MEAN])
    assert_equal(found.final, pcdyn.linear_equilibrium(problem), 1e-10)


@pytest.mark.parametrize("free_output", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deep_networks_in_runs_of_layers(free_output: bool) -> None:
    rng = np.random.default_rng(2)
    weights = [rng.normal(size=(2, 2)) / 2 for _ in range(20)]
    network = pcdyn.Network([pcdyn.Dense(w, activation="tanh") for w in weights])
    prior = pcdyn.Prior(0.5, pcdyn.Gaussian(3.0))
    output = None if free_output else rng.normal(size=(3, 2))
    problem = pcdyn.InferenceProblem(network, output=output, prior=prior)
    start = [rng.normal(size=(3, 2)) for _ in problem.free_layers]
    found = pcdyn.simulate(problem, t1=0.1, initial=start, integrator=pcdyn.Euler(dt=0.1))
    activities = [*start, *([] if free_output else [output])]
    errors = [activities[0] - 0.5]
    for w, below, here in zip(weights, activities, activities[1:], strict=False):
        errors.append(here - np.tanh(below @ w.T))
    np.testing.assert_allclose(
        found.energies[0], np.stack([0.5 * p * (e**2).sum(-1) for e, p in
                                     zip(errors, [3.0, *[1.0] * 20], strict=True)], -1),
        rtol=1e-11, atol=1e-14,
    )  # fmt: skip
    # One Euler step of layer 0: its own error, and that of the layer above.
    slope = 1 - np.tanh(activities[0] @ weights[0].T) ** 2
    moved = start[0] + 0.1 * (-3.0 * errors[0] + (errors[1] * slope) @ weights[0])
    np.testing.assert_allclose(found.final[0], moved, rtol=1e-11)


def test_with_a_free_output_inference_is_the_pass_from_the_mean() -> None:
    """Theorem 3.1, for the prediction m of layer 0."""
    problem = problem_of(output=None)
    found = pcdyn.equilibrium(problem, initial="zeros", tolerance=1e-9)
    expected = [MEAN]
    for weight, bias in zip(WEIGHTS, BIASES, strict=True):
        expected.append(np.tanh(weight @ expected[-1] + bias))
    # The tolerance over the smallest eigenvalue of H, about 1/10.
    assert_equal(found.activities, expected, 1e-7)
    assert_equal(problem.feedforward_state(), expected)


def test_a_sharp_prior_is_a_clamp() -> None:
    """The distance falls like 1/Π_0."""
    layers = problem_of("identity").network
    clamped = pcdyn.InferenceProblem(
        layers,
        input=np.tile(MEAN, (BATCH, 1)),
        output=TARGET,
        energy=pcdyn.Gaussian(PRECISIONS[1:]),
    )
    expected = pcdyn.linear_equilibrium(clamped)
    distances = []
    for precision in (1e4, 1e6):
        found = pcdyn.linear_equilibrium(problem_of("identity", pcdyn.Gaussian(precision)))
        distances.append(max(float(jnp.max(jnp.abs(a - b))) for a, b in
                             zip(found, expected, strict=True)))  # fmt: skip
    # To first order in 1/Π_0: the next one is smaller by a factor of 1e4.
    assert distances[1] == pytest.approx(distances[0] / 100, rel=1e-2)


def test_stability_has_the_hessian_of_the_formula() -> None:
    problem, state = problem_of(), some_state()
    found = pcdyn.stability(problem, at=state)
    matrices = np.zeros((BATCH, 7, 7))
    flat = np.concatenate(state, axis=-1)
    for unit in range(7):
        sides = []
        for sign in (1, -1):
            moved = flat.copy()
            moved[:, unit] += sign * 1e-5
            sides.append(np.concatenate(gradient_of([moved[:, :3], moved[:, 3:]]), axis=-1))
        matrices[:, :, unit] = (sides[0] - sides[1]) / 2e-5
    # Central differences: 1e-10 of the third derivatives, and round-off over 1e-5.
    np.testing.assert_allclose(found.rates, np.linalg.eigvalsh(matrices), rtol=1e-7, atol=1e-8)


@pytest.mark.slow
def test_derivatives_by_the_prior() -> None:
    """The envelope theorem: ∂F*/∂m = −Π_0 ε_0 and ∂F*/∂Π_0 = ½ ε_0 ε_0ᵀ, and dx*/dm = H⁻¹ Π_0."""
    base = problem_of("identity", output=TARGET[0])

    def solved(mean: Any, precision: Any) -> tuple[Any, Any]:
        problem = pcdyn.InferenceProblem(
            base.network, output=TARGET[0], energy=base.energy,
            prior=pcdyn.Prior(mean, pcdyn.Gaussian(precision)),
        )  # fmt: skip
        found = pcdyn.equilibrium(problem)
        return found.free_energy, found.activities[0]

    inputs = jnp.asarray(MEAN), jnp.asarray(PRECISIONS[0])
    slopes, input = jax.jit(jax.grad(solved, argnums=(0, 1), has_aux=True))(*inputs)
    error = np.asarray(input) - MEAN
    np.testing.assert_allclose(slopes[0], -PRECISIONS[0] @ error, rtol=1e-9)
    np.testing.assert_allclose(slopes[1], 0.5 * np.outer(error, error), rtol=1e-9)
    matrix, _, precision = linear_map()
    inverse = np.linalg.inv(matrix.T @ precision @ matrix)[:3, :3]
    jacobian = jax.jacfwd(lambda m: solved(m, inputs[1])[1])(inputs[0])
    np.testing.assert_allclose(jacobian, inverse @ PRECISIONS[0], rtol=1e-9, atol=1e-12)
    means = jnp.stack([inputs[0], 2 * inputs[0]])
    each = jax.vmap(lambda m: solved(m, inputs[1])[0])(means)
    np.testing.assert_allclose(each[0], solved(*inputs)[0], rtol=1e-12)


@pytest.mark.parametrize(
    "energy", [None, pcdyn.Student(0.5), pcdyn.Gaussian(np.array([2.0, 3.0, 4.0]))]
)
def test_files_hold_the_prior(tmp_path: Path, energy: Any) -> None:
    problem = problem_of(energy=energy)
    pcdyn.save(problem, tmp_path / "problem.nc")
    found = pcdyn.load(tmp_path / "problem.nc")
    assert jax.tree.structure(found) == jax.tree.structure(problem)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(problem), strict=True):
        np.testing.assert_array_equal(a, b)


def test_files_hold_results_with_the_energy_of_layer_0(tmp_path: Path) -> None:
    problem = problem_of()
    trajectory = pcdyn.simulate(problem, t1=1.0, times=[0.5, 1.0], integrator=pcdyn.Euler(dt=0.1))
    labelled = trajectory.to_xarray()
    assert labelled["predicted_layer"].values.tolist() == [0, 1, 2]
    for thing in (trajectory, pcdyn.equilibrium(problem)):
        pcdyn.save(thing, tmp_path / "result.nc")
        found: Any = pcdyn.load(tmp_path / "result.nc")
        assert len(found.prediction_errors) == 3
        np.testing.assert_array_equal(found.energies, thing.energies)
        assert_equal(found.prediction_errors, thing.prediction_errors, 0.0)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input": np.zeros((2, 3))}, InputError, "prior on a clamped input would be ignored"),
        ({"prior": pcdyn.Prior(np.zeros(2))}, ShapeError, r"shape \(2,\), but the input has 3"),
        ({"prior": pcdyn.Prior}, InputError, "prior must be a pcdyn.Prior"),
        ({"prior": pcdyn.Gaussian()}, InputError, "prior must be a pcdyn.Prior"),
        ({"prior": pcdyn.Prior(0.0, pcdyn.CrossEntropy())}, InputError, "energy of layer 0: cross"),
        ({"prior": pcdyn.Prior(0.0, pcdyn.Gaussian([1.0, 2.0]))}, ShapeError, "energy of layer 0"),
        ({"prior": pcdyn.Prior(0.0, pcdyn.Gaussian(np.eye(2)))}, ShapeError, "energy of layer 0"),
    ],
)
def test_priors_that_do_not_fit(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        problem_of(**options)


@pytest.mark.unchecked
def test_what_is_no_prior() -> None:
    with pytest.raises(PrecisionError):
        pcdyn.Prior(0.0, pcdyn.Gaussian(-1.0))
    with pytest.raises(InputError, match="energy of the prior must be an energy"):
        pcdyn.Prior(0.0, 2.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="clamped input"):
        pcdyn.backpropagation(problem_of())
