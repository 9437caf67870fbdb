"""Ctrl-C while a compiled program runs: Python hears of it only between its own instructions."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_Result = TypeVar("_Result")
_POLL_SECONDS = 0.1


def interruptible(function: Callable[[], _Result]) -> _Result:
    """`function()`, which Ctrl-C ends within a second though JAX compiles or runs in it.

    JAX waits for XLA where no signal is handled. In the main thread, the only one that gets
    signals, the function is therefore computed by another thread, for which this one waits; what is
    interrupted goes on in the background until it is done, and its result is dropped. Where JAX has
    settings of this thread alone (`jax.enable_x64` and its like as contexts) it is computed here.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    settings = _settings()
    outcome: list[Any] = []
    declined = object()

    def compute() -> None:
        try:
            outcome.append((function() if _settings() == settings else declined, None))
        # It is raised again by the thread that waits.
        except BaseException as error:
            outcome.append((None, error))

    context = contextvars.copy_context()
    worker = threading.Thread(target=context.run, args=(compute,), daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(_POLL_SECONDS)
    ((result, error),) = outcome
    if error is not None:
        raise error
    return function() if result is declined else result


def _settings() -> tuple[Any, ...]:
    """What JAX is set to in this thread."""
    return jax.config.values, jax.sharding.get_abstract_mesh()
