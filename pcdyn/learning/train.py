"""`train`: move the weights of a network, or of several at once, by a learning rule."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from pcdyn.checks import Numbers, as_float_array, check_finite
from pcdyn.energy import Energy, Gaussian
from pcdyn.errors import InputError, LabelError, ShapeError, TrainingDivergedError
from pcdyn.learning import checkpoint as checkpoints
from pcdyn.learning.rules import Learned, Rule
from pcdyn.network import Network
from pcdyn.problem import InferenceProblem
from pcdyn.references import backpropagation, feedforward

if TYPE_CHECKING:
    import xarray

Evaluate = Callable[[Network], dict[str, Any]]
Reduction = Literal["sum", "mean"]


class Training(eqx.Module):
    """What `train` returns. With several seeds every array has their axis first.

    - `network`: after the last epoch.
    - `history`: what was recorded for each batch, shape `([seeds,] epochs, batches)`, means over
      the batch:
      `loss`, ℒ of the feedforward pass, and `accuracy`, the share of samples whose largest output
      is that of the target;
      `free_energy`, `output_loss` and `residual_energy` after inference;
      `median_residual` and `largest_residual` of inference, relative, and `unsettled`, the share
      of samples with a residual above .3;
      with `compare`, `cosine` and `row_cosine` of the gradient with that of BP, shape
      `([seeds,] epochs, batches, L)`: of the flattened weight, and the mean over its rows.
    - `evaluations`: what `evaluate` returned before the first epoch and after each,
      `([seeds,] epochs + 1)`.
    - `state`: weights, optimiser and rule, as needed to go on.
    """

    network: Network
    history: dict[str, Any]
    evaluations: dict[str, Any]
    state: Any
    rule: str = eqx.field(static=True)

    def to_xarray(self) -> xarray.Dataset:
        """History and evaluations as a labelled data set."""
        import xarray

        seeds = ("seed",) if self.history["loss"].ndim == 3 else ()
        layers = ("layer",)
        variables = {
            name: ((*seeds, "epoch", "batch", *layers[: values.ndim - len(seeds) - 2]), values)
            for name, values in self.history.items()
        }
        for name, values in self.evaluations.items():
            rest = [f"{name}_{axis}" for axis in range(values.ndim - len(seeds) - 1)]
            variables[f"evaluated_{name}"] = ((*seeds, "epochs_done", *rest), values)
        coordinates = {"layer": np.arange(1, self.network.depth + 1)} if (
            "cosine" in self.history
        ) else {}  # fmt: skip
        return xarray.Dataset(variables, coordinates, {"rule": self.rule})


class _Setting(eqx.Module):
    """What stays the same from epoch to epoch."""

    static: Any
    rule: Rule
    energy: Energy
    optimiser: Any = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    mean: bool = eqx.field(static=True)
    compare: bool = eqx.field(static=True)


def train(
    network: Network,
    inputs: Numbers,
    targets: Any,
    *,
    rule: Rule,
    optimiser: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    key: Any,
    energy: Energy | None = None,
    reduction: Reduction = "mean",
    evaluate: Evaluate | None = None,
    compare: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    progress: bool = False,
) -> Training:
    """Train a network for some epochs, each one compiled loop over shuffled batches.

    Arguments:

    - `network`; for several seeds at once a stack of networks, as
      `equinox.filter_vmap(lambda k: pcdyn.mlp(…, key=k))(keys)` makes it, with as many keys.
    - `inputs`, shape `(n, n_0)`; `targets`, shape `(n, n_L)`, or `(n,)` integer labels, which
      become one-hot.
    - `rule`, such as `pcdyn.learning.PredictiveCoding()`; `optimiser`, any of optax.
    - `batch_size`: an epoch is `n // batch_size` batches of samples in a new order; the rest of
      that order is left out.
    - `key`: of the order, and of what the rule draws; `(seeds,)` keys for a stack of networks.
    - `energy`: `pcdyn.Gaussian()` unless given.
    - `reduction`: the gradient that the optimiser sees is the `"mean"` or the `"sum"` over the
      batch. Inference is the same: energies are per sample.
    - `evaluate`: a function of the network that returns a dictionary of arrays, called before
      the first epoch and after each, such as `pcdyn.learning.Evaluation(inputs, targets)`. If it
      holds arrays, as that one does, let it be an equinox module: they stay out of compiled code.
    - `compare`: record the cosine of each gradient with that of BP, at the cost of BP.
    - `checkpoint`: a file that is written after every `checkpoint_every` epochs and at the end. If
      it is there already, training goes on from it, to the very numbers of an uninterrupted run;
      `epochs` counts from the beginning.
    - `progress`: show a bar with the current loss.

    Raises `ShapeError`, `NonFiniteError`, `DtypeError`, `LabelError` or `InputError` for data that
    do not fit, what the rule raises for the network, `CheckpointError` for a checkpoint that is
    damaged or of another training, and `TrainingDivergedError`, which names the batch, when a loss
    or a weight is no longer finite.
    """
    energy = Gaussian() if energy is None else energy
    seeds = _seeds(key)
    data = _checked_data(network, inputs, targets, seeds)
    _check_numbers(epochs, batch_size, len(data[0]), reduction, checkpoint_every)
    _check_rule(rule, network, data, energy, batch_size, seeds)
    weights, static = eqx.partition(network, eqx.is_inexact_array)
    setting = _Setting(static, rule, energy, optimiser, batch_size, reduction == "mean", compare)
    state = _map(seeds, lambda w, k: _first_state(setting, w, k))(weights, key)
    done, history, evaluations, configuration, path = 0, [], [], {}, None
    if checkpoint is not None:
        path = Path(checkpoint)
        behaviour = checkpoints.optimiser_behaviour(optimiser, weights)
        configuration = checkpoints.fingerprint(
            network=(weights, static), rule=rule, energy=energy, optimiser=behaviour, data=data,
            batch_size=batch_size, reduction=reduction, compare=compare, key=key,
        )  # fmt: skip
        if path.exists():
            done, state, records = checkpoints.load(path, configuration, state)
            history = _split(records["history"], done, seeds)
            evaluations = _split(records["evaluations"], done + 1, seeds)
    if not evaluations:
        evaluations = [_evaluate(evaluate, setting, state, seeds)]
    with tqdm(total=epochs, initial=done, disable=not progress, unit="epoch") as bar:
        for epoch in range(done, epochs):
            bar.set_description(f"epoch {epoch + 1}, loss {_last_loss(history)}")
            new, record = _epoch(setting, state, data, key, jnp.asarray(epoch), seeds)
            record = {name: np.asarray(values) for name, values in record.items()}
            history.append(record)
            problem = _divergence(setting, record, new, lambda seed, e=epoch: _order(
                key if seeds is None else key[seed or 0], e, len(data[0]), batch_size))  # fmt: skip
            if problem:
                found = _training(setting, state, history, evaluations, seeds)
                raise TrainingDivergedError(f"{rule.name}, epoch {epoch + 1}, {problem}", found)
            state = new
            evaluations.append(_evaluate(evaluate, setting, state, seeds))
            if path is not None and ((epoch + 1) % checkpoint_every == 0 or epoch + 1 == epochs):
                records = {
                    "history": _joined(history, seeds),
                    "evaluations": _joined(evaluations, seeds),
                }
                checkpoints.save(path, configuration, epoch + 1, state, records)
            bar.update()
            bar.set_description(f"loss {_last_loss(history)}")
    return _training(setting, state, history, evaluations, seeds)


class Evaluation(eqx.Module):
    """A function from a network to its `accuracy` and mean `loss` on these data, for `train`.

    Arguments: `inputs`, shape `(n, n_0)`; `targets`, shape `(n, n_L)`; `energy`, as for `train`.
    """

    inputs: Any
    targets: Any
    energy: Energy

    def __init__(self, inputs: Numbers, targets: Numbers, *, energy: Energy | None = None):
        self.inputs = as_float_array(inputs, "inputs")
        self.targets = as_float_array(targets, "targets")
        self.energy = Gaussian() if energy is None else energy

    def __call__(self, network: Network) -> dict[str, Any]:
        problem = InferenceProblem(
            network, input=self.inputs, output=self.targets, energy=self.energy
        )
        outputs = feedforward(problem)[-1]
        loss = problem.layer_energy(network.depth, problem.output_error(outputs))
        return {"accuracy": _accuracy(outputs, problem.output), "loss": jnp.mean(loss)}


def _accuracy(outputs: Any, targets: Any) -> Any:
    right = jnp.argmax(outputs, axis=-1) == jnp.argmax(targets, axis=-1)
    return jnp.mean(right.astype(outputs.dtype))


# --- One epoch ------------------------------------------------------------------------------------


def _map(seeds: int | None, function: Any) -> Any:
    """`function` of the arrays of one network, or mapped over those of several."""
    return function if seeds is None else eqx.filter_vmap(function)


def _first_state(setting: _Setting, weights: Any, key: PRNGKeyArray) -> Any:
    network = eqx.combine(weights, setting.static)
    # Epochs fold their number into the key; this one is none of theirs.
    rule_state = setting.rule.init(network, jr.fold_in(key, 2**31 - 1))
    return weights, setting.optimiser.init(weights), rule_state


def _order(key: PRNGKeyArray, epoch: Any, count: int, batch_size: int) -> Any:
    """The rows of each batch of an epoch."""
    order = jr.permutation(jr.fold_in(key, epoch), count)
    return order[: count // batch_size * batch_size].reshape(-1, batch_size)


@eqx.filter_jit
def _epoch(
    setting: _Setting, state: Any, data: Any, key: Any, epoch: Any, seeds: int | None
) -> tuple[Any, dict[str, Any]]:
    def one(state: Any, key: Any) -> Any:
        rows = _order(key, epoch, len(data[0]), setting.batch_size)
        return jax.lax.scan(lambda s, r: _batch(setting, s, data[0][r], data[1][r]), state, rows)

    return _map(seeds, one)(state, key)


def _batch(setting: _Setting, state: Any, inputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
    """Learn from one batch."""
    weights, optimiser_state, rule_state = state
    network = eqx.combine(weights, setting.static)
    problem = InferenceProblem(network, input=inputs, output=targets, energy=setting.energy)
    learned, rule_state = setting.rule.learn(problem, rule_state)
    gradient = eqx.filter(learned.gradient, eqx.is_inexact_array)
    if setting.mean:
        gradient = jax.tree.map(lambda g: g / len(inputs), gradient)
    updates, optimiser_state = setting.optimiser.update(gradient, optimiser_state, weights)
    record = _record(setting, problem, learned)
    return (optax.apply_updates(weights, updates), optimiser_state, rule_state), record


def _record(setting: _Setting, problem: InferenceProblem, learned: Learned) -> dict[str, Any]:
    """What is recorded of a batch; what the rule has computed already is not computed again."""
    network, outputs = problem.network, feedforward(problem)[-1]
    energies = problem.energies_of(problem.prediction_errors(learned.activities))
    record = {
        "loss": jnp.mean(problem.layer_energy(network.depth, problem.output_error(outputs))),
        "accuracy": _accuracy(outputs, problem.output),
        "free_energy": jnp.mean(jnp.sum(energies, axis=-1)),
        "output_loss": jnp.mean(energies[:, -1]),
        "residual_energy": jnp.mean(jnp.sum(energies[:, :-1], axis=-1)),
        "median_residual": jnp.median(learned.residual),
        "largest_residual": jnp.max(learned.residual),
        "unsettled": jnp.mean((learned.residual > 0.3).astype(network.dtype)),
    }
    if setting.compare:
        reference = backpropagation(problem).weight_gradient
        pairs = list(zip(_matrices(learned.gradient), _matrices(reference), strict=True))
        record["cosine"] = jnp.stack([_cosine(a.ravel(), b.ravel()) for a, b in pairs])
        record["row_cosine"] = jnp.stack([jnp.mean(_cosine(a, b)) for a, b in pairs])
    return record


def _matrices(gradient: Network) -> list[Any]:
    """The gradient of each layer's largest array, its weight, as a matrix."""
    each = [jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array)) for layer in gradient.layers]
    largest = [max(leaves, key=lambda x: x.size) for leaves in each]
    return [x.reshape(len(x), -1) for x in largest]


def _cosine(a: Any, b: Any) -> Any:
    """The cosine along the last axis; 0 where either vanishes, as a dead unit's row does."""
    lengths = jnp.sqrt(jnp.sum(a**2, -1) * jnp.sum(b**2, -1))
    return jnp.sum(a * b, -1) / jnp.where(lengths > 0, lengths, 1)


# --- Between epochs -------------------------------------------------------------------------------


@eqx.filter_jit
def _evaluate_compiled(
    evaluate: Evaluate, static: Any, weights: Any, seeds: int | None
) -> dict[str, Any]:
    return _map(seeds, lambda w: evaluate(eqx.combine(w, static)))(weights)


def _evaluate(
    evaluate: Evaluate | None, setting: _Setting, state: Any, seeds: int | None
) -> dict[str, np.ndarray]:
    if evaluate is None:
        return {}
    found = _evaluate_compiled(evaluate, setting.static, state[0], seeds)
    return {name: np.asarray(value) for name, value in found.items()}


def _joined(records: list[dict[str, Any]], seeds: int | None) -> dict[str, np.ndarray]:
    """One array for each name, the epoch after the seed."""
    axis = 0 if seeds is None else 1
    return {name: np.stack([r[name] for r in records], axis) for name in records[0]}


def _split(joined: dict[str, np.ndarray], count: int, seeds: int | None) -> list[dict[str, Any]]:
    """The inverse of `_joined`."""
    axis = 0 if seeds is None else 1
    return [{n: np.take(v, index, axis) for n, v in joined.items()} for index in range(count)]


def _last_loss(history: list[dict[str, Any]]) -> str:
    return f"{np.mean(history[-1]['loss'][..., -1]):.4g}" if history else "–"


def _training(
    setting: _Setting, state: Any, history: list[Any], evaluations: list[Any], seeds: int | None
) -> Training:
    return Training(
        network=eqx.combine(state[0], setting.static),
        history=_joined(history, seeds) if history else {},
        evaluations=_joined(evaluations, seeds),
        state=state,
        rule=setting.rule.name,
    )


def _divergence(
    setting: _Setting, record: dict[str, Any], state: Any, order: Callable[[int | None], Any]
) -> str:
    """What is no longer finite, and in which batch it was first seen; empty if all is finite."""
    bad = np.argwhere(~np.isfinite(record["loss"]) | ~np.isfinite(record["free_energy"]))
    if len(bad):
        *seed, batch = (int(index) for index in bad[np.argmin(bad[:, -1])])
        what = "the loss is"
    elif all(bool(jnp.all(jnp.isfinite(w))) for w in jax.tree.leaves(state[0])):
        return ""
    else:
        seed, batch, what = [], record["loss"].shape[-1] - 1, "after it the weights are"
    rows = np.asarray(order(seed[0] if seed else None))[batch]
    some = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    of_seed = f" of seed {seed[0]}" if seed else ""
    return (
        f"batch {batch + 1}{of_seed} (samples {some}): {what} not finite. Lower the learning rate; "
        "the network before this epoch is in the exception's training.network"
    )


# --- Checks ---------------------------------------------------------------------------------------


def _seeds(key: Any) -> int | None:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim > 1:
        raise InputError(
            f"key has dtype {key.dtype} and shape {key.shape}: give jax.random.key(seed), or a "
            "vector of such keys, one for each network of a stack"
        )
    return None if key.ndim == 0 else len(key)


def _checked_data(network: Network, inputs: Any, targets: Any, seeds: int | None) -> Any:
    first = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    if seeds is not None and any(x.ndim < 1 or len(x) != seeds for x in first):
        raise ShapeError(
            f"there are {seeds} keys, but the network is not a stack of {seeds} networks: build it "
            "with equinox.filter_vmap over the keys"
        )
    inputs = as_float_array(inputs, "inputs").astype(network.dtype)
    if inputs.ndim != 2 or inputs.shape[1] != network.widths[0]:
        raise ShapeError(
            f"inputs have shape {inputs.shape}, but the network needs (samples, "
            f"{network.widths[0]})"
        )
    targets = _checked_targets(targets, network)
    if len(inputs) != len(targets):
        raise ShapeError(f"there are {len(inputs)} inputs and {len(targets)} targets")
    return inputs, targets


def _checked_targets(targets: Any, network: Network) -> Any:
    width, array = network.widths[-1], np.asarray(targets)
    if np.issubdtype(array.dtype, np.integer):
        if array.ndim != 1:
            raise ShapeError(f"integer targets are labels, a vector; got shape {array.shape}")
        wrong = np.flatnonzero((array < 0) | (array >= width))
        if wrong.size:
            raise LabelError(
                f"label {array[wrong[0]]} of sample {wrong[0]} is not the index of one of the "
                f"{width} output units, 0 to {width - 1}; {wrong.size} labels are out of range"
            )
        return jax.nn.one_hot(array, width, dtype=network.dtype)
    checked = as_float_array(array, "targets").astype(network.dtype)
    if checked.ndim != 2 or checked.shape[1] != width:
        raise ShapeError(f"targets have shape {checked.shape}, but (samples, {width}) is needed")
    check_finite(checked, f"targets as {checked.dtype}")
    return checked


def _check_numbers(
    epochs: int, batch_size: int, count: int, reduction: str, checkpoint_every: int
) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size),
                        ("checkpoint_every", checkpoint_every)):  # fmt: skip
        if value < 1 or not math.isfinite(value):
            raise InputError(f"{name} must be a positive integer, got {value}")
    if batch_size > count:
        raise InputError(f"batch_size is {batch_size}, but there are only {count} samples")
    if reduction not in ("sum", "mean"):
        raise InputError(f'reduction must be "sum" or "mean", got {reduction!r}')


def _check_rule(
    rule: Rule, network: Network, data: Any, energy: Energy, batch_size: int, seeds: int | None
) -> None:
    """Let problem and rule refuse, on the first batch, what they cannot learn from."""
    if seeds is not None:
        network = jax.tree.map(lambda x: x[0] if eqx.is_inexact_array(x) else x, network)
    # All targets, for an energy may need more than finite ones.
    InferenceProblem(network, input=data[0], output=data[1], energy=energy)
    inputs, targets = data[0][:batch_size], data[1][:batch_size]
    rule.check(InferenceProblem(network, input=inputs, output=targets, energy=energy))
