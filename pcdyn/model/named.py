"""Activities that can be asked for by the names of their nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from pcdyn._support.checks import checked_integer
from pcdyn._support.types import Values
from pcdyn.errors import GraphError, ShapeError

# Of a node, without the axes of times, samples and networks before it.
Shape = tuple[int, ...]


@jax.tree_util.register_pytree_with_keys_class
class NamedActivities(tuple[Values, ...]):
    """The activities of the nodes of a graph, in their order, which can be asked for by name.

    By index each is `(…, n)`; by name, as in `activities["retina"]`, it has the shape of the node
    on its last axes.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]

    def __new__(
        cls, arrays: Iterable[Any], names: tuple[str, ...], shapes: tuple[Shape, ...]
    ) -> NamedActivities:
        self = super().__new__(cls, arrays)
        self.names, self.shapes = names, shapes
        return self

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401
        if not isinstance(key, str):
            return super().__getitem__(key)
        index = index_of(key, self.names)
        array, shape = super().__getitem__(index), self.shapes[index]
        return array if len(shape) == 1 else array.reshape(*array.shape[:-1], *shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return NamedActivities, (tuple(self), self.names, self.shapes)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Say what JAX's transformations go through."""
        keys = map(jax.tree_util.DictKey, self.names)
        return list(zip(keys, self, strict=True)), (self.names, self.shapes)

    @classmethod
    def tree_unflatten(
        cls, names_and_shapes: tuple[tuple[str, ...], tuple[Shape, ...]], arrays: Iterable[Any]
    ) -> NamedActivities:
        """Build it from what a transformation gave back."""
        return cls(arrays, *names_and_shapes)


def checked_layer(activities: Sequence[Values], layer: object, what: str) -> int:
    """The index of a layer that is given by its number, or by the name of its node.

    Raises `ShapeError` or `GraphError`.
    """
    if isinstance(layer, str) and isinstance(activities, NamedActivities):
        return index_of(layer, activities.names)
    most = len(activities) - 1
    return checked_integer(layer, what, at_least=0, at_most=most, error=ShapeError)


def layer_name(activities: Sequence[Values], index: int) -> str:
    """The name of a node, or "layer" and its number."""
    named = isinstance(activities, NamedActivities)
    return activities.names[index] if named else f"layer {index}"


def index_of(name: object, nodes: Sequence[str]) -> int:
    """The index of a node, or `GraphError`."""
    if name not in nodes:
        raise GraphError(f"there is no node {name!r}; the nodes are {', '.join(map(repr, nodes))}")
    return nodes.index(str(name))
