"""Random networks, and those that are trained on digits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PyTree

import pcdyn
from pcdyn.errors import DataError
from pcdyn.io.datasets import Dataset

_Read = TypeVar("_Read")


def gaussian_weights(
    key: jax.Array, *, networks: int, layers: int, width: int, std: float, identity: bool = False
) -> jax.Array:
    """Square weights N(0, std²), plus the identity if asked; (networks, layers, width, width)."""
    weights = std * jr.normal(key, (networks, layers, width, width))
    return weights + jnp.eye(width)[None, None] if identity else weights


def linear_problems(
    keys: jax.Array, *, networks: int, width: int, std: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The 5-5-5 linear problems of A.9: weights N(0, std²), inputs N(1, 1), targets N(−1, 1)."""
    weights = gaussian_weights(keys[0], networks=networks, layers=2, width=width, std=std)
    inputs, outputs = (jr.normal(key, (networks, width)) for key in keys[1:3])
    return weights, 1 + inputs, -1 + outputs


def network_of(weights: jax.Array, activation: str) -> pcdyn.Network:
    """The network with these weights, shape (layers, n, n), and one activation."""
    return pcdyn.Network([pcdyn.Dense(weight, activation=activation) for weight in weights])


def at_ratios(
    measure: Callable[[pcdyn.InferenceProblem], tuple[jax.Array, ...]],
    ratios: np.ndarray,
    networks: Sequence[jax.Array],
) -> list[np.ndarray]:
    """What is measured in `linear_problems` of precisions 1 and the ratio.

    The leading axes of each result are the ratios and the networks.
    """

    def one(
        ratio: jax.Array, weights: jax.Array, input: jax.Array, output: jax.Array
    ) -> tuple[jax.Array, ...]:
        energy = pcdyn.Gaussian([1.0, ratio])
        network = network_of(weights, "identity")
        return measure(pcdyn.InferenceProblem(network, input=input, output=output, energy=energy))

    over_networks = jax.vmap(one, in_axes=(None, 0, 0, 0))
    batched = eqx.filter_jit(jax.vmap(over_networks, in_axes=(0, None, None, None)))
    return [np.asarray(result) for result in batched(jnp.asarray(ratios), *networks)]


def in_float64(problem: pcdyn.InferenceProblem) -> pcdyn.InferenceProblem:
    """The same problem, every number of it in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, problem)


def classifier(
    widths: tuple[int, ...], activation: str, key: jax.Array, gain: float = 1.0
) -> pcdyn.Network:
    """A float32 network with identity output and biases, weights N(0, gain² / n_{l−1})."""
    network = pcdyn.mlp(
        widths, activation=activation, output_activation="identity", bias=True, key=key,
        dtype=jnp.float32,
    )  # fmt: skip
    weights = [gain * layer.weight for layer in network.layers]
    return eqx.tree_at(lambda n: [layer.weight for layer in n.layers], network, weights)


def load(name: str, lowest: float = 0.0) -> tuple[Any, Any]:
    """Training and test set of `"mnist"` or `"fashion-mnist"`, in [`lowest`, 1]."""
    read = {"mnist": pcdyn.datasets.mnist, "fashion-mnist": pcdyn.datasets.fashion_mnist}[name]
    options: dict[str, Any] = {"limits": (lowest, 1.0), "dtype": np.float32}
    return read("train", **options), read("test", **options)


def available(names: Sequence[str], read: Callable[[str], _Read]) -> dict[str, _Read]:
    """What `read` finds of data sets by their names, without those that are not there."""
    found = {}
    for name in names:
        with contextlib.suppress(DataError):
            found[name] = read(name)
    return found


def trained_classifier(
    network: pcdyn.Network, digits: Dataset, *, epochs: int, key: jax.Array
) -> pcdyn.Network:
    """The network after `epochs` of BP: squared error, batches of 64, rate .05, momentum .9."""
    images, targets = jnp.asarray(digits.images), jnp.asarray(digits.one_hot)
    weights, static = eqx.partition(network, eqx.is_array)
    optimiser, batch = optax.sgd(0.05, 0.9), 64

    def loss(weights: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        errors = eqx.combine(weights, static).feedforward(x)[-1] - y
        return 0.5 * jnp.mean(jnp.sum(errors**2, axis=-1))

    def update(carry: PyTree, rows: jax.Array) -> tuple[Any, None]:
        weights, momentum = carry
        slope = jax.grad(loss)(weights, images[rows], targets[rows])
        change, momentum = optimiser.update(slope, momentum)
        return (optax.apply_updates(weights, change), momentum), None

    shuffled = jnp.concatenate([jr.permutation(k, len(images)) for k in jr.split(key, epochs)])
    batches = shuffled[: len(shuffled) // batch * batch].reshape(-1, batch)
    start = (weights, optimiser.init(weights))
    (weights, _), _ = jax.jit(lambda c, b: jax.lax.scan(update, c, b))(start, batches)
    return eqx.combine(weights, static)
