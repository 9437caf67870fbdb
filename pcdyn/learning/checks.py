"""Checks of what a training is given, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

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
from pcdyn.model.clamps import Partial
from pcdyn.model.energies.energy import Energy, one_per_prediction
from pcdyn.model.graph import Graph
from pcdyn.model.named import index_of
from pcdyn.model.network import Network
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem

Evaluate = Callable[[Any], Mapping[str, ArrayLike]]
# Of a chain an array, of a graph one for each node.
Data = Numbers | Mapping[str, Numbers | Partial]
_Network = TypeVar("_Network", bound=Network | Graph)


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


def problem_to_learn(
    network: Network | Graph,
    inputs: Data | None,
    targets: Data,
    energy: Energy | Sequence[Energy],
    prior: Prior | None,
    seeds: int | None,
) -> tuple[InferenceProblem, tuple[int, ...]]:
    """Clamp all data of the first network, and say which nodes have targets.

    Labels become one-hot rows.
    """
    _check_network(network, seeds)
    first = first_of(network, seeds)
    if isinstance(first, Graph):
        clamp, nodes = _clamps(first, inputs, targets)
        problem = InferenceProblem(first, clamp=clamp, energy=energy, prior=prior)
        if len(problem.batch_shape or ()) != 1:
            raise ShapeError("one sample of data was given: each node needs (samples, …)")
        return problem, nodes
    energies = one_per_prediction(energy, first.depth)
    input, output = _checked_data(first, inputs, targets)
    problem = InferenceProblem(first, input=input, output=output, energy=energies, prior=prior)
    return problem, (first.depth,)


def _clamps(
    graph: Graph, inputs: Data | None, targets: Data
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What is clamped where, and the nodes of the targets."""
    wanted = 'a dictionary from nodes to values, such as {"retina": images}'
    clamp: dict[str, Any] = {}
    nodes: dict[str, list[int]] = {"inputs": [], "targets": []}
    for what, given in (("inputs", {} if inputs is None else inputs), ("targets", targets)):
        if not isinstance(given, Mapping):
            raise InputError(f"{what} of a graph must be {wanted}, got a {type(given).__name__}")
        if what == "targets" and not given:
            raise InputError(f"targets are empty: give {wanted}")
        for name, values in given.items():
            node = index_of(name, graph.nodes)
            if name in clamp:
                raise InputError(f"{name!r} has inputs and targets: give either")
            labels = what == "targets" and _maybe_labels(values) is not None
            clamp[name] = (
                _checked_targets(values, graph.widths[node], graph.dtype) if labels else values
            )
            nodes[what].append(node)
    return clamp, tuple(nodes["targets"])


def _check_network(network: Network | Graph, seeds: int | None) -> None:
    """Raise an error for what is none, or no stack of as many networks as there are keys."""
    wanted = "a pcdyn.Network or a pcdyn.Graph"
    check_instance(network, "network", Network | Graph, wanted)
    check_dtype(network.dtype, "dtype of the network")
    first = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    if seeds is not None and any(x.ndim < 1 or len(x) != seeds for x in first):
        raise ShapeError(
            f"there are {seeds} keys, but the network is not a stack of {seeds} networks: build it "
            "with equinox.filter_vmap over the keys"
        )
    # One problem is made of all: of their energies there is one.
    predictions = network.predictions if isinstance(network, Graph) else ()
    each = jax.tree.leaves(eqx.filter([p.energy for p in predictions], eqx.is_inexact_array))
    if seeds is not None and any(bool(jnp.any(x != x[:1])) for x in each):
        raise InputError(
            "the graphs of the stack differ in the energies of their predictions: train those of "
            "each energy by themselves"
        )


def _checked_data(
    network: Network, inputs: Data | None, targets: Data
) -> tuple[Array | None, Array]:
    """Convert inputs and targets to arrays of the network's dtype, labels as one-hot rows.

    Inputs stay `None` where they are latent.
    """
    for what, given in (("inputs", inputs), ("targets", targets)):
        if isinstance(given, Mapping):
            raise InputError(f"{what} by node are for a pcdyn.Graph: give an array")
    width, dtype = network.widths[-1], network.dtype
    if inputs is None:
        return None, _checked_targets(targets, width, dtype)
    inputs = converted(as_float_array(inputs, "inputs"), network.dtype, "inputs")
    if inputs.ndim != 2 or inputs.shape[1] != network.widths[0]:
        raise ShapeError(
            f"inputs have shape {inputs.shape}, but the network needs (samples, "
            f"{network.widths[0]})"
        )
    targets = _checked_targets(targets, width, dtype)
    if len(inputs) != len(targets):
        raise ShapeError(f"there are {len(inputs)} inputs and {len(targets)} targets")
    return inputs, targets


def _checked_targets(targets: object, width: int, dtype: np.dtype) -> Array:
    array = _maybe_labels(targets)
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
        return jax.nn.one_hot(array, width, dtype=dtype)
    checked = converted(jnp.asarray(array), dtype, "targets")
    if checked.ndim != 2 or checked.shape[1] != width:
        raise ShapeError(f"targets have shape {checked.shape}, but (samples, {width}) is needed")
    return checked


def _maybe_labels(targets: object) -> np.ndarray | None:
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


def check_evaluate(evaluate: Evaluate, network: Network | Graph, seeds: int | None) -> None:
    """Raise `InputError` for what does not make a dictionary of arrays of a network."""
    wanted = "a function from a network to a dictionary of arrays, such as Evaluation(…)"
    check_callable(evaluate, "evaluate", wanted)
    try:
        found = eqx.filter_eval_shape(evaluate, first_of(network, seeds))
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


def first_of(network: _Network, seeds: int | None) -> _Network:
    """The first of a stack of networks, or the only one."""
    if seeds is None:
        return network
    return jax.tree.map(lambda x: x[0] if eqx.is_inexact_array(x) else x, network)
