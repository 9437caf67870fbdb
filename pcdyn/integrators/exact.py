"""The closed-form trajectory of linear networks, as an integrator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pcdyn._support.types import State
from pcdyn.errors import IntegratorError, NotLinearError, Status
from pcdyn.integrators.base import Integration, Integrator, Request, UntilEquilibrium
from pcdyn.integrators.statistics import Statistics
from pcdyn.linearisation.fluctuations import drawn_fluctuations
from pcdyn.model.driven import DrivenProblem, Interval
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import check_linear, exact_flow


class Exact(Integrator):
    """`y(t) = y* + e^{−Ht}(y(0) − y*)` of a linear network, without any time step.

    It evaluates the solution at given times and cannot watch for equilibrium, which
    `pcdyn.linear_equilibrium` gives directly. Exact is the formula, not its value:
    `Trajectory.round_off` estimates how far activities are off, and a
    `pcdyn.errors.RoundOffWarning` says where half of the digits are lost, which takes a ratio of
    rates of about 1/eps. It has derivatives of any order in both modes, by anything.

    A `pcdyn.DrivenProblem` is solved from jump to jump, for clamped values that are constant or
    linear in time there; precisions and time constants may change at jumps.

    With noise (`pcdyn.Langevin`) the way from each saved time to the next is drawn from its law,
    which is Gaussian: no step is taken and the law is exact at each. Other saved times are other
    draws. Derivatives with respect to the network are refused there.

    **Raises:**

    - `pcdyn.errors.NotLinearError` for other networks, when it is used.
    """

    @property
    def name(self) -> str:
        return "exact"

    @property
    def runs_in_jax(self) -> bool:
        return True

    @property
    def fixed_step(self) -> None:
        return None

    @property
    def most_steps(self) -> None:
        return None

    @property
    def takes_noise(self) -> bool:
        return True

    def check(self, problem: Flow, until: UntilEquilibrium | None, dense: bool) -> None:
        if isinstance(problem, DrivenProblem):
            if not problem.is_piecewise_linear:
                raise NotLinearError(
                    "Exact solves for clamped values that are constant or change along straight "
                    "lines between jumps, and precisions and time constants that change at jumps "
                    "alone: take pcdyn.PiecewiseConstant or pcdyn.PiecewiseLinear, or another "
                    "integrator"
                )
            problem = problem.problem
        if not isinstance(problem, InferenceProblem):
            raise NotLinearError(
                f"{type(problem).__name__} is no inference of a linear network, which alone "
                "Exact can solve: take another integrator"
            )
        check_linear(problem)
        if until is not None:
            raise IntegratorError(
                'Exact would ignore until="equilibrium": use pcdyn.linear_equilibrium(problem)'
            )

    def integrate(self, request: Request) -> Integration:
        problem, dtype, towards = request.problem, request.problem.dtype, None
        if isinstance(problem, Interval):
            problem, towards = problem.at(0.0), (problem.at(request.t1), request.t1)
        assert isinstance(problem, InferenceProblem), "check has refused others"
        flow = exact_flow(problem, request.state, towards=towards)
        times = jnp.asarray(request.times, dtype)
        states = jax.vmap(flow)(times)
        # e^{−H·0} is the identity only up to round-off; the start is known exactly.
        states = tuple(
            jnp.where((times == 0).reshape(-1, *[1] * x.ndim), x[None], s)
            for x, s in zip(request.state, states, strict=True)
        )
        end_state = flow(jnp.asarray(request.t1, dtype))
        if request.noise is not None:
            moved = _deviations(problem, request)
            states = tuple(x + d[:-1] for x, d in zip(states, moved, strict=True))
            end_state = tuple(x + d[-1] for x, d in zip(end_state, moved, strict=True))
        return Integration(
            states=states,
            end_time=jnp.asarray(request.t1),
            end_state=end_state,
            status=jnp.asarray(int(Status.REACHED_T1)),
            statistics=Statistics(0, 0, 0, 0),
            interpolation=flow if request.dense else None,
            round_off=jnp.max(flow.round_off),
        )


def _deviations(problem: InferenceProblem, request: Request) -> State:
    """How far noise has moved the state from the flow, at the saved times and at t1."""
    noise = request.noise
    assert noise is not None, "asked for with noise alone"
    ends = jnp.append(jnp.asarray(request.times), request.t1)
    intervals = jnp.diff(ends, prepend=jnp.zeros((1,), ends.dtype)).astype(problem.dtype)
    moved = drawn_fluctuations(problem, noise.temperature, noise.keys, intervals)
    return tuple(jnp.split(moved, np.cumsum(problem.free_widths)[:-1], axis=-1))
