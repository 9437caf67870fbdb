"""The gradient flow itself as a solver: slow, and the arbiter of which equilibrium is meant."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.checks import number
from pcdyn._support.types import Scalar, State
from pcdyn.equilibria.solvers.base import Solution, Solver, solve_each
from pcdyn.errors import EquilibriumStatus, IntegratorError, Status, TimesError
from pcdyn.integrators import Diffrax, Integrator, UntilEquilibrium, get_integrator
from pcdyn.integrators.base import Request
from pcdyn.model.problem import InferenceProblem


class FlowToRest(Solver):
    """The flow itself, integrated until the vector field is small, or to `t1`.

    Its `passes` are 0 for an implicit integrator, which does not report them.

    **Arguments:**

    - `integrator`: any that runs in JAX and can watch for equilibrium.
    - `t1`: where it gives up, in units of the activity time constant.
    """

    integrator: Integrator = eqx.field(default_factory=Diffrax, converter=get_integrator)
    t1: Scalar = eqx.field(
        default=1e4, converter=number("FlowToRest: t1", above=0, error=TimesError)
    )

    @property
    def name(self) -> str:
        return f"flow ({self.integrator.name})"

    def check(self, problem: InferenceProblem) -> None:
        if not self.integrator.runs_in_jax:
            raise IntegratorError(
                f"{self.integrator.name} runs on the host; the flow to rest needs one that runs in "
                "JAX, such as pcdyn.Diffrax()"
            )
        self.integrator.check(problem, UntilEquilibrium(), False)

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        return solve_each(self._solve_one, problem, state, tolerance)

    def _solve_one(self, problem: InferenceProblem, state: State, tolerance: Array) -> Solution:
        # The tolerance is one of the gradient, the field is the gradient over τ.
        slowest = jnp.maximum(1.0, jnp.max(jnp.stack(problem.state_time_constants)))
        run = self.integrator.integrate(
            Request(
                problem=problem,
                state=state,
                times=jnp.asarray([0.0]),
                t1=jnp.asarray(self.t1, float),
                until=UntilEquilibrium().with_tolerance(tolerance / slowest),
                dense=False,
            )
        )
        status = jnp.asarray(int(EquilibriumStatus.STALLED))
        for outcome, meaning in (
            (Status.CONVERGED, EquilibriumStatus.CONVERGED),
            (Status.REACHED_T1, EquilibriumStatus.ITERATION_LIMIT),
            (Status.MAX_STEPS, EquilibriumStatus.ITERATION_LIMIT),
            (Status.NON_FINITE, EquilibriumStatus.NON_FINITE),
        ):
            status = jnp.where(run.status == outcome, int(meaning), status)
        evaluations, steps = run.statistics.vector_field_evaluations, run.statistics.accepted_steps
        passes = jnp.asarray(0 if evaluations is None else 2 * evaluations)
        return Solution(run.end_state, status, jnp.asarray(0 if steps is None else steps), passes)
