"""Plain gradient descent of many networks at once, each at a rate of its own.

`learning.train` has one optimiser for all networks and ends where one of them diverges; a map over
learning rates needs neither.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree

import pcdyn
from experiments.shared.networks import classifier, load
from pcdyn import learning
from pcdyn.io.datasets import Dataset


@eqx.filter_jit
def descend(
    rule: learning.Rule, networks: PyTree, rates: Array, inputs: Array, targets: Array
) -> PyTree:
    """`W ← W − rate · gradient`, the mean over a batch, for one batch after another.

    `networks` is a stack of shape (rates, seeds); `inputs` and `targets` are (seeds, batches,
    batch, width). A network whose weights are no longer finite is NaN from then on.
    """
    arrays, static = eqx.partition(networks, eqx.is_inexact_array)

    def one(weights: PyTree, rate: Array, inputs: Array, targets: Array) -> PyTree:
        def update(carry: PyTree, batch: tuple[Array, Array]) -> tuple[PyTree, None]:
            weights, finite = carry
            network = eqx.combine(weights, static)
            problem = pcdyn.InferenceProblem(network, input=batch[0], output=batch[1])
            gradient = eqx.filter(rule.learn(problem, ())[0].gradient, eqx.is_inexact_array)
            step = rate / len(batch[0])
            new = jax.tree.map(lambda w, g: w - step * g, weights, gradient)
            every = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]
            finite &= jnp.all(jnp.stack(every))
            # Inference in a network of NaN would go on for as long as it may; in this it rests.
            return (jax.tree.map(lambda w: jnp.where(finite, w, 0), new), finite), None

        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(weights)]))
        start = jax.tree.map(lambda w: jnp.where(finite, w, 0), weights)
        (weights, finite), _ = jax.lax.scan(update, (start, finite), (inputs, targets))
        return jax.tree.map(lambda w: jnp.where(finite, w, jnp.nan), weights)

    def all_seeds(row: tuple[PyTree, Array]) -> PyTree:
        weights, rate = row
        return jax.vmap(one, (0, None, 0, 0))(weights, rate, inputs, targets)

    # One rate after the other: what one of them needs of inference the others need not wait for.
    return eqx.combine(jax.lax.map(all_seeds, (arrays, rates)), static)


def small_images(name: str) -> tuple[Dataset, Dataset]:
    """Training and test set of `load`, each image averaged to 14 × 14 pixels."""

    def averaged(data: Dataset) -> Dataset:
        half = data.images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4), dtype=np.float32)
        return dataclasses.replace(data, images=half.reshape(-1, 196))

    train, test = load(name)
    return averaged(train), averaged(test)


def stack(widths: tuple[int, ...], activation: str, keys: Array, rates: int) -> PyTree:
    """A network for each key, the same for every rate: a stack of shape (rates, seeds)."""
    networks = eqx.filter_vmap(lambda key: classifier(widths, activation, key))(keys)
    arrays, static = eqx.partition(networks, eqx.is_array)
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (rates, *x.shape)), arrays)
    return eqx.combine(repeated, static)


def order(key: Array, samples: int, count: int) -> np.ndarray:
    """The first `count` of shuffled samples, shuffled anew after each pass."""
    passes = jr.split(key, -(-count // samples))
    return np.concatenate([jr.permutation(k, samples) for k in passes])[:count]


@eqx.filter_jit
def scores(networks: PyTree, inputs: Array, targets: Array) -> dict[str, Array]:
    """Mean loss ½‖T − x̂_L‖² and accuracy of each network of a stack (rates, seeds)."""
    arrays, static = eqx.partition(networks, eqx.is_array)
    evaluate = learning.Evaluation(inputs, targets)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
    found = jax.lax.map(lambda a: evaluate(eqx.combine(a, static)), flat)
    shape = jax.tree.leaves(arrays)[0].shape[:2]
    return {name: x.reshape(shape) for name, x in found.items()}
