"""The free energy of a linear network as a sum of squares, F = ½ ‖A y − c‖², and its factors.

The rows of A are the whitened prediction errors `Π_l^{½} (x_l − W_l x_{l−1})`, so that `H = AᵀA`.
With precisions of a ratio r, H spans r and A only √r: what is computed from A keeps twice as many
digits, and where the ratio exceeds what a dtype can hold in one matrix H is no longer positive
definite while A is still of full rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pcdyn._support.compiling import compiled
from pcdyn._support.types import State
from pcdyn.errors import InputError, NotLinearError
from pcdyn.linearisation.block_sparse import BlockFactor, Row, factor_of_squares
from pcdyn.linearisation.block_tridiagonal import BlockCholesky
from pcdyn.linearisation.coupling import by_source, coupled_pairs, error_rows
from pcdyn.model.activations import identity
from pcdyn.model.clamps import PartlyClamped
from pcdyn.model.energies.precision import Precision
from pcdyn.model.graph import Constant, Graph
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem, check_problem


def is_linear(network: Network | Graph) -> bool:
    """Whether every layer is a `Dense` with the identity activation, or constant."""
    return all(
        isinstance(layer, Constant) or (isinstance(layer, Dense) and layer.activation == identity)
        for layer in network.layers
    )


def has_linear_flow(problem: InferenceProblem) -> bool:
    """Whether the network is linear and every energy quadratic, so that there are closed forms."""
    energies = map(problem.energy_of, problem.predicted_layers)
    quadratic = all(energy.quadratic_form is not None for energy in energies)
    return quadratic and is_linear(problem.graph)


def precisions_of(
    problem: InferenceProblem, needed_by: str, *, error: type[InputError] = InputError
) -> tuple[Precision, ...]:
    """Π_l of the predicted layers if all energies are ½ εᵀ Π ε; raises `error` for others."""
    found = []
    for index in problem.predicted_layers:
        energy = problem.energy_of(index)
        precision = energy.quadratic_form
        if precision is None:
            raise error(
                f"{needed_by} quadratic energies such as pcdyn.Gaussian, but that of "
                f"{problem.target_name(index)} is {type(energy).__name__}, which has no "
                "`quadratic_form`"
            )
        found.append(precision)
    return tuple(found)


def linear_parts(problem: InferenceProblem) -> tuple[tuple[Any, ...], tuple[Precision, ...]]:
    """The layers and the precisions of a linear network; raises `NotLinearError` for others.

    They are those of `problem.with_prior_as_layer()`.
    """
    check_problem(problem)
    for index, layer in enumerate(problem.graph.layers, start=1):
        name = problem.target_name(index)
        if not problem.is_chain:
            name = f"the prediction of {name}"
        if not isinstance(layer, Dense | Constant):
            raise NotLinearError(
                f"{name} is a {type(layer).__name__}; closed forms need pcdyn.Dense layers"
            )
        if isinstance(layer, Dense) and layer.activation != identity:
            raise NotLinearError(
                f"{name} has the activation {layer.activation.name!r}; closed forms exist "
                'for "identity" only: integrate the flow with pcdyn.simulate instead'
            )
    precisions = precisions_of(problem, "closed forms need", error=NotLinearError)
    return problem.with_prior_as_layer().graph.layers, precisions


def linear_rows(problem: InferenceProblem) -> list[Row]:
    """∂ε_k/∂x of the predictions of a linear graph: `error_rows`."""
    layers, _ = linear_parts(problem)
    free = problem.free_layers
    jacobians = [
        {node: block for node, block in by_source(problem, k, layer.matrix).items() if node in free}
        if isinstance(layer, Dense)
        else {}
        for k, layer in enumerate(layers, start=1)
    ]
    return error_rows(problem, jacobians)


def node_that_differs(problem: InferenceProblem) -> int | None:
    """The first node of which samples of a batch have other free units than each other."""
    for node, value in enumerate(problem.clamp):
        if isinstance(value, PartlyClamped) and value.free.ndim == 2 and not value.shared:
            return node
    return None


def check_same_units(problem: InferenceProblem, what: str) -> None:
    """Raise `InputError` unless the samples of a batch have the same free units."""
    node = node_that_differs(problem)
    if node is not None:
        raise InputError(
            f"{what} is the same for all samples, but the free units of {problem.node_name(node)} "
            "differ from sample to sample: take one, problem.sample(0), or map over them"
        )


@compiled
def error_blocks(problem: InferenceProblem) -> list[dict[int, Array]]:
    """The blocks of A: for each row l = 1 … L, those of the free layers among l − 1 and l."""
    layers, precisions = linear_parts(problem)
    problem = problem.with_prior_as_layer()
    rows = []
    for index, (layer, precision) in enumerate(zip(layers, precisions, strict=True), start=1):
        row = {}
        if index - 1 in problem.free_layers:
            row[index - 1] = -precision.whiten(layer.matrix.T).T
        if index in problem.free_layers:
            one = jnp.eye(problem.network.widths[index], dtype=problem.network.dtype)
            row[index] = precision.whiten(one).T
        rows.append(row)
    return rows


@compiled
def error_matrix(problem: InferenceProblem) -> Float[Array, "M N"]:
    """A as one matrix: all predicted units by all free ones."""
    if not problem.is_chain:
        return _graph_matrix(problem)
    problem = problem.with_prior_as_layer()
    widths, dtype = problem.network.widths, problem.network.dtype
    return jnp.concatenate(
        [
            jnp.concatenate(
                [
                    row.get(free, jnp.zeros((widths[index], widths[free]), dtype))
                    for free in problem.free_layers
                ],
                axis=1,
            )
            for index, row in enumerate(error_blocks(problem), start=1)
        ]
    )


def _white_rows(problem: InferenceProblem) -> list[Row]:
    """The blocks of A of a graph, with ones where a sample has no unit."""
    check_same_units(problem, "the Hessian")
    _, precisions = linear_parts(problem)
    rows = [
        {place: precision.whiten(block.T).T for place, block in row.items()}
        for row, precision in zip(linear_rows(problem), precisions, strict=True)
    ]
    for place, node in enumerate(problem.free_layers):
        value = problem.clamp[node]
        if isinstance(value, PartlyClamped) and value.padded:
            rows.append({place: jnp.diag(value.missing())})
    return rows


def _graph_matrix(problem: InferenceProblem) -> Float[Array, "M N"]:
    sizes, dtype = problem.free_widths, problem.dtype
    rows = []
    for row in _white_rows(problem):
        if row:
            height = len(next(iter(row.values())))
            each = [row.get(i, jnp.zeros((height, n), dtype)) for i, n in enumerate(sizes)]
            rows.append(jnp.concatenate(each, axis=1))
    return jnp.concatenate(rows)


def error_solver(problem: InferenceProblem) -> Callable[[State], State]:
    """What solves H x = rhs for the state of a batch, by `error_factor`."""
    if node_that_differs(problem) is None:
        return error_factor(problem)[0].solve

    def solve(one: InferenceProblem, rhs: State) -> State:
        return error_factor(one)[0].solve(rhs)

    return lambda rhs: problem.map_samples(solve, rhs)


@compiled
def error_factor(
    problem: InferenceProblem,
) -> tuple[BlockFactor, Float[Array, ""]]:
    """The block Cholesky factor of H by QR factorisations of A, and its smallest scaled pivot.

    A pivot is scaled by the norm of its column of A: it is the sine of the angle between the
    column and those before it. O(Σ n³), layer after layer; of a graph front after front.
    """
    if not problem.is_chain:
        rows = _white_rows(problem)
        return factor_of_squares(rows, coupled_pairs(problem), problem.free_widths)
    problem = problem.with_prior_as_layer()
    widths, depth = problem.network.widths, problem.network.depth
    blocks = error_blocks(problem)
    factors, couplings, pivots = [], [], []
    carry = blocks[0][1] if problem.input is not None else None
    for index in problem.free_layers:
        width = widths[index]
        known = jnp.zeros((0, width), problem.network.dtype) if carry is None else carry
        norm = jnp.sum(known**2, axis=0)
        above = 0
        if index < depth:
            row = blocks[index]
            above = widths[index + 1] if index + 1 in problem.free_layers else 0
            up = row[index]
            norm = norm + jnp.sum(up**2, axis=0)
            known = jnp.pad(known, ((0, 0), (0, above)))
            up = jnp.concatenate([up, row[index + 1]], axis=1) if above else up
            known = jnp.concatenate([known, up])
        # As many rows as columns, also where too few errors bear on a layer.
        missing = max(0, width + above - len(known))
        known = jnp.pad(known, ((0, missing), (0, 0)))
        # Householder's reflections keep the digits of small rows only below large ones.
        order = jnp.argsort(-jnp.max(jnp.abs(known), axis=1))
        factor = jnp.linalg.qr(known[order], mode="r")
        factors.append(factor[:width, :width].T)
        if above:
            couplings.append(factor[:width, width:])
        carry = factor[width:, width:]
        size = jnp.sqrt(norm)
        pivots.append(jnp.abs(jnp.diagonal(factors[-1])) / jnp.where(size > 0, size, 1))
    return BlockCholesky(tuple(factors), tuple(couplings)), jnp.min(jnp.concatenate(pivots))


def has_errors_of_their_own(problem: InferenceProblem) -> bool:
    """Whether each free layer is predicted, and none from what depends on it."""
    if problem.is_chain:
        return problem.input is not None
    graph = problem.graph
    assert isinstance(graph, Graph), "there are chains and graphs"
    return graph.has_order(problem.free_layers)


def root_rates(problem: InferenceProblem) -> Float[Array, " N"]:
    """τ^{-½} of each free unit."""
    each = zip(problem.free_widths, problem.state_time_constants, strict=True)
    return jnp.concatenate([jnp.full(width, tau**-0.5) for width, tau in each])
