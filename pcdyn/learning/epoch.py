"""One epoch of learning as one compiled loop over batches, and what is recorded of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from pcdyn._support.functions import ByCode
from pcdyn._support.states import cosine
from pcdyn.equilibria.solvers.truncated import UNSETTLED
from pcdyn.learning.rules.base import BatchGradient, Rule
from pcdyn.model.clamps import Clamp, PartlyClamped
from pcdyn.model.energies.energy import output_loss, residual_energy
from pcdyn.model.graph import Graph, learnable
from pcdyn.model.network import Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import NetworkOrGraph, backpropagation, feedforward_loss

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class TrainingSetup(eqx.Module):
    """What stays the same from epoch to epoch.

    `problem` is without weights and data; `targets` are the nodes that accuracy is of.
    """

    problem: InferenceProblem
    rule: Rule
    optimiser: ByCode[optax.GradientTransformation] = eqx.field(static=True)
    targets: tuple[int, ...] = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    mean: bool = eqx.field(static=True)
    compare: bool = eqx.field(static=True)

    def network(self, weights: PyTree) -> NetworkOrGraph:
        """Put weights into what the problem has in place of them."""
        network: Any = eqx.combine(weights, self.problem.graph)
        return network

    def problem_of(self, weights: PyTree, data: Sequence[Clamp]) -> InferenceProblem:
        """Put weights and a batch into the problem."""
        network = self.network(weights)
        return eqx.tree_at(lambda p: p.graph, self.problem, network).with_data(*data)


def for_each(
    seeds: int | None, function: Callable[_Arguments, _Result]
) -> Callable[_Arguments, _Result]:
    """Map a function of the arrays of one network over those of several, if there are several."""
    return function if seeds is None else eqx.filter_vmap(function)


def first_state(setup: TrainingSetup, weights: PyTree, key: PRNGKeyArray) -> PyTree:
    """Return weights, optimiser state and rule state before the first batch."""
    # Epochs fold their number into the key; this one is none of theirs.
    rule_state = setup.rule.init(setup.network(weights), jr.fold_in(key, 2**31 - 1))
    return weights, setup.optimiser.value.init(learnable(weights)), rule_state


def batches_of(key: PRNGKeyArray, epoch: int | Array, count: int, batch_size: int) -> Array:
    """Draw the rows of each batch of an epoch."""
    order = jr.permutation(jr.fold_in(key, epoch), count)
    return order[: count // batch_size * batch_size].reshape(-1, batch_size)


@eqx.filter_jit
def run_epoch(
    setup: TrainingSetup,
    state: PyTree,
    data: tuple[Clamp, ...],
    key: Key[Array, "..."],
    epoch: Array,
    seeds: int | None,
) -> tuple[PyTree, dict[str, Array]]:
    """Learn for an epoch: the state after it, and the records of its batches."""

    def one(state: PyTree, key: PRNGKeyArray) -> tuple[PyTree, dict[str, Array]]:
        rows = batches_of(key, epoch, len(jax.tree.leaves(data)[0]), setup.batch_size)

        def batch(state: PyTree, rows: Array) -> tuple[PyTree, dict[str, Array]]:
            return _batch(setup, state, jax.tree.map(lambda x: x[rows], data))

        return jax.lax.scan(batch, state, rows)

    return for_each(seeds, one)(state, key)


def _batch(
    setup: TrainingSetup, state: PyTree, data: tuple[Clamp, ...]
) -> tuple[PyTree, dict[str, Array]]:
    """Learn from one batch."""
    weights, optimiser_state, rule_state = state
    problem = setup.problem_of(weights, data)
    learned, rule_state = setup.rule.learn(problem, rule_state)
    gradient, learnt = learnable(learned.gradient), learnable(weights)
    if setup.mean:
        gradient = jax.tree.map(lambda g: g / setup.batch_size, gradient)
    updates, optimiser_state = setup.optimiser.value.update(gradient, optimiser_state, learnt)
    weights = eqx.combine(optax.apply_updates(learnt, updates), weights)
    return (weights, optimiser_state, rule_state), _record(setup, problem, learned)


def _record(
    setup: TrainingSetup, problem: InferenceProblem, learned: BatchGradient
) -> dict[str, Array]:
    """What is recorded of a batch; what the rule has computed already is not computed again."""
    energies = problem.energies_of(
        problem.prediction_errors(learned.activities), learned.activities
    )
    after = output_loss(energies, problem.outputs)
    record = {
        **(scores(problem, setup.targets) or {"loss": jnp.mean(after)}),
        "free_energy": jnp.mean(jnp.sum(energies, axis=-1)),
        "output_loss": jnp.mean(after),
        "residual_energy": jnp.mean(residual_energy(energies, problem.outputs)),
        "median_residual": jnp.median(learned.residual),
        "largest_residual": jnp.max(learned.residual),
        "unsettled": jnp.mean((learned.residual > UNSETTLED).astype(problem.dtype)),
    }
    if learned.handed_over is not None:
        record["handed_over"] = jnp.mean(learned.handed_over.astype(problem.dtype))
    if setup.compare:
        reference = backpropagation(problem).weight_gradient
        pairs = list(zip(_matrices(learned.gradient), _matrices(reference), strict=True))
        # The row of a dead unit has no direction.
        record["cosine"] = jnp.stack([cosine(a.ravel(), b.ravel(), of_zero=0.0) for a, b in pairs])
        record["row_cosine"] = jnp.stack([cosine(a, b, of_zero=0.0).mean() for a, b in pairs])
    return record


def scores(problem: InferenceProblem, targets: tuple[int, ...]) -> dict[str, Array]:
    """The mean loss of the feedforward pass, and its accuracy where there is one target.

    Nothing where there is no such pass.
    """
    graph = problem.graph
    if isinstance(graph, Graph):
        known = graph.has_order(problem.free_layers) and bool(problem.outputs)
    else:
        known = problem.input is not None
    if not known:
        return {}
    predicted, loss = feedforward_loss(problem)
    found = {"loss": jnp.mean(loss)}
    if len(targets) == 1 and targets[0] in graph.targets:
        wanted = problem.clamp[targets[0]]
        if wanted is not None and not isinstance(wanted, PartlyClamped):
            found["accuracy"] = accuracy(predicted[targets[0]], wanted)
    return found


def _matrices(gradient: Network | Graph) -> list[Array]:
    """The gradient of each layer's largest array, its weight, as a matrix, if there is one."""
    each = [jax.tree.leaves(learnable(layer)) for layer in gradient.layers]
    largest = [max(leaves, key=lambda x: x.size) for leaves in each if leaves]
    return [x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1) for x in largest]


def accuracy(outputs: Array, targets: Array) -> Array:
    """Compute the share of samples whose largest output is that of the target."""
    right = jnp.argmax(outputs, axis=-1) == jnp.argmax(targets, axis=-1)
    return jnp.mean(right.astype(outputs.dtype))
