"""The command when it is interrupted, closed upon, or asked for what a machine does not have.

If this fails, a command that was stopped leaves files behind or claims to be done, or a terminal
shows a traceback.
"""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import pcdyn
from pcdyn._support.waiting import interruptible
from pcdyn.cli import main
from pcdyn.cli.main import _in_ascii

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "pcdyn"]
FAST = ["equilibrium", "--activation", "identity", "--widths", "2", "2", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*COMMAND, *arguments], env=environment, **streams)


@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGINT, 0.3), (signal.SIGINT, 0.8), (signal.SIGTERM, 1.5), (signal.SIGHUP, 2.5)],
    ids=str,
)
def test_a_signal_at_any_moment_ends_the_command(number: int, seconds: float, folder: Path) -> None:
    """During the imports and later: one line, 128 + its number, no file; or it came too late."""
    process = start(*FAST, "--out", "run")
    # Before Python has come to pcdyn the answer would be its own; JAX is what pcdyn loads first.
    while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(number)
    sent = time.monotonic()
    printed, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        assert {path.name for path in Path("run").iterdir()} == {
            "equilibrium.nc",
            "equilibrium.png",
        }
        return
    assert time.monotonic() - sent < 20  # a second on a machine that has nothing else to do
    assert process.returncode == 128 + number
    assert (printed, errors) == (b"", b"error: interrupted\n")
    assert not list(folder.iterdir())


def test_an_interrupted_picture_takes_the_data_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All files of a command are complete before the first takes its name."""
    from matplotlib.figure import Figure

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    assert main([*FAST, "--out", "run"]) == 130
    assert main([*FAST, "--data", "a.nc", "--picture", "a.svg"]) == 130
    assert capsys.readouterr() == ("", "error: interrupted\n" * 2)
    assert not list(folder.iterdir())


def test_a_finaliser_does_not_swallow_an_interrupt() -> None:
    """Python drops what a finaliser raises; the call that waits for a computation raises it."""

    class Interrupts:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    computed = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: computed.wait(60), Interrupts)
    computed.set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_that_appeared_meanwhile_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another process, while this one computes: refused, without a second file."""
    from pcdyn.cli import files

    contents = files.contents

    def slow(*arguments: Any) -> Any:
        (folder / "a.svg").write_text("of another")
        return contents(*arguments)

    monkeypatch.setattr(files, "contents", slow)
    command = [*FAST, "--data", "a.nc", "--picture", "a.svg", "--quiet"]
    assert main(command) == 2
    assert "a.svg exists by now" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["a.svg"]
    assert (folder / "a.svg").read_text() == "of another"
    assert main([*command, "--overwrite"]) == 0
    assert (folder / "a.svg").read_text() != "of another"
    assert sorted(path.name for path in folder.iterdir()) == ["a.nc", "a.svg"]


def test_output_that_nobody_reads_is_no_error() -> None:
    """`| head`, a closed standard output, and closed standard errors; a full disk behind it is."""
    reader, writer = os.pipe()
    os.close(reader)
    piped = start("simulate", "--help", stdout=writer)
    os.close(writer)
    assert piped.communicate(timeout=60)[1] == b""
    assert piped.returncode == 0
    shell = f"{' '.join(COMMAND)} {' '.join(FAST)}"
    for redirection, code, shown in (
        (">&- 2>&- <&-", 0, b""),
        (">/dev/full", 2, b"error: [Errno 28] No space left on device\n"),
    ):  # fmt: skip
        done = subprocess.run(["sh", "-c", f"{shell} {redirection}"], capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)  # fmt: skip
        assert (done.returncode, done.stderr) == (code, shown), redirection


def test_what_a_code_page_lacks_is_written_in_letters() -> None:
    """cp1252 has no arrow and cp437 no ellipsis; what a run prints is ASCII anyway."""
    codecs.register_error("pcdyn of the test", _in_ascii)
    for encoding in ("ascii", "cp1252", "cp437"):
        text = "F → ℒ − x, N … 日".encode(encoding, "pcdyn of the test").decode(encoding)
        assert text.replace("−", "-").replace("…", "...") == "F -> L - x, N ... ?"
        helped = subprocess.run(
            [*COMMAND, "simulate", "--help"], capture_output=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert (helped.returncode, helped.stderr) == (0, b"")
        assert "N ..." in helped.stdout.decode(encoding).replace("…", "...")
    network = pcdyn.mlp([2, 2, 2], activation="identity", key=jax.random.key(0))
    problem = pcdyn.InferenceProblem(network, input=np.ones(2), output=np.ones(2))
    assert repr(pcdyn.simulate(problem, t1=1.0, integrator="exact")).isascii()
