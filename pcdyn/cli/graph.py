"""From the table of a graph to an inference problem."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from pcdyn._support.arrays import check_size
from pcdyn._support.checks import checked_number, naming
from pcdyn._support.types import Numbers
from pcdyn.cli.arrays import load_array, sample_shape
from pcdyn.cli.energies import as_numbers, energy_of
from pcdyn.cli.tables import OF_PREDICTIONS, Settings
from pcdyn.model.clamps import Partial, clamped
from pcdyn.model.graph import Graph, Prediction, checked_shape
from pcdyn.model.named import Shape, index_of
from pcdyn.model.network import Dense
from pcdyn.model.problem import InferenceProblem


def graph_problem(settings: Settings, key: PRNGKeyArray) -> InferenceProblem:
    """Build the problem that the table of a graph describes.

    Of three keys split from `key` the first is for weights, the second for biases and the third for
    random data; `jax.random.fold_in` makes of it that of each prediction or node, counted from 0.
    Raises `InputError` and its kinds for what does not fit, each naming what and where.
    """
    shapes = {name: checked_shape(size, name) for name, size in settings["nodes"].items()}
    shared = {name: settings[name] for name in OF_PREDICTIONS if name in settings}
    for_weights, for_biases, for_data = jr.split(key, 3)
    predictions = []
    for index, table in enumerate(settings["predictions"]):
        with naming(f"prediction {index + 1}, of {table['target']!r}"):
            keys = (jr.fold_in(for_weights, index), jr.fold_in(for_biases, index))
            predictions.append(_prediction(shared | table, shapes, *keys))
    graph = Graph(shapes, predictions)
    return InferenceProblem(graph, clamp=_clamp(settings, graph, for_data))


def _prediction(
    table: Settings, shapes: dict[str, Shape], for_weight: PRNGKeyArray, for_bias: PRNGKeyArray
) -> Prediction:
    precision = as_numbers(table["precision"]) if "precision" in table else None
    energy = energy_of(table.get("energy", "gaussian"), precision)
    target, nodes = table["target"], tuple(shapes)
    if "mean" in table:
        index_of(target, nodes)
        return Prediction(target, by=table["mean"], energy=energy)
    given = [table["given"]] if isinstance(table["given"], str) else table["given"]
    sizes = [math.prod(shapes[nodes[index_of(name, nodes)]]) for name in (target, *given)]
    rows, columns = sizes[0], sum(sizes[1:])
    check_size(jnp.zeros(()).dtype.itemsize * rows * columns, f"a weight of {rows} × {columns}")
    std = checked_number(table.get("weight_std", columns**-0.5), "weight_std", at_least=0)
    weight, bias = std * jr.normal(for_weight, (rows, columns)), None
    if "bias" in table:
        std = checked_number(table["bias"], "the standard deviation of biases", at_least=0)
        bias = std * jr.normal(for_bias, (rows,))
    by = Dense(weight, bias, table.get("activation", "tanh"))
    return Prediction(target, given=given, by=by, energy=energy)


def _clamp(settings: Settings, graph: Graph, key: PRNGKeyArray) -> dict[str, Numbers | Partial]:
    """Data from files and lists, and random ones of as many samples."""
    found: dict[str, Numbers | Partial] = {}
    random, given = [], []
    for name, source in settings["clamp"].items():
        node = index_of(name, graph.nodes)
        if source == "random":
            random.append(node)
        elif source != "free":
            with naming(f"clamp of {name!r}"):
                found[name] = _data(source, name)
            rows = clamped(found[name], f"clamp of {name!r}", graph.shapes[node], graph.dtype)
            given.append(jax.tree.leaves(rows)[0].shape[:-1])
    one = graph.dtype.itemsize * sum(graph.widths)
    shape = sample_shape(settings.get("batch"), given, bytes_each=one)
    for node in random:
        size = (*shape, *graph.shapes[node])
        found[graph.nodes[node]] = jr.normal(jr.fold_in(key, node), size, graph.dtype)
    return found


def _data(source: str | list[object] | Settings, name: str) -> Numbers | Partial:
    if isinstance(source, dict):
        values, mask = (_array(source[part], part) for part in ("values", "mask"))
        return Partial(values, mask)
    return _array(source, name)


def _array(source: str | list[object], name: str) -> Numbers:
    return load_array(source, name, Path()) if isinstance(source, str) else source
