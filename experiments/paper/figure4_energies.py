"""Figure 4 A: during inference on MNIST the output loss falls and the residual energy rises."""

from __future__ import annotations

import dataclasses

import jax.random as jr
import numpy as np
import xarray
from matplotlib.figure import FigureBase

import pcdyn
from experiments.shared.experiment import Experiment, alone
from pcdyn import plotting
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """784-128-64-10 ReLU network with identity output, random weights, real digits in [0, 1]."""

    widths: tuple[int, ...] = (784, 128, 64, 10)
    images: int = 64
    t1: float = 10.0
    saves: int = 201
    lowest: float = 0.0
    rtol: float = 1e-4
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Clamp images and one-hot labels; integrate the flow from the feedforward pass."""
    digits = pcdyn.datasets.mnist("train", limits=(config.lowest, 1.0), dtype=np.float64)
    chosen = np.random.default_rng(config.seed).choice(
        len(digits.labels), config.images, replace=False
    )
    network = pcdyn.mlp(
        config.widths, activation="relu", output_activation="identity", key=jr.key(config.seed)
    )
    problem = pcdyn.InferenceProblem(
        network, input=digits.images[chosen], output=digits.one_hot[chosen]
    )
    times = np.linspace(0, config.t1, config.saves)
    # The flow slides along kinks of the ReLU: there an explicit method can only chatter, with
    # steps and rises of F in proportion to its tolerance, and a finer one stalls.
    trajectory = pcdyn.simulate(
        problem,
        t1=config.t1,
        times=times,
        integrator=pcdyn.Diffrax("tsit5", rtol=config.rtol, atol=0.1 * config.rtol),
    )
    steps = trajectory.accepted_steps
    assert steps is not None, "counted by diffrax"
    dims = ("time", "image")
    return xarray.Dataset(
        {
            "output_loss": (dims, trajectory.output_loss),
            "residual_energy": (dims, trajectory.residual_energy),
            "free_energy": (dims, trajectory.free_energy),
        },
        coords={"time": ("time", times, {"units": "activity time constants"})},
        attrs={
            "source": digits.source,
            "steps": int(steps),
            "fallback": trajectory.fallback,
            "allowed_rise": config.rtol * sum(config.widths[1:-1]) ** 0.5,
        },
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """ℒ falls, Ẽ rises from zero, F never rises, image by image."""
    loss, residual, free = data.output_loss, data.residual_energy, data.free_energy
    images = f"of {loss.sizes['image']} images; mean "
    return [
        Evidence(
            "4A", "output loss ℒ falls (share of images)", float((loss[-1] < loss[0]).mean()),
            "equal", 1.0,
            note=f"{images}{float(loss[0].mean()):.4f} → {float(loss[-1].mean()):.4f}",
        ),
        Evidence("4A", "residual energy Ẽ is 0 at the start", float(abs(residual[0]).max()),
                 "equal", 0.0),
        Evidence(
            "4A", "residual energy Ẽ is positive at the end (share of images)",
            float((residual[-1] > 0).mean()), "equal", 1.0,
            note=f"{images}{float(residual[-1].mean()):.4f}",
        ),
        # The solver bounds the root mean square error over units; F sees their Euclidean norm.
        Evidence("4A", "free energy F never rises (largest relative rise)",
                 float((free.diff("time") / free[0]).max()), "at most",
                 float(data.attrs["allowed_rise"]), note="rtol·√units"),
    ]  # fmt: skip


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """The three energies, mean ± std over images."""
    ax = figure.subplots()
    for name, label in (
        ("output_loss", "output loss ℒ"),
        ("residual_energy", "residual energy $\\tilde{E}$"),
        ("free_energy", "free energy $F$"),
    ):
        plotting.mean_band(data.time.values, data[name].values.T, ax=ax, label=label)
    ax.set(xlabel=plotting.TIME_LABEL, ylabel="energy per image")
    where = "shipped sample of MNIST" if data.attrs["source"] == "sample" else "MNIST"
    ax.set_title(f"A  energies during inference ({data.sizes['image']} images, {where})")
    ax.legend()


EXPERIMENT = Experiment(
    "figure4_energies", "4A", {"paper": Config()}, {"images": 8}, run, check, alone(draw, 5, 3.4),
    draw=draw,
)  # fmt: skip
