"""`pcdyn verify` as a user runs it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pcdyn.cli import main
from pcdyn.theory import Statement, verify
from pcdyn.theory import errata as module

pytestmark = pytest.mark.usefixtures("as_users_run")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_verify_prints_what_the_library_measures(capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON with files, as a table, and not at all."""
    arguments = ["verify", "eq-26", "Eq 25", "--networks", "3", "--seed", "5"]
    assert main([*arguments, "--json", "--out", "run"]) == 0
    record = json.loads(capsys.readouterr().out)
    expected = verify(["Eq 25", "Eq 26"], seed=5, networks=3)
    assert record["ok"] is True
    assert [s["number"] for s in record["statements"]] == ["Eq 25", "Eq 26"]
    measured = [e["measured"] for s in record["statements"] for e in s["evidence"]]
    assert measured == [e.measured for e in expected.evidence]
    assert record["files"] == ["run/verify.nc", "run/verify.png"]
    assert Path("run/verify.png").read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 0
    assert (
        "Claims: 5, of which 3 hold and 2 do not; 0 verdicts are other" in capsys.readouterr().out
    )
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_an_unknown_statement_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """With those that exist, exit code 2."""
    assert main(["verify", "4.2"]) == 2
    message = capsys.readouterr().err
    assert "'4.2'" in message
    assert "Theorem 3.6" in message


def test_another_verdict_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results are printed all the same, and the claim is named."""
    (right,) = (s for s in module.STATEMENTS if s.number == "Eq 21")

    def swapped(**options: Any) -> Any:
        found = right.measure(**options)
        return tuple(type(e)(**{**vars(e), "measured": -e.measured}) for e in found)

    wrong = Statement(**{**vars(right), "measure": swapped})
    monkeypatch.setattr("pcdyn.theory.registry.STATEMENTS", (wrong,))
    assert main(["verify", "--networks", "2"]) == 1
    printed = capsys.readouterr()
    assert "FAILS" in printed.out
    assert "UNEXPECTED" in printed.out
    assert "2 verdicts are not those on record" in printed.err


def test_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar with the statement that is measured, and how many of how many are done."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    arguments = ["verify", "eq-26", "Eq 25", "--networks", "2"]
    for more, shown in (([], True), (["--quiet"], False), (["--json"], False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main([*arguments, *more]) == 0
        assert ("verify Eq 25: |" in terminal.getvalue()) == shown
        assert ("verify Eq 26: |" in terminal.getvalue()) == shown
        assert ("| 1/2 " in terminal.getvalue()) == shown
