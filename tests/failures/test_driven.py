"""Signals and driven problems that cannot be: each is refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcdyn
from pcdyn.errors import (
    DenseOutputError,
    DtypeError,
    InputError,
    IntegratorError,
    NonFiniteError,
    NotLinearError,
    ShapeError,
    TimesError,
)

NET = pcdyn.mlp([2, 3, 2], activation="tanh", key=jax.random.key(0))
ONCE, TWICE = pcdyn.Gaussian(1.0), pcdyn.Gaussian(2.0)
LINE = pcdyn.mlp([2, 3, 2], activation="identity", key=jax.random.key(0))
ROWS, OUT = np.arange(4.0).reshape(2, 2), np.ones(2)
# Of types that checkers would refuse where they stand.
STEP: Any = pcdyn.PiecewiseConstant([0.0, 1.0], ROWS)
SINE: Any = pcdyn.Signal(lambda t: jnp.sin(t) * jnp.ones(2))


def driven(net: pcdyn.Network = NET, **changes: Any) -> Any:
    return pcdyn.DrivenProblem(net, **{"input": STEP, "output": OUT, **changes})


# What is done, the exception, and words of its message.
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "times that do not increase": (
        lambda: pcdyn.PiecewiseConstant([0.0, 2.0, 1.0], np.ones((3, 2))), TimesError, "sort them"),
    "times that repeat": (
        lambda: pcdyn.PiecewiseLinear([0.0, 1.0, 1.0], np.ones((3, 2))), TimesError, "repeats"),
    "a beginning after 0": (
        lambda: pcdyn.PiecewiseLinear([1.0, 2.0], ROWS), TimesError, "begins at 1"),
    "one time of a line": (
        lambda: pcdyn.PiecewiseLinear([0.0], ROWS[:1]), TimesError, "2 times at least"),
    "no times": (lambda: pcdyn.PiecewiseConstant([], []), TimesError, "vector of times"),
    "another number of values": (
        lambda: pcdyn.PiecewiseConstant([0.0, 1.0, 2.0], ROWS), ShapeError,
        "3 times, but 2 values"),
    "NaN among the values": (
        lambda: pcdyn.PiecewiseConstant([0.0, 1.0], ROWS * np.nan), NonFiniteError,
        "values of the"),
    "NaN among the times": (
        lambda: pcdyn.PiecewiseConstant([0.0, np.nan], ROWS), TimesError, "NaN"),
    "texts for values": (
        lambda: pcdyn.PiecewiseConstant([0.0, 1.0], "on"), DtypeError, "values of the signal"),
    "energies of two kinds": (
        lambda: pcdyn.PiecewiseConstant([0.0, 1.0], [pcdyn.Gaussian(), pcdyn.LogCosh()]),
        InputError, "of one kind"),
    "precisions of two shapes": (
        lambda: pcdyn.PiecewiseConstant([0, 1], [pcdyn.Gaussian(1.0), pcdyn.Gaussian(np.ones(2))]),
        ShapeError, "one shape"),
    "times that are traced": (
        lambda: jax.jit(lambda t: pcdyn.PiecewiseConstant(t, ROWS)(0.0))(jnp.arange(2.0)),
        TimesError, "traced"),
    "a spline through traced values": (
        lambda: jax.jit(lambda v: pcdyn.Interpolated([0.0, 1.0], v)(0.0))(ROWS), InputError,
        "PiecewiseLinear"),
    "no function": (lambda: pcdyn.Signal(STEP.values), InputError, "function of time"),
    "jumps that do not increase": (
        lambda: pcdyn.Signal(jnp.sin, jumps=(2.0, 1.0)), TimesError, "jumps must increase"),
    "nothing that changes": (
        lambda: pcdyn.DrivenProblem(NET, input=ROWS[0], output=OUT), InputError, "nothing changes"),
    "a signal for a problem that does not change": (
        lambda: pcdyn.InferenceProblem(NET, input=STEP, output=OUT), InputError, "DrivenProblem"),
    "an energy that changes in one that does not": (
        lambda: pcdyn.InferenceProblem(NET, input=OUT, energy=[ONCE, STEP]), InputError,
        "DrivenProblem"),
    "values of another width": (
        lambda: driven(input=pcdyn.PiecewiseConstant([0.0], np.ones((1, 3)))), ShapeError,
        "input has"),
    "a function of another width": (
        lambda: driven(input=pcdyn.Signal(lambda t: jnp.ones(3))), ShapeError, "input has"),
    "two sizes of batch": (
        lambda: driven(
            input=pcdyn.PiecewiseConstant([0, 1], np.ones((2, 4, 2))), output=np.ones((3, 2))),
        ShapeError, "batch size"),
    "a precision that is no energy": (
        lambda: driven(energy=pcdyn.PiecewiseConstant([0, 1], [1.0, 2.0])), InputError, "energy"),
    "a time constant that is negative": (
        lambda: driven(time_constants=[1, pcdyn.PiecewiseConstant([0], [-1.0]), 1]), InputError,
        "positive"),
    "a signal that ends before t1": (
        lambda: pcdyn.simulate(driven(input=pcdyn.PiecewiseLinear([0.0, 1.0], ROWS)), t1=2.0),
        TimesError, "ends at 1"),
    "a spline that ends before t1": (
        lambda: pcdyn.simulate(driven(input=pcdyn.Interpolated([0.0, 1.0], ROWS)), t1=2.0),
        TimesError, "ends at 1"),
    "the problem of a time after the end": (
        lambda: driven(input=pcdyn.PiecewiseLinear([0.0, 1.0], ROWS)).at(1.5), TimesError,
        "at most 1"),
    "the problem of a time before 0": (lambda: driven().at(-0.5), TimesError, "at least 0"),
    "waiting for rest": (
        lambda: pcdyn.simulate(driven(), t1=1.0, until="equilibrium"), IntegratorError, "time"),
    "an equilibrium of what changes": (
        lambda: pcdyn.equilibrium(driven()), InputError, r"problem\.at\(t\)"),
    "a closed form of what changes": (
        lambda: pcdyn.linear_equilibrium(driven(LINE)), InputError, r"problem\.at\(t\)"),
    "a file of what changes": (
        lambda: pcdyn.save_problem(driven(), "x.nc"), InputError, r"problem\.at\(t\)"),
    "backpropagation through what changes": (
        lambda: pcdyn.backpropagation(driven()), InputError, r"problem\.at\(t\)"),
    "a closed form along a curve": (
        lambda: pcdyn.simulate(driven(LINE, input=SINE), t1=1.0, integrator=pcdyn.Exact()),
        NotLinearError, "straight"),
    "a closed form along which a precision slides": (
        lambda: pcdyn.simulate(
            driven(LINE, energy=pcdyn.PiecewiseLinear([0, 9], [ONCE, TWICE])),
            t1=1.0, integrator=pcdyn.Exact()),
        NotLinearError, "jumps alone"),
    "a closed form of a network that is not linear": (
        lambda: pcdyn.simulate(driven(), t1=1.0, integrator=pcdyn.Exact()), NotLinearError,
        "identity"),
    "samples of a single one": (
        lambda: pcdyn.simulate(driven(), t1=1.0, per_sample=True), ShapeError, "single sample"),
    "dense output over jumps under jit": (
        lambda: jax.jit(lambda p: pcdyn.simulate(p, t1=2.0, dense=True).energies)(driven()),
        DenseOutputError, "times at which"),
}  # fmt: skip


@pytest.mark.unchecked
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name: str) -> None:
    do, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        do()


def test_what_a_jump_does_to_a_run_that_fails() -> None:
    """A sample that diverged stays failed after the next jump, and its rows say so."""
    low = np.stack([np.zeros((2, 2)), np.stack([np.zeros(2), np.full(2, 1e3)])])
    problem = driven(LINE, input=pcdyn.PiecewiseConstant([0.0, 1.0], low), output=np.zeros((2, 2)))
    with pytest.warns(pcdyn.StepSizeWarning):
        run: Any = pcdyn.simulate(
            problem, t1=3000.0, integrator=pcdyn.Euler(dt=3.0), per_sample=True, throw=False,
            times=[0.0, 3.0, 3000.0], initial=(np.zeros((2, 3)),),
        )  # fmt: skip
    assert [status.name for status in run.status] == ["REACHED_T1", "NON_FINITE"]
    assert np.isnan(run.activities[1][-1, 1]).all() and np.isfinite(run.activities[1][:, 0]).all()
    assert run.end_time[0] == 3000.0 and 1.0 < run.end_time[1] < 3000.0


def test_a_run_that_runs_out_of_steps_ends_there() -> None:
    problem = driven(input=pcdyn.PiecewiseConstant([0.0, 1.0], ROWS))
    integrator = pcdyn.Diffrax("tsit5", rtol=1e-10, atol=1e-12, max_steps=8, fallback=None)
    run: Any = pcdyn.simulate(problem, t1=50.0, integrator=integrator, throw=False)
    assert run.status is pcdyn.Status.MAX_STEPS and len(run.times) < 101
    assert run.end_time < 50.0


def test_another_method_takes_over_between_two_jumps() -> None:
    problem = driven(input=pcdyn.PiecewiseConstant([0.0, 1.0], ROWS))
    integrator = pcdyn.Diffrax("tsit5", rtol=1e-9, atol=1e-12, max_steps=20)
    run: Any = pcdyn.simulate(problem, t1=20.0, integrator=integrator)
    assert run.ok and run.fallback.startswith("from t=1 LSODA")
    close = pcdyn.simulate(problem, t1=20.0, integrator=pcdyn.Diffrax("rodas5p", rtol=1e-9))
    np.testing.assert_allclose(run.activities[1], close.activities[1], atol=1e-6)


def test_a_sample_that_ran_out_of_steps_does_not_go_on_after_the_next_jump() -> None:
    low = np.stack([np.stack([np.zeros(2), np.full(2, 30.0)]), np.zeros((2, 2))])
    problem = driven(input=pcdyn.PiecewiseConstant([0.0, 50.0], low), output=np.zeros((2, 2)))
    start = (np.stack([np.full(3, 1e-3), np.full(3, 5.0)]),)
    fine: Any = {"rtol": 1e-9, "atol": 1e-12}
    options: Any = {
        "per_sample": True,
        "initial": start,
        "throw": False,
        "times": [0.0, 50.0, 51.0],
    }
    first: Any = pcdyn.simulate(
        problem, t1=50.0, **{**options, "times": [0.0]}, integrator=pcdyn.Diffrax("tsit5", **fine)
    )
    steps = first.accepted_steps + first.rejected_steps
    assert steps[0] < steps[1]
    few = pcdyn.Diffrax("tsit5", **fine, max_steps=int(steps[0]) + 1, fallback=None)
    run: Any = pcdyn.simulate(problem, t1=51.0, **options, integrator=few)
    assert [status.name for status in run.status] == ["REACHED_T1", "MAX_STEPS"]
    assert run.end_time[0] == 51.0 and run.end_time[1] < 50.0
    assert np.isnan(run.activities[1][1:, 1]).all() and np.isfinite(run.activities[1][:, 0]).all()
