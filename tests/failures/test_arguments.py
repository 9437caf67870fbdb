"""Arguments of a wrong kind: each mistake that a user could make is refused by the argument's name.

Annotations are not checked here, as users run pcdyn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import pcdyn
from pcdyn import learning, solvers
from pcdyn.errors import InputError
from tests.fuzzing import KNOWN

pytestmark = pytest.mark.unchecked


def simulate(**options: Any) -> Any:
    return pcdyn.simulate(KNOWN.problem, **{"t1": 5.0, **options})


def equilibrium(**options: Any) -> Any:
    return pcdyn.equilibrium(KNOWN.problem, **options)


def compare(integrators: Any = ("tsit5",), problem: Any = None, **options: Any) -> Any:
    problem = KNOWN.problem if problem is None else problem
    return pcdyn.compare(integrators, problem, **{"t1": 1.0, "repeats": 1, **options})


def train(**options: Any) -> Any:
    valid = {
        "network": KNOWN.network, "rule": learning.Backpropagation(), "key": KNOWN.key,
        "optimiser": optax.sgd(1e-3), "epochs": 1, "batch_size": 4, **KNOWN.samples,
    }  # fmt: skip
    return learning.train(**(valid | options))


def mlp(**options: Any) -> Any:
    return pcdyn.mlp(**{"widths": [3, 4, 2], "activation": "tanh", "key": KNOWN.key, **options})


# What is done, and the argument that the message names.
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "a trajectory as the start": (lambda: simulate(initial=KNOWN.trajectory), "initial"),
    "an equilibrium as the start": (lambda: simulate(initial=KNOWN.equilibrium), "initial"),
    "no start": (lambda: simulate(initial=None), "initial"),
    "no end": (lambda: simulate(t1=None), "t1"),
    "a text as the end": (lambda: simulate(t1="5"), "t1"),
    "a generator of times": (lambda: simulate(times=(t for t in [0.0, 1.0])), "times"),
    "a text as a flag": (lambda: simulate(throw="no"), "throw"),
    "a number as a flag": (lambda: simulate(dense=1), "dense"),
    "nothing as a flag": (lambda: simulate(per_sample=None), "per_sample"),
    "a solver class": (lambda: pcdyn.Diffrax(diffrax.Tsit5), "solver"),
    "a network as a problem": (lambda: pcdyn.simulate(KNOWN.network, t1=1.0), "problem"),
    "several times at once": (lambda: KNOWN.trajectory(np.linspace(0, 1, 5)), "t, a time"),
    "several layers at once": (lambda: KNOWN.trajectory.plot(layer=[1, 2]), "layer"),
    "axes that are none": (lambda: KNOWN.trajectory.plot(ax=1), "ax must be"),
    "a distance to an array": (lambda: KNOWN.trajectory.distance_to(np.zeros(4)), "reference"),
    "a distance in no layer": (
        lambda: KNOWN.trajectory.distance_to(KNOWN.equilibrium, layers=[7]), "layers"),
    "no limit of steps": (lambda: pcdyn.Diffrax(max_steps=None), "max_steps"),
    "a float as a limit of steps": (lambda: pcdyn.Diffrax(max_steps=2.5), "max_steps"),
    "a text as a tolerance": (lambda: pcdyn.Diffrax(rtol="1e-3"), "rtol"),
    "an implicit-explicit solver": (lambda: pcdyn.Diffrax(diffrax.KenCarp3()), "KenCarp3"),
    "a list of activations": (lambda: mlp(activation=["tanh", "identity"]), "activation"),
    "a seed as a key": (lambda: mlp(key=0), "key"),
    "a text as a bias": (lambda: mlp(bias="yes"), "bias"),
    "widths that are no integers": (lambda: mlp(widths=[3, 4.0, 2]), r"widths\[1\]"),
    "one layer": (lambda: pcdyn.Network(KNOWN.network.layers[0]), "layers"),
    "a layer of chance": (
        lambda: pcdyn.Network([KNOWN.network.layers[0], eqx.nn.Dropout(0.5)]), "layer 2"),
    "one time constant": (
        lambda: pcdyn.InferenceProblem(KNOWN.network, time_constants=1.0), "time_constants"),
    "an energy class": (
        lambda: pcdyn.InferenceProblem(KNOWN.network, energy=pcdyn.Gaussian), "energy"),
    "a text as an equilibrium tolerance": (lambda: equilibrium(tolerance="1e-6"), "tolerance"),
    "a flow in two kinds of variables": (
        lambda: pcdyn.equilibrium(KNOWN.joint_flow), "problem"),
    "one tolerance": (lambda: compare(tolerances=1e-3), "tolerances"),
    "an unknown reference": (lambda: compare(reference=1.0), "1.0"),
    "no starts": (
        lambda: pcdyn.multiple_equilibria(KNOWN.problem, [np.zeros((0, 4))]), "starts"),
    "a negative separation": (
        lambda: pcdyn.multiple_equilibria(KNOWN.problem, [np.zeros((2, 4))], separation=-1),
        "separation"),
    "a tolerance that is NaN": (
        lambda: KNOWN.equilibrium.basin(tolerance=float("nan")), "tolerance"),
    "an accuracy that is NaN": (
        lambda: learning.TruncatedGaussNewton(float("nan")), "tolerance"),
    "growth that shrinks": (lambda: solvers.PseudoTransient(growth=0.5), "growth"),
    "a seed for a training": (lambda: train(key=0), "key"),
    "epochs that are no integer": (lambda: train(epochs=1.0), "epochs"),
    "a rule class": (lambda: train(rule=learning.PredictiveCoding), "rule"),
    "a rate as an optimiser": (lambda: train(optimiser=1e-3), "optimiser"),
    "an optimiser with a line search": (lambda: train(optimiser=optax.lbfgs()), "optimiser"),
    "an evaluation that fails": (lambda: train(evaluate=len), "evaluate"),
    "one limit of pixels": (lambda: pcdyn.datasets.mnist(limits=1.0), "limits"),
    "a dtype that is none": (lambda: pcdyn.datasets.mnist(dtype="no"), "dtype"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_kind_of_argument_is_named(mistake: str) -> None:
    call, name = MISTAKES[mistake]
    with pytest.raises(InputError, match=name):
        call()


def test_an_equilibrium_is_drawn_as_its_activities() -> None:
    lines = KNOWN.trajectory.plot(equilibrium=KNOWN.equilibrium)
    same = KNOWN.trajectory.plot(equilibrium=KNOWN.equilibrium.activities)
    levels = [[line.get_ydata()[0] for line in drawn[4:]] for drawn in (lines, same)]
    np.testing.assert_array_equal(levels[0], levels[1])
    np.testing.assert_array_equal(levels[0], KNOWN.equilibrium.activities[1])


def test_arrays_are_sequences() -> None:
    assert mlp(widths=np.array([3, 4, 2])).widths == (3, 4, 2)
    constants = np.array([1.0, 2.0, 1.0])
    problem = pcdyn.InferenceProblem(KNOWN.network, input=np.ones(3), time_constants=constants)
    assert problem.time_constants is not None and float(problem.time_constants[1]) == 2.0


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)])
def test_keys_of_both_kinds_are_keys(key: Any) -> None:
    assert mlp(key=key).widths == (3, 4, 2)
