"""Arithmetic of states: tuples of arrays whose last axis is a layer's units.

In a batch the axis before it is the sample. Axes before that, if any, are layers of one width.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pcdyn._support.products import einsum


def layer_norms(state: tuple[Any, ...]) -> Float[Array, "*batch layers"]:
    """The Euclidean norm of each layer, per sample."""
    return jnp.stack([jnp.linalg.norm(layer, axis=-1) for layer in state], axis=-1)


def largest_norm(state: tuple[Any, ...]) -> Any:
    """The largest Euclidean norm of any layer, per sample."""
    norms = [jnp.linalg.norm(x, axis=-1) for x in state]
    each = [x if x.ndim < 2 else jnp.max(x, axis=0) for x in norms]
    return jnp.max(jnp.stack(each), axis=0)


def dot(a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
    """The inner product of two states, per sample."""
    # XLA multiplies rows faster than it sums their products.
    products = (einsum("...n,...n->...", x, y) for x, y in zip(a, b, strict=True))
    return sum(x if x.ndim < 2 else jnp.sum(x, axis=0) for x in products)


def step(state: Any, length: Any, direction: Any) -> Any:
    """state + length · direction, with one length or one per sample."""
    return jax.tree.map(jnp.add, state, scale(length, direction))


def scale(length: Any, state: Any) -> Any:
    """length · state, with one length or one per sample."""
    return jax.tree.map(lambda x: _per_sample(length, x) * x, state)


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """One of two states, or of any two trees of arrays, with one condition or one per sample."""
    return jax.tree.map(lambda a, b: jnp.where(_per_sample(condition, a), a, b), yes, no)


def _per_sample(values: Any, like: Any) -> Any:
    """`values`, one number or one per sample, so that they broadcast with an array of a state."""
    values = jnp.asarray(values)
    if values.ndim == 0 or like.ndim == values.ndim:
        return values
    return jnp.expand_dims(values, (*range(like.ndim - 2), -1))


def all_finite(tree: Any) -> Any:
    """Whether every entry of every array is finite."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
