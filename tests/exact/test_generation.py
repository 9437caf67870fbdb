"""Samples of the generative model against its Gaussian, and learning with latent inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
import optax
import pytest

import pcdyn
from pcdyn import learning
from pcdyn.errors import InputError

_RNG = np.random.default_rng(0)
WEIGHTS = [_RNG.normal(size=(3, 2)), _RNG.normal(size=(2, 3))]
BIASES = [_RNG.normal(size=3), _RNG.normal(size=2)]
MEAN = np.array([0.5, -1.0])
FULL = np.array([[2.0, 0.8], [0.8, 1.0]])
PRECISIONS = [np.array([0.5, 2.0]), 4.0, FULL]
TARGETS = _RNG.normal(size=(6, 2))


def network_of(activation: str = "identity") -> pcdyn.Network:
    pairs = zip(WEIGHTS, BIASES, strict=True)
    return pcdyn.Network([pcdyn.Dense(w, b, activation) for w, b in pairs])


def problem_of(network: pcdyn.Network, **options: Any) -> pcdyn.InferenceProblem:
    given: dict[str, Any] = {"prior": pcdyn.Prior(MEAN, pcdyn.Gaussian(PRECISIONS[0]))} | options
    return pcdyn.InferenceProblem(network, energy=pcdyn.Gaussian(PRECISIONS[1:]), **given)


def moments() -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of x_0, x_1, x_2, propagated layer by layer."""
    found = [(MEAN, np.diag(1 / np.asarray(PRECISIONS[0])))]
    noise = [np.eye(3) / 4, np.linalg.inv(FULL)]
    for weight, bias, own in zip(WEIGHTS, BIASES, noise, strict=True):
        mean, covariance = found[-1]
        found.append((weight @ mean + bias, weight @ covariance @ weight.T + own))
    return found


def test_samples_have_the_moments_of_the_model() -> None:
    count = 40_000
    drawn = pcdyn.generate(problem_of(network_of()), jr.key(0), samples=count)
    for values, (mean, covariance) in zip(drawn, moments(), strict=True):
        std = np.sqrt(np.diag(covariance))
        # Five standard errors of a mean, std/√n, and of a covariance, √(2/n) of the variances.
        assert np.all(np.abs(np.mean(values, axis=0) - mean) <= 5 * std / count**0.5)
        off = np.abs(np.cov(np.asarray(values), rowvar=False) - covariance)
        assert np.all(off <= 5 * (2 / count) ** 0.5 * np.outer(std, std))


def test_a_clamped_input_is_where_samples_start() -> None:
    inputs = np.tile(MEAN, (20_000, 1))
    drawn = pcdyn.generate(problem_of(network_of(), prior=None, input=inputs), jr.key(1))
    np.testing.assert_array_equal(drawn[0], inputs)
    covariance = WEIGHTS[1] @ WEIGHTS[1].T / 4 + np.linalg.inv(FULL)
    std = np.sqrt(np.diag(covariance))
    off = np.abs(np.cov(np.asarray(drawn[2]), rowvar=False) - covariance)
    assert np.all(off <= 5 * 0.01 * np.outer(std, std))
    single = pcdyn.generate(problem_of(network_of()), jr.key(1))
    assert [x.shape for x in single] == [(2,), (3,), (2,)]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"output": TARGETS}, {}, "output would be ignored"),
        ({"prior": None}, {}, "nothing to draw the input from"),
        ({"prior": None, "input": TARGETS}, {"samples": 3}, "samples would be ignored"),
        ({"prior": pcdyn.Prior(0.0, pcdyn.LogCosh())}, {}, "layer 0 is LogCosh"),
        ({}, {"samples": 0}, "samples"),
        ({}, {"samples": 10**40}, "more than 50%"),
        ({}, {"key": 3}, "key must be one random key"),
    ],
)
def test_what_cannot_be_drawn(options: Any, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pcdyn.generate(problem_of(network_of(), **options), **({"key": jr.key(0)} | arguments))


def trained(**options: Any) -> learning.Training:
    given = {
        "rule": learning.PredictiveCoding(method="closed_form"), "optimiser": optax.sgd(0.05),
        "epochs": 1, "batch_size": 6, "key": jr.key(0), "energy": pcdyn.Gaussian(PRECISIONS[1:]),
        "prior": pcdyn.Prior(MEAN, pcdyn.Gaussian(PRECISIONS[0])),
    }  # fmt: skip
    return learning.train(network_of(), None, TARGETS, **(given | options))


def test_a_step_with_latent_inputs_is_one_at_the_most_probable_activities() -> None:
    """x* = argmin F in NumPy, then W_l ← W_l + rate · mean over samples of Π_l ε_l x_{l−1}ᵀ."""
    (w1, w2), (b1, b2) = WEIGHTS, BIASES
    # F = ½ Σ ‖Π_l^½ ε_l‖², a least-squares problem in (x_0, x_1).
    roots = [np.diag(np.sqrt(PRECISIONS[0])), 2 * np.eye(3), np.linalg.cholesky(FULL).T]
    zeros = np.zeros
    matrix = np.block(
        [[roots[0], zeros((2, 3))], [-roots[1] @ w1, roots[1]], [zeros((2, 2)), -roots[2] @ w2]]
    )
    x = np.stack([
        np.linalg.lstsq(matrix, np.concatenate(
            [roots[0] @ MEAN, roots[1] @ b1, roots[2] @ (b2 - t)]), rcond=None)[0]
        for t in TARGETS
    ])  # fmt: skip
    x0, x1 = x[:, :2], x[:, 2:]
    errors = x1 - x0 @ w1.T - b1, TARGETS - x1 @ w2.T - b2
    weighted = 4 * errors[0], errors[1] @ FULL
    found = trained()
    moved: Any = found.network.layers
    # Round-off, multiplied by the condition of a small system.
    np.testing.assert_allclose(moved[0].weight, w1 + 0.05 * weighted[0].T @ x0 / 6, rtol=1e-10)
    np.testing.assert_allclose(moved[1].weight, w2 + 0.05 * weighted[1].T @ x1 / 6, rtol=1e-10)
    np.testing.assert_allclose(moved[1].bias, b2 + 0.05 * weighted[1].mean(0), rtol=1e-10)
    loss = 0.5 * np.mean(np.sum(weighted[1] * errors[1], -1))
    prior = 0.5 * np.mean(np.sum(PRECISIONS[0] * (x0 - MEAN) ** 2, -1))
    hidden = 0.5 * np.mean(np.sum(weighted[0] * errors[0], -1))
    recorded = {name: values[0, 0] for name, values in found.history.items()}
    assert recorded["loss"] == pytest.approx(loss, rel=1e-10)
    assert recorded["output_loss"] == pytest.approx(loss, rel=1e-10)
    assert recorded["free_energy"] == pytest.approx(loss + prior + hidden, rel=1e-10)
    assert "accuracy" not in recorded


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        learning.PredictiveCoding(),
        learning.PredictiveCoding(method="gauss_newton"),
        learning.EulerPredictiveCoding(dt=0.05, steps=40),
        learning.LowPrecisionPredictiveCoding(0.5),
        learning.IncrementalPredictiveCoding(dt=0.05, steps=40, ratio=1e-3),
    ],
)
def test_rules_of_predictive_coding_learn_with_latent_inputs(rule: learning.Rule) -> None:
    keys = jr.split(jr.key(0), 2)
    networks = jax.vmap(lambda k: network_of("tanh"))(keys)
    targets = np.tanh(TARGETS)
    prior = pcdyn.Prior()
    found = learning.train(
        networks, None, targets, rule=rule, optimiser=optax.sgd(0.05), epochs=30, batch_size=6,
        key=keys, prior=prior,
    )  # fmt: skip
    fall = found.history["free_energy"]
    assert np.all(fall[:, -1] < fall[:, 0])


def test_checkpoints_know_the_prior(tmp_path: Path) -> None:
    path = tmp_path / "training.npz"
    first = trained(epochs=2, checkpoint=path)
    again = trained(epochs=3, checkpoint=path)
    np.testing.assert_array_equal(again.history["loss"][:2], first.history["loss"])
    with pytest.raises(pcdyn.errors.CheckpointError, match="prior"):
        trained(epochs=3, checkpoint=path, prior=pcdyn.Prior())


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": None}, "without inputs each x_0 is inferred"),
        ({"compare": True}, "compare=True needs inputs"),
        ({"rule": learning.Backpropagation()}, "backpropagation learns at the feedforward pass"),
        ({"rule": learning.FixedPrediction()}, "learns at the feedforward pass"),
        ({"rule": learning.ZeroDivergence()}, "learns at the feedforward pass"),
        ({"rule": learning.TargetPropagation()}, "learns at the feedforward pass"),
        ({"rule": learning.LearnedTargetPropagation()}, "learns at the feedforward pass"),
        ({"prior": pcdyn.Prior(np.zeros(3))}, "mean of the prior"),
    ],
)
def test_what_has_no_latent_inputs(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trained(**options)


def test_a_prior_on_given_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="prior on given inputs"):
        learning.train(
            network_of(), TARGETS, TARGETS, rule=learning.PredictiveCoding(), epochs=1,
            optimiser=optax.sgd(0.1), batch_size=2, key=jr.key(0), prior=pcdyn.Prior(),
        )  # fmt: skip
