"""Run an integrator: on JAX's device or the host, batch or sample by sample, with the fallback."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import ModuleType, UnionType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pcdyn._support.states import choose
from pcdyn._support.types import Scalar, State, Tree, Values
from pcdyn.errors import MOST_SAMPLES_NAMED, Status, worst_status
from pcdyn.integrators.base import (
    Integration,
    Integrator,
    Interpolation,
    Request,
    default_tolerances,
)
from pcdyn.integrators.diffrax import Diffrax
from pcdyn.integrators.noise import Draws
from pcdyn.integrators.scipy import SciPy
from pcdyn.integrators.sliding import rounded
from pcdyn.integrators.statistics import stacked
from pcdyn.model.flow import Flow, SampledFlow

_GAVE_UP = (Status.MAX_STEPS, Status.STEP_TOO_SMALL, Status.SOLVER_FAILED)


def integrate(method: Integrator, request: Request, per_sample: bool) -> Integration:
    """Integrate in JAX; the end state becomes one more row after the saved times."""
    if not per_sample:
        return _checked_run(method, request)

    def one(problem: Flow, state: State, goal: Values | None, noise: Draws | None) -> Integration:
        asked = _of(request, problem, state, goal)
        return _checked_run(method, dataclasses.replace(asked, noise=noise))

    mapped = (request.state, _goals(request), _noises(request))
    runs = _with_samples(request.problem).map_samples(one, *mapped)
    return _batch_of(runs)


def _with_samples(problem: Flow) -> SampledFlow:
    assert isinstance(problem, SampledFlow), "others have no samples"
    return problem


def _of(request: Request, problem: Flow, state: State, goal: Values | None) -> Request:
    """Ask the same of one sample or of several."""
    until = None if request.until is None else request.until.with_tolerance(goal)
    return dataclasses.replace(request, problem=problem, state=state, until=until)


def _goals(request: Request) -> Values | None:
    """The tolerance of each sample at which to stop."""
    if request.until is None:
        return None
    tolerance = request.until.tolerance
    assert tolerance is not None, "filled in before anything runs"
    return jnp.broadcast_to(tolerance, request.state[0].shape[:1])


def _noises(request: Request) -> Draws | None:
    """What the noise of each sample is drawn from."""
    if request.noise is None:
        return None
    keys = request.noise.keys
    temperature = jnp.broadcast_to(jnp.asarray(request.noise.temperature), keys.shape)
    return dataclasses.replace(request.noise, temperature=temperature)


def _take(request: Request, samples: int | np.ndarray) -> Request:
    """Take one sample (an index) or several (an array of indices) of a batch."""
    state, goals = jax.tree.map(lambda x: x[samples], (request.state, _goals(request)))
    return _of(request, _with_samples(request.problem).sample(samples), state, goals)


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

    interpolations: Interpolation

    def __call__(self, t: Scalar) -> State:
        return eqx.filter_vmap(lambda each: each(t))(self.interpolations)


def _checked_run(method: Integrator, request: Request) -> Integration:
    request = dataclasses.replace(request, times=jnp.asarray(request.times))
    run = _finish(method.integrate(request), request, jnp)
    if _energy_falls(method, request):
        run = _with_stability(run, request.problem, request.state)
    return _with_held_ends(run, request.state)


class _HeldEnds(eqx.Module):
    """Dense output that holds the end state after the end, or is NaN there after a failure."""

    interpolation: Interpolation
    start: State
    end_state: State
    end_time: Scalar
    failed: Scalar

    def __call__(self, t: Scalar) -> State:
        inside = self.interpolation(jnp.minimum(t, self.end_time))
        beyond = jax.tree.map(lambda x: jnp.where(self.failed, jnp.nan, x), self.end_state)
        before = choose(t > self.end_time, beyond, inside)
        return choose(t <= 0, self.start, before)


def _with_held_ends(run: Integration, start: State) -> Integration:
    if run.interpolation is None:
        return run
    failed = Status.failed(run.status)
    held = _HeldEnds(run.interpolation, start, run.end_state, run.end_time, failed)
    return dataclasses.replace(run, interpolation=held)


def _finish(run: Integration, request: Request, xp: ModuleType) -> Integration:
    """Rows that mean something only; `xp` is NumPy on the host, where nothing need be compiled."""
    times = xp.asarray(request.times, xp.asarray(run.end_time).dtype)
    run = _without_non_finite(_with_end_row(run, times, xp), times, xp)
    # As given: the solver's own end can be rounded to the dtype of its time.
    reached, t1 = run.status == Status.REACHED_T1, xp.asarray(request.t1, float)
    end_time = xp.where(reached, t1, xp.asarray(run.end_time, float))
    return dataclasses.replace(run, end_time=end_time)


def _with_end_row(run: Integration, times: Values, xp: ModuleType) -> Integration:
    """Hold the end state at times after the end; add it as a last row."""
    reached = times <= run.end_time

    def extend(saved: Values, end: Values) -> Values:
        mask = reached.reshape(-1, *[1] * end.ndim)
        return xp.concatenate([xp.where(mask, saved, end[None]), end[None]])

    states = tuple(extend(s, e) for s, e in zip(run.states, run.end_state, strict=True))
    return dataclasses.replace(run, states=states)


def _without_non_finite(run: Integration, times: Values, xp: ModuleType) -> Integration:
    """End a run before its first non-finite row, whatever the solver thought of it."""
    finite_rows = [xp.all(xp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in run.states]
    finite = xp.cumprod(xp.stack(finite_rows).all(axis=0)).astype(bool)
    diverged = ~finite[-1]
    kept = Status.failed(run.status) | ~diverged
    status = xp.where(kept, run.status, int(Status.NON_FINITE))
    last_finite_time = xp.max(xp.where(finite[:-1], times, 0))
    end_time = xp.where(diverged, xp.minimum(last_finite_time, run.end_time), run.end_time)
    # After a success the end state is held; after a failure there is none to show.
    failed = Status.failed(status)
    shown = finite & ~(failed & xp.append(times > end_time, True))
    states = tuple(
        xp.where(shown.reshape(-1, *[1] * (x.ndim - 1)), x, xp.asarray(xp.nan, x.dtype))
        for x in run.states
    )
    return dataclasses.replace(run, states=states, status=status, end_time=end_time)


def _energy_falls(method: Integrator, request: Request) -> bool:
    """Whether a rise of the energy would be the fault of a fixed step, and not of noise."""
    return method.fixed_step is not None and request.noise is None


def _with_stability(run: Integration, problem: Flow, state: State) -> Integration:
    """A fixed step is unstable if it lets rise what never rises along the flow."""
    states = jax.tree.map(lambda x, saved: jnp.concatenate([x[None], saved]), state, run.states)
    energy = jax.vmap(problem.free_energy)(states)
    energy = energy.reshape(energy.shape[0], -1)
    last = jnp.where(jnp.isnan(energy[-1]), -jnp.inf, energy[-1])
    margin = 1e-3 * energy[0] + 1e3 * jnp.finfo(energy.dtype).eps
    unstable = jnp.any(last > jnp.nanmin(energy, axis=0) + margin)
    kept = Status.failed(run.status) | ~unstable
    status = jnp.where(kept, run.status, int(Status.UNSTABLE_STEP))
    return dataclasses.replace(run, status=status)


_integrate_compiled = eqx.filter_jit(integrate)
_with_stability_compiled = eqx.filter_jit(_with_stability)


@eqx.filter_jit
def _unchecked_compiled(method: Integrator, request: Request) -> Integration:
    return method.integrate(request)


def integrate_with_fallback(
    method: Integrator, request: Request, per_sample: bool
) -> tuple[Integration, str, Flow]:
    """Integrate on JAX's device or the host; the result is on the host.

    Also returns why the fallback took over, or an empty string, and the problem whose flow was
    integrated: the given one, or where the fallback rounded them, that one with kinks rounded.
    """
    problem = request.problem
    if not method.runs_in_jax:
        return _integrate_on_host(method, request, per_sample), "", problem
    run = _integrate_on_device(method, request, per_sample)
    gave_up = np.isin(run.status, _GAVE_UP)
    if not (isinstance(method, Diffrax) and gave_up.any()):
        return run, "", problem
    other = method.successor
    if other is None:
        return run, "", problem
    reason = f"because {method.name} {_reason(run.status)}"
    sliding = _sliding(method, other, request)
    if sliding is None:
        label = other.method
        again = partial(_integrate_on_host, other, per_sample=per_sample)
    else:
        follower, problem, width = sliding
        request = dataclasses.replace(request, problem=problem)
        label = f"{follower.name} with kinks rounded over {width:.1e}"
        again = partial(_each_sample, follower, per_sample=per_sample)
    if not per_sample:
        return again(request), f"{label}, {reason}", problem
    samples = np.flatnonzero(gave_up)
    replaced = _replace_samples(run, samples, again(_take(request, samples)))
    shown = ", ".join(map(str, samples[:MOST_SAMPLES_NAMED]))
    more = ", ..." if samples.size > MOST_SAMPLES_NAMED else ""
    counted = f"{samples.size} of {np.size(run.status)} samples: {shown}{more}"
    return replaced, f"{label}, {reason} ({counted})", problem


def _reason(status: Scalar) -> str:
    if np.any(status == Status.MAX_STEPS):
        return "ran out of steps"
    if np.any(status == Status.STEP_TOO_SMALL):
        return "could not step on"
    return "found no root of an implicit step"


def _sliding(method: Diffrax, other: SciPy, request: Request) -> tuple[Diffrax, Flow, float] | None:
    """What follows the flow along kinks, if there are any: an implicit method on rounded ones."""
    rtol, _ = default_tolerances(other.rtol, other.atol, request)
    found = rounded(request.problem, request.state, float(rtol))
    if found is None:
        return None
    options = {"rtol": other.rtol, "atol": other.atol, "max_steps": method.max_steps}
    return Diffrax("rodas5p", **options, fallback=None), *found


def _integrate_on_device(method: Integrator, request: Request, per_sample: bool) -> Integration:
    # Not integers: those inside a diffrax solver bound its loops and must be known.
    arrays, numbers = _numbers_as_arrays((method, request), float)
    if per_sample:
        return _run_on_host(_integrate_compiled(arrays, numbers, per_sample))
    # What `integrate` does, but checked on the host: that halves the time of compilation.
    run = _finish_on_host(_unchecked_compiled(arrays, numbers), request)
    if _energy_falls(method, request):
        run = _run_on_host(_with_stability_compiled(run, request.problem, request.state))
    return run


def _each_sample(method: Integrator, request: Request, per_sample: bool) -> Integration:
    """Every sample with steps of its own, for each has its kinks at other times; as one run."""
    if request.state[0].ndim == 1:
        return _integrate_on_device(method, request, False)
    run = _integrate_on_device(method, request, True)
    return run if per_sample else _joined(run, request)


def _joined(run: Integration, request: Request) -> Integration:
    """The run of a batch from the runs of its samples: up to the first failure, with total counts.

    The saved times after that mean nothing; it ends at the last one before.
    """
    status = worst_status(run.status)
    end_time, end_state = np.max(run.end_time), run.end_state
    if not status.ok:
        times = np.asarray(request.times)
        first = np.min(np.asarray(run.end_time)[Status.failed(np.asarray(run.status))])
        rows = np.flatnonzero(times <= first)
        end_time = times[rows[-1]] if rows.size else 0.0
        end_state = tuple(x[rows[-1]] for x in run.states) if rows.size else request.state
    return dataclasses.replace(
        run,
        status=np.asarray(int(status)),
        end_time=end_time,
        end_state=on_host(end_state),
        statistics=run.statistics.total(),
    )


def _integrate_on_host(method: Integrator, request: Request, per_sample: bool) -> Integration:
    if not per_sample:
        return _finish_on_host(method.integrate(request), request)
    singles = [_take(request, index) for index in range(request.state[0].shape[0])]
    return _stack([_finish_on_host(method.integrate(single), single) for single in singles])


def _finish_on_host(run: Integration, request: Request) -> Integration:
    finished = _finish(_numbers_as_arrays(_run_on_host(run)), request, np)
    return _with_held_ends(finished, request.state)


class _Stacked(eqx.Module):
    """Dense outputs of several samples, which differ in kind, as one function of time."""

    interpolations: tuple[Interpolation, ...]

    def __call__(self, t: Scalar) -> State:
        return _stacked_rows([each(t) for each in self.interpolations])


class _Replaced(eqx.Module):
    """Dense output of a batch in which another one has taken over for some samples."""

    interpolation: Interpolation
    again: Interpolation
    samples: np.ndarray

    def __call__(self, t: Scalar) -> State:
        return _with_rows(self.interpolation(t), self.again(t), self.samples, 0)


def _with_rows(mine: State, theirs: State, samples: np.ndarray, axis: int) -> State:
    """A state in which some samples, along an axis, are those of another."""
    layers = jax.tree.map(np.array, mine)
    for layer, part in zip(layers, theirs, strict=True):
        np.moveaxis(layer, axis, 0)[samples] = np.moveaxis(np.asarray(part), axis, 0)
    return layers


def _stacked_rows(states: list[State], axis: int = 0) -> State:
    return jax.tree.map(lambda *layer: np.stack(layer, axis=axis), *states)


def _stack(runs: list[Integration]) -> Integration:
    """One integration of several samples, sample after time."""
    dense = [run.interpolation for run in runs if run.interpolation is not None]
    message = next((run.message for run in runs if run.message), "")
    return Integration(
        states=_stacked_rows([run.states for run in runs], axis=1),
        end_time=np.stack([run.end_time for run in runs]),
        end_state=_stacked_rows([run.end_state for run in runs]),
        status=np.stack([run.status for run in runs]),
        statistics=stacked([run.statistics for run in runs]),
        interpolation=_Stacked(tuple(dense)) if dense else None,
        message=message,
    )


def _replace_samples(run: Integration, samples: np.ndarray, again: Integration) -> Integration:
    """`run` with some samples replaced by those of another integration."""
    interpolation = run.interpolation
    if interpolation is not None and again.interpolation is not None:
        interpolation = _Replaced(interpolation, again.interpolation, samples)
    end_time, status = np.array(run.end_time), np.array(run.status)
    end_time[samples], status[samples] = again.end_time, again.status
    return dataclasses.replace(
        run,
        states=_with_rows(run.states, again.states, samples, 1),
        end_state=_with_rows(run.end_state, again.end_state, samples, 0),
        end_time=end_time,
        status=status,
        statistics=run.statistics.replaced(samples, again.statistics, len(status)),
        interpolation=interpolation,
        message=again.message,
    )


def _numbers_as_arrays(tree: Tree, kinds: type | UnionType = int | float) -> Tree:
    """Make arrays of times, tolerances, steps and counts: they change without compiling again."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, kinds) else x, tree)


def on_host(tree: Tree) -> Tree:
    """Convert the arrays of JAX in a tree to those of NumPy."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, tree)


def _run_on_host(run: Integration) -> Integration:
    """A run on the host, except for dense output, which is evaluated where it was made."""
    without = on_host(dataclasses.replace(run, interpolation=None))
    return dataclasses.replace(without, interpolation=run.interpolation)
