"""Does PC learn faster per update than BP? A map over batch size and learning rate.

The discussion says so for small batches or large rates. Both rules see the same batches from the
same weights; they are compared at the same rate and each at its own best one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import PyTree
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from experiments.shared.descent import descend, order, scores, small_images, stack
from experiments.shared.example import COLORS
from experiments.shared.experiment import Experiment
from experiments.shared.networks import available
from pcdyn import learning
from pcdyn.io.datasets import Dataset
from pcdyn.theory import Evidence

RULES = {"PC": learning.PredictiveCoding(), "BP": learning.Backpropagation()}
# The loss of a network that answers every image with the frequencies of the classes.
CONSTANT = 0.45


@dataclasses.dataclass(frozen=True)
class Config:
    """196-64-32-10 tanh with identity output, squared error averaged over the batch, plain SGD.

    Every network takes `updates`, and more until it has seen `samples`; losses are recorded after
    `every` updates, and twice, four times … as many.
    """

    datasets: tuple[str, ...] = ("mnist", "fashion-mnist")
    widths: tuple[int, ...] = (196, 64, 32, 10)
    activation: str = "tanh"
    batches: tuple[int, ...] = (1, 2, 4, 8, 32, 128)
    rates: tuple[float, ...] = tuple(2.0**k for k in (-6, -5, -4, -3.5, -3, -2.5, -2, -1, 0))
    updates: int = 256
    samples: int = 8192
    every: int = 32
    test_samples: int = 2000
    seeds: int = 5
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """The loss on test images by rule, batch, rate, seed and number of updates."""
    found, sources = {}, []
    for name, (train, test) in available(config.datasets, small_images).items():
        sources.append(train.source)
        found[name] = xarray.concat(
            [
                xarray.concat([follow(config, train, test, rule, b) for b in config.batches],
                              "batch", join="outer")
                for rule in RULES.values()
            ],
            "rule", join="outer",
        )  # fmt: skip
    data = xarray.concat(list(found.values()), "dataset", join="outer")
    return data.assign_coords(
        dataset=list(found), rule=list(RULES), batch=list(config.batches), rate=list(config.rates)
    ).assign_attrs(
        source=", ".join(sorted(set(sources))), updates=config.updates, samples=config.samples
    )


def follow(
    config: Config, train: Dataset, test: Dataset, rule: learning.Rule, batch: int
) -> xarray.Dataset:
    """Train a network for each rate and seed, and record what it has learned."""
    keys = jr.split(jr.key(config.seed), config.seeds)
    rates = jnp.asarray(config.rates, jnp.float32)
    networks: PyTree = stack(config.widths, config.activation, keys, len(rates))
    last = max(config.updates, config.samples // batch)
    rows = np.stack([order(jr.fold_in(k, 1), len(train.images), last * batch) for k in keys])
    rows = rows.reshape(config.seeds, last, batch)
    tested = test.images[: config.test_samples], test.one_hot[: config.test_samples]
    records: dict[int, Any] = {}
    for start in range(0, last, config.every):
        chosen = rows[:, start : start + config.every]
        batches = jnp.asarray(train.images[chosen]), jnp.asarray(train.one_hot[chosen])
        networks = descend(rule, networks, rates, *batches)
        done = start + config.every
        if (done // config.every).bit_count() == 1:
            records[done] = scores(networks, *map(jnp.asarray, tested))
    loss, accuracy = (
        np.stack([np.asarray(r[name]) for r in records.values()]) for name in ("loss", "accuracy")
    )
    dims = ("updates", "rate", "seed")
    return xarray.Dataset(
        # Of a network that diverged, so that no median passes it over.
        {
            "loss": (dims, np.nan_to_num(loss, nan=np.inf, posinf=np.inf)),
            "accuracy": (dims, accuracy),
        },
        {"updates": list(records)},
    )


def equal(data: xarray.Dataset, what: str) -> xarray.DataArray:
    """The losses after as many `"updates"`, or as many `"samples"`, at every batch size."""
    number = data.attrs[what]
    rows: list[xarray.DataArray] = []
    for batch in data.batch.values:
        updates = number if what == "updates" else number // batch
        rows.append(data.loss.sel(batch=batch, updates=updates).drop_vars("updates"))
    return xarray.concat(rows, "batch")


def at_best(losses: xarray.DataArray) -> xarray.DataArray:
    """The losses (…, seed) at the rate of the least median, which is a coordinate `rate`."""
    return losses.sel(rate=losses.median("seed").idxmin("rate"))


def ratio(losses: xarray.DataArray) -> xarray.DataArray:
    """PC's median loss over BP's: infinite, zero or undefined where one or both diverged."""
    medians = losses.median("seed")
    return medians.sel(rule="PC", drop=True) / medians.sel(rule="BP", drop=True)


def learns(losses: xarray.DataArray) -> xarray.DataArray:
    """Whether the median network is better than one that answers every image alike."""
    return losses.median("seed") < CONSTANT


def both_learn(losses: xarray.DataArray) -> xarray.DataArray:
    """PC's loss over BP's at the same rate where both learn, undefined elsewhere."""
    return ratio(losses).where(learns(losses).all("rule"))


def largest_rate(losses: xarray.DataArray) -> xarray.DataArray:
    """The largest rate at which a rule learns."""
    return losses.rate.where(learns(losses)).max("rate")


def at_edge(part: xarray.Dataset) -> xarray.DataArray:
    """PC's loss over BP's after equal samples, at the smallest batch and BP's largest rate."""
    losses = equal(part, "samples").isel(batch=0)
    return ratio(losses).sel(rate=largest_rate(losses).sel(rule="BP", drop=True))


def check(data: xarray.Dataset) -> list[Evidence]:
    """Where PC is ahead: at the same rate, and each rule at its own best."""
    claims = []
    for name in data.dataset.values:
        part = data.sel(dataset=name)
        for what in ("updates", "samples"):
            losses = equal(part, what)
            after = f"after {data.attrs[what]} {what}"
            best = at_best(losses)
            own = ratio(best)
            claims.append(Evidence(
                "discussion",
                f"each at its own best rate PC is ahead of BP on {name} {after}, at some batch "
                "size (least ratio of losses)", float(own.min()), "below", 1.0,
                expected_to_hold=False, note=_own(best),
            ))  # fmt: skip
            same = both_learn(losses)
            ahead, count = int((same < 1).sum()), int(same.count())
            claims.append(Evidence(
                "discussion",
                f"at the same batch and rate PC is ahead of BP on {name} {after}, wherever both "
                "learn, more often than not (share)", ahead / max(count, 1), "above", 0.5,
                expected_to_hold=False,
                note=f"{ahead} of {count}; at the smallest batch {int((same[0] < 1).sum())} of "
                f"{int(same[0].count())}",
            ))  # fmt: skip
        edge = at_edge(part)
        # Which is ahead here is not the same for all networks and data: no verdict.
        claims.append(Evidence(
            "discussion", f"PC's loss over BP's on {name} after {data.attrs['samples']} samples, "
            "at the smallest batch and the largest rate at which BP learns", float(edge), "below",
            np.inf, note=f"rate {_rate(edge.rate)}",
        ))  # fmt: skip
        largest = largest_rate(equal(part, "samples"))
        wider = largest.sel(rule="PC") / largest.sel(rule="BP")
        claims.append(Evidence(
            "discussion", f"PC learns {name} at larger rates than BP, at every batch size (least "
            "ratio of the largest rates)", float(wider.min()), "above", 1.0,
            note="; ".join(f"batch {int(b)}: {_rate(largest.sel(rule='PC', batch=b))} against "
                           f"{_rate(largest.sel(rule='BP', batch=b))}" for b in data.batch),
        ))  # fmt: skip
        seen = online(part).isel(updates=-1)
        pc, bp = (100 * seen.accuracy.sel(rule=rule) for rule in RULES)
        claims.append(Evidence(
            "abstract", f"online, in one pass over {data.attrs['samples']} images of {name}, PC "
            "learns more than BP, each at its own best rate (ratio of losses)",
            float(ratio(seen.loss)), "below", 1.0, expected_to_hold=False,
            note=f"accuracy {_spread(pc)} against {_spread(bp)} %",
        ))  # fmt: skip
    return claims


def online(part: xarray.Dataset) -> xarray.Dataset:
    """Learning from one image after another, each rule at the rate that is best at the end."""
    rows = part.isel(batch=0).sel(updates=part.updates <= part.attrs["samples"] // part.batch[0])
    return rows.sel(rate=rows.loss.isel(updates=-1, drop=True).median("seed").idxmin("rate"))


def _own(best: xarray.DataArray) -> str:
    """Medians with rates, by batch size."""
    return "; ".join(
        f"batch {int(b)}: "
        + " against ".join(
            f"{float(row.median()):.3f} (rate {_rate(row.rate)})"
            for row in (best.sel(batch=b, rule=rule) for rule in RULES)
        )
        for b in best.batch
    )


def _spread(values: xarray.DataArray) -> str:
    return f"{float(values.mean()):.2f} ± {float(values.std(ddof=1)):.2f}"


def _rate(value: xarray.DataArray | float) -> str:
    return f"{float(value):.2g}"


def plot(data: xarray.Dataset) -> Figure:
    """Two maps of the ratio of losses, and both rules at their best rates; a row a data set."""
    names = list(data.dataset.values)
    figure, axes = plt.subplots(
        len(names), 4, figsize=(14, 3.4 * len(names)), squeeze=False, layout="constrained"
    )
    for row, name in zip(axes, names, strict=True):
        part = data.sel(dataset=name)
        _map(row[0], equal(part, "updates"))
        image = _map(row[1], equal(part, "samples"))
        for ax, what in zip(row, ("updates", "samples"), strict=False):
            ax.set_title(f"{name}, after {data.attrs[what]} {what}")
        figure.colorbar(image, ax=row[1], label="log₁₀ of PC's loss / BP's", extend="both")
        best = at_best(equal(part, "updates"))
        for rule in RULES:
            chosen = best.sel(rule=rule)
            _band(row[2], data.batch.values, chosen, "batch", rule)
            chosen = online(part).sel(rule=rule).loss
            label = f"{rule}, rate {_rate(chosen.rate)}"
            _band(row[3], chosen.updates.values, chosen, "updates", rule, label)
        row[2].set(xlabel="batch size", ylabel="test loss",
                   title=f"own best rate, {data.attrs['updates']} updates")  # fmt: skip
        row[2].set_xticks(data.batch.values, [str(b) for b in data.batch.values])
        row[3].set(xlabel="images seen, one by one", ylabel="test loss",
                   title="online, one pass, own best rate")  # fmt: skip
    key = [
        *(Line2D([], [], marker=m, ls="", color=COLORS[r], mec="w", label=f"{r}'s best rate")
          for r, m in (("PC", "s"), ("BP", "o"))),
        Patch(fc="#003c30", ec="w", hatch="///", label="only PC learns"),
        Patch(fc="w", ec="0.3", hatch="...", label="only BP learns"),
        Patch(fc="0.85", ec="0.3", hatch="///...", label="neither"),
    ]  # fmt: skip
    figure.legend(handles=key, loc="outside lower center", ncols=5)
    where = "shipped sample of MNIST" if data.attrs["source"] == "sample" else "14 × 14 pixels"
    figure.suptitle(
        f"PC and BP by batch size and rate, {where}: median and range of {data.sizes['seed']} seeds"
    )
    return figure


def _map(ax: Axes, losses: xarray.DataArray) -> AxesImage:
    """The ratio of losses as colour, what does not learn as hatches, best rates as markers."""
    learn = learns(losses).transpose("rule", "batch", "rate")
    shown = ratio(losses).where(learn.any("rule")).transpose("batch", "rate").clip(0.1, 10)
    image = ax.imshow(
        np.log10(shown.values), cmap="BrBG_r", vmin=-0.3, vmax=0.3, origin="lower", aspect="auto"
    )
    ax.set_facecolor("0.85")
    for rule, hatch in (("BP", "///"), ("PC", "...")):
        for i, j in np.argwhere(~learn.sel(rule=rule).values):
            dark = bool(learn[:, i, j].any()) and rule == "BP"
            ax.add_patch(Rectangle(
                (j - 0.5, i - 0.5), 1, 1, fill=False, hatch=hatch, lw=0, ec="w" if dark else "0.3"
            ))  # fmt: skip
    for rule, marker, offset in (("PC", "s", 0.15), ("BP", "o", -0.15)):
        best = losses.sel(rule=rule).median("seed").argmin("rate")
        ax.plot(best + offset, np.arange(len(best)), marker, color=COLORS[rule], mec="w")
    ax.set_xticks(range(losses.sizes["rate"]), [_rate(r) for r in losses.rate], rotation=60)
    ax.set_yticks(range(losses.sizes["batch"]), [str(int(b)) for b in losses.batch])
    ax.set(xlabel="learning rate", ylabel="batch size")
    ax.grid(False)
    return image


def _band(
    ax: Axes, x: np.ndarray, values: xarray.DataArray, dim: str, rule: str, label: str | None = None
) -> None:
    """Median over seeds in a band from the least to the largest."""
    ax.plot(x, values.median("seed"), "o-", ms=3, color=COLORS[rule], label=label or rule)
    low, high = values.min("seed").transpose(dim), values.max("seed").transpose(dim)
    ax.fill_between(x, low, high, color=COLORS[rule], alpha=0.2, lw=0)
    ax.set(xscale="log", yscale="log")
    ax.legend()


def page(data: xarray.Dataset, folder: Path) -> str:
    """What the maps say, in words and in a table."""
    lines = [
        "# Does PC learn faster per update than BP?", "",
        "The discussion reports that PC may learn faster per weight update, but only with small "
        "minibatches or large learning rates. Both rules learn the same images (averaged to 14 × "
        "14 pixels) in the same order from the same weights, 196-64-32-10 tanh with identity "
        "output, by plain gradient descent on the squared error, inference to equilibrium. Losses "
        f"are medians over {data.sizes['seed']} seeds on test images; an answer that is the same "
        f"for every image has {CONSTANT}. Drawn by `python -m experiments small_batches`.", "",
        "![Maps over batch size and rate](figure.png)", "",
    ]  # fmt: skip
    for name in data.dataset.values:
        part = data.sel(dataset=name)
        losses = {what: equal(part, what) for what in ("updates", "samples")}
        lines += [f"## {name}", "", *_sentences(part, losses), ""]
        for what, values in losses.items():
            best, wide = at_best(values), largest_rate(values)
            lines += [
                f"Each at its own best rate, after {data.attrs[what]} {what} (PC / BP: range of "
                "the ratio over seeds; last column: the largest rate at which each learns at all):",
                "", "| batch | PC (rate) | BP (rate) | PC / BP | learns up to |",
                "|---|---|---|---|---|",
            ]  # fmt: skip
            for b in data.batch.values:
                pc, bp = (best.sel(batch=b, rule=rule) for rule in RULES)
                quotient = pc.values / bp.values
                lines.append(
                    f"| {b} | {float(pc.median()):.3f} ({_rate(pc.rate)}) | "
                    f"{float(bp.median()):.3f} ({_rate(bp.rate)}) | "
                    f"{quotient.min():.2f} … {quotient.max():.2f} | "
                    f"{_largest(wide, b, 'PC')}, {_largest(wide, b, 'BP')} |"
                )
            lines.append("")
    lines += [
        "**Why.** PC's output error after inference is that of the feedforward pass divided by S, "
        "the spread of outputs that the hidden layers allow (in linear networks exactly S⁻¹). Its "
        "update is therefore shorter than BP's at the same rate, the more so the larger the "
        "weights: like an implicit gradient step it does not diverge where BP does, and pays for "
        "that with less progress where BP is stable.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _largest(wide: xarray.DataArray, batch: int, rule: str) -> str:
    rate = float(wide.sel(batch=batch, rule=rule))
    return _rate(rate) if np.isfinite(rate) else "none"


def _sentences(part: xarray.Dataset, losses: dict[str, xarray.DataArray]) -> list[str]:
    """The findings on one data set."""
    own = {what: ratio(at_best(values)) for what, values in losses.items()}
    same = {what: both_learn(values) for what, values in losses.items()}
    ahead = {what: int((values < 1).sum()) for what, values in same.items()}
    counts = {what: int(values.count()) for what, values in same.items()}
    edge, learn = at_edge(part), learns(losses["samples"])
    alone = int((learn.sel(rule="PC") & ~learn.sel(rule="BP")).sum())
    pc, bp = (100 * online(part).accuracy.isel(updates=-1).sel(rule=rule) for rule in RULES)
    return [
        f"**At the same rate** where both learn, PC is ahead in {ahead['updates']} of "
        f"{counts['updates']} pairs of batch and rate after equal updates and in "
        f"{ahead['samples']} of {counts['samples']} after equal samples (least ratios "
        f"{float(same['updates'].min()):.2f} and {float(same['samples'].min()):.2f}). In {alone} "
        "more, all of large rates, PC learns and BP does not. At the smallest batch and the "
        f"largest rate at which BP learns ({_rate(edge.rate)}), PC's loss after equal samples is "
        f"{float(edge):.2f} times BP's.", "",
        f"**Each at its own best rate** PC's loss is {float(own['updates'].min()):.2f} to "
        f"{float(own['updates'].max()):.2f} times BP's after equal updates, "
        f"{float(own['samples'].min()):.2f} to {float(own['samples'].max()):.2f} times after equal "
        f"samples; at the smallest batch {float(own['samples'][0]):.2f}, at the largest "
        f"{float(own['samples'][-1]):.2f}.", "",
        f"**Online**, one image at a time and one pass, PC classifies {_spread(pc)} % of the test "
        f"images, BP {_spread(bp)} %.",
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "small_batches", "extra: small batches and large rates", {"paper": Config()},
    {
        "datasets": ("mnist",), "widths": (196, 16, 10), "batches": (1, 32), "samples": 2048,
        "updates": 256, "seeds": 2, "rates": tuple(2.0**k for k in (-6, -4, -3, -2)),
    },
    run, check, plot, page=page,
)  # fmt: skip
