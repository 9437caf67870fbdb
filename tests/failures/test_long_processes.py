"""Processes that meet many shapes, that come after others, and that have several devices.

In processes of their own, for they depend on how JAX was started.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import pcdyn

ROOT = Path(__file__).parents[2]


def run(program: str, seconds: float) -> str:
    """What a program prints; fails if it ends otherwise or takes longer."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are Linux's")
def test_many_shapes_keep_a_bounded_number_of_programs() -> None:
    """Maps stay below a bound and what one call takes; a network of a new shape takes about 200."""
    program = """
        import os, pathlib
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        import jax
        import pcdyn
        from pcdyn._support import programs

        def maps():
            return pathlib.Path("/proc/self/maps").read_bytes().count(b"\\n")

        bounded, start, released = programs.release_if_many, maps(), 0

        def release_if_many():
            global released
            before = maps()
            bounded(start + 300)
            released += maps() < before

        programs.release_if_many = release_if_many
        for width in range(2, 6):
            network = pcdyn.mlp([2, width, 1], activation="tanh", key=jax.random.key(width))
            problem = pcdyn.InferenceProblem(network, input=[0.5, -0.2], output=[0.3])
            assert pcdyn.simulate(problem, t1=1.0, integrator=pcdyn.Euler(dt=0.1)).ok
            # What is compiled in a call is counted at its end: twice what one takes.
            assert maps() < start + 300 + 400, maps() - start
        print(released)
    """
    assert int(run(program, 120)) > 0


def test_compiled_programs_are_kept_for_later_processes(tmp_path: Path) -> None:
    """Also where something was compiled before; both print the same."""
    program = f"""
        import jax, numpy as np
        hits = []
        jax.monitoring.register_event_listener(
            lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
        )
        jax.jit(lambda x: x + 1)(1.0)
        import pcdyn
        assert pcdyn.compilation_cache({str(tmp_path / "new" / "folder")!r}).is_dir()
        network = pcdyn.mlp([3, 4, 2], activation="tanh", key=jax.random.key(0))
        problem = pcdyn.InferenceProblem(network, input=np.ones(3), output=np.ones(2))
        rest = pcdyn.equilibrium(problem)
        assert rest.ok
        print(len(hits), *rest.activities[1])
    """
    first, second = (run(program, 120).split() for _ in range(2))
    assert int(first[0]) == 0
    assert int(second[0]) > 0
    assert first[1:] == second[1:]


@pytest.mark.unchecked
def test_a_cache_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for folder in (file, "", "\0", 3):
        with pytest.raises(pcdyn.errors.InputError, match="folder"):
            pcdyn.compilation_cache(folder)  # pyright: ignore[reportArgumentType]
    with pytest.raises(pcdyn.errors.DataError, match="file"):
        pcdyn.compilation_cache(file / "below")


def test_a_batch_on_an_explicit_mesh_is_taken_as_any_other() -> None:
    """The same numbers as without a mesh; under a transformation a named error with the cure."""
    program = """
        import os
        os.environ["XLA_FLAGS"] = (
            "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
        )
        import jax, numpy as np
        from jax.sharding import AxisType
        jax.config.update("jax_enable_x64", True)
        import pcdyn

        network = pcdyn.mlp([3, 4, 2], activation="tanh", key=jax.random.key(0))
        x, y = np.random.default_rng(0).normal(size=(2, 8, 3))
        mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Explicit,))
        rows = jax.NamedSharding(mesh, jax.P("b"))

        def end(x, y):
            problem = pcdyn.InferenceProblem(network, input=x, output=y)
            run = pcdyn.simulate(problem, t1=1.0, integrator=pcdyn.Euler(dt=0.1))
            return run.final[1]

        x, y = x, y[:, :2]
        sharded = jax.device_put(x, rows), jax.device_put(y, rows)
        # Ten steps of activities of order one, whose sums may be in another order.
        np.testing.assert_allclose(end(*sharded), end(x, y), rtol=0, atol=1e-14)
        own = jax.shard_map(end, mesh=mesh, in_specs=jax.P("b"), out_specs=jax.P("b"))
        for name, mapped in (("AxisType.Auto", jax.jit(end)), ("check_vma=False", own)):
            try:
                found = mapped(*sharded)
            except pcdyn.PcdynError as error:
                assert name in str(error), error
            else:
                # The newest JAX can do what older ones cannot.
                np.testing.assert_allclose(found, end(x, y), rtol=0, atol=1e-14)
    """
    run(program, 120)
