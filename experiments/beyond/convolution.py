"""A convolutional network that learns to tell clothing apart, by PC and by BP.

A graph whose nodes have shapes: an image, two layers of channels that are predicted by strided
convolutions, and the label. All rules start from the same weights and see the same images in the
same order, with the same optimiser; a linear network is the least that convolutions must surpass.
PC is run with equal precisions and with a low precision of the output, towards its limit of BP.
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
from experiments.shared.experiment import Experiment
from experiments.shared.measures import STATISTICS, draw_band, statistics, within
from experiments.shared.networks import available, classifier, load
from pcdyn import learning
from pcdyn.theory import Evidence

NAME = "convolutions"
PC, LOW, BP = "PC", "PC, low output precision", "BP"
RULES = {
    PC: learning.PredictiveCoding(), LOW: learning.PredictiveCoding(),
    BP: learning.Backpropagation(),
}  # fmt: skip
LINEAR = "linear network, BP"


@dataclasses.dataclass(frozen=True)
class Config:
    """Channels of the hidden nodes, each from a 5 × 5 kernel of stride 2, with tanh.

    The first of `datasets` that is there is learned. `low` is the precision of the output where it
    is not that of all others, 1.
    """

    datasets: tuple[str, ...] = ("fashion-mnist", "mnist")
    channels: tuple[int, int] = (8, 16)
    low: float = 0.01
    images: int = 30000
    test_images: int = 10000
    epochs: int = 4
    batch: int = 64
    learning_rate: float = 2e-3
    seeds: int = 3
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Accuracy on images that were not learned, before the first epoch and after each."""
    dataset, (train, test) = next(iter(available(config.datasets, load).items()))
    images, labels = train.images[: config.images], train.labels[: config.images]
    held = test.images[: config.test_images], test.one_hot[: config.test_images]
    options: dict[str, Any] = {
        "optimiser": optax.adam(config.learning_rate), "epochs": config.epochs,
        "batch_size": config.batch,
    }  # fmt: skip
    each: dict[str, list[learning.Training]] = {rule: [] for rule in (*RULES, LINEAR)}
    for key in jr.split(jr.key(config.seed), config.seeds):
        graph = drawn(config, key)
        evaluate = learning.Evaluation({"image": held[0]}, {"label": held[1]})
        for name, rule in RULES.items():
            found = learning.train(
                graph, {"image": images}, {"label": labels}, rule=rule, evaluate=evaluate,
                energy=[pcdyn.Gaussian(config.low if name == LOW and l == 3 else 1.0)
                        for l in (1, 2, 3)],
                compare=name != BP, key=key, **options,
            )  # fmt: skip
            each[name].append(found)
        linear = classifier((images.shape[1], 10, 10), "identity", key)
        evaluate = learning.Evaluation(*held)
        each[LINEAR].append(
            learning.train(
                linear, images, labels, rule=RULES[BP], evaluate=evaluate, key=key, **options
            )
        )
    by_pc = {name: [training.history for training in each[name]] for name in (PC, LOW)}
    return xarray.Dataset(
        {
            "accuracy": (
                ("rule", "seed", "epochs_done"),
                [[t.evaluations["accuracy"] for t in ts] for ts in each.values()],
            ),
            "cosine": (
                ("by", "seed", "epoch", "layer"),
                [[h["cosine"].mean(1) for h in histories] for histories in by_pc.values()],
            ),
            "residual": (
                ("by", "seed"),
                [[np.median(h["median_residual"]) for h in hs] for hs in by_pc.values()],
            ),
        },
        {"rule": list(each), "by": list(by_pc), "layer": ["edges", "parts", "label"]},
        {"dataset": dataset, "source": train.source, "images": len(images)},
    )


def drawn(config: Config, key: jax.Array) -> pcdyn.Graph:
    """The convolutional network, with the weights that equinox draws."""
    keys, (low, high) = jr.split(key, 3), config.channels
    tanh, flat = eqx.nn.Lambda(jnp.tanh), eqx.nn.Lambda(jnp.ravel)

    def convolution(inputs: int, outputs: int, key: jax.Array) -> eqx.nn.Sequential:
        layer = eqx.nn.Conv2d(inputs, outputs, 5, stride=2, dtype=jnp.float32, key=key)
        return eqx.nn.Sequential([layer, tanh])

    last = eqx.nn.Linear(16 * high, 10, dtype=jnp.float32, key=keys[2])
    return pcdyn.Graph(
        {"image": (1, 28, 28), "edges": (low, 12, 12), "parts": (high, 4, 4), "label": 10},
        [
            pcdyn.Prediction("edges", given="image", by=convolution(1, low, keys[0])),
            pcdyn.Prediction("parts", given="edges", by=convolution(low, high, keys[1])),
            pcdyn.Prediction("label", given="parts", by=eqx.nn.Sequential([flat, last])),
        ],
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """How near PC comes to BP at either precision, and that its inference is at rest."""
    last = data.accuracy.isel(epochs_done=-1)
    accuracy = {rule: last.sel(rule=rule).values for rule in data.rule.values}
    low, low_error = _mean(accuracy[LOW] - accuracy[BP])
    nearer = data.cosine.sel(by=LOW) - data.cosine.sel(by=PC)
    equal, linear = (within(*_mean(accuracy[rule] - accuracy[BP])) for rule in (PC, LINEAR))
    method: Any = learning.PredictiveCoding().method
    return [
        Evidence(
            NAME, "PC with a low precision of the output reaches the test accuracy of BP (mean "
            "difference)", low, "at least", -0.01, error=low_error,
            note=f"with equal precisions {equal}, a linear network by BP {linear}",
        ),
        Evidence(
            NAME, "a low precision of the output brings the gradients of PC nearer to those of BP, "
            "in every layer and epoch (smallest gain of the mean cosine)",
            float(nearer.mean("seed").min()), "above", 0.0,
        ),
        Evidence(
            NAME, "inference of PC is at rest (median relative residual of a batch, largest of "
            "all seeds and precisions)", float(data.residual.max()), "at most", method.tolerance,
        ),
    ]  # fmt: skip


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean over seeds and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def plot(data: xarray.Dataset) -> Figure:
    """Test accuracy by epochs, and the cosine of the gradients of PC with those of BP."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
    for rule in data.rule.values:
        runs = _summary(data.accuracy.sel(rule=rule).values)
        draw_band(data.epochs_done.values, runs, ax=axes[0], label=str(rule))
    axes[0].set(xlabel="epochs", ylabel="test accuracy", title=str(data.attrs["dataset"]))
    for ax, by in zip(axes[1:], data.by.values, strict=True):
        for layer in data.layer.values:
            runs = _summary(data.cosine.sel(by=by, layer=layer).values)
            draw_band(data.epoch.values + 1, runs, ax=ax, label=str(layer))
        ax.set(xlabel="epoch", ylim=(0, 1.02), title=str(by))
    axes[1].set_ylabel("cosine of the gradients with BP's")
    for ax in axes[:2]:
        ax.legend(fontsize=8)
    return figure


def _summary(runs: np.ndarray) -> xarray.DataArray:
    return xarray.DataArray(
        statistics(runs), dims=("x", "statistic"), coords={"statistic": list(STATISTICS)}
    )


EXPERIMENT = Experiment(
    "convolution", "extra: a convolutional network", {"paper": Config()},
    {"channels": (2, 4), "images": 128, "test_images": 128, "epochs": 6, "seeds": 2, "batch": 32},
    run, check, plot,
)  # fmt: skip
