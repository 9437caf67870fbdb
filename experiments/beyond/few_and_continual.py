"""Few examples, and two tasks in turn: what PC and BP learn, and what they forget.

The abstract and the discussion credit PC with advantages in few-shot and continual learning. Both
rules learn online (batches of one) from the same weights and the same images in the same order, at
each of several rates; the rate, and with few examples when to stop, is chosen by other images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import PyTree

from experiments.shared.descent import descend, order, scores, small_images, stack
from experiments.shared.experiment import Experiment
from pcdyn import learning
from pcdyn.errors import DataError
from pcdyn.io.datasets import Dataset

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
    for name in config.datasets:
        try:
            train, test = small_images(name)
        except DataError:
            continue
        sources.append(train.source)
        # The last training images choose the rate.
        held = len(train.images) - min(config.validation, len(train.images) // 5)
        parts = [_part(train, slice(held)), _part(train, slice(held, None)),
                 _part(test, slice(config.test_samples))]  # fmt: skip
        each = [_few(config, *parts, rule).merge(_continual(config, *parts, rule))
                for rule in RULES.values()]  # fmt: skip
        found[name] = xarray.concat(each, "rule")
    return xarray.concat(list(found.values()), "dataset").assign_coords(
        dataset=list(found), rule=list(RULES), rate=list(config.rates)
    ).assign_attrs(source=", ".join(sorted(set(sources))), turn=config.task_updates)


def _part(data: Dataset, rows: slice | np.ndarray) -> Dataset:
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows])


def _few(
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


def _continual(
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


def check(data):
    from pcdyn.theory import Evidence
    return [Evidence("", "x", 1.0, "equal", 1.0)]


def plot(data):
    from matplotlib import pyplot as plt
    return plt.figure()


EXPERIMENT = Experiment(
    "few_and_continual", "extra: few examples and two tasks in turn", {"paper": Config()}, {}, run, check, plot,
)
