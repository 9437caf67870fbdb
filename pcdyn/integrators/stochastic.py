"""Fixed steps of a flow with noise: Euler–Maruyama and the stochastic Heun method."""

from __future__ import annotations

import abc
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.states import all_finite
from pcdyn._support.types import Scalar, State
from pcdyn.errors import IntegratorError, Status
from pcdyn.integrators.base import Integration, Request, UntilEquilibrium
from pcdyn.integrators.fixed_steps import FixedSteps
from pcdyn.integrators.statistics import Statistics
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceFlow

# From a time and a state to the time derivative of the state.
_Field = Callable[[Scalar, State], State]
# The step, the state, and whether the deadline has passed.
_Carry = tuple[Array, State, Array]


class StochasticSteps(FixedSteps):
    """Base of methods that step by `dt` and draw the noise of each step from its number.

    Nothing else bears on what is drawn, so that a path is the same whichever times are saved.
    """

    @property
    @abc.abstractmethod
    def evaluations_per_step(self) -> int:
        """How often a step evaluates the vector field."""

    @abc.abstractmethod
    def stepped(self, field: _Field, t: Scalar, state: State, kicks: State) -> State:
        """Take one step from time t, with `kicks` the integral of the noise over it."""

    @property
    def takes_noise(self) -> bool:
        return True

    @property
    def needs_noise(self) -> bool:
        return True

    def check(self, problem: Flow, until: UntilEquilibrium | None, dense: bool) -> None:
        name = type(self).__name__
        if until is not None:
            raise IntegratorError(f"{name} would ignore until: with noise nothing comes to rest")
        if dense:
            raise IntegratorError(
                f"{name} has no dense output; give the times at which to save instead"
            )

    def integrate(self, request: Request) -> Integration:
        noise, state = request.noise, request.state
        flow, dtype = request.problem.prepared(), request.problem.dtype
        assert noise is not None and isinstance(flow, InferenceFlow), "simulate refuses others"
        dt = jnp.asarray(self.dt, dtype)
        size = 2 * jnp.asarray(noise.temperature, dtype) * dt
        each = zip(state, flow.state_time_constants, strict=True)
        # Padding stays where it is.
        spread = flow.without_padding(
            tuple(jnp.sqrt(size / jnp.broadcast_to(tau, x.shape)) for x, tau in each)
        )

        def advance(carry: _Carry, stop: Array) -> tuple[_Carry, State]:
            def proceed(carry: _Carry) -> Array:
                step, state, late = carry
                return (step < stop) & ~late & all_finite(state)

            def body(carry: _Carry) -> _Carry:
                step, state, _ = carry
                kicks = jax.tree.map(jnp.multiply, spread, noise.normals(step, state))
                state = self.stepped(flow.vector_field, jnp.asarray(step, dtype) * dt, state, kicks)
                return step + 1, state, request.is_late(step + 1)

            carry = jax.lax.while_loop(proceed, body, carry)
            return carry, carry[1]

        # `simulate` has refused times that are no multiples of dt, up to round-off.
        stops = jnp.round(jnp.append(request.times, request.t1) / self.dt).astype(int)
        start = (jnp.asarray(0), state, request.is_late(0))
        (step, stopped, late), states = jax.lax.scan(advance, start, stops)
        status = jnp.where(late, int(Status.TIME_LIMIT), int(Status.REACHED_T1))
        status = jnp.where(all_finite(stopped), status, int(Status.NON_FINITE))
        end_time = jnp.where(status == Status.REACHED_T1, request.t1, step * self.dt)
        statistics = Statistics(step * self.evaluations_per_step, 0, step, 0)
        return Integration(
            jax.tree.map(lambda x: x[:-1], states), end_time, stopped, status, statistics
        )


class EulerMaruyama(StochasticSteps):
    """The update `x ← x + dt · dx/dt + √(2T dt/τ) ξ`, ξ standard normal, for `pcdyn.Langevin`.

    Of order 1 in dt, for each path and for the law. The law that it keeps on a mode of rate λ has
    the variance T/λ over 1 − λ dt/2. Saved times and t1 must be multiples of `dt`.

    **Arguments:**

    - `dt`: the step, in units of the activity time constant.
    - `max_steps`: more steps are refused.
    """

    @property
    def name(self) -> str:
        return "euler_maruyama"

    @property
    def evaluations_per_step(self) -> int:
        return 1

    def stepped(self, field: _Field, t: Scalar, state: State, kicks: State) -> State:
        dt = jnp.asarray(self.dt, state[0].dtype)
        return jax.tree.map(lambda x, v, k: x + dt * v + k, state, field(t, state), kicks)


class StochasticHeun(StochasticSteps):
    """Heun's method, its predictor with the noise of the step, for `pcdyn.Langevin`.

    The noise does not depend on the state: each path is of order 1 in dt, the law of order 2, at
    two evaluations for each step. Saved times and t1 must be multiples of `dt`.

    **Arguments:**

    - `dt`: the step, in units of the activity time constant.
    - `max_steps`: more steps are refused.
    """

    @property
    def name(self) -> str:
        return "stochastic_heun"

    @property
    def evaluations_per_step(self) -> int:
        return 2

    def stepped(self, field: _Field, t: Scalar, state: State, kicks: State) -> State:
        dt = jnp.asarray(self.dt, state[0].dtype)
        before = field(t, state)
        ahead = jax.tree.map(lambda x, v, k: x + dt * v + k, state, before, kicks)
        after = field(t + dt, ahead)
        return jax.tree.map(
            lambda x, v, w, k: x + dt / 2 * (v + w) + k, state, before, after, kicks
        )
