"""Functions and names that users give, as parts of values that are pickled and mapped over."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


@jax.tree_util.register_static
class Name(str):
    """A text that is no leaf of a pytree, so that JAX takes values that hold it."""


class Function(eqx.Module):
    """A function without arrays: no leaf of a pytree, so that JAX takes values that hold it.

    Two are equal where their functions are. It pickles where its function does, and where that is
    found under its name in its module, as JAX's own are.
    """

    function: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: Any) -> Function:
        return self

    def __reduce__(self) -> Any:
        return _function, (reference(self.function),)


def as_part(function: Any) -> Any:
    """A function as a part of a pytree: itself if it is a tree of its own, such as a module."""
    is_leaf = jax.tree_util.all_leaves([function])
    return Function(function) if is_leaf and callable(function) else function


def reference(function: Any) -> Any:
    """Module and name of a function where it is found by them; otherwise the function itself.

    Jitted functions of JAX are found so, but not by pickle.
    """
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    known = isinstance(module, str) and isinstance(name, str) and _find(module, name) is function
    return (module, name) if known else function


def referred(reference: Any) -> Any:
    """Find the function that `reference` has put into words; other objects are themselves."""
    return _find(*reference) if isinstance(reference, tuple) else reference


def _function(reference: Any) -> Function:
    return Function(referred(reference))


def _find(module: str, name: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found
