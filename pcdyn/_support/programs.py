"""Compiled programs: one for each function that a user calls, and a bounded number of them.

XLA maps each program that it compiles into memory, a few hundred times for a network of a new
shape, and JAX keeps all programs. Linux allows a process 65530 maps, unless set otherwise, and XLA
ends it by a segmentation fault when there are none left.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import checked_folder
from pcdyn._support.files import cache_folder, make_folder

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


def compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder, from which later processes take them.

    The first call of a function then takes a fraction of the time in every process but the first.
    It switches JAX's own persistent cache on, for the programs of all libraries from here on.

    **Arguments:**

    - `folder`: unless given, `jax` in pcdyn's part of the user's cache.

    **Returns:**

    The folder.

    **Raises:**

    - `DataError` if it cannot be made.
    """
    path = None if folder is None else checked_folder(folder, "folder")
    settings = cache_settings(path)
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX looks only once whether there is a cache, when it first compiles.
    jax_cache.reset_cache()
    return Path(settings["jax_compilation_cache_dir"])


def cache_settings(folder: Path | None = None) -> dict[str, Any]:
    """Make the folder, and return what JAX is set to where compiled programs are kept."""
    path = cache_folder() / "jax" if folder is None else folder
    make_folder(path)
    return {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }


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
