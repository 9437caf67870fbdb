"""Few examples, and two tasks in turn: what PC and BP learn, and what they forget.

The abstract and the discussion credit PC with advantages in few-shot and continual learning. Both
rules learn online (batches of one) from the same weights and the same images in the same order, at
each of several rates; the rate, and with few examples when to stop, is chosen by other images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import PyTree
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.shared.descent import descend, order, scores, small_images, stack
from experiments.shared.example import COLORS
from experiments.shared.experiment import Experiment
from experiments.shared.networks import available
from pcdyn import learning
from pcdyn.io.datasets import Dataset
from pcdyn.theory import Evidence

RULES = {"PC": learning.PredictiveCoding(), "BP": learning.Backpropagation()}
TASKS = ("five classes", "rotated")


@dataclasses.dataclass(frozen=True)
class Config:
    """196-64-32-10 tanh with identity output, squared error, plain SGD on batches of one.

    `few` examples per class are gone through again and again for `updates`. Of two tasks each gets
    `task_updates` new images, the first, the second, and both once more: classes 0–4 and 5–9, or
    images upright and rotated by 90°.
    """

    datasets: tuple[str, ...] = ("mnist", "fashion-mnist")
    widths: tuple[int, ...] = (196, 64, 32, 10)
    few: tuple[int, ...] = (1, 5, 10, 50, 200)
    updates: int = 2048
    task_updates: int = 1024
    every: int = 256
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-8, -1))
    validation: int = 1000
    test_samples: int = 2000
    seeds: int = 5
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Loss and accuracy on validation and test images, few examples and both pairs of tasks."""
    found, sources = {}, []
    for name, (train, test) in available(config.datasets, small_images).items():
        sources.append(train.source)
        # The last training images choose the rate.
        held = len(train.images) - min(config.validation, len(train.images) // 5)
        learned, chosen_by = _part(train, slice(held)), _part(train, slice(held, None))
        tested = _part(test, slice(config.test_samples))
        each = [
            learn_few(config, learned, chosen_by, tested, rule).merge(
                take_turns(config, learned, chosen_by, tested, rule)
            )
            for rule in RULES.values()
        ]
        found[name] = xarray.concat(each, "rule")
    return (
        xarray.concat(list(found.values()), "dataset")
        .assign_coords(dataset=list(found), rule=list(RULES), rate=list(config.rates))
        .assign_attrs(source=", ".join(sorted(set(sources))), turn=config.task_updates)
    )


def _part(data: Dataset, rows: slice | np.ndarray) -> Dataset:
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows])


def learn_few(
    config: Config, train: Dataset, chosen_by: Dataset, test: Dataset, rule: learning.Rule
) -> xarray.Dataset:
    """Learn from the first examples of each class in an order of each seed."""
    keys = jr.split(jr.key(config.seed), config.seeds)
    columns = []
    for count in config.few:
        rows = []
        for key in keys:
            drawn = order(jr.fold_in(key, 1), len(train.images), len(train.images))
            labels = train.labels[drawn]
            few = np.concatenate([drawn[labels == c][:count] for c in range(10)])
            rows.append(few[order(jr.fold_in(key, 2), len(few), config.updates)])
        run = _trained(config, rule, train, np.stack(rows), [chosen_by, test])
        columns.append(np.stack(list(run)))
    dims = ("few", "few_updates", "images", "measure", "rate", "seed")
    every = np.arange(config.every, config.updates + 1, config.every)
    return xarray.Dataset(
        {"few_scores": (dims, np.stack(columns))},
        {"few": list(config.few), "few_updates": every, "images": ["validation", "test"],
         "measure": ["loss", "accuracy"]},
    )  # fmt: skip


def take_turns(
    config: Config, train: Dataset, chosen_by: Dataset, test: Dataset, rule: learning.Rule
) -> xarray.Dataset:
    """Learn the first task, the second, and both once more."""
    keys = jr.split(jr.key(config.seed), config.seeds)
    found = []
    for name in TASKS:
        learned, held, tested = (_tasks(name, data) for data in (train, chosen_by, test))
        both = dataclasses.replace(
            train, images=np.concatenate([t.images for t in learned]),
            labels=np.concatenate([t.labels for t in learned]),
        )  # fmt: skip
        rows = []
        for key in keys:
            first, second = (
                order(jr.fold_in(key, 3 + i), len(t.images), 2 * config.task_updates)
                for i, t in enumerate(learned)
            )
            turns = (first.reshape(2, -1), len(learned[0].images) + second.reshape(2, -1))
            rows.append(np.stack(turns, axis=1).ravel())
        run = _trained(config, rule, both, np.stack(rows), [*held, *tested])
        found.append(np.stack(list(run)))
    values = np.stack(found)
    shape = (*values.shape[:2], 2, 2, *values.shape[3:])
    dims = ("tasks", "task_updates", "images", "task", "measure", "rate", "seed")
    every = np.arange(config.every, 4 * config.task_updates + 1, config.every)
    return xarray.Dataset(
        {"task_scores": (dims, values.reshape(shape))},
        {"tasks": list(TASKS), "task_updates": every, "task": ["first", "second"]},
    )


def _tasks(name: str, data: Dataset) -> list[Dataset]:
    """The two tasks that are made of some images."""
    if name == "five classes":
        return [_part(data, data.labels < 5), _part(data, data.labels >= 5)]
    turned = np.rot90(data.images.reshape(-1, 14, 14), axes=(1, 2)).reshape(-1, 196)
    return [data, dataclasses.replace(data, images=turned)]


def _trained(
    config: Config, rule: learning.Rule, data: Dataset, rows: np.ndarray, scored_on: list[Dataset]
) -> Iterator[np.ndarray]:
    """Train on rows (seeds, updates) of some data; scores (images, 2, rates, seeds) on the way."""
    keys = jr.split(jr.key(config.seed), config.seeds)
    rates = jnp.asarray(config.rates, jnp.float32)
    networks: PyTree = stack(config.widths, "tanh", keys, len(rates))
    targets = data.one_hot
    for start in range(0, rows.shape[1], config.every):
        chosen = rows[:, start : start + config.every, None]
        batches = jnp.asarray(data.images[chosen]), jnp.asarray(targets[chosen])
        networks = descend(rule, networks, rates, *batches)
        each = [scores(networks, jnp.asarray(d.images), jnp.asarray(d.one_hot)) for d in scored_on]
        loss = np.stack([np.asarray(e["loss"]) for e in each])
        accuracy = np.stack([np.asarray(e["accuracy"]) for e in each])
        # Of a network that diverged, so that no median passes it over.
        loss = np.nan_to_num(loss, nan=np.inf, posinf=np.inf)
        yield np.stack([loss, accuracy], axis=1)


def few_at_best(data: xarray.Dataset) -> xarray.DataArray:
    """Test scores where the median validation loss is least, over rates and numbers of updates."""
    flat = data.few_scores.stack(choice=("few_updates", "rate"), create_index=False)
    by = flat.sel(images="validation", measure="loss", drop=True).median("seed")
    return flat.sel(images="test").isel(choice=by.argmin("choice"))


def tasks_at_best(data: xarray.Dataset) -> xarray.DataArray:
    """Test accuracies at the rate whose mean validation accuracy on both tasks is highest."""
    accuracy = data.task_scores.sel(measure="accuracy", drop=True)
    by = accuracy.sel(images="validation", drop=True).mean(("task", "task_updates", "seed"))
    return accuracy.sel(images="test").sel(rate=by.idxmax("rate"))


def learned_and_lost(data: xarray.Dataset, accuracy: xarray.DataArray) -> xarray.Dataset:
    """Accuracy on the first task after its turn, and how much of it the second turn costs."""
    first, turn = accuracy.sel(task="first"), data.attrs["turn"]
    learned = first.sel(task_updates=turn).drop_vars("task_updates")
    lost = learned - first.sel(task_updates=2 * turn).drop_vars("task_updates")
    return xarray.Dataset({"learned": learned, "lost": lost})


def as_well_learned(data: xarray.Dataset) -> xarray.DataArray:
    """What PC loses over what BP does, at the rates where both have learned as much.

    That is as much as the one that learns less does at its best rate.
    """
    every = data.task_scores.sel(images="test", measure="accuracy")
    means = learned_and_lost(data, every).mean("seed")
    level = means.learned.max("rate").min("rule")
    ratios = level.copy()
    for index in np.ndindex(level.shape):
        where = dict(zip(level.dims, index, strict=True))
        lost = []
        for rule in RULES:
            row = means.isel(where).sel(rule=rule)
            rising = slice(int(row.learned.values.argmax()) + 1)
            lost.append(np.interp(level[where], row.learned[rising], row.lost[rising]))
        ratios[where] = lost[0] / lost[1]
    return ratios


def check(data: xarray.Dataset) -> list[Evidence]:
    """Few examples by their loss, two tasks by what is lost of the first and what is known."""
    few, tasks = few_at_best(data), tasks_at_best(data)
    lost, equally = learned_and_lost(data, tasks), as_well_learned(data)
    claims = []
    for name in data.dataset.values:
        losses = few.sel(dataset=name, measure="loss").median("seed")
        ratios = losses.sel(rule="PC") / losses.sel(rule="BP")
        right = 100 * few.sel(dataset=name, measure="accuracy")
        claims.append(Evidence(
            "abstract", f"with few examples of {name} PC learns more than BP, each at its own best "
            "rate and time (mean over their numbers of the ratio of losses)",
            float(ratios.mean()), "below", 1.0, expected_to_hold=False,
            note="; ".join(
                f"{int(n)} a class: {_spread(right.sel(few=n, rule='PC'))} against "
                f"{_spread(right.sel(few=n, rule='BP'))} %" for n in data.few
            ),
        ))  # fmt: skip
        for kind in data.tasks.values:
            where = {"dataset": name, "tasks": kind}
            known = 100 * tasks.sel(where).mean(("task", "task_updates"))
            pc, bp = (known.sel(rule=rule) for rule in RULES)
            claims.append(Evidence(
                "abstract", f"PC knows more than BP of two tasks in turn ({kind}, {name}), each at "
                "its own best rate, by two points or more (mean accuracy on both in time, points)",
                float((pc - bp).mean()), "at least", 2.0, expected_to_hold=False,
                note=f"{_spread(pc)} against {_spread(bp)} %",
            ))  # fmt: skip
            claims.append(Evidence(
                "abstract", f"and loses less of the first, by a tenth or more, where both have "
                f"learned it as well ({kind}, {name}; ratio)",
                float(equally.sel(where)), "at most", 0.9, expected_to_hold=False,
                note="at the best rates " + " against ".join(
                    f"{_spread(100 * lost.lost.sel(where).sel(rule=rule))} of "
                    f"{_spread(100 * lost.learned.sel(where).sel(rule=rule))} %" for rule in RULES
                ),
            ))  # fmt: skip
    return claims


def _spread(values: xarray.DataArray) -> str:
    return f"{float(values.mean()):.1f} ± {float(values.std(ddof=1)):.1f}"


def plot(data: xarray.Dataset) -> Figure:
    """Accuracy by number of examples; by time in two tasks; what is lost by what was learned."""
    names = list(data.dataset.values)
    figure, axes = plt.subplots(
        len(names), 5, figsize=(15, 3.2 * len(names)), squeeze=False, layout="constrained"
    )
    few, tasks = few_at_best(data), tasks_at_best(data)
    every = learned_and_lost(data, data.task_scores.sel(images="test", measure="accuracy"))
    for row, name in zip(axes, names, strict=True):
        for rule in RULES:
            where = {"dataset": name, "rule": rule}
            values = few.sel(where).sel(measure="accuracy")
            _band(row[0], data.few.values, values, "few", rule)
            for i, kind in enumerate(data.tasks.values):
                chosen = tasks.sel(where).sel(tasks=kind)
                for task, dashes in (("first", "-"), ("second", ":")):
                    values = chosen.sel(task=task)
                    _band(row[1 + i], data.task_updates.values, values, "task_updates", rule,
                          dashes)  # fmt: skip
                # Beyond the rate at which it learns most there is nothing to be had.
                mean = every.sel(where).sel(tasks=kind).mean("seed")
                mean = mean.isel(rate=slice(int(mean.learned.values.argmax()) + 1))
                row[3 + i].plot(100 * mean.learned, 100 * mean.lost, "o-", ms=4,
                                color=COLORS[rule], label=rule)  # fmt: skip
        row[0].set(xscale="log", xlabel="examples per class", ylabel=f"{name}\ntest accuracy (%)")
        row[0].set_xticks(data.few.values, [str(n) for n in data.few.values])
        row[0].legend()
        for i, kind in enumerate(data.tasks.values):
            row[1 + i].set(xlabel="updates", ylabel="test accuracy (%)", ylim=(0, 100),
                           title=f"{kind}: first (–), second (··)")  # fmt: skip
            for turn in range(1, 4):
                row[1 + i].axvline(turn * data.attrs["turn"], color="0.7", lw=0.8)
            row[3 + i].set(xlabel="learned of the first task (%)", ylabel="lost to the second (%)",
                           title=f"{kind}, by rate")  # fmt: skip
            row[3 + i].legend()
        row[0].set_title("few examples")
    where = "shipped sample of MNIST, " if data.attrs["source"] == "sample" else ""
    figure.suptitle(
        f"Few examples and two tasks in turn, {where}own best rates: median and range of "
        f"{data.sizes['seed']} seeds"
    )
    return figure


def _band(
    ax: Axes, x: np.ndarray, values: xarray.DataArray, dim: str, rule: str, dashes: str = "-"
) -> None:
    """Median over seeds in a band from the least to the largest, in per cent."""
    values = 100 * values.transpose("seed", dim)
    ax.plot(x, values.median("seed"), dashes, color=COLORS[rule], label=rule)
    ax.fill_between(x, values.min("seed"), values.max("seed"), color=COLORS[rule], alpha=0.15, lw=0)


def page(data: xarray.Dataset, folder: Path) -> str:
    """What is learned and forgotten, in words and in tables."""
    few, tasks = few_at_best(data), tasks_at_best(data)
    lost, equally = learned_and_lost(data, tasks), as_well_learned(data)
    losses = few.sel(measure="loss").median("seed")
    ratios = losses.sel(rule="PC") / losses.sel(rule="BP")
    known = 100 * tasks.mean(("task", "task_updates"))
    gap = (known.sel(rule="PC") - known.sel(rule="BP")).mean("seed")
    lines = [
        "# Few examples, and two tasks in turn", "",
        "The abstract and the discussion credit PC with advantages in few-shot and continual "
        "learning (Song et al. 2022). PC and BP learn one image at a time (14 × 14 pixels) from "
        "the same weights and in the same order, 196-64-32-10 tanh with identity output, plain "
        "gradient descent, inference to equilibrium. Each has its own best rate, and with few "
        "examples its own best time to stop, chosen by validation images; numbers are of test "
        f"images, mean ± std of {data.sizes['seed']} seeds. Drawn by `python -m experiments "
        "few_and_continual`.", "", "![Few examples and two tasks](figure.png)", "",
        "## Few examples", "",
        f"The median loss of PC is {float(ratios.min()):.2f} to {float(ratios.max()):.2f} times "
        f"that of BP; it is lower in {int((ratios < 1).sum())} of {ratios.size} cases.", "",
        "| data | per class | PC (%) | BP (%) | ratio of losses |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in data.dataset.values:
        for n in data.few.values:
            right = 100 * few.sel(dataset=name, few=n, measure="accuracy")
            lines.append(
                f"| {name} | {n} | {_spread(right.sel(rule='PC'))} | "
                f"{_spread(right.sel(rule='BP'))} | {float(ratios.sel(dataset=name, few=n)):.2f} |"
            )
    lines += [
        "", "## Two tasks in turn", "",
        f"Each task has {data.attrs['turn']} images in its turn, then the other, and both once "
        "more: classes 0–4 and 5–9, or upright and rotated by 90°. *Known* is the accuracy on both "
        "tasks, averaged over time, by which the rate is chosen; *learned* that on the first task "
        "after its turn, *lost* what the second turn costs of it. The last column compares what is "
        "lost at rates at which both rules have learned the first task equally well: a rule that "
        "takes shorter steps learns less and forgets less.", "",
        f"What PC knows differs from what BP knows by {float(gap.min()):+.1f} to "
        f"{float(gap.max()):+.1f} points. Where "
        f"both have learned as much, PC loses {float(equally.min()):.2f} to "
        f"{float(equally.max()):.2f} times as much as BP.", "",
        "| data | tasks | rule | rate | known | learned | lost | PC / BP, as well learned |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in data.dataset.values:
        for kind in data.tasks.values:
            for rule in RULES:
                where = {"dataset": name, "tasks": kind, "rule": rule}
                cells = (known, 100 * lost.learned, 100 * lost.lost)
                ratio = f"{float(equally.sel(dataset=name, tasks=kind)):.2f}" * (rule == "PC")
                lines.append(
                    f"| {name} | {kind} | {rule} | {float(tasks.sel(where).rate):.2g} | "
                    + " | ".join(_spread(x.sel(where)) for x in cells) + f" | {ratio} |"
                )  # fmt: skip
    return "\n".join(lines) + "\n"


EXPERIMENT = Experiment(
    "few_and_continual", "extra: few examples and two tasks in turn", {"paper": Config()},
    {
        "datasets": ("mnist",), "widths": (196, 16, 10), "few": (1, 10), "updates": 256,
        "task_updates": 128, "every": 64, "rates": tuple(2.0**k for k in (-7, -6, -5, -4)),
        "seeds": 3,
    },
    run, check, plot, page=page,
)  # fmt: skip
