"""Modules of equinox as texts and arrays: the class by name, what it was made with, its arrays."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from pcdyn._support.checks import naming
from pcdyn._support.types import Values
from pcdyn.errors import DataError, InputError
from pcdyn.model.activations import Activation, get_activation, name_of

_SPATIAL = ("Conv", "ConvTranspose", "AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
_NAMES = (
    *(f"{name}{dimensions}d" for name in _SPATIAL for dimensions in (1, 2, 3)),
    "Linear", "LayerNorm", "GroupNorm", "RMSNorm", "Identity",
)  # fmt: skip
_MODULES: dict[str, Any] = {name: getattr(eqx.nn, name) for name in _NAMES}
_KNOWN = f"{', '.join(_NAMES)}, Sequential, Lambda"


def described_module(module: object, where: str) -> tuple[str, list[Values]]:
    """Describe a module by a text and its arrays, from which `module_of` makes it again.

    **Arguments:**

    - `where`: the node or layer that it predicts, for messages.

    **Raises:**

    - `InputError` for another module than those of `equinox.nn` that are known here, and one that
      is not as its class makes it.
    - `ActivationError` for a function in an `equinox.nn.Lambda` that pcdyn does not know by name.
    """
    arrays = jax.tree.leaves(eqx.filter(module, eqx.is_array))
    description = _description(module, where)
    try:
        text = json.dumps(description)
        same = eqx.tree_equal(module_of(text, lambda index, _: arrays[index]), module)
    # What does not fit is an integer of NumPy among its settings, or an array more or less.
    except (DataError, TypeError, IndexError):
        text, same = "", False
    if not same:
        raise InputError(
            f"the {type(module).__name__} that predicts {where} is not as its class makes it, so "
            "that no file can hold it"
        )
    return text, arrays


def module_of(text: str, take: Callable[[int, int], Values]) -> Any:  # noqa: ANN401
    """Make the module of a text, with its arrays from `take(index, number of axes)`.

    Raises `DataError` for a text that describes none, and for arrays of other shapes than its.
    """
    try:
        like = eqx.filter_eval_shape(lambda: _made(json.loads(text)))
    # What a class of equinox does with settings that it did not expect is its own affair.
    except Exception as error:
        raise DataError(
            f"no module is described by {text!r:.60}: {type(error).__name__}: {error}"
        ) from error
    shapes, rest = eqx.partition(like, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    wanted, tree = jax.tree.flatten(shapes)
    arrays = [take(index, len(each.shape)) for index, each in enumerate(wanted)]
    for index, (array, each) in enumerate(zip(arrays, wanted, strict=True)):
        if array.shape != each.shape:
            raise DataError(
                f"array {index} of the module has shape {array.shape}, but needs {each.shape}"
            )
    return eqx.combine(tree.unflatten(list(map(jnp.asarray, arrays))), rest)


def _description(module: object, where: str) -> dict[str, Any]:
    name = type(module).__name__
    if type(module) is eqx.nn.Sequential:
        return {"class": name, "layers": [_description(each, where) for each in module.layers]}
    if type(module) is eqx.nn.Lambda:
        what = "activation" if isinstance(module.fn, Activation) else "function"
        with naming(f"the {name} that predicts {where}"):
            return {"class": name, what: name_of(module.fn)}
    if _MODULES.get(name) is not type(module):
        raise InputError(
            f"a file holds networks of pcdyn.Dense and of modules of equinox.nn ({_KNOWN}), but "
            f"that of {where} is or has a {name}"
        )
    parameters = inspect.signature(type(module).__init__).parameters
    return {"class": name, **{p: getattr(module, p) for p in parameters if hasattr(module, p)}}


def _made(description: dict[str, Any]) -> Any:  # noqa: ANN401
    settings = {name: _as_tuples(value) for name, value in description.items() if name != "class"}
    name = description["class"]
    if name == "Sequential":
        return eqx.nn.Sequential([_made(each) for each in settings["layers"]])
    if name == "Lambda":
        known = get_activation(settings.get("activation") or settings["function"])
        return eqx.nn.Lambda(known if "activation" in settings else known.function)
    if name not in _MODULES:
        raise DataError(f"unknown class {name!r:.40}")
    if "key" in inspect.signature(_MODULES[name].__init__).parameters:
        settings["key"] = jr.key(0)
    return _MODULES[name](**settings)


def _as_tuples(value: Any) -> Any:  # noqa: ANN401
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
