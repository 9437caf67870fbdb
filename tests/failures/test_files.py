"""Files under the faults of a machine: full disks, killed processes, flipped bits, other programs.

If this fails, an old file is lost, a partial one is taken for a whole one, or numbers are read that
nobody wrote.
"""

from __future__ import annotations

import functools
import gzip
import io
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import xarray

import pcdyn
from networks import build_case
from pcdyn._support import files
from pcdyn.errors import DataError, DtypeError
from pcdyn.io import netcdf, trajectories
from pcdyn.learning import Backpropagation, train

ROOT = Path(__file__).parents[2]


@functools.cache
def trajectory(seed: int = 3, batch: int | None = None) -> pcdyn.Trajectory:
    case = build_case(seed=seed, widths=(2, 3, 2), activations=["tanh"], batch=batch)
    return pcdyn.simulate(case.problem, t1=2.0, times=np.linspace(0, 2, 5))


@functools.cache
def problem() -> pcdyn.InferenceProblem:
    return build_case(seed=1, widths=(2, 2, 2), precision="mixed", bias=True, batch=2).problem


def flatten(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# --- Writing --------------------------------------------------------------------------------------


def _checkpoint(path: Path) -> None:
    import optax

    network = pcdyn.mlp([2, 3, 2], activation="tanh", key=jax.random.key(0))
    train(network, np.ones((2, 2)), np.ones((2, 2)), rule=Backpropagation(), epochs=1,
          batch_size=2, optimiser=optax.sgd(0.1), checkpoint=path,
          key=jax.random.key(0))  # fmt: skip


WRITERS: dict[str, Callable[[Path], Any]] = {
    "trajectory": lambda path: trajectory().to_netcdf(path),
    "problem": lambda path: pcdyn.save_problem(problem(), path),
    "checkpoint": _checkpoint,
    "text": lambda path: files.write_atomically(path, b"x" * 5000),
    "function": lambda path: files.write_atomically(path, lambda p: p.write_text("x" * 5000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_target_of_a_link_is_written_and_modes_are_kept(name: str, tmp_path: Path) -> None:
    """A link to another folder, one whose target is not there yet, a private file, a read-only."""
    write = WRITERS[name]
    (tmp_path / "scratch").mkdir()
    target, link = tmp_path / "scratch" / "target", tmp_path / "link"
    link.symlink_to(target)
    write(link)
    assert link.is_symlink() and target.stat().st_size > 1000
    for mode in (0o600, 0o640, 0o444):
        if name == "checkpoint":
            target.unlink()  # which a training would go on from
        else:
            target.chmod(mode)
        write(link)
        assert name == "checkpoint" or stat.S_IMODE(target.stat().st_mode) == mode
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "scratch", "target"]


_FULL = """
import resource, sys
import numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import tests.conftest
from pathlib import Path
from tests.failures.test_files import WRITERS, trajectory, problem
from pcdyn.errors import DataError
trajectory(), problem()
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[2])
for name, write in WRITERS.items():
    for limit in np.linspace(0, 4999, 6).astype(int).tolist():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            write(folder / name)
            print(name, limit, "written")
        except DataError as error:
            print(name, limit, "refused", str(error).count("File too large"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print("done")
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    """No more than so many bytes can be written: no crash, our error, the old file, nothing else.

    The limit of the size of a file is the fault of a full disk that needs no disk: the write that
    goes beyond it comes back short, and the next one fails.
    """
    kept = [name for name in WRITERS if name != "checkpoint"]  # which would be read first
    for name in kept:
        (tmp_path / name).write_bytes(b"old")
    process = subprocess.run(
        [sys.executable, "-c", _FULL, str(ROOT), str(tmp_path)], capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.split("\n")
    # A checkpoint of this network is smaller than the others.
    refused = [line for line in lines if line.endswith("refused 1")]
    written = [line for line in lines if line.endswith("written")]
    assert len(refused) + len(written) == 6 * len(WRITERS)
    assert all(line.startswith("checkpoint") for line in written)
    assert "done" in lines
    assert sorted(
        path.name for path in tmp_path.iterdir() if path.name != "checkpoint"
    ) == kept or sorted(path.name for path in tmp_path.iterdir()) == sorted(WRITERS)
    assert all((tmp_path / name).read_bytes() == b"old" for name in kept)


_SAVING = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import pcdyn
folder = Path(sys.argv[2])
each = [pcdyn.load(folder / name) for name in ("one.nc", "two.nc")]
print("ready", flush=True)
while True:
    for one in each:
        one.to_netcdf(folder / "run.nc")
"""


@pytest.mark.slow
def test_saving_killed_at_any_moment_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    """SIGKILL while two runs are saved in turn; the next save removes what was left behind."""
    both = [trajectory(), trajectory(batch=4)]
    expected = [flatten(each.activities) for each in both]
    for name, each in zip(("one.nc", "two.nc", "run.nc"), [*both, both[0]], strict=True):
        each.to_netcdf(tmp_path / name)
    rng = np.random.default_rng(0)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVING, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        with process.stdout as output:
            assert output.readline() == b"ready\n"
        for _ in range(10):
            time.sleep(rng.uniform(0, 0.02))
            # What others read meanwhile is whole as well.
            assert flatten(pcdyn.load(tmp_path / "run.nc").activities) in expected
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert flatten(pcdyn.load(tmp_path / "run.nc").activities) in expected
    both[0].to_netcdf(tmp_path / "run.nc")
    assert {path.name for path in tmp_path.iterdir()} == {"run.nc", "one.nc", "two.nc"}


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    """Files of ours that live processes write, of other machines, and files of others stay."""
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    machine = files._MACHINE
    dead = tmp_path / f".pcdyn-{machine}-{finished.pid}-0.partial.nc"
    old = tmp_path / ".pcdyn-00000000-1-0.partial"
    stays = [
        tmp_path / f".pcdyn-{machine}-{os.getpid()}-0.partial.nc",
        tmp_path / f".pcdyn-00000000-{finished.pid}-0.partial.nc",
        tmp_path / "other.partial",
        tmp_path / ".pcdyn-notes.partial.txt",
    ]
    for path in (dead, old, *stays):
        path.write_bytes(b"")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    os.utime(stays[2], (two_days_ago, two_days_ago))
    files.write_atomically(tmp_path / "run", b"")
    assert sorted(tmp_path.iterdir()) == sorted([*stays, tmp_path / "run"])


def test_several_files_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two cannot be written, or is there by now."""
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(DataError, match="create the folder"):
        files.write_all({first: b"a", tmp_path / "absent" / "second": b"b"})
    assert not list(tmp_path.iterdir())
    second.write_bytes(b"of another")
    for without_links in (False, True):
        if without_links:

            def none(*_: Any) -> None:
                raise PermissionError("no links on this file system")

            monkeypatch.setattr(os, "link", none)
        with pytest.raises(DataError, match="second exists by now"):
            files.write_all({first: b"a", second: b"b"}, replace=False)
        assert [path.name for path in tmp_path.iterdir()] == ["second"]
        assert second.read_bytes() == b"of another"
        files.write_all({first: b"a"}, replace=False)
        assert first.read_bytes() == b"a"
        first.unlink()


# --- Reading --------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """300 bits anywhere in the file; those in the mark of the digest leave all numbers as they are.

    A bit in the mark makes the file one that HDF5 would read, with bytes behind its end.
    """
    trajectory().to_netcdf(tmp_path / "run.nc")
    good = (tmp_path / "run.nc").read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(good), 300, replace=False):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / "run.nc").write_bytes(bad)
        with pytest.raises(DataError, match="cannot be read as NetCDF"):
            pcdyn.load(tmp_path / "run.nc")


def test_other_programs_read_and_change_our_files(tmp_path: Path) -> None:
    """xarray and h5py read them; what they write is without a digest, or with a right one."""
    import h5py

    path = tmp_path / "run.nc"
    trajectory().to_netcdf(path)
    with xarray.open_dataset(path) as dataset:
        dataset.load()
    dataset.to_netcdf(path)
    assert flatten(pcdyn.load(path).activities) == flatten(trajectory().activities)
    trajectory().to_netcdf(path)
    with h5py.File(path, "r+") as file:
        file["energy"][0, 0] = 7.0
    assert pcdyn.load(path).energies[0, 0] == 7.0


def test_axes_are_found_by_their_names(tmp_path: Path) -> None:
    """However xarray has reordered, stacked, reversed or broadcast a data set."""
    batch = trajectory(batch=4)
    data = batch.to_xarray()
    by_hand = xarray.concat([data.isel(sample=[i]) for i in range(4)], "sample", data_vars="all")
    shared = data.assign(activity_0=data.activity_0.isel(time=0, drop=True).expand_dims(
        time=data.time))  # fmt: skip
    for other in (
        data.transpose(),
        data.transpose("sample", "time", ...),
        data.transpose("unit_1", "free_layer", ...),
        data.sortby("predicted_layer", ascending=False),
        data.isel(free_layer=slice(None, None, -1)),
        by_hand,
        shared,
    ):
        for read in (trajectories.from_xarray(other), _through_a_file(other, tmp_path)):
            for name in ("activities", "prediction_errors", "energies", "vector_field_norms"):
                assert flatten(getattr(read, name)) == flatten(getattr(batch, name)), name
            assert read.free_layers == batch.free_layers
    one = data.isel(sample=0)
    together = trajectories.from_xarray(xarray.concat([one, one], "sample", data_vars="all"))
    np.testing.assert_array_equal(together.final[1][1], batch.final[1][0])
    # An input that all samples share has no axis of samples.
    once = data.assign(activity_0=data.activity_0.isel(sample=0))
    read = trajectories.from_xarray(once).activities[0]
    np.testing.assert_array_equal(read[:, 3], batch.activities[0][:, 0])


def _through_a_file(dataset: xarray.Dataset, folder: Path) -> pcdyn.Trajectory:
    netcdf.write_dataset(dataset, folder / "other.nc")
    return pcdyn.load(folder / "other.nc")


def test_a_transposed_problem_is_the_same_problem() -> None:
    """Square weights would be read as their transposes without an error."""
    from pcdyn.io.problems import problem_from_xarray, problem_to_xarray

    data = problem_to_xarray(problem())
    found = problem_from_xarray(data.transpose())
    assert flatten((found.network, found.input, found.output)) == flatten(
        (problem().network, problem().input, problem().output))  # fmt: skip


DATA = {
    "a run of several experiments": (lambda d: d.expand_dims(run=2), "dimensions.*run"),
    "text for activities": (lambda d: d.assign(activity_1=d.activity_1.astype(str)), "real"),
    "times for activities": (
        lambda d: d.assign(activity_1=d.activity_1.astype("timedelta64[ns]")), "real numbers"),
    "whole activities": (lambda d: d.assign(activity_1=d.activity_1.astype(int)), "real numbers"),
    "reversed times": (lambda d: d.isel(time=slice(None, None, -1)), "times"),
    "repeated times": (lambda d: d.isel(time=[0, 1, 1]), "times"),
    "NaN among the times": (lambda d: d.assign_coords(time=[0, 1, np.nan, 3, 4]), "times"),
    "an unknown status": (lambda d: d.assign(status=99), "status 99"),
    "a status between two": (lambda d: d.assign(status=0.5), "status.*integers"),
    "another number of layers": (lambda d: d.drop_vars("activity_2"), "lacks 'activity_2'"),
    "a layer too many": (lambda d: d.assign(activity_3=d.activity_1), "other activities"),
    "layers that count from 0": (
        lambda d: d.assign_coords(predicted_layer=[0, 1]), "energies of 1 layers"),
    "a free layer that is not there": (lambda d: d.assign_coords(free_layer=[7]), "free_layer"),
    "units as an axis of layers": (
        lambda d: d.assign(activity_1=d.activity_1.rename(unit_1="units")), "dimensions"),
    "counts that are not whole": (lambda d: d.assign(accepted_steps=1.5), "accepted.*integers"),
    "seconds in words": (lambda d: d.assign_attrs(run_seconds="three"), "run_seconds is 'three'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_what_no_trajectory_has_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, message = DATA[name]
    with pytest.raises(DataError, match=f"not a trajectory.*{message}"):
        trajectories.from_xarray(change(trajectory().to_xarray()))


@pytest.mark.parametrize("value", [None, 3, [], "", "a\0b", b"run.nc", 1.5])
@pytest.mark.unchecked
def test_what_is_no_path_is_refused_by_name(value: Any) -> None:
    for call in (pcdyn.load, pcdyn.load_problem, trajectory().to_netcdf):
        with pytest.raises(DataError, match="path"):
            call(value)
    with pytest.raises(DataError, match=r"data set|Dataset"):
        trajectories.from_xarray(value)


@pytest.mark.parametrize("name", [".", "/dev/null", "/dev/zero", "a" * 300, "absent/run.nc"])
def test_what_is_no_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """A folder, devices (which as a superuser one could replace), names that are too long."""
    path = tmp_path / name
    for call in (pcdyn.load, pcdyn.load_problem, trajectory().to_netcdf):
        with pytest.raises(
            DataError, match=r"not a file|is a directory|too long|no file|folder|Is"
        ):
            call(path)
    assert not list(tmp_path.iterdir())
    assert not Path("/dev/null").is_file()


def test_float64_is_not_rounded_in_silence(tmp_path: Path) -> None:
    """Written under x64 and read without: refused by name, rounded if asked, kept if exact."""
    path = tmp_path / "problem.nc"
    pcdyn.save_problem(problem(), path)
    trajectory().to_netcdf(tmp_path / "run.nc")
    exact = jax.tree.map(lambda x: np.round(x, 1) * 0 + 0.5 if eqx.is_array(x) else x,
                         pcdyn.mlp([2, 2], activation="tanh", key=jax.random.key(0)))  # fmt: skip
    pcdyn.save_problem(pcdyn.InferenceProblem(exact, input=[1.0, 2.0]), tmp_path / "exact.nc")
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(DataError, match=r"weight_1 is float64, but float64 is off.*dtype="):
            pcdyn.load_problem(path)
        for dtype in (np.float32, "float32", jax.numpy.float32):
            rounded = pcdyn.load_problem(path, dtype=dtype)
            assert rounded.dtype == np.float32
            np.testing.assert_array_equal(
                rounded.network.layers[0].weight,
                np.asarray(problem().network.layers[0].weight).astype(np.float32),
            )
        assert pcdyn.load_problem(tmp_path / "exact.nc").dtype == np.float32
        # A trajectory is of NumPy arrays, which float64 stays in.
        assert flatten(pcdyn.load(tmp_path / "run.nc").final) == flatten(trajectory().final)
    finally:
        jax.config.update("jax_enable_x64", True)
    assert pcdyn.load_problem(path, dtype=np.float32).dtype == np.float32
    for dtype in (int, "text", object):
        with pytest.raises((DataError, DtypeError), match="dtype"):
            pcdyn.load_problem(path, dtype=dtype)


def test_half_precision_is_refused_by_the_file_before_it_is_written(tmp_path: Path) -> None:
    activities = tuple(x.astype(np.float16) for x in trajectory().activities)
    half = eqx.tree_at(lambda t: t.activities, trajectory(), activities)
    with pytest.raises(DtypeError, match="float16, but NetCDF files hold float32 and float64"):
        half.to_netcdf(tmp_path / "run.nc")
    assert not list(tmp_path.iterdir())


def test_files_that_unpack_to_gigabytes_are_refused_by_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros, packed a thousandfold; for the archive it is mebibytes that are too many."""
    import h5py

    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        content = io.BytesIO()
        np.save(content, np.zeros(2**23))
        archive.writestr("a.npy", content.getvalue())
    with h5py.File(tmp_path / "bomb.nc", "w") as file:
        file.create_dataset("weight_1", shape=(2**20, 2**20), dtype="f8", chunks=True)
    # More memory than there is: it would not come back.
    with pytest.raises(DataError, match=r"claims to hold .* GiB in"):
        pcdyn.load_problem(tmp_path / "bomb.nc")
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it is unpacked"))
    monkeypatch.setattr(files, "_LARGE", 2**20)
    with pytest.raises(DataError, match=r"claims to hold 0.0625 GiB in"):
        files.read_numpy(tmp_path / "bomb.npz")


def test_images_that_unpack_to_gigabytes_are_refused_by_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More bytes than the header asks for, and a header that asks for gigabytes."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    monkeypatch.setenv("PCDYN_DATA", str(tmp_path))
    labels = b"\0\0\x08\x01" + (2).to_bytes(4, "big") + b"\1\2"
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    sizes = [(28).to_bytes(4, "big")] * 2
    images = folder / "train-images-idx3-ubyte.gz"
    for count, message in ((2, "bytes, but its header"), (2**32 - 1, "GiB")):
        head = b"".join([b"\0\0\x08\x03", count.to_bytes(4, "big"), *sizes])
        images.write_bytes(gzip.compress(head + bytes(2**26), 1))
        with pytest.raises(DataError, match=rf"train-images-idx3-ubyte\.gz: .*{message}"):
            pcdyn.datasets.mnist()
