"""Ctrl-C and its relatives where pcdyn is the command: one line, an exit code, no partial file.

This module is imported before everything else, for the imports take seconds in which Python would
answer with a traceback, or a library swallow the exception. It imports nothing that takes time.
Where pcdyn is a library it changes nothing: Ctrl-C raises `KeyboardInterrupt` as everywhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is that of a terminal that is closed
_unfinished: set[Path] = set()
_too_late = False


def _listen_if_command() -> None:
    module = sys.orig_argv[-len(sys.argv)] if sys.argv[:1] == ["-m"] else ""
    if module not in ("pcdyn", "-mpcdyn") and Path(*sys.argv[:1]).stem != "pcdyn":
        return
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        # Some are ignored on purpose: by nohup, or in the background of a script.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _hear)


@contextlib.contextmanager
def removed_if_interrupted(file: Path) -> Iterator[None]:
    """Remove this file if the process is interrupted meanwhile."""
    _unfinished.add(file)
    try:
        yield
    finally:
        _unfinished.discard(file)


@contextlib.contextmanager
def completed() -> Iterator[None]:
    """Go through with what must not be cut in two; a signal that comes meanwhile is too late."""
    global _too_late
    _too_late = True
    try:
        yield
    finally:
        _too_late = False


def ignore() -> None:
    """From now on all is done, and there is nothing to interrupt."""
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is _hear:
            signal.signal(number, lambda *_: os._exit(0))


def _hear(number: int, frame: object) -> None:
    if not _too_late:
        _leave(number)


def _leave(number: int) -> None:
    # No exception, which could be swallowed on its way up; a computation may run in its thread.
    for file in list(_unfinished):
        with contextlib.suppress(OSError):
            file.unlink()
    with contextlib.suppress(OSError):
        start = b"\r\x1b[K" if os.isatty(2) else b""  # over the bar that is shown there
        os.write(2, start + b"error: interrupted\n")
    os._exit(128 + number)


_listen_if_command()
