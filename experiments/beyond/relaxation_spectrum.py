"""The relaxation spectrum of inference: decay rates against depth, width, weights and precisions.

The rates of a linear network with both ends clamped are the eigenvalues of H = ∂²F/∂x², the same
at every state. F is convex and every rate positive, which says nothing about how long it takes:
explicit Euler needs steps in proportion to the condition number of H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.shared.experiment import Experiment
from pcdyn import plotting
from pcdyn.theory import Evidence
from pcdyn.theory.dynamics import (
    condition_numbers,
    linear_spectra,
    marchenko_pastur_edges,
    random_square_weights,
)
from pcdyn.theory.evidence import evidence_from_xarray, evidence_to_xarray


@dataclasses.dataclass(frozen=True)
class Config:
    """Square layers with weights N(0, scale²/width); depth 4, width 10 and scale 1 where fixed."""

    depths: tuple[int, ...] = (2, 4, 8, 16)
    widths: tuple[int, ...] = (3, 10, 30)
    scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 4.0)
    ratios: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0, 100.0)
    networks: int = 200
    wide: int = 200
    wide_networks: int = 20
    bins: int = 40
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Spectra along each of the four axes, a wide layer, and the rows of evidence."""
    keys = iter(jr.split(jr.key(config.seed), 100))

    def spectra(depth: int, width: int) -> list[Any]:
        return random_square_weights(next(keys), networks=config.networks, depth=depth, width=width)

    by_depth = np.full((len(config.widths), len(config.depths), 3), np.nan)
    slowest = np.full((len(config.widths), len(config.depths)), np.nan)
    shown = {}
    for i, width in enumerate(config.widths):
        for j, depth in enumerate(config.depths):
            # Depth is what the widest networks need not show: eigenvalues cost its cube.
            if width * depth <= 200:
                rates = np.asarray(linear_spectra(spectra(depth, width)))
                by_depth[i, j] = quartiles(rates)
                slowest[i, j] = np.median(1 / rates[:, 0])
                if width == 10:
                    shown[depth] = rates
    fixed = spectra(4, 10)
    by_scale = [quartiles(linear_spectra([s * w for w in fixed])) for s in config.scales]
    by_ratio = [
        quartiles(linear_spectra(fixed, jnp.asarray(ratio ** np.arange(1.0, 5.0))))
        for ratio in config.ratios
    ]
    edges = np.geomspace(1e-4, 1e2, config.bins + 1)
    shares = [
        np.histogram(shown[depth], edges)[0] / shown[depth].size / np.log10(edges[1] / edges[0])
        for depth in config.depths
    ]
    wide_edges = np.linspace(0.9, 4.2, config.bins + 1)
    wide_rates = wide_layer(config)
    counts = np.histogram(wide_rates, wide_edges)[0] / wide_rates.size
    evidence = (
        *condition_numbers(depths=config.depths, networks=config.networks, seed=config.seed),
        *marchenko_pastur_edges(width=config.wide, networks=config.wide_networks, seed=config.seed),
    )
    return xarray.Dataset(
        {
            "condition_by_depth": (("width", "depth", "quartile"), by_depth),
            "slowest_time": (("width", "depth"), slowest),
            "condition_by_scale": (("scale", "quartile"), np.stack(by_scale)),
            "condition_by_ratio": (("ratio", "quartile"), np.stack(by_ratio)),
            "density": (("depth", "rate"), np.stack(shares)),
            "wide_share": (("wide_rate",), counts),
            "wide_share_expected": (("wide_rate",), marchenko_pastur_shares(wide_edges, 0.5)),
            "wide_density_expected": (("wide_rate",), marchenko_pastur_density(
                (wide_edges[1:] + wide_edges[:-1]) / 2, 0.5)),
            **evidence_to_xarray(evidence),
        },
        coords={
            "depth": list(config.depths), "width": list(config.widths),
            "scale": list(config.scales), "ratio": list(config.ratios),
            "quartile": [0.25, 0.5, 0.75], "rate": np.sqrt(edges[1:] * edges[:-1]),
            "wide_rate": (wide_edges[1:] + wide_edges[:-1]) / 2,
        },
        attrs={"source": "random numbers", "networks": config.networks, "wide": config.wide,
               "wide_networks": config.wide_networks},
    )  # fmt: skip


def quartiles(rates: ArrayLike) -> np.ndarray:
    """Of the condition number, over networks."""
    rates = np.asarray(rates)
    return np.quantile(rates[:, -1] / rates[:, 0], [0.25, 0.5, 0.75])


def wide_layer(config: Config) -> np.ndarray:
    """The rates of networks with one hidden layer of n units below an output of 2n."""
    n, networks = config.wide, config.wide_networks
    draws = jr.normal(jr.key(config.seed + 1), (networks, 2 * n, n)) / np.sqrt(2 * n)
    return np.asarray(linear_spectra([jnp.zeros((networks, n, 1)), draws]))


def marchenko_pastur_density(rates: np.ndarray, ratio: float) -> np.ndarray:
    """The density of 1 + the eigenvalues of WᵀW, n/m = ratio ≤ 1, entries N(0, 1/m)."""
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    inner = np.clip(rates - 1, low, high)
    return np.sqrt((high - inner) * (inner - low)) / (2 * np.pi * ratio * inner)


def marchenko_pastur_shares(edges: Sequence[float] | np.ndarray, ratio: float) -> np.ndarray:
    """How much of that density lies between each pair of edges, by a fine midpoint rule."""
    fine = 200
    inner = np.interp(
        (np.arange(fine * (len(edges) - 1)) + 0.5) / fine, np.arange(len(edges)), edges
    )
    values = marchenko_pastur_density(inner, ratio).reshape(-1, fine)
    return values.mean(axis=1) * np.diff(edges)


def check(data: xarray.Dataset) -> list[Evidence]:
    """The evidence of the theory, the shape of the spectrum, and the effect of precisions."""
    medians = data.condition_by_ratio.sel(quartile=0.5)
    ratios, ends = data.ratio.values, medians.values
    return [
        *evidence_from_xarray(data),
        Evidence(
            "Eq 28", "the rates of a wide layer have the density of Marchenko and Pastur (largest "
            "distance of the distributions)",
            float(abs(np.cumsum(data.wide_share - data.wide_share_expected)).max()), "at most",
            float(2 / data.attrs["wide"]), note="2/n",
        ),
        Evidence(
            "Eq 28", "graded precisions Π_l = ρ^l: no ρ has a smaller condition number than 1 (ρ "
            "that has the least)", float(ratios[np.argmin(ends)]), "equal", 1.0,
            note=", ".join(f"{m:.3g} at {r:g}" for r, m in zip(ratios, ends, strict=True)),
        ),
        Evidence(
            "Eq 28", "as ρ → 0 the condition number grows like ρ^−(L−2), here with L = 4 "
            "(exponent)",
            float(np.log(ends[0] / ends[1]) / np.log(ratios[0] / ratios[1])), "equal", -2.0, 0.1,
            note=f"between {ratios[1]:g} and {ratios[0]:g}",
        ),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Spectra by depth, condition numbers and times along the axes, and the wide layer."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    first, second, third, fourth, fifth, sixth = axes.flat
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, data.sizes["depth"]))
    for color, depth in zip(colors, data.depth.values, strict=True):
        values = data.density.sel(depth=depth)
        first.fill_between(data.rate, values, step="mid", color=color, alpha=0.18, lw=0)
        first.step(data.rate, values, where="mid", color=color, label=f"depth {depth}")
    first.set(
        xscale="log", xlabel="decay rate", ylabel="density per decade",
        title="spectrum, width 10", ylim=(0, None),
    )  # fmt: skip
    first.legend(loc="upper left")
    for width in data.width.values:
        part = data.condition_by_depth.sel(width=width)
        _with_quartiles(second, data.depth, part, f"width {width}")
        third.plot(data.depth, data.slowest_time.sel(width=width), "o-", label=f"width {width}")
    for ax, label, title in (
        (second, "condition number of H", "deeper is stiffer"),
        (third, plotting.TIME_LABEL, "slowest relaxation time, median"),
    ):
        ax.set(xscale="log", yscale="log", xlabel="depth L", ylabel=label, title=title)
        ax.set_xticks(data.depth.values, [str(d) for d in data.depth.values], minor=False)
        ax.set_xticks([], minor=True)
        ax.legend()
    _with_quartiles(fourth, data.scale, data.condition_by_scale, None)
    fourth.set(xscale="log", yscale="log", xlabel="weight scale g, W ~ N(0, g²/width)",
               ylabel="condition number of H", title="stronger weights (depth 4)")  # fmt: skip
    _with_quartiles(fifth, data.ratio, data.condition_by_ratio, None)
    fifth.set(xscale="log", yscale="log", xlabel=r"precision ratio $ρ$, $Π_l = ρ^l$",
              ylabel="condition number of H", title="graded precisions (depth 4)")  # fmt: skip
    step = float(data.wide_rate[1] - data.wide_rate[0])
    sixth.bar(data.wide_rate, data.wide_share / step, width=step, color="#56B4E9", alpha=0.6,
              label=f"{data.attrs['wide_networks']} networks")  # fmt: skip
    sixth.plot(data.wide_rate, data.wide_density_expected, "k", label="Marchenko–Pastur")
    sixth.set(xlabel="decay rate", ylabel="density",
              title=f"one hidden layer of {data.attrs['wide']}")  # fmt: skip
    sixth.legend()
    return figure


def _with_quartiles(
    ax: Axes, x: xarray.DataArray, values: xarray.DataArray, label: str | None
) -> None:
    """The median in a band from the lower to the upper quartile."""
    (line,) = ax.plot(x, values.sel(quartile=0.5), "o-", label=label)
    ax.fill_between(
        x, values.sel(quartile=0.25), values.sel(quartile=0.75), color=line.get_color(),
        alpha=0.2, lw=0,
    )  # fmt: skip


EXPERIMENT = Experiment(
    "relaxation_spectrum", "extra: relaxation spectrum of inference", {"paper": Config()},
    {
        "depths": (2, 4), "widths": (3, 10), "scales": (0.5, 1.0), "networks": 60, "wide": 60,
        "ratios": (1e-3, 1e-2, 1.0, 100.0),
    },
    run, check, plot,
)  # fmt: skip
