"""Versions of JAX: the ones that deadlock are excluded and named, the installed one does not."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# Two batched LAPACK calls ready at once on two workers: each waits for sub-tasks that only the
# other could run. With jaxlib 0.10.2 it hangs within 20 turns in most runs.
PROGRAM = """
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
a = jax.random.normal(jax.random.key(0), (8, 4000, 5, 5))
matrices = list(a @ jnp.swapaxes(a, 2, 3) + 5 * jnp.eye(5))

@jax.jit
def program(*matrices):
    out = []
    for i, m in enumerate(matrices):
        s = jnp.tanh(jnp.sin(m * (1e-3 * (i + 1))))
        out.append(tuple(jnp.linalg.eigh(m + s + jnp.swapaxes(s, 1, 2))))
    return out

for _ in range(20):
    jax.block_until_ready(program(*matrices))
"""


def test_batched_linear_algebra_does_not_hang() -> None:
    """On the installed version; the limit is thirty times what it takes on a busy machine."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=240)


def test_versions_that_hang_cannot_be_installed() -> None:
    """The requirement leaves out jaxlib 0.10.0 to 0.11.0 and nothing near them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = {r.name: r for r in map(Requirement, project["dependencies"])}
    allowed = requirements["jax"].specifier
    for version in ("0.10.0", "0.10.1", "0.10.2", "0.10.2.1", "0.11.0"):
        assert not allowed.contains(version)
    for version in ("0.9.2", "0.11.1", "0.12.0.1", "0.13.0"):
        assert allowed.contains(version)


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.9.2", False), ("0.10.0", True), ("0.10.2", True), ("0.11.0", True), ("0.11.1", False)],
)
def test_an_affected_jaxlib_is_named_at_import(version: str, warned: bool) -> None:
    """Once, as a warning with the remedy, in an environment that has it all the same."""
    changed = f"import jax, jaxlib.version; jaxlib.version.__version__ = {version!r}"
    program = f"{changed}; import pcdyn; import pcdyn"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stderr.count("JaxlibDeadlockWarning") == warned
    assert (f"jaxlib {version} can hang" in run.stderr) == warned
