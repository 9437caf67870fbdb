"""Equilibria along a path of precisions."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

import pcdyn
from pcdyn._support.states import largest_norm
from pcdyn._support.types import Activities, State

# Of ‖∂F/∂x_l‖ at each equilibrium.
TOLERANCE = 1e-7


def precisions_of(energies: list[list[pcdyn.Gaussian]]) -> jax.Array:
    """Scalar precisions, (points, layers), the smallest scaled to 1, which moves no equilibrium.

    So every weighted prediction error is of the order of the output error, and one tolerance fits.
    """
    rows = jnp.stack([jnp.stack([jnp.asarray(e.precision) for e in each]) for each in energies])
    return rows / rows.min(axis=1, keepdims=True)


def with_precisions(
    problem: pcdyn.InferenceProblem, row: Iterable[ArrayLike]
) -> pcdyn.InferenceProblem:
    """The same problem with these precisions."""
    return pcdyn.InferenceProblem(
        problem.network, input=problem.input, output=problem.output,
        energy=pcdyn.Gaussian([jnp.asarray(p) for p in row]),
    )  # fmt: skip


def followed_path(problem: pcdyn.InferenceProblem, path: jax.Array) -> tuple[Activities, jax.Array]:
    """Each equilibrium is looked for from the one before, the first from the feedforward pass."""

    def at(state: State, row: jax.Array) -> tuple[State, tuple[Activities, jax.Array]]:
        here = with_precisions(problem, row)
        found = pcdyn.equilibrium(
            here, method="gauss_newton", initial=state, tolerance=TOLERANCE, throw=False
        )
        return found.state, (found.activities, largest_slope(here, found.activities))

    return jax.lax.scan(at, problem.feedforward_state(), path)[1]


def largest_slope(problem: pcdyn.InferenceProblem, activities: Activities) -> jax.Array:
    """The largest ‖∂F/∂x_l‖."""
    return largest_norm(problem.gradient(problem.state_of(activities)))
