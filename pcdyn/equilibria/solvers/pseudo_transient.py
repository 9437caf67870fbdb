"""Pseudo-transient continuation: implicit Euler along the flow, with steps that grow at the end."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.checks import integer, number
from pcdyn._support.states import all_finite, choose, dot, largest_norm, step
from pcdyn._support.types import Scalar, State
from pcdyn.equilibria.solvers.base import (
    Solution,
    Solver,
    conjugate_gradients,
    energy_round_off,
    solve_each,
    within_round_off,
)
from pcdyn.errors import EquilibriumStatus
from pcdyn.linearisation.scales import smallest_precision
from pcdyn.model.problem import InferenceProblem

# The state, the slope there, the time step, the status, and the numbers of iterations and passes.
_Carry = tuple[State, State, Array, Array, Array, Array]

# How much larger than estimated the round-off of F may be, as of a softmax close to certainty.
_LOST_DIGITS = 1e3


class PseudoTransient(Solver):
    """Newton–Krylov steps `(1/Δt + ∂²F/∂x²) δ = −∂F/∂x` with a growing pseudo-time step Δt.

    Small steps follow the gradient flow and so stay in its basin; large ones are Newton's and
    converge quadratically. Δt grows as the gradient falls (switched evolution relaxation) and
    shrinks where a step would raise F.

    **Arguments:**

    - `first_step`: the first Δt, in activity time constants over the smallest precision.
    - `growth`: the largest factor between steps.
    - `cg_tolerance`: the relative accuracy to which conjugate gradients, with Hessian products,
      solve the linear systems.
    - `max_iterations`: steps after which it gives up.
    """

    first_step: float = eqx.field(
        default=0.5, converter=number("PseudoTransient: first_step", above=0)
    )
    growth: float = eqx.field(default=4.0, converter=number("PseudoTransient: growth", above=1))
    cg_tolerance: float = eqx.field(
        static=True,
        default=1e-3,
        converter=number("PseudoTransient: cg_tolerance", above=0, below=1),
    )
    max_iterations: int = eqx.field(
        default=1000, converter=integer("PseudoTransient: max_iterations", at_least=1)
    )

    @property
    def name(self) -> str:
        return "pseudo_transient"

    def check(self, problem: InferenceProblem) -> None:
        """Take every problem."""

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        return solve_each(self._solve_one, problem, state, tolerance)

    def _solve_one(self, problem: InferenceProblem, state: State, tolerance: Array) -> Solution:
        dtype = problem.dtype
        running = int(EquilibriumStatus.ITERATION_LIMIT)
        # In the units of time that the precisions give.
        precision = smallest_precision(problem)
        unit = jnp.where(jnp.isfinite(precision), 1 / precision, 1)
        first_step = jnp.asarray(self.first_step, dtype) * unit
        smallest = jnp.finfo(dtype).eps

        def proceed(carry: _Carry) -> Array:
            _, _, _, status, iterations, _ = carry
            return (status == running) & (iterations < self.max_iterations)

        def body(carry: _Carry) -> _Carry:
            state, slope, time_step, _, iterations, passes = carry
            direction, products = self._step(problem, state, slope, time_step)
            trial = step(state, 1, direction)
            trial_slope = problem.gradient(trial)
            rise = problem.free_energy(trial) - problem.free_energy(state)
            slack = energy_round_off(problem, state)
            # Where digits of an energy are lost, its slopes at both ends still tell the sign.
            downhill = dot(direction, slope) + dot(direction, trial_slope) <= 0
            lower = (rise <= slack) | ((rise <= _LOST_DIGITS * slack) & downhill)
            accepted = lower & all_finite(trial_slope)
            before, after = _size(slope), _size(trial_slope)
            factor = jnp.clip(
                before / jnp.maximum(after, smallest * before), 0.5, jnp.asarray(self.growth, dtype)
            )
            # The gradient grows on the way out of a saddle, where the flow needs time, not care.
            onward = jnp.maximum(time_step * factor, jnp.minimum(2 * time_step, first_step / 5))
            next_step = jnp.where(accepted, onward, 0.25 * time_step)
            state, slope = choose(accepted, (trial, trial_slope), (state, slope))
            converged = largest_norm(slope) <= tolerance
            # A long step that changes nothing has solved for a gradient of round-off alone.
            still = (
                accepted & (next_step > unit / smallest**0.5) & within_round_off(direction, state)
            )
            status = jnp.where(converged | still, int(EquilibriumStatus.CONVERGED), running)
            stalled = ~(converged | still) & (next_step < smallest * unit)
            status = jnp.where(stalled, int(EquilibriumStatus.STALLED), status)
            return state, slope, next_step, status, iterations + 1, passes + 4 + 4 * products

        slope = problem.gradient(state)
        converged = largest_norm(slope) <= tolerance
        status = jnp.where(converged, int(EquilibriumStatus.CONVERGED), running)
        status = jnp.where(all_finite(slope), status, int(EquilibriumStatus.NON_FINITE))
        start = (state, slope, first_step, status, jnp.asarray(0), jnp.asarray(2))
        state, _, _, status, iterations, passes = jax.lax.while_loop(proceed, body, start)
        return Solution(state, status, iterations, passes)

    def _step(
        self, problem: InferenceProblem, state: State, slope: State, time_step: Array
    ) -> tuple[State, Array]:
        """Compute the step, and the number of Hessian products it took."""
        _, curve = jax.linearize(problem.gradient, state)

        def product(tangent: State) -> State:
            return jax.tree.map(lambda h, v: h + v / time_step, curve(tangent), tangent)

        return conjugate_gradients(product, jax.tree.map(jnp.negative, slope), self.cg_tolerance)


def _size(slope: State) -> Array:
    return jnp.sqrt(dot(slope, slope))
