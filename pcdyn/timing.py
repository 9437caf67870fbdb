"""Wall time of a call, split into compilation and running."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import jax.monitoring


class Stopwatch:
    """A context that measures the seconds spent compiling and the seconds spent running.

    JAX itself reports how long it traces, lowers and compiles; the rest of the wall time is run
    time.
    """

    compile_seconds: float = 0.0
    run_seconds: float = 0.0

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    def __enter__(self) -> Stopwatch:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        total = time.perf_counter() - self._start
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self.compile_seconds = _covered(self._spans)
        self.run_seconds = max(total - self.compile_seconds, 0.0)


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of the spans: one compilation can report its parts as well."""
    covered, reached = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered
