"""Gauss–Newton: the linear problem's exact solution with the current Jacobians, repeated.

With both ends clamped, and in a graph whose errors determine its activities, it works in error
coordinates, where each step is one solve in the output space: `S = Π_L⁻¹ + Σ_l J_l Π_l⁻¹ J_lᵀ`
with J_l = ∂μ_L/∂x_l. Otherwise it works in the activities, where the Hessian of a chain is block
tridiagonal: that is the iterated Kalman smoother over depth, or Gaussian message passing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, PyTree

from pcdyn._support.checks import integer, number
from pcdyn._support.states import largest_norm, scale, step
from pcdyn._support.types import Scalar, State
from pcdyn.equilibria.solvers.base import Solution, Solver, conjugate_gradients, energy_round_off
from pcdyn.equilibria.solvers.damped import DescentModel, PointEvaluation, Propose, descend
from pcdyn.equilibria.solvers.error_coordinates import (
    ErrorCoordinates,
    Stacked,
    error_coordinates,
    has_error_coordinates,
)
from pcdyn.errors import GraphError, InputError
from pcdyn.linearisation.block_sparse import BlockFactor
from pcdyn.linearisation.coupling import error_rows, prediction_jacobians, weighted_squares
from pcdyn.model.energies.precision import Precision
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import gauss_newton_hessian


class GaussNewton(Solver):
    """Damped Gauss–Newton with a line search that never lets F rise beyond its round-off.

    It needs energies of which the curvature is known, `pcdyn.Gaussian`, sums over units
    (`pcdyn.LogCosh` and others) or your own with a method `curvature`. Curvatures take the place of
    the precision where the step starts; that of sums over units is, where h'' is not positive, the
    weight of iteratively reweighted least squares (`Separable.bend`), so that every step is one of
    a positive definite model. Where residuals are large or energies not convex it can end at
    another stationary point than the gradient flow: `Equilibrium.basin` checks that.

    **Arguments:**

    - `max_iterations`: so many steps, those that could not be taken included, for each sample.
    - `explicit_width`: for outputs up to this width S is computed column by column, each by a
      backward and a tangent pass, and solved by Cholesky.
    - `cg_tolerance`: for wider ones it is solved by conjugate gradients to this relative accuracy.
    """

    max_iterations: int = eqx.field(
        default=50, converter=integer("GaussNewton: max_iterations", at_least=1)
    )
    explicit_width: int = eqx.field(
        static=True, default=32, converter=integer("GaussNewton: explicit_width", at_least=0)
    )
    cg_tolerance: float = eqx.field(
        static=True, default=1e-4, converter=number("GaussNewton: cg_tolerance", above=0, below=1)
    )

    @property
    def name(self) -> str:
        return "gauss_newton"

    def check(self, problem: InferenceProblem) -> None:
        check_curvature(self.name, problem)

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        if not has_error_coordinates(problem):
            return descend(ActivityModel(problem), state, tolerance, self.max_iterations)
        coordinates = error_coordinates(problem)
        explicit = coordinates.target.shape[-1] <= self.explicit_width
        model = ErrorModel(coordinates, explicit, self.cg_tolerance)
        end = descend(model, coordinates.errors(state), tolerance, self.max_iterations)
        hidden, _ = coordinates.activities(end.state)
        return dataclasses.replace(end, state=coordinates.unstack(hidden))


# From a vector of the output space to the solution of S, and the passes that this costs.
_Solve = Callable[[Array], tuple[Array, Scalar]]


class ErrorModel(DescentModel):
    """Both ends clamped: errors as coordinates, solved in the output space."""

    coordinates: ErrorCoordinates
    explicit: bool = eqx.field(static=True)
    cg_tolerance: float = eqx.field(static=True)

    @property
    def evaluation_passes(self) -> int:
        return 4

    @property
    def matrix_passes(self) -> int:
        return 2 + 2 * self.coordinates.target.shape[-1] if self.explicit else 2

    def evaluate(self, point: Stacked) -> PointEvaluation:
        return self.coordinates.evaluate(point)

    def round_off(self, point: Stacked) -> Array:
        return self.coordinates.round_off(point)

    def activities(self, point: Stacked) -> Stacked:
        return self.coordinates.activities(point)[0]

    def take(self, samples: Array) -> ErrorModel:
        return dataclasses.replace(self, coordinates=self.coordinates.take(samples))

    def factorise(self, point: Stacked, damping: Array) -> Propose:
        push, pull = self.coordinates.linearise(point)
        lessened = 1 / (1 + damping)
        output_covariance = self.coordinates.output_covariance(
            self.coordinates.activities(point)[1]
        )

        def s_product(covector: Array) -> Array:
            """S v with S = Π_L⁻¹ + Σ_l J_l Π_l⁻¹ J_lᵀ: v pulled down and pushed up again."""
            own = output_covariance(covector)
            through = push(self.coordinates.apply_covariance(pull(covector), point))
            return step((own,), lessened, (through,))[0]

        solver = self._cholesky if self.explicit else self._conjugate_gradients
        solve = solver(s_product)

        def propose(slope: Stacked) -> tuple[Stacked, Scalar]:
            # (Π + JᵀΠ_L J)⁻¹ = Π⁻¹ − Π⁻¹ Jᵀ S⁻¹ J Π⁻¹, with (1 + damping) Π for Π.
            steepest = scale(lessened, self.coordinates.apply_covariance(slope, point))
            solved, passes = solve(push(steepest))
            spread = scale(lessened, self.coordinates.apply_covariance(pull(solved), point))
            return jax.tree.map(jnp.subtract, spread, steepest), passes + 2

        return propose

    def _cholesky(self, s_product: Callable[[Array], Array]) -> _Solve:
        batch, width = self.coordinates.target.shape
        identity = jnp.eye(width, dtype=self.coordinates.target.dtype)
        columns = jax.vmap(
            lambda row: s_product(jnp.broadcast_to(row, (batch, width))), out_axes=-1
        )(identity)
        factors = jax.vmap(lambda s: jsl.cho_factor(s, lower=True)[0])(columns)
        solve = jax.vmap(lambda factor, rhs: jsl.cho_solve((factor, True), rhs))
        return lambda covector: (solve(factors, covector), 0)

    def _conjugate_gradients(self, s_product: Callable[[Array], Array]) -> _Solve:
        def solve(covector: Array) -> tuple[Array, Scalar]:
            (solved,), products = conjugate_gradients(
                lambda v: (s_product(v[0]),), (covector,), self.cg_tolerance
            )
            return solved, 2 * products

        return solve


class ActivityModel(DescentModel):
    """Any clamps: activities as coordinates, solved by block Cholesky."""

    problem: InferenceProblem

    @property
    def evaluation_passes(self) -> int:
        return 2

    @property
    def matrix_passes(self) -> int:
        # A Jacobian takes as many passes through its layer as it has rows or columns.
        widths, graph = self.problem.widths, self.problem.graph
        each = zip(graph.targets, graph.sources, strict=True)
        return 1 + max(min(widths[t], sum(widths[i] for i in given)) for t, given in each)

    def evaluate(self, point: State) -> PointEvaluation:
        slope = self.problem.gradient(point)
        return PointEvaluation(self.problem.free_energy(point), slope, largest_norm(slope))

    def round_off(self, point: State) -> Array:
        return energy_round_off(self.problem, point)

    def activities(self, point: State) -> State:
        return point

    def take(self, samples: Array) -> ActivityModel:
        return dataclasses.replace(self, problem=self.problem.sample(samples))

    def factorise(self, point: State, damping: Array) -> Propose:
        def factor(one: InferenceProblem, state: State, damping: Array) -> BlockFactor:
            weights = curvatures(one, state)
            jacobians = prediction_jacobians(one, state)
            if one.is_chain:
                slopes = {l: row[l - 1] for l, row in enumerate(jacobians, start=1) if row}
                matrix = gauss_newton_hessian(one, weights, slopes)
            else:
                matrix = weighted_squares(one, error_rows(one, jacobians), weights)
            return matrix.plus_diagonal(damping * matrix.largest_diagonal).cholesky()

        factors = self.problem.map_samples(factor, point, damping)

        def propose(slope: State) -> tuple[State, Scalar]:
            solved = jax.vmap(lambda factor, rhs: factor.solve(rhs))(factors, slope)
            return jax.tree.map(jnp.negative, solved), 0

        return propose


def has_curvature(problem: InferenceProblem, *, of_output: bool = True) -> bool:
    """Return whether the curvature of every energy is known, or of the hidden ones."""
    return _without_curvature(problem, of_output=of_output) is None


def check_curvature(name: str, problem: InferenceProblem, *, of_output: bool = True) -> None:
    """Raise `InputError` unless the curvatures of all energies are known, or of the hidden ones."""
    index = _without_curvature(problem, of_output=of_output)
    if index is not None:
        raise InputError(
            f"{name} needs the curvature of each energy, but that of {problem.target_name(index)}, "
            f"{type(problem.energy_of(index)).__name__}, has none: write its method "
            '`curvature`, or use the method "pseudo_transient", which needs none'
        )


def check_error_coordinates(name: str, problem: InferenceProblem) -> None:
    """Raise `InputError` unless both ends are clamped and hidden curvatures are known.

    A prior on the input serves as a clamp. Of a graph, `GraphError` unless each free node is
    predicted once, from what does not depend on it.
    """
    known = has_error_coordinates(problem.with_prior_as_layer())
    if not known and not problem.is_chain:
        raise GraphError(
            f"{name} needs a graph in which each node that is free is so as a whole and is "
            "predicted once, from what does not depend on it, and which predicts something that is "
            'clamped: use another method, such as "gauss_newton", or leave it out'
        )
    check_curvature(name, problem, of_output=False)
    if not known:
        raise InputError(
            f"{name} needs both ends clamped, or a prior on a free input: only then do the errors "
            "determine the activities and the output error"
        )


def _without_curvature(problem: InferenceProblem, *, of_output: bool) -> int | None:
    """The first predicted layer with an energy of unknown curvature; `None` if there is none."""
    known = set()
    free = problem.free_layers
    for index in problem.predicted_layers:
        if not of_output and problem.target_node(index) not in free:
            continue
        energy, width = problem.energy_of(index), problem.widths[problem.target_node(index)]
        if energy.quadratic_form is not None:
            continue
        target = problem.target_of(index)
        kind = (jax.tree.structure(energy), width, target is None)
        if kind in known:
            continue
        # Of one sample.
        error = jnp.zeros(width, problem.dtype)
        target = None if target is None else jnp.atleast_2d(target)[0]
        found = eqx.filter_eval_shape(energy.curvature, error, target)
        if found is None:
            return index
        if not isinstance(found, Precision):
            raise InputError(
                f"the curvature of {type(energy).__name__} must be a pcdyn.energies.Precision, "
                f"got a {type(found).__name__}"
            )
        known.add(kind)
    return None


def curvatures(problem: InferenceProblem, state: State) -> tuple[PyTree, ...]:
    """Return the precisions that stand for the energies at a state of one sample.

    Each is a `Precision`, or `None` where the curvature is not known.
    """
    errors = problem.prediction_errors(problem.activities(state))
    return tuple(problem.curvature(index, error) for index, error in enumerate(errors, start=1))
