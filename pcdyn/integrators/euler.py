"""Explicit Euler with a fixed step: the paper's update rule, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.states import all_finite
from pcdyn._support.types import Scalar, State
from pcdyn.errors import IntegratorError, Status
from pcdyn.integrators.base import Integration, Request, UntilEquilibrium
from pcdyn.integrators.fixed_steps import FixedSteps, nearest_steps
from pcdyn.integrators.statistics import Statistics
from pcdyn.model.flow import Flow

# The step, the state, and whether it rests and the deadline has passed.
_Carry = tuple[Array, State, Array, Array]


class Euler(FixedSteps):
    """The update `x ← x + dt · dx/dt`, repeated; n updates reach t = n·dt.

    Times between two updates are interpolated linearly. diffrax's Euler steps by differences of
    accumulated times, which are not exactly `dt`; this one is the plain loop. It stops at the first
    non-finite state. Where t1 is no multiple of `dt` the last update is shorter.

    **Arguments:**

    - `dt`: the step, in units of the activity time constant: the "learning rate η" of the paper's
      inference.
    - `max_steps`: more updates are refused.
    """

    @property
    def name(self) -> str:
        return "euler"

    def check(self, problem: Flow, until: UntilEquilibrium | None, dense: bool) -> None:
        if dense:
            raise IntegratorError(
                "Euler has no dense output; give the times at which to save instead"
            )

    def integrate(self, request: Request) -> Integration:
        until, state, t1 = request.until, request.state, request.t1
        flow = request.problem.prepared()
        dtype = request.problem.dtype
        dt = jnp.asarray(self.dt, dtype)

        def field(step: Scalar, state: State) -> State:
            return flow.vector_field(jnp.asarray(step, dtype) * dt, state)

        def ended(step: Scalar, state: State) -> tuple[Array, Array]:
            late = request.is_late(step)
            if until is None:
                return jnp.asarray(False), late
            norms = flow.norms(field(step, state))
            return until.reached(jnp.asarray(step, dtype) * dt, norms), late

        def advance(carry: _Carry, stop: Array) -> _Carry:
            def proceed(carry: _Carry) -> Array:
                step, state, rests, late = carry
                return (step < stop) & ~rests & ~late & all_finite(state)

            def body(carry: _Carry) -> _Carry:
                step, state, *_ = carry
                state = jax.tree.map(lambda x, v: x + dt * v, state, field(step, state))
                return step + 1, state, *ended(step + 1, state)

            return jax.lax.while_loop(proceed, body, carry)

        def save(carry: _Carry, save_step: tuple[Array, Array]) -> tuple[_Carry, State]:
            whole, fraction = save_step
            carry = advance(carry, whole)

            def interpolate(state: State) -> State:
                rate = field(carry[0], state)
                return jax.tree.map(lambda x, v: x + fraction * dt * v, state, rate)

            return carry, jax.lax.cond(fraction > 0, interpolate, lambda state: state, carry[1])

        steps = jnp.append(request.times, t1) / self.dt
        nearest, on_grid = nearest_steps(steps, jnp)
        whole = jnp.where(on_grid, nearest, jnp.floor(steps))
        fraction = jnp.asarray(jnp.where(on_grid, 0, steps - whole), dtype)
        # With `until` t1 can be out of reach.
        beyond = whole > self.max_steps
        whole = jnp.where(beyond, self.max_steps, whole).astype(int)
        fraction = jnp.where(beyond, 0, fraction)
        start = (jnp.asarray(0), state, *ended(0, state))
        (step, stopped, rests, late), states = jax.lax.scan(save, start, (whole, fraction))
        # The last row is the state at t1, or where it stopped before.
        early = rests | late | ~all_finite(stopped)
        end_state = jax.tree.map(lambda x, saved: jnp.where(early, x, saved[-1]), stopped, states)
        states = jax.tree.map(lambda x: x[:-1], states)
        status = jnp.where(beyond[-1], Status.MAX_STEPS, Status.REACHED_T1)
        status = jnp.where(late, Status.TIME_LIMIT, status)
        status = jnp.where(rests, Status.CONVERGED, status)
        status = jnp.where(all_finite(end_state), status, Status.NON_FINITE)
        end_time = jnp.where(status == Status.REACHED_T1, t1, step * self.dt)
        tests = 0 if until is None else step + 1
        evaluations = step + tests + jnp.sum(fraction > 0)
        return Integration(states, end_time, end_state, status, Statistics(evaluations, 0, step, 0))
