"""Run solvers in turn over a batch, each where the one before it did not converge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.states import all_finite, choose, layer_norms
from pcdyn._support.types import Scalar, State, Values
from pcdyn.equilibria.kinks import SlidingPoint, has_kinks, slide, step_off_ridges
from pcdyn.equilibria.solvers.base import Solution, Solver
from pcdyn.errors import EquilibriumStatus
from pcdyn.integrators.run import on_host
from pcdyn.linearisation.scales import gradient_round_off, resting_tolerance
from pcdyn.model.problem import InferenceProblem
from pcdyn.model.stacked import StackedProblem, stacked

# The prediction errors, the energies of layers and ‖∂F/∂x_l‖ of the free ones.
Observed = tuple[State, Values, Values]
# A solution, where the next search starts, which samples it is for, and how many there were.
_Carry = tuple[Solution, State, Array, Array]
# How often a search may end on a ridge and go on from beside it.
_MOST_RIDGES = 4


class Ran(eqx.Module):
    """What solvers that ran in turn have found.

    `start` is where they began and `observed` what is seen where they ended; `tolerance` is what
    ‖∂F/∂x_l‖ was to be, per sample; `sliding` are the points that slide, by sample; `names` are
    those of the solvers.
    """

    start: State
    solution: Solution
    observed: Observed
    tolerance: Values | np.ndarray
    names: str = eqx.field(static=True)
    sliding: dict[int, SlidingPoint] = eqx.field(default_factory=dict)


@eqx.filter_jit
def observe(problem: InferenceProblem, state: State) -> Observed:
    """The prediction errors, the energies of layers and the size of ∂F/∂x_l at a state."""
    deep = stacked(problem, state)
    if not isinstance(deep, StackedProblem):
        errors, energies = problem.observe(0.0, state)
        return errors, energies, layer_norms(problem.gradient(state))
    together = deep.pack(state)
    errors, energies = deep.observe(0.0, together)
    return deep.unpack_errors(errors), energies, deep.norms(deep.gradient(together))


@eqx.filter_jit
def _solve_and_observe(
    problem: InferenceProblem,
    start: State | None,
    solver: Solver,
    tolerance: Scalar,
    relative: bool,
) -> tuple[State, Solution, Values, Observed]:
    """All that most calls need in one program: also the feedforward pass, unless a start is given.

    It takes less time to compile, and to call, than a program for each.
    """
    state = problem.feedforward_state() if start is None else start
    solution, goal = _solve_first(problem, state, solver, tolerance, relative)
    return state, solution, goal, observe(problem, solution.state)


def _solve_first(
    problem: InferenceProblem, state: State, solver: Solver, tolerance: Scalar, relative: bool
) -> tuple[Solution, Values]:
    """The solution, and the tolerance per sample."""
    if has_kinks(problem):
        # On a ridge the gradient vanishes, and nothing could be small beside it.
        beside, falls = step_off_ridges(problem, state)
        state = choose(falls, beside, state)
    if relative:
        goal = resting_tolerance(problem, state, tolerance)
    else:
        goal = jnp.broadcast_to(jnp.asarray(tolerance, problem.dtype), state[0].shape[:1])
    return _solve(problem, state, solver, goal), goal


@eqx.filter_jit
def _solve(problem: InferenceProblem, state: State, solver: Solver, goal: Scalar) -> Solution:
    """Solve from `state`, and where that ends on a ridge of F, again from beside it."""
    # The verdict is of the residual computed again, in another order of operations.
    goal = 0.9 * goal
    if not has_kinks(problem):
        return solver.solve(problem, state, goal)

    def again(carry: _Carry) -> _Carry:
        before, start, running, count = carry
        # What is not to run has converged at once.
        after = solver.solve(problem, start, jnp.where(running, goal, jnp.inf))
        solution = choose(running, _with_costs_of(before, after), before)
        beside, falls = step_off_ridges(problem, solution.state)
        ended = solution.status == EquilibriumStatus.CONVERGED
        ended = ended | (solution.status == EquilibriumStatus.STALLED)
        ridge = running & falls & ended
        start = choose(ridge, beside, solution.state)
        return solution, start, ridge, count + 1

    def unfinished(carry: _Carry) -> Array:
        return jnp.any(carry[2]) & (carry[3] < _MOST_RIDGES)

    shapes = jax.eval_shape(lambda: solver.solve(problem, state, goal))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    everything = jnp.ones(state[0].shape[:1], bool)
    start = (nothing, state, everything, jnp.asarray(0))
    solution, beside, ridge, _ = jax.lax.while_loop(unfinished, again, start)
    status = jnp.where(ridge, int(EquilibriumStatus.STALLED), solution.status)
    return dataclasses.replace(solution, state=choose(ridge, beside, solution.state), status=status)


def _with_costs_of(before: Solution, after: Solution) -> Solution:
    return dataclasses.replace(after, passes=before.passes + after.passes)


def _follow_up(before: Solution, after: Solution, done: Values | np.ndarray) -> Solution:
    """The second solution where the first is not done, with the costs of both."""
    return choose(done, before, _with_costs_of(before, after))


@eqx.filter_jit
def within_round_off(
    problem: InferenceProblem, state: State, tolerance: Values | np.ndarray
) -> tuple[Array, Array]:
    """Whether the gradient of each sample is within its round-off, and then that as tolerance.

    By layer; the tolerance of other samples, and of layers with less round-off, is what it was.
    """
    residuals, bound = layer_norms(problem.gradient(state)), gradient_round_off(problem, state)
    goal = jnp.broadcast_to(tolerance[:, None], residuals.shape)
    reached = jnp.all(residuals <= jnp.maximum(bound, goal), axis=-1)
    return reached, jnp.where(reached[:, None], jnp.maximum(bound, goal), goal)


@eqx.filter_jit
def _restart(solution: Solution, start: State) -> State:
    """Where the next solver begins: at the end of the last one, if that is finite."""
    finite = jax.vmap(all_finite)(solution.state)
    return tuple(
        jnp.where(finite[:, None], x, s) for x, s in zip(solution.state, start, strict=True)
    )


def _followed(
    problem: InferenceProblem, start: State, solver: Solver, goal: Values, before: Solution
) -> Solution:
    """A solution with what another solver makes of the samples that have not converged."""
    done = before.status == EquilibriumStatus.CONVERGED
    # Nothing is left to do for those that have converged to round-off only.
    goal = jnp.where(done, jnp.inf, goal)
    return _follow_up(before, _solve(problem, _restart(before, start), solver, goal), done)


def solve_in_turn(
    problem: InferenceProblem,
    start: State,
    solvers: Sequence[Solver],
    tolerance: Scalar,
    relative: bool,
) -> Ran:
    """Try solvers until each sample has converged, to a tolerance that may be `relative`."""
    solution, goal = _solve_first(problem, start, solvers[0], tolerance, relative)
    for solver in solvers[1:]:
        follow = partial(_followed, problem, start, solver, goal)
        done = solution.status == EquilibriumStatus.CONVERGED
        solution = jax.lax.cond(jnp.all(done), lambda same: same, follow, solution)
    names = ", ".join(solver.name for solver in solvers)
    return Ran(start, solution, observe(problem, solution.state), goal, names)


def solve_on_host(
    problem: InferenceProblem,
    start: State | None,
    solvers: Sequence[Solver],
    tolerance: float,
    relative: bool,
) -> Ran:
    """As `solve_in_turn`, but a solver that nobody needs is not even compiled.

    It starts from the feedforward pass unless another start is given. Where activations have
    kinks, the samples that a solver leaves are looked at for sliding ones.
    """
    each, given = with_numbers_as_arrays(solvers), np.asarray(tolerance, problem.dtype)
    begin, solution, goal, observed = _solve_and_observe(problem, start, each[0], given, relative)
    goal, sliding, done = np.asarray(goal), {}, np.zeros(goal.shape, bool)
    ran = 0
    for ran, solver in enumerate(each, start=1):
        if ran > 1:
            left = np.where(done, np.inf, goal).astype(goal.dtype)
            after = _solve(problem, _restart(solution, begin), solver, left)
            solution = _follow_up(solution, after, done)
        solution = on_host(solution)
        if has_kinks(problem):
            solution, sliding = _slide_rest(problem, solution, goal, sliding)
        done = np.asarray(solution.status == EquilibriumStatus.CONVERGED)
        done[list(sliding)] = True
        if done.all():
            break
    names = [*(solver.name for solver in solvers[:ran]), *(["kinks"] if sliding else [])]
    if ran > 1 or sliding:
        observed = observe(problem, solution.state)
    return Ran(begin, solution, observed, goal, ", ".join(names), sliding)


def with_numbers_as_arrays(solvers: Sequence[Solver]) -> tuple[Solver, ...]:
    """The same solvers, whose numbers can change without compiling again."""
    return jax.tree.map(
        lambda x: np.asarray(x) if isinstance(x, int | float) else x, tuple(solvers)
    )


def _slide_rest(
    problem: InferenceProblem,
    solution: Solution,
    tolerance: np.ndarray,
    known: dict[int, SlidingPoint],
) -> tuple[Solution, dict[int, SlidingPoint]]:
    """The solution with sliding points in place of what has not converged, where there are any."""
    state, points = tuple(np.array(x) for x in solution.state), dict(known)
    for sample in np.flatnonzero(solution.status != EquilibriumStatus.CONVERGED):
        if sample in points:
            continue
        one = tuple(x[sample] for x in state)
        if not all(np.isfinite(x).all() for x in one):
            continue
        found = slide(problem.sample(sample), one, float(tolerance[sample]))
        if found is not None:
            points[int(sample)] = found
            for layer, values in zip(state, found.state, strict=True):
                layer[sample] = values
    return dataclasses.replace(solution, state=state), points
