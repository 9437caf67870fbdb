"""Where learning ends where the data cannot be interpolated, and what helps.

Weights of a linear 1-1-2 network follow `dW/dt = −dF*/dW` on targets (x, cξ) of which ξ cannot be
predicted. Where they end depends on the output precision λ and the noise c; weight decay and output
weights of fixed norm are tried as remedies. Everything is compared with what can be derived.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jax.flatten_util import ravel_pytree
from jaxtyping import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from pcdyn import learning
from pcdyn.theory import Evidence
from pcdyn.theory.convergence import growing_weight, noisy_problem

NAME = "limits of learning"
SAMPLES = 4  # of `noisy_problem`
START = 0.5  # of ‖W_2‖ where it grows from the saddle
REST = 1e-8  # of dW/dt where a flow has ended
REMEDIES = ("weight decay", "fixed norm")


@dataclasses.dataclass(frozen=True)
class Config:
    """Precisions λ, noises c, random starts N(0, 1), strengths of the remedies."""

    t1: float = 1e6
    saves: int = 61
    precisions: tuple[float, ...] = tuple(10.0**x for x in np.arange(-3, 1.01, 0.5).tolist())
    noises: tuple[float, ...] = (0.5, 0.9, 1.1, 1.5, 2.0, 3.0, 5.0)
    starts: int = 12
    remedy_noise: float = 3.0
    remedy_precisions: tuple[float, ...] = (1.0, 0.1, 0.01)
    decays: tuple[float, ...] = tuple(10.0**x for x in np.arange(-4, 0.51, 0.25).tolist())
    norms: tuple[float, ...] = tuple(10.0**x for x in np.arange(-1, 1.51, 0.125).tolist())
    order_precisions: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Growth at the saddle; ends by precision and noise; ends with remedies; order in λ."""
    times = np.append(0, np.geomspace(1e-2, config.t1, config.saves))
    keys = jr.split(jr.key(config.seed), config.starts)
    starts = np.asarray(jax.vmap(lambda k: jr.normal(k, (3,)))(keys))
    shape = (len(config.precisions), len(config.noises), config.starts)
    low = np.reshape(config.remedy_precisions, (-1, 1, 1))
    remedied = (len(low), len(config.decays), config.starts)
    fixed = (len(low), len(config.norms), config.starts)
    norms = np.reshape(config.norms, (-1, 1, 1))
    second = starts[:, 1:] / np.linalg.norm(starts[:, 1:], axis=-1, keepdims=True)
    first = np.broadcast_to(starts[:, :1], (len(norms), config.starts, 1))
    scaled = np.concatenate([first, norms * second], axis=-1)
    noise = config.remedy_noise
    weights = ends(config.t1, {
        "plane": (np.broadcast_to(starts, (*shape, 3)),
                  np.reshape(config.precisions, (-1, 1, 1)), np.reshape(config.noises, (-1, 1)),
                  0.0, 0.0),
        "weight decay": (np.broadcast_to(starts, (*remedied, 3)), low, noise,
                         np.reshape(config.decays, (-1, 1)), 0.0),
        "fixed norm": (np.broadcast_to(scaled, (*fixed, 3)), low, noise, 0.0, 1.0),
    })  # fmt: skip
    dims = {
        "plane": ("precision", "noise", "start"),
        "weight decay": ("remedy_precision", "decay", "start"),
        "fixed norm": ("remedy_precision", "norm", "start"),
    }
    variables = {}
    for name, values in weights.items():
        variables[f"{name.replace(' ', '_')}_weights"] = ((*dims[name], "weight"), values)
    return xarray.Dataset(
        {**growth(config, times), **variables, **order(config)},
        coords={
            "time": times, "precision": list(config.precisions), "noise": list(config.noises),
            "remedy_precision": list(config.remedy_precisions), "decay": list(config.decays),
            "norm": list(config.norms), "order_precision": list(config.order_precisions),
            "weight": ["w", "a", "b"],
        },
        attrs={"source": "random numbers", "remedy_noise": config.remedy_noise, "t1": config.t1},
    )  # fmt: skip


def ends(t1: float, cases: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights (w, a, b), W_1 = w and W_2 = (a, b), with which learning ends in each case.

    A case is its starts, shape (…, 3), and what broadcasts with them: λ, c, the weight decay ω,
    which adds `½ ω ‖W‖²` to F*/λ per sample, and 1 where the norm of W_2 is kept. Time is in
    units of 1/λ. All cases are one program.
    """
    rows = []
    for starts, *settings in cases.values():
        columns = [np.broadcast_to(np.asarray(x, float), starts.shape[:-1]) for x in settings]
        rows.append(np.concatenate([starts, np.stack(columns, -1)], -1).reshape(-1, 7))
    flat = jnp.asarray(np.concatenate(rows))
    weights, failed = (np.asarray(x) for x in _flows(t1, flat[:, :3], *flat[:, 3:].T))
    if failed.any() or not np.isfinite(weights).all():
        raise pcdyn.SimulationError(f"{failed.sum()} of {len(flat)} flows did not reach t1")
    parts = np.split(weights, np.cumsum([len(r) for r in rows])[:-1])
    return {
        name: part.reshape(case[0].shape)
        for (name, case), part in zip(cases.items(), parts, strict=True)
    }


def reduced_energy(weights: jax.Array, noise: jax.Array, precision: jax.Array) -> jax.Array:
    """F*/λ per sample of `noisy_problem` at weights (w, a, b), from `F* = ½ e0ᵀ S⁻¹ e0`.

    It is `½ [(e − w W_2)ᵀ K (e − w W_2) + c² K_bb]` with e = (1, 0) and, by Woodbury,
    `K = S⁻¹/λ = I − λ W_2 W_2ᵀ/(1 + λ‖W_2‖²)`.
    """
    first, second = weights[0], weights[1:]
    error = jnp.asarray([1.0, 0.0]) - first * second
    shrinking = precision / (1 + precision * jnp.sum(second**2))
    fit = jnp.sum(error**2) - shrinking * jnp.sum(second * error) ** 2
    return 0.5 * (fit + noise**2 * (1 - shrinking * second[1] ** 2))


@eqx.filter_jit
def _flows(
    t1: float,
    starts: jax.Array,
    precision: jax.Array,
    noise: jax.Array,
    decay: jax.Array,
    fixed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def slope(t: ArrayLike, y: jax.Array, args: tuple[jax.Array, ...]) -> jax.Array:
        precision, noise, decay, fixed = args
        move = -jax.grad(reduced_energy)(y, noise, precision) - decay * y
        second = y.at[0].set(0.0)
        normal = second / jnp.linalg.norm(second)
        return move - fixed * jnp.sum(move * normal) * normal

    def one(start: jax.Array, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope), diffrax.Kvaerno5(), 0.0, t1, None, start, args,
            stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-10),
            saveat=diffrax.SaveAt(t1=True), max_steps=2**14, throw=False,
            # Where nothing moves any more the implicit solver would iterate on round-off.
            event=diffrax.Event(lambda t, y, args, **_: jnp.linalg.norm(slope(t, y, args)) < REST),
        )  # fmt: skip
        ended: Any = solution.ys
        return ended[0], ~diffrax.is_okay(solution.result)

    return jax.vmap(one)(starts, precision, noise, decay, fixed)


def _flow_of(weights: jax.Array, noise: float, precision: float) -> learning.AdiabaticFlow:
    problem = noisy_problem(
        [weights[:1, None], weights[1:, None]], noise=noise, precision=precision
    )
    return learning.AdiabaticFlow(problem, pcdyn.solvers.ClosedForm())


def growth(config: Config, times: np.ndarray) -> dict[str, Any]:
    """‖W_2‖, F* and ℒ at the saddle of the narrow network, c = 3, λ = 1."""
    flow = _flow_of(jnp.asarray([0.0, 0.0, START]), 3.0, 1.0)
    solved = pcdyn.simulate(
        flow, t1=config.t1, times=times,
        integrator=pcdyn.Diffrax("kvaerno5", rtol=1e-8, atol=1e-12, max_steps=4096),
    )  # fmt: skip
    first, second = (np.asarray(layer.weight) for layer in solved.moving["network"].layers)
    norm = np.linalg.norm(second, axis=(1, 2))
    weights = np.concatenate([first[:, 0], second[:, :, 0]], axis=-1)
    return {
        "weight_norm": ("time", norm),
        "reduced_weight_norm": ("time", growing_weight(SAMPLES * times, START, noise=3.0,
                                                       precision=1.0)),
        "learning_energy": ("time", solved.free_energy.sum(-1) / SAMPLES),
        "growing_loss": ("time", loss(weights, 3.0)),
    }  # fmt: skip


def order(config: Config) -> dict[str, Any]:
    """‖∇F*/λ − ∇ℒ‖/‖∇ℒ‖ of a tanh 3-8-2 network at random weights, by λ."""
    keys = jr.split(jr.key(config.seed), 3)
    network = pcdyn.mlp((3, 8, 2), activation="tanh", key=keys[0])
    inputs, outputs = jr.normal(keys[1], (8, 3)), 0.5 * jnp.tanh(jr.normal(keys[2], (8, 2)))
    plain = pcdyn.InferenceProblem(network, input=inputs, output=outputs)
    gradient = pcdyn.backpropagation(plain).weight_gradient
    expected, _ = ravel_pytree(eqx.filter(gradient, eqx.is_inexact_array))

    @jax.jit
    def gap(precision: jax.Array) -> jax.Array:
        problem = pcdyn.InferenceProblem(
            network, input=inputs, output=outputs, energy=pcdyn.Gaussian([1.0, precision])
        )
        flow = learning.AdiabaticFlow(problem, tolerance=1e-12)
        slope = -jnp.concatenate(flow.vector_field(0.0, flow.initial_state())) / precision
        return jnp.linalg.norm(slope - expected) / jnp.linalg.norm(expected)

    values = [float(gap(jnp.asarray(p))) for p in config.order_precisions]
    return {"gradient_gap": ("order_precision", values)}


def loss(weights: ArrayLike, noise: ArrayLike) -> np.ndarray:
    """ℒ per sample at unit precision of weights (w, a, b): x and ξ are uncorrelated."""
    w, a, b = np.moveaxis(np.asarray(weights), -1, 0)
    return 0.5 * ((1 - w * a) ** 2 + (w * b) ** 2 + np.asarray(noise) ** 2)


def loss_gradient(weights: ArrayLike) -> np.ndarray:
    """‖∇ℒ‖ of the same, by hand."""
    w, a, b = np.moveaxis(np.asarray(weights), -1, 0)
    miss = 1 - w * a
    return np.sqrt((-a * miss + w * b**2) ** 2 + (w * miss) ** 2 + (w**2 * b) ** 2)


def excess(weights: xarray.DataArray) -> xarray.DataArray:
    """ℒ above the least, per sample: 0 at the fit, ½ at the saddle and wherever w = 0."""
    values = loss(weights.transpose(..., "weight").values, 0.0)
    return xarray.DataArray(values, dims=weights.dims[:-1])


def stability(data: xarray.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """λ‖W_2‖²(c² − 1) of the runs of the plane that end at the fit, and of those at the saddle.

    The fit w = 1/a, b = 0 is stable where it is below 1; the saddle draws weights nearby where it
    is above.
    """
    weights = data.plane_weights
    squares = (weights.sel(weight=["a", "b"]) ** 2).sum("weight")
    number = (squares * data.precision * (data.noise**2 - 1)).values
    above = excess(weights).values
    return number[above < 0.05], number[above > 0.45]


def check(data: xarray.Dataset) -> list[Evidence]:
    """Growth, the plane and its conditions, the remedies, and the order in λ."""
    return [*_growth_claims(data), *_plane_claims(data), *_remedy_claims(data), _order_claim(data)]


def _growth_claims(data: xarray.Dataset) -> list[Evidence]:
    late = data.time.values >= data.time.values[-1] / 100
    norm = data.weight_norm.values
    slope = float(np.polyfit(np.log(data.time.values[late]), np.log(norm[late]), 1)[0])
    text = "learning at the saddle has no end: ‖W₂‖ grows like t^¼ while ℒ stays at 5.0"
    return [
        Evidence(
            NAME, f"{text} (exponent)", slope, "equal", 0.25, 0.01,
            note=f"ℒ changes by {float(np.ptp(data.growing_loss.values)):.0e}, F* falls from "
            f"{float(data.learning_energy[0]):.3f} to {float(data.learning_energy[-1]):.4f}",
        ),
        Evidence(NAME, f"{text} (relative difference from the reduced ODE)",
                 float(abs(norm / data.reduced_weight_norm.values - 1).max()), "below", 1e-4),
    ]  # fmt: skip


def _plane_claims(data: xarray.Dataset) -> list[Evidence]:
    fitted, at_saddle = stability(data)
    saddle = excess(data.plane_weights) > 0.25
    shares = saddle.mean("start").values
    quiet, loud = shares[:, data.noise.values < 1], shares[:, data.noise.values > 1]
    return [
        Evidence(
            NAME, "Thm 3.6: learning ends at the least ℒ from every start, whatever λ and the "
            "noise c (share that ends at the saddle)", float(saddle.mean()), "equal", 0.0,
            expected_to_hold=False,
            note=f"{quiet.max(initial=0):.0%} of starts for c < 1; for c > 1 up to "
            f"{loud.max():.0%}; {shares[0].max():.0%} at most at λ = {float(data.precision[0]):g}",
        ),
        Evidence(NAME, "the saddle wins only where c > 1 (largest share elsewhere)",
                 float(quiet.max(initial=0)), "equal", 0.0),
        Evidence(
            NAME, "the fit wins only where λ‖W₂‖²(c² − 1) ≤ 1 (largest at the fit)",
            float(fitted.max()), "at most", 1.0, 1e-3,
            note=f"of {fitted.size} runs; least of {at_saddle.size} at the saddle "
            f"{at_saddle.min(initial=np.inf):.3f}",
        ),
    ]  # fmt: skip


def _remedy_claims(data: xarray.Dataset) -> list[Evidence]:
    decay, norms = (excess(data[f"{n.replace(' ', '_')}_weights"]) for n in REMEDIES)
    number = data.remedy_precision.values[:, None] * data.norm.values**2
    number = number * (data.attrs["remedy_noise"] ** 2 - 1)
    inside, outside = norms.max("start").values[number < 0.9], norms.min("start").values[number > 1]
    best = ", ".join(
        f"λ = {p:g}: {float(d.min()):.1e} at ω = {float(data.decay[int(d.values.argmin())]):.2g}"
        for p, d in zip(data.remedy_precision.values, decay.max("start"), strict=True)
    )
    fixed = "output weights of fixed norm R bring it there where λR²(c² − 1) < 1"
    return [
        Evidence(
            NAME, "weight decay brings learning to the least ℒ (c = 3, any λ; excess of ℒ at the "
            "best strength, worst start and λ)", float(decay.max("start").min("decay").max()),
            "below", 0.05, expected_to_hold=False, note=best,
        ),
        Evidence(NAME, f"{fixed} (largest excess of ℒ inside)", float(inside.max()), "below", 1e-6),
        Evidence(NAME, f"{fixed}, and nowhere else (least excess of ℒ outside)",
                 float(outside.min()), "above", 0.4),
    ]  # fmt: skip


def _order_claim(data: xarray.Dataset) -> Evidence:
    gap, precisions = data.gradient_gap.values, data.order_precision.values
    return Evidence(
        NAME, "∇F*/λ = ∇ℒ + O(λ) at finite weights (tanh 3-8-2; order)",
        float(np.log(gap[-2] / gap[-1]) / np.log(precisions[-2] / precisions[-1])), "equal", 1.0,
        0.05, note=f"relative gap {gap[-1]:.1e} at λ = {float(precisions[-1]):g}",
    )  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Growth, the plane of λ and c, both remedies, the order in λ."""
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.2), layout="constrained")
    (grows, plane, order_), (decay, norm, slope) = axes
    later = data.isel(time=slice(1, None))
    grows.loglog(later.time, later.weight_norm, label=r"$\|W_2\|$")
    grows.loglog(later.time, later.reduced_weight_norm, "k:", lw=1, label="reduced ODE")
    grows.loglog(later.time, later.growing_loss, label=r"$\mathcal{L}$")
    grows.loglog(later.time, later.learning_energy, label="$F^*$")
    grows.set(xlabel="time (weight time constants)", title=r"at the saddle: $\propto t^{1/4}$")
    grows.legend()
    shares = 100 * (excess(data.plane_weights) > 0.25).mean("start")
    columns = np.arange(data.sizes["noise"] + 1)
    rows = np.arange(data.sizes["precision"] + 1)
    mesh = plane.pcolormesh(columns, rows, shares.values, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(mesh, ax=plane, label="at the saddle (% of starts)")
    plane.set_xticks(columns[:-1] + 0.5, [f"{c:g}" for c in data.noise.values])
    every = slice(None, None, 2 if data.sizes["precision"] > 4 else 1)
    plane.set_yticks((rows[:-1] + 0.5)[every], [f"{p:g}" for p in data.precision.values[every]])
    plane.set(xlabel="noise $c$", ylabel="output precision $λ$", title="where learning ends")
    order_.loglog(data.order_precision, data.gradient_gap, "o-")
    order_.set(xlabel="output precision $λ$", ylabel="relative gap",
               title=r"$\nabla F^*/λ$ against $\nabla\mathcal{L}$")  # fmt: skip
    for ax, name, coordinate in (
        (decay, "weight_decay", "decay"), (norm, "fixed_norm", "norm")
    ):  # fmt: skip
        values = excess(data[f"{name}_weights"]).mean("start")
        for i, precision in enumerate(data.remedy_precision.values):
            ax.semilogx(data[coordinate], values[i], "o-", ms=3, label=f"λ = {precision:g}")
            if name == "fixed_norm":
                limit = (precision * (data.attrs["remedy_noise"] ** 2 - 1)) ** -0.5
                ax.axvline(limit, color=f"C{i}", ls=":", lw=1)
        ax.axhline(0.5, color="0.6", lw=0.8, ls=":")
        ax.set(ylabel=r"mean $\mathcal{L}$ above the least", ylim=(-0.02, 0.55))
    decay.legend()  # for the norm too, which has no room
    decay.set(xlabel="weight decay ω (of F*/λ)", title="remedy: weight decay")
    norm.set(xlabel="norm of $W_2$", title="remedy: fixed norm (dotted: limit)")
    for i, precision in enumerate(data.remedy_precision.values):
        values = loss_gradient(data.weight_decay_weights[i].values).mean(-1)
        slope.loglog(data.decay, values, "o-", ms=3, label=f"λ = {precision:g}")
    slope.set(xlabel="weight decay ω (of F*/λ)", ylabel=r"mean $\|\nabla\mathcal{L}\|$",
              title="decay: how far from critical it ends", ylim=(1e-20, 10))  # fmt: skip
    slope.legend()
    return figure


def page(data: xarray.Dataset, folder: Path) -> str:
    """The second half: where learning ends, and what helps."""
    shares = 100 * (excess(data.plane_weights) > 0.25).mean("start").values
    header = "| λ | " + " | ".join(f"c = {c:g}" for c in data.noise.values) + " |"
    rows = [
        f"| {p:.2g} | " + " | ".join(f"{x:.0f}" for x in row) + " |"
        for p, row in zip(data.precision.values, shares, strict=True)
    ]
    table = "\n".join([header, "|---" * (1 + len(data.noise)) + "|", *rows])
    decay = excess(data.weight_decay_weights).max("start").values
    ends = "; ".join(
        f"λ = {p:g}: {row.min():.2g} above the least ℒ at ω = {data.decay.values[row.argmin()]:.2g}"
        for p, row in zip(data.remedy_precision.values, decay, strict=True)
    )
    helped = data.remedy_precision.values[decay.min(-1) < 0.05]
    by_decay = f"at λ = {', '.join(f'{p:g}' for p in helped)} only" if len(helped) else "at no λ"
    quiet = shares[:, data.noise.values < 1].max(initial=0)
    *_, inside, outside = _remedy_claims(data)
    noise = data.attrs["remedy_noise"]
    norm = data.weight_norm.values
    gap = data.gradient_gap.values
    return f"""# The convergence theorem, second half: where learning ends

Learning follows −∂F*/∂W with F*(W) = min_x F. Its limit points are critical points of F*, not of ℒ.
The [first half](../loss_along_inference/page.md) is about the loss during inference. Drawn by
`python -m experiments learning_limits`; `critical_points` shows a network that can interpolate its
data, where both gradients vanish together.

![Where learning ends](figure.png)

**When they agree.** Where the data are interpolated F* = ℒ = 0. At finite weights
∇F*/λ = ∇ℒ + O(λ) for the output precision λ: in a tanh 3-8-2 network the relative gap is
{gap[-1]:.1e} at λ = {float(data.order_precision[-1]):g}, of order {_order_claim(data).measured:.2f}
in λ.

**Learning need not end.** A linear 1-1-2 network whose targets are (x, cξ), ξ unrelated to x, has a
saddle of ℒ at W₁ = 0. There F* = λ/2 [1 + c²/(1 + λb²)] falls as W₂ = (0, b) grows, for ever:
b → (4c²t)^¼ in time t times samples, whatever λ is. Measured from {norm[0]:g} to {norm[-1]:.1f},
within {abs(norm / data.reduced_weight_norm.values - 1).max():.0e} of the reduced ODE; ℒ stays at
{float(data.growing_loss[-1]):.3f}, the least is 4.5. The infimum of F* is not attained, which
Proposition 3.1 assumes.

**Which end wins.** Per sample, F* is at least λ/2 near the saddle and λc²/2 at the fit of the first
output, whose ℒ is least. So the saddle can win only for c > 1; below, it won in {quiet:.0f} % of
starts at most. The fit W₂ = (a, 0), W₁ = 1/a is stable where λa²(c² − 1) < 1, and since every a is
as good, there is a stable part for any λ; small weights find it at small λ. Starts (of
{data.sizes["start"]}, N(0, 1)) that end at the saddle, in per cent:

{table}

**Weight decay** ½ω‖W‖² added to F*/λ ends the growth, not the preference. With
D = c√(λ/ω) = 1 + λb² the saddle is stable as long as (c² − 1)(D − 1 + λ²c²/D) > 1, and the fit is
biased by ω. For c = {noise:g}, worst of all starts: {ends}. It helps
{by_decay}, and what it finds is a critical point of ℒ plus decay, not of ℒ.

**A fixed norm R of W₂** makes the fit, unbiased because W₁ is free, the only stable end for
λR²(c² − 1) < 1. Measured: the excess of ℒ is at most {inside.measured:.0e} there, and at least
{outside.measured:.2f} above 1. It is no general cure: it asks for a bound that depends on λ and on
the noise, and in deeper networks S = Σ P Π⁻¹Pᵀ still varies at fixed norms, with a bias O(λ).
"""


EXPERIMENT = Experiment(
    "learning_limits", "extra: limits of learning", {"paper": Config()},
    {
        "t1": 1e4, "saves": 9, "precisions": (1e-3, 1.0), "noises": (0.5, 3.0), "starts": 2,
        "remedy_precisions": (1.0, 0.01), "decays": (1e-3, 1e-2, 1.0), "norms": (0.3, 1.0, 10.0),
        "order_precisions": (1e-2, 1e-3),
    },
    run, check, plot, page=page,
)  # fmt: skip
