"""Networks as graphs: named nodes, and predictions of each from others."""

from __future__ import annotations

import graphlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from pcdyn._support.arrays import as_float_array
from pcdyn._support.checks import (
    as_sequence,
    check_callable,
    check_instance,
    checked_integer,
)
from pcdyn._support.functions import as_part
from pcdyn._support.types import Numbers, Values
from pcdyn.errors import DtypeError, GraphError, ShapeError
from pcdyn.model.clamps import Clamp, PartlyClamped
from pcdyn.model.energies.energy import Energy
from pcdyn.model.named import NamedActivities, Shape, index_of
from pcdyn.model.network import Network, dtype_of, in_one_dtype
from pcdyn.model.prior import Prior


class Constant(eqx.Module):
    """The prediction that is the same whatever the activities: the mean of a prior."""

    value: Float[Array, "..."]

    def __call__(self) -> Float[Array, "..."]:
        return self.value


class Prediction(eqx.Module):
    """The prediction of one node of a graph from others, and what its error costs.

    **Arguments:**

    - `target`: the name of the node that is predicted.
    - `given`: the names of the nodes that it is predicted from, in the order in which `by` takes
      them; none for a prior.
    - `by`: a `pcdyn.Dense`, with one weight for each of `given`, any equinox module or function of
      the activities of one sample, each in the shape of its node, to those of the target, in its
      shape or in one row; for a prior the mean, a number or an array.
    - `energy`: of the prediction error; that of the problem unless given.

    **Raises:**

    - `GraphError` for names that are none, or repeated.
    - `InputError` for what is no function or no energy.
    """

    by: Any
    energy: Energy | None
    target: str = eqx.field(static=True)
    given: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        target: str,
        *,
        by: Callable[..., Array] | Numbers,
        given: str | Sequence[str] = (),
        energy: Energy | None = None,
    ):
        names = (given,) if isinstance(given, str) else as_sequence(given, "given", _NAMES)
        for name in (target, *names):
            if not isinstance(name, str) or not name:
                raise GraphError(f"a node is named by a text, got {name!r}")
        if len(set(names)) < len(names):
            raise GraphError(f"the prediction of {target!r} is given a node twice: {names}")
        self.target, self.given = target, tuple(names)
        what = f"what predicts {target!r}"
        if names:
            check_callable(by, what, "a function of the activities, such as a pcdyn.Dense")
        if not callable(by):
            by = Constant(as_float_array(by, what))
        self.by = as_part(by)
        if energy is not None:
            check_instance(energy, f"energy of {target!r}", Energy, "a pcdyn.Gaussian or another")
        self.energy = energy

    def __repr__(self) -> str:
        return f"{self.target} from {', '.join(self.given) or 'a prior'} by {self.by}"


_NAMES = "a list of the names of nodes"


class Graph(eqx.Module):
    """A network of predictions among named nodes: `F = Σ_k h_k(x_target − f_k(x_given))`.

    A node may be predicted by several others, more than once, by itself through others, or by
    nothing. `pcdyn.Network` is the special case in which each predicts the next.

    **Arguments:**

    - `nodes`: the number of units of each node by name, or the shape of a node, such as
      `(channels, height, width)`.
    - `predictions`: a list of `pcdyn.Prediction`.

    The attributes `nodes` and `shapes` hold names and shapes, `targets` and `sources` the indices
    of nodes for each prediction.

    **Raises:**

    - `GraphError` for nodes that do not exist and a graph in pieces, with their names.
    - `ShapeError` or `DtypeError` where a prediction does not fit its nodes.
    """

    predictions: tuple[Prediction, ...]
    nodes: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[Shape, ...] = eqx.field(static=True)

    def __init__(self, nodes: Mapping[str, int | Sequence[int]], predictions: Sequence[Prediction]):
        check_instance(nodes, "nodes", Mapping, "a dictionary from names to widths or shapes")
        for name in nodes:
            if not isinstance(name, str) or not name:
                raise GraphError(f"a node is named by a text, got {name!r}")
        self.nodes = tuple(nodes)
        self.shapes = tuple(checked_shape(size, name) for name, size in nodes.items())
        wanted = "a list of pcdyn.Prediction"
        given = as_sequence(predictions, "predictions", wanted)
        if not given:
            raise GraphError("a graph needs at least one prediction")
        for each in given:
            check_instance(each, "each of predictions", Prediction, "a pcdyn.Prediction")
            for name in (each.target, *each.given):
                index_of(name, self.nodes)
        fitted = (_fitted(each, self.shapes[self.nodes.index(each.target)]) for each in given)
        self.predictions = in_one_dtype(tuple(fitted), "prediction")
        self._check_connected()
        for each in self.predictions:
            self._check_shapes(each)

    @property
    def targets(self) -> tuple[int, ...]:
        """Index of the node that each prediction is of."""
        return tuple(self.nodes.index(each.target) for each in self.predictions)

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the nodes that each prediction is given."""
        return tuple(tuple(map(self.nodes.index, each.given)) for each in self.predictions)

    @property
    def layers(self) -> tuple[Any, ...]:
        """What makes each prediction."""
        return tuple(each.by for each in self.predictions)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of units of each node."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def dtype(self) -> np.dtype:
        """Floating-point dtype of the weights."""
        return dtype_of(self.predictions)

    def predict_from(
        self,
        index: int,
        given: Sequence[Float[Values, "*batch _"]],
        by: Callable[..., Array] | None = None,
    ) -> Float[Array, "*batch n"]:
        """Make prediction k = `index`, counted from 1, from its sources, or `by` another one."""
        function = self.predictions[index - 1].by if by is None else by
        sources = self.sources[index - 1]
        shapes = [self.shapes[source] for source in sources]

        def one(*given: Array) -> Array:
            shaped = [x.reshape(shape) for x, shape in zip(given, shapes, strict=True)]
            return function(*shaped).ravel()

        if not sources:
            return function().ravel()
        signature = ",".join(f"(n{i})" for i in range(len(sources)))
        return jnp.vectorize(one, signature=f"{signature}->(m)")(*given)

    def with_layers(self, layers: Sequence[Any]) -> Graph:
        """Return the same graph with other functions in place of those that predict."""
        return eqx.tree_at(lambda g: [each.by for each in g.predictions], self, list(layers))

    def named(self, activities: Iterable[Any]) -> NamedActivities:
        """Let the activities of all nodes, in their order, be asked for by name."""
        return NamedActivities(activities, self.nodes, self.shapes)

    def as_chain(
        self, energies: Sequence[Energy], *, free: bool
    ) -> tuple[Network, tuple[Energy, ...], Prior | None] | None:
        """Write it as a chain with its energies and its prior, `None` if it is none.

        It is one if each node predicts the next, in the order in which nodes and predictions are
        listed, and nothing else but a prior on the first, if that is `free`, predicts.
        """
        each = list(zip(self.targets, self.sources, self.predictions, energies, strict=True))
        priors = [(p.by, energy) for target, given, p, energy in each if not given and target == 0]
        rest = [item for item in each if item[1] or item[0] != 0]
        ways = [(target, given) for target, given, _, _ in rest]
        if ways != [(l, (l - 1,)) for l in range(1, len(self.nodes))] or len(priors) > free:
            return None
        if any(len(shape) > 1 for shape in self.shapes):
            return None
        layers = [prediction.by for _, _, prediction, _ in rest]
        network = Network(layers, input_width=self.widths[0], nodes=self.nodes)
        prior = Prior(priors[0][0](), priors[0][1]) if priors else None
        return network, tuple(energy for _, _, _, energy in rest), prior

    def feedforward(
        self,
        clamp: Sequence[Clamp],
        batch: tuple[int, ...],
        nudges: Sequence[Array] | None = None,
    ) -> tuple[NamedActivities, NamedActivities]:
        """Compute activities of a feedforward pass from what is clamped, and their predictions.

        Of the predictions of a node the one listed first counts. They differ in what is clamped;
        a node that nothing predicts has its activity. `nudges` are added to the predictions.

        **Raises:**

        - `GraphError` on a cycle, or for a node that nothing predicts or clamps, with their names.
        """
        activities: list[Any] = list(clamp)
        is_whole = [not (x is None or isinstance(x, PartlyClamped)) for x in clamp]
        order = self.feedforward_order([node for node, x in enumerate(is_whole) if not x])

        def prediction(node: int) -> Array:
            index = self.targets.index(node) + 1
            x = self.predict_from(index, [activities[i] for i in self.sources[index - 1]])
            x = jnp.broadcast_to(x, (*batch, x.shape[-1]))
            return x if nudges is None else x + nudges[index - 1]

        predicted: dict[int, Any] = {}
        for node in order:
            x, value = prediction(node), clamp[node]
            predicted[node] = x
            is_partial = isinstance(value, PartlyClamped)
            activities[node] = value.fill(value.take(x)) if is_partial else x
        for node, whole in enumerate(is_whole):
            if whole:
                predicted[node] = prediction(node) if node in self.targets else activities[node]
        each = (predicted[node] for node in range(len(self.nodes)))
        return self.named(activities), self.named(each)

    def feedforward_order(self, free: Sequence[int]) -> tuple[int, ...]:
        """Return the `free` nodes in an order in which each comes after what it is predicted from.

        **Raises:**

        - `GraphError` on a cycle, or for a node that nothing predicts, with their names.
        """
        before: dict[int, tuple[int, ...]] = {}
        for node in free:
            if node not in self.targets:
                raise GraphError(
                    f"no feedforward pass: nothing predicts or clamps {self.nodes[node]!r}; {_USE}"
                )
            given = self.sources[self.targets.index(node)]
            before[node] = tuple(source for source in given if source in free)
        try:
            return tuple(graphlib.TopologicalSorter(before).static_order())
        except graphlib.CycleError as error:
            cycle = " → ".join(repr(self.nodes[node]) for node in reversed(error.args[1]))
            raise GraphError(f"no feedforward pass: {cycle} predict each other; {_USE}") from None

    @property
    def is_generative(self) -> bool:
        """Whether each node has at most one prediction, and none depends on itself."""
        if len(set(self.targets)) < len(self.targets):
            return False
        before = dict(zip(self.targets, self.sources, strict=True))
        try:
            graphlib.TopologicalSorter(before).prepare()
        except graphlib.CycleError:
            return False
        return True

    def has_order(self, free: Sequence[int]) -> bool:
        """Whether each `free` node is predicted, and none from what depends on it."""
        try:
            self.feedforward_order(free)
        except GraphError:
            return False
        return True

    def without_energies(self) -> Graph:
        """Return the same graph with no energies, which a problem keeps beside it."""
        bare = tuple(
            eqx.tree_at(lambda p: p.energy, each, None, is_leaf=lambda x: x is None)
            for each in self.predictions
        )
        return eqx.tree_at(lambda g: g.predictions, self, bare)

    def check_one(self) -> None:
        """Raise `ShapeError` for the stacked weights of several networks."""
        for each in self.predictions:
            weight = getattr(each.by, "weight", None)
            if type(each.by).__name__ == "Dense" and getattr(weight, "ndim", 2) != 2:
                raise ShapeError(
                    "the graph holds the weights of several: map over them with "
                    "equinox.filter_vmap, or take one with jax.tree.map(lambda x: x[0], graph)"
                )

    def _check_connected(self) -> None:
        reached, ways = {0}, list(zip(self.targets, self.sources, strict=True))
        for _ in self.nodes:
            for target, sources in ways:
                together = {target, *sources}
                if reached & together:
                    reached |= together
        apart = [name for node, name in enumerate(self.nodes) if node not in reached]
        if apart:
            raise GraphError(
                f"the graph is in pieces: no prediction joins {', '.join(map(repr, apart))} to "
                f"{self.nodes[0]!r}; make one graph of each piece"
            )

    def _check_shapes(self, each: Prediction) -> None:
        dtype, wanted = self.dtype, self.shapes[self.nodes.index(each.target)]
        given = [
            jax.ShapeDtypeStruct(self.shapes[self.nodes.index(name)], dtype) for name in each.given
        ]
        taken = ", ".join(f"{name!r} of shape {self.shapes[self.nodes.index(name)]}"
                          for name in each.given)  # fmt: skip
        try:
            found: Any = eqx.filter_eval_shape(each.by, *given)
        # What a function of the user does with an array that it did not expect is its own affair.
        except Exception as error:
            raise ShapeError(
                f"the prediction of {each.target!r} does not accept {taken}: "
                f"{type(error).__name__}: {error}"
            ) from error
        shape = getattr(found, "shape", None)
        if shape not in (wanted, (math.prod(wanted),)):
            raise ShapeError(
                f"the prediction of {each.target!r} has shape {shape}, but the node {wanted}"
            )
        if found.dtype != dtype:
            raise DtypeError(
                f"the prediction of {each.target!r} has dtype {found.dtype}, its activities {dtype}"
            )


_USE = (
    'start from initial="zeros", initial=problem.random_state(key) or a state, or clamp or predict '
    "one of them by a prior"
)


def _fitted(prediction: Prediction, shape: Shape) -> Prediction:
    """The same, a mean with one number for each unit of the node."""
    if not isinstance(prediction.by, Constant):
        return prediction
    value = prediction.by.value
    if value.ndim == 0:
        value = jnp.broadcast_to(value, shape)
    elif value.shape == (math.prod(shape),):
        value = value.reshape(shape)
    return eqx.tree_at(lambda p: p.by.value, prediction, value)


def learnable(tree: PyTree) -> PyTree:
    """The arrays of a network or graph, or of any part, but for the means of priors."""
    return eqx.filter(tree, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, Constant))


def checked_shape(size: object, name: str) -> Shape:
    """The shape of a node of so many units, or of this shape; raises `ShapeError`."""
    what = f"the size of node {name!r}"
    limits: dict[str, Any] = {"at_least": 1, "at_most": 2**31 - 1, "error": ShapeError}
    if isinstance(size, Sequence) and not isinstance(size, str):
        shape = tuple(checked_integer(n, f"each of {what}", **limits) for n in size)
        if not shape:
            raise ShapeError(f"{what} is empty: give a number of units or a shape")
        return shape
    return (checked_integer(size, what, **limits),)
