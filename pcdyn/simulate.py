"""`simulate`: integrate the gradient flow of an inference problem into a trajectory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn.checks import Numbers, is_traced
from pcdyn.errors import (
    IntegratorError,
    ShapeError,
    Status,
    TimesError,
    simulation_error,
    worst_status,
)
from pcdyn.integrators import Diffrax, Integration, Integrator, SciPy, UntilEquilibrium
from pcdyn.integrators import get_integrator as _get_integrator
from pcdyn.integrators.base import Flow, field_norms
from pcdyn.problem import InferenceProblem, State
from pcdyn.timing import Stopwatch
from pcdyn.trajectory import Trajectory

_DEFAULT_SAVES = 101


def simulate(
    problem: InferenceProblem,
    *,
    t1: float,
    times: Numbers | None = None,
    initial: str | Sequence[Numbers] = "feedforward",
    integrator: str | Integrator = "tsit5",
    until: Literal["equilibrium"] | UntilEquilibrium | None = None,
    per_sample: bool = False,
    dense: bool = False,
    throw: bool = True,
) -> Trajectory:
    """Integrate `τ_l dx_l/dt = −∂F/∂x_l` from t = 0 to `t1`.

    Arguments:

    - `t1`: the end time, in units of the activity time constant.
    - `times`: increasing times within 0 … t1 to save at; 101 evenly spaced ones unless given.
    - `initial`: `"feedforward"`, `"zeros"` or a state (see `problem.random_state`).
    - `integrator`: a name (`"tsit5"`, `"kvaerno5"`, `"lsoda"`, `"exact"`, …) or a value such as
      `pcdyn.Diffrax("dopri8", rtol=1e-9)`, `pcdyn.SciPy("Radau")`, `pcdyn.Euler(dt=0.05)`,
      `pcdyn.Exact()`.
    - `until`: `"equilibrium"` or `pcdyn.UntilEquilibrium(…)` stops before t1 when the vector
      field is small in every layer; the state there becomes the last saved one.
    - `per_sample`: give every sample of a batch its own step size, statistics and status;
      otherwise one step size serves the batch.
    - `dense`: keep the solver's interpolation, so that `trajectory(t)` works at any time. diffrax
      then reserves memory for `max_steps` steps.
    - `throw`: raise `pcdyn.SimulationError` if any sample fails, with what was computed in its
      `trajectory`; with `throw=False` the status says so instead.

    Where diffrax runs out of steps or its step vanishes, SciPy's LSODA takes over on the host and
    the trajectory's `fallback` says so (`pcdyn.Diffrax(…, fallback=None)` switches it off).

    Under `jax.vmap` or `jax.jit`, over networks and data alike, nothing is raised, trimmed or
    handed to SciPy: look at `status_codes`. The times must be known then.

    Raises `TimesError`, `IntegratorError`, `ToleranceError` and what the problem and the initial
    state raise, before anything runs.
    """
    method = _get_integrator(integrator)
    stop = _stopping(until, problem)
    method.check(problem, stop, dense)
    save_times = _checked_times(t1, times)
    state = problem.initial_state(initial)
    if per_sample and state[0].ndim != 2:
        raise ShapeError("per_sample=True needs a batch; this problem has a single sample")
    if is_traced(problem, state):
        if not method.runs_in_jax:
            raise IntegratorError(
                f"{method.name} runs on the host and cannot be transformed by JAX; use diffrax"
            )
        run = _integrate(problem, state, save_times, t1, method, stop, per_sample, dense)
        return _traced_trajectory(problem, run, save_times, method)
    with Stopwatch() as clock:
        run, fallback = _run(problem, state, save_times, t1, method, stop, per_sample, dense)
        observed = _on_host(_observe(problem, run.states))
    trajectory = _trajectory(problem, run, observed, save_times, method, fallback, clock)
    if throw and not trajectory.ok:
        worst = worst_status(trajectory.status_codes)
        raise simulation_error(worst, f"{method.name}: {trajectory.message}", trajectory)
    return trajectory


def _stopping(
    until: str | UntilEquilibrium | None, problem: InferenceProblem
) -> UntilEquilibrium | None:
    if until is None:
        return None
    if isinstance(until, UntilEquilibrium):
        return until.resolved(problem.network.dtype)
    if until == "equilibrium":
        return UntilEquilibrium().resolved(problem.network.dtype)
    raise IntegratorError(
        f'until={until!r} is unknown: use "equilibrium" or pcdyn.UntilEquilibrium(tolerance=…)'
    )


def _checked_times(t1: float, times: Numbers | None) -> np.ndarray:
    if not (math.isfinite(t1) and t1 > 0):
        raise TimesError(f"t1 must be positive and finite, got {t1}; time starts at 0")
    if times is None:
        return np.linspace(0.0, t1, _DEFAULT_SAVES)
    array = np.asarray(times, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise TimesError(f"times must be a vector of at least one time, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise TimesError("times contain NaN or infinity")
    if np.any(np.diff(array) <= 0):
        where = int(np.argmax(np.diff(array) <= 0))
        raise TimesError(
            f"times must increase, but times[{where + 1}] = {array[where + 1]:g} follows "
            f"{array[where]:g}; sort them and drop repeats"
        )
    if array[0] < 0 or array[-1] > t1:
        raise TimesError(
            f"times from {array[0]:g} to {array[-1]:g} leave the integrated range 0 … {t1:g}"
        )
    return array


def _integrate(
    problem: InferenceProblem,
    state: State,
    times: Any,
    t1: Any,
    method: Integrator,
    until: UntilEquilibrium | None,
    per_sample: bool,
    dense: bool,
) -> Integration:
    """Integrate in JAX; the end state becomes one more row after the saved times."""
    if not per_sample:
        return _checked_run(problem, state, times, t1, method, until, dense)

    def one(input: Array | None, output: Array | None, sample: State) -> Integration:
        single = _with_data(problem, input, output)
        return _checked_run(single, sample, times, t1, method, until, dense)

    return _batch_of(eqx.filter_vmap(one)(problem.input, problem.output, state))


def _with_data(
    problem: InferenceProblem, input: Array | None, output: Array | None
) -> InferenceProblem:
    return eqx.tree_at(
        lambda p: (p.input, p.output), problem, (input, output), is_leaf=lambda x: x is None
    )


def _batch_of(run: Integration) -> Integration:
    """Time first, then the sample; one dense output for all."""
    interpolation = run.interpolation
    if interpolation is not None:
        interpolation = _EachSample(interpolation)
    return dataclasses.replace(
        run,
        states=tuple(jnp.moveaxis(x, 0, 1) for x in run.states),
        interpolation=interpolation,
    )


class _EachSample(eqx.Module):
    """Dense outputs of several samples as one function of time."""

    interpolations: Any

    def __call__(self, t: Any) -> State:
        return eqx.filter_vmap(lambda each: each(t))(self.interpolations)


def _checked_run(
    problem: InferenceProblem,
    state: State,
    times: Any,
    t1: Any,
    method: Integrator,
    until: UntilEquilibrium | None,
    dense: bool,
) -> Integration:
    times = jnp.asarray(times)
    run = method.integrate(problem, state, times, t1, until, dense)
    run = _with_end_row(run, times)
    run = _without_non_finite(run, times, state)
    return run if method.fixed_step is None else _with_stability(problem, run)


def _with_end_row(run: Integration, times: Array) -> Integration:
    """Hold the end state at times after the end; add it as a last row."""
    reached = times <= run.end_time

    def extend(saved: Array, end: Array) -> Array:
        mask = reached.reshape(-1, *[1] * end.ndim)
        return jnp.concatenate([jnp.where(mask, saved, end[None]), end[None]])

    states = tuple(extend(s, e) for s, e in zip(run.states, run.end_state, strict=True))
    return dataclasses.replace(run, states=states)


def _without_non_finite(run: Integration, times: Array, state: State) -> Integration:
    """End a run before its first non-finite row, whatever the solver thought of it."""
    rows = jnp.stack([_finite_rows(x) for x in run.states]).all(axis=0)
    finite = jnp.cumprod(rows).astype(bool)
    failed = ~finite[-1]
    last_good = jnp.max(jnp.where(finite[:-1], times, 0))
    failure = run.status > Status.CONVERGED
    status = jnp.where(failed & (~failure | (run.status == Status.NON_FINITE)),
                       int(Status.NON_FINITE), run.status)  # fmt: skip
    end_time = jnp.where(failed, jnp.minimum(last_good, run.end_time), run.end_time)
    # After a failure there is no state to show.
    beyond = jnp.append(times > end_time, failed | (status > Status.CONVERGED))
    keep = finite & ~(beyond & (status > Status.CONVERGED))
    states = tuple(jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan) for x in run.states)
    return dataclasses.replace(run, states=states, status=status, end_time=end_time)


def _finite_rows(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def _with_stability(problem: InferenceProblem, run: Integration) -> Integration:
    """A fixed step is unstable if it lets the free energy rise, which the flow never does."""
    energy = jax.vmap(problem.free_energy)(run.states)
    energy = energy.reshape(energy.shape[0], -1)
    last = jnp.where(jnp.isnan(energy[-1]), -jnp.inf, energy[-1])
    margin = 1e-3 * energy[0] + 1e3 * jnp.finfo(energy.dtype).eps
    unstable = jnp.any(last > jnp.nanmin(energy, axis=0) + margin)
    ok = run.status <= Status.CONVERGED
    status = jnp.where(unstable & ok, int(Status.UNSTABLE_STEP), run.status)
    return dataclasses.replace(run, status=status)


@eqx.filter_jit
def _integrate_compiled(*arguments: Any) -> Integration:
    return _integrate(*arguments)


class Observed(eqx.Module):
    """What is derived from the activities at the saved times."""

    errors: tuple[Any, ...]
    energies: Any
    norms: Any


@eqx.filter_jit
def _observe(problem: InferenceProblem, states: State) -> Observed:
    flow = Flow(problem)

    def at(state: State) -> Observed:
        errors = problem.prediction_errors(problem.activities(state), flow.first_prediction)
        return Observed(errors, problem.energies_of(errors), field_norms(flow(0.0, state)))

    return jax.vmap(at)(states)


def _traced_trajectory(
    problem: InferenceProblem, run: Integration, times: np.ndarray, method: Integrator
) -> Trajectory:
    states = tuple(x[:-1] for x in run.states)
    return _build(problem, run, _observe(problem, states), states, jnp.asarray(times), method)


def _build(
    problem: InferenceProblem,
    run: Integration,
    observed: Observed,
    states: State,
    times: Any,
    method: Integrator,
    **rest: Any,
) -> Trajectory:
    module = np if isinstance(times, np.ndarray) else jnp
    activities = tuple(
        module.broadcast_to(module.asarray(x), (len(times), *x.shape))
        if index not in problem.free_layers
        else x
        for index, x in enumerate(problem.activities(states))
    )
    interpolation = run.interpolation
    if interpolation is not None:
        interpolation = _DenseActivities(problem, interpolation)
    return Trajectory(
        times=times,
        activities=activities,
        prediction_errors=observed.errors,
        energies=observed.energies,
        vector_field_norms=observed.norms,
        status_codes=run.status,
        end_time=run.end_time,
        vector_field_evaluations=run.evaluations,
        jacobian_evaluations=run.jacobian_evaluations,
        accepted_steps=run.accepted_steps,
        rejected_steps=run.rejected_steps,
        interpolation=interpolation,
        integrator=method.name,
        free_layers=problem.free_layers,
        **rest,
    )


class _DenseActivities(eqx.Module):
    """Dense output of the state as activities of all layers."""

    problem: InferenceProblem
    interpolation: Any

    def __call__(self, t: Any) -> tuple[Any, ...]:
        return self.problem.activities(self.interpolation(jnp.asarray(t)))


def _run(
    problem: InferenceProblem,
    state: State,
    times: np.ndarray,
    t1: float,
    method: Integrator,
    until: UntilEquilibrium | None,
    per_sample: bool,
    dense: bool,
) -> tuple[Integration, str]:
    """Integrate on JAX's device or the host, with the fallback; results on the host."""
    if not method.runs_in_jax:
        return _run_on_host(problem, state, times, t1, method, until, per_sample), ""
    # As arrays, tolerances and steps can change without compiling again.
    numbers = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, float) else x, (method, until))
    run = _integrate_compiled(
        problem, state, times, np.asarray(float(t1)), *numbers, per_sample, dense
    )
    # The interpolation stays as JAX made it: diffrax evaluates it in JAX.
    run = dataclasses.replace(
        _on_host(dataclasses.replace(run, interpolation=None)), interpolation=run.interpolation
    )
    gave_up = np.isin(run.status, (Status.MAX_STEPS, Status.STEP_TOO_SMALL))
    if not (isinstance(method, Diffrax) and method.fallback and gave_up.any()):
        return run, ""
    other = SciPy(method.fallback, rtol=method.rtol, atol=method.atol)
    reason = f"{other.method}, because {method.name} {worst_status(run.status).explanation}"
    if not per_sample:
        return _run_on_host(problem, state, times, t1, other, until, False), reason
    return _with_samples(
        run, np.flatnonzero(gave_up), problem, state, times, t1, other, until
    ), f"{reason} (samples {np.flatnonzero(gave_up).tolist()})"


def _run_on_host(
    problem: InferenceProblem,
    state: State,
    times: np.ndarray,
    t1: float,
    method: Integrator,
    until: UntilEquilibrium | None,
    per_sample: bool,
) -> Integration:
    if not per_sample:
        run = method.integrate(problem, state, times, t1, until, True)
        return _on_host(_finish(run, times, state))
    runs = []
    for index in range(state[0].shape[0]):
        single, start = _sample(problem, state, index)
        runs.append(_on_host(_finish(method.integrate(single, start, times, t1, until, True),
                                     times, start)))  # fmt: skip
    return _stack(runs)


@eqx.filter_jit
def _finish_arrays(run: Integration, times: Any, state: State) -> Integration:
    return _without_non_finite(_with_end_row(run, times), times, state)


def _finish(run: Integration, times: np.ndarray, state: State) -> Integration:
    numbers = dataclasses.replace(
        run,
        interpolation=None,
        end_time=np.asarray(run.end_time),
        status=np.asarray(int(run.status)),
        message="",
    )
    finished = _finish_arrays(numbers, times, state)
    return dataclasses.replace(finished, interpolation=run.interpolation, message=run.message)


def _sample(problem: InferenceProblem, state: State, index: int) -> tuple[InferenceProblem, State]:
    single = _with_data(
        problem,
        None if problem.input is None else problem.input[index],
        None if problem.output is None else problem.output[index],
    )
    return single, tuple(x[index] for x in state)


def _stack(runs: list[Integration]) -> Integration:
    """One integration of several samples, sample after time."""
    interpolations = [run.interpolation for run in runs]
    message = next((run.message for run in runs if run.message), "")

    def column(name: str) -> Any:
        values = [getattr(run, name) for run in runs]
        return None if any(value is None for value in values) else np.stack(values)

    return Integration(
        states=tuple(
            np.stack(layer, axis=1) for layer in zip(*[r.states for r in runs], strict=True)
        ),
        end_time=column("end_time"),
        end_state=tuple(
            np.stack(layer) for layer in zip(*[r.end_state for r in runs], strict=True)
        ),
        status=column("status"),
        evaluations=column("evaluations"),
        jacobian_evaluations=column("jacobian_evaluations"),
        accepted_steps=column("accepted_steps"),
        rejected_steps=column("rejected_steps"),
        interpolation=lambda t: tuple(
            np.stack(layer) for layer in zip(*[each(t) for each in interpolations], strict=True)
        ),
        message=message,
    )


def _with_samples(
    run: Integration,
    samples: np.ndarray,
    problem: InferenceProblem,
    state: State,
    times: np.ndarray,
    t1: float,
    method: SciPy,
    until: UntilEquilibrium | None,
) -> Integration:
    """`run` with some samples integrated again by another method."""
    chosen = _with_data(
        problem,
        None if problem.input is None else problem.input[samples],
        None if problem.output is None else problem.output[samples],
    )
    part = tuple(x[samples] for x in state)
    again = _run_on_host(chosen, part, times, t1, method, until, True)
    states = tuple(np.array(x) for x in run.states)
    for mine, theirs in zip(states, again.states, strict=True):
        mine[:, samples] = theirs

    def merged(name: str) -> Any:
        mine, theirs = getattr(run, name), getattr(again, name)
        if mine is None or theirs is None:
            return None
        values = np.array(np.broadcast_to(mine, run.status.shape))
        values[samples] = theirs
        return values

    names = ("end_time", "status", "evaluations", "jacobian_evaluations", "accepted_steps")
    return dataclasses.replace(
        run, states=states, interpolation=None, rejected_steps=None, message=again.message,
        **{name: merged(name) for name in names},
    )  # fmt: skip


def _on_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, tree)


def _trajectory(
    problem: InferenceProblem,
    run: Integration,
    observed: Observed,
    times: np.ndarray,
    method: Integrator,
    fallback: str,
    clock: Stopwatch,
) -> Trajectory:
    """The trajectory without padding: the times reached, and the end if it came early."""
    end = float(np.max(run.end_time))
    worst = worst_status(run.status)
    rows = np.flatnonzero(times <= end)
    ended_early = worst is not Status.REACHED_T1 and (rows.size == 0 or times[rows[-1]] < end)
    if ended_early and np.isfinite(observed.norms[-1]).any():
        rows = np.append(rows, len(times))
    all_times = np.append(times, end)[rows]
    states = tuple(x[rows] for x in run.states)
    observed = jax.tree.map(lambda x: x[rows], observed)
    message = _message(worst, run, method, problem, observed)
    return _build(
        _on_host(problem), run, observed, states, all_times, method,
        fallback=fallback, message=message,
        compile_seconds=clock.compile_seconds, run_seconds=clock.run_seconds,
    )  # fmt: skip


def _message(
    status: Status,
    run: Integration,
    method: Integrator,
    problem: InferenceProblem,
    observed: Observed,
) -> str:
    text = f"{status.name}: {status.explanation}"
    if method.fixed_step is not None and status in (Status.NON_FINITE, Status.UNSTABLE_STEP):
        text += f" (dt={method.fixed_step:g})"
    failed = np.flatnonzero(np.atleast_1d(run.status) > Status.CONVERGED)
    if np.ndim(run.status) and failed.size:
        text += f"; samples {failed.tolist()} of {np.size(run.status)}"
    return f"{text}. {run.message}" if run.message else text
