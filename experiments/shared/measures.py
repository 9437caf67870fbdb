"""What figures measure, and how sure they are of it."""

from __future__ import annotations

import math

import numpy as np
import xarray
from matplotlib.axes import Axes

# Over random draws: the mean, one standard error of it, and the 10 % and 90 % quantiles.
STATISTICS = ("mean", "error", "low", "high")


def largest_rise(values: np.ndarray | xarray.DataArray, *, axis: int) -> float:
    """The largest increase from one entry to the next along `axis` (negative: always falls)."""
    return np.diff(np.asarray(values, dtype=float), axis=axis).max().item()


def statistics(draws: np.ndarray, *, axis: int = 0) -> np.ndarray:
    """The `STATISTICS` of random draws along `axis`, as the last axis of the result."""
    draws = np.asarray(draws, dtype=float)
    error = draws.std(axis=axis, ddof=1) / draws.shape[axis] ** 0.5
    low, high = np.quantile(draws, [0.1, 0.9], axis=axis)
    return np.stack([draws.mean(axis=axis), error, low, high], axis=-1)


def estimate(values: xarray.DataArray) -> tuple[float, float]:
    """The mean of `statistics`, and one standard error of it."""
    return float(values.sel(statistic="mean")), float(values.sel(statistic="error"))


def within(value: float, error: float) -> str:
    """A number ± its standard error, to the first digit of the error, or alone without one."""
    if not error:
        return f"{value:.3g}"
    digits = max(0, math.ceil(-math.log10(error)))
    # Plus zero: no minus before a number that is rounded to zero.
    return f"{round(value, digits) + 0.0:.{digits}f} ± {error:.{digits}f}"


def draw_band(
    x: np.ndarray, values: xarray.DataArray, *, ax: Axes, label: str | None = None
) -> None:
    """Draw the mean of `statistics` in a band from the 10 % to the 90 % quantile."""
    (line,) = ax.plot(x, values.sel(statistic="mean"), label=label)
    low, high = (values.sel(statistic=name) for name in ("low", "high"))
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.25, lw=0)
