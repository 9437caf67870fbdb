"""Layers and networks against NumPy, and the distribution of initial weights."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given

from pcdyn.model.network import Dense, Network, mlp
from tests.networks import EPS, FUNCTIONS, SMOOTH, Case, assert_close, build_case, cases, few

# A product of a few numbers of order 1: round-off of one layer is about n EPS, and layers with
# |f'| ≤ 1 and weights of order 1 amplify it by less than 10 each; 3 layers of 4 units.
ROUND_OFF = 1e4 * EPS


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_dense_is_activation_of_affine_map(name: str, bias: bool) -> None:
    """Dense is x ↦ f(W x + b), with the weights inside the activation."""
    case = build_case(seed=1, widths=(3, 4), bias=bias, activations=(name,), clamp="input")
    layer = Dense(case.weights[0], case.biases[0], name)
    x = case.activities[0]
    assert_close(layer(jnp.asarray(x)), case.predict(1, x), ROUND_OFF)
    assert_close(layer.preactivation(jnp.asarray(x)), case.preactivation(1, x), ROUND_OFF)


@few(max_examples=15)
@given(case=cases(clamps=("input",), activations=tuple(FUNCTIONS)))
def test_feedforward_is_a_loop_over_layers(case: Case) -> None:
    """x_l = f_l(W_l x_{l−1} + b_l), against a NumPy loop."""
    x = case.activities[0]
    network = case.network
    assert network.depth == case.depth
    assert network.widths == case.widths
    assert network.dtype == jnp.float64
    assert_close(network.feedforward(jnp.asarray(x)), case.feedforward(x), ROUND_OFF)


@few(max_examples=8)
@given(case=cases(clamps=("input",), activations=SMOOTH, batches=(3,)))
def test_batch_equals_loop(case: Case) -> None:
    """The feedforward pass of a batch, with any leading axes, is that of its samples."""
    network, x = case.network, jnp.asarray(case.activities[0])
    batch = network.feedforward(x)
    cube = network.feedforward(jnp.stack([x, -x]))
    for row in range(3):
        single = network.feedforward(x[row])
        assert_close([layer[row] for layer in batch], single, ROUND_OFF)
        assert_close([layer[0, row] for layer in cube], single, ROUND_OFF)


def test_equinox_layers_predict_like_numpy() -> None:
    """eqx.nn.Linear and eqx.nn.Sequential are layers; their widths are found out."""
    keys = jr.split(jr.key(0), 3)
    linear = eqx.nn.Linear(3, 5, key=keys[0])
    block = eqx.nn.Sequential([
        eqx.nn.Linear(5, 4, key=keys[1]),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.Linear(4, 2, use_bias=False, key=keys[2]),
    ])  # fmt: skip
    network = Network([linear, block], input_width=3)
    assert network.widths == (3, 5, 2)
    x = np.random.default_rng(0).normal(size=(4, 3))
    hidden = x @ np.asarray(linear.weight).T + np.asarray(linear.bias)
    first, _, last = (getattr(lay, "weight", None) for lay in block.layers)
    inner = np.tanh(hidden @ np.asarray(first).T + np.asarray(block.layers[0].bias))
    expected = (x, hidden, inner @ np.asarray(last).T)
    assert_close(network.feedforward(jnp.asarray(x)), expected, ROUND_OFF)


def test_input_width_is_found_from_dense_only() -> None:
    """A Dense first layer needs no input_width, and agrees with the right one."""
    layers = [Dense(np.ones((2, 3)))]
    assert Network(layers).widths == Network(layers, input_width=3).widths == (3, 2)


def test_mlp_places_activations_and_biases() -> None:
    """The last layer takes output_activation; biases start at zero; dtype and keys are obeyed."""
    network = mlp(
        [3, 4, 2], activation="tanh", output_activation="identity", bias=True, key=jr.key(0),
        dtype=jnp.float32,
    )  # fmt: skip
    assert [layer.activation.name for layer in network.layers] == ["tanh", "identity"]
    assert network.dtype == jnp.float32
    assert all(not np.any(np.asarray(layer.bias)) for layer in network.layers)
    plain = mlp([3, 4, 2], activation="tanh", key=jr.key(0))
    assert [layer.activation.name for layer in plain.layers] == ["tanh", "tanh"]
    assert all(layer.bias is None for layer in plain.layers)


def assert_gaussian(weights: np.ndarray, std: float) -> None:
    """Mean, variance and kurtosis of N samples within 5 of their standard errors.

    These are std/√N for the mean, std/√(2N) for the standard deviation and √(24/N) for the
    kurtosis of a Gaussian; 3 checks at 5σ fail by chance with probability 2e-6.
    """
    n = weights.size
    assert abs(weights.mean()) <= 5 * std / np.sqrt(n)
    assert abs(weights.std() - std) <= 5 * std / np.sqrt(2 * n)
    kurtosis = np.mean((weights / weights.std()) ** 4)
    assert abs(kurtosis - 3) <= 5 * np.sqrt(24 / n)


@pytest.mark.parametrize("std", [0.05**0.5, 1.0])
def test_std_is_the_standard_deviation(std: float) -> None:
    """Weights are Gaussian with the standard deviation asked for, at any width."""
    network = mlp([300, 200, 100], activation="tanh", std=std, key=jr.key(1))
    for layer in network.layers:
        assert_gaussian(np.asarray(layer.weight), std)


@pytest.mark.parametrize("initialisation", [None, "fan_in"])
def test_fan_in_is_one_over_root_of_inputs(initialisation: str | None) -> None:
    """The default is Gaussian with standard deviation 1/√n_{l−1}, not 1/√n_l."""
    network = mlp(
        [300, 200, 400], activation="tanh", initialisation=initialisation, key=jr.key(2)
    )  # fmt: skip
    for layer, n_in in zip(network.layers, (300, 200), strict=True):
        assert layer.weight.shape[1] == n_in
        assert_gaussian(np.asarray(layer.weight), n_in**-0.5)


def test_orthogonal_weights() -> None:
    """WᵀW = I for a square or tall weight, WWᵀ = I for a wide one."""
    network = mlp(
        [20, 20, 30, 10], activation="tanh", initialisation="orthogonal", key=jr.key(3)
    )  # fmt: skip
    for layer in network.layers:
        weight = np.asarray(layer.weight)
        small = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
        # Orthogonality of a Householder QR is n EPS.
        np.testing.assert_allclose(small, np.eye(len(small)), atol=30 * 10 * EPS)


def test_layers_and_keys_are_independent() -> None:
    """Two layers of one key differ, two keys differ, one key repeats itself."""
    one, again = (mlp([4, 4, 4], activation="tanh", key=jr.key(5)) for _ in range(2))
    other = mlp([4, 4, 4], activation="tanh", key=jr.key(6))
    assert not np.allclose(one.layers[0].weight, one.layers[1].weight)
    assert not np.allclose(one.layers[0].weight, other.layers[0].weight)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(again)))
