"""Figure 2 right: a tanh network moves from the feedforward pass towards the TP targets."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import STATISTICS, draw_band, estimate, statistics
from experiments.shared.networks import gaussian_weights, network_of
from pcdyn import plotting
from pcdyn._support.states import cosine
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 tanh networks near the identity, both ends clamped, targets within the range."""

    networks: int = 2000
    width: int = 5
    weight_std: float = 0.05
    t1: float = 20.0
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Integrate from the feedforward pass and compare the hidden layer with both references."""
    keys = jr.split(jr.key(config.seed), 3)
    shape = (config.networks, config.width)
    weights = gaussian_weights(
        keys[0], networks=config.networks, layers=2, width=config.width,
        std=config.weight_std, identity=True,
    )  # fmt: skip
    inputs, outputs = 1 + jr.normal(keys[1], shape), jnp.tanh(jr.normal(keys[2], shape))
    times = np.linspace(0, config.t1, 201)

    def one(weights: jax.Array, input: jax.Array, output: jax.Array) -> tuple[jax.Array, ...]:
        problem = pcdyn.InferenceProblem(network_of(weights, "tanh"), input=input, output=output)
        trajectory = pcdyn.simulate(
            problem, t1=config.t1, times=times, integrator=pcdyn.Diffrax("tsit5", rtol=1e-8)
        )
        target = pcdyn.target_propagation(problem).values[1]
        return trajectory.activities[1], target, pcdyn.feedforward(problem)[1]

    hidden, target, prediction = (
        np.asarray(r) for r in eqx.filter_jit(jax.vmap(one))(weights, inputs, outputs)
    )
    to_feedforward, to_tp = cosine(hidden, prediction[:, None]), cosine(hidden, target[:, None])
    curve = ("time", "statistic")
    return xarray.Dataset(
        {
            "cosine_to_feedforward": (curve, statistics(to_feedforward)),
            "cosine_to_tp": (curve, statistics(to_tp)),
            "moved_feedforward": ("network", to_feedforward[:, -1] < to_feedforward[:, 0]),
            "moved_tp": ("network", to_tp[:, -1] > to_tp[:, 0]),
        },
        coords={
            "time": ("time", times, {"units": "activity time constants"}),
            "statistic": list(STATISTICS),
        },
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """Away from the feedforward pass, towards the targets, in every draw."""
    claims = []
    for panel, name, word in (("A", "feedforward", "falls"), ("B", "tp", "rises")):
        side = "below" if word == "falls" else "above"
        moved = data[f"moved_{name}"]
        first, last = (estimate(data[f"cosine_to_{name}"][i]) for i in (0, -1))
        claims += [
            Evidence(f"2 right {panel}", f"cosine to {name} {word} in every draw (share)",
                     float(moved.mean()), "equal", 1.0, note=f"of {moved.size} draws"),
            Evidence(f"2 right {panel}", f"cosine to {name} {word} (mean at the end, {side} the "
                     "start)", last[0], side, first[0], error=last[1],
                     note=f"from {first[0]:.2f}"),
        ]  # fmt: skip
    return claims


def plot(data: xarray.Dataset) -> Figure:
    """Both cosines over time."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    panels = (("A", "feedforward", "feedforward pass"), ("B", "tp", "TP targets"))
    for ax, (panel, name, text) in zip(axes, panels, strict=True):
        draw_band(data.time.values, data[f"cosine_to_{name}"], ax=ax)
        ax.set(xlabel=plotting.TIME_LABEL, ylabel="cosine similarity")
        ax.set_title(f"{panel}  hidden layer and {text} (mean, 10–90 %)")
    return figure


EXPERIMENT = Experiment(
    "figure2_nonlinear", "2 right A, 2 right B", {"paper": Config()}, {"networks": 50},
    run, check, plot,
)  # fmt: skip
