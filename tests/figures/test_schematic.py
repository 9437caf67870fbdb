"""Drawings of networks show the numbers that they are given."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from pcdyn.errors import ShapeError
from pcdyn.plotting import schematic
from tests.networks import build_case

LAYOUT = schematic.Layout((2, 3, 1), origin=(1.0, -1.0), layer_distance=2.0, unit_distance=0.5)


@pytest.fixture
def axes() -> Iterator[Axes]:
    yield plt.subplots()[1]
    plt.close("all")


def test_units_stand_in_columns() -> None:
    """Layers from left to right, units from top to bottom, each column about the same middle."""
    assert LAYOUT.unit(0, 0) == (1.0, -0.75)
    assert LAYOUT.unit(1, 2) == (3.0, -1.5)
    assert LAYOUT.middle(2) == LAYOUT.unit(2, 0) == (5.0, -1.0)
    assert LAYOUT.half_height(1) == pytest.approx(0.5 + LAYOUT.radius)


def test_units_are_coloured_by_sign_and_size(axes: Axes) -> None:
    """Red above zero, blue below, paler where smaller; what is beyond `largest` is full."""
    patches = schematic.units(
        axes, LAYOUT, [[1.0, -1.0], [0.5, 0.0, 9.0]], largest=1.0, layers=(0, 1), clamped=(0,)
    )
    colors = np.array([to_rgb(p.get_facecolor()) for p in patches])
    red, _, blue = colors.T
    assert red[0] > blue[0]
    assert red[1] < blue[1]
    assert colors[2].sum() > colors[0].sum()
    assert np.all(colors[3] > 0.95)
    assert np.array_equal(colors[4], colors[0])
    assert patches[0].get_linewidth() > patches[2].get_linewidth()


def test_weights_are_as_wide_as_they_are_large(axes: Axes) -> None:
    """One line per weight of each layer, from its unit below to its unit above."""
    case = build_case(seed=0, widths=(2, 3, 1))
    drawn = schematic.weights(axes, LAYOUT, case.network, width=2.0)
    for layer, (lines, weight) in enumerate(zip(drawn, case.weights, strict=True), start=1):
        sizes = np.abs(weight).reshape(-1)
        np.testing.assert_allclose(lines.get_linewidths(), 2 * sizes / sizes.max())
        last = lines.get_segments()[-1]
        np.testing.assert_allclose(last[0], LAYOUT.unit(layer - 1, weight.shape[1] - 1))
        np.testing.assert_allclose(last[1], LAYOUT.unit(layer, weight.shape[0] - 1))


def test_signals_are_as_wide_as_what_they_carry(axes: Axes) -> None:
    """In proportion, with a least width; NaN leaves an arrow out."""
    arrows = schematic.signals(
        axes, LAYOUT, np.array([2.0, 1.0]), backward=True, largest=2.0, color="black", width=4.0
    )
    assert [a.get_linewidth() for a in arrows] == [4.0, 2.0]
    (thin,) = schematic.signals(
        axes, LAYOUT, np.array([np.nan, 0.0]), backward=False, largest=1.0, color="black"
    )
    assert thin.get_linewidth() == schematic.THINNEST


def test_what_does_not_fit_is_refused(axes: Axes) -> None:
    with pytest.raises(ShapeError, match="layers"):
        schematic.units(axes, LAYOUT, [[1.0], [1.0] * 3, [1.0]], largest=1.0)
    with pytest.raises(ShapeError, match="2 pairs"):
        schematic.signals(axes, LAYOUT, np.ones(1), backward=True, largest=1.0, color="k")
    with pytest.raises(ShapeError, match="layout"):
        schematic.weights(axes, LAYOUT, build_case(seed=0, widths=(2, 2, 1)).network)
