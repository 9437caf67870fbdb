"""Checks of what comes from the user; values are looked at only where they are known.

Under `jax.jit`, `jax.vmap` or `jax.grad` an array has a shape and a dtype but no values yet, so
that only those two can be checked there. Every check names the argument and raises an
`InputError`, or the kind of it that it is told.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, ArrayLike

from pcdyn.errors import DtypeError, InputError, NonFiniteError

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
    return _on_automatic_axes(array)


def _on_automatic_axes(array: Array) -> Array:
    """A known array on the same devices, its axes sharded by the compiler instead of by types."""
    if is_traced(array) or not isinstance(array.sharding, NamedSharding):
        return array
    mesh, spec = array.sharding.mesh, array.sharding.spec
    if AxisType.Explicit not in mesh.axis_types:
        return array
    # The axes of a mesh are automatic by default here, and explicit by default in jax.make_mesh.
    automatic = Mesh(cast(Mesh, mesh).devices, mesh.axis_names)
    return jax.device_put(array, NamedSharding(automatic, spec))


def check_sharding(*trees: Any) -> None:
    """Raise `InputError` for traced arrays whose sharding is a part of their type."""
    for leaf in jax.tree.leaves(trees):
        if not is_traced(leaf):
            continue
        kind: Any = jax.typeof(leaf)
        if getattr(kind, "vma", None):
            raise InputError(
                "inside jax.shard_map pcdyn's loops do not keep track of what varies over the axes "
                f"{tuple(kind.vma)} of the mesh: give jax.shard_map check_vma=False"
            )
        sharding: Any = getattr(kind, "sharding", None)
        if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
            continue
        if any(axis is not None for axis in sharding.spec):
            raise InputError(
                "under a JAX transformation the sharding of an array must not be a part of its "
                "type: make the mesh with automatic axes, jax.make_mesh(…, "
                "axis_types=(jax.sharding.AxisType.Auto,)), or leave the transformation out"
            )


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


def checked_number(
    value: Any,
    name: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    error: type[InputError] = InputError,
) -> float:
    """`value` as a finite float in a range; a number of Python or NumPy, or an array of one number.

    Raises `error` for anything else: texts, booleans, arrays of several numbers, NaN, values of a
    JAX transformation, which are not known yet.
    """
    if is_traced(value):
        raise error(
            f"{name} is traced by a JAX transformation (jit, vmap, grad …), but its value must be "
            "known before anything runs: pass a Python number"
        )
    wanted = _range_text("a finite number", above, at_least, below, at_most)
    number = _as_scalar(value, numbers.Real)
    if number is None:
        raise error(f"{name} must be {wanted}, got {_shown(value)}")
    try:
        number = float(number)
    except OverflowError:
        raise error(f"{name} must be {wanted}, got an integer beyond the range of floats") from None
    inside = above < number < below and at_least <= number <= at_most
    if not (inside and math.isfinite(number)):
        raise error(f"{name} must be {wanted}, got {_shown(value)}")
    return number


def checked_integer(
    value: Any,
    name: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    error: type[InputError] = InputError,
) -> int:
    """`value` as an int in a range; raises `error` for floats, booleans, texts and the rest."""
    wanted = _range_text("an integer", -math.inf, at_least, math.inf, at_most)
    number = None if is_traced(value) else _as_scalar(value, numbers.Integral)
    if number is None or not at_least <= number <= at_most:
        raise error(f"{name} must be {wanted}, got {_shown(value)}")
    return int(number)


def check_flag(value: Any, name: str, *, error: type[InputError] = InputError) -> None:
    """Raise `error` unless `value` is `True` or `False`."""
    if not isinstance(value, bool | np.bool_):
        raise error(f"{name} must be True or False, got {_shown(value)}")


def check_choice(
    value: Any, name: str, choices: Iterable[str], *, error: type[InputError] = InputError
) -> None:
    """Raise `error` unless `value` is one of the texts `choices`."""
    known = tuple(choices)
    if not (isinstance(value, str) and value in known):
        texts = ", ".join(f'"{choice}"' for choice in known)
        raise error(f"{name} must be one of {texts}, got {_shown(value)}")


def check_instance(
    value: Any, name: str, kind: Any, wanted: str, *, error: type[InputError] = InputError
) -> None:
    """Raise `error`, which says what is `wanted`, unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        hint = " (an instance, not the class: add parentheses)" if isinstance(value, type) else ""
        raise error(f"{name} must be {wanted}, got {_shown(value)}{hint}")


def check_key(value: Any, name: str = "key") -> None:
    """Raise `InputError` unless `value` is one random key, of the new or of the old kind."""
    is_array = isinstance(value, jax.Array)
    if is_array and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.ndim == 0:
        return
    if is_array and value.dtype == jnp.uint32 and value.ndim == 1:
        return
    raise InputError(f"{name} must be one random key, jax.random.key(seed), got {_shown(value)}")


def _as_scalar(value: Any, kind: type) -> Any:
    """The number in `value`, or `None` where it holds no single number of this kind."""
    if isinstance(value, np.ndarray | jax.Array):
        if value.ndim != 0 or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return None
        value = np.asarray(value).item()
    elif isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _range_text(kind: str, above: float, at_least: float, below: float, at_most: float) -> str:
    limits = [
        f"{word} {limit:g}"
        for word, limit in (
            ("above", above), ("at least", at_least), ("below", below), ("at most", at_most),
        )
        if math.isfinite(limit)
    ]  # fmt: skip
    return f"{kind} {' and '.join(limits)}" if limits else kind


def _shown(value: Any) -> str:
    """A short text of any value."""
    if isinstance(value, np.ndarray | jax.Array):
        traced = "a traced " if is_traced(value) else "an "
        return f"{traced}array of shape {value.shape} and dtype {value.dtype}"
    try:
        text = repr(value)
    except Exception:
        text = "a value that cannot be printed"
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"{text} ({type(value).__name__})"
