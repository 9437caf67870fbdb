"""Learned precisions: what the data say of Π, and why the paper's free energy cannot learn it.

The free energy needs its log-determinants, and a posterior with a width. With the Gaussian
(Laplace) posterior, which is exact for linear networks, the flow of Π climbs the likelihood and
recovers the noise. With the delta posterior of the paper some layer always collapses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jax.flatten_util import ravel_pytree
from jaxtyping import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import minimize

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.precision_paths import with_precisions
from pcdyn import learning, linear
from pcdyn._support.states import cosine
from pcdyn._support.types import Activities
from pcdyn.learning.flows.precisions import Structure
from pcdyn.learning.flows.variational import PosteriorName
from pcdyn.references.algorithms import local_gradient
from pcdyn.theory import Evidence

NAME = "learned precisions"
NAMES = ("hidden", "output 1", "output 2")
STARTS = {"hidden layer more precise": (2.0, 1.0), "output more precise": (0.1, 10.0)}
# Growth at the boundary is slower: a factor of time in which Π_L grows to 10³ as well.
EDGE_TIME = 100.0
TIME = "time (time constants of the precisions)"
NOISES = ("true", "closed form", "flow", "delta, closed form")


@dataclasses.dataclass(frozen=True)
class Config:
    """Linear 3-3-2 networks with known weights, and samples drawn from their own noise."""

    samples: int = 400
    hidden_variance: float = 0.5
    output_variances: tuple[float, float] = (0.5, 1.0)
    t1: float = 600.0
    delta_t1: float = 20.0
    saves: int = 41
    rtol: float = 1e-8
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Both posteriors on the same samples; a full output precision; one at its boundary."""
    variances = (config.hidden_variance, np.diag(config.output_variances))
    problem = sampled(config, *variances)
    times = np.append(0, np.geomspace(0.1, config.t1, config.saves))
    delta_times = np.linspace(0, config.delta_t1, config.saves)
    laplace = follow(problem, (1.0, 1.0), ("scalar", "diagonal"), "laplace", times, config)
    deltas = [
        follow(problem, start, ("scalar", "diagonal"), "delta", delta_times, config)
        for start in STARTS.values()
    ]
    true = np.array([[0.5, 0.25], [0.25, 0.4]])
    plain = sampled(config, 0.05, true)
    full = follow(plain, (20.0, 1.0), ("fixed", "full"), "laplace", times, config)
    edge_times = EDGE_TIME * times
    edge = follow(plain, (0.05, 1.0), ("fixed", "full"), "laplace", edge_times, config)
    held, too_wide = (with_precisions(plain, (p, 1.0)) for p in (20.0, 0.05))
    noises = [
        true, learning.output_noise(held).covariance, np.linalg.inv(full["precisions"][1][-1]),
        learning.output_noise(held, posterior="delta").covariance,
    ]  # fmt: skip
    bound = learning.output_noise(too_wide).covariance
    sizes = np.linalg.eigvalsh(edge["precisions"][1])
    return xarray.Dataset(
        {
            "variance": (("time", "parameter"), 1 / table(laplace)),
            "closed_form": ("parameter", closed_form(problem)),
            "scipy": ("parameter", by_scipy(problem)),
            "true_variance": ("parameter", [variances[0], *config.output_variances]),
            "standard_error": ("parameter", standard_errors(problem, *variances)),
            "precision": (
                ("start", "delta_time", "parameter"), np.stack([table(d) for d in deltas])),
            "residual_precision": ("parameter", [np.inf, *1 / np.diag(second_moment(problem))]),
            "free_energy": ("time", laplace["free_energy"]),
            "delta_free_energy": (("start", "delta_time"), [d["free_energy"] for d in deltas]),
            "likelihood_gap": ("time", laplace["free_energy"] - laplace["likelihood"]),
            "cosine_bp": ("time", laplace["cosine_bp"]),
            "cosine_tp": ("time", laplace["cosine_tp"]),
            "delta_cosine_bp": (("start", "delta_time"), [d["cosine_bp"] for d in deltas]),
            "delta_cosine_tp": (("start", "delta_time"), [d["cosine_tp"] for d in deltas]),
            "noise": (("noise_of", "row", "column"), np.stack([np.asarray(n) for n in noises])),
            "edge_precision": (("edge_time", "direction"), sizes),
            "edge_distance": ("edge_time", np.linalg.norm(
                np.linalg.inv(edge["precisions"][1]) - np.asarray(bound), axis=(-2, -1))),
        },
        coords={
            "time": times, "edge_time": edge_times, "delta_time": delta_times,
            "parameter": list(NAMES), "start": list(STARTS), "noise_of": list(NOISES),
        },
        attrs={"source": "random numbers", "samples": config.samples},
    )  # fmt: skip


def sampled(config: Config, hidden: float, output: np.ndarray) -> pcdyn.InferenceProblem:
    """A linear 3-3-2 network and samples of its generative model with these covariances."""
    keys = jr.split(jr.key(config.seed), 4)
    # With independent rows that overlap, the noise of the two layers can be told apart.
    top_weight = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    network = pcdyn.Network([pcdyn.Dense(jr.normal(keys[0], (3, 3))), pcdyn.Dense(top_weight)])
    inputs = jr.normal(keys[1], (config.samples, 3))
    noise = jnp.sqrt(hidden) * jr.normal(keys[2], (config.samples, 3))
    factor = jnp.linalg.cholesky(jnp.asarray(output))
    top = jr.normal(keys[3], (config.samples, 2)) @ factor.T
    targets = network.predict(2, network.predict(1, inputs) + noise) + top
    return pcdyn.InferenceProblem(network, input=inputs, output=targets)


def follow(
    problem: pcdyn.InferenceProblem,
    start: Iterable[ArrayLike],
    structures: tuple[Structure, Structure],
    posterior: PosteriorName,
    times: np.ndarray,
    config: Config,
) -> dict[str, Any]:
    """Precisions, free energy, likelihood and cosines along the flow."""
    flow = learning.PrecisionFlow(with_precisions(problem, start), structures, posterior)
    run = pcdyn.simulate(
        flow, t1=float(times[-1]), times=times,
        integrator=pcdyn.SciPy("LSODA", rtol=config.rtol, atol=1e-3 * config.rtol),
    )  # fmt: skip
    found = {"precisions": run.precisions, "free_energy": np.asarray(flow.free_energy_along(run))}
    if "fixed" in structures:
        return found
    assert run.precisions is not None
    bp, tp, likelihood = (np.asarray(x) for x in compared(problem, run.precisions))
    return found | {"cosine_bp": bp, "cosine_tp": tp, "likelihood": likelihood}


@eqx.filter_jit
def compared(
    problem: pcdyn.InferenceProblem, precisions: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """At each time: the cosine of the weight gradient to BP's, that of the hidden activities' move
    to (difference) target propagation's, means over the samples, and −log p(T | d)."""

    def at(precisions: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        now = with_precisions(problem, precisions)
        assert now.input is not None and now.output is not None
        activities = pcdyn.linear_equilibrium(now, method="output_space")
        before = pcdyn.feedforward(now)
        left = now.output_error(before[-1])
        target = left @ jnp.linalg.pinv(now.network.layers[-1].weight).T

        def angle(x: jax.Array, y: jax.Array, rest: Activities) -> jax.Array:
            one = now.with_data(x, y)
            errors = one.prediction_errors(rest)
            deltas = [one.weighted_error(i, e) for i, e in enumerate(errors, start=1)]
            ours = local_gradient(one.network, rest, deltas)
            theirs = pcdyn.backpropagation(one).weight_gradient
            return cosine(ravel_pytree(ours)[0], ravel_pytree(theirs)[0])

        bp = jax.vmap(angle)(now.input, now.output, activities)
        tp = jax.vmap(cosine)(activities[1] - before[1], target)
        return jnp.mean(bp), jnp.mean(tp), jnp.mean(linear.negative_log_likelihood(now))

    return jax.vmap(at)(tuple(jnp.asarray(p) for p in precisions))


def table(found: dict[str, Any]) -> np.ndarray:
    """The three numbers of a scalar and a diagonal precision, shape (time, 3)."""
    hidden, output = found["precisions"]
    return np.concatenate([hidden[:, None], output], axis=-1)


def second_moment(problem: pcdyn.InferenceProblem) -> np.ndarray:
    """Ĉ, the mean of e0 e0ᵀ."""
    errors = problem.output_error(pcdyn.feedforward(problem)[-1])
    return np.asarray(errors.T @ errors) / len(errors)


def basis(problem: pcdyn.InferenceProblem) -> np.ndarray:
    """S as a matrix times the three variances, for its entries 11, 22 and 12."""
    spread = np.asarray(problem.network.layers[-1].weight)
    explained = spread @ spread.T
    return np.array([[explained[0, 0], 1, 0], [explained[1, 1], 0, 1], [explained[0, 1], 0, 0]])


def closed_form(problem: pcdyn.InferenceProblem) -> np.ndarray:
    """The three variances with S = Ĉ: where the likelihood is largest if all are positive."""
    measured = second_moment(problem)
    return np.linalg.solve(basis(problem), [measured[0, 0], measured[1, 1], measured[0, 1]])


def standard_errors(
    problem: pcdyn.InferenceProblem, hidden: float, output: np.ndarray
) -> np.ndarray:
    """Of `closed_form`: Ĉ is Wishart, cov(Ĉ_ij, Ĉ_kl) = (S_ik S_jl + S_il S_jk) / samples."""
    spread = np.asarray(problem.network.layers[-1].weight)
    s = hidden * spread @ spread.T + output
    pairs = ((0, 0), (1, 1), (0, 1))
    wishart = [[s[i, k] * s[j, l] + s[i, l] * s[j, k] for k, l in pairs] for i, j in pairs]
    inverse = np.linalg.inv(basis(problem))
    (samples,) = problem.batch_shape or (1,)
    return np.sqrt(np.diag(inverse @ np.array(wishart) @ inverse.T) / samples)


def by_scipy(problem: pcdyn.InferenceProblem) -> np.ndarray:
    """The three variances that maximise the likelihood, by Nelder–Mead on their logarithms."""
    measured = second_moment(problem)
    spread = np.asarray(problem.network.layers[-1].weight)

    def cost(logs: np.ndarray) -> float:
        s = np.exp(logs[0]) * spread @ spread.T + np.diag(np.exp(logs[1:]))
        return np.trace(np.linalg.solve(s, measured)) + np.linalg.slogdet(s)[1]

    options = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000}
    return np.exp(minimize(cost, np.zeros(3), method="Nelder-Mead", options=options).x)


def check(data: xarray.Dataset) -> list[Evidence]:
    """Laplace recovers the noise; delta collapses, one layer or the other."""
    return [*_laplace(data), *_delta(data), *_full(data)]


def _laplace(data: xarray.Dataset) -> list[Evidence]:
    end = data.variance.isel(time=-1)
    scores = abs(end - data.true_variance) / data.standard_error
    optimum = "with a Laplace posterior the flow ends at the maximum of the likelihood"
    between = "with a Laplace posterior the network stays between BP and TP"
    return [
        Evidence(NAME, "F with a Laplace posterior is −log p(T | d) along the flow (largest "
                 "difference)", float(abs(data.likelihood_gap).max()), "below", 1e-11),
        *(
            Evidence(NAME, f"{optimum} (relative distance)", float(abs(end / there - 1).max()),
                     "below", bound, oracle=oracle)
            for there, bound, oracle in (
                (data.closed_form, 1e-6, "its closed form"),
                (data.scipy, 1e-5, "SciPy's Nelder–Mead"),
            )
        ),
        Evidence(
            NAME, "with a Laplace posterior they are the inverse noise variances (standard errors "
            "apart)", float(scores.max()), "at most", 3.0,
            note=f"variances {numbers(end)} for {numbers(data.true_variance)} "
            f"({data.attrs['samples']} samples)",
        ),
        *(
            Evidence(NAME, f"{between} (cosine to {name} at the end)", float(cosine[-1]), "below",
                     0.999, note=f"from {float(cosine[0]):.4f}")
            for name, cosine in (("BP", data.cosine_bp), ("TP", data.cosine_tp))
        ),
    ]  # fmt: skip


def _delta(data: xarray.Dataset) -> list[Evidence]:
    first = next(iter(STARTS))
    hidden = data.precision.sel(start=first)
    growth = rates(np.log(hidden.sel(parameter="hidden")))
    fall = rates(data.delta_free_energy.sel(start=first))
    ends = hidden.isel(delta_time=-1)[1:]
    residual = float(abs(ends / data.residual_precision[1:] - 1).max())
    bp, tp = data.delta_cosine_bp[:, -1].values, data.delta_cosine_tp[:, -1].values
    collapse = "the start decides which layer collapses: "
    return [
        Evidence(
            NAME, "with the delta posterior of the paper F has a minimum (rate at which it falls "
            "in the end)", -fall, "equal", 0.0, 1e-3, expected_to_hold=False,
            note=f"log Π_1 grows at {growth:.4f}, without end (n/2 = 1.5, its square 2.25)",
        ),
        Evidence(NAME, "a collapsing layer's log Π grows at n/2", growth, "equal", 1.5, 1e-2),
        Evidence(NAME, "a collapsing layer's F falls at n²/4", -fall, "equal", 2.25, 1e-2),
        Evidence(
            NAME, f"{collapse}the hidden one leaves BP (cosine to its weight gradient)",
            float(bp[0]), "above", 0.999, note=f"{bp[1]:.4f} where the output collapses",
        ),
        Evidence(
            NAME, f"{collapse}the output leaves TP (cosine to its targets)", float(tp[1]), "above",
            0.999, note=f"{tp[0]:.4f} where the hidden one collapses",
        ),
        Evidence(
            NAME, "after a hidden collapse the output precision is the inverse noise variance "
            "(relative difference)", float(abs(ends * data.true_variance[1:] - 1).max()), "below",
            0.1, expected_to_hold=False,
            note=f"{residual:.1e} from the inverse of the residuals' variance",
        ),
    ]  # fmt: skip


def _full(data: xarray.Dataset) -> list[Evidence]:
    full = data.noise.sel(noise_of="flow") - data.noise.sel(noise_of="closed form")
    late = data.edge_precision.isel(edge_time=[-3, -1]).max("direction")
    return [
        Evidence(NAME, "a full output precision is the inverse of Ĉ − V (largest difference of "
                 "covariances)", float(abs(full).max()), "below", 1e-6),
        Evidence(
            NAME, "where Ĉ − V is not positive definite Π grows like t, F bounded (order)",
            float((np.diff(np.log(late)) / np.diff(np.log(late.edge_time))).item()), "equal", 1.0,
            0.02, note=f"covariance {float(data.edge_distance[-1]):.1e} from that of the boundary",
        ),
    ]  # fmt: skip


def rates(values: xarray.DataArray) -> float:
    """The slope over the last quarter of the delta posterior's time."""
    late = values.isel(delta_time=[3 * values.sizes["delta_time"] // 4, -1])
    return float((np.diff(late) / np.diff(late.delta_time)).item())


def numbers(values: xarray.DataArray) -> str:
    """The numbers of a short vector."""
    return ", ".join(f"{float(v):.3f}" for v in values)


def plot(data: xarray.Dataset) -> Figure:
    """Variances and precisions in time, F, the recovered noise, the boundary, BP and TP."""
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.6), layout="constrained")
    late, edge = data.isel(time=slice(1, None)), data.isel(edge_time=slice(1, None))
    for i, name in enumerate(NAMES):
        axes[0, 0].semilogx(late.time, late.variance.sel(parameter=name), label=name)
        axes[0, 0].axhline(float(data.closed_form[i]), color=colors[i], ls="--", lw=1)
        axes[0, 0].axhline(float(data.true_variance[i]), color=colors[i], ls=":", lw=1)
    axes[0, 0].set(xlabel=TIME, ylabel="variance (1 / precision)",
                   title="Laplace posterior: noise recovered\n"
                   "(dashed: closed form, dotted: true)")  # fmt: skip
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(loc="lower left", ncols=3, columnspacing=1, handlelength=1.5)
    for ls, start in zip(("-", "--"), STARTS, strict=True):
        for i, name in enumerate(NAMES):
            axes[0, 1].semilogy(
                data.delta_time, data.precision.sel(start=start, parameter=name), ls,
                color=colors[i], label=name if ls == "-" else None,
            )  # fmt: skip
    axes[0, 1].set(xlabel=TIME, ylabel="precision",
                   title="delta posterior: one layer collapses\n"
                   "(dashed: output more precise at first)")  # fmt: skip
    axes[0, 1].legend(loc="upper left")
    draw_free_energy(axes[0, 2], data, colors)
    draw_noises(axes[1, 0], data, colors)
    for i, direction in enumerate(("larger", "smaller")):
        axes[1, 1].loglog(edge.edge_time, edge.edge_precision[:, 1 - i],
                          label=f"{direction} eigenvalue")  # fmt: skip
    guide = edge.edge_precision[-1, 1] * edge.edge_time / edge.edge_time[-1]
    axes[1, 1].loglog(edge.edge_time, guide, "k:", lw=1, label="∝ t")
    axes[1, 1].set(xlabel=TIME, ylabel="output precision",
                   title="Laplace posterior, hidden noise\n"
                   "held larger than the data allow")  # fmt: skip
    axes[1, 1].legend()
    draw_cosines(axes[1, 2], data, colors)
    return figure


def draw_free_energy(ax: Axes, data: xarray.Dataset, colors: list[str]) -> None:
    """F in time for both posteriors, on the time axis of the delta posterior."""
    shown = data.sel(time=slice(0, float(data.delta_time[-1])))
    ax.plot(shown.time, shown.free_energy, label="Laplace")
    for (i, start), ls in zip(enumerate(STARTS, start=1), ("-", "--"), strict=True):
        ax.plot(data.delta_time, data.delta_free_energy.sel(start=start), ls, color=colors[i],
                label=f"delta, {start}")  # fmt: skip
    ax.axhline(float(data.free_energy[-1]), color="0.5", ls=":", lw=1)
    ax.set(xlabel=TIME, ylabel="variational free energy",
           title="free energy per sample\n(dotted: least −log p)")  # fmt: skip
    # Room for the legend under the lines.
    ax.set_ylim(bottom=1.6 * float(data.delta_free_energy.min()))
    ax.legend(loc="lower left")


def draw_noises(ax: Axes, data: xarray.Dataset, colors: list[str]) -> None:
    """Ellipses of one standard deviation."""
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    looks = (("k", ":"), (colors[0], "-"), (colors[1], "--"), (colors[2], "-"))
    for name, (color, ls) in zip(NOISES, looks, strict=True):
        ellipse = np.linalg.cholesky(data.noise.sel(noise_of=name).values) @ circle
        ax.plot(*ellipse, ls, color=color, label=name)
    ax.set(xlabel="output 1", ylabel="output 2", xlim=(-1.6, 1.6), ylim=(-1, 1.6),
           title="covariance of the output noise\n(one standard deviation)")  # fmt: skip
    ax.set_aspect("equal")
    ax.legend(loc="upper center", ncols=2)


def draw_cosines(ax: Axes, data: xarray.Dataset, colors: list[str]) -> None:
    """Cosines to BP and TP, each flow over its own time."""
    flows = [("Laplace", data.time, data.cosine_bp, data.cosine_tp)]
    for start in STARTS:
        part = data.sel(start=start)
        flows.append(
            (f"delta, {start}", data.delta_time, part.delta_cosine_bp, part.delta_cosine_tp)
        )
    for i, (name, time, bp, tp) in enumerate(flows):
        share = time / time[-1] if i else np.log1p(time) / np.log1p(time[-1])
        ax.plot(share, bp, color=colors[i], label=name)
        ax.plot(share, tp, "--", color=colors[i])
    ax.set(xlabel="share of the time (Laplace: of its logarithm)", ylabel="mean cosine",
           title="weight gradient to BP (solid),\nhidden activities to TP (dashed)")  # fmt: skip
    ax.set_ylim(bottom=1 - 1.6 * float(1 - data.delta_cosine_bp.min()))
    ax.legend(loc="lower right")


EXPERIMENT = Experiment(
    "learned_precisions", "extra: learned precisions", {"paper": Config()},
    {"samples": 100, "saves": 9}, run, check, plot,
)  # fmt: skip
