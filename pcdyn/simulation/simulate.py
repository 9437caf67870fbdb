"""`simulate`: integrate the flow of an inference problem, or any other, into a trajectory."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Literal, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from pcdyn._support.arrays import as_host_array, check_size, is_traced
from pcdyn._support.checks import check_flag, checked_number
from pcdyn._support.forward_only import forward_only
from pcdyn._support.timing import Stopwatch, elapsed
from pcdyn._support.types import Numbers, State, Values
from pcdyn._support.waiting import interruptible
from pcdyn.errors import (
    IntegratorError,
    RoundOffWarning,
    ShapeError,
    StepSizeWarning,
    TimesError,
    simulation_error,
    worst_status,
)
from pcdyn.integrators import (
    Diffrax,
    Exact,
    Integration,
    Integrator,
    Langevin,
    UntilEquilibrium,
    get_integrator,
)
from pcdyn.integrators.base import Request, check_step_count
from pcdyn.integrators.noise import draws
from pcdyn.integrators.run import integrate, integrate_with_fallback, on_host
from pcdyn.integrators.stability_function import known_interval
from pcdyn.linearisation.spectrum import estimated_fastest_rate
from pcdyn.model.driven import DrivenProblem
from pcdyn.model.flow import Flow, SampledFlow, check_contract, check_flow, depends_on_time
from pcdyn.model.problem import InferenceFlow
from pcdyn.model.stacked import StackedProblem, stacked
from pcdyn.simulation.assembly import Observed, observe, traced_trajectory, trajectory_of
from pcdyn.simulation.intervals import integrate_over_jumps, integrate_over_jumps_in_jax
from pcdyn.simulation.noise import check_noise, times_on_steps
from pcdyn.simulation.trajectory import Trajectory, round_off

_DEFAULT_SAVES = 101


def simulate(
    problem: Flow,
    *,
    t1: float,
    times: Numbers | None = None,
    initial: str | Sequence[Numbers] = "feedforward",
    integrator: str | Integrator = "tsit5",
    until: Literal["equilibrium"] | UntilEquilibrium | None = None,
    per_sample: bool = False,
    dense: bool = False,
    throw: bool = True,
    seconds: float | None = None,
    noise: Langevin | None = None,
    key: PRNGKeyArray | None = None,
) -> Trajectory:
    """Integrate `τ_l dx_l/dt = −∂F/∂x_l`, or any other `pcdyn.Flow`, from t = 0 to `t1`.

    **Arguments:**

    - `problem`: a `pcdyn.InferenceProblem`, a `pcdyn.DrivenProblem`, whose data, precisions or time
      constants change in time, a flow in which weights or precisions move as well, such as
      `pcdyn.learning.JointFlow`, or a `pcdyn.Flow` of your own.
    - `t1`: the end time, in units of the activity time constant.
    - `times`: increasing times within 0 … t1 to save at; 101 evenly spaced ones unless given, or
      the steps of a method with noise nearest to them.
    - `initial`: `"feedforward"`, `"zeros"` or a state (see `problem.random_state`); what other
      flows take, their `initial_state` says.
    - `integrator`: a name (`"tsit5"`, `"rodas5p"`, `"lsoda"`, `"exact"`, …) or a value such as
      `pcdyn.Diffrax("dopri8", rtol=1e-9)`, `pcdyn.SciPy("Radau")`, `pcdyn.Euler(dt=0.05)`,
      `pcdyn.Exact()`.
    - `until`: `"equilibrium"` or `pcdyn.UntilEquilibrium(…)` stops before t1 when the vector
      field is small in every layer; the state there becomes the last saved one. A flow that
      depends on time does not come to rest, and is refused.
    - `per_sample`: give every sample of a batch its own step size, statistics and status;
      otherwise one step size serves the batch. For inference only.
    - `dense`: keep the solver's interpolation, so that `trajectory(t)` works at any time. diffrax
      then reserves memory for `max_steps` steps.
    - `throw`: raise `pcdyn.SimulationError` if any sample fails, with what was computed in its
      `trajectory`; with `throw=False` the status says so instead.
    - `seconds`: after so much wall time, compilation included, it ends with the status
      `TIME_LIMIT` and what was reached. Compiled methods then ask Python for the time at each
      step. Refused under `jax.jit` and by `pcdyn.Exact`, which takes no steps.
    - `noise`: `pcdyn.Langevin(temperature=T)` integrates `τ dx = −∂F/∂x dt + √(2Tτ) dW` by
      `pcdyn.EulerMaruyama(dt=…)`, `pcdyn.StochasticHeun(dt=…)` or `pcdyn.Exact()`, which has no
      error of steps; for inference only (docs/noise.md).
    - `key`: a `jax.random.key`, from which the noise is drawn, of its own for each sample.

    A fixed step above the largest stable one of an explicit method at the initial state gives a
    `pcdyn.StepSizeWarning` that names the bound; see `pcdyn.stability`.

    Where diffrax runs out of steps, its step vanishes or it finds no root of an implicit step,
    SciPy's LSODA takes over on the host and the trajectory's `fallback` says so
    (`pcdyn.Diffrax(…, fallback=None)` switches it off). Where activations have kinks the flow can
    slide along them: then Rodas5P takes over with each kink rounded over a width, named in
    `fallback`, of the tolerance; activities are those of the sliding flow up to that width, and
    `vector_field_norms` those of the rounded field, which vanishes where the flow rests at a kink.

    Under `jax.vmap` or `jax.jit`, over networks and data alike, nothing is raised, trimmed or
    handed to SciPy: look at `status_codes`. The times must be known then. Derivatives are taken
    in forward mode (`jax.jvp`, `jax.jacfwd`); `pcdyn.Exact` has reverse mode as well.

    **Raises:**

    - `TimesError`, `IntegratorError`, `ToleranceError`, `ShapeError`, `SizeError` and what the
      problem and the initial state raise, before anything runs.
    - `SimulationError` if a sample fails, unless `throw=False`.
    """
    check_flow(problem)
    for name, value in (("per_sample", per_sample), ("dense", dense), ("throw", throw)):
        check_flag(value, name)
    method = get_integrator(integrator)
    stop = _stopping(until)
    check_noise(problem, method, noise, key, stop, dense)
    method.check(problem, stop, dense)
    saves = times_on_steps(_checked_times(t1, times), float(t1), method, given=times is not None)
    is_driven = isinstance(problem, DrivenProblem)
    if is_driven:
        problem.edges(float(t1))
    state = problem.initial_state(initial)
    if not isinstance(problem, InferenceFlow):
        _check_other(problem, state, stop, per_sample)
    check_step_count(method, float(t1), stop)
    traced = is_traced(problem, state, noise, key)
    # The closed form is one of the weights, layer by layer.
    deep = problem if isinstance(method, Exact) else stacked(problem, state)
    request = Request(
        problem=deep,
        state=deep.pack(state) if isinstance(deep, StackedProblem) else state,
        times=cast(Values, saves),
        t1=float(t1),
        until=None if stop is None else stop.resolved(problem, state, per_sample),
        dense=dense,
        deadline=_deadline(seconds, method, traced=traced),
        noise=None if noise is None or key is None else draws(noise, key, state),
    )
    _check_sizes(request, method)
    if per_sample and state[0].ndim != 2:
        raise ShapeError("per_sample=True needs a batch; this problem has a single sample")
    if traced:
        if not method.runs_in_jax:
            raise IntegratorError(
                f"{method.name} runs on the host and cannot be transformed by JAX; use diffrax"
            )
        if not isinstance(method, Exact):
            moving = (request.problem, request.state, request.noise)
            moving = forward_only(moving, f"simulate with {method.name}")
            request = dataclasses.replace(
                request, problem=moving[0], state=moving[1], noise=moving[2]
            )
        run = (integrate_over_jumps_in_jax if is_driven else integrate)(method, request, per_sample)
        return traced_trajectory(problem, request, run, method)
    _warn_of_step(request, method)

    def compute() -> tuple[Integration, str, Observed, Stopwatch]:
        with Stopwatch() as clock:
            over_time = integrate_over_jumps if is_driven else integrate_with_fallback
            run, fallback, integrated = over_time(method, request, per_sample)
            # The last row is that of the end.
            times = np.append(request.times, np.max(run.end_time)).astype(problem.dtype)
            observed = on_host(observe(integrated, jnp.asarray(times), run.states))
        return run, fallback, observed, clock

    # SciPy's loops are Python's own, and end where they are interrupted.
    computed = interruptible(compute) if method.runs_in_jax else compute()
    run, fallback, observed, clock = computed
    trajectory = trajectory_of(problem, request, run, observed, method, fallback, clock)
    _warn_of_round_off(trajectory)
    if throw and not trajectory.ok:
        worst = worst_status(trajectory.status_codes)
        raise simulation_error(worst, f"{method.name}: {trajectory.message}", trajectory)
    return trajectory


def _check_other(
    flow: Flow, state: State, until: UntilEquilibrium | None, per_sample: bool
) -> None:
    """Raise the named error for a flow that is no inference and does not fit its contract."""
    check_contract(flow, state)
    name = type(flow).__name__
    if per_sample and not isinstance(flow, SampledFlow):
        raise ShapeError(
            f"per_sample=True needs a batch of a pcdyn.InferenceProblem, whose samples do not "
            f"meet; those of a {name} may"
        )
    if until is not None and depends_on_time(flow.vector_field, 0.0, state):
        raise IntegratorError(
            f"until would stop where the vector field of the {name} happens to vanish: it depends "
            "on time, so that the flow does not come to rest there; leave until out"
        )


def _check_sizes(request: Request, method: Integrator) -> None:
    """Raise `SizeError` for more saved states, or room for dense output, than memory holds."""
    state = sum(x.size for x in request.state) * request.problem.dtype.itemsize
    # With its errors a saved state takes twice its own size.
    what = f"saving {len(request.times)} times of {state / 2**20:.3g} MiB, with their errors,"
    check_size(2 * (len(request.times) + 1) * state, what)
    if request.dense and isinstance(method, Diffrax):
        # diffrax keeps no less than both ends of each step that it could take.
        what = f"dense output of up to {method.max_steps} steps of {state / 2**20:.3g} MiB"
        check_size(2 * method.max_steps * state, what)


def _deadline(seconds: float | None, method: Integrator, *, traced: bool) -> float | None:
    """When to stop, as `elapsed` tells the time."""
    if seconds is None:
        return None
    seconds = checked_number(seconds, "seconds", above=0, error=IntegratorError)
    if traced:
        raise IntegratorError(
            f"seconds={seconds:g} would count from when JAX traces this call, not from when it "
            "runs: leave seconds out, and bound max_steps"
        )
    if isinstance(method, Exact):
        raise IntegratorError(
            f"{method.name} would ignore seconds={seconds:g}: a closed form takes no steps between "
            "which it could end"
        )
    return elapsed() + seconds


def _warn_of_step(request: Request, method: Integrator) -> None:
    """Warn of a fixed step with which an explicit method amplifies a mode at the start."""
    problem = request.problem
    if isinstance(problem, DrivenProblem):
        problem = problem.problem
    if method.fixed_step is None or not isinstance(problem, InferenceFlow):
        return
    interval = known_interval(method)
    if interval is None or math.isinf(interval):
        return
    fastest = estimated_fastest_rate(problem, request.state)
    above = np.flatnonzero(np.ravel(fastest) * float(method.fixed_step) > interval)
    if above.size:
        share = "" if fastest.ndim == 0 else f" of {above.size} of {fastest.size} samples"
        warnings.warn(
            f"dt={float(method.fixed_step):g} is above {interval / np.nanmax(fastest):.3g}, the "
            f"largest stable step of {method.name} at the initial state{share}: take a smaller "
            "step, or an adaptive or implicit integrator (see pcdyn.stability)",
            StepSizeWarning,
            stacklevel=3,
        )


def _warn_of_round_off(trajectory: Trajectory) -> None:
    """Warn where a solution that should be exact has lost more than half of its digits."""
    lost = trajectory.round_off
    if lost is None:
        return
    size = max(float(np.max(np.abs(x))) for x in trajectory.activities)
    if np.max(lost) > math.sqrt(np.finfo(trajectory.energies.dtype).eps) * size:
        warnings.warn(
            f"activities of the size {size:.2g} may be off by {np.max(lost):.1g} by round-off: the "
            f"rates span more than {trajectory.energies.dtype} can resolve; use float64, or a "
            "smaller ratio of precisions",
            RoundOffWarning,
            stacklevel=3,
        )


def _stopping(until: str | UntilEquilibrium | None) -> UntilEquilibrium | None:
    if until is None or isinstance(until, UntilEquilibrium):
        return until
    if isinstance(until, str) and until == "equilibrium":
        return UntilEquilibrium()
    raise IntegratorError(
        f'until={until!r} is unknown: use "equilibrium" or pcdyn.UntilEquilibrium(tolerance=…)'
    )


def _checked_times(t1: float, times: Numbers | None) -> np.ndarray:
    given, t1 = t1, checked_number(t1, "t1", above=0, error=TimesError)
    if times is None:
        return np.linspace(0.0, t1, _DEFAULT_SAVES)
    array = as_host_array(times, "times", error=TimesError)
    if array.ndim != 1 or array.size == 0:
        raise TimesError(f"times must be a vector of at least one time, got shape {array.shape}")
    # A time that is t1 up to the round-off of either's dtype is t1.
    latest = t1 * (1 + round_off(given, times))
    array = np.where((array > t1) & (array <= latest), t1, array)
    if np.any(np.diff(array) <= 0):
        where = int(np.argmax(np.diff(array) <= 0))
        raise TimesError(
            f"times must increase, but times[{where + 1}] = {array[where + 1]:g} follows "
            f"{array[where]:g}; sort them and drop repeats"
        )
    if array[0] < 0 or array[-1] > t1:
        raise TimesError(
            f"times from {array[0]:.17g} to {array[-1]:.17g} leave the integrated range 0 … "
            f"{t1:.17g}"
        )
    return array
