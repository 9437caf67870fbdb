"""Networks as pictures: units coloured by their activity, arrows as wide as what they carry.

Axes in, artists out: what is drawn is what was computed elsewhere. A `Layout` says where the units
of each layer stand; everything else is drawn on top of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from pcdyn._support.types import Numbers
from pcdyn.errors import ShapeError
from pcdyn.model.network import Dense, Network

# White at zero, so that what is silent stays white.
COLORS = "RdBu_r"
# In points: an arrow that carries next to nothing stays visible.
THINNEST = 0.4


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the units of layers 0 … L stand: layers from left to right, units from top to bottom.

    **Arguments:**

    - `widths`: n_0 … n_L.
    - `origin`: the middle of layer 0.
    - `layer_distance`, `unit_distance`, and `radius` of a unit: in data units of axes with equal
      aspect.
    """

    widths: tuple[int, ...]
    origin: tuple[float, float] = (0.0, 0.0)
    layer_distance: float = 1.6
    unit_distance: float = 0.34
    radius: float = 0.13

    def unit(self, layer: int, index: int) -> tuple[float, float]:
        """Return the position of the middle of a unit."""
        rows = self.widths[layer]
        height = ((rows - 1) / 2 - index) * self.unit_distance
        return self.origin[0] + layer * self.layer_distance, self.origin[1] + height

    def middle(self, layer: int) -> tuple[float, float]:
        """Return the position of the middle of a layer."""
        return self.origin[0] + layer * self.layer_distance, self.origin[1]

    def half_height(self, layer: int) -> float:
        """Measure from the middle of a layer to the edge of its outermost unit."""
        return (self.widths[layer] - 1) / 2 * self.unit_distance + self.radius


def units(
    axes: Axes,
    layout: Layout,
    values: Sequence[Numbers],
    *,
    largest: float,
    layers: Sequence[int] | None = None,
    clamped: Sequence[int] = (),
    square: bool = False,
) -> list[Patch]:
    """Draw the units of layers, coloured by their values: blue below zero, red above.

    **Arguments:**

    - `values`: one array `(n_l,)` for each of `layers`.
    - `largest`: the size at which colours are full.
    - `layers`: all unless given.
    - `clamped`: layers that have a heavy edge.
    - `square`: for units that hold errors.

    **Returns:**

    The patches, layer by layer.

    **Raises:**

    - `ShapeError` if a value does not have the width of its layer.
    """
    layers = range(len(layout.widths)) if layers is None else layers
    shown = _checked(layout, layers, values)
    norm, colors = Normalize(-largest, largest), colormaps[COLORS]
    patches: list[Patch] = []
    for layer, array in zip(layers, shown, strict=True):
        edge = 1.8 if layer in clamped else 0.7
        for index, value in enumerate(array):
            x, y = layout.unit(layer, index)
            r = layout.radius
            style: dict[str, Any] = {
                "facecolor": colors(norm(value)), "edgecolor": "black", "linewidth": edge,
                "zorder": 3,
            }  # fmt: skip
            shape = Rectangle((x - r, y - r), 2 * r, 2 * r, **style)
            patches.append(axes.add_patch(shape if square else Circle((x, y), r, **style)))
    return patches


def weights(
    axes: Axes, layout: Layout, network: Network, *, width: float = 1.6
) -> list[LineCollection]:
    """Draw each weight as a line, as wide as it is large (`width` points for the largest).

    Red is positive and blue negative. Returns one `LineCollection` per layer. Raises `ShapeError`
    for a layer that is not a `Dense`, or a layout with other widths.
    """
    if network.widths != layout.widths:
        raise ShapeError(f"a layout of {layout.widths} for a network of {network.widths} units")
    drawn = []
    for layer, dense in enumerate(network.layers, start=1):
        if not isinstance(dense, Dense):
            raise ShapeError(f"layer {layer} is a {type(dense).__name__}: it has no single weights")
        matrix = np.asarray(dense.weight)
        ends = [
            [layout.unit(layer - 1, j), layout.unit(layer, i)] for i, j in np.ndindex(matrix.shape)
        ]
        share = matrix.reshape(-1) / np.max(np.abs(matrix))
        lines = LineCollection(
            ends, linewidths=width * np.abs(share), colors=colormaps[COLORS](0.5 + 0.4 * share),
            alpha=0.6, zorder=1,
        )  # fmt: skip
        axes.add_collection(lines)
        drawn.append(lines)
    return drawn


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    *,
    color: str = "0.35",
    points: float = 0.8,
    both_ways: bool = False,
) -> FancyArrowPatch:
    """Draw an arrow `points` wide from one point to another, or both ways. Returns it."""
    patch = FancyArrowPatch(
        start, end, arrowstyle="<|-|>" if both_ways else "-|>", mutation_scale=6 + 1.8 * points,
        linewidth=points, color=color, shrinkA=0, shrinkB=0, zorder=2, joinstyle="miter",
        capstyle="butt",
    )  # fmt: skip
    axes.add_patch(patch)
    return patch


def signals(
    axes: Axes,
    layout: Layout,
    sizes: Numbers,
    *,
    backward: bool,
    largest: float,
    color: str,
    offset: float = 0.0,
    width: float = 5.0,
) -> list[FancyArrowPatch]:
    """Draw one arrow between each pair of neighbouring layers, as wide as its size.

    **Arguments:**

    - `sizes`: one number for each pair (l − 1, l), not negative; NaN leaves an arrow out.
    - `backward`: whether arrows point from l to l − 1.
    - `largest`: the size of an arrow `width` points wide.
    - `offset`: how far above the middle of the layers.

    **Returns:**

    The arrows.

    **Raises:**

    - `ShapeError` for another number of sizes.
    """
    values = np.asarray(sizes, float)
    if values.shape != (len(layout.widths) - 1,):
        raise ShapeError(f"{values.shape} sizes for {len(layout.widths) - 1} pairs of layers")
    arrows = []
    for layer, size in enumerate(values, start=1):
        if not np.isfinite(size):
            continue
        left, right = layout.middle(layer - 1), layout.middle(layer)
        gap = 1.7 * layout.radius
        ends = [(left[0] + gap, left[1] + offset), (right[0] - gap, right[1] + offset)]
        start, end = ends[::-1] if backward else ends
        points = max(width * float(size) / largest, THINNEST)
        arrows.append(arrow(axes, start, end, color=color, points=points))
    return arrows


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], color: str) -> Patch:
    """Draw a rounded box behind everything else. Returns it."""
    patch = FancyBboxPatch(
        corner, *size, boxstyle="round,pad=0,rounding_size=0.12", facecolor=color, alpha=0.12,
        edgecolor="none", zorder=0,
    )  # fmt: skip
    axes.add_patch(patch)
    return patch


def frame(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Make axes a drawing: equal aspect, these limits, no ticks and no spines."""
    axes.set_aspect("equal")
    axes.set(xlim=x, ylim=y, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _checked(layout: Layout, layers: Sequence[int], values: Sequence[Numbers]) -> list[np.ndarray]:
    arrays = [np.asarray(value, float) for value in values]
    widths = [(layout.widths[layer],) for layer in layers]
    if [array.shape for array in arrays] != widths:
        raise ShapeError(
            f"values of shape {[a.shape for a in arrays]} for layers {list(layers)} of {widths}"
        )
    return arrays
