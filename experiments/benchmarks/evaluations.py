"""The part of the benchmark that counts vector-field evaluations for the same error."""

from __future__ import annotations

from collections.abc import Iterator

import jax.random as jr
import numpy as np

import pcdyn
from experiments.shared.timing import row
from pcdyn.theory import Evidence

TARGET = 1e-6


def relative_error(trajectory: pcdyn.Trajectory, reference: pcdyn.Trajectory) -> float:
    """Largest distance to the reference over time, relative to the inference displacement."""
    moved = reference.distance_to(tuple(x[0] for x in reference.activities))
    return float(np.max(trajectory.distance_to(reference)) / np.max(moved))


def evaluations_for(problem: pcdyn.InferenceProblem, name: str) -> tuple[int, float]:
    """Evaluations and error of the cheapest run of `name` that meets the target error."""
    times = [0.0, 1.0, 2.0, 4.0]
    reference = pcdyn.simulate(
        problem, t1=4.0, times=times, integrator=pcdyn.SciPy("DOP853", rtol=1e-12, atol=1e-13)
    )
    for exponent in range(2, 44):
        if name == "tsit5":
            integrator = pcdyn.Diffrax("tsit5", rtol=10 ** (-exponent / 4), atol=1e-13)
        else:
            integrator = pcdyn.Euler(dt=2.0 ** (-exponent))
        run = pcdyn.simulate(problem, t1=4.0, times=times, integrator=integrator, throw=False)
        if run.ok and (error := relative_error(run, reference)) <= TARGET:
            evaluations = run.vector_field_evaluations
            assert evaluations is not None, "counted by explicit methods"
            return int(evaluations), error
    raise RuntimeError(f"{name} never met the target")


def rows() -> Iterator[Evidence]:
    """Vector-field evaluations for the same error, Euler's over Tsit5's."""
    for widths, activation in (
        ([5, 5, 5], "identity"), ([5, 5, 5], "tanh"), ([20, 20, 20, 20], "tanh"),
    ):  # fmt: skip
        keys = jr.split(jr.key(0), 3)
        network = pcdyn.mlp(widths, activation=activation, std=0.05**0.5, key=keys[0])
        problem = pcdyn.InferenceProblem(
            network, input=1 + jr.normal(keys[1], (widths[0],)),
            output=0.5 * jr.normal(keys[2], (widths[-1],)),
        )  # fmt: skip
        tsit5, euler = (evaluations_for(problem, name) for name in ("tsit5", "euler"))
        yield row(
            f"{'-'.join(map(str, widths))} {activation}, error {TARGET:g}: evaluations of Euler / "
            "Tsit5",
            euler[0] / tsit5[0], 10, True,
            f"Tsit5 {tsit5[0]} ({tsit5[1]:.1e}), Euler {euler[0]} ({euler[1]:.1e})",
        )  # fmt: skip
