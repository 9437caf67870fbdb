"""Graphs and partial clamps that cannot be used are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import pcdyn
from pcdyn import Dense, Graph, InferenceProblem, Partial, Prediction
from pcdyn.errors import (
    DtypeError,
    GraphError,
    InputError,
    NonFiniteError,
    ShapeError,
    SingularHessianError,
)


def dense(rows: int, *widths: int) -> Dense:
    return Dense([np.full((rows, n), 0.3) for n in widths])


def graph(*more: Prediction, nodes: dict[str, Any] | None = None) -> Graph:
    """Two inputs, a layer between and an output."""
    given = {"eye": 3, "ear": 2, "low": 4, "top": 2} if nodes is None else nodes
    predictions = [
        Prediction("low", given=("eye", "ear"), by=dense(4, 3, 2)),
        Prediction("top", given="low", by=dense(2, 4)),
    ]
    return Graph(given, [*predictions, *more])


def problem(clamp: dict[str, Any] | None = None, **options: Any) -> InferenceProblem:
    ends = {"eye": np.ones(3), "ear": np.ones(2), "top": np.ones(2)}
    return InferenceProblem(graph(), clamp=ends if clamp is None else clamp, **options)


def loop() -> InferenceProblem:
    lateral = Prediction("low", given="top", by=dense(4, 2))
    nodes = {"eye": 3, "low": 4, "top": 2}
    predictions = [
        lateral,
        Prediction("top", given=("low", "eye"), by=dense(2, 4, 3)),
    ]
    return InferenceProblem(Graph(nodes, predictions), clamp={"eye": np.ones(3)})


MASK = np.array([True, False, True])
NET = pcdyn.mlp([3, 4, 2], activation="tanh", key=jax.random.key(0))

CALLS: list[tuple[str, Callable[[], Any], type[InputError], str]] = [
    ("unknown target", lambda: graph(Prediction("nose", given="eye", by=dense(2, 3))),
     GraphError, "there is no node 'nose'"),
    ("unknown source", lambda: graph(Prediction("top", given="nose", by=dense(2, 3))),
     GraphError, "there is no node 'nose'"),
    ("repeated source", lambda: Prediction("top", given=("eye", "eye"), by=dense(2, 3, 3)),
     GraphError, "a node twice"),
    ("a number as a name", lambda: Prediction(3, by=1.0), GraphError, "named by a text"),  # type: ignore
    ("a number as a node", lambda: graph(nodes={1: 2}), GraphError, "named by a text"),  # type: ignore
    ("no prediction", lambda: Graph({"eye": 3}, []), GraphError, "at least one prediction"),
    ("no list", lambda: Graph({"eye": 3}, 3), InputError, "a list of pcdyn.Prediction"),  # type: ignore
    ("no dictionary", lambda: Graph([3], []), InputError, "a dictionary"),  # type: ignore
    ("width of zero", lambda: graph(nodes={"eye": 0}), ShapeError, "node 'eye'"),
    ("empty shape", lambda: graph(nodes={"eye": ()}), ShapeError, "node 'eye'"),
    ("wrong width", lambda: graph(Prediction("top", given="eye", by=dense(2, 2))), ShapeError,
     "'top' does not accept 'eye' of shape (3,)"),
    ("wrong rows", lambda: graph(Prediction("top", given="eye", by=dense(3, 3))), ShapeError,
     "'top' has shape (3,), but the node (2,)"),
    ("wrong mean", lambda: graph(Prediction("top", by=np.ones(3))), ShapeError, "'top'"),
    ("weights of several heights", lambda: Dense([np.ones((2, 3)), np.ones((3, 3))]), ShapeError,
     "as many rows"),
    ("in pieces", lambda: graph(nodes={"eye": 3, "ear": 2, "low": 4, "top": 2, "far": 1}),
     GraphError, "in pieces: no prediction joins 'far' to 'eye'"),
    ("no function", lambda: Prediction("top", given="low", by=3.0), InputError, "'top'"),
    ("no energy", lambda: Prediction("top", given="low", by=dense(2, 4), energy=1.0),  # type: ignore
     InputError, "energy of 'top'"),
    ("clamp of no node", lambda: problem({"nose": np.ones(2)}), GraphError, "'nose'"),
    ("clamp that is no dictionary", lambda: problem(clamp=[1.0]), InputError, "a dictionary"),  # type: ignore
    ("clamp of another width", lambda: problem({"eye": np.ones(2)}), ShapeError,
     "clamp['eye'] has shape (2,)"),
    ("clamps of two batches",
     lambda: problem({"eye": np.ones((2, 3)), "ear": np.ones((3, 2))}), ShapeError, "batch size"),
    ("all clamped", lambda: problem({"eye": np.ones(3), "ear": np.ones(2), "low": np.ones(4),
                                     "top": np.ones(2)}), InputError, "nothing to infer"),
    ("input of a graph", lambda: InferenceProblem(graph(), input=np.ones(3)), GraphError,
     "a graph has no input"),
    ("prior of a graph", lambda: InferenceProblem(graph(), prior=pcdyn.Prior()), InputError,
     "priors among its predictions"),
    ("layer beyond a chain", lambda: InferenceProblem(NET, clamp={3: np.ones(2)}), GraphError,
     "at most 2"),
    ("clamped twice", lambda: InferenceProblem(NET, input=np.ones(3), clamp={0: np.ones(3)}),
     InputError, "clamped twice"),
    ("NaN", lambda: problem({"eye": np.array([1.0, np.nan, 0.0])}), NonFiniteError,
     "pcdyn.Partial(values, mask)"),
    ("NaN where clamped", lambda: Partial(np.array([np.nan, 1.0, 0.0]), MASK), NonFiniteError,
     "values"),
    ("mask of another shape", lambda: Partial(np.ones(2), MASK), ShapeError, "mask has shape (3,)"),
    ("mask of numbers", lambda: Partial(np.ones(3), np.ones(3)), DtypeError, "booleans"),
    ("mask of another node", lambda: problem({"ear": Partial(np.ones(3), MASK)}), ShapeError,
     "clamp['ear'] has shape (3,)"),
    ("traced mask", lambda: jax.jit(lambda m: Partial(np.ones(3), m).values)(MASK), InputError,
     "mask must be known"),
    ("time constant of no node", lambda: problem(time_constants={"nose": 1.0}), GraphError,
     "'nose'"),
    ("two time constants", lambda: problem(time_constants=[1.0, 1.0]), ShapeError, "for 4 nodes"),
    ("energies in a list beside own ones",
     lambda: InferenceProblem(
         graph(Prediction("eye", by=0.0, energy=pcdyn.Gaussian())), energy=[pcdyn.Gaussian()] * 3
     ), InputError, "energies of their own"),
    ("names of a chain", lambda: pcdyn.Network(NET.layers, nodes=["a", "a", "b"]), GraphError,
     "3 different names"),
    ("no pass on a cycle", lambda: pcdyn.simulate(loop(), t1=1.0), GraphError,
     "predict each other"),
    ("no pass from nothing", lambda: pcdyn.feedforward(problem({"eye": np.ones(3)})), GraphError,
     "nothing predicts or clamps 'ear'"),
    ("no target", lambda: pcdyn.backpropagation(problem({"eye": np.ones(3), "ear": np.ones(2)})),
     GraphError, "needs a target"),
    ("a flat direction", lambda: pcdyn.linear_equilibrium(problem({"eye": np.ones(3)})),
     SingularHessianError, "nodes 'ear', 'low', 'top'"),
    ("what only chains have", lambda: pcdyn.target_propagation(problem()), GraphError,
     "a chain of layers alone"),
    ("error coordinates",
     lambda: pcdyn.equilibrium(problem({"eye": np.ones(3), "ear": np.ones(2)}), method="nesterov"),
     GraphError, "nesterov needs a graph in which"),
    ("no such activities", lambda: pcdyn.equilibrium(problem()).activities["nose"], GraphError,  # type: ignore
     "there is no node 'nose'"),
]  # fmt: skip


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "error", "named"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS]
)
def test_what_cannot_be_used_is_refused(
    call: Callable[[], Any], error: type[InputError], named: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert named in str(caught.value)
