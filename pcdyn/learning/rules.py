"""Learning rules as values: from a network and a batch to a weight gradient.

Every rule begins with a feedforward pass and ends with one local gradient per layer,
`−(f'_l ∘ d_l) x_{l−1}ᵀ`; rules differ in the activities x and in what they credit to a layer, d.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pcdyn.energy import scale_output
from pcdyn.equilibrium import equilibrium
from pcdyn.errors import InputError
from pcdyn.network import Activities, Network
from pcdyn.problem import InferenceProblem, State
from pcdyn.references import backpropagation, feedforward, local_gradient
from pcdyn.solvers import Solver
from pcdyn.solvers.truncated import TruncatedGaussNewton
from pcdyn.states import dot, step


class Learned(eqx.Module):
    """What a rule makes of a batch.

    - `gradient`: a network whose arrays are the gradients, summed over the batch.
    - `activities`: x_0 … x_L after inference; the feedforward pass with the target as x_L for
      rules without inference.
    - `residual`: how far inference is from its equilibrium, relative and per sample; zero for
      rules that need none.
    """

    gradient: Network
    activities: Activities
    residual: Float[Array, " batch"]


class Rule(eqx.Module):
    """Base of all learning rules.

    A rule may carry a state from batch to batch, such as the inverse weights of target propagation;
    most have none.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What tables and figures call it."""

    @abc.abstractmethod
    def check(self, problem: InferenceProblem) -> None:
        """Raise the named error for a problem that this rule cannot learn from."""

    @abc.abstractmethod
    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        """The state before the first batch; `()` if there is none."""

    @abc.abstractmethod
    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        """The weight gradient from a batch, both ends clamped, and the next state."""


class PredictiveCoding(Rule):
    """`∂F/∂W_l = −(f'_l ∘ Π_l ε_l*) x*_{l−1}ᵀ` at the equilibrium of inference (Eq 2).

    Arguments: `method`, unless given `TruncatedGaussNewton`, which solves every sample to a
    relative accuracy and says how near it is; otherwise what `pcdyn.equilibrium` takes, with its
    absolute `tolerance`.
    """

    method: Any = TruncatedGaussNewton()
    tolerance: float | None = None

    def __check_init__(self) -> None:
        if self.tolerance is not None and isinstance(self.method, TruncatedGaussNewton):
            raise InputError(
                "tolerance would be ignored: give it to the method, TruncatedGaussNewton(tolerance)"
            )

    @property
    def name(self) -> str:
        return "predictive coding"

    def check(self, problem: InferenceProblem) -> None:
        if isinstance(self.method, TruncatedGaussNewton | Solver):
            self.method.check(problem)

    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        return ()

    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        if isinstance(self.method, TruncatedGaussNewton):
            settled = self.method.settle(problem)
            return _at(problem, settled.state, settled.residual), state
        found = equilibrium(problem, method=self.method, tolerance=self.tolerance, throw=False)
        rest = tuple(jnp.asarray(x) for x in found.state)
        return _at(problem, rest), state


class EulerPredictiveCoding(Rule):
    """Predictive coding after `steps` updates `x ← x − dt · ∂F/∂x`, as the field runs it.

    From the feedforward pass, wherever that leads: `residual` says how far it is from equilibrium.
    """

    dt: float = 0.1
    steps: int = 20

    def __check_init__(self) -> None:
        _check_steps(self.name, self.dt, self.steps)

    @property
    def name(self) -> str:
        return f"predictive coding, {self.steps} Euler steps"

    def check(self, problem: InferenceProblem) -> None:
        """Every problem is fine."""

    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        return ()

    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        first = problem.first_prediction()

        def update(_: Any, x: State) -> State:
            return step(x, -self.dt, problem.gradient(x, first))

        rest = jax.lax.fori_loop(0, self.steps, update, problem.feedforward_state())
        return _at(problem, rest), state


class LowPrecisionPredictiveCoding(Rule):
    """Predictive coding with the output energy multiplied by λ = `precision`, over λ.

    It tends to BP as λ → 0, with an error in proportion to λ (MATHS of the paper: Theorem 3.2
    needs this limit).
    """

    precision: Any
    method: Any = TruncatedGaussNewton()

    def __check_init__(self) -> None:
        if not 0 < self.precision < math.inf:
            raise InputError(f"precision must be positive and finite, got {self.precision}")

    @property
    def name(self) -> str:
        return f"predictive coding, output precision {float(self.precision):g}"

    def check(self, problem: InferenceProblem) -> None:
        PredictiveCoding(self.method).check(self._scaled(problem))

    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        return ()

    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        learned, _ = PredictiveCoding(self.method).learn(self._scaled(problem), ())
        gradient = jax.tree.map(
            lambda g: g / self.precision if eqx.is_inexact_array(g) else g, learned.gradient
        )
        return eqx.tree_at(lambda l: l.gradient, learned, gradient), state

    def _scaled(self, problem: InferenceProblem) -> InferenceProblem:
        energy = scale_output(problem.energy, problem.network.depth, self.precision)
        energy = jax.tree.map(lambda x: x.astype(problem.dtype), energy)
        return eqx.tree_at(lambda p: p.energy, problem, energy)


class Backpropagation(Rule):
    """The gradient ∂ℒ/∂W_l of the output loss of the feedforward pass."""

    @property
    def name(self) -> str:
        return "backpropagation"

    def check(self, problem: InferenceProblem) -> None:
        """Every problem is fine."""

    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        return ()

    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        found = backpropagation(problem)
        return _without_inference(problem, found.weight_gradient), state


class FixedPrediction(Rule):
    """Inference with predictions and slopes frozen at the feedforward pass (the fixed prediction
    assumption), for `steps` Euler updates of the errors by `dt`.

    Its equilibrium is BP exactly; ε_{L−1}(t) = (1 − e^{−t}) δ_{L−1} on the way there, for unit
    precisions of the hidden layers.
    """

    dt: float = 0.5
    steps: int = 40

    def __check_init__(self) -> None:
        _check_steps(self.name, self.dt, self.steps)

    @property
    def name(self) -> str:
        return "fixed prediction assumption"

    def check(self, problem: InferenceProblem) -> None:
        """Every problem is fine."""

    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        return ()

    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        network, activities = problem.network, feedforward(problem)
        pulls = [
            jax.vjp(lambda x, i=index: network.predict(i, x), activities[index - 1])[1]
            for index in range(2, network.depth + 1)
        ]
        output_delta = problem.weighted_error(network.depth, problem.output_error(activities[-1]))

        def weighted(errors: State) -> list[Array]:
            hidden = [problem.weighted_error(i, e) for i, e in enumerate(errors, start=1)]
            return [*hidden, output_delta]

        def update(_: Any, errors: State) -> State:
            *own, _ = deltas = weighted(errors)
            above = [pull(delta)[0] for pull, delta in zip(pulls, deltas[1:], strict=True)]
            return step(errors, self.dt, jax.tree.map(jnp.subtract, tuple(above), tuple(own)))

        start = tuple(jnp.zeros_like(x) for x in activities[1:-1])
        errors = jax.lax.fori_loop(0, self.steps, update, start)
        gradient = local_gradient(network, activities, weighted(errors))
        return _without_inference(problem, gradient), state


class ZeroDivergence(Rule):
    """Zero-divergence inference learning (Z-IL, Song et al. 2020): BP by L well-timed steps.

    All layers take Euler steps of size `rate` from the feedforward pass; layer l first moves at
    step L − l, and its weights learn from the error that it has then, γ^{L−l} δ_l. That is BP for
    γ = 1 and BP layer by layer up to a factor otherwise. Hidden precisions must be 1.
    """

    rate: float = 1.0

    def __check_init__(self) -> None:
        _check_steps(self.name, self.rate, 1)

    @property
    def name(self) -> str:
        return "Z-IL"

    def check(self, problem: InferenceProblem) -> None:
        for index in range(1, problem.network.depth):
            probe = jnp.ones(problem.network.widths[index], problem.network.dtype)
            if not bool(jnp.all(problem.weighted_error(index, probe) == probe)):
                raise InputError(f"Z-IL needs unit precision, but layer {index} has another one")

    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        return ()

    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        network, activities = problem.network, feedforward(problem)
        x, deltas = problem.state_of(activities), []
        for index in range(network.depth, 0, -1):
            errors = problem.prediction_errors(problem.activities(x))
            deltas.insert(0, problem.weighted_error(index, errors[index - 1]))
            x = step(x, -self.rate, problem.gradient(x))
        gradient = local_gradient(network, activities, deltas)
        return _without_inference(problem, gradient), state


class IncrementalPredictiveCoding(Rule):
    """Weights move while activities move (incremental PC, Salvatori et al. 2022).

    `steps` Euler steps of size `dt` of the joint flow `dx/dt = −∂F/∂x`, `dW/dt = −ε ∂F/∂W`, with
    F summed over the batch and ε = `ratio`. The gradient is what the weights moved by, over
    ε · steps · dt: gradient descent with that as its rate is incremental PC exactly, and as ε → 0
    it is the mean of ∂F/∂W along inference.
    """

    dt: float = 0.1
    steps: int = 20
    ratio: Any = 1e-4

    def __check_init__(self) -> None:
        _check_steps(self.name, self.dt, self.steps)
        if not 0 < self.ratio < math.inf:
            raise InputError(f"ratio must be positive and finite, got {self.ratio}")

    @property
    def name(self) -> str:
        return "incremental predictive coding"

    def check(self, problem: InferenceProblem) -> None:
        """Every problem is fine."""

    def init(self, network: Network, key: PRNGKeyArray) -> Any:
        return ()

    def learn(self, problem: InferenceProblem, state: Any) -> tuple[Learned, Any]:
        start, static = eqx.partition(problem.network, eqx.is_inexact_array)

        def at(weights: Any) -> InferenceProblem:
            return eqx.tree_at(lambda p: p.network, problem, eqx.combine(weights, static))

        def update(_: Any, carry: Any) -> Any:
            x, weights = carry
            now = at(weights)
            gradient = eqx.filter(_at(now, x).gradient, eqx.is_inexact_array)
            return step(x, -self.dt, now.gradient(x)), step(
                weights, -self.ratio * self.dt, gradient
            )

        first = (problem.feedforward_state(), start)
        rest, weights = jax.lax.fori_loop(0, self.steps, update, first)
        moved = self.ratio * self.steps * self.dt
        gradient = jax.tree.map(lambda a, b: (a - b) / moved, start, weights)
        residual = _relative_residual(at(weights), rest)
        learned = Learned(eqx.combine(gradient, static), problem.activities(rest), residual)
        return learned, state


def _at(problem: InferenceProblem, state: State, residual: Array | None = None) -> Learned:
    """The gradient ∂F/∂(weights) at the activities of `state`."""
    activities = problem.activities(state)
    errors = problem.prediction_errors(activities)
    deltas = [problem.weighted_error(index, e) for index, e in enumerate(errors, start=1)]
    gradient = local_gradient(problem.network, activities, deltas)
    if residual is None:
        residual = _relative_residual(problem, state)
    return Learned(gradient, activities, residual)


def _relative_residual(problem: InferenceProblem, state: State) -> Array:
    """‖∂F/∂x‖ over ‖Π ε‖ of the hidden layers, which it is the difference of two terms of."""
    slope = problem.gradient(state)
    errors = problem.prediction_errors(problem.activities(state))
    weighted = tuple(problem.weighted_error(i, e) for i, e in enumerate(errors[:-1], start=1))
    size = dot(weighted, weighted)
    return jnp.sqrt(dot(slope, slope) / jnp.where(size > 0, size, 1))


def _without_inference(problem: InferenceProblem, gradient: Network) -> Learned:
    activities = problem.activities(problem.feedforward_state())
    return Learned(gradient, activities, jnp.zeros(activities[0].shape[0], problem.network.dtype))


def _check_steps(name: str, dt: float, steps: int) -> None:
    if not 0 < dt < math.inf:
        raise InputError(f"{name} needs a positive and finite step, got {dt}")
    if steps < 1:
        raise InputError(f"{name} needs at least one step, got {steps}")
