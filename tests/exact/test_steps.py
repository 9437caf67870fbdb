"""How many steps there are, and what one of them gives between its ends."""

from __future__ import annotations

import numpy as np
import pytest

from pcdyn.integrators import Diffrax, Euler
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.simulation.simulate import simulate


def scalar() -> InferenceProblem:
    """ẋ = −2x: 1-1-1 with unit weights, clamped to zero at both ends."""
    layers = [Dense([[1.0]]), Dense([[1.0]])]
    return InferenceProblem(Network(layers), input=[0.0], output=[0.0], energy=Gaussian())


@pytest.mark.parametrize(
    ("t1", "dt", "steps"), [(0.3, 0.1, 3), (0.7, 0.1, 7), (1.0, 0.1, 10), (0.6, 0.2, 3)]
)
def test_euler_takes_as_many_steps_as_fit(t1: float, dt: float, steps: int) -> None:
    """0.3 / 0.1 is 2.999… in floating point and three steps all the same."""
    run = simulate(scalar(), t1=t1, times=[t1 / 2], initial=([1.0],), integrator=Euler(dt=dt))
    assert run.accepted_steps == steps
    assert run.end_time == t1


def test_rodas5p_between_steps_is_the_published_method() -> None:
    """One step of z = −1 from 1, as the published coefficients give it in exact arithmetic.

    Those of Steinebach (2023) in the form of Hairer and Wanner's RODAS, with its dense output
    y + θ(y_1 − y) + θ(1 − θ)(K_1 + θ K_2 + θ² K_3), were evaluated in rational numbers. Weights of
    the last increments contribute to the fifth order of the step only, and so to no order of the
    dense output. Coefficients of up to 170 leave round-off of 1e-13.
    """
    published = [0.7787871352427383, 0.6065203962244019, 0.4723952044103718, 0.3678803089370513]
    run = simulate(scalar(), t1=0.5, times=[0.125, 0.25, 0.375, 0.5], initial=([1.0],),
                   integrator=Diffrax("rodas5p", dt=0.5))  # fmt: skip
    np.testing.assert_allclose(run.activities[1][:, 0], published, rtol=0, atol=1e-12)


def test_the_fallback_has_the_tolerances_of_the_method() -> None:
    """LSODA at 1e-11 is three orders nearer to e^{−2t} than at its default of 1e-6."""
    method = Diffrax("tsit5", rtol=1e-11, atol=1e-13, max_steps=3)
    run = simulate(scalar(), t1=3.0, initial=([1.0],), integrator=method)
    assert "LSODA" in run.fallback
    np.testing.assert_allclose(run.activities[1][:, 0], np.exp(-2 * run.times), rtol=0, atol=1e-9)


def test_the_error_of_a_batch_is_that_of_its_worst_sample() -> None:
    """One moving sample takes the same steps beside 31 at rest: their errors are not averaged."""
    problem = InferenceProblem(scalar().network, input=np.zeros((32, 1)), output=np.zeros((32, 1)))
    start = np.zeros((32, 1))
    start[7] = 1.0
    together = simulate(problem, t1=3.0, initial=(start,))
    alone = simulate(scalar(), t1=3.0, initial=([1.0],))
    assert together.accepted_steps == alone.accepted_steps
    np.testing.assert_allclose(together.activities[1][:, 7], alone.activities[1], atol=1e-12)
