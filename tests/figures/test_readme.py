"""README as a reader takes it: every snippet and every shell command, as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "sh"]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    """Python and shell blocks are run below; a TOML block is a file for the command line."""
    assert {language for language, _ in BLOCKS} <= {"python", "sh", "toml"}


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run")
def test_the_python_snippets_run_one_after_the_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would paste them into one session; their numbers are those that README tells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PCDYN_DATA", raising=False)
    names: dict[str, object] = {}
    printed = ""
    for text in PYTHON:
        exec(compile(text, "README.md", "exec"), names)
        plt.close("all")
        printed += capsys.readouterr().out
    assert "REACHED_T1" in printed
    error, rest = (float(x) for x in re.findall(r"(?:error|to equilibrium) ([\d.e-]+)", printed))
    assert error < 1e-5
    assert rest < 1e-5
    assert "is the fastest" in printed
    order = re.search(r"order (\d\.\d+)", printed)
    assert order
    assert float(order[1]) == pytest.approx(2, abs=0.1)
    # Five networks on the shipped sample, each much better than chance.
    accuracies = re.search(r"^\[(0\.\d+(?: +0\.\d+){4})\]", printed, re.MULTILINE)
    assert accuracies
    assert min(map(float, accuracies[1].split())) > 0.5
    assert (tmp_path / "run.npz").is_file()


@pytest.mark.usefixtures("as_users_run")
def test_the_example_of_the_page_on_noise_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The standard deviations of 10⁴ samples, by steps and exact, are those of the posterior.

    One has the standard error .7 %; five of them.
    """
    page = (ROOT / "docs" / "noise.md").read_text("utf-8")
    names: dict[str, object] = {}
    for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(text, "docs/noise.md", "exec"), names)
    rows = re.findall(r"\[([\d. ]+)\]", capsys.readouterr().out)
    expected, *found = ([float(x) for x in row.split()] for row in rows[:3])
    for each in found:
        assert each == pytest.approx(expected, rel=0.035)


@pytest.mark.slow
def test_the_shell_commands_run_as_printed(tmp_path: Path) -> None:
    """One after the other in one folder; `make` is what runs this (see .ci/run for both)."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("PCDYN_DATA", None)
    lines = [line for text in SHELL for line in text.splitlines()]
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert len(commands) > 5
    for words in commands:
        if words[0] == "make":
            continue
        run = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, (words, run.stdout, run.stderr)
