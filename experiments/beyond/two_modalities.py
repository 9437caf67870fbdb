"""Two modalities, an image and a word, and what inference makes of one of them alone.

A common cause with a prior predicts both halves of the image and the word. Nothing is the input
here: what is there is clamped, what is missing is free and inferred with the cause.
The linear network is the maximum of the likelihood (probabilistic PCA of both side by side), whose
inference is the conditional mean of Gaussians. The tanh network, with a layer between the cause and
both modalities, is trained by predictive coding with both clamped.
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
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.beyond.generative import ProbabilisticPCA
from experiments.shared.descent import small_images
from experiments.shared.experiment import Experiment
from experiments.shared.measures import within
from pcdyn import learning
from pcdyn.theory import Evidence

NAME = "two modalities"
LINEAR, DEEP = "linear", "tanh"
# What is given, by the nodes that are clamped.
GIVEN = {
    "image": ("upper", "lower"),
    "upper half": ("upper",),
    "upper half and word": ("upper", "word"),
    "word": ("word",),
}
SIDE, CLASSES = 14, 10
HALF = SIDE**2 // 2
WIDTHS = {"upper": HALF, "lower": HALF, "word": CLASSES}
# Where each of them stands, side by side.
PARTS = {
    "upper": slice(HALF), "lower": slice(HALF, 2 * HALF), "word": slice(2 * HALF, None),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Digits of 14 × 14 pixels with their names as one-hot vectors."""

    dataset: str = "mnist"
    images: int = 4000
    test_images: int = 300
    latent: int = 30
    hidden: int = 64
    hidden_precision: float = 10.0
    epochs: int = 10
    batch: int = 100
    learning_rate: float = 3e-3
    seeds: int = 3
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Fit both kinds of networks, and infer what is missing of digits that neither has seen."""
    train, test = small_images(config.dataset)
    images, words = (x[: config.images].astype(float) for x in (train.images, train.one_hot))
    held = test.images[: config.test_images].astype(float)
    labels = test.labels[: len(held)]
    joint = np.concatenate([images, words], axis=1)
    pca = ProbabilisticPCA(joint, config.latent)
    keys = jr.split(jr.key(config.seed), config.seeds)
    graphs = [linear(pca), *(trained(config, pca, joint, key) for key in keys)]
    both, lower = np.concatenate([held, np.eye(CLASSES)[labels]], axis=1), PARTS["lower"]
    first = [np.flatnonzero(labels == digit)[0] for digit in np.unique(labels)]
    named, errors, off, made = [], [], [], []
    for given in GIVEN.values():
        wanted = conditional_means(pca, both, given)
        found = [inferred(graph, both, given) for graph in graphs]
        off.append(np.max(np.abs(found[0] - wanted)) / np.max(np.abs(wanted)))
        named.append([np.argmax(x[:, PARTS["word"]], axis=1) == labels for x in found])
        errors.append([np.mean((x - both)[:, lower] ** 2, axis=1) for x in found])
        made.append(found[1][first, : SIDE**2])
    mean = np.mean((joint.mean(0) - both)[:, lower] ** 2, axis=1)
    return xarray.Dataset(
        {
            "is_named": (("given", "network", "image"), np.array(named)),
            "error": (("given", "network", "image"), np.array(errors)),
            "mean_error": ("image", mean),
            "off_conditional_mean": ("given", off),
            "made": (("given", "digit", "pixel"), np.array(made).astype(np.float32)),
            "images": (("digit", "pixel"), held[first].astype(np.float32)),
        },
        {"given": list(GIVEN), "network": [LINEAR, *(f"{DEEP} {k}" for k in range(config.seeds))]},
        {"source": train.source, "latent": config.latent},
    )


def linear(pca: ProbabilisticPCA) -> pcdyn.Graph:
    """The cause predicts both, by the weights of the maximum of the likelihood."""
    predictions = [pcdyn.Prediction("cause", by=0.0)]
    for name, rows in PARTS.items():
        by = pcdyn.Dense(pca.weight[rows], pca.mean[rows])
        energy = pcdyn.Gaussian(1 / pca.noise)
        predictions.append(pcdyn.Prediction(name, given="cause", by=by, energy=energy))
    return pcdyn.Graph({"cause": pca.weight.shape[1], **WIDTHS}, predictions)


def trained(
    config: Config, pca: ProbabilisticPCA, joint: np.ndarray, key: jax.Array
) -> pcdyn.Graph:
    """A layer of tanh between, trained by PC with all clamped, at the noise of the linear one."""
    order, *keys = jr.split(key, 2 + len(PARTS))

    def dense(columns: int, bias: np.ndarray, key: jax.Array, name: str) -> pcdyn.Dense:
        weight = jr.normal(key, (len(bias), columns), jnp.float32) / columns**0.5
        return pcdyn.Dense(weight, bias.astype(np.float32), activation=name)

    between = dense(config.latent, np.zeros(config.hidden), keys[0], "tanh")
    own = pcdyn.Gaussian(config.hidden_precision)
    predictions = [
        pcdyn.Prediction("cause", by=np.float32(0)),
        pcdyn.Prediction("features", given="cause", by=between, energy=own),
    ]
    for (name, rows), each in zip(PARTS.items(), keys[1:], strict=True):
        by = dense(config.hidden, joint.mean(0)[rows], each, "identity")
        energy = pcdyn.Gaussian(1 / pca.noise)
        predictions.append(pcdyn.Prediction(name, given="features", by=by, energy=energy))
    nodes = {"cause": config.latent, "features": config.hidden, **WIDTHS}
    found = learning.train(
        pcdyn.Graph(nodes, predictions), None, {n: joint[:, rows] for n, rows in PARTS.items()},
        # The output is wide, where TruncatedGaussNewton is no use.
        rule=learning.PredictiveCoding("nesterov", tolerance=1e-2),
        optimiser=optax.adam(config.learning_rate), epochs=config.epochs,
        batch_size=min(config.batch, len(joint)), key=order,
    )  # fmt: skip
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, found.network
    )


def inferred(graph: pcdyn.Graph, both: np.ndarray, given: tuple[str, ...]) -> np.ndarray:
    """Images and words at the equilibrium with what is given clamped, side by side."""
    problem = pcdyn.InferenceProblem(graph, clamp={name: both[:, PARTS[name]] for name in given})
    # The one that compiles soonest for networks that are not linear, and what it leaves to others.
    method = ("nesterov", "gauss_newton", "pseudo_transient") if "features" in graph.nodes else None
    rest: Any = pcdyn.equilibrium(problem, method=method).activities
    return np.concatenate([rest[name] for name in PARTS], axis=1)


def conditional_means(
    pca: ProbabilisticPCA, both: np.ndarray, given: tuple[str, ...]
) -> np.ndarray:
    """The mean of what is missing given what is there, by the formula for Gaussians."""
    is_there = np.zeros(both.shape[1], bool)
    for name in given:
        is_there[PARTS[name]] = True
    covariance = pca.weight @ pca.weight.T + pca.noise * np.eye(len(pca.weight))
    inside = covariance[np.ix_(is_there, is_there)]
    across = covariance[np.ix_(~is_there, is_there)]
    errors = both[:, is_there] - pca.mean[is_there]
    found = both.copy()
    found[:, ~is_there] = pca.mean[~is_there] + np.linalg.solve(inside, errors.T).T @ across.T
    return found


def check(data: xarray.Dataset) -> list[Evidence]:
    """Whether inference is exact, names what it sees, and gains from the other modality."""
    found = [
        Evidence(
            NAME, "linear: what is missing is the conditional mean, whichever modality is there "
            "(largest relative difference)", float(data.off_conditional_mean.max()), "at most",
            1e-10, oracle="the formula for conditional means of Gaussians in NumPy",
        )
    ]  # fmt: skip
    chance = 1 / CLASSES
    for kind in (LINEAR, DEEP):
        here = data.sel(network=[n for n in data.network.values if n.startswith(kind)])
        right = here.is_named.sel(given="image").mean("network")
        with_word, alone = (
            here.error.sel(given=name).mean("network").values
            for name in ("upper half and word", "upper half")
        )
        ratio = float(with_word.mean() / alone.mean())
        error = float(np.std(with_word - ratio * alone) / len(alone) ** 0.5 / alone.mean())
        of_mean = data.mean_error.values
        told = within(
            float(alone.mean() / of_mean.mean()),
            float(
                np.std(alone - alone.mean() / of_mean.mean() * of_mean)
                / len(of_mean) ** 0.5
                / of_mean.mean()
            ),
        )
        found += [
            Evidence(
                NAME, f"{kind}: shown the image, inference names the digit (share of digits that "
                "were not learned)", float(right.mean()), "above", chance,
                error=float(right.std() / right.size**0.5),
            ),
            Evidence(
                NAME, f"{kind}: the word helps to complete an image of which the upper half is "
                "shown (ratio of mean squared errors of the lower half)", ratio, "below", 1.0,
                error=error, note=f"without the word {told} of the error of the mean image",
            ),
        ]  # fmt: skip
    return found


def plot(data: xarray.Dataset) -> Figure:
    """What a tanh network makes of each modality, and how well digits are named and completed."""
    figure = plt.figure(figsize=(10, 3.6), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    left, right = panels
    rows = {"image": data.images, **{
        f"{name}\ngiven": data.made.sel(given=name) for name in list(GIVEN)[1:]
    }}  # fmt: skip
    axes = left.subplots(len(rows), data.sizes["digit"], squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images.values, strict=True):
            ax.imshow(image.reshape(SIDE, SIDE), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    named, errors = right.subplots(1, 2)
    kinds = {LINEAR: "C0", DEEP: "C1"}
    for place, (kind, color) in enumerate(kinds.items()):
        here = data.sel(network=[n for n in data.network.values if n.startswith(kind)])
        for ax, values, given in (
            (named, here.is_named.mean("network"), ("upper half", "image")),
            (errors, here.error.mean("network") / data.mean_error.mean(), tuple(GIVEN)[1:]),
        ):
            mean = [float(values.sel(given=name).mean()) for name in given]
            spread = [float(values.sel(given=n).std() / values.sizes["image"] ** 0.5)
                      for n in given]  # fmt: skip
            at = np.arange(len(given)) + 0.38 * (place - 0.5)
            ax.bar(at, mean, 0.36, yerr=spread, color=color, label=kind)
            ax.set_xticks(range(len(given)), [n.replace(" and", "\nand") for n in given],
                          fontsize=8)  # fmt: skip
    named.axhline(1 / CLASSES, color="0.5", lw=0.8)
    named.set(title="digits named", ylim=(0, 1), xlabel="given")
    errors.axhline(1, color="0.5", lw=0.8)
    errors.set(title="error of the lower half\n(1: the mean image)", xlabel="given")
    named.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    "two_modalities", "extra: two modalities", {"paper": Config()},
    {"images": 400, "test_images": 100, "latent": 10, "hidden": 20, "epochs": 10, "seeds": 1},
    run, check, plot,
)  # fmt: skip
