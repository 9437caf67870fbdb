"""A checkpoint is taken up by the very same training only, and what cannot work is refused first.

If this fails, a training goes on with other settings than it began with, and nobody is told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import pcdyn
from pcdyn.errors import CheckpointError, InputError
from pcdyn.learning import Backpropagation, EulerPredictiveCoding, Training, train

pytestmark = pytest.mark.usefixtures("as_users_run")

INPUTS = np.random.default_rng(0).normal(size=(12, 2))
TARGETS = np.random.default_rng(1).normal(size=(12, 2))


def run(epochs: int = 2, **changes: Any) -> Training:
    """Three batches of four an epoch."""
    activation = changes.pop("activation", pcdyn.Activation("own", jnp.tanh))
    options = {
        "rule": Backpropagation(), "optimiser": optax.sgd(0.01), "batch_size": 4, "key": jr.key(1),
        "epochs": epochs, **changes,
    }  # fmt: skip
    network = pcdyn.mlp([2, 3, 2], activation=activation, key=jr.key(0))
    return train(network, INPUTS, TARGETS, **options)


def steps(factor: float, at: int = 100) -> Any:
    """SGD whose rate changes long after any step that could be tried out."""
    return optax.sgd(optax.piecewise_constant_schedule(1e-2, {at: factor}))


def clipped(threshold: float) -> Any:
    """No gradient of this network is as large."""
    return optax.chain(optax.clip_by_global_norm(threshold), optax.sgd(0.01))


def looked_up(*rates: float) -> Any:
    """A schedule of a table, which is a constant of the compiled code."""
    return optax.sgd(lambda count: jnp.asarray(rates * 50)[count])


def custom(power: int) -> pcdyn.Energy:
    return pcdyn.CustomEnergy(lambda e: e**2 / 2 + e**power / 1000)


def scaled(factor: float) -> pcdyn.Activation:
    return pcdyn.Activation("own", lambda x: jnp.tanh(factor * x))


EULER = EulerPredictiveCoding(steps=2)
OTHERS = {
    "a later step of the schedule": (
        {"optimiser": steps(0.1)}, {"optimiser": steps(30.0)}, "optimiser"),
    "the moment of that step": (
        {"optimiser": steps(0.1)}, {"optimiser": steps(0.1, at=101)}, "optimiser"),
    "the threshold of clipping": (
        {"optimiser": clipped(1e6)}, {"optimiser": clipped(2e6)}, "optimiser"),
    "the last number of a table of rates": (
        {"optimiser": looked_up(1e-2, 1e-2)}, {"optimiser": looked_up(1e-2, 2e-2)}, "optimiser"),
    "another optimiser with the same first steps": (
        {"optimiser": optax.sgd(0.01)}, {"optimiser": optax.sgd(0.01, 1e-9)}, "optimiser"),
    "an activation of the same name": (
        {"activation": scaled(1.0)}, {"activation": scaled(1.001)}, "activations"),
    "an energy of the same class": (
        {"energy": custom(4), "rule": EULER}, {"energy": custom(6), "rule": EULER}, "energy"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mine", "other", "part"), OTHERS.values(), ids=OTHERS.keys())
def test_what_differs_only_in_what_it_does_is_refused(
    mine: Any, other: Any, part: str, tmp_path: Path
) -> None:
    """All of these have the same structure, print the same and begin with the same steps."""
    path = tmp_path / "run.npz"
    run(1, checkpoint=path, **mine)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"another training: its .*{part}.* differ"):
        run(2, checkpoint=path, **other)
    assert path.read_bytes() == before
    resumed, whole = run(2, checkpoint=path, **mine), run(2, **mine)
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"])


def test_keys_of_another_kind_resume(tmp_path: Path) -> None:
    """The state of a rule holds a key; those of `rbg` have other data than the default ones."""
    from pcdyn.learning import LearnedTargetPropagation

    options = {
        "rule": LearnedTargetPropagation(noise=0.1), "key": jr.key(1, impl="rbg"),
        "activation": "tanh",
    }  # fmt: skip
    whole = run(2, **options)
    run(1, checkpoint=tmp_path / "run.npz", **options)
    resumed = run(2, checkpoint=tmp_path / "run.npz", **options)
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"])


def no_epoch(network: Any) -> Any:
    raise AssertionError("an epoch has begun")


def test_what_cannot_be_written_is_refused_before_the_first_epoch(
    tmp_path: Path,
) -> None:
    """A missing folder, a folder in place of the file, a device, a name that is too long."""
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "absent" / "run.npz", "create the folder"),
        (tmp_path / "folder", "is a folder"),
        (Path("/dev/null"), "not a file"),
        (tmp_path / ("a" * 300), "cannot write"),
    ):
        with pytest.raises(InputError, match=message):
            run(checkpoint=path, evaluate=no_epoch)
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder"]


def stateful(leaf: Any) -> Any:
    """An optimiser that carries something along."""
    return optax.GradientTransformation(
        lambda weights: leaf, lambda gradient, state, weights=None: (gradient, state)
    )


def test_what_a_file_cannot_hold_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    """A state of half precision, and a rule that calls Python, of which there is no code."""
    path = tmp_path / "run.npz"
    half = jnp.zeros(3, jnp.bfloat16)
    with pytest.raises(CheckpointError, match="cannot hold"):
        run(checkpoint=path, optimiser=stateful(half), evaluate=no_epoch)

    def called(count: Any) -> Any:
        shape = jax.ShapeDtypeStruct((), jnp.float64)
        return jax.pure_callback(lambda c: np.float64(0.01), shape, count)

    with pytest.raises(CheckpointError, match="calls Python"):
        run(checkpoint=path, optimiser=optax.sgd(called), evaluate=no_epoch)
    assert not list(tmp_path.iterdir())


def _header(**changes: Any) -> Any:
    """A change of the header of a checkpoint."""

    def change(arrays: dict[str, Any]) -> None:
        header = json.loads(arrays["header"].tobytes()) | changes
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)

    return change


WRONG = {
    "no configuration": _header(configuration=None),
    "a configuration that is a list": _header(configuration=[]),
    "epochs that are text": _header(epochs="two"),
    "epochs that are true": _header(epochs=True),
    "a negative number of epochs": _header(epochs=-1),
    "more epochs than the history": _header(epochs=2),
    "the format of before": _header(format="pcdyn training checkpoint 1"),
    "no header": lambda arrays: arrays.pop("header"),
    "a header of numbers": lambda arrays: arrays.update(header=np.ones(3)),
    "a header of deep lists": lambda arrays: arrays.update(
        header=np.frombuffer(b"[" * 100_000, np.uint8)),
    "no history": lambda arrays: [
        arrays.pop(name) for name in list(arrays) if name.startswith("history")],
    "a history that is a number": lambda arrays: arrays.update({"history/loss": np.ones(())}),
    "weights of another shape": lambda arrays: arrays.update(state_0=np.ones(3)),
    "weights that are text": lambda arrays: arrays.update(
        state_0=np.full(arrays["state_0"].shape, "x")),
    "no weights": lambda arrays: arrays.pop("state_0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "run.npz"
    run(1, checkpoint=path)
    return path.read_bytes()


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_such_checkpoint_is_refused(
    name: str, good: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "run.npz"
    path.write_bytes(good)
    with np.load(path) as loaded:
        arrays = dict(loaded)
    WRONG[name](arrays)
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match=r"run\.npz"):
        run(2, checkpoint=path)
