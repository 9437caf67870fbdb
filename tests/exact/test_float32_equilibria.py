"""In float32 an equilibrium that is right to the last digits is accepted, and others are not."""

from __future__ import annotations

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import pcdyn
from pcdyn import EquilibriumStatus, Gaussian, InferenceProblem, equilibrium

X, Y = [0.5, -0.2, 1.0], [0.3, -0.4]
EPS = float(np.finfo(np.float32).eps)


def problem_of(ratio: float) -> InferenceProblem:
    net = pcdyn.mlp([3, 4, 2], activation="tanh", key=jr.key(0), dtype=jnp.float32)
    data = (np.asarray(X, np.float32), np.asarray(Y, np.float32))
    energy = Gaussian([np.float32(1), np.float32(ratio)])
    return InferenceProblem(net, input=data[0], output=data[1], energy=energy)


def newton(problem: InferenceProblem, ratio: float, start: np.ndarray) -> np.ndarray:
    """The equilibrium by Newton's method of Gauss in float64, by NumPy alone."""
    first, second = (np.asarray(layer.weight, float) for layer in problem.network.layers)
    x, y = (np.asarray(np.asarray(v, np.float32), float) for v in (X, Y))
    h = np.asarray(start, float)
    for _ in range(100):
        mean = np.tanh(second @ h)
        jacobian = (1 - mean**2)[:, None] * second
        slope = h - np.tanh(first @ x) - ratio * jacobian.T @ (y - mean)
        h = h - np.linalg.solve(np.eye(4) + ratio * jacobian.T @ jacobian, slope)
    return h


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6])
def test_large_ratios(ratio: float) -> None:
    """Within the round-off of a state of order one, some places for the chain of roundings."""
    problem = problem_of(ratio)
    found = equilibrium(problem)
    assert found.status is EquilibriumStatus.CONVERGED
    assert np.all(found.residual_norms <= found.tolerance)
    assert "tolerance" in found.message
    right = newton(problem, ratio, found.activities[1])
    # At a ratio of one the tolerance, 1e-4 of a field of order one, is what is seen.
    atol = 1e-4 if ratio == 1 else 64 * EPS
    np.testing.assert_allclose(found.activities[1], right, rtol=0, atol=atol)
    assert pcdyn.stability(problem, at=found).units == 4


def test_what_is_not_at_rest_is_not_accepted() -> None:
    """A method that has only begun or stalled where round-off is large, and a strict tolerance."""
    far = equilibrium(problem_of(1e8), throw=False)
    if far.ok:
        right = newton(problem_of(1e8), 1e8, far.activities[1])
        np.testing.assert_allclose(far.activities[1], right, rtol=0, atol=64 * EPS)
    found = equilibrium(
        problem_of(1e4), method=pcdyn.solvers.GradientDescent(dt=1e-6, max_iterations=3),
        throw=False,
    )  # fmt: skip
    assert found.status is EquilibriumStatus.ITERATION_LIMIT
    strict = equilibrium(problem_of(1e6), tolerance=1e-6, throw=False)
    assert not strict.ok
