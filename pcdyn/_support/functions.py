"""Functions and names that users give, as parts of values that are pickled and mapped over."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pcdyn._support.arrays import is_traced

_Result = TypeVar("_Result")
_Value = TypeVar("_Value")
# A function, or its module and its name in it.
ByName = Callable[..., Any] | tuple[str, str]


@jax.tree_util.register_static
class Name(str):
    """A text that is no leaf of a pytree, so that JAX takes values that hold it."""


class Function(eqx.Module, Generic[_Result]):
    """A function without arrays: no leaf of a pytree, so that JAX takes values that hold it.

    Two are equal where their functions are. It pickles where its function does, and where that is
    found under its name in its module, as JAX's own are.
    """

    function: Callable[..., _Result] = eqx.field(static=True)

    def __call__(self, *args: object) -> _Result:
        return self.function(*args)

    def __deepcopy__(self, memo: object) -> Function:
        return self

    def __reduce__(self) -> tuple[Callable[[ByName], Function], tuple[ByName]]:
        return _function, (reference(self.function),)


class ByCode(Generic[_Value]):
    """A value made of optax's functions, equal to another of the same code and equal settings.

    For static parts of what is compiled: two optimisers `optax.adam(1e-3)` are functions that are
    not equal, so that JAX would compile again for the second. Functions of others are equal to
    themselves only, for what they do may depend on a variable that has changed since; so is what
    is neither a function nor a plain value.
    """

    def __init__(self, value: _Value):
        self.value = value
        self._signature = _signature(value, ())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByCode) and self._signature == other._signature

    def __hash__(self) -> int:
        return hash(self._signature)


class _Itself:
    """A hashable stand-in for an object, equal where the object is the same one."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _signature(value: object, outer: tuple[int, ...]) -> object:
    """What decides how a value behaves, as something hashable; `outer` are the ids it lies in."""
    if id(value) in outer:
        # A function that calls itself.
        return "outer", outer.index(id(value))
    parts: tuple[object, ...]
    match value:
        case None | bool() | int() | str() | bytes() | complex():
            return type(value), value
        case float():
            # Neither is 0 equal to −0 here, nor a NaN different from itself.
            return float, value.hex()
        case np.ndarray() | np.generic() if not value.dtype.hasobject:
            return type(value), value.dtype.str, value.shape, value.tobytes()
        case jax.Array() if not is_traced(value) and jnp.issubdtype(value.dtype, jnp.number):
            return jax.typeof(value), _signature(np.asarray(value), ())
        case FunctionType() if value.__globals__.get("__name__", "").startswith("optax."):
            cells = value.__closure__ or ()
            parts = value.__defaults__, value.__kwdefaults__, value.__dict__, *cells
            known = value.__code__
        case MethodType():
            known, parts = (), (value.__func__, value.__self__)
        case functools.partial():
            known, parts = (), (value.func, value.args, value.keywords)
        case CellType():
            with contextlib.suppress(ValueError):
                return _signature(value.cell_contents, outer)
            return CellType
        case tuple() | list():
            known, parts = (), tuple(value)
        case dict():
            known, parts = (), (*value, *value.values())
        case _:
            return _Itself(value)
    inner = (*outer, id(value))
    return type(value), known, tuple(_signature(part, inner) for part in parts)


def as_part(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """A function as a part of a pytree: itself if it is a tree of its own, such as a module."""
    return Function(function) if jax.tree_util.all_leaves([function]) else function


def reference(function: Callable[..., Any]) -> ByName:
    """Module and name of a function where it is found by them; otherwise the function itself.

    Jitted functions of JAX are found so, but not by pickle.
    """
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str):
        with contextlib.suppress(ImportError, AttributeError):
            if _find(module, name) is function:
                return module, name
    return function


def referred(reference: ByName) -> Callable[..., Any]:
    """The function that has this `reference`."""
    return _find(*reference) if isinstance(reference, tuple) else reference


def _function(reference: ByName) -> Function:
    return Function(referred(reference))


def _find(module: str, name: str) -> Callable[..., Any]:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
