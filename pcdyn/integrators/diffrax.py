"""Any diffrax solver with any of its step size controllers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pcdyn._support.checks import check_instance, checked_integer
from pcdyn._support.functions import Name
from pcdyn._support.types import Scalar, State
from pcdyn.errors import IntegratorError, Status
from pcdyn.integrators.base import (
    Integration,
    Integrator,
    Interpolation,
    Request,
    UntilEquilibrium,
    check_step,
    check_tolerances,
    default_tolerances,
)
from pcdyn.integrators.scipy import SciPy
from pcdyn.integrators.statistics import Statistics
from pcdyn.model.driven import Interval
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceFlow

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
    """A diffrax solver with a step size controller, on whatever device JAX has.

    **Arguments:**

    - `solver`: a diffrax solver, or a name such as `"tsit5"` (the default), `"dopri8"`,
      `"kvaerno5"` or, for stiff problems, `"rodas5p"` (see `pcdyn.integrators.rosenbrock`).
    - `rtol`, `atol`: tolerances of the adaptive step size; 1e-6 and 1e-9 in float64, 1e-4 and
      1e-6 in float32 unless given, and tighter with `until`, where a solver that hovers at its
      own tolerance would never meet the equilibrium's.
    - `dt`: a fixed step instead, in units of the activity time constant.
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

    solver: str | diffrax.AbstractSolver
    rtol: Scalar | None
    atol: Scalar | None
    dt: Scalar | None
    controller: diffrax.AbstractStepSizeController | None
    max_steps: int = eqx.field(static=True)
    fallback: str | None = eqx.field(static=True)

    def __init__(
        self,
        solver: str | diffrax.AbstractSolver = "tsit5",
        *,
        rtol: Scalar | None = None,
        atol: Scalar | None = None,
        dt: Scalar | None = None,
        controller: diffrax.AbstractStepSizeController | None = None,
        max_steps: int = 2**14,
        fallback: str | None = "LSODA",
    ):
        if not isinstance(solver, str):
            _check_solver(solver)
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
            _check_controller(controller)
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
        """Integrator that takes over where this one gives up, with the same tolerances.

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
    def fixed_step(self) -> Scalar | None:
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

    def _solver(self, problem: Flow) -> diffrax.AbstractSolver:
        """Build the diffrax solver, with the linear algebra that suits the problem."""
        import diffrax

        from pcdyn.integrators import implicit_steps
        from pcdyn.integrators.rosenbrock import Rodas5P

        if self.solver == "rodas5p":
            return Rodas5P(problem if isinstance(problem, InferenceFlow | Interval) else None)
        if not isinstance(self.solver, str):
            return implicit_steps.with_structure(self.solver, problem)
        solver = getattr(diffrax, _SOLVERS[self.solver])()
        fixed = self.dt is not None and implicit_steps.is_implicit(solver)
        if fixed or self.solver == "implicit_euler":
            solver = implicit_steps.with_root_finder(solver, fixed_step=fixed)
        return implicit_steps.with_structure(solver, problem)

    def _root_tolerances(self, request: Request) -> tuple[Scalar, Scalar]:
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

        from pcdyn.integrators.implicit_steps import with_root_tolerances

        flow = problem.prepared()
        solver = with_root_tolerances(
            self._solver(problem), request, *self._root_tolerances(request)
        )
        # Time has the dtype of the state, for their products are added to it.
        dtype = problem.dtype
        times, t1 = request.times.astype(dtype), jnp.asarray(request.t1, dtype)
        dt = None if self.dt is None else jnp.asarray(self.dt, dtype)

        def at_rest(t: Scalar, y: State, args: object = None, **_: object) -> Array:
            assert until is not None, "watched for only where it is"
            return until.reached(t, flow.norms(flow.vector_field(t, y)))

        def too_late(t: Scalar, y: State, args: object = None, **_: object) -> Array:
            return request.is_late(t)

        watched = {
            Status.CONVERGED: None if until is None else at_rest,
            Status.TIME_LIMIT: None if request.deadline is None else too_late,
        }
        conditions = {int(status): each for status, each in watched.items() if each is not None}
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
            event=diffrax.Event(conditions) if conditions else None,
            max_steps=self.max_steps,
            # throw=True would insert a host callback, which keeps JAX from caching the program.
            throw=False,
            adjoint=diffrax.ForwardMode(),
        )
        assert solution.ts is not None and solution.ys is not None, "asked for by saveat"
        states, last = solution.ys
        end_state = jax.tree.map(lambda x: x[0], last)
        end_time: Array = solution.ts[1][0]
        # diffrax fills up with infinity what it does not reach, which jax_debug_infs takes for a
        # failure.
        stats, reached = solution.stats, times <= end_time
        states = tuple(
            jnp.where(reached.reshape(-1, *[1] * x.ndim), saved, x)
            for saved, x in zip(states, end_state, strict=True)
        )
        if conditions:
            # diffrax saves nothing where an event has already happened at the start.
            unmoved = stats["num_steps"] == 0
            states, end_state = jax.tree.map(
                lambda saved, x: jnp.where(unmoved, x, saved), (states, end_state), (state, state)
            )
            end_time = jnp.where(unmoved, 0, end_time)
        return Integration(
            states=states,
            end_time=end_time,
            end_state=end_state,
            status=_status(solution.result, solution.event_mask),
            statistics=Statistics(
                vector_field_evaluations=self._evaluations(solver, stats["num_steps"], until),
                jacobian_evaluations=_jacobian_evaluations(solver, stats["num_steps"]),
                accepted_steps=stats["num_accepted_steps"],
                rejected_steps=stats["num_rejected_steps"],
            ),
            interpolation=_dense_output(solution) if request.dense else None,
        )

    def _controller(self, request: Request, t1: Array) -> diffrax.AbstractStepSizeController:
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

    def _evaluations(
        self, solver: diffrax.AbstractSolver, steps: Array, until: UntilEquilibrium | None
    ) -> Array | None:
        """Count vector-field evaluations; diffrax's implicit solvers do not report theirs."""
        import diffrax

        from pcdyn.integrators.rosenbrock import Rodas5P

        if isinstance(solver, diffrax.AbstractERK):
            tableau = solver.tableau
            assert isinstance(tableau, diffrax.ButcherTableau), "of one vector field"
            stages, reused = tableau.num_stages, int(tableau.fsal)
        elif isinstance(solver, diffrax.Euler):
            stages, reused = 1, 0
        elif isinstance(solver, Rodas5P):
            stages, reused = solver.stages, 0
        else:
            return None
        # And at the start.
        tests = 0 if until is None else steps + 1
        return (stages - reused) * steps + reused + tests


def _check_solver(solver: diffrax.AbstractSolver) -> None:
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


def _check_controller(controller: object) -> None:
    """Raise `IntegratorError` for what is no diffrax step size controller."""
    import diffrax

    kind, wanted = diffrax.AbstractStepSizeController, "a diffrax step size controller"
    check_instance(controller, "controller", kind, wanted, error=IntegratorError)


class _Field(eqx.Module):
    """The vector field of a flow as diffrax calls it."""

    flow: Flow

    def __call__(self, t: Scalar, state: State, args: object) -> State:
        return self.flow.vector_field(t, state)


class _Interpolation(eqx.Module):
    """diffrax's dense output as a function of time."""

    interpolation: diffrax.DenseInterpolation

    def __call__(self, t: Scalar) -> State:
        return self.interpolation.evaluate(t)


def _dense_output(solution: diffrax.Solution) -> Interpolation:
    """Room for steps that were not taken holds a large number instead of infinity, see above."""
    numbers, rest = eqx.partition(solution.interpolation, eqx.is_inexact_array)
    finite = jax.tree.map(lambda x: jnp.where(jnp.isposinf(x), jnp.finfo(x.dtype).max, x), numbers)
    return _Interpolation(eqx.combine(finite, rest))


def largest_sample_rms(error: PyTree) -> Array:
    """Compute the largest root mean square over the units of any one sample."""
    leaves = jax.tree.leaves(error)
    units = sum(x.shape[-1] for x in leaves)
    squares = sum(jnp.sum(jnp.abs(x) ** 2, axis=-1) for x in leaves)
    mean = squares / units
    # The derivative of a square root at zero is infinite, also where the error vanishes exactly.
    zero = mean == 0
    return jnp.max(jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, mean))))


def solver_class(solver: object) -> type[diffrax.AbstractSolver] | None:
    """Find the diffrax class of a solver or of its name; `None` for anything else."""
    import diffrax

    if isinstance(solver, str) and solver == "rodas5p":
        from pcdyn.integrators.rosenbrock import Rodas5P

        return Rodas5P
    if isinstance(solver, str):
        return getattr(diffrax, _SOLVERS[solver]) if solver in _SOLVERS else None
    return type(solver) if isinstance(solver, diffrax.AbstractSolver) else None


def _jacobian_evaluations(solver: diffrax.AbstractSolver, steps: Array) -> Array | int | None:
    """Count one a step for a Rosenbrock method; diffrax's implicit solvers do not report theirs."""
    from pcdyn.integrators.implicit_steps import is_implicit
    from pcdyn.integrators.rosenbrock import Rodas5P

    if isinstance(solver, Rodas5P):
        return steps
    return None if is_implicit(solver) else 0


def _status(result: diffrax.RESULTS, events: dict[int, Array] | None) -> Array:
    """From diffrax' result, and which of the events, by their statuses, has occurred."""
    from diffrax import RESULTS

    code = jnp.asarray(int(Status.SOLVER_FAILED))
    for status, outcome in (
        (Status.REACHED_T1, RESULTS.successful),
        (Status.MAX_STEPS, RESULTS.max_steps_reached),
        (Status.MAX_STEPS, RESULTS.max_steps_rejected),
        (Status.STEP_TOO_SMALL, RESULTS.dt_min_reached),
    ):
        code = jnp.where(result == outcome, int(status), code)
    for event, occurred in (events or {}).items():
        code = jnp.where((result == RESULTS.event_occurred) & occurred, event, code)
    return code
