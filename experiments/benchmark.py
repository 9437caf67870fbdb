"""Speed, as ratios measured side by side: `python -m experiments.benchmark`.

Prints the vector-field evaluations that Tsit5 and fixed-step Euler need for the same error, and
the time from a fresh Python process to the first trajectory on the diffrax and the SciPy path.
"""

from __future__ import annotations

import subprocess
import sys
import time

import jax
import jax.random as jr
import numpy as np
from tqdm import tqdm

import pcdyn

TARGET = 1e-6

_FIRST = """
import sys, jax
jax.config.update("jax_enable_x64", True)
if sys.argv[2] == "cached":
    jax.config.update("jax_compilation_cache_dir", sys.argv[3])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
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


def first_trajectory(integrator: str, cache: str = "cold", folder: str = "") -> float:
    """Seconds from process start to the end of the first simulation."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _FIRST, integrator, cache, folder], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Print both tables."""
    import tempfile

    jax.config.update("jax_enable_x64", True)
    print(f"vector-field evaluations for relative error {TARGET:g}")
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
        print(
            f"{widths!s:18} {activation:9} tsit5 {tsit5[0]:>6} ({tsit5[1]:.1e})  euler "
            f"{euler[0]:>9} ({euler[1]:.1e})  ratio {euler[0] / tsit5[0]:.0f}"
        )
    print("seconds from process start to the first trajectory (median of 3)")
    with tempfile.TemporaryDirectory() as folder:
        first_trajectory("tsit5", "cached", folder)
        for integrator, cache in tqdm([("tsit5", "cold"), ("tsit5", "cached"), ("lsoda", "cold")]):
            seconds = [first_trajectory(integrator, cache, folder) for _ in range(3)]
            print(f"{integrator:8} {cache:8} {np.median(seconds):.2f}")


if __name__ == "__main__":
    main()
