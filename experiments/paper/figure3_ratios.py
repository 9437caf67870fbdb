"""Figure 3 C–F: a low precision ratio gives backpropagation, a high one target propagation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib.figure import FigureBase

import pcdyn
from experiments.shared.experiment import Experiment, alone
from experiments.shared.measures import (
    STATISTICS,
    draw_band,
    estimate,
    largest_rise,
    statistics,
    within,
)
from experiments.shared.networks import at_ratios, linear_problems
from pcdyn import plotting
from pcdyn._support.states import cosine
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 linear networks with Π_1 = 1 and Π_2 the ratio; the course in time of the first few."""

    networks: int = 20_000
    followed: int = 1000
    width: int = 5
    weight_std: float = 0.05**0.5
    low_ratio: float = 0.1
    high_ratios: tuple[float, float] = (100.0, 1000.0)
    lowest_decade: float = -5.0
    t1: float = 10.0
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Exact trajectories at three ratios, and exact equilibria over decades of low ratios."""
    keys = jr.split(jr.key(config.seed), 3)
    networks = linear_problems(
        keys, networks=config.networks, width=config.width, std=config.weight_std
    )
    followed = [each[: config.followed] for each in networks]
    times = np.concatenate([[0], np.geomspace(1e-4, config.t1, 160)])

    def follow(problem: pcdyn.InferenceProblem) -> tuple[jax.Array, ...]:
        trajectory = pcdyn.simulate(problem, t1=config.t1, times=times, integrator=pcdyn.Exact())
        hidden = trajectory.activities[1]
        return hidden, *jax.vmap(lambda x: compare(problem, x))(hidden)

    def settle(problem: pcdyn.InferenceProblem) -> tuple[jax.Array, ...]:
        hidden, start = pcdyn.linear_equilibrium(problem)[1], pcdyn.feedforward(problem)[1]
        return hidden, *compare(problem, hidden), compare(problem, start)[-1]

    shown = np.array([config.low_ratio, *config.high_ratios])
    sweep = np.logspace(config.lowest_decade, 0, 11)
    hidden, error, to_feedforward, to_tp = at_ratios(follow, shown, followed)
    rest, floor, end_to_feedforward, end_to_tp, start_to_tp = at_ratios(settle, shown, networks)
    sweep_floor = at_ratios(settle, sweep, followed)[1]
    curves, ends = ("ratio", "time", "statistic"), ("ratio", "statistic")
    return xarray.Dataset(
        {
            # One network is drawn; those of the others would fill megabytes.
            "activity": (("ratio", "time", "unit"), hidden[:, 0]),
            "equilibrium": (("ratio", "unit"), rest[:, 0]),
            "squared_error": (curves, statistics(error**2, axis=1)),
            "cosine_to_feedforward": (curves, statistics(to_feedforward, axis=1)),
            "cosine_to_tp": (curves, statistics(to_tp, axis=1)),
            "end_squared_error": (ends, statistics(floor**2, axis=1)),
            "end_cosine_to_feedforward": (ends, statistics(end_to_feedforward, axis=1)),
            "end_cosine_to_tp": (ends, statistics(end_to_tp, axis=1)),
            "start_cosine_to_tp": (ends, statistics(start_to_tp, axis=1)),
            "falls_from_tp": (ends, statistics(end_to_tp < start_to_tp, axis=1)),
            "largest_rise_of_error": ((), largest_rise(error[0] ** 2, axis=1)),
            "floor": (("sweep", "statistic"), statistics(sweep_floor, axis=1)),
        },
        coords={
            "time": ("time", times, {"units": "activity time constants"}),
            "ratio": shown, "sweep": sweep, "statistic": list(STATISTICS),
        },
        attrs={"networks": config.networks},
    )  # fmt: skip


def compare(
    problem: pcdyn.InferenceProblem, hidden: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden activities against BP, the feedforward pass and TP.

    The relative distance of the prediction error from BP's delta, and two cosines.
    """
    backpropagated = pcdyn.backpropagation(problem)
    prediction, delta = backpropagated.activities[1], backpropagated.deltas[0]
    target = pcdyn.target_propagation(problem).values[1]
    error = jnp.linalg.norm(hidden - prediction - delta) / jnp.linalg.norm(delta)
    return error, cosine(hidden, prediction), cosine(hidden, target)


def check(data: xarray.Dataset) -> list[Evidence]:
    """The floor and its order at low ratios; the cosines at high ones."""
    floor, floor_error = estimate(data.end_squared_error[0])
    means = data.floor.sel(statistic="mean")
    slope = float(np.polyfit(np.log(data.sweep[:5]), np.log(means[:5]), 1)[0])
    low, population = float(data.ratio[0]), f"{data.attrs['networks']} networks"
    approach = f"prediction errors approach BP's deltas (ratio {low:g}; "
    claims = [
        Evidence("3C", approach + "largest rise of the squared relative distance)",
                 float(data.largest_rise_of_error), "below", 1e-12),
        Evidence("3C", approach + "squared relative distance at the end, below ratio²)", floor,
                 "below", low**2, error=floor_error, note=population),
        Evidence("3C", "the unsquared distance at the end is O(ratio) (order)", slope, "equal",
                 1.0, 0.01),
    ]  # fmt: skip
    for index in (1, 2):
        ratio = f"(ratio {float(data.ratio[index]):g}; "
        fall, fall_error = estimate(data.end_cosine_to_feedforward[index])
        end, end_error = estimate(data.end_cosine_to_tp[index])
        start, start_error = estimate(data.start_cosine_to_tp[index])
        share, share_error = estimate(data.falls_from_tp[index])
        claims += [
            Evidence("3E", f"cosine to feedforward falls from 1 to about 0 {ratio}at the end)",
                     fall, "equal", 0.0, 0.1, error=fall_error, note=population),
            Evidence("3F", f"cosine to TP rises {ratio}at the end, above the start)", end, "above",
                     start, error=end_error, note=f"from {within(start, start_error)}"),
            Evidence(
                "3F", f"cosine to TP decreases, as the caption says {ratio}share of draws)", share,
                "equal", 1.0, error=share_error, expected_to_hold=False,
            ),
        ]  # fmt: skip
    return claims


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """Panels C to F."""
    axes = figure.subplots(2, 2)
    time = data.time.values[1:]
    c, d, e, f = axes.flat
    draw_band(time, data.squared_error[0, 1:], ax=c)
    c.set(xscale="log", yscale="log", ylabel=r"$\|Πε-δ\|^2/\|δ\|^2$")
    c.set_title(f"C  distance to BP, ratio {float(data.ratio[0]):g} (mean, 10–90 %)")
    for unit in range(data.sizes["unit"]):
        (line,) = d.plot(time, data.activity[1, 1:, unit])
        d.axhline(float(data.equilibrium[1, unit]), color=line.get_color(), ls="--")
    d.set(xscale="log", ylabel="hidden activity $x_1$")
    d.set_title(f"D  activities, ratio {float(data.ratio[1]):g}")
    for ax, name, title in (
        (e, "cosine_to_feedforward", "E  cosine to feedforward pass (mean, 10–90 %)"),
        (f, "cosine_to_tp", "F  cosine to TP targets (mean, 10–90 %)"),
    ):
        for index in (1, 2):
            label = f"ratio {float(data.ratio[index]):g}"
            draw_band(time, data[name][index, 1:], ax=ax, label=label)
        ax.set(xscale="log", ylabel="cosine similarity")
        ax.set_title(title)
        ax.legend()
    for ax in axes.flat:
        ax.set_xlabel(plotting.TIME_LABEL)


EXPERIMENT = Experiment(
    "figure3_ratios", "3C, 3D, 3E, 3F", {"paper": Config()}, {"networks": 400, "followed": 20},
    run, check, alone(draw, 8, 6), draw=draw,
)  # fmt: skip
