"""Where a run ends at once, cannot start, or ends at different times for different samples."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn.errors import (
    IntegratorError,
    NonFiniteError,
    PrecisionError,
    ShapeError,
    Status,
    TimesError,
)
from pcdyn.integrators import Diffrax, Euler, SciPy
from pcdyn.model.activations import Activation
from pcdyn.model.energies.energy import Energy, Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import target_propagation
from pcdyn.references.linear import linear_equilibrium
from pcdyn.simulation.simulate import simulate
from tests.networks import build_case

EXPONENTIAL = Activation("exp", jnp.exp)
ROOT = Activation("root", jnp.sqrt)


def scalar_chain(activation: Activation, target: float) -> InferenceProblem:
    """1-1-1: x_1 is free, its prediction of the target is f(x_1)."""
    layers = [Dense(np.eye(1)), Dense(np.eye(1), None, activation)]
    return InferenceProblem(Network(layers), input=[1.0], output=[target])


@pytest.mark.slow
@pytest.mark.parametrize("integrator", ["tsit5", "kvaerno5", "lsoda", "radau", Euler(dt=0.1)])
def test_a_feedforward_pass_without_output_is_at_rest(integrator: Any) -> None:
    """By Theorem 3.1 the field vanishes at the start: converged at once, with the start saved."""
    case = build_case(seed=1, widths=(3, 3, 2), clamp="input", activations=("tanh",))
    run = simulate(case.problem, t1=50.0, until="equilibrium", integrator=integrator)
    assert run.status is Status.CONVERGED
    assert run.times.tolist() == [0.0]
    for ours, theirs in zip(run.final, case.feedforward(case.input), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "integrator", ["rk45", "rk23", "dop853", "radau", "bdf", "lsoda", "tsit5", Euler(dt=0.1)]
)
def test_a_field_that_is_infinite_from_the_start_ends_the_run(integrator: Any) -> None:
    """exp(800) overflows: no method may return a number, or never return."""
    problem = scalar_chain(EXPONENTIAL, 1.0)
    run = simulate(problem, t1=1.0, initial=([800.0],), integrator=integrator, throw=False)
    assert run.status is Status.NON_FINITE
    assert not run.ok


def test_a_vanishing_step_is_told_and_handed_over() -> None:
    """√x with the target 0 pulls x_1 from 1 to 0, beyond which the field is NaN."""
    layers = [Dense(np.eye(1)), Dense(np.eye(1), None, ROOT)]
    problem = InferenceProblem(Network(layers), input=[-1.0], output=[0.0])
    alone = simulate(
        problem, t1=10.0, initial=([1.0],), integrator=Diffrax(fallback=None), throw=False
    )
    assert alone.status is Status.STEP_TOO_SMALL
    helped = simulate(problem, t1=10.0, initial=([1.0],), throw=False)
    assert "LSODA" in helped.fallback
    assert not helped.ok


def test_a_fixed_step_is_never_replaced_by_an_adaptive_one() -> None:
    """Who asks for a step of 0.1 and 5 of them is told that they do not suffice.

    Before they run, but where the run may end early.
    """
    case, five = build_case(seed=1, widths=(2, 3, 2)), Diffrax("heun", dt=0.1, max_steps=5)
    with pytest.raises(IntegratorError, match="needs 200 steps"):
        simulate(case.problem, t1=20.0, integrator=five)
    run = simulate(case.problem, t1=20.0, integrator=five, until="equilibrium", throw=False)
    assert run.status is Status.MAX_STEPS
    assert run.fallback == ""


@pytest.mark.parametrize("integrator", ["tsit5", "rk45"])
def test_dense_output_of_a_failed_sample_leaves_the_others(integrator: str) -> None:
    """Sample 1 starts where exp overflows; samples 0 and 2 are those of runs without it."""
    layers = [Dense(np.eye(1)), Dense(np.eye(1), None, EXPONENTIAL)]
    data = {"input": np.ones((3, 1)), "output": np.ones((3, 1))}
    start = np.array([[1.0], [800.0], [0.5]])
    run = simulate(
        InferenceProblem(Network(layers), **data), t1=2.0, initial=(start,), per_sample=True,
        dense=True, integrator=integrator, throw=False,
    )  # fmt: skip
    alone = simulate(
        InferenceProblem(Network(layers), input=[1.0], output=[1.0]), t1=2.0, initial=(start[2],),
        dense=True, integrator=integrator,
    )  # fmt: skip
    assert run.status == (Status.REACHED_T1, Status.NON_FINITE, Status.REACHED_T1)
    hidden = np.asarray(run(1.3)[1])
    assert np.isnan(hidden[1]).all()
    np.testing.assert_allclose(hidden[2], np.asarray(alone(1.3)[1]), rtol=1e-12)


def test_dense_output_ends_where_a_sample_failed() -> None:
    """Soon after that as well it is NaN, while the sample at rest goes on to t1."""
    case = build_case(seed=1, widths=(2, 3, 2), batch=2)
    (rest,) = (np.array(x) for x in linear_equilibrium(case.problem)[1:-1])
    rest[1] += 1e6
    few = Diffrax("tsit5", max_steps=40, fallback=None)
    run = simulate(
        case.problem, t1=20.0, initial=(rest,), integrator=few, dense=True, per_sample=True,
        throw=False,
    )  # fmt: skip
    assert run.status == (Status.REACHED_T1, Status.MAX_STEPS)
    assert 0 < run.end_time[1] < 10
    for later in (1.01, 1.5, 1.99):
        hidden = np.asarray(run(later * run.end_time[1])[1])
        np.testing.assert_allclose(hidden[0], rest[0], rtol=0, atol=1e-9)
        assert np.isnan(hidden[1]).all()


def test_trajectories_are_compared_at_the_same_times_only() -> None:
    """Equal numbers of saves are not equal times, and a batch is not a list of times."""
    case = build_case(seed=1, widths=(2, 3, 2))
    batch = build_case(seed=1, widths=(2, 3, 2), batch=5)
    short, long = (simulate(case.problem, t1=t1, integrator="exact") for t1 in (1.0, 2.0))
    with pytest.raises(TimesError, match="different times"):
        short.distance_to(long)
    many = simulate(batch.problem, t1=1.0, times=np.linspace(0, 1, 5), integrator="exact")
    single = simulate(case.problem, t1=1.0, times=np.linspace(0, 1, 5), integrator="exact")
    assert many.distance_to(single).shape == (5, 5)
    expected = np.linalg.norm(many.activities[1] - single.activities[1][:, None], axis=-1)
    np.testing.assert_allclose(many.distance_to(single), expected)
    with pytest.raises(ShapeError, match="does not fit"):
        single.distance_to(many)
    constant = many.distance_to(linear_equilibrium(batch.problem))
    rest = np.asarray(linear_equilibrium(batch.problem)[1])
    np.testing.assert_allclose(constant, np.linalg.norm(many.activities[1] - rest, axis=-1))


def test_a_run_without_saved_times_can_be_printed() -> None:
    """It failed before the first requested time."""
    problem = scalar_chain(EXPONENTIAL, 1.0)
    run = simulate(problem, t1=1.0, times=[0.5], initial=([800.0],), integrator="lsoda",
                   throw=False)  # fmt: skip
    assert len(run.times) == 0
    assert "NON_FINITE" in repr(run)
    with pytest.raises(TimesError, match="no time was saved"):
        _ = run.final


def test_values_are_checked_in_the_dtype_of_the_network() -> None:
    """What is finite, positive or SPD in float64 need not be so in float32."""
    network = Network([Dense(np.eye(2, dtype=np.float32)) for _ in range(2)])
    with pytest.raises(NonFiniteError, match="float32"):
        InferenceProblem(network, input=[1e60, 1.0])
    near = 1 - 1e-9
    for precision in (1e-60, [1.0, np.array([[1.0, near], [near, 1.0]])]):
        energy = Gaussian(precision)
        with pytest.raises(PrecisionError):
            InferenceProblem(network, input=[1.0, 1.0], energy=energy)


class Scaled(Energy):
    """`scale · Σ ε²`, with a Python number among its fields."""

    scale: float = 0.5

    def value(self, error: Any, target: Any) -> Any:
        return self.scale * jnp.sum(error**2, axis=-1)


def test_an_energy_may_hold_plain_numbers() -> None:
    """With scale ½ it is the Gaussian energy of unit precision."""
    case = build_case(seed=1, widths=(2, 3, 2))
    ours = InferenceProblem(case.network, input=case.input, output=case.output, energy=Scaled())
    np.testing.assert_allclose(
        ours.free_energy(case.state), case.free_energy(case.activities), rtol=1e-13
    )


def test_a_tall_weight_reaches_only_what_is_in_its_range() -> None:
    """W t = T has no solution for most T if W has more rows than columns."""
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    targets = np.array([[1.0, -5.0, 7.0], [1.0, 2.0, 3.0]])
    found = target_propagation(InferenceProblem(Network([Dense(weight)]), output=targets))
    assert np.asarray(found.exists).tolist() == [False, True]
    np.testing.assert_allclose(np.asarray(found.values[0])[1], [1.0, 2.0], rtol=1e-12)


def test_flat_directions_stay_flat_for_ever() -> None:
    """With n_0 > n_1 and the input free, round-off in zero rates must not grow with time."""
    case = build_case(seed=4, widths=(5, 3, 2), clamp="output")
    early, late = (
        simulate(case.problem, t1=t1, initial=case.state, integrator="exact").final[0]
        for t1 in (1e4, 1e18)
    )
    np.testing.assert_allclose(late, early, rtol=0, atol=1e-9)


def test_the_fallback_keeps_the_tolerances_of_a_controller() -> None:
    """LSODA at 1e-11 is three orders closer to the truth than at its default."""
    import diffrax

    case = build_case(seed=1, widths=(2, 3, 2))
    controller = diffrax.PIDController(rtol=1e-11, atol=1e-13)
    run = simulate(case.problem, t1=3.0, integrator=Diffrax(controller=controller, max_steps=3))
    exact = simulate(case.problem, t1=3.0, integrator="exact")
    assert "LSODA" in run.fallback
    assert np.max(run.distance_to(exact)) < 1e-9


def test_float32_runs_ask_scipy_for_what_float32_can_give() -> None:
    """At 1e-6 the noise of a float32 field would be integrated: some 50 000 evaluations."""
    case = build_case(seed=1, widths=(5, 9, 5), activations=("tanh",))
    layers = [Dense(np.asarray(w, np.float32), None, "tanh") for w in case.weights]
    problem = InferenceProblem(Network(layers), input=case.input, output=case.output)
    run = simulate(problem, t1=300.0, integrator=SciPy("LSODA"))
    assert run.vector_field_evaluations < 1000
    assert {x.dtype for x in run.activities} == {np.dtype(np.float32)}
