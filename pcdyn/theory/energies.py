"""A.8, other energies: the adjoint condition, log ε, several minima, uniqueness and bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from scipy.integrate import solve_ivp

from pcdyn.equilibria.equilibrium import Equilibrium, equilibrium
from pcdyn.equilibria.multiple import multiple_equilibria
from pcdyn.integrators import Diffrax
from pcdyn.model.energies.generalised import Divisive, LogCosh, PseudoHuber, Separable, Student
from pcdyn.model.network import Dense, Network, mlp
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.adjoint_condition import adjoint_condition
from pcdyn.simulation.simulate import simulate
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.statement import Statement

_TOLERANCE = 1e-9
# Sums of a few terms of order 1, each with a few roundings.
_ROUND_OFF = 1e-12


def adjoint_recursion(*, seed: int = 0, networks: int = 5) -> tuple[Evidence, ...]:
    """Eq 51: the prediction error gives the recursion of BP for every h, a ratio does not."""
    worst, least, recursion, loss = 0.0, np.inf, 0.0, -np.inf
    settings = {"networks": networks, "widths": [3, 4, 3, 2], "seed": seed, "activation": "tanh"}
    for problem in _problems(seed, networks, LogCosh()):
        rest = equilibrium(problem, method="pseudo_transient", tolerance=_TOLERANCE)
        activities = tuple(np.asarray(x) for x in rest.activities)
        own = adjoint_condition(problem.network, activities).residuals
        ratio = adjoint_condition(problem.network, activities, interaction=jnp.divide).residuals
        worst, least = max(worst, float(jnp.max(own))), min(least, float(jnp.min(ratio)))
        recursion = max(recursion, _recursion_residual(problem, activities))
        loss = max(loss, _excess(problem, rest))
    oracle = "automatic differentiation of g, without the energy"
    return (
        Evidence("Eq 51", "g = x_l − μ_l obeys the adjoint condition (largest relative residual)",
                 worst, "equal", 0.0, _ROUND_OFF, oracle, settings),
        Evidence("Eq 51", "g = x_l / μ_l does not obey it (smallest relative residual)",
                 least, "at least", 0.01, 0.0, oracle, settings),
        # Residuals of two layers, each of which the tolerance of the equilibrium bounds.
        Evidence("Eq 51", "log cosh: h'(ε_l*) = W_{l+1}ᵀ (f' ∘ h'(ε_{l+1}*)) (largest residual)",
                 recursion, "equal", 0.0, 2 * _TOLERANCE, "the recursion in NumPy", settings),
        Evidence("Eq 51", "log cosh: ℒ(x*) ≤ F(x*) ≤ ℒ(feedforward) (largest excess)",
                 loss, "at most", 0.0, _ROUND_OFF, "Σ log cosh ε in NumPy", settings),
    )  # fmt: skip


def printed_logarithm(*, seed: int = 0, networks: int = 1) -> tuple[Evidence, ...]:
    """h = log ε as printed: singular at t = ε₀²/2, where the divisive form goes on."""
    first, last, delta = 1.5, 1e-4, 0.1
    settings: Mapping[str, Any] = {"epsilon_0": first, "stopped_at": last}

    def reached(_: float, error: np.ndarray) -> float:
        return error[0] - last

    reached.terminal = True  # type: ignore[attr-defined]
    run = solve_ivp(lambda _, e: -1 / e, (0, first**2), np.array([first]), method="Radau",
                    events=reached, rtol=1e-10, atol=1e-12)  # fmt: skip
    network = Network([Dense(jnp.ones((1, 1)))])
    problem = InferenceProblem(network, input=[0.0], energy=Divisive(delta))
    times = np.array([0.0, 0.5, 1.0, first**2 / 2, 1.5])
    flow = simulate(problem, t1=1.5, times=times, initial=([first],),
                    integrator=Diffrax(rtol=1e-10, atol=1e-12))  # fmt: skip
    error = np.asarray(flow.activities[1])[:, 0]
    # dε/dt = −ε/(δ + ε²) integrates to this, which falls at rate 1.
    elapsed = delta * np.log(first / error) + (first**2 - error**2) / 2
    return (
        Evidence("A.8 log ε", "h = log ε: the flow dε/dt = −1/ε ends at t = ε₀²/2",
                 float(run.t[-1]), "equal", (first**2 - last**2) / 2, 1e-7,
                 "SciPy's Radau against ε² = ε₀² − 2t", settings),
        Evidence("A.8 log ε", "h = log ε: the speed |dε/dt| stays bounded", 1 / float(run.y[0, -1]),
                 "at most", 1e3, 0.0, "SciPy's Radau", settings, expected_to_hold=False),
        Evidence("A.8 log ε", "h = ½ log(1 + ε²/δ): the flow goes through t = ε₀²/2 (error of t)",
                 float(np.abs(elapsed - times).max()), "equal", 0.0, 1e-7,
                 "δ log(ε₀/ε) + (ε₀² − ε²)/2 = t", {**settings, "delta": delta}),
    )  # fmt: skip


def other_energies(*, seed: int = 0, networks: int = 5) -> tuple[Evidence, ...]:
    """A.8: how many equilibria there are, and what one error can add to a gradient."""
    return (
        *unique_equilibrium(seed=seed, networks=networks),
        *student_minima(seed=seed),
        *bounded_influence(seed=seed),
    )


def student_minima(*, seed: int = 0, networks: int = 1) -> tuple[Evidence, ...]:
    """h = log(1 + ε²) on the chain 0 → x → 4: minima at 2 ± √3, a maximum at 2."""
    network = Network([Dense(jnp.ones((1, 1))), Dense(jnp.ones((1, 1)))])
    problem = InferenceProblem(network, input=[0.0], output=[4.0], energy=Student())
    found = multiple_equilibria(problem, (np.array([[0.0], [4.0]]),), tolerance=_TOLERANCE)
    ends = np.sort(np.asarray(found.activities[1])[:, 0])
    low, high = float(ends[0]), float(ends[-1])
    curvature = float(np.asarray(found.smallest_eigenvalue).min())
    settings = {"chain": "0 → x → 4", "starts": [0.0, 4.0]}
    oracle = "2(u³ − 3u) = 0 with x = 2 + u"
    # Curvature at the minima is 1.5, so that a residual moves them by less than itself.
    rows = [
        Evidence("A.8", f"log(1 + ε²): the {name} minimum of the chain 0 → x → 4", measured,
                 "equal", 2 + sign * math.sqrt(3), _TOLERANCE, oracle, settings)
        for name, measured, sign in (("lower", low, -1), ("upper", high, 1))
    ]  # fmt: skip
    middle = (jnp.array([2.0]),)
    derivatives = jax.jit(lambda x: (problem.gradient(x), jax.hessian(problem.free_energy)(x)))
    (slope,), ((between,),) = derivatives(middle)
    rows += [
        Evidence("A.8", "log(1 + ε²): both are minima (smallest F'')", curvature, "at least", 0.0,
                 0.0, oracle, settings),
        Evidence("A.8", "log(1 + ε²): F' halfway between them, at 2", float(slope[0]), "equal",
                 0.0, _ROUND_OFF, oracle, settings),
        Evidence("A.8", "log(1 + ε²): F'' there, a maximum", float(between[0, 0]), "equal",
                 -0.48, _ROUND_OFF, "F'' = 2 h''(2), h'' = 2(1 − ε²)/(1 + ε²)²", settings),
    ]  # fmt: skip
    return tuple(rows)


def unique_equilibrium(*, seed: int = 0, networks: int = 5) -> tuple[Evidence, ...]:
    """Convex h and a linear network: one equilibrium, wherever inference starts."""
    distance, starts, rng = 0.0, 8, np.random.default_rng(seed + 1)
    for problem in _problems(seed, networks, LogCosh(), "identity"):
        many = problem.with_data(
            *(jnp.broadcast_to(x, (starts, x.shape[-1]))
              for x in (problem.input, problem.output) if x is not None)
        )  # fmt: skip
        state = [3 * rng.normal(size=(starts, n)) for n in many.network.widths[1:-1]]
        found = equilibrium(many, method="pseudo_transient", initial=state, tolerance=_TOLERANCE)
        ends = np.concatenate([np.asarray(x) for x in found.state], axis=-1)
        distance = max(distance, float(np.abs(ends - ends[0]).max()))
    settings = {"networks": networks, "widths": [3, 4, 3, 2], "starts": starts, "seed": seed}
    return (
        # Curvature near these equilibria is above 1e-3, where errors are of order 1.
        Evidence("A.8", "log cosh, linear networks: all starts end at one point (largest distance)",
                 distance, "equal", 0.0, 1e3 * _TOLERANCE, "F is strictly convex", settings),
    )  # fmt: skip


def bounded_influence(*, seed: int = 0, networks: int = 1) -> tuple[Evidence, ...]:
    """|∂E_l/∂ε_l| ≤ Π_l sup|h'|: the bound on what one unit adds to any gradient."""
    grid = jnp.asarray(np.linspace(-60.0, 60.0, 240_001))
    cases: tuple[tuple[str, Separable, float, float], ...] = (
        ("log cosh: 1", LogCosh(), 1.0, 0.0),
        # δ (1 − δ²/(2 ε²)) at the end of the grid, a little less than δ.
        ("pseudo-Huber: δ = ½", PseudoHuber(0.5), 0.5, 0.5**3 / 60**2),
        ("Student: 1/s = 2", Student(0.5), 2.0, 0.0),
        ("divisive: 1/(2√δ) = 1", Divisive(0.25), 1.0, 0.0),
    )
    return tuple(
        Evidence("A.8", f"sup|h'| of {text}",
                 float(jnp.max(jnp.abs(eqx.filter_jit(e.slope)(grid)))), "equal", bound,
                 slack + 1e-8, "calculus", {"grid": "240001 errors up to 60"})
        for text, e, bound, slack in cases
    )  # fmt: skip


def _problems(
    seed: int, networks: int, energy: Separable, activation: str = "tanh"
) -> list[InferenceProblem]:
    """Random 3-4-3-2 networks, one sample each."""
    nets, rng = [], np.random.default_rng(seed)
    for key in jr.split(jr.key(seed), networks):
        network = mlp((3, 4, 3, 2), activation=activation, key=key, dtype=jnp.float64)
        input, output = rng.normal(size=3), 2 * rng.normal(size=2)
        nets.append(InferenceProblem(network, input=input, output=output, energy=energy))
    return nets


def _weights(problem: InferenceProblem) -> list[np.ndarray]:
    return [np.asarray(layer.weight) for layer in problem.network.layers]


def _recursion_residual(problem: InferenceProblem, x: tuple[np.ndarray, ...]) -> float:
    """The largest ‖h'(ε_l) − W_{l+1}ᵀ (f' ∘ h'(ε_{l+1}))‖ of a tanh network with log cosh."""
    weights = _weights(problem)
    predictions = [np.tanh(w @ below) for w, below in zip(weights, x[:-1], strict=True)]
    slopes = [np.tanh(a - m) for a, m in zip(x[1:], predictions, strict=True)]
    residuals = [
        slopes[l] - weights[l + 1].T @ ((1 - predictions[l + 1] ** 2) * slopes[l + 1])
        for l in range(len(weights) - 1)
    ]
    return max(float(np.linalg.norm(r)) for r in residuals)


def _excess(problem: InferenceProblem, rest: Equilibrium) -> float:
    """How far ℒ* ≤ F* ≤ ℒ(feedforward) is violated, the last in NumPy."""
    x = np.asarray(problem.input)
    for weight in _weights(problem):
        x = np.tanh(weight @ x)
    feedforward = float(np.sum(np.log(np.cosh(np.asarray(problem.output) - x))))
    return max(float(rest.output_loss - rest.free_energy), float(rest.free_energy) - feedforward)


STATEMENTS = (
    Statement(
        number="A.8", title="Other energies",
        says="Any energy that is bounded below and splits into ℒ + Ẽ keeps what is good about "
        "inference and learning.",
        as_printed="holds with a condition",
        form="Existence and descent of F do hold. One equilibrium needs convex h (log cosh, "
        "Huber): log(1 + ε²) has two minima, 2 ± √3, on the chain 0 → x → 4.",
        measure=other_energies,
    ),
    Statement(
        number="Eq 51", title="Adjoint condition",
        says="The errors obey the recursion of BP for any h(g) whose interaction g obeys "
        "(∂g_{l+1}/∂x_l) ÷ (∂g_l/∂x_l) = −∂f/∂x_l.",
        as_printed="holds",
        form="As printed, h'(ε_l) in place of ε_l: g = x_l − f(W x_{l−1}) obeys it, a ratio does "
        "not.",
        measure=adjoint_recursion,
    ),
    Statement(
        number="A.8 log ε", title="Divisive errors",
        says="h(ε) = log ε gives divisive prediction errors.",
        as_printed="does not hold",
        form="log ε is unbounded below, undefined for ε < 0 and singular at t = ε_0²/2; "
        "½ log(1 + ε²/δ) is bounded below and smooth, and h' → 1/ε where ε² ≫ δ.",
        measure=printed_logarithm,
    ),
)  # fmt: skip
