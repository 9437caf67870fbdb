"""Gauss–Newton to a relative accuracy, by few conjugate-gradient steps: the inside of learning.

A weight update needs an equilibrium to a percent, for every batch anew. From the feedforward pass
two Gauss–Newton steps in error coordinates of a few conjugate-gradient steps are near enough in
many networks, the more so with a preconditioner, for the samples of a batch see much the same
network; what they leave is measured, and what is not near enough goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pcdyn._support.checks import as_sequence, checked_integer, flag, integer, number
from pcdyn._support.forward_only import without_derivative
from pcdyn._support.products import einsum, matmul
from pcdyn._support.states import choose, dot, scale, step
from pcdyn._support.types import State, Tree, Values
from pcdyn.equilibria.kinks import has_kinks
from pcdyn.equilibria.solvers.base import Solver
from pcdyn.equilibria.solvers.error_coordinates import (
    ErrorCoordinates,
    Stacked,
    error_coordinates,
)
from pcdyn.equilibria.solvers.first_order import ErrorDescent
from pcdyn.equilibria.solvers.gauss_newton import (
    GaussNewton,
    check_error_coordinates,
    has_curvature,
)
from pcdyn.errors import InputError
from pcdyn.model.problem import InferenceProblem

# The relative residual above which a sample counts as unsettled.
UNSETTLED = 0.3
_STEPS_AT_KINKS = 5
# Products of a further step: nearly exact, for what short ones do not settle is badly conditioned.
_MORE_PRODUCTS, _MORE_PRECONDITIONED = 8, 3
# The samples of which a preconditioner is made, and the widest output for which it is.
_SAMPLES = 4
_WIDEST = 32

_Constant = TypeVar("_Constant")

_NO_DERIVATIVE = InputError(
    "TruncatedGaussNewton stops short of the equilibrium, where what it returns has no useful "
    'derivative: differentiate PredictiveCoding(method="gauss_newton"), or the default of '
    "pcdyn.equilibrium, PredictiveCoding(method=None)"
)


class TruncatedSolution(eqx.Module):
    """The end of inference to a relative accuracy, per sample.

    - `state`: the hidden activities.
    - `residual`: how far from the equilibrium, per sample, as `TruncatedGaussNewton` measures it.
    - `iterations`: Gauss–Newton steps of the whole batch.
    - `handed_over`: which samples the fallback took over, or would have.
    """

    state: State
    residual: Values
    iterations: Values
    handed_over: Values


def _as_products(value: object) -> tuple[int, ...]:
    wanted = "a list of positive integers"
    products = tuple(
        checked_integer(count, "each of products", at_least=1)
        for count in as_sequence(value, "products", wanted)
    )
    if not products:
        raise InputError(f"products must be {wanted}, got none")
    return products


class TruncatedGaussNewton(eqx.Module):
    """Equilibrium of a batch from its feedforward pass, with both ends clamped.

    Accuracy is measured in error coordinates, as ‖∂F/∂e‖ in the norm of Π⁻¹ over ‖e‖ in that of Π,
    per sample: F has no curvature below Π there but for that of the predictions, so that this
    bounds to first order how much of the displacement from the feedforward pass is missing.

    After one step for each of `products` more follow while the median over the batch is above
    `tolerance`. Samples then above `unsettled`, or with more energy than their feedforward pass,
    are solved to `tolerance` by `GaussNewton` (by `ErrorDescent` where the output's energy has no
    curvature, as cross-entropy), which check every step. With energies that are not Gaussian F can
    have less curvature than the model there, so that accuracy is that of the model's next step.
    Where activations have kinks gradients need not vanish, and only the energy decides. What
    remains of a sample's error depends on the others of its batch, by the median and by what the
    preconditioner has of them.

    **Arguments:**

    - `tolerance`: the relative residual at which half of a batch may stop.
    - `unsettled`: that above which a sample is handed over.
    - `products`: the number of conjugate-gradient steps in each of the first Gauss–Newton steps.
    - `max_iterations`: the most Gauss–Newton steps in all.
    - `fallback`: whether samples are handed over; otherwise they stay as they are.
    """

    tolerance: float = eqx.field(
        default=0.02, converter=number("TruncatedGaussNewton: tolerance", above=0)
    )
    unsettled: float = eqx.field(
        default=UNSETTLED, converter=number("TruncatedGaussNewton: unsettled", above=0)
    )
    products: tuple[int, ...] = eqx.field(static=True, default=(3, 1), converter=_as_products)
    max_iterations: int = eqx.field(
        default=6, converter=integer("TruncatedGaussNewton: max_iterations", at_least=1)
    )
    fallback: bool = eqx.field(
        static=True, default=True, converter=flag("TruncatedGaussNewton: fallback")
    )

    def check(self, problem: InferenceProblem) -> None:
        """Raise `InputError` unless both ends are clamped and curvatures of hidden layers known.

        That of the output may be any energy. Graphs as `pcdyn.solvers.ConjugateGradients` takes
        them, others are a `GraphError`.
        """
        check_error_coordinates("TruncatedGaussNewton", problem)

    def settle(self, problem: InferenceProblem) -> TruncatedSolution:
        """Find the equilibrium of every sample, and how near it is."""
        problem = without_derivative(problem.with_prior_as_layer(), _NO_DERIVATIVE)
        coordinates = error_coordinates(problem)
        errors = coordinates.stack(problem.zeros_state())
        preconditioner = _preconditioner(coordinates, errors)
        for products in self.products:
            errors = _stepped(coordinates, errors, products, preconditioner)
        point, iterations = self._more_steps(
            coordinates,
            preconditioner,
            _evaluated(coordinates, errors),
            jnp.asarray(len(self.products)),
        )
        unsolved = self._unsolved(problem, coordinates, point)
        if self.fallback:
            nothing = jnp.zeros_like(unsolved)
            point, _ = _while(
                lambda carry: jnp.any(carry[1]),
                lambda problem, carry: (self._handed_over(problem, *carry), nothing),
                problem,
                (point, unsolved),
            )
        return TruncatedSolution(
            coordinates.unstack(point.hidden), point.residual, iterations, unsolved
        )

    def _more_steps(
        self,
        coordinates: ErrorCoordinates,
        preconditioner: Array | None,
        point: _Point,
        iterations: Array,
    ) -> tuple[_Point, Array]:
        """Take steps of more products while the median needs them."""

        def body(
            constant: tuple[ErrorCoordinates, Array | None], carry: tuple[_Point, Array]
        ) -> tuple[_Point, Array]:
            (coordinates, preconditioner), (point, iterations) = constant, carry
            products = _MORE_PRODUCTS if preconditioner is None else _MORE_PRECONDITIONED
            new = _evaluated(
                coordinates, _stepped(coordinates, point.errors, products, preconditioner)
            )
            return _chosen(new.energy <= point.energy, new, point), iterations + 1

        def far(carry: tuple[_Point, Array]) -> Array:
            return self._far(carry[0]) & (carry[1] < self.max_iterations)

        return _while(far, body, (coordinates, preconditioner), (point, iterations))

    def _far(self, point: _Point) -> Array:
        """Whether fewer than half of the samples are near enough."""
        return 2 * jnp.sum(point.residual <= self.tolerance) < point.residual.size

    def _unsolved(
        self, problem: InferenceProblem, coordinates: ErrorCoordinates, point: _Point
    ) -> Array:
        """The samples that must be handed over."""
        rises = _rises(coordinates, point)
        if has_kinks(problem):
            return rises
        return rises | ~(point.residual <= self.unsettled)

    def _handed_over(self, problem: InferenceProblem, point: _Point, unsolved: Array) -> _Point:
        """Solve the `unsolved` samples by a solver that checks every step."""
        coordinates = error_coordinates(problem)
        # At a kink there is no residual to wait for: a few steps that lower F are all it takes.
        most = _STEPS_AT_KINKS if has_kinks(problem) else GaussNewton().max_iterations
        solver: Solver = GaussNewton(max_iterations=most)
        if not has_curvature(problem):
            solver = ErrorDescent(max_iterations=4 * most)
        lower = ~_rises(coordinates, point)
        start = jax.tree.map(jnp.nan_to_num, point.errors)
        hidden, _ = coordinates.activities(scale(lower.astype(point.energy.dtype), start))
        size = jnp.sqrt(jnp.maximum(dot(start, coordinates.weighted(start)), 0))
        goal = jnp.where(unsolved, self.tolerance * jnp.where(lower & (size > 0), size, 1), jnp.inf)
        solved = solver.solve(problem, coordinates.unstack(hidden), goal)
        return _chosen(unsolved, _evaluated(coordinates, coordinates.errors(solved.state)), point)


class _Point(eqx.Module):
    """Errors, and the activities, F and the relative residual there."""

    errors: Stacked
    hidden: Stacked
    energy: Array
    residual: Array


def _while(
    condition: Callable[[Tree], Array],
    body: Callable[[_Constant, Tree], Tree],
    constant: _Constant,
    carry: Tree,
) -> Tree:
    """`while condition(carry): carry = body(constant, carry)`, for loops that seldom run.

    XLA would compute what does not change in the body before the loop, also where it never runs:
    all that the body reads passes a barrier with what changes in it.
    """

    def iterate(carry: Tree) -> Tree:
        arrays, static = eqx.partition((constant, carry), eqx.is_array)
        return body(*eqx.combine(jax.lax.optimization_barrier(arrays), static))

    return jax.lax.while_loop(condition, iterate, carry)


def _rises(coordinates: ErrorCoordinates, point: _Point) -> Array:
    """Where F is above that of the feedforward pass, by more than round-off, or not finite."""
    start = jax.tree.map(jnp.zeros_like, point.errors)
    at_rest = coordinates.free_energy(start, coordinates.activities(start)[1])
    return ~(point.energy <= at_rest + 1e3 * jnp.finfo(at_rest.dtype).eps * jnp.abs(at_rest))


def _chosen(condition: Array, yes: _Point, no: _Point) -> _Point:
    """Choose one of two points per sample."""
    return jax.tree.map(lambda a, b: choose(condition, a, b), yes, no)


def _evaluated(coordinates: ErrorCoordinates, errors: Stacked) -> _Point:
    """F and the relative residual, by a forward and a backward pass."""
    output_error, pull, hidden = jax.vjp(coordinates.output_error, errors, has_aux=True)
    weighted = coordinates.weighted(errors)
    slope = jax.tree.map(jnp.add, weighted, pull(coordinates.output_gradient(output_error))[0])
    size = dot(errors, weighted)
    missing = dot(slope, coordinates.apply_covariance(slope, errors))
    # Where nothing moves, nothing is missing.
    residual = jnp.sqrt(missing / jnp.where(size > 0, size, 1))
    return _Point(errors, hidden, coordinates.free_energy(errors, output_error), residual)


def _stepped(
    coordinates: ErrorCoordinates, errors: Stacked, products: int, preconditioner: Array | None
) -> Stacked:
    """Take one Gauss–Newton step, its linear system solved by so many conjugate-gradient steps.

    With G = ∂E_L/∂r, H = ∂²E_L/∂r² (or its stand-in) and K = J Π⁻¹ Jᵀ the new errors are
    `Π⁻¹ Jᵀ (G + H y)`, where `(1 + K H) y = J (e − Π⁻¹ Jᵀ G)`. The search starts from y = 0, which
    is BP.
    """
    output_error, push, pull = _linearised(coordinates, errors)
    curve = coordinates.output_curvature(output_error)

    def spread(covector: Array) -> Stacked:
        return coordinates.apply_covariance(pull(covector), errors)

    steepest = spread(coordinates.output_gradient(output_error))
    if not coordinates.is_quadratic:
        # Their model is not least at zero but where its slope at the errors leads.
        own = coordinates.apply_covariance(coordinates.weighted(errors), errors)
        lowest = jax.tree.map(jnp.subtract, errors, own)
        steepest = jax.tree.map(jnp.add, lowest, steepest)
    rhs = push(jax.tree.map(jnp.subtract, errors, steepest))
    found = _conjugate_steps(lambda v: push(spread(v)), curve, preconditioner, rhs, products)
    return step(steepest, 1, spread(curve(found)))


def _linearised(
    coordinates: ErrorCoordinates, errors: Stacked
) -> tuple[Array, Callable[[Stacked], Array], Callable[[Array], Stacked]]:
    """The output error, and products with J and Jᵀ."""
    output_error, tangent = jax.linearize(lambda e: coordinates.activities(e)[1], errors)
    transposed = jax.linear_transpose(tangent, errors)
    return (
        output_error,
        lambda v: -tangent(v),
        lambda covector: jax.tree.map(jnp.negative, transposed(covector)[0]),
    )


def _conjugate_steps(
    coupled: Callable[[Array], Array],
    curve: Callable[[Array], Array],
    preconditioner: Array | None,
    rhs: Float[Array, "batch n"],
    steps: int,
) -> Float[Array, "batch n"]:
    """Solve `(1 + K H) y = rhs` by conjugate gradients in the inner product of H.

    `coupled` is the product with K, `curve` that with H, per sample. In this inner product the
    system is symmetric, also where H is singular, as that of a softmax is.
    """

    def inner(a: Array, b: Array) -> Array:
        return einsum("bn,bn->b", a, b)

    def precondition(vectors: Array) -> Array:
        return vectors if preconditioner is None else matmul(vectors, preconditioner.T)

    answer, residual = jnp.zeros_like(rhs), rhs
    direction = precondition(residual)
    size = inner(curve(residual), direction)
    for count in range(steps):
        bent = curve(direction)
        image = direction + coupled(bent)
        curvature = inner(bent, image)
        length = size / jnp.where(curvature > 0, curvature, 1)
        answer = step(answer, length, direction)
        if count + 1 == steps:
            break
        residual = step(residual, -length, image)
        nearer = precondition(residual)
        after = inner(curve(residual), nearer)
        direction = step(nearer, after / jnp.where(size > 0, size, 1), direction)
        size = after
    return answer


def _preconditioner(coordinates: ErrorCoordinates, start: Stacked) -> Array | None:
    """`(1 + K̄ Π_L)⁻¹`, K̄ the mean of K over the first samples, which have much of it in common.

    `None` for a softmax, whose H is each sample's own, and for wide outputs, where it would cost
    more than it saves.
    """
    width, samples = coordinates.target.shape[-1], min(_SAMPLES, len(coordinates.target))
    if width > _WIDEST or coordinates.output_energy.quadratic_form is None:
        return None
    few = coordinates.take(slice(samples))
    _, push, pull = _linearised(few, jax.tree.map(lambda x: x[:, :samples], start))
    units = jnp.eye(width, dtype=coordinates.target.dtype)

    def mean_of_row(unit: Array) -> Array:
        covector = jnp.broadcast_to(unit, (samples, width))
        return jnp.mean(push(few.apply_covariance(pull(covector), start)), axis=0)

    coupling = jax.vmap(mean_of_row)(units)
    return jnp.linalg.inv(units + coordinates.output_gradient(coupling))
