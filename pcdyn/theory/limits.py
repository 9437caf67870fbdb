"""Which limit of predictive coding is which algorithm: Theorem 3.2, A.2 and A.7, with orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from pcdyn.learning import FixedPrediction, JointFlow, Rule, ZeroDivergence
from pcdyn.model.problem import InferenceProblem
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.flows import flow, integrate, linear_rest, settle
from pcdyn.theory.networks import (
    DELTAS,
    ORDER,
    SQUARE,
    UNEQUAL,
    Networks,
    draw,
    largest_relative,
    on_each,
    order,
    reachable,
    relative,
    times,
)
from pcdyn.theory.statement import Statement

SMALL = (1e-1, 1e-2, 1e-3, 1e-4)


def _slope(
    number: str,
    claim: str,
    sizes: Sequence[float] | np.ndarray,
    errors: Sequence[float],
    expected: float,
    oracle: str,
    settings: Mapping[str, Any],
) -> Evidence:
    """An order of convergence, with the curve that it was fitted to."""
    curve = {"sizes": [float(s) for s in sizes], "errors": [float(e) for e in errors]}
    return Evidence(number, f"{claim} (order)", order(sizes, errors), "equal", expected, ORDER,
                    oracle, {**settings, **curve})  # fmt: skip


def approximates_backpropagation(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Theorem 3.2: the recursion at equilibrium, its sign, and why equal f' is not enough."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    found = settle(nets)
    errors = nets.weighted_errors(found)
    pulled = [nets.pull(i + 1, found[i], errors[i]) for i in range(1, nets.depth)]
    bound = float(max(np.abs(a - b).max() for a, b in zip(pulled, errors[:-1], strict=True)))
    low = nets.with_precisions(1.0, 1.0, 1e-4)
    at_low = [e / 1e-4 for e in low.weighted_errors(settle(low))]
    gradients = [-delta for delta in nets.deltas()]
    rows = [
        Evidence("Theorem 3.2", "the recursion ε_l* = W_{l+1}ᵀ (f'(W_{l+1} x_l*) ∘ ε_{l+1}*) "
                 "(largest residual)", bound, "equal", 0.0, 1e-10,
                 "the recursion in NumPy; equilibria to 1e-11", nets.settings),
        Evidence("Theorem 3.2", "ε_l*/λ → −∂ℒ/∂x̂_l (median relative difference at λ = 1e-4)",
                 relative(at_low, nets.deltas()), "at most", 0.0, 1e-2, DELTAS, nets.settings),
        Evidence("Theorem 3.2", "as printed, ε_l*/λ → +∂ℒ/∂x̂_l (median relative difference at "
                 "λ = 1e-4)", relative(at_low, gradients), "at most", 0.0, 1e-2, DELTAS,
                 nets.settings, expected_to_hold=False),
    ]  # fmt: skip
    for std in (0.05, 0.3, 1.0):
        linear = draw(seed=seed, networks=networks, widths=SQUARE, std=std)
        errors = linear.weighted_errors(linear_rest(linear))
        rows.append(
            Evidence("Theorem 3.2", f"as printed below it, equal f' is enough: linear networks, "
                     f"weight std {std} (median relative difference of ε_l* from δ_l)",
                     relative(errors, linear.deltas()), "at most", 0.0, UNEQUAL, DELTAS,
                     {**linear.settings, "std": std}, expected_to_hold=False)
        )  # fmt: skip
    return tuple(rows)


def low_output_precision(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.2 (Whittington and Bogacz): λ → 0 is BP, in prediction errors and in weight gradients."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    deltas, errors, gradients = nets.deltas(), [], []
    expected = nets.weight_gradient(nets.feedforward(), deltas)
    for size in SMALL:
        low = nets.with_precisions(1.0, 1.0, size)
        found = settle(low)
        scaled = [e / size for e in low.weighted_errors(found)]
        errors.append(relative(scaled, deltas))
        gradients.append(relative([low.weight_gradient(found, scaled)], [expected]))
    return (
        _slope("A.2 low output precision", "‖ε_l*/λ − δ_l‖ = O(λ)", SMALL, errors, 1.0, DELTAS,
               nets.settings),
        _slope("A.2 low output precision", "‖∇F*/λ − ∇ℒ‖ = O(λ)", SMALL, gradients, 1.0,
               "BP's weight gradient in NumPy", nets.settings),
    )  # fmt: skip


def frozen_predictions(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.2 (Millidge et al.): with predictions and f' frozen the equilibrium is BP, exactly."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    expected = nets.weight_gradient(nets.feedforward(), nets.deltas())
    ours = on_each(_frozen, nets)
    forward, deltas = nets.feedforward(), nets.deltas()

    def field(_: float, y: np.ndarray) -> np.ndarray:
        lower, upper = y.reshape(2, networks, 3)
        from_above = nets.pull(3, forward[2], deltas[2]) - upper
        return np.concatenate([(nets.pull(2, forward[1], upper) - lower).ravel(),
                               from_above.ravel()])  # fmt: skip

    t = 1.5
    solved = integrate(field, np.zeros(6 * networks), [t], method="DOP853", tolerance=1e-12)
    lower, upper = solved[-1].reshape(2, networks, 3)
    closed = ((1 - (1 + t) * np.exp(-t)) * deltas[0], (1 - np.exp(-t)) * deltas[1])
    return (
        Evidence("A.2 frozen predictions", "weight gradients at the equilibrium are BP's "
                 "(largest relative difference)", largest_relative([ours], [expected]), "equal",
                 0.0, 1e-12, "BP's weight gradient in NumPy",
                 {**nets.settings, "dt": 0.5, "steps": 200}),
        Evidence("A.2 frozen predictions", "on the way ε_{L−1} = (1 − e^{−t}) δ and ε_{L−2} = "
                 "(1 − (1 + t) e^{−t}) δ (largest relative difference)",
                 largest_relative((lower, upper), closed), "equal", 0.0, 1e-9,
                 "SciPy's DOP853 on the frozen flow in NumPy, tolerance 1e-12",
                 {**nets.settings, "t": t}),
    )  # fmt: skip


def _frozen(problem: InferenceProblem) -> Array:
    return _learned(FixedPrediction(dt=0.5, steps=200), problem)


def _learned(rule: Rule, problem: InferenceProblem) -> Array:
    """The rule's weight gradient as one vector."""
    assert problem.input is not None
    assert problem.output is not None
    batch = problem.with_data(problem.input[None], problem.output[None])
    return ravel_pytree(rule.learn(batch, ())[0].gradient)[0]


def first_update(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.2 (Song et al.): the first update of each layer is BP, by Euler steps and in time."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    forward, deltas = nets.feedforward(), nets.deltas()
    rows = []
    for rate, measure in ((1.0, _by_steps_of_one), (0.5, _by_steps_of_half)):
        scaled = [rate ** (nets.depth - i) * d for i, d in enumerate(deltas, start=1)]
        expected = nets.weight_gradient(forward, scaled)
        rows.append(
            Evidence("A.2 first update", f"Euler steps of {rate:g} from the feedforward pass: "
                     f"layer l learns from {rate:g}^(L−l) δ_l (largest relative difference)",
                     largest_relative([on_each(measure, nets)], [expected]), "equal", 0.0, 1e-13,
                     "BP's weight gradient in NumPy", {**nets.settings, "γ": rate})
        )  # fmt: skip
    sizes = (1e-3, 1e-2, 1e-1)
    states = flow(nets, nets.start(), sizes, tolerance=1e-13)
    errors = []
    for t, state in zip(sizes, states, strict=True):
        ours = [nets.errors(state)[1] / t, nets.errors(state)[0] / (t**2 / 2)]
        errors.append(max(relative([e], [d]) for e, d in zip(ours, deltas[1::-1], strict=True)))
    rows.append(
        _slope("A.2 first update", "in continuous time ε_l = t^{L−l}/(L−l)! δ_l (1 + O(t))",
               sizes, errors, 1.0, DELTAS, nets.settings)
    )  # fmt: skip
    return tuple(rows)


def _by_steps_of_one(problem: InferenceProblem) -> Array:
    return _learned(ZeroDivergence(1.0), problem)


def _by_steps_of_half(problem: InferenceProblem) -> Array:
    return _learned(ZeroDivergence(0.5), problem)


def high_precision_ratio(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 7 and 8: which precisions send which layers to their targets, and to the forward pass."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, near_identity=0.2)
    targets, forward = nets.targets(), nets.feedforward()
    sizes = np.asarray((1e-2, 1e-3, 1e-4))
    graded, alone, low = [], [], []
    for ratio in 1 / sizes:
        found = linear_rest(nets.with_precisions(ratio**-2, 1 / ratio, 1.0))
        graded.append(relative(found[1:-1], targets[1:-1]))
        alone.append(linear_rest(nets.with_precisions(1.0, 1.0, ratio)))
        low.append(linear_rest(nets.with_precisions(ratio**2, ratio, 1.0)))
    smooth = reachable(
        draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", near_identity=0.1)
    )
    curved = [
        relative(settle(smooth.with_precisions(size**2, size, 1.0))[1:-1], smooth.targets()[1:-1])
        for size in sizes[:2]
    ]
    top = [relative(x[2:3], targets[2:3]) for x in alone]
    below = relative(alone[-1][1:2], targets[1:2])
    near = [relative(x[1:-1], forward[1:-1]) for x in low]
    oracle = "t = W⁻¹ f⁻¹(t) in NumPy"
    return (
        _slope("Eqs 7–8", "graded precisions Π_l = ρ^l: all layers tend to their targets as 1/ρ",
               sizes, graded, 1.0, oracle, nets.settings),
        _slope("Eqs 7–8", "the same for tanh, where targets exist", sizes[:2], curved, 1.0,
               oracle, smooth.settings),
        _slope("Eqs 7–8", "output precision ρ alone: layer L−1 tends to its target as 1/ρ", sizes,
               top, 1.0, oracle, nets.settings),
        Evidence("Eqs 7–8", "as read from Eq 7, output precision 1e4 alone sends layer L−2 to its "
                 "target too (median relative difference)", below, "at most", 0.0, 1e-2, oracle,
                 nets.settings, expected_to_hold=False),
        _slope("Eqs 7–8", "Π_l = ρ^−l: all layers tend to the feedforward pass as 1/ρ", sizes,
               near, 1.0, "feedforward recursion in NumPy", nets.settings),
        *_rectangular(seed, networks),
    )  # fmt: skip


def _rectangular(seed: int, networks: int) -> tuple[Evidence, ...]:
    """A weight without inverse: difference target propagation."""
    nets = draw(seed=seed, networks=networks, widths=(4, 5, 3)).with_precisions(1.0, 1e6)
    found, forward = linear_rest(nets), nets.feedforward()
    inverse = np.linalg.pinv(nets.weights[1])
    difference = forward[1] + times(inverse, nets.target - forward[2])
    oracle = "Moore–Penrose inverse in NumPy"
    settings = {**nets.settings, "ratio": 1e6}
    return (
        Evidence("Eqs 7–8", "rectangular W at ratio 1e6: x* is x_ff + W⁺ (T − W x_ff), difference "
                 "target propagation (median relative difference)",
                 relative(found[1:2], [difference]), "at most", 0.0, 1e-4, oracle, settings),
        Evidence("Eqs 7–8", "as used in A.9, rectangular W at ratio 1e6: x* is W⁺ T (median "
                 "relative difference)", relative(found[1:2], [times(inverse, nets.target)]),
                 "at most", 0.0, 1e-4, oracle, settings, expected_to_hold=False),
    )  # fmt: skip


def interpolation(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.7, Eq 48: F = λℒ + (1 − λ)Ẽ near both ends and at them."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, near_identity=0.2)
    targets, deltas = nets.targets(), nets.deltas()
    sizes = (1e-2, 1e-3, 1e-4)
    high, low = [], []
    below = np.inf
    for size in sizes:
        found = linear_rest(nets.with_precisions(size, size, 1 - size))
        high.append(relative(found[2:3], targets[2:3]))
        below = relative(found[1:2], targets[1:2])
        weak = nets.with_precisions(1 - size, 1 - size, size)
        errors = nets.errors(linear_rest(weak))
        scaled = [e * (1 - size) / size for e in errors[:-1]]
        low.append(relative(scaled, deltas[:-1]))
    at_one = np.linalg.eigvalsh(nets.with_precisions(0.0, 0.0, 1.0).linear_flow()[0])
    flat = int((at_one < 1e-12 * at_one.max(-1, keepdims=True)).sum(-1).min())
    at_zero = nets.with_precisions(1.0, 1.0, 0.0)
    gradient = at_zero.weight_gradient(at_zero.rest(), at_zero.weighted_errors(at_zero.rest()))
    share = float(np.abs(gradient).max() / np.abs(nets.weight_gradient(
        nets.feedforward(), deltas)).max())  # fmt: skip
    oracle = "t = W⁻¹ t in NumPy"
    return (
        _slope("Eq 48", "λ → 1: layer L−1 tends to its target as 1 − λ", sizes, high, 1.0, oracle,
               nets.settings),
        _slope("Eq 48", "λ → 0: ε_l (1 − λ)/λ tends to BP's δ_l as λ", sizes, low, 1.0, DELTAS,
               nets.settings),
        Evidence("Eq 48", "as printed, λ → 1 is target propagation in every layer: layer L−2 at "
                 "1 − λ = 1e-4 (median relative difference)", below, "at most", 0.0, 1e-2, oracle,
                 nets.settings, expected_to_hold=False),
        Evidence("Eq 48", "as printed, λ = 1 has one equilibrium: flat directions of F there",
                 float(flat), "equal", 0.0, 0.0, "eigenvalues of AᵀΠA in NumPy", nets.settings,
                 expected_to_hold=False),
        Evidence("Eq 48", "as printed, λ = 0 is BP: largest weight gradient there over BP's",
                 share, "equal", 1.0, 1e-6, "BP's weight gradient in NumPy", nets.settings,
                 expected_to_hold=False),
    )  # fmt: skip


def incremental_coding(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Weights that move with the activities (incremental PC) tend to the adiabatic ones as ε → 0.

    On one linear network whatever `networks` says: the flow of weights is slow to follow.
    """
    nets = draw(seed=seed, networks=1, widths=(2, 2, 2))
    shapes = [w[0].shape for w in nets.weights]
    flat = np.concatenate([w.ravel() for w in nets.weights])

    def at(vector: np.ndarray) -> Networks:
        parts = np.split(vector, [shapes[0][0] * shapes[0][1]])
        weights = tuple(p.reshape(1, *s) for p, s in zip(parts, shapes, strict=True))
        return dataclasses.replace(nets, weights=weights)

    def adiabatic(_: float, vector: np.ndarray) -> np.ndarray:
        now = at(vector)
        rest = now.rest()
        return -now.weight_gradient(rest, now.weighted_errors(rest))[0]

    limit = integrate(adiabatic, flat, [1.0], method="DOP853", tolerance=1e-11)[-1]
    # Where the fastest weights move at rates of ten, ε = .01 is not small yet.
    sizes, distances = (1e-3, 3e-4, 1e-4), []
    for ratio in sizes:
        ratios = np.asarray([ratio])

        def field(_: float, y: np.ndarray, ratios: np.ndarray = ratios) -> np.ndarray:
            return on_each(_joint, nets, y[None], ratios)[0]

        start = np.concatenate([nets.rest()[1][0], flat])
        end = integrate(field, start, [1 / ratio], method="LSODA", tolerance=1e-9)[-1][2:]
        distances.append(float(np.linalg.norm(end - limit)))
    return (
        _slope("Incremental PC", "τ_W = 1/ε: distance of the weights at εt = 1 from those of "
               "inference to equilibrium is O(ε)", sizes, distances, 1.0,
               "SciPy's DOP853 on −dF*/dW in NumPy, equilibria by dense solves", nets.settings),
    )  # fmt: skip


def _joint(problem: InferenceProblem, y: Array, ratio: Array) -> Array:
    flow = JointFlow(problem, ratio)
    ends = np.cumsum([x.size for x in flow.initial_state()])[:-1]
    return jax.numpy.concatenate(flow.vector_field(0.0, tuple(jax.numpy.split(y, ends))))


STATEMENTS = (
    Statement(
        number="Theorem 3.2", also="Eqs 14, 27", title="Prediction errors approximate BP",
        says="With ε_L = ∂ℒ/∂x_L the errors at equilibrium approximate BP's gradients to O(ε_f), "
        "ε_f = f'(W x*) − f'(W x̄), and equal f' is enough.",
        as_printed="holds with a condition",
        form="ε_L = −∂ℒ/∂x̂_L, and x* → x̄ is needed (as with output precision λ → 0, error O(λ)): "
        "linear networks have ε_f = 0 and still ε_l* = P_lᵀ S⁻¹ e_0, not BP's P_lᵀ e_0.",
        measure=approximates_backpropagation,
    ),
    Statement(
        number="A.2 frozen predictions", title="Fixed prediction assumption",
        says="With predictions and f' frozen at the feedforward pass the errors converge to BP's "
        "gradients.",
        as_printed="holds",
        form="As printed, exactly; (1 − e^{−t}) δ and (1 − (1 + t) e^{−t}) δ on the way.",
        measure=frozen_predictions,
    ),
    Statement(
        number="A.2 first update", title="First update of each layer (Z-IL)",
        says="From the feedforward pass, a layer's error when it first becomes nonzero is exactly "
        "BP's gradient.",
        as_printed="holds with a condition",
        form="Euler step γ gives γ^{L−l} δ_l: its direction for any γ, its value for γ = 1. In "
        "continuous time ε_l = t^{L−l}/(L−l)! δ_l (1 + O(t)).",
        measure=first_update,
    ),
    Statement(
        number="A.2 low output precision", title="Low output precision",
        says="With a small precision of the output the errors converge to BP's gradients.",
        as_printed="holds",
        form="‖ε_l*/λ − δ_l‖ = O(λ): the errors themselves vanish, those over λ are BP's.",
        measure=low_output_precision,
    ),
    Statement(
        number="Eqs 7–8", title="High and low precision ratios",
        says="A high ratio of feedback to feedforward precision gives the targets of target "
        "propagation, a low ratio the feedforward pass.",
        as_printed="holds with a condition",
        form="Every layer's own ratio must be high: graded Π_l = ρ^l, error O(1/ρ). The output's "
        "alone sends only layer L−1 to its target. Rectangular W give difference targets.",
        measure=high_precision_ratio,
    ),
    Statement(
        number="Eq 48", also="A.7", title="One λ from BP to target propagation",
        says="F = λℒ + (1 − λ)Ẽ is target propagation at λ = 1 and BP at λ = 0.",
        as_printed="holds with a condition",
        form="Both are limits, with errors O(1 − λ) and O(λ): λ → 1 for layer L−1 only, λ → 0 for "
        "ε_l (1 − λ)/λ. At λ = 1 lower layers are undetermined, at λ = 0 nothing is learned.",
        measure=interpolation,
    ),
    Statement(
        number="Incremental PC", title="Weights that move with the activities",
        says="The weights of the paper move once at convergence; related work moves both at once.",
        as_printed="not in the paper",
        form="With τ_W = 1/ε the weights stay within O(ε) of those of inference to equilibrium.",
        measure=incremental_coding,
    ),
)  # fmt: skip
