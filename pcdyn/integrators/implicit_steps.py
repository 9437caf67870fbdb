"""How diffrax's implicit solvers find the roots of their steps: structure, tolerances, patience."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from lineax import AutoLinearSolver
from optimistix import RESULTS, Chord, Newton, max_norm

from pcdyn._support.types import Scalar
from pcdyn.integrators.base import Request, largest_activity
from pcdyn.integrators.structured import ChainSolver
from pcdyn.linearisation.coupling import coupled_pairs
from pcdyn.model.driven import Interval
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceFlow, InferenceProblem
from pcdyn.model.stacked import StackedProblem

# Hairer & Wanner (Solving ODEs II, IV.8) stop at a hundredth to a tenth of the tolerance. Below it
# round-off of a stiff field can keep corrections from shrinking, in float32 below the tolerance.
_SMALL_CORRECTION = 0.1
_SMALL_CORRECTION_SINGLE = 1.0


class PatientNewton(Newton):
    """Newton's method that goes on as long as its corrections shrink.

    Without Cauchy's criterion, which asks for residuals that round-off does not let a stiff field
    have, that of optimistix gives up unless the second correction is already small.
    """

    def terminate(
        self,
        fn: Callable[..., PyTree],
        y: PyTree,
        args: PyTree,
        options: dict[str, Any],
        state: PyTree,
        tags: frozenset[object],
    ) -> tuple[Array, RESULTS]:
        ended, result = super().terminate(fn, y, args, options, state, tags)
        # What goes on has not failed.
        return ended, RESULTS.where(jnp.asarray(ended), result, RESULTS.successful)


def is_implicit(
    solver: diffrax.AbstractSolver,
) -> TypeGuard[diffrax.AbstractImplicitSolver]:
    """Whether a step of this solver is the root of a system of equations."""
    return isinstance(solver, diffrax.AbstractImplicitSolver)


def with_root_finder(solver: diffrax.AbstractSolver, *, fixed_step: bool) -> diffrax.AbstractSolver:
    """Choose a root finder without Cauchy's criterion.

    For a fixed step Newton's: the chord method gives up where it cannot ask for a smaller step.
    """
    kind = diffrax.with_stepsize_controller_tols(PatientNewton if fixed_step else Chord)
    return dataclasses.replace(solver, root_finder=kind(cauchy_termination=False))


def with_structure(solver: diffrax.AbstractSolver, problem: Flow) -> diffrax.AbstractSolver:
    """Give the root finder of an implicit solver a linear solver for coupled layers.

    A linear solver that the user chose stays, and so does the dense one of any other flow.
    """
    if isinstance(problem, Interval) and problem.problem.has_constant_rates:
        problem = problem.at(0.0)
    if not (is_implicit(solver) and isinstance(problem, InferenceFlow)):
        return solver
    finder = solver.root_finder
    if not isinstance(getattr(finder, "linear_solver", None), AutoLinearSolver):
        return solver
    widths = problem.free_widths if isinstance(problem, StackedProblem) else None
    pairs = None
    if isinstance(problem, InferenceProblem) and not problem.is_chain:
        pairs = coupled_pairs(problem)
    chosen = ChainSolver(problem.state_time_constants, widths, pairs)
    finder = eqx.tree_at(lambda f: f.linear_solver, finder, chosen)
    return dataclasses.replace(solver, root_finder=finder)


def with_root_tolerances(
    solver: diffrax.AbstractSolver, request: Request, rtol: Scalar, atol: Scalar
) -> diffrax.AbstractSolver:
    """Let the root finder of an implicit solver measure corrections by the size of the activities.

    The unknowns of an implicit step are increments of the state, which vanish at equilibrium: an
    error relative to them is finer than the field is known in, the finer the stiffer. A root finder
    with tolerances of its own keeps them.
    """
    if not is_implicit(solver):
        return solver
    finder = solver.root_finder
    # diffrax marks what it would fill in from the step size controller by one object.
    if isinstance(getattr(finder, "rtol", 0.0), float | int | np.ndarray | jax.Array):
        return solver
    dtype = request.problem.dtype
    scale = largest_activity(request)
    tolerances = jnp.asarray(rtol, dtype), jnp.asarray(atol + rtol * scale, dtype)
    small = _SMALL_CORRECTION if dtype == jnp.float64 else _SMALL_CORRECTION_SINGLE

    def correction_norm(correction: PyTree) -> Array:
        """The largest entry, or zero, which ends the iteration, where that is small."""
        norm: Array = max_norm(correction)
        return jnp.where(norm < small, 0, norm)

    finder = eqx.tree_at(lambda f: (f.rtol, f.atol, f.norm), finder, (*tolerances, correction_norm))
    return dataclasses.replace(solver, root_finder=finder)
