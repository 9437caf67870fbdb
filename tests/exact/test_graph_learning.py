"""Learning on graphs, against `jax.grad` of the free energy and of the unrolled graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import pcdyn
from pcdyn import Dense, Gaussian, Graph, InferenceProblem, Partial, Prediction, learning
from pcdyn.equilibria.solvers.error_coordinates import error_coordinates, has_error_coordinates
from pcdyn.errors import GraphError, InputError, PcdynError, ShapeError
from pcdyn.learning.rules.backpropagation import ways_to_clamped

SAMPLES = 12


def draws(seed: int) -> Any:
    """Matrices of a fitting size, from one generator."""
    keys = iter(jr.split(jr.key(seed), 100))
    return lambda *shape: jr.normal(next(keys), shape) / shape[-1] ** 0.5


def with_skips(seed: int = 0, activation: str = "tanh") -> Graph:
    """Two inputs, two hidden nodes in the wrong order, two outputs, skips, a bias."""
    draw = draws(seed)
    return Graph(
        {"a": 5, "b": 3, "high": 6, "low": 7, "out": 3, "more": 4},
        [
            Prediction("high", given=("low", "b"), energy=Gaussian(2.0),
                       by=Dense([draw(6, 7), draw(6, 3)], draw(6), activation=activation)),
            Prediction("low", given="a", by=Dense(draw(7, 5), activation=activation)),
            Prediction("out", given=("high", "a"), energy=Gaussian(np.array([1.0, 2.0, 3.0])),
                       by=Dense([draw(3, 6), draw(3, 5)], activation=activation)),
            Prediction("more", given=("low", "high"), by=Dense([draw(4, 7), draw(4, 6)])),
        ],
    )  # fmt: skip


def data(seed: int = 1, samples: int = SAMPLES) -> tuple[dict[str, Any], dict[str, Any]]:
    draw = draws(seed)
    inputs = {"a": 2 * draw(samples, 5), "b": draw(samples, 3)}
    return inputs, {"out": 2 * draw(samples, 3), "more": draw(samples, 4)}


def problem_of(graph: Graph, **options: Any) -> InferenceProblem:
    inputs, targets = data()
    return InferenceProblem(graph, clamp={**inputs, **targets}, **options)


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))]


def same(found: Any, expected: Any, rtol: float) -> None:
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1e-300, np.abs(b).max()))


def differ(found: Any, expected: Any) -> float:
    """The largest difference of two trees in terms of the second."""
    each = zip(arrays(found), arrays(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in each)


# --- Error coordinates ----------------------------------------------------------------------------


def test_errors_determine_activities_and_free_energy() -> None:
    problem = problem_of(with_skips())
    state = tuple(jr.normal(jr.key(n), (SAMPLES, n)) for n in problem.free_widths)
    coordinates = error_coordinates(problem)
    errors = coordinates.errors(state)
    hidden, output_error = coordinates.activities(errors)
    same(coordinates.unstack(hidden), state, 1e-13)
    same(coordinates.free_energy(errors, output_error), problem.free_energy(state), 1e-13)
    of_state = problem.prediction_errors(problem.activities(state))
    same(jnp.concatenate(of_state[2:], axis=-1), output_error, 1e-13)
    # ∂F/∂e by its definition.
    slope = jax.grad(lambda e: jnp.sum(coordinates.free_energy(e, coordinates.activities(e)[1])))
    same(coordinates.evaluate(errors).slope, slope(errors), 1e-12)
    # ∂F/∂x, which the residual is of.
    norms = [np.linalg.norm(np.asarray(g), axis=-1) for g in problem.gradient(state)]
    same(coordinates.evaluate(errors).residual, np.max(norms, axis=0), 1e-12)
    few = coordinates.take(slice(3))
    same(few.activities(tuple(e[:, :3] for e in errors))[1], output_error[:3], 1e-13)


@pytest.mark.parametrize("method", [None, "gauss_newton", "nesterov"])
def test_solvers_in_error_coordinates_find_the_equilibrium(method: Any) -> None:
    problem = problem_of(with_skips())
    found = pcdyn.equilibrium(problem, method=method, tolerance=1e-10)
    other = pcdyn.equilibrium(problem, method="flow", tolerance=1e-10)
    # F has no curvature below that of the smallest precision in error coordinates, 1.
    for a, b in zip(found.activities, other.activities, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


def test_only_graphs_whose_errors_are_coordinates_have_them() -> None:
    graph = with_skips()
    inputs, targets = data()
    assert has_error_coordinates(problem_of(graph))
    assert not has_error_coordinates(InferenceProblem(graph, clamp=inputs))
    half = Partial(np.asarray(targets["out"]), [True, False, True])
    partial = InferenceProblem(graph, clamp={**inputs, "out": half})
    assert not has_error_coordinates(partial)
    twice = Graph(
        {"a": 2, "b": 2, "c": 2},
        [Prediction("b", given="a", by=Dense(np.eye(2))),
         Prediction("b", given="c", by=Dense(np.eye(2))),
         Prediction("c", given="b", by=Dense(np.eye(2)))],
    )  # fmt: skip
    problem = InferenceProblem(twice, clamp={"a": [1.0, 2.0], "c": [0.0, 1.0]})
    assert not has_error_coordinates(problem)
    with pytest.raises(GraphError, match="predicted once"):
        pcdyn.equilibrium(problem, method="conjugate_gradients")


# --- Rules ----------------------------------------------------------------------------------------


def gradient_of(rule: learning.Rule, problem: InferenceProblem) -> Any:
    """What a rule makes of a batch, as a graph without energies, and where inference ended."""
    rule.check(problem)
    found, _ = rule.learn(problem, rule.init(problem.graph, jr.key(0)))
    return found


def slope_at(problem: InferenceProblem, state: Any) -> Any:
    """∂F/∂(weights) at a state, by automatic differentiation of F."""
    state = tuple(map(jnp.asarray, state))

    def total(graph: Any) -> Any:
        moved = eqx.tree_at(lambda p: p.graph, problem, graph)
        return jnp.sum(moved.free_energy(state))

    return eqx.filter_grad(total)(problem.graph)


@pytest.mark.parametrize("method", [None, "gauss_newton"])
def test_predictive_coding_is_the_slope_of_the_free_energy_at_rest(method: Any) -> None:
    problem = problem_of(with_skips())
    found = gradient_of(learning.PredictiveCoding(method, tolerance=1e-11), problem)
    rest = pcdyn.equilibrium(problem, tolerance=1e-11)
    same(found.gradient, slope_at(problem, rest.state), 1e-8)
    assert np.max(found.residual) < 1e-9


def test_the_default_method_is_as_near_as_it_says() -> None:
    """In a linear graph F has no curvature below Π, so that its residual is a bound."""
    problem = problem_of(with_skips(activation="identity"))
    rule = learning.PredictiveCoding()
    found = gradient_of(rule, problem)
    assert np.median(found.residual) <= rule.method.tolerance
    coordinates = error_coordinates(problem)
    mine = coordinates.errors(problem.state_of(found.activities))
    rest = coordinates.errors(problem.state_of(pcdyn.linear_equilibrium(problem)))
    precisions = (2.0, 1.0)

    def size(errors: Any) -> Any:
        each = zip(precisions, errors, strict=True)
        return np.sqrt(sum(p * np.sum(np.asarray(e[0]) ** 2, axis=-1) for p, e in each))

    missing = size([x - y for x, y in zip(mine, rest, strict=True)])
    assert np.all(missing <= np.asarray(found.residual) * size(mine) * (1 + 1e-9) + 1e-12)


def test_euler_steps_are_those_of_the_flow() -> None:
    problem = problem_of(with_skips())
    found = gradient_of(learning.EulerPredictiveCoding(0.05, 7), problem)
    state = problem.feedforward_state()
    for _ in range(7):
        slope = problem.gradient(state)
        state = tuple(x - 0.05 * g for x, g in zip(state, slope, strict=True))
    same(found.activities, problem.activities(state), 1e-13)
    same(found.gradient, slope_at(problem, state), 1e-12)


def test_incremental_learning_tends_to_the_mean_slope() -> None:
    problem = problem_of(with_skips())
    found = gradient_of(learning.IncrementalPredictiveCoding(0.05, 5, ratio=1e-8), problem)
    state, slopes = problem.feedforward_state(), []
    for _ in range(5):
        slopes.append(arrays(slope_at(problem, state)))
        slope = problem.gradient(state)
        state = tuple(x - 0.05 * g for x, g in zip(state, slope, strict=True))
    same(found.gradient, [np.mean(each, axis=0) for each in zip(*slopes, strict=True)], 1e-5)


def test_low_output_precision_tends_to_backpropagation_in_proportion() -> None:
    problem = problem_of(with_skips())
    expected = pcdyn.backpropagation(problem).weight_gradient
    far = [
        differ(
            gradient_of(learning.LowPrecisionPredictiveCoding(p, "gauss_newton"), problem).gradient,
            expected,
        )
        for p in (1e-3, 1e-4)
    ]
    assert far[0] < 0.1
    np.testing.assert_allclose(far[0] / far[1], 10, rtol=0.05)


def test_activities_and_weights_as_one_flow() -> None:
    problem = problem_of(with_skips())
    flow = learning.JointFlow(problem, 0.1)
    run = pcdyn.simulate(flow, t1=0.5, integrator=pcdyn.Euler(dt=0.05))
    state, graph = problem.feedforward_state(), problem.graph
    for _ in range(10):
        now = eqx.tree_at(lambda p: p.graph, problem, graph)
        slopes, gradient = slope_at(now, state), now.gradient(state)
        state = tuple(x - 0.05 * g for x, g in zip(state, gradient, strict=True))
        graph = eqx.apply_updates(graph, jax.tree.map(lambda g: -0.1 * 0.05 * g, slopes))
    same(run.final, problem.activities(state), 1e-12)
    same([x[-1] for x in arrays(run.moving["network"])], graph, 1e-12)
    np.testing.assert_allclose(run.output_loss, np.asarray(run.energies)[..., 2:].sum(-1))


@pytest.mark.slow
def test_weights_with_inference_at_rest_go_down_the_free_energy_at_rest() -> None:
    graph, targets = cyclic()
    flow = learning.AdiabaticFlow(InferenceProblem(graph, clamp=targets))
    run = pcdyn.simulate(flow, t1=0.05, times=[0.0, 0.025, 0.05])
    energies = np.asarray(run.free_energy).sum(-1)
    assert np.all(np.diff(energies) < 0)
    first = [x[0] for x in arrays(run.moving["network"])]
    # The mean of the prior is no weight.
    np.testing.assert_array_equal(first[2].shape, (6, 4))


# --- Backpropagation by predictive coding (A.2) ---------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_fixed_predictions_are_backpropagation_in_any_acyclic_graph(seed: int) -> None:
    """Also with hidden precisions, which the errors of the equilibrium make up for."""
    problem = problem_of(with_skips(seed))
    rule = learning.FixedPrediction(dt=0.4, steps=200)
    expected = pcdyn.backpropagation(problem).weight_gradient
    same(gradient_of(rule, problem).gradient, expected, 1e-11)


def identity(width: int) -> Dense:
    return Dense(jnp.eye(width))


def diamond(*, padded: bool) -> InferenceProblem:
    """A skip past one node, with or without an identity node in it."""
    draw = draws(3)
    nodes = {"a": 3, "low": 4, "high": 5, "out": 2}
    around = "low"
    predictions = [
        Prediction("low", given="a", by=Dense(draw(4, 3), activation="tanh")),
        Prediction("high", given="low", by=Dense(draw(5, 4), activation="tanh")),
    ]
    if padded:
        nodes["copy"], around = 4, "copy"
        predictions.append(Prediction("copy", given="low", by=identity(4)))
    by = Dense([draw(2, 5), draw(2, 4)], activation="tanh")
    predictions.append(Prediction("out", given=("high", around), by=by))
    clamp = {"a": draw(SAMPLES, 3), "out": draw(SAMPLES, 2)}
    return InferenceProblem(Graph(nodes, predictions), clamp=clamp)


def test_well_timed_steps_are_backpropagation_where_all_ways_are_of_one_length() -> None:
    problem = diamond(padded=True)
    nodes = problem.graph.nodes
    assert nodes is not None
    lengths = {nodes[node]: ways for node, ways in ways_to_clamped(problem).items()}
    assert lengths == {"low": {2}, "high": {1}, "copy": {1}}
    expected = pcdyn.backpropagation(problem).weight_gradient
    same(gradient_of(learning.ZeroDivergence(), problem).gradient, expected, 1e-12)


def test_with_a_skip_well_timed_steps_are_not_backpropagation() -> None:
    """A.2 claims any graph: what is there to see without the check."""
    problem, rule = diamond(padded=False), learning.ZeroDivergence()
    with pytest.raises(GraphError, match=r"those from 'low' have \[1, 2\] predictions"):
        rule.check(problem)
    found, _ = rule.learn(problem, ())
    expected = pcdyn.backpropagation(problem).weight_gradient
    assert differ(found.gradient, expected) > 0.05
    # Of what is nearest to the output it is.
    same(found.gradient.layers[2], expected.layers[2], 1e-12)


# --- Training -------------------------------------------------------------------------------------


def trained(network: Any, inputs: Any, targets: Any, **options: Any) -> learning.Training:
    given = {
        "rule": learning.PredictiveCoding(), "optimiser": optax.sgd(0.02), "epochs": 3,
        "batch_size": 4, "key": jr.key(2), **options,
    }  # fmt: skip
    return learning.train(network, inputs, targets, **given)


def test_one_step_is_the_gradient_of_the_rule() -> None:
    graph, (inputs, targets) = with_skips(), data()
    found = trained(
        graph, inputs, targets, rule=learning.Backpropagation(), optimiser=optax.sgd(0.1),
        epochs=1, batch_size=SAMPLES, compare=True,
        evaluate=learning.Evaluation(inputs, targets),
    )  # fmt: skip
    back = pcdyn.backpropagation(problem_of(graph))
    slopes = eqx.filter(back.weight_gradient, eqx.is_inexact_array)
    moved = arrays([p.by for p in graph.predictions])
    expected = [
        w - 0.1 * g / SAMPLES
        for w, g in zip(moved, arrays([p.by for p in slopes.predictions]), strict=True)
    ]
    same([p.by for p in found.network.predictions], expected, 1e-12)
    same([p.energy for p in found.network.predictions], [p.energy for p in graph.predictions], 0)
    np.testing.assert_allclose(found.history["loss"][0, 0], np.mean(back.loss), rtol=1e-13)
    np.testing.assert_allclose(found.evaluations["loss"][0], np.mean(back.loss), rtol=1e-13)
    np.testing.assert_allclose(found.history["cosine"], 1, rtol=1e-12)
    # Of two targets there is no one accuracy.
    assert "accuracy" not in found.history and "accuracy" not in found.evaluations
    assert found.to_xarray().sizes["layer"] == 4


def test_a_chain_written_as_a_graph_learns_the_same_bits() -> None:
    chain = pcdyn.mlp([5, 6, 3], activation="tanh", key=jr.key(0))
    names = ("in", "mid", "out")
    graph = Graph(
        {"in": 5, "mid": 6, "out": 3},
        [
            Prediction(names[l + 1], given=names[l], by=layer)
            for l, layer in enumerate(chain.layers)
        ],
    )
    images, labels = np.asarray(data()[0]["a"]), np.arange(SAMPLES) % 3
    one = trained(chain, images, labels, evaluate=learning.Evaluation(images, np.eye(3)[labels]))
    other = trained(
        graph, {"in": images}, {"out": labels},
        evaluate=learning.Evaluation({"in": images}, {"out": np.eye(3)[labels]}),
    )  # fmt: skip
    same(other.network, one.network, 0)
    same(other.history, one.history, 0)
    same(other.evaluations, one.evaluations, 0)
    assert isinstance(other.network, Graph) and "accuracy" in other.history


def test_several_graphs_learn_each_as_alone() -> None:
    keys = jr.split(jr.key(4), 2)

    def drawn(key: Any) -> Graph:
        graph = with_skips()
        first = graph.predictions[0].by
        weight = first.weight + 0.1 * jr.normal(key, first.weight.shape)
        return eqx.tree_at(lambda g: g.predictions[0].by.weight, graph, weight)

    inputs, targets = data()
    together = trained(eqx.filter_vmap(drawn)(keys), inputs, targets, key=keys)
    for index, key in enumerate(keys):
        alone = trained(drawn(key), inputs, targets, key=key)
        same(jax.tree.map(lambda x, i=index: x[i], arrays(together.network)), alone.network, 1e-10)
        np.testing.assert_allclose(
            together.history["loss"][index], alone.history["loss"], rtol=1e-10
        )


def cyclic() -> tuple[Graph, dict[str, Any]]:
    """A hidden layer that predicts itself and the data, with a prior, clamped at one end."""
    draw = draws(5)
    graph = Graph(
        {"seen": 6, "hidden": 4},
        [
            Prediction("hidden", given="hidden", by=Dense(0.5 * draw(4, 4), activation="tanh")),
            Prediction("hidden", by=0.5),
            Prediction("seen", given="hidden", by=Dense(draw(6, 4))),
        ],
    )
    return graph, {"seen": draw(SAMPLES, 6)}


def test_a_graph_with_a_cycle_learns_without_supervision() -> None:
    graph, targets = cyclic()
    found = trained(
        graph, None, targets, rule=learning.PredictiveCoding(method=None),
        optimiser=optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1)), epochs=20,
    )  # fmt: skip
    energy = found.history["free_energy"].mean(-1)
    assert energy[-1] < 0.8 * energy[0]
    # No pass of which there could be a loss: that after inference stands for it.
    same(found.history["loss"], found.history["output_loss"], 0)
    # The mean of a prior is no weight, and does not decay.
    np.testing.assert_array_equal(np.asarray(found.network.predictions[1].by.value), 0.5)
    with pytest.raises(GraphError, match="predicted once"):
        trained(graph, None, targets)


def test_what_is_missing_in_a_batch_is_inferred() -> None:
    graph, targets = cyclic()
    mask = np.asarray(jr.bernoulli(jr.key(0), 0.7, (SAMPLES, 6))).copy()
    mask[0] = [True, True, False, False, True, False]
    seen = Partial(np.where(mask, targets["seen"], np.nan), mask)
    rule = learning.PredictiveCoding(method=None, tolerance=1e-10)
    found = trained(
        graph, None, {"seen": seen}, rule=rule, optimiser=optax.sgd(0.1), epochs=1,
        batch_size=SAMPLES,
    )  # fmt: skip
    problem = InferenceProblem(graph, clamp={"seen": seen})
    rest = pcdyn.equilibrium(problem, initial="zeros", tolerance=1e-10)
    slope = slope_at(problem, rest.state)
    for place in (0, 2):
        before, after = graph.predictions[place].by, found.network.predictions[place].by
        moved = (np.asarray(before.weight) - np.asarray(after.weight)) * SAMPLES / 0.1
        np.testing.assert_allclose(moved, slope.predictions[place].by.weight, atol=1e-7)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    graph, (inputs, targets) = with_skips(), data()
    options = {"rule": learning.EulerPredictiveCoding(0.1, 5)}
    whole = trained(graph, inputs, targets, **options)
    path = tmp_path / "training.npz"
    trained(graph, inputs, targets, epochs=2, checkpoint=path, **options)
    resumed = trained(graph, inputs, targets, checkpoint=path, **options)
    same(resumed.network, whole.network, 0)
    same(resumed.history, whole.history, 0)
    other = eqx.tree_at(lambda g: g.predictions[3].by.weight, graph, replace_fn=lambda w: 2 * w)
    with pytest.raises(pcdyn.errors.CheckpointError):
        trained(other, inputs, targets, checkpoint=path, **options)


IN, OUT = data()
BAD: dict[str, tuple[dict[str, Any], type[PcdynError], str]] = {
    "an array for a graph": ({"inputs": IN["a"]}, InputError, "dictionary"),
    "no targets": ({"targets": {}}, InputError, "targets are empty"),
    "an unknown node": ({"inputs": {"c": IN["a"]}}, GraphError, "'c'"),
    "a node twice": ({"targets": {**OUT, "a": IN["a"]}}, InputError, "'a'"),
    "one sample": (
        {"inputs": {n: x[0] for n, x in IN.items()}, "targets": {n: x[0] for n, x in OUT.items()}},
        ShapeError, "one sample",
    ),
    "other numbers of samples": (
        {"inputs": {**IN, "a": IN["a"][1:]}}, ShapeError, "same batch size"),
    "a label that is none": (
        {"targets": {**OUT, "out": np.full(SAMPLES, 3)}}, InputError, "label 3"),
    "a prior": ({"prior": pcdyn.Prior()}, InputError, "among its predictions"),
    "target propagation": (
        {"rule": learning.TargetPropagation()}, GraphError, "chain"),
    "learned inverses": (
        {"rule": learning.LearnedTargetPropagation()}, GraphError, "chain"),
    "a hidden precision under Z-IL": (
        {"rule": learning.ZeroDivergence()}, InputError, "unit precision"),
    "backpropagation of nothing": (
        {"inputs": {}, "targets": IN, "rule": learning.Backpropagation()}, GraphError, "target"),
    "fixed predictions of nothing": (
        {"inputs": {}, "targets": IN, "rule": learning.FixedPrediction()}, GraphError, "target"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name: str) -> None:
    changed, kind, words = BAD[name]
    given = {"inputs": IN, "targets": OUT, **changed}
    with pytest.raises(kind, match=words):
        trained(with_skips(), **given)


def test_weights_that_are_hidden_in_functions_are_refused() -> None:
    weight = jnp.eye(3)
    hidden = Graph(
        {"a": 3, "b": 3, "c": 3},
        [Prediction("b", given="a", by=lambda x: weight @ x),
         Prediction("c", given="b", by=lambda x: weight @ x)],
    )  # fmt: skip
    values = np.ones((4, 3))
    with pytest.raises(InputError, match="no weights to learn"):
        trained(hidden, {"a": values}, {"c": values})


def test_data_by_node_are_for_graphs() -> None:
    chain = pcdyn.mlp([5, 3], activation="tanh", key=jr.key(0))
    with pytest.raises(InputError, match=r"for a pcdyn\.Graph"):
        trained(chain, {"0": IN["a"]}, OUT["out"])


def test_stacks_have_one_energy() -> None:
    def drawn(precision: Any) -> Graph:
        graph = with_skips()
        energy = Gaussian(precision)
        return eqx.tree_at(lambda g: g.predictions[0].energy, graph, energy)

    keys = jr.split(jr.key(0), 2)
    with pytest.raises(InputError, match="differ in the energies"):
        trained(eqx.filter_vmap(drawn)(jnp.array([1.0, 2.0])), IN, OUT, key=keys)


def test_the_output_loss_is_that_of_all_that_is_clamped(tmp_path: Path) -> None:
    problem = problem_of(with_skips())
    rest = pcdyn.equilibrium(problem)
    run = pcdyn.simulate(problem, t1=1.0)
    run.to_netcdf(tmp_path / "run.nc")
    for found in (rest, run, pcdyn.load(tmp_path / "run.nc")):
        energies = np.asarray(found.energies)
        np.testing.assert_allclose(found.output_loss, energies[..., 2:].sum(-1))
        np.testing.assert_allclose(found.residual_energy, energies[..., :2].sum(-1))
    state = problem.feedforward_state()
    same(problem.output_loss(state), pcdyn.backpropagation(problem).loss, 1e-12)
    np.testing.assert_allclose(problem.residual_energy(state), 0, atol=1e-20)
