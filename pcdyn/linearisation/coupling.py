"""Which free nodes of a graph meet in a prediction error, and matrices with a block for each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.products import matmul
from pcdyn._support.types import State
from pcdyn.linearisation.block_sparse import BlockSparse, Row
from pcdyn.model.clamps import PartlyClamped
from pcdyn.model.energies.precision import Precision
from pcdyn.model.problem import InferenceProblem


def nodes_of(problem: InferenceProblem, index: int) -> tuple[int, ...]:
    """The nodes that prediction k = `index` is of and from, each once."""
    return tuple(dict.fromkeys((*problem.graph.sources[index - 1], problem.target_node(index))))


def coupled_pairs(problem: InferenceProblem) -> tuple[tuple[int, int], ...]:
    """Pairs i ≤ j of the arrays of a state that meet in a prediction error, diagonal first."""
    free = problem.free_layers
    pairs = {(i, i) for i in range(len(free))}
    for index in problem.predicted_layers:
        places = sorted(free.index(node) for node in nodes_of(problem, index) if node in free)
        pairs |= set(itertools.combinations(places, 2))
    return tuple(sorted(pairs, key=lambda pair: (pair[0] != pair[1], pair)))


def block_sparse(problem: InferenceProblem, blocks: Mapping[tuple[int, int], Array]) -> BlockSparse:
    """The matrix of blocks of one sample, with ones where it has no unit."""
    filled = dict(blocks)
    for place, node in enumerate(problem.free_layers):
        value = problem.clamp[node]
        if isinstance(value, PartlyClamped) and value.padded:
            filled[place, place] = filled[place, place] + jnp.diag(value.missing())
    return BlockSparse(tuple(filled.values()), tuple(filled), problem.free_widths)


def prediction_jacobians(problem: InferenceProblem, state: State) -> list[dict[int, Array]]:
    """∂f_k/∂x of each prediction of one sample by each free node that it is given, `(n_k, n)`."""
    activities, widths, found = problem.activities(state), problem.widths, []
    for index, sources in enumerate(problem.graph.sources, start=1):
        given = [activities[node] for node in sources]
        free = [place for place, node in enumerate(sources) if node in problem.free_layers]
        narrowing = widths[problem.target_node(index)] <= sum(widths[sources[i]] for i in free)
        transform = jax.jacrev if narrowing else jax.jacfwd

        def predict(*given: Array, index: int = index) -> Array:
            return problem.graph.predict_from(index, given)

        slopes = transform(predict, argnums=tuple(free))(*given) if free else ()
        found.append({sources[i]: slope for i, slope in zip(free, slopes, strict=True)})
    return found


def error_rows(problem: InferenceProblem, jacobians: Sequence[Mapping[int, Array]]) -> list[Row]:
    """∂ε_k/∂x of each prediction by each array of the state, from `prediction_jacobians`."""
    free, rows = problem.free_layers, []
    for index, slopes in enumerate(jacobians, start=1):
        target = problem.target_node(index)
        row: Row = {
            free.index(node): -free_columns(problem, node, slope) for node, slope in slopes.items()
        }
        if target in free:
            place = free.index(target)
            own = jnp.eye(problem.widths[target], dtype=problem.dtype)
            own = free_columns(problem, target, own)
            row[place] = row[place] + own if place in row else own
        rows.append(row)
    return rows


def by_source(problem: InferenceProblem, index: int, matrix: Array) -> dict[int, Array]:
    """The columns of a matrix of prediction k = `index` for each node that it is given."""
    sources = problem.graph.sources[index - 1]
    ends = list(itertools.accumulate(problem.widths[node] for node in sources))[:-1]
    return dict(zip(sources, jnp.split(matrix, ends, axis=1), strict=True))


def free_columns(problem: InferenceProblem, node: int, block: Array) -> Array:
    """Of a matrix with a column for each unit of a node those of its free units."""
    value = problem.clamp[node]
    return value.columns(block) if isinstance(value, PartlyClamped) else block


def weighted_squares(
    problem: InferenceProblem, rows: Sequence[Row], precisions: Sequence[Precision]
) -> BlockSparse:
    """Σ_k J_kᵀ Π_k J_k for `error_rows` J_k: the Hessian of F where predictions are linear."""
    sizes = problem.free_widths
    pairs = coupled_pairs(problem)
    blocks = {(i, j): jnp.zeros((sizes[i], sizes[j]), problem.dtype) for i, j in pairs}
    for row, precision in zip(rows, precisions, strict=True):
        weighted = {place: precision.weigh(block.T) for place, block in row.items()}
        for i, j in itertools.combinations_with_replacement(sorted(row), 2):
            blocks[i, j] = blocks[i, j] + matmul(weighted[i], row[j])
    return block_sparse(problem, blocks)
