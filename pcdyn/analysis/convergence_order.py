"""The order of convergence of a fixed-step method, from the steps that can show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pcdyn._support.arrays import as_host_array
from pcdyn._support.checks import as_sequence, checked_integer, checked_number
from pcdyn._support.types import Numbers
from pcdyn.analysis.comparison.reference_solution import reference_for
from pcdyn.analysis.comparison.settings import unstable_steps_expected, with_step
from pcdyn.errors import InputError, NoUsableRangeError, ShapeError, TimesError
from pcdyn.integrators import Integrator
from pcdyn.model.flow import Flow, check_flow
from pcdyn.simulation.simulate import simulate
from pcdyn.simulation.trajectory import Trajectory

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.lines
    import xarray

# Errors nearer to the round-off or to the reference's error than this are bent by them.
_MARGIN = 30
# Slopes of neighbouring steps differ by less than this, or by a twentieth of themselves, where
# the first term of the error expansion leads.
_SLOPE_SPREAD = 0.1
_RELATIVE_SPREAD = 0.05
_LEAST_STEPS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ConvergenceOrder:
    """How the error at t1 falls with the step.

    - `order`: the slope of log error against log step over the usable range.
    - `steps`, `errors`: all that ran, from the coarsest; an error is the Euclidean distance of the
      free layers of the worst sample from the reference at t1, infinite where the run failed.
    - `usable`: which steps the slope is taken from.
    - `floor`: the error of the reference or the round-off, whichever is larger.
    - `integrator`: the name of the method.
    """

    order: float
    steps: np.ndarray
    errors: np.ndarray
    usable: np.ndarray
    floor: float
    integrator: str

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return the order in one line, with the steps and errors that it is taken from."""
        used = self.steps[self.usable]
        return (
            f"{self.integrator}: order {self.order:.2f} from {used.size} steps "
            f"{used[0]:.3g} to {used[-1]:.3g}, errors {self.errors[self.usable][0]:.1e} to "
            f"{self.errors[self.usable][-1]:.1e}"
        )

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> list[matplotlib.lines.Line2D]:
        """Draw the errors against the steps; see `pcdyn.plotting.convergence_order`."""
        import pcdyn

        return pcdyn.plotting.convergence_order(self, ax=ax)

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled data set with the dimension `step`."""
        import xarray

        variables = {"error": ("step", self.errors), "usable": ("step", self.usable)}
        attributes = {"order": self.order, "floor": self.floor, "integrator": self.integrator}
        return xarray.Dataset(variables, {"step": self.steps}, attributes)


def convergence_order(
    integrator: str | Integrator,
    problem: Flow,
    *,
    t1: float,
    initial: str | Sequence[Numbers] = "feedforward",
    steps: Sequence[float] | None = None,
    reference: Trajectory | Sequence[Numbers | None] | None = None,
    most_steps: int = 2**13,
) -> ConvergenceOrder:
    """Measure the order of a method by integrating to `t1` with smaller and smaller fixed steps.

    The usable range is the longest run of at least three steps over which the local slopes agree
    within .1 (or a twentieth), above the floor of round-off and reference and below the steps that
    are unstable or too coarse to show the order.

    **Arguments:**

    - `integrator`: a name or value; diffrax solvers of variable step run with a fixed one.
    - `problem`, `t1`, `initial`: as for `pcdyn.simulate`. A smooth problem, far from equilibrium
      at t1, shows the order best: the order of a method is lower across kinks, and errors die out
      as the flow comes to rest.
    - `steps`: in units of the activity time constant; t1, t1/2, t1/4, … unless given, until the
      error meets round-off, stops falling, or `most_steps` steps are needed.
    - `reference`: activities x_0 … x_L at t1 (`None` for clamped layers) or a trajectory whose end
      they are; the reference of `pcdyn.compare` unless given.
    - `most_steps`: how many steps the finest run may take, at least 3.

    **Raises:**

    - `NoUsableRangeError`, with what was measured, if there is no usable range.
    - `IntegratorError` for a method without a fixed step.
    - `InputError` for fewer than three steps, and what `pcdyn.simulate` raises.
    """
    check_flow(problem)
    t1 = checked_number(t1, "t1", above=0, error=TimesError)
    most_steps = checked_integer(most_steps, "most_steps", at_least=_LEAST_STEPS)
    if steps is not None:
        given = as_sequence(steps, "steps", "a list of positive numbers")
        steps = tuple(checked_number(dt, "each of steps", above=0) for dt in given)
        if len(set(steps)) < _LEAST_STEPS:
            raise InputError(f"an order needs at least {_LEAST_STEPS} different steps, got {steps}")
    method = with_step(integrator, t1)
    truth, uncertainty = _truth(problem, t1, initial, reference)
    scale = max(np.linalg.norm(x, axis=-1).max() for x in truth if x is not None)
    floor = max(uncertainty, float(np.finfo(problem.dtype).eps * scale))
    taken, errors = [], []
    for dt in _halvings(t1, most_steps) if steps is None else sorted(set(steps), reverse=True):
        with unstable_steps_expected():
            run = simulate(
                problem, t1=t1, times=np.array([t1]), initial=initial, throw=False,
                integrator=with_step(method, dt),
            )  # fmt: skip
        taken.append(float(dt))
        errors.append(float(run.distance_to(truth).max()) if run.ok else np.inf)
        if steps is None and (errors[-1] <= floor or _has_stopped_falling(errors, floor)):
            break
    steps_taken, measured = np.array(taken), np.array(errors)
    usable = usable_range(steps_taken, measured, _MARGIN * floor)
    if usable is None:
        raise NoUsableRangeError(
            f"{method.name}: no {_LEAST_STEPS} neighbouring steps show one order between the "
            f"coarsest step and the floor of {floor:.1e} (steps {_list(taken)}, errors "
            f"{_list(errors)}); take an earlier t1, a smoother problem, other steps, or float64",
            steps_taken,
            measured,
        )
    slope = np.polyfit(np.log(steps_taken[usable]), np.log(measured[usable]), 1)[0]
    return ConvergenceOrder(float(slope), steps_taken, measured, usable, floor, method.name)


def usable_range(steps: np.ndarray, errors: np.ndarray, least_error: float) -> np.ndarray | None:
    """Find which steps, from the coarsest, show one order; `None` if fewer than three do.

    The longest run of steps whose errors are finite, above `least_error`, and fall with slopes of
    at least ½ that agree; of equally long ones the finest.
    """
    good = np.isfinite(errors) & (errors > least_error)
    logs = np.log(np.where(good, errors, np.nan))
    slopes = np.diff(logs) / np.diff(np.log(steps))
    best: range | None = None
    for first in range(len(steps) - _LEAST_STEPS + 1):
        for last in range(first + _LEAST_STEPS - 1, len(steps)):
            inside = slopes[first:last]
            if not good[first : last + 1].all() or not inside.min() >= 0.5:
                break
            allowed = max(_SLOPE_SPREAD, _RELATIVE_SPREAD * float(inside.mean()))
            if np.ptp(inside) <= allowed and (best is None or last - first + 1 >= len(best)):
                best = range(first, last + 1)
    if best is None:
        return None
    usable = np.zeros(len(steps), bool)
    usable[best.start : best.stop] = True
    return usable


def _truth(
    problem: Flow,
    t1: float,
    initial: str | Sequence[Numbers],
    reference: Trajectory | Sequence[Numbers | None] | None,
) -> tuple[list[np.ndarray | None], float]:
    """The activities at t1 (`None` where clamped), and how far a second solver is from them."""
    if isinstance(reference, Trajectory):
        reference = reference.final
    if reference is not None:
        like = problem.activities(problem.initial_state(initial))
        count = len(like)
        wanted = f"a Trajectory or activities x_0 … x_{count - 1} at t1"
        reference = as_sequence(reference, "reference", wanted)
        if len(reference) != count:
            raise ShapeError(f"reference must be {wanted}, got {len(reference)} layers")
        free = problem.free_layers
        truth = [
            as_host_array(x, f"layer {i} of reference") if i in free else None
            for i, x in enumerate(reference)
        ]
        for index in free:
            layer, needed = truth[index], like[index].shape
            if layer is not None and layer.shape != needed:
                raise ShapeError(
                    f"layer {index} of reference has shape {layer.shape}, but {needed} is needed"
                )
        return truth, 0.0
    known = reference_for(problem, t1=t1, times=np.array([t1]), initial=initial)
    final, _ = _truth(problem, t1, initial, known.trajectory)
    uncertainty = known.uncertainty.final_error * known.displacement
    return final, 0.0 if np.isnan(uncertainty) else uncertainty


def _halvings(t1: float, most_steps: int) -> Iterator[float]:
    """t1 in 1, 2, 3, 4, 6, 8, 12, 16, … steps: halvings of t1 and of t1/3."""
    number = 1
    while number <= most_steps:
        yield t1 / number
        # After 2^k comes 3·2^(k−1), after that 2^(k+1).
        power = number & (number - 1) == 0
        number = 2 if number == 1 else number * 3 // 2 if power else number * 4 // 3


def _has_stopped_falling(errors: list[float], floor: float) -> bool:
    """Whether two finer steps in a row hardly helped, near to the floor of an accurate method."""
    if len(errors) < _LEAST_STEPS or not np.isfinite(errors[-_LEAST_STEPS:]).all():
        return False
    return errors[-1] < 1e6 * floor and min(errors[-2:]) > 0.7 * errors[-3]


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2g}" for value in values)
