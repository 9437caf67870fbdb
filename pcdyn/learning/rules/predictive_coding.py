"""Predictive coding as learning rules: to equilibrium, by Euler steps, and on the way there.

Each ends with one local gradient per layer, `−(f'_l ∘ d_l) x_{l−1}ᵀ`, with d_l = Π_l ε_l at the
activities where inference ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from pcdyn._support.checks import checked_number, number, optional
from pcdyn._support.states import dot, step
from pcdyn._support.types import Scalar, State
from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.solvers import Solver, get_solvers
from pcdyn.equilibria.solvers.truncated import TruncatedGaussNewton
from pcdyn.errors import InputError, ToleranceError
from pcdyn.learning.rules.base import BatchGradient, Rule, check_steps, start_of
from pcdyn.model.energies.energy import in_dtype
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import NetworkOrGraph, local_gradient

_Method = TruncatedGaussNewton | Solver | tuple[Solver, ...] | None


def as_method(
    method: str | TruncatedGaussNewton | Solver | Sequence[Solver | str] | None,
) -> _Method:
    """Return what finds equilibria: `TruncatedGaussNewton`, or solvers for `pcdyn.equilibrium`.

    Raises `InputError` for anything else.
    """
    if method is None or isinstance(method, TruncatedGaussNewton | Solver):
        return method
    return get_solvers(method)


class PredictiveCoding(Rule):
    """The gradient `∂F/∂W_l = −(f'_l ∘ Π_l ε_l*) x*_{l−1}ᵀ` at the equilibrium of inference (Eq 2).

    A latent input is inferred with the rest: F is minimised over it and the weights, which is EM
    with a posterior at a point. Where nothing bounds the weights, they grow so that the prior costs
    ever less.

    **Arguments:**

    - `method`: unless given `TruncatedGaussNewton`, which solves every sample to a relative
      accuracy and says how near it is; otherwise what `pcdyn.equilibrium` takes.
    - `tolerance`: absolute, as for `pcdyn.equilibrium`; not for `TruncatedGaussNewton`.
    """

    method: _Method = eqx.field(default_factory=TruncatedGaussNewton, converter=as_method)
    tolerance: float | None = eqx.field(
        default=None,
        converter=optional(number("PredictiveCoding: tolerance", above=0, error=ToleranceError)),
    )

    def __check_init__(self) -> None:
        if self.tolerance is not None and isinstance(self.method, TruncatedGaussNewton):
            raise InputError(
                "tolerance would be ignored: give it to the method, TruncatedGaussNewton(tolerance)"
            )

    @property
    def name(self) -> str:
        return "predictive coding"

    @property
    def without_fallback(self) -> PredictiveCoding:
        if not isinstance(self.method, TruncatedGaussNewton) or not self.method.fallback:
            return self
        return PredictiveCoding(dataclasses.replace(self.method, fallback=False))

    def check(self, problem: InferenceProblem) -> None:
        for method in self.method if isinstance(self.method, tuple) else (self.method,):
            if method is not None:
                method.check(problem)

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        if isinstance(self.method, TruncatedGaussNewton):
            settled = self.method.settle(problem)
            learned = _gradient_at(problem, settled.state, settled.residual)
            return dataclasses.replace(learned, handed_over=settled.handed_over), state
        found = equilibrium(
            problem, method=self.method, tolerance=self.tolerance, throw=False,
            initial=start_of(problem),
        )  # fmt: skip
        rest = tuple(jnp.asarray(x) for x in found.state)
        return _gradient_at(problem, rest), state


class EulerPredictiveCoding(Rule):
    """Predictive coding after some updates `x ← x − dt · ∂F/∂x`, as the field runs it.

    Inference starts at the feedforward pass, at zero in a graph that has none, and ends after
    `steps` updates; the `residual` of a batch says how far that is from equilibrium.
    """

    dt: float = 0.1
    steps: int = 20

    def __check_init__(self) -> None:
        check_steps(self.name, self.dt, self.steps)

    @property
    def name(self) -> str:
        return f"predictive coding, {self.steps} Euler steps"

    def check(self, problem: InferenceProblem) -> None:
        """Accept every problem."""

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        prepared = problem.prepared()

        def update(_: Array, x: State) -> State:
            return step(x, -self.dt, prepared.gradient(x))

        rest = jax.lax.fori_loop(0, self.steps, update, start_of(problem))
        return _gradient_at(problem, rest), state


class LowPrecisionPredictiveCoding(Rule):
    """Predictive coding with the output energy multiplied by λ = `precision`, over λ.

    It tends to BP as λ → 0, with an error in proportion to λ (the limit that Theorem 3.2 needs).
    """

    precision: float = eqx.field(
        converter=number("LowPrecisionPredictiveCoding: precision", above=0)
    )
    method: _Method = eqx.field(default_factory=TruncatedGaussNewton, converter=as_method)

    @property
    def name(self) -> str:
        return f"predictive coding, output precision {float(self.precision):g}"

    def check(self, problem: InferenceProblem) -> None:
        PredictiveCoding(self.method).check(self._scaled(problem))

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        learned, _ = PredictiveCoding(self.method).learn(self._scaled(problem), ())
        gradient = jax.tree.map(
            lambda g: g / self.precision if eqx.is_inexact_array(g) else g, learned.gradient
        )
        return eqx.tree_at(lambda l: l.gradient, learned, gradient), state

    def _scaled(self, problem: InferenceProblem) -> InferenceProblem:
        energies = list(problem.energy)
        for place in problem.outputs:
            energies[place] = energies[place].scaled(self.precision)
        return eqx.tree_at(lambda p: p.energy, problem, in_dtype(tuple(energies), problem.dtype))


class IncrementalPredictiveCoding(Rule):
    """Weights move while activities move (incremental PC, Salvatori et al. 2022).

    `steps` Euler steps of size `dt` of the joint flow `dx/dt = −∂F/∂x`, `dW/dt = −ε ∂F/∂W`, with
    F summed over the batch and ε = `ratio`. The gradient is what the weights moved by, over
    ε · steps · dt: gradient descent with that as its rate is incremental PC exactly, and as ε → 0
    it is the mean of ∂F/∂W along inference.
    """

    dt: float = 0.1
    steps: int = 20
    ratio: Scalar = 1e-4

    def __check_init__(self) -> None:
        check_steps(self.name, self.dt, self.steps)
        checked_number(self.ratio, f"{self.name}: ratio", above=0)

    @property
    def name(self) -> str:
        return "incremental predictive coding"

    def check(self, problem: InferenceProblem) -> None:
        """Accept every problem."""

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        start, static = eqx.partition(problem.graph, eqx.is_inexact_array)

        def at(weights: PyTree) -> InferenceProblem:
            return eqx.tree_at(lambda p: p.graph, problem, eqx.combine(weights, static))

        def update(_: Array, carry: tuple[State, PyTree]) -> tuple[State, PyTree]:
            x, weights = carry
            now = at(weights)
            gradient = eqx.filter(_gradient_at(now, x).gradient, eqx.is_inexact_array)
            return step(x, -self.dt, now.gradient(x)), step(
                weights, -self.ratio * self.dt, gradient
            )

        first = (start_of(problem), start)
        rest, weights = jax.lax.fori_loop(0, self.steps, update, first)
        moved = self.ratio * self.steps * self.dt
        gradient = jax.tree.map(lambda a, b: (a - b) / moved, start, weights)
        residual = _relative_residual(at(weights), rest)
        learned = BatchGradient(eqx.combine(gradient, static), problem.activities(rest), residual)
        return learned, state


def _gradient_at(
    problem: InferenceProblem, state: State, residual: Array | None = None
) -> BatchGradient:
    """The gradient ∂F/∂(weights) at the activities of `state`."""
    activities = problem.activities(state)
    weighted = problem.weighted_errors(problem.prediction_errors(activities), activities)
    # That of a prior credits no weights.
    deltas = weighted[-len(problem.energy) :]
    gradient = local_gradient(problem.graph, activities, deltas)
    if residual is None:
        residual = _relative_residual(problem, state)
    return BatchGradient(gradient, activities, residual)


def _relative_residual(problem: InferenceProblem, state: State) -> Array:
    """‖∂F/∂x‖ over ‖Π ε‖ of what is free, one of the two terms that cancel in ∂F/∂x."""
    slope = problem.gradient(state)
    activities = problem.activities(state)
    errors = problem.prediction_errors(activities)
    each = zip(problem.targets, problem.weighted_errors(errors, activities), strict=True)
    weighted = tuple(x for node, x in each if node in problem.free_layers)
    size = dot(weighted, weighted)
    return jnp.sqrt(dot(slope, slope) / jnp.where(size > 0, size, 1))
