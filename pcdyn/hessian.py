"""The Hessian of the free energy of any network: block tridiagonal, sample by sample."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pcdyn.block_tridiagonal import BlockTridiagonal
from pcdyn.problem import InferenceProblem, State


def free_energy_hessian(problem: InferenceProblem, state: State) -> BlockTridiagonal:
    """∂²F/∂x² at a state of one sample, curvature of the predictions included.

    Layers that are not neighbours do not meet in any prediction error, so that it is block
    tridiagonal for any network and energy.
    """
    depth, activities = problem.network.depth, problem.activities(state)

    def pair_energy(index: int, below: Any, here: Any) -> Any:
        """E_l as a function of x_{l−1} and x_l."""
        error = here - problem.network.predict(index, below)
        return problem.layer_energy(index, error)

    def own_energy(index: int, here: Any) -> Any:
        """The energies in which x_l appears, as a function of it."""
        total = jnp.zeros((), problem.network.dtype)
        if index > 0:
            total = total + pair_energy(index, activities[index - 1], here)
        if index < depth:
            total = total + pair_energy(index + 1, here, activities[index + 1])
        return total

    diagonal, upper = [], []
    for index in problem.free_layers:
        here = activities[index]
        diagonal.append(jax.hessian(lambda x, i=index: own_energy(i, x))(here))
        if index + 1 in problem.free_layers:
            slope = jax.grad(lambda x, y, i=index: pair_energy(i + 1, x, y))
            upper.append(jax.jacfwd(slope, argnums=1)(here, activities[index + 1]))
    return BlockTridiagonal(tuple(diagonal), tuple(upper))


def solve_hessian(problem: InferenceProblem, state: State, rhs: State) -> State:
    """H⁻¹ rhs for each sample of a batch; NaN where H is not positive definite.

    It can be differentiated and transposed, as the implicit function theorem needs.
    """

    def one(input: Any, output: Any, state: State, rhs: State) -> State:
        matrix = free_energy_hessian(problem.with_data(input, output), state)
        return jax.lax.custom_linear_solve(
            matrix.times, rhs, lambda _, b: matrix.cholesky().solve(b), symmetric=True
        )

    return eqx.filter_vmap(one)(problem.input, problem.output, state, rhs)
