"""Results survive xarray and NetCDF to the bit, and damaged files say what they are."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import xarray

import pcdyn
from pcdyn import Trajectory, learning, simulate
from pcdyn.analysis.comparison.reference_solution import Errors
from pcdyn.analysis.comparison.table import Run
from pcdyn.errors import DataError, InputError, ShapeError, Status
from pcdyn.integrators import Diffrax, Statistics
from pcdyn.io import trajectories
from tests.networks import build_case

COUNTS = (
    "vector_field_evaluations",
    "jacobian_evaluations",
    "accepted_steps",
    "rejected_steps",
)


def _trajectory(
    batch: int | None = None, clamp: str = "both", widths: tuple[int, ...] = (2, 3, 2, 1),
    **options: Any,
) -> Trajectory:  # fmt: skip
    case = build_case(seed=3, widths=widths, activations=["tanh"], clamp=clamp, batch=batch)
    times = np.linspace(0, 2, 5)
    return simulate(case.problem, **{"t1": 2.0, "times": times, **options})


@functools.cache
def _single() -> Trajectory:
    return _trajectory()


@functools.cache
def _without_counts() -> Trajectory:
    trajectory = _trajectory(integrator="kvaerno3")
    assert trajectory.vector_field_evaluations is None
    return trajectory


@functools.cache
def _batch() -> Trajectory:
    return _trajectory(batch=3, clamp="input", widths=(2, 3, 2))


def _generative() -> Trajectory:
    return _trajectory(clamp="none", widths=(2, 1), initial="zeros")


def _failed_samples() -> Trajectory:
    """Samples that ended in different ways, with NaN after the end of one."""
    trajectory = _trajectory(batch=3, per_sample=True, until="equilibrium", t1=200.0)
    activities = tuple(np.array(x) for x in trajectory.activities)
    for layer in activities:
        # Of unusual bits, for those of an ordinary NaN could be restored by chance.
        layer[-1, 1] = np.array(0xFFF8_0000_0000_BEEF, np.uint64).view(np.float64)
    codes = np.array([Status.CONVERGED, Status.NON_FINITE, Status.REACHED_T1])
    return eqx.tree_at(lambda t: (t.activities, t.status_codes), trajectory, (activities, codes))


def _fallback() -> Trajectory:
    trajectory = _trajectory(integrator=Diffrax("tsit5", max_steps=1))
    assert trajectory.fallback
    return trajectory


def _float32() -> Trajectory:
    return jax.tree.map(lambda x: x.astype(np.float32) if np.ndim(x) else x, _single())


TRAJECTORIES = [
    _single, _without_counts, _batch, _generative, _failed_samples, _fallback, _float32,
]  # fmt: skip


def assert_same(actual: Trajectory, expected: Trajectory) -> None:
    """Equal to the bit, in all but dense output."""
    assert actual.interpolation is None
    expected = dataclasses.replace(expected, interpolation=None)
    ours = jax.tree_util.tree_flatten_with_path(actual)[0]
    theirs = jax.tree_util.tree_flatten_with_path(expected)[0]
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), path
        assert one.tobytes() == other.tobytes(), path
    for name in ("integrator", "fallback", "message", "free_layers", "status"):
        assert getattr(actual, name) == getattr(expected, name)
    for name in COUNTS:
        assert (getattr(actual, name) is None) == (getattr(expected, name) is None)


@pytest.mark.parametrize("make", TRAJECTORIES)
def test_round_trips_are_exact(make: Any, tmp_path: Path) -> None:
    trajectory = make()
    assert_same(trajectories.from_xarray(trajectory.to_xarray()), trajectory)
    path = tmp_path / "run.nc"
    trajectory.to_netcdf(path)
    loaded = pcdyn.load(path)
    assert_same(loaded, trajectory)
    assert repr(loaded) == repr(trajectory)
    assert os.listdir(tmp_path) == ["run.nc"]


SAMPLES = build_case(seed=3, widths=(2, 3, 2), activations=["tanh"], batch=3).problem


@functools.cache
def _equilibrium() -> pcdyn.Equilibrium:
    return pcdyn.equilibrium(SAMPLES)


def _sliding() -> pcdyn.Equilibrium:
    """Of one sample, with a status, a tolerance and kinks of its own."""
    found = jax.tree.map(lambda x: x[0] if np.ndim(x) and len(x) == 3 else x, _equilibrium())
    case = build_case(seed=3, widths=(2, 3, 2), activations=["tanh"])
    at_kink = (np.array([True, False, True]), np.array([False, True]))
    found = dataclasses.replace(found, problem=case.problem, at_kink=at_kink, given_tolerance=0.1)
    return dataclasses.replace(found, status_codes=np.array(pcdyn.EquilibriumStatus.SLIDING))


def _turning() -> pcdyn.Stability:
    """Complex rates, as of a flow that is none of inference."""
    rates = np.array([[-0.5 - 2j, -0.5 + 2j, 3.0 + 0j], [0.1, 0.2, 0.3]])
    shares = np.array([[0.25, 0.75], [0.5, 0.5]])
    return pcdyn.Stability(
        rates, shares, shares[::-1], np.array([False, True]), times=np.array([0.0, 0.1]),
        units=3, free_layers=(0, 1), at="all times of a trajectory",
    )  # fmt: skip


def _comparison() -> pcdyn.Comparison:
    """With what is not known, and an error that the reference cannot tell."""
    errors = Errors(1e-3, 2e-3, 1 / 3, 4e-9, float("nan"))
    statistics = Statistics(float("nan"), 0.0, 7.5, float("nan"), 0.25, 0.125)
    run = Run(
        integrator="tsit5", setting="rtol", value=1e-3, status=Status.MAX_STEPS, message="slow, ε",
        below_reference=("energy_error",), statistics=statistics, **vars(errors),
    )  # fmt: skip
    other = dataclasses.replace(run, integrator="exact", setting="", value=float("nan"))
    return pcdyn.Comparison(
        rows=(run, other), reference="dopri8", second="radau", reference_error=errors,
        displacement=0.7, energy_loss=0.1, t1=2.0, repeats=3,
    )  # fmt: skip


RESULTS = {
    "problem": lambda: SAMPLES,
    "equilibrium": _equilibrium,
    "sliding equilibrium": _sliding,
    "stability": lambda: pcdyn.stability(SAMPLES, at="feedforward"),
    "turning stability": _turning,
    "comparison": _comparison,
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_saved_is_loaded_as_the_same_kind(name: str, tmp_path: Path) -> None:
    """Every array to the bit, and every name and number beside them."""
    thing = RESULTS[name]()
    pcdyn.save(thing, tmp_path / "thing.nc")
    loaded = pcdyn.load(tmp_path / "thing.nc")
    assert type(loaded) is type(thing) and repr(loaded) == repr(thing)
    ours, structure = jax.tree.flatten(loaded)
    theirs, expected = jax.tree.flatten(thing)
    assert structure == expected
    for one, other in zip(map(np.asarray, ours), map(np.asarray, theirs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == other.tobytes()


@pytest.mark.unchecked
def test_what_cannot_be_made_again_says_how_to_read_it(tmp_path: Path) -> None:
    path = tmp_path / "training.nc"
    network = pcdyn.mlp([2, 2], activation="identity", key=jax.random.key(0))
    pcdyn.save(learning.Training(network, {"loss": np.ones((1, 2))}, {}, None, "bp"), path)
    with xarray.open_dataset(path) as dataset:
        assert dataset.loss.dims == ("epoch", "batch")
    with pytest.raises(DataError, match=r"holds a Training, which .*xarray\.open_dataset"):
        pcdyn.load(path)
    with pytest.raises(InputError, match="no file format for Network: give a result"):
        pcdyn.save(network, tmp_path / "network.nc")
    assert os.listdir(tmp_path) == ["training.nc"]


@pytest.mark.parametrize("name", ["equilibrium", "stability", "comparison"])
def test_a_result_that_lacks_a_part_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "thing.nc"
    pcdyn.save(RESULTS[name](), path)
    with xarray.open_dataset(path, mask_and_scale=False) as dataset:
        part = {"equilibrium": "start_1", "stability": "rates", "comparison": "l2_error"}[name]
        dataset.load().drop_vars(part).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(DataError, match=rf"other\.nc: .*lacks '{part}'"):
        pcdyn.load(tmp_path / "other.nc")


def test_dense_output_is_not_stored(tmp_path: Path) -> None:
    trajectory = _trajectory(dense=True)
    trajectory.to_netcdf(tmp_path / "run.nc")
    assert trajectory.interpolation is not None
    assert_same(pcdyn.load(tmp_path / "run.nc"), trajectory)


@pytest.mark.parametrize("engine", ["h5netcdf", None])
def test_plain_xarray_reads_the_file(engine: Any, tmp_path: Path) -> None:
    # Not from the feedforward pass, where all energies vanish.
    trajectory = _trajectory(batch=3, clamp="input", widths=(2, 3, 2), initial="zeros")
    assert np.all(trajectory.output_loss[0] != trajectory.residual_energy[0])
    trajectory.to_netcdf(tmp_path / "run.nc")
    with xarray.open_dataset(tmp_path / "run.nc", engine=engine) as dataset:
        dataset.load()
    assert dict(dataset.sizes) == {
        "time": 5, "sample": 3, "unit_0": 2, "unit_1": 3, "unit_2": 2, "predicted_layer": 2,
        "free_layer": 2,
    }  # fmt: skip
    assert dataset.activity_1.dims == ("time", "sample", "unit_1")
    assert dataset.prediction_error_2.dims == ("time", "sample", "unit_2")
    assert dataset.energy.dims == ("time", "sample", "predicted_layer")
    assert dataset.vector_field_norm.dims == ("time", "sample", "free_layer")
    assert dataset.status.dims == ()
    assert dataset.time.attrs["units"] == "activity time constants"
    assert dataset.end_time.attrs["units"] == "activity time constants"
    assert all("units" in dataset[name].attrs for name in dataset.data_vars if name != "status")
    assert dataset.predicted_layer.values.tolist() == [1, 2]
    assert dataset.free_layer.values.tolist() == [1, 2]
    assert dataset.attrs["free_layers"].tolist() == [1, 2]
    assert dataset.attrs["integrator"] == trajectory.integrator
    assert dataset.attrs["pcdyn_version"]
    for name in ("free_energy", "output_loss", "residual_energy"):
        assert dataset[name].dims == ("time", "sample")
        np.testing.assert_array_equal(dataset[name], getattr(trajectory, name))


def test_a_count_that_is_not_reported_is_absent() -> None:
    trajectory = _without_counts()
    dataset = trajectory.to_xarray()
    for name in COUNTS:
        assert (name in dataset) == (getattr(trajectory, name) is not None)


def test_results_per_sample_have_the_sample_dimension() -> None:
    dataset = _failed_samples().to_xarray()
    assert dataset.status.dims == dataset.end_time.dims == ("sample",)
    assert dataset.accepted_steps.dims == ("sample",)


def test_several_networks_go_to_a_file_and_back(tmp_path: Path) -> None:
    """Along the dimension `network`, to the bit; of runs at other times there is no data set."""
    one = dataclasses.replace(_batch(), statistics=Statistics(7, 0, 5, 2, 0.25, 0.125))
    one = jax.tree.map(np.asarray, one)
    other = eqx.tree_at(
        lambda t: (t.activities, t.status_codes, t.statistics.run_seconds), one,
        (tuple(2 * x for x in one.activities), np.array(Status.MAX_STEPS), np.array(0.5)),
    )  # fmt: skip
    runs = jax.tree.map(lambda *x: np.stack(x), one, other, one)
    data = runs.to_xarray()
    assert data.activity_1.dims == ("network", "time", "sample", "unit_1")
    assert data.run_seconds.values.tolist() == [0.125, 0.5, 0.125]
    pcdyn.save(runs, tmp_path / "runs.nc")
    loaded = pcdyn.load(tmp_path / "runs.nc")
    assert loaded.networks == 3
    assert_same(loaded, runs)
    later = eqx.tree_at(lambda t: t.times, runs, runs.times + np.arange(3.0)[:, None])
    with pytest.raises(ShapeError, match="no data set in common"):
        later.to_xarray()


def test_equilibria_of_several_networks_go_to_a_file_with_their_problems(tmp_path: Path) -> None:
    one = jax.tree.map(np.asarray, _equilibrium())
    other = jax.tree.map(lambda x: 2 * x if x.dtype.kind in "fi" else ~x, one)
    other = eqx.tree_at(
        lambda e: (e.status_codes, e.problem.input), other, (one.status_codes, one.problem.input)
    )
    found = jax.tree.map(lambda *x: np.stack(x), one, other)
    pcdyn.save(found, tmp_path / "found.nc")
    with xarray.open_dataset(tmp_path / "found.nc") as dataset:
        assert dataset.weight_1.dims == ("network", "unit_1", "unit_0")
    loaded = pcdyn.load(tmp_path / "found.nc")
    assert loaded.networks == 2 and jax.tree.structure(loaded) == jax.tree.structure(found)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(found), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.tobytes() == theirs.tobytes()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*absent\.nc: check the path"):
        pcdyn.load(tmp_path / "absent.nc")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "run.nc"
    _single().to_netcdf(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"run\.nc cannot be read .*truncated.*copy it again"):
        pcdyn.load(path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.nc"
    path.write_text("These are notes. " * 100)
    with pytest.raises(DataError, match=r"notes\.nc cannot be read as NetCDF"):
        pcdyn.load(path)


@pytest.mark.parametrize("missing", ["energy", "time", "free_layer", "activity_1", "message"])
def test_a_netcdf_file_of_something_else_is_named(missing: str, tmp_path: Path) -> None:
    dataset = _single().to_xarray()
    if missing == "message":
        del dataset.attrs["message"]
    else:
        dataset = dataset.drop_vars(missing)
    path = tmp_path / "other.nc"
    dataset.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(DataError, match=r"other\.nc: .*not a trajectory of pcdyn"):
        pcdyn.load(path)
    with pytest.raises(DataError, match="it lacks"):
        trajectories.from_xarray(dataset)


@pytest.mark.parametrize("wrong", [None, [1.0, 2.0], "soon"])
def test_an_attribute_that_is_no_number_is_named(wrong: Any) -> None:
    dataset = _single().to_xarray().assign_attrs(run_seconds=wrong)
    with pytest.raises(DataError, match=r"attribute run_seconds is .* should be a number"):
        trajectories.from_xarray(dataset)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="create the folder"):
        _single().to_netcdf(tmp_path / "absent" / "run.nc")


def _write_half(self: Path, content: bytes) -> None:
    with open(self, "wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("no space left on device")


def _fail(*arguments: Any) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("before", [None, b"an earlier run"])
@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [(Path, "write_bytes", _write_half), (os, "fsync", _fail), (os, "replace", _fail)],
)
def test_a_failed_write_leaves_what_was_there(
    owner: Any, name: str, failure: Any, before: bytes | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "run.nc"
    if before is not None:
        path.write_bytes(before)
    trajectory = _single()
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(DataError, match=r"cannot write .*run\.nc: no space left"):
        trajectory.to_netcdf(path)
    assert os.listdir(tmp_path) == ([] if before is None else ["run.nc"])
    assert before is None or path.read_bytes() == before


def test_an_earlier_file_is_replaced(tmp_path: Path) -> None:
    _batch().to_netcdf(tmp_path / "run.nc")
    trajectory = _single()
    trajectory.to_netcdf(str(tmp_path / "run.nc"))
    assert_same(pcdyn.load(str(tmp_path / "run.nc")), trajectory)
