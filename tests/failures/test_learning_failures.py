"""One row per bad input to learning, and the error that names it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from pcdyn import learning
from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.errors import (
    ActivationError,
    DtypeError,
    InputError,
    LabelError,
    NonFiniteError,
    NotLinearError,
    PrecisionError,
    ShapeError,
    TrainingDivergedError,
    UnreachableTargetError,
)
from pcdyn.integrators import Exact
from pcdyn.model.energies.energy import CrossEntropy, Gaussian
from pcdyn.model.network import Network, mlp
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import target_propagation
from pcdyn.simulation.simulate import simulate

pytestmark = pytest.mark.unchecked

INPUTS = np.random.default_rng(0).normal(size=(10, 4))
LABELS = np.arange(10) % 3
KEYS = jr.split(jr.key(0), 2)


def build(activation: str = "tanh") -> Network:
    return mlp((4, 5, 3), activation=activation, output_activation="identity", key=jr.key(0))


def train(inputs: Any = INPUTS, targets: Any = LABELS, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "rule": learning.Backpropagation(), "optimiser": optax.sgd(0.1), "epochs": 1,
        "batch_size": 5, "key": jr.key(0), **changes,
    }  # fmt: skip
    start = options.pop("network", None)
    return learning.train(build() if start is None else start, inputs, targets, **options)


def with_nan() -> np.ndarray:
    inputs = INPUTS.copy()
    inputs[3, 1] = np.nan
    return inputs


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "NaN in the data": (lambda: train(with_nan()), NonFiniteError, r"index \(3, 1\)"),
    "NaN in targets": (
        lambda: train(targets=np.full((10, 3), np.nan)), NonFiniteError, "targets"),
    "integer images": (lambda: train(INPUTS.astype(int)), DtypeError, "inputs"),
    "a label too large": (
        lambda: train(targets=LABELS + 1), LabelError, "label 3 of sample 2 .* 0 to 2"),
    "a negative label": (lambda: train(targets=LABELS - 1), LabelError, "label -1 of sample 0"),
    "labels in a matrix": (lambda: train(targets=LABELS[:, None]), ShapeError, "vector"),
    "a batch larger than the data": (
        lambda: train(batch_size=11), InputError, "batch_size is 11, but there are only 10"),
    "a batch of none": (lambda: train(batch_size=0), InputError, "batch_size"),
    "no epochs": (lambda: train(epochs=0), InputError, "epochs"),
    "a wrong input width": (lambda: train(INPUTS[:, :3]), ShapeError, r"needs \(samples, 4\)"),
    "a wrong target width": (
        lambda: train(targets=np.ones((10, 2))), ShapeError, r"\(samples, 3\)"),
    "fewer targets than inputs": (lambda: train(targets=LABELS[:9]), ShapeError, "9 targets"),
    "an unknown reduction": (lambda: train(reduction="median"), InputError, "median"),
    "an old key": (lambda: train(key=jnp.zeros(2, jnp.uint32)), InputError, "jax.random.key"),
    "keys without a stack": (lambda: train(key=KEYS), ShapeError, "stack of 2"),
    "a checkpoint nowhere": (
        lambda: train(checkpoint="/nowhere/at/all.npz"), InputError, "create the folder"),
    "a shallow network": (
        lambda: train(network=mlp((4, 3), activation="tanh", key=jr.key(0))), InputError,
        "nothing to infer"),
    "TP without an inverse": (
        lambda: train(network=mlp((4, 4, 3), activation="softplus", key=jr.key(0)).__class__(
            [eqx.nn.Linear(4, 4, key=jr.key(0)), eqx.nn.Linear(4, 3, key=jr.key(0))],
            input_width=4), rule=learning.TargetPropagation()),
        ShapeError, "only Dense"),
    "learned TP of a layer without activation": (
        lambda: train(network=Network(
            [eqx.nn.Linear(4, 4, key=jr.key(0)), eqx.nn.Linear(4, 3, key=jr.key(0))],
            input_width=4), rule=learning.LearnedTargetPropagation()),
        ShapeError, "activation"),
    "Z-IL with precisions": (
        lambda: train(rule=learning.ZeroDivergence(), energy=Gaussian([2.0, 1.0])), InputError,
        "layer 1"),
    "no Euler steps": (
        lambda: learning.EulerPredictiveCoding(steps=0), InputError, "at least 1, got 0"),
    "a negative step": (lambda: learning.FixedPrediction(dt=-1.0), InputError, "above 0, got -1"),
    "a zero ratio": (
        lambda: learning.IncrementalPredictiveCoding(ratio=0.0), InputError, "ratio"),
    "a zero precision": (
        lambda: learning.LowPrecisionPredictiveCoding(0.0), InputError, "precision"),
    "a negative inverse rate": (
        lambda: learning.LearnedTargetPropagation(inverse_rate=-1.0), InputError, "inverse_rate"),
    "negative noise": (
        lambda: learning.LearnedTargetPropagation(noise=-1.0), InputError, "noise"),
    "no products": (
        lambda: learning.TruncatedGaussNewton(products=()), InputError, "products"),
    "a tolerance that is ignored": (
        lambda: learning.PredictiveCoding(tolerance=1e-3), InputError, "ignored"),
    "cross-entropy without probabilities": (
        lambda: train(targets=np.full((10, 3), 0.5), energy=CrossEntropy()), InputError,
        "probabilities"),
    "cross-entropy with a free output": (
        lambda: InferenceProblem(build(), input=INPUTS, energy=CrossEntropy()), InputError,
        "clamp the output"),
    "cross-entropy with a negative weight": (
        lambda: CrossEntropy(weight=-1.0), PrecisionError, "weight"),
    "cross-entropy with a vector of weights": (
        lambda: CrossEntropy(weight=[1.0, 2.0]), ShapeError, "one number"),
    "Gauss–Newton with cross-entropy": (
        lambda: equilibrium(InferenceProblem(
            build(), input=INPUTS, output=np.eye(3)[LABELS], energy=CrossEntropy()),
            method="gauss_newton"), InputError, "layer 2, CrossEntropy, has none"),
    "truncation with a free output": (
        lambda: learning.PredictiveCoding().check(InferenceProblem(build(), input=INPUTS)),
        InputError, "both ends"),
    "a joint flow without a ratio": (
        lambda: learning.JointFlow(PROBLEM, ratio=0.0), InputError, "ratio"),
    "the exact solution of a joint flow": (
        lambda: simulate(learning.JointFlow(PROBLEM, 0.1), t1=1.0, integrator=Exact()),
        NotLinearError, "JointFlow"),
    "samples of a joint flow": (
        lambda: simulate(learning.JointFlow(PROBLEM, 0.1), t1=1.0, per_sample=True), ShapeError,
        "batch"),
    "a joint trajectory as a file": (
        lambda: simulate(learning.JointFlow(PROBLEM, 0.1), t1=0.1).to_xarray(), ShapeError,
        "holds its network"),
    "a start of the adiabatic flow": (
        lambda: simulate(learning.AdiabaticFlow(PROBLEM), t1=1.0, initial="zeros"), InputError,
        "'zeros' of AdiabaticFlow"),
}  # fmt: skip
PROBLEM = InferenceProblem(build("identity"), input=INPUTS, output=np.eye(3)[LABELS])


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    """Before anything runs."""
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_diverging_training_names_the_batch_and_keeps_what_was_good() -> None:
    """A rate of 1e200 after a rate of 0: the second epoch diverges in its second batch."""
    schedule = optax.join_schedules([lambda _: 0.0, lambda _: 1e200], [2])
    with pytest.raises(
        TrainingDivergedError, match=r"epoch 2, batch 2 \(samples .*Lower"
    ) as caught:
        train(optimiser=optax.sgd(schedule), epochs=5)
    kept = caught.value.training
    for ours, theirs in zip(kept.network.layers, build().layers, strict=True):
        np.testing.assert_array_equal(ours.weight, theirs.weight)
    assert kept.history["loss"].shape == (2, 2)


def test_a_seed_that_diverges_is_named() -> None:
    """One of two networks starts with weights that overflow."""
    stack = eqx.filter_vmap(lambda k: mlp((4, 5, 3), activation="identity", key=k))(KEYS)
    weight = stack.layers[0].weight.at[1].multiply(1e200)
    stack = eqx.tree_at(lambda n: n.layers[0].weight, stack, weight)
    with pytest.raises(TrainingDivergedError, match="batch 1 of seed 1"):
        train(network=stack, key=KEYS)


def test_targets_that_nothing_reaches_are_said_to_be_missing() -> None:
    """ReLU has no preimage of zero: the reference raises, the rule counts."""
    network = mlp((4, 4, 3), activation="relu", key=jr.key(0))
    problem = InferenceProblem(network, input=INPUTS, output=np.eye(3)[LABELS])
    with pytest.raises(UnreachableTargetError):
        _ = target_propagation(problem).targets
    learned, _ = learning.TargetPropagation().learn(problem, ())
    assert np.all(np.isinf(learned.residual))
    assert all(np.all(np.asarray(layer.weight) == 0) for layer in learned.gradient.layers)
    softplus = mlp((4, 4, 3), activation="sigmoid", key=jr.key(0))
    assert softplus.layers[0].activation.inverse is not None
    with pytest.raises(ActivationError, match="unknown"):
        learning.LearnedTargetPropagation(activation="cubic").init(network, jr.key(0))
