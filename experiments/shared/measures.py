"""What figures measure."""

from __future__ import annotations

import numpy as np
import xarray


def largest_rise(values: np.ndarray | xarray.DataArray, *, axis: int) -> float:
    """The largest increase from one entry to the next along `axis` (negative: always falls)."""
    return np.diff(np.asarray(values, dtype=float), axis=axis).max().item()
