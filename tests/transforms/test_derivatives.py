"""The derivative table: each public verb under each transformation of JAX, by each of its numbers.

Oracle: central differences of the verb itself, with steps h and h/2. Where a transformation is
expected to be refused, it is by an error of pcdyn, while JAX traces and before anything runs.
`python -m tests.transforms.test_derivatives` prints the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn import linear, linear_equilibrium, posterior
from pcdyn.analysis.stability import stability
from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.errors import PcdynError
from pcdyn.integrators import Diffrax, Euler
from pcdyn.learning import (
    Backpropagation,
    EulerPredictiveCoding,
    FixedPrediction,
    IncrementalPredictiveCoding,
    PredictiveCoding,
    expectation_maximisation,
)
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.simulation.simulate import simulate

Leaves = dict[str, Any]
Verb = Callable[[Leaves], Any]

_RNG = np.random.default_rng(0)
# A 2-3-2 network away from any symmetry; `time constants` are τ_0 … τ_2.
LEAVES: Leaves = {
    "input": _RNG.normal(size=2),
    "output": _RNG.normal(size=2) / 2,
    "weight 1": _RNG.normal(size=(3, 2)) / 2,
    "weight 2": _RNG.normal(size=(2, 3)) / 2,
    "bias 1": _RNG.normal(size=3) / 2,
    "bias 2": _RNG.normal(size=2) / 2,
    "precision 1": np.array([0.7, 1.1, 1.6]),
    "precision 2": np.array([2.0, 1.3]),
    "time constants": np.array([1.0, 1.4, 0.8]),
}
# One direction for each leaf alone, and all of them together.
_WAYS = {name: _RNG.normal(size=x.shape) for name, x in LEAVES.items()}
DIRECTIONS = [
    {name: way * (chosen in (name, "all")) for name, way in _WAYS.items()}
    for chosen in (*LEAVES, "all")
]
STEP = 1e-2
OFFSETS = (0.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0)

TRANSFORMATIONS = ("jit", "vmap", "jvp", "jvp of jvp", "grad", "vmap of grad", "grad of vmap",
                   "jvp of grad")  # fmt: skip
REVERSE = TRANSFORMATIONS[4:]


def problem_of(leaves: Leaves, activation: str) -> InferenceProblem:
    layers = [Dense(leaves[f"weight {l}"], leaves[f"bias {l}"], activation) for l in (1, 2)]
    return InferenceProblem(
        Network(layers),
        input=leaves["input"],
        output=leaves["output"],
        energy=Gaussian([leaves["precision 1"], leaves["precision 2"]]),
        time_constants=list(leaves["time constants"]),
    )


def by_simulate(integrator: Any, activation: str = "tanh") -> Verb:
    def verb(leaves: Leaves) -> Any:
        problem = problem_of(leaves, activation)
        run = simulate(problem, t1=1.5, times=[0.5, 1.5], integrator=integrator)
        return run.activities[1]

    return verb


def by_equilibrium(method: str | None, activation: str = "tanh", weights: float = 1.0) -> Verb:
    def verb(leaves: Leaves) -> Any:
        problem = problem_of(leaves, activation)
        problem = eqx.tree_at(
            lambda p: p.network, problem, jax.tree.map(lambda w: weights * w, problem.network)
        )
        found = equilibrium(problem, method=method, tolerance=EXACT)
        # Nonlinear, so that second derivatives are also those of products.
        return jnp.append(jnp.sin(found.activities[1]), found.free_energy)

    return verb


def by_stability(leaves: Leaves) -> Any:
    """By the time constants as well, which rates depend on."""
    found = stability(problem_of(leaves, "tanh"), at="feedforward")
    return jnp.concatenate([found.rates, found.slowest_mode])


def by_posterior(leaves: Leaves) -> Any:
    found = posterior(problem_of(leaves, "identity"))
    return jnp.concatenate([found.covariances[0].ravel(), found.mean[0], found.log_evidence[None]])


def by_alternation(leaves: Leaves) -> Any:
    found = expectation_maximisation(
        problem_of(leaves, "identity"), rounds=1, learning_rate=0.1, throw=False
    )
    return jnp.concatenate([found.energies.ravel(), found.loss])


def by_loop(verb: Verb) -> Verb:
    """Two rounds in which what the verb returns moves a bias, in a loop of JAX."""

    def one(leaves: Leaves, _: None) -> tuple[Leaves, None]:
        moved = leaves["bias 1"] + jnp.sin(verb(leaves)).ravel()[:3] / 5
        return {**leaves, "bias 1": moved}, None

    def rounds(leaves: Leaves) -> Any:
        arrays = jax.tree.map(jnp.asarray, leaves)
        return jax.lax.scan(one, arrays, None, length=2)[0]["bias 1"]

    return rounds


def by_rule(rule: Any) -> Verb:
    def verb(leaves: Leaves) -> Any:
        problem = problem_of(leaves, "tanh")
        problem = problem.with_data(*(x[None] for x in (problem.input, problem.output)))
        state = rule.init(problem.network, jax.random.key(0))
        learned, _ = rule.learn(problem, state)
        arrays = jax.tree.leaves(eqx.filter(learned.gradient, eqx.is_inexact_array))
        return jnp.concatenate([x.ravel() for x in arrays])

    return verb


EXACT = 1e-11
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
# Each verb with its own noise, the error up to which it computes its value, and what of the table
# it refuses. Steps of an integrator are followed forward in time only.
VERBS: dict[str, tuple[Verb, float, tuple[str, ...]]] = {
    "simulate, euler": (by_simulate(Euler(dt=0.05)), 1e-14, REVERSE),
    "simulate, tsit5": (by_simulate(Diffrax("tsit5", **TIGHT)), 1e-10, REVERSE),
    "simulate, heun": (by_simulate(Diffrax("heun", dt=0.05)), 1e-14, REVERSE),
    "simulate, dopri8": (by_simulate(Diffrax("dopri8", **TIGHT)), 1e-10, REVERSE),
    "simulate, implicit_euler": (by_simulate(Diffrax("implicit_euler", dt=0.1)), 1e-13, REVERSE),
    "simulate, kvaerno5": (by_simulate(Diffrax("kvaerno5", **TIGHT)), 1e-9, REVERSE),
    "simulate, rodas5p": (by_simulate(Diffrax("rodas5p", **TIGHT)), 1e-9, REVERSE),
    "simulate, exact": (by_simulate("exact", "identity"), 1e-14, ()),
    "simulate, lsoda": (by_simulate("lsoda"), 0.0, TRANSFORMATIONS),
    "equilibrium, default": (by_equilibrium(None), EXACT, ()),
    "equilibrium, closed_form": (by_equilibrium("closed_form", "identity"), 1e-14, ()),
    "equilibrium, gauss_newton": (by_equilibrium("gauss_newton"), EXACT, ()),
    "equilibrium, nesterov": (by_equilibrium("nesterov"), EXACT, ()),
    "equilibrium, pseudo_transient": (by_equilibrium("pseudo_transient"), EXACT, ()),
    "equilibrium, fixed_point": (by_equilibrium("fixed_point", weights=0.3), EXACT, ()),
    "equilibrium, flow": (by_equilibrium("flow"), EXACT, ()),
    "linear_equilibrium": (
        lambda leaves: linear_equilibrium(problem_of(leaves, "identity"))[1], 1e-14, (),
    ),
    "posterior": (by_posterior, 1e-13, ()),
    "expectation maximisation, one round": (by_alternation, EXACT, ()),
    "linear.spectrum": (
        lambda leaves: linear.spectrum(problem_of(leaves, "identity")), 1e-13, (),
    ),
    "stability": (by_stability, 1e-13, ()),
    "in a loop, equilibrium": (by_loop(by_equilibrium("gauss_newton")), EXACT, ()),
    "in a loop, posterior": (by_loop(by_posterior), 1e-13, ()),
    "in a loop, stability": (by_loop(by_stability), 1e-13, ()),
    "in a loop, simulate, exact": (by_loop(by_simulate("exact", "identity")), 1e-14, ()),
    "rule, predictive coding": (
        by_rule(PredictiveCoding(method="gauss_newton", tolerance=EXACT)), EXACT, (),
    ),
    "rule, predictive coding, truncated": (
        by_rule(PredictiveCoding()), 0.0, ("jvp", "jvp of jvp", *REVERSE),
    ),
    "rule, Euler steps": (by_rule(EulerPredictiveCoding(steps=5)), 1e-14, ()),
    "rule, incremental": (by_rule(IncrementalPredictiveCoding(steps=5, ratio=0.1)), 1e-13, ()),
    "rule, backpropagation": (by_rule(Backpropagation()), 1e-14, ()),
    "rule, fixed prediction": (by_rule(FixedPrediction(steps=5)), 1e-14, ()),
}  # fmt: skip


def table() -> str:
    """What works and what is refused, in Markdown."""
    rows = [("verb", *TRANSFORMATIONS), ("---",) * (len(TRANSFORMATIONS) + 1)]
    for name, (_, _, refused) in VERBS.items():
        cells = ("refused" if each in refused else "works" for each in TRANSFORMATIONS)
        rows.append((name, *cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def moved(direction: Leaves, length: Any) -> Leaves:
    return {name: x + length * direction[name] for name, x in LEAVES.items()}


def number(verb: Verb) -> Callable[[Leaves], Any]:
    """One number from all that a verb returns."""

    def value(leaves: Leaves) -> Any:
        result = jnp.asarray(verb(leaves)).ravel()
        return jnp.sum(result * jnp.cos(jnp.arange(1.0, len(result) + 1, dtype=result.dtype)))

    return value


def stacked(points: list[Leaves]) -> Leaves:
    return jax.tree.map(lambda *x: jnp.stack(x), *points)


def differences(values: np.ndarray, noise: float) -> tuple[np.ndarray, ...]:
    """First and second derivatives along each direction by steps of h/2, each with its error.

    The error of five points is of fourth order in the step: that of h/2 is a sixteenth of what lies
    between h and h/2, for which a quarter leaves room. The noise of a value comes on top, times the
    sum of the weights over the step, 1.5/(h/2) and 5.4/(h/2)², and h/2 for 1 in its own scale.
    """
    zero, m2, m1, mh, ph, p1, p2 = values.T

    def first(far: Any, near: Any, h: float) -> Any:
        return (8 * (near[1] - near[0]) - (far[1] - far[0])) / (12 * h)

    def second(far: Any, near: Any, h: float) -> Any:
        return (16 * (near[0] + near[1]) - (far[0] + far[1]) - 30 * zero) / (12 * h**2)

    found, half = [], STEP / 2
    for by, roughness in ((first, 1.5 / half), (second, 5.4 / half**2)):
        coarse, fine = by((m2, p2), (m1, p1), STEP), by((m1, p1), (mh, ph), half)
        scale = 1 + np.abs(values).max()
        found += [fine, np.abs(coarse - fine) / 4 + 2 * roughness * scale * (noise + 1e-15)]
    return tuple(found)


def check(cells: dict[str, str], cell: str, ours: Any, theirs: Any, allowed: Any) -> None:
    """Write down in a cell where numbers differ by more than is allowed."""
    wrong = ~(np.abs(np.asarray(ours) - np.asarray(theirs)) <= np.asarray(allowed))
    if wrong.any():
        names = [*LEAVES, "all"]
        worst = [names[i] for i in np.flatnonzero(wrong)] if wrong.ndim else ""
        cells[cell] = (
            f"{np.ravel(ours)} instead of {np.ravel(theirs)} ± {np.ravel(allowed)} {worst}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_derivatives(name: str) -> None:
    """Every cell of one row of the table, by each leaf alone and by all together."""
    verb, noise, refused = VERBS[name]
    value, cells = number(verb), {}
    together, base = DIRECTIONS[-1], jax.tree.map(jnp.asarray, LEAVES)
    two = stacked([moved(together, 0.0), moved(together, 1.0)])
    attempts: dict[str, Callable[[], Any]] = {
        "jit": lambda: jax.make_jaxpr(value)(base),
        "vmap": lambda: jax.make_jaxpr(jax.vmap(value))(two),
        "jvp": lambda: [forward(value, leaf) for leaf in LEAVES],
        "jvp of jvp": lambda: jax.make_jaxpr(functools.partial(rates, value))(base, together),
        "grad": lambda: [backward(value, leaf) for leaf in LEAVES],
        "vmap of grad": lambda: jax.make_jaxpr(jax.vmap(jax.grad(value)))(two),
        "grad of vmap": lambda: jax.make_jaxpr(jax.grad(total(value)))(two),
        "jvp of grad": lambda: jax.make_jaxpr(functools.partial(curved, value))(base, together),
    }
    for transformation, attempt in attempts.items():
        if transformation in refused:
            with pytest.raises(PcdynError):
                attempt()
        elif transformation == "jvp":
            # Each leaf alone: the others then have no tangent at all.
            attempt()
    if "vmap" in refused:
        return

    points = stacked([moved(d, STEP * offset) for d in DIRECTIONS for offset in OFFSETS])
    values = np.asarray(jax.jit(jax.vmap(value))(points)).reshape(len(DIRECTIONS), len(OFFSETS))
    host = float(value(base))
    check(cells, "jit and vmap", values[-1, 0], host, 10 * (noise + 1e-14) * (1 + abs(host)))
    slope, error, curvature, curvature_error = differences(values, noise)
    if "jvp" not in refused:
        ways = stacked(DIRECTIONS)
        along = jax.jit(jax.vmap(functools.partial(rates, value), (None, 0)))(base, ways)
        check(cells, "jvp", along[0], slope, error)
        check(cells, "jvp of jvp", along[1], curvature, curvature_error)
    if "grad" not in refused:
        gradients, curves = jax.jit(functools.partial(curved, total(value)))(
            two, stacked([together, together])
        )
        along = [dot(jax.tree.map(lambda x: x[0], gradients), d) for d in DIRECTIONS]
        check(cells, "grad of vmap", np.stack(along), slope, error)
        check(cells, "jvp of grad", dot(curves, together)[0], curvature[-1], curvature_error[-1])

        def by_each(leaves: Leaves) -> Leaves:
            return {leaf: by_leaf(value, leaf, leaves) for leaf in leaves}

        alone = jax.jit(jax.vmap(by_each))(two)
        for leaf, expected, allowed in zip(LEAVES, slope, error, strict=False):
            ours = np.sum(np.asarray(alone[leaf][0]) * _WAYS[leaf])
            check(cells, f"vmap of grad by {leaf} alone", ours, expected, allowed)
    assert not cells, "\n".join(f"{cell}: {found}" for cell, found in cells.items())


def total(value: Any) -> Any:
    return lambda points: jnp.sum(jax.vmap(value)(points))


def rates(value: Any, leaves: Leaves, direction: Leaves) -> tuple[Any, Any]:
    """The first and the second derivative along a direction, forward over forward."""

    def first(at: Leaves) -> Any:
        return jax.jvp(value, (at,), (direction,))[1]

    return jax.jvp(first, (leaves,), (direction,))


def curved(value: Any, leaves: Leaves, direction: Leaves) -> tuple[Leaves, Leaves]:
    """The gradient and its derivative along a direction, forward over reverse."""
    return jax.jvp(jax.grad(value), (leaves,), (direction,))


def by_leaf(value: Any, leaf: str, leaves: Leaves) -> Any:
    return jax.grad(lambda x: value({**leaves, leaf: x}))(leaves[leaf])


def forward(value: Any, leaf: str) -> Any:
    """Trace the derivative by one leaf, everything else being known."""
    return jax.make_jaxpr(
        lambda x, way: jax.jvp(lambda y: value({**LEAVES, leaf: y}), (x,), (way,))
    )(jnp.asarray(LEAVES[leaf]), jnp.asarray(_WAYS[leaf]))


def backward(value: Any, leaf: str) -> Any:
    """Trace the gradient by one leaf, everything else being known."""
    return jax.make_jaxpr(jax.grad(lambda y: value({**LEAVES, leaf: y})))(jnp.asarray(LEAVES[leaf]))


def dot(a: Leaves, b: Leaves) -> Any:
    """Σ a·b over all but leading axes of `a` that `b` lacks."""
    parts = []
    for leaf, x in a.items():
        axes = tuple(range(np.ndim(x) - np.ndim(b[leaf]), np.ndim(x)))
        parts.append(np.sum(np.asarray(x) * b[leaf], axis=axes))
    return sum(parts)


if __name__ == "__main__":
    print(table())
