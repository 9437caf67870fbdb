"""Variational free energy and learned precisions, against SciPy's densities and closed forms."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, norm

from pcdyn import linear
from pcdyn.analysis.stability import stability
from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.solvers import GaussNewton
from pcdyn.errors import ShapeError
from pcdyn.integrators import SciPy
from pcdyn.learning import PrecisionFlow, output_noise, variational_free_energy
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.simulation.simulate import simulate
from tests.networks import EPS, Case, assert_close, build_case, jax_free_energy, random_spd

WIDTHS = (2, 3, 2)


def products(case: Case) -> dict[int, np.ndarray]:
    """P_l = W_L … W_{l+1}."""
    found = {case.depth: np.eye(case.widths[-1])}
    for index in range(case.depth, 1, -1):
        found[index - 1] = found[index] @ case.weights[index - 1]
    return found


def covariance(case: Case) -> np.ndarray:
    """S."""
    return sum(p @ np.linalg.inv(case.precision(i)) @ p.T for i, p in products(case).items())


def log_likelihood(case: Case) -> np.ndarray:
    """log N(T; feedforward(d), S), by SciPy."""
    means = case.feedforward(case.activities[0])[-1]
    errors = np.atleast_2d(case.activities[-1] - means)
    return np.array([multivariate_normal(cov=covariance(case)).logpdf(e) for e in errors])


def second_moment(case: Case) -> np.ndarray:
    """Ĉ, the mean of e0 e0ᵀ."""
    errors = case.activities[-1] - case.feedforward(case.activities[0])[-1]
    return errors.T @ errors / len(errors)


def noisy(seed: int, hidden: float, samples: int = 40) -> Case:
    """Linear 2-3-2, Π_1 = `hidden`, and outputs about whose mean nothing is special."""
    case = build_case(seed=seed, widths=WIDTHS, precision="full", batch=samples)
    return case.replace(precisions=(np.asarray(hidden), case.precisions[1]))


@eqx.filter_jit
def field(flow: PrecisionFlow) -> Any:
    """dθ/dt at the start."""
    return flow.vector_field(0.0, flow.initial_state())


@pytest.mark.parametrize("batch", [None, 4])
def test_with_the_exact_posterior_it_is_the_log_likelihood(batch: int | None) -> None:
    """Four layers with biases and mixed precisions, against SciPy's multivariate normal."""
    case = build_case(seed=1, widths=(2, 3, 4, 2, 2), precision="mixed", bias=True, batch=batch)
    problem = case.problem
    expected = -log_likelihood(case).reshape(np.shape(case.activities[0])[:-1])
    # Round-off is amplified by the conditioning of H and of S, which are below 1e3 here.
    tolerance = 1e4 * EPS
    hessian, forcing, _ = case.linear_flow()
    rest = case.split(np.linalg.solve(hessian, forcing.T).T)
    found = variational_free_energy(problem, rest)
    assert_close(found, expected, tolerance)
    assert_close(linear.negative_log_likelihood(problem), expected, tolerance)
    assert_close(linear.output_covariance(problem), covariance(case), tolerance)


def test_with_the_output_free_there_is_nothing_to_explain() -> None:
    """The integral of a density is 1, so that F_var is 0 at the feedforward pass."""
    case = build_case(seed=2, widths=WIDTHS, precision="full", clamp="input", batch=3)
    problem = case.problem
    found = variational_free_energy(problem, problem.feedforward_state())
    assert_close(found, np.zeros(3), 1e3 * EPS)


def test_another_posterior_costs_its_divergence() -> None:
    """F_var + log p = KL(q ‖ posterior) for a Gaussian q with another mean and covariance."""
    case = build_case(seed=3, widths=WIDTHS, precision="full", batch=3)
    hessian, forcing, _ = case.linear_flow()
    spread = random_spd(np.random.default_rng(0), 3)
    away = case.activities[1] - np.linalg.solve(hessian, forcing.T).T
    product = hessian @ spread
    divergence = 0.5 * (
        np.trace(product) - 3 - np.linalg.slogdet(product)[1]
        + np.einsum("bi,ij,bj->b", away, hessian, away)
    )  # fmt: skip
    found = variational_free_energy(case.problem, case.state, posterior=jnp.asarray(spread))
    assert_close(found, divergence - log_likelihood(case), 1e4 * EPS)


@pytest.mark.parametrize(("slope", "input", "target", "side"), [(1, 0.5, 0.2, 1), (2, 1, 0.9, -1)])
def test_of_nonlinear_networks_laplace_is_no_bound(
    slope: float, input: float, target: float, side: int
) -> None:
    """T ~ N(tanh(a x), 1), x ~ N(d, 1): against log p by quadrature it lies on either side."""
    layers = [Dense([[1.0]], activation="identity"), Dense([[slope]], activation="tanh")]
    problem = InferenceProblem(Network(layers), input=[input], output=[target])
    rest = problem.state_of(equilibrium(problem).activities)
    x = np.linspace(input - 12, input + 12, 20_001)
    density = norm.pdf(x, loc=input) * norm.pdf(target, loc=np.tanh(slope * x))
    gap = float(variational_free_energy(problem, rest)) + math.log(np.sum(density) * (x[1] - x[0]))
    assert gap * side > 0.1


def test_a_delta_posterior_gives_the_joint_density_and_laplace_its_curvature() -> None:
    """tanh: −Σ log N(x_l; μ_l, Π_l⁻¹) by SciPy, and ½ log det of the Hessian by automatic
    differentiation of an energy written here."""
    case = build_case(seed=4, widths=WIDTHS, precision="mixed", activations=("tanh",), batch=3)
    # No prediction error but the last one: near the minimum, where the Hessian is that of one.
    state = case.feedforward(case.activities[0])[1:-1]
    activities = case.problem.activities(state)
    rows = [[np.asarray(x[i]) for x in activities] for i in range(3)]
    densities, curvatures = [], []
    for row in rows:
        one = case.replace(activities=tuple(row))
        densities.append(-sum(
            multivariate_normal(cov=np.linalg.inv(case.precision(i))).logpdf(e)
            for i, e in enumerate(one.errors(row), start=1)
        ))  # fmt: skip
        ends = jnp.asarray(row[0]), jnp.asarray(row[2])
        hessian = jax.hessian(lambda x, e=ends: jax_free_energy(case, (e[0], x, e[1])))(
            jnp.asarray(row[1])
        )
        curvatures.append(0.5 * np.linalg.slogdet(hessian)[1] - 1.5 * math.log(2 * math.pi))
    delta = np.array(densities)
    found = variational_free_energy(case.problem, state, posterior="delta")
    assert_close(found, delta, 1e3 * EPS)
    found = variational_free_energy(case.problem, state)
    assert_close(found, delta + np.array(curvatures), 1e4 * EPS)


def test_parameters_stand_for_the_precisions_and_any_are_positive_definite() -> None:
    """The start is the precision given; random parameters give SPD matrices (Cholesky)."""
    for kind in ("scalar", "diagonal", "full"):
        case = build_case(seed=5, widths=WIDTHS, precision=kind, batch=3)
        flow = PrecisionFlow(case.problem, (kind, kind))
        assert_close(flow.precisions_at(flow.initial_state()), case.precisions, 1e2 * EPS)
    wide = PrecisionFlow(build_case(seed=5, widths=WIDTHS, batch=3).problem, ("full", "fixed"))
    (start,) = wide.initial_state()
    assert_close(wide.precisions_at((start,)), (np.eye(3), 1.0), EPS)
    rng = np.random.default_rng(0)
    full = PrecisionFlow(case.problem, ("full", "full"))
    drawn = tuple(jnp.asarray(rng.normal(size=(5, *x.shape))) for x in full.initial_state())
    for matrices in full.precisions_at(drawn):
        assert matrices.shape[0] == 5
        np.linalg.cholesky(matrices)


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
def test_the_field_is_the_closed_form_of_the_likelihood(kind: Any) -> None:
    """With G = S⁻¹ − S⁻¹ĈS⁻¹: ∂F/∂Π_l = −½ Π_l⁻¹P_lᵀ G P_l Π_l⁻¹, in NumPy."""
    case = build_case(seed=6, widths=WIDTHS, precision=kind, batch=4)
    flow = PrecisionFlow(case.problem, (kind, kind))
    inverse = np.linalg.inv(covariance(case))
    pull = inverse - inverse @ second_moment(case) @ inverse
    expected = []
    for index, product in products(case).items():
        precision = case.precision(index)
        spread = np.linalg.solve(precision, product.T)
        slope = -0.5 * spread @ pull @ spread.T
        factor = np.linalg.cholesky(precision)
        # dΠ = dC Cᵀ + C dCᵀ, and the diagonal of C is an exponential.
        turned = 2 * slope @ factor
        moves = np.diag(factor) * np.diag(turned)
        moves = {
            "scalar": np.array([np.trace(slope) * precision[0, 0]]),
            "diagonal": np.diag(slope) * np.diag(precision),
            "full": np.concatenate([moves, turned[np.tril_indices(len(turned), -1)]]),
        }[kind]
        expected.insert(0, -moves)
    assert_close(field(flow), expected, 1e3 * EPS)


def test_the_field_of_a_tanh_network_is_that_of_finite_differences() -> None:
    """The equilibrium is solved again for each difference; Laplace needs its derivative."""
    case = build_case(seed=7, widths=WIDTHS, precision="full", activations=("tanh",), batch=3)
    flow = PrecisionFlow(case.problem, ("fixed", "full"), tolerance=1e-12)
    (start,) = flow.initial_state()
    energy = eqx.filter_jit(flow.free_energy)
    size = 1e-4
    found = [
        -(energy((start + size * unit,)) - energy((start - size * unit,))) / (2 * size)
        for unit in jnp.eye(3)
    ]
    # The differences err by size² times a third derivative of order 1.
    np.testing.assert_allclose(field(flow)[0], found, atol=1e2 * size**2)


@pytest.mark.parametrize("hidden", [100.0, 0.05])
def test_the_output_noise_maximises_the_likelihood(hidden: float) -> None:
    """SciPy's optimum over a Cholesky factor; Ĉ − V inside, on the boundary if V is too large."""
    case = noisy(8, hidden)
    noise = output_noise(case.problem)
    measured, explained = second_moment(case), case.weights[1] @ case.weights[1].T / hidden
    inside = np.linalg.eigvalsh(measured - explained)[0] > 0
    assert bool(noise.interior) == inside == (hidden > 1)

    def cost(entries: np.ndarray) -> float:
        factor = np.array([[entries[0], 0], [entries[1], entries[2]]])
        total = explained + factor @ factor.T
        return np.trace(np.linalg.solve(total, measured)) + np.linalg.slogdet(total)[1]

    best = minimize(cost, [1.0, 0.0, 1.0], method="Nelder-Mead",
                    options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000}).x  # fmt: skip
    factor = np.array([[best[0], 0], [best[1], best[2]]])
    # A minimum is known to the root of the round-off of its value, about 1e-7.
    np.testing.assert_allclose(noise.covariance, factor @ factor.T, atol=1e-5)
    if inside:
        assert_close(noise.covariance, measured - explained, 1e3 * EPS)


@pytest.mark.parametrize("posterior", ["delta", "laplace"])
def test_the_field_vanishes_at_the_closed_form(posterior: Any) -> None:
    """The learned precision of the output rests at the inverse of `output_noise`."""
    case = noisy(9, 100.0)
    noise = output_noise(case.problem, posterior=posterior)
    assert bool(noise.interior)
    known = case.replace(precisions=(case.precisions[0], np.linalg.inv(noise.covariance)))
    flow = PrecisionFlow(known.problem, ("fixed", "full"), posterior)
    assert_close(field(flow), [np.zeros(3)], 1e4 * EPS)


def test_the_flow_ends_at_the_closed_form() -> None:
    """From unit precision to the maximum of the likelihood, F_var falling to its minimum."""
    case = noisy(10, 100.0, samples=8)
    problem = eqx.tree_at(lambda p: p.energy, case.problem, (Gaussian(100.0), Gaussian(1.0)))
    flow = PrecisionFlow(problem, ("fixed", "full"))
    run = simulate(flow, t1=60.0, times=[1.0, 20.0, 60.0], integrator=SciPy("LSODA", rtol=1e-9))
    expected = np.linalg.inv(output_noise(problem).covariance)
    # The slowest mode decays at a rate near 1 in these parameters: e^{−60} is below round-off.
    np.testing.assert_allclose(run.precisions[1][-1], expected, rtol=1e-6)
    known = case.replace(precisions=(np.asarray(100.0), expected))
    along = flow.free_energy_along(run)
    assert np.all(np.diff(along) < 1e-9)
    assert along[-1] == pytest.approx(-log_likelihood(known).mean(), abs=1e-10)
    assert run.precisions[0].shape == (3,)
    with pytest.raises(ShapeError, match="holds its precisions"):
        run.to_xarray()
    with pytest.raises(ValueError, match="precisions moved"):
        stability(problem, at=run)


def test_a_delta_posterior_has_no_minimum() -> None:
    """Far out the errors of a layer have collapsed: θ moves at n_l/2, Π_L at the inverse of Ĉ."""
    case = noisy(11, 1e10)
    residual = np.linalg.inv(second_moment(case))
    case = case.replace(precisions=(np.asarray(1e10), residual))
    flow = PrecisionFlow(case.problem, ("scalar", "full"), "delta")
    hidden, output = field(flow)
    # Corrections are in proportion to 1/Π_1, times the conditioning.
    np.testing.assert_allclose(hidden, 1.5, atol=1e-7)
    np.testing.assert_allclose(output, 0, atol=1e-7)


def test_optax_descends_to_the_closed_form() -> None:
    """Scalar chain with one free precision: 1/π = ĉ − v, by gradient descent."""
    case = build_case(seed=12, widths=(1, 1, 1), batch=30)
    problem = eqx.tree_at(lambda p: p.energy, case.problem, (Gaussian(20.0), Gaussian(1.0)))
    flow = PrecisionFlow(problem, ("fixed", "scalar"))
    descent = optax.sgd(1.0)

    def update(carry: Any, _: Any) -> Any:
        theta, state = carry
        slope = jax.grad(flow.free_energy)(theta)
        moves, state = descent.update(slope, state)
        return (optax.apply_updates(theta, moves), state), None

    start = flow.initial_state()
    run = jax.jit(lambda c: jax.lax.scan(update, c, None, length=200))
    (theta, _), _ = run((start, descent.init(start)))
    noise = float(second_moment(case)[0, 0] - case.weights[1][0, 0] ** 2 / 20)
    assert noise > 0
    assert float(flow.precisions_at(theta)[1]) == pytest.approx(1 / noise, rel=1e-9)


def test_an_equilibrium_that_is_not_found_is_not_hidden() -> None:
    """One Gauss–Newton iteration is not enough for tanh: the field is NaN."""
    case = build_case(seed=13, widths=WIDTHS, activations=("tanh",), batch=3)
    method = GaussNewton(max_iterations=1)
    flow = PrecisionFlow(case.problem, ("fixed", "scalar"), "delta", method, 1e-13)
    assert np.isnan(field(flow)[0]).all()
