"""SciPy's `solve_ivp` on the host, with the problem's Jacobian for the implicit methods."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import check_choice, integer
from pcdyn._support.types import Scalar, State, Tree, Values
from pcdyn.errors import DenseOutputError, IntegratorError, Status
from pcdyn.integrators.base import (
    Integration,
    Integrator,
    Interpolation,
    Request,
    UntilEquilibrium,
    check_tolerances,
    default_tolerances,
)
from pcdyn.integrators.host_jacobian import (
    ChainPattern,
    chain_entries,
    deep_entries,
    driven_entries,
)
from pcdyn.integrators.host_steps import Course, march
from pcdyn.integrators.statistics import Statistics
from pcdyn.linearisation.coupling import coupled_pairs
from pcdyn.model.driven import Interval
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceProblem
from pcdyn.model.stacked import StackedProblem

if TYPE_CHECKING:
    import scipy.integrate

_METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
# LAPACK's dense factorisation is quicker where more of one sample's matrix than this is not zero.
_DENSE_SHARE = 0.4
_EVALUATIONS_PER_STEP = {"RK45": 6, "RK23": 3}
SCIPY_NAMES = {method.lower(): method for method in _METHODS}


class SciPy(Integrator):
    """A method of `scipy.integrate.solve_ivp`, in float64 on the host's CPU.

    The state is advanced in float64, the vector field computed in the dtype of the network. Radau,
    BDF and LSODA get the Jacobian of the vector field by automatic differentiation; that of a batch
    or of many layers is handed over as a sparse or banded matrix.

    **Arguments:**

    - `method`: one of RK45, RK23, DOP853, Radau, BDF and LSODA.
    - `rtol`, `atol`: tolerances, with the defaults of `pcdyn.Diffrax`.
    - `max_steps`: after so many steps it gives up, or after 64 times as many evaluations of the
      vector field.
    """

    method: str = eqx.field(static=True, default="LSODA")
    rtol: Scalar | None = None
    atol: Scalar | None = None
    max_steps: int = eqx.field(
        static=True,
        default=2**14,
        converter=integer("max_steps", at_least=1, error=IntegratorError),
    )

    def __check_init__(self) -> None:
        check_choice(self.method, "SciPy's method", _METHODS, error=IntegratorError)
        check_tolerances(self.method, self.rtol, self.atol)

    @property
    def name(self) -> str:
        return self.method

    @property
    def runs_in_jax(self) -> bool:
        return False

    @property
    def fixed_step(self) -> None:
        return None

    @property
    def most_steps(self) -> int:
        return self.max_steps

    def check(self, problem: Flow, until: UntilEquilibrium | None, dense: bool) -> None:
        # SciPy clips a finer rtol with a warning of its own; refuse it by name instead.
        check_tolerances(self.name, self.rtol, self.atol, problem.dtype)

    def integrate(self, request: Request) -> Integration:
        problem, state, until = request.problem, request.state, request.until
        system = _HostSystem(problem, state)
        start = system.flatten(state)
        if until is not None and until.minimum_time == 0 and system.below(0.0, start, until):
            return _at_rest(system, start, request)
        system.tests += 1
        if not np.isfinite(system.field(0.0, start)).all():
            return _failed(system, start, request, Status.NON_FINITE, "")
        rtol, atol = map(float, default_tolerances(self.rtol, self.atol, request))

        def at_rest(t: float, y: np.ndarray) -> bool:
            assert until is not None, "watched for only where it is"
            return bool(t >= until.minimum_time) and system.below(t, y, until)

        with np.errstate(all="ignore"):
            course = march(
                self.method,
                system.field,
                start,
                float(request.t1),
                max_steps=self.max_steps,
                deadline=request.deadline,
                event=None if until is None else at_rest,
                rtol=rtol,
                atol=atol,
                **system.jacobian_options(self.method),
            )
        return self._package(system, course, request)

    def _package(self, system: _HostSystem, course: Course, request: Request) -> Integration:
        end_time, accepted = float(course.times[-1]), len(course.times) - 1
        per_step = _EVALUATIONS_PER_STEP.get(self.method)
        rejected = None if per_step is None else (course.evaluations - 2) // per_step - accepted
        saved = np.asarray(course.sol(np.minimum(np.asarray(request.times), end_time)))
        return Integration(
            states=system.unflatten(saved.T),
            end_time=end_time,
            end_state=system.unflatten(course.end),
            status=int(course.status),
            statistics=Statistics(
                vector_field_evaluations=course.evaluations + system.tests,
                jacobian_evaluations=course.jacobian_evaluations,
                accepted_steps=accepted,
                rejected_steps=rejected,
            ),
            interpolation=None if not request.dense else self._output(system, course, request),
            message=course.message,
        )

    def _output(self, system: _HostSystem, course: Course, request: Request) -> Interpolation:
        from scipy.integrate import OdeSolution

        if isinstance(course.sol, OdeSolution):
            return system.output(course.sol)
        return _Rest(request.state)


class _HostSystem:
    """A problem as SciPy sees it: one flat float64 vector, sample after sample."""

    def __init__(self, problem: Flow, state: State):
        arrays, rest = eqx.partition(problem.prepared(), eqx.is_array)
        self._flow = eqx.combine(_on_cpu(arrays), rest)
        self._widths = tuple(x.shape[-1] for x in state)
        self._batch = state[0].shape[:-1]
        self._dtype = problem.dtype
        self.tests = 0

    def flatten(self, state: State) -> np.ndarray:
        """Return the state as one float64 vector."""
        layers = [np.asarray(x, dtype=np.float64) for x in state]
        return np.concatenate(layers, axis=-1).reshape(-1)

    def unflatten(self, y: np.ndarray) -> State:
        """Return the state of a flat vector, or the states of several with a leading axis."""
        return _unflatten(y, self._widths, self._batch, self._dtype)

    def output(self, solution: scipy.integrate.OdeSolution) -> _DenseOutput:
        """Wrap SciPy's dense output as a function from a time to a state."""
        return _DenseOutput(_Interpolants(solution), self._widths, self._batch, self._dtype)

    def field(self, t: float, y: np.ndarray) -> np.ndarray:
        rows = y.reshape(*self._batch, -1).astype(self._dtype)
        # As an array, time can change without compiling again.
        time = np.asarray(t, self._dtype)
        field = np.asarray(_flat_field(self._flow, self._widths, time, rows), dtype=np.float64)
        return field.reshape(-1)

    def dense_jacobian(self, t: float, y: np.ndarray) -> np.ndarray:
        """Compute ∂(dx/dt)/∂x of one flat vector, shape (N, N)."""
        rows, time = y.reshape(*self._batch, -1).astype(self._dtype), np.asarray(t, self._dtype)
        found = _jacobian(self._flow, self._widths, time, rows)
        return np.asarray(found, dtype=np.float64).reshape(y.size, y.size)

    def jacobian_options(self, method: str) -> dict[str, Any]:
        """Return the arguments of solve_ivp that give the method its Jacobian."""
        if method not in ("Radau", "BDF", "LSODA"):
            return {}
        flow = self._flow
        problem = flow.problem.problem if isinstance(flow, Interval) else flow
        if not isinstance(problem, InferenceProblem | StackedProblem):
            return {"jac": self.dense_jacobian}
        if isinstance(problem, InferenceProblem) and not problem.is_chain:
            pairs = coupled_pairs(problem)
        else:
            layers = range(len(problem.free_layers))
            pairs = [*zip(layers, layers, strict=True), *itertools.pairwise(layers)]
        widths = problem.free_widths
        pattern = ChainPattern(widths, int(np.prod(self._batch, dtype=int)), pairs)
        if not self._batch and pattern.share > _DENSE_SHARE:
            return {"jac": self.dense_jacobian}

        def entries(t: float, y: np.ndarray) -> np.ndarray:
            state = self.unflatten(y)
            if isinstance(flow, Interval):
                time = np.asarray(t, self._dtype)
                return np.asarray(driven_entries(flow, time, state), dtype=np.float64)
            if isinstance(problem, StackedProblem):
                return np.asarray(deep_entries(problem, state), dtype=np.float64)
            return np.asarray(chain_entries(problem, state), dtype=np.float64)

        return pattern.options(method, entries)

    def below(self, t: float, y: np.ndarray, until: UntilEquilibrium) -> bool:
        """Whether the vector field is below the tolerance in every layer and sample."""
        self.tests += 1
        problem = self._flow
        field = self.unflatten(self.field(t, y))
        layers = problem.unpack(field) if isinstance(problem, StackedProblem) else field
        norms = np.stack([np.linalg.norm(layer, axis=-1) for layer in layers], axis=-1)
        return bool(np.all(norms <= np.asarray(until.tolerance)[..., None]))


def _on_cpu(tree: Tree) -> Tree:
    """Move arrays to the CPU, or to JAX's default device where JAX is set to do without a CPU."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return jax.device_put(tree, device)


@eqx.filter_jit
def _flat_field(flow: Flow, widths: tuple[int, ...], t: Scalar, rows: Values | np.ndarray) -> Array:
    state = tuple(jnp.split(rows, np.cumsum(widths)[:-1], axis=-1))
    return jnp.concatenate(flow.vector_field(t, state), axis=-1)


@eqx.filter_jit
def _jacobian(flow: Flow, widths: tuple[int, ...], t: Scalar, rows: Values | np.ndarray) -> Array:
    return jax.jacfwd(lambda y: _flat_field(flow, widths, t, y))(rows)


def _unflatten(
    y: np.ndarray, widths: tuple[int, ...], batch: tuple[int, ...], dtype: np.dtype
) -> State:
    rows = y.reshape(*y.shape[:-1], *batch, sum(widths)).astype(dtype)
    return cast(State, tuple(np.split(rows, np.cumsum(widths)[:-1], axis=-1)))


class _Interpolants:
    """SciPy's dense output as a value: equal where it gives the same states."""

    def __init__(self, solution: scipy.integrate.OdeSolution):
        self.solution = solution

    def _key(self) -> tuple[bytes, bytes]:
        times = self.solution.ts
        return times.tobytes(), self.solution((times[1:] + times[:-1]) / 2).tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Interpolants) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


class _DenseOutput(eqx.Module):
    """SciPy's dense output as a function from a time to a state; no leaf of a pytree."""

    interpolants: _Interpolants = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)
    batch: tuple[int, ...] = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    def __call__(self, t: Scalar) -> State:
        if is_traced(t):
            raise DenseOutputError(
                "SciPy's dense output is evaluated on the host, which JAX cannot transform: "
                "integrate with diffrax, or evaluate at known times"
            )
        y = self.interpolants.solution(float(t))
        return _unflatten(y, self.widths, self.batch, self.dtype)


class _Rest(eqx.Module):
    """Dense output of a run that did not leave its start."""

    state: State

    def __call__(self, t: Scalar) -> State:
        return self.state


def _at_rest(system: _HostSystem, start: np.ndarray, request: Request) -> Integration:
    return _unmoved(system, start, request, int(Status.CONVERGED), Statistics(1, 0, 0, 0))


def _failed(
    system: _HostSystem, start: np.ndarray, request: Request, status: Status, message: str
) -> Integration:
    return _unmoved(system, start, request, int(status), Statistics(), message)


def _unmoved(
    system: _HostSystem,
    start: np.ndarray,
    request: Request,
    status: int,
    statistics: Statistics,
    message: str = "",
) -> Integration:
    state = system.unflatten(start)
    saved = system.unflatten(np.tile(start, (len(request.times), 1)))
    interpolation = _Rest(state) if request.dense else None
    return Integration(saved, 0.0, state, status, statistics, interpolation, message=message)
