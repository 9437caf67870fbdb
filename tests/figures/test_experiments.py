"""The command that draws the figures, and their claims on fast settings."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from matplotlib import pyplot as plt
from PIL import Image

from experiments.shared.base import Claim, Experiment, save_picture, values_hash
from experiments.shared.command import EXTRA, NAMES, Options, main, run_experiment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _the_shipped_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast settings are made for the sample, whatever data there are."""
    monkeypatch.delenv("PCDYN_DATA", raising=False)
    monkeypatch.setattr("experiments.shared.command.configure", lambda: None)


def experiment_of(name: str) -> Experiment:
    folder = "paper" if name in NAMES else "beyond"
    return importlib.import_module(f"experiments.{folder}.{name}").EXPERIMENT


_QUICK = (
    "figure1_linear_equilibrium",
    "figure2_interpolation",
    "figure3_ratios",
    "figure4_energies",
)
_EACH = [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow)
         for name in (*NAMES, *EXTRA)]  # fmt: skip


@pytest.mark.parametrize("name", _EACH)
def test_claims_hold_and_the_saved_data_give_the_saved_picture(name: str, tmp_path: Path) -> None:
    """What the command does for every name: claims have their verdicts, files are whole.

    Plotting what lies in the file gives the same bytes, so that the data are all that it needs.
    """
    claims = run_experiment(name, Options(fast=True, output=tmp_path))
    assert claims
    assert not [c for c in claims if not c.timed and c.holds != c.expected_to_hold]
    with xarray.open_dataset(tmp_path / f"{name}.nc", engine="h5netcdf") as saved:
        data = saved.load()
    manifest = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert manifest["values_sha256"] == values_hash(data)
    again = tmp_path / "again"
    again.mkdir()
    save_picture(name, again, experiment_of(name).plot, data)
    first, second = (folder / f"{name}.png" for folder in (tmp_path, again))
    assert first.read_bytes() == second.read_bytes()
    # The last of ten decimals in a PDF depends on where arrays lie in memory.
    assert (tmp_path / f"{name}.pdf").read_bytes().rstrip().endswith(b"%%EOF")
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(name) and p != again]


def _replaced(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Put an experiment that takes no time, with some changes, in the place of another."""
    small = Experiment(
        panels="none",
        presets=experiment_of(name).presets,
        fast={},
        run=lambda settings: xarray.Dataset({"x": ("t", np.arange(3.0))}),
        check=lambda data: [Claim("a claim", "1", "1", holds=True)],
        plot=lambda data: plt.figure(),
        summary=lambda data: "a summary",
    )
    changed = dataclasses.replace(small, **changes)
    monkeypatch.setattr(f"experiments.paper.{name}.EXPERIMENT", changed)


def test_a_failed_claim_makes_the_run_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An expected claim that fails gives exit status 1; a finding that holds does so too."""
    options = Options(names=("figure3_ratios",), fast=True, output=tmp_path)
    for holds, expected, status in ((True, True, 0), (False, True, 1), (True, False, 1)):
        claim = Claim("a claim", "1", "2", holds=holds, expected_to_hold=expected)
        _replaced(monkeypatch, "figure3_ratios", check=lambda data, claim=claim: [claim])
        assert main(options) == status


@pytest.mark.parametrize("broken", ["run", "check", "plot", "summary"])
def test_one_failing_figure_does_not_take_the_others_with_it(
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next one is drawn, the end names what failed, the exit status is 1.

    Data are saved before anything is made of them.
    """

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    _replaced(monkeypatch, "figure5", **{broken: fail})
    _replaced(monkeypatch, "figure3_ratios")
    options = Options(names=("figure5", "figure3_ratios"), fast=True, output=tmp_path)
    assert main(options) == 1
    printed = capsys.readouterr()
    assert "FAILED: figure5 (ZeroDivisionError: planted)" in printed.out
    assert "Traceback" in printed.err
    assert (tmp_path / "figure5.nc").is_file() == (broken != "run")
    assert (tmp_path / "figure3_ratios.json").is_file()
    assert "figure3_ratios" in (tmp_path / "index.md").read_text("utf-8")


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong name gives exit status 2 and runs nothing; `list` names them all."""
    assert main(Options(names=("figure9",))) == 2
    assert "figure9" in capsys.readouterr().out
    assert main(Options(names=("list",))) == 0
    assert set(capsys.readouterr().out.split()) >= {*NAMES, *EXTRA}


def test_the_checkout_stays_clean() -> None:
    """Without --output nothing is written where git would see it, whatever the settings."""
    for options in (Options(), Options(fast=True), Options(preset="code")):
        ignored = subprocess.run(
            ["git", "check-ignore", "-q", options.folder / "figure5.png"], cwd=ROOT, check=False
        )
        assert ignored.returncode == 0


def test_a_failed_write_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing partial remains when saving breaks in the middle."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    _replaced(monkeypatch, "figure5")
    with pytest.raises(Exception, match="disk full"):
        run_experiment("figure5", Options(fast=True, output=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["figure5.nc"]


@pytest.mark.slow
def test_killed_at_any_moment_whole_files_stay(tmp_path: Path) -> None:
    """SIGKILL at random moments: what is there can be read, and the next run completes it."""
    names = ("figure5", "figure3_ratios")
    command = [sys.executable, "-m", "experiments", *names, "--fast", "--output", str(tmp_path)]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole = time.perf_counter() - started
    rng = random.Random(0)
    for _ in range(3):
        running = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 1) * whole)
        running.kill()
        running.wait()
        for path in tmp_path.iterdir():
            if ".partial" in path.name:
                continue
            if path.suffix == ".nc":
                xarray.load_dataset(path, engine="h5netcdf")
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".pdf":
                assert path.read_bytes().rstrip().endswith(b"%%EOF")


def test_ctrl_c_ends_the_command_at_once(tmp_path: Path) -> None:
    """Wherever it is, within a second, and no partial file stays."""
    command = [sys.executable, "-m", "experiments", "figure1_linear_equilibrium"]
    for wait in (0.5, 6.0):
        running = subprocess.Popen(
            [*command, "--output", str(tmp_path)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(wait)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
        # As a shell says it: 130.
        assert running.returncode == -signal.SIGINT
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("*.partial*"))


def test_the_hash_sees_values() -> None:
    """Data that differ in one value have different hashes."""
    ratios = experiment_of("figure3_ratios")
    data = ratios.run(dataclasses.replace(ratios.presets["paper"], networks=4))
    changed = data.copy(deep=True)
    changed.floor.values[0, 0] = np.nextafter(changed.floor.values[0, 0], 1)
    assert values_hash(data) != values_hash(changed)
