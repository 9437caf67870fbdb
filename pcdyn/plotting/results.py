"""Axes in, artists out: several equilibria, basins, orders of convergence, and training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pcdyn._support.checks import check_choice, check_instance
from pcdyn.analysis.convergence_order import ConvergenceOrder
from pcdyn.equilibria.equilibrium import Basin
from pcdyn.equilibria.multiple import Equilibria
from pcdyn.plotting.curves import QUANTILES, fill_band
from pcdyn.plotting.style import checked_axes
from pcdyn.references.frequency_response import FrequencyResponse

if TYPE_CHECKING:
    from pcdyn.learning.train import Training


def equilibria(found: Equilibria, *, ax: Axes | None = None) -> list[Line2D]:
    """Draw the activity of each unit at each equilibrium: filled where stable, open elsewhere.

    The units of the free layers stand side by side in their order. Returns a line for each
    equilibrium, in the order of the free energy.
    """
    check_instance(found, "found", Equilibria, "what pcdyn.multiple_equilibria returns")
    ax = checked_axes(ax)
    free = [found.activities[l] for l in found.searches.problem.free_layers]
    lines = []
    for i, energy in enumerate(found.free_energy):
        values = np.concatenate([x[i] for x in free])
        fill = None if found.stable[i] else "none"
        label = f"F = {energy:.4g}"
        lines += ax.plot(values, "o-", markerfacecolor=fill, linewidth=0.8, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("unit of the free layers (open: not stable)")
    ax.set_ylabel("activity at equilibrium")
    if lines:
        ax.legend()
    return lines


def basin(found: Basin, *, ax: Axes | None = None) -> list[Line2D]:
    """Draw how far from the equilibrium the flow ends, against how far from it the flow starts.

    Filled where the two agree, open elsewhere; distances of exactly 0 stand at the lower edges.
    Returns the line of the samples that agree and that of the others.
    """
    check_instance(found, "found", Basin, "what Equilibrium.basin returns")
    ax = checked_axes(ax)
    agrees = np.ravel(found.agrees)
    x, y = (
        np.maximum(v, np.min(v[v > 0], initial=1.0) / 2)
        for v in (np.ravel(found.displacement), np.ravel(found.distance))
    )
    lines = ax.plot(x[agrees], y[agrees], "o", label=f"the same equilibrium ({agrees.sum()})")
    lines += ax.plot(
        x[~agrees], y[~agrees], "o", color=lines[0].get_color(), markerfacecolor="none",
        label=f"elsewhere ({(~agrees).sum()})",
    )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="distance from the start to the equilibrium")
    ax.set_ylabel("distance from the flow's end to it")
    ax.legend()
    return lines


def convergence_order(found: ConvergenceOrder, *, ax: Axes | None = None) -> list[Line2D]:
    """Draw the error against the step: filled where the order is measured, open elsewhere.

    A dotted line is the floor of round-off and reference. Returns the line of all steps and that of
    the usable ones.
    """
    check_instance(found, "found", ConvergenceOrder, "what pcdyn.convergence_order returns")
    ax = checked_axes(ax)
    lines = ax.plot(found.steps, found.errors, "o", markerfacecolor="none")
    lines += ax.plot(
        found.steps[found.usable], found.errors[found.usable], "o-", color=lines[0].get_color(),
        label=f"{found.integrator}: order {found.order:.2f}",
    )  # fmt: skip
    ax.axhline(found.floor, color="0.5", linestyle=":", linewidth=1)
    ax.set(xscale="log", yscale="log", ylabel="error at the end")
    ax.set_xlabel("step (activity time constants)")
    ax.legend()
    return lines


def training(found: Training, *, ax: Axes | None = None, metric: str = "loss") -> list[Artist]:
    """Draw a record of each batch against the epoch; of several seeds the median and a band.

    `metric` is a name of the `history` that has one number for each batch. The band is from the
    10 % to the 90 % quantile of the seeds. Returns the line, and the band if there is one.
    """
    # Optax is imported by those who train.
    from pcdyn.learning.train import Training

    check_instance(found, "found", Training, "what pcdyn.learning.train returns")
    loss = found.history["loss"]
    names = [name for name, values in found.history.items() if values.ndim == loss.ndim]
    check_choice(metric, "metric", names)
    ax = checked_axes(ax)
    epochs, batches = loss.shape[-2:]
    time = np.arange(1, epochs * batches + 1) / batches
    values = np.asarray(found.history[metric]).reshape(-1, epochs * batches)
    low, middle, high = np.quantile(values, QUANTILES, axis=0)
    (line,) = ax.plot(time, middle, label=found.rule)
    artists: list[Artist] = [line]
    if len(values) > 1:
        artists.append(fill_band(ax, line, low, high))
    ax.set_xlabel("epoch")
    ax.set_ylabel(metric.replace("_", " "))
    ax.legend()
    return artists


def frequency_response(
    found: FrequencyResponse, quantity: str = "gain", *, ax: Axes | None = None
) -> list[Line2D]:
    """Draw gain or phase of each free layer against the angular frequency, along one pattern.

    The pattern is that of `FrequencyResponse.leading`; a phase is drawn without jumps by 2π.
    Returns a line for each free layer.
    """
    kind = "what pcdyn.frequency_response returns"
    check_instance(found, "found", FrequencyResponse, kind)
    check_choice(quantity, "quantity", ("gain", "phase"))
    ax = checked_axes(ax)
    lines = []
    for layer, response in zip(found.layers, found.leading, strict=True):
        values = np.abs(response) if quantity == "gain" else np.unwrap(np.angle(response))
        lines += ax.plot(found.frequencies, values, label=f"layer {layer}")
    ax.set_xscale("log")
    if quantity == "gain":
        ax.set_yscale("log")
    ax.set_xlabel("angular frequency (1/activity time constant)")
    ax.set_ylabel("gain" if quantity == "gain" else "phase (radians)")
    ax.legend()
    return lines
