"""A process that meets many shapes, deep networks and sharded arrays, each as a user has them.

In processes of their own, for they depend on how JAX was started.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(program: str, seconds: float) -> str:
    """What a program prints; fails if it ends otherwise or takes longer."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are Linux's")
def test_many_shapes_keep_a_bounded_number_of_programs() -> None:
    """Maps stay below the bound and what one shape takes, here 3000; without it they pass it.

    Twelve networks take about 400 maps each on top of what is there from the start.
    """
    program = """
        import pathlib, jax
        jax.config.update("jax_enable_x64", True)
        import pcdyn
        from pcdyn import programs

        bounded, counts = programs.release_if_many, []
        maps = lambda: pathlib.Path("/proc/self/maps").read_bytes().count(b"\\n")
        start = maps()
        programs.release_if_many = lambda: bounded(start + 1000)
        for width in range(2, 14):
            network = pcdyn.mlp([2, width, 1], activation="tanh", key=jax.random.key(width))
            problem = pcdyn.InferenceProblem(network, input=[0.5, -0.2], output=[0.3])
            assert pcdyn.simulate(problem, t1=1.0, integrator=pcdyn.Euler(dt=0.1)).ok
            assert pcdyn.equilibrium(problem).ok
            counts.append(maps() - start)
        print(max(counts))
    """
    assert int(run(program, 300)) < 3000
