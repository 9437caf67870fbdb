"""Wall time of a call, split into compilation and running."""

from __future__ import annotations

import functools
import threading
import time
from types import TracebackType

import jax.monitoring

from pcdyn._support import programs

_IMPORTED = time.monotonic()


def elapsed() -> float:
    """Tell the seconds since pcdyn was imported, few enough for float32."""
    return time.monotonic() - _IMPORTED


class Stopwatch:
    """A context that measures the seconds spent compiling and the seconds spent running.

    JAX itself reports how long it traces, lowers and compiles, in the thread that does so; the rest
    of the wall time is run time.
    """

    compile_seconds: float = 0.0
    run_seconds: float = 0.0

    def __enter__(self) -> Stopwatch:
        _listen_to_jax()
        self._spans: list[tuple[float, float]] = []
        _of_this_thread.spans = (*_running(), self._spans)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        total = time.perf_counter() - self._start
        _of_this_thread.spans = _running()[:-1]
        self.compile_seconds = _covered(self._spans)
        self.run_seconds = max(total - self.compile_seconds, 0.0)
        if self.compile_seconds > 0:
            programs.release_if_many()


_of_this_thread = threading.local()


def _running() -> tuple[list[tuple[float, float]], ...]:
    """The spans of the stopwatches that run in this thread, the innermost last."""
    return getattr(_of_this_thread, "spans", ())


# Listeners of JAX are global, and threads that add and remove theirs would lose events.
@functools.cache
def _listen_to_jax() -> None:
    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            for spans in _running():
                spans.append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(listen)


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of the spans: one compilation can report its parts as well."""
    covered, reached = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered
