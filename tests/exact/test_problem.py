"""The gradient flow against another free energy, docs/maths.md §2 and differences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcdyn.model.network import mlp
from pcdyn.model.problem import InferenceProblem
from tests.networks import (
    CLAMPS,
    EPS,
    SMOOTH,
    Case,
    assert_close,
    build_case,
    cases,
    few,
    jax_free_energy,
    per_sample,
)

# Sums of fewer than 100 products of numbers of order 1 (assert_close scales with the largest).
ROUND_OFF = 1e3 * EPS


def time_constant(case: Case, index: int) -> float:
    return 1.0 if case.time_constants is None else case.time_constants[index]


@few(max_examples=15)
@given(case=cases(activations=SMOOTH))
def test_field_is_maths_section_2(case: Case) -> None:
    """τ_l ẋ_l = −Π_l ε_l + W_{l+1}ᵀ diag(f'_{l+1}) Π_{l+1} ε_{l+1}, in NumPy."""
    assert_close(case.problem.vector_field(0.0, case.state), case.field(), ROUND_OFF)


@few(max_examples=8)
@given(case=cases(activations=SMOOTH))
def test_field_is_the_gradient_of_an_independent_energy(case: Case) -> None:
    """τ_l ẋ_l = −∂F/∂x_l, by jax.grad of a free energy written for this test."""
    gradient = jax.jit(per_sample(case, jax.grad(lambda x: jax_free_energy(case, x))))(
        tuple(jnp.asarray(x) for x in case.activities)
    )
    expected = [-np.asarray(gradient[i]) / time_constant(case, i) for i in case.free]
    assert_close(case.problem.vector_field(0.0, case.state), expected, ROUND_OFF)


@few(max_examples=15)
@given(case=cases(activations=SMOOTH))
def test_field_is_central_differences(case: Case) -> None:
    """τ_l ẋ_l = −∂F/∂x_l, by central differences of the NumPy free energy.

    With h = 1e-5 the truncation error is h² F'''/6 ~ 1e-10 and round-off F EPS/h ~ 1e-11 F; the
    third derivatives of tanh, products and precisions up to e give two more orders.
    """
    step, expected = 1e-5, []
    for index in case.free:
        rate = np.zeros_like(case.activities[index])
        for unit in range(case.widths[index]):
            values = []
            for sign in (1, -1):
                moved = [np.array(x) for x in case.activities]
                moved[index][..., unit] += sign * step
                values.append(case.free_energy(moved))
            rate[..., unit] = -(values[0] - values[1]) / (2 * step)
        expected.append(rate / time_constant(case, index))
    assert_close(case.problem.vector_field(0.0, case.state), expected, 1e-8)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_every_setting_at_once(clamp: str) -> None:
    """docs/maths.md §2 for each clamp, with full precisions, biases, τ_l and mixed activations."""
    for name in SMOOTH:
        case = build_case(
            seed=7, widths=(3, 2, 4, 3), clamp=clamp, precision="full", bias=True, slow=True,
            batch=3, activations=(name,),
        )  # fmt: skip
        assert_close(case.problem.vector_field(0.0, case.state), case.field(), ROUND_OFF)


@few(max_examples=8)
@given(case=cases(activations=SMOOTH))
def test_state_and_activities_are_inverse(case: Case) -> None:
    """activities(state_of(a)) = a and state_of(activities(s)) = s; clamped layers are the data."""
    problem = case.problem
    assert problem.free_layers == case.free
    activities = problem.activities(case.state)
    assert_close(activities, case.activities, 0)
    assert_close(problem.state_of(activities), case.state, 0)
    errors = problem.prediction_errors(activities)
    assert_close(errors, case.errors(case.activities), ROUND_OFF)


@few(max_examples=8)
@given(case=cases(activations=SMOOTH, batches=(3,)))
def test_batch_rows_are_single_samples(case: Case) -> None:
    """Field and energies of a sample do not depend on the batch it is in."""
    problem = case.problem
    field, energies = problem.vector_field(0.0, case.state), problem.layer_energies(case.state)
    for row in range(3):
        single = case.sample(row)
        alone = single.problem.vector_field(0.0, single.state)
        assert_close([x[row] for x in field], alone, ROUND_OFF)
        assert_close(energies[row], single.problem.layer_energies(single.state), ROUND_OFF)


@few(max_examples=10)
@given(
    case=cases(activations=("tanh",), shapes=((2, 3, 2), (3, 3, 3), (2, 2, 2, 2))),
    seed=st.integers(0, 99),
)
def test_hidden_units_may_be_permuted(case: Case, seed: int) -> None:
    """Permuting the units of a hidden layer permutes its field and changes no other."""
    order = np.random.default_rng(seed).permutation(case.widths[1])
    weights, biases = list(case.weights), list(case.biases)
    weights[0], weights[1] = weights[0][order], weights[1][:, order]
    biases[0] = None if biases[0] is None else biases[0][order]
    precisions = case.precisions
    if isinstance(precisions, tuple):
        first = np.asarray(precisions[0])
        # Rows and columns of a matrix, entries of a diagonal, nothing of a scalar.
        for axis in range(first.ndim):
            first = np.take(first, order, axis=axis)
        precisions = (first, *precisions[1:])
    activities = list(case.activities)
    activities[1] = activities[1][..., order]
    permuted = dataclasses.replace(
        case, weights=tuple(weights), biases=tuple(biases), precisions=precisions,
        activities=tuple(activities),
    )  # fmt: skip
    expected = [np.asarray(x) for x in case.problem.vector_field(0.0, case.state)]
    place = case.free.index(1)
    expected[place] = expected[place][..., order]
    assert_close(permuted.problem.vector_field(0.0, permuted.state), expected, ROUND_OFF)


@few(max_examples=10)
@given(case=cases(activations=SMOOTH, clamps=("both", "input")))
def test_a_prepared_problem_is_the_same(case: Case) -> None:
    """μ_1 computed once gives the same energies and the same field, until the data change."""
    problem, state = case.problem.prepared(), case.state
    assert_close(problem.first_prediction, case.predict(1, case.activities[0]), ROUND_OFF)
    expected = case.layer_energies(case.activities)
    assert_close(problem.layer_energies(state), expected, ROUND_OFF)
    assert_close(problem.vector_field(0.0, state), case.field(), ROUND_OFF)
    assert problem.with_data(*problem.data).first_prediction is None


@pytest.mark.parametrize("clamp", ["output", "none"])
def test_free_input_has_no_first_prediction(clamp: str) -> None:
    """With the input free nothing about μ_1 is constant."""
    problem = build_case(seed=0, widths=(2, 3, 2), clamp=clamp).problem
    assert problem.prepared().first_prediction is None


@few(max_examples=8)
@given(case=cases(activations=SMOOTH))
def test_initial_states(case: Case) -> None:
    """Feedforward, zero, random and given states have the shapes of the free layers."""
    problem, x = case.problem, case.activities[0]
    passed = [case.feedforward(x)[i] for i in case.free]
    if case.input is not None:
        assert_close(problem.initial_state(), passed, ROUND_OFF)
    assert_close(problem.feedforward_state(x), passed, ROUND_OFF)
    size = {"batch_size": 3} if case.batched and case.clamp == "none" else {}
    for state in (problem.zeros_state(**size), problem.random_state(jr.key(0), **size)):
        assert [s.shape for s in state] == [s.shape for s in case.state]
    assert not any(np.any(s) for s in problem.zeros_state(**size))
    assert_close(problem.initial_state(case.state), case.state, 0)


def test_random_state_has_the_std_asked_for() -> None:
    """Independent Gaussians: std and mean within 5 standard errors, layers uncorrelated."""
    network = mlp([2, 100, 100, 2], activation="tanh", key=jr.key(0))
    problem = InferenceProblem(network, input=np.zeros((200, 2)))
    first, second, _ = (np.asarray(x) for x in problem.random_state(jr.key(1), std=0.3))
    n = first.size
    for x in (first, second):
        assert abs(x.std() - 0.3) <= 5 * 0.3 / np.sqrt(2 * n)
        assert abs(x.mean()) <= 5 * 0.3 / np.sqrt(n)
    assert abs(np.mean(first * second)) <= 5 * 0.3**2 / np.sqrt(n)


def test_data_take_the_dtype_of_the_network() -> None:
    """A float32 network computes in float32 whatever the dtype of data, precision and τ."""
    network = mlp([2, 3, 2], activation="tanh", key=jr.key(0), dtype=jnp.float32)
    case = build_case(seed=0, widths=(2, 3, 2), precision="full", slow=True)
    problem = InferenceProblem(
        network, input=case.input, output=case.output, time_constants=case.time_constants
    )
    state = problem.initial_state(case.state)
    assert {x.dtype for x in jax.tree.leaves(problem)} == {jnp.dtype("float32")}
    assert problem.vector_field(0.0, state)[0].dtype == jnp.float32
