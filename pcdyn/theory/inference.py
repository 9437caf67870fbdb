"""Where inference ends and how it gets there: Theorems 3.1, 3.3, 3.4, 3.5, A.3, A.4, A.5."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Array
from scipy.linalg import expm

from pcdyn._support.types import Activities, State
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import exact_flow, hessian, linear_equilibrium, single_layer_flow
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.flows import flow, integrate, linear_rest, vector_field
from pcdyn.theory.networks import (
    SQUARE,
    Layers,
    Networks,
    central_differences,
    draw,
    largest,
    on_each,
    reachable,
    relative,
    solve,
    times,
    transpose,
)
from pcdyn.theory.statement import Statement

EPS = float(np.finfo(np.float64).eps)
MIXED = (4, 5, 4, 3)
# A flow integrated to 1e-10 over a hundred time constants, with a margin of a hundred.
FLOW = 1e-8


def vector_field_is_gradient(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 1: the flow against finite differences of F, with the ½ and as printed."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh")
    rng = np.random.default_rng(seed + 1)
    activities = [x + rng.normal(size=x.shape) for x in nets.start()]
    activities[0], activities[-1] = nets.input, nets.target
    field = vector_field(nets, activities)
    rises = central_differences(
        lambda hidden: nets.free_energy([nets.input, *hidden, nets.target]), activities[1:-1]
    )
    slopes = [-rise for rise in rises]
    ours, theirs = (np.concatenate(x, -1) for x in (field, slopes))
    ratio = float((2 * ours * theirs).sum() / (ours * ours).sum())
    oracle = "central differences of F written out in NumPy, step 1e-5"
    return (
        Evidence("Eq 1", "the flow is −∂F/∂x of F = Σ ½ε² (largest difference)",
                 largest(field, slopes), "equal", 0.0, 1e-8, oracle, nets.settings),
        Evidence("Eq 1", "as printed, F = Σ ε²: −∂F/∂x over the right side of Eq 1",
                 ratio, "equal", 1.0, 1e-6, oracle, nets.settings, expected_to_hold=False),
    )  # fmt: skip


def feedforward_equilibrium(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Theorem 3.1: with the output free, the flow from anywhere ends at the feedforward pass."""
    rows = []
    for activation in ("tanh", "identity"):
        nets = draw(seed=seed, networks=networks, widths=SQUARE, activation=activation)
        nets = dataclasses.replace(nets, weights=tuple(0.5 * w for w in nets.weights))
        rng = np.random.default_rng(seed + 1)
        start = [nets.input, *(2 * rng.normal(size=(networks, n)) for n in nets.widths[1:])]
        (end,) = flow(nets, start, [120.0], clamp="input")
        rows.append(
            Evidence("Theorem 3.1", f"{nets.settings['network']}, output free: the flow from "
                     "random activities ends at the feedforward pass (largest difference)",
                     largest(end, nets.feedforward()), "equal", 0.0, FLOW,
                     "feedforward recursion in NumPy", {**nets.settings, "t1": 120.0})
        )  # fmt: skip
    return tuple(rows)


def target_propagation_equilibrium(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Theorem 3.3: with the input free, the flow ends at the targets, where these exist."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, activation="tanh", near_identity=0.05)
    nets = reachable(nets, scale=0.3)
    targets = nets.targets()
    slopes = (nets.slope(layer, targets[layer - 1]) for layer in range(1, nets.depth + 1))
    linear = tuple(s[..., None] * w for s, w in zip(slopes, nets.weights, strict=True))
    near = dataclasses.replace(nets, weights=linear, activation="identity")
    # After 25 of the slowest time constants e^{−25} = 1e-11 is left.
    t1 = 25 / float(np.linalg.eigvalsh(near.linear_flow(0)[0]).min())
    start = [np.zeros_like(x) for x in nets.start()]
    start[-1] = nets.target
    states = flow(nets, start, [5.0, 20.0, t1], clamp="output")
    energies = np.stack([nets.free_energy(x) for x in (start, *states)])
    share = _share_of_reachable(seed)
    return (
        Evidence("Theorem 3.3", "input free, targets in the range of tanh: the flow ends at the "
                 "targets t_0 … t_L (largest difference)", largest(states[-1], targets),
                 "equal", 0.0, FLOW, "t = W⁻¹ f⁻¹(t) by NumPy", {**nets.settings, "t1": t1}),
        Evidence("Theorem 3.3", "F never rises on the way (largest rise)",
                 float(np.diff(energies, axis=0).max()), "at most", 0.0, 1e-12,
                 "F written out in NumPy", nets.settings),
        Evidence("Theorem 3.3", "as printed, for any target: share of Gaussian targets that exist "
                 "for tanh", share, "equal", 1.0, 0.0, "t = W⁻¹ f⁻¹(t) by NumPy",
                 {"networks": 2000, "network": "5-5-5 tanh", "weights": "I + N(0, .2²)"},
                 expected_to_hold=False),
    )  # fmt: skip


def _share_of_reachable(seed: int) -> float:
    """Of standard normal targets of 5-5-5 tanh networks, for which t_1 exists."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(2000, 5))
    weight = np.eye(5) + 0.2 * rng.normal(size=(2000, 5, 5))
    with np.errstate(invalid="ignore"):
        below = solve(weight, np.arctanh(target))
    return float((np.abs(below) < 1).all(-1).mean())


def linear_equilibria(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Theorem 3.4: the equilibrium of linear networks, and the equation of each layer."""
    nets = draw(seed=seed, networks=networks, widths=MIXED)
    return _linear("Theorem 3.4", nets)


def precision_equilibria(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Theorem 3.5: the same with full SPD precisions; and in output space."""
    nets = draw(seed=seed, networks=networks, widths=MIXED, full_precisions=True)
    return (*_linear("Theorem 3.5", nets), *_output_space(nets))


def _linear(number: str, nets: Networks) -> tuple[Evidence, ...]:
    found = linear_rest(nets)
    matrix, _ = nets.linear_flow()
    tolerance = 1e2 * EPS * float(np.linalg.cond(matrix).max()) * max(map(_size, found))
    residuals = []
    for layer in range(1, nets.depth):
        weight, precision = nets.weights[layer], nets.precisions
        back = np.linalg.inv(precision[layer - 1]) @ transpose(weight) @ precision[layer]
        drive = times(nets.weights[layer - 1], found[layer - 1]) + times(back, found[layer + 1])
        equation = np.eye(nets.widths[layer]) + back @ weight
        residuals.append(found[layer] - solve(equation, drive))
    return (
        Evidence(number, "the equilibrium of the whole network (largest difference)",
                 largest(found, nets.rest()), "equal", 0.0, tolerance,
                 "dense solve of the stacked system in NumPy", nets.settings),
        Evidence(number, "the printed equation of each hidden layer at the equilibrium of its "
                 "neighbours (largest residual)", max(map(_size, residuals)), "equal", 0.0,
                 tolerance, "the printed equation in NumPy", nets.settings),
    )  # fmt: skip


def _output_space(nets: Networks) -> tuple[Evidence, ...]:
    """Π_l ε_l* = P_lᵀ S⁻¹ e_0 and F* = ½ e_0ᵀ S⁻¹ e_0."""
    found = list(on_each(_by_output_space, nets))
    products = [np.broadcast_to(np.eye(nets.widths[-1]), nets.precisions[-1].shape)]
    for weight in nets.weights[:0:-1]:
        products.insert(0, products[0] @ weight)
    pairs = list(zip(products, nets.precisions, strict=True))
    s_matrix = sum(p @ np.linalg.inv(precision) @ transpose(p) for p, precision in pairs)
    error = nets.target - nets.feedforward()[-1]
    filtered = solve(np.asarray(s_matrix), error)
    weighted = [times(transpose(p), filtered) for p in products]
    energy = 0.5 * (error * filtered).sum(-1)
    matrix, _ = nets.linear_flow()
    tolerance = 1e2 * EPS * float(np.linalg.cond(matrix).max()) * max(map(_size, found))
    rest = nets.rest()
    return (
        Evidence("Theorem 3.5", "all layers at once, Π_l ε_l* = P_lᵀ S⁻¹ e_0 with S = Σ P_l Π_l⁻¹ "
                 "P_lᵀ (largest difference)", largest(nets.weighted_errors(found), weighted),
                 "equal", 0.0, 10 * tolerance, "S of NumPy's products and inverses",
                 nets.settings),
        Evidence("Theorem 3.5", "F* = ½ e_0ᵀ S⁻¹ e_0 (largest difference)",
                 _size(nets.free_energy(rest) - energy), "equal", 0.0, 10 * tolerance,
                 "F at the dense solution in NumPy", nets.settings),
    )  # fmt: skip


def _by_output_space(problem: InferenceProblem) -> Activities:
    return linear_equilibrium(problem, method="output_space")


def convexity(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.3: the Hessian of the whole network."""
    nets = draw(seed=seed, networks=networks, widths=MIXED)
    ours, theirs = on_each(_dense_hessian, nets), nets.linear_flow()[0]
    values = np.linalg.eigvalsh(ours)
    round_off = 1e2 * EPS * float(values.max())
    return (
        Evidence("A.3", "F is strictly convex in all layers together: least eigenvalue of H, "
                 "above round-off", float(values.min()), "at least", round_off, 0.0,
                 "eigenvalues in NumPy of pcdyn.linear.hessian", nets.settings),
        Evidence("A.3", "H = AᵀΠA for the stacked errors ε = Ay + c (largest difference)",
                 _size(ours - theirs), "equal", 0.0, round_off, "AᵀΠA in NumPy", nets.settings),
    )  # fmt: skip


def _dense_hessian(problem: InferenceProblem) -> Array:
    return hessian(problem).dense()


def path_to_convergence(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.4: Eq 31 with its time reversed, and the closed form of the whole network."""
    nets = draw(seed=seed, networks=networks, widths=MIXED, full_precisions=True)
    start = nets.start()
    t = 1.5
    stacked, layer = on_each(_exact, nets, tuple(start), np.full(networks, t))
    matrix, drive = nets.linear_flow()
    count, size = drive.shape

    def field(_: float, y: np.ndarray) -> np.ndarray:
        return (drive - times(matrix, y.reshape(count, size))).ravel()

    solved = integrate(field, nets.stack(start).ravel(), [t], method="DOP853", tolerance=1e-12)
    weight, precisions = nets.weights[2], nets.precisions
    back = transpose(weight) @ precisions[2]
    one, pull = precisions[1] + back @ weight, times(back, nets.target)
    pull = pull + times(precisions[1] @ nets.weights[1], start[1])
    rest = solve(one, pull)
    decay, grow = expm(-one * t), expm(one * t)
    alone = rest + times(decay, start[2] - rest)
    printed = times(grow, start[2]) - times(grow - np.eye(one.shape[-1]), rest)
    settings = {**nets.settings, "t": t}
    fixed = nets.unstack(solved.reshape(count, size))[2]
    return (
        Evidence("A.4, Eq 31", "neighbours fixed, Eq 31 with e^{−At} (largest difference)",
                 _size(layer[0] - alone), "equal", 0.0, 1e-11, "SciPy's expm", settings),
        Evidence("A.4, Eq 31", "as printed, with e^{+At} (largest difference from the flow)",
                 _size(printed - alone), "equal", 0.0, 1e-11, "SciPy's expm", settings,
                 expected_to_hold=False),
        Evidence("A.4, Eq 31", "neighbours not fixed, where the paper sees no closed form: y* + "
                 "e^{−Ht}(y(0) − y*) of all layers (largest difference)",
                 _size(np.concatenate(stacked, -1) - solved.reshape(count, size)), "equal", 0.0,
                 1e-9, "SciPy's DOP853 on the flow in NumPy, tolerance 1e-12", settings),
        Evidence("A.4, Eq 31", "Eq 31 for a layer whose neighbours do move (largest difference)",
                 _size(alone - fixed), "equal", 0.0, 1e-9,
                 "SciPy's DOP853 on the flow in NumPy, tolerance 1e-12", settings,
                 expected_to_hold=False),
    )  # fmt: skip


def _exact(problem: InferenceProblem, activities: Activities, t: Array) -> tuple[State, State]:
    whole = exact_flow(problem, problem.state_of(activities))(t)
    return whole, single_layer_flow(problem, 2, activities)(t)


def moving_neighbours(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 32: a layer between moving neighbours, with the drive of the past or of the present."""
    nets = draw(seed=seed, networks=networks, widths=MIXED)
    start, t = nets.start(), 1.5
    # Gauss–Legendre of exponentials whose fastest rates times t are some tens.
    nodes, shares = np.polynomial.legendre.leggauss(32)
    moments = 0.5 * t * (nodes + 1)
    hidden = [
        on_each(_exact, nets, tuple(start), np.full(networks, moment))[0]
        for moment in (*moments, t)
    ]
    ends = [np.stack([x] * len(hidden)) for x in (nets.input, nets.target)]
    path = [ends[0], *map(np.stack, zip(*hidden, strict=True)), ends[1]]
    found: dict[tuple[int, str], Layers] = {}
    for layer in range(1, nets.depth):
        weight = nets.weights[layer]
        drive = times(nets.weights[layer - 1], path[layer - 1])
        drive = drive + times(transpose(weight), path[layer + 1])
        rates, modes = np.linalg.eigh(np.eye(nets.widths[layer]) + transpose(weight) @ weight)
        into = transpose(modes)
        felt = {"s": times(into, drive[:-1]), "τ": times(into, drive[-1])}
        for sign in (1, -1):
            kernels = np.exp(sign * rates * (t - moments)[:, None, None])
            for when, pulled in felt.items():
                integral = (0.5 * t * shares[:, None, None] * kernels * pulled).sum(0)
                mode = np.exp(sign * rates * t) * times(into, start[layer]) - sign * integral
                found.setdefault((sign, when), []).append(times(modes, mode))
    arrived = [x[-1] for x in path[1:-1]]
    number, settings = "A.4, Eq 32", {**nets.settings, "τ": t}
    oracle = "Gauss–Legendre in the modes of A in NumPy, along pcdyn's path of the neighbours"
    return (
        Evidence(number, "corrected, x_l(τ) = e^{−Aτ} x_l(0) + ∫ e^{−A(τ−s)} [W_l x_{l−1}(s) + "
                 "W_{l+1}ᵀ x_{l+1}(s)] ds (largest difference from pcdyn's path)",
                 largest(found[-1, "s"], arrived), "equal", 0.0, 1e-10, oracle, settings),
        *(
            Evidence(number, f"{text} (median relative difference)",
                     relative(found[form], arrived), "equal", 0.0, 1e-6, oracle, settings,
                     expected_to_hold=False)
            for text, form in (
                ("with the drive at τ, as printed, but e^{−A}", (-1, "τ")),
                ("with e^{+A}, as printed, but the drive at s", (1, "s")),
                ("as printed, with both", (1, "τ")),
            )
        ),
    )  # fmt: skip


def equal_influences(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.5.2: where all prediction errors vanish, the feedforward pass is the target."""
    nets = draw(seed=seed, networks=networks, widths=SQUARE, near_identity=0.2)
    nets = dataclasses.replace(nets, target=nets.feedforward()[-1])
    found = linear_rest(nets)
    forward = [times(nets.weights[i - 1], found[i - 1]) for i in range(1, nets.depth)]
    back = [times(transpose(nets.weights[i]), found[i + 1]) for i in range(1, nets.depth)]
    weighted = [times(transpose(w) @ w, x) for w, x in zip(nets.weights[1:], forward, strict=True)]
    conditions = [np.linalg.cond(weight).max() for weight in nets.weights]
    tolerance = 1e2 * EPS * float(np.prod(conditions)) ** 2 * max(map(_size, found))
    oracle = "products and inverses in NumPy"
    return (
        Evidence("A.5.2", "T = feedforward(d): prediction errors vanish and x_l* is the target "
                 "W_{l+1}⁻¹ x_{l+1}* (largest difference)", largest(found, nets.targets()),
                 "equal", 0.0, tolerance, oracle, nets.settings),
        Evidence("A.5.2", "the two influences balance as Wᵀ_{l+1} W_{l+1} W_l x_{l−1}* = "
                 "Wᵀ_{l+1} x_{l+1}* (largest difference)", largest(weighted, back), "equal", 0.0,
                 tolerance, oracle, nets.settings),
        Evidence("A.5.2", "as printed below Theorem 3.4, W_l x_{l−1}* = Wᵀ_{l+1} x_{l+1}* "
                 "(median relative difference)", relative(back, forward), "equal", 0.0, tolerance,
                 oracle, nets.settings, expected_to_hold=False),
    )  # fmt: skip


def input_unconstrained_dynamics(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.5.3: leaving out −ε_l keeps the end but is no gradient flow; its sign in Eq 36."""
    near = draw(seed=seed, networks=networks, widths=SQUARE, near_identity=0.2)
    matrix, drive = near.linear_flow(0)
    end, targets = np.split(solve(matrix, drive), near.depth, axis=-1), near.targets()[:-1]
    nets, state = _where_feedback_opposes(draw(seed=seed, networks=networks, widths=SQUARE))
    slope, errors = nets.gradient(state), nets.errors(state)
    full = vector_field(nets, state, clamp="output")
    dropped = [-s for s in slope[:-1]]
    dropped[1] = dropped[1] + errors[0]
    rates = [sum((s * f).sum(-1) for s, f in zip(slope[:-1], field, strict=True))
             for field in (full, dropped)]  # fmt: skip
    pairs = zip(nets.weights, errors, strict=True)
    feedback = [times(transpose(weight), error) for weight, error in pairs]
    tolerance = 1e2 * EPS * float(np.linalg.cond(matrix).max()) * max(map(_size, end))
    oracle = "∂F/∂x by hand in NumPy"
    return (
        Evidence("A.5.3, Eq 36", "the flow with the input free, −ε_l included, rests at the "
                 "targets (largest difference)", largest(end, targets), "equal", 0.0,
                 tolerance, "t = W⁻¹ t by NumPy, dense solve of the stacked system",
                 nets.settings),
        Evidence("A.5.3, Eq 36", "F falls along that flow (largest dF/dt)",
                 float(np.max(rates[0])), "at most", 0.0, 0.0, oracle, nets.settings),
        Evidence("A.5.3, Eq 36", "as argued and as in the authors' code, without −ε_1: F falls "
                 "(largest dF/dt where the feedback halves −ε_1)", float(np.max(rates[1])),
                 "at most", 0.0, 0.0, oracle, nets.settings, expected_to_hold=False),
        Evidence("A.5.3, Eq 36", "as printed, ẋ_l = −ε_{l+1} ∂f/∂x_l descends E_{l+1} (largest "
                 "dE/dt with that sign)", float(max((f * f).sum(-1).max() for f in feedback)),
                 "at most", 0.0, 0.0, oracle, nets.settings, expected_to_hold=False),
    )  # fmt: skip


def _where_feedback_opposes(nets: Networks) -> tuple[Networks, list[np.ndarray]]:
    """Activities, and targets for them, at which dF/dt without −ε_1 is ¼ − σ², for ‖ε_1‖ = 1.

    ε_1 is the direction that W_1ᵀ shrinks most, to σ; half of it comes back from layer 2, and
    layer 2 is at rest.
    """
    errors = [np.linalg.svd(nets.weights[0])[0][:, :, -1]]
    for weight, share in zip(nets.weights[1:], (0.5, 1.0), strict=True):
        errors.append(share * solve(transpose(weight), errors[-1]))
    state = [nets.input]
    for layer, error in enumerate(errors, start=1):
        state.append(nets.predict(layer, state[-1]) + error)
    return dataclasses.replace(nets, target=state[-1]), state


def _size(array: np.ndarray) -> float:
    return float(np.abs(array).max())


STATEMENTS = (
    Statement(
        number="Eq 1", title="Inference is gradient descent on F",
        says="Activities descend F = Σ ε², and Eqs 1 and 2 are its gradients.",
        as_printed="holds with a condition",
        form="The right sides are the gradients of F = Σ ½ ε²: the ½ belongs to the definition.",
        measure=vector_field_is_gradient,
    ),
    Statement(
        number="Theorem 3.1", title="Output free: the feedforward pass",
        says="With the input clamped and the output free, the equilibrium is the feedforward pass.",
        as_printed="holds",
        form="As printed, for any activation; it is the only critical point.",
        measure=feedforward_equilibrium,
    ),
    Statement(
        number="Theorem 3.3", title="Input free: target propagation",
        says="With the output clamped, the input free and f and all W invertible, the equilibrium "
        "is the targets of target propagation.",
        as_printed="holds with a condition",
        form="Every target t_l, l ≥ 1, must lie in the range of f_l; for a bounded f most targets "
        "do not exist, and then x_0 runs off to infinity.",
        measure=target_propagation_equilibrium,
    ),
    Statement(
        number="Theorem 3.4", also="Eq 5", title="Equilibrium of linear networks",
        says="x_l* = (I + W_{l+1}ᵀ W_{l+1})⁻¹ [W_l x_{l−1}* + W_{l+1}ᵀ x_{l+1}*].",
        as_printed="holds",
        form="As printed, layer by layer: a coupled system, solved at once by y* = H⁻¹ b.",
        measure=linear_equilibria,
    ),
    Statement(
        number="Theorem 3.5", title="Equilibrium with precisions",
        says="x_l* = (I + Π_l⁻¹ W_{l+1}ᵀ Π_{l+1} W_{l+1})⁻¹ [W_l x_{l−1}* + Π_l⁻¹ W_{l+1}ᵀ Π_{l+1} "
        "x_{l+1}*].",
        as_printed="holds",
        form="As printed, for symmetric positive definite Π; explicitly Π_l ε_l* = P_lᵀ S⁻¹ e_0, "
        "F* = ½ e_0ᵀ S⁻¹ e_0, S = Σ P_l Π_l⁻¹ P_lᵀ.",
        measure=precision_equilibria,
    ),
    Statement(
        number="A.3", also="Eqs 28–29", title="Convexity of linear networks",
        says="∂²F/∂x_l² = I + WᵀW is positive, so that F is convex.",
        as_printed="holds",
        form="F is jointly convex, as a sum of squares of affine maps of full column rank; that it "
        "is in each layer does not show it.",
        measure=convexity,
    ),
    Statement(
        number="A.4, Eq 31", title="Path to convergence",
        says="Eq 31 is the path of a layer with fixed neighbours; with moving ones no analytical "
        "solution exists.",
        as_printed="does not hold",
        form="x(t) = e^{−At} x(0) + (I − e^{−At}) A⁻¹ [W_l x_{l−1} + W_{l+1}ᵀ x_{l+1}]; and the "
        "whole network has y(t) = y* + e^{−Ht} (y(0) − y*).",
        measure=path_to_convergence,
    ),
    Statement(
        number="A.4, Eq 32", title="A layer between moving neighbours",
        says="x_l(τ) = e^{Aτ} x_l(0) − ∫ e^{A(τ−s)} [W_l x_{l−1}(τ) + W_{l+1}ᵀ x_{l+1}(τ)] ds.",
        as_printed="does not hold",
        form="x_l(τ) = e^{−Aτ} x_l(0) + ∫_0^τ e^{−A(τ−s)} [W_l x_{l−1}(s) + W_{l+1}ᵀ x_{l+1}(s)] "
        "ds: the exponents are negative, and the drive is that at s.",
        measure=moving_neighbours,
    ),
    Statement(
        number="A.5.2", also="Eq 35", title="Equal influences at zero prediction error",
        says="Where all errors vanish, W_l x_{l−1}* = W_{l+1}ᵀ x_{l+1}*, and the feedforward pass "
        "equals the targets.",
        as_printed="holds with a condition",
        form="Eq 35: W_l x_{l−1}* = W_{l+1}⁻¹ x_{l+1}*. With the transpose, as in the main text, "
        "both sides need the factor: WᵀW W_l x_{l−1}* = Wᵀ x_{l+1}*.",
        measure=equal_influences,
    ),
    Statement(
        number="A.5.3, Eq 36", title="Dynamics with the input free",
        says="With the input free ε_l = 0, so that ẋ_l needs only the feedback error (Eq 36).",
        as_printed="does not hold",
        form="The full flow, −ε_l included, descends F and rests at the targets; without −ε_1 F "
        "can rise, and the first line of Eq 36 has the opposite sign.",
        measure=input_unconstrained_dynamics,
    ),
)  # fmt: skip
