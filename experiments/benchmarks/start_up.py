"""The part of the benchmark that times fresh Python processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from experiments.shared.timing import row
from pcdyn.theory import Evidence

# The compilation cache as the entry points switch it on, in a folder of its own.
_FIRST = """
import sys, jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
import pcdyn
network = pcdyn.mlp([5, 5, 5], activation="tanh", key=jax.random.key(0))
problem = pcdyn.InferenceProblem(network, input=[1.0] * 5, output=[-0.5] * 5)
pcdyn.simulate(problem, t1=20.0, integrator=sys.argv[1])
"""


def seconds_of(*arguments: str, **variables: str) -> float:
    """Wall time of a fresh Python process with these arguments and environment variables."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def rows() -> Iterator[Evidence]:
    """From process start to the first trajectory, and all figures, in seconds; median of 3."""
    for integrator, limit in (("tsit5", 4.0), ("lsoda", 2.5)):
        cold, warm = [], []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as cache:
                runs = [seconds_of("-c", _FIRST, integrator, cache) for _ in range(2)]
            cold.append(runs[0])
            warm.append(runs[1])
        first, second = float(np.median(cold)), float(np.median(warm))
        yield row(f"{integrator}: seconds to the first trajectory, cold", first, limit)
        yield row(f"{integrator}: second run with the cache / cold", second / first, 1.0)
    with tempfile.TemporaryDirectory() as cache:
        figures = seconds_of("-m", "experiments", "--output", cache, XDG_CACHE_HOME=cache)
    yield row("all figures, paper preset: seconds, cold", figures, 60.0)
