"""Eqs 49, 50 and 52: energies of other interactions than x − μ, and other priors than Gaussian."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import stats
from scipy.optimize import minimize, root

from pcdyn._support.types import Activities, State
from pcdyn.learning import EulerPredictiveCoding
from pcdyn.model.energies.energy import Energy, Gaussian
from pcdyn.model.energies.generalised import Interaction, LogCosh, Student
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.adjoint_condition import adjoint_condition
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.flows import integrate
from pcdyn.theory.networks import Layers, Networks, draw, largest, on_each, weight_differences
from pcdyn.theory.statement import Statement

WIDTHS = (3, 4, 3, 2)
# Sums of a dozen terms of order 1 to 100, each with a few roundings.
_ROUND_OFF = 1e-11
# The standard deviation of ln x of the log-normal prior; degrees of freedom and scale of the t.
_SIGMA, _NU, _SCALE = 0.5, 3.0, 0.7


class _Form(NamedTuple):
    """An energy of x and μ in NumPy, unit by unit, and its derivatives for both."""

    value: Callable[[Any, Any], Any]
    for_activity: Callable[[Any, Any], Any]
    for_prediction: Callable[[Any, Any], Any]


_RATIO = _Form(
    lambda x, mu: (x / mu - 1) ** 2 / 2,
    lambda x, mu: (x / mu - 1) / mu,
    lambda x, mu: -(x / mu - 1) * x / mu**2,
)
_LOG_RATIO = _Form(
    lambda x, mu: np.log(x / mu) ** 2 / (2 * _SIGMA**2),
    lambda x, mu: np.log(x / mu) / (_SIGMA**2 * x),
    lambda x, mu: -np.log(x / mu) / (_SIGMA**2 * mu),
)


def _ratio(x: Array, mu: Array) -> Array:
    return x / mu - 1


def _log_ratio(x: Array, mu: Array) -> Array:
    return jnp.log(x) - jnp.log(mu)


class _LogNormal(Energy):
    """−ln p(x | μ) of the log-normal density whose median is μ, without its constant."""

    def value(self, error: Array, target: Array | None) -> Array:
        assert target is not None, "it is an energy of hidden layers"
        ratio = _log_ratio(target, target - error)
        return jnp.sum(jnp.log(target) + ratio**2 / (2 * _SIGMA**2), axis=-1)


# Interactions that act unit by unit, none of them a multiple of x − μ.
_OTHERS: dict[str, Callable[[Array, Array], Array]] = {
    "x/μ": _ratio,
    "ln x − ln μ": _log_ratio,
    "x³ − μ³": lambda x, mu: x**3 - mu**3,
}


def general_interaction(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 49: inference and learning with divisive errors, and which interactions obey Eq 51."""
    nets = _positive(seed, networks)
    energies = np.array(
        [_free_energy(nets, x, _RATIO) for x in _along(nets, np.linspace(0, 20, 41))]
    )
    rest = _rest(nets, _RATIO, positive=False)
    speeds = on_each(_field, nets, tuple(rest[1:-1]))
    excess = _free_energy(nets, rest, _RATIO) - nets.layer_energies(nets.start())[:, -1]
    gradient, found = on_each(_learned, nets)
    after = [x[:, 0] for x in found]
    expected = weight_differences(nets, lambda made: _free_energy(made, after, _RATIO))
    far = np.linalg.norm(gradient - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    residuals, multiple = on_each(_adjoint_residuals, nets, tuple(rest))
    least = {name: float(values.min()) for name, values in residuals.items()}
    settings = {**nets.settings, "g": "x/μ − 1", "h": "g²/2"}
    return (
        Evidence("Eq 49", "g = x_l/μ_l − 1: F does not rise along the flow (largest rise between "
                 "41 times up to t = 20)", float(np.diff(energies, axis=0).max()), "at most", 0.0,
                 1e-9, "F in NumPy along pcdyn's flow, which SciPy's DOP853 solves to 1e-10",
                 settings),
        Evidence("Eq 49", "g = x_l/μ_l − 1: it rests where F is least (largest |dx/dt| there)",
                 max(float(np.abs(x).max()) for x in speeds), "at most", 0.0, 1e-6,
                 "F in NumPy minimised by SciPy", settings),
        Evidence("Eq 49", "g = x_l/μ_l − 1: F(x*) ≤ ℒ(feedforward) (largest excess)",
                 float(excess.max()), "at most", 0.0, 0.0, "F in NumPy", settings),
        # Truncation step², round-off 1e-15 over the step, and slopes of order 1.
        Evidence("Eq 49", "g = x_l/μ_l − 1: weights learn by ∂F/∂W (largest relative difference "
                 "after 20 Euler steps of inference)", float(far.max()), "at most", 0.0, 1e-7,
                 "central differences of F in NumPy, step 1e-5", settings),
        Evidence("Eq 49", f"an interaction that is no multiple of x_l − μ_l obeys Eq 51 (smallest "
                 f"relative residual of g = {', '.join(least)})", min(least.values()), "at most",
                 0.0, 1e-4, "∂g/∂μ_{l+1} = −∂g/∂x_l for every pair of connected units has only "
                 "constants as solutions", {**nets.settings, "residuals": least},
                 expected_to_hold=False),
        Evidence("Eq 49", "g = 3 (x_l − μ_l) obeys it (largest relative residual)",
                 float(multiple.max()), "at most", 0.0, _ROUND_OFF,
                 "automatic differentiation of g", nets.settings),
    )  # fmt: skip


def sign_of_the_general_flow(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 50: with the sign as printed F rises as fast as it should fall."""
    nets = _positive(seed, networks)
    rng = np.random.default_rng(seed + 1)
    moved = [x * np.exp(0.3 * rng.normal(size=x.shape)) for x in nets.start()[1:-1]]
    activities = [nets.input, *moved, nets.target]
    printed, ours = _slopes(nets, activities, _RATIO), on_each(_field, nets, tuple(moved))
    rates, step = [], 1e-6
    for direction in (ours, printed):
        ends = [
            [nets.input, *(x + s * v for x, v in zip(moved, direction, strict=True)), nets.target]
            for s in (-step, step)
        ]
        before, after = (_free_energy(nets, x, _RATIO) for x in ends)
        rates.append((after - before) / (2 * step) / sum((v**2).sum(-1) for v in direction))
    size = max(float(np.abs(x).max()) for x in printed)
    oracle = "central differences of F in NumPy, step 1e-6"
    settings = {**nets.settings, "g": "x/μ − 1", "h": "g²/2"}
    return (
        Evidence("Eq 50", "the flow is minus what is printed (largest difference over the largest "
                 "entry)", largest([-x for x in ours], printed) / size, "at most", 0.0, _ROUND_OFF,
                 "Eq 50 as printed in NumPy, with the derivatives of g by hand", settings),
        Evidence("Eq 50", "corrected, with the minus: dF/dt over ‖∂F/∂x‖² (largest)",
                 float(rates[0].max()), "equal", -1.0, 1e-5, oracle, settings),
        Evidence("Eq 50", "as printed, without it: F falls (smallest dF/dt over ‖∂F/∂x‖²)",
                 float(rates[1].min()), "at most", 0.0, 0.0, oracle, settings,
                 expected_to_hold=False),
    )  # fmt: skip


def priors(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Eq 52: Ẽ as −ln p(x | D, W) of Gaussian, Student's, sech and log-normal noise."""
    return (
        *symmetric_priors(seed=seed, networks=networks),
        *log_normal_prior(seed=seed, networks=networks),
    )


def symmetric_priors(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """Ẽ of random activities against the log densities of SciPy, whose constants it lacks."""
    nets = draw(seed=seed, networks=networks, widths=WIDTHS, activation="tanh",
                full_precisions=True)  # fmt: skip
    rng = np.random.default_rng(seed + 1)
    state = [x + rng.normal(size=x.shape) for x in nets.start()[1:-1]]
    errors = nets.errors([nets.input, *state, nets.target])[:-1]
    gaussian, student, sech = on_each(_residual_energies, nets, tuple(state))
    pairs = list(zip(nets.precisions, errors, strict=False))
    surprise = -sum(
        np.array([stats.multivariate_normal(cov=np.linalg.inv(p)).logpdf(e)
                  for p, e in zip(*pair, strict=True)])
        for pair in pairs
    )  # fmt: skip
    constant = sum(
        0.5 * (e.shape[-1] * math.log(2 * math.pi) - np.linalg.slogdet(p)[1]) for p, e in pairs
    )
    stacked, off = np.concatenate(errors, axis=-1), 0.0
    by_t = functools.partial(stats.t.logpdf, df=_NU, scale=_SCALE)
    for found, density in ((student, by_t), (sech, stats.hypsecant.logpdf)):
        expected = -(density(stacked) - density(0.0)).sum(-1)
        off = max(off, float(np.abs(found - expected).max()))
    oracle = "SciPy's multivariate normal, layer by layer"
    return (
        Evidence("Eq 52", "Gaussian: Ẽ + Σ_l ½ log det 2πΠ_l⁻¹ is −ln p(x | D, W) (largest "
                 "difference)", float(np.abs(gaussian + constant - surprise).max()), "at most",
                 0.0, _ROUND_OFF, oracle, nets.settings),
        Evidence("Eq 52", "as printed, Ẽ is −ln p(x | D, W), constant included (smallest "
                 "difference)", float(np.abs(gaussian - surprise).min()), "at most", 0.0, 1e-3,
                 oracle, nets.settings, expected_to_hold=False),
        Evidence("Eq 52", "Student of scale σ√ν and precision (ν + 1)/2 is the prior of Student's "
                 "t, log cosh that of the hyperbolic secant (largest difference up to constants)",
                 off, "at most", 0.0, _ROUND_OFF, "SciPy's t and hypsecant",
                 {**nets.settings, "nu": _NU, "sigma": _SCALE}),
    )  # fmt: skip


def log_normal_prior(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """The log-normal prior that A.8 names: where it is defined, and whether it has a minimum."""
    nets = _positive(seed, networks)
    rng = np.random.default_rng(seed + 1)
    moved = [x * np.exp(_SIGMA * rng.normal(size=x.shape)) for x in nets.start()[1:-1]]
    forward = nets.feedforward()
    medians = [nets.predict(1, nets.input), nets.predict(2, moved[0])]
    pairs = zip(moved, medians, strict=True)
    surprise = -sum(stats.lognorm.logpdf(x, s=_SIGMA, scale=m).sum(-1) for x, m in pairs)
    constant = sum(WIDTHS[1:-1]) * math.log(_SIGMA * math.sqrt(2 * math.pi))
    prior, _ = on_each(_log_normal, nets, tuple(moved))
    _, pull = on_each(_log_normal, nets, tuple(forward[1:-1]))
    signed = draw(seed=seed, networks=networks, widths=WIDTHS, activation="tanh")
    positive = np.concatenate(signed.feedforward()[1:-1], axis=-1) > 0
    far = (1.0, 10.0, 100.0, 500.0)
    chain = _on_a_chain(far)
    rest = _rest(nets, _LOG_RATIO, positive=True)
    slopes = on_each(_log_ratio_slopes, nets, tuple(rest[1:-1]))
    left = max(float(np.abs(s * x).max()) for s, x in zip(slopes, rest[1:-1], strict=True))
    settings = {**nets.settings, "sigma": _SIGMA}
    return (
        Evidence("Eq 52", "log-normal of median μ_l: Σ ln x + (ln x − ln μ)²/2σ² is −ln p(x | D, W)"
                 " up to a constant (largest difference)",
                 float(np.abs(prior + constant - surprise).max()), "at most", 0.0, _ROUND_OFF,
                 "SciPy's lognorm, layer by layer", settings),
        Evidence("Eq 52", "log-normal: tanh networks predict within its domain (share of networks "
                 "in which all hidden predictions are positive)",
                 float(positive.all(axis=-1).mean()), "equal", 1.0, 0.0, "counted in NumPy",
                 signed.settings, expected_to_hold=False),
        Evidence("Eq 52", "log-normal: F is bounded below, as A.8 asks (F at x_1 = 500 on the "
                 "softplus chain 0 → x_1 → x_2 → 0 with weights 1, −1, 1)", chain[-1], "at least",
                 -100.0, 0.0, "least over x_2, E_2 is ln μ_2 − σ²/2, and ln μ_2 → −x_1",
                 {"sigma": _SIGMA, "x_1": far, "F": chain}, expected_to_hold=False),
        Evidence("Eq 52", "log-normal: the feedforward pass is at rest under Ẽ, as for the "
                 "Gaussian (smallest ‖∂Ẽ/∂x‖)",
                 float(np.linalg.norm(np.concatenate(pull, axis=-1), axis=-1).min()), "at most",
                 0.0, 1e-3, "the density is largest at μ e^{−σ²}, not at its median", settings,
                 expected_to_hold=False),
        Evidence("Eq 52", "without ln x it is h = g²/2σ² of g = ln x − ln μ, bounded below by 0, "
                 "and rests at positive activities (largest |∂F/∂ ln x| there)", left, "at most",
                 0.0, 1e-6, "F in NumPy minimised by SciPy over ln x", settings),
    )  # fmt: skip


def _positive(seed: int, networks: int) -> Networks:
    """Networks that predict positive activities, none of them much smaller than 1."""
    return draw(seed=seed, networks=networks, widths=WIDTHS, activation="softplus", std=0.4)


def _free_energy(nets: Networks, activities: Sequence[np.ndarray], form: _Form) -> np.ndarray:
    """Σ_{l<L} h(g(x_l, μ_l)) + ½ ‖T − μ_L‖²."""
    total = 0.5 * ((nets.target - nets.predict(nets.depth, activities[-2])) ** 2).sum(-1)
    for layer in range(1, nets.depth):
        prediction = nets.predict(layer, activities[layer - 1])
        total = total + form.value(activities[layer], prediction).sum(-1)
    return total


def _slopes(nets: Networks, activities: Sequence[np.ndarray], form: _Form) -> Layers:
    """∂F/∂x of the hidden layers by the chain rule: h'_l ∂g_l/∂x_l + h'_{l+1} ∂g_{l+1}/∂x_l."""
    slopes = []
    for layer in range(1, nets.depth):
        below, here, above = activities[layer - 1 : layer + 2]
        prediction = nets.predict(layer + 1, here)
        last = layer + 1 == nets.depth
        credit = prediction - above if last else form.for_prediction(above, prediction)
        own = form.for_activity(here, nets.predict(layer, below))
        slopes.append(own + nets.pull(layer + 1, here, credit))
    return slopes


def _along(nets: Networks, times: np.ndarray) -> list[Layers]:
    """x_0 … x_L at each time of pcdyn's flow with divisive errors, from the feedforward pass."""

    def field(_: float, y: np.ndarray) -> np.ndarray:
        state = tuple(nets.unstack(y.reshape(len(nets.input), -1))[1:-1])
        return np.concatenate(on_each(_field, nets, state), axis=-1).ravel()

    start = nets.stack(nets.start())
    found = integrate(field, start.ravel(), times.tolist(), method="DOP853", tolerance=1e-10)
    return [nets.unstack(y.reshape(start.shape)) for y in found]


def _rest(nets: Networks, form: _Form, *, positive: bool) -> Layers:
    """x_0 … x_L where F is least, by SciPy from the feedforward pass, network by network.

    Over ln x where activities are to stay positive: those of a ratio can change their sign.
    """

    def one(net: Networks) -> np.ndarray:
        def evaluate(at: np.ndarray) -> tuple[float, np.ndarray]:
            hidden = np.exp(at) if positive else at
            activities = net.unstack(hidden[None])
            slopes = np.concatenate(_slopes(net, activities, form), axis=-1)[0]
            energy = float(_free_energy(net, activities, form)[0])
            return energy, slopes * hidden if positive else slopes

        start = net.stack(net.start())[0]
        start = np.log(start) if positive else start
        # Their round-off ends the line search at about the square root of the tolerance.
        near = minimize(evaluate, start, jac=True, method="BFGS", options={"gtol": 1e-6}).x
        found = root(lambda x: evaluate(x)[1], near, tol=1e-12).x
        return np.exp(found) if positive else found

    each = [
        dataclasses.replace(
            nets,
            weights=tuple(w[i : i + 1] for w in nets.weights),
            precisions=tuple(p[i : i + 1] for p in nets.precisions),
            input=nets.input[i : i + 1],
            target=nets.target[i : i + 1],
        )
        for i in range(len(nets.input))
    ]
    return nets.unstack(np.stack([one(net) for net in each]))


def _on_a_chain(first: Sequence[float]) -> list[float]:
    """F with the log-normal prior on one unit a layer, x_2 where its energy is least."""
    network = Network([Dense(jnp.full((1, 1), w), activation="softplus") for w in (1.0, -1.0, 1.0)])
    x = jnp.asarray(first)[:, None]
    zeros, prior = jnp.zeros_like(x), _LogNormal()
    energy = [prior, prior, Gaussian()]
    problem = InferenceProblem(network, input=zeros, output=zeros, energy=energy)
    least = network.predict(2, x) * math.exp(-(_SIGMA**2))
    return np.asarray(problem.free_energy((x, least))).tolist()


def _with(problem: InferenceProblem, energy: Energy) -> InferenceProblem:
    """With another energy of the hidden layers, and ½ ‖T − μ_L‖²."""
    hidden = [energy] * (problem.network.depth - 1)
    return InferenceProblem(
        problem.network, input=problem.input, output=problem.output, energy=[*hidden, Gaussian()]
    )


def _field(problem: InferenceProblem, state: State) -> State:
    return _with(problem, Interaction(_ratio)).vector_field(0.0, state)


def _learned(problem: InferenceProblem) -> tuple[Array, Activities]:
    """The gradient of all weights as one vector, and the activities there, a batch of one."""
    one = _with(problem, Interaction(_ratio))
    assert one.input is not None and one.output is not None, "both ends are clamped"
    batch = one.with_data(one.input[None], one.output[None])
    learned, _ = EulerPredictiveCoding(dt=1e-3, steps=20).learn(batch, ())
    layers: Any = learned.gradient.layers
    return jnp.concatenate([layer.weight.ravel() for layer in layers]), learned.activities


def _adjoint_residuals(
    problem: InferenceProblem, activities: Activities
) -> tuple[dict[str, Array], Array]:
    """The largest residual of each interaction over the layers, and that of 3 (x − μ)."""

    def of(interaction: Callable[[Array, Array], Array]) -> Array:
        found = adjoint_condition(problem.network, activities, interaction=interaction)
        return jnp.max(found.residuals)

    return {name: of(g) for name, g in _OTHERS.items()}, of(lambda x, mu: 3 * (x - mu))


def _residual_energies(problem: InferenceProblem, state: State) -> tuple[Array, ...]:
    """Ẽ with the problem's own precisions, of Student's t and of log cosh."""
    others = (Student(_SCALE * _NU**0.5, precision=(_NU + 1) / 2), LogCosh())
    return (
        problem.residual_energy(state),
        *(_with(problem, energy).residual_energy(state) for energy in others),
    )


def _log_normal(problem: InferenceProblem, state: State) -> tuple[Array, State]:
    """Ẽ with the log-normal prior, and ∂Ẽ/∂x."""
    free = _with(problem, _LogNormal())
    return jax.value_and_grad(free.residual_energy)(state)


def _log_ratio_slopes(problem: InferenceProblem, state: State) -> State:
    return _with(problem, Interaction(_log_ratio, Gaussian(_SIGMA**-2))).gradient(state)


STATEMENTS = (
    Statement(
        number="Eq 49", title="A general interaction",
        says="Residual energies Σ h(g(x_l, x_{l−1})) of other interactions g than x_l − μ_l keep "
        "what is good about inference and learning, if Eq 51 holds.",
        as_printed="holds with a condition",
        form="Inference descends F and weights learn by ∂F/∂W for any smooth g; "
        "`pcdyn.energies.Interaction` runs them. But unit by unit Eq 51 holds for multiples of "
        "x_l − μ_l only, once layers have several units: the freedom is in h.",
        measure=general_interaction,
    ),
    Statement(
        number="Eq 50", title="Flow of a general interaction",
        says="ẋ_l = h'_l ∂g_l/∂x_l + h'_{l+1} ∂g_{l+1}/∂x_l.",
        as_printed="does not hold",
        form="With a minus: ẋ_l = −h'_l ∂g_l/∂x_l − h'_{l+1} ∂g_{l+1}/∂x_l descends F.",
        measure=sign_of_the_general_flow,
    ),
    Statement(
        number="Eq 52", title="Residual energy as a prior",
        says="Ẽ = −ln p(x | D, W), for other priors too, such as the log-normal.",
        as_printed="holds with a condition",
        form="Up to a constant, for Gaussian noise, Student's t and the hyperbolic secant. The "
        "log-normal prior needs positive predictions, is unbounded below where weights are "
        "negative, and moves activities away from the feedforward pass; without the 1/x of its "
        "density it is an energy of g = ln x − ln μ and well posed.",
        measure=priors,
    ),
)  # fmt: skip
