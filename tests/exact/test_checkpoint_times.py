"""After which epochs a checkpoint is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from pcdyn.learning import Backpropagation, train
from pcdyn.model.network import Network, mlp


def test_a_checkpoint_comes_after_every_second_epoch(tmp_path: Path) -> None:
    """The first after epoch 2, which the evaluation after epoch 3 sees, and that of 2 does not."""
    path, seen = tmp_path / "run.npz", []

    def look(network: Network) -> dict[str, Any]:
        jax.debug.callback(lambda: seen.append(path.exists()))
        return {}

    rng = np.random.default_rng(0)
    train(
        mlp([2, 3, 2], activation="tanh", key=jax.random.key(0)), rng.normal(size=(8, 2)),
        rng.normal(size=(8, 2)), rule=Backpropagation(), optimiser=optax.sgd(0.1), epochs=4,
        batch_size=4, key=jax.random.key(1), evaluate=look, checkpoint=path, checkpoint_every=2,
    )  # fmt: skip
    jax.effects_barrier()
    # Before the first epoch, and after each of four.
    assert seen == [False, False, False, True, True]
    assert path.exists()
