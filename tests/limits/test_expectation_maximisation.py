"""E-step and M-step against regressions of NumPy and SciPy, and against training step by step."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.optimize

import pcdyn
from pcdyn import learning
from pcdyn.errors import InputError, MaximisationError, NotConvergedError, ToleranceError
from tests.networks import Case, build_case

WIDTHS = (3, 4, 2)
# More samples than weights of a unit, so that each regression has one solution.
SAMPLES = 12


def case_of(*activations: str, **options: Any) -> Case:
    given: dict[str, Any] = {"bias": True, "batch": SAMPLES, "precision": "full", **options}
    return build_case(seed=5, widths=WIDTHS, activations=activations, **given)


def regression(below: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of least squares, by normal equations."""
    design = np.c_[below, np.ones(len(below))]
    found = np.linalg.solve(design.T @ design, design.T @ above).T
    return found[:, :-1], found[:, -1]


def test_linear_layers_are_regressions_whatever_their_precisions() -> None:
    """Errors of the normal equations are their condition number, below 1e3, times round-off."""
    case = case_of("identity")
    state = case.state
    step = learning.maximisation_step(case.problem, state)
    for layer, below, above in zip(
        step.network.layers, case.activities[:-1], case.activities[1:], strict=True
    ):
        weight, bias = regression(below, above)
        np.testing.assert_allclose(layer.weight, weight, atol=1e-11)
        np.testing.assert_allclose(layer.bias, bias, atol=1e-11)
    assert np.max(step.residual) < 1e-13


def test_too_few_samples_give_the_nearest_weights() -> None:
    """One sample: W + ε xᵀ/‖x‖², which is where gradient descent from W ends, and no error."""
    case = case_of("identity", bias=False, batch=None)
    step = learning.maximisation_step(case.problem, case.state)
    for layer, weight, below, above in zip(
        step.network.layers, case.weights, case.activities[:-1], case.activities[1:], strict=True
    ):
        error = above - weight @ below
        nearest = weight + np.outer(error, below) / (below @ below)
        np.testing.assert_allclose(layer.weight, nearest, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_tanh_layers_are_at_a_minimum_of_their_energies() -> None:
    """SciPy's least squares from the same weights; its own gradient tolerance is 1e-12."""
    case = case_of("tanh", "identity")
    rest = pcdyn.equilibrium(case.problem)
    step = learning.maximisation_step(case.problem, rest.state)
    below, above = (np.asarray(rest.activities[i]) for i in (0, 1))
    design = np.c_[below, np.ones(SAMPLES)]
    root = np.linalg.cholesky(case.precision(1))
    bias = case.biases[0]
    assert bias is not None
    start = np.c_[case.weights[0], bias]

    def errors(flat: np.ndarray) -> np.ndarray:
        return ((above - np.tanh(design @ flat.reshape(start.shape).T)) @ root).ravel()

    found = scipy.optimize.least_squares(errors, start.ravel(), xtol=1e-14, ftol=1e-14, gtol=1e-12)
    layer = step.network.layers[0]
    np.testing.assert_allclose(
        np.c_[layer.weight, layer.bias].ravel(), found.x, rtol=1e-5, atol=1e-6
    )
    assert np.max(step.residual) <= 1e-8


@pytest.mark.parametrize("seed", range(5))
def test_float32_reaches_its_default(seed: int) -> None:
    """Values of F tell where its minimum is to the root of their round-off, and no closer."""
    rng = np.random.default_rng(seed)
    network = pcdyn.mlp(WIDTHS, activation="tanh", key=jr.key(seed), dtype=jnp.float32)
    input, output = (rng.normal(size=(SAMPLES, n), scale=0.5) for n in (WIDTHS[0], WIDTHS[-1]))
    problem = pcdyn.InferenceProblem(network, input=input, output=output)
    step = learning.maximisation_step(problem, pcdyn.equilibrium(problem).state)
    assert step.residual.dtype == np.float32
    assert np.max(step.residual) <= np.finfo(np.float32).eps ** 0.5


def test_activities_beyond_the_range_have_no_best_weights() -> None:
    """tanh(w) is to be 2: the energy falls for ever as w grows. The residual tells where it is."""
    network = pcdyn.Network([pcdyn.Dense([[1.0]], activation="tanh"), pcdyn.Dense([[1.0]])])
    problem = pcdyn.InferenceProblem(network, input=[1.0], output=[1.0])
    with pytest.raises(MaximisationError, match=r"layer 1, .*beyond the range"):
        learning.maximisation_step(problem, [np.array([2.0])], max_iterations=3)
    step = learning.maximisation_step(problem, [np.array([2.0])], max_iterations=3, throw=False)
    weight = float(step.network.layers[0].weight[0, 0])
    slope = (2 - np.tanh(weight)) * (1 - np.tanh(weight) ** 2)
    np.testing.assert_allclose(step.residual, [slope / 2, 0], atol=1e-12)


@pytest.mark.slow
def test_one_gradient_step_is_training_on_the_whole_batch() -> None:
    """By `train` with plain gradient descent. Both find equilibria to 1e-6 of their gradients."""
    case = case_of("tanh", "identity", precision="unit")
    rounds, rate = 4, 0.1
    done = learning.expectation_maximisation(case.problem, rounds=rounds, learning_rate=rate)
    trained = learning.train(
        case.network, case.activities[0], case.activities[-1],
        rule=learning.PredictiveCoding("gauss_newton"), optimiser=optax.sgd(rate), epochs=rounds,
        batch_size=SAMPLES, key=jr.key(0),
    )  # fmt: skip
    for ours, theirs in zip(
        jax.tree.leaves(done.network), jax.tree.leaves(trained.network), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    history = trained.history
    np.testing.assert_allclose(done.loss[:-1], history["loss"][:, 0], rtol=1e-5)
    for name in ("free_energy", "output_loss", "residual_energy"):
        found = getattr(done, name)[:, 0]
        np.testing.assert_allclose(found, history[name][:, 0], rtol=1e-5)
    assert np.all(np.diff(done.free_energy.ravel()) < 0)


@pytest.mark.slow
@pytest.mark.parametrize("initial", ["feedforward", "previous"])
def test_free_energy_falls_in_every_half_to_the_end(initial: Any) -> None:
    """A linear network, whose equilibria do not depend on where inference starts."""
    case = case_of("identity")
    done = learning.expectation_maximisation(case.problem, rounds=5, initial=initial)
    weights = list(zip(case.weights, case.biases, strict=True))
    for energies in done.energies:
        now = case.replace(
            weights=tuple(w for w, _ in weights), biases=tuple(b for _, b in weights)
        )
        rest = pcdyn.linear_equilibrium(now.problem)
        activities = [np.asarray(x) for x in rest]
        np.testing.assert_allclose(energies[0], now.layer_energies(activities).mean(0), rtol=1e-9)
        weights = [regression(*pair) for pair in itertools.pairwise(activities)]
        now = case.replace(
            weights=tuple(w for w, _ in weights), biases=tuple(b for _, b in weights)
        )
        np.testing.assert_allclose(energies[1], now.layer_energies(activities).mean(0), rtol=1e-9)
    assert np.all(np.diff(done.free_energy.ravel()) < 0)


@pytest.mark.slow
def test_tanh_networks_alternate_to_the_end() -> None:
    """Inference goes on from the round before, so that F falls in nonlinear networks too."""
    case = case_of("tanh", "identity", precision="unit")
    done = learning.expectation_maximisation(case.problem, rounds=3, initial="previous")
    assert np.all(np.diff(done.free_energy.ravel()) < 0)
    assert np.max(done.residual) <= 1e-8
    assert done.energies.shape == (3, 2, 2)
    final = pcdyn.InferenceProblem(
        done.network, input=case.activities[0], output=case.activities[-1]
    )
    error = np.asarray(final.output_error(pcdyn.feedforward(final)[-1]))
    assert done.loss[-1] == pytest.approx(0.5 * (error**2).sum(-1).mean(), rel=1e-12)


def test_it_prints_maps_and_is_a_data_set() -> None:
    case = case_of("identity", precision="unit", bias=False)
    done = learning.expectation_maximisation(case.problem, rounds=2)
    assert str(done) == repr(done) == done.summary()
    assert f"{done.loss[-1]:.4g} at the end" in done.summary()
    data = done.to_xarray()
    np.testing.assert_array_equal(data.free_energy, data.energy.sum("layer"))
    np.testing.assert_array_equal(data.loss, done.loss)
    assert data.half.values.tolist() == ["E", "M"]

    def of(target: Any) -> learning.ExpectationMaximisation:
        moved = case.problem.with_data(case.problem.input, target)
        return learning.expectation_maximisation(moved, rounds=2)

    assert case.problem.output is not None
    several = jax.vmap(of)(jnp.stack([case.problem.output, 2 * case.problem.output]))
    # Another order of the same sums.
    np.testing.assert_allclose(several.energies[0], done.energies, rtol=1e-10)
    assert several.to_xarray().sizes["network_0"] == 2
    assert "several networks" in str(several)


@pytest.mark.unchecked
def test_bad_input_is_refused_by_name() -> None:
    problem = case_of("tanh", "identity").problem
    state = case_of("tanh").state
    run: Any = learning.expectation_maximisation
    for options, error, match in (
        ({"rounds": 0}, InputError, "rounds"),
        ({"rounds": 1, "learning_rate": -1.0}, InputError, "learning_rate"),
        ({"rounds": 1, "initial": "zeros"}, InputError, "initial"),
        ({"rounds": 1, "method": "closed_form"}, InputError, "identity"),
    ):
        with pytest.raises(error, match=match):
            run(problem, **options)
    with pytest.raises(InputError, match="both ends"):
        run(problem.with_data(problem.input, None), rounds=1)
    with pytest.raises(ToleranceError, match="tolerance"):
        learning.maximisation_step(problem, state, tolerance=0.0)
    entropy = pcdyn.InferenceProblem(
        problem.network, input=np.ones(3), output=[0.0, 1.0], energy=pcdyn.CrossEntropy()
    )
    with pytest.raises(InputError, match="quadratic"):
        learning.maximisation_step(entropy, entropy.initial_state())


def test_weights_that_grow_without_end_are_reported() -> None:
    """A rate far beyond what is stable."""
    case = case_of("identity", precision="unit")
    with pytest.raises(NotConvergedError, match="smaller learning_rate"):
        learning.expectation_maximisation(case.problem, rounds=60, learning_rate=1e6)
