"""Compiled programs: one for each function that a user calls, and a bounded number of them.

XLA maps each program that it compiles into memory, a few hundred times for a network of a new
shape, and JAX keeps all programs. Linux allows a process 65530 maps, unless set otherwise, and XLA
ends it by a segmentation fault when there are none left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax

from pcdyn._support.arrays import is_traced

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_MAPS = Path("/proc/self/maps")
_LIMIT = Path("/proc/sys/vm/max_map_count")


def compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make one program of a function of known arrays, as a user calls it.

    Otherwise JAX would run operation after operation, and compile each of them for every new shape:
    five times slower the first time, and fifty times later. Numbers and texts among the arguments
    are part of the program. Inside of a transformation nothing changes.
    """
    program = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return (function if is_traced(args, kwargs) else program)(*args, **kwargs)

    return call


def release_if_many(most: int | None = None) -> None:
    """Let JAX forget its compiled programs where they take more than `most` memory maps.

    That is half of what the kernel allows unless given. Functions that are called again are
    compiled again, also those of others than pcdyn. Call it after something has compiled: it reads
    a file of one line for each map. Does nothing where there is no Linux.
    """
    if not _MAPS.exists():
        return
    if most is None:
        most = int(_LIMIT.read_text()) // 2 if _LIMIT.exists() else 32_000
    if _MAPS.read_bytes().count(b"\n") > most:
        jax.clear_caches()
