"""Every learning rule on the same digits: what it learns, how near it is to BP, what it costs."""

from __future__ import annotations

import dataclasses
import time

import equinox as eqx
import jax.random as jr
import numpy as np
import optax
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.shared.experiment import Experiment
from experiments.shared.networks import classifier, load
from pcdyn import learning
from pcdyn.theory import Evidence

RULES = {
    "BP": learning.Backpropagation(),
    "PC": learning.PredictiveCoding(),
    "PC, 20 Euler steps": learning.EulerPredictiveCoding(),
    "PC, output precision 1/64": learning.LowPrecisionPredictiveCoding(1 / 64),
    "incremental PC": learning.IncrementalPredictiveCoding(ratio=1e-4),
    "fixed prediction": learning.FixedPrediction(),
    "Z-IL": learning.ZeroDivergence(),
    "difference TP": learning.LearnedTargetPropagation(output_step=0.1),
    "TP, learned inverses": learning.LearnedTargetPropagation(difference=False, output_step=0.1),
    "TP, exact inverses": learning.TargetPropagation(),
}
# What must be BP to round-off, and its float32 bound.
EXACT = ("fixed prediction", "Z-IL")


@dataclasses.dataclass(frozen=True)
class Config:
    """784-128-64-10 tanh with identity output, squared error averaged over the batch."""

    rules: tuple[str, ...] = tuple(RULES)
    widths: tuple[int, ...] = (784, 128, 64, 10)
    seeds: int = 3
    epochs: int = 5
    batch: int = 64
    learning_rate: float = 0.02
    momentum: float = 0.9
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Train with every rule from the same weights, in the same orders, at the same rate."""
    train, test = load("mnist")
    evaluate = learning.Evaluation(test.images, test.one_hot)
    keys = jr.split(jr.key(config.seed), config.seeds)
    networks = eqx.filter_vmap(lambda key: classifier(config.widths, "tanh", key))(keys)
    optimiser = optax.sgd(config.learning_rate, config.momentum)
    shape = (len(config.rules), config.seeds)
    accuracy = np.zeros((*shape, config.epochs + 1))
    cosine = np.zeros((*shape, len(config.widths) - 1))
    residual, seconds = np.zeros(shape), np.zeros(len(config.rules))
    for i, name in enumerate(config.rules):
        options = {
            "rule": RULES[name], "optimiser": optimiser, "batch_size": config.batch, "key": keys,
        }  # fmt: skip
        training = learning.train(
            networks, train.images, train.one_hot, epochs=config.epochs, evaluate=evaluate,
            compare=True, **options,
        )  # fmt: skip
        accuracy[i] = training.evaluations["accuracy"]
        cosine[i] = training.history["cosine"].mean((1, 2))
        residual[i] = np.median(training.history["median_residual"], axis=(1, 2))
        # Once more, without what is only looked at: the second epoch is compiled already.
        learning.train(networks, train.images, train.one_hot, epochs=1, **options)
        started = time.perf_counter()
        learning.train(networks, train.images, train.one_hot, epochs=1, **options)
        seconds[i] = time.perf_counter() - started
    return xarray.Dataset(
        {
            "accuracy": (("rule", "seed", "epochs_done"), accuracy),
            "cosine": (("rule", "seed", "layer"), cosine),
            "residual": (("rule", "seed"), residual),
            "seconds_per_epoch": ("rule", seconds),
        },
        coords={
            "rule": list(config.rules), "layer": np.arange(1, len(config.widths)),
            "learns": ("rule", [RULES[name].name for name in config.rules]),
        },
        attrs={"source": train.source},
    )  # fmt: skip


def check(data: xarray.Dataset) -> list[Evidence]:
    """Which rules are BP, and which learn as much."""
    final = 100 * data.accuracy.isel(epochs_done=-1)
    bp = final.sel(rule="BP")
    exact = data.cosine.sel(rule=[name for name in EXACT if name in data.rule.values])
    ends = ", ".join(f"{float(final.sel(rule=r).mean()):.2f} %" for r in exact.rule.values)
    claims = [
        Evidence(
            "rules", "the fixed prediction assumption and Z-IL are BP (least cosine)",
            float(exact.min()), "above", 0.99999,
            note=f"after {ends} against {float(bp.mean()):.2f} %",
        )
    ]  # fmt: skip
    for name in data.rule.values:
        if name in ("BP", *EXACT):
            continue
        mine = final.sel(rule=name)
        cosines = ", ".join(f"{float(c):.3f}" for c in data.cosine.sel(rule=name).mean("seed"))
        claims.append(Evidence(
            "rules", f"{name} learns as much as BP at the same rate (points that BP is ahead)",
            float((bp - mine).mean()), "equal", 0.0, 1.0,
            expected_to_hold=name == "PC, output precision 1/64",
            note=f"{float(mine.mean()):.2f} ± {float(mine.std(ddof=1)):.2f} against "
            f"{float(bp.mean()):.2f} ± {float(bp.std(ddof=1)):.2f} %; cosines {cosines}",
        ))  # fmt: skip
    return claims


def plot(data: xarray.Dataset) -> Figure:
    """Test error, cosines and seconds, a row for each rule."""
    names = list(data.rule.values)
    places = np.arange(len(names))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
    first, second, third = axes
    errors = 100 * (1 - data.accuracy.isel(epochs_done=-1))
    for seed in range(errors.sizes["seed"]):
        first.plot(errors.isel(seed=seed), places, "|", ms=9, color="black")
    epochs = data.sizes["epochs_done"] - 1
    first.set(xscale="log", xlabel=f"test error after {epochs} epochs (%), each seed")
    first.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    first.xaxis.set_minor_formatter(NullFormatter())
    first.axvline(float(errors.sel(rule="BP").mean()), color="0.6", lw=0.8, ls=":")
    for layer, marker in zip(data.layer.values, "osD", strict=False):
        second.plot(
            data.cosine.sel(layer=layer).mean("seed"), places, marker, mfc="none",
            ms=4 + 2 * layer, label=f"$W_{layer}$",
        )  # fmt: skip
    second.set(xlabel="cosine to BP, mean over training")
    second.legend(loc="lower center")
    bars = third.barh(places, data.seconds_per_epoch / data.seconds_per_epoch.sel(rule="BP"))
    third.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    third.set(xlabel="time of an epoch / BP's")
    first.set_yticks(places, names)
    first.set_ylim(len(names) - 0.4, -0.6)
    where = "shipped sample of MNIST" if data.attrs["source"] == "sample" else "MNIST"
    figure.suptitle(f"Learning rules on {where}, {data.sizes['seed']} seeds")
    return figure


EXPERIMENT = Experiment(
    "learning_rules", "extra: learning rules", {"paper": Config()},
    {
        "rules": ("BP", "fixed prediction", "Z-IL"), "widths": (784, 16, 10), "seeds": 2,
        "epochs": 1,
    },
    run, check, plot,
)  # fmt: skip
