"""The output error in closed form against matrix exponentials, sampling and the reduced problem."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from scipy.optimize import minimize

from experiments.beyond.learning_limits import SAMPLES, reduced_energy
from experiments.beyond.loss_along_inference import worst_target
from pcdyn.equilibria.solvers import ClosedForm
from pcdyn.errors import InputError, NotLinearError, TimesError
from pcdyn.learning import AdiabaticFlow
from pcdyn.references.output_error import (
    LARGEST_RISE,
    energy_gradient_margin,
    feedforward_output_error,
    output_error_flow,
)
from pcdyn.theory import convergence
from tests.networks import EPS, Case, assert_close, build_case


def exact_error(case: Case, t: float) -> np.ndarray:
    """ε_L(t) from the feedforward pass by a dense matrix exponential."""
    matrix, drive, taus = case.linear_flow()
    layers = [case.activities[0]]
    for weight, bias in zip(case.weights, case.biases, strict=True):
        layers.append(layers[-1] @ weight.T + (0 if bias is None else bias))
    rates = matrix / taus[:, None]
    rest = np.linalg.solve(matrix, drive)
    start = np.concatenate(layers[1:-1])
    state = rest + scipy.linalg.expm(-rates * t) @ (start - rest)
    last = case.biases[-1]
    prediction = case.weights[-1] @ state[-case.widths[-2] :] + (0 if last is None else last)
    return case.activities[-1] - prediction


@pytest.mark.parametrize("precision", ["unit", "full"])
def test_the_output_error_is_that_of_a_matrix_exponential(precision: str) -> None:
    """With full precisions, biases and time constants; its rate by differences and by the bound."""
    case = build_case(
        seed=3, widths=(3, 2, 3, 2), precision=precision, bias=True, slow=precision == "full"
    )
    flow, error = output_error_flow(case.problem), feedforward_output_error(case.problem)
    for t in (0.0, 0.7, 30.0):
        assert_close(flow(t) @ error, exact_error(case, t), 1e4 * EPS)
    assert_close(flow(math.inf) @ error, exact_error(case, 1e6), 1e4 * EPS)
    step = 1e-4
    slope = (flow.loss(error, 0.7 + step) - flow.loss(error, 0.7 - step)) / (2 * step)
    # The error of central differences is of the order of the square of the step.
    assert float(flow.loss_rate(error, 0.7)) == pytest.approx(float(slope), rel=1e-6)
    start = case.problem.feedforward_state()
    margin = energy_gradient_margin(case.problem, start)
    assert float(margin) == pytest.approx(-float(flow.loss_rate(error, 0.0)), rel=1e-10)


def test_the_share_of_rising_targets_is_that_of_sampling() -> None:
    """Signs of dℒ/dt late in inference, for isotropic errors, against the angle θ/π."""
    # One hidden layer is no exception with a full precision; the angle is large in this network.
    weights = (np.eye(2), np.array([[1.0, 0.5], [0.0, 2.0]]))
    case = build_case(seed=1, widths=(2, 2, 2)).replace(
        weights=weights, precisions=(np.diag([0.05, 1.0]), 1.0)
    )
    flow = output_error_flow(case.problem)
    late = 40 / float(flow.rates[1] - flow.rates[0])
    errors = np.random.default_rng(0).normal(size=(20000, 2))
    now, speed = np.asarray(flow.whitened(late)), np.asarray(flow.speed(late))
    rises = -np.sum((errors @ now) * (errors @ speed), axis=-1) > 0
    share = float(flow.rising_share())
    assert share > 0.01
    # Four standard deviations of a binomial share.
    assert rises.mean() == pytest.approx(share, abs=4 * (share / 20000) ** 0.5)


def test_a_mode_that_is_not_seen_has_no_share() -> None:
    """One hidden layer wider than the output: the slowest modes are in the null space of W_L."""
    for seed in range(3):
        flow = output_error_flow(build_case(seed=seed, widths=(4, 8, 2)).problem)
        assert float(flow.rising_share()) == pytest.approx(0, abs=1e-6)
    case = build_case(seed=0, widths=(2, 3, 2))
    nothing = case.replace(weights=(case.weights[0], np.zeros((2, 3))))
    assert math.isnan(float(output_error_flow(nothing.problem).rising_share()))


# Of ℒ at the start: it is .0906 of it at t = 1, .1042 at t = 24.2 and .0585 in the end for one
# target, so that the rise is invisible to a comparison with the end.
RISES_AND_FALLS = (
    np.array([[-0.014, -0.118], [-0.201, 0.069]]),
    np.array([[-13.824, 6.325], [-30.748, -10.179]]),
    np.array([[0.813, -0.47], [0.74, -0.334]]),
    np.array([[-0.467, 2.466], [-0.12, -0.174]]),
)


def test_the_largest_rise_is_that_of_all_pairs_of_times() -> None:
    """N(t) = I − C H⁻¹(I − e^{−Ht}) Cᵀ in NumPy, and its eigenvalues pair by pair."""
    case = build_case(seed=0, widths=(2, 2, 2, 2, 2)).replace(weights=RISES_AND_FALLS)
    flow = output_error_flow(case.problem)
    times = np.append(np.geomspace(0.1, 1e3, 31), math.inf)
    values, vectors = np.linalg.eigh(case.linear_flow()[0])
    seen = RISES_AND_FALLS[-1] @ vectors[-2:]
    squares = []
    for t in times:
        now = np.eye(2) - (seen * -np.expm1(-values * t) / values) @ seen.T
        squares.append(now @ now)
    rises = [
        [np.linalg.eigvalsh(b - a)[-1] for b in squares[i + 1 :]] for i, a in enumerate(squares)
    ]
    found = float(flow.largest_rise(times))
    assert found == pytest.approx(max(max(row) for row in rises if row), rel=1e-9)
    assert float(worst_target(flow, jnp.asarray(times))) == pytest.approx(found, rel=1e-9)
    to_the_end = [float(flow.rise(t, math.inf)) for t in times[:-1]]
    assert to_the_end == pytest.approx([row[-1] for row in rises if row], abs=1e-12)
    assert 0.025 < found < LARGEST_RISE
    assert max(to_the_end) < 1e-3


def test_no_pair_of_times_exceeds_the_largest_rise() -> None:
    """Random weights of all sizes, in which N(s) − N(t) is positive semidefinite for s < t."""
    rng = np.random.default_rng(0)
    times = np.append(np.geomspace(1e-3, 1e5, 33), math.inf)
    for _ in range(10):
        weights = tuple(w * 10 ** rng.normal() for w in rng.normal(size=(4, 2, 2)))
        case = build_case(seed=0, widths=(2, 2, 2, 2, 2)).replace(weights=weights)
        flow = output_error_flow(case.problem)
        maps = np.asarray(jax.vmap(flow.whitened)(jnp.asarray(times)))
        early, late = np.triu_indices(len(times), k=1)
        assert np.linalg.eigvalsh(maps[early] - maps[late]).min() > -1e3 * EPS
        assert float(flow.largest_rise(times)) <= LARGEST_RISE


def test_the_largest_rise_is_that_of_two_matrices() -> None:
    """The largest eigenvalue of B² − A² where A has eigenvalues 1 and d, B = ββᵀ, βᵀA⁻¹β = 1."""

    def cost(x: Any) -> float:
        d, angle = 1 / (1 + math.exp(-x[0])), x[1]
        beta = np.array([math.cos(angle), d**0.5 * math.sin(angle)])
        b = np.outer(beta, beta)
        return -float(np.linalg.eigvalsh(b @ b - np.diag([1, d]) @ np.diag([1, d]))[-1])

    best = minimize(
        cost, [-0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}
    )
    # At a maximum the value errs by the square of the position.
    assert -best.fun == pytest.approx(LARGEST_RISE, abs=1e-10)


def test_what_cannot_be_done_is_refused() -> None:
    """A free end and a network that is not linear."""
    with pytest.raises(InputError, match="both ends are clamped"):
        output_error_flow(build_case(seed=0, widths=(2, 3, 2), clamp="input").problem)
    with pytest.raises(NotLinearError):
        output_error_flow(build_case(seed=0, widths=(2, 3, 2), activations=("tanh",)).problem)
    flow = output_error_flow(build_case(seed=0, widths=(2, 3, 2)).problem)
    for times, says in (([1.0], "two or more"), ([0.0, 2.0, 2.0], "ascending")):
        with pytest.raises(TimesError, match=says):
            flow.largest_rise(times)
    with pytest.raises(InputError, match="input is free"):
        feedforward_output_error(build_case(seed=0, widths=(2, 3, 2), clamp="output").problem)


def test_the_reduced_energy_is_that_of_the_network() -> None:
    """Its gradient against that of F* with inference at equilibrium."""
    weights, noise, precision = jnp.asarray([0.7, -0.4, 1.3]), 2.0, 0.3
    problem = convergence.noisy_problem(
        [weights[:1, None], weights[1:, None]], noise=noise, precision=precision
    )
    flow = AdiabaticFlow(problem, ClosedForm())
    moves = jnp.concatenate(flow.vector_field(0.0, flow.initial_state())) / (SAMPLES * precision)
    assert_close(moves, -jax.grad(reduced_energy)(weights, noise, precision), 1e3 * EPS)


def test_the_growing_weight_solves_its_equation() -> None:
    """Against SciPy's DOP853 on db/dt = λ²c²b/(1 + λb²)²."""
    times = np.asarray([0.0, 3.0, 50.0])
    solved = scipy.integrate.solve_ivp(
        lambda t, b: 0.4**2 * 9 * b / (1 + 0.4 * b**2) ** 2, (0, 50), [0.5], t_eval=times,
        method="DOP853", rtol=1e-11, atol=1e-12,
    )  # fmt: skip
    found = convergence.growing_weight(times, 0.5, noise=3.0, precision=0.4)
    np.testing.assert_allclose(found, solved.y[0], rtol=1e-8)
