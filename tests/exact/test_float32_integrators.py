"""Implicit steps in float32, JAX's default, against NumPy and SciPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from pcdyn import Diffrax, Gaussian, Status, simulate
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem

RNG = np.random.default_rng(3)
WEIGHTS = (RNG.normal(size=(4, 3)) / 2, RNG.normal(size=(2, 4)) / 2)
X, Y = np.array([0.5, -0.2, 1.0]), np.array([0.3, -0.4])
EPS = float(np.finfo(np.float32).eps)


def problem(activation: str, ratio: float, dtype: Any = np.float32) -> InferenceProblem:
    layers = [Dense(weight.astype(dtype), activation=activation) for weight in WEIGHTS]
    return InferenceProblem(Network(layers), input=X, output=Y, energy=Gaussian((1.0, ratio)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kvaerno3", "kvaerno4", "kvaerno5", "rodas5p"])
def test_stiff_flows_take_tens_of_steps(name: str) -> None:
    """At precision ratios up to 10³; errors within a few of the tolerances 10⁻⁴ and 10⁻⁶."""
    for ratio in (1.0, 10.0, 1e3):

        def field(t: float, h: np.ndarray, ratio: float = ratio) -> np.ndarray:
            prediction = np.tanh(WEIGHTS[1] @ h)
            pull = WEIGHTS[1].T @ ((1 - prediction**2) * ratio * (Y - prediction))
            return np.tanh(WEIGHTS[0] @ X) - h + pull

        start, times = np.tanh(WEIGHTS[0] @ X), [0.05, 0.5, 50.0]
        expected = solve_ivp(field, (0, 50), start, "Radau", times, rtol=1e-10, atol=1e-12).y.T
        run = simulate(
            problem("tanh", ratio), t1=50.0, times=times, integrator=Diffrax(name, fallback=None)
        )
        assert run.status is Status.REACHED_T1
        assert run.accepted_steps + run.rejected_steps < 100
        np.testing.assert_allclose(run.activities[1], expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fixed_implicit_euler_is_that_of_numpy(dtype: Any) -> None:
    """(1 + dt H) h' = h + dt b, to round-off of the steps: 100 of them, each of a few eps."""
    dt, steps = 0.05, 100
    first, second = WEIGHTS
    for ratio in (1.0, 1e3):
        h = first @ X
        matrix = np.eye(4) * (1 + dt) + dt * ratio * second.T @ second
        for _ in range(steps):
            h = np.linalg.solve(matrix, h + dt * (first @ X + ratio * second.T @ Y))
        run = simulate(
            problem("identity", ratio, dtype), t1=dt * steps, times=[dt * steps],
            integrator=Diffrax("implicit_euler", dt=dt),
        )  # fmt: skip
        assert run.status is Status.REACHED_T1 and run.accepted_steps == steps
        tolerance = 100 * ratio**0.5 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(run.final[1], h, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["kvaerno3", "kvaerno4", "kvaerno5"])
def test_fixed_steps_of_higher_order_reach_the_end(name: str) -> None:
    """The exponential of the linear flow.

    dt⁴ ≈ 10⁻⁵ bounds the error of order three, and a hundred steps add round-off.
    """
    first, second = WEIGHTS
    hessian, b = np.eye(4) + second.T @ second, first @ X + second.T @ Y
    values, vectors = np.linalg.eigh(hessian)
    rest = np.linalg.solve(hessian, b)
    expected = rest + vectors @ (np.exp(-5 * values) * (vectors.T @ (first @ X - rest)))
    run = simulate(problem("identity", 1.0), t1=5.0, integrator=Diffrax(name, dt=0.05))
    assert run.status is Status.REACHED_T1
    np.testing.assert_allclose(run.final[1], expected, rtol=0, atol=1e-5 + 100 * EPS)
