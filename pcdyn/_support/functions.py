"""Functions and names that users give, as parts of values that are pickled and mapped over."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax

_Result = TypeVar("_Result")
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
