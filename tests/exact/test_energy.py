"""Energies of prediction errors against ½ εᵀΠε in NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.model.energies.energy import CrossEntropy, Gaussian, error_gradient, scale_output
from pcdyn.model.problem import InferenceProblem
from tests.networks import (
    EPS,
    SMOOTH,
    Case,
    assert_close,
    build_case,
    cases,
    few,
    least_curvature,
    random_precision,
)

# Sums of fewer than 100 terms of order 1, each with a few roundings.
ROUND_OFF = 1e3 * EPS


@few(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 5),
    kind=st.sampled_from(["scalar", "diagonal", "full"]),
    batch=st.sampled_from([(), (3,), (2, 3)]),
)
def test_every_kind_of_precision_is_its_matrix(
    seed: int, width: int, kind: str, batch: tuple[int, ...]
) -> None:
    """E = ½ εᵀΠε, weigh = Πε, unweigh = Π⁻¹ε and matrix = Π for every kind of Π."""
    rng = np.random.default_rng(seed)
    precision = random_precision(rng, width, kind)
    matrix = precision if kind == "full" else np.diag(np.broadcast_to(precision, (width,)))
    energy = Gaussian([1.0, precision])
    error = rng.normal(size=(*batch, width))
    given_error = jnp.asarray(error)
    expected = 0.5 * np.einsum("...i,ij,...j", error, matrix, error)
    assert_close(energy.layer_energy(2, given_error, None), expected, ROUND_OFF)
    assert_close(energy.weigh(2, given_error), error @ matrix, ROUND_OFF)
    # Eigenvalues lie between 1/e and e: the condition number is below 8.
    solved = np.linalg.solve(matrix, error.reshape(-1, width).T).T.reshape(error.shape)
    assert_close(energy.unweigh(2, given_error), solved, 8 * ROUND_OFF)
    assert_close(energy.unweigh(2, energy.weigh(2, given_error)), error, 8 * ROUND_OFF)
    assert_close(energy.matrix(2, width, jnp.float64), matrix, ROUND_OFF)


@pytest.mark.parametrize("precision", [None, 2.5])
def test_one_precision_serves_all_layers(precision: float | None) -> None:
    """`None` is unit precision and a number is that multiple of it, in every layer."""
    energy, factor = Gaussian(precision), 1.0 if precision is None else precision
    error = jnp.asarray([1.0, -2.0])
    for index in (1, 7):
        assert float(energy.layer_energy(index, error, None)) == pytest.approx(0.5 * factor * 5)
        assert_close(energy.weigh(index, error), factor * np.array([1.0, -2.0]), ROUND_OFF)
        assert_close(energy.unweigh(index, error), np.array([1.0, -2.0]) / factor, ROUND_OFF)
        assert_close(energy.matrix(index, 2, jnp.float64), factor * np.eye(2), ROUND_OFF)


@few(max_examples=20)
@given(case=cases(activations=SMOOTH))
def test_free_energy_is_the_sum_of_layers(case: Case) -> None:
    """F = Σ_l E_l = ℒ + Ẽ, with ℒ = E_L, per sample."""
    problem, state = case.problem, case.state
    expected = case.layer_energies(case.activities)
    assert_close(problem.layer_energies(state), expected, ROUND_OFF)
    assert_close(problem.free_energy(state), expected.sum(-1), ROUND_OFF)
    assert_close(problem.output_loss(state), expected[..., -1], ROUND_OFF)
    assert_close(problem.residual_energy(state), expected[..., :-1].sum(-1), ROUND_OFF)
    total = problem.output_loss(state) + problem.residual_energy(state)
    assert_close(problem.free_energy(state), np.asarray(total), ROUND_OFF)


def test_round_off_asymmetry_is_symmetrised() -> None:
    """A covariance's inverse, symmetric to round-off only, is accepted and made symmetric."""
    rng = np.random.default_rng(3)
    precision = np.linalg.inv(np.cov(rng.normal(size=(50, 4)).T))
    precision[0, 1] += 1e-13
    kept = np.asarray(Gaussian([precision]).matrix(1, 4, jnp.float64))
    np.testing.assert_array_equal(kept, kept.T)
    np.testing.assert_allclose(kept, precision, atol=1e-13)


def test_cross_entropy_is_that_of_scipy() -> None:
    """−λ Σ T log softmax(μ) with ε = T − μ, also where a probability is far below round-off."""
    rng = np.random.default_rng(0)
    logits = np.append(rng.normal(size=(5, 3)), [[50.0, -50.0, 0.0]], axis=0)
    target = np.append(rng.dirichlet(np.ones(3), 5), [[0.0, 1.0, 0.0]], axis=0)
    energy = CrossEntropy([2.0], weight=0.5)
    found = energy.layer_energy(2, jnp.asarray(target - logits), jnp.asarray(target))
    expected = -0.5 * np.sum(target * log_softmax(logits, axis=-1), -1)
    assert_close(found, expected, ROUND_OFF)
    hidden = jnp.asarray(rng.normal(size=4))
    assert float(energy.layer_energy(1, hidden, None)) == pytest.approx(float(hidden @ hidden))
    slope = error_gradient(energy, 2, jnp.asarray(target - logits), jnp.asarray(target))
    assert_close(slope, 0.5 * (target - softmax(logits, axis=-1)), ROUND_OFF)


def test_the_output_alone_is_scaled() -> None:
    """Gaussian of every kind, cross-entropy, and no other energy."""
    matrix = np.array([[2.0, 0.5], [0.5, 1.0]])
    error = jnp.asarray([1.0, -2.0])
    for precisions in (None, 3.0, [1.0, 2.0], [1.0, matrix]):
        energy = Gaussian(precisions)
        scaled = scale_output(energy, 2, 0.1)
        for index, factor in ((1, 1.0), (2, 0.1)):
            before = float(energy.layer_energy(index, error, None))
            after = float(scaled.layer_energy(index, error, None))
            assert after == pytest.approx(factor * before)
    target = jnp.asarray([0.0, 1.0])
    before, after = (
        float(e.layer_energy(2, error, target))
        for e in (CrossEntropy(), scale_output(CrossEntropy(), 2, 0.1))
    )
    assert after == pytest.approx(0.1 * before)


def test_methods_agree_where_the_output_is_a_softmax() -> None:
    """Error descent, pseudo-transient continuation and the flow, to their residuals."""
    case = build_case(seed=0, widths=(3, 4, 3), activations=("tanh",), batch=3)
    network = case.replace(activations=("tanh", "identity")).network
    problem = InferenceProblem(
        network, input=case.input, output=np.eye(3)[[0, 2, 1]], energy=CrossEntropy()
    )
    methods = (None, "pseudo_transient", "flow")
    ends = [equilibrium(problem, method=m, tolerance=1e-8) for m in methods]
    bound = 2 * 1e-8 / (least_curvature(problem, ends[0].state) / 2)
    for other in ends[1:]:
        assert np.max(np.abs(np.asarray(ends[0].state[0]) - other.state[0])) <= bound
