"""Any diffrax solver with any of its step size controllers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pcdyn._support.checks import check_instance, checked_integer
from pcdyn._support.functions import Name
from pcdyn._support.types import State
from pcdyn.errors import IntegratorError, Status
from pcdyn.integrators.base import (
    Integration,
    Integrator,
    Request,
    UntilEquilibrium,
    check_step,
    check_tolerances,
    default_tolerances,
    largest_activity,
)
from pcdyn.integrators.scipy import SciPy
from pcdyn.integrators.statistics import Statistics
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceFlow
from pcdyn.model.stacked import StackedProblem

if TYPE_CHECKING:
    import diffrax

# diffrax is imported where it is used, so that the SciPy path starts without it.
_SOLVERS = {
    "euler": "Euler",
    "heun": "Heun",
    "midpoint": "Midpoint",
    "ralston": "Ralston",
    "bosh3": "Bosh3",
    "tsit5": "Tsit5",
    "dopri5": "Dopri5",
    "dopri8": "Dopri8",
    "implicit_euler": "ImplicitEuler",
    "kvaerno3": "Kvaerno3",
    "kvaerno4": "Kvaerno4",
    "kvaerno5": "Kvaerno5",
    "rodas5p": "Rodas5P",
}
DIFFRAX_NAMES = tuple(name for name in _SOLVERS if name != "euler")


class Diffrax(Integrator):
    """Integrate with a diffrax solver, on whatever device JAX has.

    Arguments:

    - `solver`: a diffrax solver, or a name such as `"tsit5"` (the default), `"dopri8"`,
      `"kvaerno5"` or, for stiff problems, `"rodas5p"` (see `pcdyn.integrators.rosenbrock`).
    - `rtol`, `atol`: tolerances of the adaptive step size; 1e-6 and 1e-9 in float64, 1e-4 and
      1e-6 in float32 unless given, and tighter with `until`, where a solver that hovers at its
      own tolerance would never meet the equilibrium's.
    - `dt`: a fixed step instead.
    - `controller`: any diffrax step size controller instead, with its own tolerances.
    - `max_steps`: after so many steps it gives up.
    - `fallback`: the SciPy method that takes over, and says so, where an adaptive method runs out
      of steps or its step vanishes; `None` switches it off.

    The error of a batch is the largest error of any of its samples, each the root mean square
    over units: one sample is integrated as exactly among 256 as alone. Saved times are
    interpolated by the method's dense output, whose order can be lower than that of the steps.

    Implicit solvers and Rodas5P factorise one block-tridiagonal matrix for each sample of an
    `InferenceProblem`; a diffrax solver whose root finder was given another linear solver than
    lineax's default keeps it. Of any other flow the matrix is dense.
    """

    solver: Any
    rtol: Any
    atol: Any
    dt: Any
    controller: Any
    max_steps: int = eqx.field(static=True)
    fallback: str | None = eqx.field(static=True)

    def __init__(
        self,
        solver: str | diffrax.AbstractSolver = "tsit5",
        *,
        rtol: float | None = None,
        atol: float | None = None,
        dt: float | None = None,
        controller: diffrax.AbstractStepSizeController | None = None,
        max_steps: int = 2**14,
        fallback: str | None = "LSODA",
    ):
        if not isinstance(solver, str):
            check_solver(solver)
        elif solver not in _SOLVERS:
            raise IntegratorError(
                f"unknown diffrax solver {solver!r}; known names are {', '.join(_SOLVERS)}, or "
                "pass a diffrax solver"
            )
        if (dt is not None or controller is not None) and (rtol is not None or atol is not None):
            chosen = "dt" if dt is not None else "controller"
            raise IntegratorError(f"Diffrax would ignore rtol and atol next to {chosen}")
        if dt is not None and controller is not None:
            raise IntegratorError("Diffrax takes a fixed step dt or a controller, not both")
        max_steps = checked_integer(max_steps, "max_steps", at_least=1, error=IntegratorError)
        if controller is not None:
            check_controller(controller)
        check_tolerances("Diffrax", rtol, atol)
        if fallback is not None:
            SciPy(fallback)  # refuses an unknown one
        if dt is not None:
            check_step("Diffrax", dt)
        self.solver = Name(solver) if isinstance(solver, str) else solver
        self.rtol, self.atol, self.dt = rtol, atol, dt
        self.controller, self.max_steps, self.fallback = controller, max_steps, fallback

    @property
    def name(self) -> str:
        label = (
            str(self.solver) if isinstance(self.solver, str) else type(self.solver).__name__.lower()
        )
        return label if self.dt is None else f"{label} with fixed step"

    @property
    def successor(self) -> SciPy | None:
        """What takes over where this one gives up, with the same tolerances.

        Nothing does for a fixed step, or for a controller whose tolerances are unknown.
        """
        import diffrax

        if self.fallback is None or self.dt is not None:
            return None
        if self.controller is None:
            return SciPy(self.fallback, rtol=self.rtol, atol=self.atol)
        if isinstance(self.controller, diffrax.PIDController):
            rtol, atol = float(self.controller.rtol), float(self.controller.atol)
            return SciPy(self.fallback, rtol=rtol, atol=atol)
        return None

    @property
    def runs_in_jax(self) -> bool:
        return True

    @property
    def fixed_step(self) -> Any:
        return self.dt

    def check(self, problem: Flow, until: UntilEquilibrium | None, dense: bool) -> None:
        import diffrax

        check_tolerances(self.name, self.rtol, self.atol, problem.dtype)
        if isinstance(self.solver, diffrax.HalfSolver):
            raise IntegratorError(
                "diffrax cannot run HalfSolver without reverse-mode derivatives; choose a solver "
                "with an error estimate of its own"
            )
        adaptive = isinstance(self._solver(problem), diffrax.AbstractAdaptiveSolver)
        if self.dt is None and self.controller is None and not adaptive:
            raise IntegratorError(
                f"{self.name} has no error estimate and cannot adapt its step: give dt"
            )

    @property
    def most_steps(self) -> int:
        return self.max_steps

    def _solver(self, problem: Flow) -> Any:
        """The diffrax solver, with the linear algebra that suits the problem."""
        import diffrax

        from pcdyn.integrators.rosenbrock import Rodas5P

        if self.solver == "rodas5p":
            return Rodas5P(problem if isinstance(problem, InferenceFlow) else None)
        if not isinstance(self.solver, str):
            return _with_structure(self.solver, problem)
        solver: Any = getattr(diffrax, _SOLVERS[self.solver])()
        fixed = self.dt is not None and _is_implicit(solver)
        if fixed or self.solver == "implicit_euler":
            from optimistix import Chord

            from pcdyn.integrators.newton import PatientNewton

            # The chord method gives up where it cannot ask for a smaller step.
            kind = diffrax.with_stepsize_controller_tols(PatientNewton if fixed else Chord)
            solver = dataclasses.replace(solver, root_finder=kind(cauchy_termination=False))
        return _with_structure(solver, problem)

    def _root_tolerances(self, request: Request) -> tuple[Any, Any]:
        """Relative and absolute tolerance of an implicit step's root finder.

        Those of the step size; for a fixed step √eps, for Newton's method converges quadratically:
        a correction of √eps leaves an error of eps.
        """
        import diffrax

        if isinstance(self.controller, diffrax.AbstractAdaptiveStepSizeController):
            return self.controller.rtol, self.controller.atol
        if self.dt is None and self.controller is None:
            return default_tolerances(self.rtol, self.atol, request)
        return float(jnp.finfo(request.problem.dtype).eps) ** 0.5, 0.0

    def integrate(self, request: Request) -> Integration:
        problem, state, until = request.problem, request.state, request.until
        import diffrax

        flow = problem.prepared()
        solver = _with_root_tolerances(
            self._solver(problem), request, *self._root_tolerances(request)
        )
        # Time has the dtype of the state, for their products are added to it.
        dtype = problem.dtype
        times, t1 = request.times.astype(dtype), jnp.asarray(request.t1, dtype)
        dt = None if self.dt is None else jnp.asarray(self.dt, dtype)

        def at_rest(t: Any, y: State, args: Any = None, **_: Any) -> Any:
            assert until is not None, "watched for only where it is"
            return until.reached(t, flow.norms(flow.vector_field(t, y)))

        event = None if until is None else diffrax.Event(at_rest)
        saveat = diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(ts=times), diffrax.SubSaveAt(t1=True)],
            dense=request.dense,
        )
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_Field(flow)),
            solver,
            jnp.zeros((), dtype),
            t1,
            dt,
            state,
            saveat=saveat,
            stepsize_controller=self._controller(request, t1),
            event=event,
            max_steps=self.max_steps,
            # throw=True would insert a host callback, which keeps JAX from caching the program.
            throw=False,
            adjoint=diffrax.ForwardMode(),
        )
        states, last = cast(Any, solution.ys)
        end_state = jax.tree.map(lambda x: x[0], last)
        end_time, status = cast(Any, solution.ts)[1][0], _status(solution.result)
        # diffrax fills up with infinity what it does not reach, which jax_debug_infs takes for a
        # failure.
        reached = times <= end_time
        states = tuple(
            jnp.where(reached.reshape(-1, *[1] * x.ndim), saved, x)
            for saved, x in zip(states, end_state, strict=True)
        )
        if until is not None:
            # diffrax saves nothing where the event has already happened at the start.
            unmoved = at_rest(0.0, state)
            states, end_state = jax.tree.map(
                lambda saved, x: jnp.where(unmoved, x, saved), (states, end_state), (state, state)
            )
            end_time = jnp.where(unmoved, 0, end_time)
        stats = solution.stats
        return Integration(
            states=states,
            end_time=end_time,
            end_state=end_state,
            status=status,
            statistics=Statistics(
                vector_field_evaluations=self._evaluations(solver, stats["num_steps"], until),
                jacobian_evaluations=_jacobian_evaluations(solver, stats["num_steps"]),
                accepted_steps=stats["num_accepted_steps"],
                rejected_steps=stats["num_rejected_steps"],
            ),
            interpolation=_dense_output(solution) if request.dense else None,
        )

    def _controller(self, request: Request, t1: Any) -> Any:
        import diffrax

        if self.controller is not None:
            return self.controller
        if self.dt is not None:
            return diffrax.ConstantStepSize()
        tolerances = default_tolerances(self.rtol, self.atol, request)
        rtol, atol = (jnp.asarray(tolerance, t1.dtype) for tolerance in tolerances)
        # Far below what time can resolve: a step gets there only where none is small enough.
        smallest = jnp.finfo(t1.dtype).eps ** 2 * t1
        return diffrax.PIDController(
            rtol, atol, norm=largest_sample_rms, dtmin=smallest, force_dtmin=False
        )

    def _evaluations(self, solver: Any, steps: Any, until: UntilEquilibrium | None) -> Any:
        """Vector-field evaluations of an explicit method; others do not report theirs."""
        import diffrax

        if isinstance(solver, diffrax.AbstractERK):
            tableau: Any = solver.tableau
            stages, reused = tableau.num_stages, int(tableau.fsal)
        elif isinstance(solver, diffrax.Euler):
            stages, reused = 1, 0
        elif self.solver == "rodas5p":
            stages, reused = solver.stages, 0
        else:
            return None
        # At the start twice: for a start at rest, and by diffrax.
        tests = 0 if until is None else steps + 2
        return (stages - reused) * steps + reused + tests


def check_solver(solver: Any) -> None:
    """Raise `IntegratorError` for what is no diffrax solver, or one that no gradient flow suits."""
    import diffrax

    wanted = 'a name such as "tsit5", or a diffrax solver'
    check_instance(solver, "solver", diffrax.AbstractSolver, wanted, error=IntegratorError)
    if solver.term_structure not in (diffrax.AbstractTerm, diffrax.ODETerm):
        raise IntegratorError(
            f"{type(solver).__name__} is for several vector fields at once (implicit-explicit, "
            "symplectic, stochastic …), but the flow has one: choose another, such as "
            "diffrax.Tsit5() or diffrax.Kvaerno5()"
        )


def check_controller(controller: Any) -> None:
    """Raise `IntegratorError` for what is no diffrax step size controller."""
    import diffrax

    kind, wanted = diffrax.AbstractStepSizeController, "a diffrax step size controller"
    check_instance(controller, "controller", kind, wanted, error=IntegratorError)


class _Field(eqx.Module):
    """The vector field of a flow as diffrax calls it."""

    flow: Flow

    def __call__(self, t: Any, state: State, args: Any) -> State:
        return self.flow.vector_field(t, state)


class _Interpolation(eqx.Module):
    """diffrax's dense output as a function of time."""

    interpolation: Any

    def __call__(self, t: Any) -> State:
        return self.interpolation.evaluate(t)


def _dense_output(solution: Any) -> _Interpolation:
    """Room for steps that were not taken holds a large number instead of infinity, see above."""

    def finite(x: Any) -> Any:
        known = eqx.is_inexact_array(x)
        return jnp.where(jnp.isposinf(x), jnp.finfo(x.dtype).max, x) if known else x

    return _Interpolation(jax.tree.map(finite, solution.interpolation))


def largest_sample_rms(error: Any) -> Any:
    """The largest root mean square over the units of any one sample."""
    leaves = jax.tree.leaves(error)
    units = sum(x.shape[-1] for x in leaves)
    squares = sum(jnp.sum(jnp.abs(x) ** 2, axis=-1) for x in leaves)
    mean = squares / units
    # The derivative of a square root at zero is infinite, also where the error vanishes exactly.
    zero = mean == 0
    return jnp.max(jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, mean))))


def solver_class(solver: Any) -> type | None:
    """The diffrax class of a solver or of its name; `None` for anything else."""
    import diffrax

    if isinstance(solver, str) and solver == "rodas5p":
        from pcdyn.integrators.rosenbrock import Rodas5P

        return Rodas5P
    if isinstance(solver, str):
        return getattr(diffrax, _SOLVERS[solver]) if solver in _SOLVERS else None
    return type(solver) if isinstance(solver, diffrax.AbstractSolver) else None


def _with_structure(solver: Any, problem: Flow) -> Any:
    """An implicit solver whose root finder knows how layers and samples couple.

    A linear solver that the user chose stays, and so does the dense one of any other flow.
    """
    from lineax import AutoLinearSolver

    if not (_is_implicit(solver) and isinstance(problem, InferenceFlow)):
        return solver
    finder = solver.root_finder
    if not isinstance(getattr(finder, "linear_solver", None), AutoLinearSolver):
        return solver
    from pcdyn.integrators.structured import ChainSolver

    widths = problem.free_widths if isinstance(problem, StackedProblem) else None
    chosen = ChainSolver(problem.state_time_constants, widths)
    finder = eqx.tree_at(lambda f: f.linear_solver, finder, chosen)
    return dataclasses.replace(solver, root_finder=finder)


# Hairer & Wanner (Solving ODEs II, IV.8) stop at a hundredth to a tenth of the tolerance. Below it
# round-off of a stiff field can keep corrections from shrinking, in float32 below the tolerance.
_SMALL_CORRECTION = 0.1
_SMALL_CORRECTION_SINGLE = 1.0


def _with_root_tolerances(solver: Any, request: Request, rtol: Any, atol: Any) -> Any:
    """An implicit solver whose root finder measures corrections by the size of the activities.

    The unknowns of an implicit step are increments of the state, which vanish at equilibrium: an
    error relative to them is finer than the field is known in, the finer the stiffer. A root finder
    with tolerances of its own keeps them.
    """
    from optimistix import max_norm

    if not _is_implicit(solver):
        return solver
    finder = solver.root_finder
    # diffrax marks what it would fill in from the step size controller by one object.
    if isinstance(getattr(finder, "rtol", 0.0), float | int | np.ndarray | jax.Array):
        return solver
    dtype = request.problem.dtype
    scale = largest_activity(request)
    tolerances = jnp.asarray(rtol, dtype), jnp.asarray(atol + rtol * scale, dtype)
    small = _SMALL_CORRECTION if dtype == jnp.float64 else _SMALL_CORRECTION_SINGLE

    def correction_norm(correction: Any) -> Any:
        """The largest entry, or zero, which ends the iteration, where that is small."""
        norm = max_norm(correction)
        return jnp.where(norm < small, 0, norm)

    finder = eqx.tree_at(lambda f: (f.rtol, f.atol, f.norm), finder, (*tolerances, correction_norm))
    return dataclasses.replace(solver, root_finder=finder)


def _jacobian_evaluations(solver: Any, steps: Any) -> Any:
    """One a step for a Rosenbrock method; diffrax's implicit solvers do not report theirs."""
    from pcdyn.integrators.rosenbrock import Rodas5P

    if isinstance(solver, Rodas5P):
        return steps
    return None if _is_implicit(solver) else 0


def _is_implicit(solver: Any) -> bool:
    import diffrax

    return isinstance(solver, diffrax.AbstractImplicitSolver)


def _status(result: Any) -> Any:
    from diffrax import RESULTS

    code = jnp.asarray(int(Status.SOLVER_FAILED))
    for status, outcome in (
        (Status.REACHED_T1, RESULTS.successful),
        (Status.CONVERGED, RESULTS.event_occurred),
        (Status.MAX_STEPS, RESULTS.max_steps_reached),
        (Status.MAX_STEPS, RESULTS.max_steps_rejected),
        (Status.STEP_TOO_SMALL, RESULTS.dt_min_reached),
    ):
        code = jnp.where(result == outcome, int(status), code)
    return code
