"""Ctrl-C while a compiled program runs: Python hears of it only between its own instructions."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

_Result = TypeVar("_Result")
_POLL_SECONDS = 0.1
_LAST_SECONDS = 5.0
# Computations that nobody waits for any more.
_left: list[threading.Event] = []


def interruptible(
    function: Callable[[], _Result], meanwhile: Callable[[], object] | None = None
) -> _Result:
    """`function()`, which Ctrl-C ends within a second though JAX compiles or runs in it.

    JAX waits for XLA where no signal is handled. In the main thread, the only one that gets
    signals, the function is therefore computed by another thread, for which this one waits; what is
    interrupted goes on in the background until it is done, and its result is dropped. Where JAX has
    settings of this thread alone (`jax.enable_x64` and its like as contexts) it is computed here.
    While it waits, `meanwhile` is called ten times a second.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    settings = _settings()
    outcome: list[Any] = []
    declined = object()
    # `Thread.is_alive` is wrong once Ctrl-C has interrupted `Thread.join`.
    done = threading.Event()

    def compute() -> None:
        try:
            outcome.append((function() if _settings() == settings else declined, None))
        # It is raised again by the thread that waits.
        except BaseException as error:
            outcome.append((None, error))
        finally:
            done.set()

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(compute,), daemon=True).start()
    try:
        with _noted_interrupts() as interrupted:
            while not (done.wait(_POLL_SECONDS) or interrupted.is_set()):
                if meanwhile is not None:
                    meanwhile()
            if interrupted.is_set():
                raise KeyboardInterrupt
    except BaseException:
        _left.append(done)
        raise
    ((result, error),) = outcome
    if error is not None:
        raise error
    return function() if result is declined else result


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[threading.Event]:
    """Set an event on Ctrl-C, in place of Python's exception; other handlers stay as they are.

    Python drops an exception that comes while it collects garbage or runs a finaliser.
    """
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield interrupted
        return
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _settings() -> tuple[Any, ...]:
    """What JAX is set to in this thread."""
    return jax.config.values, jax.sharding.get_abstract_mesh()


def _end_what_is_left() -> None:
    """End the process where a computation that was interrupted still runs.

    Python would abort it, with a message of the C++ library, once XLA returns to the interpreter
    that has gone.
    """
    if not all(done.wait(_LAST_SECONDS) for done in _left):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if getattr(sys, "last_type", None) is KeyboardInterrupt:
            os._exit(130)
        os.write(2, b"pcdyn: a computation that was interrupted still ran, and was ended\n")
        os._exit(1)


atexit.register(_end_what_is_left)
