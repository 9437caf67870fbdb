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
from experiments.shared.measures import largest_rise
from experiments.shared.networks import gaussian_weights, network_of
from pcdyn import plotting
from pcdyn.references import TargetPropagationPass
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 tanh networks with the input free and the output clamped to a random target."""

    networks: int = 50
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
        keys[0], networks=config.networks, layers=2, width=config.width,
        std=config.weight_std, identity=True,
    )  # fmt: skip
    targets = config.target_std * jr.normal(keys[1], (config.networks, config.width))
    starts = config.target_std * jr.normal(keys[2], (config.networks, config.width))
    times = np.concatenate([[0], np.geomspace(1e-2, config.t1, 160)])

    def one(
        weights: jax.Array, target: jax.Array, start: jax.Array
    ) -> tuple[pcdyn.Trajectory, TargetPropagationPass]:
        problem = pcdyn.InferenceProblem(network_of(weights, "tanh"), output=target)
        reference = pcdyn.target_propagation(problem)
        trajectory = pcdyn.simulate(
            problem, t1=config.t1, times=times, initial=problem.feedforward_state(input=start),
            integrator=pcdyn.Diffrax("kvaerno5", rtol=1e-10, atol=1e-12, max_steps=20_000),
        )  # fmt: skip
        return trajectory, reference

    trajectory, reference = eqx.filter_jit(jax.vmap(one))(weights, targets, starts)
    exists = np.asarray(reference.exists)
    activities = np.concatenate([np.asarray(x)[exists] for x in trajectory.activities[:2]], -1)
    wanted = np.concatenate([np.asarray(x)[exists] for x in reference.values[:2]], -1)
    return xarray.Dataset(
        {
            "activity": (("network", "time", "unit"), activities),
            "target": (("network", "unit"), wanted),
            "free_energy": (("network", "time"), np.asarray(trajectory.free_energy)[exists]),
            "status": ("network", np.asarray(trajectory.status_codes)[exists]),
        },
        coords={"time": ("time", times, {"units": "activity time constants"})},
        attrs={"rejected": int((~exists).sum()), "drawn": config.networks, "shown": config.shown},
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """The flow ends at the targets, and the free energy falls to zero without ever rising."""
    error = np.abs(data.activity[:, -1] - data.target).max("unit").values
    energy = data.free_energy.values
    return [
        Evidence(
            "1A", "activities reach the TP targets (input free; largest error)",
            float(error.max()), "below", 1e-8,
            note=f"median {np.median(error):.1e}; {data.attrs['rejected']} of "
            f"{data.attrs['drawn']} draws unreachable",
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
    "figure1_target_propagation", "1A, 1B", {"paper": Config()}, {"networks": 8},
    run, check, alone(draw, 8, 3.2), draw=draw,
)  # fmt: skip
