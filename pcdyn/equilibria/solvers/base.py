"""The contract of equilibrium solvers: a batch, a start and a tolerance in, a `Solution` out."""

from __future__ import annotations

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.states import dot, step
from pcdyn._support.types import Scalar, State, Values
from pcdyn.errors import EquilibriumStatus
from pcdyn.model.problem import InferenceProblem

# A step that solves for a gradient of nothing but round-off moves activities by some of their last
# places, for each passes through several layers.
_STEP_ROUNDINGS = 32


class Solution(eqx.Module):
    """The end of a solver's run, per sample.

    - `state`: the free layers.
    - `status`: a `pcdyn.EquilibriumStatus` as an integer.
    - `iterations`: those of the solver.
    - `passes`: forward, backward and tangent passes through the network; one evaluation of the
      vector field takes two.
    """

    state: State
    status: Values
    iterations: Values
    passes: Values


class Solver(eqx.Module):
    """Base of all equilibrium solvers: values that say how to find where inference ends."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name of the method in messages and tables."""

    @abc.abstractmethod
    def check(self, problem: InferenceProblem) -> None:
        """Raise the named error for a problem that this solver cannot take."""

    @abc.abstractmethod
    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        """Solve every sample of a batch from `state`; each stops changing once it is solved.

        It has converged when ‖∂F/∂x_l‖ is at most `tolerance`, one number or one per sample, in
        every free layer. A prior on the input comes as one more layer.
        """


def solve_each(
    solve: Callable[[InferenceProblem, State, Array], Solution],
    problem: InferenceProblem,
    state: State,
    tolerance: Scalar,
) -> Solution:
    """Apply a function that solves one sample to a tolerance to every sample of a batch."""
    each = jnp.broadcast_to(jnp.asarray(tolerance, problem.dtype), state[0].shape[:1])
    return problem.map_samples(solve, state, each)


def final_status(converged: Values | bool, finite: Values, otherwise: EquilibriumStatus) -> Array:
    """Choose the status of a run from what is known of its end."""
    status = jnp.where(converged, int(EquilibriumStatus.CONVERGED), int(otherwise))
    return jnp.where(finite, status, int(EquilibriumStatus.NON_FINITE))


def round_off(energy: Values, weighted: State, activities: State, errors: State) -> Array:
    """Estimate the round-off of F, per sample, from F, weighted errors and their parts.

    Errors are differences of activities and predictions, each of which is rounded, as F is.
    """
    parts = jax.tree.map(lambda x, e: jnp.abs(x) + jnp.abs(e), activities, errors)
    size = jnp.abs(energy) + dot(jax.tree.map(jnp.abs, weighted), parts)
    return 4 * jnp.finfo(size.dtype).eps * size


def energy_round_off(problem: InferenceProblem, state: State) -> Array:
    """Estimate the round-off of F at a state, per sample."""
    activities = problem.activities(state)
    errors = problem.prediction_errors(activities)
    weighted = tuple(problem.weighted_errors(errors, activities))
    targets = tuple(activities[problem.target_node(k)] for k in problem.predicted_layers)
    return round_off(problem.free_energy(state), weighted, targets, errors)


def within_round_off(moved: State, state: State) -> Array:
    """Return whether a step is no more than the round-off of a state, per sample."""
    squares = dot(moved, moved), dot(state, state)
    resolved = _STEP_ROUNDINGS * jnp.finfo(squares[0].dtype).eps
    return squares[0] <= resolved**2 * squares[1]


# The solution, the residual, the direction, the squared residual, the number of products, and
# whether a direction without curvature has shown.
_Carry = tuple[State, State, State, Array, Array, Array]


def conjugate_gradients(
    product: Callable[[State], State], rhs: State, tolerance: Scalar
) -> tuple[State, Array]:
    """Solve until the residual falls by `tolerance`, or a direction of negative curvature shows.

    There it returns what it has, which is a descent direction (Steihaug); the solvers of JAX and
    lineax would go on and lose it. One sample or a batch, of which each is solved by itself. Also
    returns the number of products.
    """
    first = dot(rhs, rhs)
    target = tolerance**2 * first
    units = sum(x.shape[-1] for x in rhs)

    def unsolved(carry: _Carry) -> Array:
        _, _, _, squared, count, flat = carry
        return (squared > target) & (count < 2 * units) & ~flat

    def body(carry: _Carry) -> _Carry:
        x, residual, direction, squared, count, flat = carry
        active = unsolved(carry)
        image = product(direction)
        curvature = dot(direction, image)
        flat = flat | (active & ~(curvature > 0))
        length = squared / jnp.where(curvature > 0, curvature, 1)
        # Downhill without curvature: the right-hand side itself, if there is nothing better.
        length = jnp.where(flat, jnp.where(count == 0, 1, 0).astype(length.dtype), length)
        length = jnp.where(active, length, 0)
        x = step(x, length, direction)
        residual = step(residual, -length, image)
        after = dot(residual, residual)
        direction = step(residual, after / jnp.where(squared > 0, squared, 1), direction)
        return x, residual, direction, after, count + active.astype(int), flat

    zero = jax.tree.map(jnp.zeros_like, rhs)
    none = jnp.zeros(first.shape, int)
    start = (zero, rhs, rhs, first, none, none > 0)
    x, *_, count, _ = jax.lax.while_loop(lambda carry: jnp.any(unsolved(carry)), body, start)
    return x, count
