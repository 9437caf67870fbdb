"""Real numbers in every form that people have them in: converted without loss, or refused by name.

float32 and float64 are what pcdyn computes in, and a problem in float64 needs JAX set to it.
"""

from __future__ import annotations

import decimal
import fractions
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import xarray

import pcdyn
from pcdyn import learning, linear, references
from pcdyn._support.arrays import check_finite
from pcdyn.errors import DtypeError, InputError, NonFiniteError

pytestmark = pytest.mark.unchecked

VALUES = [0.5, -0.25, 1.0]  # exact in half precision
OUTPUT = [0.3, -0.4]


def network(**options: Any) -> pcdyn.Network:
    options = {"activation": "tanh", "key": jax.random.key(0)} | options
    return pcdyn.mlp([3, 4, 2], **options)


def problem(input: Any = tuple(VALUES), **options: Any) -> pcdyn.InferenceProblem:
    return pcdyn.InferenceProblem(network(**options), input=input, output=OUTPUT)


FORMS: dict[str, Any] = {
    "big-endian": np.array(VALUES, ">f8"),
    "big-endian float32": np.array(VALUES, ">f4"),
    "float16": np.array(VALUES, np.float16),
    "bfloat16": np.array(VALUES, jnp.bfloat16),
    "bfloat16 of JAX": jnp.asarray(VALUES, jnp.bfloat16),
    "long double": np.array(VALUES, np.longdouble),
    "objects": np.array(VALUES, object),
    "nothing masked": np.ma.array(VALUES, mask=[0, 0, 0]),
    "scalars of NumPy": [np.float32(x) for x in VALUES],
    "scalars of JAX": [jnp.asarray(x) for x in VALUES],
    "integers in a list": [np.int64(1), 2, -3],
    "decimals": [decimal.Decimal(str(x)) for x in VALUES],
    "fractions": [fractions.Fraction(x) for x in VALUES],
    "pandas": pandas.Series(VALUES),
    "xarray": xarray.DataArray(VALUES, dims="unit"),
    "strided": np.repeat(np.array(VALUES), 2)[::2],
}


def read_only(values: Any) -> np.ndarray:
    array = np.array(values)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("form", [*FORMS, "read only"])
def test_real_numbers_in_any_form_become_float64(form: str) -> None:
    given = read_only(VALUES) if form == "read only" else FORMS[form]
    expected = [1.0, 2.0, -3.0] if form == "integers in a list" else VALUES
    found = problem(given).input
    assert found is not None and found.dtype == jnp.float64
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_other_data_are_converted_as_those_of_the_constructor_are() -> None:
    """Two samples in float64 for a problem in float32, mapped over."""
    narrow = pcdyn.InferenceProblem(
        pcdyn.mlp([3, 4, 2], activation="identity", key=jax.random.key(0), dtype="float32"),
        input=np.array(VALUES), output=np.array(OUTPUT),
    )  # fmt: skip
    data = np.array([VALUES, VALUES]), np.array([OUTPUT, OUTPUT])
    mapped = jax.vmap(lambda x, y: pcdyn.equilibrium(narrow.with_data(x, y)).activities)(*data)
    expected = pcdyn.equilibrium(narrow).activities
    for found, layer in zip(mapped, expected, strict=True):
        assert found.dtype == jnp.float32
        # A closed form of numbers of order 1, with a dozen of products.
        np.testing.assert_allclose(found, np.stack([layer, layer]), rtol=0, atol=1e-5)


REFUSED: dict[str, tuple[Any, type[InputError], str]] = {
    "masked": (np.ma.array(VALUES, mask=[0, 1, 0]), DtypeError, "1 masked entries"),
    "masked in a list": (
        [np.ma.array(VALUES, mask=[0, 1, 1])], DtypeError, "2 masked entries"),
    "the masked constant": ([1.0, np.ma.masked, 2.0], DtypeError, "masked"),
    "integers": (np.arange(3), DtypeError, "int64"),
    "booleans": ([True, False, True], DtypeError, "bool"),
    "complex numbers": ([1j, 0.0, 1.0], DtypeError, "complex"),
    "texts": (["a", "b", "c"], DtypeError, "list"),
    "dates": (np.array(["2020"] * 3, "M8"), DtypeError, "ndarray"),
    "nothing": ([None, 1.0, 2.0], DtypeError, "list"),
    "several lengths": ([[1.0], [1.0, 2.0]], DtypeError, "equal lengths"),
    "an iterator": (iter(VALUES), DtypeError, "iterator"),
    "a key": (jax.random.key(0), DtypeError, "key"),
    "missing in pandas": (
        pandas.Series([1.0, None, 2.0], dtype="Float64"), NonFiniteError, "index"),
    "too large": ([10**400, 0, 0], DtypeError, "list"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_the_rest_is_refused_by_name(case: str) -> None:
    value, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as caught:
        problem(value)
    assert "input" in str(caught.value)


@pytest.mark.skipif(np.finfo(np.longdouble).eps == np.finfo(float).eps, reason="no long doubles")
def test_digits_that_float64_lacks_are_not_lost_in_silence() -> None:
    third = np.ones(3, np.longdouble) / 3
    with pytest.raises(DtypeError, match="more digits than float64"):
        problem(third)
    assert problem(third.astype(float)).input is not None


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_weights_are_computed_with_in_float32(dtype: Any) -> None:
    halves = [np.asarray(layer.weight).astype(dtype) for layer in network().layers]
    made = pcdyn.Network([pcdyn.Dense(weight, activation="tanh") for weight in halves])
    assert made.dtype == jnp.float32
    found = pcdyn.equilibrium(pcdyn.InferenceProblem(made, input=VALUES, output=OUTPUT))
    same = pcdyn.Network(
        [pcdyn.Dense(weight.astype(float), activation="tanh") for weight in halves]
    )
    expected = pcdyn.equilibrium(pcdyn.InferenceProblem(same, input=VALUES, output=OUTPUT))
    # Residuals of 1e-4 in float32, with a Hessian of eigenvalues above 1.
    np.testing.assert_allclose(found.activities[1], expected.activities[1], atol=2e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", int, bool, complex, "no", 3, [1]])
def test_networks_are_not_made_in_other_dtypes(dtype: Any) -> None:
    with pytest.raises(DtypeError, match="dtype"):
        network(dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.complex64])
def test_layers_of_the_user_in_other_dtypes_are_refused(dtype: Any) -> None:
    import equinox as eqx

    layer = eqx.nn.Linear(3, 4, dtype=dtype, key=jax.random.key(0))
    with pytest.raises(DtypeError, match="dtype of layer 1"):
        pcdyn.Network([layer], input_width=3)


def test_layers_of_two_dtypes_become_the_wider() -> None:
    first, second = network(bias=True).layers
    narrow = pcdyn.Dense(first.weight.astype(jnp.float32), first.bias, "tanh")
    assert narrow.bias is not None and narrow.bias.dtype == jnp.float32
    made = pcdyn.Network([narrow, second])
    assert made.dtype == jnp.float64
    assert {x.dtype for x in jax.tree.leaves(made)} == {np.dtype(np.float64)}
    assert pcdyn.equilibrium(pcdyn.InferenceProblem(made, input=VALUES, output=OUTPUT)).ok


def _uses(problem: Any, line: Any) -> dict[str, Callable[[], Any]]:
    data = {"inputs": np.ones((8, 3)), "targets": np.ones((8, 2))}
    import optax

    return {
        "simulate": lambda: pcdyn.simulate(problem, t1=1.0),
        "Euler": lambda: pcdyn.simulate(problem, t1=1.0, integrator=pcdyn.Euler(dt=0.1)),
        "equilibrium": lambda: pcdyn.equilibrium(problem),
        "stability": lambda: pcdyn.stability(problem, at="feedforward"),
        "compare": lambda: pcdyn.compare(["tsit5"], problem, t1=1.0, repeats=1),
        "convergence_order": lambda: pcdyn.convergence_order("heun", problem, t1=1.0),
        "backpropagation": lambda: references.backpropagation(problem),
        "feedforward": lambda: references.feedforward(problem),
        "multiple_equilibria": lambda: pcdyn.multiple_equilibria(problem, [np.zeros((2, 4))]),
        "linear_equilibrium": lambda: pcdyn.linear_equilibrium(line),
        "spectrum": lambda: linear.spectrum(line),
        "variational": lambda: learning.variational_free_energy(problem, [np.zeros(4)]),
        "train": lambda: learning.train(
            problem.network, **data, rule=learning.Backpropagation(), optimiser=optax.sgd(0.1),
            epochs=1, batch_size=4, key=jax.random.key(0),
        ),
        "another problem": lambda: pcdyn.InferenceProblem(problem.network, input=VALUES),
    }  # fmt: skip


@pytest.mark.parametrize("use", list(_uses(None, None)))
def test_a_float64_problem_without_x64_is_one_clear_error(use: str) -> None:
    made, line = problem(), problem(activation="identity")
    with jax.enable_x64(False), pytest.raises(DtypeError, match="jax_enable_x64"):
        _uses(made, line)[use]()


def test_float64_cannot_be_asked_for_without_x64() -> None:
    with jax.enable_x64(False), pytest.raises(DtypeError, match="jax_enable_x64"):
        network(dtype="float64")


def test_a_problem_made_without_x64_works_with_it() -> None:
    with jax.enable_x64(False):
        made = problem()
    assert made.dtype == jnp.float32
    assert pcdyn.simulate(made, t1=1.0).activities[1].dtype == np.float32
    assert pcdyn.equilibrium(made).ok
    assert pcdyn.stability(made, at="feedforward").rates.dtype == np.float32


def test_a_linear_graph_is_solved_with_x64_on_off_and_on_again() -> None:
    """JAX took the 64-bit places of units in a program of before for an error of types."""

    def solved() -> np.ndarray:
        one = pcdyn.Dense(np.full((4, 3), 0.25))
        both = pcdyn.Dense((np.full((2, 3), 0.5), np.full((2, 4), -0.5)))
        graph = pcdyn.Graph(
            {"a": 3, "b": 4, "c": 2},
            [
                pcdyn.Prediction("b", given="a", by=one),
                pcdyn.Prediction("c", given=("a", "b"), by=both),
            ],
        )
        clamp = {"a": np.ones(3), "c": np.zeros(2)}
        found = pcdyn.linear_equilibrium(pcdyn.InferenceProblem(graph, clamp=clamp))
        return np.asarray(found["b"])

    before = solved()
    with jax.enable_x64(False):
        between = solved()
    assert between.dtype == np.float32
    # F of b alone, all of whose units are equal: (b − ¾)² of each and (3/2 − 2b)² of both of c.
    np.testing.assert_allclose(before, 0.75, rtol=1e-14)
    np.testing.assert_allclose(between, 0.75, rtol=1e-6)
    np.testing.assert_array_equal(solved(), before)


def test_large_arrays_of_jax_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another array is another one, also where it takes the place of one that is gone."""
    for _ in range(3):
        good = jnp.ones(2**17)
        check_finite(good, "data")
        del good
        with pytest.raises(NonFiniteError, match="data has 1 non-finite"):
            check_finite(jnp.ones(2**17).at[5].set(jnp.nan), "data")
    known = jnp.ones(2**17)
    check_finite(known, "data")
    monkeypatch.delattr(np, "isfinite")
    check_finite(known, "data")
