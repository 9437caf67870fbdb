"""Equilibrium solvers side by side: the problems, and error against the work that each may do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import pcdyn
from experiments.shared.networks import classifier, in_float64, trained_classifier
from experiments.shared.timing import best_time
from pcdyn import solvers
from pcdyn._support.types import State
from pcdyn.model.network import Initialisation, apply_layer

# Work by which each method is let run further and further: iterations, or time constants.
RUNGS = np.array([1, 2, 3, 5, 8, 12, 20, 50, 100, 300, 1000, 3000, 10_000])

ITERATIVE = {
    "conjugate gradients": solvers.ConjugateGradients(),
    "Gauss–Newton": solvers.GaussNewton(),
    "matrix-free Gauss–Newton": solvers.GaussNewton(explicit_width=0, cg_tolerance=1e-2),
    "Nesterov": solvers.ErrorDescent(),
    "error descent": solvers.ErrorDescent(nesterov=False),
    "pseudo-transient": solvers.PseudoTransient(),
    "fixed point": solvers.FixedPoint(),
}


@dataclasses.dataclass(frozen=True)
class Race:
    """Networks with both ends clamped, a batch of 64, float32; references in float64."""

    batch: int = 64
    mnist: bool = True
    epochs: int = 3
    precisions: tuple[float, ...] = (0.01, 1.0, 100.0, 1000.0)
    depths: tuple[int, ...] = (8, 16, 32, 64)
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    width: int = 128
    deep: tuple[tuple[int, Initialisation], ...] = (
        (8, "orthogonal"), (64, "orthogonal"), (32, "fan_in"),
    )  # fmt: skip
    solvers: tuple[str, ...] = (
        "Gauss–Newton", "Nesterov", "error descent", "pseudo-transient", "fixed point", "Tsit5",
        "Euler",
    )  # fmt: skip
    seconds: float = 1.0
    seed: int = 0


def problems(config: Race) -> tuple[dict[str, pcdyn.InferenceProblem], str]:
    """The problems by name, and where the digits come from."""
    keys = jr.split(jr.key(config.seed), 8)
    cases = {}
    for name, widths, activation in (
        ("5-5-5 linear", (5, 5, 5), "identity"),
        ("20-20-20-20 tanh", (20, 20, 20, 20), "tanh"),
    ):
        network = pcdyn.mlp(
            widths, activation=activation, std=0.05**0.5, key=keys[0], dtype=jnp.float32
        )
        cases[name] = pcdyn.InferenceProblem(
            network,
            input=1 + jr.normal(keys[1], (config.batch, widths[0])),
            output=jnp.tanh(jr.normal(keys[2], (config.batch, widths[-1]))),
        )
    digits, source = digit_problems(config, keys[3:]) if config.mnist else ({}, "none")
    cases |= digits
    for depth, initialisation in config.deep:
        name = f"{depth} × {config.width} {initialisation.replace('_', ' ')}"
        cases[name] = deep_problem(config, depth, config.width, initialisation)
    return cases, source


def digit_problems(config: Race, keys: jax.Array) -> tuple[dict[str, pcdyn.InferenceProblem], str]:
    """A random and a trained classifier of digits, and where the digits come from."""
    digits = pcdyn.datasets.mnist("train", limits=(0.0, 1.0), dtype=np.float32)
    random = classifier((784, 128, 64, 10), "tanh", keys[0])
    trained = trained_classifier(random, digits, epochs=config.epochs, key=keys[1])
    chosen = np.random.default_rng(config.seed).choice(len(digits.labels), config.batch, False)
    images, targets = digits.images[chosen], digits.one_hot[chosen]
    cases = {"MNIST random": pcdyn.InferenceProblem(random, input=images, output=targets)}
    for precision in config.precisions:
        cases[f"MNIST trained, Π = {precision:g}"] = pcdyn.InferenceProblem(
            trained, input=images, output=targets, energy=pcdyn.Gaussian([1.0, 1.0, precision])
        )
    return cases, digits.source


def deep_problem(
    config: Race, depth: int, width: int, initialisation: Initialisation = "orthogonal"
) -> pcdyn.InferenceProblem:
    """`depth` tanh layers of equal width below 10 linear outputs; Gaussian inputs, one-hot targets.

    The batch and the seed are those of `config`.
    """
    keys = jr.split(jr.fold_in(jr.key(config.seed), depth), 3)
    network = pcdyn.mlp(
        [width] * depth + [10], activation="tanh", output_activation="identity",
        initialisation=initialisation, key=keys[0], dtype=jnp.float32,
    )  # fmt: skip
    labels = jr.randint(keys[2], (config.batch,), 0, 10)
    return pcdyn.InferenceProblem(
        network,
        input=jr.normal(keys[1], (config.batch, width)),
        output=jax.nn.one_hot(labels, 10),
    )


def exact_equilibrium(problem: pcdyn.InferenceProblem) -> np.ndarray:
    """The equilibrium in float64 to a residual of 1e-10, all layers side by side."""
    methods = (solvers.GaussNewton(), solvers.ErrorDescent(), solvers.PseudoTransient())
    return _rows(pcdyn.equilibrium(in_float64(problem), method=methods, tolerance=1e-10).state)


def ladder(
    problem: pcdyn.InferenceProblem, name: str, reference: np.ndarray, budget: float
) -> list[tuple[float, np.ndarray]]:
    """Seconds and relative errors, rung by rung, until it arrives, diverges or takes too long.

    Errors are relative to the displacement between the feedforward pass and the equilibrium.
    """
    solve = compiled(problem, name)
    way = np.linalg.norm(_rows(problem.feedforward_state()) - reference, axis=1)
    results: list[tuple[float, np.ndarray]] = []
    for rung in RUNGS:
        state, seconds = best_time(solve, problem, jnp.asarray(rung))
        results.append((seconds, np.linalg.norm(_rows(state) - reference, axis=1) / way))
        medians = [float(np.median(errors)) for _, errors in results]
        diverges = not medians[-1] < 2
        arrived = medians[-1] < 1e-3 and len(medians) > 2 and medians[-1] > 0.8 * medians[-3]
        if seconds > budget or diverges or arrived:
            break
    return results


def compiled(problem: pcdyn.InferenceProblem, name: str) -> Callable[..., Any]:
    """A compiled function from the problem and the amount of work to the state."""
    if name == "Euler":
        step = min(0.1, 1 / float(largest_curvature(problem)))
        return eqx.filter_jit(lambda problem, steps: euler(problem, step, steps))
    # What it has found after so much work, not when it would stop.
    options: dict[str, Any] = {"tolerance": 1e-30, "throw": False}

    def solve(problem: pcdyn.InferenceProblem, work: jax.Array) -> State:
        if name == "Tsit5":
            solver = solvers.FlowToRest(pcdyn.Diffrax("tsit5", fallback=None), t1=work)
        else:
            solver = eqx.tree_at(lambda s: s.max_iterations, ITERATIVE[name], work)
        return pcdyn.equilibrium(problem, method=solver, **options).state

    return eqx.filter_jit(solve)


def euler(problem: pcdyn.InferenceProblem, step: float, steps: jax.Array) -> State:
    """A bare loop of Euler steps, without any check: the least that an update can cost."""
    prepared = problem.prepared()

    def update(_: jax.Array, state: State) -> State:
        slope = prepared.gradient(state)
        return jax.tree.map(lambda x, g: x - step * g, state, slope)

    return jax.lax.fori_loop(0, steps, update, problem.feedforward_state())


def error_descent(problem: pcdyn.InferenceProblem, rate: float, steps: int) -> State:
    """A bare loop of descent in error coordinates, as others write it, for unit precisions."""
    hidden, last = problem.network.layers[1:-1], problem.network.layers[-1]
    first, target = problem.prepared().first_prediction, problem.output
    assert first is not None and target is not None, "both ends are clamped"

    def free_energy(errors: State) -> jax.Array:
        x = first + errors[0]
        for layer, error in zip(hidden, errors[1:], strict=True):
            x = apply_layer(layer, x) + error
        each = (*errors, target - apply_layer(last, x))
        return sum((jnp.sum(error**2) for error in each), jnp.zeros(())) / 2

    def update(_: jax.Array, errors: State) -> State:
        return jax.tree.map(lambda e, g: e - rate * g, errors, jax.grad(free_energy)(errors))

    none = jax.tree.map(jnp.zeros_like, problem.zeros_state())
    return jax.lax.fori_loop(0, steps, update, none)


@eqx.filter_jit
def largest_curvature(problem: pcdyn.InferenceProblem) -> jax.Array:
    """The largest eigenvalue of the Hessian at the feedforward pass, by power iteration."""
    state = problem.feedforward_state()
    _, product = jax.linearize(problem.gradient, state)

    def iterate(_: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        direction, _ = carry
        image = product(direction)
        size = jnp.sqrt(sum(jnp.sum(x**2, -1) for x in image))
        return jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1)[:, None], image), size

    start = problem.random_state(jr.key(0))
    sizes = jnp.zeros(len(start[0]), start[0].dtype)
    return jnp.max(jax.lax.fori_loop(0, 50, iterate, (start, sizes))[1])


def to_rest(solver: pcdyn.solvers.Solver, tolerance: float = 1e-4) -> Callable[..., Any]:
    """A compiled function from a problem to the status of each sample."""

    def solve(problem: pcdyn.InferenceProblem) -> jax.Array:
        found = pcdyn.equilibrium(problem, method=solver, tolerance=tolerance, throw=False)
        return found.status_codes

    return eqx.filter_jit(solve)


def _rows(state: State) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64) for x in state], axis=-1)
