"""SciPy's solvers step by step, so that steps and evaluations are bounded and nothing is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pcdyn._support.timing import elapsed
from pcdyn._support.types import Scalar
from pcdyn.errors import Status

if TYPE_CHECKING:
    import scipy.integrate

# No step of any method takes as many, rejected attempts included, unless it hardly moves.
_EVALUATIONS_PER_STEP = 64
_MOST_NON_FINITE = 200
_EPS = float(np.finfo(float).eps)


@dataclasses.dataclass(frozen=True)
class Course:
    """What was integrated: `times` of the steps, the `end` state, and dense output `sol`."""

    times: np.ndarray
    end: np.ndarray
    sol: Callable[[float | np.ndarray], np.ndarray]
    status: Status
    message: str
    evaluations: int
    jacobian_evaluations: int


class _Stop(Exception):
    """Ends a run from within the vector field."""

    def __init__(self, status: Status):
        super().__init__(status.name)
        self.status = status


def march(
    method: str,
    field: Callable[[float, np.ndarray], np.ndarray],
    start: np.ndarray,
    t1: float,
    *,
    max_steps: int,
    deadline: Scalar | None,
    event: Callable[[float, np.ndarray], bool] | None,
    **options: object,
) -> Course:
    """Integrate by a method of `scipy.integrate` to `t1`, or to where `event` becomes true.

    It ends with a status after `max_steps` steps or 64 times as many evaluations, at the `deadline`
    (see `Request`), after many non-finite values in a row, and where SciPy gives up.
    """
    from scipy import integrate

    bounded = _bounded(field, max_steps, deadline)
    steps: list[scipy.integrate.DenseOutput] = []
    times, end, solver = [0.0], start, None
    status, message = Status.REACHED_T1, ""
    try:
        solver = getattr(integrate, method)(bounded, 0.0, start, t1, **options)
        while solver.status == "running":
            if len(steps) == max_steps:
                status = Status.MAX_STEPS
                break
            reply = solver.step()
            if solver.status == "failed":
                status, message = Status.STEP_TOO_SMALL, f"SciPy says: {reply}"
                break
            output = solver.dense_output()
            t, y = solver.t, solver.y
            reached = event is not None and event(t, y)
            if reached and event is not None:
                t, status = _first_time(event, output, times[-1], t), Status.CONVERGED
                y = output(t)
            steps.append(output)
            times.append(float(t))
            end = np.array(y)
            if reached:
                break
    except _Stop as stop:
        status = stop.status
    except (ValueError, np.linalg.LinAlgError) as error:
        # The implicit methods raise on a Jacobian with NaN.
        status, message = Status.SOLVER_FAILED, f"SciPy says: {error}"
    if not np.isfinite(end).all():
        status = Status.NON_FINITE
    return Course(
        times=np.array(times),
        end=end,
        sol=_dense(method, times, steps, start),
        status=status,
        message=message,
        evaluations=0 if solver is None else int(solver.nfev),
        jacobian_evaluations=0 if solver is None else int(solver.njev),
    )


def _bounded(
    field: Callable[[float, np.ndarray], np.ndarray], max_steps: int, deadline: Scalar | None
) -> Callable[[float, np.ndarray], np.ndarray]:
    remaining, non_finite = _EVALUATIONS_PER_STEP * max_steps, 0

    def bounded(t: float, y: np.ndarray) -> np.ndarray:
        nonlocal remaining, non_finite
        remaining -= 1
        if remaining < 0:
            raise _Stop(Status.MAX_STEPS)
        if deadline is not None and elapsed() > deadline:
            raise _Stop(Status.TIME_LIMIT)
        value = field(t, y)
        # A step can run into NaN and be halved; a solver that cannot get out of it never returns.
        non_finite = 0 if np.isfinite(value).all() else non_finite + 1
        if non_finite > _MOST_NON_FINITE:
            raise _Stop(Status.NON_FINITE)
        return value

    return bounded


def _first_time(
    event: Callable[[float, np.ndarray], bool],
    output: scipy.integrate.DenseOutput,
    before: float,
    after: float,
) -> float:
    """Find the time within a step from which the event is true, by bisection."""
    while after - before > 4 * _EPS * after:
        middle = (before + after) / 2
        if event(middle, output(middle)):
            after = middle
        else:
            before = middle
    return after


def _dense(
    method: str,
    times: list[float],
    steps: list[scipy.integrate.DenseOutput],
    start: np.ndarray,
) -> Callable[[float | np.ndarray], np.ndarray]:
    from scipy.integrate import OdeSolution

    if not steps:
        return lambda t: np.multiply.outer(start, np.ones_like(t, dtype=float))
    # BDF and LSODA know a step's ends from the step itself, not from the one after it.
    return OdeSolution(times, steps, alt_segment=method in ("BDF", "LSODA"))
