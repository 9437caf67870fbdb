"""Speed, as ratios measured side by side: `python -m experiments.benchmarks`.

Prints, each beside its limit: the vector-field evaluations that Tsit5 and fixed-step Euler need for
the same error; equilibrium solvers against each other and the flow; learning against BP; and the
time of fresh Python processes to a first trajectory and to all figures. Each part goes to
`paper_figures/benchmark_<part>.md`; names of parts run only those.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import tyro

import pcdyn
from experiments.benchmarks import equilibrium, learning
from experiments.shared.saving import save_text
from experiments.shared.timing import Row

TARGET = 1e-6

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


def relative_error(trajectory: pcdyn.Trajectory, reference: pcdyn.Trajectory) -> float:
    """Largest distance to the reference over time, relative to the inference displacement."""
    moved = reference.distance_to(tuple(x[0] for x in reference.activities))
    return float(np.max(trajectory.distance_to(reference)) / np.max(moved))


def evaluations_for(problem: pcdyn.InferenceProblem, name: str) -> tuple[int, float]:
    """Evaluations and error of the cheapest run of `name` that meets the target error."""
    times = [0.0, 1.0, 2.0, 4.0]
    reference = pcdyn.simulate(
        problem, t1=4.0, times=times, integrator=pcdyn.SciPy("DOP853", rtol=1e-12, atol=1e-13)
    )
    for exponent in range(2, 44):
        if name == "tsit5":
            integrator = pcdyn.Diffrax("tsit5", rtol=10 ** (-exponent / 4), atol=1e-13)
        else:
            integrator = pcdyn.Euler(dt=2.0 ** (-exponent))
        run = pcdyn.simulate(problem, t1=4.0, times=times, integrator=integrator, throw=False)
        if run.ok and (error := relative_error(run, reference)) <= TARGET:
            return int(run.vector_field_evaluations), error
    raise RuntimeError(f"{name} never met the target")


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


def evaluations() -> Iterator[Row]:
    """Vector-field evaluations for the same error, Euler's over Tsit5's."""
    for widths, activation in (
        ([5, 5, 5], "identity"), ([5, 5, 5], "tanh"), ([20, 20, 20, 20], "tanh"),
    ):  # fmt: skip
        keys = jr.split(jr.key(0), 3)
        network = pcdyn.mlp(widths, activation=activation, std=0.05**0.5, key=keys[0])
        problem = pcdyn.InferenceProblem(
            network, input=1 + jr.normal(keys[1], (widths[0],)),
            output=0.5 * jr.normal(keys[2], (widths[-1],)),
        )  # fmt: skip
        tsit5, euler = (evaluations_for(problem, name) for name in ("tsit5", "euler"))
        yield Row(
            f"{'-'.join(map(str, widths))} {activation}, error {TARGET:g}: evaluations of Euler / "
            "Tsit5",
            euler[0] / tsit5[0], 10, True,
            f"Tsit5 {tsit5[0]} ({tsit5[1]:.1e}), Euler {euler[0]} ({euler[1]:.1e})",
        )  # fmt: skip


def start_up() -> Iterator[Row]:
    """From process start to the first trajectory, and all figures, in seconds; median of 3."""
    for integrator, limit in (("tsit5", 4.0), ("lsoda", 2.5)):
        cold, warm = [], []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as cache:
                runs = [seconds_of("-c", _FIRST, integrator, cache) for _ in range(2)]
            cold.append(runs[0])
            warm.append(runs[1])
        first, second = float(np.median(cold)), float(np.median(warm))
        yield Row(f"{integrator}: seconds to the first trajectory, cold", first, limit)
        yield Row(f"{integrator}: second run with the cache / cold", second / first, 1.0)
    with tempfile.TemporaryDirectory() as cache:
        figures = seconds_of("-m", "experiments", "--output", cache, XDG_CACHE_HOME=cache)
    yield Row("all figures, paper preset: seconds, cold", figures, 60.0)


PARTS = {
    "evaluations": evaluations,
    "equilibrium": equilibrium.rows,
    "learning": learning.rows,
    "start-up": start_up,
}


def main(names: tyro.conf.Positional[tuple[str, ...]] = ()) -> int:
    """Print every measurement beside its limit; `names` of parts run only those."""
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        print(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
        return 2
    jax.config.update("jax_enable_x64", True)
    for name in names or PARTS:
        print(name)
        table = []
        for row in PARTS[name]():
            print(
                f"{row.what:<86} {row.measured:>9.2f}  {row.bound:<13} {row.verdict:<6} {row.note}"
            )
            table.append(row)
        _write_page(name, table)
    return 0


_ABOUT = """Written by `python -m experiments.benchmarks {}` on {}. Ratios of the best of
many calls taken in turns in one process, unless it says evaluations or seconds; they move by a
third from run to run on a busy machine."""


def _machine() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("pcdyn", "jax", "diffrax"))
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {jax.devices()[0]}, Python "
        f"{platform.python_version()}, {libraries}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    )


def _write_page(name: str, table: list[Row]) -> None:
    lines = [
        f"# Benchmark: {name}\n",
        _ABOUT.format(name, _machine()),
        "",
        "| what | measured | limit | | |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.what} | {row.measured:.3g} | {row.bound} | {row.verdict} | {row.note} |"
        for row in table
    ]
    save_text(Path("paper_figures") / "benchmarks" / f"{name}.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m experiments.benchmarks"))
