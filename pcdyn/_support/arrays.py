"""Arrays of the user: made floating-point arrays of JAX or NumPy, or refused by name.

Under `jax.jit`, `jax.vmap` or `jax.grad` an array has a shape and a dtype but no values yet, so
that only those two can be checked there.
"""

from __future__ import annotations

import contextlib
import decimal
import functools
import math
import numbers
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from pcdyn.errors import DtypeError, InputError, NonFiniteError, SizeError

# Narrower floating-point numbers than float32 are widened: LAPACK and files know none.
_LEAST_BYTES = 4
# What one call may take of the machine's memory: results are copied while they are put together.
_LARGEST_SHARE = 0.5


def is_traced(*trees: object) -> bool:
    """Whether any leaf is an abstract value of a JAX transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in _leaves(trees))


def _leaves(trees: object) -> list[Any]:
    # JAX warns of iterators, which are refused by name elsewhere.
    return jax.tree.leaves(trees, is_leaf=lambda x: isinstance(x, Iterator))


def as_float_array(value: object, name: str) -> Array:
    """`value` as a JAX array of float32 or float64 with finite entries.

    Python numbers and nested lists become the default float dtype; an array of float32 or float64
    keeps its own. What holds real numbers in another way is converted where nothing is lost: half
    precision to float32, other byte orders, long doubles without more digits than float64 has,
    objects that are numbers, arrays of pandas and xarray.

    Raises `DtypeError` for arrays of integers, booleans or complex numbers, for masked entries, and
    for what is no array of numbers, such as a text or lists of several lengths, and
    `NonFiniteError` for NaN or infinity, each naming `name`.
    """
    if isinstance(value, jax.Array):
        array = value
    elif is_traced(value):
        array = _traced_array(value, name)
    else:
        known, is_plain = _numpy_array(value, name)
        check_finite(known, name)
        # A number too large for the dtype becomes infinite, which is said with its name.
        with np.errstate(over="ignore"):
            array = jnp.asarray(known, dtype=float) if is_plain else jnp.asarray(known)
        if array.dtype.itemsize < known.dtype.itemsize:
            check_finite(array, f"{name} as {array.dtype}")
    if array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(float)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise DtypeError(
            f"{name} has dtype {array.dtype}; activities are real numbers: convert it to "
            "floating point, for example with .astype(float)"
        )
    if array.dtype.itemsize < _LEAST_BYTES:
        array = array.astype(jnp.float32)
    if isinstance(value, jax.Array):
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


def check_sharding(*trees: object) -> None:
    """Raise `InputError` for traced arrays whose sharding is a part of their type."""
    for leaf in _leaves(trees):
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


def as_host_array(
    value: object, name: str, *, finite: bool = True, error: type[InputError] = DtypeError
) -> np.ndarray:
    """`value` as a NumPy array of float64, such as times or what is drawn, with `finite` entries.

    Raises `error` for what is no array of real numbers, and for values that are traced.
    """
    if is_traced(value):
        raise error(
            f"{name} is traced by a JAX transformation (jit, vmap, grad …), but its values must be "
            "known before anything runs"
        )
    try:
        array = np.asarray(value) if isinstance(value, jax.Array) else _numpy_array(value, name)[0]
    except (DtypeError, TypeError) as problem:
        raise error(str(problem)) from problem
    if not jnp.issubdtype(array.dtype, jnp.number) or np.iscomplexobj(array):
        raise error(f"{name} must be real numbers, got dtype {array.dtype}")
    array = array.astype(float)
    if finite and not np.isfinite(array).all():
        raise error(f"{name} has NaN or infinite entries: remove or impute them first")
    return array


def _traced_array(value: object, name: str) -> Array:
    try:
        return jnp.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise DtypeError(_not_numbers(value, name)) from error


def _numpy_array(value: object, name: str) -> tuple[np.ndarray, bool]:
    """`value` in a dtype that JAX knows, and whether it should take JAX's default dtype."""
    leaves = jax.tree.leaves(value) if isinstance(value, list | tuple) else [value]
    masked = sum(int(np.ma.getmaskarray(x).sum()) for x in leaves if np.ma.isMaskedArray(x))
    if masked:
        raise DtypeError(
            f"{name} has {masked} masked entries, which have no value: fill or leave them out "
            "first, for example with .filled(0.0)"
        )
    try:
        array = np.asarray(value)
        if array.dtype == object and all(_is_real(x) for x in array.ravel()):
            array = array.astype(float)
    # What an object does when asked for its numbers is its own affair.
    except Exception as error:
        raise DtypeError(_not_numbers(value, name)) from error
    if array.dtype.kind in "OSUVMm":
        if not jnp.issubdtype(array.dtype, jnp.floating):  # bfloat16 and its like are of kind V
            raise DtypeError(_not_numbers(value, name))
        return array, False
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        double = array.astype(np.float64)
        if not np.array_equal(double, array, equal_nan=True):
            raise DtypeError(
                f"{name} has dtype {array.dtype} and more digits than float64 can hold: if they "
                "may be lost, convert it with .astype(float)"
            )
        array = double
    is_default = isinstance(value, int | float | list | tuple) and array.dtype.kind in "iuf"
    return array.astype(array.dtype.newbyteorder("=")), is_default


def _is_real(value: object) -> bool:
    # Real numbers of Python, such as fractions and decimals, and arrays of one number.
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number)
    return isinstance(value, numbers.Real | decimal.Decimal) and not isinstance(value, bool)


def _not_numbers(value: object, name: str) -> str:
    return (
        f"{name} is a {type(value).__name__} that does not convert to an array of real "
        "numbers: give a number, an array, or lists of equal lengths"
    )


def check_dtype(dtype: DTypeLike, name: str) -> None:
    """Raise `DtypeError` unless `dtype` is one that pcdyn computes in, and JAX is set to allow."""
    if dtype not in (np.float32, np.float64):
        raise DtypeError(f"{name} is {dtype}, but pcdyn computes in float32 or float64: use one")
    if dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise DtypeError(
            f"{name} is float64, but JAX is set to float32: switch float64 on with "
            'jax.config.update("jax_enable_x64", True), or build everything in float32'
        )


def converted(array: Array, dtype: np.dtype, name: str) -> Array:
    """A finite array in another dtype; raises `NonFiniteError` for numbers too large for that."""
    if array.dtype == dtype:
        return array
    narrow = array.astype(dtype)
    check_finite(narrow, f"{name} as {narrow.dtype}")
    return narrow


def check_finite(array: object, name: str) -> None:
    """Raise `NonFiniteError` if a known array has a NaN or infinite entry."""
    if is_traced(array) or _is_known_finite(array):
        return
    values = np.asarray(array)
    finite = np.isfinite(values)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise NonFiniteError(
            f"{name} has {int((~finite).sum())} non-finite entries, the first "
            f"({values[where]}) at index {where}; remove or impute them first"
        )
    if isinstance(array, jax.Array) and array.size >= _LARGE:
        key = id(array)
        _known_finite[key] = weakref.ref(array, lambda _: _known_finite.pop(key, None))


# Arrays of JAX do not change: data of a training are looked at once, not in every call.
_known_finite: dict[int, weakref.ref[Array]] = {}
_LARGE = 2**16


def _is_known_finite(array: object) -> bool:
    known = _known_finite.get(id(array))
    return known is not None and known() is array


def check_size(size: float | int, what: str) -> None:
    """Raise `SizeError` where `size` bytes, what `what` takes, are no part of this machine."""
    memory, size = _machine_memory(), _as_float(size)
    if size > _LARGEST_SHARE * memory:
        raise SizeError(
            f"{what} would take {size / 2**30:.3g} GiB, more than {_LARGEST_SHARE:.0%} of the "
            f"{memory / 2**30:.3g} GiB of memory of this machine"
        )


def _as_float(number: float | int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


@functools.cache
def _machine_memory() -> float | int:
    """The bytes of memory that this process can have; infinite where that is not known."""
    sizes = [math.inf]
    # Not every system says.
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # What a container is allowed is not what the machine has.
    with contextlib.suppress(ValueError, OSError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)
