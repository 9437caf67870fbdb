"""What a result offers beside its numbers: text, pictures and data sets that hold just these."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt

from pcdyn import Trajectory, equilibrium, simulate
from pcdyn.equilibria.equilibrium import Equilibrium
from pcdyn.errors import EquilibriumStatus, ShapeError
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


def test_several_networks_are_no_data_set(found: Equilibrium) -> None:
    several = jax.tree.map(lambda x: np.stack([x, x]), found)
    with pytest.raises(ShapeError, match="several networks"):
        several.to_xarray()
