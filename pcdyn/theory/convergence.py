"""The convergence theorem (Theorem 3.6, A.6.3) and where its proof breaks, as measured numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from pcdyn._support.types import Numbers
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.output_error import (
    LARGEST_RISE,
    output_error_flow,
)
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.statement import Statement


def rising_loss_problem() -> InferenceProblem:
    """Make a linear 2-2-2-2 network and a target whose ℒ falls, then rises, in inference."""
    weights = (
        jnp.eye(2),
        jnp.asarray([[-4.93, 29.25], [-15.19, 89.87]]),
        jnp.asarray([[-1.33, 0.65], [0.13, -0.15]]),
    )
    return InferenceProblem(
        Network([Dense(weight) for weight in weights]),
        input=jnp.zeros(2),
        output=jnp.asarray([math.cos(3.42), math.sin(3.42)]),
    )


def noisy_problem(
    weights: Sequence[Numbers], *, noise: float | Array, precision: float | Array
) -> InferenceProblem:
    """Make a linear 1-1-2 network with targets (x, cξ), ξ of mean square 1, uncorrelated with x.

    `weights` are W_1 of shape (1, 1) and W_2 of shape (2, 1), `noise` is c ≥ 0, `precision` λ of
    the output. ℒ at unit precision is least, c²/2 per sample, where the first output is
    fitted, and has a saddle, (1 + c²)/2, where the weights predict nothing.
    """
    x = jnp.asarray([1.0, 1.0, -1.0, -1.0])
    unrelated = jnp.asarray([1.0, -1.0, 1.0, -1.0])
    return InferenceProblem(
        Network([Dense(weight) for weight in weights]),
        input=x[:, None],
        output=jnp.stack([x, noise * unrelated], axis=-1),
        energy=Gaussian([1.0, precision]),
    )


def growing_weight(time: Numbers, start: float, *, noise: float, precision: float) -> np.ndarray:
    """Compute ‖W_2‖ of `noisy_problem` at the saddle of ℒ, where learning never ends.

    With W_1 = 0 and W_2 = (0, b), `F* = λ/2 [1 + c²/(1 + λb²)]` per sample, so that
    `ln b + λb² + λ²b⁴/4 = λ²c²t + constant`: b → (4c²t)^¼ whatever λ is. `time` is the time
    times the number of samples, of which F is the sum, in units of the weight time constant;
    `start` is b > 0 at time 0. Solved by bisection in b.
    """
    from scipy.optimize import brentq

    def clock(b: float) -> float:
        return math.log(b) + precision * b**2 + (precision * b**2) ** 2 / 4

    def at(t: float) -> float:
        target = clock(start) + (precision * noise) ** 2 * t
        end = start + (4 * noise**2 * t + 4 * abs(target) / precision**2) ** 0.25 + 1
        root: Any = brentq(lambda b: clock(b) - target, start, end, xtol=1e-14 * end)
        return float(root)

    return np.array([at(float(t)) if t > 0 else start for t in np.atleast_1d(time)])


def largest_rises(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Where ℒ provably falls in linear networks, where it need not, and how much it can rise."""
    cases = {
        "scalar output, 4-4-4-1": ((4, 4, 4, 1), None),
        "one hidden layer of scalar precision, 4-4-4": ((4, 4, 4), None),
        "one hidden layer of full precision, 4-4-4": ((4, 4, 4), "full"),
        "two hidden layers, 4-4-4-4": ((4, 4, 4, 4), None),
    }
    times = np.append(np.geomspace(1e-3, 1e4, 57), np.inf)
    rises = {
        name: _largest_rises(widths, precision, networks, seed, times)
        for name, (widths, precision) in cases.items()
    }
    names = list(cases)
    rows = [
        Evidence(
            statement="A.6.3 largest rise",
            claim=f"no target makes ℒ rise: {name} (largest rise over ℒ at the start)",
            measured=float(rises[name].max()), relation="at most", expected=0.0, tolerance=1e-9,
            oracle="none needed: eigenvalues of N(t)² − N(s)², s < t, of pcdyn.output_error",
            settings={"networks": networks, "seed": seed, "times": len(times)},
            expected_to_hold=index < 2,
        )
        for index, name in enumerate(names)
    ]  # fmt: skip
    rows.append(
        Evidence(
            statement="A.6.3 largest rise",
            claim="no linear network's ℒ rises by more than (√5 − 2)/4 of its start",
            measured=float(max(r.max() for r in rises.values())), relation="at most",
            expected=LARGEST_RISE, tolerance=1e-12,
            oracle="largest eigenvalue of B² − A² over 0 ≼ B ≼ A ≼ I",
            settings={"networks": networks * len(cases), "seed": seed},
        )
    )  # fmt: skip
    return tuple(rows)


def _largest_rises(
    widths: tuple[int, ...], precision: str | None, networks: int, seed: int, times: np.ndarray
) -> np.ndarray:
    """The largest rise over all targets and pairs of times, of each of several random networks."""

    def rise(key: PRNGKeyArray) -> Array:
        keys = jr.split(key, len(widths))
        weights = [
            jr.normal(k, (m, n)) for k, n, m in zip(keys[:-1], widths[:-1], widths[1:], strict=True)
        ]
        energy = None
        if precision == "full":
            # Of a Wishart distribution, conditioned well enough for its eigenvalues to be resolved.
            root = jr.normal(keys[-1], (widths[1], widths[1]))
            energy = Gaussian([root @ root.T + 0.01 * jnp.eye(widths[1]), 1.0])
        problem = InferenceProblem(
            Network([Dense(weight) for weight in weights]),
            input=jnp.zeros(widths[0]), output=jnp.ones(widths[-1]), energy=energy,
        )  # fmt: skip
        return output_error_flow(problem).largest_rise(times)

    # One program for each shape: mapped operation by operation it would be dozens.
    return np.asarray(jax.jit(jax.vmap(rise))(jr.split(jr.key(seed), networks)))


STATEMENTS = (
    Statement(
        number="A.6.3 largest rise", title="How far the loss can rise",
        says="From the feedforward pass the supervised loss is guaranteed to decrease during "
        "inference.",
        as_printed="does not hold",
        form="In linear networks it does with a scalar output, and with one hidden layer of scalar "
        "precision. Otherwise it can rise again, by at most (√5 − 2)/4 = 5.9 % of its start; it "
        "never ends above its start.",
        measure=largest_rises,
    ),
)  # fmt: skip
