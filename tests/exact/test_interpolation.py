"""Energies between BP and TP against closed forms of linear networks in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn import linear_equilibrium, target_propagation
from pcdyn.errors import InputError, NonFiniteError, PrecisionError, ShapeError
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.energies.interpolation import graded, interpolated
from pcdyn.model.problem import InferenceProblem
from tests.networks import EPS, Case, assert_close, build_case

RANDOM = build_case(seed=4, widths=(3, 3, 3, 3))
# Near the identity, so that the limits are soon reached.
CASE = RANDOM.replace(weights=tuple(np.eye(3) + 0.2 * w for w in RANDOM.weights))
# Condition numbers of the weights are below 10, and products of three are solved for; precisions
# differ by up to 1e4, and prediction errors are differences of activities.
SOLVED = 1e6 * EPS


def precisions_of(energies: list[Gaussian]) -> Any:
    return jnp.stack([jnp.asarray(energy.precision) for energy in energies])


def with_energy(case: Case, energy: Any) -> InferenceProblem:
    return InferenceProblem(case.network, input=case.input, output=case.output, energy=energy)


@jax.jit
def rest(precisions: Any) -> Any:
    """Activities, weighted errors and energies of CASE at rest."""
    problem = with_energy(CASE, Gaussian(list(precisions)))
    activities = linear_equilibrium(problem)
    errors = problem.prediction_errors(activities)
    weighted = [p * e for p, e in zip(precisions, errors, strict=True)]
    return activities, weighted, problem.energies_of(errors, activities)


def weighted_errors(precisions: np.ndarray) -> list[np.ndarray]:
    """`Π_l ε_l = P_lᵀ S⁻¹ e0` with `S = Σ P_l Π_l⁻¹ P_lᵀ`, which is well conditioned here."""
    products = [np.eye(3)]
    for weight in CASE.weights[:0:-1]:
        products.insert(0, products[0] @ weight)
    total = sum(p @ p.T / pi for p, pi in zip(products, precisions, strict=True))
    assert CASE.input is not None
    error = CASE.activities[-1] - CASE.feedforward(CASE.input)[-1]
    return [p.T @ np.linalg.solve(total, error) for p in products]


def test_the_free_energy_is_that_of_eq_48() -> None:
    """F = λ ℒ + (1 − λ) Ẽ with ℒ and Ẽ of unit precision, and Π_l = ρ^l for graded ones."""
    energies = CASE.layer_energies(CASE.activities)
    mixed = with_energy(CASE, interpolated(0.3, 3)).free_energy(CASE.state)
    assert_close(mixed, 0.3 * energies[-1] + 0.7 * energies[:-1].sum(), 100 * EPS)
    grown = with_energy(CASE, graded(2.0, 3)).layer_energies(CASE.state)
    assert_close(grown, np.array([2, 4, 8]) * energies, 100 * EPS)


@pytest.mark.parametrize("weight", [1e-4, 0.5, 1 - 1e-4])
def test_equilibria_have_the_weighted_errors_of_the_closed_form(weight: float) -> None:
    """At every λ, and at the graded precisions of the same number."""
    for energy in (interpolated(weight, 3), graded(weight, 3)):
        precisions = precisions_of(energy)
        expected = weighted_errors(np.asarray(precisions))
        # Errors are differences of activities, of which a high precision magnifies the round-off.
        assert_close(rest(precisions)[1], expected, SOLVED)


def test_with_one_hidden_layer_both_are_the_same() -> None:
    """λ = ρ/(1 + ρ): the precisions have the same ratio, and no equilibrium sees their scale."""
    for ratio in (0.1, 7.0):
        first = precisions_of(graded(ratio, 2))
        second = precisions_of(interpolated(ratio / (1 + ratio), 2))
        assert float(first[1] / first[0]) == pytest.approx(float(second[1] / second[0]), rel=1e-14)
    precisions = precisions_of(graded(2.0, 3))
    assert_close(rest(precisions)[0], rest(4 * precisions)[0], SOLVED)


def test_the_ends_of_the_path() -> None:
    """Each end is approached in proportion to λ, 1 − λ or 1/ρ; below L − 1 λ leads elsewhere."""
    targets = target_propagation(CASE.problem).targets
    deltas = [np.asarray(e) for e in weighted_errors(np.array([1e12, 1e12, 1.0]))]
    gaps: dict[str, list[float]] = {"bp": [], "last": [], "first": [], "graded": []}
    for small in (1e-4, 1e-5):
        low, high = (precisions_of(interpolated(w, 3)) for w in (small, 1 - small))
        scaled = [e / small for e in rest(low)[1]]
        gaps["bp"].append(max(np.linalg.norm(a - b) for a, b in zip(scaled, deltas, strict=True)))
        near = rest(high)[0]
        gaps["last"].append(float(np.linalg.norm(near[2] - targets[2])))
        gaps["first"].append(float(np.linalg.norm(near[1] - targets[1])))
        # Of the graded ones the square root, or round-off would be all.
        steep = rest(precisions_of(graded(small**-0.5, 3)))[0]
        gaps["graded"].append(float(np.linalg.norm(steep[1] - targets[1])))
    ratios = {name: first / second for name, (first, second) in gaps.items()}
    # Second-order terms are below 1e-4 times the condition of the weights squared.
    assert ratios["bp"] == pytest.approx(10, rel=0.05)
    assert ratios["last"] == pytest.approx(10, rel=0.05)
    assert ratios["graded"] == pytest.approx(10**0.5, rel=0.1)
    assert ratios["first"] == pytest.approx(1, rel=0.01)


def test_the_least_energy_changes_by_the_difference_of_its_parts() -> None:
    """dF*/dλ = ℒ − Ẽ at rest (envelope theorem), so that λ can be traced and differentiated."""

    def least(weight: Any) -> Any:
        problem = with_energy(CASE, interpolated(weight, 3))
        return problem.free_energy(problem.state_of(linear_equilibrium(problem)))

    slope = jax.jit(jax.grad(least))(jnp.asarray(0.4))
    precisions = precisions_of(interpolated(0.4, 3))
    energies = np.asarray(rest(precisions)[2]) / np.asarray(precisions)
    assert_close(slope, energies[-1] - energies[:-1].sum(), SOLVED)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [(0.0, "feedforward pass"), (1.0, "undetermined"), (-0.1, "negative"), (1.5, "negative")],
)
def test_the_endpoints_are_refused_with_their_limits(weight: float, reason: str) -> None:
    with pytest.raises(PrecisionError, match=rf"between 0 and 1.*{reason}"):
        interpolated(weight, 3)


def test_bad_ratios_and_depths_are_refused() -> None:
    for ratio in (0.0, -2.0):
        with pytest.raises(PrecisionError, match="must be positive"):
            graded(ratio, 3)
    for ratio in (1e200, 1e-200):
        with pytest.raises(PrecisionError, match="out of the range of float64"):
            graded(ratio, 3)
    for make in (graded, interpolated):
        with pytest.raises(NonFiniteError):
            make(float("nan"), 3)
        with pytest.raises(ShapeError, match="one number"):
            make([0.5, 0.5], 3)
        with pytest.raises(InputError, match="at least 2"):
            make(0.5, 1)
