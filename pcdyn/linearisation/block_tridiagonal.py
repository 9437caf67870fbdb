"""Symmetric block-tridiagonal matrices: one block row per free layer."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float

from pcdyn._support.products import matmul
from pcdyn._support.types import Scalar, State


class BlockTridiagonal(eqx.Module):
    """A symmetric block-tridiagonal matrix: one block row per free layer.

    `diagonal[i]` has shape `(n_i, n_i)`, `upper[i]` shape `(n_i, n_{i+1})`. As the value of a
    mapped function the blocks have a leading axis of samples, over which to map the methods.
    """

    diagonal: tuple[Float[Array, "*batch _ _"], ...]
    upper: tuple[Float[Array, "*batch _ _"], ...]

    def dense(self) -> Float[Array, "N N"]:
        """The whole matrix, N = Σ n_i."""
        sizes = [block.shape[0] for block in self.diagonal]
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        matrix = jsl.block_diag(*self.diagonal)
        for i, block in enumerate(self.upper):
            rows = slice(offsets[i], offsets[i] + sizes[i])
            columns = slice(offsets[i + 1], offsets[i + 1] + sizes[i + 1])
            matrix = matrix.at[rows, columns].set(block).at[columns, rows].set(block.T)
        return matrix

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

    def solve(self, rhs: State) -> State:
        """H⁻¹ rhs for `rhs[i]` of shape `(n_i,)` or `(batch, n_i)`."""
        partial: list[Array] = []
        for i, factor in enumerate(self.factors):
            # One column per sample.
            columns = rhs[i].reshape(-1, rhs[i].shape[-1]).T
            if i > 0:
                columns = columns - matmul(self.couplings[i - 1].T, partial[-1])
            partial.append(jsl.solve_triangular(factor, columns, lower=True))
        solution: list[Array] = []
        for i, factor in reversed(list(enumerate(self.factors))):
            columns = partial[i]
            if solution:
                columns = columns - matmul(self.couplings[i], solution[0])
            solution.insert(0, jsl.solve_triangular(factor, columns, lower=True, trans="T"))
        return tuple(x.T.reshape(r.shape) for x, r in zip(solution, rhs, strict=True))


def largest_entry(layers: State) -> Array:
    """The largest absolute value in any layer."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(layer)) for layer in layers]))
