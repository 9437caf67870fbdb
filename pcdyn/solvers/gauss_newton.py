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

from pcdyn.energy import Gaussian
from pcdyn.errors import InputError
from pcdyn.linear import gauss_newton_hessian
from pcdyn.problem import InferenceProblem, State
from pcdyn.solvers.base import Solution, Solver, conjugate_gradients
from pcdyn.solvers.chain import Chain, output_jacobians, pull_through
from pcdyn.solvers.damped import Linearisation, descend


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
        narrow = chain.problem.network.widths[-1] <= self.explicit_width

        def linearise(errors: State) -> Linearisation:
            output_error, pulls = chain.with_pulls(errors)
            weighted_output = chain.gaussian.weigh(chain.depth, output_error)
            slope = jax.tree.map(
                jnp.subtract, chain.weighted(errors), pull_through(pulls, weighted_output)
            )
            if narrow:
                propose = _explicit_step(chain, errors, output_error, pulls)
                passes = 3 + chain.problem.network.widths[-1]
            else:
                propose = self._matrix_free_step(chain, slope, output_error, pulls)
                passes = 3
            return Linearisation(
                energy=chain.energy_of(errors, output_error),
                residual=chain.residual(errors, output_error, pulls),
                slope=slope,
                propose=propose,
                passes=passes,
            )

        start = chain.errors(state)
        end = descend(linearise, chain.energy, start, tolerance, self.max_iterations)
        hidden, _ = chain.activities(end.state)
        return dataclasses.replace(end, state=hidden)

    def _matrix_free_step(self, chain: Chain, slope: State, output_error: Any, pulls: Any) -> Any:
        def pushed(tangents: State) -> Any:
            """Σ_l J_l v_l, the transpose of pulling back."""
            push = jax.linear_transpose(lambda v: pull_through(pulls, v), output_error)
            return push(tangents)[0]

        def spread(covector: Any) -> State:
            return chain.unweighted(pull_through(pulls, covector))

        steepest = chain.unweighted(slope)

        def propose(damping: Any) -> tuple[State, Any]:
            def s_product(covector: Any) -> Any:
                own = chain.gaussian.unweigh(chain.depth, covector)
                return own + pushed(spread(covector)) / (1 + damping)

            # For the correction and not for the new errors: its right-hand side shrinks with the
            # residual, and so does the error that conjugate gradients leave.
            rhs = pushed(steepest) / (1 + damping)
            (solved,), products = conjugate_gradients(
                lambda v: (s_product(v[0]),), (rhs,), self.cg_tolerance
            )
            move = jax.tree.map(lambda s, g: (s - g) / (1 + damping), spread(solved), steepest)
            # Each product is a backward and a tangent pass, as are its two ends together.
            return move, 2 * (products + 1)

        return propose

    def _in_activities(self, problem: InferenceProblem, state: State, tolerance: Any) -> Solution:
        gaussian = gaussian_energy(self.name, problem)

        def linearise(state: State) -> Linearisation:
            slope = problem.gradient(state)
            matrix = gauss_newton_hessian(problem, gaussian, layer_jacobians(problem, state))
            largest = jnp.max(jnp.concatenate([jnp.diagonal(b) for b in matrix.diagonal]))

            def propose(damping: Any) -> tuple[State, int]:
                damped = matrix.plus_diagonal(damping * largest)
                return jax.tree.map(jnp.negative, damped.cholesky().solve(slope)), 0

            return Linearisation(problem.free_energy(state), slope, slope, propose, 3)

        return descend(linearise, problem.free_energy, state, tolerance, self.max_iterations)


def _explicit_step(chain: Chain, errors: State, output_error: Any, pulls: Any) -> Any:
    jacobians = output_jacobians(pulls, output_error.shape[0], output_error.dtype)
    spread = chain.unweighted(jacobians)
    moved = sum(j @ e for j, e in zip(jacobians, errors, strict=True))
    hidden_part = sum(j @ s.T for j, s in zip(jacobians, spread, strict=True))
    own_part = chain.gaussian.unweigh(
        chain.depth, jnp.eye(output_error.shape[0], dtype=output_error.dtype)
    )

    def propose(damping: Any) -> tuple[State, int]:
        s_matrix = own_part + hidden_part / (1 + damping)
        rhs = output_error + moved / (1 + damping)
        solved = jsl.cho_solve(jsl.cho_factor(s_matrix, lower=True), rhs)
        pairs = zip(spread, errors, strict=True)
        return tuple((solved @ s - e) / (1 + damping) for s, e in pairs), 0

    return propose


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
