"""Activities and weights as one flow, against NumPy's field, SciPy, and the adiabatic limit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.errors import Status
from pcdyn.integrators import Diffrax, Euler, UntilEquilibrium
from pcdyn.learning import AdiabaticFlow, JointFlow
from pcdyn.simulation.simulate import simulate
from tests.limits.test_rules import order, pc_gradient
from tests.networks import EPS, Case, assert_close, build_case

RTOL = 1e-9
PRECISE = Diffrax("tsit5", rtol=RTOL, atol=1e-12, max_steps=2**18)


def small(seed: int = 0, **options: Any) -> Case:
    """tanh 2-3-2 with biases and three samples."""
    return build_case(
        seed=seed, widths=(2, 3, 2), activations=("tanh",), bias=True, batch=3, **options
    )


def arrays(network: Any, row: int) -> list[np.ndarray]:
    return [np.asarray(x)[row] for x in jax.tree.leaves(network)]


def test_the_field_is_that_of_numpy() -> None:
    """Activities at their own speed, −ε ∂F/∂W summed over the batch, for full precisions."""
    case, ratio = small(precision="full", slow=True), 0.3
    joint = JointFlow(case.problem, ratio)
    state = joint.initial_state(case.state)
    expected = [
        *(v.ravel() for v in case.field()),
        *(-ratio * g.ravel() for g in pc_gradient(case, case.state)),
    ]
    assert_close(joint.vector_field(0.0, state), expected, 1e3 * EPS)
    assert_close(joint.free_energy(state), case.free_energy(case.activities).sum(), 1e3 * EPS)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "lsoda", Euler(dt=0.01)])
def test_explicit_and_implicit_integrators_follow_it(method: Any) -> None:
    """Against SciPy's DOP853 on the field written in NumPy; Euler to the order of its step."""
    case, ratio = small(1), 0.5
    names = [x for pair in zip(case.weights, case.biases, strict=True) for x in pair]
    shapes = [np.shape(x) for x in (*case.activities[1:-1], *names)]
    sizes = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]

    def field(t: float, y: np.ndarray) -> np.ndarray:
        hidden, *rest = (x.reshape(s) for x, s in zip(np.split(y, sizes), shapes, strict=True))
        now = case.replace(
            activities=(case.activities[0], hidden, case.activities[-1]),
            weights=tuple(rest[::2]), biases=tuple(rest[1::2]),
        )  # fmt: skip
        slopes = (-ratio * g for g in pc_gradient(now, (hidden,)))
        return np.concatenate([x.ravel() for x in (*now.field(), *slopes)])

    start = np.concatenate([np.ravel(x) for x in (case.activities[1], *names)])
    exact = solve_ivp(field, (0, 3.0), start, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    run = simulate(
        JointFlow(case.problem, ratio), t1=3.0, times=[1.0, 3.0], initial=case.state,
        integrator=method,
    )  # fmt: skip
    found = np.concatenate([np.ravel(x) for x in (run.final[1], *arrays(run.network, -1))])
    # Default tolerances are 1e-6; Euler errs by about half its step times a curvature of order 1.
    tolerance = 0.02 if isinstance(method, Euler) else 1e-4
    np.testing.assert_allclose(found, exact, atol=tolerance)
    assert run.activities[1].shape == (2, 3, 3)
    assert run.energies.shape == (2, 3, 2)
    assert run.free_energy.sum(-1)[1] < run.free_energy.sum(-1)[0]


@pytest.mark.slow
def test_it_stops_where_both_rest() -> None:
    """`until` sees the weights too: data that can be interpolated end at F = 0."""
    case = build_case(seed=2, widths=(2, 3, 2), activations=("tanh",), batch=2)
    case = case.replace(activities=(*case.activities[:-1], 0.3 * np.tanh(case.activities[-1])))
    run = simulate(
        JointFlow(case.problem, 1.0), t1=1e4, integrator="kvaerno5",
        until=UntilEquilibrium(tolerance=1e-6),
    )  # fmt: skip
    assert run.status is Status.CONVERGED
    assert run.free_energy[-1].sum() < 1e-9
    assert run.vector_field_norms.shape[-1] == 1 + 2


@pytest.mark.slow
def test_the_distance_to_the_adiabatic_limit_is_of_order_one() -> None:
    """Against dW/dt = −dF*/dW of a linear network, F* in closed form, by SciPy."""
    case = build_case(seed=3, widths=(2, 2, 2), batch=3)
    x, y = case.activities[0], case.activities[-1]

    def field(t: float, weights: np.ndarray) -> np.ndarray:
        """∂F*/∂W = −Σ ε_l* x_{l−1}*ᵀ, with ε_2* = S⁻¹e0 and ε_1* = W_2ᵀ ε_2*."""
        first, second = weights.reshape(2, 2, 2)
        covariance = np.eye(2) + second @ second.T
        top = np.linalg.solve(covariance, (y - x @ first.T @ second.T).T).T
        below = top @ second
        return np.concatenate([(below.T @ x).ravel(), (top.T @ (x @ first.T + below)).ravel()])

    start = np.concatenate([w.ravel() for w in case.weights])
    exact = solve_ivp(field, (0, 1.0), start, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    adiabatic = simulate(
        AdiabaticFlow(case.problem, tolerance=1e-12), t1=1.0, times=[1.0], integrator=PRECISE
    )
    assert adiabatic.ok
    found = np.concatenate([w.ravel() for w in arrays(adiabatic.network, -1)])
    np.testing.assert_allclose(found, exact, atol=1e3 * RTOL)

    rest, sizes, errors = equilibrium(case.problem).state, (3e-3, 1e-3, 3e-4), []
    for ratio in sizes:
        run = simulate(JointFlow(case.problem, ratio), t1=1 / ratio, times=[1 / ratio],
                       initial=rest, integrator=PRECISE)  # fmt: skip
        flat = np.concatenate([w.ravel() for w in arrays(run.network, -1)])
        errors.append(np.linalg.norm(flat - exact))
    assert order(sizes, errors) == pytest.approx(1, abs=0.1)
