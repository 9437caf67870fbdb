"""Figure 1 A, B: with the input free, activities flow to the target propagation targets."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import xarray
from matplotlib.figure import FigureBase

import pcdyn
from experiments.shared.experiment import Experiment, alone
from experiments.shared.measures import STATISTICS, estimate, largest_rise, statistics
from experiments.shared.networks import gaussian_weights, network_of
from pcdyn import plotting
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 tanh networks with the input free and the output clamped to a random target."""

    networks: int = 50
    draws: int = 10_000
    width: int = 5
    weight_std: float = 0.2
    target_std: float = 0.3
    t1: float = 20_000.0  # the slowest mode of these networks decays at a rate of 0.002
    shown: float = 30.0
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Draw networks, reject unreachable targets, integrate the true flow from a random input."""
    keys = jr.split(jr.key(config.seed), 3)
    weights = gaussian_weights(
        keys[0], networks=config.draws, layers=2, width=config.width,
        std=config.weight_std, identity=True,
    )  # fmt: skip
    targets = config.target_std * jr.normal(keys[1], (config.draws, config.width))
    starts = config.target_std * jr.normal(keys[2], (config.draws, config.width))
    times = np.concatenate([[0], np.geomspace(1e-2, config.t1, 160)])

    def problem_of(weights: jax.Array, target: jax.Array) -> pcdyn.InferenceProblem:
        return pcdyn.InferenceProblem(network_of(weights, "tanh"), output=target)

    def simulate(weights: jax.Array, target: jax.Array, start: jax.Array) -> pcdyn.Trajectory:
        problem = problem_of(weights, target)
        return pcdyn.simulate(
            problem, t1=config.t1, times=times, initial=problem.feedforward_state(input=start),
            integrator=pcdyn.Diffrax("kvaerno5", rtol=1e-10, atol=1e-12, max_steps=20_000),
        )  # fmt: skip

    reference = eqx.filter_jit(
        jax.vmap(lambda *drawn: pcdyn.target_propagation(problem_of(*drawn)))
    )(weights, targets)
    exists = np.asarray(reference.exists)
    reached = np.flatnonzero(exists)[: config.networks]
    trajectory = eqx.filter_jit(jax.vmap(simulate))(
        jax.tree.map(lambda w: w[reached], weights), targets[reached], starts[reached]
    )
    return xarray.Dataset(
        {
            "activity": (
                ("network", "time", "unit"),
                np.concatenate(trajectory.activities[:2], -1),
            ),
            "target": (
                ("network", "unit"),
                np.concatenate([np.asarray(x)[reached] for x in reference.values[:2]], -1),
            ),
            "free_energy": (("network", "time"), np.asarray(trajectory.free_energy)),
            "status": ("network", np.asarray(trajectory.status_codes)),
            "unreachable": ("statistic", statistics(~exists)),
        },
        coords={
            "time": ("time", times, {"units": "activity time constants"}),
            "statistic": list(STATISTICS),
        },
        attrs={"shown": config.shown},
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """The flow ends at the targets, and the free energy falls to zero without ever rising."""
    error = np.abs(data.activity[:, -1] - data.target).max("unit").values
    energy = data.free_energy.values
    unreachable, share_error = estimate(data.unreachable)
    return [
        Evidence("1A", "every target can be reached (share of draws that cannot)", unreachable,
                 "equal", 0.0, error=share_error, expected_to_hold=False, note="drawn again"),
        Evidence(
            "1A", "activities reach the TP targets (input free; largest error)",
            float(error.max()), "below", 1e-8,
            note=f"median {np.median(error):.1e} of {data.sizes['network']} networks",
        ),
        Evidence("1A", "every run comes to its end (share)", float((data.status == 0).mean()),
                 "equal", 1.0),
        Evidence("1B", "free energy falls to 0 (largest at the end)", float(energy[:, -1].max()),
                 "below", 1e-16),
        Evidence("1B", "free energy never rises (largest rise)", largest_rise(energy, axis=1),
                 "at most", 1e-11, note="solver tolerance"),
    ]  # fmt: skip


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """Panel A: activities of one network; panel B: distance of each layer, all networks."""
    axes = figure.subplots(1, 2)
    width = data.sizes["unit"] // 2
    shown = data.time <= data.attrs["shown"]
    hidden = data.activity[0].isel(unit=slice(width, None))
    for unit in range(width):
        (line,) = axes[0].plot(data.time[shown], hidden[shown, unit])
        axes[0].axhline(float(data.target[0, width + unit]), color=line.get_color(), ls="--")
    axes[0].set(xlabel=plotting.TIME_LABEL, ylabel="hidden activity $x_1$")
    axes[0].set_title("A  activities and TP targets (dashed)")
    squared = (data.activity - data.target) ** 2
    for index, label in ((1, "hidden layer $x_1$"), (0, "input layer $x_0$")):
        part = squared.isel(unit=slice(index * width, (index + 1) * width)).sum("unit")
        middle = part.median("network")
        (line,) = axes[1].loglog(data.time[1:], middle[1:], label=label)
        low, high = part.quantile([0.1, 0.9], dim="network").values
        axes[1].fill_between(
            data.time[1:], low[1:], high[1:], color=line.get_color(), alpha=0.2, lw=0
        )
    axes[1].set(xlabel=plotting.TIME_LABEL, ylabel="squared distance")
    axes[1].set_title("B  distance to targets (median, 10–90 %)")
    axes[1].legend()


EXPERIMENT = Experiment(
    "figure1_target_propagation", "1A, 1B", {"paper": Config()}, {"networks": 8, "draws": 1000},
    run, check, alone(draw, 8, 3.2), draw=draw,
)  # fmt: skip
