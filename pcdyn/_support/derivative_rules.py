"""Functions with rules of their own for derivatives, inside of loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import equinox as eqx

_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_rule_in_loops(function: _Function) -> _Function:
    """The same function, whose own rule for derivatives holds in loops as well.

    In a `lax.scan` JAX 0.9 differentiates what such a function computes in place of its rule, where
    the derivative of a gradient is taken forward. What is computed again keeps the rule.
    """
    return cast(_Function, eqx.filter_checkpoint(function))
