"""Run solvers in turn over a batch, each where the one before it did not converge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pcdyn.errors import EquilibriumStatus
from pcdyn.integrators.run import on_host
from pcdyn.kinks import SlidingPoint, has_kinks, slide
from pcdyn.problem import InferenceProblem, State
from pcdyn.solvers.base import Solution, Solver
from pcdyn.states import all_finite, choose


@eqx.filter_jit
def _solve(problem: InferenceProblem, state: State, solver: Solver, tolerance: Any) -> Solution:
    # The verdict is of the residual computed again, in another order of operations.
    return solver.solve(problem, state, 0.9 * tolerance)


def _follow_up(before: Solution | None, after: Solution) -> Solution:
    """The second solution where the first did not converge, with the costs of both."""
    if before is None:
        return after
    done = before.status == EquilibriumStatus.CONVERGED
    both = dataclasses.replace(after, passes=before.passes + after.passes)
    return choose(done, before, both)


@eqx.filter_jit
def _restart(solution: Solution, start: State) -> State:
    """Where the next solver begins: at the end of the last one, if that is finite."""
    finite = jax.vmap(all_finite)(solution.state)
    return tuple(
        jnp.where(finite[:, None], x, s) for x, s in zip(solution.state, start, strict=True)
    )


def solve_in_turn(
    problem: InferenceProblem, start: State, solvers: Sequence[Solver], tolerance: Any
) -> tuple[Solution, str]:
    """Try solvers until each sample has converged; also returns the names of those that ran."""
    solution, state = None, start
    for solver in solvers:
        if solution is not None:
            state = _restart(solution, start)
        solution = _follow_up(solution, _solve(problem, state, solver, tolerance))
    assert solution is not None
    return solution, ", ".join(solver.name for solver in solvers)


def solve_on_host(
    problem: InferenceProblem, start: State, solvers: Sequence[Solver], tolerance: float
) -> tuple[Solution, dict[int, SlidingPoint], str]:
    """As `solve_in_turn`, but a solver that nobody needs is not even compiled.

    Where activations have kinks, the samples that a solver leaves are looked at for sliding ones.
    """
    solution, sliding, state, ran = None, {}, start, []
    for solver in solvers:
        if solution is not None:
            state = _restart(solution, start)
        # As arrays, numbers can change without compiling again.
        numbers = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, int | float) else x, solver)
        goal = np.asarray(tolerance, problem.network.dtype)
        solution = _follow_up(solution, _solve(problem, state, numbers, goal))
        solution = on_host(solution)
        ran.append(solver.name)
        if has_kinks(problem.network):
            solution, sliding = _slide_rest(problem, solution, tolerance)
        done = solution.status == EquilibriumStatus.CONVERGED
        done[list(sliding)] = True
        if done.all():
            break
    assert solution is not None
    return solution, sliding, ", ".join([*ran, *(["kinks"] if sliding else [])])


def _slide_rest(
    problem: InferenceProblem, solution: Solution, tolerance: float
) -> tuple[Solution, dict[int, SlidingPoint]]:
    """The solution with sliding points in place of what has not converged, where there are any."""
    state, points = tuple(np.array(x) for x in solution.state), {}
    for sample in np.flatnonzero(solution.status != EquilibriumStatus.CONVERGED):
        one = tuple(x[sample] for x in state)
        if not all(np.isfinite(x).all() for x in one):
            continue
        data = (problem.input, problem.output)
        input, output = (None if x is None else x[sample] for x in data)
        found = slide(problem.with_data(input, output), one, tolerance)
        if found is not None:
            points[int(sample)] = found
            for layer, values in zip(state, found.state, strict=True):
                layer[sample] = values
    return dataclasses.replace(solution, state=state), points
