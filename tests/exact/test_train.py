"""The training loop against a loop in plain Python, and checkpoints that survive being killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from pcdyn.equilibria.solvers import GaussNewton
from pcdyn.errors import CheckpointError, DataError
from pcdyn.learning import (
    Backpropagation,
    EulerPredictiveCoding,
    Evaluation,
    FixedPrediction,
    IncrementalPredictiveCoding,
    LearnedTargetPropagation,
    LowPrecisionPredictiveCoding,
    PredictiveCoding,
    TruncatedGaussNewton,
    ZeroDivergence,
    train,
)
from pcdyn.model.energies.energy import CrossEntropy
from pcdyn.model.network import Dense, Network, mlp
from pcdyn.model.problem import InferenceProblem

WIDTHS = (4, 5, 3)
ROOT = Path(__file__).parents[2]


def data(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, WIDTHS[0])), rng.integers(0, 3, count)


def network(seed: int = 0) -> Network:
    return mlp(WIDTHS, activation="tanh", output_activation="identity", bias=True, key=jr.key(seed))


def run(**changes: Any) -> Any:
    """BP for three epochs of three batches of six."""
    inputs, labels = data()
    options: dict[str, Any] = {
        "rule": Backpropagation(), "optimiser": optax.sgd(0.1, 0.9), "epochs": 3, "batch_size": 6,
        "key": jr.key(1), "evaluate": Evaluation(inputs, np.eye(3)[labels]), **changes,
    }  # fmt: skip
    start = options.pop("network", None)
    return train(network() if start is None else start, inputs, labels, **options)


def same(a: Any, b: Any) -> None:
    """Bit for bit."""
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_loop_in_plain_python(reduction: str) -> None:
    """Momentum by hand and gradients by `jax.grad` of a loss that is written out here.

    Any order of the samples is fine as long as each epoch has each sample at most once.
    """
    inputs, labels = data()
    rate = 0.1 if reduction == "mean" else 0.1 / 6
    found = run(reduction=reduction, optimiser=optax.sgd(rate, 0.9))
    weights = [(layer.weight, layer.bias) for layer in network().layers]

    def loss(weights: Any, x: Any, y: Any) -> Any:
        hidden = jnp.tanh(x @ weights[0][0].T + weights[0][1][None])
        output = hidden @ weights[1][0].T + weights[1][1][None]
        return 0.5 * jnp.mean(jnp.sum((output - y) ** 2, axis=-1))

    momentum, losses = jax.tree.map(jnp.zeros_like, weights), []
    for epoch in range(3):
        order = np.asarray(jr.permutation(jr.fold_in(jr.key(1), epoch), 20))[:18].reshape(3, 6)
        for rows in order:
            x, y = jnp.asarray(inputs[rows]), jnp.eye(3)[labels[rows]]
            value, slope = jax.value_and_grad(loss)(weights, x, y)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, slope)
            weights = jax.tree.map(lambda w, m: w - 0.1 * m, weights, momentum)
            losses.append(float(value))
    np.testing.assert_allclose(found.history["loss"].ravel(), losses, rtol=1e-12)
    for layer, (weight, bias) in zip(found.network.layers, weights, strict=True):
        np.testing.assert_allclose(layer.weight, weight, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(layer.bias, bias, rtol=1e-11, atol=1e-13)
    x, y = jnp.asarray(inputs), jnp.eye(3)[labels]
    final = float(loss(weights, x, y))
    np.testing.assert_allclose(found.evaluations["loss"][-1], final, rtol=1e-11)
    assert found.evaluations["accuracy"].shape == (4,)
    assert found.evaluations["loss"][-1] < found.evaluations["loss"][0]


def test_what_is_recorded_of_a_batch() -> None:
    """Energies before and after inference and the cosines, for the first batch by hand."""
    inputs, labels = data()
    rule = EulerPredictiveCoding(dt=0.2, steps=3)
    found = run(rule=rule, epochs=1, compare=True)
    rows = np.asarray(jr.permutation(jr.fold_in(jr.key(1), 0), 20))[:6]
    problem = InferenceProblem(network(), input=inputs[rows], output=np.eye(3)[labels[rows]])
    state = problem.feedforward_state()
    assert found.history["loss"][0, 0] == pytest.approx(float(problem.output_loss(state).mean()))
    for _ in range(3):
        state = tuple(x - 0.2 * g for x, g in zip(state, problem.gradient(state), strict=True))
    after = {"free_energy": problem.free_energy, "output_loss": problem.output_loss,
             "residual_energy": problem.residual_energy}  # fmt: skip
    for name, function in after.items():
        assert found.history[name][0, 0] == pytest.approx(float(function(state).mean()))
    ours, _ = rule.learn(problem, ())
    theirs, _ = Backpropagation().learn(problem, ())
    for index in range(2):
        a, b = (np.asarray(x.gradient.layers[index].weight) for x in (ours, theirs))
        cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert found.history["cosine"][0, 0, index] == pytest.approx(cosine)
        rows_cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert found.history["row_cosine"][0, 0, index] == pytest.approx(rows_cosine.mean())
    labelled = found.to_xarray()
    assert labelled.cosine.dims == ("epoch", "batch", "layer")
    assert labelled.evaluated_loss.dims == ("epochs_done",)


def test_several_seeds_are_as_many_trainings() -> None:
    """A stack of networks with a key each gives what each gives alone."""
    keys = jr.split(jr.key(5), 2)
    stack = eqx.filter_vmap(
        lambda k: mlp(WIDTHS, activation="tanh", output_activation="identity", bias=True, key=k)
    )(keys)
    together = run(network=stack, key=keys)
    assert together.history["loss"].shape == (2, 3, 3)
    assert together.to_xarray().loss.dims == ("seed", "epoch", "batch")
    for seed in range(2):
        one = jax.tree.map(lambda x, s=seed: x[s] if eqx.is_array(x) else x, stack)
        alone = run(network=one, key=keys[seed])
        np.testing.assert_allclose(together.history["loss"][seed], alone.history["loss"], 1e-12)
        np.testing.assert_allclose(
            together.evaluations["loss"][seed], alone.evaluations["loss"], 1e-12
        )


@pytest.mark.usefixtures("as_users_run")
def test_layers_of_equinox_and_softmax_learn() -> None:
    """A layer that is not `Dense`, and cross-entropy with labels."""
    middle = eqx.nn.MLP(5, 4, 6, 1, key=jr.key(2))
    start = Network([Dense(np.ones((5, 4)) / 4, activation="tanh"), middle, Dense(np.ones((3, 4)))])
    found = run(network=start, energy=CrossEntropy(), rule=EulerPredictiveCoding(steps=5),
                optimiser=optax.adam(1e-2), epochs=20, evaluate=None, compare=True)  # fmt: skip
    loss = found.history["loss"].mean(1)
    assert loss[-1] < loss[0]


# --- Checkpoints ----------------------------------------------------------------------------------

STATEFUL = LearnedTargetPropagation(noise=0.1)


def test_a_resumed_training_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """With momentum, and a rule that carries inverse weights and a key."""
    path = tmp_path / "run.npz"
    whole = run(rule=STATEFUL, epochs=4)
    run(rule=STATEFUL, epochs=2, checkpoint=path)
    resumed = run(rule=STATEFUL, epochs=4, checkpoint=path)
    again = run(rule=STATEFUL, epochs=4, checkpoint=path)
    for other in (resumed, again):
        same((whole.network, whole.history, whole.evaluations), (
            other.network, other.history, other.evaluations))  # fmt: skip
        same(jax.tree.map(jr.key_data, whole.state[2][1]),
             jax.tree.map(jr.key_data, other.state[2][1]))  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import tests.conftest
from tests.exact.test_train import STATEFUL, run
print("ready", flush=True)
run(rule=STATEFUL, epochs=int(sys.argv[3]), checkpoint=sys.argv[2])
"""


def _start(path: Path, epochs: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(ROOT), str(path), str(epochs)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_training_killed_at_any_moment_resumes(tmp_path: Path) -> None:
    """SIGKILL at random moments, most of them while files are written, until it gets to its end."""
    path, epochs = tmp_path / "run.npz", 80
    rng, killed = np.random.default_rng(0), 0
    while killed < 3:
        process = _start(path, epochs)
        begun = time.monotonic()
        before = path.stat().st_mtime_ns if path.exists() else 0
        # Not before it has written something, so that each attempt gets on.
        while process.poll() is None and time.monotonic() < begun + 60:
            if path.exists() and path.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed > 0
    resumed = run(rule=STATEFUL, epochs=epochs, checkpoint=path)
    whole = run(rule=STATEFUL, epochs=epochs)
    same((whole.network, whole.history, whole.evaluations),
         (resumed.network, resumed.history, resumed.evaluations))  # fmt: skip


@pytest.mark.parametrize(("owner", "step"), [(Path, "write_bytes"), (os, "fsync"), (os, "replace")])
def test_a_failed_write_leaves_the_earlier_checkpoint(
    owner: Any, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else, wherever it fails."""
    path = tmp_path / "run.npz"
    run(epochs=1, checkpoint=path)
    before = path.read_bytes()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"run\.npz: disk full"):
        patch.setattr(owner, step, broken)
        run(epochs=2, checkpoint=path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_a_truncated_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    """Cut anywhere, a flipped byte, another file, another training: each by name, none touched."""
    path = tmp_path / "run.npz"
    run(epochs=1, checkpoint=path)
    good = path.read_bytes()
    damaged = [good[: len(good) * part // 7] for part in range(7)]
    flipped = bytearray(good)
    flipped[good.index(np.asarray(run(epochs=1).network.layers[0].bias).tobytes())] ^= 0xFF
    for bad in (*damaged, bytes(flipped), b"not a checkpoint"):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"run\.npz"):
            run(epochs=2, checkpoint=path)
        assert path.read_bytes() == bad
    path.write_bytes(good)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("stray.npy", zipfile.ZipFile(path).read("header.npy"))
    with pytest.raises(CheckpointError, match="stray"):
        run(epochs=2, checkpoint=path)
    np.savez(path, something=np.ones(3))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        run(epochs=2, checkpoint=path)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("optimiser", {"optimiser": optax.sgd(0.2, 0.9)}),
        ("optimiser", {"optimiser": optax.sgd(0.1, 0.8)}),
        ("batch_size", {"batch_size": 5}),
        ("reduction", {"reduction": "sum"}),
        ("rule", {"rule": EulerPredictiveCoding()}),
        ("network", {"network": network(3)}),
        ("key", {"key": jr.key(2)}),
        ("energy", {"energy": CrossEntropy()}),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    part: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The message names what differs."""
    path = tmp_path / "run.npz"
    run(epochs=1, checkpoint=path)
    with pytest.raises(CheckpointError, match=f"its .*{part}.* differ"):
        run(epochs=2, checkpoint=path, **changes)


def test_checkpoints_are_as_rare_as_asked(tmp_path: Path) -> None:
    """Every second epoch and at the end; a run cut short loses at most one epoch."""
    path = tmp_path / "run.npz"
    times = []

    def count(network: Network) -> dict[str, Any]:
        jax.debug.callback(lambda: times.append(path.stat().st_mtime_ns if path.exists() else 0))
        return {}

    run(epochs=5, checkpoint=path, checkpoint_every=2, evaluate=count)
    jax.effects_barrier()
    assert len(set(times)) == 3


def test_a_checkpoint_beyond_what_is_asked_is_refused(tmp_path: Path) -> None:
    """Rather than more epochs than were asked for."""
    run(epochs=2, checkpoint=tmp_path / "run.npz")
    with pytest.raises(CheckpointError, match="2 epochs already"):
        run(epochs=1, checkpoint=tmp_path / "run.npz")


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        Backpropagation(), PredictiveCoding(), EulerPredictiveCoding(steps=2),
        LowPrecisionPredictiveCoding(0.1), FixedPrediction(steps=2), ZeroDivergence(),
        IncrementalPredictiveCoding(steps=2), LearnedTargetPropagation(noise=0.1),
    ],
    ids=lambda rule: rule.name,
)  # fmt: skip
def test_float32_stays_float32(rule: Any) -> None:
    """Every rule, also where float64 is on: weights, records and what the rule carries."""
    start = mlp(WIDTHS, activation="tanh", bias=True, key=jr.key(0), dtype=jnp.float32)
    inputs, labels = data()
    found = train(start, inputs, labels, rule=rule, optimiser=optax.sgd(0.1), epochs=1,
                  batch_size=10, key=jr.key(0), compare=True)  # fmt: skip
    kept = jax.tree.leaves(eqx.filter(found.state, eqx.is_inexact_array))
    assert {x.dtype for x in (*kept, *found.history.values())} == {np.dtype("float32")}


# --- Optimisers -----------------------------------------------------------------------------------


def test_the_same_optimiser_made_anew_compiles_nothing(compilations: list[str]) -> None:
    """Another rate does, and is used: one step of gradient descent moves in proportion to it."""

    def moved(rate: float) -> np.ndarray:
        after = run(optimiser=optax.sgd(rate), epochs=1, batch_size=20, evaluate=None).network
        return np.asarray(after.layers[0].weight) - np.asarray(network().layers[0].weight)

    first = moved(0.1)
    compilations.clear()
    again = moved(0.1)
    assert compilations == []
    np.testing.assert_array_equal(again, first)
    # The differences have the round-off of weights of order 1.
    np.testing.assert_allclose(moved(0.2), 2 * first, rtol=0, atol=1e-15)
    assert compilations


def test_a_function_of_ones_own_follows_its_variables() -> None:
    """A variable of its module may change between two trainings that make it anew."""
    names: dict[str, Any] = {"optax": optax, "jax": jax, "rate": 0.1}
    code = "optax.stateless(lambda g, _: jax.tree.map(lambda x: -rate * x, g))"

    def moved() -> np.ndarray:
        rule = {"optimiser": eval(code, names), "epochs": 1, "batch_size": 20, "evaluate": None}
        return np.asarray(run(**rule).network.layers[0].weight - network().layers[0].weight)

    first = moved()
    names["rate"] = 0.2
    # The differences have the round-off of weights of order 1.
    np.testing.assert_allclose(moved(), 2 * first, rtol=0, atol=1e-15)


# --- A fallback that few samples need -------------------------------------------------------------


class AlwaysReady(PredictiveCoding):
    """Predictive coding whose fallback is compiled with all the rest."""

    @property
    def without_fallback(self) -> PredictiveCoding:
        return self


# With a nonlinear layer above a hidden one nothing is so near after one step.
STRICT = TruncatedGaussNewton(products=(1,), max_iterations=1, tolerance=1e-9, unsettled=1e-9)


def by_coding(rule: PredictiveCoding, epochs: int = 1, **options: Any) -> Any:
    deeper = mlp((4, 5, 4, 3), activation="tanh", output_activation="identity", key=jr.key(3))
    return run(rule=rule, network=deeper, optimiser=optax.sgd(0.1, 0.9), epochs=epochs, **options)


def test_an_epoch_that_needs_the_fallback_is_run_with_it(tmp_path: Path) -> None:
    """The same numbers as where it is always there; also resumed after such an epoch."""
    expected = by_coding(AlwaysReady(STRICT), 2)
    assert np.all(expected.history["handed_over"] == 1)
    checkpoint = tmp_path / "training.npz"
    by_coding(PredictiveCoding(STRICT), 1, checkpoint=checkpoint)
    for options in ({}, {"checkpoint": checkpoint}):
        found = by_coding(PredictiveCoding(STRICT), 2, **options)
        assert found.history.keys() == expected.history.keys()
        for name, values in expected.history.items():
            np.testing.assert_array_equal(found.history[name], values)


def test_a_training_without_need_compiles_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def solve(*_: Any) -> Any:
        raise AssertionError("traced, though no sample needs it")

    monkeypatch.setattr(GaussNewton, "solve", solve)
    found = by_coding(PredictiveCoding(TruncatedGaussNewton(tolerance=0.03)))
    assert np.all(found.history["handed_over"] == 0)
    # Another tolerance than that of other tests, which have compiled theirs.
    strict = dataclasses.replace(STRICT, tolerance=1e-8)
    with pytest.raises(AssertionError, match="though"):
        by_coding(PredictiveCoding(strict))


def test_without_a_fallback_samples_stay_as_they_are() -> None:
    bare, solved = (
        by_coding(PredictiveCoding(dataclasses.replace(STRICT, fallback=ready))).history
        for ready in (False, True)
    )
    assert np.all(bare["handed_over"] == 1)
    assert np.all(bare["largest_residual"] > 1e-9)
    assert np.all(solved["largest_residual"] < bare["largest_residual"])
