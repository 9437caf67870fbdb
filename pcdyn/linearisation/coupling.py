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


def source_jacobians(problem: InferenceProblem, state: State) -> list[tuple[Array, ...]]:
    """∂f_k/∂x of each prediction of one sample by each node that it is given, `(n_k, n)`."""
    activities, widths, found = problem.activities(state), problem.widths, []
    for index, sources in enumerate(problem.graph.sources, start=1):
        given = tuple(activities[node] for node in sources)
        narrowing = widths[problem.target_node(index)] <= sum(widths[node] for node in sources)
        transform = jax.jacrev if narrowing else jax.jacfwd

        def predict(*given: Array, index: int = index) -> Array:
            return problem.graph.predict_from(index, given)

        slopes = transform(predict, argnums=tuple(range(len(given))))(*given) if given else ()
        found.append(slopes)
    return found


def error_rows(problem: InferenceProblem, jacobians: Sequence[Sequence[Array]]) -> list[Row]:
    """∂ε_k/∂x of each prediction by each array of the state that it depends on."""
    free, rows = problem.free_layers, []
    for index, (sources, slopes) in enumerate(
        zip(problem.graph.sources, jacobians, strict=True), start=1
    ):
        target = problem.target_node(index)
        parts = [(node, -slope) for node, slope in zip(sources, slopes, strict=True)]
        parts.append((target, jnp.eye(problem.widths[target], dtype=problem.dtype)))
        row: Row = {}
        for node, block in parts:
            if node in free:
                value, place = problem.clamp[node], free.index(node)
                block = value.columns(block) if isinstance(value, PartlyClamped) else block
                row[place] = row[place] + block if place in row else block
        rows.append(row)
    return rows


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
