"""The panels of the figure of `interpolation`."""

from __future__ import annotations

import numpy as np
import xarray
from matplotlib.axes import Axes

from pcdyn import plotting

_STYLES = {"linear": "-", "tanh": "--"}


def cosines(ax: Axes, here: xarray.Dataset, what: str, layers: str, start: str) -> None:
    """Cosines of activities or weight gradients to those of both ends."""
    for name, shade in ((start, "C0"), ("tp", "C1")):
        values = here[f"{what}_cosine_{name}"]
        for layer in values[layers].values:
            for kind in _STYLES:
                curve = values.sel({layers: layer, "kind": kind})
                if kind == "linear" and layer == values[layers].values[-1]:
                    # One band: those of all layers would hide the lines.
                    plotting.mean_band(here.path.values, curve.values, ax=ax, color=shade)
                ax.plot(here.path, curve.mean("network"), _STYLES[kind], color=shade,
                        lw=0.7 + 0.7 * layer)  # fmt: skip
    words = {"feedforward": "feedforward pass", "bp": "BP", "tp": "TP"}
    for name, shade in ((start, "C0"), ("tp", "C1")):
        ax.plot([], [], color=shade, label=f"to {words[name]}")
    ax.plot([], [], "k--", lw=1, label="tanh")
    noun = "activities" if what == "activity" else "weight gradients"
    ax.set(
        ylabel="cosine", title=f"{noun}, layers 1 (thin) to {len(values[layers])}", ylim=(-1, 1.08)
    )
    ax.legend(loc="lower left", fontsize=8)


def distances(ax: Axes, here: xarray.Dataset) -> None:
    """Relative distances to both ends, with slopes to compare them with."""
    for name, layers, shade, words in (
        ("error_distance_bp", "layer", "C0", "weighted errors to BP"),
        ("way_to_tp", "hidden", "C1", "activities to TP"),
    ):
        for layer in here[layers].values:
            for kind in _STYLES:
                curve = here[name].sel({layers: layer, "kind": kind}).median("network")
                first = kind == "linear" and layer == 1
                ax.plot(here.path, curve, _STYLES[kind], color=shade, lw=0.7 + 0.7 * layer,
                        label=words if first else None)  # fmt: skip
    ax.set(yscale="log", ylabel="relative distance (median)", title="orders at both ends")
    ends = here.path.values[[0, -1]]
    for x, order in ((ends[0] * np.array([1, 30]), 1), (ends[1] / np.array([30, 1]), -1)):
        y = 1e-5 if str(here.family.values) == "lambda" else 1e-3
        ax.plot(x, y * (x / x[0 if order > 0 else 1]) ** order, "k:", lw=1)
    ax.plot([], [], "k:", lw=1, label="slope ±1")
    ax.legend(loc="lower center", fontsize=8)


def ways(ax: Axes, data: xarray.Dataset) -> None:
    """The path in the plane of both distances."""
    linear = data.sel(kind="linear")
    for family, shade, words in (("lambda", "C2", "λ"), ("graded", "C4", "graded")):
        for layer in data.hidden.values:
            here = linear.sel(family=family, hidden=layer)
            x, y = (here[n].mean("network") for n in ("way_from_feedforward", "way_to_tp"))
            ax.plot(x, y, color=shade, lw=0.7 + 0.9 * layer, label=f"{words}, layer {layer}")
            ax.plot(x[-1], y[-1], "o", ms=5, color=shade)
    ax.plot([0, 1], [1, 0], ":", color="0.5", lw=1, label="straight way")
    ax.set(xlabel="distance from the feedforward pass", ylabel="distance to the TP target",
           title="the way of the activities (mean, linear)")  # fmt: skip
    ax.legend(fontsize=8)


def wide(ax: Axes, data: xarray.Dataset) -> None:
    """Distances of layer L − 1 to what it might tend to where W is wide."""
    odds = data.path.sel(family="lambda")
    shown = (
        ("one", "inverse", "C3", "-", r"$W^+T$, one hidden layer"),
        ("one", "difference", "C0", "-", "difference TP, one hidden layer"),
        ("two", "difference", "C0", "--", "difference TP, two hidden layers"),
        ("two", "weighted", "C2", "--", "weighted inverse, two hidden layers"),
    )
    for hidden, name, shade, dashes, words in shown:
        ax.loglog(odds, data[f"wide_{hidden}_{name}"].median("network"), dashes, color=shade,
                  label=words)  # fmt: skip
    widths = "-".join(str(w) for w in data.attrs["wide"])
    ax.set(xlabel="λ/(1 − λ)", ylabel="relative distance (median)",
           title=f"layer L − 1, wide weights ({widths})")  # fmt: skip
    ax.set_ylim(top=1e4)  # room for the legend
    ax.legend(loc="upper left", fontsize=7)


def residuals(ax: Axes, data: xarray.Dataset) -> None:
    """The largest residual at each point of both paths."""
    for family, shade, words in (("lambda", "C2", "λ/(1 − λ)"), ("graded", "C4", "ρ")):
        for kind in _STYLES:
            here = data.sel(family=family, kind=kind)
            ax.loglog(here.path, here.residual.max("network"), _STYLES[kind], color=shade,
                      label=f"{words}, {kind}")  # fmt: skip
    ax.axhline(data.attrs["tolerance"], color="k", ls=":", lw=1, label="tolerance")
    ax.set(xlabel="λ/(1 − λ) or ρ", ylabel="largest ‖∂F/∂x‖ of all networks",
           title="residuals of the equilibria")  # fmt: skip
    ax.set_ylim(top=1e-2)  # room for the legend
    ax.legend(fontsize=7, loc="upper center", ncols=2)
