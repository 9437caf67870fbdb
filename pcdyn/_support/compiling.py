"""Functions that users call as one compiled program each, and programs kept for later processes."""

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
from pcdyn._support.timing import Stopwatch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make one program of a function of known arrays, as a user calls it.

    Otherwise JAX would run operation after operation, and compile each of them for every new shape:
    five times slower the first time, and fifty times later. Numbers and texts among the arguments
    are part of the program. Inside of a transformation nothing changes.
    """
    program = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if is_traced(args, kwargs):
            return function(*args, **kwargs)
        # It sees to it that there are not too many programs.
        with Stopwatch():
            return program(*args, **kwargs)

    return call


def compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder, from which later processes take them.

    The first call of a function then takes a fraction of the time in every process but the first.
    It switches JAX's own persistent cache on, for the programs of all libraries from here on. With
    jaxlib 0.9 set the environment variable `TF_CPP_MIN_LOG_LEVEL` to 3 before JAX is imported, or
    it prints errors, which are none, of programs that it finds.

    **Arguments:**

    - `folder`: unless given, `jax` in pcdyn's part of the user's cache.

    **Returns:**

    The folder.

    **Raises:**

    - `InputError` for what is no path of a folder, `DataError` if it cannot be made.
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
