"""Gauss–Newton: the linear problem's exact solution with the current Jacobians, repeated.

With both ends clamped it works in error coordinates, where each step is one solve in the output
space: `S = Π_L⁻¹ + Σ_l J_l Π_l⁻¹ J_lᵀ` with J_l = ∂μ_L/∂x_l. For the other clamp modes it works
in the activities, where the Hessian is block tridiagonal: that is the iterated Kalman smoother
over depth, or Gaussian message passing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from pcdyn.block_tridiagonal import BlockCholesky
from pcdyn.energy import Gaussian, weigh
from pcdyn.errors import InputError
from pcdyn.linear import gauss_newton_hessian
from pcdyn.problem import InferenceProblem, State
from pcdyn.solvers.base import Solution, Solver, conjugate_gradients
from pcdyn.solvers.chain import Chain, Stacked
from pcdyn.solvers.damped import Look, Propose, descend
from pcdyn.states import largest_norm, scale, step


class GaussNewton(Solver):
    """Damped Gauss–Newton with a line search that never lets the free energy rise.

    Arguments: `max_iterations`; `explicit_width`: outputs up to this width have their Jacobians
    computed by as many backward passes and S solved by Cholesky, wider ones are solved by
    conjugate gradients, without Jacobians, to the relative accuracy `cg_tolerance`.

    It needs `pcdyn.Gaussian` energies. Where residuals are large it can end at another stationary
    point than the gradient flow: `Equilibrium.basin` looks.
    """

    max_iterations: int = eqx.field(static=True, default=50)
    explicit_width: int = eqx.field(static=True, default=32)
    cg_tolerance: float = eqx.field(static=True, default=1e-4)

    @property
    def name(self) -> str:
        return "gauss_newton"

    def check(self, problem: InferenceProblem) -> None:
        gaussian_energy(self.name, problem)

    def solve(self, problem: InferenceProblem, state: State, tolerance: Any) -> Solution:
        if problem.input is not None and problem.output is not None:
            return self._in_error_coordinates(Chain(problem), state, tolerance)
        return self._in_activities(problem, state, tolerance)

    def _in_error_coordinates(self, chain: Chain, state: State, tolerance: Any) -> Solution:
        width = chain.target.shape[-1]
        narrow = width <= self.explicit_width

        def factorise(errors: Stacked, damping: Any) -> Propose:
            push, pull = chain.linearise(errors)
            lessened = 1 / (1 + damping)
            if narrow:
                solve = _cholesky(chain, push, pull, lessened)
            else:
                solve = self._conjugate_gradients(chain, push, pull, lessened)

            def propose(slope: Stacked) -> tuple[Stacked, Any]:
                # (Π + JᵀΠ_L J)⁻¹ = Π⁻¹ − Π⁻¹ Jᵀ S⁻¹ J Π⁻¹, with (1 + damping) Π for Π.
                steepest = scale(lessened, chain.unweighted(slope))
                solved, passes = solve(push(steepest))
                spread = scale(lessened, chain.unweighted(pull(solved)))
                return jax.tree.map(jnp.subtract, spread, steepest), passes + 2

            return propose

        start = chain.errors(state)
        end = descend(
            chain.look, factorise, start, tolerance, self.max_iterations,
            look_passes=3, matrix_passes=1 + 2 * width if narrow else 1,
        )  # fmt: skip
        hidden, _ = chain.activities(end.state)
        return dataclasses.replace(end, state=chain.unstack(hidden))

    def _conjugate_gradients(self, chain: Chain, push: Any, pull: Any, lessened: Any) -> Any:
        def s_product(covector: tuple[Any]) -> tuple[Any]:
            own = weigh(chain.output_covariance, covector[0])
            return step((own,), lessened, (push(chain.unweighted(pull(covector[0]))),))

        def solve(covector: Any) -> tuple[Any, Any]:
            (solved,), products = conjugate_gradients(s_product, (covector,), self.cg_tolerance)
            return solved, 2 * products

        return solve

    def _in_activities(self, problem: InferenceProblem, state: State, tolerance: Any) -> Solution:
        gaussian = gaussian_energy(self.name, problem)

        def look(state: State) -> Look:
            slope = problem.gradient(state)
            return Look(problem.free_energy(state), slope, largest_norm(slope))

        def factorise(state: State, damping: Any) -> Propose:
            def factor(input: Any, output: Any, state: State, damping: Any) -> BlockCholesky:
                one = problem.with_data(input, output)
                matrix = gauss_newton_hessian(one, gaussian, layer_jacobians(one, state))
                largest = jnp.max(jnp.concatenate([jnp.diagonal(b) for b in matrix.diagonal]))
                return matrix.plus_diagonal(damping * largest).cholesky()

            factors = eqx.filter_vmap(factor)(problem.input, problem.output, state, damping)

            def propose(slope: State) -> tuple[State, Any]:
                solved = jax.vmap(lambda factor, rhs: factor.solve(rhs))(factors, slope)
                return jax.tree.map(jnp.negative, solved), 0

            return propose

        return descend(
            look, factorise, state, tolerance, self.max_iterations,
            look_passes=2, matrix_passes=1,
        )  # fmt: skip


def _cholesky(chain: Chain, push: Any, pull: Any, lessened: Any) -> Any:
    """Solutions with S, whose columns are those of the identity, pulled down and pushed up."""
    batch, width = chain.target.shape
    identity = jnp.eye(width, dtype=chain.target.dtype)

    def column(covector: Any) -> Any:
        covectors = jnp.broadcast_to(covector, (batch, width))
        through = push(chain.unweighted(pull(covectors)))
        return step((weigh(chain.output_covariance, covectors),), lessened, (through,))[0]

    columns = jax.vmap(column, out_axes=-1)(identity)
    factors, _ = jax.vmap(lambda s: jsl.cho_factor(s, lower=True))(columns)
    return lambda covector: (
        jax.vmap(lambda f, v: jsl.cho_solve((f, True), v))(factors, covector),
        0,
    )


def gaussian_energy(name: str, problem: InferenceProblem) -> Gaussian:
    """The energy; raises `InputError` unless it is `pcdyn.Gaussian`."""
    if not isinstance(problem.energy, Gaussian):
        raise InputError(
            f"{name} needs pcdyn.Gaussian energies, not {type(problem.energy).__name__}; use "
            "pcdyn.solvers.PseudoTransient()"
        )
    return problem.energy


def layer_jacobians(problem: InferenceProblem, state: State) -> dict[int, Any]:
    """∂μ_l/∂x_{l−1} of shape (n_l, n_{l−1}), for each l whose lower layer is free."""
    activities, widths = problem.activities(state), problem.network.widths
    jacobians = {}
    for index in range(1, problem.network.depth + 1):
        if index - 1 in problem.free_layers:
            narrowing = widths[index] <= widths[index - 1]
            transform = jax.jacrev if narrowing else jax.jacfwd
            jacobians[index] = transform(lambda x, i=index: problem.network.predict(i, x))(
                activities[index - 1]
            )
    return jacobians
