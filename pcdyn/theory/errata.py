"""Equations that do not hold as printed: both forms and both numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.linalg import expm

from pcdyn.theory.evidence import Evidence
from pcdyn.theory.flows import linear_rest, vector_field
from pcdyn.theory.networks import (
    SQUARE,
    Layers,
    Networks,
    draw,
    largest,
    largest_relative,
    reachable,
    solve,
    times,
    transpose,
)
from pcdyn.theory.statement import Statement


def sign_of_the_flow(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 6, 30, 33: as printed activities leave the equilibrium, with the sign corrected they
    reach it."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, full_precisions=True)
    matrix, _ = nets.linear_flow()
    rest = nets.stack(linear_rest(nets))
    # At t = 20 what grows would come near the largest number, and infinity confirms nothing.
    t, earlier = 20.0, 2.0
    away = nets.stack(nets.start()) - rest
    ends = [np.linalg.norm(times(expm(matrix * s), away), axis=-1) for s in (-t, earlier)]
    least = float(np.linalg.eigvalsh(matrix).min())
    left = [float((end / np.linalg.norm(away, axis=-1)).max()) for end in ends]
    state = nets.start()
    state[1:-1] = [x + 0.1 for x in state[1:-1]]
    ours, printed = vector_field(nets, state), nets.gradient(state)[1:-1]
    oracle = "SciPy's expm of the stacked system"
    settings = {**nets.settings, "t": t}
    return (
        Evidence("Eqs 6, 30, 33", "corrected, ẋ_l = −Π_l ε_l + W_{l+1}ᵀ Π_{l+1} ε_{l+1}: "
                 "distance to the equilibrium at t = 20 over that at the start", left[0],
                 "at most", 0.0, float(np.exp(-least * t)), oracle, settings),
        Evidence("Eqs 6, 30, 33", "as printed, with the opposite sign: the same at t = 2", left[1],
                 "at most", 0.0, 1.0, oracle, {**settings, "t": earlier}, expected_to_hold=False),
        Evidence("Eqs 6, 30, 33", "the flow is minus what is printed (largest difference)",
                 largest([-f for f in ours], printed), "equal", 0.0, 1e-13,
                 "Eq 6 as printed in NumPy", nets.settings),
    )  # fmt: skip


def sign_of_learning(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 2 and 21: +ε f' xᵀ descends F, −ε f' xᵀ ascends it; so does W + η ∂ℒ/∂W for ℒ."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh")
    rng = np.random.default_rng(seed + 1)
    state = [x + rng.normal(size=x.shape) for x in nets.start()]
    gradient = nets.weight_gradient(state, nets.weighted_errors(state))
    moved, step = {}, 1e-6
    for sign in (1, -1):
        parts = np.split(sign * step * gradient, 3, axis=-1)
        pairs = zip(nets.weights, parts, strict=True)
        there = dataclasses.replace(
            nets, weights=tuple(w + part.reshape(w.shape) for w, part in pairs)
        )
        rise = (there.free_energy(state) - nets.free_energy(state)) / step
        moved[sign] = float((rise / (gradient**2).sum(-1)).max())
    oracle = "forward differences of F in NumPy, step 1e-6"
    return (
        Evidence("Eq 21", "Eq 2's sign, Ẇ = +ε f' xᵀ: dF/dt over −‖∂F/∂W‖²", -moved[-1], "equal",
                 1.0, 1e-3, oracle, nets.settings),
        Evidence("Eq 21", "as printed, Ẇ = −ε f' xᵀ (and W + η ∂ℒ/∂W in A.1.2): dF/dt over "
                 "−‖∂F/∂W‖²", -moved[1], "equal", 1.0, 1e-3, oracle, nets.settings,
                 expected_to_hold=False),
    )  # fmt: skip


def missing_plus(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 34: its lines at the equilibrium, and what is printed where a plus is missing."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, full_precisions=True)
    found, lines = linear_rest(nets), []
    for layer in range(1, nets.depth):
        forward, feedback, own = _terms_of_rest(nets, found, layer)
        inverse = np.linalg.inv(nets.precisions[layer - 1])
        weight = nets.weights[layer]
        back = inverse @ transpose(weight) @ nets.precisions[layer]
        factor = np.eye(nets.widths[layer]) + back @ weight
        below, above = (times(inverse, term) for term in (forward, feedback))
        error = times(nets.precisions[layer - 1], found[layer]) - forward
        lines += [error - feedback + own, times(inverse, error - feedback + own),
                  times(factor, found[layer]) - below - above,
                  found[layer] - solve(factor, below + above)]  # fmt: skip
    # Where each layer has one unit a product of two terms is one, too.
    units = draw(seed=seed, networks=networks, widths=(1, 1, 1, 1))
    rest, products = units.rest(), []
    for layer in range(1, units.depth):
        forward, feedback, own = _terms_of_rest(units, rest, layer)
        products.append(rest[layer] - forward - feedback * own)
    return (
        Evidence("A.5.1, Eq 34", "corrected, … − W_lᵀ Π_{l+1} μ_{l+1} + W_lᵀ Π_{l+1} W_l μ_l = 0: "
                 "lines 2 to 5 at the equilibrium (largest residual)",
                 max(float(np.abs(line).max()) for line in lines), "equal", 0.0, 1e-11,
                 "the lines in NumPy at pcdyn's equilibrium", nets.settings),
        Evidence("A.5.1, Eq 34", "as printed, the product … − W_lᵀ Π_{l+1} μ_{l+1} W_lᵀ Π_{l+1} "
                 "W_l μ_l = 0: line 2 at the equilibrium of layers of one unit, where it exists "
                 "(median residual)", float(np.median(np.abs(products))), "equal", 0.0, 1e-6,
                 "dense equilibrium in NumPy", units.settings, expected_to_hold=False),
    )  # fmt: skip


def _terms_of_rest(nets: Networks, found: Layers, layer: int) -> tuple[np.ndarray, ...]:
    """Π_l W_l x_{l−1}, W_{l+1}ᵀ Π_{l+1} x_{l+1} and W_{l+1}ᵀ Π_{l+1} W_{l+1} x_l of linear ones."""
    back = transpose(nets.weights[layer]) @ nets.precisions[layer]
    forward = times(nets.precisions[layer - 1], nets.predict(layer, found[layer - 1]))
    return forward, times(back, found[layer + 1]), times(back @ nets.weights[layer], found[layer])


def order_of_inverses(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eqs 3 and 25: the target of x = f(W x_{l−1}) is W⁻¹ f⁻¹(t), not f⁻¹(W⁻¹ t)."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", near_identity=0.1)
    nets = reachable(nets)
    weight = nets.weights[-1]
    corrected = solve(weight, np.arctanh(nets.target))
    # Kept inside the domain of f⁻¹, where the printed form has a value at all.
    printed = np.arctanh(np.clip(solve(weight, nets.target), -0.999, 0.999))
    oracle = "tanh(W t) against the target, in NumPy"
    rows = []
    for text, form, holds in (("Eq 3, W⁻¹ f⁻¹(t)", corrected, True),
                              ("as printed in Eq 25, f⁻¹(W⁻¹ t)", printed, False)):  # fmt: skip
        reached = np.tanh(times(weight, form))
        rows.append(
            Evidence("Eq 25", f"{text}: the layer maps it to the target (largest relative error)",
                     largest_relative([reached], [nets.target]), "equal", 0.0, 1e-12, oracle,
                     nets.settings, expected_to_hold=holds)
        )  # fmt: skip
    return tuple(rows)


def inverse_update(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 26: the update of the learned inverse, with both signs."""
    nets = draw(seed=seed, networks=networks, widths=(3, 3), near_identity=0.2)
    weight = nets.weights[0]
    samples = np.random.default_rng(seed + 1).normal(size=(networks, 3, 50))
    outputs = weight @ samples
    start = transpose(weight)
    covariance = outputs @ transpose(outputs) / 50
    cross = samples @ transpose(outputs) / 50
    least = np.linalg.solve(covariance, transpose(cross))
    rows, t = [], 10.0
    for text, sign, source in (("corrected, +ẽ (W x)ᵀ", -1, outputs),
                               ("as printed, −ẽ xᵀ", 1, samples)):  # fmt: skip
        moment = outputs @ transpose(source) / 50
        drive = samples @ transpose(source) / 50
        rest = transpose(np.linalg.solve(transpose(moment), transpose(drive)))
        inverse = rest + (start - rest) @ expm(sign * moment * t)
        error = np.linalg.norm(samples - inverse @ outputs, axis=(1, 2))
        before = np.linalg.norm(samples - start @ outputs, axis=(1, 2))
        rows.append(
            Evidence("Eq 26", f"{text}: reconstruction error at t = 10 over that at the start "
                     "(largest)", float((error / before).max()), "at most", 0.0, 1.0,
                     "SciPy's expm of the linear flow of the inverse", {**nets.settings, "t": t},
                     expected_to_hold=sign < 0)
        )  # fmt: skip
    rows.append(
        Evidence("Eq 26", "where +ẽ (W x)ᵀ rests is W⁻¹ (largest difference)",
                 float(np.abs(transpose(least) - np.linalg.inv(weight)).max()), "equal", 0.0,
                 1e-11, "inverse by NumPy", nets.settings)
    )  # fmt: skip
    return tuple(rows)


STATEMENTS = (
    Statement(
        number="Eqs 6, 30, 33", title="Sign of the precision-weighted flow",
        says="ẋ_l = Π_l ε_l − W_{l+1}ᵀ (f' ∘ Π_{l+1} ε_{l+1}).",
        as_printed="does not hold",
        form="The opposite sign, as in Eq 1: ẋ_l = −Π_l ε_l + W_{l+1}ᵀ (f' ∘ Π_{l+1} ε_{l+1}).",
        measure=sign_of_the_flow,
    ),
    Statement(
        number="A.5.1, Eq 34", title="Proof of the equilibrium with precisions",
        says="… − W_lᵀ Π_{l+1} μ_{l+1} W_lᵀ Π_{l+1} W_l μ_l = 0 is solved by Theorem 3.5.",
        as_printed="does not hold",
        form="A plus is missing in lines 2 and 3: … − W_lᵀ Π_{l+1} μ_{l+1} + W_lᵀ Π_{l+1} W_l μ_l "
        "= 0; lines 4 and 5 are right. What is W_l there is W_{l+1} elsewhere.",
        measure=missing_plus,
    ),
    Statement(
        number="Eq 21", also="Eq 2", title="Sign of learning",
        says="Ẇ_l = −ε_l f' xᵀ.",
        as_printed="does not hold",
        form="Ẇ_l = +ε_l f' xᵀ, as in Eq 2; and W − η ∂ℒ/∂W for BP in A.1.2.",
        measure=sign_of_learning,
    ),
    Statement(
        number="Eq 25", definitions="Eq 3", title="Order of the inverses of target propagation",
        says="T_l = f⁻¹(W_l⁻¹ T_{l+1}).",
        as_printed="does not hold",
        form="t_l = W_{l+1}⁻¹ f⁻¹(t_{l+1}), as in Eq 3, where predictions are f(W x).",
        measure=order_of_inverses,
    ),
    Statement(
        number="Eq 26", title="Learned inverses",
        says="The inverse weights follow −ẽ xᵀ, ẽ = x − W̃ W x.",
        as_printed="does not hold",
        form="+ẽ (W x)ᵀ descends ½ ‖ẽ‖² and rests at W⁻¹.",
        measure=inverse_update,
    ),
)  # fmt: skip
