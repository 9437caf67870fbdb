"""Near the feedforward pass: Eq 4 layer by layer, the first update, and where inference starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pcdyn._support.types import State
from pcdyn.model.energies.energy import CrossEntropy, Energy, Gaussian
from pcdyn.model.energies.generalised import (
    CustomEnergy,
    Divisive,
    LogCosh,
    PseudoHuber,
    Student,
)
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.flows import settle
from pcdyn.theory.networks import (
    DELTAS,
    ORDER,
    SQUARE,
    UNEQUAL,
    Layers,
    Networks,
    draw,
    largest,
    order,
    times,
    transpose,
)
from pcdyn.theory.statement import Statement

SMALL = (1e-2, 1e-3, 1e-4)


def one_layer_identity(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 4: its two terms in one layer, and what is left of BP after several."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    found = settle(nets)
    errors, forward = nets.weighted_errors(found), nets.feedforward()
    remainders, changes = _remainders(nets, found), _slope_changes(nets, found)
    layers = range(1, nets.depth)
    backpropagated = [nets.pull(layer + 1, forward[layer], errors[layer]) for layer in layers]
    printed = [a + b for a, b in zip(backpropagated, remainders, strict=True)]
    shares = []
    for layer in layers:
        weight = np.linalg.norm(nets.weights[layer], 2, axis=(1, 2))
        bound = weight * _norm(errors[layer]) * np.abs(changes[layer - 1]).max(-1)
        shares.append(_norm(remainders[layer - 1]) / bound)
    sizes = []
    for size in SMALL:
        low = nets.with_precisions(1.0, 1.0, size)
        parts = np.concatenate(_remainders(low, settle(low)), axis=-1)
        sizes.append(float(np.median(_norm(parts))))
    curve = {"sizes": list(SMALL), "errors": sizes}
    oracle = "both terms in NumPy; equilibria to 1e-11"
    return (
        Evidence("Eq 4", "one layer: ε_l* = J̄ᵀ ε_{l+1}* + W_{l+1}ᵀ (ε_f ∘ ε_{l+1}*), J̄ the slope "
                 "of the prediction at x̄_l (largest residual)", largest(printed, errors[:-1]),
                 "equal", 0.0, 1e-10, oracle, nets.settings),
        Evidence("Eq 4", "its remainder is at most ‖W_{l+1}‖ ‖ε_{l+1}*‖ max|ε_f| (largest ratio)",
                 float(np.max(shares)), "at most", 1.0, 1e-12, "singular values in NumPy",
                 nets.settings),
        Evidence("Eq 4", "O(ε_{l+1} ε_f): with output precision λ both factors are O(λ), and the "
                 "remainder of one layer O(λ²) (order)", order(SMALL, sizes), "equal", 2.0, ORDER,
                 oracle, {**nets.settings, **curve}),
        *_over_layers(seed, max(networks, 50)),
    )  # fmt: skip


def _slope_changes(nets: Networks, found: Layers) -> Layers:
    """ε_f = f'(W_{l+1} x_l*) − f'(W_{l+1} x̄_l) for the hidden layers l."""
    return [
        nets.slope(layer + 1, found[layer]) - nets.slope(layer + 1, forward)
        for layer, forward in enumerate(nets.feedforward()[1:-1], start=1)
    ]


def _remainders(nets: Networks, found: Layers) -> Layers:
    """W_{l+1}ᵀ (ε_f ∘ ε_{l+1}*) of the hidden layers l."""
    errors = nets.weighted_errors(found)
    return [
        times(transpose(nets.weights[layer]), change * errors[layer])
        for layer, change in enumerate(_slope_changes(nets, found), start=1)
    ]


def _over_layers(seed: int, networks: int) -> tuple[Evidence, ...]:
    """How the difference from BP grows with the number of layers, at output precision 1e-3.

    Weights are orthogonal, so that no difference is owed to credit that shrinks or grows.
    """
    precision, width, depths = 1e-3, 10, (4, 8, 16, 32)
    differences, owed, residual = [], [], 0.0
    for depth in depths:
        nets = draw(seed=seed, networks=networks, widths=(width,) * (depth + 1), activation="tanh")
        weights = tuple(np.linalg.qr(weight)[0] for weight in nets.weights)
        nets = dataclasses.replace(nets, weights=weights)
        nets = nets.with_precisions(*[1.0] * (depth - 1), precision)
        found = _rest_by_recursion(nets)
        errors, deltas = nets.weighted_errors(found), nets.deltas()
        residual = max(residual, *(float(np.abs(s).max()) for s in nets.gradient(found)[1:-1]))
        carried = output = errors[-1] - deltas[-1]
        forward, remainders = nets.feedforward(), _remainders(nets, found)
        for layer in range(depth - 1, 0, -1):
            carried = nets.pull(layer + 1, forward[layer], carried) + remainders[layer - 1]
            output = nets.pull(layer + 1, forward[layer], output)
        difference = errors[0] - deltas[0]
        residual = max(residual, float(np.abs(difference - carried).max()))
        differences.append(float(np.median(_norm(difference) / _norm(deltas[0]))))
        owed.append(float(np.median(_norm(output) / _norm(difference))))
    settings = {"networks": networks, "network": f"{width} wide, tanh, orthogonal W",
                "depths": depths, "λ": precision}  # fmt: skip
    curve = {"sizes": list(depths), "errors": differences}
    return (
        Evidence("Eq 4", "several layers: ε_1* − δ_1 is the sum of the remainders of the layers "
                 "above and of ε_L* − δ_L, each carried down by J̄ᵀ (largest residual)",
                 residual, "equal", 0.0, 1e-12, "equilibria by the recursion in NumPy", settings),
        Evidence("Eq 4", "their sum grows in proportion to the number of layers: ‖ε_1* − δ_1‖ / "
                 "‖δ_1‖ over depths 4 … 32 (order)", order(depths, differences), "equal", 1.0, 0.3,
                 DELTAS, {**settings, **curve}),
        Evidence("Eq 4", "as printed, the difference from BP is O(ε_{l+1} ε_f) alone: share of it "
                 "at depth 32 that ε_L* − δ_L carries down (median)", owed[-1], "equal", 0.0,
                 UNEQUAL, DELTAS, settings, expected_to_hold=False),
    )  # fmt: skip


def _rest_by_recursion(nets: Networks) -> Layers:
    """x_0* … x_L* for a small output precision λ and others of 1, where this map contracts as λ."""
    errors = [np.zeros_like(x) for x in nets.feedforward()[1:]]
    found = nets.start()
    for _ in range(25):
        found = [nets.input]
        for layer in range(1, nets.depth):
            found.append(nets.predict(layer, found[-1]) + errors[layer - 1])
        error = nets.target - nets.predict(nets.depth, found[-1])
        errors = [times(nets.precisions[-1], error)]
        for layer in range(nets.depth, 1, -1):
            errors.insert(0, nets.pull(layer, found[layer - 1], errors[0]))
        found.append(nets.target)
    return found


def _norm(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors, axis=-1)


_SHIFTED = "√(1 + (ε − ½)²)"
# h' of each energy; that of the last is not zero at ε = 0.
_SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Gaussian": lambda e: e,
    "Gaussian, Π_l numbers": lambda e: e,
    "Gaussian, Π_l matrices": lambda e: e,
    "Gaussian below cross-entropy": lambda e: e,
    "log cosh": np.tanh,
    "pseudo-Huber": lambda e: e / np.sqrt(1 + e**2),
    "Student": lambda e: 2 * e / (1 + e**2),
    "divisive": lambda e: e / (1 + e**2),
    _SHIFTED: lambda e: (e - 0.5) / np.sqrt(1 + (e - 0.5) ** 2),
}
_LINEAR = ("Gaussian", "Gaussian, Π_l numbers", "Gaussian below cross-entropy")
_CURVED = ("log cosh", "pseudo-Huber", "Student", "divisive")


def first_update_of_energies(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.7: whether the first update of any energy F = ℒ + Ẽ is BP, in activities and weights."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", std=0.5)
    full = draw(seed=seed, networks=networks, widths=SQUARE, full_precisions=True).precisions
    # Targets that cross-entropy takes too.
    classes = np.eye(3)[np.random.default_rng(seed + 1).integers(3, size=networks)]
    nets = dataclasses.replace(nets, target=classes)
    fields = jax.tree.map(np.asarray, _first_fields((nets.weights, full, nets.input, classes)))
    steps, missed, turned = (1e-1, 3e-2, 1e-2), {}, {}
    for name in _SLOPES:
        case = nets.with_precisions(0.5, 2.0, 3.0) if "numbers" in name else nets
        if "matrices" in name:
            case = dataclasses.replace(nets, precisions=full)
        deltas, forward = [_slopes(case, name, case.start())[-1]], case.feedforward()
        for layer in range(case.depth, 1, -1):
            deltas.insert(0, case.pull(layer, forward[layer - 1], deltas[0]))
        bp = [*(np.zeros_like(x) for x in forward[1:-2]), deltas[-2]]
        missed[name] = largest(fields[name], bp) / float(np.abs(deltas[-2]).max())
        turned[name] = [_sines(_first_credits(case, name, step), deltas) for step in steps]
    named = ", ".join(name for name in _SLOPES if name != _SHIFTED)
    medians = {name: np.median(turned[name], axis=1).tolist() for name in _CURVED}
    settings, oracle = nets.settings, "BP with h' written out in NumPy"
    weights = "what a layer's weights first learn from is a multiple of δ_l"
    return (
        Evidence("A.7 first update", f"{named}: at the feedforward pass ẋ = −∂ℒ/∂x (largest "
                 "difference over largest value)",
                 max(missed[name] for name in _SLOPES if name != _SHIFTED), "equal", 0.0, 1e-12,
                 oracle, settings),
        Evidence("A.7 first update", f"as printed, for any energy: the same for h = {_SHIFTED}, "
                 "h'(0) ≠ 0", missed[_SHIFTED], "equal", 0.0, 1e-12, oracle, settings,
                 expected_to_hold=False),
        Evidence("A.7 first update", f"{', '.join(_LINEAR)}: {weights}, at Euler steps of .1 "
                 "(largest sine of the angle)",
                 max(float(turned[name][0].max()) for name in _LINEAR), "equal", 0.0, 1e-9,
                 oracle, settings),
        Evidence("A.7 first update", f"as printed, for any energy: Gaussian, Π_l matrices: "
                 f"{weights} (median sine)", float(np.median(turned["Gaussian, Π_l matrices"])),
                 "equal", 0.0, UNEQUAL, oracle, settings, expected_to_hold=False),
        Evidence("A.7 first update", f"as printed, for any energy: {', '.join(_CURVED)}: "
                 f"{weights}, exactly, at Euler steps of .1 (least median sine)",
                 min(medians[name][0] for name in _CURVED), "equal", 0.0, 1e-9, oracle, settings,
                 expected_to_hold=False),
        *(
            Evidence("A.7 first update", f"{name}: it turns to δ_l as the square of the Euler step "
                     "(order)", order(steps, medians[name]), "equal", 2.0, ORDER, oracle,
                     {**settings, "sizes": list(steps), "errors": medians[name]})
            for name in _CURVED
        ),
    )  # fmt: skip


@jax.jit
def _first_fields(data: PyTree) -> dict[str, State]:
    """pcdyn's ẋ at the feedforward pass of each network and energy."""

    def one(data: PyTree) -> dict[str, State]:
        weights, full, input, target = data
        network = Network([Dense(weight, activation="tanh") for weight in weights])
        energies: dict[str, Energy | list[Energy]] = {
            "Gaussian": Gaussian(),
            "Gaussian, Π_l numbers": [Gaussian(p) for p in (0.5, 2.0, 3.0)],
            "Gaussian, Π_l matrices": [Gaussian(p) for p in full],
            "Gaussian below cross-entropy": [Gaussian(), Gaussian(), CrossEntropy()],
            "log cosh": LogCosh(),
            "pseudo-Huber": PseudoHuber(),
            "Student": Student(),
            "divisive": Divisive(),
            _SHIFTED: CustomEnergy(_shifted),
        }
        fields = {}
        for name, energy in energies.items():
            problem = InferenceProblem(network, input=input, output=target, energy=energy)
            fields[name] = problem.vector_field(0.0, problem.feedforward_state())
        return fields

    return jax.vmap(one)(data)


def _shifted(error: Array) -> Array:
    return jnp.sqrt(1 + (error - 0.5) ** 2)


def _slopes(nets: Networks, name: str, activities: Layers) -> Layers:
    """Π_l h'(ε_l) of each layer; of a cross-entropy −∂ℒ/∂μ_L."""
    errors = nets.errors(activities)
    if "cross-entropy" in name:
        scores = np.exp(nets.predict(nets.depth, activities[-2]))
        errors[-1] = activities[-1] - scores / scores.sum(-1, keepdims=True)
    pairs = zip(nets.precisions, errors, strict=True)
    return [times(precision, _SLOPES[name](error)) for precision, error in pairs]


def _first_credits(nets: Networks, name: str, step: float) -> Layers:
    """Π_l h'(ε_l) of each layer when it first moved, of Euler steps from the feedforward pass."""
    activities, credits = nets.start(), []
    for moving in range(nets.depth, 0, -1):
        slopes = _slopes(nets, name, activities)
        credits.insert(0, slopes[moving - 1])
        for layer in range(1, nets.depth):
            pulled = nets.pull(layer + 1, activities[layer], slopes[layer])
            activities[layer] = activities[layer] + step * (pulled - slopes[layer - 1])
    return credits


def _sines(credits: Layers, deltas: Layers) -> np.ndarray:
    """The sine of the angle between credit and δ_l, the largest of the layers of each network."""
    sines = []
    for credit, delta in zip(credits, deltas, strict=True):
        unit = delta / _norm(delta)[:, None]
        across = credit - (credit * unit).sum(-1, keepdims=True) * unit
        sines.append(_norm(across) / _norm(credit))
    return np.max(sines, axis=0)


def other_starts(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.7: what inference that starts at random activities does, and what the start decides."""
    count = max(networks, 500)
    nets = draw(seed=seed, networks=count, widths=(5, 5, 5, 5), activation="tanh")
    feedforward, rng = nets.start(), np.random.default_rng(seed + 1)
    hidden = [rng.normal(size=x.shape) for x in feedforward[1:-1]]
    starts = {"feedforward": feedforward, "random": [nets.input, *hidden, nets.target]}
    # tanh has slopes of at most 1, so that no eigenvalue of ∂²F/∂x² is much above the linear one.
    step = 1 / float(np.linalg.eigvalsh(nets.linear_flow()[0]).max())
    early, late, ends = {}, {}, {}
    for name, start in starts.items():
        early[name] = _descended(nets, start, 1.0, step)
        late[name] = _descended(nets, early[name], 9.0, step)
        ends[name] = _descended(nets, late[name], 90.0, step)
    apart = [a - b for a, b in zip(ends["random"], ends["feedforward"], strict=True)]
    same = np.abs(np.concatenate(apart, axis=-1)).max(-1) < 1e-3
    wrong = {name: float(np.mean(_margin(nets, start) <= 0)) for name, start in starts.items()}
    loss = [nets.layer_energies(x)[:, -1] for x in (starts["random"], ends["random"])]
    higher = float(np.mean(loss[1] > loss[0]))
    learned = _update(nets, ends["feedforward"])
    cosines = {
        (name, t): float(np.median(_cosine(_update(nets, x), learned)))
        for t, states in ((1, early), (10, late))
        for name, x in states.items()
    }

    def spread(share: float) -> dict[str, object]:
        """A share of so many networks has this standard error."""
        error = (share * (1 - share) / count) ** 0.5
        return {**nets.settings, "start": "N(0, 1)", "standard error": error}

    settings = {**nets.settings, "start": "N(0, 1)"}
    oracle = "∂ℒ/∂x, ∂Ẽ/∂x and Euler's flow in NumPy"
    return (
        Evidence("A.7 start", "share of networks in which the energy gradient bound does not hold "
                 "at the feedforward pass", wrong["feedforward"], "equal", 0.0, 0.0, oracle,
                 settings),
        Evidence("A.7 start", "as explained, random activities are on the other side of the bound: "
                 "share of networks in which they are, half of them at least", wrong["random"],
                 "at least", 0.5, 0.0, oracle, spread(wrong["random"]), expected_to_hold=False),
        Evidence("A.7 start", "as explained, ℒ then increases during inference: share of networks "
                 "in which it ends above its start, half of them at least", higher, "at least",
                 0.5, 0.0, oracle, spread(higher), expected_to_hold=False),
        Evidence("A.7 start", "inference from random activities ends where that from the "
                 "feedforward pass does: share of networks, to 1e-3", float(np.mean(same)),
                 "at least", 0.97, 0.0, oracle, spread(float(np.mean(same)))),
        Evidence("A.7 start", "what the start decides is how far inference is after one time "
                 "constant: median cosine to the weight update of the end, from the feedforward "
                 "pass, less that from random activities", cosines["feedforward", 1] -
                 cosines["random", 1], "above", 0.1, 0.0, oracle, {**settings, "t": 1}),
        Evidence("A.7 start", "after ten it is the same: median cosine to the weight update of the "
                 "end, from random activities", cosines["random", 10], "at least", 0.999, 0.0,
                 oracle, {**settings, "t": 10}),
    )  # fmt: skip


def _descended(nets: Networks, start: Layers, t: float, step: float) -> Layers:
    """The activities after Euler steps of about `step` over the time t."""
    activities, count = list(start), int(np.ceil(t / step))
    for _ in range(count):
        slopes = nets.gradient(activities)[1:-1]
        moved = [x - t / count * s for x, s in zip(activities[1:-1], slopes, strict=True)]
        activities[1:-1] = moved
    return activities


def _margin(nets: Networks, activities: Layers) -> np.ndarray:
    """g·(g + ∂Ẽ/∂x_{L−1}), g = ∂ℒ/∂x_{L−1}: positive where the energy gradient bound holds."""
    error = nets.weighted_errors(activities)[-1]
    loss = -nets.pull(nets.depth, activities[-2], error)
    return (loss * nets.gradient(activities)[-2]).sum(-1)


def _update(nets: Networks, activities: Layers) -> np.ndarray:
    return -nets.weight_gradient(activities, nets.weighted_errors(activities))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / (_norm(a) * _norm(b))


STATEMENTS = (
    Statement(
        number="Eq 4", title="What one layer adds to the difference from BP",
        says="ε_l* is ε_{l+1} ∂f(W_{l+1} x̄_l)/∂x̄_l, which is BP, plus O(ε_{l+1} ε_f), with "
        "ε_f = f'(W x*) − f'(W x̄).",
        as_printed="holds with a condition",
        form="The identity is exact in one layer, but its first term has ε_{l+1}* for BP's "
        "δ_{l+1}. Over several, ε_l* − δ_l is the sum of the remainders above and of ε_L* − δ_L, "
        "each carried down: with output precision λ it is of relative order λL.",
        measure=one_layer_identity,
    ),
    Statement(
        number="A.7 first update", title="The first update of any energy",
        says="From the feedforward pass the first update of any energy F = ℒ + Ẽ, in activities "
        "and in weights, is exactly BP's.",
        as_printed="holds with a condition",
        form="Activities first move along −∂ℒ/∂x wherever h'(0) = 0. Weights first learn from a "
        "multiple of BP's δ_l where h is ½ε² with a number as precision of each layer; from one up "
        "to the square of the step where h is another even function; not with a matrix Π_l.",
        measure=first_update_of_energies,
    ),
    Statement(
        number="A.7 start", title="Whether inference must start at the feedforward pass",
        says="Networks perform poorly without that start, because random activities can be on the "
        "other side of the energy gradient bound, where inference increases ℒ.",
        as_printed="does not hold",
        form="Standard normal activities are on that side in 3 % of 5-5-5-5 tanh networks, and ℒ "
        "ends higher in as many. Inference ends at the same equilibrium; what the start saves is "
        "time, some time constants of it.",
        measure=other_starts,
    ),
)  # fmt: skip
