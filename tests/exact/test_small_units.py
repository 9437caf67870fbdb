"""Units change no equilibrium: all precisions by one factor, and data of a linear network."""

from __future__ import annotations

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import pcdyn
from pcdyn import EquilibriumStatus, Gaussian, InferenceProblem, equilibrium, linear_equilibrium

X, Y = np.array([0.5, -0.2, 1.0]), np.array([0.3, -0.4])
SCALES = (1.0, 1e-4, 1e-8, 1e4)
# The residual is 1e-6 of the field at the start at most; rates of order one.
CLOSE = 1e-5


def tanh_problem(scale: float) -> InferenceProblem:
    net = pcdyn.mlp([3, 4, 4, 2], activation="tanh", key=jr.key(0))
    return InferenceProblem(net, input=X, output=Y, energy=Gaussian(scale))


def linear_problem(scale: float) -> InferenceProblem:
    net = pcdyn.mlp([3, 4, 4, 2], activation="identity", key=jr.key(0))
    return InferenceProblem(net, input=scale * X, output=scale * Y)


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_precisions_in_other_units(scale: float) -> None:
    right = equilibrium(tanh_problem(1.0), tolerance=1e-12).activities[1]
    problem = tanh_problem(scale)
    for method in (None, "pseudo_transient", "nesterov"):
        found = equilibrium(problem, method=method)
        np.testing.assert_allclose(found.activities[1], right, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("scale", SCALES)
def test_data_in_other_units(scale: float) -> None:
    problem = linear_problem(scale)
    right = np.asarray(linear_equilibrium(problem)[1])
    np.testing.assert_allclose(
        right / scale, linear_equilibrium(linear_problem(1.0))[1], rtol=1e-12
    )
    found = equilibrium(problem, method="gauss_newton")
    np.testing.assert_allclose(found.activities[1], right, rtol=0, atol=CLOSE * scale)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("integrator", ["tsit5", "lsoda"])
def test_the_flow_stops_at_equilibrium_in_small_units(scale: float, integrator: str) -> None:
    run = pcdyn.simulate(linear_problem(scale), t1=50.0, until="equilibrium", integrator=integrator)
    assert run.status is pcdyn.Status.CONVERGED and run.end_time > 1
    right = np.asarray(linear_equilibrium(linear_problem(scale))[1])
    np.testing.assert_allclose(run.final[1], right, rtol=0, atol=CLOSE * scale)
    slow = pcdyn.simulate(
        tanh_problem(scale), t1=50 / scale, until="equilibrium", integrator=integrator
    )
    right = equilibrium(tanh_problem(1.0), tolerance=1e-12).activities[1]
    np.testing.assert_allclose(slow.final[1], right, rtol=0, atol=CLOSE)


@pytest.mark.slow
def test_samples_have_units_of_their_own() -> None:
    """A batch of one sample in units of 1, one in units of 1e-8 and one that is at rest."""
    net = linear_problem(1.0).network
    rest = np.asarray(net.feedforward(jnp.asarray(X))[-1])
    x, y = np.stack([X, 1e-8 * X, X]), np.stack([Y, 1e-8 * Y, rest])
    problem = InferenceProblem(net, input=x, output=y)
    right = np.asarray(linear_equilibrium(problem)[1])
    size = np.array([1, 1e-8, 1])[:, None]
    found = equilibrium(problem, method="gauss_newton")
    assert found.iterations[2] == 0
    np.testing.assert_allclose(found.activities[1] / size, right / size, atol=CLOSE)
    for per_sample in (False, True):
        run = pcdyn.simulate(problem, t1=60.0, until="equilibrium", per_sample=per_sample)
        assert run.ok
        np.testing.assert_allclose(run.final[1] / size, right / size, atol=CLOSE)


def test_a_start_at_rest_has_converged_at_once() -> None:
    problem = tanh_problem(1.0)
    rest = equilibrium(problem, tolerance=1e-14, throw=False)
    again = equilibrium(problem, initial=rest.state)
    assert again.status is EquilibriumStatus.CONVERGED and again.iterations == 0
    forward = equilibrium(problem.with_data(problem.input, None))
    assert forward.iterations == 0 and np.all(forward.residual_norms == 0)


def test_a_given_tolerance_is_absolute() -> None:
    found = equilibrium(tanh_problem(1e-8), tolerance=1e-6)
    assert found.iterations == 0 and np.all(found.tolerance == 1e-6)
