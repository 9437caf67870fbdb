"""A recurrent layer: inference with lateral predictions against the recurrent network itself.

Units predict one another through `x ≈ f(u + s J x)`, with a drive u that is clamped. The recurrent
network `ẋ = −x + f(u + s J x)` loses its stability at some strength s of the loop; inference on
`F = ½‖x − f(u + s J x)‖²` goes to the same fixed points, down a function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import STATISTICS, draw_band, statistics
from pcdyn.references.linear import spectrum
from pcdyn.theory import Evidence

NAME = "recurrent layer"
KINDS = ("symmetric", "random")


@dataclasses.dataclass(frozen=True)
class Config:
    """Random connections J, scaled so that the largest real part of an eigenvalue is 1."""

    units: int = 20
    draws: int = 40
    strengths: tuple[float, ...] = (
        0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0, 1.01, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0
    )  # fmt: skip
    beyond: float = 1.5
    t1: float = 10_000.0
    tanh_units: int = 6
    tanh_draws: int = 20
    tanh_strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    starts: int = 60
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Rates against the strength of the loop, a run beyond it, and the equilibria of tanh."""
    draw = np.random.default_rng(config.seed)
    rates, oracle, growth = [], [], []
    for kind in KINDS:
        loops = [connections(draw, kind, config.units) for _ in range(config.draws)]
        strengths = config.strengths
        found = [[np.asarray(spectrum(problem_of(s * j))) for j in loops] for s in strengths]
        rates.append([[each[[0, -1]] for each in row] for row in found])
        values = [[np.linalg.svd(np.eye(len(j)) - s * j, compute_uv=False) ** 2 for j in loops]
                  for s in strengths]  # fmt: skip
        away = [[np.max(np.abs(a - b[::-1])) / b[0] for a, b in zip(*rows, strict=True)]
                for rows in zip(found, values, strict=True)]  # fmt: skip
        oracle.append(away)
        growth.append([[s * np.linalg.eigvals(j).real.max() - 1 for j in loops] for s in strengths])
    times, inference, recurrent, ends = beyond(config, draw)
    counts, energies = tanh_equilibria(config, draw)
    return xarray.Dataset(
        {
            "rate": (("kind", "strength", "draw", "end"), rates),
            "off_numpy": (("kind", "strength", "draw"), oracle),
            "growth": (("kind", "strength", "draw"), growth),
            "inference_distance": (("kind", "time"), inference),
            "recurrent_distance": (("kind", "time"), recurrent),
            "end_distance": ("kind", ends),
            "equilibria": (("tanh_strength", "tanh_draw"), counts),
            "largest_energy": (("tanh_strength", "tanh_draw"), energies),
        },
        coords={"kind": list(KINDS), "strength": list(config.strengths), "time": times,
                "end": ["slowest", "fastest"], "tanh_strength": list(config.tanh_strengths)},
        attrs={"source": "random numbers", "beyond": config.beyond, "units": config.units,
               "tanh_units": config.tanh_units, "starts": config.starts},
    )  # fmt: skip


def connections(draw: np.random.Generator, kind: str, units: int) -> np.ndarray:
    """J, whose largest real part of an eigenvalue is 1."""
    matrix = draw.normal(size=(units, units))
    matrix = matrix + matrix.T if kind == "symmetric" else matrix
    return matrix / np.linalg.eigvals(matrix).real.max()


def problem_of(
    loop: np.ndarray, drive: np.ndarray | None = None, activation: str = "identity"
) -> pcdyn.InferenceProblem:
    """A layer that is predicted from a clamped drive and from itself."""
    units = len(loop)
    by = pcdyn.Dense([np.eye(units), loop], activation=activation)
    graph = pcdyn.Graph(
        {"drive": units, "rate": units},
        [pcdyn.Prediction("rate", given=("drive", "rate"), by=by)],
    )
    return pcdyn.InferenceProblem(
        graph, clamp={"drive": np.zeros(units) if drive is None else drive}
    )


def beyond(
    config: Config, draw: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[float]]:
    """From zero, beyond the strength at which the recurrent network is stable: both flows.

    Distances from their common fixed point, relative to its size; the last is that of the
    equilibrium that is found.
    """
    times = np.concatenate([[0.0], np.geomspace(0.05, config.t1, 60)])
    times[-1] = config.t1
    inference, recurrent, ends = [], [], []
    for kind in KINDS:
        loop = config.beyond * connections(draw, kind, config.units)
        drive = draw.normal(size=config.units)
        fixed = np.linalg.solve(np.eye(config.units) - loop, drive)
        problem = problem_of(loop, drive)
        run = pcdyn.simulate(
            problem, t1=config.t1, times=times, initial="zeros", integrator="exact"
        )
        rates = np.asarray(run.activities[1])
        inference.append(np.linalg.norm(rates - fixed, axis=1) / np.linalg.norm(fixed))
        # x(t) − x* = e^{(sJ − 1) t} (0 − x*).
        values, vectors = np.linalg.eig(loop - np.eye(config.units))
        start = np.linalg.solve(vectors, -fixed)
        # Beyond 1e12 nothing is left to see.
        powers: Any = np.outer(times, values)
        grown = np.exp(np.minimum(powers.real, 40) + 1j * powers.imag)
        away = np.linalg.norm((grown * start) @ vectors.T, axis=1) / np.linalg.norm(fixed)
        recurrent.append(np.where(away < 1e6, away, np.nan))
        rest = np.asarray(pcdyn.linear_equilibrium(problem)[1])
        ends.append(float(np.linalg.norm(rest - fixed) / np.linalg.norm(fixed)))
    return times, inference, recurrent, ends


def tanh_equilibria(config: Config, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How many stable equilibria random starts find, and the largest free energy of one."""
    shape = (len(config.tanh_strengths), config.tanh_draws)
    counts, energies = np.zeros(shape), np.zeros(shape)
    for column in range(config.tanh_draws):
        loop = connections(draw, "symmetric", config.tanh_units)
        drive = 0.1 * draw.normal(size=config.tanh_units)
        starts = jnp.asarray(draw.uniform(-1.5, 1.5, (config.starts, config.tanh_units)))
        for row, strength in enumerate(config.tanh_strengths):
            problem = problem_of(strength * loop, drive, "tanh")
            found = pcdyn.multiple_equilibria(problem, [starts])
            stable = np.asarray(found.stable)
            counts[row, column] = stable.sum()
            energies[row, column] = np.max(np.asarray(found.free_energy)[stable], initial=0.0)
    return counts, energies


def check(data: xarray.Dataset) -> list[Evidence]:
    """Rates, stability at any strength, where inference ends beyond, and what tanh adds."""
    symmetric = data.sel(kind="symmetric")
    one = symmetric.rate.sel(strength=1.0, end="slowest")
    near = symmetric.sel(strength=[0.9, 0.99]).rate.sel(end="slowest").mean("draw")
    tanh = data.equilibria
    return [
        Evidence(
            NAME, "the rates of inference are the squared singular values of 1 − sJ (largest "
            "difference, relative to the fastest)", float(data.off_numpy.max()), "at most", 1e-12,
            oracle="singular values in NumPy",
        ),
        Evidence(
            NAME, "inference is stable at every strength of the loop (smallest rate)",
            float(data.rate.min()), "at least", -1e-12,
        ),
        Evidence(
            NAME, "the recurrent network is not, beyond a strength of 1 (share of draws in which "
            "it grows)", float((data.growth.where(data.strength > 1) > 0).sum()
                               / (data.growth.where(data.strength > 1).notnull()).sum()),
            "equal", 1.0,
        ),
        Evidence(
            NAME, "symmetric loops: at a strength of 1 one direction is flat (largest slowest "
            "rate)", float(one.max()), "at most", 1e-12,
        ),
        Evidence(
            NAME, "symmetric loops: the slowest rate falls as (1 − s)², that of the recurrent "
            "network as 1 − s (relative difference of the ratio at .9 and .99 from 100)",
            abs(float(near[0] / near[1]) / 100 - 1), "at most", 1e-6,
        ),
        Evidence(
            NAME, f"at a strength of {data.attrs['beyond']:g} inference ends at the fixed point "
            "that the recurrent network runs away from (relative distance)",
            float(data.end_distance.max()), "at most", 1e-8, oracle="the linear system in NumPy",
        ),
        Evidence(
            NAME, "tanh, weak drive: beyond a strength of 1 there are several stable equilibria "
            "(mean number at the largest strength)", float(tanh.isel(tanh_strength=-1).mean()),
            "at least", 2.0, error=float(tanh.isel(tanh_strength=-1).std() / tanh.shape[1] ** 0.5),
        ),
        Evidence(
            NAME, "tanh: every stable equilibrium of inference is a fixed point of the recurrent "
            "network (share of networks in which all have F = 0)",
            float((data.largest_energy < 1e-10).mean()), "equal", 1.0, expected_to_hold=False,
        ),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Rates against the strength, both flows beyond it, and the number of equilibria of tanh."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for kind in KINDS:
        slowest = data.rate.sel(kind=kind, end="slowest")
        values = np.stack([statistics(np.maximum(row, 0)) for row in slowest.values])
        summary = xarray.DataArray(
            values, dims=("strength", "statistic"), coords={"statistic": list(STATISTICS)}
        )
        draw_band(data.strength.values, summary, ax=axes[0], label=f"inference, {kind}")
    axes[0].plot(data.strength, -data.growth.isel(kind=0).mean("draw"), "k--", lw=1,
                 label="recurrent network")  # fmt: skip
    axes[0].axhline(0, color="0.7", lw=0.8)
    axes[0].set(xlabel="strength s of the loop", ylabel="slowest rate (negative: grows)",
                ylim=(-1, 1.05))  # fmt: skip
    for kind, color in zip(KINDS, ("C0", "C1"), strict=True):
        here = data.sel(kind=kind)
        axes[1].plot(data.time[1:], here.inference_distance[1:], color=color,
                     label=f"inference, {kind}")  # fmt: skip
        axes[1].plot(data.time[1:], here.recurrent_distance[1:], "--", color=color,
                     label=f"recurrent network, {kind}")  # fmt: skip
    axes[1].set(xscale="log", yscale="log", xlabel="time (activity time constants)",
                ylabel="distance from the fixed point",
                title=f"beyond: s = {data.attrs['beyond']:g}", ylim=(1e-4, 1e4))  # fmt: skip
    counts = data.equilibria
    axes[2].errorbar(data.tanh_strength, counts.mean("tanh_draw"),
                     counts.std("tanh_draw") / counts.shape[1] ** 0.5, marker="o", ms=4,
                     label="stable equilibria")  # fmt: skip
    spurious = (data.largest_energy > 1e-10).mean("tanh_draw")
    axes[2].plot(data.tanh_strength, spurious, "s--", ms=4,
                 label="share of networks with one of F > 0")  # fmt: skip
    axes[2].set(xlabel="strength s of the loop", title=f"tanh, {data.attrs['tanh_units']} units")
    for ax in axes:
        ax.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    "recurrent_layer", "extra: a recurrent layer", {"paper": Config()},
    {
        "units": 8, "draws": 6, "tanh_draws": 4, "tanh_strengths": (0.5, 2.0, 4.0), "starts": 20,
        "t1": 100.0,
    },
    run, check, plot,
)  # fmt: skip
