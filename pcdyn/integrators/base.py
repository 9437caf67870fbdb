"""The contract that every integrator keeps: `Request` in, `Integration` out."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from pcdyn._support.checks import checked_number
from pcdyn._support.states import layer_norms
from pcdyn._support.timing import elapsed
from pcdyn._support.types import Scalar, State, Values
from pcdyn.errors import IntegratorError, ToleranceError
from pcdyn.integrators.noise import Draws
from pcdyn.integrators.statistics import Statistics
from pcdyn.linearisation.scales import resting_tolerance, smallest_precision
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceFlow, InferenceProblem

# Dense output: the state at a time.
Interpolation = Callable[[Scalar], State]


class UntilEquilibrium(eqx.Module):
    """A stopping rule: every free layer of every sample rests, up to `tolerance`.

    **Arguments:**

    - `tolerance`: the largest ‖dx_l/dt‖, the Euclidean norm of a layer, at which to stop. A given
      one is absolute. Unless given it is 1e-6 in float64 and 1e-3 in float32 times the scale of
      each sample, as for `pcdyn.equilibrium` but over the largest time constant; where weights or
      precisions move as well, times the largest ‖dx_l/dt‖ at the start if that is below 1.
    - `minimum_time`: nothing stops before it, in units of the activity time constant.
    """

    tolerance: Scalar | None = None
    minimum_time: Scalar = 0.0

    def __check_init__(self) -> None:
        if self.tolerance is not None:
            checked_number(self.tolerance, "tolerance", above=0, error=ToleranceError)
        checked_number(self.minimum_time, "minimum_time", at_least=0, error=ToleranceError)

    def resolved(self, problem: Flow, start: State, per_sample: bool) -> UntilEquilibrium:
        """Fill the tolerance in: one for each sample, or one for the batch.

        Samples that share their steps share the tolerance of the one that moves fastest: beside it
        one that starts at rest is disturbed by the errors of the steps.
        """
        relative = 1e-6 if problem.dtype == jnp.float64 else 1e-3
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = _resting_field(problem, start, jnp.asarray(relative, problem.dtype))
            tolerance = tolerance if per_sample else jnp.max(tolerance)
        return self.with_tolerance(tolerance)

    def with_tolerance(self, tolerance: Scalar | None) -> UntilEquilibrium:
        """Return the same with another tolerance, one or one per sample, which may be traced."""
        return eqx.tree_at(lambda u: u.tolerance, self, tolerance, is_leaf=lambda x: x is None)

    def reached(self, t: Scalar, norms: Array) -> Array:
        """Decide by the norms of the field whether to stop at time t, all samples together."""
        return (jnp.asarray(self.minimum_time, norms.dtype) <= t) & self.rests(norms)

    def rests(self, norms: Array) -> Array:
        """Decide whether the field of every sample is within the tolerance."""
        tolerance = jnp.asarray(self.tolerance, norms.dtype)
        return jnp.all(norms <= jnp.broadcast_to(tolerance[..., None], norms.shape))


@eqx.filter_jit
def _resting_field(problem: Flow, start: State, relative: Array) -> Array:
    """What ‖dx_l/dt‖ is to be, per sample."""
    if isinstance(problem, InferenceProblem):
        return resting_tolerance(problem, start, relative) / _slowest_time(problem)
    largest = jnp.minimum(1, jnp.max(layer_norms(problem.vector_field(0.0, start))))
    return jnp.maximum(relative * largest, jnp.finfo(problem.dtype).tiny)


def _slowest_time(problem: InferenceFlow) -> Array:
    """The largest time constant of a free layer."""
    return jnp.max(jnp.stack([jnp.max(tau) for tau in problem.state_time_constants]))


class Request(eqx.Module):
    """What an integrator is asked: integrate from `state` at t = 0 to `t1`, saving at `times`.

    It stops before t1 where `until` says so, or when `pcdyn._support.timing.elapsed` tells
    `deadline`, keeps dense output if `dense`, and has noise where `noise` is given.
    """

    problem: Flow
    state: State
    times: Values
    t1: Scalar
    until: UntilEquilibrium | None
    dense: bool = eqx.field(static=True)
    deadline: Scalar | None = None
    noise: Draws | None = None

    def is_late(self, t: Scalar) -> Array:
        """Whether the deadline has passed when the steps arrive at `t`, also in a compiled loop."""
        if self.deadline is None:
            return jnp.asarray(False)
        # It takes t, for XLA would move a call that always takes the same out of the loop.
        return jax.pure_callback(
            _has_passed, jax.ShapeDtypeStruct((), bool), self.deadline, t,
            vmap_method="broadcast_all",
        )  # fmt: skip


def _has_passed(deadline: Values, t: Values) -> np.ndarray:
    return np.broadcast_to(elapsed() > np.asarray(deadline), np.shape(t))


class Integration(eqx.Module):
    """What an integrator returns, before anything is derived from it.

    - `states`: with a leading axis over the requested times, of which only those up to `end_time`
      mean anything.
    - `end_time`, in units of the activity time constant, and the `end_state` then.
    - `status`: a `pcdyn.Status` as an integer.
    - `statistics`: what it cost.
    - `interpolation`: from a time to the state then, where dense output was asked for.
    - `round_off`: by how much round-off may have moved any activity, estimated, where known.
    - `message`: what the solver says itself.
    """

    states: State
    end_time: Scalar
    end_state: State
    status: Scalar
    statistics: Statistics = Statistics()
    interpolation: Interpolation | None = None
    round_off: Values | None = None
    message: str = eqx.field(static=True, default="")


class Integrator(eqx.Module):
    """Base of all integrators: values that say how to integrate."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name of the method in messages and tables."""

    @property
    @abc.abstractmethod
    def runs_in_jax(self) -> bool:
        """Whether `integrate` can be traced by JAX; otherwise it runs on the host."""

    @property
    @abc.abstractmethod
    def fixed_step(self) -> Scalar | None:
        """Step size, in units of the activity time constant; `None` if the method chooses it."""

    @property
    @abc.abstractmethod
    def most_steps(self) -> int | None:
        """Number of steps after which it gives up; `None` for a method without steps."""

    @property
    def takes_noise(self) -> bool:
        """Whether it can integrate with noise; it cannot, unless overridden."""
        return False

    @property
    def needs_noise(self) -> bool:
        """Whether it is for noise alone; it is not, unless overridden."""
        return False

    @abc.abstractmethod
    def check(self, problem: Flow, until: UntilEquilibrium | None, dense: bool) -> None:
        """Raise `IntegratorError` or `ToleranceError` for what this integrator cannot do."""

    @abc.abstractmethod
    def integrate(self, request: Request) -> Integration:
        """Integrate; what goes wrong on the way is a status, not an exception."""


def default_tolerances(
    rtol: Scalar | None, atol: Scalar | None, request: Request
) -> tuple[Scalar, Scalar]:
    """Fill in the rtol and atol of an adaptive method that were not given.

    1e-6 and 1e-9 in float64, 1e-4 and 1e-6 in float32; tighter with `until`.
    """
    dtype, until = request.problem.dtype, request.until
    default_rtol, default_atol = (1e-6, 1e-9) if dtype == jnp.float64 else (1e-4, 1e-6)
    if until is not None:
        # An explicit method hovers where its own error control lets it; a hundredth of the
        # equilibrium's tolerance, relative to the largest activity, keeps that out of sight.
        largest = largest_activity(request)
        # SciPy takes no less.
        floor = 100 * float(jnp.finfo(dtype).eps)
        # From the field to the way that is left, by the slowest rate that precisions allow for.
        rate = jnp.ones((), dtype)
        if isinstance(request.problem, InferenceFlow):
            slowest = smallest_precision(request.problem) / _slowest_time(request.problem)
            rate = jnp.where(jnp.isfinite(slowest), slowest, 1)
        wanted = jnp.min(jnp.asarray(until.tolerance, dtype)) / rate / 100
        default_rtol = jnp.clip(wanted / largest, floor, default_rtol)
        default_atol = jnp.minimum(default_atol, wanted)
    return (default_rtol if rtol is None else rtol, default_atol if atol is None else atol)


def largest_activity(request: Request) -> Array:
    """Find the largest |activity| at the start, clamped ones included; 1 where all vanish."""
    activities = request.problem.activities(request.state)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in activities]))
    return jnp.where(largest > 0, largest, 1)


def check_step(name: str, dt: object) -> None:
    """Raise `IntegratorError` unless a fixed step is positive and finite."""
    checked_number(dt, f"{name}: dt, the step,", above=0, error=IntegratorError)


def check_step_count(method: Integrator, t1: float, until: UntilEquilibrium | None) -> None:
    """Raise `IntegratorError` where fixed steps cannot reach t1 within the bound on steps.

    With `until` a run may end long before t1, and the bound is kept while it runs.
    """
    if method.fixed_step is None or method.most_steps is None or until is not None:
        return
    dt = float(method.fixed_step)
    # In floating point, for it can be beyond any integer; a last step may be round-off.
    steps = t1 / dt if dt > t1 * 1e-300 else math.inf
    if steps > method.most_steps * (1 + 1e-9) + 0.5:
        raise IntegratorError(
            f"{method.name} needs {steps:.3g} steps of dt={dt:g} to reach t1={t1:g}, more than "
            f"max_steps={method.most_steps}: take a larger step or raise max_steps"
        )


def check_tolerances(
    name: str, rtol: Scalar | None, atol: Scalar | None, dtype: DTypeLike | None = None
) -> None:
    """Raise `ToleranceError` for tolerances that are not positive or too fine for the dtype."""
    for label, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            checked_number(value, f"{name}: {label}", above=0, error=ToleranceError)
    if dtype is not None and rtol is not None and rtol < 10 * jnp.finfo(dtype).eps:
        hint = (
            ' or switch on float64 with jax.config.update("jax_enable_x64", True) and build the '
            "network again"
            if dtype == jnp.float32
            else ""
        )
        raise ToleranceError(
            f"{name}: rtol={float(rtol):g} is finer than {jnp.dtype(dtype).name} can resolve "
            f"(10 eps = {10 * float(jnp.finfo(dtype).eps):.1e}); loosen it{hint}"
        )
