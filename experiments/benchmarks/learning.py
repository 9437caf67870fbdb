"""The part of the benchmark that times learning: ratios to BP written plainly in JAX.

784-128-64-10, batch 64, float32, MNIST; one compiled loop over an epoch's batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PyTree

import pcdyn
from experiments.shared.networks import classifier, load, trained_classifier
from experiments.shared.solver_races import exact_equilibrium
from experiments.shared.timing import best_times, row
from pcdyn import learning
from pcdyn.io.datasets import Dataset
from pcdyn.theory import Evidence

_WIDTHS = (784, 128, 64, 10)
_BATCH = 64
_SEEDS = 5
_OPTIMISER = optax.sgd(1e-4, 0.9, nesterov=True)
_RULES = {
    "BP": learning.Backpropagation(),
    "PC": learning.PredictiveCoding(),
    "PC, 20 Euler steps": learning.EulerPredictiveCoding(),
}
_FUNCTIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def rows() -> Iterator[Evidence]:
    """Every measurement with its limit."""
    train, _ = load("mnist")
    train_keys = jr.split(jr.key(0), 2)
    for activation in ("tanh", "relu"):
        random = classifier(_WIDTHS, activation, train_keys[0])
        by_bp = trained_classifier(random, train, epochs=3, key=train_keys[1])
        by_pc = learning.train(
            random, train.images, train.one_hot, rule=_RULES["PC"], optimiser=_OPTIMISER, epochs=3,
            batch_size=_BATCH, key=train_keys[1], reduction="sum",
        ).network  # fmt: skip
        yield from _steps(f"{activation}, trained by BP", activation, by_bp, train)
        yield from _steps(f"{activation}, trained by PC", activation, by_pc, train)
    yield from _seeds(train)


def _steps(
    which: str, activation: str, network: pcdyn.Network, train: Dataset
) -> Iterator[Evidence]:
    what = f"{which}: time of a step,"
    data = (jnp.asarray(train.images), jnp.asarray(train.one_hot))
    calls: dict[str, Callable[[], Any]] = {
        "plain": _plain_epoch(network, data, _FUNCTIONS[activation])
    }
    for name, rule in _RULES.items():
        for epochs in (1, 3):
            calls[f"{name} {epochs}"] = _call(network, data, rule, jr.key(0), epochs)
    best = best_times(calls, seconds=20.0)
    # What train checks and copies before its first epoch is not a matter of steps.
    times = {name: (best[f"{name} 3"] - best[f"{name} 1"]) / 2 for name in _RULES}
    times["plain"] = best["plain"]
    steps = len(data[0]) // _BATCH
    note = ", ".join(f"{name} {1e6 * t / steps:.0f} µs" for name, t in times.items())
    median, most = _errors(network, train)
    yield row(f"{what} BP / plain JAX", times["BP"] / times["plain"], 1.1, note=note)
    yield row(f"{what} PC to equilibrium / plain JAX", times["PC"] / times["plain"], 1.5)
    yield row(
        f"{what} PC by 20 Euler steps / plain JAX", times["PC, 20 Euler steps"] / times["plain"]
    )
    for name, limit in (("BP", 1.15), ("PC", 1.6)):
        yield row(
            f"{which}: an epoch as a user calls it, {name} / plain JAX",
            best[f"{name} 1"] / best["plain"], limit,
        )  # fmt: skip
    yield row(f"{which}: share of the displacement that PC misses, median", median, 0.01)
    yield row(f"{which}: the same, ninth decile", most, 0.05)


def _call(
    network: pcdyn.Network,
    data: tuple[jax.Array, jax.Array],
    rule: learning.Rule,
    key: jax.Array,
    epochs: int,
) -> Callable[[], Any]:
    """Training as a user calls it, with the data on the device already."""
    return lambda: learning.train(
        network, *data, rule=rule, optimiser=_OPTIMISER, epochs=epochs, batch_size=_BATCH, key=key,
        reduction="sum",
    ).state  # fmt: skip


def _plain_epoch(
    network: pcdyn.Network,
    data: tuple[jax.Array, jax.Array],
    function: Callable[[jax.Array], jax.Array],
) -> Callable[[], Any]:
    """BP by hand, without anything recorded but the loss."""
    inputs, targets = data
    weights = [(layer.weight, layer.bias) for layer in network.layers]

    def loss(weights: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        for weight, bias in weights[:-1]:
            x = function(x @ weight.T + bias)
        weight, bias = weights[-1]
        return 0.5 * jnp.sum((x @ weight.T + bias - y) ** 2)

    def update(carry: PyTree, rows: jax.Array) -> PyTree:
        weights, state = carry
        value, slope = jax.value_and_grad(loss)(weights, inputs[rows], targets[rows])
        updates, state = _OPTIMISER.update(slope, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    @jax.jit
    def epoch(weights: PyTree, key: jax.Array) -> PyTree:
        count = len(inputs) // _BATCH * _BATCH
        order = jr.permutation(key, len(inputs))[:count].reshape(-1, _BATCH)
        return jax.lax.scan(update, (weights, _OPTIMISER.init(weights)), order)

    return lambda: epoch(weights, jr.key(0))


def _errors(network: pcdyn.Network, train: Dataset) -> tuple[float, float]:
    """Median and ninth decile of ‖x − x*‖ / ‖x_ff − x*‖ over eight batches."""
    settle = eqx.filter_jit(lambda problem: learning.TruncatedGaussNewton().settle(problem).state)
    errors = []
    for batch in range(8):
        rows = slice(batch * _BATCH, (batch + 1) * _BATCH)
        problem = pcdyn.InferenceProblem(
            network, input=train.images[rows], output=train.one_hot[rows]
        )
        exact = exact_equilibrium(problem)
        found, start = (
            np.concatenate([np.asarray(x, np.float64) for x in state], axis=-1)
            for state in (settle(problem), problem.feedforward_state())
        )
        way = np.linalg.norm(start - exact, axis=-1)
        errors.append(np.linalg.norm(found - exact, axis=-1) / way)
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def _seeds(train: Dataset) -> Iterator[Evidence]:
    keys = jr.split(jr.key(0), _SEEDS)
    stack = eqx.filter_vmap(lambda key: classifier(_WIDTHS, "tanh", key))(keys)
    one = classifier(_WIDTHS, "tanh", keys[0])
    data = (jnp.asarray(train.images), jnp.asarray(train.one_hot))
    for name in ("BP", "PC"):
        calls = {
            "one": _call(one, data, _RULES[name], keys[0], 1),
            "five": _call(stack, data, _RULES[name], keys, 1),
        }
        times = best_times(calls, seconds=20.0)
        yield row(
            f"{name}, first epoch of tanh: five seeds / one", times["five"] / times["one"], 5.0,
            note=f"one {times['one']:.2f} s, five {times['five']:.2f} s",
        )  # fmt: skip
