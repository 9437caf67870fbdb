"""Learning as expectation maximisation: Eqs 9 to 11 and 13 to 16, Sections 3.3 and 3.4."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import multivariate_normal, norm

from pcdyn._support.types import Activities
from pcdyn.equilibria.solvers import ClosedForm
from pcdyn.learning import AdiabaticFlow, expectation_maximisation, maximisation_step
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import backpropagation, local_gradient
from pcdyn.theory.convergence import noisy_problem
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.flows import linear_rest, settle
from pcdyn.theory.networks import (
    SQUARE,
    Layers,
    Networks,
    draw,
    largest_relative,
    on_each,
    reachable,
    relative,
    solve,
    times,
    transpose,
)
from pcdyn.theory.statement import Statement

# Optimisers of SciPy take a while for each network.
SEARCHED = 5
SAMPLES, ROUNDS = 8, 20
_DENSITIES = "log-densities of scipy.stats"
_REPEATED = "alternation of dense solves and normal equations in NumPy"


def most_probable_activities(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 9 and 10: the equilibrium as the maximum of the posterior of the activities."""
    linear = draw(seed=seed, networks=networks, widths=SQUARE, full_precisions=True)
    curved = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5,
                  full_precisions=True)  # fmt: skip
    few, found = _first(curved), [x[:SEARCHED] for x in settle(curved)]
    return (
        Evidence("Eqs 9, 10", "linear networks: the equilibrium is the mean, and so the maximum, "
                 "of the Gaussian p(x | T, d) (largest relative difference)",
                 largest_relative(linear_rest(linear)[1:-1], _posterior_means(linear)), "equal",
                 0.0, 1e-10, "covariances propagated upwards and conditioned on T in NumPy",
                 linear.settings),
        Evidence("Eqs 9, 10", "tanh networks: the equilibrium is the maximum of ln p(T | x) + "
                 "ln p(x | d) (largest relative difference)",
                 largest_relative(found[1:-1], _most_probable(few)), "equal", 0.0, 1e-4,
                 f"SciPy's BFGS on {_DENSITIES}, by differences", few.settings),
        _two_maxima(networks),
    )  # fmt: skip


def _first(nets: Networks) -> Networks:
    """The few of several networks that are searched one by one."""
    return _taken(nets, slice(SEARCHED))


def _one(nets: Networks, index: int) -> Networks:
    return _taken(nets, slice(index, index + 1))


def _taken(nets: Networks, rows: slice) -> Networks:
    return dataclasses.replace(
        nets, weights=tuple(w[rows] for w in nets.weights),
        precisions=tuple(p[rows] for p in nets.precisions), input=nets.input[rows],
        target=nets.target[rows],
    )  # fmt: skip


def _posterior_means(nets: Networks) -> Layers:
    """E[x_l | T, d] of the hidden layers, each its prediction with noise of covariance Π_l⁻¹."""
    means, covariance, with_output = nets.feedforward(), 0 * nets.precisions[0], []
    for weight, precision in zip(nets.weights, nets.precisions, strict=True):
        above = weight @ covariance if with_output else covariance
        with_output = [weight @ each for each in with_output]
        covariance = (above @ transpose(weight) if with_output else 0) + np.linalg.inv(precision)
        with_output.append(covariance)
    surprise = solve(covariance, nets.target - means[-1])
    pairs = zip(means[1:-1], with_output[:-1], strict=True)
    return [mean + times(transpose(cross), surprise) for mean, cross in pairs]


def _log_densities(nets: Networks) -> list[list[Callable[[np.ndarray], np.ndarray]]]:
    """ln p of the error of each layer, for each network."""
    return [
        [multivariate_normal(cov=np.linalg.inv(each[i])).logpdf for each in nets.precisions]
        for i in range(len(nets.input))
    ]  # fmt: skip


def _most_probable(nets: Networks) -> Layers:
    """The hidden activities of greatest joint density with T, from the feedforward pass."""
    found = []
    for i, densities in enumerate(_log_densities(nets)):
        one = _one(nets, i)

        def surprise(hidden: np.ndarray, one: Networks = one, densities: list = densities) -> float:
            errors = one.errors(one.unstack(hidden[None]))
            return -float(sum(f(e[0]) for f, e in zip(densities, errors, strict=True)))

        found.append(minimize(surprise, one.stack(one.start())[0], method="BFGS").x)
    return nets.unstack(np.stack(found))[1:-1]


def _two_maxima(networks: int) -> Evidence:
    """A tanh chain 1-1-1-1 whose posterior has two maxima: inference finds the lower one.

    As one unit of networks that are compiled already.
    """
    unit = np.zeros((networks, 3))
    unit[:, 0] = 1
    weights = tuple(w * unit[:, :, None] * unit[:, None, :] for w in (-2.0, 2.0, 5.0))
    nets = Networks(weights, (), unit, 0.95 * unit, "tanh").with_precisions(1.0, 1.0, 1.0)
    first, second = np.meshgrid(*[np.linspace(-2, 2, 1001)] * 2)
    errors = (first + np.tanh(2), second - np.tanh(2 * first), 0.95 - np.tanh(5 * second))
    least = float(np.sum([0.5 * e**2 for e in errors], axis=0).min())
    return Evidence(
        "Eqs 9, 10", "as printed, x* is the argmax: F at the equilibrium from the feedforward "
        "pass, less its least value, in a tanh 1-1-1-1 with weights −2, 2, 5, d = 1, T = .95",
        float(nets.free_energy(settle(nets))[0]) - least, "at most", 0.0, 1e-3,
        "F on a grid in NumPy", {"network": "1-1-1-1 tanh"}, expected_to_hold=False,
    )  # fmt: skip


def maximisation(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 11: which weights it trains as printed, and what the M-step maximises."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5,
                full_precisions=True)  # fmt: skip
    found = settle(nets)
    ours = -_local_gradients(nets, found)
    densities = _log_densities(nets)

    def log_joint(moved: Networks, first: int = 0) -> np.ndarray:
        errors = moved.errors(found)[first:]
        return np.asarray([
            sum(f(e[i]) for f, e in zip(each[first:], errors, strict=True))
            for i, each in enumerate(densities)
        ])  # fmt: skip

    joint = _slopes(nets, log_joint)
    printed = _slopes(nets, lambda moved: log_joint(moved, nets.depth - 1))
    below = slice(0, sum(w[0].size for w in nets.weights[:-1]))
    data = _with_samples(seed, networks)
    single = _each_sample(data)
    weighted = dataclasses.replace(
        data, precisions=draw(seed=seed, networks=networks, widths=SQUARE,
                              full_precisions=True).precisions
    )  # fmt: skip
    rest = _in_samples(single.rest(), networks)
    least = _ravel(_regressed(rest))
    learned = on_each(_maximised, weighted, tuple(rest[1:-1]))
    oracle = f"central differences of {_DENSITIES}, step {_STEP:g}"
    return (
        Evidence("Eq 11", "with the logarithm and the joint density: ∂ ln p(T, x* | d, W)/∂W is "
                 "PC's −∂F/∂W (largest relative difference)", largest_relative([ours], [joint]),
                 "equal", 0.0, 1e-6, oracle, nets.settings),
        Evidence("Eq 11", "as printed, p(T | x*, d, W) trains W_1 … W_{L−1} as PC does (norm of "
                 "its slope over that of PC's there, median)",
                 float(np.median(_norms(printed[:, below]) / _norms(ours[:, below]))), "equal",
                 1.0, 1e-2, oracle, nets.settings, expected_to_hold=False),
        Evidence("Eq 11", "the joint density is largest at the least squares of each layer, "
                 "whatever its precision (largest relative difference of the weights)",
                 largest_relative([learned], [least]), "equal", 0.0, 1e-9,
                 "normal equations in NumPy", weighted.settings),
        Evidence("Eq 11", "as printed, without the logarithm, the weight that maximises the mean "
                 "of p(T | x*) is that of least squares, 4/3 for x* = 1, 1, 1 and T = 0, 0, 4",
                 _without_logarithm(np.asarray([0.0, 0.0, 4.0])), "equal", 4 / 3, 1e-2,
                 "SciPy's bounded search on densities of scipy.stats", {"network": "1-1 linear"},
                 expected_to_hold=False),
    )  # fmt: skip


_STEP = 1e-5


def _slopes(nets: Networks, value: Callable[[Networks], np.ndarray]) -> np.ndarray:
    """∂(value)/∂W of all weights by central differences, one row for each network."""
    slopes = []
    for layer, weight in enumerate(nets.weights):
        for unit in np.ndindex(weight.shape[1:]):
            values = []
            for sign in (1, -1):
                moved = weight.copy()
                moved[(slice(None), *unit)] += sign * _STEP
                weights = (*nets.weights[:layer], moved, *nets.weights[layer + 1 :])
                values.append(value(dataclasses.replace(nets, weights=weights)))
            slopes.append((values[0] - values[1]) / (2 * _STEP))
    return np.stack(slopes, axis=-1)


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=-1)


def _ravel(weights: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([w.reshape(len(w), -1) for w in weights], axis=-1)


def _local_gradients(nets: Networks, activities: Layers) -> np.ndarray:
    """∂F/∂W by pcdyn, at activities held."""
    return on_each(_local_gradient, nets, tuple(activities))


def _local_gradient(problem: InferenceProblem, activities: Activities) -> Array:
    errors = problem.prediction_errors(activities)
    deltas = [problem.weighted_error(index, e) for index, e in enumerate(errors, start=1)]
    return ravel_pytree(local_gradient(problem.network, activities, deltas))[0]


def _maximised(problem: InferenceProblem, state: Activities) -> Array:
    return ravel_pytree(maximisation_step(problem, state).network)[0]


def _with_samples(seed: int, networks: int) -> Networks:
    """Linear networks, each with several samples on the axis after that of the networks.

    The targets have nothing to do with the inputs, so that weights cannot interpolate them.
    """
    nets = draw(seed=seed, networks=networks, widths=SQUARE)
    rng = np.random.default_rng(seed + 1)
    shape = (networks, SAMPLES, SQUARE[0])
    return dataclasses.replace(nets, input=rng.normal(size=shape), target=rng.normal(size=shape))


def _each_sample(nets: Networks) -> Networks:
    """The same with each sample as a network of its own."""
    count = nets.input.shape[1]
    return dataclasses.replace(
        nets, weights=tuple(np.repeat(w, count, 0) for w in nets.weights),
        precisions=tuple(np.repeat(p, count, 0) for p in nets.precisions),
        input=nets.input.reshape(-1, nets.input.shape[-1]),
        target=nets.target.reshape(-1, nets.target.shape[-1]),
    )  # fmt: skip


def _in_samples(activities: Layers, networks: int) -> Layers:
    return [x.reshape(networks, -1, x.shape[-1]) for x in activities]


def _regressed(activities: Layers) -> list[np.ndarray]:
    """The weights of least squares of each layer on the one below, by normal equations."""
    pairs = zip(activities[1:], activities[:-1], strict=True)
    return [
        transpose(np.linalg.solve(transpose(below) @ below, transpose(below) @ above))
        for above, below in pairs
    ]


def _without_logarithm(targets: np.ndarray) -> float:
    """W of the greatest mean density of these targets where every input is 1."""
    found: Any = minimize_scalar(
        lambda w: -np.mean(norm.pdf(targets, loc=w)), bounds=(targets.min(), targets.max()),
        method="bounded",
    )  # fmt: skip
    return float(found.x)


def free_energy_falls(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Section 3.3: F in each half of the alternation, and whether its minimum is reached."""
    nets = _with_samples(seed, networks)
    rows = []
    for text, measure, rate in _ALTERNATIONS:
        energies, losses = on_each(measure, nets)
        free = energies.sum(-1)
        ours = [energies.reshape(networks, -1), losses]
        rows += [
            Evidence("Section 3.3", f"{text}: F never rises, in E halves and M halves (largest "
                     "rise over F of the first)",
                     float((np.diff(free) / free[:, :1]).max()), "at most", 0.0, 1e-12,
                     "none needed: F of pcdyn after each half", {**nets.settings, **_SETTINGS}),
            Evidence("Section 3.3", f"{text}: all energies, and ℒ of the feedforward pass, are "
                     "those of an alternation in NumPy (largest relative difference)",
                     largest_relative(ours, [x.reshape(networks, -1) for x in _alternated(
                         nets, ROUNDS, rate)]), "equal", 0.0, 1e-8, _REPEATED,
                     {**nets.settings, **_SETTINGS}),
        ]  # fmt: skip
    weights = np.random.default_rng(seed).normal(size=(4, 3))
    sizes = []
    for _ in range(4):
        weights = _noisy(weights)[1]
        sizes.append(_norms(weights[:, 1:]))
    speed = np.median(sizes[3] ** 2 - sizes[1] ** 2) / (2 * NOISY_ROUNDS)
    settings = {"network": "1-1-2 linear", "starts": 4, "rounds": 4 * NOISY_ROUNDS}
    return (
        *rows,
        Evidence("Section 3.3", "M-steps to the end, targets (x, 3ξ) that cannot be interpolated: "
                 "‖W_2‖² grows by 2 in each round, whatever the noise (median over the last half)",
                 float(speed), "equal", 2.0, 0.02,
                 "b ← b + 1/b by hand: x* = b T/(1 + b²), b ← ⟨T x*⟩/⟨x*²⟩", settings),
        Evidence("Section 3.3", "as printed, it converges to a minimum of F: ‖W_2‖ there after "
                 f"{4 * NOISY_ROUNDS} rounds over that after {NOISY_ROUNDS} (median)",
                 float(np.median(sizes[3] / sizes[0])), "equal", 1.0, 1e-2,
                 "2 for a square root", settings, expected_to_hold=False),
    )  # fmt: skip


_SETTINGS = {"samples": SAMPLES, "rounds": ROUNDS}
# Of the step along the gradient: below 2 over the largest eigenvalue of ⟨x xᵀ⟩ in every layer.
RATE = 0.02


def _to_the_end(problem: InferenceProblem) -> tuple[Array, Array]:
    return _run(problem, None)


def _by_one_step(problem: InferenceProblem) -> tuple[Array, Array]:
    return _run(problem, RATE)


def _run(problem: InferenceProblem, rate: float | None) -> tuple[Array, Array]:
    """Energies after each half, and ℒ of the feedforward pass after each round."""
    found = expectation_maximisation(problem, rounds=ROUNDS, learning_rate=rate)
    return jax.numpy.reshape(found.energies, (2 * ROUNDS, -1)), jax.numpy.asarray(found.loss)


_ALTERNATIONS = (
    ("M-steps to the end", _to_the_end, None),
    (f"M-steps of one step along the gradient, rate {RATE:g}", _by_one_step, RATE),
)


def _alternated(nets: Networks, rounds: int, rate: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The energies after each half and ℒ of the feedforward pass, by an alternation in NumPy."""
    count, energies, losses = len(nets.input), [], []

    def means(of: Networks, activities: Layers) -> np.ndarray:
        return _in_samples([of.layer_energies(activities)], count)[0].mean(1)

    for _ in range(rounds):
        single = _each_sample(nets)
        losses.append(means(single, single.start())[:, -1])
        rest = single.rest()
        energies.append(means(single, rest))
        parts = _in_samples(rest, count)
        if rate is None:
            weights = _regressed(parts)
        else:
            pairs = zip(nets.weights, parts[:-1], parts[1:], strict=True)
            weights = [
                w + rate * transpose(above - below @ transpose(w)) @ below / below.shape[1]
                for w, below, above in pairs
            ]
        nets = dataclasses.replace(nets, weights=tuple(weights))
        energies.append(means(_each_sample(nets), rest))
    single = _each_sample(nets)
    losses.append(means(single, single.start())[:, -1])
    return np.stack(energies, axis=1), np.stack(losses, axis=1)


NOISY_ROUNDS = 200


@jax.jit
@jax.vmap
def _noisy_run(weights: Array) -> tuple[Array, Array]:
    problem = noisy_problem([weights[:1, None], weights[1:, None]], noise=3.0, precision=1.0)
    found = expectation_maximisation(problem, rounds=NOISY_ROUNDS)
    return jax.numpy.asarray(found.loss), ravel_pytree(found.network)[0]


def _noisy(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ℒ after each round and the weights at the end, from W_1 and W_2 of the linear 1-1-2."""
    losses, ends = _noisy_run(weights)
    return np.asarray(losses), np.asarray(ends)


def constrained_inference(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 13 and 15: points within the bound whose ℒ is far below that of the equilibrium."""
    linear = draw(seed=seed, networks=networks, widths=SQUARE, near_identity=0.2)
    tanh = reachable(
        draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", near_identity=0.1)
    )
    rows = []
    for text, nets, rest in (("linear", linear, linear_rest(linear)), ("tanh", tanh, settle(tanh))):
        # Targets of almost T leave one prediction error, and so no slope of Ẽ at layer L − 1.
        near = dataclasses.replace(nets, target=(1 - 1e-6) * nets.target)
        point = [nets.input, *near.targets()[1:-1], nets.target]
        slope, margin = _bound(nets, point)
        ratio = nets.layer_energies(point)[:, -1] / nets.layer_energies(rest)[:, -1]
        oracle = "∂ℒ/∂x, ∂Ẽ/∂x and ℒ by hand in NumPy"
        rows += [
            Evidence("Eqs 13, 15", f"{text} networks: a point near the targets of target "
                     "propagation is within the bound (least −∂ℒ/∂x·ẋ over ‖∂ℒ/∂x‖²)",
                     float((margin / (slope**2).sum(-1)).min()), "above", 0.0, 0.0, oracle,
                     nets.settings),
            Evidence("Eqs 13, 15", f"as printed, {text} networks: no point within the bound has a "
                     "smaller ℒ than x* (ℒ of that point over ℒ(x*), largest)", float(ratio.max()),
                     "at least", 1.0, 0.0, oracle, nets.settings, expected_to_hold=False),
        ]  # fmt: skip
    few, rest = _first(linear), [x[:SEARCHED] for x in linear_rest(linear)]
    least = few.layer_energies(rest)[:, -1]
    levels = few.layer_energies(rest)[:, :-1].sum(-1)
    printed = _argmin(few, lambda nets, x, _: _bound(nets, x)[1], levels)
    bounded = _argmin(few, lambda nets, x, level: level - nets.layer_energies(x)[:, :-1].sum(-1),
                      levels)  # fmt: skip
    oracle = "SciPy's SLSQP from the feedforward pass, by differences"
    return (
        *rows,
        Evidence("Eqs 13, 15", "the constrained E-step as printed, the bound with ≥, has an ℒ of "
                 "zero (ℒ there over ℒ(x*), largest)",
                 float((few.layer_energies(printed)[:, -1] / least).max()), "at most", 0.0, 1e-3,
                 oracle, few.settings),
        Evidence("Eqs 13, 15", "as printed, x* is that constrained minimum (relative difference in "
                 "layer L − 1, median)", relative(printed[-2:-1], rest[-2:-1]), "at most", 0.0,
                 1e-2, oracle, few.settings, expected_to_hold=False),
        Evidence("Eqs 13, 15", "corrected: x* minimises ℒ subject to Ẽ ≤ Ẽ(x*) (largest relative "
                 "difference)", largest_relative(bounded[1:-1], rest[1:-1]), "equal", 0.0, 1e-3,
                 oracle, few.settings),
    )  # fmt: skip


def _bound(nets: Networks, activities: Layers) -> tuple[np.ndarray, np.ndarray]:
    """∂ℒ/∂x_{L−1}, and its product with ∂F/∂x_{L−1}, which the energy gradient bound has positive.

    In layers below ∂ℒ/∂x = 0, and so are both sides of the bound.
    """
    error = nets.weighted_errors(activities)[-1]
    slope = -nets.pull(nets.depth, activities[-2], error)
    return slope, (slope * nets.gradient(activities)[-2]).sum(-1)


def _argmin(
    nets: Networks,
    constraint: Callable[[Networks, Layers, np.ndarray], np.ndarray],
    levels: np.ndarray,
) -> Layers:
    """The least ℒ where the constraint is not negative, network after network."""
    found = []
    for i, level in enumerate(levels):
        one = _one(nets, i)

        def loss(hidden: np.ndarray, one: Networks = one) -> float:
            return float(one.layer_energies(one.unstack(hidden[None]))[0, -1])

        def room(hidden: np.ndarray, one: Networks = one, level: np.ndarray = level) -> float:
            return float(constraint(one, one.unstack(hidden[None]), level)[0])

        start = one.stack(one.start())[0]
        options = {"ftol": 1e-14, "maxiter": 1000}
        bounds = {"type": "ineq", "fun": room}
        found.append(minimize(loss, start, method="SLSQP", constraints=bounds, options=options).x)
    return nets.unstack(np.stack(found))


def recursion(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 14: the recursion of the prediction errors at rest, and its index as printed."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    found = settle(nets)
    errors = nets.errors(found)
    pulled = {
        shift: [
            times(transpose(_jacobian(nets, layer + shift, found[layer])), errors[layer])
            for layer in range(1, nets.depth)
        ]
        for shift in (0, 1)
    }
    oracle = "∂f/∂x_l by central differences in NumPy; equilibria to 1e-11"
    return (
        Evidence("Eq 14", "ε_l* = ε_{l+1}* ∂f(W_{l+1} x_l*)/∂x_l* (largest relative difference)",
                 largest_relative(pulled[1], errors[:-1]), "equal", 0.0, 1e-6, oracle,
                 nets.settings),
        Evidence("Eq 14", "as printed, with W_l in place of W_{l+1} (median relative difference)",
                 relative(pulled[0], errors[:-1]), "at most", 0.0, 1e-2, oracle, nets.settings,
                 expected_to_hold=False),
    )  # fmt: skip


def _jacobian(nets: Networks, layer: int, below: np.ndarray) -> np.ndarray:
    """∂f(W_layer x)/∂x by central differences."""
    columns = []
    for unit in np.eye(below.shape[-1]):
        ahead, behind = (nets.predict(layer, below + s * _STEP * unit) for s in (1, -1))
        columns.append((ahead - behind) / (2 * _STEP))
    return np.stack(columns, axis=-1)


def maximisation_of_the_loss(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 16: which weights it trains as printed, and of which ℒ PC's update is the gradient."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    found = settle(nets)
    ours, errors = _local_gradients(nets, found), nets.errors(found)

    def printed(moved: Networks) -> np.ndarray:
        return moved.layer_energies(found)[:, -1]

    def through_the_equilibrium(moved: Networks) -> np.ndarray:
        x = moved.input
        for layer in range(1, moved.depth):
            x = moved.predict(layer, x) + errors[layer - 1]
        return 0.5 * ((moved.target - moved.predict(moved.depth, x)) ** 2).sum(-1)

    below = slice(0, sum(w[0].size for w in nets.weights[:-1]))
    trained = _slopes(nets, printed)
    oracle = f"central differences of ℒ in NumPy, step {_STEP:g}"
    return (
        Evidence("Eq 16", "PC's ∂F/∂W is the slope of ℒ of the network with x_l = f(W_l x_{l−1}) + "
                 "ε_l*, these errors held: BP through the equilibrium (largest relative "
                 "difference)",
                 largest_relative([ours], [_slopes(nets, through_the_equilibrium)]), "equal", 0.0,
                 1e-6, oracle, nets.settings),
        Evidence("Eq 16", "as printed, ℒ({x_l*}, W) trains W_1 … W_{L−1} as PC does (norm of its "
                 "slope over that of PC's there, median)",
                 float(np.median(_norms(trained[:, below]) / _norms(ours[:, below]))),
                 "equal", 1.0, 1e-2, oracle, nets.settings, expected_to_hold=False),
    )  # fmt: skip


def loss_in_each_half(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Section 3.4: what ℒ does in the E half and in the M half, and from round to round."""
    nets = _with_samples(seed, networks)
    settings = {**nets.settings, **_SETTINGS}
    none = f"none needed: ℒ of pcdyn; energies are those of an {_REPEATED} (Section 3.3)"
    rows = []
    for text, measure, _ in _ALTERNATIONS:
        energies, losses = on_each(measure, nets)
        loss = energies[..., -1]
        rises = np.diff(loss) / losses[:, :1]
        inference = (loss[:, ::2] - losses[:, :-1]) / losses[:, :1]
        rows += [
            Evidence("Section 3.4", f"{text}: ℒ at x* never rises in an M half (largest rise over "
                     "ℒ at the start)", float(rises[:, ::2].max()), "at most", 0.0, 1e-12, none,
                     settings),
            Evidence("Section 3.4", f"{text}: within an E half, from the feedforward pass to x*, ℒ "
                     "never ends higher (largest rise over ℒ at the start)",
                     float(inference.max()), "at most", 0.0, 1e-12, none, settings),
        ]  # fmt: skip
        if measure is _to_the_end:
            rows.append(
                Evidence("Section 3.4", f"as printed, {text}: ℒ never rises in an E half, from x* "
                         "of the round before to x* (share of E halves in which it does)",
                         float((rises[:, 1::2] > 1e-9).mean()), "at most", 0.0, 0.0, none,
                         settings, expected_to_hold=False)
            )  # fmt: skip
    # Near the minimum of ℒ, where the second output is predicted to be zero.
    b = 0.1
    near = np.asarray([1.0, 1.0, b])
    losses, _ = _noisy(np.tile(near, (4, 1)))
    q = b * ((9 + b**2) / (2 + b**2) - 1)
    by_hand = (2 * b * q - b**4) / (2 + b**2)
    rate = float(_loss_rate(near))
    settings = {"network": "1-1-2 linear, targets (x, 3ξ)", "start": near.tolist()}
    return (
        *rows,
        Evidence("Section 3.4", "as printed, ℒ of the feedforward pass falls from round to round: "
                 f"that after {NOISY_ROUNDS} rounds less that at the start, near the minimum of ℒ",
                 float(losses[0, -1] - losses[0, 0]), "at most", 0.0, 1e-6,
                 "by hand, 5 at the saddle of ℒ and 4.5 + b²/2 at the start", settings,
                 expected_to_hold=False),
        Evidence("Section 3.4", "as printed, it falls with a small enough rate: dℒ/dt along "
                 "dW/dt = −dF*/dW at that start", rate, "at most", 0.0, 1e-6,
                 "F* and ℒ differentiated by hand", settings, expected_to_hold=False),
        Evidence("Section 3.4", "dℒ/dt there is (2bq − b⁴)/(2 + b²), q = b(9 + b²)/(2 + b²) − b "
                 "(difference)", rate - by_hand, "equal", 0.0, 1e-12,
                 "F* and ℒ differentiated by hand", settings),
    )  # fmt: skip


@jax.jit
def _loss_rate(weights: Array) -> Array:
    """dℒ/dt along −dF*/dW of the linear 1-1-2, F and ℒ averaged over its four samples."""
    problem = noisy_problem([weights[:1, None], weights[1:, None]], noise=3.0, precision=1.0)
    flow = AdiabaticFlow(problem, ClosedForm())
    slope = ravel_pytree(backpropagation(problem).weight_gradient)[0]
    return slope @ jax.numpy.concatenate(flow.vector_field(0.0, flow.initial_state())) / 16


STATEMENTS = (
    Statement(
        number="Eqs 9, 10", title="The E-step: most probable activities",
        says="The equilibrium of inference is the argmax of p(x | T, d, W), the E-step.",
        as_printed="holds with a condition",
        form="It is a maximum of the posterior, the only one in linear networks. From the "
        "feedforward pass inference can end at a lower maximum of a nonlinear network.",
        measure=most_probable_activities,
    ),
    Statement(
        number="Eq 11", title="The M-step: most probable weights",
        says="Learning is the argmax over W of the mean of p(T | x*, d, W) over the posterior.",
        as_printed="does not hold",
        form="Of the mean of ln p(T, x* | d, W): the logarithm, so that samples are averaged as PC "
        "does, and the joint density, for p(T | x*) = p(T | x_{L−1}*) trains W_L only.",
        measure=maximisation,
    ),
    Statement(
        number="Section 3.3", title="Predictive coding as expectation maximisation",
        says="As expectation maximisation, predictive coding converges to a minimum of F.",
        as_printed="holds with a condition",
        form="F never rises, in E halves and M halves, by M-steps to the end or along the "
        "gradient. That is no convergence: where data cannot be interpolated weights can grow "
        "without end.",
        measure=free_energy_falls,
    ),
    Statement(
        number="Eqs 13, 15", title="Inference as constrained minimisation of ℒ",
        says="x* = argmin ℒ such that −∂ℒ/∂xᵀ ∂Ẽ/∂x < ‖∂ℒ/∂x‖².",
        as_printed="does not hold",
        form="x* = argmin ℒ such that Ẽ ≤ Ẽ(x*). Within the printed bound ℒ comes as near to zero "
        "as one likes wherever targets exist: it bounds a direction, not a distance.",
        measure=constrained_inference,
    ),
    Statement(
        number="Eq 14", title="Recursion of the prediction errors at rest",
        says="ε_l* = ε_{l+1}* ∂f(W_l x_l*)/∂x_l*.",
        as_printed="holds with a condition",
        form="With W_{l+1}, which predicts layer l + 1.",
        measure=recursion,
    ),
    Statement(
        number="Eq 16", title="The M-step on ℒ",
        says="Learning is the argmin over W_l of the mean of ℒ({x_l*}, W) over the posterior.",
        as_printed="does not hold",
        form="ℒ({x_l*}, W) = E_L trains W_L only. PC's update is the gradient of another ℒ: that "
        "of the network with the errors ε_l* added to its layers and held.",
        measure=maximisation_of_the_loss,
    ),
    Statement(
        number="Section 3.4", title="ℒ in E halves and M halves",
        says="ℒ is guaranteed to decrease or stay the same at each E and M step, so that the "
        "algorithm converges to a minimum or saddle of ℒ.",
        as_printed="does not hold",
        form="ℒ at x* falls in M halves, and ends below the feedforward pass in E halves. It can "
        "rise from one E-step to the next, and so can ℒ of the feedforward pass at any rate.",
        measure=loss_in_each_half,
    ),
)  # fmt: skip
