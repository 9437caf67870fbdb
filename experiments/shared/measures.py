"""What figures measure."""

from __future__ import annotations

from typing import Any

import numpy as np


def largest_rise(values: Any, *, axis: int) -> float:
    """The largest increase from one entry to the next along `axis` (negative: always falls)."""
    return np.diff(np.asarray(values, dtype=float), axis=axis).max().item()
