"""Axes in, artists out; never computes.

What is drawn is what a trajectory holds. Wrap figures in `style()` for the look of pcdyn; a
function that is given no axes makes its own in that style.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import ColorType

from pcdyn._support.arrays import as_host_array
from pcdyn._support.checks import (
    as_sequence,
    check_choice,
    check_flag,
    check_instance,
    checked_integer,
)
from pcdyn._support.types import Numbers, Values
from pcdyn.analysis.comparison.table import METRICS, UNITS, Comparison
from pcdyn.equilibria.equilibrium import Equilibrium
from pcdyn.errors import InputError, ShapeError
from pcdyn.model.named import checked_layer, layer_name
from pcdyn.plotting.style import checked_axes
from pcdyn.simulation.trajectory import Reference, Trajectory

TIME_LABEL = "time (activity time constants)"

# More entries than there are colours would only cover the figure.
_LARGEST_LEGEND = 8
_MARKERS = ("o", "s", "^", "D")
_DASHES = ("-", "--", "-.", ":")
# Of several networks or seeds: the lower end of the band, the median, and the upper end.
QUANTILES = (0.1, 0.5, 0.9)


def activities(
    trajectory: Trajectory,
    *,
    ax: Axes | None = None,
    layer: int | str | None = None,
    sample: int = 0,
    equilibrium: Reference | None = None,
) -> list[Line2D]:
    """Draw the activity of each unit against time.

    Of several networks the median is drawn, in a band from their 10 % to their 90 % quantile, over
    those that ended without a failure.

    **Arguments:**

    - `trajectory`: as `pcdyn.simulate` returns it.
    - `ax`: where to draw; new axes in the style of pcdyn unless given.
    - `layer`: by number or name; all free layers unless given.
    - `sample`: which one of a batch.
    - `equilibrium`: a `pcdyn.Equilibrium` or activities x_0 … x_L, each of shape `([batch,] n_l)`
      (`None` where not needed), drawn as dashed lines in the colours of their units.

    **Returns:**

    The lines of the units, then those of the equilibrium.

    **Raises:**

    - `ShapeError` if there is no such layer or sample, or if the equilibrium has other shapes.
    """
    times, sample = _checked(trajectory, sample)
    layers, most = trajectory.free_layers, len(trajectory.activities) - 1
    if layer is not None:
        layers = (checked_layer(trajectory.activities, layer, "layer"),)
    ends: Sequence[Numbers | None] = [None] * (most + 1)
    if equilibrium is not None:
        wanted = f"activities x_0 … x_{most}, or a pcdyn.Equilibrium"
        given = getattr(equilibrium, "activities", equilibrium)
        ends = as_sequence(given, "equilibrium", wanted)
        if len(ends) != most + 1:
            raise ShapeError(f"equilibrium must be {wanted}, got {len(ends)} layers")
    bands = {
        index: _bands(trajectory, trajectory.activities[index], sample, axis=1, dimensions=2)
        for index in layers
    }
    shown = {index: band[1] for index, band in bands.items()}
    rest = {
        index: _of_sample(
            as_host_array(ends[index], f"equilibrium of layer {index}", finite=False),
            sample,
            axis=0,
            dimensions=1,
        )
        for index in layers
        if ends[index] is not None
    }
    for index, levels in rest.items():
        if levels.shape != shown[index].shape[1:]:
            raise ShapeError(
                f"the equilibrium of layer {index} has shape {levels.shape}, not "
                f"{shown[index].shape[1:]}"
            )
    ax = checked_axes(ax)
    lines, dashed = [], []
    for index, values in shown.items():
        name = layer_name(trajectory.activities, index)
        labels = [f"{name}, unit {unit}" for unit in range(values.shape[1])]
        drawn = ax.plot(times, values, label=labels)
        lines += drawn
        if trajectory.networks is not None:
            for line, low, high in zip(drawn, bands[index][0].T, bands[index][2].T, strict=True):
                fill_band(ax, line, low, high)
        dashed += [
            ax.axhline(level, color=line.get_color(), linestyle="--", linewidth=1)
            for line, level in zip(drawn, rest.get(index, ()), strict=False)
        ]
    ax.set_xlabel(TIME_LABEL)
    ax.set_ylabel("activity")
    if len(lines) <= _LARGEST_LEGEND:
        # Beside the axes: activities that have settled fill them from top to bottom.
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return lines + dashed


def distance(
    times: Numbers,
    values: Numbers,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    log: bool = True,
) -> list[Line2D]:
    """Draw distances against time, such as `Trajectory.distance_to` returns.

    **Arguments:**

    - `times`: shape `(time,)`, in units of the activity time constant.
    - `values`: shape `(time, [batch])`; the samples of a batch share one colour.
    - `ax`: where to draw; new axes unless given.
    - `label`: of all lines together.
    - `log`: whether the axis of distances is logarithmic.

    **Returns:**

    A line for each sample.

    **Raises:**

    - `ShapeError` for other shapes.
    """
    array = as_host_array(values, "values", finite=False)
    times = as_host_array(times, "times")
    check_flag(log, "log")
    _check_style(label)
    if array.ndim not in (1, 2) or times.shape != array.shape[:1]:
        raise ShapeError(
            f"distances need shape (time,) or (time, batch), got {array.shape} at "
            f"{times.shape} times"
        )
    ax = checked_axes(ax)
    columns = array.reshape(len(times), -1)
    lines = ax.plot(times, columns[:, 0], label=label)
    for column in columns.T[1:]:
        lines += ax.plot(times, column, color=lines[0].get_color())
    if log:
        ax.set_yscale("log")
    ax.set_xlabel(TIME_LABEL)
    ax.set_ylabel("Euclidean distance")
    if label is not None:
        ax.legend()
    return lines


def energies(trajectory: Trajectory, *, ax: Axes | None = None, sample: int = 0) -> list[Line2D]:
    """Draw the output loss ℒ, the residual energy Ẽ and the free energy F against time.

    Of several networks they are medians in bands, as for `activities`. Returns the three lines in
    that order. Raises `ShapeError` if there is no such `sample`.
    """
    times, sample = _checked(trajectory, sample)
    if trajectory.energies.shape[-1] == 0:
        raise ShapeError("there are no energies along this trajectory: its flow observes none")
    # As mathematics: ordinary fonts lack these letters.
    shown = {
        r"output loss $\mathcal{L}$": trajectory.output_loss,
        r"residual energy $\widetilde{E}$": trajectory.residual_energy,
        "free energy $F$": trajectory.free_energy,
    }
    bands = [_bands(trajectory, x, sample, axis=1, dimensions=1) for x in shown.values()]
    ax = checked_axes(ax)
    lines = []
    for label, (low, middle, high) in zip(shown, bands, strict=True):
        lines += ax.plot(times, middle, label=label)
        if trajectory.networks is not None:
            fill_band(ax, lines[-1], low, high)
    ax.set_xlabel(TIME_LABEL)
    ax.set_ylabel("energy")
    ax.legend()
    return lines


def equilibrium(found: Equilibrium, *, ax: Axes | None = None, sample: int = 0) -> list[Line2D]:
    """Draw the activity of each unit at an equilibrium, and where the search started.

    The units of the free layers stand side by side in their order, each layer in its own colour:
    filled markers at the equilibrium, open ones at the start. Of a batch one `sample` is drawn. Of
    several networks these are medians, with bars from the 10 % to the 90 % quantile, over those
    that ended without a failure. Returns the lines, equilibrium before start for each layer.
    """
    check_instance(found, "found", Equilibrium, "a pcdyn.Equilibrium")
    lines, first = [], 0
    stack = found.networks is not None
    shape = np.shape(found.energies)[stack:-1]
    sample = _checked_sample(sample, shape[0] if shape else 1)
    free = found.problem.free_layers
    ends = [_bands(found, found.activities[l], sample, axis=0, dimensions=1) for l in free]
    begun = found.problem.activities(found.start)
    starts = [_bands(found, begun[l], sample, axis=0, dimensions=1)[1] for l in free]
    ax = checked_axes(ax)
    for index, (low, values, high), before in zip(free, ends, starts, strict=True):
        units = np.arange(first, first + len(values))
        rest = ax.plot(units, values, "o", label=layer_name(found.activities, index))
        if stack:
            ax.vlines(units, low, high, color=rest[0].get_color(), linewidth=1)
        lines += rest
        lines += ax.plot(units, before, "o", color=rest[0].get_color(), markerfacecolor="none")
        first += len(values)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("unit of the free layers (open: where the search started)")
    ax.set_ylabel("activity at equilibrium")
    if len(lines) <= 2 * _LARGEST_LEGEND:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return lines


def decay_rates(rates: Numbers, *, ax: Axes | None = None) -> list[Line2D]:
    """Draw decay rates of shape `([sample,] rate)`, such as `pcdyn.stability` returns, in order.

    The axis is logarithmic if all known rates are positive. The samples of a batch share one
    colour. Returns the lines. Raises `ShapeError` for other shapes.
    """
    array = as_host_array(rates, "rates", finite=False)
    if array.ndim not in (1, 2):
        raise ShapeError(f"rates need shape (rate,) or (sample, rate), got {array.shape}")
    ax = checked_axes(ax)
    order = np.arange(1, array.shape[-1] + 1)
    lines: list[Line2D] = []
    for row in np.atleast_2d(array):
        color = lines[0].get_color() if lines else None
        lines += ax.plot(order, row, "o-", color=color, markersize=3, linewidth=0.8)
    if not np.any(array <= 0):
        ax.set_yscale("log")
    ax.set_xlabel("mode, from the slowest to the fastest")
    ax.set_ylabel("decay rate (1 / activity time constant)")
    return lines


def work_precision(
    comparison: Comparison,
    *,
    ax: Axes | None = None,
    x: str = "run_seconds",
    y: str = "final_error",
) -> list[Line2D]:
    """Draw one metric of a comparison's runs against another, a line for each integrator.

    Runs that failed are not drawn; the legend says how many of an integrator's did, and how many
    lack the metric. A hollow marker stands for an error below what the reference can resolve; it is
    drawn there, on a dotted line. The lines follow the settings. Axes are logarithmic.

    **Arguments:**

    - `comparison`: as `pcdyn.compare` returns it.
    - `ax`: where to draw; new axes unless given.
    - `x`, `y`: attributes of a run such as `"run_seconds"`, `"maximum_error"`,
      `"vector_field_evaluations"`, or `"value"`, the tolerance or step.

    **Returns:**

    The lines of the integrators.

    **Raises:**

    - `InputError` for an unknown metric.
    """
    check_instance(comparison, "comparison", Comparison, "what pcdyn.compare returns")
    for name, metric in (("x", x), ("y", y)):
        check_choice(metric, name, (*METRICS, "value"))
    ax = checked_axes(ax)
    colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    lines = []
    for index, name in enumerate(comparison.integrators):
        runs = [run for run in comparison.of(name) if run.status.ok]
        points = np.array(
            [(comparison.resolved(run, x), comparison.resolved(run, y)) for run in runs]
        ).reshape(-1, 2)
        # A logarithmic axis has no place for zero or NaN.
        shown = (points > 0).all(axis=1)
        hollow = np.array([bool({x, y} & set(run.below_reference)) for run in runs], bool)[shown]
        points = points[shown]
        failed = len(comparison.of(name)) - len(runs)
        notes = [f"{failed} failed"] * bool(failed)
        notes += [f"{(~shown).sum()} without value"] * bool((~shown).any())
        label = f"{name} ({', '.join(notes)})" if notes else name
        # More integrators than colours: markers and dashes distinguish those of one colour.
        repeat, color = index // len(colors), colors[index % len(colors)]
        shared: dict[str, Any] = {"color": color, "marker": _MARKERS[repeat % len(_MARKERS)]}
        (line,) = ax.plot(
            *points.T, label=label, markersize=4.5, linewidth=1.2,
            linestyle=_DASHES[repeat % len(_DASHES)], **shared,
        )  # fmt: skip
        ax.plot(
            *points[hollow].T, linestyle="none", markersize=4.5, markerfacecolor="white",
            zorder=line.get_zorder() + 1, **shared,
        )  # fmt: skip
        lines.append(line)
    for metric, draw in ((x, ax.axvline), (y, ax.axhline)):
        if any(metric in run.below_reference for run in comparison.rows):
            limit = getattr(comparison.reference_error, metric)
            draw(limit, color="0.5", linestyle=":", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel=_metric_label(x), ylabel=_metric_label(y))
    ax.legend()
    return lines


def _metric_label(name: str) -> str:
    """A metric in words, with its unit."""
    words, unit = name.replace("_", " "), UNITS.get(name, "")
    return f"{words} (s)" if unit == "s" else words


def mean_band(
    x: Numbers,
    values: Numbers,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    axis: int = 0,
    color: ColorType | None = None,
) -> list[Artist]:
    """Draw the mean over `axis` of two-dimensional `values`, in a band of ± one standard deviation.

    The deviation is that of the values at hand (divided by their number). The axes keep their
    labels. Returns the line and the band. Raises `ShapeError` if the other axis is not that of `x`.
    """
    x, values = as_host_array(x, "x"), as_host_array(values, "values", finite=False)
    axis = checked_integer(axis, "axis", at_least=-2, at_most=1)
    _check_style(label, color)
    if values.ndim != 2 or x.shape != (values.shape[1 - axis % 2],):
        raise ShapeError(
            f"values of shape {values.shape} without axis {axis} do not match x of shape {x.shape}"
        )
    mean, deviation = values.mean(axis=axis), values.std(axis=axis)
    ax = checked_axes(ax)
    (line,) = ax.plot(x, mean, label=label, color=color)
    band = fill_band(ax, line, mean - deviation, mean + deviation)
    if label is not None:
        ax.legend()
    return [line, band]


def fill_band(ax: Axes, line: Line2D, low: np.ndarray, high: np.ndarray) -> Artist:
    """Draw the band of a line, in its colour."""
    x: Any = line.get_xdata()
    return ax.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)


def _check_style(label: str | None, color: ColorType | None = None) -> None:
    if label is not None:
        check_instance(label, "label", str, "a text")
    if not (color is None or is_color_like(color)):
        raise InputError(f"color must be a colour of matplotlib, got {color!r}")


def _checked_sample(sample: int, samples: int) -> int:
    return checked_integer(sample, "sample", at_least=0, at_most=samples - 1, error=ShapeError)


def _checked(trajectory: Trajectory, sample: int) -> tuple[np.ndarray, int]:
    """The times of a trajectory, and the sample that it has."""
    check_instance(trajectory, "trajectory", Trajectory, "a pcdyn.Trajectory")
    stack = trajectory.networks is not None
    times, shape = np.asarray(trajectory.times), np.shape(trajectory.energies)[1 + stack : -1]
    if stack and np.any(times != times[:1]):
        raise ShapeError("these networks are saved at different times: simulate all at the same")
    return times[0] if stack else times, _checked_sample(sample, shape[0] if shape else 1)


def _bands(
    result: Trajectory | Equilibrium, values: Values, sample: int, *, axis: int, dimensions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 10 % quantile, the median and the 90 % quantile over the networks without a failure.

    Of one network, three times what is of its sample.
    """
    ok = result.without_failure
    if ok is None:
        one = _of_sample(np.asarray(values), sample, axis=axis, dimensions=dimensions)
        return one, one, one
    if not ok.any():
        raise ShapeError("there is nothing to draw: each of these networks ended with a failure")
    each = _of_sample(np.asarray(values), sample, axis=axis + 1, dimensions=dimensions + 1)
    low, median, high = np.quantile(each[ok], QUANTILES, axis=0)
    return low, median, high


def _of_sample(values: np.ndarray, sample: int, *, axis: int, dimensions: int) -> np.ndarray:
    """`values` of one sample; without an axis for the batch they have `dimensions` axes."""
    return values.take(sample, axis=axis) if values.ndim > dimensions else values
