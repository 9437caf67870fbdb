"""Equilibrium solvers are values under one contract: a batch and a start in, a solution out."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from pcdyn._support.checks import as_sequence
from pcdyn.equilibria.kinks import has_kinks
from pcdyn.equilibria.solvers.base import Solution, Solver
from pcdyn.equilibria.solvers.closed_form import ClosedForm
from pcdyn.equilibria.solvers.conjugate_gradients import ConjugateGradients
from pcdyn.equilibria.solvers.error_coordinates import has_error_coordinates
from pcdyn.equilibria.solvers.first_order import ErrorDescent, FixedPoint, GradientDescent
from pcdyn.equilibria.solvers.flow import FlowToRest
from pcdyn.equilibria.solvers.gauss_newton import GaussNewton, has_curvature
from pcdyn.equilibria.solvers.pseudo_transient import PseudoTransient
from pcdyn.errors import InputError
from pcdyn.linearisation.block_sparse import operations
from pcdyn.linearisation.coupling import coupled_pairs, nodes_of
from pcdyn.linearisation.whitened import has_linear_flow
from pcdyn.model.problem import InferenceProblem

__all__ = [
    "ClosedForm",
    "ConjugateGradients",
    "ErrorDescent",
    "FixedPoint",
    "FlowToRest",
    "GaussNewton",
    "GradientDescent",
    "PseudoTransient",
    "Solution",
    "Solver",
    "default_solvers",
    "get_solver",
    "get_solvers",
]

# Where conjugate gradients would take more, Gauss–Newton costs less.
_FEW_ITERATIONS = 30
# Conjugate gradients of pseudo-transient continuation take about so many for one step of Newton's.
_MOST_PASSES = 500

_BY_NAME = {
    "closed_form": ClosedForm,
    "conjugate_gradients": ConjugateGradients,
    "gauss_newton": GaussNewton,
    "nesterov": ErrorDescent,
    "pseudo_transient": PseudoTransient,
    "fixed_point": FixedPoint,
    "flow": FlowToRest,
}


def get_solver(method: str | Solver) -> Solver:
    """Return the solver of a name, or the given one itself.

    **Raises:**

    - `pcdyn.errors.InputError` for an unknown name.
    """
    if isinstance(method, Solver):
        return method
    if not isinstance(method, str) or method not in _BY_NAME:
        known = ", ".join(_BY_NAME)
        raise InputError(
            f"unknown method {method!r}; known are {known}, or pass a value such as "
            "pcdyn.solvers.GradientDescent(dt=0.1)"
        )
    return _BY_NAME[method]()


def get_solvers(method: str | Solver | Sequence[Solver | str]) -> tuple[Solver, ...]:
    """Return the solvers to try in turn, by name or as given.

    **Raises:**

    - `pcdyn.errors.InputError` for what is no name, solver or list.
    """
    if isinstance(method, str | Solver):
        return (get_solver(method),)
    methods = as_sequence(method, "method", "a name, a solver, or a list of solvers")
    if not methods:
        raise InputError("method is an empty list: give at least one solver")
    return tuple(get_solver(each) for each in methods)


# What was chosen for problems of one structure, shapes and dtypes, which decide: to look at their
# energies again in each call of a user would take longer than many a solve.
_CHOSEN: dict[object, tuple[Solver, ...]] = {}
_MOST_CHOSEN = 1000


def default_solvers(problem: InferenceProblem) -> tuple[Solver, ...]:
    """Choose what to try in turn, each where the one before it did not converge.

    A linear network with quadratic energies has a closed form. Otherwise conjugate gradients in
    error coordinates, if both ends are clamped, or each free node of a graph is predicted once,
    from what does not depend on it, the curvature of each hidden energy is known and activations
    have no kinks: they take the fewest passes and are compiled the fastest. They leave to
    Gauss–Newton what is ill-conditioned, as at large output precisions, if the curvature of the
    output's energy is known too; then comes pseudo-transient continuation, for any energy. Other
    graphs begin with Gauss–Newton if a step of it costs less than a few hundred passes by count,
    otherwise with pseudo-transient continuation, whose conjugate gradients take passes alone.
    """
    leaves, structure = jax.tree.flatten(problem)
    kind = structure, tuple((x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves)
    chosen = _CHOSEN.get(kind)
    if chosen is None:
        if len(_CHOSEN) >= _MOST_CHOSEN:
            _CHOSEN.clear()
        chosen = _CHOSEN[kind] = _choose(problem)
    return chosen


def _is_cheap(problem: InferenceProblem) -> bool:
    """Whether a step of Gauss–Newton, by count of multiplications, costs no more than some passes.

    In a chain it always is taken to be, and in error coordinates it takes passes alone.
    """
    if problem.is_chain or has_error_coordinates(problem):
        return True
    graph, widths, free = problem.graph, problem.widths, problem.free_layers
    sizes = dict(zip(free, problem.free_widths, strict=True))
    forming = one_pass = 0.0
    for k, (target, given) in enumerate(zip(graph.targets, graph.sources, strict=True), start=1):
        rows = float(widths[target])
        one_pass += rows * sum(widths[node] for node in given)
        forming += rows * sum(sizes.get(node, 0) for node in nodes_of(problem, k)) ** 2
    step = forming + operations(problem.free_widths, coupled_pairs(problem)) / 3
    return step <= _MOST_PASSES * one_pass


def _choose(problem: InferenceProblem) -> tuple[Solver, ...]:
    if has_linear_flow(problem):
        return (ClosedForm(),)
    smooth = has_error_coordinates(problem.with_prior_as_layer()) and not has_kinks(problem)
    first = smooth and has_curvature(problem, of_output=False)
    return (
        *((ConjugateGradients(max_iterations=_FEW_ITERATIONS),) if first else ()),
        *((GaussNewton(),) if has_curvature(problem) and _is_cheap(problem) else ()),
        PseudoTransient(),
    )
