"""From what an integrator returns to a trajectory: what is observed, trimmed and said of it."""

from __future__ import annotations

import dataclasses
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.namespaces import array_namespace
from pcdyn._support.timing import Stopwatch
from pcdyn._support.types import Activities, Scalar, State, Values
from pcdyn.errors import MOST_SAMPLES_NAMED, Status, worst_status
from pcdyn.integrators import Integration, Integrator
from pcdyn.integrators.base import Interpolation, Request
from pcdyn.integrators.run import on_host
from pcdyn.model.flow import Flow
from pcdyn.model.stacked import StackedProblem
from pcdyn.simulation.trajectory import Trajectory


class Observed(eqx.Module):
    """What is derived from the activities at the saved times."""

    errors: Activities
    energies: Values
    norms: Values


@eqx.filter_jit
def observe(problem: Flow, times: Array, states: State) -> Observed:
    """Derive from several states what a trajectory holds besides activities."""
    flow = problem.prepared()

    def at(t: Array, state: State) -> Observed:
        errors, energies = flow.observe(t, state)
        return Observed(errors, energies, flow.norms(flow.vector_field(t, state)))

    return jax.vmap(at)(times, states)


def traced_trajectory(
    problem: Flow, request: Request, run: Integration, method: Integrator
) -> Trajectory:
    """The trajectory inside of a transformation, where nothing is trimmed."""
    states, times = tuple(x[:-1] for x in run.states), jnp.asarray(request.times)
    observed = observe(request.problem, times.astype(problem.dtype), states)
    run = _without_overflow(run, observed)
    found = _build(problem, run, observed, states, times, method, request)
    # As arrays, counts and times get the axis of the networks as all the rest does.
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, int | float) else x, found)


def _without_overflow(run: Integration, observed: Observed) -> Integration:
    """A field can vanish because the energy it is of has overflowed: that is no equilibrium."""
    last = observed.energies[-1]
    xp = array_namespace(last)
    finite = xp.isfinite(last).all(axis=tuple(range(np.ndim(run.status), last.ndim)))
    vanished = (run.status == Status.CONVERGED) & ~finite
    # As nearly always: a new run costs as much as the looking.
    if xp is np and not np.any(vanished):
        return run
    status = xp.where(vanished, int(Status.NON_FINITE), run.status)
    return dataclasses.replace(run, status=status)


def _build(
    problem: Flow,
    run: Integration,
    observed: Observed,
    states: State,
    times: Values,
    method: Integrator,
    request: Request,
    *,
    fallback: str = "",
    message: str = "",
) -> Trajectory:
    """The trajectory of `problem` from states of what was integrated, which may be stacked."""
    integrated, noise = request.problem, request.noise
    errors, interpolation = observed.errors, run.interpolation
    if interpolation is not None:
        interpolation = _DenseActivities(problem, integrated, interpolation)
    states = _layers_of(integrated, states)
    if isinstance(integrated, StackedProblem):
        errors = integrated.unpack_errors(errors)
    xp = array_namespace(times)
    activities = problem.activities_along(times, states)
    last = tuple(range(len(activities)))[len(activities) - len(errors) :]
    return Trajectory(
        times=times,
        activities=activities,
        prediction_errors=errors,
        energies=observed.energies,
        vector_field_norms=observed.norms,
        status_codes=xp.asarray(run.status),
        end_time=run.end_time,
        statistics=run.statistics,
        interpolation=interpolation,
        integrator=method.name,
        free_layers=problem.free_layers,
        targets=last if problem.targets is None else problem.targets,
        outputs=problem.outputs,
        moving=problem.moving(states),
        round_off=run.round_off,
        temperature=None if noise is None else noise.temperature,
        fallback=fallback,
        message=message,
    )


class _DenseActivities(eqx.Module):
    """Dense output of the state as activities of all layers."""

    problem: Flow
    integrated: Flow
    interpolation: Interpolation

    def __call__(self, t: Scalar) -> Activities:
        state = self.interpolation(jnp.asarray(t))
        return self.problem.activities(_layers_of(self.integrated, state))


def _layers_of(problem: Flow, state: State) -> State:
    """An array for each free layer, whatever the state of the problem is."""
    return problem.unpack(state) if isinstance(problem, StackedProblem) else state


def trajectory_of(
    problem: Flow,
    request: Request,
    run: Integration,
    observed: Observed,
    method: Integrator,
    fallback: str,
    clock: Stopwatch,
) -> Trajectory:
    """The trajectory without padding: the times reached, and the end if it came early."""
    run = _without_overflow(run, observed)
    times, end = request.times, float(np.max(run.end_time))
    worst = worst_status(run.status)
    rows = np.flatnonzero(times <= end)
    ended_early = worst is not Status.REACHED_T1 and (rows.size == 0 or times[rows[-1]] < end)
    if ended_early and np.isfinite(observed.norms[-1]).any():
        rows = np.append(rows, len(times))
    all_times = cast(Values, np.append(times, end)[rows])
    states = tuple(x[rows] for x in run.states)
    observed = jax.tree.map(lambda x: x[rows], observed)
    statistics = dataclasses.replace(
        run.statistics, compile_seconds=clock.compile_seconds, run_seconds=clock.run_seconds
    )
    run = dataclasses.replace(run, statistics=statistics)
    return _build(
        on_host(problem), run, observed, states, all_times, method, request,
        fallback=fallback, message=_message(worst, run, method),
    )  # fmt: skip


def _message(status: Status, run: Integration, method: Integrator) -> str:
    text = f"{status.name}: {status.explanation}"
    if method.fixed_step is not None and status in (Status.NON_FINITE, Status.UNSTABLE_STEP):
        text += f" (dt={method.fixed_step:g})"
    failed = np.flatnonzero(Status.failed(np.atleast_1d(run.status)))
    if np.ndim(run.status) and failed.size:
        shown = ", ".join(map(str, failed[:MOST_SAMPLES_NAMED]))
        more = ", ..." if failed.size > MOST_SAMPLES_NAMED else ""
        text += f"; {failed.size} of {np.size(run.status)} samples: {shown}{more}"
    return f"{text}. {run.message}" if run.message else text
