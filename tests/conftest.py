"""Strict settings for every test: float64, no silent promotion, types and shapes checked."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# Before NumPy, JAX and Matplotlib are imported: they read these once. The workers of pytest-xdist
# share the machine, so that each keeps to one BLAS thread and takes no more GPU memory (where
# there is a GPU) than it uses.
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# What pcdyn keeps for the user is kept apart, and shared by the workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pcdyn-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# Most of a test's time is compilation, and small networks need no fast code. Without the fusion
# emitters it takes a third less; other versions of XLA do not know the flag, and exit.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.9."),
)

# The places in the code that each operation comes from cost a twentieth.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Commands that tests interrupt inherit what is ignored, as in the background of a script.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)

hypothesis.settings.register_profile("pcdyn", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("pcdyn")

# Modules imported from here on have their annotations checked at each call.
jaxtyping.install_import_hook("pcdyn", "beartype.beartype")


# JAX traces by millions of small objects, of which next to none is garbage: looking for it takes a
# fifth of the time.
gc.freeze()
gc.set_threshold(100_000, 10, 20)


@pytest.fixture(autouse=True)
def _annotations_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Switch the checks off for tests marked `unchecked`: users run pcdyn without them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("unchecked"):
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


# Linux gives a process 65530 memory maps, compiled programs take some each, and XLA crashes when
# none are left. A single test of the experiments takes many thousands.
_MOST_MAPS = 30_000
_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def _compiled_programs_do_not_pile_up() -> Iterator[None]:
    yield
    if _MAPS.exists() and _MAPS.read_text().count("\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """Promote dtypes and ranks as JAX does by default: commands and schedules of optax need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one with each program that XLA compiles."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
