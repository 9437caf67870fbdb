"""Graphs of predictions against dense least squares, matrix exponentials and the chain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot
import numpy as np
import pytest

import pcdyn
from pcdyn import Dense, Gaussian, Graph, InferenceProblem, Partial, Prediction
from pcdyn.linearisation.block_sparse import fronts_of
from pcdyn.linearisation.coupling import coupled_pairs
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.references.linear import hessian, spectrum
from tests.graphs import Edge, GraphCase, random_graph

TIMES = np.array([0.0, 0.3, 2.0, 9.0])
# Ten draws of numbers for each of twenty structures.
QUICK, ALL, DRAWS = (0, 1, 3), (2, *range(4, 20)), 10


def of(activities: object, name: str) -> Any:
    """The activities of a node."""
    assert isinstance(activities, pcdyn.NamedActivities)
    return activities[name]


def graph_of(problem: InferenceProblem) -> Graph:
    assert isinstance(problem.graph, Graph)
    return problem.graph


def stacked(activities: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(x) for x in activities], axis=-1)


def check(case: GraphCase) -> None:
    end, course = case.solved(TIMES)
    problem = case.problem
    scale = np.max(np.abs(end))
    rest = pcdyn.equilibrium(problem, initial="zeros")
    np.testing.assert_allclose(stacked(rest.activities), end, atol=1e-10 * scale)
    run = pcdyn.simulate(problem, t1=9.0, times=TIMES, initial="zeros", integrator="exact")
    np.testing.assert_allclose(stacked(run.activities), course, atol=1e-10 * scale)


@pytest.mark.parametrize("structure", QUICK)
def test_linear_graphs_are_dense_least_squares(structure):
    for numbers in range(DRAWS):
        check(random_graph(structure, 1000 * structure + numbers))


@pytest.mark.slow
def test_a_graph_of_many_nodes_is_eliminated_front_after_front():
    draw, count = np.random.default_rng(0), 30
    edges = [Edge(0, (), (), draw.normal(size=2), np.eye(2))]
    for target in range(1, count):
        # A tree of two branches each, some with a skip.
        sources = ((target - 1) // 2, *([(target - 3) // 4] if target % 5 == 3 else []))
        weights = tuple(0.7 * draw.normal(size=(2, 2)) for _ in sources)
        edges.append(Edge(target, sources, weights, draw.normal(size=2), 2 * np.eye(2)))
    masks = tuple(np.array([i % 7 == 6, i % 3 == 2]) for i in range(count))
    values = tuple(draw.normal(size=2) for _ in range(count))
    case = GraphCase((2,) * count, tuple(edges), masks, values, draw.uniform(0.5, 2.0, count))
    problem = case.problem
    assert len(fronts_of(problem.free_widths, coupled_pairs(problem))) > 5
    check(case)
    state = problem.zeros_state()
    factor = free_energy_hessian(problem, state).cholesky()
    solved = jax.tree.map(jnp.negative, factor.solve(problem.gradient(state)))
    end = problem.activities(solved)
    np.testing.assert_allclose(stacked(end), case.solved(TIMES)[0], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ALL)
def test_more_linear_graphs_are_dense_least_squares(structure):
    for numbers in range(DRAWS):
        check(random_graph(structure, 1000 * structure + numbers))


@pytest.mark.parametrize("structure", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_each_sample_of_a_batch_may_have_its_own_mask(structure):
    case = random_graph(structure, structure, batch=3, differ=True)
    problem = case.problem
    # Those of the first sample are all free, so that the others have units that are none.
    assert any(getattr(value, "padded", False) for value in problem.clamp)
    rest = pcdyn.equilibrium(problem, initial="zeros")
    exact = pcdyn.simulate(problem, t1=9.0, times=TIMES, initial="zeros", integrator="exact")
    stepped = {
        name: pcdyn.simulate(problem, t1=9.0, times=TIMES, initial="zeros", integrator=name)
        for name in ("dopri8", "rodas5p", "Radau")
    }
    scale = 0.0
    for sample in range(3):
        end, course = case.solved(TIMES, sample)
        scale = np.max(np.abs(end))
        np.testing.assert_allclose(stacked(rest.activities)[sample], end, atol=1e-10 * scale)
        np.testing.assert_allclose(stacked(exact.activities)[:, sample], course, atol=1e-10 * scale)
        for run in stepped.values():
            # Tolerances of 1e-6 a step, over tens of steps.
            np.testing.assert_allclose(
                stacked(run.activities)[:, sample], course, atol=1e-4 * scale
            )
    one = pcdyn.linear_equilibrium(problem.sample(1))
    np.testing.assert_allclose(stacked(one), case.solved(TIMES, 1)[0], atol=1e-10 * scale)


@pytest.mark.parametrize(
    "structure", [0, *[pytest.param(i, marks=pytest.mark.slow) for i in (2, 5)]]
)
def test_the_hessian_and_what_follows_from_it(structure):
    case = random_graph(structure, structure)
    problem, (matrix, _) = case.problem, case.whole()
    free = ~np.concatenate(case.masks)
    left = matrix[:, free]
    wanted = left.T @ left
    np.testing.assert_allclose(hessian(problem).dense(), wanted, atol=1e-12 * np.max(wanted))
    root = np.repeat(case.taus, case.widths)[free] ** -0.5
    rates = np.linalg.eigvalsh(root[:, None] * wanted * root)
    np.testing.assert_allclose(spectrum(problem), rates, rtol=1e-9)
    found = pcdyn.stability(problem, at="zeros")
    np.testing.assert_allclose(found.rates, rates, rtol=1e-9)
    given = pcdyn.posterior(problem)
    covariance = np.linalg.inv(wanted)
    np.testing.assert_allclose(given.covariance(), covariance, rtol=1e-8, atol=1e-10)
    ends = np.cumsum(problem.free_widths)
    for end, block in zip(ends, given.covariances, strict=True):
        own = slice(end - len(block), end)
        np.testing.assert_allclose(block, covariance[own, own], rtol=1e-8, atol=1e-10)


def listed_otherwise(problem: InferenceProblem) -> InferenceProblem:
    """The same chain as a graph whose nodes are listed from the output to the input."""
    network, depth = problem.network, problem.network.depth
    names = [f"layer {l}" for l in range(depth + 1)]
    predictions = [
        Prediction(names[l], given=names[l - 1], by=layer, energy=energy)
        for l, (layer, energy) in enumerate(
            zip(network.layers, problem.energy, strict=True), start=1
        )
    ]
    if problem.prior is not None:
        mean, energy = problem.prior.mean, problem.prior.energy
        predictions.append(Prediction(names[0], by=mean, energy=energy))
    ends: dict[str, Any] = {names[0]: problem.input, names[-1]: problem.output}
    graph = Graph({names[l]: network.widths[l] for l in reversed(range(depth + 1))}, predictions)
    made = InferenceProblem(
        graph,
        clamp={name: value for name, value in ends.items() if value is not None},
        time_constants=dict(zip(names, problem.time_constants, strict=True)),
    )
    assert not made.is_chain
    return made


def random_chain(activation: str, seed: int, **options) -> InferenceProblem:
    keys = jax.random.split(jax.random.key(seed), 4)
    net = pcdyn.mlp([3, 4, 3, 2], activation=activation, bias=True, key=keys[0], std=0.9)
    data = {
        "input": jax.random.normal(keys[1], (4, 3)),
        "output": jax.random.normal(keys[2], (4, 2)),
    }
    return InferenceProblem(net, **{**data, **options})


CHAINS = {
    "tanh": {},
    "free output": {"output": None},
    "prior": {"input": None, "prior": pcdyn.Prior(0.3, Gaussian(2.0))},
    "robust": {"energy": [pcdyn.LogCosh(), Gaussian(2.0), pcdyn.Student(3.0)]},
    "precise": {"energy": Gaussian([1.0, 0.5, 30.0]), "time_constants": [1.0, 0.5, 2.0, 1.0]},
}


def test_a_chain_in_another_order_is_the_chain():
    compare_orders(random_chain("tanh", 0), ("tsit5", "rodas5p"))


@pytest.mark.slow
@pytest.mark.parametrize("options", CHAINS.values(), ids=list(CHAINS))
def test_every_chain_in_another_order_is_the_chain(options):
    chain = random_chain("tanh", 1, **options)
    compare_orders(chain, ("tsit5", "rodas5p", "kvaerno5", "LSODA"))


def compare_orders(chain: InferenceProblem, integrators: tuple[str, ...]) -> None:
    graph = listed_otherwise(chain)
    rest, ours = pcdyn.equilibrium(chain), pcdyn.equilibrium(graph)
    for mine, other in zip(reversed(ours.activities), rest.activities, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    rates, others = (pcdyn.stability(p, at="zeros").rates for p in (chain, graph))
    np.testing.assert_allclose(rates, others, rtol=1e-9)
    for name in integrators:
        run, mine = (
            pcdyn.simulate(p, t1=5.0, times=TIMES[:3], integrator=name) for p in (chain, graph)
        )
        for x, other in zip(reversed(mine.activities), run.activities, strict=True):
            np.testing.assert_allclose(x, other, atol=1e-4)


@pytest.mark.slow
def test_where_a_chain_slides_its_graph_slides():
    chain = random_chain("relu", 3)
    rest, ours = pcdyn.equilibrium(chain), pcdyn.equilibrium(listed_otherwise(chain))
    assert "SLIDING" in rest.message
    np.testing.assert_array_equal(ours.status_codes, rest.status_codes)
    for mine, other in zip(reversed(ours.activities), rest.activities, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def as_listed(chain: InferenceProblem) -> InferenceProblem:
    """The same chain as a graph in its own order."""
    network, names = chain.network, ["a", "b", "c", "d"]
    predictions = [
        Prediction(names[l], given=names[l - 1], by=layer)
        for l, layer in enumerate(network.layers, start=1)
    ]
    graph = Graph(dict(zip(names, network.widths, strict=True)), predictions)
    ends: dict[str, Any] = {"a": chain.input, "d": chain.output}
    return InferenceProblem(graph, clamp=ends)


def test_a_chain_written_as_a_graph_has_its_bits():
    chain = random_chain("tanh", 1)
    graph = as_listed(chain)
    for found, ours in (
        (pcdyn.equilibrium(chain), pcdyn.equilibrium(graph)),
        (pcdyn.simulate(chain, t1=3.0), pcdyn.simulate(graph, t1=3.0)),
    ):
        for mine, other in zip(ours.activities, found.activities, strict=True):
            np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(of(ours.activities, "c"), found.activities[2])
    deltas = pcdyn.backpropagation(graph).deltas
    for mine, other in zip(deltas, pcdyn.backpropagation(chain).deltas, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_chain_clamped_inside_falls_apart():
    chain = random_chain("tanh", 2)
    inside = jax.random.normal(jax.random.key(5), (4, 3))
    both = InferenceProblem(
        chain.network, input=chain.input, output=chain.output, clamp={2: inside}
    )
    rest = pcdyn.equilibrium(both)
    lower = InferenceProblem(
        pcdyn.Network(chain.network.layers[:2]), input=chain.input, output=inside
    )
    np.testing.assert_allclose(
        rest.activities[1], pcdyn.equilibrium(lower).activities[1], atol=1e-5
    )
    np.testing.assert_array_equal(rest.activities[2], inside)


def branching(activation: str = "tanh", **options) -> InferenceProblem:
    """A graph with a skip, two inputs, a prior, a second prediction and a target."""
    draw = np.random.default_rng(3)

    def dense(rows: int, *widths: int) -> Dense:
        weights = [draw.normal(size=(rows, n)) / np.sqrt(n) for n in widths]
        return Dense(weights, draw.normal(size=rows), activation)

    graph = Graph(
        {"retina": 3, "sound": 2, "low": 4, "high": 3, "label": 2},
        [
            Prediction("sound", by=0.3, energy=Gaussian(2.0)),
            Prediction("low", given="retina", by=dense(4, 3)),
            Prediction("high", given=("low", "retina", "sound"), by=dense(3, 4, 3, 2)),
            Prediction("label", given=("high", "low"), by=dense(2, 3, 4)),
            Prediction("low", given="high", by=dense(4, 3), energy=Gaussian(0.1)),
        ],
    )
    clamp = {"retina": draw.normal(size=(3, 3)), "label": draw.normal(size=(3, 2))}
    return InferenceProblem(graph, clamp=clamp, **options)


def unrolled(problem: InferenceProblem, nudge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pass of `branching` written out in NumPy, and its loss, with `low` moved by `nudge`."""

    def predict(index: int, *given: np.ndarray) -> np.ndarray:
        by = problem.graph.layers[index]
        z = np.concatenate(given, axis=-1) @ np.asarray(by.weight).T + np.asarray(by.bias)
        return np.tanh(z)

    retina, label = np.asarray(problem.clamp[0]), np.asarray(problem.clamp[4])
    low = predict(1, retina) + nudge
    high = predict(2, low, retina, np.full((3, 2), 0.3))
    output = predict(3, high, low)
    return output, np.sum((label - output) ** 2) / 2


def test_the_feedforward_pass_and_backpropagation_of_a_graph():
    problem = branching()
    passed, bp = pcdyn.feedforward(problem), pcdyn.backpropagation(problem)
    output, loss = unrolled(problem, np.zeros((3, 4)))
    np.testing.assert_allclose(of(passed, "label"), output, rtol=1e-12)
    np.testing.assert_allclose(np.sum(bp.loss), loss, rtol=1e-12)
    start = problem.activities(problem.initial_state())
    np.testing.assert_array_equal(of(start, "label"), problem.clamp[4])
    np.testing.assert_allclose(of(start, "low"), of(passed, "low"), rtol=1e-12)
    for sample, unit in np.ndindex(3, 4):
        step = np.zeros((3, 4))
        step[sample, unit] = 1e-5
        slope = (unrolled(problem, step)[1] - unrolled(problem, -step)[1]) / 2e-5
        np.testing.assert_allclose(bp.deltas[1][sample, unit], -slope, atol=1e-8)
    # What feedback predicts is no part of the pass.
    np.testing.assert_array_equal(bp.deltas[4], 0)


def test_backpropagation_of_a_chain_in_another_order():
    chain = random_chain("tanh", 4)
    wanted, found = (pcdyn.backpropagation(p) for p in (chain, listed_otherwise(chain)))
    for mine, other in zip(found.deltas, wanted.deltas, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-12)
    mine = [layer.weight for layer in found.weight_gradient.layers]
    for gradient, layer in zip(mine, wanted.weight_gradient.layers, strict=True):
        np.testing.assert_allclose(gradient, layer.weight, rtol=1e-10, atol=1e-12)


def free_energy(problem: InferenceProblem, activities: list[np.ndarray]) -> float:
    """F of `branching` in NumPy."""
    graph, total = graph_of(problem), 0.0
    names = graph.nodes
    precisions = [2.0, 1.0, 1.0, 1.0, 0.1]
    for each, precision in zip(graph.predictions, precisions, strict=True):
        here = activities[names.index(each.target)]
        if each.given:
            given = np.concatenate([activities[names.index(n)] for n in each.given], axis=-1)
            mean = np.tanh(given @ np.asarray(each.by.weight).T + np.asarray(each.by.bias))
        else:
            mean = 0.3
        total += precision * np.sum((here - mean) ** 2) / 2
    return total


def test_the_flow_of_a_nonlinear_graph_goes_down_its_free_energy():
    problem = branching()
    state = problem.random_state(jax.random.key(1))
    activities = [np.asarray(x) for x in problem.activities(state)]
    np.testing.assert_allclose(
        np.sum(problem.free_energy(state)), free_energy(problem, activities), rtol=1e-12
    )
    gradient = problem.gradient(state)
    for node, slope in zip(problem.free_layers, gradient, strict=True):
        for place in np.ndindex(slope.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in activities]
                moved[node][place] += sign * 1e-5
                ends.append(free_energy(problem, moved))
            np.testing.assert_allclose(slope[place], (ends[0] - ends[1]) / 2e-5, atol=1e-8)
    rest = pcdyn.equilibrium(problem)
    assert np.max(rest.residual_norms) < 1e-6


LEAVES = {
    "weight": lambda p: p.graph.layers[2].weight,
    "bias": lambda p: p.graph.layers[4].bias,
    "mean": lambda p: p.graph.layers[0].value,
    "precision": lambda p: p.energy[4].precision,
    "data": lambda p: p.clamp[0],
}


@pytest.mark.parametrize(
    "leaf",
    ["weight", "data", *[pytest.param(x, marks=pytest.mark.slow) for x in list(LEAVES)[1:4]]],
)
def test_derivatives_of_an_equilibrium_by_each_leaf(leaf):
    problem, where = branching(), LEAVES[leaf]
    value = where(problem)
    direction = jax.random.normal(jax.random.key(2), value.shape, value.dtype)

    def energy(x: jax.Array) -> jax.Array:
        rest = pcdyn.equilibrium(eqx.tree_at(where, problem, x), tolerance=1e-12)
        return jnp.sum(of(rest.activities, "high") ** 2)

    slope = jnp.sum(jax.grad(energy)(value) * direction)
    step = 1e-4 * direction
    wanted = (energy(value + step) - energy(value - step)) / 2e-4
    np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-8)


def test_files_hold_graphs(tmp_path):
    mask = np.array([[True, False, True], [True, True, True], [False, True, False]])
    problem = branching()
    cued = InferenceProblem(
        graph_of(problem),
        clamp={"retina": Partial(np.asarray(problem.clamp[0]), mask), "label": problem.clamp[4]},
        energy=pcdyn.LogCosh(),
        time_constants={"low": 0.5},
    )
    pcdyn.save(cued, tmp_path / "problem.nc")
    again = pcdyn.load(tmp_path / "problem.nc")
    assert isinstance(again, InferenceProblem)
    assert eqx.tree_equal(again, cued)
    start = {"initial": "zeros"}
    for thing in (pcdyn.simulate(cued, t1=1.0, **start), pcdyn.equilibrium(cued, **start)):
        pcdyn.save(thing, tmp_path / "result.nc")
        found: Any = pcdyn.load(tmp_path / "result.nc")
        for array, other in zip(found.activities, thing.activities, strict=True):
            np.testing.assert_array_equal(array, other)
        np.testing.assert_array_equal(of(found.activities, "low"), of(thing.activities, "low"))
        for array, other in zip(found.prediction_errors, thing.prediction_errors, strict=True):
            np.testing.assert_array_equal(array, other)


class Pool(eqx.Module):
    """Means over windows of two by two pixels."""

    def __call__(self, x: jax.Array) -> jax.Array:
        channels, height, width = x.shape
        return x.reshape(channels, height // 2, 2, width // 2, 2).mean((2, 4))


@pytest.mark.slow
def test_convolutions_are_their_unrolled_matrices():
    keys = jax.random.split(jax.random.key(0), 5)
    conv = eqx.nn.Conv2d(1, 2, 3, padding=1, key=keys[0])
    image = jax.random.normal(keys[1], (2, 1, 6, 6))
    label = jax.random.normal(keys[2], (2, 3))
    last = Dense(jax.random.normal(keys[3], (3, 18)) / 4, activation="tanh")
    shapes = {"image": (1, 6, 6), "features": (2, 6, 6), "pooled": (2, 3, 3), "label": 3}
    flat = {"image": 36, "features": 72, "pooled": 18, "label": 3}

    def matrix_of(function, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        zero = jnp.zeros(shape)
        slope = jax.jacobian(lambda x: function(x.reshape(shape)).ravel())(zero.ravel())
        return slope, function(zero).ravel()

    def problem(sizes, *by) -> InferenceProblem:
        first, second, third = by
        graph = Graph(
            sizes,
            [
                Prediction("features", given="image", by=first),
                Prediction("pooled", given="features", by=second),
                Prediction("label", given="pooled", by=third),
            ],
        )
        size = sizes["image"]
        data = image if isinstance(size, tuple) else image.reshape(2, size)
        return InferenceProblem(graph, clamp={"image": data, "label": label})

    shaped = problem(shapes, conv, Pool(), lambda x: last(x.ravel()))
    unrolled = problem(
        flat,
        Dense(*matrix_of(conv, (1, 6, 6))),
        Dense(*matrix_of(Pool(), (2, 6, 6))),
        last,
    )
    rest, other = pcdyn.equilibrium(shaped), pcdyn.equilibrium(unrolled)
    assert of(rest.activities, "features").shape == (2, 2, 6, 6)
    for mine, theirs in zip(rest.activities, other.activities, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    runs = [pcdyn.simulate(p, t1=2.0) for p in (shaped, unrolled)]
    for mine, theirs in zip(runs[0].final, runs[1].final, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.slow
def test_the_blocks_of_the_guide_run(capsys):
    text = Path("docs/graphs.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/graphs.md", "exec"), names)
    assert "(101, 20)" in capsys.readouterr().out
    np.testing.assert_allclose(names["rest"].activities["sound"].shape, (8,))
    matplotlib.pyplot.close("all")
