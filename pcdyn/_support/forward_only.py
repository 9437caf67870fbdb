"""Values whose derivatives are known forward in time only, and those that have none."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import NoReturn

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pcdyn._support.types import Tree
from pcdyn.errors import IntegratorError

_forward_only = Primitive("pcdyn_forward_only")
_forward_only.def_impl(lambda x, **_: x)
_forward_only.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_forward_only, mlir.lower_fun(lambda x, **_: x, multiple_results=False))
batching.defvectorized(_forward_only)


def _refuse(_: object, x: object, *, name: str) -> NoReturn:
    raise IntegratorError(
        f"{name} has no derivatives in reverse mode (jax.grad, jax.vjp, jax.jacrev): take them "
        "forward, by jax.jvp or jax.jacfwd; or differentiate a linear network's flow by "
        "pcdyn.Exact(), or the end of any flow by pcdyn.equilibrium, which have both"
    )


ad.deflinear2(_forward_only, _refuse)


def _refuse_first(*_: object, name: str) -> NoReturn:
    _refuse(None, None, name=name)


# JAX transposes in the end. Some versions also let a primitive refuse where JAX linearises, before
# anything runs, but under no public name.
with contextlib.suppress(ImportError, AttributeError):
    from jax._src.interpreters.ad import primitive_linearizations

    primitive_linearizations[_forward_only] = _refuse_first


def forward_only(tree: Tree, name: str) -> Tree:
    """The same arrays, whose transposed derivatives are refused by an error that names `name`."""
    return jax.tree.map(
        lambda x: _forward_only.bind(x, name=name) if eqx.is_inexact_array(x) else x, tree
    )


def without_derivative(tree: Tree, error: Exception) -> Tree:
    """The same values, any derivative of which raises `error`."""
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(_without_derivative(arrays, error), rest)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_derivative(arrays: Tree, error: Exception) -> Tree:
    return arrays


@_without_derivative.defjvp
def _(error: Exception, primals: object, tangents: object) -> NoReturn:
    raise error
