"""Gauss–Newton to a relative accuracy, by few conjugate-gradient steps: the inside of learning.

A weight update needs an equilibrium to a percent, for every batch anew. From the feedforward pass
two Gauss–Newton steps in error coordinates of one or two conjugate-gradient steps each are near
enough in many networks; what they leave is measured, and what is not near enough goes on.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pcdyn.energy import Gaussian
from pcdyn.errors import InputError
from pcdyn.kinks import has_kinks
from pcdyn.problem import InferenceProblem, State
from pcdyn.solvers.base import Solver
from pcdyn.solvers.chain import Chain, Stacked
from pcdyn.solvers.first_order import ErrorDescent
from pcdyn.solvers.gauss_newton import GaussNewton, gaussian_below
from pcdyn.states import choose, dot, scale, step

_STEPS_AT_KINKS = 5
_MOST_PRODUCTS = 8


class Settled(eqx.Module):
    """An equilibrium to a relative accuracy.

    - `state`: the hidden activities.
    - `residual`: how far from it, per sample, as `TruncatedGaussNewton` measures it.
    - `iterations`: Gauss–Newton steps of the whole batch.
    - `handed_over`: which samples the fallback took over.
    """

    state: State
    residual: Any
    iterations: Any
    handed_over: Any


class TruncatedGaussNewton(eqx.Module):
    """Equilibrium of a batch from its feedforward pass, with both ends clamped.

    Accuracy is measured in error coordinates, as ‖∂F/∂e‖ in the norm of Π⁻¹ over ‖e‖ in that of Π,
    per sample: F has no curvature below Π there but for that of the predictions, so that this
    bounds to first order how much of the displacement from the feedforward pass is missing.

    One step is taken for each entry of `products`, the number of conjugate-gradient steps in it:
    `(2, 1)` unless given, `(2, 2)` where activations have kinks, for there more is missed. While
    the median over the batch is above `tolerance` more steps follow, with as many products as make
    them nearly exact, at most `max_iterations` in all. Samples then above `handed_over`, or with
    more energy than their feedforward pass, are solved to `tolerance` by `GaussNewton` (with
    cross-entropy by `ErrorDescent`), which check every step. Where activations have kinks gradients
    need not vanish, and only the energy decides.
    """

    tolerance: Any = 0.02
    handed_over: Any = 0.3
    products: tuple[int, ...] | None = eqx.field(static=True, default=None)
    max_iterations: Any = 6

    def __check_init__(self) -> None:
        if self.products is not None and (not self.products or min(self.products) < 1):
            raise InputError(f"products must be positive integers, got {self.products}")

    def check(self, problem: InferenceProblem) -> None:
        """Raise `InputError` unless both ends are clamped and hidden energies are Gaussian."""
        gaussian_below("TruncatedGaussNewton", problem)
        if problem.input is None or problem.output is None:
            raise InputError("TruncatedGaussNewton needs both ends clamped")

    def settle(self, problem: InferenceProblem) -> Settled:
        """The equilibrium of every sample, and how near it is."""
        chain = Chain(problem)
        errors = chain.stack(problem.zeros_state())
        steps = self._products(problem)
        for products in steps:
            errors = _stepped(chain, errors, products)
        point = _look(chain, errors)
        none = jnp.zeros(point.residual.shape, bool)
        found = (point, jnp.asarray(len(steps)), none)
        unfinished = self._unsettled(point) | jnp.any(self._left(problem, chain, point))

        def finish(carry: Any) -> Any:
            # All that the loop reads passes the barrier with what changes in it: XLA would
            # otherwise compute most of it before the loop, which seldom makes a turn.
            arrays, static = eqx.partition((problem, carry), eqx.is_array)
            arrays = jax.lax.optimization_barrier(arrays)
            posed, ((point, iterations, _), _) = eqx.combine(arrays, static)
            return self._finish(posed, point, iterations), jnp.asarray(False)

        # A loop of at most one turn: under vmap a condition would compute both of its sides.
        found, _ = jax.lax.while_loop(lambda carry: carry[1], finish, (found, unfinished))
        point, iterations, handed_over = found
        return Settled(chain.unstack(point.hidden), point.residual, iterations, handed_over)

    def _finish(self, problem: InferenceProblem, point: _Point, iterations: Any) -> Any:
        """More steps while the median needs them; then the samples that these do not settle."""
        # What two short steps do not settle is badly conditioned: these are nearly exact.
        chain, products = Chain(problem), min(problem.network.widths[-1], _MOST_PRODUCTS)

        def body(carry: Any) -> Any:
            point, iterations = carry
            new = _look(chain, _stepped(chain, point.errors, products))
            return _chosen(new.energy <= point.energy, new, point), iterations + 1

        point, iterations = jax.lax.while_loop(
            lambda carry: self._unsettled(carry[0]) & (carry[1] < self.max_iterations),
            body,
            (point, iterations),
        )
        left = self._left(problem, chain, point)
        point, _ = jax.lax.while_loop(
            lambda carry: jnp.any(carry[1]),
            lambda carry: (self._handed_over(problem, chain, *carry), jnp.zeros_like(left)),
            (point, left),
        )
        return point, iterations, left

    def _products(self, problem: InferenceProblem) -> tuple[int, ...]:
        if self.products is not None:
            return self.products
        return (2, 2) if has_kinks(problem.network) else (2, 1)

    def _unsettled(self, point: _Point) -> Any:
        """Whether fewer than half of the samples are near enough."""
        return 2 * jnp.sum(point.residual <= self.tolerance) < point.residual.size

    def _left(self, problem: InferenceProblem, chain: Chain, point: _Point) -> Any:
        """The samples that must be handed over."""
        rises = _rises(chain, point)
        if has_kinks(problem.network):
            return rises
        return rises | ~(point.residual <= self.handed_over)

    def _handed_over(
        self, problem: InferenceProblem, chain: Chain, point: _Point, left: Any
    ) -> _Point:
        """The samples that are `left` solved by a solver that checks every step."""
        # At a kink there is no residual to wait for: a few steps that lower F are all it takes.
        most = _STEPS_AT_KINKS if has_kinks(problem.network) else GaussNewton().max_iterations
        solver: Solver = GaussNewton(max_iterations=most)
        if not isinstance(problem.energy, Gaussian):
            solver = ErrorDescent(max_iterations=4 * most)
        lower = ~_rises(chain, point)
        start = jax.tree.map(jnp.nan_to_num, point.errors)
        hidden, _ = chain.activities(scale(lower.astype(point.energy.dtype), start))
        size = jnp.sqrt(dot(start, chain.weighted(start)))
        goal = jnp.where(left, self.tolerance * jnp.where(lower & (size > 0), size, 1), jnp.inf)
        solved = solver.solve(problem, chain.unstack(hidden), goal)
        return _chosen(left, _look(chain, chain.errors(solved.state)), point)


class _Point(eqx.Module):
    """Errors, and what is seen there: activities, F and the relative residual."""

    errors: Stacked
    hidden: Stacked
    energy: Any
    residual: Any


def _rises(chain: Chain, point: _Point) -> Any:
    """Where F is above that of the feedforward pass, by more than round-off, or not finite."""
    start = jax.tree.map(jnp.zeros_like, point.errors)
    at_rest = chain.free_energy(start, chain.activities(start)[1])
    return ~(point.energy <= (1 + 1e3 * jnp.finfo(at_rest.dtype).eps) * at_rest)


def _chosen(condition: Any, yes: _Point, no: _Point) -> _Point:
    """One of two points per sample."""
    return jax.tree.map(lambda a, b: choose(condition, a, b), yes, no)


def _look(chain: Chain, errors: Stacked) -> _Point:
    """F and the relative residual, by a forward and a backward pass."""
    output_error, pull, hidden = jax.vjp(chain.output_error, errors, has_aux=True)
    weighted = chain.weighted(errors)
    slope = jax.tree.map(jnp.add, weighted, pull(chain.output_gradient(output_error))[0])
    size = dot(errors, weighted)
    missing = dot(slope, chain.unweighted(slope))
    # Where nothing moves, nothing is missing.
    residual = jnp.sqrt(missing / jnp.where(size > 0, size, 1))
    return _Point(errors, hidden, chain.free_energy(errors, output_error), residual)


def _stepped(chain: Chain, errors: Stacked, products: int) -> Stacked:
    """One Gauss–Newton step, its linear system solved by so many conjugate-gradient steps.

    With G = ∂E_L/∂r, H = ∂²E_L/∂r² and K = J Π⁻¹ Jᵀ the new errors are `Π⁻¹ Jᵀ w`, where
    `(1 + H K) w = G + H J e`: for a Gaussian output S w = r + J e. K makes that system symmetric,
    also where H is singular, as that of a softmax is. The search starts from w = G, which is BP.
    """
    output_error, push, pull = _linearised(chain, errors)
    curve = chain.output_curvature(output_error)
    gradient = chain.output_gradient(output_error)
    steepest = chain.unweighted(pull(gradient))
    rhs = curve(push(jax.tree.map(jnp.subtract, errors, steepest)))
    correction = _conjugate_steps(
        lambda covector: chain.unweighted(pull(covector)), push, curve, rhs, products
    )
    return step(steepest, 1, correction)


def _linearised(chain: Chain, errors: Stacked) -> tuple[Any, Any, Any]:
    """The output error, and products with J and Jᵀ."""
    output_error, tangent = jax.linearize(lambda e: chain.activities(e)[1], errors)
    transposed = jax.linear_transpose(tangent, errors)
    return (
        output_error,
        lambda v: -tangent(v),
        lambda covector: jax.tree.map(jnp.negative, transposed(covector)[0]),
    )


def _conjugate_steps(spread: Any, push: Any, curve: Any, rhs: Any, steps: int) -> Stacked:
    """`Π⁻¹ Jᵀ w` with `(1 + H K) w = rhs`, by conjugate gradients in the inner product of K.

    `spread` is Π⁻¹ Jᵀ. What it makes of residual and direction is kept, for that is the answer.
    """

    def inner(a: Any, b: Any) -> Any:
        return jnp.einsum("bn,bn->b", a, b)

    residual, spread_residual = rhs, spread(rhs)
    image = push(spread_residual)
    direction, spread_direction, direction_image = residual, spread_residual, image
    size = inner(residual, image)
    answer = jax.tree.map(jnp.zeros_like, spread_residual)
    for count in range(steps):
        bent = curve(direction_image)
        curvature = inner(direction, direction_image) + inner(bent, direction_image)
        length = size / jnp.where(curvature > 0, curvature, 1)
        answer = step(answer, length, spread_direction)
        if count + 1 == steps:
            break
        spread_bent = spread(bent)
        residual = step(residual, -length, direction + bent)
        spread_residual = step(spread_residual, -length, step(spread_direction, 1, spread_bent))
        image = step(image, -length, direction_image + push(spread_bent))
        after = inner(residual, image)
        ratio = after / jnp.where(size > 0, size, 1)
        direction = step(residual, ratio, direction)
        spread_direction = step(spread_residual, ratio, spread_direction)
        direction_image = step(image, ratio, direction_image)
        size = after
    return answer
