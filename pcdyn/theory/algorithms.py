"""The algorithms as Appendix A.1 prints them: predictive coding, backpropagation and targets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import expm

from pcdyn._support.types import Activities
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import backpropagation, target_propagation
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.flows import linear_rest, vector_field
from pcdyn.theory.networks import (
    ORDER,
    SQUARE,
    UNEQUAL,
    Layers,
    Networks,
    central_differences,
    draw,
    largest,
    largest_relative,
    on_each,
    order,
    reachable,
    relative,
    times,
    transpose,
)
from pcdyn.theory.statement import Statement

# Of central differences with a step of 1e-5.
DIFFERENCES = 1e-8


def generative_direction(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 20 and 21: which of the printed lines descend the energy of x_l = f(W_l x_{l+1})."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh")
    rng = np.random.default_rng(seed + 1)
    activities = [x + rng.normal(size=x.shape) for x in nets.start()]
    activities[-1] = nets.target
    # As A.1.1 counts, the data is x_0, and W_l predicts x_l from x_{l+1}, l = 0 … L − 1.
    data, *free = x = activities[::-1]
    weights = list(nets.weights[::-1])
    moves = central_differences(lambda y: _generative_energy([data, *y], weights), free)
    learns = central_differences(lambda w: _generative_energy(x, w), weights)
    ours = vector_field(nets, activities, clamp="output")[::-1]

    def printed(hidden: Layers, data: np.ndarray = data) -> Layers:
        errors = _generative_errors([data, *hidden, x[-1]], weights)
        return _as_printed(hidden, weights, [*errors, np.zeros_like(x[-1])])

    # Of Eq 1, where W_l predicts x_l from x_{l−1}.
    upward = [nets.input, *activities[1:]]

    def printed_upward(hidden: Layers) -> Layers:
        errors = nets.errors([nets.input, *hidden, nets.target])
        return _as_printed(hidden, [data, *nets.weights], [data, *errors])

    def whole(hidden: Layers) -> Layers:
        return nets.gradient([nets.input, *hidden, nets.target])[1:-1]

    errors = _generative_errors(x, weights)
    corrected, same_layer = (
        [_outer(w, error, at) for w, error, at in zip(weights, errors, where, strict=True)]
        for where in (x[1:], x[:-1])
    )
    untouched = largest(printed(free[:-1], data + 1), printed(free[:-1]))
    oracle, settings = "central differences of F in NumPy, step 1e-5", nets.settings
    number = "A.1.1, Eqs 20–21"
    return (
        Evidence(number, "corrected, ẋ_l = −ε_l + ε_{l−1} ∂f(φ, x_l)/∂x_l: pcdyn's flow with the "
                 "data as output and the input free is −∂F/∂x_l (largest difference)",
                 largest(ours, [-m for m in moves]), "equal", 0.0, DIFFERENCES, oracle, settings),
        Evidence(number, "as printed in Eq 21, −ε_l + ε_{l+1} f'(W_l x_l) W_lᵀ: −∂F/∂x_l (median "
                 "relative difference)", relative(printed(free[:-1]), [-m for m in moves[:-1]]),
                 "equal", 0.0, UNEQUAL, oracle, settings, expected_to_hold=False),
        Evidence(number, "as printed in Eq 21, activities feel the data: what adding 1 to it "
                 "changes of ẋ (largest)", untouched, "above", 0.0, 0.0, "the line in NumPy",
                 settings, expected_to_hold=False),
        Evidence(number, "as printed in Eq 21, with predictions upward as in Eq 1, which needs "
                 "W_{l+1}: −∂F/∂x_l (median relative difference)",
                 relative(printed_upward(upward[1:-1]), [-s for s in whole(upward[1:-1])]),
                 "equal", 0.0, UNEQUAL, "∂F/∂x by hand in NumPy", settings,
                 expected_to_hold=False),
        Evidence(number, "as printed in Eq 21, a gradient flow of any energy: asymmetry ‖J − Jᵀ‖ / "
                 "‖J‖ of its Jacobian, predictions downward or upward (least of the medians)",
                 min(float(np.median(_asymmetry(field, hidden))) for field, hidden in (
                     (printed, free[:-1]), (printed_upward, upward[1:-1]))),
                 "equal", 0.0, UNEQUAL, "central differences of the line in NumPy", settings,
                 expected_to_hold=False),
        Evidence(number, "Eq 1 is one: the same (largest)",
                 float(_asymmetry(whole, upward[1:-1]).max()), "equal", 0.0, DIFFERENCES,
                 "central differences of the line in NumPy", settings),
        Evidence(number, "corrected, φ̇_l = +ε_l ∂f(φ, x_{l+1})/∂φ: −∂F/∂W_l (largest difference)",
                 # Third derivatives by a weight grow as the cube of an activity.
                 largest(corrected, [-m for m in learns]), "equal", 0.0, 10 * DIFFERENCES, oracle,
                 settings),
        Evidence(number, "as printed but for its sign, +ε_l ∂f(φ, x_l)/∂φ: −∂F/∂W_l (median "
                 "relative difference)", relative(
                     [a.reshape(networks, -1) for a in same_layer],
                     [-m.reshape(networks, -1) for m in learns]),
                 "equal", 0.0, UNEQUAL, oracle, settings, expected_to_hold=False),
    )  # fmt: skip


def _generative_errors(x: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> Layers:
    """ε_l = x_l − tanh(W_l x_{l+1}), l = 0 … L − 1."""
    return [a - np.tanh(times(w, b)) for a, w, b in zip(x[:-1], weights, x[1:], strict=True)]


def _generative_energy(x: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> np.ndarray:
    return 0.5 * (np.concatenate(_generative_errors(x, weights), axis=-1) ** 2).sum(-1)


def _as_printed(hidden: Layers, weights: Layers, errors: Layers) -> Layers:
    """Eq 21 of the hidden layers l = 1, 2, …: −ε_l + W_lᵀ (f'(W_l x_l) ∘ ε_{l+1})."""
    field = []
    for layer, x in enumerate(hidden, start=1):
        slope = 1 - np.tanh(times(weights[layer], x)) ** 2
        pulled = times(transpose(weights[layer]), slope * errors[layer + 1])
        field.append(pulled - errors[layer])
    return field


def _outer(weight: np.ndarray, error: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(f'(W x) ∘ ε) xᵀ of tanh."""
    slope = 1 - np.tanh(times(weight, at)) ** 2
    return (slope * error)[:, :, None] * at[:, None, :]


def _asymmetry(field: Callable[[Layers], Layers], hidden: Layers) -> np.ndarray:
    """‖J − Jᵀ‖ / ‖J‖ of the Jacobian of a field, which is zero for a gradient only."""
    rows = [
        np.concatenate(
            central_differences(lambda y, k=k: np.concatenate(field(y), -1)[:, k], hidden), axis=-1
        )
        for k in range(sum(x.shape[-1] for x in hidden))
    ]
    jacobian = np.stack(rows, axis=1)
    norms = [np.linalg.norm(m, axis=(1, 2)) for m in (jacobian - transpose(jacobian), jacobian)]
    return norms[0] / norms[1]


def reverse_mode(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 22 to 24: the chain rule, where its recursion starts, and which slopes BP takes."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh")
    forward, deltas = nets.feedforward(), list(on_each(_deltas, nets))
    jacobians = [
        nets.slope(layer, forward[layer - 1])[..., None] * nets.weights[layer - 1]
        for layer in range(1, nets.depth + 1)
    ]
    product = jacobians[2] @ jacobians[1] @ jacobians[0]

    def output(layer: int, x: np.ndarray) -> np.ndarray:
        for above in range(layer + 1, nets.depth + 1):
            x = nets.predict(above, x)
        return x

    rows = [
        central_differences(lambda x, k=k: output(0, x[0])[:, k], [nets.input])[0]
        for k in range(nets.widths[-1])
    ]
    slopes = [
        central_differences(
            lambda x, l=layer: 0.5 * ((nets.target - output(l, x[0])) ** 2).sum(-1),
            [forward[layer]],
        )[0]
        for layer in range(1, nets.depth + 1)
    ]
    # f'(W_l x_l) in place of f'(W_l x_{l−1}), from δ_L down.
    printed = [deltas[-1]]
    for layer in range(nets.depth, 1, -1):
        printed.insert(0, nets.pull(layer, forward[layer], printed[0]))
    flat = [m.reshape(networks, -1) for m in (jacobians[2] @ product, np.stack(rows, axis=1))]
    oracle = "central differences of the feedforward pass in NumPy, step 1e-5"
    number, settings = "A.1.2, Eqs 22–24", nets.settings
    return (
        Evidence(number, "Eq 22: ∂F/∂x is the product of the layers' Jacobians (largest "
                 "difference)", largest([product], [np.stack(rows, axis=1)]), "equal", 0.0,
                 DIFFERENCES, oracle, settings),
        Evidence(number, "as printed, Eq 23 from δ_N = ∂f_N/∂f_{N−1}, which has the last Jacobian "
                 "twice: ∂F/∂x (median relative difference)", relative(flat[:1], flat[1:]),
                 "equal", 0.0, UNEQUAL, oracle, settings, expected_to_hold=False),
        Evidence(number, "corrected, δ_{l−1} = W_lᵀ (f'(W_l x_{l−1}) ∘ δ_l): pcdyn's δ_l are "
                 "−∂ℒ/∂x_l (largest difference)", largest(deltas, [-s for s in slopes]), "equal",
                 0.0, DIFFERENCES, oracle, settings),
        Evidence(number, "as printed in Eq 24, with f'(W_l x_l): −∂ℒ/∂x_l (median relative "
                 "difference)", relative(printed[:-1], [-s for s in slopes[:-1]]), "equal", 0.0,
                 UNEQUAL, oracle, settings, expected_to_hold=False),
    )  # fmt: skip


def _deltas(problem: InferenceProblem) -> Activities:
    return backpropagation(problem).deltas


def gauss_newton(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.1.3: targets for a small step of the output against Gauss–Newton steps of each layer."""
    linear = draw(seed=seed, networks=networks, widths=SQUARE, near_identity=0.2)
    curved = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", near_identity=0.2)
    # Small inputs keep the outputs of tanh, and with them the targets, off the ends of its range.
    curved = reachable(dataclasses.replace(curved, input=0.5 * curved.input))
    sizes = (1e-3, 1e-4, 1e-5)
    exact = _steps(linear, sizes[0])
    near = [_steps(curved, size) for size in sizes]
    output = curved.feedforward()[-1]
    gradient = output - curved.target
    away = output + sizes[-1] * gradient
    rise = 0.5 * (((curved.target - away) ** 2).sum(-1) - (gradient**2).sum(-1)) / sizes[-1]
    wide = draw(seed=seed, networks=networks, widths=(3, 5, 4, 3))
    chained = np.linalg.pinv(wide.weights[1]) @ np.linalg.pinv(wide.weights[2])
    at_once = np.linalg.pinv(wide.weights[2] @ wide.weights[1])
    error = wide.target - wide.feedforward()[-1]
    number, oracle = "A.1.3 Gauss–Newton", "least squares on the Jacobian ∂x̂_L/∂x_l in NumPy"
    weights = "weight updates (t_l − x̂_l) f' x̂_{l−1}ᵀ are multiples of the Gauss–Newton ones of"
    sines = [_weight_sines(nets, sizes[-1]) for nets in (linear, curved)]
    return (
        Evidence(number, "as printed, T = x̂_L + β ∂ℒ/∂x̂_L takes ℒ down: its rise over "
                 "β ‖∂ℒ/∂x̂_L‖² (median)", float(np.median(rise / (gradient**2).sum(-1))), "at most",
                 0.0, 0.0, "ℒ in NumPy", {**curved.settings, "β": sizes[-1]},
                 expected_to_hold=False),
        Evidence(number, "T = x̂_L − β ∂ℒ/∂x̂_L, linear: t_l − x̂_l is β times the Gauss–Newton step "
                 "of layer l (largest relative difference)", largest_relative(*exact), "equal",
                 0.0, 1e-9, oracle, {**linear.settings, "β": sizes[0]}),
        Evidence(number, "the same for tanh, to a relative error of O(β) (order)",
                 order(sizes, [relative(*pair) for pair in near]), "equal", 1.0, ORDER, oracle,
                 {**curved.settings, "sizes": list(sizes),
                  "errors": [relative(*pair) for pair in near]}),
        Evidence(number, f"linear: {weights} each layer alone, one sample (largest sine of the "
                 "angle)",
                 float(sines[0].max()), "equal", 0.0, 1e-6, oracle, linear.settings),
        Evidence(number, f"as printed, tanh: {weights} each layer, which have 1/f' for f' (median "
                 "sine)", float(np.median(sines[1])), "equal", 0.0, UNEQUAL, oracle,
                 curved.settings, expected_to_hold=False),
        Evidence(number, "as printed, a stack of inverse Jacobians is Gauss–Newton: layer 1 of "
                 "wide layers, W_2⁺ W_3⁺ e_0 against (W_3 W_2)⁺ e_0 (median relative difference)",
                 relative([times(chained, error)], [times(at_once, error)]), "equal", 0.0,
                 UNEQUAL, "Moore–Penrose inverses in NumPy", wide.settings,
                 expected_to_hold=False),
    )  # fmt: skip


def _steps(nets: Networks, size: float) -> tuple[Layers, Layers]:
    """pcdyn's (t_l − x̂_l)/β for T = x̂_L − β ∂ℒ/∂x̂_L, and Gauss–Newton steps, l = 0 … L − 1."""
    forward = nets.feedforward()
    error = nets.target - forward[-1]
    near = dataclasses.replace(nets, target=forward[-1] + size * error)
    targets = on_each(_targets, near)
    moves = [(t - x) / size for t, x in zip(targets[:-1], forward[:-1], strict=True)]
    return moves, [times(np.linalg.pinv(j), error) for j in _output_jacobians(nets)[:-1]]


def _targets(problem: InferenceProblem) -> Activities:
    return target_propagation(problem).values


def _output_jacobians(nets: Networks) -> list[np.ndarray]:
    """∂x̂_L/∂x_l at the feedforward pass, l = 0 … L."""
    forward = nets.feedforward()
    found = [np.broadcast_to(np.eye(nets.widths[-1]), (len(nets.input),) + 2 * nets.widths[-1:])]
    for layer in range(nets.depth, 0, -1):
        slope = nets.slope(layer, forward[layer - 1])
        found.insert(0, found[0] @ (slope[..., None] * nets.weights[layer - 1]))
    return found


def _weight_sines(nets: Networks, size: float) -> np.ndarray:
    """The sine of the angle between both weight updates of layers 1 … L − 1, the largest."""
    moves, forward, jacobians = _steps(nets, size)[0], nets.feedforward(), _output_jacobians(nets)
    error, sines = nets.target - forward[-1], []
    for layer in range(1, nets.depth):
        below = forward[layer - 1]
        slope = nets.slope(layer, below)
        ours = ((slope * moves[layer])[:, :, None] * below[:, None, :]).reshape(len(below), -1)
        # ∂x̂_L/∂W_l, one column for each weight.
        columns = (jacobians[layer] * slope[:, None, :])[..., None] * below[:, None, None, :]
        theirs = times(np.linalg.pinv(columns.reshape(*columns.shape[:2], -1)), error)
        unit = theirs / np.linalg.norm(theirs, axis=-1, keepdims=True)
        across = ours - (ours * unit).sum(-1, keepdims=True) * unit
        sines.append(np.linalg.norm(across, axis=-1) / np.linalg.norm(ours, axis=-1))
    return np.max(sines, axis=0)


def feedback_control(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.1.3, footnote 2: what feedback that finds targets online comes to rest at."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, near_identity=0.2)
    products = _output_jacobians(nets)[1:-1]
    error = nets.target - nets.feedforward()[-1]
    joint = times(np.linalg.pinv(np.concatenate(products, axis=-1)), error)
    leaks = (1e-2, 1e-3, 1e-4)
    inverted = [_dynamic_inversion(seed, networks, leak) for leak in leaks]
    states = [_controlled(nets, products, leak) for leak in leaks]
    pushed = [relative(nets.errors(state)[:-1], np.split(joint, 2, axis=-1)) for state in states]
    leak = 0.5
    rest = linear_rest(nets.with_precisions(1.0, 1.0, 1 / leak))
    end = _controlled(nets, products, leak)
    number, exact = "A.1.3 feedback control", "Moore–Penrose inverses in NumPy"
    settings = {**nets.settings, "speed of the control": _SPEED}
    return (
        Evidence(number, "dynamic inversion, ẋ = −αx + Wᵀ(t − Wx) with a wide W, rests at the "
                 "target W⁺ t to O(α) (order)", order(leaks, inverted), "equal", 1.0, ORDER, exact,
                 {"networks": networks, "network": "5-3 linear", "sizes": list(leaks),
                  "errors": inverted}),
        Evidence(number, "leaky control, ẋ_l = −ε_l + P_lᵀ u below the output and u̇ ∝ T − x_L − "
                 "αu, rests at the x_l* of predictive coding with output precision 1/α, linear, "
                 "α = ½ (largest difference)", largest(end[1:-1], rest[1:-1]), "equal", 0.0, 1e-8,
                 "the flow by SciPy's expm against pcdyn's equilibrium", settings),
        Evidence(number, "as α → 0 the P_lᵀ u are the least changes of all layers together that "
                 "reach T, [P_1 … P_{L−1}]⁺ e_0, the Gauss–Newton step, to O(α) (order)",
                 order(leaks, pushed), "equal", 1.0, ORDER, exact,
                 {**settings, "sizes": list(leaks), "errors": pushed}),
        Evidence(number, "as the footnote reads, they are targets of target propagation: x_l at "
                 "α = 1e-4 against t_l (median relative difference)",
                 relative(states[-1][1:-1], nets.targets()[1:-1]), "equal", 0.0, UNEQUAL,
                 "t = W⁻¹ t in NumPy", settings, expected_to_hold=False),
    )  # fmt: skip


# Of the integrating feedback, in units of the activities'; at their own speed it can be unstable.
_SPEED = 0.02
# By when every flow below has come to rest, in activity time constants. The exponential is squared
# some 22 times for it, which makes round-off 2²² times as large.
_LONG = 1e6


def _controlled(nets: Networks, products: Layers, leak: float) -> Layers:
    """d and x_1 … x_L where the leaky control of linear networks has come to rest."""
    widths = nets.widths[1:]
    rows = np.cumsum([0, *widths, widths[-1]])
    places = [slice(a, b) for a, b in itertools.pairwise(rows)]
    *layers, control = places
    matrix, drive = (np.zeros((len(nets.input), rows[-1], n)) for n in (rows[-1], 1))
    for layer, place in enumerate(layers):
        matrix[:, place, place] = -np.eye(widths[layer])
        if layer:
            matrix[:, place, layers[layer - 1]] = nets.weights[layer]
        if layer < len(products):
            matrix[:, place, control] = transpose(products[layer])
    matrix[:, control, layers[-1]] = -_SPEED * np.eye(widths[-1])
    matrix[:, control, control] = -_SPEED * leak * np.eye(widths[-1])
    drive[:, layers[0], 0] = times(nets.weights[0], nets.input)
    drive[:, control, 0] = _SPEED * nets.target
    end = _flow_from_zero(matrix, drive[..., 0], _LONG)
    return [nets.input, *(end[:, place] for place in layers)]


def _dynamic_inversion(seed: int, networks: int, leak: float) -> float:
    """How far ẋ = −αx + Wᵀ(t − Wx) ends from W⁺ t, for a wide W (median relative difference)."""
    nets = draw(seed=seed, networks=networks, widths=(5, 3))
    weight = nets.weights[0]
    matrix = -leak * np.eye(5) - transpose(weight) @ weight
    end = _flow_from_zero(matrix, times(transpose(weight), nets.target), _LONG)
    return relative([end], [times(np.linalg.pinv(weight), nets.target)])


def _flow_from_zero(matrix: np.ndarray, drive: np.ndarray, t: float) -> np.ndarray:
    """y(t) of ẏ = M y + b from y = 0, by the exponential of both in one matrix."""
    both = np.concatenate([matrix, drive[..., None]], axis=-1)
    both = np.concatenate([both, np.zeros_like(both[:, :1])], axis=1)
    return expm(both * t)[:, :-1, -1]


STATEMENTS = (
    Statement(
        number="A.1.1, Eqs 20–21", title="Predictions from above: activities and parameters",
        says="ẋ_l = −ε_l + ε_{l+1} f'(W_l x_l) W_lᵀ and φ̇ = −ε_l ∂f(φ, x_l)/∂φ descend the F of "
        "x_l = f(W_l x_{l+1}).",
        as_printed="does not hold",
        form="ẋ_l = −ε_l + W_{l−1}ᵀ (f'(W_{l−1} x_l) ∘ ε_{l−1}) and φ̇_l = +ε_l ∂f(φ, x_{l+1})/∂φ. "
        "The printed ẋ_l descends no energy in either direction, and from above it leaves the data "
        "out; Eq 1 is the gradient flow of predictions from below.",
        measure=generative_direction,
    ),
    Statement(
        number="A.1.2, Eqs 22–24", title="The chain rule and its recursions",
        says="∂F/∂x is the product of the Jacobians, by δ_{n−1} = δ_n ∂f_n/∂f_{n−1} from δ_N = "
        "∂f_N/∂f_{N−1}; in networks δ_{l−1} = δ_l f'(W_l x_l) W_lᵀ.",
        as_printed="does not hold",
        form="The product is right. The recursion begins with the identity (or ∂ℒ/∂x_L), and the "
        "slope is that of the prediction: δ_{l−1} = W_lᵀ (f'(W_l x_{l−1}) ∘ δ_l).",
        measure=reverse_mode,
    ),
    Statement(
        number="A.1.3 Gauss–Newton", title="Target propagation as Gauss–Newton",
        says="With T = x_L + β ∂ℒ/∂x_L and small β, the targets are a stack of inverse Jacobians, "
        "which approximates Gauss–Newton optimization.",
        as_printed="holds with a condition",
        form="With T = x_L − β ∂ℒ/∂x_L (+ raises ℒ) and square invertible layers t_l − x̂_l is β "
        "times the Gauss–Newton step of layer l, to O(β), exactly in linear networks. Weight "
        "updates are so for one sample of a linear network only, and wide layers not at all.",
        measure=gauss_newton,
    ),
    Statement(
        number="A.1.3 feedback control", title="Targets found online by feedback",
        says="Footnote 2: local targets can also be computed online, by deep feedback control.",
        as_printed="holds with a condition",
        form="Dynamic inversion of one layer rests at its target W⁺ t, to O(α) in its leak α. "
        "Control of the output by all layers rests, in linear networks, at the equilibrium of "
        "predictive coding with output precision 1/α, and for α → 0 at the joint Gauss–Newton "
        "step, which is not the target of each layer.",
        measure=feedback_control,
    ),
)  # fmt: skip
