"""Arithmetic of states, tuples of arrays whose last axis is a layer's units, and of such arrays.

In a batch the axis before it is the sample. Axes before that, if any, are layers of one width.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from pcdyn._support.namespaces import array_namespace
from pcdyn._support.products import matmul
from pcdyn._support.types import State, Tree, Values

_Array = TypeVar("_Array", Array, np.ndarray)


def layer_norms(state: State) -> Float[Array, "*batch layers"]:
    """The Euclidean norm of each layer, per sample."""
    return jnp.stack([jnp.linalg.norm(layer, axis=-1) for layer in state], axis=-1)


def largest_norm(state: State) -> Float[Array, "*batch"]:
    """The largest Euclidean norm of any layer, per sample."""
    squares = [_row_products(x, x) for x in state]
    each = [x if x.ndim < 2 else jnp.max(x, axis=0) for x in squares]
    return jnp.sqrt(jnp.max(jnp.stack(each), axis=0))


def dot(a: State, b: State) -> Float[Array, "*batch"]:
    """The inner product of two states, per sample."""
    products = (_row_products(x, y) for x, y in zip(a, b, strict=True))
    each = (x if x.ndim < 2 else jnp.sum(x, axis=0) for x in products)
    return functools.reduce(operator.add, each)


def _row_products(a: Values, b: Values) -> Array:
    # On a CPU one product with a vector of ones takes a quarter of the time of a product of two
    # rows for each sample.
    return matmul(a * b, jnp.ones(a.shape[-1], a.dtype))


def cosine(a: _Array, b: _Array, *, of_zero: float = math.nan) -> _Array:
    """The cosine similarity along the last axis, and `of_zero` where either vanishes."""
    xp = array_namespace(a)
    lengths = xp.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    quotients = (a * b).sum(-1) / xp.where(lengths == 0, 1, lengths)
    return xp.where(lengths == 0, of_zero, quotients)


def step(state: Tree, length: ArrayLike, direction: Tree) -> Tree:
    """state + length · direction, with one length or one per sample."""
    return jax.tree.map(jnp.add, state, scale(length, direction))


def scale(length: ArrayLike, state: Tree) -> Tree:
    """length · state, with one length or one per sample."""
    return jax.tree.map(lambda x: _per_sample(length, x) * x, state)


def choose(condition: ArrayLike, yes: Tree, no: Tree) -> Tree:
    """One of two states, or of any two trees of arrays, with one condition or one per sample."""
    return jax.tree.map(lambda a, b: jnp.where(_per_sample(condition, a), a, b), yes, no)


def _per_sample(values: ArrayLike, like: Values) -> Array:
    """`values`, one number or one per sample, so that they broadcast with an array of a state."""
    values = jnp.asarray(values)
    if values.ndim == 0 or like.ndim == values.ndim:
        return values
    return jnp.expand_dims(values, (*range(like.ndim - 2), -1))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every entry of every array is finite."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
