"""Energies of prediction errors against ½ εᵀΠε in NumPy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.model.energies.energy import CrossEntropy, Energy, Gaussian
from pcdyn.model.energies.generalised import LogCosh
from pcdyn.model.energies.precision import Precision
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
    """E = ½ εᵀΠε, its gradient Πε, and products with Π, Π⁻¹ and its root for every kind of Π."""
    rng = np.random.default_rng(seed)
    precision = random_precision(rng, width, kind)
    matrix = precision if kind == "full" else np.diag(np.broadcast_to(precision, (width,)))
    energy = Gaussian([1.0, precision]).per_prediction(2)[1]
    weights = energy.quadratic_form
    assert weights is not None
    error = rng.normal(size=(*batch, width))
    given_error = jnp.asarray(error)
    expected = 0.5 * np.einsum("...i,ij,...j", error, matrix, error)
    assert_close(energy.value(given_error, None), expected, ROUND_OFF)
    assert_close(energy.gradient(given_error, None), error @ matrix, ROUND_OFF)
    # Eigenvalues lie between 1/e and e: the condition number is below 8.
    solved = np.linalg.solve(matrix, error.reshape(-1, width).T).T.reshape(error.shape)
    assert_close(weights.unweigh(given_error), solved, 8 * ROUND_OFF)
    assert_close(weights.inverse().weigh(given_error), solved, 8 * ROUND_OFF)
    assert_close(weights.unweigh(weights.weigh(given_error)), error, 8 * ROUND_OFF)
    assert_close(weights.matrix(width, jnp.float64), matrix, ROUND_OFF)
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert float(weights.smallest(jnp.float64)) == pytest.approx(eigenvalues[0], rel=1e-12)
    determinant = float(np.sum(np.log(eigenvalues)))
    assert float(weights.log_determinant(width)) == pytest.approx(determinant, abs=1e-12)
    rows = given_error.reshape(-1, width)
    squares = np.sum(np.asarray(weights.whiten(rows)) ** 2, -1)
    assert_close(0.5 * squares, expected.ravel(), ROUND_OFF)
    inverses = np.einsum("ri,ri->r", np.asarray(rows), solved.reshape(-1, width))
    assert_close(jnp.sum(weights.spread(rows) ** 2, -1), inverses, 8 * ROUND_OFF)


@pytest.mark.parametrize("precision", [None, 2.5])
def test_one_precision_serves_all_layers(precision: float | None) -> None:
    """`None` is unit precision and a number is that multiple of it, in every layer."""
    factor = 1.0 if precision is None else precision
    error = jnp.asarray([1.0, -2.0])
    for energy in Gaussian(precision).per_prediction(7):
        assert float(energy.value(error, None)) == pytest.approx(0.5 * factor * 5)
        assert_close(energy.gradient(error, None), factor * np.array([1.0, -2.0]), ROUND_OFF)
        weights = energy.quadratic_form
        assert weights is not None
        assert_close(weights.unweigh(error), np.array([1.0, -2.0]) / factor, ROUND_OFF)
        assert_close(weights.matrix(2, jnp.float64), factor * np.eye(2), ROUND_OFF)


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
    kept = np.asarray(Gaussian(precision).precision)
    np.testing.assert_array_equal(kept, kept.T)
    np.testing.assert_allclose(kept, precision, atol=1e-13)


def test_cross_entropy_is_that_of_scipy() -> None:
    """−λ Σ T log softmax(μ) with ε = T − μ, also where a probability is far below round-off."""
    rng = np.random.default_rng(0)
    logits = np.append(rng.normal(size=(5, 3)), [[50.0, -50.0, 0.0]], axis=0)
    target = np.append(rng.dirichlet(np.ones(3), 5), [[0.0, 1.0, 0.0]], axis=0)
    energy = CrossEntropy(weight=0.5)
    found = energy.value(jnp.asarray(target - logits), jnp.asarray(target))
    expected = -0.5 * np.sum(target * log_softmax(logits, axis=-1), -1)
    assert_close(found, expected, ROUND_OFF)
    slope = energy.gradient(jnp.asarray(target - logits), jnp.asarray(target))
    assert_close(slope, 0.5 * (target - softmax(logits, axis=-1)), ROUND_OFF)


def test_what_is_scaled() -> None:
    """Value, gradient, curvature and quadratic form times a factor, of energies of every kind."""
    matrix = np.array([[2.0, 0.5], [0.5, 1.0]])
    error, target = jnp.asarray([1.0, -2.0]), jnp.asarray([0.0, 1.0])

    class Own(Energy):
        def value(self, error: Any, target: Any) -> Any:
            return jnp.sum(error**4, axis=-1)

    class Curved(Own):
        def curvature(self, error: Any, target: Any) -> Any:
            return Precision(12 * error**2)

    class Quadratic(Energy):
        def value(self, error: Any, target: Any) -> Any:
            return jnp.sum(error**2, axis=-1)

        @property
        def quadratic_form(self) -> Any:
            return Precision(jnp.asarray(2.0))

    for energy in (
        Gaussian(),
        Gaussian(3.0),
        Gaussian(matrix),
        LogCosh(2.0),
        CrossEntropy(),
        Own(),
        Curved(),
        Quadratic(),
    ):
        for scaled in (energy.scaled(0.1), energy.scaled(0.5).scaled(0.2)):
            for found, expected in (
                (scaled.value(error, target), energy.value(error, target)),
                (scaled.gradient(error, target), energy.gradient(error, target)),
            ):
                assert_close(found, 0.1 * np.asarray(expected), ROUND_OFF)
            for found, expected in (
                (scaled.curvature(error, target), energy.curvature(error, target)),
                (scaled.quadratic_form, energy.quadratic_form),
            ):
                assert (found is None) == (expected is None)
                if found is not None and expected is not None:
                    dense = np.asarray(expected.matrix(2, jnp.float64))
                    assert_close(found.matrix(2, jnp.float64), 0.1 * dense, ROUND_OFF)


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
