"""`equilibrium`: find where inference ends, to a stated residual, and say if it was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from pcdyn.checks import Numbers, is_traced
from pcdyn.energy import LayerEnergies
from pcdyn.errors import (
    EquilibriumStatus,
    InputError,
    NotConvergedError,
    ShapeError,
    Statuses,
    ToleranceError,
)
from pcdyn.hessian import solve_hessian
from pcdyn.integrators.run import on_host
from pcdyn.kinks import SlidingPoint
from pcdyn.problem import InferenceProblem, State
from pcdyn.solvers import FlowToRest, Solution, Solver, default_solvers, get_solver
from pcdyn.solvers.run import solve_in_turn, solve_on_host
from pcdyn.stacked import StackedProblem, stacked
from pcdyn.states import layer_norms
from pcdyn.timing import Stopwatch


class Equilibrium(LayerEnergies):
    """Where inference ends, and how surely.

    Arrays are NumPy arrays on the host (JAX arrays under a transformation). Axes are the sample,
    if there is a batch, then units or layers.

    - `activities`: `activities[l]` is layer l = 0 … L, clamped layers included.
    - `prediction_errors`: `prediction_errors[l - 1]` is ε_l of layer l = 1 … L.
    - `energies`: E_1 … E_L, shape `([batch,] L)`.
    - `residual_norms`: ‖∂F/∂x_l‖ of each free layer, shape `([batch,] free layers)`, computed
      again from the activities after the solver has ended.
    - `tolerance`: what the residual of every layer was to be.
    - `status_codes`: a `pcdyn.EquilibriumStatus` as an integer, per sample.
    - `at_kink`: `at_kink[l - 1]` says which units of layer l = 1 … L have their preactivation at a
      kink of the activation, for samples with the status `SLIDING`; there `residual_norms` are
      those of the smallest generalised gradient.
    - `iterations`: of the last solver that worked on the sample.
    - `passes`: forward, backward and tangent passes through the network, per sample; one
      evaluation of the vector field takes two.
    - `start`: the state that the search began from. `problem`: what was solved.
    - `method`: the solvers that ran, in turn. `message`: how it ended.
    """

    problem: InferenceProblem
    start: State
    activities: tuple[Any, ...]
    prediction_errors: tuple[Any, ...]
    energies: Any
    residual_norms: Any
    tolerance: Any
    status_codes: Any
    at_kink: tuple[Any, ...]
    iterations: Any
    passes: Any
    compile_seconds: Any = 0.0
    run_seconds: Any = 0.0
    method: str = eqx.field(static=True, default="")
    message: str = eqx.field(static=True, default="")

    @property
    def status(self) -> EquilibriumStatus | tuple[EquilibriumStatus, ...]:
        """How it ended: one status, or one per sample of a batch."""
        codes = np.asarray(self.status_codes)
        if codes.ndim == 0:
            return EquilibriumStatus(int(codes))
        if codes.ndim > 1:
            raise ShapeError(
                "this is an equilibrium of several networks: take one first, such as "
                "jax.tree.map(lambda x: x[0], equilibrium)"
            )
        return Statuses(EquilibriumStatus(int(code)) for code in codes)

    @property
    def ok(self) -> bool:
        """Whether every sample is at an equilibrium."""
        return all(EquilibriumStatus(int(code)).ok for code in np.ravel(self.status_codes))

    @property
    def state(self) -> State:
        """The free layers of `activities`."""
        return self.problem.state_of(self.activities)

    def basin(
        self,
        *,
        flow: FlowToRest | None = None,
        perturbation: float = 0.0,
        key: Any = None,
        tolerance: float = 1e-2,
    ) -> Basin:
        """Follow the gradient flow from the start and see whether it ends here.

        Arguments: `flow`, how to integrate it; `perturbation`, the standard deviation of Gaussian
        noise added to the start, drawn with `key`: does the neighbourhood of the start end here
        too?; `tolerance` of the distance, relative to the way from the start to this equilibrium.

        A flow that does not come to rest, as along a kink, raises nothing: see `settled`. Raises
        `InputError` for a negative perturbation or one without a key.
        """
        start = self.start
        if not perturbation >= 0:
            raise InputError(f"perturbation must not be negative, got {perturbation}")
        if perturbation > 0:
            if key is None:
                raise InputError("a perturbation is drawn at random: give a key")
            keys = jr.split(key, len(start))
            start = tuple(
                x + perturbation * jr.normal(k, x.shape, x.dtype)
                for k, x in zip(keys, start, strict=True)
            )
        rest = equilibrium(
            self.problem,
            method=FlowToRest() if flow is None else flow,
            initial=start,
            tolerance=float(self.tolerance),
            throw=False,
        )
        distance = _distance(rest.state, self.state)
        displacement = _distance(self.start, self.state)
        settled = np.isin(rest.status_codes, [s for s in EquilibriumStatus if s.ok])
        agrees = distance <= tolerance * displacement + float(self.tolerance)
        return Basin(agrees, settled, distance, displacement, rest)

    def __repr__(self) -> str:
        if is_traced(self.energies) or np.ndim(self.energies) > 2:
            return f"Equilibrium of several networks by {self.method}"
        widths = [x.shape[-1] for x in self.activities]
        samples = "one sample" if np.ndim(self.energies) == 1 else f"{len(self.energies)} samples"
        return "\n".join(
            [
                f"Equilibrium of {widths} units, {samples}, by {self.method}",
                f"  {self.message}",
                f"  largest residual {np.max(self.residual_norms):.2g} (tolerance "
                f"{float(self.tolerance):.2g}), free energy {np.mean(self.free_energy):.4g}",
                f"  iterations at most {np.max(self.iterations)}, passes at most "
                f"{np.max(self.passes)}",
                f"  compiled in {self.compile_seconds:.2f} s, ran in {self.run_seconds:.3g} s",
            ]
        )


class Basin(eqx.Module):
    """Whether the gradient flow ends at an equilibrium, per sample.

    - `agrees`: it ends within the tolerance of it.
    - `settled`: it came to rest at all.
    - `distance` from where it ended to the equilibrium, `displacement` from the start to the
      equilibrium.
    - `rest`: where it ended.
    """

    agrees: Any
    settled: Any
    distance: Any
    displacement: Any
    rest: Equilibrium


def _distance(a: State, b: State) -> Any:
    squares = [np.sum((np.asarray(x) - np.asarray(y)) ** 2, -1) for x, y in zip(a, b, strict=True)]
    return np.sqrt(sum(squares))


def equilibrium(
    problem: InferenceProblem,
    *,
    method: str | Solver | Sequence[Solver] | None = None,
    initial: str | Sequence[Numbers] = "feedforward",
    tolerance: float | None = None,
    throw: bool = True,
) -> Equilibrium:
    """The equilibrium that inference from `initial` leads to, with its residual.

    Arguments:

    - `method`: a name (`"gauss_newton"`, `"pseudo_transient"`, `"flow"`, …), a value such as
      `pcdyn.solvers.GaussNewton(max_iterations=20)`, or several values to try in turn, each on
      the samples where the one before it did not converge. Unless given: the closed form of a
      linear network; otherwise Gauss–Newton, then Nesterov in error coordinates, then
      pseudo-transient continuation.
    - `initial`: `"feedforward"`, `"zeros"` or a state.
    - `tolerance` of ‖∂F/∂x_l‖ in every free layer and sample, absolute; 1e-6 in float64 and 1e-4
      in float32 unless given.
    - `throw`: raise `pcdyn.NotConvergedError` if any sample has not converged, with what was found
      in its `equilibrium`; with `throw=False` the status says so instead.

    A nonlinear network can have several equilibria; `Equilibrium.basin` checks whether the flow
    leads to this one. It can be differentiated by `jax.grad` and `jax.jvp` with respect to
    weights, precisions and data, by the implicit function theorem; under `jax.jit`, `jax.vmap`
    and `jax.grad` nothing is raised.

    Raises `ToleranceError` and what the problem, the solver and the initial state raise, before
    anything runs.
    """
    solvers = _solvers(method, problem)
    for solver in solvers:
        solver.check(problem)
    tolerance = _checked_tolerance(tolerance, problem.network.dtype)
    start = problem.initial_state(initial)
    batched, state = _with_batch(problem, start)
    if is_traced(problem, start):
        frozen = jax.lax.stop_gradient(eqx.filter((batched, state), eqx.is_array))
        frozen = eqx.combine(frozen, (batched, state))
        solution, ran = solve_in_turn(*frozen, solvers, tolerance)
        solution = eqx.tree_at(
            lambda s: s.state, solution, _with_derivatives(batched, solution.state)
        )
        observed = _observe(batched, solution.state)
        return _build(problem, start, solution, observed, tolerance, ran)
    with Stopwatch() as clock:
        solution, sliding, ran = solve_on_host(batched, state, solvers, tolerance)
        # Copies, for the sliding samples get other numbers.
        observed = jax.tree.map(np.array, _observe(batched, solution.state))
        found = _build(
            on_host(problem), on_host(start), solution, observed, tolerance, ran, sliding
        )
    found = _with_message(found, clock)
    if throw and not found.ok:
        raise NotConvergedError(f"{found.method}: {found.message}", found)
    return found


def _solvers(
    method: str | Solver | Sequence[Solver] | None, problem: InferenceProblem
) -> tuple[Solver, ...]:
    if method is None:
        return default_solvers(problem)
    if isinstance(method, str | Solver):
        return (get_solver(method),)
    if not isinstance(method, list | tuple) or not method:
        raise InputError(f"method is {method!r}: give a name, a solver, or a list of solvers")
    return tuple(get_solver(each) for each in method)


def _checked_tolerance(tolerance: float | None, dtype: Any) -> float:
    if tolerance is None:
        return 1e-6 if dtype == jnp.float64 else 1e-4
    if not 0 < tolerance < float("inf"):
        raise ToleranceError(f"tolerance must be positive and finite, got {tolerance}")
    return float(tolerance)


def _with_batch(problem: InferenceProblem, state: State) -> tuple[InferenceProblem, State]:
    """A single sample as a batch of one."""
    if state[0].ndim == 2:
        return problem, state
    data = (problem.input, problem.output)
    input, output, state = jax.tree.map(lambda x: x[None], (*data, state))
    return problem.with_data(input, output), state


@eqx.filter_jit
def _observe(problem: InferenceProblem, state: State) -> tuple[Any, Any, Any]:
    deep = stacked(problem)
    if not isinstance(deep, StackedProblem):
        errors = problem.prediction_errors(problem.activities(state))
        return errors, problem.energies_of(errors), layer_norms(problem.gradient(state))
    together = deep.pack(state)
    errors, energies = deep.observe(together)
    return deep.unpack_errors(errors), energies, deep.norms(deep.gradient(together))


def _build(
    problem: InferenceProblem,
    start: State,
    solution: Solution,
    observed: tuple[Any, Any, Any],
    tolerance: Any,
    ran: str,
    sliding: dict[int, SlidingPoint] | None = None,
) -> Equilibrium:
    """What follows from the solution; a solver's claim to have converged is checked."""
    errors, energies, residuals = observed
    xp = np if isinstance(energies, np.ndarray) else jnp
    at_kink = tuple(xp.zeros(error.shape, bool) for error in errors)
    resting = xp.all(residuals <= tolerance, axis=-1)
    claimed = solution.status == EquilibriumStatus.CONVERGED
    doubted = xp.where(claimed, int(EquilibriumStatus.STALLED), solution.status)
    # A slope can vanish because the energy it is of has overflowed.
    finite = xp.all(xp.isfinite(residuals), axis=-1) & xp.all(xp.isfinite(energies), axis=-1)
    doubted = xp.where(finite, doubted, int(EquilibriumStatus.NON_FINITE))
    status = xp.where(resting & finite, int(EquilibriumStatus.CONVERGED), doubted)
    for sample, point in (sliding or {}).items():
        # A point with no unit at a kink is an equilibrium like any other.
        slides = any(mask.any() for mask in point.at_kink)
        if slides and status[sample] != EquilibriumStatus.CONVERGED:
            status[sample] = EquilibriumStatus.SLIDING
            residuals[sample] = point.residual_norms
        for mask, units in zip(at_kink, point.at_kink, strict=True):
            mask[sample] = units
    parts = (solution.state, errors, energies, residuals, status, at_kink, solution.iterations,
             solution.passes)  # fmt: skip
    if start[0].ndim == 1:
        parts = jax.tree.map(lambda x: x[0], parts)
    state, errors, energies, residuals, status, at_kink, iterations, passes = parts
    return Equilibrium(
        problem=problem, start=start, activities=problem.activities(state),
        prediction_errors=errors, energies=energies, residual_norms=residuals,
        tolerance=tolerance, status_codes=status, at_kink=at_kink, iterations=iterations,
        passes=passes,
        method=ran,
    )  # fmt: skip


def _with_message(found: Equilibrium, clock: Stopwatch) -> Equilibrium:
    codes = np.atleast_1d(found.status_codes)
    counts = [(int(np.sum(codes == s)), s) for s in EquilibriumStatus if np.any(codes == s)]
    text = "; ".join(f"{status.name} {count} of {codes.size}: {status.explanation}"
                     for count, status in counts)  # fmt: skip
    return dataclasses.replace(
        found,
        message=text,
        compile_seconds=clock.compile_seconds,
        run_seconds=clock.run_seconds,
    )


@eqx.filter_custom_jvp
def _with_derivatives(problem: InferenceProblem, state: State) -> State:
    """`state`, an equilibrium of a batched problem, with the derivatives of an equilibrium.

    `∂F/∂x(x*, θ) = 0` gives `dx*/dθ = −(∂²F/∂x²)⁻¹ ∂²F/∂x∂θ`.
    """
    return state


@_with_derivatives.def_jvp
def _implicit_jvp(primals: Any, tangents: Any) -> Any:
    problem, state = primals
    tangent, _ = tangents
    _, change = eqx.filter_jvp(lambda p: p.gradient(state), (problem,), (tangent,))
    return state, jax.tree.map(jnp.negative, solve_hessian(problem, state, change))
