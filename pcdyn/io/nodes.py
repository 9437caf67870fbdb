"""The names and shapes of the nodes of a graph, as an attribute of a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pcdyn._support.types import Activities, Values
from pcdyn.errors import DataError
from pcdyn.model.named import NamedActivities, Shape

if TYPE_CHECKING:
    import xarray

_NODES = "nodes"


class Nodes(NamedTuple):
    """Nodes, the index of the one that each prediction is of, and of a graph those it is given.

    `outputs` say where the energies of the output stand.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    targets: tuple[int, ...]
    given: tuple[tuple[int, ...], ...] | None
    outputs: tuple[int, ...]


def prediction_numbers(activities: Sequence[Any], targets: Sequence[int]) -> list[int]:
    """The numbers by which predictions go: in a chain those of its layers, else 1 … K."""
    chain, given = list(range(len(activities))), list(targets)
    return given if given in (chain, chain[1:]) else list(range(1, len(given) + 1))


def described_nodes(
    activities: Activities,
    targets: Sequence[int],
    given: Sequence[tuple[int, ...]] | None = None,
    outputs: Sequence[int] | None = None,
) -> dict[str, str]:
    """The attribute, where activities have names."""
    if not isinstance(activities, NamedActivities):
        return {}
    described: dict[str, Any] = {
        "names": activities.names,
        "shapes": activities.shapes,
        "targets": tuple(targets),
    }
    if outputs is not None:
        described["outputs"] = tuple(outputs)
    if given is not None:
        described["given"] = tuple(given)
    return {_NODES: json.dumps(described)}


def nodes_of(dataset: xarray.Dataset) -> Nodes | None:
    """What the attribute says, `None` without it; raises `DataError` for what makes no sense."""
    if _NODES not in dataset.attrs:
        return None
    try:
        given = json.loads(str(dataset.attrs[_NODES]))
        names = tuple(given["names"])
        shapes = tuple(tuple(int(n) for n in shape) for shape in given["shapes"])
        targets = tuple(int(index) for index in given["targets"])
        outputs = tuple(int(place) for place in given.get("outputs", (-1,)))
        sources = None
        if "given" in given:
            sources = tuple(tuple(int(index) for index in each) for each in given["given"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"its attribute {_NODES!r} cannot be read: {error}") from error
    sound = len(names) == len(shapes) == len(set(names)) and all(
        isinstance(name, str) and name for name in names
    )
    indices = [*targets, *(index for each in sources or () for index in each)]
    if sources is not None and len(sources) != len(targets):
        sound = False
    sound = sound and all(-1 <= place < len(targets) for place in outputs)
    if not sound or not all(0 <= index < len(names) for index in indices):
        raise DataError(f"its attribute {_NODES!r} does not fit together")
    return Nodes(names, shapes, targets, sources, outputs)


def named(nodes: Nodes | None, arrays: Sequence[Values]) -> Activities:
    """Let arrays be asked for by name, where nodes have names."""
    return tuple(arrays) if nodes is None else NamedActivities(arrays, nodes.names, nodes.shapes)
