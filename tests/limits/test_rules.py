"""Each learning rule against its limit (docs/maths.md §4), with its order, and against NumPy.

The oracle is written out layer by layer: `−(f'_l ∘ d_l) x_{l−1}ᵀ`, summed over the batch.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag, eigh

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.solvers import GaussNewton
from pcdyn.learning import (
    Backpropagation,
    EulerPredictiveCoding,
    FixedPrediction,
    IncrementalPredictiveCoding,
    LearnedTargetPropagation,
    LowPrecisionPredictiveCoding,
    PredictiveCoding,
    TargetPropagation,
    TruncatedGaussNewton,
    ZeroDivergence,
)
from pcdyn.model.energies.energy import CrossEntropy, Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import target_propagation
from tests.networks import EPS, FUNCTIONS, Case, assert_close, build_case, few, jax_free_energy

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = (3, 4, 4, 2)
# Sums of fewer than a hundred products of numbers of order 1.
ROUND_OFF = 1e3 * EPS
LEARN = eqx.filter_jit(lambda rule, problem, state: rule.learn(problem, state))
SETTLE = eqx.filter_jit(lambda method, problem: method.settle(problem))
EXACT = PredictiveCoding(GaussNewton(), tolerance=1e-10)


def tanh_case(seed: int, **options: Any) -> Case:
    """tanh with biases; weights half of the usual size, so that equilibria are unique."""
    case = build_case(
        seed=seed, widths=WIDTHS, activations=("tanh",), bias=True, batch=5, **options
    )
    return case.replace(weights=tuple(0.5 * w for w in case.weights))


def local(case: Case, activities: Any, deltas: Any) -> list[np.ndarray]:
    """Weight and bias gradient of each layer, in turn."""
    gradients = []
    for index, delta in enumerate(deltas, start=1):
        below = np.asarray(activities[index - 1])
        slope = FUNCTIONS[case.activations[index - 1]][1](case.preactivation(index, below))
        credit = slope * np.asarray(delta)
        gradients.append(-credit.T @ below)
        if case.biases[index - 1] is not None:
            gradients.append(-credit.sum(0))
    return gradients


def bp_deltas(case: Case) -> list[np.ndarray]:
    """δ_L = Π_L (T − x̂_L), δ_{l−1} = W_lᵀ (f'_l ∘ δ_l)."""
    forward = case.feedforward(case.activities[0])
    deltas = [(case.activities[-1] - forward[-1]) @ case.precision(case.depth)]
    for index in range(case.depth, 1, -1):
        z = case.preactivation(index, forward[index - 1])
        slope = FUNCTIONS[case.activations[index - 1]][1](z)
        deltas.insert(0, (slope * deltas[0]) @ case.weights[index - 1])
    return deltas


def bp_gradient(case: Case) -> list[np.ndarray]:
    return local(case, case.feedforward(case.activities[0]), bp_deltas(case))


def pc_gradient(case: Case, state: Any) -> list[np.ndarray]:
    """∂F/∂(weights) at a state."""
    activities = (case.activities[0], *(np.asarray(x) for x in state), case.activities[-1])
    weighted = [
        e @ case.precision(index) for index, e in enumerate(case.errors(activities), start=1)
    ]
    return local(case, activities, weighted)


def gradient(rule: Any, case: Case, problem: InferenceProblem | None = None) -> list[np.ndarray]:
    """What the rule makes of the case."""
    problem = case.problem if problem is None else problem
    rule.check(problem)
    learned, _ = LEARN(rule, problem, rule.init(problem.network, jr.key(0)))
    return [np.asarray(x) for x in jax.tree.leaves(learned.gradient)]


def parameters(case: Case) -> list[Any]:
    """Weight and bias of each layer, in turn."""
    return [x for pair in zip(case.weights, case.biases, strict=True) for x in pair]


def distance(a: Any, b: Any) -> float:
    """Relative to the second."""
    flat = [np.concatenate([np.ravel(x) for x in each]) for each in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def order(sizes: Any, errors: Any) -> float:
    """The slope of log error against log size."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


@few(max_examples=5)
@given(seed=SEEDS)
def test_backpropagation_is_the_gradient_of_the_loss(seed: int) -> None:
    """For any precision."""
    case = tanh_case(seed, precision="full")
    ours = gradient(Backpropagation(), case)
    assert_close(ours, bp_gradient(case), ROUND_OFF)


@few(max_examples=5)
@given(seed=SEEDS)
def test_predictive_coding_is_the_gradient_of_the_equilibrium_energy(seed: int) -> None:
    """Linear networks: dF*/dW of F* = ½ e0ᵀS⁻¹e0, by automatic differentiation of that form."""
    case = build_case(seed=seed, widths=WIDTHS, precision="full", batch=3)

    def energy(weights: Any) -> Any:
        product, covariance = jnp.eye(WIDTHS[-1]), jnp.zeros((WIDTHS[-1], WIDTHS[-1]))
        for index in range(case.depth, 0, -1):
            inverse = jnp.linalg.inv(jnp.asarray(case.precision(index)))
            covariance = covariance + product @ inverse @ product.T
            product = product @ weights[index - 1]
        errors = jnp.asarray(case.activities[-1]) - jnp.asarray(case.activities[0]) @ product.T
        return 0.5 * jnp.sum(errors * jnp.linalg.solve(covariance, errors.T).T)

    expected = jax.grad(energy)([jnp.asarray(w) for w in case.weights])
    # S has eigenvalues between 1/e and about 30; the residual counts as little as the tolerance.
    assert_close(gradient(EXACT, case), expected, 1e-8)


def least_curvature_of_errors(case: Case, errors: Any) -> float:
    """The smallest eigenvalue of Π⁻¹ ∂²F/∂e², over the batch, with F written out for JAX."""
    hidden = range(1, case.depth)
    precision = block_diag(*(case.precision(index) for index in hidden))
    ends = np.cumsum([case.widths[index] for index in hidden])[:-1]

    def energy(flat: Any, x: Any, target: Any) -> Any:
        for index, error in zip(hidden, jnp.split(flat, ends), strict=True):
            x = jnp.tanh(case.weights[index - 1] @ x + case.biases[index - 1]) + error
        output = target - jnp.tanh(case.weights[-1] @ x + case.biases[-1])
        return 0.5 * (flat @ precision @ flat + output @ case.precision(case.depth) @ output)

    flat = jnp.asarray(np.concatenate(errors, axis=-1))
    ends_of_network = (jnp.asarray(case.activities[0]), jnp.asarray(case.activities[-1]))
    hessians = jax.vmap(jax.hessian(energy))(flat, *ends_of_network)
    return min(float(eigh(np.asarray(h), precision, eigvals_only=True)[0]) for h in hessians)


@pytest.mark.slow
@few(max_examples=3)
@given(seed=SEEDS)
def test_a_relative_accuracy_is_kept(seed: int) -> None:
    """The missing share of the displacement is no more than the residual over the curvature.

    Half of that at the equilibrium, for what counts is the curvature between there and the point.
    """
    case = tanh_case(seed, precision="full")
    exact = equilibrium(case.problem, tolerance=1e-11)
    errors = case.errors(exact.activities)[:-1]
    curvature = least_curvature_of_errors(case, errors) / 2
    assert curvature > 0

    def size(parts: Any) -> np.ndarray:
        weighted = [e @ case.precision(index) for index, e in enumerate(parts, start=1)]
        return np.sqrt(sum((e * w).sum(-1) for e, w in zip(parts, weighted, strict=True)))

    for tolerance in (1e-2, 1e-4, 1e-6):
        # As an array, the tolerance changes without compiling again.
        method = TruncatedGaussNewton(
            tolerance=jnp.asarray(tolerance), products=(1,), max_iterations=50
        )
        found = SETTLE(method, case.problem)
        activities = case.problem.activities(found.state)
        ours = case.errors([np.asarray(x) for x in activities])[:-1]
        missing = size([a - b for a, b in zip(ours, errors, strict=True)])
        residual = np.asarray(found.residual)
        assert np.median(residual) <= tolerance
        near = residual <= 10 * tolerance
        assert np.all((missing <= residual * size(ours) / curvature + 1e-9)[near])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["unit", "number", "diagonal", "full"])
def test_where_all_samples_have_the_same_jacobian_one_product_is_exact(precision: str) -> None:
    """The preconditioner is the inverse of a linear network's own system."""
    case = build_case(seed=2, widths=(4, 6, 5, 3), bias=True, batch=5, precision=precision)
    found = SETTLE(TruncatedGaussNewton(products=(1,), max_iterations=1), case.problem)
    matrix, drive, _ = case.linear_flow()
    expected = np.linalg.solve(matrix, drive.T).T
    tolerance = ROUND_OFF * np.linalg.cond(matrix)
    assert_close(np.concatenate(found.state, axis=-1), expected, tolerance)
    assert int(found.iterations) == 1


@pytest.mark.slow
def test_what_few_steps_leave_is_handed_over() -> None:
    """Output precision 1e4, where full Gauss–Newton steps go astray; also under vmap."""
    case = tanh_case(1).replace(precisions=(1.0, 1.0, 1e4))
    case = case.replace(weights=tuple(4 * w for w in case.weights))
    method = TruncatedGaussNewton(max_iterations=2, unsettled=1e-3, tolerance=1e-4)
    found = SETTLE(method, case.problem)
    assert np.any(found.handed_over)
    assert np.all(np.asarray(found.residual) <= 2e-3)
    problem = case.problem
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (problem.input, problem.output))
    both = jax.jit(jax.vmap(lambda x, y: method.settle(problem.with_data(x, y)).state))(*stacked)
    for ours, theirs in zip(both, found.state, strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(ours[0], ours[1])


def test_the_default_is_near_the_exact_gradient() -> None:
    """Two percent of the displacement, times how much the gradient depends on it."""
    case = tanh_case(3)
    assert distance(gradient(PredictiveCoding(), case), gradient(EXACT, case)) < 0.02


def test_euler_steps_are_the_updates_of_the_paper() -> None:
    """x ← x + dt · field, in NumPy."""
    case = tanh_case(0, precision="full")
    forward = case.feedforward(case.activities[0])
    now = case.replace(activities=(*forward[:-1], case.activities[-1]))
    for _ in range(7):
        moved = (x + 0.1 * v for x, v in zip(now.activities[1:-1], now.field(), strict=True))
        now = now.replace(activities=(now.activities[0], *moved, now.activities[-1]))
    ours = gradient(EulerPredictiveCoding(dt=0.1, steps=7), case)
    assert_close(ours, pc_gradient(case, now.activities[1:-1]), ROUND_OFF)


@pytest.mark.slow
def test_low_output_precision_is_backpropagation_with_order_one() -> None:
    """‖∇F*/λ − ∇ℒ‖ = O(λ), for a full output precision and for cross-entropy."""
    case = tanh_case(2, precision="full").replace()
    precisions = (1.0, 1.0, case.precisions[-1])
    case, sizes = case.replace(precisions=precisions), (1e-1, 1e-2, 1e-3)
    softmax = InferenceProblem(
        case.network, input=case.input, output=np.eye(2)[[0, 1, 1, 0, 1]], energy=CrossEntropy()
    )
    accurate = TruncatedGaussNewton(tolerance=1e-10, max_iterations=50)
    for problem in (case.problem, softmax):
        reference = gradient(Backpropagation(), case, problem)
        rules = [LowPrecisionPredictiveCoding(jnp.asarray(s), accurate) for s in sizes]
        errors = [distance(gradient(rule, case, problem), reference) for rule in rules]
        assert order(sizes, errors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("steps", [3, 200])
def test_fixed_predictions_approach_backpropagation_as_computed(steps: int) -> None:
    """Euler's factors of 1 − e^{−t} and 1 − (1 + t) e^{−t}; after many steps BP itself."""
    case, dt = tanh_case(4), 0.1
    ours = gradient(FixedPrediction(dt=dt, steps=steps), case)
    rest = (1 - dt) ** steps
    factors = [1 - rest - steps * dt * (1 - dt) ** (steps - 1), 1 - rest, 1.0]
    expected = bp_deltas(case)
    scaled = [f * d for f, d in zip(factors, expected, strict=True)]
    forward = case.feedforward(case.activities[0])
    assert_close(ours, local(case, forward, scaled), ROUND_OFF)
    if steps == 200:
        assert distance(ours, bp_gradient(case)) < 2 * (1 + steps * dt) * rest


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_zero_divergence_learning_is_backpropagation_layer_by_layer(rate: float) -> None:
    """γ^{L−l} δ_l exactly, for any γ: not to first order in it."""
    case = tanh_case(5)
    scaled = [rate ** (case.depth - index) * d for index, d in enumerate(bp_deltas(case), start=1)]
    forward = case.feedforward(case.activities[0])
    assert_close(gradient(ZeroDivergence(rate), case), local(case, forward, scaled), ROUND_OFF)


def test_incremental_coding_is_euler_on_the_joint_flow() -> None:
    """In NumPy; and as ε → 0 it is the mean of ∂F/∂W along inference, with order one."""
    case, dt, steps = tanh_case(6), 0.1, 5

    def numpy_run(ratio: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What the weights moved by over ε · steps · dt, and the mean gradient on the way."""
        forward = case.feedforward(case.activities[0])
        now = case.replace(activities=(*forward[:-1], case.activities[-1]))
        total = None
        for _ in range(steps):
            slope = pc_gradient(now, now.activities[1:-1])
            total = slope if total is None else [a + b for a, b in zip(total, slope, strict=True)]
            moved = [x + dt * v for x, v in zip(now.activities[1:-1], now.field(), strict=True)]
            pairs = zip(parameters(now), slope, strict=True)
            changed = [w - ratio * dt * g for w, g in pairs]
            pairs = zip(parameters(now), slope, strict=True)
            changed = [w - ratio * dt * g for w, g in pairs]
            now = now.replace(
                activities=(now.activities[0], *moved, now.activities[-1]),
                weights=tuple(changed[::2]),
                biases=tuple(changed[1::2]),
            )
        pairs = zip(parameters(case), parameters(now), strict=True)
        change = [(a - b) / (ratio * dt * steps) for a, b in pairs]
        return change, [g / steps for g in total]

    for ratio in (0.1, 1e-3):
        ours = gradient(IncrementalPredictiveCoding(dt, steps, jnp.asarray(ratio)), case)
        assert_close(ours, numpy_run(ratio)[0], ROUND_OFF / ratio)
    limit, sizes = numpy_run(1e-12)[1], (1e-2, 1e-3, 1e-4)
    rules = [IncrementalPredictiveCoding(dt, steps, jnp.asarray(s)) for s in sizes]
    errors = [distance(gradient(rule, case), limit) for rule in rules]
    assert order(sizes, errors) == pytest.approx(1, abs=0.1)


def reachable_case(seed: int) -> Case:
    """Square leaky ReLU layers, every target of which exists."""
    case = build_case(seed=seed, widths=(4, 4, 4, 4), activations=("leaky_relu",), batch=3)
    return case.replace(weights=tuple(np.eye(4) + 0.3 * w for w in case.weights))


@pytest.mark.slow
def test_target_propagation_learns_from_local_errors() -> None:
    """t_l − x̂_l with targets by NumPy; the first layer of PC tends to it as 1/ρ for Π_l = ρ^l."""
    case = reachable_case(0)
    forward, targets = case.feedforward(case.activities[0]), [case.activities[-1]]
    for index in range(case.depth, 1, -1):
        t = targets[0]
        preimage = np.where(t > 0, t, t / 0.01)
        targets.insert(0, np.linalg.solve(case.weights[index - 1], preimage.T).T)
    deltas = [t - x for t, x in zip(targets, forward[1:], strict=True)]
    ours = gradient(TargetPropagation(), case)
    # The inverse of a leaky ReLU stretches by 100 in each layer.
    assert_close(ours, local(case, forward, deltas), 1e4 * ROUND_OFF)

    smooth = case.replace(activations=("identity",) * 3)
    expected, sizes, errors = gradient(TargetPropagation(), smooth)[0], (1e2, 1e3, 1e4), []
    for ratio in sizes:
        graded = smooth.replace(precisions=tuple(ratio**index for index in (1, 2, 3)))
        errors.append(distance([gradient(EXACT, graded)[0] / ratio], [expected]))
    assert order(sizes, errors) == pytest.approx(-1, abs=0.1)


def test_unreachable_samples_teach_nothing() -> None:
    """A target of 2 is outside the range of tanh."""
    case = build_case(seed=1, widths=(3, 3, 3), activations=("tanh",), batch=4)
    case = case.replace(weights=tuple(np.eye(3) + 0.1 * w for w in case.weights))
    outputs = np.tanh(0.3 * case.activities[-1])
    outputs[1] = 2.0
    some = case.replace(activities=(*case.activities[:-1], outputs))
    rest = some.replace(activities=tuple(np.delete(x, 1, 0) for x in some.activities))
    exists = target_propagation(rest.problem).exists
    assert np.all(exists)
    assert_close(gradient(TargetPropagation(), some), gradient(TargetPropagation(), rest), 1e-9)
    learned, _ = TargetPropagation().learn(some.problem, ())
    assert np.flatnonzero(np.isinf(learned.residual)).tolist() == [1]


def linear_problem(seed: int, widths: tuple[int, ...]) -> tuple[Case, InferenceProblem]:
    case = build_case(seed=seed, widths=widths, batch=40)
    return case, case.problem


def test_inverses_learn_by_the_corrected_equation() -> None:
    """One step is V + η mean(ẽ (W x)ᵀ), the plus being the correction of Eq 26."""
    case, problem = linear_problem(0, (3, 4, 4))
    rule = LearnedTargetPropagation(inverse_rate=0.1)
    start = rule.init(problem.network, jr.key(0))
    _, (inverses, _) = rule.learn(problem, start)
    _, x, y = case.feedforward(case.activities[0])
    weight = np.asarray(start[0][0].weight)
    missing = x - y @ weight.T
    expected = weight + 0.1 * missing.T @ y / len(x)
    assert_close(inverses[0].weight, expected, ROUND_OFF)
    assert_close(inverses[0].bias, 0.1 * missing.mean(0), ROUND_OFF)


@pytest.mark.slow
def test_learned_inverses_become_the_exact_ones() -> None:
    """Square linear layers: V → W⁻¹, and with it both kinds of targets the exact targets."""
    case, problem = linear_problem(1, (3, 3, 3))
    case = case.replace(weights=tuple(np.eye(3) + 0.2 * w for w in case.weights))
    problem = case.problem
    rule = LearnedTargetPropagation(inverse_rate=0.5, inverse_steps=50)
    state = rule.init(problem.network, jr.key(1))
    step = jax.jit(lambda s: rule.learn(problem, s)[1])
    for _ in range(60):
        state = step(state)
    inverse = np.linalg.inv(case.weights[1])
    assert_close(state[0][0].weight, inverse, 1e-6)
    exact = target_propagation(problem).values[1]
    for difference in (True, False):
        found = LearnedTargetPropagation(difference=difference).targets(problem, state[0])
        assert_close(found[1], exact, 1e-5)


def test_difference_targets_with_a_pseudoinverse_are_the_high_precision_limit() -> None:
    """x_ff + W⁺(T − W x_ff), where PC with a high output precision goes for a wide layer."""
    case = build_case(seed=3, widths=(3, 5, 2), batch=4)
    pseudoinverse = np.linalg.pinv(case.weights[1])
    targets = LearnedTargetPropagation().targets(case.problem, (Dense(pseudoinverse, np.zeros(5)),))
    precise = case.replace(precisions=(1.0, 1e8))
    rest = equilibrium(precise.problem).activities
    assert_close(targets[1], rest[1], 1e-6)


def test_an_output_step_takes_part_of_the_way() -> None:
    """t_L = x_L + β (T − x_L)."""
    case, problem = linear_problem(2, (3, 3, 3))
    rule = LearnedTargetPropagation(output_step=0.25)
    inverses, _ = rule.init(problem.network, jr.key(0))
    out = case.feedforward(case.activities[0])[-1]
    expected = out + 0.25 * (case.activities[-1] - out)
    assert_close(rule.targets(problem, inverses)[-1], expected, ROUND_OFF)


@pytest.mark.slow
def test_cross_entropy_is_a_preset_of_predictive_coding() -> None:
    """∂F*/∂W by finite differences of F* where the output is a softmax."""
    case = tanh_case(7)
    labels = np.eye(2)[[0, 1, 1, 0, 1]]
    energy = [Gaussian(1.0), Gaussian(2.0), CrossEntropy(0.7)]

    def problem(weight: Any) -> InferenceProblem:
        weights = (case.weights[0], weight, case.weights[2])
        network = case.replace(weights=weights, activations=("tanh", "tanh", "identity")).network
        return InferenceProblem(network, input=case.input, output=labels, energy=energy)

    rule = PredictiveCoding(TruncatedGaussNewton(tolerance=1e-10, max_iterations=50))
    learned, _ = rule.learn(problem(case.weights[1]), ())
    direction = np.random.default_rng(0).normal(size=case.weights[1].shape)
    size = 1e-5
    ends = [
        float(np.sum(equilibrium(problem(case.weights[1] + s * direction), tolerance=1e-11)
                     .free_energy)) for s in (size, -size)
    ]  # fmt: skip
    slope = (ends[0] - ends[1]) / (2 * size)
    # Rounding of F over the step, and the third derivative times its square.
    assert np.sum(learned.gradient.layers[1].weight * direction) == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
def test_energies_of_a_batch_are_of_its_samples() -> None:
    """The gradient of a batch is the sum of those of its samples, for inference is per sample.

    A share of 1e-11 of each displacement is missing, the gradient at most a hundred times as much.
    """
    case = tanh_case(8)
    accurate = TruncatedGaussNewton(tolerance=1e-11, unsettled=1e-11, max_iterations=50)
    rule = PredictiveCoding(accurate)
    whole = gradient(rule, case)
    parts = [
        gradient(rule, case.replace(activities=tuple(x[i : i + 1] for x in case.activities)))
        for i in range(5)
    ]
    assert_close(whole, [sum(each) for each in zip(*parts, strict=True)], 1e-9)


def test_the_oracle_agrees_with_automatic_differentiation() -> None:
    """NumPy's local gradient is that of F written again for JAX."""
    case = build_case(seed=0, widths=WIDTHS, activations=("tanh",), precision="full")

    def energy(weights: Any) -> Any:
        return jax_free_energy(case.replace(weights=weights), case.activities)

    expected = jax.grad(energy)(tuple(jnp.asarray(w) for w in case.weights))
    batch = case.replace(activities=tuple(x[None] for x in case.activities))
    assert_close(pc_gradient(batch, batch.activities[1:-1]), expected, ROUND_OFF)
    assert isinstance(batch.problem.energy[0], Gaussian)
    assert isinstance(batch.network, Network)
