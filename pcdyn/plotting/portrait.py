"""Draws phase portraits: axes in, artists out; never computes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from pcdyn._support.checks import check_flag, check_instance, checked_integer
from pcdyn.analysis.phase_portrait import PhasePortrait
from pcdyn.plotting.style import checked_axes

NULLCLINE_COLORS = ("#0072B2", "#D55E00")
_MARKER_STYLES: dict[str, dict[str, Any]] = {
    "minimum": {"marker": "o", "markerfacecolor": "k", "label": "minimum (stable)"},
    "saddle": {"marker": "X", "markerfacecolor": "w", "label": "saddle"},
    "maximum": {"marker": "o", "markerfacecolor": "w", "label": "maximum (unstable)"},
    "at a kink": {"marker": "D", "markerfacecolor": "#E69F00", "label": "rest at a kink"},
    "degenerate": {"marker": "s", "markerfacecolor": "0.6", "label": "degenerate"},
}
_BASIN_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#999999")
_LEVELS = 14


def phase_portrait(
    portrait: PhasePortrait, *, ax: Axes | None = None, legend: bool = True, arrows: int = 17
) -> list[Line2D]:
    """Draw the flow of two free units, its nullclines, equilibria, basins and trajectories.

    The background has the colours of the basins, thin lines are contours of the free energy (closer
    together towards low energies), arrows give the direction of the flow, dashed lines are the
    separatrices and dark lines with a white edge trajectories.

    **Arguments:**

    - `portrait`: as `pcdyn.phase_portrait` returns it.
    - `ax`: where to draw; new axes unless given.
    - `legend`: whether a legend stands beside the axes.
    - `arrows`: how many on each axis, at most.

    **Returns:**

    The lines of the equilibria, a line for each kind.
    """
    check_instance(portrait, "portrait", PhasePortrait, "what pcdyn.phase_portrait returns")
    check_flag(legend, "legend")
    arrows = checked_integer(arrows, "arrows", at_least=1)
    ax = checked_axes(ax)
    _background(portrait, ax)
    _field(portrait, ax, arrows)
    for path in portrait.trajectories:
        ax.plot(*path.T, color="w", linewidth=2.4, alpha=0.8, zorder=2.5)
        ax.plot(*path.T, color="0.15", linewidth=0.9, zorder=2.6)
    handles = []
    for component, color in enumerate(NULLCLINE_COLORS):
        ax.contour(
            portrait.x, portrait.y, portrait.velocity[..., component], levels=[0.0],
            colors=color, linewidths=1.8, zorder=3,
        )  # fmt: skip
        name = _coordinate(portrait, component)
        label = rf"nullcline d{name}/d$t$ = 0"
        handles.append(Line2D([], [], color=color, linewidth=1.8, label=label))
    handles.append(Line2D([], [], color="0.15", linewidth=0.9, label="trajectory"))
    handles.append(Line2D([], [], color="0.45", linewidth=0.5, label="contour of $F$"))
    for curve in portrait.separatrices:
        ax.plot(*curve.T, color="k", linestyle="--", linewidth=1.6, zorder=3.5)
    if portrait.separatrices:
        handles.append(Line2D([], [], color="k", linestyle="--", label="separatrix"))
    lines = _equilibria(portrait, ax)
    low_x, high_x, low_y, high_y = portrait.extent
    ax.set(
        xlim=(low_x, high_x), ylim=(low_y, high_y),
        xlabel=_coordinate(portrait, 0), ylabel=_coordinate(portrait, 1),
    )  # fmt: skip
    if legend:
        ax.legend(handles=[*handles, *lines], loc="center left", bbox_to_anchor=(1, 0.5))
    return lines


def _background(portrait: PhasePortrait, ax: Axes) -> None:
    """The basins in pale colours, and contours of F."""
    attractors = [index for index in np.unique(portrait.basin) if index >= 0]
    image = np.ones((*portrait.basin.shape, 3))
    for order, index in enumerate(attractors):
        color = np.array(to_rgb(_BASIN_COLORS[order % len(_BASIN_COLORS)]))
        image[portrait.basin == index] = 1 - 0.38 * (1 - color)
    ax.pcolormesh(portrait.x, portrait.y, image, shading="nearest", rasterized=True, zorder=0)
    energy = portrait.free_energy
    low, high = energy.min(), energy.max()
    if high > low:
        # As squares: then a parabolic valley has contours at even distances.
        levels = low + (high - low) * np.linspace(0, 1, _LEVELS + 1)[1:-1] ** 2
        ax.contour(
            portrait.x, portrait.y, energy, levels=levels, colors="0.45", linewidths=0.5, zorder=1
        )


def _field(portrait: PhasePortrait, ax: Axes, arrows: int) -> None:
    """Arrows of one length, which give the direction of the flow and not its speed."""
    stride = max(1, -(-len(portrait.x) // arrows))
    inner = slice(stride // 2, None, stride)
    velocity = portrait.velocity[inner, inner]
    speed = np.linalg.norm(velocity, axis=-1)
    u, v = np.moveaxis(velocity / np.where(speed > 0, speed, 1)[..., None], -1, 0)
    ax.quiver(
        portrait.x[inner], portrait.y[inner], u, v, color="0.35", alpha=0.75, pivot="mid",
        angles="xy", scale=1.6 * len(portrait.x[inner]), width=0.0032, headwidth=4, zorder=2,
    )  # fmt: skip


def _equilibria(portrait: PhasePortrait, ax: Axes) -> list[Line2D]:
    lines = []
    for kind, style in _MARKER_STYLES.items():
        points = portrait.equilibria[[k == kind for k in portrait.kinds]]
        if len(points):
            lines += ax.plot(
                *points.T, linestyle="none", markersize=8, markeredgecolor="k",
                markeredgewidth=1.1, zorder=5, **style,
            )  # fmt: skip
    return lines


def _coordinate(portrait: PhasePortrait, component: int) -> str:
    layer, unit = portrait.coordinates[component]
    one_layer = portrait.coordinates[0][0] == portrait.coordinates[1][0]
    return f"$x_{{{layer},{unit + 1}}}$" if one_layer else f"$x_{layer}$"
