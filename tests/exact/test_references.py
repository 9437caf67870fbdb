"""Backpropagation and target propagation against autodiff, finite differences and NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcdyn.errors import (
    ActivationError,
    InputError,
    ShapeError,
    SingularWeightError,
    UnreachableTargetError,
)
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import backpropagation, feedforward, target_propagation
from tests.networks import (
    EPS,
    FUNCTIONS,
    JAX_FUNCTIONS,
    SMOOTH,
    Case,
    assert_close,
    build_case,
    cases,
    few,
    per_sample,
)

# Sums of fewer than 100 products of numbers of order 1 (assert_close scales with the largest).
ROUND_OFF = 1e3 * EPS
INVERTIBLE = ("identity", "tanh", "sigmoid", "softplus", "leaky_relu")


def loss_of(case: Case, weights: Sequence[Any], biases: Sequence[Any], nudges: Sequence[Any],
            x: Any, target: Any) -> Any:  # fmt: skip
    """ℒ of one sample's feedforward pass with `nudges` added to x̂_1 … x̂_L."""
    for index in range(case.depth):
        z = weights[index] @ x
        z = z if biases[index] is None else z + biases[index]
        x = JAX_FUNCTIONS[case.activations[index]](z) + nudges[index]
    error = target - x
    return 0.5 * error @ (jnp.asarray(case.precision(case.depth)) @ error)


@few(max_examples=10)
@given(case=cases(clamps=("both",), activations=SMOOTH))
def test_backpropagation_is_autodiff_of_the_loss(case: Case) -> None:
    """δ_l = −∂ℒ/∂x̂_l and ∂ℒ/∂W_l, ∂ℒ/∂b_l (summed over the batch) by jax.grad."""
    result = backpropagation(case.problem)
    weights = [jnp.asarray(w) for w in case.weights]
    biases = [None if b is None else jnp.asarray(b) for b in case.biases]
    nudges = [jnp.zeros(n) for n in case.widths[1:]]

    def one(x: Any, target: Any) -> Any:
        gradient = jax.value_and_grad(loss_of_case, argnums=(0, 1, 2))
        return gradient(weights, biases, nudges, x, target)

    def loss_of_case(*arguments: Any) -> Any:
        return loss_of(case, *arguments)

    data = (jnp.asarray(case.activities[0]), jnp.asarray(case.activities[-1]))
    loss, (of_weights, of_biases, of_nudges) = jax.jit(per_sample(case, one))(*data)
    assert_close(result.loss, loss, ROUND_OFF)
    assert_close(result.activities, case.feedforward(case.activities[0]), ROUND_OFF)
    assert_close(result.deltas, [-np.asarray(g) for g in of_nudges], ROUND_OFF)
    for layer, weight, bias in zip(
        result.weight_gradient.layers, of_weights, of_biases, strict=True
    ):
        assert_close(layer.weight, np.sum(weight, axis=0) if case.batched else weight, ROUND_OFF)
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            assert_close(layer.bias, np.sum(bias, axis=0) if case.batched else bias, ROUND_OFF)


@few(max_examples=8)
@given(case=cases(clamps=("both",), activations=SMOOTH))
def test_backpropagation_is_the_recursion(case: Case) -> None:
    """δ_L = Π_L(T − x̂_L), δ_{l−1} = W_lᵀ(f'_l ∘ δ_l), ∂ℒ/∂W_l = −(f'_l ∘ δ_l) x_{l−1}ᵀ."""
    result = backpropagation(case.problem)
    x = case.feedforward(case.activities[0])
    delta = (case.activities[-1] - x[-1]) @ case.precision(case.depth)
    for index in range(case.depth, 0, -1):
        assert_close(result.deltas[index - 1], delta, ROUND_OFF)
        slope = FUNCTIONS[case.activations[index - 1]][1](case.preactivation(index, x[index - 1]))
        local = np.atleast_2d(slope * delta)
        gradient = -local.T @ np.atleast_2d(x[index - 1])
        assert_close(result.weight_gradient.layers[index - 1].weight, gradient, ROUND_OFF)
        delta = (slope * delta) @ case.weights[index - 1]


def test_weight_gradient_is_finite_differences() -> None:
    """∂ℒ/∂W_l by central differences of the NumPy loss.

    With h = 1e-5 truncation is h² ℒ'''/6 ~ 1e-10 and round-off ℒ EPS/h ~ 1e-10.
    """
    case = build_case(
        seed=3, widths=(3, 4, 2, 2), activations=("tanh", "sigmoid"), precision="full", bias=True,
        batch=3,
    )  # fmt: skip
    result, step = backpropagation(case.problem), 1e-5

    def loss(weights: list[np.ndarray]) -> float:
        moved = case.replace(weights=tuple(weights))
        error = case.activities[-1] - moved.feedforward(case.activities[0])[-1]
        return 0.5 * float(np.einsum("bi,ij,bj", error, case.precision(case.depth), error))

    for index in range(case.depth):
        expected = np.zeros_like(case.weights[index])
        for place in np.ndindex(expected.shape):
            values = []
            for sign in (1, -1):
                weights = [np.array(w) for w in case.weights]
                weights[index][place] += sign * step
                values.append(loss(weights))
            expected[place] = (values[0] - values[1]) / (2 * step)
        assert_close(result.weight_gradient.layers[index].weight, expected, 1e-8)


@pytest.mark.parametrize("batch", [None, 3])
def test_backpropagation_through_equinox_layers(batch: int | None) -> None:
    """Weight gradients of an equinox module as layer are those of eqx.filter_grad of ℒ."""
    keys = jr.split(jr.key(0), 3)
    block = eqx.nn.Sequential([
        eqx.nn.Linear(4, 3, key=keys[0]),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.Linear(3, 3, key=keys[1]),
    ])  # fmt: skip
    network = Network([Dense(0.5 * np.ones((4, 2)), None, "tanh"), block, Dense(np.eye(3)[:2])])
    shape = () if batch is None else (batch,)
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=(*shape, 2))) for _ in range(2))
    result = backpropagation(
        InferenceProblem(network, input=x, output=target, energy=Gaussian(2.0))
    )

    def loss(layers: tuple[Any, ...]) -> Any:
        def one(x: Any, target: Any) -> Any:
            for layer in layers:
                x = layer(x)
            return jnp.sum((target - x) ** 2)  # ½ Π with Π = 2.

        return one(x, target) if batch is None else jnp.sum(jax.vmap(one)(x, target))

    expected = eqx.filter_jit(eqx.filter_grad(loss))(network.layers)
    ours = eqx.filter(result.weight_gradient.layers, eqx.is_inexact_array)
    assert_close(ours, eqx.filter(expected, eqx.is_inexact_array), ROUND_OFF)
    assert_close(jnp.sum(result.loss), float(loss(network.layers)), ROUND_OFF)


@few(max_examples=8)
@given(case=cases(clamps=("both", "input"), activations=SMOOTH))
def test_feedforward_is_a_numpy_loop(case: Case) -> None:
    """`feedforward` is x_l = f_l(W_l x_{l−1} + b_l) from the clamped input."""
    assert_close(feedforward(case.problem), case.feedforward(case.activities[0]), ROUND_OFF)


@st.composite
def square_cases(draw: st.DrawFn, activations: Sequence[str] = INVERTIBLE) -> Case:
    """Square networks with orthogonal weights, so that inverses do not amplify errors."""
    width, depth = draw(st.sampled_from([1, 3])), draw(st.integers(1, 3))
    case = build_case(
        seed=draw(st.integers(0, 2**32 - 1)), widths=(width,) * (depth + 1), clamp="output",
        activations=activations, bias=draw(st.booleans()), batch=draw(st.sampled_from([None, 3])),
    )  # fmt: skip
    weights = tuple(np.linalg.qr(w)[0] for w in case.weights)
    return case.replace(weights=weights)


@few(max_examples=12)
@given(case=square_cases())
def test_targets_of_a_reachable_output_are_its_feedforward_pass(case: Case) -> None:
    """Where T = feedforward(x_0): t_l are its activities, and feedforward(t_0) = T."""
    passed = case.feedforward(case.activities[0])
    case = case.replace(activities=(*case.activities[:-1], passed[-1]))
    result = target_propagation(case.problem)
    assert bool(np.all(result.exists))
    assert all(bool(np.all(mask)) for mask in result.reachable)
    # f⁻¹ amplifies round-off by 1/f'; |z| stays below 7 for orthogonal weights and Gaussian data,
    # where tanh' = 3e-6 (leaky_relu' = .01), for three layers at the worst in one of them.
    assert_close(result.targets, passed, 1e8 * EPS)
    again = case.feedforward(np.asarray(result.targets[0]))
    assert_close(again[-1], case.activities[-1], ROUND_OFF)


@few(max_examples=12)
@given(case=square_cases(("tanh", "sigmoid", "softplus", "identity")))
def test_reachability_is_a_numpy_loop(case: Case) -> None:
    """A sample exists if t_L … t_1 all lie inside the open ranges, in a NumPy loop.

    Below the first layer that cannot be reached there are no targets to look at: the masks are
    compared down to that layer, sample by sample.
    """
    ranges = {"tanh": (-1, 1), "sigmoid": (0, 1), "softplus": (0, np.inf),
              "identity": (-np.inf, np.inf)}  # fmt: skip
    inverses = {"tanh": np.arctanh, "sigmoid": lambda y: np.log(y / (1 - y)),
                "softplus": lambda y: np.log(np.expm1(y)), "identity": lambda y: y}  # fmt: skip
    result = target_propagation(case.problem)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result.values))
    for row in range(3) if case.batched else [...]:
        target, exists = case.activities[-1][row], True
        for index in range(case.depth, 0, -1):
            name = case.activations[index - 1]
            inside = (target > ranges[name][0]) & (target < ranges[name][1])
            np.testing.assert_array_equal(np.asarray(result.reachable[index - 1])[row], inside)
            if not inside.all():
                exists = False
                break
            bias = case.biases[index - 1]
            centred = inverses[name](target) - (0.0 if bias is None else bias)
            target = np.linalg.solve(case.weights[index - 1], centred)
        assert bool(np.asarray(result.exists)[row]) == exists
        if exists:
            assert_close(np.asarray(result.values[0])[row], target, 1e8 * EPS)
    if np.all(result.exists):
        assert_close(result.targets, result.values, 0)
    else:
        with pytest.raises(UnreachableTargetError):
            _ = result.targets


@pytest.mark.parametrize("widths", [(4, 2), (2, 4), (3, 2, 4), (2, 3, 3, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [None, 3])
def test_weights_that_are_not_square_use_the_moore_penrose_inverse(
    widths: tuple[int, ...], bias: bool, batch: int | None
) -> None:
    """t_{l−1} = W_l⁺(f_l⁻¹(t_l) − b_l) with numpy.linalg.pinv; identity activations.

    A random target is not in the range of a tall weight: then no target exists.
    """
    case = build_case(seed=5, widths=widths, clamp="output", bias=bias, batch=batch)
    targets, condition = [case.activities[-1]], 1.0
    for weight, shift in zip(reversed(case.weights), reversed(case.biases), strict=True):
        centred = targets[0] - (0.0 if shift is None else shift)
        targets.insert(0, centred @ np.linalg.pinv(weight).T)
        condition *= np.linalg.cond(weight) * max(1, np.linalg.norm(np.linalg.pinv(weight), 2))
    # A pseudo-inverse is accurate to its condition number; layers multiply.
    found = target_propagation(case.problem)
    assert_close(found.values, targets, 10 * condition * EPS)
    tall = any(weight.shape[0] > weight.shape[1] for weight in case.weights)
    assert np.all(np.asarray(found.exists) == (not tall))


def test_unreachable_target_names_samples_layer_and_units() -> None:
    """The open range excludes its ends: T = 1 has no preimage under tanh."""
    network = Network([Dense(np.eye(3)), Dense(np.eye(3), None, "tanh")])
    target = np.array([[0.1, 0.2, 0.3], [0.1, 1.0, -2.0]])
    result = target_propagation(InferenceProblem(network, output=target))
    np.testing.assert_array_equal(result.exists, [True, False])
    with pytest.raises(UnreachableTargetError, match=r"1 of 2 samples.*layer 2 units \[1, 2\]"):
        _ = result.targets
    np.testing.assert_allclose(result.values[0][0], np.arctanh(target[0]), rtol=8 * EPS)


def test_unreachable_samples_do_not_poison_derivatives() -> None:
    """The derivative of reachable targets is that of arctanh beside an unreachable sample."""
    network = Network([Dense(np.eye(2), None, "tanh")])

    def total(target: Any) -> Any:
        result = target_propagation(InferenceProblem(network, output=target))
        return jnp.sum(jnp.where(result.exists[:, None], result.values[0], 0.0))

    target = jnp.asarray([[0.5, -0.25], [3.0, 0.0]])
    gradient = np.asarray(jax.grad(total)(target))
    expected = 1 / (1 - np.asarray(target[0]) ** 2)
    np.testing.assert_allclose(gradient, [expected, [0, 0]], rtol=8 * EPS)


def test_singular_weight_is_named() -> None:
    """A rank-one square weight, and a wide one of deficient rank, have no inverse."""
    for weight in (np.ones((2, 2)), np.ones((2, 3)), np.zeros((2, 2))):
        network = Network([Dense(np.eye(weight.shape[1])), Dense(weight)])
        problem = InferenceProblem(network, output=np.ones(2))
        with pytest.raises(SingularWeightError, match="layer 2"):
            target_propagation(problem)


def test_activation_without_inverse_is_named() -> None:
    """An activation that is not injective has no target propagation."""
    from pcdyn.model.activations import Activation

    network = Network([Dense(np.eye(2), None, Activation("wave", jnp.sin))])
    with pytest.raises(ActivationError, match=r"'wave' of layer 1"):
        target_propagation(InferenceProblem(network, output=np.ones(2)))


def test_layer_without_inverse_is_named() -> None:
    """Only Dense layers can be inverted."""
    network = Network([Dense(np.eye(2)), eqx.nn.Linear(2, 2, key=jr.key(0))])
    with pytest.raises(ShapeError, match="layer 2 is a Linear"):
        target_propagation(InferenceProblem(network, output=np.ones(2)))


@pytest.mark.parametrize(
    ("function", "clamp", "named"),
    [
        (backpropagation, "input", "output is free"),
        (backpropagation, "output", "input is free"),
        (target_propagation, "input", "output is free"),
        (feedforward, "output", "input is free"),
    ],
)
def test_missing_data_are_named(function: Any, clamp: str, named: str) -> None:
    """Each reference says which end it needs clamped."""
    with pytest.raises(InputError, match=named):
        function(build_case(seed=0, widths=(2, 2, 2), clamp=clamp).problem)
