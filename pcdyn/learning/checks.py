"""Checks of what a training is given, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, PyTree

from pcdyn._support.arrays import as_float_array, check_dtype, converted
from pcdyn._support.checks import check_callable, check_instance, checked_integer
from pcdyn._support.functions import ByCode
from pcdyn._support.types import Numbers
from pcdyn.errors import InputError, LabelError, ShapeError
from pcdyn.learning.rules.base import Rule
from pcdyn.model.energies.energy import Energy
from pcdyn.model.network import Network
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem

Evaluate = Callable[[Network], Mapping[str, ArrayLike]]


def number_of_seeds(key: object) -> int | None:
    """Count the networks that the keys are for; `None` for one key alone."""
    if not (
        isinstance(key, jax.Array)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.ndim <= 1
        and key.size
    ):
        what = f"dtype {key.dtype} and shape {key.shape}" if isinstance(key, jax.Array) else None
        raise InputError(
            f"key {f'has {what}' if what else f'is a {type(key).__name__}'}: give "
            "jax.random.key(seed), or a vector of such keys, one for each network of a stack"
        )
    return None if key.ndim == 0 else len(key)


def checked_data(
    network: Network, inputs: Numbers | None, targets: Numbers, seeds: int | None
) -> tuple[Array | None, Array]:
    """Convert inputs and targets to arrays of the network's dtype, labels as one-hot rows.

    Inputs stay `None` where they are latent.
    """
    check_instance(network, "network", Network, "a pcdyn.Network")
    check_dtype(network.dtype, "dtype of the network")
    first = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    if seeds is not None and any(x.ndim < 1 or len(x) != seeds for x in first):
        raise ShapeError(
            f"there are {seeds} keys, but the network is not a stack of {seeds} networks: build it "
            "with equinox.filter_vmap over the keys"
        )
    if inputs is None:
        return None, _checked_targets(targets, network)
    inputs = converted(as_float_array(inputs, "inputs"), network.dtype, "inputs")
    if inputs.ndim != 2 or inputs.shape[1] != network.widths[0]:
        raise ShapeError(
            f"inputs have shape {inputs.shape}, but the network needs (samples, "
            f"{network.widths[0]})"
        )
    targets = _checked_targets(targets, network)
    if len(inputs) != len(targets):
        raise ShapeError(f"there are {len(inputs)} inputs and {len(targets)} targets")
    return inputs, targets


def _checked_targets(targets: Numbers, network: Network) -> Array:
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
    checked = converted(jnp.asarray(array), network.dtype, "targets")
    if checked.ndim != 2 or checked.shape[1] != width:
        raise ShapeError(f"targets have shape {checked.shape}, but (samples, {width}) is needed")
    return checked


def _maybe_labels(targets: Numbers) -> np.ndarray | None:
    """The targets as integers, if that is what they are."""
    if np.ma.isMaskedArray(targets):
        return None
    try:
        array = np.asarray(targets)
    # What an object does when asked for its numbers is its own affair.
    except Exception:
        return None
    return array if np.issubdtype(array.dtype, np.integer) else None


def checked_numbers(
    epochs: object, batch_size: object, checkpoint_every: object, count: int
) -> tuple[int, int, int]:
    """Return the numbers as integers; raise `InputError` where they do not fit `count` samples."""
    epochs = checked_integer(epochs, "epochs", at_least=1)
    batch_size = checked_integer(batch_size, "batch_size", at_least=1)
    checkpoint_every = checked_integer(checkpoint_every, "checkpoint_every", at_least=1)
    if batch_size > count:
        raise InputError(f"batch_size is {batch_size}, but there are only {count} samples")
    return epochs, batch_size, checkpoint_every


def checked_optimiser(
    optimiser: optax.GradientTransformation, weights: PyTree
) -> ByCode[optax.GradientTransformation]:
    """Return an optimiser as part of what is compiled.

    Raises `InputError` for what is none, or needs more than gradient and weights.
    """
    wanted = "an optimiser of optax such as optax.adam(1e-3)"
    check_instance(optimiser, "optimiser", optax.GradientTransformation, wanted)
    checked = ByCode(optimiser)
    try:
        _first_update.eval_shape(checked, weights)
    # What an optimiser of the user does is its own affair.
    except Exception as error:
        raise InputError(
            f"optimiser cannot update the weights from their gradient alone "
            f"({type(error).__name__}: {error}): give one that needs nothing else, such as "
            "optax.adam(1e-3)"
        ) from error
    return checked


@partial(jax.jit, static_argnums=0)
def _first_update(optimiser: ByCode[optax.GradientTransformation], weights: PyTree) -> PyTree:
    return optimiser.value.update(weights, optimiser.value.init(weights), weights)


def check_evaluate(evaluate: Evaluate, network: Network, seeds: int | None) -> None:
    """Raise `InputError` for what does not make a dictionary of arrays of a network."""
    wanted = "a function from a network to a dictionary of arrays, such as Evaluation(…)"
    check_callable(evaluate, "evaluate", wanted)
    try:
        found = eqx.filter_eval_shape(evaluate, _first_of(network, seeds))
    except InputError:
        raise
    # What a function of the user does with a network is its own affair.
    except Exception as error:
        raise InputError(
            f"evaluate must be {wanted}, but it failed on the network: "
            f"{type(error).__name__}: {error}"
        ) from error
    arrays = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(x, jax.ShapeDtypeStruct | int | float | np.ndarray) for x in arrays):
        raise InputError(f"evaluate must be {wanted}, but it gives a {type(found).__name__}")


def _first_of(network: Network, seeds: int | None) -> Network:
    """The first of a stack of networks, or the only one."""
    if seeds is None:
        return network
    return jax.tree.map(lambda x: x[0] if eqx.is_inexact_array(x) else x, network)


def check_rule(
    rule: Rule,
    network: Network,
    data: tuple[Array | None, Array],
    energy: tuple[Energy, ...],
    prior: Prior | None,
    batch_size: int,
    seeds: int | None,
) -> None:
    """Let problem and rule refuse, on the first batch, what they cannot learn from."""
    check_instance(rule, "rule", Rule, "a rule such as pcdyn.learning.PredictiveCoding()")
    network = _first_of(network, seeds)
    # All targets, for an energy may need more than finite ones.
    problem = InferenceProblem(network, input=data[0], output=data[1], energy=energy, prior=prior)
    rule.check(problem.with_data(*jax.tree.map(lambda x: x[:batch_size], data)))
