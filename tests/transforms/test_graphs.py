"""Graphs under JAX's transformations, in every dtype, and through every verb."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcdyn
from pcdyn import Dense, Gaussian, Graph, InferenceProblem, Partial, Prediction
from pcdyn.errors import GraphError


def problem_of(weights: dict[str, Any], activation: str = "tanh") -> InferenceProblem:
    """A loop of two nodes that see a partly clamped one, of three samples."""
    dtype = weights["low"].dtype
    graph = Graph(
        {"eye": 3, "low": 2, "top": 2},
        [
            Prediction("eye", by=np.zeros(3, dtype)),
            Prediction("low", given="eye", by=Dense(weights["low"], activation=activation)),
            Prediction(
                "top",
                given=("low", "eye"),
                by=Dense([weights["up"], weights["skip"]], activation=activation),
            ),
            Prediction(
                "low",
                given="top",
                by=Dense(weights["down"], activation=activation),
                energy=Gaussian(np.asarray(0.5, dtype)),
            ),
        ],
    )
    mask = np.array([[True, False, True], [True, True, True], [False, True, False]])
    values = np.linspace(-1, 1, 9).reshape(3, 3).astype(dtype)
    return InferenceProblem(
        graph, clamp={"eye": Partial(values, mask), "top": np.ones((3, 2), dtype)}
    )


def drawn(key: jax.Array, dtype: Any = jnp.float64) -> dict[str, jax.Array]:
    shapes = {"low": (2, 3), "up": (2, 2), "skip": (2, 3), "down": (2, 2)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: 0.6 * jax.random.normal(k, shape, dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@pytest.mark.parametrize("activation", ["identity", pytest.param("tanh", marks=pytest.mark.slow)])
def test_several_graphs_are_each_alone(activation: str) -> None:
    keys = jax.random.split(jax.random.key(0), 3)

    def energies(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        problem = problem_of(drawn(key), activation)
        run = pcdyn.simulate(problem, t1=2.0)
        return pcdyn.equilibrium(problem).free_energy, run.activities[1][-1]

    mapped = jax.vmap(energies)(keys)
    for i, key in enumerate(keys):
        for alone, together in zip(energies(key), mapped, strict=True):
            # Both to the tolerances of a solver.
            np.testing.assert_allclose(together[i], alone, atol=1e-6)


def test_a_gradient_of_several_graphs_is_that_of_each() -> None:
    keys = jax.random.split(jax.random.key(1), 2)
    weights = jax.vmap(drawn)(keys)

    def energy(weights: dict[str, jax.Array]) -> jax.Array:
        rest = pcdyn.equilibrium(problem_of(weights), tolerance=1e-11)
        return jnp.sum(rest.activities[1] ** 2)

    of_each = jax.vmap(jax.grad(energy))(weights)
    of_all = jax.grad(lambda w: jnp.sum(jax.vmap(energy)(w)))(weights)
    one = jax.tree.map(lambda x: x[0], weights)
    for name, weight in one.items():
        np.testing.assert_allclose(of_each[name], of_all[name], rtol=1e-8, atol=1e-10)
        step = jnp.zeros_like(weight).at[0, 1].set(1e-5)
        ends = [energy({**one, name: weight + sign * step}) for sign in (1, -1)]
        np.testing.assert_allclose(of_each[name][0, 0, 1], (ends[0] - ends[1]) / 2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "activation", ["identity", *[pytest.param(x, marks=pytest.mark.slow) for x in ("tanh", "relu")]]
)
def test_float32_is_float64_up_to_its_digits(activation: str) -> None:
    weights = drawn(jax.random.key(2))
    exact = problem_of(weights, activation)
    single = problem_of({k: w.astype(jnp.float32) for k, w in weights.items()}, activation)
    rest, ours = (pcdyn.equilibrium(p) for p in (exact, single))
    assert all(x.dtype == jnp.float32 for x in ours.activities)
    for x, other in zip(ours.activities, rest.activities, strict=True):
        # The default tolerance of float32, over the slowest rate.
        np.testing.assert_allclose(x, other, atol=1e-3)
    for name in ("tsit5", "rodas5p", *(["exact"] if activation == "identity" else [])):
        run, mine = (pcdyn.simulate(p, t1=2.0, integrator=name) for p in (exact, single))
        for x, other in zip(mine.final, run.final, strict=True):
            np.testing.assert_allclose(x, other, atol=1e-3)
    rates = [pcdyn.stability(p, at="zeros").rates for p in (exact, single)]
    if activation != "relu":
        np.testing.assert_allclose(rates[1], rates[0], rtol=1e-4)


VERBS: dict[str, Callable[[InferenceProblem], Any]] = {
    "per sample": lambda p: pcdyn.simulate(p, t1=1.0, per_sample=True),
    "until": lambda p: pcdyn.simulate(p, t1=500.0, until="equilibrium", integrator="rodas5p"),
    "dense": lambda p: pcdyn.simulate(p, t1=1.0, dense=True)(0.5),
    "euler": lambda p: pcdyn.simulate(p, t1=1.0, integrator=pcdyn.Euler(dt=0.1)),
    "basin": lambda p: pcdyn.equilibrium(p).basin(),
    "descent": lambda p: pcdyn.equilibrium(p, method=pcdyn.solvers.GradientDescent(dt=0.1)),
    "flow": lambda p: pcdyn.equilibrium(p, method="flow"),
    "compare": lambda p: pcdyn.compare(["tsit5", "rodas5p"], p, t1=1.0).table(),
    "order": lambda p: pcdyn.convergence_order("heun", p, t1=1.0),
    "stability along": lambda p: pcdyn.stability_along(p, pcdyn.simulate(p, t1=1.0)),
    "several": lambda p: pcdyn.multiple_equilibria(
        p.sample(0), [jnp.zeros((2, n)) for n in p.free_widths]
    ),
}
REFUSED: dict[str, Callable[[InferenceProblem], Any]] = {
    "fixed point": lambda p: pcdyn.equilibrium(p, method="fixed_point"),
    "targets": pcdyn.target_propagation,
    "generate": lambda p: pcdyn.generate(p, jax.random.key(0)),
    "network": lambda p: p.network,
    "input": lambda p: p.input,
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_verbs_answer(verb: Callable[[InferenceProblem], Any]) -> None:
    assert verb(problem_of(drawn(jax.random.key(3)))) is not None


@pytest.mark.parametrize("verb", REFUSED.values(), ids=list(REFUSED))
def test_what_is_of_chains_refuses_by_name(verb: Callable[[InferenceProblem], Any]) -> None:
    with pytest.raises(GraphError, match="chain"):
        verb(problem_of(drawn(jax.random.key(3))))


def test_graphs_and_what_comes_of_them_are_citizens() -> None:
    problem = problem_of(drawn(jax.random.key(4)))
    run = pcdyn.simulate(problem, t1=1.0)
    again = pickle.loads(pickle.dumps((problem, run)))
    assert eqx.tree_equal(again[0], problem)
    doubled: Any = jax.tree.map(lambda x: 2 * x, run.activities)
    np.testing.assert_array_equal(doubled["low"], 2 * again[1].activities["low"])
    jitted: Any = jax.jit(lambda p: pcdyn.simulate(p, t1=1.0).activities)(problem)
    np.testing.assert_allclose(jitted["low"], doubled["low"] / 2, atol=1e-12)
