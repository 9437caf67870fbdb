"""Closed forms keep their digits at large ratios of precisions, and know how many are left.

A hidden layer of three below one output: H = 1 + r w wᵀ, so that x moves along w only, at the rate
1 + r|w|². Equilibrium and trajectory are known to the last digit with pencil and paper.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import pcdyn
from pcdyn import EquilibriumStatus, Gaussian, InferenceProblem, equilibrium, linear_equilibrium
from pcdyn.errors import RoundOffWarning, SingularHessianError

W, X, Y = np.array([1.0, 2.0, 0.3]), np.array([0.5, -0.2, 1.0]), 0.3
EPS = np.finfo(float).eps
RATIOS = (1e-8, 1.0, 1e4, 1e8, 1e12, 1e14, 1e16)


def problem_of(ratio: float, scale: float = 1.0) -> InferenceProblem:
    net = pcdyn.Network([pcdyn.Dense(np.eye(3)), pcdyn.Dense(W[None])])
    energy = Gaussian([scale, scale * ratio])
    return InferenceProblem(net, input=X, output=[Y], energy=energy)


def state_at(ratio: float, t: float) -> np.ndarray:
    size = W @ W
    # 1 − r/(1 + r) is 1/(1 + r): without the cancellation.
    rest = (Y - W @ X) * ratio / (1 + ratio * size)
    return X + W * rest * -np.expm1(-(1 + ratio * size) * t)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("method", ["cholesky", "output_space"])
def test_well_posed_equilibria_are_found_at_any_ratio(
    ratio: float, scale: float, method: str
) -> None:
    """To a few roundings of numbers of order one."""
    found = linear_equilibrium(problem_of(ratio, scale), method=method)[1]
    np.testing.assert_allclose(found, state_at(ratio, np.inf), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("ratio", RATIOS)
def test_equilibrium_accepts_its_own_right_answer(ratio: float) -> None:
    # At a ratio of 1e16 the round-off of Gauss-Newton's steps is more than it takes for still.
    for method in (None, "gauss_newton")[: 1 if ratio == 1e16 else 2]:
        found = equilibrium(problem_of(ratio), method=method)
        assert found.status is EquilibriumStatus.CONVERGED
        assert np.all(found.residual_norms <= found.tolerance)
        np.testing.assert_allclose(found.activities[1], state_at(ratio, np.inf), atol=100 * EPS)


def test_many_outputs_at_a_large_ratio() -> None:
    """Four outputs of three hidden units, S of which is singular beside 1/r: numpy.linalg.lstsq.

    Its error, and the distance to the limit r → ∞ for which it is asked, are of the order 1e-13.
    """
    rng = np.random.default_rng(0)
    weight, target = rng.normal(size=(4, 3)), rng.normal(size=4)
    net = pcdyn.Network([pcdyn.Dense(np.eye(3)), pcdyn.Dense(weight)])
    problem = InferenceProblem(net, input=X, output=target, energy=Gaussian([1.0, 1e15]))
    limit = np.linalg.lstsq(weight, target, rcond=None)[0]
    found = linear_equilibrium(problem)[1]
    np.testing.assert_allclose(found, limit, rtol=1e-12)
    np.testing.assert_allclose(equilibrium(problem).activities[1], limit, rtol=1e-12)
    # Through the output the unreachable part of the target, times 1e15, must cancel.
    with pytest.raises(SingularHessianError, match="cannot tell"):
        linear_equilibrium(problem, method="output_space")


def test_flat_directions_are_refused_whatever_the_precisions() -> None:
    """An input of three that one output sees, and both ends free."""
    for ratio in (1.0, 1e12):
        given = problem_of(ratio)
        for output in (given.output, None):
            with pytest.raises(SingularHessianError, match="flat directions"):
                linear_equilibrium(given.with_data(None, output))
    beyond = problem_of(1e28)
    with pytest.raises(SingularHessianError, match="cannot tell"):
        linear_equilibrium(beyond)
    np.testing.assert_allclose(
        linear_equilibrium(beyond, method="output_space")[1], state_at(1e28, np.inf), atol=8 * EPS
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_exact_flow_is_as_right_as_it_says(ratio: float) -> None:
    run = pcdyn.simulate(problem_of(ratio), t1=1.0, integrator="exact")
    error = np.max(np.abs(run.final[1] - state_at(ratio, 1.0)))
    assert error <= max(run.round_off, 8 * EPS)
    # Half of the digits that the ratio takes away are kept.
    assert run.round_off <= 100 * EPS * max(1, np.sqrt(ratio))


def test_lost_digits_are_said() -> None:
    with pytest.warns(RoundOffWarning, match="by round-off"):
        run = pcdyn.simulate(problem_of(1e20), t1=1.0, integrator="exact")
    assert np.max(np.abs(run.final[1] - state_at(1e20, 1.0))) <= run.round_off
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pcdyn.simulate(problem_of(1e12), t1=1.0, integrator="exact")


@pytest.mark.slow
def test_compare_does_not_blame_others_for_the_reference() -> None:
    rodas = pcdyn.Diffrax("rodas5p", rtol=1e-8)
    table = pcdyn.compare({"rodas5p": rodas}, problem_of(1e8), t1=1.0, repeats=1)
    row = table.rows[0]
    run = pcdyn.simulate(problem_of(1e8), t1=1.0, integrator=rodas)
    true = np.linalg.norm(run.final[1] - state_at(1e8, 1.0)) / table.displacement
    assert abs(row.final_error - true) <= table.reference_error.final_error


def test_rates_at_a_large_ratio() -> None:
    """1, 1 and 1 + r|w|²: the small ones to the square root of the ratio times eps."""
    for ratio in (1e4, 1e12):
        rates = np.asarray(pcdyn.linear.spectrum(problem_of(ratio)))
        right = [1, 1, 1 + ratio * (W @ W)]
        np.testing.assert_allclose(rates, right, rtol=20 * EPS * np.sqrt(ratio))
