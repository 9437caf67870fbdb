"""Which of NumPy and `jax.numpy` computes with given arrays."""

from __future__ import annotations

from types import ModuleType

import jax.numpy as jnp
import numpy as np

from pcdyn._support.arrays import is_traced


def array_namespace(array: object) -> ModuleType:
    """The library that an array is of."""
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def host_namespace(*trees: object) -> ModuleType:
    """NumPy, for which nothing is compiled, unless a leaf is traced by JAX."""
    return jnp if is_traced(*trees) else np
