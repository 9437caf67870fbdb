"""Checks of settings: numbers, flags, names, paths. Arrays are checked in `arrays.py`.

Every check names the argument and raises an `InputError`, or the kind of it that is given.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, TypeVar, Unpack

import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from pcdyn._support.arrays import is_traced
from pcdyn.errors import InputError

_Number = TypeVar("_Number")
_Result = TypeVar("_Result")


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in an `InputError` raised inside what it is about."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{what}: {error}") from error


def checked_number(
    value: object,
    name: str,
    *,
    above: float | int = -math.inf,
    at_least: float | int = -math.inf,
    below: float | int = math.inf,
    at_most: float | int = math.inf,
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
    scalar = _as_scalar(value, numbers.Real)
    if scalar is None:
        raise error(f"{name} must be {wanted}, got {_shown(value)}")
    try:
        number = float(scalar)
    except OverflowError:
        raise error(f"{name} must be {wanted}, got an integer beyond the range of floats") from None
    inside = above < number < below and at_least <= number <= at_most
    if not (inside and math.isfinite(number)):
        raise error(f"{name} must be {wanted}, got {_shown(value)}")
    return number


def checked_integer(
    value: object,
    name: str,
    *,
    at_least: float | int = -math.inf,
    at_most: float | int = math.inf,
    error: type[InputError] = InputError,
) -> int:
    """`value` as an int in a range; raises `error` for floats, booleans, texts and the rest."""
    wanted = _range_text("an integer", -math.inf, at_least, math.inf, at_most)
    scalar = None if is_traced(value) else _as_scalar(value, numbers.Integral)
    if scalar is None or not at_least <= (number := int(scalar)) <= at_most:
        raise error(f"{name} must be {wanted}, got {_shown(value)}")
    return number


def check_flag(value: object, name: str, *, error: type[InputError] = InputError) -> None:
    """Raise `error` unless `value` is `True` or `False`."""
    if not isinstance(value, bool | np.bool_):
        raise error(f"{name} must be True or False, got {_shown(value)}")


def check_choice(
    value: object, name: str, choices: Iterable[str], *, error: type[InputError] = InputError
) -> None:
    """Raise `error` unless `value` is one of the texts `choices`."""
    known = tuple(choices)
    if not (isinstance(value, str) and value in known):
        texts = ", ".join(f'"{choice}"' for choice in known)
        raise error(f"{name} must be one of {texts}, got {_shown(value)}")


def check_instance(
    value: object,
    name: str,
    kind: type | UnionType,
    wanted: str,
    *,
    error: type[InputError] = InputError,
) -> None:
    """Raise `error`, which says what is `wanted`, unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        hint = " (an instance, not the class: add parentheses)" if isinstance(value, type) else ""
        raise error(f"{name} must be {wanted}, got {_shown(value)}{hint}")


def check_key(value: object, name: str = "key") -> None:
    """Raise `InputError` unless `value` is one random key, of the new or of the old kind."""
    if isinstance(value, np.ndarray | jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            if value.ndim == 0:
                return
        elif value.dtype == jnp.uint32 and value.shape == jr.PRNGKey(0).shape:
            return
    raise InputError(f"{name} must be one random key, jax.random.key(seed), got {_shown(value)}")


def check_callable(
    value: object, name: str, wanted: str, *, error: type[InputError] = InputError
) -> None:
    """Raise `error`, which says what is `wanted`, unless `value` can be called."""
    if not callable(value):
        raise error(f"{name} must be {wanted}, got {_shown(value)}")


def check_path(value: object, name: str, *, error: type[InputError] = InputError) -> None:
    """Raise `error` unless `value` can be the path of a file."""
    path = _path_in(value, name, "the path of a file", error)
    if os.path.isdir(path):
        raise error(f"{name} must be the path of a file, but {path!r} is a folder")


def checked_folder(value: object, name: str) -> Path:
    """Return what can be the path of a folder; raise `InputError` for the rest."""
    path = Path(_path_in(value, name, "the path of a folder", InputError))
    if path.exists() and not path.is_dir():
        raise InputError(f"{name} must be the path of a folder, but {path} is a file")
    return path


def _path_in(value: object, name: str, wanted: str, error: type[InputError]) -> str:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise error(f"{name} must be {wanted}, got {_shown(value)}")
    return path


def as_sequence(
    value: object, name: str, wanted: str, *, error: type[InputError] = InputError
) -> tuple[Any, ...]:
    """`value` as a tuple, from a list, a tuple, a range or an array; raises `error` for the rest.

    An iterator is refused: it can be read only once, and need not end.
    """
    if isinstance(value, np.ndarray | jax.Array) and value.ndim > 0:
        return tuple(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(value)
    hint = "; make it a list first" if isinstance(value, Iterator) else ""
    raise error(f"{name} must be {wanted}, got {_shown(value)}{hint}")


class _Limits(TypedDict, total=False):
    at_least: float | int
    at_most: float | int
    error: type[InputError]


class _StrictLimits(_Limits, total=False):
    above: float | int
    below: float | int


def number(name: str, **limits: Unpack[_StrictLimits]) -> Callable[[object], float]:
    """`checked_number` as the converter of a field of an equinox module."""
    return lambda value: checked_number(value, name, **limits)


def integer(name: str, **limits: Unpack[_Limits]) -> Callable[[object], int]:
    """`checked_integer` as the converter of a field."""
    return lambda value: checked_integer(value, name, **limits)


def flag(name: str) -> Callable[[object], bool]:
    """`check_flag` as the converter of a field."""

    def convert(value: object) -> bool:
        check_flag(value, name)
        return bool(value)

    return convert


def optional(convert: Callable[[Any], _Result]) -> Callable[[Any], _Result | None]:
    """The converter of a field that may be `None`."""
    return lambda value: None if value is None else convert(value)


def _as_scalar(value: object, kind: type[_Number]) -> _Number | None:
    """The number in `value`, or `None` where it holds no single number of this kind."""
    if isinstance(value, np.ndarray | jax.Array):
        if value.ndim != 0 or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return None
        value = np.asarray(value).item()
    elif isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _range_text(
    kind: str,
    above: float | int,
    at_least: float | int,
    below: float | int,
    at_most: float | int,
) -> str:
    limits = [
        f"{word} {limit:g}"
        for word, limit in (
            ("above", above), ("at least", at_least), ("below", below), ("at most", at_most),
        )
        if math.isfinite(limit)
    ]  # fmt: skip
    return f"{kind} {' and '.join(limits)}" if limits else kind


def _shown(value: object) -> str:
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
