"""Results of loops that JAX can differentiate forwards only, with a named error for backwards."""

from __future__ import annotations

from typing import Any, NoReturn

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pcdyn.errors import IntegratorError


def forward_only(tree: Any, name: str) -> Any:
    """The same arrays; reverse-mode derivatives through them raise `IntegratorError`.

    `name` is what the message calls their maker. Nothing is added where nothing is differentiated.
    """

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x,), (dx,) = primals, tangents
        return x, _tangent.bind(dx, name=name)

    return jax.tree.map(lambda x: same(x) if eqx.is_inexact_array(x) else x, tree)


# The identity on tangents, whose transpose is where JAX asks for reverse mode.
_tangent = Primitive("pcdyn_forward_only")


def _refuse(_: Any, x: Any, *, name: str) -> NoReturn:
    raise IntegratorError(
        f"reverse-mode derivatives (jax.grad, jax.vjp, jax.jacrev) through {name} are not there: "
        "use forward mode, jax.jvp or jax.jacfwd; or pcdyn.Exact() for a linear network; or, where "
        "the end is at rest, pcdyn.equilibrium, which has both"
    )


_tangent.def_impl(lambda x, *, name: x)
_tangent.def_abstract_eval(lambda x, *, name: x)
ad.deflinear2(_tangent, _refuse)
batching.defvectorized(_tangent)
mlir.register_lowering(_tangent, lambda ctx, *args, **kw: args)
