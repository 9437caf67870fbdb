"""Precisions Π, symmetric positive definite: a number, one per unit, or a matrix."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg as jsl
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from pcdyn._support.arrays import as_float_array, is_traced
from pcdyn._support.products import matmul
from pcdyn._support.types import Numbers, Scalar
from pcdyn.errors import PrecisionError, ShapeError

# As given: a number, one per unit or a matrix; one such for each prediction; `None` is 1.
Precisions = Float[Array, "..."] | tuple[Float[Array, "..."], ...] | None


class Precision(eqx.Module):
    """The precision Π of one prediction, and products with it.

    **Arguments:**

    - `values`: a number, a vector of shape `(n,)` (the diagonal) or a symmetric positive definite
      matrix of shape `(n, n)`, which is not checked; `None` is the unit matrix.
    """

    values: Float[Array, "..."] | None

    def weigh(self, vector: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Multiply vectors by the precision, Π v."""
        if self.values is None:
            return vector
        if self.values.ndim == 2:
            return matmul(vector, self.values)
        return jnp.broadcast_to(self.values, vector.shape) * vector

    def unweigh(self, vector: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Multiply vectors by the covariance, Π⁻¹ v: the inverse of `weigh`."""
        if self.values is None:
            return vector
        if self.values.ndim == 2:
            columns = vector.reshape(-1, vector.shape[-1]).T
            solved = jsl.cho_solve(jsl.cho_factor(self.values, lower=True), columns)
            return solved.T.reshape(vector.shape)
        return vector / jnp.broadcast_to(self.values, vector.shape)

    def whiten(self, rows: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """Compute Cᵀ v with Π = C Cᵀ, so that the squares of the result sum up to vᵀ Π v."""
        if self.values is None:
            return rows
        if self.values.ndim == 2:
            return matmul(rows, jnp.linalg.cholesky(self.values))
        return jnp.broadcast_to(jnp.sqrt(self.values), rows.shape) * rows

    def spread(self, rows: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """Compute C⁻¹ v with Π = C Cᵀ, so that the squares of the result sum up to vᵀ Π⁻¹ v."""
        if self.values is None:
            return rows
        if self.values.ndim == 2:
            factor = jnp.linalg.cholesky(self.values)
            return jsl.solve_triangular(factor, rows.T, lower=True).T
        return rows / jnp.broadcast_to(jnp.sqrt(self.values), rows.shape)

    def noise(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Draw Gaussian noise of covariance Π⁻¹, the units on the last axis of `shape`."""
        white = jr.normal(key, shape, dtype)
        if self.values is None or self.values.ndim < 2:
            return self.spread(white)
        factor = jnp.linalg.cholesky(self.values)
        columns = white.reshape(-1, shape[-1]).T
        return jsl.solve_triangular(factor, columns, lower=True, trans="T").T.reshape(shape)

    def inverse(self) -> Precision:
        """Return the covariance Π⁻¹ in the same form."""
        if self.values is None:
            return self
        if self.values.ndim < 2:
            return Precision(1 / self.values)
        identity = jnp.eye(len(self.values), dtype=self.values.dtype)
        return Precision(jsl.cho_solve(jsl.cho_factor(self.values, lower=True), identity))

    def scaled(self, factor: Scalar) -> Precision:
        """Return the precision times a positive factor."""
        factor = jnp.asarray(factor)
        return Precision(factor if self.values is None else factor * self.values)

    def matrix(self, width: int, dtype: DTypeLike) -> Float[Array, "n n"]:
        """Write Π as a full matrix of `width` rows."""
        if self.values is None:
            return jnp.eye(width, dtype=dtype)
        if self.values.ndim == 2:
            return self.values
        return jnp.diag(jnp.broadcast_to(self.values, (width,)))

    def smallest(self, dtype: DTypeLike) -> Float[Array, ""]:
        """Return the smallest eigenvalue of Π."""
        if self.values is None:
            return jnp.ones((), dtype)
        if self.values.ndim == 2:
            return jnp.linalg.eigvalsh(self.values)[0]
        return jnp.min(self.values)

    def log_determinant(self, width: int) -> Scalar:
        """Compute log det Π for a layer of `width` units."""
        if self.values is None:
            return 0.0
        if self.values.ndim == 2:
            return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(self.values))))
        return jnp.sum(jnp.log(jnp.broadcast_to(self.values, (width,))))


def positive(name: str) -> Callable[[Numbers], Float[Array, ""]]:
    """The converter of a field for one positive number.

    It raises `PrecisionError` or `ShapeError` under that name.
    """

    def convert(value: Numbers) -> Float[Array, ""]:
        number = checked_precision(value, name)
        if number.ndim != 0:
            raise ShapeError(f"{name} must be one number, got shape {number.shape}")
        return number

    return convert


def checked_precisions(given: Numbers | None) -> Precisions:
    """A precision, or the tuple of those of a list; `None` stays."""
    if given is None:
        return None
    if isinstance(given, list | tuple):
        return tuple(
            checked_precision(each, f"precision of layer {index}")
            for index, each in enumerate(given, start=1)
        )
    return checked_precision(given, "precision")


def checked_precision(value: Numbers, name: str) -> Float[Array, "..."]:
    """`value` as a precision; raises `PrecisionError` or `ShapeError` under that name."""
    precision = as_float_array(value, name)
    if precision.ndim > 2 or (precision.ndim == 2 and precision.shape[0] != precision.shape[1]):
        raise ShapeError(f"{name} must be a scalar, a vector or a square matrix, "
                         f"got shape {precision.shape}")  # fmt: skip
    if precision.size == 0:
        raise ShapeError(f"{name} is empty: give a number, one per unit, or a square matrix")
    if is_traced(precision):
        return precision
    if precision.ndim < 2:
        smallest = float(np.min(np.asarray(precision)))
        if smallest <= 0:
            raise PrecisionError(f"{name} must be positive, but contains {smallest:g}")
        return precision
    return jnp.asarray(_symmetric_positive_definite(np.asarray(precision), name))


def asymmetry_of(matrix: np.ndarray) -> float:
    """The largest entry of M − Mᵀ over that of M; 0 where it is no more than round-off."""
    asymmetry = np.max(np.abs(matrix - matrix.T)) / np.max(np.abs(matrix), initial=1e-300)
    # Inverting a matrix leaves asymmetry of the order of round-off times its conditioning.
    return float(asymmetry) if asymmetry > np.sqrt(np.finfo(matrix.dtype).eps) else 0.0


def _symmetric_positive_definite(matrix: np.ndarray, name: str) -> np.ndarray:
    if asymmetry := asymmetry_of(matrix):
        raise PrecisionError(
            f"{name} is not symmetric (relative asymmetry {asymmetry:.1e}); use (P + P.T) / 2 if "
            "that is what you mean"
        )
    symmetric = (matrix + matrix.T) / 2
    try:
        np.linalg.cholesky(symmetric)
    except np.linalg.LinAlgError:
        smallest = np.linalg.eigvalsh(symmetric)[0]
        raise PrecisionError(
            f"{name} is not positive definite: its smallest eigenvalue is {smallest:.3g}; a "
            "precision is the inverse of a covariance matrix and all its eigenvalues are positive"
        ) from None
    return symmetric
