"""What an integration cost: one value from the integrator to the result, its file and its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np

from pcdyn._support.types import Scalar

_Default = TypeVar("_Default")


def _measured(default: _Default, long_name: str, units: str) -> _Default:
    # Like `dataclasses.field` it has the type of what it stands for.
    return eqx.field(default=default, metadata={"long_name": long_name, "units": units})


class Statistics(eqx.Module):
    """Counts and seconds of an integration, one for all samples or one per sample.

    Evaluations are those of the solver, of its step choice and of its stopping test. A count is
    `None` where the method does not report it. Seconds are wall time.
    """

    vector_field_evaluations: Scalar | None = _measured(
        None, "evaluations of the vector field", "1"
    )
    jacobian_evaluations: Scalar | None = _measured(None, "evaluations of its Jacobian", "1")
    accepted_steps: Scalar | None = _measured(None, "accepted steps", "1")
    rejected_steps: Scalar | None = _measured(None, "rejected steps", "1")
    compile_seconds: Scalar = _measured(0.0, "wall time of compilation", "s")
    run_seconds: Scalar = _measured(0.0, "wall time of the run", "s")

    def total(self) -> Statistics:
        """Sum over samples; `None` stays."""
        return jax.tree.map(np.sum, self)

    def mean(self) -> Statistics:
        """Take the means over samples, as numbers; NaN where a count is not reported."""
        known = jax.tree.map(lambda x: float(np.mean(x)), self)
        return _map_counts(lambda x: float("nan") if x is None else x, known)

    def replaced(self, samples: np.ndarray, others: Statistics, count: int) -> Statistics:
        """Return the same of `count` samples, of which some have the statistics of others."""

        def merged(mine: Scalar | None, theirs: Scalar | None) -> np.ndarray | None:
            if mine is None or theirs is None:
                return None
            values = np.array(np.broadcast_to(mine, (count,)))
            values[samples] = theirs
            return values

        return _map_counts(merged, self, others)


def stacked(each: list[Statistics]) -> Statistics:
    """Stack the statistics of several samples; a count that one does not report is `None`."""
    return _map_counts(lambda *x: None if any(v is None for v in x) else np.stack(x), *each)


def summed(each: list[Statistics]) -> Statistics:
    """Sum what runs one after the other cost; a count that one does not report is `None`."""
    return _map_counts(lambda *x: None if any(v is None for v in x) else sum(x), *each)


def _map_counts(function: Callable[..., object], *statistics: Statistics) -> Statistics:
    return jax.tree.map(function, *statistics, is_leaf=lambda x: x is None)


MEASURES = {field.name: field.metadata for field in dataclasses.fields(Statistics)}
"""The names of the statistics, and for each its `long_name` and its `units`."""

COUNTS = tuple(name for name, measure in MEASURES.items() if measure["units"] == "1")


class WithStatistics:
    """What holds `statistics`, and lets them be read as its own attributes."""

    statistics: Statistics

    @property
    def vector_field_evaluations(self) -> Scalar | None:
        """Number of evaluations of the vector field."""
        return self.statistics.vector_field_evaluations

    @property
    def jacobian_evaluations(self) -> Scalar | None:
        """Number of evaluations of its Jacobian."""
        return self.statistics.jacobian_evaluations

    @property
    def accepted_steps(self) -> Scalar | None:
        """Number of accepted steps."""
        return self.statistics.accepted_steps

    @property
    def rejected_steps(self) -> Scalar | None:
        """Number of rejected steps."""
        return self.statistics.rejected_steps

    @property
    def compile_seconds(self) -> Scalar:
        """Wall time of compilation."""
        return self.statistics.compile_seconds

    @property
    def run_seconds(self) -> Scalar:
        """Wall time of the run."""
        return self.statistics.run_seconds
