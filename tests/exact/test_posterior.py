"""The posterior of linear networks against dense NumPy, SciPy and belief propagation in NumPy.

H = AᵀΠA and b = −AᵀΠc come from the affine map ε = A y + c of `Case.affine_errors`, which knows
nothing of block-tridiagonal matrices.
"""

from __future__ import annotations

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

import pcdyn
from pcdyn.errors import InputError, NotLinearError, ShapeError, SingularHessianError
from pcdyn.linearisation.block_tridiagonal import BlockCholesky
from pcdyn.theory import verify
from tests.networks import EPS, Case, assert_close, build_case, cases, few

# Sums of fewer than 100 products of numbers of order 1 (assert_close scales with the largest).
ROUND_OFF = 1e3 * EPS


def blocks(case: Case, matrix: np.ndarray) -> list[np.ndarray]:
    """The diagonal blocks of the free layers."""
    ends = np.cumsum([0, *(case.widths[index] for index in case.free)])
    return [matrix[a:b, a:b] for a, b in itertools.pairwise(ends)]


def log_evidence(case: Case) -> np.ndarray:
    """log ∫ p(x_1 … x_L | x_0) over the free layers, of F = ½ yᵀHy − bᵀy + ½ cᵀΠc."""
    matrix, drive, _ = case.linear_flow()
    _, constant, precision = case.affine_errors()
    at_rest = np.einsum("...i,ij,...j", constant, precision, constant) / 2
    lowest = at_rest - np.einsum("...i,ij,...j", drive, np.linalg.inv(matrix), drive) / 2
    determinants = np.linalg.slogdet(matrix)[1] - np.linalg.slogdet(precision)[1]
    return -lowest - determinants / 2 - (len(precision) - len(matrix)) * np.log(2 * np.pi) / 2


@pytest.mark.slow
@few(max_examples=6)
@given(case=cases(clamps=("both", "input")))
def test_it_is_the_dense_gaussian(case: Case) -> None:
    """Mean H⁻¹b, blocks and whole of H⁻¹, and the integral of the density over the free layers."""
    matrix, drive, _ = case.linear_flow()
    inverse = np.linalg.inv(matrix)
    found = pcdyn.posterior(case.problem)
    tolerance = ROUND_OFF * float(np.linalg.cond(matrix))
    shape = case.stack(case.state).shape
    assert_close(found.mean, case.split(np.broadcast_to(drive, shape) @ inverse), tolerance)
    assert_close(found.covariances, blocks(case, inverse), tolerance)
    assert_close(found.covariance(), inverse, tolerance)
    spreads = [np.sqrt(np.diagonal(block)) for block in blocks(case, inverse)]
    assert_close(found.standard_deviations, spreads, tolerance)
    assert_close(found.log_evidence, log_evidence(case), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(2, 2, 2), (2, 3, 4)])
def test_of_a_free_input(widths: tuple[int, ...]) -> None:
    """Its prior is flat; outputs that tell all of it give it a posterior."""
    case = build_case(seed=3, widths=widths, clamp="output", precision="full", bias=True, batch=2)
    inverse = np.linalg.inv(case.linear_flow()[0])
    found = pcdyn.posterior(case.problem)
    assert found.layers == (0, 1)
    tolerance = ROUND_OFF * float(np.linalg.cond(inverse))
    assert_close(found.covariance(), inverse, tolerance)
    assert_close(found.log_evidence, log_evidence(case), tolerance)


def test_marginals_are_those_of_belief_propagation() -> None:
    """On the Markov chain of the layers, all messages at once: exact after L − 2 rounds.

    The message of layer i to its neighbour j is −H_ji P_i⁻¹ [H_ij | h_i], where P_i and h_i are its
    own precision and drive and what its other neighbour has told it.
    """
    case = build_case(seed=5, widths=(3, 2, 4, 3, 2, 3), precision="full", bias=True)
    matrix, drive, _ = case.linear_flow()
    ends = np.cumsum([0, *(case.widths[index] for index in case.free)])
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    layers = range(len(parts))
    found = pcdyn.posterior(case.problem)
    told = {(i, j): (0.0, 0.0) for i in layers for j in layers if abs(i - j) == 1}
    distances = []
    for _ in range(len(parts)):
        beliefs = []
        for i in layers:
            heard = [message for (_, j), message in told.items() if j == i]
            precision = matrix[parts[i], parts[i]] + sum(m[0] for m in heard)
            beliefs.append((precision, drive[parts[i]] + sum(m[1] for m in heard)))
        covariances = [np.linalg.inv(p) for p, _ in beliefs]
        means = [c @ h for c, (_, h) in zip(covariances, beliefs, strict=True)]
        pairs = zip((*means, *covariances), (*found.mean, *found.covariances), strict=True)
        distances.append(max(float(np.abs(a - np.asarray(b)).max()) for a, b in pairs))
        new = {}
        for i, j in told:
            back = told[j, i]
            across = matrix[parts[j], parts[i]] @ np.linalg.inv(beliefs[i][0] - back[0])
            new[i, j] = (-across @ matrix[parts[i], parts[j]], -across @ (beliefs[i][1] - back[1]))
        told = new
    # Four hidden layers: the ends are three messages apart.
    assert min(distances[:3]) > 1e-3
    assert distances[3] < ROUND_OFF * np.linalg.cond(matrix)


def test_densities_are_scipys() -> None:
    """Of the states of a batch, of some more at once, and of one sample."""
    case = build_case(seed=1, widths=(3, 4, 2, 3), precision="mixed", batch=2)
    matrix, drive, _ = case.linear_flow()
    found = pcdyn.posterior(case.problem)
    rows = np.random.default_rng(0).normal(size=(5, 2, 6))
    inverse = np.linalg.inv(matrix)
    expected = [
        stats.multivariate_normal(mean=inverse @ b, cov=inverse).logpdf(rows[:, sample])
        for sample, b in enumerate(drive)
    ]
    ours = found.log_density([rows[..., :4], rows[..., 4:]])
    assert_close(ours, np.stack(expected, axis=-1), ROUND_OFF)
    assert_close(found.log_density([rows[0, :, :4], rows[0, :, 4:]]), ours[0], ROUND_OFF)
    # −log p(x, T | d) + log p(T | d) is the same number: Bayes' theorem.
    state = [jnp.asarray(rows[0, :, :4]), jnp.asarray(rows[0, :, 4:])]
    joint = pcdyn.learning.variational_free_energy(case.problem, state, posterior="delta")
    assert_close(found.log_density(state), -joint - found.log_evidence, ROUND_OFF)


def test_samples_have_its_moments() -> None:
    """Within five standard errors of means and covariances, each sample of a batch by its own."""
    case = build_case(seed=2, widths=(2, 3, 2, 2), precision="full", batch=2)
    matrix, drive, _ = case.linear_flow()
    inverse, count = np.linalg.inv(matrix), 20_000
    found = pcdyn.posterior(case.problem)
    drawn = case.stack(found.sample(jax.random.key(0), count=count))
    assert drawn.shape == (count, 2, 5)
    spread = np.sqrt(np.diagonal(inverse))
    for sample in range(2):
        away = (drawn[:, sample] - inverse @ drive[sample]) / spread
        assert np.all(np.abs(away.mean(0)) < 5 / count**0.5)
        # The variance of a product of two standard normals is at most 2.
        correlations = inverse / np.outer(spread, spread)
        assert np.all(np.abs(away.T @ away / count - correlations) < 5 * (2 / count) ** 0.5)
    (one, _) = found.sample(jax.random.key(1))
    assert one.shape == found.mean[0].shape


@pytest.mark.slow
def test_derivatives_are_those_of_the_likelihood() -> None:
    """∂ log p(T | d) by central differences of another formula; of spreads by their own."""
    case = build_case(seed=4, widths=(2, 3, 2, 2), precision="full")

    def at(weight: Any) -> pcdyn.InferenceProblem:
        return eqx.tree_at(lambda p: p.network.layers[1].weight, case.problem, weight)

    def both(weight: Any) -> Any:
        found = pcdyn.posterior(at(weight))
        return found.log_evidence, sum(jnp.sum(s) for s in found.standard_deviations)

    weight, step = jnp.asarray(case.weights[1]), 1e-5
    slopes = jax.jit(jax.jacrev(both))(weight)
    likelihood = jax.jit(lambda w: -pcdyn.linear.negative_log_likelihood(at(w)))
    spreads = jax.jit(lambda w: both(w)[1])
    for slope, function in zip(slopes, (likelihood, spreads), strict=True):
        for place in np.ndindex(weight.shape):
            ends = [function(weight.at[place].add(sign * step)) for sign in (1, -1)]
            # Truncation is of order step², round-off of 1e-15 / step.
            np.testing.assert_allclose(slope[place], (ends[0] - ends[1]) / (2 * step), atol=1e-8)


def test_many_networks_at_once() -> None:
    """Under jit and vmap it is that of each; a singular problem is NaN there, and says so alone."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)))

    def of(weight: Any) -> Any:
        network = pcdyn.Network([pcdyn.Dense(weight), pcdyn.Dense(weight)])
        return pcdyn.posterior(pcdyn.InferenceProblem(network, output=jnp.ones(2)))

    together = jax.jit(jax.vmap(of))(weights.at[1].set(0))
    assert "of 3 networks" in repr(together)
    alone = of(weights[0])
    tolerance = ROUND_OFF * float(jnp.linalg.cond(alone.covariance()))
    assert_close(jax.tree.map(lambda x: x[0], together), alone, tolerance)
    assert np.isfinite(together.log_evidence).tolist() == [True, False, True]
    assert np.isnan(together.standard_deviations[0][1]).all()
    with pytest.raises(SingularHessianError, match="flat directions"):
        of(0 * weights[0])


def test_a_large_ratio_of_precisions_in_float32() -> None:
    """H spans 1e8 there, more than float32 resolves, and its square root 1e4."""
    case = build_case(seed=6, widths=(3, 3, 3))
    layers = [pcdyn.Dense(np.asarray(w, np.float32)) for w in case.weights]
    energy = pcdyn.Gaussian([np.float32(1.0), np.float32(1e8)])
    narrow = pcdyn.InferenceProblem(
        pcdyn.Network(layers), input=case.input, output=case.output, energy=energy
    )
    weight = np.asarray(layers[1].weight, float)
    inverse = np.linalg.inv(np.eye(3) + 1e8 * weight.T @ weight)
    (spreads,) = pcdyn.posterior(narrow).standard_deviations
    # The condition of the weights times float32's round-off of 6e-8, with room.
    allowed = 100 * np.linalg.cond(weight) * np.finfo(np.float32).eps
    np.testing.assert_allclose(spreads, np.sqrt(np.diagonal(inverse)), rtol=allowed)


def test_it_prints() -> None:
    found = pcdyn.posterior(build_case(seed=0, widths=(2, 3, 2), batch=4).problem)
    lines = repr(found).splitlines()
    assert lines[0] == "Posterior of layer 1 with [3] units, 4 samples"
    assert "standard deviations" in lines[1]
    assert f"{float(np.mean(found.log_evidence)):.4g}, mean over the samples" in lines[2]


@pytest.mark.unchecked
def test_what_has_no_such_posterior_is_refused() -> None:
    """Networks that are not linear, energies that are not Gaussian, flat directions, odd states."""
    linear = build_case(seed=0, widths=(2, 3, 2))
    tanh = build_case(seed=0, widths=(2, 3, 2), activations=("tanh",))
    student = pcdyn.InferenceProblem(
        linear.network, input=linear.input, output=linear.output, energy=pcdyn.Student()
    )
    open_ends = pcdyn.InferenceProblem(linear.network)
    found = pcdyn.posterior(linear.problem)
    calls: Any = [
        (lambda: pcdyn.posterior(tanh.problem), NotLinearError, "'tanh'"),
        (lambda: pcdyn.posterior(student), NotLinearError, "Student"),
        (lambda: pcdyn.posterior(open_ends), SingularHessianError, "singular"),
        (lambda: pcdyn.posterior(linear.network), InputError, "problem must be"),
        (lambda: found.log_density([np.ones(2)]), ShapeError, r"shapes \[\(3,\)\]"),
        (lambda: found.log_density(np.ones(3)), ShapeError, "an array for each"),
        (lambda: found.log_density([np.full(3, np.nan)]), InputError, "non-finite"),
        (lambda: found.sample(0), InputError, "random key"),
        (lambda: found.sample(jax.random.key(0), count=0), InputError, "count"),
    ]
    for call, error, words in calls:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run")
def test_variances_without_messages_from_above_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """H_ll⁻¹, the spread of a layer whose neighbours are known, in place of (H⁻¹)_ll."""

    def given_neighbours(self: BlockCholesky) -> Any:
        return tuple(jnp.linalg.inv(f @ f.T) for f in self.factors)

    monkeypatch.setattr(BlockCholesky, "inverse_diagonal", given_neighbours)
    rows = verify(["message passing"], networks=4).evidence
    assert [row.as_known for row in rows] == [True, False, True]
