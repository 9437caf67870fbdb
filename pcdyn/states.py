"""Arithmetic of states: tuples with one array per layer."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norms(state: tuple[Any, ...]) -> Float[Array, "*batch layers"]:
    """The Euclidean norm of each layer, per sample."""
    return jnp.stack([jnp.linalg.norm(layer, axis=-1) for layer in state], axis=-1)


def dot(a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
    """The inner product of two states of one sample."""
    return sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))


def step(state: Any, length: Any, direction: Any) -> Any:
    """state + length · direction."""
    return jax.tree.map(lambda x, d: x + length * d, state, direction)


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """One of two states, or of any two trees of arrays."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def all_finite(tree: Any) -> Any:
    """Whether every entry of every array is finite."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
