"""The energies between backpropagation and target propagation: one family of precisions.

The equilibrium depends on the ratios of the precisions only. Where the precision of the output is
low beside that of the layers below it, it stays at the feedforward pass and the weighted
prediction errors are BP's; where it is high, activities move to the targets of TP.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.arrays import as_float_array, is_traced
from pcdyn._support.checks import checked_integer
from pcdyn._support.types import Numbers
from pcdyn.errors import PrecisionError, ShapeError
from pcdyn.model.energies.energy import Gaussian


def interpolated(weight: Numbers, depth: int) -> list[Gaussian]:
    """Make the energies of `F = λ ℒ + (1 − λ) Ẽ` of Eq 48: Π_L = λ, and Π_l = 1 − λ for l < L.

    The equilibrium is that of unit precisions with the output's multiplied by λ/(1 − λ). As λ → 0,
    `ε_l (1 − λ)/λ` tends to BP's deltas of unit precision in every hidden layer, with an error
    O(λ); as λ → 1, layer L − 1 alone tends to its TP target, with an error O(1 − λ), while the
    layers below it minimise Ẽ. The endpoints are limits and no energies, for F does not determine
    the activities there (the paper takes λ = 0 for BP and λ = 1 for TP).

    **Arguments:**

    - `weight`: λ, 0 < λ < 1.
    - `depth`: L ≥ 2, the number of predicted layers.

    **Raises:**

    - `PrecisionError` for another λ, unless it is traced.
    - `ShapeError` for one that is not a number.
    - `InputError` for a depth below 2 or not whole.
    """
    value, depth = _number(weight, "λ"), _depth(depth)
    if not is_traced(value) and not 0 < float(value) < 1:
        reason = _ENDPOINTS.get(float(value), "elsewhere a precision is negative")
        raise PrecisionError(f"λ must lie between 0 and 1, got {float(value):g}: {reason}")
    return [*[Gaussian(1 - value)] * (depth - 1), Gaussian(value)]


def graded(ratio: Numbers, depth: int) -> list[Gaussian]:
    """Make energies whose precisions grow by the factor ρ from layer to layer: `Π_l = ρ^l`.

    As ρ → ∞ all hidden layers tend to their TP targets where these exist, with an error O(1/ρ);
    as ρ → 0 `Π_l ε_l / Π_L` tends to BP's deltas of unit precision, with an error O(ρ). With one
    hidden layer it is `interpolated` at λ = ρ/(1 + ρ).

    **Arguments:**

    - `ratio`: ρ > 0.
    - `depth`: L ≥ 2, the number of predicted layers.

    **Raises:**

    - `PrecisionError` for a ratio that is not positive, or so far from 1 that a precision leaves
      the range of floating-point numbers.
    - `ShapeError` for one that is not a number.
    - `InputError` for a depth below 2 or not whole.
    """
    value, depth = _number(ratio, "ratio of precisions"), _depth(depth)
    precisions = [value**index for index in range(1, depth + 1)]
    if not is_traced(value):
        if not float(value) > 0:
            raise PrecisionError(f"the ratio of precisions must be positive, got {float(value):g}")
        if not all(0 < float(p) < np.inf for p in precisions):
            raise PrecisionError(
                f"a ratio of {float(value):g} takes precisions of {depth} layers out of the range "
                f"of {value.dtype}; choose one nearer to 1"
            )
    return [Gaussian(precision) for precision in precisions]


_ENDPOINTS = {
    0.0: "the output has no influence: F = Ẽ is least at the feedforward pass and every "
    "hidden prediction error is zero. BP is the limit of ε_l (1 − λ)/λ as λ → 0: take a small λ",
    1.0: "the layers below L − 1 are undetermined, for F = ℒ depends on x_{L−1} only. As "
    "λ → 1 layer L − 1 tends to its TP target: take λ near 1, or graded precisions for all layers",
}


def _number(value: Numbers, name: str) -> Float[Array, ""]:
    array = as_float_array(value, name)
    if array.ndim:
        raise ShapeError(f"{name} must be one number, got shape {array.shape}")
    return array


def _depth(depth: int) -> int:
    # No network is deeper, and each layer is an array.
    return checked_integer(
        depth, "depth, the number of predicted layers,", at_least=2, at_most=100_000
    )
