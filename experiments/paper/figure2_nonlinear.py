"""Figure 2 right: a tanh network moves from the feedforward pass towards the TP targets."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib.figure import FigureBase

import pcdyn
from experiments.shared.experiment import Experiment, alone
from experiments.shared.networks import gaussian_weights, network_of
from pcdyn import plotting
from pcdyn._support.states import cosine
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 tanh networks near the identity, both ends clamped, targets within the range."""

    networks: int = 50
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
    dims = ("network", "time")
    return xarray.Dataset(
        {
            "cosine_to_feedforward": (dims, cosine(hidden, prediction[:, None])),
            "cosine_to_tp": (dims, cosine(hidden, target[:, None])),
        },
        coords={"time": ("time", times, {"units": "activity time constants"})},
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """Away from the feedforward pass, towards the targets, in every draw."""
    claims = []
    for panel, name, sign, start, end in (
        ("A", "feedforward", -1, 1.0, 0.77),
        ("B", "tp", 1, 0.0, 0.59),
    ):
        values = data[f"cosine_to_{name}"]
        change = sign * (values[:, -1] - values[:, 0])
        word = "falls" if sign < 0 else "rises"
        first, last = float(values[:, 0].mean()), float(values[:, -1].mean())
        error = float(values[:, -1].std(ddof=1)) / data.sizes["network"] ** 0.5
        claims += [
            Evidence(f"2 right {panel}", f"cosine to {name} {word} in every draw (share)",
                     float((change > 0).mean()), "equal", 1.0, note=f"of {change.size} draws"),
            Evidence(
                f"2 right {panel}", f"mean cosine to {name} goes {start:g} → {end:g} (at the end)",
                last, "equal", end, max(4 * error, 0.1),
                note=f"from {first:.2f}; ± {error:.2f} (s.e.); within 4 s.e. or .1",
            ),
        ]  # fmt: skip
    return claims


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """Both angles over time."""
    axes = figure.subplots(2, 1)
    panels = (("A", "feedforward", "the feedforward pass"), ("B", "tp", "the TP targets"))
    for ax, (panel, name, text) in zip(axes, panels, strict=True):
        # Round-off takes a cosine beyond 1.
        angles = np.degrees(np.arccos(np.clip(data[f"cosine_to_{name}"].values, -1, 1)))
        low, middle, high = np.quantile(angles, [0.1, 0.5, 0.9], axis=0)
        ax.plot(data.time, middle, label=f"median, {len(angles)} networks")
        ax.fill_between(data.time, low, high, alpha=0.2, lw=0, label="10–90 %")
        ax.set(xlabel=plotting.TIME_LABEL, ylabel="angle (degrees)")
        ax.set_title(f"{panel}  hidden layer to {text}")
        ax.legend()


EXPERIMENT = Experiment(
    "figure2_nonlinear", "2 right A, 2 right B", {"paper": Config(), "code": Config(t1=5.0)},
    {"networks": 8}, run, check, alone(draw, 4.5, 5), draw=draw,
)  # fmt: skip
