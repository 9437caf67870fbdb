"""`equilibrium`: find where inference ends, to a stated residual, and say if it was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import check_flag, check_instance, check_key, checked_number
from pcdyn._support.namespaces import array_namespace
from pcdyn._support.timing import Stopwatch
from pcdyn._support.types import Activities, HostValues, Numbers, Scalar, State, Values
from pcdyn.equilibria.solvers import FlowToRest, Solver, default_solvers, get_solvers
from pcdyn.equilibria.solvers.run import (
    Observed,
    Ran,
    observe,
    solve_in_turn,
    solve_on_host,
    with_numbers_as_arrays,
    within_round_off,
)
from pcdyn.errors import (
    EquilibriumStatus,
    InputError,
    NotConvergedError,
    Statuses,
    ToleranceError,
    all_well,
    status_counts,
)
from pcdyn.integrators.run import on_host
from pcdyn.linearisation.hessian import with_derivatives
from pcdyn.model.energies.energy import LayerEnergies
from pcdyn.model.problem import InferenceProblem, check_problem

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.lines
    import xarray


class Equilibrium(LayerEnergies):
    """An equilibrium of inference, with the residual that is left and a status per sample.

    Arrays are NumPy arrays on the host (JAX arrays under a transformation). Axes are the sample,
    if there is a batch, then units or layers.

    - `activities`: `activities[l]` is layer l = 0 … L, clamped layers included.
    - `prediction_errors`: `prediction_errors[l - 1]` is ε_l of layer l = 1 … L. With a prior on
      the input that of layer 0 comes first, here, in `energies` and in `at_kink`.
    - `energies`: E_1 … E_L, shape `([batch,] L)`.
    - `residual_norms`: ‖∂F/∂x_l‖ of each free layer, shape `([batch,] free layers)`, computed
      again from the activities after the solver has ended.
    - `tolerance`: what each of them was to be, of the same shape. Where the solver could come no
      nearer it is the round-off of the gradient, if that is larger.
    - `status_codes`: a `pcdyn.EquilibriumStatus` as an integer, per sample.
    - `at_kink`: `at_kink[l - 1]` says which units of layer l = 1 … L have their preactivation at a
      kink of the activation, for samples with the status `SLIDING`; there `residual_norms` are
      those of the smallest generalised gradient.
    - `iterations`: of the last solver that worked on the sample.
    - `passes`: forward, backward and tangent passes through the network, per sample; one
      evaluation of the vector field takes two.
    - `given_tolerance`: the absolute one that was asked for, or `None`.
    - `start`: the state that the search began from. `problem`: what was solved.
    - `method`: the solvers that ran, in turn. `message`: how it ended.

    An equilibrium of several networks (`networks` of them), which `jax.vmap` makes, has their axis
    before all others: it prints, draws and is saved as a whole.
    """

    problem: InferenceProblem
    start: State
    activities: Activities
    prediction_errors: tuple[Values, ...]
    energies: Values
    residual_norms: Values
    tolerance: Values
    status_codes: Values
    at_kink: tuple[Values, ...]
    iterations: Values
    passes: Values
    compile_seconds: Scalar = 0.0
    run_seconds: Scalar = 0.0
    given_tolerance: float | None = eqx.field(static=True, default=None)
    method: str = eqx.field(static=True, default="")
    message: str = eqx.field(static=True, default="")

    def _outputs(self) -> tuple[int, ...]:
        return self.problem.outputs

    @property
    def status(self) -> EquilibriumStatus | tuple[EquilibriumStatus, ...]:
        """How it ended: one status, or one per sample of a batch.

        Those of several networks stand one after the other.
        """
        codes = np.asarray(self.status_codes)
        if codes.ndim == 0:
            return EquilibriumStatus(int(codes))
        return Statuses(EquilibriumStatus(int(code)) for code in codes.ravel())

    @property
    def networks(self) -> int | None:
        """How many networks it is of, where `jax.vmap` made it of several; otherwise `None`."""
        # One number for each layer of one network.
        shape = np.shape(self.problem.time_constants[0])
        return shape[0] if len(shape) == 1 else None

    @property
    def without_failure(self) -> np.ndarray | None:
        """Which of several networks rest in every sample; `None` of one network."""
        return None if self.networks is None else all_well(EquilibriumStatus, self.status_codes)

    @property
    def ok(self) -> bool:
        """Whether every sample is at an equilibrium."""
        return not np.any(EquilibriumStatus.failed(np.asarray(self.status_codes)))

    @property
    def state(self) -> State:
        """The free layers of `activities`, as `initial=` of `pcdyn.simulate` takes them."""
        return self.problem.state_of(self.activities)

    def basin(
        self,
        *,
        flow: FlowToRest | None = None,
        perturbation: float = 0.0,
        key: PRNGKeyArray | None = None,
        tolerance: float = 1e-2,
    ) -> Basin:
        """Follow the gradient flow from the start and see whether it ends here.

        A flow that does not come to rest, as along a kink, raises nothing: see `Basin.settled`.

        **Arguments:**

        - `flow`: how to integrate it.
        - `perturbation`: the standard deviation of Gaussian noise added to the start, drawn with
          `key`: does the neighbourhood of the start end here too?
        - `tolerance`: of the distance, relative to the way from the start to this equilibrium.

        **Raises:**

        - `pcdyn.errors.InputError` for a negative perturbation or one without a key.
        """
        start = self.start
        tolerance = checked_number(tolerance, "tolerance", above=0, error=ToleranceError)
        perturbation = checked_number(perturbation, "perturbation", at_least=0)
        if flow is not None:
            check_instance(flow, "flow", FlowToRest, "a pcdyn.solvers.FlowToRest")
        if perturbation > 0:
            if key is None:
                raise InputError("a perturbation is drawn at random: give a key")
            check_key(key)
            keys = jr.split(key, len(start))
            start = tuple(
                x + perturbation * jr.normal(k, x.shape, x.dtype)
                for k, x in zip(keys, start, strict=True)
            )
        rest = equilibrium(
            self.problem,
            method=FlowToRest() if flow is None else flow,
            initial=start,
            tolerance=self.given_tolerance,
            throw=False,
        )
        distance = _distance(rest.state, self.state)
        displacement = _distance(self.start, self.state)
        settled = ~EquilibriumStatus.failed(np.asarray(rest.status_codes))
        agrees = distance <= tolerance * displacement
        return Basin(agrees, settled, distance, displacement, rest)

    def plot(
        self, ax: matplotlib.axes.Axes | None = None, *, sample: int = 0
    ) -> list[matplotlib.lines.Line2D]:
        """Draw the activities and where the search began; see `pcdyn.plotting.equilibrium`."""
        import pcdyn

        return pcdyn.plotting.equilibrium(self, ax=ax, sample=sample)

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled data set with named dimensions; see `pcdyn.io.equilibria`."""
        import pcdyn

        return pcdyn.io.equilibria.to_xarray(self)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a readable account, for all samples together."""
        if is_traced(self.energies):
            return f"Equilibrium by {self.method} inside of a JAX transformation"
        widths = [x.shape[-1] for x in self.activities]
        ok = self.without_failure
        if ok is not None:
            text = (
                f"Equilibrium of {len(ok)} networks of {widths} units, by {self.method}\n"
                f"  {status_counts(self.status)}"
            )
            if ok.any():
                residuals = [np.max(x) for x in np.asarray(self.residual_norms)[ok]]
                text += (
                    f"\n  medians: largest residual {np.median(residuals):.2g}, free energy "
                    f"{np.median(np.asarray(self.free_energy)[ok]):.4g}"
                )
            return text
        samples = "one sample" if np.ndim(self.energies) == 1 else f"{len(self.energies)} samples"
        return "\n".join(
            [
                f"Equilibrium of {widths} units, {samples}, by {self.method}",
                f"  {self.message}",
                f"  largest residual {np.max(self.residual_norms):.2g} (tolerance "
                f"{_range(self.tolerance)}), free energy {np.mean(self.free_energy):.4g}",
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

    agrees: HostValues
    settled: HostValues
    distance: HostValues
    displacement: HostValues
    rest: Equilibrium

    @property
    def ok(self) -> bool:
        """Whether the flow ends at the equilibrium in every sample."""
        return bool(np.all(self.agrees))

    @property
    def message(self) -> str:
        """How many samples end where."""
        count = np.size(self.agrees)
        return (
            f"the flow ends at the equilibrium in {np.sum(self.agrees)} of {count} samples, comes "
            f"to rest elsewhere in {np.sum(self.settled & ~self.agrees)}, and has not come to rest "
            f"in {np.sum(~self.settled & ~self.agrees)}"
        )

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a readable account, for all samples together."""
        return (
            f"Basin: {self.message}\n  distance at most {np.max(self.distance):.2g}, displacement "
            f"from the start at most {np.max(self.displacement):.2g}"
        )

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> list[matplotlib.lines.Line2D]:
        """Draw the distance of each sample against its displacement; see `plotting.basin`."""
        import pcdyn

        return pcdyn.plotting.basin(self, ax=ax)

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled data set, with the dimension `sample` where there is a batch."""
        import xarray

        axes = ("sample",) * np.ndim(self.agrees)
        names = ("agrees", "settled", "distance", "displacement")
        variables = {name: (axes, np.asarray(getattr(self, name))) for name in names}
        return xarray.Dataset(variables, attrs={"message": self.message})


def _distance(a: State, b: State) -> HostValues:
    squares = [np.sum((np.asarray(x) - np.asarray(y)) ** 2, -1) for x, y in zip(a, b, strict=True)]
    return np.sqrt(sum(squares))


def equilibrium(
    problem: InferenceProblem,
    *,
    method: str | Solver | Sequence[Solver | str] | None = None,
    initial: str | Sequence[Numbers] = "feedforward",
    tolerance: float | None = None,
    throw: bool = True,
) -> Equilibrium:
    """Find the equilibrium that inference from `initial` leads to, with its residual.

    Where round-off keeps the gradient above a tolerance that was not given, as at large ratios of
    precisions, a sample has converged once the steps of its solver change nothing and the gradient
    is within that round-off; `Equilibrium.tolerance` says so. Where activations have kinks, a point
    with a vanishing gradient on one side of which F falls is no equilibrium: the search goes on
    from beside it.

    A nonlinear network can have several equilibria; `Equilibrium.basin` checks whether the flow
    leads to this one. Under `jax.jit`, `jax.vmap` and `jax.grad` nothing is raised. There the
    equilibrium has derivatives of any order with respect to weights, biases, precisions and data,
    by the implicit function theorem; time constants do not move it. Samples that have not
    converged, such as those that slide along a kink, have derivatives that are NaN.

    **Arguments:**

    - `problem`: what is clamped, to which network, with which energies.
    - `method`: a name (`"gauss_newton"`, `"pseudo_transient"`, `"flow"`, …), a value such as
      `pcdyn.solvers.GaussNewton(max_iterations=20)`, or several values to try in turn, each on
      the samples where the one before it did not converge. Unless given: the closed form of a
      linear network; otherwise conjugate gradients in error coordinates (both ends clamped,
      smooth activations), then Gauss–Newton, then pseudo-transient continuation.
    - `initial`: `"feedforward"`, `"zeros"` or a state.
    - `tolerance` of ‖∂F/∂x_l‖ in every free layer and sample, absolute. Unless given it is 1e-6 in
      float64 and 1e-4 in float32 times the scale of each sample: the least of 1, of the largest
      ‖∂F/∂x_l‖ at the start, and of the largest prediction error there times the smallest
      precision. A sample whose gradient at the start is within its round-off is at rest there.
    - `throw`: raise `pcdyn.NotConvergedError` if any sample has not converged, with what was found
      in its `equilibrium`; with `throw=False` the status says so instead.

    **Raises:**

    - `pcdyn.errors.ToleranceError`, and what the problem, the solver and the initial state raise,
      before anything runs.
    - `pcdyn.NotConvergedError` afterwards, unless `throw=False`.
    """
    check_problem(problem)
    check_flag(throw, "throw")
    solvers = _solvers(method, problem)
    given = None if tolerance is None else _checked_tolerance(tolerance)
    relative = given is None
    wanted = (1e-6 if problem.dtype == jnp.float64 else 1e-4) if given is None else given
    start = _start(problem, initial)
    batched, state = (problem, None) if start is None else _with_batch(problem, start)
    batched = batched.with_prior_as_layer(state)
    if is_traced(problem, start):
        assert start is not None and state is not None, "left out for known values only"
        frozen = jax.lax.stop_gradient(eqx.filter((batched, state), eqx.is_array))
        fixed, begin = eqx.combine(frozen, (batched, state))
        if is_traced(fixed, begin):
            each, goal = with_numbers_as_arrays(solvers), np.asarray(wanted, problem.dtype)
            ran, verdict = _solve_traced(fixed, begin, each, goal, relative)
        else:
            # By `jax.grad` alone, where only derivatives are traced.
            ran = solve_on_host(fixed, begin, solvers, wanted, relative)
            seen = jax.tree.map(np.asarray, ran.observed)
            verdict = _verdict(fixed, ran, seen, relative)
        found = jax.tree.map(jnp.asarray, ran.solution.state)
        moving = with_derivatives(batched, found, verdict.status == EquilibriumStatus.CONVERGED)
        return _build(problem, start, moving, ran, observe(batched, moving), verdict, given)
    with Stopwatch() as clock:
        ran = solve_on_host(batched, state, solvers, wanted, relative)
        # Copies, for the sliding samples get other numbers.
        observed = jax.tree.map(np.array, ran.observed)
        verdict = _verdict(batched, ran, observed, relative)
        start = on_host(ran.start if start is None else start)
        found = _build(on_host(problem), start, ran.solution.state, ran, observed, verdict, given)
    found = _with_message(found, clock)
    if throw and not found.ok:
        raise NotConvergedError(f"{found.method}: {found.message}", found)
    return found


def _solvers(
    method: str | Solver | Sequence[Solver | str] | None, problem: InferenceProblem
) -> tuple[Solver, ...]:
    if method is None:
        return default_solvers(problem)
    solvers = get_solvers(method)
    for solver in solvers:
        solver.check(problem)
    return solvers


def _checked_tolerance(tolerance: float) -> float:
    return checked_number(tolerance, "tolerance", above=0, error=ToleranceError)


def _start(problem: InferenceProblem, initial: str | Sequence[Numbers]) -> State | None:
    """The start; `None` for the feedforward pass of a batch, which the solver's program makes."""
    feedforward = isinstance(initial, str) and initial == "feedforward"
    # With a prior or a free input no pass starts from the data.
    begins = not problem.is_chain or problem.input is not None
    has_batch = begins and len(problem.batch_shape or ()) == 1
    if feedforward and has_batch and not is_traced(problem):
        return None
    return problem.initial_state(initial)


def _with_batch(problem: InferenceProblem, state: State) -> tuple[InferenceProblem, State]:
    """A single sample as a batch of one."""
    if state[0].ndim == 2:
        return problem, state
    # Known numbers by NumPy, for which nothing is compiled.
    xp = jnp if is_traced(problem, state) else np
    data, state = jax.tree.map(lambda x: xp.asarray(x)[None], (problem.data, state))
    return problem.with_data(*data), state


class _Verdict(eqx.Module):
    """What is thought of each sample: the status, and the residuals and tolerances by layer."""

    status: Values
    residuals: Values
    tolerance: Values


# Compiled as one program also where nothing around it is, as by `jax.vmap` and `jax.grad` alone.
@eqx.filter_jit
def _solve_traced(
    problem: InferenceProblem,
    start: State,
    solvers: Sequence[Solver],
    tolerance: Scalar,
    relative: bool,
) -> tuple[Ran, _Verdict]:
    ran = solve_in_turn(problem, start, solvers, tolerance, relative)
    return ran, _verdict(problem, ran, ran.observed, relative)


def _verdict(problem: InferenceProblem, ran: Ran, observed: Observed, relative: bool) -> _Verdict:
    """A solver's claim to have converged is checked."""
    _, energies, residuals = observed
    xp = array_namespace(residuals)
    tolerance = xp.broadcast_to(ran.tolerance[:, None], residuals.shape)
    resting = xp.all(residuals <= tolerance, axis=-1)
    claimed = ran.solution.status == EquilibriumStatus.CONVERGED
    if relative and (xp is jnp or np.any(claimed & ~resting)):
        reached, wider = within_round_off(problem, ran.solution.state, ran.tolerance)
        accepted = claimed & ~resting & xp.asarray(reached)
        tolerance = xp.where(accepted[:, None], xp.asarray(wider), tolerance)
        resting = resting | accepted
    doubted = xp.where(claimed, int(EquilibriumStatus.STALLED), ran.solution.status)
    # A slope can vanish because the energy it is of has overflowed.
    finite = xp.all(xp.isfinite(residuals), axis=-1) & xp.all(xp.isfinite(energies), axis=-1)
    doubted = xp.where(finite, doubted, int(EquilibriumStatus.NON_FINITE))
    status = xp.where(resting & finite, int(EquilibriumStatus.CONVERGED), doubted)
    return _Verdict(status, residuals, tolerance)


def _build(
    problem: InferenceProblem,
    start: State,
    state: State,
    ran: Ran,
    observed: Observed,
    verdict: _Verdict,
    given: float | None,
) -> Equilibrium:
    """What follows from what the solvers have found."""
    errors, energies, _ = observed
    xp = array_namespace(verdict.status)
    status, residuals, tolerance = verdict.status, verdict.residuals, verdict.tolerance
    at_kink = tuple(xp.zeros(error.shape, bool) for error in errors)
    if ran.sliding:
        status, residuals = jax.tree.map(np.array, (status, residuals))
    for sample, point in ran.sliding.items():
        # A point with no unit at a kink is an equilibrium like any other.
        slides = any(mask.any() for mask in point.at_kink)
        if slides and status[sample] != EquilibriumStatus.CONVERGED:
            status[sample] = EquilibriumStatus.SLIDING
            residuals[sample] = point.residual_norms
        for mask, units in zip(at_kink, point.at_kink, strict=True):
            mask[sample] = units
    parts = (state, errors, energies, residuals, tolerance, status, at_kink,
             ran.solution.iterations, ran.solution.passes)  # fmt: skip
    if start[0].ndim == 1:
        parts = jax.tree.map(lambda x: x[0], parts)
    state, errors, energies, residuals, tolerance, status, at_kink, iterations, passes = parts
    return Equilibrium(
        problem=problem, start=start, activities=problem.activities(state),
        prediction_errors=errors, energies=energies, residual_norms=residuals,
        tolerance=tolerance, status_codes=status, at_kink=at_kink, iterations=iterations,
        passes=passes, given_tolerance=given, method=ran.names,
    )  # fmt: skip


def _range(values: Values) -> str:
    low, high = f"{np.min(values):.2g}", f"{np.max(values):.2g}"
    return low if low == high else f"{low} … {high}"


def _with_message(found: Equilibrium, clock: Stopwatch) -> Equilibrium:
    codes = np.atleast_1d(found.status_codes)
    counts = [(int(np.sum(codes == s)), s) for s in EquilibriumStatus if np.any(codes == s)]
    text = "; ".join(f"{status.name} {count} of {codes.size}: {status.explanation}"
                     for count, status in counts)  # fmt: skip
    text += f" (tolerance {_range(found.tolerance)})"
    return dataclasses.replace(
        found,
        message=text,
        compile_seconds=clock.compile_seconds,
        run_seconds=clock.run_seconds,
    )
