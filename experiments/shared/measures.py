"""What figures measure: cosines, and how much a curve rises."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def cosine(a: Any, b: Any) -> Any:
    """Cosine similarity along the last axis."""
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def vector_cosine(a: Any, b: Any) -> Any:
    """Cosine similarity of two vectors, within compiled functions."""
    return a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def largest_rise(values: Any, *, axis: int) -> float:
    """The largest increase from one entry to the next along `axis` (negative: always falls)."""
    return np.diff(np.asarray(values, dtype=float), axis=axis).max().item()
