"""What a result offers beside its numbers: text, pictures and data sets that hold just these."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt

import pcdyn
from pcdyn import Status, Trajectory, equilibrium, learning, plotting, simulate
from pcdyn.analysis.convergence_order import ConvergenceOrder
from pcdyn.equilibria.equilibrium import Basin, Equilibrium
from pcdyn.equilibria.multiple import Equilibria
from pcdyn.errors import EquilibriumStatus, InputError
from pcdyn.integrators.statistics import Statistics
from tests.networks import Case, build_case

CASE = build_case(seed=3, widths=(3, 4, 2), activations=("tanh",), batch=3)


@pytest.fixture(scope="module")
def found() -> Equilibrium:
    return equilibrium(CASE.problem)


def test_an_equilibrium_as_a_data_set(found: Equilibrium) -> None:
    """Energies are summed again in NumPy from the errors in the data set."""
    data = found.to_xarray()
    for l, x in enumerate(found.activities):
        np.testing.assert_array_equal(data[f"activity_{l}"].transpose("sample", ...), x)
    energies = [
        0.5 * np.einsum("bi,ij,bj->b", error, _matrix(CASE, l), error)
        for l, error in enumerate((data[f"prediction_error_{l}"].values for l in (1, 2)), start=1)
    ]
    np.testing.assert_allclose(data.energy.values.T, energies, rtol=1e-12)
    np.testing.assert_allclose(data.free_energy, np.sum(energies, axis=0), rtol=1e-12)
    assert data.status.flag_values[int(data.status[0])] == EquilibriumStatus.CONVERGED
    assert data.free_layer.values.tolist() == [1]


def _matrix(case: Case, l: int) -> np.ndarray:
    width = case.network.widths[l]
    precision = case.problem.energy[l - 1].precision
    value = np.eye(width) if precision is None else np.asarray(precision)
    return value if value.ndim == 2 else value * np.eye(width)


def test_an_equilibrium_draws_itself(found: Equilibrium) -> None:
    figure, ax = plt.subplots()
    at_rest, start = found.plot(ax, sample=2)
    np.testing.assert_array_equal(at_rest.get_ydata(), found.activities[1][2])
    np.testing.assert_array_equal(start.get_ydata(), np.asarray(found.start[0])[2])
    plt.close(figure)


def test_what_it_prints_is_its_summary(found: Equilibrium) -> None:
    run = simulate(CASE.problem, t1=1.0)
    assert isinstance(run, Trajectory)
    for result in (found, run):
        assert str(result) == repr(result) == result.summary()
        assert "3 samples" in result.summary()


def test_statistics_are_one_value_from_the_integrator_to_the_table() -> None:
    """Of three samples with steps of their own: sums and means, and NaN for what is not known."""
    run = simulate(CASE.problem, t1=1.0, integrator="kvaerno3", per_sample=True)
    statistics = run.statistics
    assert statistics.accepted_steps is run.accepted_steps and run.accepted_steps.shape == (3,)
    assert statistics.total().accepted_steps == sum(run.accepted_steps.tolist())
    assert statistics.mean().accepted_steps == sum(run.accepted_steps.tolist()) / 3
    assert statistics.total().vector_field_evaluations is None
    assert np.isnan(statistics.mean().vector_field_evaluations)
    assert statistics.mean().run_seconds == run.run_seconds > 0


def test_a_status_prints_its_name() -> None:
    assert f"{Status.REACHED_T1}, {EquilibriumStatus.SLIDING:>8}" == "REACHED_T1,  SLIDING"
    assert str(Status(1)) == "CONVERGED" and int(Status.CONVERGED) == 1


def test_where_the_flow_ends_is_told_in_counts(found: Equilibrium) -> None:
    """Of a thousand samples, made by hand: 990 agree, 6 rest elsewhere, 4 do not rest."""
    agrees, settled = np.arange(1000) < 990, np.arange(1000) < 996
    basin = Basin(agrees, settled, np.linspace(0, 2, 1000), np.r_[0, np.full(999, 3.0)], found)
    assert not basin.ok and str(basin) == repr(basin) == basin.summary()
    for words in ("in 990 of 1000 samples", "elsewhere in 6", "rest in 4", "at most 2"):
        assert words in basin.summary()
    assert dataclasses.replace(basin, agrees=np.ones(1000, bool)).ok
    figure, ax = plt.subplots()
    same, others = basin.plot(ax)
    # The first has a distance of 0, and stands below the least that is not.
    assert 0 < same.get_xdata()[0] < 3
    assert 0 < same.get_ydata()[0] < same.get_ydata()[1] == basin.distance[1]
    np.testing.assert_array_equal(others.get_ydata(), basin.distance[990:])
    plt.close(figure)
    data = basin.to_xarray()
    assert data.attrs["message"] == basin.message
    assert (int(data.agrees.sum()), int((~data.settled).sum())) == (990, 4)
    np.testing.assert_array_equal(data.distance, basin.distance)


def test_several_equilibria_print_draw_and_are_a_data_set(found: Equilibrium) -> None:
    """Two made by hand, of which the lower is stable, from three starts, one of them lost."""
    layers = tuple(np.array([x[0], -x[0]]) for x in found.activities)
    ends = np.array([1, -1, 0])
    both = Equilibria(layers, np.array([0.5, 0.75]), np.array([1.0, -2.0]), ends, found)
    assert not both.ok and both.status == found.status
    first, *rest = str(both).splitlines()
    assert first == "2 equilibria, 1 of them stable, from 3 starts, 1 of which found none"
    assert len(rest) == 2 and "eigenvalue -2, reached from 1" in rest[1]
    data = both.to_xarray()
    assert data.stable.values.tolist() == [True, False]
    np.testing.assert_array_equal(data.basin_of, ends)
    np.testing.assert_array_equal(data.activity_1, layers[1])
    figure, ax = plt.subplots()
    lines = both.plot(ax)
    for line, values in zip(lines, layers[1], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert [line.get_markerfacecolor() == "none" for line in lines] == [False, True]
    plt.close(figure)


def test_an_order_prints_draws_and_is_a_data_set() -> None:
    steps = np.array([0.5, 0.25, 0.125, 0.0625])
    usable = np.array([False, True, True, True])
    order = ConvergenceOrder(2.0, steps, steps**2, usable, 1e-9, "heun")
    assert str(order) == repr(order) == order.summary()
    assert order.summary().startswith("heun: order 2.00 from 3 steps 0.25 to 0.0625")
    data = order.to_xarray()
    np.testing.assert_array_equal(data.error[data.usable], steps[1:] ** 2)
    figure, ax = plt.subplots()
    every, used = order.plot(ax)
    assert len(every.get_xdata()) == 4
    np.testing.assert_array_equal(used.get_ydata(), steps[1:] ** 2)
    assert [line.get_ydata() for line in ax.lines[2:]] == [[1e-9, 1e-9]]
    plt.close(figure)


def test_a_training_prints_and_draws_its_history() -> None:
    """Three seeds, two epochs of two batches: quantiles of 1, 2, 3 are those of a straight line."""
    loss = np.array([1.0, 2.0, 3.0])[:, None, None] * np.array([[4.0, 3.0], [2.0, 1.0]])
    network = pcdyn.mlp([2, 2], activation="identity", key=jax.random.key(0))
    history = {"loss": loss, "accuracy": loss / 12, "cosine": loss[..., None]}
    done = learning.Training(network, history, {}, None, "bp")
    assert str(done) == repr(done) == done.summary()
    assert done.summary().splitlines() == [
        "Training by bp: 3 seeds, 2 epochs of 2 batches",
        "  loss 7 in the first epoch, 3 in the last",
    ]
    _, ax = plt.subplots()
    line, band = done.plot(ax)
    np.testing.assert_array_equal(line.get_xdata(), [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_array_equal(line.get_ydata(), [8, 6, 4, 2])
    corners = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose((corners.min(), corners.max()), (1.2, 11.2), rtol=1e-12)
    with pytest.raises(InputError, match="metric"):
        plotting.training(done, ax=ax, metric="cosine")
    # One seed has no band; without axes there is a figure of its own.
    alone = learning.Training(network, {k: v[0] for k, v in history.items()}, {}, None, "bp")
    (single,) = alone.plot(metric="accuracy")
    np.testing.assert_allclose(single.get_ydata(), np.array([4, 3, 2, 1]) / 12)
    plt.close("all")


def test_statistics_of_some_samples_are_replaced() -> None:
    """The others stay, each sample has its own, and what one side does not know nobody does."""
    ours = Statistics(np.array([1, 2, 3]), None, 4, np.array([5, 6, 7]))
    theirs = Statistics(np.array([7, 9]), np.array([1, 1]), np.array([8, 10]), None)
    found = ours.replaced(np.array([0, 2]), theirs, 3)
    np.testing.assert_array_equal(found.vector_field_evaluations, [7, 2, 9])
    np.testing.assert_array_equal(found.accepted_steps, [8, 4, 10])
    assert found.jacobian_evaluations is None and found.rejected_steps is None


def test_several_networks_print_draw_and_are_a_data_set(found: Equilibrium) -> None:
    """Made of one equilibrium times 1, 2, 3, and one that was not found."""
    scaled = [
        dataclasses.replace(found, activities=tuple(k * x for x in found.activities))
        for k in (1.0, 2.0, 3.0, np.nan)
    ]
    several = jax.tree.map(lambda *x: np.stack(x), *scaled)
    codes = np.full((4, 3), EquilibriumStatus.CONVERGED)
    codes[3, 1] = EquilibriumStatus.STALLED
    several = eqx.tree_at(lambda e: e.status_codes, several, codes)
    assert several.networks == 4 and not several.ok
    assert "Equilibrium of 4 networks" in str(several) and "11 CONVERGED, 1 STALLED" in str(several)
    assert several.to_xarray().activity_1.dims == ("network", "sample", "unit_1")
    figure, ax = plt.subplots()
    at_rest, start = several.plot(ax, sample=2)
    np.testing.assert_allclose(at_rest.get_ydata(), 2 * found.activities[1][2], rtol=1e-12)
    np.testing.assert_array_equal(start.get_ydata(), np.asarray(found.start[0])[2])
    ends = np.array([segment[:, 1] for segment in ax.collections[0].get_segments()])
    quantiles = np.sort(np.outer(found.activities[1][2], [1.2, 2.8]))
    np.testing.assert_allclose(ends, quantiles, rtol=1e-12)
    plt.close(figure)
