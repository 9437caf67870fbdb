"""How wrong a trajectory is: a reference that knows its own error, and errors against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pcdyn._support.types import Numbers, State, Tree, Values
from pcdyn.errors import InputError, NotLinearError, StepLimitError, TimesError
from pcdyn.integrators import Diffrax, Exact, Integrator, SciPy, get_integrator
from pcdyn.integrators.diffrax import largest_sample_rms
from pcdyn.model.flow import Flow
from pcdyn.simulation.simulate import simulate
from pcdyn.simulation.trajectory import Trajectory

TIGHT = 1e-12
# Explicit steps are cheap once compiled, also where stability and not accuracy limits them.
_MOST_STEPS = 2**20
_LARGEST_ON_HOST = 2000
ARRIVED = 0.01


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of one run against a reference; NaN where the run did not reach its end.

    A distance is the Euclidean one of all free layers of a sample, in units of the displacement:
    the root mean square over samples of the distance from the start to the reference's end. Each
    error is that of the worst sample.

    - `final_error`: at the last saved time.
    - `maximum_error`: the largest over the saved times.
    - `l2_error`: the root mean square over time (trapezoidal rule over the saved times).
    - `energy_error`: the largest over the saved times of |F − F of the reference|, in units of
      the mean energy that the reference loses (in size: of other flows it may gain some); NaN for
      a flow that has no energies.
    - `equilibrium_time`: the first saved time from which every sample stays within 1 % of the
      displacement around the *reference's end*; NaN if none is. It is the time to equilibrium if
      t1 is long enough for the reference to get there.
    """

    final_error: float
    maximum_error: float
    l2_error: float
    energy_error: float
    equilibrium_time: float


NO_ERRORS = Errors(*[float("nan")] * 5)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What runs are measured against, and how far an independent solver is from it.

    - `method`, `second`: how the reference and the solver that checks it were computed.
    - `trajectory`: the reference itself.
    - `uncertainty`: the errors of the second solver's run against the reference, each an estimate
      of what the reference can resolve, or the round-off that the reference knows of if that is
      larger; NaN if that solver failed and none is known, and `second` says so.
    - `displacement`, `energy_loss`: the units of the errors.
    """

    method: str
    second: str
    trajectory: Trajectory
    uncertainty: Errors
    displacement: float
    energy_loss: float

    def errors(self, run: Trajectory) -> Errors:
        """Measure the errors of a trajectory saved at the same times."""
        if np.shape(run.times) != np.shape(self.trajectory.times):
            return NO_ERRORS
        times = np.asarray(self.trajectory.times)
        with np.errstate(over="ignore", invalid="ignore"):
            distance = _per_sample(run.distance_to(self.trajectory)) / self.displacement
            energy = np.abs(_per_sample(run.free_energy - self.trajectory.free_energy))
            to_end = _per_sample(run.distance_to(_end(self.trajectory))) / self.displacement
            return Errors(
                final_error=float(distance[-1].max()),
                maximum_error=float(distance.max()),
                l2_error=float(_root_mean_square(times, distance).max()),
                energy_error=float(energy.max()) / self.energy_loss,
                equilibrium_time=_first_time_to_stay(times, to_end.max(axis=1) <= ARRIVED),
            )


def reference_for(
    problem: Flow,
    *,
    t1: float,
    times: Numbers | None = None,
    initial: str | Sequence[Numbers] = "feedforward",
    given: Trajectory | str | Integrator | None = None,
) -> Reference:
    """Solve a linear network exactly, and others to a tight tolerance; or take what is given.

    In float64 whatever the dtype of the problem. Unless `given`, a nonlinear network is integrated
    by diffrax's Dopri8 with rtol 1e-12 that steps to every saved time (dense output would be less
    accurate than the steps), and by LSODA with rtol 1e-12 where Dopri8 gives up. The second solver
    is the next of Exact, Dopri8 and LSODA, with Tsit5 before LSODA where there are more than 2000
    free activities.

    **Raises:**

    - `InputError` if the problem starts at rest, so that errors would have no unit.
    - `StepLimitError` if no solver reaches t1.
    - What `simulate` raises for bad input.
    """
    start = problem.initial_state(initial)
    # The thread's own setting, restored at the end: a float32 problem needs a better reference.
    with jax.enable_x64(True):
        exact, begin = _double(problem), _double(start)
        saves = np.linspace(0, t1, 101) if times is None else np.asarray(times, float)
        options = {"t1": t1, "times": saves, "initial": begin, "throw": False}
        candidates = _candidates(exact, begin, saves)
        if isinstance(given, Trajectory):
            _check_given(given, saves)
            method, trajectory, others = f"given ({given.integrator})", given, candidates
        else:
            if given is not None:
                chosen = get_integrator(given)
                candidates = [(chosen.name, chosen), *candidates]
            method, trajectory, others = _first_that_arrives(exact, options, candidates)
        return _measured(exact, begin, options, method, trajectory, others)


def _check_given(given: Trajectory, saves: np.ndarray) -> None:
    if not given.ok:
        raise InputError(f"the reference failed: {given.message}")
    times = np.asarray(given.times)
    if times.shape != saves.shape or not np.allclose(times, saves, rtol=1e-6, atol=0):
        raise TimesError(
            "the reference is saved at other times than the runs; simulate it with the same t1 "
            "and times"
        )


def _candidates(problem: Flow, start: State, saves: np.ndarray) -> list[tuple[str, Integrator]]:
    """Tight methods with their names, the best first."""
    import diffrax

    controller = diffrax.PIDController(TIGHT, TIGHT / 10, norm=largest_sample_rms)
    clipped = diffrax.ClipStepSizeController(controller, step_ts=jnp.asarray(saves))

    def stepping(solver: str) -> tuple[str, Integrator]:
        method = Diffrax(solver, controller=clipped, max_steps=_MOST_STEPS, fallback=None)
        return f"{solver} at rtol {TIGHT:g}, stepping to every saved time", method

    host = (f"LSODA at rtol {TIGHT:g}", SciPy("LSODA", rtol=TIGHT, atol=TIGHT / 10))
    # On the host a large batch takes minutes; there a second explicit method checks the first.
    small = sum(x.size for x in start) <= _LARGEST_ON_HOST
    others = [host] if small else [stepping("tsit5"), host]
    methods = [stepping("dopri8"), *others]
    try:
        Exact().check(problem, None, False)
    except NotLinearError:
        return methods
    return [("exact", Exact()), *methods]


def _first_that_arrives(
    problem: Flow, options: dict[str, Any], candidates: list[tuple[str, Integrator]]
) -> tuple[str, Trajectory, list[tuple[str, Integrator]]]:
    """The name and the run of the first method that reaches t1, and the methods not yet tried."""
    messages = []
    for index, (name, method) in enumerate(candidates):
        run = simulate(problem, integrator=method, **options)
        if run.ok:
            return name, run, candidates[index + 1 :]
        messages.append(f"{name}: {run.message}")
    raise StepLimitError(
        "no tight solver reached t1, so that there is no reference; give one as reference=…, or "
        f"an earlier t1. {' '.join(messages)}"
    )


def _measured(
    problem: Flow,
    start: State,
    options: dict[str, Any],
    method: str,
    trajectory: Trajectory,
    others: list[tuple[str, Integrator]],
) -> Reference:
    """The reference with its units and its own error."""
    begin = problem.activities(start)
    free = trajectory.free_layers
    moved = _per_sample(trajectory.distance_to([np.asarray(x) for x in begin]))[-1]
    displacement = float(np.sqrt(np.mean(moved**2)))
    energies = np.asarray(problem.observe(0.0, start)[1])
    fall = energies.sum(axis=-1) - np.asarray(trajectory.free_energy[-1])
    energy_loss = abs(float(np.mean(fall))) if energies.size else float("nan")
    scale = max(float(np.linalg.norm(trajectory.final[index])) for index in free)
    if not displacement > 1e-12 * scale or energy_loss == 0:
        raise InputError(
            "the problem starts at rest: its errors have no unit; choose another initial state, "
            "such as problem.random_state(key)"
        )
    round_off = _round_off(trajectory, displacement, energy_loss)
    second = "no second solver arrived" + ("" if round_off is NO_ERRORS else ": round-off")
    alone = Reference(method, second, trajectory, round_off, displacement, energy_loss)
    try:
        second, run, _ = _first_that_arrives(problem, options, others)
    except StepLimitError:
        return alone
    apart = alone.errors(run)
    larger = {
        name: float(np.fmax(getattr(apart, name), getattr(round_off, name)))
        for name in ("final_error", "maximum_error", "l2_error", "energy_error")
    }
    uncertainty = dataclasses.replace(apart, **larger)
    return dataclasses.replace(alone, second=second, uncertainty=uncertainty)


def _round_off(trajectory: Trajectory, displacement: float, energy_loss: float) -> Errors:
    """What round-off makes of the errors, where the trajectory knows it; otherwise NaN."""
    if trajectory.round_off is None:
        return NO_ERRORS
    units = sum(trajectory.activities[index].shape[-1] for index in trajectory.free_layers)
    moved = float(np.max(trajectory.round_off)) * units**0.5
    # Where the field vanishes F changes by less.
    steepest = float(np.max(np.linalg.norm(trajectory.vector_field_norms, axis=-1)))
    return Errors(
        final_error=moved / displacement,
        maximum_error=moved / displacement,
        l2_error=moved / displacement,
        energy_error=moved * steepest / energy_loss,
        equilibrium_time=float("nan"),
    )


def _double(tree: Tree) -> Tree:
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if eqx.is_inexact_array(x) else x, tree
    )


def _per_sample(values: Values) -> np.ndarray:
    """Values with a time axis and a sample axis, in float64."""
    array = np.asarray(values, dtype=float)
    return array.reshape(array.shape[0], -1)


def _end(trajectory: Trajectory) -> list[np.ndarray]:
    return [np.asarray(x, dtype=float) for x in trajectory.final]


def _root_mean_square(times: np.ndarray, distance: np.ndarray) -> np.ndarray:
    if len(times) == 1:
        return distance[0]
    return np.sqrt(np.trapezoid(distance**2, times, axis=0) / (times[-1] - times[0]))


def _first_time_to_stay(times: np.ndarray, inside: np.ndarray) -> float:
    if not inside[-1]:
        return float("nan")
    outside = np.flatnonzero(~inside)
    return float(times[0 if outside.size == 0 else outside[-1] + 1])
