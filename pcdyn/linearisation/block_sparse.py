"""Symmetric matrices of blocks of which most are zero: one block row per free node of a graph.

They are factorised front by front (Duff & Reid 1983): a front eliminates some nodes and leaves a
dense update of their neighbours to the front above. Which nodes, and in which order, is decided on
the host, once per structure: those of least degree first, until what remains is nearly dense, which
is the last front.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import equinox as eqx
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.compiling import compiled
from pcdyn._support.products import matmul
from pcdyn._support.types import Scalar, State

_Pair = tuple[int, int]
# The share of its blocks that are not zero above which what remains is factorised as dense.
_DENSE = 0.6


@dataclasses.dataclass(frozen=True)
class Front:
    """Nodes that are eliminated together, and their neighbours among those that are not yet."""

    pivots: tuple[int, ...]
    boundary: tuple[int, ...]

    @property
    def nodes(self) -> tuple[int, ...]:
        """All of them, pivots first."""
        return self.pivots + self.boundary


@functools.lru_cache(maxsize=256)
def fronts_of(sizes: tuple[int, ...], pairs: tuple[_Pair, ...]) -> tuple[Front, ...]:
    """Choose what to eliminate in turn, for nodes of these sizes of which `pairs` are coupled."""
    neighbours: dict[int, set[int]] = {node: set() for node in range(len(sizes))}
    for one, other in pairs:
        if one != other:
            neighbours[one].add(other)
            neighbours[other].add(one)
    fronts: list[Front] = []
    while neighbours:
        if _is_dense(neighbours, sizes):
            fronts.append(Front(tuple(neighbours), ()))
            break
        node = min(neighbours, key=lambda n: (sum(sizes[m] for m in neighbours[n]), n))
        around = neighbours.pop(node)
        for one in around:
            neighbours[one] |= around - {one}
            neighbours[one].discard(node)
        last = fronts[-1] if fronts else None
        if last and set(last.boundary) == {node, *around}:
            # The front before it has the same neighbours: one larger front does for both.
            fronts[-1] = Front((*last.pivots, node), tuple(sorted(around)))
        else:
            fronts.append(Front((node,), tuple(sorted(around))))
    return tuple(fronts)


def _is_dense(neighbours: dict[int, set[int]], sizes: tuple[int, ...]) -> bool:
    whole = sum(sizes[node] for node in neighbours) ** 2
    filled = sum(sizes[n] * (sizes[n] + sum(sizes[m] for m in ms)) for n, ms in neighbours.items())
    return filled >= _DENSE * whole


def operations(sizes: tuple[int, ...], pairs: tuple[_Pair, ...]) -> float:
    """Count the multiplications of a factorisation, in units of n³/3 of a dense one of n units."""
    count = 0.0
    for front in fronts_of(sizes, pairs):
        pivots, boundary = (
            sum(sizes[node] for node in nodes) for nodes in (front.pivots, front.boundary)
        )
        count += pivots**3 + 3 * pivots**2 * boundary + 3 * pivots * boundary**2
    return count


class BlockSparse(eqx.Module):
    """A symmetric matrix with `blocks[k]` of shape `(n_i, n_j)` at `pairs[k]` = (i, j), i ≤ j.

    Every diagonal block is among them. Blocks may have a leading axis of samples, over which to map
    the methods.
    """

    blocks: tuple[Float[Array, "*batch _ _"], ...]
    pairs: tuple[_Pair, ...] = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)

    @compiled
    def dense(self) -> Float[Array, "N N"]:
        """The whole matrix, N = Σ n_i."""
        everything = tuple(range(len(self.sizes)))
        return self._assembled(everything, everything)

    @compiled
    def times(self, vector: State) -> State:
        """The product with a vector, one part `(n_i,)` for each block row."""
        products = [jnp.zeros_like(x) for x in vector]
        for (i, j), block in zip(self.pairs, self.blocks, strict=True):
            products[i] = products[i] + matmul(block, vector[j])
            if i != j:
                products[j] = products[j] + matmul(block.T, vector[i])
        return tuple(products)

    def plus_diagonal(self, amount: Scalar) -> BlockSparse:
        """The matrix plus `amount` times the identity."""
        blocks = tuple(
            block + amount * jnp.eye(len(block), dtype=block.dtype) if i == j else block
            for (i, j), block in zip(self.pairs, self.blocks, strict=True)
        )
        return BlockSparse(blocks, self.pairs, self.sizes)

    @compiled
    def cholesky(self) -> FrontalCholesky:
        """The Cholesky factorisation by fronts; NaN if the matrix is not positive definite."""
        fronts = fronts_of(self.sizes, self.pairs)
        waiting: list[tuple[tuple[int, ...], Array]] = []
        factors, couplings = [], []
        for front in fronts:
            matrix = self._assembled(front.nodes, front.pivots)
            count = sum(self.sizes[node] for node in front.pivots)
            rest = []
            for nodes, update in waiting:
                if set(nodes) & set(front.pivots):
                    matrix = _added(matrix, update, nodes, front.nodes, self.sizes)
                else:
                    rest.append((nodes, update))
            factor = jnp.linalg.cholesky(matrix[:count, :count])
            coupling = jsl.solve_triangular(factor, matrix[:count, count:], lower=True)
            factors.append(factor)
            couplings.append(coupling)
            update = matrix[count:, count:] - matmul(coupling.T, coupling)
            waiting = [*rest, (front.boundary, update)] if front.boundary else rest
        return FrontalCholesky(tuple(factors), tuple(couplings), fronts, self.sizes)

    def _assembled(self, nodes: tuple[int, ...], pivots: tuple[int, ...]) -> Float[Array, "_ _"]:
        """The matrix of some nodes, but for the blocks that touch none of the pivots."""
        where = _slices(nodes, self.sizes)
        total = sum(self.sizes[node] for node in nodes)
        found = jnp.zeros((total, total), self.blocks[0].dtype)
        for (i, j), block in zip(self.pairs, self.blocks, strict=True):
            if i in where and j in where and (i in pivots or j in pivots):
                found = found.at[where[i], where[j]].set(block)
                if i != j:
                    found = found.at[where[j], where[i]].set(block.T)
        return found


class FrontalCholesky(eqx.Module):
    """L of H = L Lᵀ, of one front after the other: a lower factor and what is right of it in Lᵀ."""

    factors: tuple[Float[Array, "_ _"], ...]
    couplings: tuple[Float[Array, "_ _"], ...]
    fronts: tuple[Front, ...] = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)

    @compiled
    def solve(self, rhs: State) -> State:
        """H⁻¹ rhs for `rhs[i]` of shape `(n_i,)`, or `(…, n_i)` with the same axes before it."""
        left = [_columns(x) for x in rhs]
        for front, factor, coupling in zip(self.fronts, self.factors, self.couplings, strict=True):
            found = jsl.solve_triangular(factor, _gathered(left, front.pivots), lower=True)
            change = matmul(coupling.T, found)
            for node, rows in _slices(front.pivots, self.sizes).items():
                left[node] = found[rows]
            for node, rows in _slices(front.boundary, self.sizes).items():
                left[node] = left[node] - change[rows]
        return self._back_substitute(left, rhs)

    @compiled
    def solve_transposed(self, rhs: State) -> State:
        """L⁻ᵀ rhs, shaped as for `solve`: of white noise it makes noise of covariance H⁻¹."""
        return self._back_substitute([_columns(x) for x in rhs], rhs)

    @compiled
    def times_transposed(self, vector: State) -> State:
        """Lᵀ vector, shaped as for `solve`: the squares of its entries sum up to vᵀ H v."""
        columns, products = [_columns(x) for x in vector], list(vector)
        for front, factor, coupling in zip(self.fronts, self.factors, self.couplings, strict=True):
            found = matmul(factor.T, _gathered(columns, front.pivots))
            if front.boundary:
                found = found + matmul(coupling, _gathered(columns, front.boundary))
            for node, rows in _slices(front.pivots, self.sizes).items():
                products[node] = found[rows].T.reshape(vector[node].shape)
        return tuple(products)

    @property
    def log_determinant(self) -> Array:
        """log det H."""
        diagonals = [jnp.diagonal(factor) for factor in self.factors]
        return 2 * jnp.sum(jnp.log(jnp.abs(jnp.concatenate(diagonals))))

    @compiled
    def inverse_diagonal(self) -> tuple[Float[Array, "_ _"], ...]:
        """The diagonal blocks of H⁻¹, from the last front to the first (Takahashi et al. 1973).

        `S_pp = F⁻ᵀ F⁻¹ + G S_bb Gᵀ` and `S_pb = −G S_bb` with the factor F of the pivots p and
        `G = F⁻ᵀ` times their coupling to the boundary b, all of which the front above knows.
        """
        known: dict[_Pair, Array] = {}
        each = list(zip(self.fronts, self.factors, self.couplings, strict=True))
        for front, factor, coupling in reversed(each):
            inverse = jsl.solve_triangular(
                factor, jnp.eye(len(factor), dtype=factor.dtype), lower=True
            )
            block = matmul(inverse.T, inverse)
            pivots = _slices(front.pivots, self.sizes)
            if front.boundary:
                boundary = _slices(front.boundary, self.sizes)
                gain = matmul(inverse.T, coupling)
                around = jnp.block([[known[i, j] for j in boundary] for i in boundary])
                across = -matmul(gain, around)
                block = block - matmul(across, gain.T)
                for (i, rows), (j, columns) in itertools.product(pivots.items(), boundary.items()):
                    known[i, j] = across[rows, columns]
                    known[j, i] = known[i, j].T
            # Round-off leaves the product of three matrices a little asymmetric.
            block = (block + block.T) / 2
            for (i, rows), (j, columns) in itertools.product(pivots.items(), repeat=2):
                known[i, j] = block[rows, columns]
        return tuple(known[node, node] for node in range(len(self.sizes)))

    def _back_substitute(self, left: list[Array], like: State) -> State:
        """L⁻ᵀ of columns, as rows shaped like a state."""
        solved = list(left)
        each = list(zip(self.fronts, self.factors, self.couplings, strict=True))
        for front, factor, coupling in reversed(each):
            columns = _gathered(solved, front.pivots)
            if front.boundary:
                columns = columns - matmul(coupling, _gathered(solved, front.boundary))
            found = jsl.solve_triangular(factor, columns, lower=True, trans="T")
            for node, rows in _slices(front.pivots, self.sizes).items():
                solved[node] = found[rows]
        return tuple(x.T.reshape(r.shape) for x, r in zip(solved, like, strict=True))


def _slices(nodes: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, slice]:
    """Where each node stands in a matrix of these."""
    ends = itertools.accumulate(sizes[node] for node in nodes)
    return {node: slice(end - sizes[node], end) for node, end in zip(nodes, ends, strict=True)}


def _added(
    matrix: Array,
    update: Array,
    nodes: tuple[int, ...],
    into: tuple[int, ...],
    sizes: tuple[int, ...],
) -> Array:
    """A front's matrix with the update of another, whose nodes are among its own."""
    there = _slices(into, sizes)
    index = np.concatenate([np.arange(there[node].start, there[node].stop) for node in nodes])
    return matrix.at[np.ix_(index, index)].add(update)


def _gathered(parts: list[Array], nodes: tuple[int, ...]) -> Array:
    """The columns of some nodes, one below the other."""
    return jnp.concatenate([parts[node] for node in nodes])


def _columns(rows: Array) -> Array:
    """One column per sample."""
    return rows.reshape(-1, rows.shape[-1]).T
