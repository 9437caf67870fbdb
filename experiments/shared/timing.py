"""Timing of compiled calls, and rows of benchmark tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pcdyn.theory import Evidence


def row(
    what: str, measured: float, limit: float = np.inf, at_least: bool = False, note: str = ""
) -> Evidence:
    """One measurement beside its limit, if it has one."""
    relation = "at least" if at_least and np.isfinite(limit) else "at most"
    return Evidence("", what, float(measured), relation, limit, note=note, timed=True)


def best_time(function: Callable[..., Any], *arguments: object) -> tuple[Any, float]:
    """The result of a compiled call and the least seconds it took, not counting the first."""
    result, best = jax.block_until_ready(function(*arguments)), np.inf
    for _ in range(4):
        started = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - started)
        if best > 0.3:
            break
    return result, best


def best_times(calls: Mapping[str, Callable[[], Any]], seconds: float = 5.0) -> dict[str, float]:
    """The least seconds of each call, taken in turns for so long after one round that compiles."""
    best = dict.fromkeys(calls, np.inf)
    for call in calls.values():
        jax.block_until_ready(call())
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], time.perf_counter() - begin)
    return best
