"""The contract that every equilibrium solver keeps: a problem of one sample and a start in."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pcdyn.errors import EquilibriumStatus
from pcdyn.problem import InferenceProblem, State
from pcdyn.states import dot, step


class Solution(eqx.Module):
    """Where a solver ended, for one sample.

    `status` is a `pcdyn.EquilibriumStatus` as an integer. `passes` counts forward, backward and
    tangent passes through the network; one evaluation of the vector field takes two.
    """

    state: State
    status: Any
    iterations: Any
    passes: Any


class Solver(eqx.Module):
    """Base of all equilibrium solvers: values that say how to find where inference ends."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What messages and tables call it."""

    @abc.abstractmethod
    def check(self, problem: InferenceProblem) -> None:
        """Raise the named error for a problem that this solver cannot take."""

    @abc.abstractmethod
    def solve(self, problem: InferenceProblem, state: State, tolerance: Any) -> Solution:
        """Solve one sample from `state`; the batch comes by `jax.vmap`.

        It has converged when ‖∂F/∂x_l‖ is at most `tolerance` in every free layer.
        """


def final_status(converged: Any, finite: Any, otherwise: EquilibriumStatus) -> Any:
    """The status of a run from what is known of its end."""
    status = jnp.where(converged, int(EquilibriumStatus.CONVERGED), int(otherwise))
    return jnp.where(finite, status, int(EquilibriumStatus.NON_FINITE))


def conjugate_gradients(product: Any, rhs: State, tolerance: Any) -> tuple[State, Any]:
    """Solve until the residual falls by `tolerance`, or a direction of negative curvature shows.

    There it returns what it has, which is a descent direction (Steihaug); the solvers of JAX and
    lineax would go on and lose it. Also returns the number of products.
    """
    target = tolerance**2 * dot(rhs, rhs)
    units = sum(x.size for x in rhs)

    def proceed(carry: Any) -> Any:
        _, _, _, squared, count, flat = carry
        return (squared > target) & (count < 2 * units) & ~flat

    def body(carry: Any) -> Any:
        x, residual, direction, squared, count, _ = carry
        image = product(direction)
        curvature = dot(direction, image)
        flat = ~(curvature > 0)
        length = squared / jnp.where(flat, 1, curvature)
        length = jnp.where(flat, jnp.where(count == 0, 1.0, 0.0).astype(length.dtype), length)
        x = step(x, length, direction)
        residual = step(residual, -length, image)
        after = dot(residual, residual)
        direction = step(residual, after / jnp.where(squared > 0, squared, 1), direction)
        return x, residual, direction, after, count + 1, flat

    zero = jax.tree.map(jnp.zeros_like, rhs)
    start = (zero, rhs, rhs, dot(rhs, rhs), jnp.asarray(0), jnp.asarray(False))
    x, *_, count, _ = jax.lax.while_loop(proceed, body, start)
    return x, count
