"""What accelerators need, seen without one: precise products, and programs that lower for CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import pcdyn

_PRECISIONS = (4 * jnp.eye(5), jnp.full(5, 2.0), 3 * jnp.eye(3))


def _problem(activation: str, dtype: Any) -> pcdyn.InferenceProblem:
    keys = jr.split(jr.key(0), 3)
    return pcdyn.InferenceProblem(
        pcdyn.mlp([4, 5, 5, 3], activation=activation, key=keys[0], dtype=dtype),
        input=jr.normal(keys[1], (2, 4), dtype), output=jr.normal(keys[2], (2, 3), dtype),
        energy=pcdyn.Gaussian([p.astype(dtype) for p in _PRECISIONS]),
    )  # fmt: skip


def _simulate(integrator: str) -> Callable[[pcdyn.InferenceProblem], Any]:
    def run(problem: pcdyn.InferenceProblem) -> Any:
        options: dict[str, Any] = {"t1": 1.0, "times": [0.0, 1.0], "throw": False}
        return pcdyn.simulate(problem, integrator=integrator, **options).activities

    return run


def _slope(problem: pcdyn.InferenceProblem) -> Any:
    def energy(problem: pcdyn.InferenceProblem) -> Any:
        rest = pcdyn.equilibrium(problem, method="gauss_newton", throw=False)
        return jnp.sum(rest.activities[1] ** 2)

    return eqx.filter_grad(energy)(problem)


_VERBS: dict[str, tuple[str, Callable[[pcdyn.InferenceProblem], Any]]] = {
    "rodas5p": ("tanh", _simulate("rodas5p")),
    "exact": ("identity", _simulate("exact")),
    "equilibrium": ("tanh", lambda p: pcdyn.equilibrium(p, throw=False).residual_norms),
    "derivatives of an equilibrium": ("tanh", _slope),
    "linear_equilibrium": ("identity", pcdyn.linear_equilibrium),
    "stability": ("tanh", lambda p: pcdyn.stability(p, at="feedforward").rates),
    "backpropagation": ("tanh", lambda p: pcdyn.backpropagation(p).weight_gradient),
    "target_propagation": ("tanh", lambda p: pcdyn.target_propagation(p).values),
}


def _products(program: Any) -> Iterator[Any]:
    """Every product of a program, those of the loops and branches inside it included."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for part in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


@pytest.mark.parametrize("name", _VERBS)
def test_products_of_float32_are_asked_for_in_float32(name: str) -> None:
    # Otherwise a GPU gives them eleven bits, and of the trained classifier of the benchmark two
    # samples in three do not converge.
    activation, verb = _VERBS[name]
    arrays, static = eqx.partition(_problem(activation, jnp.float32), eqx.is_array)
    program = jax.make_jaxpr(lambda arrays: verb(eqx.combine(arrays, static)))(arrays)
    found = list(_products(program.jaxpr))
    highest = jax.lax.Precision.HIGHEST
    assert found
    assert {product.params["precision"] for product in found} <= {highest, (highest, highest)}


@pytest.mark.slow
def test_every_verb_lowers_for_cuda() -> None:
    # With errors as NaN: those that the solvers raise from inside are calls of Python, which can
    # run beside a GPU but not be exported.
    run = subprocess.run(
        [sys.executable, "-c", "from tests.transforms import test_accelerators as t; t.lower()"],
        env={**os.environ, "EQX_ON_ERROR": "nan"}, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert run.stdout.split("\n")[:-1] == list(_VERBS), run.stderr


def lower() -> None:
    """Print the name of each verb that lowers for CUDA."""
    jax.config.update("jax_enable_x64", True)
    for name, (activation, verb) in _VERBS.items():
        arrays, static = eqx.partition(_problem(activation, jnp.float64), eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)

        def call(*leaves: Any, structure: Any = structure, static: Any = static,
                 verb: Any = verb) -> Any:  # fmt: skip
            return verb(eqx.combine(jax.tree.unflatten(structure, leaves), static))

        jax.export.export(jax.jit(call), platforms=("cuda",))(*leaves)
        print(name)
