"""Options of the command line reach the library: each changes what the library's own does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import pcdyn
from pcdyn.cli import main

LINEAR = ["--activation", "identity", "--widths", "3", "4", "3", "--seed", "2"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_random_input_output_and_weights_are_independent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Correlations of 1200 pairs of standard normal numbers are below 5 standard errors."""
    record(capsys, "equilibrium", *LINEAR, "--batch", "400", "--data", "a.nc")
    problem = pcdyn.load_problem("a.nc")
    input, output = (np.asarray(x) for x in (problem.input, problem.output))
    assert input.shape == output.shape == (400, 3)
    assert abs(np.mean(input * output)) < 5 / np.sqrt(input.size)
    drawn = [np.ravel(x) for x in (input, output, *jax.tree.leaves(problem.network))]
    numbers = np.concatenate(drawn)
    assert np.unique(numbers).size == numbers.size


def test_it_stops_at_equilibrium_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """Before t1, at the closed form."""
    options = ["--t1", "500", "--until-equilibrium", "--data", "run.nc"]
    found = record(capsys, "simulate", *LINEAR, *options)
    assert found["status_counts"] == {"CONVERGED": 1}
    assert found["end_time"] < 500
    rest = pcdyn.linear_equilibrium(pcdyn.load_problem("run.nc"))
    # ‖∂F/∂x‖ is at most 1e-6, and no eigenvalue of the Hessian is below 1.
    np.testing.assert_allclose(pcdyn.load("run.nc").final[1], rest[1], rtol=0, atol=1e-6)


def test_samples_have_steps_of_their_own_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its status and its count of steps."""
    options = ["--batch", "3", "--t1", "2", "--data", "run.nc"]
    record(capsys, "simulate", *LINEAR, *options, "--per-sample")
    assert np.shape(pcdyn.load("run.nc").accepted_steps) == (3,)
    record(capsys, "simulate", *LINEAR, *options, "--overwrite")
    assert np.shape(pcdyn.load("run.nc").accepted_steps) == ()


@pytest.mark.parametrize("command", ["simulate", "equilibrium"])
def test_it_starts_where_it_is_told(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At zeros, or at the feedforward pass, which solves all but the output error."""
    t1 = ["--t1", "1"] if command == "simulate" else []
    starts = {}
    for initial in ("zeros", "feedforward"):
        found = record(capsys, command, *LINEAR, *t1, "--initial", initial, "--overwrite",
                       "--data", "a.nc")  # fmt: skip
        starts[initial] = found.get("free_energy_start")
    problem = pcdyn.load_problem("a.nc")
    if command == "simulate":
        for initial, energy in starts.items():
            expected = float(problem.free_energy(problem.initial_state(initial)))
            assert energy == pytest.approx(expected, rel=1e-12)
