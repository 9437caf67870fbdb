"""Linear algebra of implicit steps: samples do not couple, layers couple to neighbours only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from pcdyn._support.products import einsum, matmul
from pcdyn._support.types import Scalar, State
from pcdyn.linearisation.block_sparse import Blocks, BlockSparse, FrontalCholesky
from pcdyn.linearisation.block_tridiagonal import BlockTridiagonal
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.model.problem import InferenceProblem

# Layers whose indices differ by this much do not share a neighbour.
_COLOURS = 3


def sample_hessians(problem: InferenceProblem, state: State) -> Blocks:
    """Compute ∂²F/∂x² of one sample, or of each of a batch with the sample as leading axis."""
    if state[0].ndim == 1:
        return free_energy_hessian(problem, state)
    return problem.map_samples(free_energy_hessian, state)


def shifted(matrix: Blocks, time_constants: tuple[Array, ...], rate: Scalar) -> Blocks:
    """Compute rate · T + H, for T = diag(τ_l) and H with or without a leading axis of samples."""
    blocks = [
        block + rate * time_constants[i] * _identity_like(block) if i == j else block
        for (i, j), block in zip(matrix.pairs, matrix.blocks, strict=True)
    ]
    if isinstance(matrix, BlockSparse):
        return dataclasses.replace(matrix, blocks=tuple(blocks))
    return BlockTridiagonal(tuple(blocks[: len(matrix.diagonal)]), matrix.upper)


class InverseBlockCholesky(eqx.Module):
    """Block factorisation of symmetric positive definite block-tridiagonal matrices.

    `inverses[i]` is the inverse S_i⁻¹ of a Schur complement, `couplings[i]` is S_i⁻¹ H_{i,i+1};
    both may have leading axes of samples. A step solves with them many times: products with
    matrices are quicker then, and on a busy CPU steadier, than substitutions by LAPACK.
    """

    inverses: tuple[Array, ...]
    couplings: tuple[Array, ...]

    def solve(self, rhs: State) -> State:
        """Compute H⁻¹ rhs, for `rhs[i]` of shape `(n_i,)` or `(batch, n_i)` as the matrices."""
        partial = [rhs[0]]
        for coupling, part in zip(self.couplings, rhs[1:], strict=True):
            partial.append(part - _times(jnp.matrix_transpose(coupling), partial[-1]))
        solution = [_times(self.inverses[-1], partial[-1])]
        for i in reversed(range(len(self.couplings))):
            own = _times(self.inverses[i], partial[i])
            solution.insert(0, own - _times(self.couplings[i], solution[0]))
        return tuple(solution)


class SampleFactors(eqx.Module):
    """The factor of one block-sparse matrix, or those of all samples stacked."""

    factor: FrontalCholesky

    def solve(self, rhs: State) -> State:
        """Compute H⁻¹ rhs, for `rhs[i]` of shape `(n_i,)` or `(batch, n_i)` as the matrices."""
        if rhs[0].ndim == 1:
            return self.factor.solve(rhs)
        return jax.vmap(lambda factor, x: factor.solve(x))(self.factor, rhs)


def factorise(matrix: Blocks) -> InverseBlockCholesky | SampleFactors:
    """Factorise, O(Σ n_l³) a sample; NaN for a sample whose matrix is not positive definite."""
    if isinstance(matrix, BlockSparse):
        several = matrix.blocks[0].ndim == 3
        factor = jax.vmap(lambda one: one.cholesky())(matrix) if several else matrix.cholesky()
        return SampleFactors(factor)
    inverses: list[Array] = []
    couplings: list[Array] = []
    for i, block in enumerate(matrix.diagonal):
        if i > 0:
            coupling = matmul(inverses[-1], matrix.upper[i - 1])
            block = block - matmul(jnp.matrix_transpose(matrix.upper[i - 1]), coupling)
            couplings.append(coupling)
        inverse = _triangular_inverse(jnp.linalg.cholesky(block))
        inverses.append(matmul(jnp.matrix_transpose(inverse), inverse))
    return InverseBlockCholesky(tuple(inverses), tuple(couplings))


def _triangular_inverse(lower: Array) -> Array:
    """L⁻¹, row by row for all samples at once."""
    eye = _identity_like(lower)

    def with_row(i: Scalar, inverse: Array) -> Array:
        row = eye[..., i, :] - _times(jnp.matrix_transpose(inverse), lower[..., i, :])
        return inverse.at[..., i, :].set(row / lower[..., i, i][..., None])

    return jax.lax.fori_loop(0, lower.shape[-1], with_row, jnp.zeros_like(lower))


def _identity_like(matrix: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)


def _times(matrix: Array, vector: Array) -> Array:
    return einsum("...ij,...j->...i", matrix, vector)


def chain_blocks(
    product: Callable[[State], State], like: State | tuple[jax.ShapeDtypeStruct, ...]
) -> BlockTridiagonal:
    """Find the blocks of a symmetric block-tridiagonal linear map of states shaped like `like`.

    Layers three apart share no neighbour, so that 3 · max n_l products give the blocks of all
    samples at once. What `product` might do across samples or beyond neighbours is not seen.
    """
    count, widest = len(like), max(x.shape[-1] for x in like)
    colours = range(min(_COLOURS, count))

    def column(colour: Array, unit: Array) -> State:
        direction = tuple(
            jnp.broadcast_to(
                ((jnp.arange(x.shape[-1]) == unit) & (colour == i % _COLOURS)).astype(x.dtype),
                x.shape,
            )
            for i, x in enumerate(like)
        )
        return product(direction)

    columns = jax.vmap(jax.vmap(column, (None, 0)), (0, None))(
        jnp.asarray(colours), jnp.arange(widest)
    )

    def block(row: int, layer: int) -> Array:
        part = columns[row][layer % _COLOURS, : like[layer].shape[-1]]
        return jnp.moveaxis(part, 0, -1)

    diagonal = tuple(block(i, i) for i in range(count))
    return BlockTridiagonal(diagonal, tuple(block(i, i + 1) for i in range(count - 1)))


def coupled_blocks(
    product: Callable[[State], State],
    like: State | tuple[jax.ShapeDtypeStruct, ...],
    pairs: tuple[tuple[int, int], ...],
) -> BlockSparse:
    """As `chain_blocks`, of a map that couples the arrays of a state in `pairs`.

    Arrays that no third one is coupled to both of share a colour, and one product.
    """
    near: list[set[int]] = [{i} for i in range(len(like))]
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)
    colours: list[int] = []
    for i in range(len(like)):
        taken = {colours[k] for j in near[i] for k in near[j] if k < i}
        colours.append(next(c for c in range(len(like)) if c not in taken))
    widest = max(x.shape[-1] for x in like)

    def column(colour: Array, unit: Array) -> State:
        chosen = [(jnp.arange(x.shape[-1]) == unit) & (colour == c)
                  for c, x in zip(colours, like, strict=True)]  # fmt: skip
        return product(
            tuple(
                jnp.broadcast_to(on.astype(x.dtype), x.shape)
                for on, x in zip(chosen, like, strict=True)
            )
        )

    columns = jax.vmap(jax.vmap(column, (None, 0)), (0, None))(
        jnp.arange(max(colours) + 1), jnp.arange(widest)
    )
    blocks = [jnp.moveaxis(columns[i][colours[j], : like[j].shape[-1]], 0, -1) for i, j in pairs]
    return BlockSparse(tuple(blocks), pairs, tuple(x.shape[-1] for x in like))


class PaddedBlocks(eqx.Module):
    """The blocks of a block-tridiagonal matrix, all of the size of the largest layer.

    `diagonal` has shape `(*batch, layers, n, n)`, `upper` one block less, from a layer to the next;
    so has `lower`, which is `None` where the matrix is symmetric.
    """

    diagonal: Array
    upper: Array
    lower: Array | None


class PaddedFactors(eqx.Module):
    """As `InverseBlockCholesky`, with the layers on the first axis, for loops over them."""

    inverses: Array
    couplings: Array
    widths: tuple[int, ...] = eqx.field(static=True)

    def solve(self, rhs: State) -> State:
        """Compute H⁻¹ rhs, for one array `(*batch, N)` of all layers."""
        chain = PaddedChain(self.widths)

        def down(partial: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            coupling, part = now
            partial = part - _times(jnp.matrix_transpose(coupling), partial)
            return partial, partial

        def up(above: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            inverse, coupling, partial = now
            solution = _times(inverse, partial) - _times(coupling, above)
            return solution, solution

        parts = jnp.moveaxis(chain.pad(rhs[0]), -2, 0)
        none = jnp.zeros_like(parts[0])
        # The coupling of each layer to the one below it, and to the one above it.
        _, partials = jax.lax.scan(down, none, (self.couplings, parts))
        above = jnp.concatenate([self.couplings[1:], jnp.zeros_like(self.couplings[:1])])
        _, solution = jax.lax.scan(up, none, (self.inverses, above, partials), reverse=True)
        return (chain.unpad(jnp.moveaxis(solution, 0, -2)),)


class PaddedChain:
    """Layers of any widths as blocks of the largest, so that loops over them compile once."""

    def __init__(self, widths: tuple[int, ...]):
        self.widths, self.widest = widths, max(widths)
        inside = np.arange(self.widest) < np.asarray(widths)[:, None]
        self._outside = ~inside
        self._units = np.flatnonzero(inside)
        # Where each unit comes from; those that are none from one more, which is zero.
        self._sources = np.full(inside.shape, sum(widths))
        self._sources[inside] = np.arange(sum(widths))
        pairs = [
            inside[:, :, None] & inside[:, None, :],
            inside[:-1, :, None] & inside[1:, None, :],
        ]
        pairs.append(inside[1:, :, None] & inside[:-1, None, :])
        self.entries = np.flatnonzero(np.concatenate([x.ravel() for x in pairs]))

    def pad(self, x: Array) -> Array:
        """Reshape `(*batch, N)` to `(*batch, layers, n)`, with zeros where there is no unit."""
        return jnp.concatenate([x, jnp.zeros_like(x[..., :1])], axis=-1)[..., self._sources]

    def unpad(self, x: Array) -> Array:
        """Take the padding of `pad` away."""
        return x.reshape(*x.shape[:-2], -1)[..., self._units]

    def blocks(
        self,
        product: Callable[[Array], Array],
        like: Array | jax.ShapeDtypeStruct,
        *,
        symmetric: bool = True,
    ) -> PaddedBlocks:
        """Find the blocks as `chain_blocks` does, of a linear map of arrays shaped like `like`."""
        layers, colours = np.arange(len(self.widths)), min(_COLOURS, len(self.widths))
        chosen = (layers % _COLOURS == np.arange(colours)[:, None])[:, None, :, None]
        pattern = chosen & np.eye(self.widest, dtype=bool)[None, :, None, :]
        units = pattern.reshape(colours, self.widest, -1)[..., self._units]

        def column(unit: Array) -> Array:
            return self.pad(product(jnp.broadcast_to(unit.astype(like.dtype), like.shape)))

        columns = jax.vmap(jax.vmap(column))(jnp.asarray(units))

        def rows(first: int, shift: int) -> Array:
            here = layers[max(first, 0) : len(layers) + min(first, 0)]
            parts = columns[..., here, :]
            # The layer of each row has the colour of another than of its own.
            colour = (here + shift) % _COLOURS
            parts = jnp.moveaxis(parts, -2, 1)[colour, np.arange(len(here))]
            return jnp.moveaxis(jnp.moveaxis(parts, 1, -1), 0, -3)

        lower = None if symmetric else rows(1, -1)
        return PaddedBlocks(rows(0, 0), rows(-1, 1), lower)

    def factorise(self, matrix: PaddedBlocks) -> PaddedFactors:
        """Factorise as `factorise` does; the padding stands apart, with ones on the diagonal."""
        ones = jnp.asarray(self._outside[:, :, None] * np.eye(self.widest), matrix.diagonal.dtype)
        diagonal = matrix.diagonal + jnp.broadcast_to(ones, matrix.diagonal.shape)
        blocks, upper = (jnp.moveaxis(x, -3, 0) for x in (diagonal, matrix.upper))
        upper = jnp.concatenate([jnp.zeros_like(blocks[:1]), upper])

        def eliminate(below: Array, now: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            block, above = now
            coupling = matmul(below, above)
            inverse = _triangular_inverse(
                jnp.linalg.cholesky(block - matmul(jnp.matrix_transpose(above), coupling))
            )
            inverse = matmul(jnp.matrix_transpose(inverse), inverse)
            return inverse, (inverse, coupling)

        _, factors = jax.lax.scan(eliminate, jnp.zeros_like(blocks[0]), (blocks, upper))
        inverses, couplings = factors
        return PaddedFactors(inverses, couplings, self.widths)


class _ChainState(eqx.Module):
    """Factors of σ T M, the sign σ of each sample, T, and whether Mᵀ is meant instead of M."""

    factors: InverseBlockCholesky | PaddedFactors | SampleFactors
    sign: Array
    time_constants: tuple[Array, ...]
    transposed: bool = eqx.field(static=True)


class ChainSolver(lx.AbstractLinearSolver[_ChainState]):
    """Solve M x = b for M = ±(1 + c T⁻¹H), the matrix of diffrax's implicit steps.

    T M is symmetric, block tridiagonal over layers and the same for every sample apart: one block
    Cholesky factorisation of each sample, O(batch · Σ n_l³). M is known by its products alone, of
    which 3 · max n_l are taken. Where a sample's T M is not definite, which takes a step longer
    than the time in which the state runs away from a saddle, the solution is NaN; diffrax then
    shortens the step. With `widths`, of the free layers, the state is one array of all of them;
    with `pairs` those of its arrays are coupled, those of a graph.
    """

    time_constants: tuple[Array, ...]
    widths: tuple[int, ...] | None = eqx.field(static=True, default=None)
    pairs: tuple[tuple[int, int], ...] | None = eqx.field(static=True, default=None)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _ChainState:
        """Prepare the products, blocks and factors that solving needs."""
        like = operator.in_structure()
        taus = self.time_constants

        def symmetric(direction: State) -> State:
            image = operator.mv(direction)
            return tuple(jnp.broadcast_to(t, x.shape) * x for t, x in zip(taus, image, strict=True))

        if self.widths is not None:
            chain = PaddedChain(self.widths)
            blocks = chain.blocks(lambda x: symmetric((x,))[0], like[0])
            sign = jnp.sign(blocks.diagonal[..., 0, 0, 0])
            scaled = jax.tree.map(lambda x: sign[..., None, None, None] * x, blocks)
            return _ChainState(chain.factorise(scaled), sign, taus, False)
        if self.pairs is None:
            matrix = chain_blocks(symmetric, like)
        else:
            matrix = coupled_blocks(symmetric, like, self.pairs)
        # diffrax writes the implicit relation with either sign.
        sign = jnp.sign(jnp.trace(matrix.blocks[0], axis1=-2, axis2=-1))
        scaled = jax.tree.map(lambda block: sign[..., None, None] * block, matrix)
        return _ChainState(factorise(scaled), sign, taus, False)

    def compute(
        self, state: _ChainState, vector: State, options: dict[str, Any]
    ) -> tuple[State, lx.RESULTS, dict[str, Any]]:
        """Solve by forward and backward substitution."""

        def times(x: State) -> State:
            return tuple(
                state.sign[..., None] * jnp.broadcast_to(t, part.shape) * part
                for t, part in zip(state.time_constants, x, strict=True)
            )

        if state.transposed:
            solution = times(state.factors.solve(vector))
        else:
            solution = state.factors.solve(times(vector))
        return solution, lx.RESULTS.successful, {}

    def transpose(
        self, state: _ChainState, options: dict[str, Any]
    ) -> tuple[_ChainState, dict[str, Any]]:
        """Solve with the transpose, Mᵀ = σ (T M) T⁻¹."""
        other = _ChainState(state.factors, state.sign, state.time_constants, not state.transposed)
        return other, options

    def conj(
        self, state: _ChainState, options: dict[str, Any]
    ) -> tuple[_ChainState, dict[str, Any]]:
        """Solve with the conjugate: everything is real, so that it is the same."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Say that matrices are regular: a singular one gives NaN."""
        return True
