"""Block-sparse matrices against NumPy's dense ones, over random graphs, trees and chains."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn.linearisation.block_sparse import BlockSparse, factor_of_squares, fronts_of, operations

Pairs = tuple[tuple[int, int], ...]


def graph(seed: int) -> tuple[tuple[int, ...], Pairs]:
    """Sizes of up to 24 nodes, and which of them are coupled: from none to most."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 25))
    sizes = tuple(int(n) for n in rng.integers(1, 4, count))
    share = rng.choice([0.1, 0.2, 0.6])
    coupled = [p for p in itertools.combinations(range(count), 2) if rng.uniform() < share]
    return sizes, (*[(i, i) for i in range(count)], *coupled)


def matrix(seed: int, sizes: tuple[int, ...], pairs: Pairs) -> BlockSparse:
    """Positive definite: the sum of a square for each pair, and the identity."""
    rng = np.random.default_rng([seed, 1])
    blocks = {pair: np.zeros((sizes[pair[0]], sizes[pair[1]])) for pair in pairs}
    for i, j in pairs:
        a, b = (rng.normal(size=(2, sizes[k])) for k in (i, j))
        blocks[i, i] += a.T @ a + np.eye(sizes[i])
        if i != j:
            blocks[j, j] += b.T @ b
            blocks[i, j] += a.T @ b
    return BlockSparse(tuple(map(jnp.asarray, blocks.values())), tuple(blocks), sizes)


def split(vector: np.ndarray, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x) for x in np.split(vector, np.cumsum(sizes)[:-1], axis=-1))


def joined(parts: tuple[jax.Array, ...]) -> np.ndarray:
    return np.concatenate([np.asarray(x) for x in parts], axis=-1)


@pytest.mark.parametrize(
    "seed", [*range(5), *[pytest.param(i, marks=pytest.mark.slow) for i in range(5, 20)]]
)
def test_everything_is_as_of_the_dense_matrix(seed: int) -> None:
    sizes, pairs = graph(seed)
    sparse = matrix(seed, sizes, pairs)
    dense = np.zeros((sum(sizes), sum(sizes)))
    ends = np.cumsum(sizes)
    for (i, j), block in zip(sparse.pairs, sparse.blocks, strict=True):
        rows, columns = (slice(ends[k] - sizes[k], ends[k]) for k in (i, j))
        dense[rows, columns], dense[columns, rows] = block, block.T
    # Condition numbers of up to some tens.
    close: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_array_equal(sparse.dense(), dense)
    vectors = np.random.default_rng(seed).normal(size=(3, sum(sizes)))
    np.testing.assert_allclose(joined(sparse.times(split(vectors[0], sizes))), dense @ vectors[0],
                               **close)  # fmt: skip
    np.testing.assert_array_equal(sparse.plus_diagonal(2.0).dense(), dense + 2 * np.eye(len(dense)))
    factor = sparse.cholesky()
    np.testing.assert_allclose(
        joined(factor.solve(split(vectors, sizes))), np.linalg.solve(dense, vectors.T).T, **close
    )
    np.testing.assert_allclose(factor.log_determinant, np.linalg.slogdet(dense)[1], **close)
    inverse = np.linalg.inv(dense)
    for block, end, size in zip(factor.inverse_diagonal(), ends, sizes, strict=True):
        rows = slice(end - size, end)
        np.testing.assert_allclose(block, inverse[rows, rows], **close)
    # L⁻ᵀ L⁻¹ is the inverse, and Lᵀ undoes L⁻ᵀ.
    unit = np.eye(len(dense))
    spread = joined(factor.solve_transposed(split(unit, sizes)))
    np.testing.assert_allclose(spread.T @ spread, inverse, **close)
    np.testing.assert_allclose(joined(factor.times_transposed(split(spread, sizes))), unit, **close)


@pytest.mark.parametrize(
    "seed", [0, 3, *[pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 4, 5, 6, 7)]]
)
def test_the_factor_of_squares(seed: int) -> None:
    sizes, pairs = graph(seed)
    draw, ends = np.random.default_rng([seed, 2]), np.cumsum(sizes)
    rows: list[dict[int, jax.Array]] = []
    whole = []
    for i, j in pairs:
        # Those of one node alone have full rank.
        height = sizes[i] + 1 if i == j else 2
        row = {k: draw.normal(size=(height, sizes[k])) for k in dict.fromkeys((i, j))}
        rows.append({k: jnp.asarray(block) for k, block in row.items()})
        whole.append(np.zeros((height, sum(sizes))))
        for k, block in row.items():
            whole[-1][:, ends[k] - sizes[k] : ends[k]] = block
    matrix = np.concatenate(whole)
    factor, pivot = factor_of_squares(rows, pairs, sizes)
    vectors = np.random.default_rng(seed).normal(size=(3, sum(sizes)))
    wanted = np.linalg.solve(matrix.T @ matrix, vectors.T).T
    condition = np.linalg.cond(matrix) ** 2
    np.testing.assert_allclose(
        joined(factor.solve(split(vectors, sizes))), wanted,
        atol=1e-14 * condition * np.max(np.abs(wanted)),
    )  # fmt: skip
    assert 0 < pivot <= 1
    # Without the rows of its own, and of others, the first node is not determined.
    bare = [row for row in rows if 0 not in row]
    if bare:
        assert factor_of_squares([*bare, {0: 0 * rows[0][0]}], pairs, sizes)[1] == 0


def test_what_is_not_positive_definite_is_nan() -> None:
    sparse = BlockSparse((-jnp.eye(2), jnp.eye(1), jnp.ones((2, 1))), ((0, 0), (1, 1), (0, 1)),
                         (2, 1))  # fmt: skip
    assert np.isnan(joined(sparse.cholesky().solve((jnp.ones(2), jnp.ones(1))))).all()


def test_every_node_is_eliminated_once_and_chains_and_trees_fill_nothing() -> None:
    for seed in range(200):
        sizes, pairs = graph(seed)
        fronts = fronts_of(sizes, pairs)
        assert sorted(n for front in fronts for n in front.pivots) == list(range(len(sizes)))
    rng = np.random.default_rng(0)
    for parents in ([i - 1 for i in range(1, 200)], [int(rng.integers(i)) for i in range(1, 200)]):
        edges = tuple((parent, i) for i, parent in enumerate(parents, start=1))
        for front in fronts_of((16,) * 200, edges):
            # Or the last few, which are nearly dense.
            assert len(front.boundary) <= 1
            assert len(front.pivots) <= 4
    # 400 blocks of n³ and less, and not (200 n)³.
    assert operations((16,) * 200, edges) < 10 * 200 * 16**3
