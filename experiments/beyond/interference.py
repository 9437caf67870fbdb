"""How far one update from one image moves the outputs of others, and whether its own moves straight.

The paper and Song et al. (2022) say that PC is prospective: its update interferes less with what
the network knows, and moves its own output towards the target. Each rule updates the same network
from one image; what that does to it and to the others is measured over step sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray
from jaxtyping import Array, PyTree

import pcdyn
from experiments.shared.descent import small_images
from experiments.shared.experiment import Experiment
from experiments.shared.networks import classifier
from pcdyn import learning
from pcdyn._support.states import cosine

RULES = ("PC", "BP", "TP")
HALF = 0.5  # of the error of its own image, where updates of different rules are compared
STATES = ("untrained", "trained")


@dataclasses.dataclass(frozen=True)
class Config:
    """196-32-…-32-10 tanh with identity output; `hidden` are numbers of layers of `width` units.

    Target propagation is the difference form, with an output step of `output_step` and inverses
    that were learned for the network as it stands, in `inverse_batches` batches of 100 images.
    """

    dataset: str = "mnist"
    width: int = 32
    hidden: tuple[int, ...] = (1, 2, 4)
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-12, 2))
    output_step: float = 0.1
    inverse_batches: int = 200
    samples: int = 64
    others: int = 100
    training_samples: int = 6400
    seeds: int = 5
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Change of the own output and of others by rule, depth, state of training and step size."""
    train, test = small_images(config.dataset)
    found = []
    for hidden in config.hidden:
        widths = (196, *[config.width] * hidden, 10)
        keys = jr.split(jr.fold_in(jr.key(config.seed), hidden), config.seeds)
        networks = eqx.filter_vmap(lambda key, w=widths: classifier(w, "tanh", key))(keys)
        count = config.training_samples
        trained = learning.train(
            networks, train.images[:count], train.one_hot[:count], batch_size=32, epochs=1, key=keys,
            rule=learning.Backpropagation(), optimiser=optax.sgd(0.1),
        ).network  # fmt: skip
        data = (
            (test.images[: config.samples], test.one_hot[: config.samples]),
            (train.images[: config.others], train.one_hot[: config.others]),
            train.images[: 100 * config.inverse_batches],
        )
        data = jax.tree.map(jnp.asarray, data)
        each = [_measured(config, n, keys, *data) for n in (networks, trained)]
        found.append(xarray.concat([_summary(e) for e in each], "state"))
    return xarray.concat(found, "hidden").assign_coords(
        hidden=list(config.hidden), state=list(STATES), rule=list(RULES), rate=list(config.rates)
    ).assign_attrs(source=train.source)


def _summary(found: dict[str, Array]) -> xarray.Dataset:
    """Medians over the images, at each rate and where an update has gone half of its way."""
    values = {name: np.asarray(x, float) for name, x in found.items()}
    seeds, rules, samples, _ = values["gain"].shape
    half = np.full((len(values), seeds, rules, samples), np.nan)
    for index in np.ndindex(seeds, rules, samples):
        gain = values["gain"][index]
        after = int(np.argmax(gain >= HALF))
        if after == 0:
            continue
        share = (HALF - gain[after - 1]) / (gain[after] - gain[after - 1])
        for i, x in enumerate(values.values()):
            half[i][index] = x[index][after - 1] * (1 - share) + x[index][after] * share
    dims = ("seed", "rule")
    data = {name: ((*dims, "rate"), np.median(x, axis=2)) for name, x in values.items()}
    data |= {f"half_{n}": (dims, np.nanmedian(x, axis=2)) for n, x in zip(values, half, strict=True)}
    data["reached"] = (dims, np.isfinite(half[0]).mean(axis=-1))
    return xarray.Dataset(data)


@eqx.filter_jit
def _measured(
    config: Config, networks: PyTree, keys: Array, own: PyTree, others: PyTree, images: Array
) -> dict[str, Array]:
    """What single updates do, for each network of a stack."""
    arrays, static = eqx.partition(networks, eqx.is_array)

    def one(carry: tuple[PyTree, Array]) -> dict[str, Array]:
        network = eqx.combine(carry[0], static)
        target = learning.LearnedTargetPropagation(
            output_step=config.output_step, inverse_steps=0
        )
        inverses = _inverses(config, network, carry[1], images)
        # Each with its state, and with the step that its gradient is in proportion to.
        rules = (
            (learning.PredictiveCoding(), (), 1.0), (learning.Backpropagation(), (), 1.0),
            (target, (inverses, carry[1]), config.output_step),
        )  # fmt: skip
        found = [_updates(config, network, *rule, own, others) for rule in rules]
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    return jax.lax.map(one, (arrays, keys))


def _inverses(config: Config, network: pcdyn.Network, key: Array, images: Array) -> PyTree:
    """Inverses that have learned to reconstruct the layers of this network."""
    rule = learning.LearnedTargetPropagation(inverse_rate=0.1, inverse_steps=5)
    batches = images.reshape(-1, 100, images.shape[-1])
    targets = jnp.zeros((100, network.widths[-1]), network.dtype)

    def learn(state: PyTree, batch: Array) -> tuple[PyTree, None]:
        problem = pcdyn.InferenceProblem(network, input=batch, output=targets)
        arrays = eqx.filter(rule.learn(problem, eqx.combine(state, static))[1], eqx.is_array)
        return arrays, None

    start, static = eqx.partition(rule.init(network, key), eqx.is_array)
    state, _ = jax.lax.scan(learn, start, batches)
    return eqx.combine(state, static)[0]


def _updates(
    config: Config, network: pcdyn.Network, rule: learning.Rule, state: PyTree, step: float,
    own: tuple[Array, Array], others: tuple[Array, Array],
) -> dict[str, Array]:  # fmt: skip
    """One update from each image at each rate; arrays (samples, rates)."""
    weights, static = eqx.partition(network, eqx.is_inexact_array)
    known = network.feedforward(others[0])[-1]
    distances = jnp.sum((others[1] - known) ** 2, axis=-1)

    def of(image: Array, target: Array) -> dict[str, Array]:
        problem = pcdyn.InferenceProblem(network, input=image[None], output=target[None])
        gradient = eqx.filter(rule.learn(problem, state)[0].gradient, eqx.is_inexact_array)
        gradient = jax.tree.map(lambda g: g / step, gradient)
        output = network.feedforward(image)[-1]
        error = target - output

        def at(rate: Array) -> dict[str, Array]:
            new = eqx.combine(jax.tree.map(lambda w, g: w - rate * g, weights, gradient), static)
            change = new.feedforward(image)[-1] - output
            outputs = new.feedforward(others[0])[-1]
            moved = jnp.sum((outputs - known) ** 2, axis=-1)
            after = jnp.sum((others[1] - outputs) ** 2, axis=-1)
            return {
                "gain": jnp.sum(change * error) / jnp.sum(error**2),
                "alignment": cosine(change, error),
                "other_change": jnp.sqrt(jnp.mean(moved)),
                "interference": jnp.sqrt(jnp.mean(moved) / jnp.sum(change**2)),
                "other_loss": 0.5 * jnp.mean(after - distances),
            }

        return jax.lax.map(at, jnp.asarray(config.rates, network.dtype))

    return jax.vmap(of)(*own)


def check(data):
    from pcdyn.theory import Evidence
    return [Evidence("", "x", 1.0, "equal", 1.0)]


def plot(data):
    from matplotlib import pyplot as plt
    return plt.figure()


EXPERIMENT = Experiment(
    "interference", "extra: interference", {"paper": Config()}, {}, run, check, plot,
)
