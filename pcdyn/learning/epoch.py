"""One epoch of learning as one compiled loop over batches, and what is recorded of each."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import PRNGKeyArray

from pcdyn.equilibria.solvers.truncated import UNSETTLED
from pcdyn.learning.rules.base import BatchGradient, Rule
from pcdyn.model.energies.energy import Energy
from pcdyn.model.network import Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import backpropagation, feedforward


class TrainingSetup(eqx.Module):
    """What stays the same from epoch to epoch."""

    static: Any
    rule: Rule
    energy: tuple[Energy, ...]
    optimiser: Any = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    mean: bool = eqx.field(static=True)
    compare: bool = eqx.field(static=True)


def for_each(seeds: int | None, function: Any) -> Any:
    """`function` of the arrays of one network, or mapped over those of several."""
    return function if seeds is None else eqx.filter_vmap(function)


def first_state(setting: TrainingSetup, weights: Any, key: PRNGKeyArray) -> Any:
    """Weights, optimiser and rule before the first batch."""
    network = eqx.combine(weights, setting.static)
    # Epochs fold their number into the key; this one is none of theirs.
    rule_state = setting.rule.init(network, jr.fold_in(key, 2**31 - 1))
    return weights, setting.optimiser.init(weights), rule_state


def batches_of(key: PRNGKeyArray, epoch: Any, count: int, batch_size: int) -> Any:
    """The rows of each batch of an epoch."""
    order = jr.permutation(jr.fold_in(key, epoch), count)
    return order[: count // batch_size * batch_size].reshape(-1, batch_size)


@eqx.filter_jit
def run_epoch(
    setting: TrainingSetup, state: Any, data: Any, key: Any, epoch: Any, seeds: int | None
) -> tuple[Any, dict[str, Any]]:
    """The state after an epoch, and the records of its batches."""

    def one(state: Any, key: Any) -> Any:
        rows = batches_of(key, epoch, len(data[0]), setting.batch_size)
        return jax.lax.scan(lambda s, r: _batch(setting, s, data[0][r], data[1][r]), state, rows)

    return for_each(seeds, one)(state, key)


def _batch(
    setting: TrainingSetup, state: Any, inputs: Any, targets: Any
) -> tuple[Any, dict[str, Any]]:
    """Learn from one batch."""
    weights, optimiser_state, rule_state = state
    network = eqx.combine(weights, setting.static)
    problem = InferenceProblem(network, input=inputs, output=targets, energy=setting.energy)
    learned, rule_state = setting.rule.learn(problem, rule_state)
    gradient = eqx.filter(learned.gradient, eqx.is_inexact_array)
    if setting.mean:
        gradient = jax.tree.map(lambda g: g / len(inputs), gradient)
    updates, optimiser_state = setting.optimiser.update(gradient, optimiser_state, weights)
    record = _record(setting, problem, learned)
    return (optax.apply_updates(weights, updates), optimiser_state, rule_state), record


def _record(
    setting: TrainingSetup, problem: InferenceProblem, learned: BatchGradient
) -> dict[str, Any]:
    """What is recorded of a batch; what the rule has computed already is not computed again."""
    network, outputs = problem.network, feedforward(problem)[-1]
    energies = problem.energies_of(problem.prediction_errors(learned.activities))
    record = {
        "loss": jnp.mean(problem.layer_energy(network.depth, problem.output_error(outputs))),
        "accuracy": share_right(outputs, problem.output),
        "free_energy": jnp.mean(jnp.sum(energies, axis=-1)),
        "output_loss": jnp.mean(energies[:, -1]),
        "residual_energy": jnp.mean(jnp.sum(energies[:, :-1], axis=-1)),
        "median_residual": jnp.median(learned.residual),
        "largest_residual": jnp.max(learned.residual),
        "unsettled": jnp.mean((learned.residual > UNSETTLED).astype(network.dtype)),
    }
    if setting.compare:
        reference = backpropagation(problem).weight_gradient
        pairs = list(zip(_matrices(learned.gradient), _matrices(reference), strict=True))
        record["cosine"] = jnp.stack([_cosine(a.ravel(), b.ravel()) for a, b in pairs])
        record["row_cosine"] = jnp.stack([jnp.mean(_cosine(a, b)) for a, b in pairs])
    return record


def _matrices(gradient: Network) -> list[Any]:
    """The gradient of each layer's largest array, its weight, as a matrix."""
    each = [jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array)) for layer in gradient.layers]
    largest = [max(leaves, key=lambda x: x.size) for leaves in each]
    return [x.reshape(len(x), -1) for x in largest]


def _cosine(a: Any, b: Any) -> Any:
    """The cosine along the last axis; 0 where either vanishes, as a dead unit's row does."""
    lengths = jnp.sqrt(jnp.sum(a**2, -1) * jnp.sum(b**2, -1))
    return jnp.sum(a * b, -1) / jnp.where(lengths > 0, lengths, 1)


def share_right(outputs: Any, targets: Any) -> Any:
    """The share of samples whose largest output is that of the target."""
    right = jnp.argmax(outputs, axis=-1) == jnp.argmax(targets, axis=-1)
    return jnp.mean(right.astype(outputs.dtype))
