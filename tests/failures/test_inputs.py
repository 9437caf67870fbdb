"""Every input that cannot be used raises its named error before anything runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from pcdyn._support.arrays import as_float_array
from pcdyn.errors import (
    ActivationError,
    DtypeError,
    InputError,
    NonFiniteError,
    PcdynError,
    PrecisionError,
    ShapeError,
)
from pcdyn.model.activations import Activation
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network, mlp
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem

NETWORK = Network([Dense(0.5 * np.ones((3, 2)), None, "tanh"), Dense(0.5 * np.ones((2, 3)))])
HIDDEN = np.zeros(3)


def problem(**options: Any) -> InferenceProblem:
    """Widths 2, 3, 2; both ends clamped unless told otherwise."""
    return InferenceProblem(NETWORK, **{"input": np.ones(2), "output": np.ones(2), **options})


def precisions(first: Any) -> InferenceProblem:
    return problem(energy=Gaussian([first, 1.0]))


def weights(widths: list[Any], **options: Any) -> Network:
    return mlp(widths, activation="tanh", key=jr.key(0), **options)


def start(*state: Any, **options: Any) -> Any:
    return problem(**options).initial_state(state)


class Pair(eqx.Module):
    """A layer that returns a matrix."""

    def __call__(self, x: Any) -> Any:
        return jnp.stack([x, x])


NAN, INF = np.array([1.0, np.nan]), np.array([np.inf, 1.0])
ASYMMETRIC = np.array([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]])
INDEFINITE = np.array([[1.0, 2.0, 0], [2, 1, 0], [0, 0, 1]])
Call = Callable[[], Any]

# What is wrong, the call, its error, and what the message must name.
BAD: list[tuple[str, Call, type[InputError], str]] = [
    # Layers and networks.
    ("weight vector", lambda: Dense(np.ones(3)), ShapeError, "weight"),
    ("weight cube", lambda: Dense(np.ones((2, 2, 2))), ShapeError, "(2, 2, 2)"),
    ("empty weight", lambda: Dense(np.ones((0, 2))), ShapeError, "(0, 2)"),
    ("integer weight", lambda: Dense(np.ones((2, 2), int)), DtypeError, "weight has dtype int"),
    ("complex weight", lambda: Dense(np.ones((2, 2), complex)), DtypeError, "complex"),
    ("NaN weight", lambda: Dense(np.full((2, 2), np.nan)), NonFiniteError, "weight"),
    ("bias shape", lambda: Dense(np.ones((2, 3)), np.ones(3)), ShapeError, "bias"),
    ("integer bias", lambda: Dense(np.eye(2), np.ones(2, int)), DtypeError, "bias"),
    ("NaN bias", lambda: Dense(np.eye(2), NAN), NonFiniteError, "bias"),
    ("unknown activation", lambda: Dense(np.eye(2), None, "wave"), ActivationError, "'wave'"),
    ("empty range", lambda: Activation("wave", jnp.sin, None, 1.0, 1.0), ActivationError, "'wave'"),
    ("empty network", lambda: Network([]), ShapeError, "at least one layer"),
    ("mismatched layers", lambda: Network([Dense(np.ones((3, 2))), Dense(np.ones((2, 2)))]),
     ShapeError, "layer 2"),
    ("wrong input_width", lambda: Network([Dense(np.eye(2))], input_width=3), ShapeError,
     "input_width is 3"),
    ("missing input_width", lambda: Network([eqx.nn.Linear(2, 2, key=jr.key(0))]), ShapeError,
     "input_width"),
    ("layer that does not fit",
     lambda: Network([Dense(np.eye(2)), eqx.nn.Linear(3, 2, key=jr.key(0))]), ShapeError,
     "layer 2"),
    ("layer that returns a matrix", lambda: Network([Dense(np.eye(2)), Pair()]), ShapeError,
     "layer 2"),
    # Initial weights.
    ("one width", lambda: weights([3]), ShapeError, "[3]"),
    ("no widths", lambda: weights([]), ShapeError, "[]"),
    ("zero width", lambda: weights([3, 0, 2]), ShapeError, "widths[1]"),
    ("negative width", lambda: weights([3, -1]), ShapeError, "widths[1]"),
    ("std with initialisation", lambda: weights([2, 2], std=1.0, initialisation="orthogonal"),
     InputError, "not both"),
    ("negative std", lambda: weights([2, 2], std=-1.0), InputError, "-1.0"),
    ("NaN std", lambda: weights([2, 2], std=np.nan), InputError, "nan"),
    ("unknown initialisation",
     lambda: inspect.unwrap(mlp)([2, 2], activation="tanh", key=jr.key(0), initialisation="he"),
     InputError, "'he'"),
    ("mlp activation", lambda: mlp([2, 2], activation="wave", key=jr.key(0)), ActivationError,
     "'wave'"),
    # Precisions.
    ("zero precision", lambda: Gaussian(0.0), PrecisionError, "precision"),
    ("negative precision", lambda: Gaussian(-2.0), PrecisionError, "-2"),
    ("NaN precision", lambda: Gaussian(np.nan), NonFiniteError, "precision"),
    ("integer precision array", lambda: Gaussian([np.eye(3, dtype=int)]), DtypeError, "layer 1"),
    ("array for all layers", lambda: problem(energy=Gaussian(np.ones(7))), ShapeError,
     "layer 1: precision has shape (7,)"),
    ("negative diagonal", lambda: Gaussian([1.0, np.array([1.0, -3.0])]), PrecisionError,
     "layer 2"),
    ("asymmetric", lambda: Gaussian([ASYMMETRIC]), PrecisionError, "layer 1 is not symmetric"),
    ("indefinite", lambda: Gaussian([1.0, INDEFINITE]), PrecisionError,
     "layer 2 is not positive definite: its smallest eigenvalue is -1"),
    ("semidefinite", lambda: Gaussian([np.zeros((2, 2))]), PrecisionError, "layer 1"),
    ("rectangular", lambda: Gaussian([np.ones((2, 3))]), ShapeError, "layer 1"),
    ("cube", lambda: Gaussian([np.ones((2, 2, 2))]), ShapeError, "(2, 2, 2)"),
    ("too few precisions", lambda: problem(energy=Gaussian([1.0])), ShapeError, "1 precisions"),
    ("too many precisions", lambda: problem(energy=Gaussian([1.0] * 3)), ShapeError,
     "3 precisions"),
    ("diagonal width", lambda: precisions(np.ones(2)), ShapeError,
     "layer 1: precision has shape (2,)"),
    ("matrix width", lambda: precisions(np.eye(2)), ShapeError,
     "layer 1: precision has shape (2, 2)"),
    # Clamped data.
    ("input width", lambda: problem(input=np.ones(3)), ShapeError, "input has shape (3,)"),
    ("output width", lambda: problem(output=np.ones((4, 3))), ShapeError,
     "output has shape (4, 3)"),
    ("scalar input", lambda: problem(input=1.0), ShapeError, "input"),
    ("cube input", lambda: problem(input=np.ones((2, 2, 2))), ShapeError, "input"),
    ("integer input", lambda: problem(input=np.ones(2, int)), DtypeError, "input"),
    ("boolean output", lambda: problem(output=np.ones(2, bool)), DtypeError, "output"),
    ("NaN input", lambda: problem(input=NAN), NonFiniteError, "(nan) at index (1,)"),
    ("infinite output", lambda: problem(output=INF), NonFiniteError, "(inf) at index (0,)"),
    ("mismatched batches",
     lambda: problem(input=np.ones((3, 2)), output=np.ones((4, 2))), ShapeError, "batch size"),
    ("batch with single", lambda: problem(input=np.ones((3, 2))), ShapeError, "batch size"),
    ("empty batch", lambda: problem(input=np.ones((0, 2)), output=np.ones((0, 2))), ShapeError,
     "input has an empty batch"),
    ("nothing to infer",
     lambda: InferenceProblem(Network([Dense(np.eye(2))]), input=np.ones(2), output=np.ones(2)),
     InputError, "nothing to infer"),
    ("other data of another width", lambda: problem().with_data(np.ones(3), np.ones(2)), ShapeError,
     "input has shape (3,)"),
    ("other data of two batches", lambda: problem().with_data(np.ones((3, 2)), np.ones((4, 2))),
     ShapeError, "batch size"),
    ("other data, NaN", lambda: problem().with_data(NAN, np.ones(2)), NonFiniteError, "input"),
    ("other data below a prior",
     lambda: problem(input=None, prior=Prior()).with_data(np.ones(2), np.ones(2)), InputError,
     "prior on a clamped input"),
    # Time constants.
    ("too few time constants", lambda: problem(time_constants=[1.0, 1.0]), ShapeError,
     "2 time constants for 3 layers"),
    ("zero time constant", lambda: problem(time_constants=[1.0, 0.0, 1.0]), InputError, "0.0"),
    ("negative time constant", lambda: problem(time_constants=[1.0, -2.0, 1.0]), InputError,
     "-2.0"),
    ("NaN time constant", lambda: problem(time_constants=[1.0, np.nan, 1.0]), NonFiniteError,
     "time constant"),
    # States.
    ("unknown initial state", lambda: problem().initial_state("ones"), InputError, "'ones'"),
    ("random without key", lambda: problem().initial_state("random"), InputError,
     "random_state(key)"),
    ("clamped layers in the state", lambda: start(np.ones(2), HIDDEN, np.ones(2)), ShapeError,
     "3 arrays"),
    ("state width", lambda: start(np.zeros(2)), ShapeError, "layer 1 has shape (2,)"),
    ("state batch", lambda: start(np.zeros((2, 3))), ShapeError, "layer 1 has shape (2, 3)"),
    ("integer state", lambda: start(np.zeros(3, int)), DtypeError, "layer 1"),
    ("NaN state", lambda: start(np.full(3, np.nan)), NonFiniteError, "layer 1"),
    ("state of different batches",
     lambda: start(np.zeros((2, 2)), np.zeros((3, 3)), np.zeros((2, 2)), input=None, output=None),
     ShapeError, "same batch size"),
    ("state cube",
     lambda: start(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), np.zeros((2, 2, 2)), input=None,
                   output=None), ShapeError, "layer 0"),
    ("feedforward of a free input", lambda: problem(input=None).initial_state(), InputError,
     "input is free"),
    ("feedforward input width", lambda: problem(input=None).feedforward_state(np.ones(3)),
     ShapeError, "input has shape (3,)"),
    ("batch_size of clamped data", lambda: problem().zeros_state(batch_size=3), InputError,
     "batch_size"),
    ("batch_size of random state", lambda: problem().random_state(jr.key(0), batch_size=3),
     InputError, "batch_size"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "named"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_input_raises_its_error(call: Call, error: type[InputError], named: str) -> None:
    """The error is of the class documented, and its message names what is wrong."""
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, PcdynError)
    assert isinstance(caught.value, ValueError)


def test_dtype_error_is_a_type_error() -> None:
    """Wrong dtypes can be caught as TypeError, as Python's own are."""
    with pytest.raises(TypeError):
        Dense(np.eye(2, dtype=int))


def test_python_numbers_become_the_default_float() -> None:
    """Python integers and nested lists are numbers, not integer arrays."""
    assert as_float_array([1, 2], "x").dtype == jnp.float64
    assert as_float_array(3, "x").dtype == jnp.float64
    assert as_float_array(np.ones(2, np.float32), "x").dtype == jnp.float32
    assert problem(time_constants=[1, 2, 1]).time_constants[0].dtype == jnp.float64


def test_shapes_are_checked_under_jit_and_values_are_not() -> None:
    """Traced arrays have shapes only: wrong ones still raise, NaN passes through."""
    with pytest.raises(ShapeError, match="input"):
        jax.jit(lambda x: problem(input=x).free_energy((jnp.zeros(3),)))(jnp.ones(3))
    energy = jax.jit(lambda x: problem(input=x).free_energy((jnp.zeros(3),)))(jnp.asarray(NAN))
    assert bool(jnp.isnan(energy))
