"""Symmetric block-tridiagonal matrices: one block row per free layer."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.compiling import compiled
from pcdyn._support.products import matmul
from pcdyn._support.types import Scalar, State


class BlockTridiagonal(eqx.Module):
    """A symmetric block-tridiagonal matrix: one block row per free layer.

    `diagonal[i]` has shape `(n_i, n_i)`, `upper[i]` shape `(n_i, n_{i+1})`. As the value of a
    mapped function the blocks have a leading axis of samples, over which to map the methods.
    """

    diagonal: tuple[Float[Array, "*batch _ _"], ...]
    upper: tuple[Float[Array, "*batch _ _"], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number n_i of units of each block row."""
        return tuple(block.shape[-1] for block in self.diagonal)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the blocks."""
        return self.diagonal[0].dtype

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The block row and column of each of the `blocks`."""
        rows = range(len(self.diagonal))
        return (*((i, i) for i in rows), *((i, i + 1) for i in rows[:-1]))

    @property
    def blocks(self) -> tuple[Array, ...]:
        """All blocks on and above the diagonal."""
        return (*self.diagonal, *self.upper)

    @property
    def largest_diagonal(self) -> Array:
        """The largest entry of the diagonal."""
        return jnp.max(jnp.concatenate([jnp.diagonal(block) for block in self.diagonal]))

    @property
    def norm(self) -> Array:
        """The Frobenius norm."""
        return jnp.sqrt(sum(jnp.sum(block**2) for block in self.diagonal + 2 * self.upper))

    @compiled
    def dense(self) -> Float[Array, "N N"]:
        """The whole matrix, N = Σ n_i."""
        sizes = self.sizes
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        matrix = jsl.block_diag(*self.diagonal)
        for i, block in enumerate(self.upper):
            rows = slice(offsets[i], offsets[i] + sizes[i])
            columns = slice(offsets[i + 1], offsets[i + 1] + sizes[i + 1])
            matrix = matrix.at[rows, columns].set(block).at[columns, rows].set(block.T)
        return matrix

    @compiled
    def times(self, vector: State) -> State:
        """The product with a vector, one part `(n_i,)` for each block row."""
        products = [matmul(block, x) for block, x in zip(self.diagonal, vector, strict=True)]
        for i, block in enumerate(self.upper):
            products[i] = products[i] + matmul(block, vector[i + 1])
            products[i + 1] = products[i + 1] + matmul(block.T, vector[i])
        return tuple(products)

    def plus_diagonal(self, amount: Scalar) -> BlockTridiagonal:
        """The matrix plus `amount` times the identity."""
        eyes = (jnp.eye(len(block), dtype=block.dtype) for block in self.diagonal)
        diagonal = tuple(b + amount * eye for b, eye in zip(self.diagonal, eyes, strict=True))
        return BlockTridiagonal(diagonal, self.upper)

    @compiled
    def cholesky(self) -> BlockCholesky:
        """The block Cholesky factorisation, O(Σ n³); NaN if the matrix is not positive definite."""
        factors: list[Array] = []
        couplings: list[Array] = []
        for i, block in enumerate(self.diagonal):
            if i > 0:
                # The coupling is L_{i-1}⁻¹ H_{i-1,i}, so that the Schur complement is symmetric.
                coupling = jsl.solve_triangular(factors[-1], self.upper[i - 1], lower=True)
                block = block - matmul(coupling.T, coupling)
                couplings.append(coupling)
            factors.append(jnp.linalg.cholesky(block))
        return BlockCholesky(tuple(factors), tuple(couplings))


class BlockCholesky(eqx.Module):
    """L of H = L Lᵀ for a block-tridiagonal H: lower `factors`, and `couplings` above them."""

    factors: tuple[Float[Array, "_ _"], ...]
    couplings: tuple[Float[Array, "_ _"], ...]

    @compiled
    def solve(self, rhs: State) -> State:
        """H⁻¹ rhs for `rhs[i]` of shape `(n_i,)`, or `(…, n_i)` with the same axes before it."""
        partial: list[Array] = []
        for i, factor in enumerate(self.factors):
            columns = _columns(rhs[i])
            if i > 0:
                columns = columns - matmul(self.couplings[i - 1].T, partial[-1])
            partial.append(jsl.solve_triangular(factor, columns, lower=True))
        return self._back_substitute(partial, rhs)

    @compiled
    def solve_transposed(self, rhs: State) -> State:
        """L⁻ᵀ rhs, shaped as for `solve`: of white noise it makes noise of covariance H⁻¹."""
        return self._back_substitute([_columns(r) for r in rhs], rhs)

    @compiled
    def times_transposed(self, vector: State) -> State:
        """Lᵀ vector, shaped as for `solve`: the squares of its entries sum up to vᵀ H v."""
        products = [matmul(x, factor) for x, factor in zip(vector, self.factors, strict=True)]
        for i, coupling in enumerate(self.couplings):
            products[i] = products[i] + matmul(vector[i + 1], coupling.T)
        return tuple(products)

    @property
    def diagonal(self) -> Array:
        """The diagonal of L."""
        return jnp.concatenate([jnp.diagonal(factor) for factor in self.factors])

    @property
    def log_determinant(self) -> Array:
        """log det H."""
        return 2 * jnp.sum(jnp.log(jnp.abs(self.diagonal)))

    @compiled
    def inverse_diagonal(self) -> tuple[Float[Array, "_ _"], ...]:
        """The diagonal blocks of H⁻¹, by a recursion from the last to the first, O(Σ n³).

        `S_i = F⁻ᵀ F⁻¹ + G S_{i+1} Gᵀ` with the factor F and `G = F⁻ᵀ` times the coupling: the
        backward pass of the Rauch–Tung–Striebel smoother.
        """
        blocks: list[Array] = []
        for i, factor in reversed(list(enumerate(self.factors))):
            inverse = jsl.solve_triangular(
                factor, jnp.eye(len(factor), dtype=factor.dtype), lower=True
            )
            block = matmul(inverse.T, inverse)
            if blocks:
                gain = matmul(inverse.T, self.couplings[i])
                block = block + matmul(matmul(gain, blocks[0]), gain.T)
            # Round-off leaves the product of three matrices a little asymmetric.
            blocks.insert(0, (block + block.T) / 2)
        return tuple(blocks)

    def _back_substitute(self, partial: list[Array], like: State) -> State:
        """L⁻ᵀ of columns, as rows shaped like a state."""
        solution: list[Array] = []
        for i, factor in reversed(list(enumerate(self.factors))):
            columns = partial[i]
            if solution:
                columns = columns - matmul(self.couplings[i], solution[0])
            solution.insert(0, jsl.solve_triangular(factor, columns, lower=True, trans="T"))
        return tuple(x.T.reshape(r.shape) for x, r in zip(solution, like, strict=True))


def _columns(rows: Array) -> Array:
    """One column per sample."""
    return rows.reshape(-1, rows.shape[-1]).T


def largest_entry(layers: State) -> Array:
    """The largest absolute value in any layer."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(layer)) for layer in layers]))
