"""The closed form of linear networks, as a solver."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from pcdyn._support.checks import check_choice
from pcdyn._support.states import all_finite
from pcdyn._support.types import Scalar, State
from pcdyn.equilibria.solvers.base import Solution, Solver, final_status
from pcdyn.errors import EquilibriumStatus
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import check_linear, linear_equilibrium


class ClosedForm(Solver):
    """The closed form of a linear network, that of `pcdyn.linear_equilibrium`.

    **Arguments:**

    - `via`: `"output_space"` (both ends clamped: the S-matrix, n_L × n_L), `"cholesky"` (block
      tridiagonal, any clamps), or by default whichever is smaller.
    """

    via: Literal["output_space", "cholesky"] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.via is not None:
            check_choice(self.via, "ClosedForm: via", ("output_space", "cholesky"))

    @property
    def name(self) -> str:
        return "closed_form"

    def check(self, problem: InferenceProblem) -> None:
        check_linear(problem)

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        # The S-matrix costs a multiplication of n_L rows per layer, the blocks a factorisation.
        widths = problem.widths
        # Above a narrower layer S is singular but for the precision of the output.
        narrow = problem.is_chain and problem.both_ends_clamped and widths[-1] <= min(widths[1:])
        via = self.via or ("output_space" if narrow else "cholesky")
        solved = problem.state_of(linear_equilibrium(problem, method=via))
        finite = jax.vmap(all_finite)(solved)
        status = final_status(True, finite, EquilibriumStatus.CONVERGED)
        none = jnp.zeros(finite.shape, int)
        return Solution(solved, status, none + 1, none)
