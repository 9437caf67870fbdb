"""The command line as a user runs it; its numbers against the same calls of the library."""

from __future__ import annotations

import csv
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import xarray

import pcdyn
from pcdyn.cli import main

ROOT = Path(__file__).parents[2]
INPUT, OUTPUT = np.array([[0.5, -1.0], [1.0, 0.25]]), np.array([[0.2, -0.4], [-0.3, 0.6]])
NETWORK = ["--widths", "2", "3", "2", "--seed", "4", "--precisions", "1", "2.5",
           "--input", "data.npz", "--output", "data.npz"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data to run in."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", input=INPUT, output=OUTPUT)
    return tmp_path


def library_problem(activation: str = "tanh") -> pcdyn.InferenceProblem:
    """What `NETWORK` means, by calls of the library."""
    network = pcdyn.mlp([2, 3, 2], activation=activation, key=jax.random.key(4))
    return pcdyn.InferenceProblem(
        network, input=INPUT, output=OUTPUT, energy=pcdyn.Gaussian([1.0, 2.5])
    )


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_a_prior_on_a_free_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = [*NETWORK[:-4], "--input", "free", "--output", "data.npz"]
    command = ["equilibrium", *free, "--method", "closed_form", "--activation", "identity"]
    found = record(capsys, *command, "--prior", "0.5", "2", "--data", "found.nc")
    given = library_problem("identity")
    problem = pcdyn.InferenceProblem(
        given.network, output=OUTPUT, energy=given.energy,
        prior=pcdyn.Prior(0.5, pcdyn.Gaussian(2.0)),
    )  # fmt: skip
    expected = pcdyn.equilibrium(problem)
    assert found["free_energy"] == np.mean(expected.free_energy)
    # The file has the prior, which goes where the input is clamped.
    again = record(capsys, "equilibrium", "--network", "found.nc", "--method", "closed_form")
    assert again["free_energy"] == found["free_energy"]
    clamped = ["--network", "found.nc", "--input", "data.npz"]
    assert record(capsys, "equilibrium", *clamped)["free_energy"] != found["free_energy"]
    assert main([*command, "--prior", "0.5", "-1"]) == 2
    assert main(["equilibrium", *NETWORK, "--prior", "0.5", "2"]) == 2
    assert "prior on a clamped input" in capsys.readouterr().err


def test_simulate_writes_what_the_library_computes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--t1", "4", "--times", "5", "--rtol", "1e-7", "--out", "run"]
    found = record(capsys, "simulate", *NETWORK, *options)
    expected = pcdyn.simulate(
        library_problem(),
        t1=4.0,
        times=np.linspace(0, 4, 5),
        integrator=pcdyn.Diffrax("tsit5", rtol=1e-7),
    )
    assert found["status_counts"] == {"REACHED_T1": 1}
    assert found["end_time"] == 4
    assert found["free_energy_start"] == np.mean(expected.free_energy[0])
    assert found["free_energy_end"] == np.mean(expected.free_energy[-1])
    assert found["vector_field_evaluations"] == expected.vector_field_evaluations
    assert found["accepted_steps"] == expected.accepted_steps
    saved = pcdyn.load("run/simulate.nc")
    for ours, theirs in zip(saved.activities, expected.activities, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert Path("run/simulate.png").read_bytes().startswith(b"\x89PNG")
    assert found["files"] == ["run/simulate.nc", "run/simulate.png"]

    # The run is a network for the other commands, and a place for stability.
    again = record(capsys, "equilibrium", "--network", "run/simulate.nc", "--data", "rest.nc",
                   "--picture", "rest.png")  # fmt: skip
    rest = pcdyn.equilibrium(library_problem())
    assert again["residual"] == np.max(rest.residual_norms) <= again["tolerance"]
    assert again["tolerance"] == np.max(rest.tolerance)
    assert again["free_energy"] == np.mean(rest.free_energy)
    assert again["status_counts"] == {"CONVERGED": 2}
    with xarray.open_dataset("rest.nc", engine="h5netcdf") as dataset:
        np.testing.assert_array_equal(dataset.activity_1, rest.activities[1])
    problem = pcdyn.load_problem("rest.nc")
    np.testing.assert_array_equal(
        problem.network.layers[1].weight, library_problem().network.layers[1].weight
    )

    assert main(["stability", "--at", "run/simulate.nc"]) == 0
    assert "the end of a trajectory" in capsys.readouterr().out
    assert main(["stability", "--at", "rest.nc"]) == 0
    assert "Stability at equilibrium" in capsys.readouterr().out
    assert pcdyn.load("rest.nc").ok


def test_stability_of_a_linear_network_is_its_hessian(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--activation", "identity", "--picture", "rates.pdf", "--data", "rates.nc"]
    found = record(capsys, "stability", *NETWORK, *options)
    weight = np.asarray(library_problem().network.layers[1].weight)
    rates = np.linalg.eigvalsh(np.eye(3) + 2.5 * weight.T @ weight)
    # Round-off of a 3 × 3 eigenvalue problem, with a margin of a hundred.
    np.testing.assert_allclose(found["slowest_rate"], [rates[0]] * 2, rtol=1e-13)
    np.testing.assert_allclose(found["largest_euler_step"], [2 / rates[-1]] * 2, rtol=1e-13)
    assert found["recommended"] == "explicit"
    assert Path("rates.pdf").read_bytes().startswith(b"%PDF")
    assert Path("rates.nc").is_file()


def test_compare_writes_the_table_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--activation", "identity", "--integrators", "exact", "tsit5", "euler", "--t1", "4",
               "--tolerances", "1e-4", "--steps", "0.1", "5", "--repeats", "1"]  # fmt: skip
    assert main(["compare", *NETWORK, *options, "--out", "table"]) == 0
    text = capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the step that is too large
        expected = pcdyn.compare(
            ["exact", "tsit5", "euler"],
            library_problem("identity"),
            t1=4.0,
            tolerances=[1e-4],
            steps=[0.1, 5.0],
            repeats=1,
        )
    with open("table/compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == [row.status.name for row in expected.rows]
    assert rows[-1]["status"] != "REACHED_T1"  # a step of 5 is beyond 2 / fastest rate
    for name in ("final_error", "vector_field_evaluations"):
        np.testing.assert_array_equal(
            [float(row[name]) for row in rows], [getattr(row, name) for row in expected.rows]
        )
    assert "For a maximum error of at most 0.001" in text
    assert all(row["integrator"] in text for row in rows)
    with xarray.open_dataset("table/compare.nc", engine="h5netcdf") as dataset:
        np.testing.assert_array_equal(dataset.weight_1, library_problem().network.layers[0].weight)
    assert Path("table/compare.png").is_file()


def test_a_toml_file_means_the_same_options(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "settings").mkdir()
    np.save(folder / "settings" / "input.npy", INPUT)
    Path("settings/net.toml").write_text(
        '[network]\nwidths = [2, 3, 2]\nactivation = "identity"\nseed = 1\n'
        'precisions = [1, [[2.5, 0], [0, 2.5]]]\ninput = "input.npy"\n'
    )
    # The command line wins, and the data stand beside the TOML file.
    options = ["--seed", "4", "--output", "data.npz:output"]
    found = record(capsys, "equilibrium", "--network", "settings/net.toml", *options)
    expected = pcdyn.equilibrium(library_problem("identity"))
    # The matrix and the number differ by round-off.
    np.testing.assert_allclose(found["free_energy"], np.mean(expected.free_energy), rtol=1e-13)


def test_random_data_and_biases_follow_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--activation", "identity", "--bias", "0.5", "--batch", "400", "--widths", "2", "2"]
    options = [*network, "--output", "free", "--data", "a.nc"]
    record(capsys, "equilibrium", *options)
    problem = pcdyn.load_problem("a.nc")
    assert problem.output is None and problem.network.layers[0].bias.any()
    # 800 standard normal numbers: the mean square is 1 to within 5 standard errors √(2/800).
    assert abs(np.mean(np.asarray(problem.input) ** 2) - 1) < 0.25
    record(capsys, "equilibrium", *options, "--overwrite")
    np.testing.assert_array_equal(pcdyn.load_problem("a.nc").input, problem.input)
    record(capsys, "equilibrium", *options, "--overwrite", "--seed", "1")
    assert not np.any(np.asarray(pcdyn.load_problem("a.nc").input) == problem.input)


def test_float32_is_switched_for_the_command_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["equilibrium", *NETWORK, "--activation", "identity", "--float32"]) == 0
    assert "float32 (float64 is off)" in capsys.readouterr().out
    assert jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        assert main(["equilibrium", *NETWORK, "--activation", "identity"]) == 0
        assert "float64 (float64 is on)" in capsys.readouterr().out
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", True)


BAD_INPUT = {
    "unknown activation": ("simulate --activation tanhh", "unknown activation 'tanhh'"),
    "one width": ("simulate --widths 5", "two or more positive integers"),
    "widths that the data do not fit": (
        "simulate --widths 3 3 2 --input data.npz", r"input has shape \(2, 2\), .* needs \(3,\)"
    ),
    "negative precision": ("equilibrium --precisions 1 -2", "must be positive, but contains -2"),
    "energy without a flow": ("simulate --energy log", "undefined .* use divisive"),
    "energy with a singular flow": ("simulate --energy power", "use pseudo_huber or log_cosh$"),
    "unknown energy": ("simulate --energy huber", "known are .* divisive, cross_entropy$"),
    "energy with a word": ("simulate --energy student:x", "not a number: .* student:0.5"),
    "too few precisions": ("equilibrium --precisions 1 2 3", "3 precisions for 2 predictions"),
    "missing array": ("simulate --input no.npy", "no file no.npy"),
    "missing network": ("simulate --network no.nc", "no file no.nc"),
    "missing TOML": ("simulate --network no.toml", "no file no.toml"),
    "array not in the file": ("simulate --input data.npz:x", "no array 'x', but input, output"),
    "corrupt array": ("simulate --input corrupt.npy", "corrupt.npy cannot be read as NumPy"),
    "corrupt NetCDF": ("stability --network corrupt.nc", "corrupt.nc cannot be read as NetCDF"),
    "NetCDF without network": ("equilibrium --network other.nc", "no network in this file"),
    "broken TOML": ("equilibrium --network broken.toml", "broken.toml is not valid TOML"),
    "unknown key": ("equilibrium --network key.toml", "unknown key 'width'.*did you mean 'widths'"),
    "wrong type": ("equilibrium --network type.toml", "widths must be a list of integers"),
    "unknown integrator": ("simulate --integrator rk4", "unknown integrator 'rk4'"),
    "Euler without a step": ("simulate --integrator euler", "euler needs a step"),
    "ignored step": ("simulate --integrator lsoda --dt 0.1", "chooses its own steps"),
    "ignored tolerance": ("simulate --integrator exact --rtol 1e-3", "leave --rtol out"),
    "ignored width": ("simulate --network other.nc --widths 2 2 2", "leave --widths out"),
    "negative time": ("simulate --t1 -1", "t1 must be .* above 0"),
    "one saved time": ("simulate --times 1", "at least 2"),
    "unknown method": ("equilibrium --method newton", "unknown method 'newton'"),
    "negative tolerance": ("equilibrium --tolerance -1", "tolerance must be .* above 0"),
    "exact of a tanh network": ("simulate --integrator exact", "closed forms"),
    "NaN in data": ("simulate --widths 2 3 2 --input nan.npy", "input has 1 non-finite entries"),
    "contradicting batch": (
        "simulate --widths 2 3 2 --input data.npz --batch 3", "a batch of 3 contradicts"
    ),
    "empty batch": ("simulate --batch 0", "--batch must be .* at least 1"),
    "existing output": ("simulate --data other.nc", "other.nc exists.*--overwrite"),
    "existing output in a folder": ("stability --out .", "stability.png exists.*--overwrite"),
    "other kind of picture": ("simulate --picture run.gif", "writes .png or .pdf or .svg"),
    "missing folder": ("simulate --data no/run.nc", "no/run.nc: create the folder .*no first"),
    "unknown integrator to compare": ("compare --integrators rk4", "unknown integrator 'rk4'"),
    "negative error": ("compare --error -1", "--error must be .* above 0"),
    "stability nowhere": ("stability --at nowhere", "unknown initial state 'nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    np.save("nan.npy", [1.0, np.nan])
    for name in ("corrupt.npy", "corrupt.nc", "stability.png"):
        Path(name).write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    xarray.Dataset({"x": ("y", [1.0])}).to_netcdf("other.nc", engine="h5netcdf")
    Path("broken.toml").write_text("[network\nwidths = 5")
    Path("key.toml").write_text("[network]\nwidth = [5, 5]")
    Path("type.toml").write_text("[network]\nwidths = [5, 5.5]")
    before = sorted(folder.iterdir())
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", printed.err)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        # Explicit Euler with a step of 3 > 2 / 1, as every rate of this flow is at least 1.
        (["simulate", *NETWORK, "--integrator", "euler", "--dt", "3", "--t1", "90"], "too large"),
        (
            ["equilibrium", *NETWORK, "--tolerance", "1e-30", "--method", "gauss_newton"],
            "(STALLED|ITERATION_LIMIT)",
        ),
    ],
)
def test_a_run_that_fails_exits_with_one_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    assert main([*command, "--json", "--out", "run"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(rf"^error: .*{message}.*\n\Z", printed.err, re.MULTILINE)
    # A step beyond the stable one is warned of as well, in a line of its own.
    warned = [
        line for line in printed.err.splitlines() if line.startswith("warning: dt=3 is above")
    ]
    assert len(warned) == ("--dt" in command)
    assert [path.name for path in folder.iterdir()] == ["data.npz"]


def test_quiet_and_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["equilibrium", *NETWORK, "--activation", "identity", "--data", "rest.nc"]
    Path("rest.nc").write_text("something else")
    assert main([*command, "--quiet"]) == 2
    assert Path("rest.nc").read_text() == "something else"
    capsys.readouterr()
    assert main([*command, "--quiet", "--overwrite"]) == 0
    assert capsys.readouterr() == ("", "")
    assert pcdyn.load_problem("rest.nc").network.widths == (2, 3, 2)


def test_an_interrupt_while_writing_leaves_the_old_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    before = ["data.npz", "rest.nc"]
    Path("rest.nc").write_text("something else")
    command = ["equilibrium", *NETWORK, "--activation", "identity", "--data", "rest.nc"]
    assert main([*command, "--overwrite"]) == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")
    assert Path("rest.nc").read_text() == "something else"
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--version"], 0, f"pcdyn {pcdyn.__version__}"),
        (["--help"], 0, "Exit codes"),
        (["simulate", "--help"], 0, "activity time constant"),
        (["equilibrium", "--help"], 0, "Example: pcdyn equilibrium"),
        (["compare", "--help"], 0, "Example: pcdyn compare"),
        (["stability", "--help"], 0, "Example: pcdyn stability"),
        (["simulat"], 2, ""),
        (["simulate", "--stpes", "3"], 2, ""),
    ],
)
def test_help_and_version(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, shown: str
) -> None:
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert shown in printed.out
    assert (printed.err == "") == (code == 0)


def test_interrupting_a_long_run_leaves_no_file(folder: Path) -> None:
    # A million steps of a wide network inside of one compiled loop, which would take minutes; the
    # progress bar on a terminal says that it runs.
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    command = [sys.executable, "-m", "pcdyn", "simulate", "--widths", "20", "800", "800", "10",
               "--integrator", "euler", "--dt", "1e-6", "--t1", "1", "--out", "run"]  # fmt: skip
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    try:
        shown = _read(terminal, until=b"simulate:", seconds=60)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
        shown += _read(terminal, until=b"interrupted", seconds=5)
    finally:
        process.kill()
        process.wait()
        os.close(stderr)
        os.close(terminal)
    assert process.returncode == 130
    assert printed == b""
    assert b"error: interrupted" in shown
    assert b"Traceback" not in shown
    assert [path.name for path in folder.iterdir()] == ["data.npz"]


def _read(terminal: int, *, until: bytes, seconds: float) -> bytes:
    """What a terminal shows until these words come."""
    shown, end = b"", time.monotonic() + seconds
    while until not in shown:
        ready, _, _ = select.select([terminal], [], [], max(end - time.monotonic(), 0))
        assert ready, shown
        shown += os.read(terminal, 1024)
    return shown
