"""Summaries for people and records for programs."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pcdyn.model.graph import Constant, Graph
from pcdyn.model.network import Dense
from pcdyn.model.problem import InferenceProblem


def describe(problem: InferenceProblem) -> str:
    """Describe network, samples and dtype of a problem in one line."""
    graph = problem.graph
    shape = problem.batch_shape
    samples = f"{shape[0]} samples" if shape else "one sample"
    config: Any = jax.config
    x64 = "float64 is on" if config.jax_enable_x64 else "float64 is off"
    names = [_name_of(layer) for layer in graph.layers]
    if isinstance(graph, Graph):
        sizes = ["×".join(map(str, shape)) for shape in graph.shapes]
        nodes = ", ".join(map(" ".join, zip(graph.nodes, sizes, strict=True)))
        what = f"graph of {nodes}, {', '.join(f'{n} {name}' for name, n in Counter(names).items())}"
    else:
        activations = names[0] if len(set(names)) == 1 else "-".join(names)
        residual = "residual " if any(_has_skip(layer) for layer in graph.layers) else ""
        what = f"{'-'.join(map(str, graph.widths))} {residual}network, {activations}"
    return f"{what}, {samples}, {problem.dtype} ({x64})"


def describe_record(problem: InferenceProblem) -> dict[str, Any]:
    """Describe a problem for `--json`, as `describe` does in words."""
    graph = problem.graph
    record: dict[str, Any] = {
        "widths": graph.widths,
        "activations": [_name_of(layer) for layer in graph.layers],
        "skips": [_has_skip(layer) for layer in graph.layers],
        "samples": problem.batch_shape[0] if problem.batch_shape else None,
        "free_layers": problem.free_layers,
        "dtype": str(problem.dtype),
    }
    if isinstance(graph, Graph):
        record["nodes"] = dict(zip(graph.nodes, graph.shapes, strict=True))
        record["predictions"] = [
            {"target": each.target, "given": each.given} for each in graph.predictions
        ]
    return record


def _name_of(layer: object) -> str:
    """The activation of a layer, or what it is where it has none."""
    if isinstance(layer, Constant):
        return "prior"
    return layer.activation.name if isinstance(layer, Dense) else type(layer).__name__


def _has_skip(layer: object) -> bool:
    return isinstance(layer, Dense) and layer.skip


def lines(rows: Sequence[tuple[str, str]]) -> str:
    """Align names and texts in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def counts(statuses: enum.IntEnum | tuple[enum.IntEnum, ...]) -> dict[str, int]:
    """Count the samples of each status."""
    each = statuses if isinstance(statuses, tuple) else (statuses,)
    return {status.name: each.count(status) for status in dict.fromkeys(each)}


def as_json(value: object) -> object:
    """Convert to plain Python types that JSON knows; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return as_json(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
