"""Whether an elementwise energy h(ε) gives a gradient flow that exists, as far as a grid shows.

`dε/dt = −h'(ε)` has one solution for all times if h is finite and bounded below and h' is locally
Lipschitz. A grid can refute each of these and prove none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pcdyn.errors import IllPosedEnergyError

# Errors at which h is looked at: from the smallest that matter to far outside any network.
_MAGNITUDES = np.concatenate([np.geomspace(1e-4, 1.0, 41), np.geomspace(1.0, 1e4, 81)[1:]])
# Spacings at which the slope of h' is measured, coarse and fine. A Lipschitz h' of curvature c has
# quotients near c at both; those of |ε|^(p−1) grow by the ratio of the two to the power 2 − p.
_COARSE, _FINE = 1e-2, 1e-8
_GROWTH = 2.0


@dataclasses.dataclass(frozen=True)
class WellPosedness:
    """What a grid of errors shows of h.

    - `finite`: whether h and h' are finite at every error.
    - `bounded_below`: whether h does not fall at the outer ends of the grid.
    - `lipschitz`: whether difference quotients of h' stay bounded as the spacing shrinks from 1e-2
      to 1e-8.
    - `convex`: whether h' never falls.
    - `where`: an error at which one of the first three fails, otherwise `None`.
    - `largest_slope`: the largest |h'|, which bounds the influence of an error if h' is bounded.
    """

    finite: bool
    bounded_below: bool
    lipschitz: bool
    convex: bool
    where: float | None
    largest_slope: float

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against a well-posed flow; convexity is not needed for it."""
        return self.finite and self.bounded_below and self.lipschitz


def well_posedness(h: Callable[[Any], Any], dtype: Any = None) -> WellPosedness:
    """Look at an elementwise h and its derivative on a grid of errors from −1e4 to 1e4.

    Raises `IllPosedEnergyError` if h does not map an array to a real one of its shape.
    """
    # An energy may be made inside a function that is being compiled.
    with jax.ensure_compile_time_eval():
        return _inspect(h, dtype)


def _inspect(h: Callable[[Any], Any], dtype: Any) -> WellPosedness:
    grid = np.concatenate([-_MAGNITUDES[::-1], [0.0], _MAGNITUDES])
    errors = jnp.asarray(grid, dtype)
    values = h(errors)
    if jnp.shape(values) != errors.shape or not jnp.issubdtype(values.dtype, jnp.floating):
        raise IllPosedEnergyError(
            f"h must be elementwise and real: an array of shape {errors.shape} became one of shape "
            f"{jnp.shape(values)} and dtype {values.dtype}"
        )
    slope = jax.vmap(jax.grad(lambda error: h(error[None])[0]))
    values, slopes = np.asarray(values, float), np.asarray(slope(errors), float)
    finite = np.isfinite(values) & np.isfinite(slopes)
    if not finite.all():
        at = _nearest_to_zero(grid[~finite])
        return WellPosedness(False, False, False, False, at, float("inf"))
    outward = slopes * np.sign(grid)
    # Beyond the last point a slope of the wrong sign leads to minus infinity, unless it vanishes.
    falls = {i: outward[i] < 0 and _keeps_falling(values, outward, i) for i in (0, -1)}
    steep = _growing(slope, grid, errors.dtype)
    # Slopes are known to round-off times their size.
    known = 1e3 * np.finfo(errors.dtype).eps * (1e-6 + np.abs(slopes[1:]) + np.abs(slopes[:-1]))
    convex = bool(np.all(np.diff(slopes) >= -known))
    where = next((float(grid[i]) for i, fell in falls.items() if fell), None)
    return WellPosedness(
        finite=True,
        bounded_below=not any(falls.values()),
        lipschitz=steep is None,
        convex=convex,
        where=steep if where is None else where,
        largest_slope=float(np.abs(slopes).max()),
    )


def _keeps_falling(values: np.ndarray, outward: np.ndarray, end: int) -> bool:
    """Whether the fall over the last decade is no slower than logarithmic."""
    inner = 40 if end == 0 else -41
    return bool(outward[end] * _MAGNITUDES[-1] <= 0.5 * outward[inner] * _MAGNITUDES[-41])


def _growing(slope: Any, grid: np.ndarray, dtype: Any) -> float | None:
    """An error at which difference quotients of h' grow as the spacing shrinks, if there is one."""
    if dtype != jnp.float64:
        # Differences at the fine spacing would be round-off.
        return None
    near = grid[np.abs(grid) <= 10]

    def quotients(spacing: float) -> np.ndarray:
        ends = (slope(jnp.asarray(near + sign * spacing / 2)) for sign in (1, -1))
        upper, lower = (np.asarray(end, float) for end in ends)
        return np.abs(upper - lower) / spacing

    coarse, fine = quotients(_COARSE), quotients(_FINE)
    size = np.abs(np.asarray(slope(jnp.asarray(near)), float))
    round_off = 4 * np.finfo(float).eps * (1 + size) / _FINE
    # The coarse quotient straddles what lies within its spacing; the largest of them is the scale.
    grows = ~(fine <= _GROWTH * max(coarse.max(), 1e-3) + round_off)
    return _nearest_to_zero(near[grows]) if grows.any() else None


def _nearest_to_zero(errors: np.ndarray) -> float:
    return float(errors[np.argmin(np.abs(errors))])
