"""Nonlinear conjugate gradients in error coordinates: few passes where the output is narrow.

The model's Hessian in the errors is `Π + JᵀΠ_L J`. Preconditioned by the precisions it is the
identity but for as many directions as there are output units, so that conjugate gradients take
about as many iterations, and fewer where its eigenvalues lie close together. The step length is the
one that minimises this model along the direction; each iteration is one forward, one backward and
one tangent pass.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.checks import integer
from pcdyn._support.states import all_finite, choose, dot, scale, step
from pcdyn._support.types import Scalar, State
from pcdyn.equilibria.solvers.base import Solution, Solver, round_off
from pcdyn.equilibria.solvers.error_coordinates import (
    ErrorCoordinates,
    Stacked,
    error_coordinates,
)
from pcdyn.equilibria.solvers.gauss_newton import check_error_coordinates
from pcdyn.errors import EquilibriumStatus
from pcdyn.model.problem import InferenceProblem

_RUNNING = int(EquilibriumStatus.ITERATION_LIMIT)
_CONVERGED = int(EquilibriumStatus.CONVERGED)
_STALLED = int(EquilibriumStatus.STALLED)
# Iterations before the rate of convergence is judged.
_JUDGED_AFTER = 4


class _Search(eqx.Module):
    """What is carried from iteration to iteration, per sample.

    `errors` is the point to look at next; where it was one step `length · direction` before, F was
    `energy`, its gradient `slope` and the gradient's product with its preconditioned self
    `product`, at first `first_product`. `curvature` is the direction's product with Π and itself.
    """

    errors: Stacked
    energy: Array
    slope: Stacked
    direction: Stacked
    length: Array
    curvature: Array
    product: Array
    first_product: Array
    status: Array
    iterations: Array
    passes: Array


class ConjugateGradients(Solver):
    """Nonlinear conjugate gradients (Polak–Ribière) in error coordinates, without a line search.

    It needs both ends clamped and the curvatures of hidden energies, `pcdyn.Gaussian` or others
    with a method `curvature`. A sample is given up, for the next solver, once F would rise, and a
    batch once the convergence of a sample so far says that `max_iterations` would not do.

    **Arguments:**

    - `max_iterations`: steps after which it gives up, for each sample.
    """

    max_iterations: int = eqx.field(
        default=1000, converter=integer("ConjugateGradients: max_iterations", at_least=1)
    )

    @property
    def name(self) -> str:
        return "conjugate_gradients"

    def check(self, problem: InferenceProblem) -> None:
        check_error_coordinates(self.name, problem)

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        coordinates = error_coordinates(problem)
        batch, dtype = len(coordinates.target), coordinates.target.dtype
        tolerance = jnp.broadcast_to(jnp.asarray(tolerance, dtype), (batch,))

        def runs(now: _Search) -> Array:
            return (now.status == _RUNNING) & (now.iterations < self.max_iterations)

        start = coordinates.errors(state)
        nothing, none = jax.tree.map(jnp.zeros_like, start), jnp.zeros(batch, int)
        zero, endless = jnp.zeros(batch, dtype), jnp.full(batch, jnp.inf, dtype)
        first = _Search(
            errors=start, energy=endless, slope=nothing, direction=nothing, length=zero,
            curvature=zero, product=endless, first_product=zero, status=none + _RUNNING,
            iterations=none, passes=none + 1,
        )  # fmt: skip
        end = jax.lax.while_loop(
            lambda now: jnp.any(runs(now)),
            lambda now: self._iterate(coordinates, now, runs(now), tolerance),
            first,
        )
        hidden, output_error = coordinates.activities(end.errors)
        state = coordinates.unstack(hidden)
        finite = jax.vmap(all_finite)((*state, output_error))
        status = jnp.where(finite, end.status, int(EquilibriumStatus.NON_FINITE))
        return Solution(state, status, end.iterations, end.passes)

    def _iterate(
        self, coordinates: ErrorCoordinates, now: _Search, running: Array, tolerance: Array
    ) -> _Search:
        output_error, push, hidden = jax.linearize(
            coordinates.output_error, now.errors, has_aux=True
        )
        weighted = coordinates.weighted(now.errors)
        output_weighted = coordinates.output_gradient(output_error)
        energy = coordinates.free_energy(now.errors, output_error)
        (pulled,) = jax.linear_transpose(push, now.errors)(output_weighted)
        slope = jax.tree.map(jnp.add, weighted, pulled)

        # ‖∂F/∂x_l‖ takes two passes more: only where the gradient in the errors is so small that
        # its layers, which sum up those above, may add up to no more than the tolerance.
        near = running & (jnp.sqrt(dot(slope, slope)) <= sum(coordinates.lengths) * tolerance)
        residual = jax.lax.cond(
            jnp.any(near),
            lambda: coordinates.residual(hidden, weighted, output_weighted),
            lambda: jnp.full_like(energy, jnp.inf),
        )
        slack = round_off(
            energy, (*weighted, output_weighted), (*hidden, coordinates.target),
            (*now.errors, output_error),
        )  # fmt: skip
        falls = energy <= now.energy + slack
        converged = falls & (residual <= tolerance)

        steepest = coordinates.apply_covariance(slope, now.errors)
        product = dot(slope, steepest)
        # Polak–Ribière; below 0 the memory is dropped, and at the first iteration there is none.
        memory: Array = jnp.maximum((product - dot(now.slope, steepest)) / now.product, 0)
        along = dot(slope, now.direction)
        memory = jnp.where(memory * along < product, memory, 0)
        direction = step(scale(-1, steepest), memory, now.direction)
        # dᵀΠd of the direction d = memory · d' − Π⁻¹g, from that of d'.
        curvature = product - 2 * memory * along + memory**2 * now.curvature
        moved = push(direction)
        output_curvature = dot((moved,), (coordinates.output_curvature(output_error)(moved),))
        total = curvature + output_curvature
        length = (product - memory * along) / jnp.where(total > 0, total, 1)

        first_product = jnp.where(now.iterations == 0, product, now.first_product)
        # ‖∂F/∂e‖ and the tolerance, as if each iteration took off the same factor.
        fallen = jnp.log(jnp.sqrt(product / first_product))
        wanted = jnp.log(tolerance / jnp.sqrt(first_product))
        share = (now.iterations / self.max_iterations).astype(energy.dtype)
        slow = ~(fallen <= share * wanted)
        # The next solver takes as long for a batch as for one sample of it.
        hopeless = jnp.any(running & slow & (now.iterations >= _JUDGED_AFTER))
        stalled = ~falls | ~(total > 0) | hopeless
        status = jnp.where(stalled, _STALLED, _RUNNING)
        status = jnp.where(converged, _CONVERGED, status)
        going = running & (status == _RUNNING)
        # Where F has risen, or is not finite any more, one step back.
        onward = choose(going, step(now.errors, length, direction), now.errors)
        back = step(now.errors, -now.length, now.direction)
        return _Search(
            errors=choose(running & ~falls, back, onward),
            energy=jnp.where(running, energy, now.energy),
            slope=slope,
            direction=direction,
            length=length,
            curvature=curvature,
            product=product,
            first_product=first_product,
            status=jnp.where(running, status, now.status),
            iterations=now.iterations + going.astype(int),
            passes=now.passes + jnp.where(running, jnp.where(jnp.any(near), 5, 3), 0),
        )
