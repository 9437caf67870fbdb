"""Backpropagation as a learning rule, and the two rules of predictive coding that equal it.

Each ends with one local gradient per layer, `−(f'_l ∘ d_l) x_{l−1}ᵀ`, at the feedforward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from pcdyn._support.states import step
from pcdyn._support.types import Activities, State
from pcdyn.errors import GraphError, InputError
from pcdyn.learning.rules.base import BatchGradient, Rule, check_clamped_input, check_steps
from pcdyn.model.clamps import PartlyClamped
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import NetworkOrGraph, backpropagation, local_gradient


class Backpropagation(Rule):
    """The gradient ∂ℒ/∂W_l of the output loss of the feedforward pass."""

    @property
    def name(self) -> str:
        return "backpropagation"

    def check(self, problem: InferenceProblem) -> None:
        """Raise `InputError` for a latent input."""
        check_clamped_input(self.name, problem)

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
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
        """Raise `InputError` for a latent input, `GraphError` for what has no one pass."""
        _check_predicted_once(self.name, problem)

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        rest = problem.feedforward_state()
        activities = problem.activities(rest)

        def errors_of(state: State) -> Activities:
            return problem.prediction_errors(problem.activities(state))

        # Slopes and the errors of what is clamped stay those of the pass.
        at_rest, pull = jax.vjp(errors_of, rest)

        def weighted(errors: State) -> Activities:
            own = dict(zip(problem.free_layers, errors, strict=True))
            moved = problem.activities(jax.tree.map(jnp.add, rest, errors))
            each = [own.get(node, e) for node, e in zip(problem.targets, at_rest, strict=True)]
            return tuple(problem.weighted_errors(each, moved))

        def update(_: Array, errors: State) -> State:
            return step(errors, -self.dt, pull(weighted(errors))[0])

        errors = jax.lax.fori_loop(0, self.steps, update, jax.tree.map(jnp.zeros_like, rest))
        gradient = local_gradient(problem.graph, activities, weighted(errors))
        return _without_inference(problem, gradient), state


class ZeroDivergence(Rule):
    """Zero-divergence inference learning (Z-IL, Song et al. 2020): BP by L well-timed steps.

    All layers take Euler steps of size γ = `rate` from the feedforward pass; layer l first moves at
    step L − l, and its weights learn from the error that it has then, γ^{L−l} δ_l. That is BP for
    γ = 1 and BP layer by layer up to a factor otherwise. Hidden precisions must be 1. In a graph
    all ways from a node to what is clamped must be of one length: with a skip a node would still
    wait for one error when the other has moved it. An identity node in the skip makes them equal.
    """

    rate: float = 1.0

    def __check_init__(self) -> None:
        check_steps(self.name, self.rate, 1)

    @property
    def name(self) -> str:
        return "Z-IL"

    def check(self, problem: InferenceProblem) -> None:
        """Raise `InputError` for a latent input, or a hidden layer whose precision is not 1.

        `GraphError` for a graph whose ways are not of one length.
        """
        _check_predicted_once(self.name, problem)
        for index, node in zip(problem.predicted_layers, problem.targets, strict=True):
            if node not in problem.free_layers:
                continue
            # At two errors: an energy that is not Gaussian can have the slope 1 at one of them.
            sizes = jnp.asarray([[1.0], [2.0]], problem.dtype)
            probe = jnp.tile(sizes, (1, problem.widths[node]))
            if not bool(jnp.all(problem.weighted_error(index, probe) == probe)):
                name = problem.node_name(node)
                raise InputError(f"Z-IL needs unit precision, but {name} has another one")
        for node, lengths in ways_to_clamped(problem).items():
            if len(lengths) > 1:
                raise GraphError(
                    f"Z-IL needs all ways from a node to what is clamped to be of one length, but "
                    f"those from {problem.node_name(node)} have {sorted(lengths)} predictions: put "
                    "identity nodes into the shorter ones"
                )

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        x = problem.feedforward_state()
        activities, ways = problem.activities(x), ways_to_clamped(problem)
        times = [max(ways.get(node, {0}), default=0) for node in problem.targets]
        deltas: dict[int, Array] = {}
        for time in range(max(times) + 1):
            now = problem.activities(x)
            weighted = problem.weighted_errors(problem.prediction_errors(now), now)
            deltas.update((k, delta) for k, delta in enumerate(weighted) if times[k] == time)
            x = step(x, -self.rate, problem.gradient(x))
        in_order = [deltas[k] for k in range(len(times))]
        return _without_inference(
            problem, local_gradient(problem.graph, activities, in_order)
        ), state


def ways_to_clamped(problem: InferenceProblem) -> dict[int, set[int]]:
    """Of each free node the lengths of all ways to what is clamped, of a graph without cycles."""
    graph, free = problem.graph, problem.free_layers
    lengths: dict[int, set[int]] = {node: set() for node in free}
    # Each pass over the predictions knows the ways that are longer by one.
    for _ in free:
        for target, sources in zip(graph.targets, graph.sources, strict=True):
            further = {1 + n for n in lengths[target]} if target in free else {1}
            for node in sources:
                if node in free:
                    lengths[node] |= further
    return lengths


def _check_predicted_once(name: str, problem: InferenceProblem) -> None:
    """Raise what `check_clamped_input` does, and `GraphError` for a node predicted twice."""
    check_clamped_input(name, problem)
    for node in problem.free_layers:
        if problem.targets.count(node) > 1 or isinstance(problem.clamp[node], PartlyClamped):
            raise GraphError(
                f"{name} needs nodes that are clamped or free as a whole, and free ones predicted "
                f"once, but {problem.node_name(node)} is not"
            )


def _without_inference(problem: InferenceProblem, gradient: NetworkOrGraph) -> BatchGradient:
    activities = problem.activities(problem.feedforward_state())
    return BatchGradient(gradient, activities, jnp.zeros(problem.batch_shape or (), problem.dtype))
