"""How far one update from one image moves the outputs of others, and how straight its own.

The paper and Song et al. (2022) say that PC is prospective: its update interferes less with what
the network knows, and moves its own output towards the target. Each rule updates the same network
from one image; what that does to it and to the others is measured over step sizes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray
from jaxtyping import Array, PyTree
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.descent import small_images
from experiments.shared.example import COLORS
from experiments.shared.experiment import Experiment
from experiments.shared.networks import classifier
from pcdyn import learning
from pcdyn._support.states import cosine
from pcdyn.theory import Evidence

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
            networks, train.images[:count], train.one_hot[:count], batch_size=32, epochs=1,
            key=keys, rule=learning.Backpropagation(), optimiser=optax.sgd(0.1),
        ).network  # fmt: skip
        data = (
            (test.images[: config.samples], test.one_hot[: config.samples]),
            (train.images[: config.others], train.one_hot[: config.others]),
            train.images[: 100 * config.inverse_batches],
        )
        data = jax.tree.map(jnp.asarray, data)
        each = [_measured(config, n, keys, *data) for n in (networks, trained)]
        found.append(xarray.concat([_summary(e) for e in each], "state"))
    return (
        xarray.concat(found, "hidden")
        .assign_coords(
            hidden=list(config.hidden),
            state=list(STATES),
            rule=list(RULES),
            rate=list(config.rates),
        )
        .assign_attrs(source=train.source)
    )


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
    data |= {
        f"half_{n}": (dims, np.nanmedian(x, axis=2)) for n, x in zip(values, half, strict=True)
    }
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
        target = learning.LearnedTargetPropagation(output_step=config.output_step, inverse_steps=0)
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


def check(data: xarray.Dataset) -> list[Evidence]:
    """Alignment and interference, each rule as far on its way and at the same rate."""
    aligned, moved = data.half_alignment, data.half_interference
    pc, bp, tp = (aligned.sel(rule=rule) for rule in RULES)
    per_own = moved.sel(rule="PC") / moved.sel(rule="BP")
    others = data.half_other_change
    others = others.sel(rule="PC") / others.sel(rule="BP")
    same = same_rate(data)
    return [
        Evidence(
            "introduction", "an update of PC moves its own output more nearly towards the target "
            "than one of BP (least lead in cosine)", float((pc - bp).min()), "above", 0.0,
            note=f"half way: {_range(pc)} against {_range(bp)}",
        ),
        Evidence(
            "introduction", "and on average than one of TP (mean lead in cosine)",
            float((pc - tp).mean()), "above", 0.0, note=f"TP {_range(tp)}",
        ),
        Evidence(
            "discussion", "at the same small rate an update of PC moves other outputs less than "
            "one of BP (largest ratio)", float(same.max()), "below", 1.0, note=_range(same),
        ),
        Evidence(
            "discussion", "half way to the target PC has moved other outputs less, for what it "
            "moved its own, than BP by 5 % or more (mean ratio over all networks)",
            float(per_own.mean()), "below", 0.95, expected_to_hold=False, note=_range(per_own),
        ),
        Evidence(
            "discussion", "half way to the target PC has moved other outputs less than BP (mean "
            "ratio over all networks)", float(others.mean()), "below", 1.0, note=_range(others),
        ),
    ]  # fmt: skip


def same_rate(data: xarray.Dataset) -> xarray.DataArray:
    """How far PC moves other outputs over how far BP does, at the smallest rate."""
    change = data.other_change.isel(rate=0, drop=True)
    return change.sel(rule="PC") / change.sel(rule="BP")


def _range(values: xarray.DataArray) -> str:
    return f"{float(values.min()):.3f} … {float(values.max()):.3f}"


def plot(data: xarray.Dataset) -> Figure:
    """Alignment and interference by rate in one depth, and half way by depth."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.8), layout="constrained")
    hidden = int(data.hidden[data.sizes["hidden"] // 2])
    for row, state in zip(axes, data.state.values, strict=True):
        part = data.sel(state=state)
        chosen = part.sel(hidden=hidden)
        for rule in RULES:
            one, half = chosen.sel(rule=rule), part.sel(rule=rule)
            _band(row[0], data.rate.values, one.alignment, "rate", rule)
            _band(row[1], data.rate.values, one.other_change, "rate", rule)
            _band(row[2], data.hidden.values, half.half_alignment, "hidden", rule)
            _band(row[3], data.hidden.values, half.half_interference, "hidden", rule)
        row[0].set(xscale="log", ylabel=f"{state}\ncosine of own change and T − x̂")
        row[1].set(xscale="log", yscale="log", ylabel="change of other outputs")
        row[2].set(ylabel="cosine of own change and T − x̂")
        row[3].set(ylabel="change of others / own", ylim=(0, None))
        for ax in row[:2]:
            ax.set_xlabel("learning rate")
        for ax in row[2:]:
            ax.set_xlabel("hidden layers")
            ax.set_xticks(data.hidden.values)
    axes[0, 0].legend()
    axes[0, 0].set_title(f"alignment, {hidden} hidden layers")
    axes[0, 1].set_title(f"interference, {hidden} hidden layers")
    axes[0, 2].set_title("alignment, half way to T")
    axes[0, 3].set_title("interference, half way to T")
    where = "shipped sample of MNIST" if data.attrs["source"] == "sample" else "MNIST"
    figure.suptitle(
        f"One update from one image, {where}: medians over images, median and range of "
        f"{data.sizes['seed']} networks"
    )
    return figure


def _band(ax: Axes, x: np.ndarray, values: xarray.DataArray, dim: str, rule: str) -> None:
    """Median over networks in a band from the least to the largest."""
    values = values.transpose("seed", dim)
    ax.plot(x, values.median("seed"), "o-", ms=3, color=COLORS[rule], label=rule)
    ax.fill_between(x, values.min("seed"), values.max("seed"), color=COLORS[rule], alpha=0.2, lw=0)


def page(data: xarray.Dataset, folder: Path) -> str:
    """What single updates do, in words and in a table."""
    aligned, moved, others = data.half_alignment, data.half_interference, data.half_other_change
    same = same_rate(data)
    per_own = moved.sel(rule="PC") / moved.sel(rule="BP")
    total = others.sel(rule="PC") / others.sel(rule="BP")
    names = [f"{state}, {int(h)} hidden" for state in data.state.values for h in data.hidden]
    rows = [
        f"| {name} | " + " | ".join(
            f"{float(values.sel(rule=rule).median()):.3f}"
            for values in (
                aligned.sel(state=name.split(",")[0], hidden=int(name.split()[1])),
                moved.sel(state=name.split(",")[0], hidden=int(name.split()[1])),
            )
            for rule in RULES
        ) + " |"
        for name in names
    ]  # fmt: skip
    leads = float((aligned.sel(rule="PC") - aligned.sel(rule="BP")).min()) > 0
    table = "\n".join(rows)
    return f"""# Prospective and without interference?

The paper says that the equilibrium of inference is prospective, and its discussion that updates of
PC therefore interfere less than those of BP. Here each rule updates the same network once, from one
image; x̂ is the output before and T the target. *Alignment* is the cosine of the change of that
image's output with T − x̂ (the "target alignment" of Song et al. 2022). *Interference* is how far
the outputs of other images move (root mean square), alone and over how far the own output moves.
196-32-…-32-10 tanh networks with identity output, untrained or trained by BP; TP is difference
target propagation with learned inverses. Rules are compared at the same rate and half way: at the
rate at which the own output has covered half of T − x̂. Drawn by `python -m experiments
interference`.

![Alignment and interference](figure.png)

Half way, medians over images and {data.sizes["seed"]} networks:

| | alignment PC | BP | TP | others / own PC | BP | TP |
|---|---|---|---|---|---|---|
{table}

**Prospective: {"yes" if leads else "not always"}.** PC's update points
{"more nearly to the target than BP's in every network" if leads else "to the target less in some"}
({_range(aligned.sel(rule="PC"))} against {_range(aligned.sel(rule="BP"))}), at every depth,
untrained and trained; TP lies between or near BP ({_range(aligned.sel(rule="TP"))}).

**Less interference: at the same rate, because the step is shorter.** At the same small rate PC
moves the other outputs {float(same.min()):.2f} to {float(same.max()):.2f} times as far as BP, but
it moves its own output less as well. For the same movement of the own output it moves the others
{float(per_own.min()):.3f} to {float(per_own.max()):.3f} times as far, {float(per_own.mean()):.3f}
on average: no less. What it gains half way to the target, {float(total.min()):.2f} to
{float(total.max()):.2f} ({float(total.mean()):.2f} on average), is what BP moves sideways.
"""


EXPERIMENT = Experiment(
    "interference", "extra: interference and target alignment", {"paper": Config()},
    {"hidden": (1, 2), "seeds": 2, "samples": 16, "others": 50}, run, check, plot, page=page,
)  # fmt: skip
