"""Integrate a driven problem from one jump to the next, so that no step goes across one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.arrays import is_traced
from pcdyn._support.states import choose
from pcdyn._support.types import Scalar, State
from pcdyn.errors import DenseOutputError, Status
from pcdyn.integrators import Integration, Integrator
from pcdyn.integrators.base import Interpolation, Request
from pcdyn.integrators.run import integrate, integrate_with_fallback
from pcdyn.integrators.statistics import summed
from pcdyn.model.driven import DrivenProblem, Interval


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is between two jumps: which of the saved times are there, and those as it counts them.

    `times` are filled up to the same number in all parts, so that they share one program.
    """

    begin: float
    end: float
    rows: np.ndarray
    times: np.ndarray


def _parts(problem: DrivenProblem, request: Request) -> list[_Part]:
    edges, times = problem.edges(float(request.t1)), np.asarray(request.times)
    # At a jump begins what comes after it; t1 belongs to what ends there.
    place = np.minimum(np.searchsorted(edges, times, side="right") - 1, len(edges) - 2)
    most = int(np.max(np.bincount(place, minlength=1)))
    parts = []
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        rows = np.flatnonzero(place == number)
        padded = np.full(most, end - begin)
        padded[: len(rows)] = np.clip(times[rows] - begin, 0, end - begin)
        parts.append(_Part(begin, end, rows, padded))
    return parts


def _asked(request: Request, problem: DrivenProblem, part: _Part, state: State) -> Request:
    return dataclasses.replace(
        request,
        problem=Interval(problem, np.asarray(part.begin), np.asarray(part.end)),
        state=state,
        times=part.times,
        t1=part.end - part.begin,
    )


def integrate_over_jumps(
    method: Integrator, request: Request, per_sample: bool
) -> tuple[Integration, str, DrivenProblem]:
    """As `integrate_with_fallback` from jump to jump; a sample that fails ends there."""
    problem = request.problem
    assert isinstance(problem, DrivenProblem), "others have no jumps"
    parts, runs, fallbacks = _parts(problem, request), [], {}
    state = request.state
    for part in parts:
        run, fallback, _ = integrate_with_fallback(
            method, _asked(request, problem, part, state), per_sample
        )
        runs.append(run)
        state = run.end_state
        if fallback:
            fallbacks.setdefault(fallback, part.begin)
        if np.all(Status.failed(run.status)):
            break
    said = "; ".join(f"from t={begin:g} {what}" for what, begin in fallbacks.items())
    return _joined(runs, parts[: len(runs)], request), said, problem


def integrate_over_jumps_in_jax(
    method: Integrator, request: Request, per_sample: bool
) -> Integration:
    """The same as one loop, inside of a JAX transformation."""
    problem = request.problem
    assert isinstance(problem, DrivenProblem), "others have no jumps"
    parts = _parts(problem, request)
    if request.dense and len(parts) > 1:
        raise DenseOutputError(
            "under a JAX transformation there is no dense output over the jumps of a signal: give "
            "the times at which to save instead"
        )
    if len(parts) == 1:
        return integrate(method, _asked(request, problem, parts[0], request.state), per_sample)

    def one(state: State, part: tuple[Array, Array, Array]) -> tuple[State, Integration]:
        begin, end, times = part
        asked = dataclasses.replace(
            request, problem=Interval(problem, begin, end), state=state, times=times, t1=end - begin
        )
        run = integrate(method, asked, per_sample)
        return run.end_state, run

    begins, ends = (jnp.asarray([getattr(x, name) for x in parts]) for name in ("begin", "end"))
    times = jnp.asarray(np.stack([part.times for part in parts]))
    _, runs = jax.lax.scan(one, request.state, (begins, ends, times))
    return _joined([_taken(runs, k) for k in range(len(parts))], parts, request)


def _taken(runs: Integration, number: int) -> Integration:
    return jax.tree.map(lambda x: x[number], runs)


def _joined(runs: list[Integration], parts: list[_Part], request: Request) -> Integration:
    """One run of several, which ends for each sample where it failed, if it did."""
    xp: Any = jnp if is_traced(runs) else np
    failed = xp.zeros(np.shape(runs[0].status), bool)
    end, rows = (runs[0].status, runs[0].end_time, runs[0].end_state, _last(runs[0])), []

    def kept(old: Any, new: Any, *, first: int = 0) -> Any:  # noqa: ANN401
        """The old of what has failed before, of a time axis before the samples if `first` is 1."""
        new = xp.asarray(new)
        axes = (*range(first), *range(first + failed.ndim, new.ndim))
        return xp.where(xp.expand_dims(failed, axes), old, new)

    for run, part in zip(runs, parts, strict=True):
        rows.append([kept(xp.nan, x[: len(part.rows)], first=1) for x in run.states])
        now = (run.status, part.begin + xp.asarray(run.end_time), run.end_state, _last(run))
        end = jax.tree.map(kept, end, now)
        failed = failed | Status.failed(xp.asarray(run.status))
    status, end_time, end_state, last = end
    missing = len(request.times) - sum(len(part.rows) for part in parts)
    states = tuple(
        xp.concatenate([*saved, *[xp.full_like(x[None], xp.nan)] * missing, x[None]])
        for saved, x in zip(zip(*rows, strict=True), last, strict=True)
    )
    dense = tuple(run.interpolation for run in runs if run.interpolation is not None)
    lost = [run.round_off for run in runs if run.round_off is not None]
    return dataclasses.replace(
        runs[-1],
        states=states,
        end_time=end_time,
        end_state=end_state,
        status=status,
        statistics=summed([run.statistics for run in runs]),
        interpolation=_Dense(dense, tuple(part.begin for part in parts)) if dense else None,
        round_off=functools.reduce(operator.add, lost) if lost else None,
        message="; ".join(dict.fromkeys(run.message for run in runs if run.message)),
    )


def _last(run: Integration) -> State:
    """The row of the end."""
    return tuple(x[-1] for x in run.states)


class _Dense(eqx.Module):
    """Dense outputs from jump to jump as one function of time."""

    each: tuple[Interpolation, ...]
    begins: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, t: Scalar) -> State:
        if not is_traced(t):
            place = max(int(np.searchsorted(self.begins, float(t), side="right")) - 1, 0)
            return self.each[place](jnp.asarray(t) - self.begins[place])
        found = self.each[0](t)
        for begin, one in zip(self.begins[1:], self.each[1:], strict=True):
            found = choose(t >= begin, one(t - begin), found)
        return found
