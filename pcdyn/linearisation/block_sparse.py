"""Symmetric matrices of blocks of which most are zero: one block row per free node of a graph.

They are factorised front by front (Duff & Reid 1983): a front eliminates some nodes and leaves a
dense update of their neighbours to the front above. Which nodes, and in which order, is decided on
the host, once per structure: those of least degree first, until what remains is nearly dense, which
is the last front. Fronts of one shape that do not wait for each other are computed together, so
that a program has few operations.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.compiling import compiled
from pcdyn._support.products import einsum, matmul
from pcdyn._support.types import Scalar, State
from pcdyn.linearisation.block_tridiagonal import BlockCholesky, BlockTridiagonal

_Pair = tuple[int, int]
# Blocks of a rectangular matrix with the same rows, by the column of blocks.
Row = dict[int, Array]
# Of places: JAX takes other integers for 64-bit ones in programs made while those were on.
_INTEGER = np.int32
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Fronts of one shape that are eliminated together, and where their numbers stand.

    `start` is that of the first of their matrices in the storage of all, one after the other.
    `rows` (fronts, pivots) and `around` (fronts, boundary) are units; `above` (fronts, boundary,
    boundary) are the places of the update in the storage.
    """

    start: int
    rows: np.ndarray
    around: np.ndarray
    above: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the stacked matrices."""
        units = self.rows.shape[1] + self.around.shape[1]
        return len(self.rows), units, units

    @property
    def stop(self) -> int:
        """Where the matrices end in the storage."""
        return self.start + math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What to compute in turn, and where the blocks of a matrix go in the storage."""

    groups: tuple[_Group, ...]
    blocks: tuple[np.ndarray, ...]
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tree:
    """Fronts by their numbers: the one that each node is eliminated `by`, the one above each.

    `together` are those of one shape that do not wait for each other, group after group.
    """

    fronts: tuple[Front, ...]
    by: dict[int, int]
    parents: list[int | None]
    together: list[list[int]]


@functools.lru_cache(maxsize=256)
def _tree(sizes: tuple[int, ...], pairs: tuple[_Pair, ...]) -> _Tree:
    fronts = fronts_of(sizes, pairs)
    by = {node: k for k, front in enumerate(fronts) for node in front.pivots}
    parents = [min((by[node] for node in f.boundary), default=None) for f in fronts]
    levels = [0] * len(fronts)
    for k, parent in enumerate(parents):
        if parent is not None:
            levels[parent] = max(levels[parent], levels[k] + 1)

    def kind(k: int) -> tuple[int, int, int]:
        front = fronts[k]
        width, height = (sum(sizes[n] for n in x) for x in (front.pivots, front.boundary))
        return levels[k], width, height

    groups = itertools.groupby(sorted(range(len(fronts)), key=kind), kind)
    return _Tree(fronts, by, parents, [list(group) for _, group in groups])


@functools.lru_cache(maxsize=256)
def _plan(sizes: tuple[int, ...], pairs: tuple[_Pair, ...]) -> _Plan:
    ends = np.cumsum(sizes)
    units = [np.arange(end - n, end, dtype=_INTEGER) for end, n in zip(ends, sizes, strict=True)]
    tree = _tree(sizes, pairs)
    fronts, by, parents = tree.fronts, tree.by, tree.parents

    def joined(nodes: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([units[node] for node in nodes] or [np.zeros(0, _INTEGER)])

    starts: dict[int, int] = {}
    places: list[dict[int, int]] = [{} for _ in fronts]
    size = 0
    for k in itertools.chain(*tree.together):
        nodes = joined(fronts[k].nodes)
        starts[k], size = size, size + len(nodes) ** 2
        places[k] = {int(unit): place for place, unit in enumerate(nodes)}

    def where(k: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The places of a block of the matrix of a front."""
        i, j = (np.array([places[k][int(u)] for u in each], _INTEGER) for each in (rows, columns))
        return starts[k] + i[:, None] * len(places[k]) + j

    groups = []
    for members in tree.together:
        around = np.stack([joined(fronts[k].boundary) for k in members])
        above = [
            np.zeros((0, 0), _INTEGER) if up is None else where(up, a, a)
            for up, a in zip((parents[k] for k in members), around, strict=True)
        ]
        rows = np.stack([joined(fronts[k].pivots) for k in members])
        groups.append(_Group(starts[members[0]], rows, around, np.stack(above)))
    first = [min(by[i], by[j]) for i, j in pairs]
    blocks = [where(k, units[i], units[j]) for k, (i, j) in zip(first, pairs, strict=True)]
    blocks += [where(k, units[j], units[i]).T for k, (i, j) in zip(first, pairs, strict=True)]
    return _Plan(tuple(groups), tuple(blocks), size)


class BlockSparse(eqx.Module):
    """A symmetric matrix with `blocks[k]` of shape `(n_i, n_j)` at `pairs[k]` = (i, j), i ≤ j.

    Every diagonal block is among them. Blocks may have a leading axis of samples, over which to map
    the methods.
    """

    blocks: tuple[Float[Array, "*batch _ _"], ...]
    pairs: tuple[_Pair, ...] = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the blocks."""
        return self.blocks[0].dtype

    @property
    def largest_diagonal(self) -> Array:
        """The largest entry of the diagonal."""
        each = zip(self.pairs, self.blocks, strict=True)
        return jnp.max(jnp.concatenate([jnp.diagonal(b) for (i, j), b in each if i == j]))

    @property
    def norm(self) -> Array:
        """The Frobenius norm."""
        each = zip(self.pairs, self.blocks, strict=True)
        return jnp.sqrt(sum((1 if i == j else 2) * jnp.sum(block**2) for (i, j), block in each))

    @compiled
    def dense(self) -> Float[Array, "N N"]:
        """The whole matrix, N = Σ n_i."""
        ends = np.cumsum(self.sizes)
        slices = [slice(end - n, end) for end, n in zip(ends, self.sizes, strict=True)]
        matrix = jnp.zeros((ends[-1], ends[-1]), self.blocks[0].dtype)
        for (i, j), block in zip(self.pairs, self.blocks, strict=True):
            matrix = matrix.at[slices[i], slices[j]].set(block)
            matrix = matrix.at[slices[j], slices[i]].set(block.T)
        return matrix

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
        plan = _plan(self.sizes, self.pairs)
        given = jnp.concatenate([block.ravel() for block in (*self.blocks, *self.blocks)])
        places = np.concatenate([place.ravel() for place in plan.blocks])
        storage = jnp.zeros(plan.size, given.dtype).at[places].set(given)
        factors, couplings = [], []
        for group in plan.groups:
            matrices = storage[group.start : group.stop].reshape(group.shape)
            count = group.rows.shape[1]
            factor = jnp.linalg.cholesky(matrices[:, :count, :count])
            factors.append(factor)
            couplings.append(_solved(factor, matrices[:, :count, count:]))
            if group.above.size:
                # What fronts below have left there goes on as well.
                spent = einsum("gpi,gpj->gij", couplings[-1], couplings[-1])
                rest = matrices[:, count:, count:] - spent
                storage = storage.at[group.above].add(rest)
        return FrontalCholesky(tuple(factors), tuple(couplings), self.pairs, self.sizes)


# What the Hessian of a chain and that of a graph are, and their factors.
Blocks = BlockTridiagonal | BlockSparse


class FrontalCholesky(eqx.Module):
    """L of H = L Lᵀ: of each group of fronts the lower factors, and what is right of them in Lᵀ."""

    factors: tuple[Float[Array, "_ _ _"], ...]
    couplings: tuple[Float[Array, "_ _ _"], ...]
    pairs: tuple[_Pair, ...] = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)

    @compiled
    def solve(self, rhs: State) -> State:
        """H⁻¹ rhs for `rhs[i]` of shape `(n_i,)`, or `(…, n_i)` with the same axes before it."""
        columns = _columns(rhs)
        for group, factor, coupling in self._each():
            found = _solved(factor, columns[group.rows])
            columns = columns.at[group.rows].set(found)
            change = einsum("gpb,gpc->gbc", coupling, found)
            columns = columns.at[group.around].add(-change)
        return self._back_substitute(columns, rhs)

    @compiled
    def solve_transposed(self, rhs: State) -> State:
        """L⁻ᵀ rhs, shaped as for `solve`: of white noise it makes noise of covariance H⁻¹."""
        return self._back_substitute(_columns(rhs), rhs)

    @compiled
    def times_transposed(self, vector: State) -> State:
        """Lᵀ vector, shaped as for `solve`: the squares of its entries sum up to vᵀ H v."""
        columns = _columns(vector)
        products = columns
        for group, factor, coupling in self._each():
            found = einsum("gqp,gqc->gpc", factor, columns[group.rows])
            found = found + einsum("gpb,gbc->gpc", coupling, columns[group.around])
            products = products.at[group.rows].set(found)
        return self._parts(products, vector)

    @property
    def diagonal(self) -> Array:
        """The diagonal of L."""
        return jnp.concatenate([jnp.diagonal(f, axis1=1, axis2=2).ravel() for f in self.factors])

    @property
    def log_determinant(self) -> Array:
        """log det H."""
        return 2 * jnp.sum(jnp.log(jnp.abs(self.diagonal)))

    @compiled
    def inverse_diagonal(self) -> tuple[Float[Array, "_ _"], ...]:
        """The diagonal blocks of H⁻¹, from the last front to the first (Takahashi et al. 1973).

        `S_pp = F⁻ᵀ F⁻¹ + G S_bb Gᵀ` and `S_pb = −G S_bb` with the factor F of the pivots p and
        `G = F⁻ᵀ` times their coupling to the boundary b, all of which the front above knows.
        """
        plan = _plan(self.sizes, self.pairs)
        storage = jnp.zeros(plan.size, self.factors[0].dtype)
        for group, factor, coupling in reversed(self._each()):
            count = group.rows.shape[1]
            inverse = _solved(factor, jnp.broadcast_to(jnp.eye(count, dtype=factor.dtype),
                                                       factor.shape))  # fmt: skip
            gain = einsum("gqp,gqb->gpb", inverse, coupling)
            around = storage[group.above]
            across = -einsum("gpb,gbc->gpc", gain, around)
            own = einsum("gqp,gqr->gpr", inverse, inverse) - einsum("gpb,grb->gpr", across, gain)
            # Round-off leaves the product of three matrices a little asymmetric.
            own = (own + jnp.matrix_transpose(own)) / 2
            upper = jnp.concatenate([own, across], axis=2)
            lower = jnp.concatenate([jnp.matrix_transpose(across), around], axis=2)
            whole = jnp.concatenate([upper, lower], axis=1)
            storage = storage.at[group.start : group.stop].set(whole.ravel())
        return tuple(
            storage[place] for place, (i, j) in zip(plan.blocks, self.pairs, strict=False) if i == j
        )

    def _each(self) -> list[tuple[_Group, Array, Array]]:
        groups = _plan(self.sizes, self.pairs).groups
        return list(zip(groups, self.factors, self.couplings, strict=True))

    def _back_substitute(self, columns: Array, like: State) -> State:
        """L⁻ᵀ of columns, as rows shaped like a state."""
        for group, factor, coupling in reversed(self._each()):
            known = einsum("gpb,gbc->gpc", coupling, columns[group.around])
            found = _solved(factor, columns[group.rows] - known, transposed=True)
            columns = columns.at[group.rows].set(found)
        return self._parts(columns, like)

    def _parts(self, columns: Array, like: State) -> State:
        """The parts of columns, as rows shaped like a state."""
        parts = jnp.split(columns, np.cumsum(self.sizes)[:-1])
        return tuple(x.T.reshape(r.shape) for x, r in zip(parts, like, strict=True))


BlockFactor = BlockCholesky | FrontalCholesky


def factor_of_squares(
    rows: Sequence[Row], pairs: tuple[_Pair, ...], sizes: tuple[int, ...]
) -> tuple[FrontalCholesky, Array]:
    """The factor of H = AᵀA by QR factorisations of A, and its smallest scaled pivot.

    As many digits are kept as A has. Each of the `rows` of A has blocks in columns of which all
    `pairs` are coupled. A pivot is scaled by the norm of its column of A.
    """
    kinds = tuple((next(iter(row.values())).shape[0], tuple(row)) for row in rows if row)
    plan, (size, groups) = _plan(sizes, pairs), _row_plan(sizes, pairs, kinds)
    given = [block for row in rows for block in row.values()]
    places = np.concatenate([place.ravel() for group in groups for place in group.blocks])
    order = [k for group in groups for k in group.order]
    values = jnp.concatenate([given[k].ravel() for k in order])
    storage = jnp.zeros(size, values.dtype).at[places].set(values)
    squares = [jnp.zeros(n, values.dtype) for n in sizes]
    for row in rows:
        for i, block in row.items():
            squares[i] = squares[i] + jnp.sum(block**2, axis=0)
    norms = jnp.sqrt(jnp.concatenate(squares))
    factors, couplings, pivots = [], [], []
    for group, own in zip(plan.groups, groups, strict=True):
        matrices = storage[own.start : own.start + math.prod(own.shape)].reshape(own.shape)
        # Householder's reflections keep the digits of small rows only below large ones.
        sorting = jnp.argsort(-jnp.max(jnp.abs(matrices), axis=2), axis=1)
        upper = jnp.linalg.qr(jnp.take_along_axis(matrices, sorting[:, :, None], 1), mode="r")
        count = group.rows.shape[1]
        factors.append(jnp.matrix_transpose(upper[:, :count, :count]))
        couplings.append(upper[:, :count, count:])
        lengths = norms[group.rows]
        diagonal = jnp.abs(jnp.diagonal(factors[-1], axis1=1, axis2=2))
        pivots.append((diagonal / jnp.where(lengths > 0, lengths, 1)).ravel())
        if own.above.size:
            storage = storage.at[own.above].set(upper[:, count:, count:])
    factor = FrontalCholesky(tuple(factors), tuple(couplings), pairs, sizes)
    return factor, jnp.min(jnp.concatenate(pivots))


@dataclasses.dataclass(frozen=True, eq=False)
class _RowGroup:
    """Where the rows of a group of fronts stand, one matrix of `shape` after the other.

    `blocks` are the places of the blocks of A that are its own, the numbers of which `order` has;
    `above` (fronts, boundary, boundary) are the places of what it leaves to the fronts above.
    """

    start: int
    shape: tuple[int, int, int]
    blocks: tuple[np.ndarray, ...]
    order: tuple[int, ...]
    above: np.ndarray


@functools.lru_cache(maxsize=256)
def _row_plan(
    sizes: tuple[int, ...],
    pairs: tuple[_Pair, ...],
    kinds: tuple[tuple[int, tuple[int, ...]], ...],
) -> tuple[int, tuple[_RowGroup, ...]]:
    """Where rows go, of which `kinds` say how many there are and in which columns of blocks."""
    tree = _tree(sizes, pairs)
    fronts, by, parents = tree.fronts, tree.by, tree.parents
    offsets = [
        dict(zip(f.nodes, np.cumsum([0, *(sizes[n] for n in f.nodes)])[:-1].tolist(), strict=True))
        for f in fronts
    ]
    heights = [0] * len(fronts)
    rows: list[list[tuple[int, int]]] = [[] for _ in fronts]
    for number, (height, columns) in enumerate(kinds):
        k = min(by[node] for node in columns)
        rows[k].append((number, heights[k]))
        heights[k] += height
    passed: dict[int, int] = {}
    # A front comes after those below it.
    for k, front in enumerate(fronts):
        parent = parents[k]
        if parent is not None:
            passed[k] = heights[parent]
            heights[parent] += sum(sizes[node] for node in front.boundary)
    groups, places, start = [], {}, 0
    for ks in tree.together:
        width = sum(sizes[node] for node in fronts[ks[0]].nodes)
        height = max(width, *(heights[k] for k in ks))
        for count, k in enumerate(ks):
            places[k] = start + count * height * width, width
        groups.append((start, (len(ks), height, width)))
        start += len(ks) * height * width

    def where(k: int, first_row: int, height: int, columns: np.ndarray) -> np.ndarray:
        begin, width = places[k]
        return begin + (first_row + np.arange(height, dtype=_INTEGER))[:, None] * width + columns

    def columns_of(k: int, nodes: tuple[int, ...]) -> np.ndarray:
        each = [offsets[k][node] + np.arange(sizes[node], dtype=_INTEGER) for node in nodes]
        return np.concatenate(each or [np.zeros(0, _INTEGER)])

    numbers = np.cumsum([0, *(len(columns) for _, columns in kinds)])
    found = []
    for (first, shape), ks in zip(groups, tree.together, strict=True):
        blocks, order, above = [], [], []
        for k in ks:
            for number, row in rows[k]:
                height, nodes = kinds[number]
                for count, node in enumerate(nodes):
                    blocks.append(where(k, row, height, columns_of(k, (node,))))
                    order.append(int(numbers[number]) + count)
            parent, boundary = parents[k], fronts[k].boundary
            if parent is not None:
                around = columns_of(parent, boundary)
                above.append(where(parent, passed[k], len(around), around))
        shaped = np.stack(above) if above else np.zeros((len(ks), 0, 0), _INTEGER)
        found.append(_RowGroup(first, shape, tuple(blocks), tuple(order), shaped))
    return start, tuple(found)


def _solved(factor: Array, columns: Array, *, transposed: bool = False) -> Array:
    """L⁻¹ or L⁻ᵀ times columns, for a stack of lower factors."""
    return jax.lax.linalg.triangular_solve(
        factor, columns, left_side=True, lower=True, transpose_a=transposed
    )


def _columns(parts: State) -> Array:
    """All units, one column per sample."""
    return jnp.concatenate([x.reshape(-1, x.shape[-1]).T for x in parts])
