"""From prediction errors to energies: Gaussian ones, and cross-entropy for the output.

`E_l = ½ ε_lᵀ Π_l ε_l`, free energy `F = Σ_l E_l`, output loss `ℒ = E_L` and residual energy
`Ẽ = F − ℒ`. The ½ is part of the definition, and every energy is per sample: the flow of one
sample never depends on how many others are simulated beside it.
"""

# No postponed annotations here: equinox sees an abstract field only as a value.
import abc
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.checks import Numbers, as_float_array, is_traced
from pcdyn._support.products import matmul
from pcdyn.errors import InputError, PrecisionError, ShapeError


class LayerEnergies(eqx.Module):
    """What follows from `energies`, E_1 … E_L on the last axis."""

    energies: eqx.AbstractVar[Any]

    @property
    def free_energy(self) -> Any:
        """F = Σ_l E_l, shaped like `energies` without the last axis."""
        return self.energies.sum(-1)

    @property
    def output_loss(self) -> Any:
        """ℒ = E_L, shaped like `energies` without the last axis."""
        return self.energies[..., -1]

    @property
    def residual_energy(self) -> Any:
        """Ẽ = F − ℒ, shaped like `energies` without the last axis."""
        return self.energies[..., :-1].sum(-1)


class Energy(eqx.Module):
    """What a layer's prediction error costs; a new energy is one small final class."""

    @abc.abstractmethod
    def layer_energy(
        self,
        index: int,
        error: Float[Array, "*batch n"],
        target: Float[Array, "*batch n"] | None,
    ) -> Float[Array, "*batch"]:
        """E_l of layer l = `index` for its prediction error, per sample.

        `target` is what the output is clamped to if l = L, and `None` for every other layer.
        """

    @abc.abstractmethod
    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        """Raise an `InputError` if this energy does not fit the problem.

        `widths` are n_0 … n_L, `output` is what the output is clamped to, `None` if it is free. A
        problem calls it once the energy's arrays have the dtype of the network.
        """


class Gaussian(Energy):
    """`E_l = ½ ε_lᵀ Π_l ε_l` with a precision Π_l for each layer l = 1 … L.

    Arguments: `precisions`, either `None` (all 1), one positive number for all layers, or a
    sequence with one entry for each l = 1 … L: a positive number, a vector of shape `(n_l,)` (the
    diagonal) or a symmetric positive definite matrix of shape `(n_l, n_l)`.

    Raises `PrecisionError` for a precision that is not symmetric positive definite (by Cholesky;
    otherwise the flow would not be a gradient flow) and `ShapeError` where shapes do not fit.
    Under a JAX transformation the values are unknown and only shapes are checked.
    """

    precisions: tuple[Float[Array, "..."], ...] | Float[Array, ""] | None

    def __init__(self, precisions: Numbers | None = None):
        if precisions is None:
            self.precisions = None
        elif isinstance(precisions, list | tuple):
            self.precisions = tuple(
                checked_precision(p, f"precision of layer {index}")
                for index, p in enumerate(precisions, start=1)
            )
        else:
            self.precisions = checked_precision(precisions, "precision")
            if self.precisions.ndim != 0:
                raise ShapeError(
                    "one precision for all layers must be a number; give a list with one entry "
                    f"per layer instead of an array of shape {self.precisions.shape}"
                )

    def precision(self, index: int) -> Float[Array, "..."] | None:
        """Π_l of layer l = `index`, as given: scalar, diagonal or matrix; `None` means 1."""
        if isinstance(self.precisions, tuple):
            return self.precisions[index - 1]
        return self.precisions

    def weigh(self, index: int, error: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Π_l ε_l, the precision-weighted prediction error of layer l = `index`."""
        return weigh(self.precision(index), error)

    def unweigh(self, index: int, vector: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Π_l⁻¹ v, the inverse of `weigh`: a product with the covariance of layer l = `index`."""
        precision = self.precision(index)
        if precision is None:
            return vector
        if precision.ndim == 2:
            columns = vector.reshape(-1, vector.shape[-1]).T
            solved = jsl.cho_solve(jsl.cho_factor(precision, lower=True), columns)
            return solved.T.reshape(vector.shape)
        return vector / jnp.broadcast_to(precision, vector.shape)

    def layer_energy(self, index: int, error: Array, target: Array | None) -> Array:
        return 0.5 * jnp.sum(error * self.weigh(index, error), axis=-1)

    def matrix(self, index: int, width: int, dtype: Any) -> Float[Array, "n n"]:
        """Π_l of layer l = `index` as a full matrix of `width` rows."""
        precision = self.precision(index)
        if precision is None:
            return jnp.eye(width, dtype=dtype)
        if precision.ndim == 2:
            return precision
        return jnp.diag(jnp.broadcast_to(precision, (width,)))

    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        # In a lower precision a small number can vanish, a matrix become singular.
        Gaussian(self.precisions)
        if not isinstance(self.precisions, tuple):
            return
        if len(self.precisions) != len(widths) - 1:
            raise ShapeError(
                f"{len(self.precisions)} precisions for a network with {len(widths) - 1} "
                "predicted layers; give one for each l = 1 … L"
            )
        for index, precision in enumerate(self.precisions, start=1):
            if precision.ndim > 0 and precision.shape[-1] != widths[index]:
                raise ShapeError(
                    f"precision of layer {index} has shape {precision.shape}, but the layer has "
                    f"{widths[index]} units"
                )


class CrossEntropy(Energy):
    """Cross-entropy of a softmax output, `E_L = −λ Σ_k T_k log softmax(μ_L)_k`; Gaussian below.

    The prediction μ_L of the output layer are logits: give that layer the identity activation.
    Arguments: `precisions` of the layers l = 1 … L − 1, as for `Gaussian`; `weight`, λ > 0, the
    precision of the output so to speak: an average over a batch of B samples in place of a sum,
    with the hidden layers as they are, is λ = 1/B.

    The output must be clamped, and to probabilities. Raises `InputError` where it is not,
    `PrecisionError` for a weight or a precision that is not positive.
    """

    hidden: Gaussian
    weight: Float[Array, ""]

    def __init__(self, precisions: Numbers | None = None, weight: Numbers = 1.0):
        self.hidden = Gaussian(precisions)
        self.weight = checked_precision(weight, "weight of the cross-entropy")
        if self.weight.ndim != 0:
            raise ShapeError(f"weight must be one number, got shape {self.weight.shape}")

    def precision(self, index: int) -> Float[Array, "..."] | None:
        """Π_l of the hidden layer l = `index`."""
        return self.hidden.precision(index)

    def layer_energy(self, index: int, error: Array, target: Array | None) -> Array:
        if target is None:
            return self.hidden.layer_energy(index, error, None)
        log_probabilities = jax.nn.log_softmax(target - error, axis=-1)
        return -self.weight * jnp.sum(target * log_probabilities, axis=-1)

    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        self.hidden.check(widths[:-1], None)
        checked_precision(self.weight, "weight of the cross-entropy")
        if output is None:
            raise InputError("cross-entropy compares with a target: clamp the output")
        if is_traced(output):
            return
        target = np.asarray(output)
        sums = target.sum(-1)
        if np.any(target < 0) or np.any(np.abs(sums - 1) > 1e-3):
            raise InputError(
                f"cross-entropy needs probabilities as output, but entries go from "
                f"{target.min():g} to {target.max():g} and sums from {sums.min():g} to "
                f"{sums.max():g}; give one-hot labels"
            )


def check_energy(energy: Any, name: str) -> None:
    """Raise `InputError` for what is no energy, such as the class of one."""
    if isinstance(energy, Energy):
        return
    if isinstance(energy, type) and issubclass(energy, Energy):
        raise InputError(f"{name} is the class {energy.__name__}: call it, {energy.__name__}(…)")
    raise InputError(
        f"{name} must be an energy such as pcdyn.Gaussian(), got a {type(energy).__name__}"
    )


def error_gradient(energy: Energy, index: int, error: Array, target: Array | None) -> Array:
    """∂E_l/∂ε_l, which is −∂E_l/∂μ_l; Π_l ε_l where the energy is Gaussian."""
    if isinstance(energy, Gaussian):
        return energy.weigh(index, error)
    return jax.grad(lambda e: jnp.sum(energy.layer_energy(index, e, target)))(error)


@functools.singledispatch
def scale_output(energy: Energy, depth: int, factor: Any) -> Energy:
    """The same energy with that of the output layer L = `depth` multiplied by `factor`.

    Raises `InputError` for an energy whose class has not registered how.
    """
    raise InputError(f"the output of a {type(energy).__name__} energy cannot be scaled")


@scale_output.register(CrossEntropy)
def _(energy: CrossEntropy, depth: int, factor: Any) -> CrossEntropy:
    return eqx.tree_at(lambda e: e.weight, energy, factor * energy.weight)


@scale_output.register(Gaussian)
def _(energy: Gaussian, depth: int, factor: Any) -> Gaussian:
    each = [energy.precision(index) for index in range(1, depth + 1)]
    one = jnp.ones((), jnp.result_type(*[p for p in each if p is not None], factor))
    filled = [one if precision is None else precision for precision in each]
    return Gaussian([*filled[:-1], factor * filled[-1]])


def weigh(
    precision: Float[Array, "..."] | None, error: Float[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
    """Π ε for a precision as given: scalar, diagonal or matrix; `None` means 1."""
    if precision is None:
        return error
    if precision.ndim == 2:
        return matmul(error, precision)
    return jnp.broadcast_to(precision, error.shape) * error


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
