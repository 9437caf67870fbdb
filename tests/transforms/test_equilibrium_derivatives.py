"""Derivatives of equilibria and of exact flows that the derivative table does not have.

Differences of step h = 1e-4 of functions of order one err by about h² = 1e-8 times a third
derivative and by round-off / h = 1e-12; 1e-6 leaves room for derivatives of order 100. Those of
second order err by h² = 1e-8 and round-off / h² = 1e-8, for which 1e-5 leaves the same room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg

import pcdyn
from pcdyn import EquilibriumStatus, Gaussian, InferenceProblem, equilibrium, linear_equilibrium
from pcdyn.references.linear import spectrum

STEP, FIRST, SECOND = 1e-4, 1e-6, 1e-5
INPUT, OUTPUT = np.array([0.5, -0.2, 1.0]), np.array([0.3, -0.4])


def network(activation: str, widths: tuple[int, ...] = (3, 4, 4, 2)) -> pcdyn.Network:
    net = pcdyn.mlp(widths, activation=activation, key=jr.key(0), bias=True)
    biases = [0.1 * jnp.cos(jnp.arange(float(n))) for n in widths[1:]]
    return eqx.tree_at(lambda n: [layer.bias for layer in n.layers], net, biases)


def problem_with(leaf: str, s: Any, activation: str, batch: bool = False) -> InferenceProblem:
    """A problem of which one leaf alone depends on s."""
    net = network(activation)
    x, y = jnp.asarray(INPUT), jnp.asarray(OUTPUT)
    precisions: list[Any] = [1.0, jnp.array([1.0, 2.0, 0.5, 1.5]), 2.0]
    constants: list[Any] = [1.0, 2.0, 1.0, 1.0]
    if leaf == "input":
        x = x.at[0].add(s)
    if leaf == "output":
        y = y.at[1].add(s)
    if leaf == "weight":
        net = eqx.tree_at(lambda n: n.layers[1].weight, net, net.layers[1].weight.at[0, 1].add(s))
    if leaf == "bias":
        net = eqx.tree_at(lambda n: n.layers[2].bias, net, net.layers[2].bias.at[0].add(s))
    if leaf == "precision":
        precisions[1] = precisions[1].at[2].add(s)
    if leaf == "time constant":
        constants[1] = constants[1] + s
    if batch:
        x, y = jnp.stack([x, -x]), jnp.stack([y, y])
    return InferenceProblem(
        net, input=x, output=y, energy=Gaussian(precisions), time_constants=constants
    )


LEAVES = ("input", "output", "weight", "bias", "precision", "time constant")


def assert_derivatives(f: Callable[[Any], Any], second: bool = True) -> None:
    """grad, jvp and grad of grad of f at 0 are what differences of its values are."""
    up, here, down = (float(f(jnp.asarray(s))) for s in (STEP, 0.0, -STEP))
    slope = (up - down) / (2 * STEP)
    zero = jnp.zeros(())
    value, found = jax.jit(jax.value_and_grad(f))(zero)
    np.testing.assert_allclose(value, here, rtol=1e-9)
    np.testing.assert_allclose(found, slope, rtol=FIRST, atol=FIRST)
    np.testing.assert_allclose(jax.jvp(f, (zero,), (jnp.ones(()),))[1], found, rtol=1e-9, atol=1e-9)
    if second:
        bend = (up - 2 * here + down) / STEP**2
        np.testing.assert_allclose(
            jax.jit(jax.grad(jax.grad(f)))(zero), bend, rtol=SECOND, atol=SECOND
        )


@pytest.mark.slow
@pytest.mark.parametrize("leaf", LEAVES)
def test_linear_equilibria_in_output_space_by_one_leaf(leaf: str) -> None:
    def f(s: Any) -> Any:
        problem = problem_with(leaf, s, "identity")
        return linear_equilibrium(problem, method="output_space")[1].sum()

    assert_derivatives(f)


def test_without_hidden_layers_and_with_a_free_input() -> None:
    """x* of one layer with tanh, input free: T = tanh(W x + b) has one solution, dx/dT known."""
    net = pcdyn.Network([pcdyn.Dense(np.array([[2.0]]), np.array([0.1]), "tanh")])

    def f(target: Any) -> Any:
        problem = InferenceProblem(net, output=target[None])
        return equilibrium(problem, initial="zeros", tolerance=1e-13).activities[0].sum()

    # dx/dT = 1 / (2 (1 − T²)), d²x/dT² = T / (1 − T²)².
    np.testing.assert_allclose(jax.grad(f)(0.3), 1 / (2 * (1 - 0.09)), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(jax.grad(f))(0.3), 0.3 / (1 - 0.09) ** 2, rtol=1e-9)


@pytest.mark.slow
def test_what_slides_has_no_derivative() -> None:
    """The host finds that it slides; under a transformation its status says so, by NaN."""
    net = pcdyn.mlp([5, 8, 8, 5], activation="relu", key=jr.key(0))
    y = np.linspace(0.5, -0.5, 5)

    def f(x: Any) -> Any:
        return equilibrium(InferenceProblem(net, input=x, output=y)).free_energy

    x = jnp.linspace(-1, 1, 5)
    assert equilibrium(InferenceProblem(net, input=x, output=y)).status is EquilibriumStatus.SLIDING
    assert np.isnan(jax.jit(jax.grad(f))(x)).all()


def closed_form(s: float, t: float, precision: float) -> Any:
    """x_1(t) of the network 3-4-2 by scipy.linalg.expm, with W_2 + s D."""
    net = pcdyn.mlp([3, 4, 2], activation="identity", key=jr.key(0))
    first, second = (np.asarray(layer.weight) for layer in net.layers)
    second = second + s * np.cos(np.arange(8.0)).reshape(2, 4)
    matrix = np.eye(4) + precision * second.T @ second
    start = first @ INPUT
    rest = np.linalg.solve(matrix, start + precision * second.T @ OUTPUT)
    return rest + scipy.linalg.expm(-matrix * t) @ (start - rest)


def exact(s: Any, t: Any, precision: Any) -> Any:
    net = pcdyn.mlp([3, 4, 2], activation="identity", key=jr.key(0))
    moved = net.layers[1].weight + s * jnp.cos(jnp.arange(8.0)).reshape(2, 4)
    net = eqx.tree_at(lambda n: n.layers[1].weight, net, moved)
    problem = InferenceProblem(net, input=INPUT, output=OUTPUT, energy=Gaussian([1.0, precision]))
    return pcdyn.linear.exact_flow(problem, problem.feedforward_state())(t)[0]


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2], ids=["weight", "time", "precision"])
def test_the_exact_flow_where_rates_repeat(which: int) -> None:
    """The rate 1 comes twice, for the hidden layer is wider than the output."""
    at = (0.0, 0.8, 2.0)

    def moved(step: float) -> Any:
        return closed_form(*[a + step * (i == which) for i, a in enumerate(at)])

    given = tuple(jnp.asarray(a) for a in at)
    np.testing.assert_allclose(exact(*given), moved(0.0), rtol=1e-12)
    slope = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    found = jax.jit(jax.jacrev(exact, which))(*given)
    np.testing.assert_allclose(found, slope, rtol=FIRST, atol=FIRST)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(exact, which))(*given), found, rtol=1e-10)
    bend = (moved(STEP) - 2 * moved(0.0) + moved(-STEP)) / STEP**2
    twice = jax.jit(jax.jacfwd(jax.jacrev(exact, which), which))(*given)
    np.testing.assert_allclose(twice, bend, rtol=SECOND, atol=SECOND)


def test_mixed_derivatives_of_the_exact_flow() -> None:
    """∂²x/∂s∂t and ∂²x/∂s∂Π by central differences in both."""
    at = np.array([0.1, 0.8, 2.0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        first, second = STEP * np.eye(3)[one], STEP * np.eye(3)[other]
        signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
        mixed = sum(a * b * closed_form(*(at + a * first + b * second)) for a, b in signs)
        found = jax.jit(jax.jacfwd(jax.jacrev(exact, one), other))(*map(jnp.asarray, at))
        np.testing.assert_allclose(found, mixed / (4 * STEP**2), rtol=SECOND, atol=SECOND)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rates_of", [spectrum, lambda problem: pcdyn.stability(problem, at="feedforward").rates],
    ids=["linear.spectrum", "stability"],
)  # fmt: skip
def test_the_spectrum_where_rates_repeat(rates_of: Any) -> None:
    """Two rates stay 1 while W moves: their derivatives vanish, and those of Σ λ² are right."""
    direction = jnp.cos(jnp.arange(8.0)).reshape(2, 4)
    net = pcdyn.mlp([3, 4, 2], activation="identity", key=jr.key(0))

    def rates(s: Any) -> Any:
        moved = net.layers[1].weight + s * direction
        problem = InferenceProblem(
            eqx.tree_at(lambda n: n.layers[1].weight, net, moved), input=INPUT, output=OUTPUT
        )
        return rates_of(problem)

    def squares(s: float) -> float:
        second = np.asarray(net.layers[1].weight) + s * np.asarray(direction)
        return float(np.sum(np.linalg.eigvalsh(np.eye(4) + second.T @ second) ** 2))

    zero = jnp.zeros(())
    np.testing.assert_allclose(jax.jacrev(rates)(zero)[:2], 0, atol=1e-13)
    np.testing.assert_allclose(jax.jacfwd(jax.jacrev(rates))(zero)[:2], 0, atol=1e-12)

    def total(s: Any) -> Any:
        return jnp.sum(rates(s) ** 2)

    slope = (squares(STEP) - squares(-STEP)) / (2 * STEP)
    np.testing.assert_allclose(jax.grad(total)(zero), slope, rtol=FIRST)
    bend = (squares(STEP) - 2 * squares(0) + squares(-STEP)) / STEP**2
    np.testing.assert_allclose(jax.grad(jax.grad(total))(zero), bend, rtol=SECOND)
