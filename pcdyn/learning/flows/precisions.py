"""Learned precisions: gradient flow of the variational free energy on Π, which stays SPD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Bool, Float

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import as_sequence, check_instance, number, optional
from pcdyn._support.products import matmul
from pcdyn._support.types import Activities, Numbers, Scalar, State
from pcdyn.equilibria.solvers import GaussNewton, Solver, get_solver
from pcdyn.errors import InputError, PrecisionError, ShapeError, ToleranceError
from pcdyn.learning.flows.joint import activities_at_rest, as_jax
from pcdyn.learning.flows.variational import (
    PosteriorName,
    check_gaussian,
    check_posterior,
    variational_free_energy,
)
from pcdyn.linearisation.whitened import is_linear, precisions_of
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.flow import FlowOfProblem
from pcdyn.model.problem import InferenceProblem, check_problem
from pcdyn.references.algorithms import feedforward
from pcdyn.references.linear import linear_equilibrium, output_covariance
from pcdyn.simulation.trajectory import Trajectory

Structure = Literal["fixed", "scalar", "diagonal", "full"]


def _as_tuple(structures: Sequence[Structure]) -> tuple[Structure, ...]:
    wanted = f"a list with one of {', '.join(get_args(Structure))} for each layer l = 1 … L"
    return as_sequence(structures, "structures", wanted)


def _as_posterior(posterior: PosteriorName) -> PosteriorName:
    check_posterior(posterior)
    return posterior


class PrecisionFlow(FlowOfProblem):
    """The flow `dθ/dt = −∂F/∂θ` of the parameters of precisions, with inference at equilibrium.

    F is the variational free energy (`pcdyn.learning.variational_free_energy`) at the equilibrium
    of inference, averaged over the samples, which share the precisions. Time is in units of the
    time constant of θ. `pcdyn.simulate` integrates the flow; the trajectory's `precisions` hold
    Π_1 … Π_L in time. For optax, `free_energy` is a loss of the parameters `initial_state()`.

    **Arguments:**

    - `problem`: with a clamped output and the energy `pcdyn.Gaussian`, whose precisions are the
      start.
    - `structures`: for each layer l = 1 … L what Π_l is: `"scalar"`, π I with θ = log π;
      `"diagonal"`, θ its logarithms; `"full"`, Π_l = C Cᵀ with C lower triangular, θ the logarithms
      of C's diagonal and then the rows below it (log-Cholesky: Pinheiro & Bates 1996, so that
      every θ is one SPD matrix); or `"fixed"`, as given.
    - `posterior`: `"laplace"` or `"delta"`. For the delta posterior, which is the paper's, F has no
      lower bound: the errors of some layer vanish and its precision grows like e^{n_l t/2} if it is
      scalar (each of its eigenvalues like e^{t/2} if diagonal, e^{2t} if full).
    - `method`, `tolerance`: of the equilibrium, as for `pcdyn.equilibrium`; the closed form of a
      linear network and Gauss–Newton for others unless given. Where it is not found the field is
      NaN and the simulation says so.

    **Raises:**

    - `ShapeError` unless there is one structure per layer and it can hold the precision given.
    - `InputError` for unknown structures or posteriors, nothing to learn, or a free output.
    """

    problem: InferenceProblem
    structures: tuple[Structure, ...] = eqx.field(static=True, converter=_as_tuple)
    posterior: PosteriorName = eqx.field(static=True, default="laplace", converter=_as_posterior)
    method: Solver | None = eqx.field(default=None, converter=optional(get_solver))
    tolerance: float | None = eqx.field(
        static=True,
        default=None,
        converter=optional(number("PrecisionFlow: tolerance", above=0, error=ToleranceError)),
    )

    def __check_init__(self) -> None:
        check_problem(self.problem)
        check_gaussian(self.problem)
        if self.method is not None:
            self.method.check(self.problem)
        depth = self.problem.network.depth
        if len(self.structures) != depth:
            raise ShapeError(f"{len(self.structures)} structures for the layers 1 … {depth}")
        known = get_args(Structure)
        unknown = [s for s in self.structures if not isinstance(s, str) or s not in known]
        if unknown:
            raise InputError(f"unknown structure {unknown[0]!r}: use {', '.join(known)}")
        if not self._learned:
            raise InputError("nothing to learn: every precision is fixed")
        if self.problem.output is None:
            raise InputError("precisions are learned from data: clamp the output")
        for index in self._learned:
            given = self._given(index)
            if given.ndim > ("scalar", "diagonal", "full").index(self.structures[index - 1]):
                raise ShapeError(
                    f"the precision of layer {index} has shape {given.shape}, which a "
                    f"{self.structures[index - 1]} precision cannot start from"
                )

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return θ of the problem's precisions, or others: a vector for each learned precision."""
        start = tuple(
            _parameters(self._given(i), self.structures[i - 1], self.problem.network.widths[i])
            for i in self._learned
        )
        return self.checked_state(initial, start)

    def problem_at(self, state: State) -> InferenceProblem:
        """Return the problem with the precisions of the parameters `state`."""
        return _with_precisions(self.problem, self.precisions_at(state))

    def precisions_at(self, state: State) -> tuple[Array, ...]:
        """Compute Π_1 … Π_L, numbers, diagonals or matrices, after a leading axis of states."""
        if state[0].ndim > 1:
            return _in_time(PrecisionFlow.precisions_at, *as_jax((self, state)))
        moving = dict(zip(self._learned, state, strict=True))
        widths = self.problem.network.widths
        return tuple(
            _precision(moving[index], structure, widths[index])
            if index in moving
            else self._given(index)
            for index, structure in enumerate(self.structures, start=1)
        )

    def activities(self, state: State) -> Activities:
        if state[0].ndim > 1:
            return _in_time(PrecisionFlow.activities, *as_jax((self, state)))
        problem = self.problem_at(state)
        if self.method is None and is_linear(problem.network):
            return linear_equilibrium(problem)
        method = GaussNewton() if self.method is None else self.method
        return activities_at_rest(problem, method, self.tolerance)

    def moving(self, state: State) -> dict[str, Any]:
        """Name what moves besides activities: Π_1 … Π_L, as `"precisions"`."""
        return {"precisions": self.precisions_at(state)}

    def observe(self, t: Scalar, state: State) -> tuple[Activities, Array]:
        rest = self.problem.state_of(self.activities(state))
        return self.problem_at(state).observe(t, rest)

    def free_energy(self, state: State) -> Array:
        """Compute the variational free energy of the parameters θ, averaged over the samples."""
        return self._free_energy(state, self.problem.state_of(self.activities(state)))

    def free_energy_along(self, trajectory: Trajectory) -> Float[Array, " time"]:
        """Compute `free_energy` at the saved times of a trajectory of this flow."""
        check_instance(trajectory, "trajectory", Trajectory, "a trajectory of this flow")
        if trajectory.precisions is None:
            raise InputError("no precisions move along this trajectory: simulate this flow")

        def at(precisions: tuple[Array, ...], rest: State) -> Array:
            problem = _with_precisions(self.problem, precisions)
            return jnp.mean(variational_free_energy(problem, rest, posterior=self.posterior))

        rest = self.problem.state_of(trajectory.activities)
        return jax.jit(jax.vmap(at))(*as_jax((trajectory.precisions, rest)))

    def vector_field(self, t: Scalar, state: State) -> State:
        if self.posterior == "laplace" and not is_linear(self.problem.network):
            # log det H depends on where the equilibrium is.
            slope = jax.grad(self.free_energy)(state)
        else:
            rest = self.problem.state_of(self.activities(state))
            slope = jax.grad(lambda s: self._free_energy(s, rest))(state)
        return jax.tree.map(jnp.negative, slope)

    def _free_energy(self, state: State, rest: State) -> Array:
        problem = self.problem_at(state)
        return jnp.mean(variational_free_energy(problem, rest, posterior=self.posterior))

    @property
    def _learned(self) -> tuple[int, ...]:
        return tuple(i for i, s in enumerate(self.structures, start=1) if s != "fixed")

    def _given(self, index: int) -> Array:
        """The precision to start from, 1 unless given."""
        each = precisions_of(self.problem, "precisions are learned from")
        values = each[self.problem.predicted_layers.index(index)].values
        return jnp.ones((), self.problem.dtype) if values is None else values


def _with_precisions(problem: InferenceProblem, precisions: Sequence[Array]) -> InferenceProblem:
    return eqx.tree_at(lambda p: p.energy, problem, tuple(map(Gaussian, precisions)))


@eqx.filter_jit
def _in_time(
    function: Callable[[PrecisionFlow, State], tuple[Array, ...]],
    flow: PrecisionFlow,
    states: State,
) -> tuple[Array, ...]:
    """`function` of the flow at several states."""
    return jax.vmap(lambda state: function(flow, state))(states)


def _parameters(precision: Array, structure: Structure, width: int) -> Array:
    """θ of a precision, as one vector."""
    if structure == "scalar":
        return jnp.log(precision).reshape(1)
    if structure == "diagonal":
        return jnp.log(jnp.broadcast_to(precision, (width,)))
    if precision.ndim < 2:
        precision = jnp.diag(jnp.broadcast_to(precision, (width,)))
    factor = jnp.linalg.cholesky(precision)
    return jnp.concatenate([jnp.log(jnp.diagonal(factor)), factor[np.tril_indices(width, -1)]])


def _precision(parameters: Array, structure: Structure, width: int) -> Array:
    """The inverse of `_parameters`."""
    if structure == "scalar":
        return jnp.exp(parameters[0])
    if structure == "diagonal":
        return jnp.exp(parameters)
    factor = jnp.diag(jnp.exp(parameters[:width]))
    factor = factor.at[np.tril_indices(width, -1)].set(parameters[width:])
    return matmul(factor, factor.T)


class OutputNoise(eqx.Module):
    """The covariance of the output that explains the errors best, from `output_noise`.

    - `covariance`: Π_L⁻¹ where F_var is least, shape `(n_L, n_L)`; with zero eigenvalues where it
      is not `interior`.
    - `interior`: whether it is positive definite, a minimum that a precision can reach.
    """

    covariance: Float[Array, "n_L n_L"]
    interior: Bool[Array, ""]


def output_noise(problem: InferenceProblem, *, posterior: PosteriorName = "laplace") -> OutputNoise:
    """Compute the covariance Π_L⁻¹ of the output that is learned if other precisions are held.

    In closed form for linear networks. With Ĉ the mean of e0 e0ᵀ over the samples, e0 = T −
    feedforward(d), and V = Σ_{l<L} P_l Π_l⁻¹ P_lᵀ what the hidden layers explain,

    - `"laplace"`: the maximum of the likelihood, Ĉ − V if that is positive definite. Otherwise, in
      coordinates in which Ĉ = I and V = diag(m), it is diag(max(1 − m, 0)): at the boundary, with
      infinite precision where the hidden layers predict more variance than there is.
    - `"delta"`: in the same coordinates the minimum, only a local one, of the paper's free energy
      with its log-determinant, u = ½(1 − 2m + √(1 − 4m)), less than the noise, if m ≤ ¼; else there
      is none and the precision grows without bound.

    **Raises:**

    - `NotLinearError` for a network that is not linear.
    - `InputError` unless both ends are clamped.
    - `PrecisionError` where the errors of the samples do not span the outputs.
    """
    check_problem(problem)
    check_posterior(posterior)
    found, measured = _output_noise(problem, posterior)
    _check_spanned(measured, (problem.batch_shape or (1,))[0])
    return found


@eqx.filter_jit
def _output_noise(problem: InferenceProblem, posterior: PosteriorName) -> tuple[OutputNoise, Array]:
    """The noise, and Ĉ."""
    explained = output_covariance(problem) - _output_noise_of(problem)
    errors = problem.output_error(feedforward(problem)[-1])
    errors = jnp.atleast_2d(errors)
    measured = matmul(errors.T, errors) / len(errors)
    root = jnp.linalg.cholesky(measured)
    half = jsl.solve_triangular(root, explained, lower=True)
    white = jsl.solve_triangular(root, half.T, lower=True)
    share, modes = jnp.linalg.eigh((white + white.T) / 2)
    interior: Array
    left: Array
    if posterior == "laplace":
        interior, left = share < 1, 1 - share
    else:
        interior = share <= 0.25
        beneath: Any = jnp.where(interior, 1 - 4 * share, 0)
        left = 0.5 * (1 - 2 * share + jnp.sqrt(beneath))
    factor = matmul(root, modes) * jnp.sqrt(jnp.where(interior, left, 0))[None]
    return OutputNoise(matmul(factor, factor.T), jnp.all(interior)), measured


def _output_noise_of(problem: InferenceProblem) -> Array:
    """Π_L⁻¹ as a matrix."""
    *_, precision = precisions_of(problem, "the noise of the output is that of")
    width = problem.network.widths[-1]
    return precision.unweigh(jnp.eye(width, dtype=problem.dtype))


def _check_spanned(covariance: Array, samples: int) -> None:
    if is_traced(covariance):
        return
    sizes = np.linalg.eigvalsh(np.asarray(covariance))
    if sizes[0] <= len(sizes) * np.finfo(sizes.dtype).eps * sizes[-1]:
        raise PrecisionError(
            f"the errors of {samples} samples do not span the {len(sizes)} outputs, so that the "
            "likelihood has no maximum: give more samples than outputs, none predicted exactly"
        )
