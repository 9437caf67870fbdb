"""Whether an elementwise energy h(ε) gives a gradient flow that exists, as far as a grid shows.

`dε/dt = −h'(ε)` has one solution for all times if h is finite and bounded below and h' is locally
Lipschitz. A grid can refute each of these and prove none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from pcdyn.errors import IllPosedEnergyError

# Errors at which h is evaluated: from the smallest that matter to far outside any network.
_MAGNITUDES = np.concatenate([np.geomspace(1e-4, 1.0, 41), np.geomspace(1.0, 1e4, 81)[1:]])
# How many of them there are in each decade above 1.
_DECADE = 20
# Spacings at which the slope of h' is measured, coarse and fine. A Lipschitz h' of curvature c has
# quotients near c at both; those of |ε|^(p−1) grow by the ratio of the two to the power 2 − p.
_COARSE, _FINE = 1e-2, 1e-8
_GROWTH = 2.0


@dataclasses.dataclass(frozen=True)
class WellPosedness:
    """What a grid of errors shows of h.

    - `finite`: whether h and h' are finite at every error.
    - `bounded_below`: whether h does not fall to new minima at the outer ends of the grid.
    - `lipschitz`: whether difference quotients of h' stay bounded as the spacing shrinks from 1e-2
      to 1e-8, between any two errors of the grid up to 10 where h' changes most; `None` where h
      is not of float64, in which they would be round-off.
    - `convex`: whether h' never falls.
    - `where`: an error at which one of the first three fails, otherwise `None`.
    - `largest_slope`: the largest |h'|, which bounds the influence of an error if h' is bounded.
    """

    finite: bool
    bounded_below: bool
    lipschitz: bool | None
    convex: bool
    where: float | None
    largest_slope: float

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against a well-posed flow; convexity is not needed for it."""
        return self.finite and self.bounded_below and self.lipschitz is not False


def well_posedness(h: Callable[[Array], Array], dtype: DTypeLike | None = None) -> WellPosedness:
    """Test an elementwise h and its derivative on a grid of errors from −1e4 to 1e4.

    **Arguments:**

    - `h`: the energy as a function of an array of errors.
    - `dtype`: that of the grid, float64 unless given, whatever JAX's default.

    **Raises:**

    - `IllPosedEnergyError` if h does not map a JAX array elementwise to a real one.
    """
    # An energy may be built inside a function that is being compiled, and h hold float32 constants.
    with (
        jax.ensure_compile_time_eval(),
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
    ):
        return _inspect(h, jnp.float64 if dtype is None else dtype)


def _inspect(h: Callable[[Array], Array], dtype: DTypeLike) -> WellPosedness:
    grid = np.concatenate([-_MAGNITUDES[::-1], [0.0], _MAGNITUDES])
    errors = jnp.asarray(grid, dtype)
    slope = jax.jit(jax.vmap(jax.grad(lambda error: h(error[None])[0])))
    try:
        found = h(errors)
        _check_elementwise(h, errors, found)
        slopes = np.asarray(slope(errors), float)
    except IllPosedEnergyError:
        raise
    # What a function of the user does with arrays is its own affair.
    except Exception as error:
        raise IllPosedEnergyError(
            f"h must take an array and be written in terms of JAX (jax.numpy, jnp.where in place "
            f"of if), but it failed on one of shape {errors.shape}: {error}"
        ) from error
    values = np.asarray(found, float)
    finite = np.isfinite(values) & np.isfinite(slopes)
    if not finite.all():
        at = _nearest_to_zero(grid[~finite])
        return WellPosedness(False, False, False, False, at, float("inf"))
    middle = len(_MAGNITUDES)
    sides = {grid[0]: values[middle::-1], grid[-1]: values[middle:]}
    end = next((float(at) for at, side in sides.items() if _keeps_falling(side)), None)
    # Differences at the fine spacing would be round-off in a lower precision.
    measured = found.dtype == jnp.float64
    steep = _growing(slope, grid) if measured else None
    # Slopes are known to round-off times their size.
    known = 1e3 * np.finfo(found.dtype).eps * (1e-6 + np.abs(slopes[1:]) + np.abs(slopes[:-1]))
    return WellPosedness(
        finite=True,
        bounded_below=end is None,
        lipschitz=steep is None if measured else None,
        convex=bool(np.all(np.diff(slopes) >= -known)),
        where=steep if end is None else end,
        largest_slope=float(np.abs(slopes).max()),
    )


def _check_elementwise(h: Callable[[Array], Array], errors: Array, found: object) -> None:
    """Raise `IllPosedEnergyError` unless h of an array is a real array of h of its entries."""
    if not isinstance(found, jax.Array):
        raise IllPosedEnergyError(
            f"h must map an array of JAX to one, but returned a {type(found).__name__}: write it "
            "with jax.numpy"
        )
    if found.shape != errors.shape or not jnp.issubdtype(found.dtype, jnp.floating):
        raise IllPosedEnergyError(
            f"h must be elementwise and real: an array of shape {errors.shape} became one of shape "
            f"{found.shape} and dtype {found.dtype}"
        )
    alone, together = np.asarray(jax.vmap(h)(errors[:, None])[:, 0]), np.asarray(found)
    tolerance = float(np.sqrt(np.finfo(found.dtype).eps))
    same = np.isclose(together, alone, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not same.all():
        at = int(np.argmin(same))
        raise IllPosedEnergyError(
            f"h must be elementwise, but at ε = {float(errors[at]):g} it is {alone[at]:g} alone "
            f"and {together[at]:g} among others: the flow of a sample would depend on its batch"
        )


def _keeps_falling(values: np.ndarray) -> bool:
    """Whether h, from ε = 0 outward, falls to new minima and no slower than logarithmically."""
    inner, middle, end = values[[-1 - 2 * _DECADE, -1 - _DECADE, -1]]
    new_minima = end < values[:-1].min() and middle < values[: -1 - _DECADE].min()
    return bool(new_minima and middle - end >= 0.5 * (inner - middle))


def _growing(slope: Callable[[np.ndarray], Array], grid: np.ndarray) -> float | None:
    """An error at which difference quotients of h' grow as the spacing shrinks, if there is one."""
    near = grid[np.abs(grid) <= 10]
    lower, upper = near[:-1], near[1:]
    at_lower, at_upper = np.asarray(slope(lower)), np.asarray(slope(upper))
    size = np.maximum(np.abs(at_lower), np.abs(at_upper))

    def quotients(spacing: float) -> np.ndarray:
        """Of each interval, bisected down to the spacing towards the half where h' changes more."""
        nonlocal lower, upper, at_lower, at_upper
        while (wide := upper - lower > spacing).any():
            middle = (lower + upper) / 2
            at_middle = np.asarray(slope(middle))
            below = np.abs(at_middle - at_lower) > np.abs(at_upper - at_middle)
            left, right = wide & below, wide & ~below
            upper, at_upper = np.where(left, (middle, at_middle), (upper, at_upper))
            lower, at_lower = np.where(right, (middle, at_middle), (lower, at_lower))
        return np.abs(at_upper - at_lower) / (upper - lower)

    coarse, fine = quotients(_COARSE), quotients(_FINE)
    round_off = 4 * np.finfo(float).eps * (1 + size) / (upper - lower)
    # One scale for all, for h' can be as high at both ends of a coarse interval.
    grows = ~(fine <= _GROWTH * max(coarse.max(), 1e-3) + round_off)
    # To more than the spacing, so that a kink at 0 is said to be at 0.
    return _nearest_to_zero(np.round(lower[grows], 7) + 0.0) if grows.any() else None


def _nearest_to_zero(errors: np.ndarray) -> float:
    return float(errors[np.argmin(np.abs(errors))])
