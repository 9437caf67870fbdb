"""From prediction errors to energies: one value per prediction, Gaussian or another.

Free energy `F = Σ_l E_l`, output loss `ℒ = E_L` and residual energy `Ẽ = F − ℒ`, with
`E_l = ½ ε_lᵀ Π_l ε_l` where it is Gaussian. The ½ is part of the definition, and every energy is
per sample: the flow of one sample never depends on how many others are simulated beside it.
"""

# No postponed annotations here: equinox sees an abstract field only as a value.
import abc
import contextlib
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import naming
from pcdyn._support.types import Scalar, Values
from pcdyn.errors import InputError, ShapeError
from pcdyn.model.energies.precision import (
    Precision,
    Precisions,
    checked_precision,
    checked_precisions,
    positive,
)


class LayerEnergies(eqx.Module):
    """What follows from `energies`, E_1 … E_L on the last axis."""

    energies: eqx.AbstractVar[Values]

    @property
    def free_energy(self) -> Values:
        """Free energy F = Σ_l E_l, shaped like `energies` without the last axis."""
        return self.energies.sum(-1)

    @property
    def output_loss(self) -> Values:
        """Output loss ℒ = E_L, shaped like `energies` without the last axis.

        Of a graph it is the energy of the predictions of all that is clamped.
        """
        return output_loss(self.energies, self._outputs())

    @property
    def residual_energy(self) -> Values:
        """Residual energy Ẽ = F − ℒ, shaped like `energies` without the last axis."""
        return residual_energy(self.energies, self._outputs())

    def _outputs(self) -> tuple[int, ...]:
        """Where the energies of the output stand."""
        return (-1,)


def output_loss(energies: Values, outputs: tuple[int, ...]) -> Values:
    """Sum up the energies that stand at `outputs` on the last axis."""
    return energies[..., np.array(outputs, int)].sum(-1)


def residual_energy(energies: Values, outputs: tuple[int, ...]) -> Values:
    """Sum up the energies that do not stand at `outputs` on the last axis."""
    return energies[..., np.delete(np.arange(energies.shape[-1]), outputs)].sum(-1)


class Energy(eqx.Module):
    """What the error of one prediction costs; a new energy is one small class with a `value`.

    A problem has one for each prediction l = 1 … L. What else there is follows from `value` or is
    not known, and may be written by whoever knows it: a `curvature` for the solvers that build a
    model of F (`gauss_newton`, `nesterov`, `fixed_point`, and the default of learning).
    """

    # What files and commands call it, where pcdyn knows it by a name.
    name: ClassVar[str | None] = None

    @abc.abstractmethod
    def value(
        self, error: Float[Array, "*batch n"], target: Float[Array, "*batch n"] | None
    ) -> Float[Array, "*batch"]:
        """Compute E of a prediction error, per sample.

        `target` is what is predicted, the activity x_l, from which the error is a difference:
        μ_l = target − error. Of a clamped output it is what that is clamped to.
        """

    def gradient(
        self, error: Float[Array, "*batch n"], target: Float[Array, "*batch n"] | None
    ) -> Float[Array, "*batch n"]:
        """Compute ∂E/∂ε at a given `target`, which is −∂E/∂μ: by autodiff unless overridden."""
        return jax.grad(lambda e: jnp.sum(self.value(e, target)))(error)

    def curvature(
        self, error: Float[Array, " n"], target: Float[Array, " n"] | None
    ) -> Precision | None:
        """Return the precision that stands for ∂²E/∂ε² at the error of one sample.

        It must be positive definite, also where the energy is not convex; `None` if it is
        not known, or if the energy of a hidden layer depends on its `target` as well. Unless
        overridden it is `quadratic_form`.
        """
        return self.quadratic_form

    @property
    def quadratic_form(self) -> Precision | None:
        """Precision Π if the energy is ½ εᵀ Π ε for every ε, for which there are closed forms."""
        return None

    def scaled(self, factor: Scalar) -> "Energy":
        """Multiply the energy by a positive factor."""
        return _Scaled(self, jnp.asarray(factor))

    def check(self, width: int, target: Array | None) -> None:
        """Raise an `InputError` if this energy does not fit a prediction of `width` units.

        `target` is what the output is clamped to, `None` for every other layer. A problem calls it
        once the energy's arrays have the dtype of the network.
        """
        leaves = jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array))
        dtype = leaves[0].dtype if leaves else None if target is None else target.dtype
        batch = () if target is None else target.shape[:-1]
        error = jnp.zeros((*batch, width), dtype)
        target = error if target is None else target
        shape = getattr(eqx.filter_eval_shape(self.value, error, target), "shape", None)
        if shape != batch:
            raise ShapeError(
                f"value of {type(self).__name__} must sum over the units of a layer: an error of "
                f"shape {error.shape} gave {shape} and not {batch}"
            )

    def per_prediction(self, depth: int) -> tuple["Energy", ...]:
        """Return the energies of the predictions 1 … `depth` where this one is given for all."""
        return (self,) * depth


class Weighted(Energy):
    """Base of energies that are multiplied by a precision, as `pcdyn.Gaussian` says."""

    precision: Precisions = eqx.field(default=None, kw_only=True, converter=checked_precisions)

    @property
    def weights(self) -> Precision:
        """Precision, with products; raises `InputError` while there is one for each layer."""
        if isinstance(self.precision, tuple):
            raise InputError(
                f"this {type(self).__name__} has a precision for each of "
                f"{len(self.precision)} predictions: take one of problem.energy"
            )
        return Precision(self.precision)

    def scaled(self, factor: Scalar) -> "Weighted":
        return _with_precision(self, self.weights.scaled(factor).values)

    def check(self, width: int, target: Array | None) -> None:
        given = self.weights.values
        if given is None:
            return
        # In a lower precision a small number can vanish, a matrix become singular.
        checked_precision(given, "precision")
        if given.ndim > 0 and given.shape[-1] != width:
            raise ShapeError(
                f"precision has shape {given.shape}, but the layer has {width} units"
                + ("; give a list with one for each l = 1 … L" if given.ndim == 1 else "")
            )

    def per_prediction(self, depth: int) -> tuple[Energy, ...]:
        if not isinstance(self.precision, tuple):
            return (self,) * depth
        if len(self.precision) != depth:
            raise ShapeError(
                f"{len(self.precision)} precisions for {depth} predictions; give one for each "
                "l = 1 … L"
            )
        return tuple(_with_precision(self, each) for each in self.precision)


_Weighted = TypeVar("_Weighted", bound=Weighted)


class Gaussian(Weighted):
    """`E = ½ εᵀ Π ε` with the precision Π.

    **Arguments:**

    - `precision`: Π, either `None` (1), a positive number, a vector of shape `(n,)` (the diagonal)
      or a symmetric positive definite matrix of shape `(n, n)`. A list has one of these for each
      prediction l = 1 … L, which a problem takes apart.

    **Raises:**

    - `PrecisionError` for a precision that is not symmetric positive definite (by Cholesky;
      otherwise the flow would not be a gradient flow). Under a JAX transformation the values are
      unknown and only shapes are checked.
    - `ShapeError` where shapes do not fit.
    """

    name: ClassVar[str | None] = "gaussian"
    # By position as well.
    precision: Precisions = eqx.field(default=None, converter=checked_precisions)

    def value(self, error: Array, target: Array | None) -> Array:
        return 0.5 * jnp.sum(error * self.weights.weigh(error), axis=-1)

    def gradient(self, error: Array, target: Array | None) -> Array:
        return self.weights.weigh(error)

    @property
    def quadratic_form(self) -> Precision:
        return self.weights


class CrossEntropy(Energy):
    """Cross-entropy of a softmax output, `E = −λ Σ_k T_k log softmax(μ_L)_k`.

    The prediction μ_L of the output layer are logits: give that layer the identity activation.
    Given alone for all predictions it is that of the output, with `Gaussian()` below.

    **Arguments:**

    - `weight`: λ > 0, the precision of the output so to speak: an average over a batch of B samples
      in place of a sum, with the hidden layers as they are, is λ = 1/B.

    **Raises:**

    - `PrecisionError` for a weight that is not positive.
    - `InputError`, by the problem, where the output is not clamped to probabilities.
    """

    name: ClassVar[str | None] = "cross_entropy"
    weight: Float[Array, ""] = eqx.field(
        default=1.0, converter=positive("weight of the cross-entropy")
    )

    @property
    def precision(self) -> Float[Array, ""]:
        """Factor λ, as a precision."""
        return self.weight

    def value(self, error: Array, target: Array | None) -> Array:
        if target is None:
            raise InputError(_NO_TARGET)
        log_probabilities = jax.nn.log_softmax(target - error, axis=-1)
        return -self.weight * jnp.sum(target * log_probabilities, axis=-1)

    def scaled(self, factor: Scalar) -> "CrossEntropy":
        return eqx.tree_at(lambda e: e.weight, self, factor * self.weight)

    def check(self, width: int, target: Array | None) -> None:
        positive("weight of the cross-entropy")(self.weight)
        if target is None:
            raise InputError(_NO_TARGET)
        if is_traced(target):
            return
        known = np.asarray(target)
        sums = known.sum(-1)
        if np.any(known < 0) or np.any(np.abs(sums - 1) > 1e-3):
            raise InputError(
                f"cross-entropy needs probabilities as output, but entries go from "
                f"{known.min():g} to {known.max():g} and sums from {sums.min():g} to "
                f"{sums.max():g}; give one-hot labels"
            )

    def per_prediction(self, depth: int) -> tuple[Energy, ...]:
        return (*Gaussian().per_prediction(depth - 1), self)


class _Scaled(Energy):
    """An energy times a factor."""

    energy: Energy
    factor: Float[Array, ""]

    def value(self, error: Array, target: Array | None) -> Array:
        return self.factor * self.energy.value(error, target)

    def gradient(self, error: Array, target: Array | None) -> Array:
        return self.factor * self.energy.gradient(error, target)

    def curvature(self, error: Array, target: Array | None) -> Precision | None:
        found = self.energy.curvature(error, target)
        return None if found is None else found.scaled(self.factor)

    @property
    def quadratic_form(self) -> Precision | None:
        found = self.energy.quadratic_form
        return None if found is None else found.scaled(self.factor)

    def check(self, width: int, target: Array | None) -> None:
        self.energy.check(width, target)


_NO_TARGET = (
    "cross-entropy compares with a target: clamp the output, and give it for that alone, with "
    "another energy for each prediction below"
)


def one_per_prediction(energy: Energy | Sequence[Energy] | None, depth: int) -> tuple[Energy, ...]:
    """One energy for each of `depth` predictions, from one for all of them, a list, or `None`.

    Raises what `check_energy` raises, and `ShapeError` for another number of energies.
    """
    if energy is None:
        return (Gaussian(),) * depth
    check_energy(energy, "energy")
    if isinstance(energy, Energy):
        return energy.per_prediction(depth)
    if len(energy) != depth:
        raise ShapeError(
            f"{len(energy)} energies for {depth} predictions; give one for each l = 1 … L, or a "
            "single one for all"
        )
    found = []
    for index, each in enumerate(energy, start=1):
        with naming_layer(f"layer {index}"):
            found.extend(each.per_prediction(1))
    return tuple(found)


def naming_layer(name: str) -> contextlib.AbstractContextManager[None]:
    """Say in an `InputError` raised inside of which layer or node the energy is."""
    return naming(f"energy of {name}")


def in_dtype(energies: tuple[Energy, ...], dtype: np.dtype) -> tuple[Energy, ...]:
    """The same energies with all their arrays, of NumPy as well, in one dtype of JAX."""

    def convert(leaf: object) -> object:
        is_array = isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating)
        return jnp.asarray(leaf, dtype) if is_array or eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(convert, energies)


def check_energy(energy: object, name: str) -> None:
    """Raise `InputError` for what is neither an energy nor a list of energies."""
    if isinstance(energy, Energy):
        return
    if isinstance(energy, list | tuple):
        for index, each in enumerate(energy, start=1):
            if isinstance(each, list | tuple):
                raise InputError(f"{name} of layer {index} is a list: give one energy")
            check_energy(each, f"{name} of layer {index}")
        return
    if isinstance(energy, type) and issubclass(energy, Energy):
        raise InputError(f"{name} is the class {energy.__name__}: call it, {energy.__name__}(…)")
    raise InputError(
        f"{name} must be an energy such as pcdyn.Gaussian(), or a list with one for each "
        f"prediction, got a {type(energy).__name__}"
    )


def _with_precision(energy: _Weighted, values: Array | None) -> _Weighted:
    """The same energy with another precision, which is known to be one."""
    return eqx.tree_at(
        lambda e: e.precision, energy, values, is_leaf=lambda x: x is None or x is energy.precision
    )
