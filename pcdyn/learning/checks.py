"""Checks of what a training is given, before anything runs."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pcdyn.checks import (
    as_float_array,
    check_choice,
    check_dtype,
    check_finite,
    check_instance,
    checked_integer,
)
from pcdyn.energy import Energy
from pcdyn.errors import InputError, LabelError, ShapeError
from pcdyn.learning.base import Rule
from pcdyn.network import Network
from pcdyn.problem import InferenceProblem


def number_of_seeds(key: Any) -> int | None:
    """How many networks the key or keys are for; `None` for one that is not in a stack."""
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.ndim > 1 or key.size == 0:
        what = f"dtype {key.dtype} and shape {key.shape}" if isinstance(key, jax.Array) else None
        raise InputError(
            f"key {f'has {what}' if what else f'is a {type(key).__name__}'}: give "
            "jax.random.key(seed), or a vector of such keys, one for each network of a stack"
        )
    return None if key.ndim == 0 else len(key)


def checked_data(network: Network, inputs: Any, targets: Any, seeds: int | None) -> Any:
    """Inputs and targets as arrays of the network's dtype, labels as one-hot rows."""
    check_instance(network, "network", Network, "a pcdyn.Network")
    check_dtype(network.dtype, "dtype of the network")
    first = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    if seeds is not None and any(x.ndim < 1 or len(x) != seeds for x in first):
        raise ShapeError(
            f"there are {seeds} keys, but the network is not a stack of {seeds} networks: build it "
            "with equinox.filter_vmap over the keys"
        )
    inputs = as_float_array(inputs, "inputs").astype(network.dtype)
    check_finite(inputs, f"inputs as {inputs.dtype}")
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
    width, array = network.widths[-1], _maybe_labels(targets)
    if array is None:
        array = as_float_array(targets, "targets")
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
    checked = jnp.asarray(array).astype(network.dtype)
    if checked.ndim != 2 or checked.shape[1] != width:
        raise ShapeError(f"targets have shape {checked.shape}, but (samples, {width}) is needed")
    check_finite(checked, f"targets as {checked.dtype}")
    return checked


def _maybe_labels(targets: Any) -> np.ndarray | None:
    """The targets as integers, if that is what they are."""
    if np.ma.isMaskedArray(targets):
        return None
    try:
        array = np.asarray(targets)
    # What an object does when asked for its numbers is its own affair.
    except Exception:
        return None
    return array if np.issubdtype(array.dtype, np.integer) else None


def check_numbers(
    epochs: int, batch_size: int, count: int, reduction: str, checkpoint_every: int
) -> None:
    """Raise `InputError` for numbers that do not fit `count` samples."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size),
                        ("checkpoint_every", checkpoint_every)):  # fmt: skip
        checked_integer(value, name, at_least=1)
    if batch_size > count:
        raise InputError(f"batch_size is {batch_size}, but there are only {count} samples")
    check_choice(reduction, "reduction", ("sum", "mean"))


def check_optimiser(optimiser: Any, weights: Any) -> None:
    """Raise `InputError` for what is no optimiser, or one that needs more than a gradient."""
    wanted = "an optimiser of optax such as optax.adam(1e-3)"
    check_instance(optimiser, "optimiser", optax.GradientTransformation, wanted)

    def one_update(weights: Any) -> Any:
        return optimiser.update(weights, optimiser.init(weights), weights)

    try:
        jax.eval_shape(one_update, weights)
    # What an optimiser of the user does is its own affair.
    except Exception as error:
        raise InputError(
            f"optimiser cannot update the weights from their gradient alone "
            f"({type(error).__name__}: {error}): give one that needs nothing else, such as "
            "optax.adam(1e-3)"
        ) from error


def check_rule(
    rule: Rule, network: Network, data: Any, energy: Energy, batch_size: int, seeds: int | None
) -> None:
    """Let problem and rule refuse, on the first batch, what they cannot learn from."""
    check_instance(rule, "rule", Rule, "a rule such as pcdyn.learning.PredictiveCoding()")
    if seeds is not None:
        network = jax.tree.map(lambda x: x[0] if eqx.is_inexact_array(x) else x, network)
    # All targets, for an energy may need more than finite ones.
    InferenceProblem(network, input=data[0], output=data[1], energy=energy)
    inputs, targets = data[0][:batch_size], data[1][:batch_size]
    rule.check(InferenceProblem(network, input=inputs, output=targets, energy=energy))
