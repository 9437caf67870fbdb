"""One epoch of learning as one compiled loop over batches, and what is recorded of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

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
from pcdyn.model.energies.energy import Energy
from pcdyn.model.network import Network
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import backpropagation, feedforward

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class TrainingSetup(eqx.Module):
    """What stays the same from epoch to epoch."""

    static: PyTree
    rule: Rule
    energy: tuple[Energy, ...]
    prior: Prior | None
    optimiser: ByCode[optax.GradientTransformation] = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    mean: bool = eqx.field(static=True)
    compare: bool = eqx.field(static=True)


def for_each(
    seeds: int | None, function: Callable[_Arguments, _Result]
) -> Callable[_Arguments, _Result]:
    """Map a function of the arrays of one network over those of several, if there are several."""
    return function if seeds is None else eqx.filter_vmap(function)


def first_state(setup: TrainingSetup, weights: PyTree, key: PRNGKeyArray) -> PyTree:
    """Return weights, optimiser state and rule state before the first batch."""
    network = eqx.combine(weights, setup.static)
    # Epochs fold their number into the key; this one is none of theirs.
    rule_state = setup.rule.init(network, jr.fold_in(key, 2**31 - 1))
    return weights, setup.optimiser.value.init(weights), rule_state


def batches_of(key: PRNGKeyArray, epoch: int | Array, count: int, batch_size: int) -> Array:
    """Draw the rows of each batch of an epoch."""
    order = jr.permutation(jr.fold_in(key, epoch), count)
    return order[: count // batch_size * batch_size].reshape(-1, batch_size)


@eqx.filter_jit
def run_epoch(
    setup: TrainingSetup,
    state: PyTree,
    data: tuple[Array | None, Array],
    key: Key[Array, "..."],
    epoch: Array,
    seeds: int | None,
) -> tuple[PyTree, dict[str, Array]]:
    """Learn for an epoch: the state after it, and the records of its batches."""

    def one(state: PyTree, key: PRNGKeyArray) -> tuple[PyTree, dict[str, Array]]:
        rows = batches_of(key, epoch, len(data[1]), setup.batch_size)

        def batch(state: PyTree, rows: Array) -> tuple[PyTree, dict[str, Array]]:
            return _batch(setup, state, *jax.tree.map(lambda x: x[rows], data))

        return jax.lax.scan(batch, state, rows)

    return for_each(seeds, one)(state, key)


def _batch(
    setup: TrainingSetup, state: PyTree, inputs: Array | None, targets: Array
) -> tuple[PyTree, dict[str, Array]]:
    """Learn from one batch."""
    weights, optimiser_state, rule_state = state
    network = eqx.combine(weights, setup.static)
    problem = InferenceProblem(
        network, input=inputs, output=targets, energy=setup.energy, prior=setup.prior
    )
    learned, rule_state = setup.rule.learn(problem, rule_state)
    gradient = eqx.filter(learned.gradient, eqx.is_inexact_array)
    if setup.mean:
        gradient = jax.tree.map(lambda g: g / len(targets), gradient)
    updates, optimiser_state = setup.optimiser.value.update(gradient, optimiser_state, weights)
    record = _record(setup, problem, targets, learned)
    return (optax.apply_updates(weights, updates), optimiser_state, rule_state), record


def _record(
    setup: TrainingSetup, problem: InferenceProblem, targets: Array, learned: BatchGradient
) -> dict[str, Array]:
    """What is recorded of a batch; what the rule has computed already is not computed again."""
    network = problem.network
    energies = problem.energies_of(
        problem.prediction_errors(learned.activities), learned.activities
    )
    if problem.input is None:
        before = {"loss": jnp.mean(energies[:, -1])}
    else:
        outputs = feedforward(problem)[-1]
        loss = problem.layer_energy(network.depth, problem.output_error(outputs))
        before = {"loss": jnp.mean(loss), "accuracy": accuracy(outputs, targets)}
    record = {
        **before,
        "free_energy": jnp.mean(jnp.sum(energies, axis=-1)),
        "output_loss": jnp.mean(energies[:, -1]),
        "residual_energy": jnp.mean(jnp.sum(energies[:, :-1], axis=-1)),
        "median_residual": jnp.median(learned.residual),
        "largest_residual": jnp.max(learned.residual),
        "unsettled": jnp.mean((learned.residual > UNSETTLED).astype(network.dtype)),
    }
    if learned.handed_over is not None:
        record["handed_over"] = jnp.mean(learned.handed_over.astype(network.dtype))
    if setup.compare:
        reference = backpropagation(problem).weight_gradient
        pairs = list(zip(_matrices(learned.gradient), _matrices(reference), strict=True))
        # The row of a dead unit has no direction.
        record["cosine"] = jnp.stack([cosine(a.ravel(), b.ravel(), of_zero=0.0) for a, b in pairs])
        record["row_cosine"] = jnp.stack([cosine(a, b, of_zero=0.0).mean() for a, b in pairs])
    return record


def _matrices(gradient: Network) -> list[Array]:
    """The gradient of each layer's largest array, its weight, as a matrix."""
    each = [jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array)) for layer in gradient.layers]
    largest = [max(leaves, key=lambda x: x.size) for leaves in each]
    return [x.reshape(len(x), -1) for x in largest]


def accuracy(outputs: Array, targets: Array) -> Array:
    """Compute the share of samples whose largest output is that of the target."""
    right = jnp.argmax(outputs, axis=-1) == jnp.argmax(targets, axis=-1)
    return jnp.mean(right.astype(outputs.dtype))
