"""The Hessian of the free energy of any network: block tridiagonal, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from pcdyn._support.derivative_rules import with_rule_in_loops
from pcdyn._support.states import scale
from pcdyn._support.types import State, Values
from pcdyn.linearisation.block_sparse import Blocks, BlockSparse
from pcdyn.linearisation.block_tridiagonal import BlockTridiagonal
from pcdyn.linearisation.coupling import block_sparse, coupled_pairs, nodes_of
from pcdyn.linearisation.whitened import error_solver, has_linear_flow
from pcdyn.model.problem import InferenceProblem


def free_energy_hessian(problem: InferenceProblem, state: State) -> Blocks:
    """∂²F/∂x² at a state of one sample, curvature of the predictions included.

    Layers that are not neighbours do not meet in any prediction error, so that it is block
    tridiagonal for any chain and energy; of a graph it has a block for each pair of free nodes that
    meet in one.
    """
    if not problem.is_chain:
        return _graph_hessian(problem, state)
    problem = problem.with_prior_as_layer(state)
    depth, activities = problem.network.depth, problem.activities(state)

    def pair_energy(index: int, below: Values, here: Values) -> Array:
        """E_l as a function of x_{l−1} and x_l."""
        error = here - problem.network.predict(index, below)
        return problem.layer_energy(index, error, here)

    def own_energy(index: int, here: Values) -> Array:
        """The energies in which x_l appears, as a function of it."""
        total = jnp.zeros((), problem.network.dtype)
        if index > 0:
            total = total + pair_energy(index, activities[index - 1], here)
        if index < depth:
            total = total + pair_energy(index + 1, here, activities[index + 1])
        return total

    diagonal, upper = [], []
    for index in problem.free_layers:
        here = activities[index]
        diagonal.append(jax.hessian(lambda x, i=index: own_energy(i, x))(here))
        if index + 1 in problem.free_layers:
            slope = jax.grad(lambda x, y, i=index: pair_energy(i + 1, x, y))
            upper.append(jax.jacfwd(slope, argnums=1)(here, activities[index + 1]))
    return BlockTridiagonal(tuple(diagonal), tuple(upper))


def _graph_hessian(problem: InferenceProblem, state: State) -> BlockSparse:
    """Prediction by prediction, from the free nodes that meet in each."""
    pairs, columns = coupled_pairs(problem), problem.free_layers
    blocks = {pair: jnp.zeros([state[i].shape[-1] for i in pair], problem.dtype) for pair in pairs}
    for index in problem.predicted_layers:
        meeting = tuple(columns.index(node) for node in nodes_of(problem, index) if node in columns)

        def energy(*parts: Array, index: int = index, meeting: tuple[int, ...] = meeting) -> Array:
            moved = list(state)
            for place, part in zip(meeting, parts, strict=True):
                moved[place] = part
            activities = problem.activities(tuple(moved))
            error = problem.prediction_error(index, activities)
            return problem.layer_energy(index, error, activities[problem.target_node(index)])

        curvature = jax.hessian(energy, argnums=tuple(range(len(meeting))))
        each = curvature(*(state[place] for place in meeting)) if meeting else ()
        for i, row in zip(meeting, each, strict=True):
            for j, block in zip(meeting, row, strict=True):
                if i <= j:
                    blocks[i, j] = blocks[i, j] + block
    return block_sparse(problem, blocks)


@eqx.filter_custom_jvp
def _with_derivatives(problem: InferenceProblem, state: State, certain: Values) -> State:
    """`state`, equilibria of a problem, with the derivatives of equilibria.

    `∂F/∂x(x*, θ) = 0` gives `dx*/dθ = −(∂²F/∂x²)⁻¹ ∂²F/∂x∂θ`, of any order. They are NaN for the
    samples that are not `certain`, one boolean for each, to be at an equilibrium.
    """
    return state


with_derivatives = with_rule_in_loops(_with_derivatives)


@_with_derivatives.def_jvp
def _implicit_jvp(
    primals: tuple[InferenceProblem, State, Values], tangents: tuple[PyTree, PyTree, PyTree]
) -> tuple[State, State]:
    problem, state, certain = primals
    # Of what the rule returns only this has derivatives: without it those of a second derivative
    # would take the equilibrium to be constant.
    state = with_derivatives(problem, state, certain)
    return state, _change_of_equilibrium(problem, tangents[0], state, certain)


# Compiled as one program also where nothing around it is.
@eqx.filter_jit
def _change_of_equilibrium(
    problem: InferenceProblem, tangent: PyTree, state: State, certain: Values
) -> State:
    _, change = eqx.filter_jvp(lambda p: p.gradient(state), (problem,), (tangent,))
    # Layers that do not depend on what moves have no tangent at all.
    change = tuple(
        jnp.zeros_like(x) if c is None else c for x, c in zip(state, change, strict=True)
    )
    known = jnp.where(certain, -1, jnp.nan).astype(state[0].dtype)
    return scale(known, solve_hessian(problem, state, change))


def solve_hessian(problem: InferenceProblem, state: State, rhs: State) -> State:
    """H⁻¹ rhs for each sample of a batch; NaN where H is not positive definite.

    It can be differentiated and transposed, as the implicit function theorem needs.
    """
    if has_linear_flow(problem):
        return _solve_linear(problem, state, rhs)

    def one(sample: InferenceProblem, state: State, rhs: State) -> State:
        matrix = free_energy_hessian(sample, state)
        return _symmetric_solve(matrix.times, matrix.cholesky().solve, rhs)

    return problem.map_samples(one, state, rhs)


def _solve_linear(problem: InferenceProblem, state: State, rhs: State) -> State:
    """With the one Hessian of a linear network's samples, by QR of its square root."""
    arrays, rest = eqx.partition(problem, eqx.is_array)
    # Only the product is differentiated: the solution follows from it.
    fixed = eqx.combine(jax.lax.stop_gradient(arrays), rest)
    return _symmetric_solve(jax.linearize(problem.gradient, state)[1], error_solver(fixed), rhs)


def _symmetric_solve(
    product: Callable[[State], State], solve: Callable[[State], State], rhs: State
) -> State:
    # As one vector: JAX cannot transpose a solve of which some parts are constant.
    vector, layers = ravel_pytree(rhs)
    solved = jax.lax.custom_linear_solve(
        lambda x: ravel_pytree(product(layers(x)))[0],
        vector,
        lambda _, b: ravel_pytree(solve(layers(b)))[0],
        symmetric=True,
    )
    return layers(solved)
