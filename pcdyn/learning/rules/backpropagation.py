"""Backpropagation as a learning rule, and the two rules of predictive coding that equal it.

Each ends with one local gradient per layer, `−(f'_l ∘ d_l) x_{l−1}ᵀ`, at the feedforward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from pcdyn._support.states import step
from pcdyn._support.types import State
from pcdyn.errors import InputError
from pcdyn.learning.rules.base import BatchGradient, Rule, check_clamped_input, check_steps
from pcdyn.model.network import Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import backpropagation, feedforward, local_gradient


class Backpropagation(Rule):
    """The gradient ∂ℒ/∂W_l of the output loss of the feedforward pass."""

    @property
    def name(self) -> str:
        return "backpropagation"

    def check(self, problem: InferenceProblem) -> None:
        """Raise `InputError` for a latent input."""
        check_clamped_input(self.name, problem)

    def init(self, network: Network, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        found = backpropagation(problem)
        return _without_inference(problem, found.weight_gradient), state


class FixedPrediction(Rule):
    """Predictive coding with predictions and slopes frozen at the feedforward pass.

    Under this fixed prediction assumption the equilibrium is BP exactly; on the way there
    ε_{L−1}(t) = (1 − e^{−t}) δ_{L−1}, for unit precisions of the hidden layers.

    **Arguments:**

    - `dt`: the step of the Euler updates of the errors, in activity time constants.
    - `steps`: how many updates are made.
    """

    dt: float = 0.5
    steps: int = 40

    def __check_init__(self) -> None:
        check_steps(self.name, self.dt, self.steps)

    @property
    def name(self) -> str:
        return "fixed prediction assumption"

    def check(self, problem: InferenceProblem) -> None:
        """Raise `InputError` for a latent input."""
        check_clamped_input(self.name, problem)

    def init(self, network: Network, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        network, activities = problem.network, feedforward(problem)
        pulls = [
            jax.vjp(lambda x, i=index: network.predict(i, x), activities[index - 1])[1]
            for index in range(2, network.depth + 1)
        ]
        output_delta = problem.weighted_error(network.depth, problem.output_error(activities[-1]))

        def weighted(errors: State) -> list[Array]:
            moved = jax.tree.map(jnp.add, activities[1:-1], errors)
            return [*problem.weighted_errors(errors, (activities[0], *moved)), output_delta]

        def update(_: Array, errors: State) -> State:
            *own, _ = deltas = weighted(errors)
            above = [pull(delta)[0] for pull, delta in zip(pulls, deltas[1:], strict=True)]
            return step(errors, self.dt, jax.tree.map(jnp.subtract, tuple(above), tuple(own)))

        start = tuple(jnp.zeros_like(x) for x in activities[1:-1])
        errors = jax.lax.fori_loop(0, self.steps, update, start)
        gradient = local_gradient(network, activities, weighted(errors))
        return _without_inference(problem, gradient), state


class ZeroDivergence(Rule):
    """Zero-divergence inference learning (Z-IL, Song et al. 2020): BP by L well-timed steps.

    All layers take Euler steps of size γ = `rate` from the feedforward pass; layer l first moves at
    step L − l, and its weights learn from the error that it has then, γ^{L−l} δ_l. That is BP for
    γ = 1 and BP layer by layer up to a factor otherwise. Hidden precisions must be 1.
    """

    rate: float = 1.0

    def __check_init__(self) -> None:
        check_steps(self.name, self.rate, 1)

    @property
    def name(self) -> str:
        return "Z-IL"

    def check(self, problem: InferenceProblem) -> None:
        """Raise `InputError` for a latent input, or a hidden layer whose precision is not 1."""
        check_clamped_input(self.name, problem)
        for index in range(1, problem.network.depth):
            # At two errors: an energy that is not Gaussian can have the slope 1 at one of them.
            sizes = jnp.asarray([[1.0], [2.0]], problem.network.dtype)
            probe = jnp.tile(sizes, (1, problem.network.widths[index]))
            if not bool(jnp.all(problem.weighted_error(index, probe) == probe)):
                raise InputError(f"Z-IL needs unit precision, but layer {index} has another one")

    def init(self, network: Network, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        network, activities = problem.network, feedforward(problem)
        x, deltas = problem.state_of(activities), []
        for index in range(network.depth, 0, -1):
            now = problem.activities(x)
            errors = problem.prediction_errors(now)
            deltas.insert(0, problem.weighted_error(index, errors[index - 1], now[index]))
            x = step(x, -self.rate, problem.gradient(x))
        gradient = local_gradient(network, activities, deltas)
        return _without_inference(problem, gradient), state


def _without_inference(problem: InferenceProblem, gradient: Network) -> BatchGradient:
    activities = problem.activities(problem.feedforward_state())
    return BatchGradient(
        gradient, activities, jnp.zeros(activities[0].shape[0], problem.network.dtype)
    )
