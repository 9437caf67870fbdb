"""Eqs 17, 18, 19 and the discussion: the posterior that inference stands for, and its bound."""

from __future__ import annotations

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.optimize import minimize

from pcdyn._support.types import State
from pcdyn.learning.flows.variational import variational_free_energy
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.posterior import posterior
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.networks import (
    Layers,
    Networks,
    draw,
    largest,
    on_each,
    solve,
    times,
    transpose,
    weight_differences,
)
from pcdyn.theory.statement import Statement

WIDTHS = (3, 4, 3, 2)
_MESSAGES = "Discussion, message passing"
# Inverses and determinants of a dozen units, of matrices with condition numbers up to about 1e3.
_ROUND_OFF = 1e-10


def message_passing(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """The discussion: belief propagation along the layers against pcdyn's posterior."""
    nets = draw(seed=seed, networks=networks, widths=WIDTHS, full_precisions=True)
    means, covariances, evidence = on_each(_posterior, nets)
    by_messages = _belief_propagation(nets)
    matrix, drive = nets.linear_flow()
    inverse, ends = np.linalg.inv(matrix), np.cumsum(nets.widths[1:-1])[:-1]
    blocks = [
        inverse[:, here, here]
        for here in (slice(*pair) for pair in zip((0, *ends), (*ends, None), strict=True))
    ]
    dense = np.split(times(inverse, drive), ends, axis=-1)
    log_p = -_surprise(nets)
    messages = "Gaussian belief propagation written out in NumPy, one pass up and one down"
    return (
        Evidence(_MESSAGES, "means of the layers are those of belief propagation, and the "
                 "equilibrium of inference (largest difference)",
                 max(largest(means, by_messages[0]), largest(means, dense)), "at most", 0.0,
                 _ROUND_OFF, f"{messages}; dense solve", nets.settings),
        Evidence(_MESSAGES, "covariances of the layers are those of belief propagation, "
                 "and the diagonal blocks of H⁻¹ (largest difference)",
                 max(largest(covariances, by_messages[1]), largest(covariances, blocks)),
                 "at most", 0.0, _ROUND_OFF, f"{messages}; dense inverse", nets.settings),
        Evidence(_MESSAGES, "log evidence is ln p(T | d) (largest difference)",
                 float(np.abs(evidence - log_p).max()), "at most", 0.0, _ROUND_OFF,
                 "N(T; feedforward(d), S) in NumPy, S propagated layer by layer", nets.settings),
    )  # fmt: skip


def bound_on_the_divergence(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 17: F = KL − ln p(o) for Gaussians q, which is below KL where the density is above 1."""
    nets = draw(seed=seed, networks=networks, widths=WIDTHS, full_precisions=True)
    # Noise of standard deviation of order .01, and targets that the network itself would draw.
    nets = dataclasses.replace(nets, precisions=tuple(1e4 * p for p in nets.precisions))
    rng = np.random.default_rng(seed + 1)
    root = np.linalg.cholesky(_output_covariance(nets))
    drawn = nets.feedforward()[-1] + times(root, rng.normal(size=nets.target.shape))
    nets = dataclasses.replace(nets, target=drawn)
    matrix, drive = nets.linear_flow()
    exact = np.linalg.inv(matrix)
    noise = rng.normal(size=(2, *drive.shape, drive.shape[-1])) / drive.shape[-1] ** 0.5
    covariance = 1e-4 * (noise[0] @ transpose(noise[0]) + 0.1 * np.eye(drive.shape[-1]))
    mean = times(exact, drive) + 1e-2 * noise[1][..., 0]
    state = tuple(np.split(mean, np.cumsum(nets.widths[1:-1])[:-1], axis=-1))
    free_energy = on_each(_variational, nets, state, covariance)
    divergence = _divergence(mean, covariance, times(exact, drive), exact)
    surprise = _surprise(nets)
    off = np.abs(free_energy - divergence - surprise) / (1 + np.abs(free_energy))
    settings = {**nets.settings, "ln p(o), median": float(np.median(-surprise))}
    oracle = "KL of two Gaussians and ln p(o) in NumPy"
    return (
        Evidence("Eq 17", "F = KL[q‖p(x|o)] − ln p(o) (largest relative difference)",
                 float(off.max()), "at most", 0.0, _ROUND_OFF, oracle, settings),
        Evidence("Eq 17", "F ≥ −ln p(o) (smallest excess)", float((free_energy - surprise).min()),
                 "at least", 0.0, 0.0, oracle, settings),
        Evidence("Eq 17", "as printed, third line, F ≥ KL[q‖p(x|o)] (smallest F − KL, which is "
                 "−ln p(o): negative where the density of o is above 1)",
                 float((free_energy - divergence).min()), "at least", 0.0, 0.0, oracle, settings,
                 expected_to_hold=False),
    )  # fmt: skip


def fitted_posterior(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 18: q fitted by descending F, with a full covariance and factorised across layers."""
    nets = draw(seed=seed, networks=networks, widths=(2, 2, 3, 2), full_precisions=True)
    matrix, drive = nets.linear_flow()
    exact, surprise = np.linalg.inv(matrix), _surprise(nets)
    mean = times(exact, drive)
    layers = np.repeat([0, 1], nets.widths[1:-1])
    within = np.equal.outer(layers, layers)
    inside = np.linalg.slogdet(np.where(within, matrix, 0))[1]
    # What independent layers miss: their best covariances are H_ll⁻¹.
    lost = 0.5 * (inside - np.linalg.slogdet(matrix)[1])
    oracle = "H⁻¹b and H⁻¹ by NumPy; KL of two Gaussians"
    settings = {**nets.settings, "optimiser": "SciPy's L-BFGS from N(0, I)"}
    fits = [_fit(nets, np.tril(mask)) for mask in (np.ones_like(within), within)]
    full, apart = (_divergence(m, covariance, mean, exact) for m, covariance, _ in fits)
    least, bound = (energy for *_, energy in fits)
    return (
        # F is quadratic in what is left, of which L-BFGS leaves the squares of 1e-6 or so.
        Evidence("Eq 18", "the Gaussian q for which F is least is the posterior, mean H⁻¹b and "
                 "covariance H⁻¹ (largest KL)", float(full.max()), "at most", 0.0, 1e-8, oracle,
                 settings),
        Evidence("Eq 18", "F at its minimum is −ln p(o) (largest difference)",
                 float(np.abs(least - surprise).max()), "at most", 0.0, 1e-8,
                 "−ln N(T; feedforward(d), S) in NumPy", settings),
        Evidence("Eq 18", "q factorised across layers, as A.1.1 has it, becomes the posterior "
                 "(smallest KL)", float(apart.min()), "at most", 0.0, 1e-8, oracle, settings,
                 expected_to_hold=False),
        Evidence("Eq 18", "q factorised across layers: F stays above −ln p(o) by "
                 "½ (Σ_l log det H_ll − log det H) (largest difference)",
                 float(np.abs(bound - surprise - lost).max()), "at most", 0.0, 1e-8,
                 "the closed form", {**settings, "gap, median": float(np.median(lost))}),
    )  # fmt: skip


def laplace_approximation(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 19: what F ≈ Σ ε² leaves out does not depend on linear networks' activities, but on W."""
    nets = draw(seed=seed, networks=networks, widths=WIDTHS)
    rng = np.random.default_rng(seed + 1)
    states = [[x + rng.normal(size=x.shape) for x in nets.rest()[1:-1]] for _ in range(2)]
    whole = [on_each(_laplace, nets, tuple(state)) for state in states]
    squares = [nets.free_energy([nets.input, *state, nets.target]) for state in states]
    change, expected = whole[1] - whole[0], squares[1] - squares[0]
    rest = nets.rest()
    weights = nets.weight_gradient(rest, nets.weighted_errors(rest))
    slopes = on_each(_laplace_slopes, nets, tuple(rest[1:-1]))
    differences = weight_differences(nets, _surprise)
    size = np.linalg.norm(differences, axis=-1)
    oracle = "central differences of −ln N(T; feedforward(d), S) in NumPy, step 1e-5"
    return (
        Evidence("Eq 19", "from one state to another F changes by the change of Σ ½ε² (largest "
                 "relative difference, linear networks)",
                 float((np.abs(change - expected) / (1 + np.abs(expected))).max()), "at most", 0.0,
                 _ROUND_OFF, "Σ ½ε² in NumPy", nets.settings),
        Evidence("Eq 19", "as printed, without the ½: change of F over that of Σ ε²",
                 float((change @ expected) / (2 * expected @ expected)), "equal", 1.0, 1e-6,
                 "Σ ε² in NumPy", nets.settings, expected_to_hold=False),
        # Truncation step², round-off 1e-15 over the step, on slopes of order one.
        Evidence("Eq 19", "with ½ log det H the slope of F for the weights is that of −ln p(T | d) "
                 "(largest relative difference)",
                 float((np.linalg.norm(slopes - differences, axis=-1) / size).max()), "at most",
                 0.0, 1e-7, oracle, nets.settings),
        Evidence("Eq 19", "as printed, Σ ½ε² alone has the slope of −ln p(T | d) for the weights "
                 "(smallest relative difference)",
                 float((np.linalg.norm(weights - differences, axis=-1) / size).min()), "at most",
                 0.0, 1e-3, oracle, nets.settings, expected_to_hold=False),
    )  # fmt: skip


def _posterior(problem: InferenceProblem) -> tuple[State, tuple[Array, ...], Array]:
    found = posterior(problem)
    return found.mean, found.covariances, found.log_evidence


def _variational(problem: InferenceProblem, mean: State, covariance: Array) -> Array:
    return variational_free_energy(problem, mean, posterior=covariance)


def _laplace(problem: InferenceProblem, state: State) -> Array:
    return variational_free_energy(problem, state, posterior="laplace")


def _laplace_slopes(problem: InferenceProblem, state: State) -> Array:
    """∂F/∂W of all layers, as one vector."""
    layers = problem.network.layers

    def energy(weights: list[Array]) -> Array:
        changed = eqx.tree_at(lambda p: [l.weight for l in p.network.layers], problem, weights)
        return _laplace(changed, state)

    slopes = jax.grad(energy)([layer.weight for layer in layers])
    return jnp.concatenate([slope.ravel() for slope in slopes])


def _fit(nets: Networks, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, covariance and F of the Gaussian for which pcdyn's F is least, of each network.

    The entries of the covariance's Cholesky factor where `mask` is true are free.
    """
    count, units = len(nets.input), len(mask)

    def parts(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, entries = np.split(flat.reshape(count, -1), [units], axis=1)
        return mean, entries.reshape(count, units, units)

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        energies, slopes = on_each(_fitted, nets, *parts(flat), np.tile(mask, (count, 1, 1)))
        return energies.sum(), np.concatenate([s.reshape(count, -1) for s in slopes], 1).ravel()

    start = np.zeros((count, units + units**2)).ravel()
    options = {"maxiter": 5000, "maxfun": 5000, "ftol": 0.0, "gtol": 1e-7}
    found = minimize(evaluate, start, jac=True, method="L-BFGS-B", options=options)
    mean, entries = parts(found.x)
    factor = np.where(mask, entries, 0)
    diagonal = np.einsum("nii->ni", factor)
    diagonal[:] = np.exp(diagonal)
    energies, _ = on_each(_fitted, nets, mean, entries, np.tile(mask, (count, 1, 1)))
    return mean, factor @ transpose(factor), energies


def _fitted(
    problem: InferenceProblem, mean: Array, entries: Array, mask: Array
) -> tuple[Array, tuple[Array, Array]]:
    """F and its slopes, with the diagonal of the Cholesky factor as logarithms."""
    widths = [problem.network.widths[index] for index in problem.free_layers]

    def energy(parameters: tuple[Array, Array]) -> Array:
        mean, entries = parameters
        diagonal = jnp.diag(jnp.exp(jnp.diagonal(entries)))
        factor = jnp.where(mask, entries * (1 - jnp.eye(len(entries))), 0) + diagonal
        state = tuple(jnp.split(mean, np.cumsum(widths)[:-1]))
        return variational_free_energy(problem, state, posterior=factor @ factor.T)

    return jax.value_and_grad(energy)((mean, entries))


def _divergence(
    mean: np.ndarray, covariance: np.ndarray, other: np.ndarray, against: np.ndarray
) -> np.ndarray:
    """KL of N(mean, covariance) from N(other, against), of each network."""
    away = other - mean
    quadratic = (away * solve(against, away)).sum(-1)
    trace = np.trace(np.linalg.solve(against, covariance), axis1=-2, axis2=-1)
    logs = np.linalg.slogdet(against)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (trace - mean.shape[-1] + quadratic + logs)


def _output_covariance(nets: Networks) -> np.ndarray:
    """S of each network, propagated from layer to layer."""
    covariance = np.zeros((len(nets.input), nets.widths[0], nets.widths[0]))
    for weight, precision in zip(nets.weights, nets.precisions, strict=True):
        covariance = weight @ covariance @ transpose(weight) + np.linalg.inv(precision)
    return covariance


def _surprise(nets: Networks) -> np.ndarray:
    """−ln p(T | d) of each network."""
    error, covariance = nets.target - nets.feedforward()[-1], _output_covariance(nets)
    quadratic = (error * solve(covariance, error)).sum(-1)
    constant = np.linalg.slogdet(covariance)[1] + error.shape[-1] * math.log(2 * math.pi)
    return 0.5 * (quadratic + constant)


def _belief_propagation(nets: Networks) -> tuple[Layers, list[np.ndarray]]:
    """Means and covariances of the hidden layers, from two messages to each.

    A message is a Gaussian up to a factor: its precision and its precision times its mean. Up,
    layer l − 1 is integrated out of N(x_l; W_l x_{l−1}, Π_l⁻¹) times the message to it; down,
    layer l + 1.
    """
    weights, precisions, depth = nets.weights, nets.precisions, nets.depth
    up = [(precisions[0], times(precisions[0] @ weights[0], nets.input))]
    for weight, precision in zip(weights[1:-1], precisions[1:-1], strict=True):
        known, drive = up[-1]
        gain = precision @ weight @ np.linalg.inv(transpose(weight) @ precision @ weight + known)
        up.append((precision - gain @ transpose(weight) @ precision, times(gain, drive)))
    back = transpose(weights[-1]) @ precisions[-1]
    down = [(back @ weights[-1], times(back, nets.target))]
    for layer in range(depth - 1, 1, -1):
        weight, precision = weights[layer - 1], precisions[layer - 1]
        known, drive = down[0]
        gain = transpose(weight) @ precision @ np.linalg.inv(precision + known)
        # W ᵀ(Π − Π (Π + known)⁻¹ Π) W = Wᵀ Π (Π + known)⁻¹ known W.
        down.insert(0, (gain @ known @ weight, times(gain, drive)))
    covariances = [np.linalg.inv(a[0] + b[0]) for a, b in zip(up, down, strict=True)]
    drives = (a[1] + b[1] for a, b in zip(up, down, strict=True))
    return [times(c, d) for c, d in zip(covariances, drives, strict=True)], covariances


STATEMENTS = (
    Statement(
        number="Eq 17", title="Free energy as a bound",
        says="F = KL[q(x|o)‖p(x|o)] − ln p(o) ≥ KL[q(x|o)‖p(x|o)].",
        as_printed="does not hold",
        form="The second line holds, and with it F ≥ −ln p(o). The third needs p(o) ≤ 1, which the "
        "density of a continuous o may exceed.",
        measure=bound_on_the_divergence,
    ),
    Statement(
        number="Eq 18", title="Variational inference",
        says="The parameters of q for which F is least make it the posterior; q is Gaussian and "
        "factorised across layers.",
        as_printed="holds with a condition",
        form="A Gaussian q with a covariance across layers becomes the posterior N(H⁻¹b, H⁻¹) of a "
        "linear network. Factorised across layers it has the right means, but the covariances "
        "H_ll⁻¹, too small, and F stays above −ln p(o).",
        measure=fitted_posterior,
    ),
    Statement(
        number="Eq 19", title="Laplace approximation",
        says="F ≈ Σ_l ε_l².",
        as_printed="holds with a condition",
        form="With ½, and for activities: F = Σ ½ε² + ½ log det H + const, where H of a linear "
        "network does not depend on them. It depends on the weights: for these Σ ½ε² alone does "
        "not have the gradient of −ln p(T | d).",
        measure=laplace_approximation,
    ),
    Statement(
        number=_MESSAGES, title="Inference by message passing",
        says="Inference might be sped up by message passing.",
        as_printed="holds",
        form="For linear networks belief propagation, once up and once down the layers in O(Σ n³), "
        "gives the equilibrium, and the variances and the evidence besides: `pcdyn.posterior`.",
        measure=message_passing,
    ),
)  # fmt: skip
