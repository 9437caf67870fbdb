"""Timing of compiled calls, and rows of benchmark tables."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement beside its limit, if it has one."""

    what: str
    measured: float
    limit: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def bound(self) -> str:
        """The limit in words."""
        if self.limit is None:
            return ""
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"

    @property
    def verdict(self) -> str:
        """Whether the limit is met."""
        if self.limit is None:
            return ""
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return "met" if met else "MISSED"


def best_time(function: Callable[..., Any], *arguments: Any, repeats: int = 4) -> tuple[Any, float]:
    """The result of a compiled call and the least seconds it took, not counting the first."""
    result, best = jax.block_until_ready(function(*arguments)), np.inf
    for _ in range(repeats):
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
