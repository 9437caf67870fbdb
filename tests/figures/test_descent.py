"""Gradient descent of a stack of networks is that of each, in plain NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.shared.descent import descend, stack
from pcdyn import learning


def test_each_network_descends_at_its_own_rate() -> None:
    """Two rates and two seeds by hand; one that diverges is NaN and leaves the others alone."""
    keys = jr.split(jr.key(3), 2)
    start = stack((3, 4, 2), "tanh", keys, 3)
    rng = np.random.default_rng(0)
    inputs, targets = (rng.normal(size=(2, 5, 6, n)).astype(np.float32) for n in (3, 2))
    rates = np.array([0.1, 0.02, 1e30], np.float32)
    given = (jnp.asarray(x) for x in (rates, inputs, targets))
    found = descend(learning.Backpropagation(), start, *given)
    for i, rate in enumerate(rates):
        for seed in range(2):
            first, second = (
                [np.array(x[i, seed], float) for x in (layer.weight, layer.bias)]
                for layer in start.layers
            )
            if rate > 1:
                assert np.isnan(found.layers[0].weight[i, seed]).all()
                continue
            for x, target in zip(inputs[seed], targets[seed], strict=True):
                hidden = np.tanh(x @ first[0].T + first[1])
                error = hidden @ second[0].T + second[1] - target
                back = error @ second[0] * (1 - hidden**2)
                second = [
                    second[0] - rate * error.T @ hidden / len(x),
                    second[1] - rate * error.mean(0),
                ]
                first = [first[0] - rate * back.T @ x / len(x), first[1] - rate * back.mean(0)]
            for layer, expected in zip(found.layers, (first, second), strict=True):
                # Five float32 updates of numbers of order one.
                np.testing.assert_allclose(layer.weight[i, seed], expected[0], atol=1e-5)
                np.testing.assert_allclose(layer.bias[i, seed], expected[1], atol=1e-5)
