"""Euler ends where it says: its number of steps is rounded, and a rest of a step is taken."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pcdyn import Diffrax, Euler, Status, UntilEquilibrium, simulate
from tests.networks import build_case

CASE = build_case(seed=8, widths=(3, 2, 2), activations=("tanh",))


def loop(dt: float, steps: int, rest: float = 0.0) -> np.ndarray:
    """The plain loop in NumPy, with a last step of length `rest`."""
    case = CASE
    for length in [dt] * steps + [rest] * (rest > 0):
        moved = [x + length * v for x, v in zip((case.activities[1],), case.field(), strict=True)]
        case = case.replace(activities=(case.activities[0], *moved, case.activities[2]))
    return case.activities[1]


# 0.3 / 0.1 < 3, 0.7 / 0.1 < 7 and 1.1 / 0.1 > 11 in floating point.
@pytest.mark.parametrize("steps", [3, 7, 11])
def test_a_multiple_of_the_step_takes_as_many(steps: int) -> None:
    t1 = steps / 10
    run = simulate(CASE.problem, t1=t1, times=[t1], initial=CASE.state, integrator=Euler(dt=0.1))
    assert run.accepted_steps == steps and run.end_time == run.times[-1] == t1
    # The same additions in the same order, but for the sums within a product with a matrix.
    np.testing.assert_allclose(run.final[1], loop(0.1, steps), rtol=0, atol=1e-14)


@pytest.mark.parametrize("t1", [0.25, 0.999, 0.05])
def test_no_multiple_of_the_step_ends_at_t1_all_the_same(t1: float) -> None:
    """The last update is shorter; it used to stop up to half a step from t1, and say t1."""
    run = simulate(CASE.problem, t1=t1, times=[t1], initial=CASE.state, integrator=Euler(dt=0.1))
    whole = int(t1 / 0.1)
    expected = loop(0.1, whole, t1 - 0.1 * whole)
    np.testing.assert_allclose(run.final[1], expected, rtol=0, atol=1e-14)
    # The end itself, where no time is saved there.
    early = simulate(CASE.problem, t1=t1, times=[0.0], initial=CASE.state, integrator=Euler(dt=0.1))
    assert early.end_time == t1 and early.status is Status.REACHED_T1


def test_padding_is_finite_under_debug_infs() -> None:
    """diffrax fills with infinity what it does not reach, of which nothing is left."""
    with jax.debug_infs(True):
        until = simulate(CASE.problem, t1=200.0, initial=CASE.state, until=UntilEquilibrium(1e-6))
        dense = simulate(
            CASE.problem, t1=5.0, initial=CASE.state, dense=True, integrator=Diffrax(max_steps=64)
        )
        assert until.status is Status.CONVERGED
        np.testing.assert_allclose(dense(5.0)[1], dense.final[1], rtol=0, atol=1e-12)
