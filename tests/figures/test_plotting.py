"""Figures show the arrays of a trajectory, unchanged and labelled."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from pcdyn import Trajectory, plotting, simulate
from pcdyn.errors import ShapeError, Status
from tests.networks import build_case

TIME = "time (activity time constants)"


@pytest.fixture(autouse=True)
def _no_figure_stays() -> Iterator[None]:
    yield
    plt.close("all")


def _trajectory(batch: int | None = None) -> Trajectory:
    case = build_case(seed=5, widths=(2, 3, 2, 1), activations=["tanh"], batch=batch)
    return simulate(case.problem, t1=5.0, times=np.linspace(0, 5, 21))


@pytest.fixture(scope="module")
def single() -> Trajectory:
    return _trajectory()


@pytest.fixture(scope="module")
def batch() -> Trajectory:
    return _trajectory(batch=3)


def _data(line: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def _axes(artist: Any) -> Any:
    return artist.axes


def _texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_activities_are_those_of_the_free_layers(single: Trajectory) -> None:
    lines = plotting.activities(single)
    expected = [
        (f"layer {layer}, unit {unit}", single.activities[layer][:, unit])
        for layer, width in ((1, 3), (2, 2))
        for unit in range(width)
    ]
    assert len(lines) == len(expected)
    for line, (label, values) in zip(lines, expected, strict=True):
        x, y = _data(line)
        np.testing.assert_array_equal(x, single.times)
        np.testing.assert_array_equal(y, values)
        assert line.get_label() == label
    ax = _axes(lines[0])
    assert (ax.get_xlabel(), ax.get_ylabel()) == (TIME, "activity")
    assert _texts(ax) == [label for label, _ in expected]


def test_activities_of_one_layer_and_sample(batch: Trajectory) -> None:
    lines = plotting.activities(batch, layer=2, sample=1)
    for unit, line in enumerate(lines):
        np.testing.assert_array_equal(_data(line)[1], batch.activities[2][:, 1, unit])
    assert len(lines) == 2
    (output,) = plotting.activities(batch, layer=3, sample=2)
    np.testing.assert_array_equal(_data(output)[1], batch.activities[3][:, 2, 0])


@pytest.mark.parametrize("of_sample", [True, False])
def test_equilibria_are_dashed_in_the_colours_of_their_units(
    of_sample: bool, batch: Trajectory
) -> None:
    equilibrium = [x[1] if of_sample else x for x in batch.final]
    lines = plotting.activities(batch, sample=1, equilibrium=equilibrium)
    assert len(lines) == 10
    units = [(layer, unit) for layer, width in ((1, 3), (2, 2)) for unit in range(width)]
    for (layer, unit), line, dashed in zip(units, lines[:5], lines[5:], strict=True):
        assert set(_data(dashed)[1]) == {batch.final[layer][1, unit]}
        assert dashed.get_linestyle() == "--"
        assert dashed.get_color() == line.get_color()
    assert len(_texts(lines[0].axes)) == 5


def test_an_equilibrium_of_some_layers(single: Trajectory) -> None:
    lines = plotting.activities(single, equilibrium=(None, None, single.final[2], None))
    assert [line.get_linestyle() for line in lines] == ["-"] * 5 + ["--"] * 2
    assert [line.get_color() for line in lines[5:]] == [line.get_color() for line in lines[3:5]]


def test_trajectory_plot_draws_the_activities(single: Trajectory) -> None:
    _, ax = plt.subplots()
    lines = single.plot(ax, layer=1)
    assert all(line.axes is ax for line in lines)
    np.testing.assert_array_equal(_data(lines[2])[1], single.activities[1][:, 2])


def test_many_units_have_no_legend() -> None:
    case = build_case(seed=1, widths=(2, 9, 1))
    lines = plotting.activities(simulate(case.problem, t1=1.0))
    assert len(lines) == 9
    assert _axes(lines[0]).get_legend() is None


def test_energies(batch: Trajectory) -> None:
    lines = plotting.energies(batch, sample=2)
    expected = (batch.output_loss, batch.residual_energy, batch.free_energy)
    for line, values in zip(lines, expected, strict=True):
        np.testing.assert_array_equal(_data(line)[0], batch.times)
        np.testing.assert_array_equal(_data(line)[1], values[:, 2])
    ax = _axes(lines[0])
    assert (ax.get_xlabel(), ax.get_ylabel()) == (TIME, "energy")
    assert [text.split()[0] for text in _texts(ax)] == ["output", "residual", "free"]


@pytest.mark.parametrize(("log", "scale"), [(True, "log"), (False, "linear")])
def test_distance(log: bool, scale: str, single: Trajectory) -> None:
    values = single.distance_to(single.final)
    (line,) = plotting.distance(single.times, values, label="to the end", log=log)
    np.testing.assert_array_equal(_data(line)[0], single.times)
    np.testing.assert_array_equal(_data(line)[1], values)
    ax = _axes(line)
    assert ax.get_yscale() == scale
    assert (ax.get_xlabel(), ax.get_ylabel()) == (TIME, "Euclidean distance")
    assert _texts(ax) == ["to the end"]


def test_distances_of_a_batch_share_colour_and_label(batch: Trajectory) -> None:
    values = batch.distance_to([np.zeros_like(x[0]) for x in batch.activities])
    lines = plotting.distance(batch.times, values, label="from zero")
    for line, column in zip(lines, values.T, strict=True):
        np.testing.assert_array_equal(_data(line)[1], column)
    assert len({line.get_color() for line in lines}) == 1
    assert _texts(lines[0].axes) == ["from zero"]
    assert _axes(plotting.distance(batch.times, values)[0]).get_legend() is None


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_mean_band(axis: int) -> None:
    x = np.arange(4.0)
    seeds = np.random.default_rng(0).normal(size=(3, 4))
    values = seeds if axis in (0, -2) else seeds.T
    line, band = plotting.mean_band(x, values, axis=axis, label="seeds", color="C3")
    np.testing.assert_array_equal(_data(line)[0], x)
    np.testing.assert_allclose(_data(line)[1], seeds.mean(axis=0))
    low, high = seeds.mean(axis=0) - seeds.std(axis=0), seeds.mean(axis=0) + seeds.std(axis=0)
    corners = band.get_paths()[0].vertices
    for position, ends in zip(x, zip(low, high, strict=True), strict=True):
        heights = corners[corners[:, 0] == position, 1]
        np.testing.assert_allclose((heights.min(), heights.max()), ends)
    assert _texts(line.axes) == ["seeds"]


def _draw(single: Trajectory, ax: Any = None) -> dict[str, Any]:
    """Every function, on `ax`."""
    return {
        "activities": lambda: plotting.activities(single, ax=ax, equilibrium=single.final),
        "distance": lambda: plotting.distance(
            single.times, single.free_energy, ax=ax, label="curve"
        ),
        "energies": lambda: plotting.energies(single, ax=ax),
        "mean_band": lambda: plotting.mean_band(
            single.times, single.activities[1], ax=ax, axis=1, label="units"
        ),
    }


NAMES = ("activities", "distance", "energies", "mean_band")


@pytest.mark.parametrize("name", NAMES)
def test_given_axes_are_used(name: str, single: Trajectory) -> None:
    ax = Figure().subplots()
    artists = _draw(single, ax)[name]()
    assert artists and all(artist.axes is ax for artist in artists)
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_data_give_the_same_picture(name: str, single: Trajectory) -> None:
    pictures = []
    for _ in range(2):
        file = io.BytesIO()
        with plotting.style():
            _draw(single)[name]()[0].get_figure().savefig(file, format="png")
        pictures.append(file.getvalue())
    assert pictures[0] == pictures[1]


def test_the_style_ends_with_its_context(single: Trajectory) -> None:
    before = matplotlib.rcParams.copy()
    with plotting.style():
        assert not matplotlib.rcParams["axes.spines.top"]
        assert matplotlib.rcParams["figure.constrained_layout.use"]
    assert matplotlib.rcParams == before
    ax = _axes(plotting.energies(single)[0])
    assert not ax.spines["top"].get_visible()
    assert matplotlib.rcParams == before


def test_a_figure_drawn_outside_the_style_keeps_it(single: Trajectory) -> None:
    ax = _axes(plotting.energies(single)[0])
    with plotting.style():
        size = plt.subplots()[1].get_xticklabels()[0].get_fontsize()
    ax.figure.canvas.draw()
    assert {label.get_fontsize() for label in ax.get_xticklabels()} == {size}


def test_several_networks_are_drawn_as_medians_in_bands(batch: Trajectory) -> None:
    """Made of one run times 1 … 5, and a run that failed: quantiles of a straight line."""
    scaled = [
        dataclasses.replace(
            batch, activities=tuple(k * x for x in batch.activities), energies=k * batch.energies
        )
        for k in (1.0, 2.0, 3.0, 4.0, 5.0, np.nan)
    ]
    codes = np.array([Status.REACHED_T1] * 5 + [Status.NON_FINITE])
    several = jax.tree.map(lambda *x: np.stack(x), *scaled)
    several = eqx.tree_at(lambda t: t.status_codes, several, codes)
    lines = plotting.activities(several, layer=1, sample=2)
    ax = _axes(lines[0])
    for unit, (line, band) in enumerate(zip(lines, ax.collections, strict=True)):
        values = batch.activities[1][:, 2, unit]
        np.testing.assert_allclose(line.get_ydata(), 3 * values, rtol=1e-12)
        edges = np.concatenate([1.4 * values, 4.6 * values])
        drawn = band.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose((drawn.min(), drawn.max()), (edges.min(), edges.max()))
    _, _, free_energy = plotting.energies(several, sample=1)
    np.testing.assert_allclose(free_energy.get_ydata(), 3 * batch.free_energy[:, 1], rtol=1e-12)
    text = repr(several)
    assert "6 networks" in text and "5 REACHED_T1, 1 NON_FINITE" in text
    plt.close("all")


def test_what_is_not_there_is_refused(single: Trajectory, batch: Trajectory) -> None:
    several = jax.tree.map(lambda x: np.stack([x, x]), single)
    failed = eqx.tree_at(lambda t: t.status_codes, several, np.array([Status.MAX_STEPS] * 2))
    shifted = eqx.tree_at(lambda t: t.times, several, several.times + np.array([[0.0], [1.0]]))
    for draw, message in (
        (lambda: plotting.activities(single, layer=4), "layer must be .* at most 3, got 4"),
        (lambda: plotting.activities(single, layer=-1), "layer must be .* got -1"),
        (lambda: plotting.activities(single, sample=1), "sample must be .* at most 0, got 1"),
        (lambda: plotting.energies(batch, sample=3), "sample must be .* at most 2, got 3"),
        (lambda: plotting.activities(single, equilibrium=single.final[1:]), "got 3 layers"),
        (lambda: plotting.activities(single, equilibrium=single.final[::-1]), "has shape"),
        (lambda: plotting.activities(failed), "ended with a failure"),
        (lambda: plotting.energies(failed), "ended with a failure"),
        (lambda: plotting.energies(shifted), "different times"),
        (lambda: plotting.distance(single.times, np.ones(3)), "got \\(3,\\)"),
        (lambda: plotting.mean_band(np.ones(3), np.ones((3, 4))), "do not match"),
    ):
        with pytest.raises(ShapeError, match=message):
            draw()
    assert not plt.get_fignums()
