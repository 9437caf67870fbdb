"""A problem as a picture: who predicts whom, and what is clamped."""

from __future__ import annotations

import graphlib
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pcdyn._support.checks import check_instance, checked_integer
from pcdyn._support.types import Values
from pcdyn.equilibria.equilibrium import Equilibrium
from pcdyn.model.clamps import PartlyClamped
from pcdyn.model.graph import Graph
from pcdyn.model.problem import InferenceProblem, check_inference
from pcdyn.plotting.schematic import frame
from pcdyn.plotting.style import checked_axes

_SIZE = (1.3, 0.62)
_STEP = (2.3, 1.25)
# In points: the arrow of a prediction without error, and of the one with the largest.
_ARROWS = (0.8, 4.0)


def problem(
    given: InferenceProblem,
    *,
    at: Equilibrium | None = None,
    ax: Axes | None = None,
    sample: int = 0,
) -> list[Artist]:
    """Draw a box for each layer or node, and an arrow from what predicts to what is predicted.

    Predictions go from left to right, those that go back are bent. A node that is clamped has a
    heavy edge, one that is partly clamped a heavy dashed one, and a prior is a short arrow from
    above. At an equilibrium boxes are darker the larger their activities (root mean square), and
    arrows are wider the larger the prediction error.

    **Arguments:**

    - `at`: an equilibrium of the problem.
    - `ax`: where to draw; new axes in the style of pcdyn unless given.
    - `sample`: which one of a batch the equilibrium is shown of.

    **Returns:**

    The boxes in the order of the nodes, then the arrows in the order of the predictions.

    **Raises:**

    - `InputError` for what is no problem or no equilibrium, `ShapeError` if there is no such
      sample.
    """
    check_inference(given)
    if at is not None:
        check_instance(at, "at", Equilibrium, "a pcdyn.Equilibrium")
    graph = given.graph
    names = graph.nodes or tuple(f"layer {l}" for l in range(len(given.widths)))
    shapes = graph.shapes if isinstance(graph, Graph) else [(n,) for n in given.widths]
    middles = _middles(graph.targets, graph.sources, len(names))
    sizes, errors = _sizes(given, at, sample)
    ax = checked_axes(ax)
    shade, norm = colormaps["Oranges"], Normalize(0, 2 * max(*sizes, 1e-300))
    artists: list[Artist] = []
    for node, (x, y) in enumerate(middles):
        clamp = given.clamp[node]
        is_partial = isinstance(clamp, PartlyClamped)
        box = FancyBboxPatch(
            (x - _SIZE[0] / 2, y - _SIZE[1] / 2), *_SIZE,
            boxstyle="round,pad=0,rounding_size=0.12", facecolor=shade(norm(sizes[node])),
            edgecolor="black", linewidth=0.8 if clamp is None else 2.2,
            linestyle="--" if is_partial else "-", zorder=3,
        )  # fmt: skip
        artists.append(ax.add_patch(box))
        size = " × ".join(map(str, shapes[node]))
        ax.text(x, y, f"{names[node]}\n{size}", ha="center", va="center", zorder=4)
    for index, target in enumerate(graph.targets):
        width = _ARROWS[0] + (_ARROWS[1] - _ARROWS[0]) * errors[index]
        for patch in _arrows(middles, graph.sources[index], target, width):
            artists.append(ax.add_patch(patch))
    low, high = np.min(middles, axis=0), np.max(middles, axis=0)
    margin = np.array([_SIZE[0], _STEP[1]])
    frame(ax, *zip(low - margin, high + margin, strict=True))
    return artists


def _arrows(
    middles: np.ndarray, sources: Sequence[int], target: int, width: float
) -> list[FancyArrowPatch]:
    """One from each source; for a prior one from above, for a node from itself a loop."""
    end, arrows = middles[target], []
    if not sources:
        above = np.array([0, _SIZE[1] / 2])
        return [_arrow(end + 2.2 * above, end + above, 0.0, width)]
    for source in sources:
        way = end - middles[source]
        if source == target:
            aside, above = np.array([_SIZE[0] / 4, 0]), np.array([0, _SIZE[1] / 2])
            arrows.append(_arrow(end + above + aside, end + above - aside, 1.2, width))
            continue
        # Straight to a neighbour; bent past the nodes between, and on the way back.
        steps = way[0] / _STEP[0]
        side = -1 if way[1] <= 0 else 1
        bend = 0.25 if steps <= 0 else 0.3 * side * (steps > 1.5)
        arrows.append(_arrow(_edge(middles[source], way), _edge(end, -way), bend, width))
    return arrows


def _arrow(start: np.ndarray, end: np.ndarray, bend: float, width: float) -> FancyArrowPatch:
    return FancyArrowPatch(
        tuple(start), tuple(end), connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
        mutation_scale=8 + 2 * width, linewidth=width, color="0.35", shrinkA=0, shrinkB=0,
        zorder=2,
    )  # fmt: skip


def _edge(middle: np.ndarray, way: np.ndarray) -> np.ndarray:
    """Where a line from the middle of a box leaves it."""
    share = np.min(np.array(_SIZE) / 2 / np.maximum(np.abs(way), 1e-12))
    return middle + share * way


def _middles(targets: Sequence[int], sources: Sequence[tuple[int, ...]], count: int) -> np.ndarray:
    """Where boxes stand: each to the right of what predicts it first, as far as there is an order.

    On a cycle a node stands one step from the nearest that leads to it.
    """
    first = dict(reversed(list(zip(targets, sources, strict=True))))
    level = dict.fromkeys(range(count), 0)
    try:
        for node in graphlib.TopologicalSorter(first).static_order():
            level[node] = max((level[s] + 1 for s in first.get(node, ())), default=0)
    except graphlib.CycleError:
        reached = {node for node in range(count) if not first.get(node)} or {0}
        for step in range(1, count):
            new = {t for t, given in first.items() if t not in reached and reached & set(given)}
            level.update(dict.fromkeys(new, step))
            reached |= new
    columns = [[n for n in range(count) if level[n] == l] for l in range(count)]
    middles = np.zeros((count, 2))
    for x, column in enumerate(columns):
        for row, node in enumerate(column):
            middles[node] = x * _STEP[0], ((len(column) - 1) / 2 - row) * _STEP[1]
    return middles


def _sizes(
    given: InferenceProblem, at: Equilibrium | None, sample: int
) -> tuple[list[float], list[float]]:
    """The root mean square of the activities of each node, and of the errors of each prediction.

    The latter in units of the largest; all are 0 without an equilibrium.
    """
    if at is None:
        return [0.0] * len(given.widths), [0.0] * len(given.graph.targets)
    rows = len(at.energies) if np.ndim(at.energies) == 2 else 1
    sample = checked_integer(sample, "sample", at_least=0, at_most=rows - 1)

    def size(x: Values) -> float:
        row = x[sample] if np.ndim(x) == 2 else x
        return float(np.sqrt(np.mean(np.square(row))))

    errors = [size(x) for x in at.prediction_errors[-len(given.graph.targets) :]]
    largest = max(*errors, 1e-300) if len(errors) > 1 else max(errors[0], 1e-300)
    return [size(x) for x in at.activities], [error / largest for error in errors]
