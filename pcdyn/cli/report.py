"""Summaries for people and records for programs."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pcdyn.model.problem import InferenceProblem


def describe(problem: InferenceProblem) -> str:
    """Describe network, samples and dtype of a problem in one line."""
    network = problem.network
    names = [layer.activation.name for layer in network.layers]
    activations = names[0] if len(set(names)) == 1 else "-".join(names)
    widths = "-".join(map(str, network.widths))
    shape = problem.batch_shape
    samples = f"{shape[0]} samples" if shape else "one sample"
    residual = "residual " if any(layer.skip for layer in network.layers) else ""
    config: Any = jax.config
    x64 = "float64 is on" if config.jax_enable_x64 else "float64 is off"
    return f"{widths} {residual}network, {activations}, {samples}, {problem.dtype} ({x64})"


def describe_record(problem: InferenceProblem) -> dict[str, Any]:
    """Describe a problem for `--json`, as `describe` does in words."""
    return {
        "widths": problem.network.widths,
        "activations": [layer.activation.name for layer in problem.network.layers],
        "skips": [layer.skip for layer in problem.network.layers],
        "samples": problem.batch_shape[0] if problem.batch_shape else None,
        "free_layers": problem.free_layers,
        "dtype": str(problem.dtype),
    }


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
