"""Checks of arrays that come from the user; values are looked at only where they are known.

Under `jax.jit`, `jax.vmap` or `jax.grad` an array has a shape and a dtype but no values yet, so
that only those two can be checked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from pcdyn.errors import DtypeError, NonFiniteError

# What users may pass as an array; JAX's ArrayLike leaves lists out.
Numbers = ArrayLike | Sequence[Any]


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is an abstract value of a JAX transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def as_float_array(value: Any, name: str) -> Array:
    """`value` as a floating-point JAX array with finite entries.

    Python numbers and nested lists become the default float dtype; an array keeps its own.
    Raises `DtypeError` for integer, boolean or complex arrays and for what is no array of numbers,
    such as a text or lists of several lengths, and `NonFiniteError` for NaN or infinity, each
    naming `name`.
    """
    is_python = isinstance(value, int | float | list | tuple)
    try:
        if isinstance(value, str):
            # JAX would take it for the name of a dtype.
            raise TypeError("a text")
        array = jnp.asarray(value, dtype=float) if is_python else jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DtypeError(
            f"{name} is a {type(value).__name__} that does not convert to an array of real "
            "numbers: give a number, an array, or lists of equal lengths"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise DtypeError(
            f"{name} has dtype {array.dtype}; activities are real numbers: convert it to "
            "floating point, for example with .astype(float)"
        )
    check_finite(array, name)
    return array


def check_finite(array: Any, name: str) -> None:
    """Raise `NonFiniteError` if a known array has a NaN or infinite entry."""
    if is_traced(array):
        return
    values = np.asarray(array)
    finite = np.isfinite(values)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise NonFiniteError(
            f"{name} has {int((~finite).sum())} non-finite entries, the first "
            f"({values[where]}) at index {where}; remove or impute them first"
        )
