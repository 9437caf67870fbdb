"""The part of the benchmark for graphs: block factorisation beside the chain's and a dense one."""

from __future__ import annotations

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import pcdyn
from experiments.shared.timing import best_times, row
from pcdyn._support.types import State
from pcdyn.equilibria.solvers.gauss_newton import ActivityModel
from pcdyn.linearisation.block_sparse import operations
from pcdyn.linearisation.coupling import coupled_pairs
from pcdyn.linearisation.whitened import error_factor, error_matrix
from pcdyn.theory import Evidence

LAYERS, WIDTH, BATCH = 16, 128, 64
NODES, UNITS = 200, 16


def rows() -> Iterator[Evidence]:
    """A step of Gauss–Newton with skips, and large sparse graphs against dense solves."""
    yield _with_skips()
    for sources in (1, 2):
        yield _sparse(sources)


def _with_skips() -> Evidence:
    chain, skips = (_deep(skip) for skip in (False, True))
    calls = {}
    for name, problem in (("chain", chain), ("skips", skips)):
        state = problem.feedforward_state()
        step, given = eqx.filter_jit(_step), (problem, state)
        calls[name] = lambda step=step, given=given: step(*given)
    seconds = best_times(calls, 20.0)
    return row(
        f"{LAYERS} × {WIDTH} tanh, output free, batch {BATCH}: a Gauss–Newton step with a skip for "
        "each layer / without", seconds["skips"] / seconds["chain"], 3.0,
        note=f"{1e3 * seconds['skips']:.0f} and {1e3 * seconds['chain']:.0f} ms",
    )  # fmt: skip


def _step(problem: pcdyn.InferenceProblem, state: State) -> State:
    model = ActivityModel(problem)
    slope = problem.gradient(state)
    return model.factorise(state, jnp.zeros(BATCH))(slope)[0]


def _deep(skip: bool) -> pcdyn.InferenceProblem:
    """Layers predicted from the one below, or from the two below."""
    keys = iter(jr.split(jr.key(0), 2 * LAYERS + 1))

    def weight() -> jax.Array:
        return jr.normal(next(keys), (WIDTH, WIDTH)) / (2 * WIDTH) ** 0.5

    data = jr.normal(next(keys), (BATCH, WIDTH))
    if not skip:
        layers = [pcdyn.Dense(weight(), activation="tanh") for _ in range(LAYERS)]
        return pcdyn.InferenceProblem(pcdyn.Network(layers), input=data)
    predictions = []
    for l in range(1, LAYERS + 1):
        given = [str(k) for k in range(max(0, l - 2), l)]
        by = pcdyn.Dense([weight() for _ in given], activation="tanh")
        predictions.append(pcdyn.Prediction(str(l), given=given, by=by))
    graph = pcdyn.Graph({str(l): WIDTH for l in range(LAYERS + 1)}, predictions)
    return pcdyn.InferenceProblem(graph, clamp={"0": data})


def _sparse(sources: int) -> Evidence:
    problem, draw = _random_graph(sources), np.random.default_rng(1)
    units = sum(problem.free_widths)
    rhs = tuple(jnp.asarray(draw.normal(size=n)) for n in problem.free_widths)
    dense_rhs = jnp.concatenate(rhs)
    matrix = error_matrix(problem)

    @eqx.filter_jit
    def by_blocks(problem: pcdyn.InferenceProblem, rhs: State) -> State:
        return error_factor(problem)[0].solve(rhs)

    @jax.jit
    def dense(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
        factor = jnp.linalg.cholesky(matrix.T @ matrix)
        return jax.scipy.linalg.cho_solve((factor, True), rhs)

    calls = {
        "blocks": lambda: by_blocks(problem, rhs),
        "dense": lambda: dense(matrix, dense_rhs),
    }
    away = jnp.max(jnp.abs(jnp.concatenate(by_blocks(problem, rhs)) - dense(matrix, dense_rhs)))
    seconds = best_times(calls, 30.0)
    count = operations(problem.free_widths, coupled_pairs(problem)) / units**3
    return row(
        f"a random linear graph of {NODES} nodes × {UNITS} units, {sources} source"
        f"{'s' if sources > 1 else ''} each: a dense solve / QR factorisations of blocks",
        seconds["dense"] / seconds["blocks"], 20.0, True,
        note=f"{1e3 * seconds['dense']:.0f} and {1e3 * seconds['blocks']:.1f} ms; of dense "
        f"multiplications {100 * count:.1f} %; difference {float(away):.0e}",
    )  # fmt: skip


def _random_graph(sources: int) -> pcdyn.InferenceProblem:
    draw, names = np.random.default_rng(0), [str(i) for i in range(NODES)]
    predictions = [pcdyn.Prediction("0", by=0.0)]
    for node in range(1, NODES):
        given = draw.choice(node, min(node, sources), replace=False)
        weights = [draw.normal(size=(UNITS, UNITS)) / (UNITS * sources) ** 0.5 for _ in given]
        by = pcdyn.Dense(weights)
        predictions.append(pcdyn.Prediction(names[node], given=[names[i] for i in given], by=by))
    graph = pcdyn.Graph(dict.fromkeys(names, UNITS), predictions)
    return pcdyn.InferenceProblem(graph, clamp={names[-1]: draw.normal(size=UNITS)})
