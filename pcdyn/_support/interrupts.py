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
_stage = "running"  # then "writing", then "done"


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
def completed() -> Iterator[None]:
    """Go through with writing all that was asked for; a signal that comes later is too late."""
    global _stage
    _stage = "writing"
    try:
        yield
    except BaseException:
        _stage = "running"
        raise
    _stage = "done"


def _hear(number: int, frame: object) -> None:
    if _stage == "done":  # but the output is not read
        os._exit(0)
    if _stage == "running":
        with contextlib.suppress(OSError):
            start = b"\r\x1b[K" if os.isatty(2) else b""  # over the bar that is shown there
            os.write(2, start + b"error: interrupted\n")
        # No exception, which could be swallowed on its way up.
        os._exit(128 + number)


_listen_if_command()
