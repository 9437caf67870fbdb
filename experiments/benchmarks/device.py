"""The part of the benchmark that compares the accelerator with the CPU of the same machine.

Each piece of work is one compiled call, run on both from data that lie there already. Where JAX
has no accelerator the CPU's times stand alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import pcdyn
from experiments.shared.networks import (
    classifier,
    linear_problems,
    network_of,
    trained_classifier,
)
from experiments.shared.timing import best_time, row
from pcdyn import learning
from pcdyn._support.types import State
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Work:
    """A call of its arrays, and what it returns.

    The result is an error per sample or layer; `what` says which. `compiled` is false for calls
    that compile what they need themselves.
    """

    name: str
    call: Callable[[Any], Any]
    arrays: Any
    what: str
    compiled: bool = True


def rows() -> Iterator[Evidence]:
    """Seconds on each device, and the largest error there."""
    accelerator, cpu = jax.devices()[0], jax.devices("cpu")[0]
    devices = [accelerator] if accelerator == cpu else [accelerator, cpu]
    names = ["CPU" if device.platform == "cpu" else device.device_kind for device in devices]
    for work in works():
        seconds = []
        for device, name in zip(devices, names, strict=True):
            with jax.default_device(device):
                arrays = jax.device_put(work.arrays, device)
                compiled = eqx.filter_jit(work.call) if work.compiled else work.call
                started = time.perf_counter()
                jax.block_until_ready(compiled(arrays))
                first = time.perf_counter() - started
                result, best = best_time(compiled, arrays)
            seconds.append(best)
            yield row(
                f"{work.name}, {name}: seconds", best,
                note=f"first call {first:.1f} s, largest {work.what} "
                f"{float(np.max(np.asarray(result))):.1e}",
            )  # fmt: skip
        if len(seconds) == 2:
            yield row(f"{work.name}: CPU / {names[0]}", seconds[1] / seconds[0])


def works() -> Iterator[Work]:
    """Ensembles, large batches, learning, stiff flows and depth."""
    yield from _ensembles(100_000)
    for batch in (8192, 65536):
        yield _equilibrium(batch)
    for batch in (64, 1024):
        yield from _training(65536, batch)
    yield _stiff(1024)
    yield _deep(64)


def _ensembles(networks: int) -> Iterator[Work]:
    """Figure 2's linear networks, each with its own step sizes, in float64."""
    arrays = linear_problems(jr.split(jr.key(0), 3), networks=networks, width=5, std=0.05**0.5)

    def problem(weights: jax.Array, input: jax.Array, output: jax.Array) -> pcdyn.InferenceProblem:
        return pcdyn.InferenceProblem(network_of(weights, "identity"), input=input, output=output)

    def residual(problem: pcdyn.InferenceProblem, state: State) -> jax.Array:
        return jnp.linalg.norm(problem.gradient(state)[0])

    def closed_form(weights: jax.Array, input: jax.Array, output: jax.Array) -> jax.Array:
        posed = problem(weights, input, output)
        return residual(posed, posed.state_of(pcdyn.linear_equilibrium(posed)))

    def trajectory(weights: jax.Array, input: jax.Array, output: jax.Array) -> jax.Array:
        posed = problem(weights, input, output)
        runs = [
            pcdyn.simulate(posed, t1=20.0, times=[0.0, 20.0], integrator=i, throw=False)
            for i in ("tsit5", "exact")
        ]
        return jnp.linalg.norm(runs[0].activities[1][-1] - runs[1].activities[1][-1])

    for name, one, what in (
        ("closed forms", closed_form, "residual"),
        ("trajectories, Tsit5 beside the exact", trajectory, "distance of the two"),
    ):
        yield Work(f"{networks} {name}, 5-5-5", lambda a, f=one: jax.vmap(f)(*a), arrays, what)


def _equilibrium(batch: int) -> Work:
    """Of a trained classifier of digits, in float32."""
    network, images, targets = _classifier(batch)

    def solve(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, targets = arrays
        problem = pcdyn.InferenceProblem(network, input=images, output=targets)
        return pcdyn.equilibrium(problem, throw=False).residual_norms

    name = f"equilibrium of 784-128-64-10, batch {batch}, float32"
    return Work(name, solve, (images, targets), "residual")


def _training(samples: int, batch: int) -> Iterator[Work]:
    """An epoch of `samples` digits."""
    network, images, targets = _classifier(samples)
    optimiser = optax.sgd(0.01 / batch, 0.9, nesterov=True)
    for name, rule in (
        ("BP", learning.Backpropagation()),
        ("PC", learning.PredictiveCoding()),
    ):

        def epoch(arrays: tuple[jax.Array, jax.Array], rule: learning.Rule = rule) -> np.ndarray:
            return learning.train(
                network, *arrays, rule=rule, optimiser=optimiser, epochs=1, batch_size=batch,
                key=jr.key(0), reduction="sum",
            ).history["loss"]  # fmt: skip

        yield Work(f"epoch of {samples} digits by {name}, batch {batch}", epoch,
                   (images, targets), "loss of the batches", compiled=False)  # fmt: skip


def _classifier(samples: int) -> tuple[pcdyn.Network, jax.Array, jax.Array]:
    """784-128-64-10 tanh, trained for three epochs by BP; the shipped digits again and again."""
    digits = pcdyn.datasets.mnist("train", source="sample", limits=(0.0, 1.0), dtype=np.float32)
    network = classifier((784, 128, 64, 10), "tanh", jr.key(0))
    rows = np.arange(samples) % len(digits.images)
    trained = trained_classifier(network, digits, epochs=3, key=jr.key(1))
    return trained, jnp.asarray(digits.images[rows]), jnp.asarray(digits.one_hot[rows])


def _stiff(batch: int) -> Work:
    """20-20-20-20 tanh at a precision ratio of 1e4, in float64, each sample with its own steps."""
    keys = jr.split(jr.key(0), 3)
    network = pcdyn.mlp([20] * 4, activation="tanh", std=0.05**0.5, key=keys[0])
    arrays = (1 + jr.normal(keys[1], (batch, 20)), jnp.tanh(jr.normal(keys[2], (batch, 20))))

    def run(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        input, output = arrays
        problem = pcdyn.InferenceProblem(
            network, input=input, output=output, energy=pcdyn.Gaussian([1.0, 1.0, 1e4])
        )
        return pcdyn.simulate(
            problem, t1=50.0, times=[0.0, 50.0], integrator="rodas5p", per_sample=True, throw=False
        ).vector_field_norms[-1]

    return Work(f"Rodas5P, 20-20-20-20, ratio 1e4, batch {batch}", run, arrays, "field at t = 50")


def _deep(batch: int) -> Work:
    """64 orthogonal tanh layers of 128, in float32."""
    keys = jr.split(jr.key(0), 3)
    network = pcdyn.mlp(
        [128] * 64 + [10], activation="tanh", output_activation="identity",
        initialisation="orthogonal", key=keys[0], dtype=jnp.float32,
    )  # fmt: skip
    labels = jr.randint(keys[2], (batch,), 0, 10)
    arrays = (jr.normal(keys[1], (batch, 128), jnp.float32), jax.nn.one_hot(labels, 10))

    def solve(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        input, output = arrays
        problem = pcdyn.InferenceProblem(network, input=input, output=output)
        return pcdyn.equilibrium(problem, throw=False).residual_norms

    return Work(f"equilibrium of 64 × 128, batch {batch}, float32", solve, arrays, "residual")
