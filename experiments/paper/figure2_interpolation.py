"""Figure 2 left: the precision ratio interpolates between backpropagation and TP."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib.figure import FigureBase

import pcdyn
from experiments.shared.experiment import Experiment, alone
from experiments.shared.networks import linear_problems, network_of
from pcdyn import plotting
from pcdyn._support.states import cosine
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 linear networks with Π_1 = 1 and Π_2 the precision ratio."""

    networks: int = 100
    width: int = 5
    weight_std: float = 0.05**0.5
    lowest_decade: float = -4.0
    highest_decade: float = 8.0
    ratios: int = 37
    euler_step: float = 0.1
    euler_steps: int = 100
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Exact equilibria and the authors' Euler iteration for each network and ratio."""
    keys = jr.split(jr.key(config.seed), 3)
    weights, inputs, outputs = linear_problems(
        keys, networks=config.networks, width=config.width, std=config.weight_std
    )
    ratios = np.logspace(config.lowest_decade, config.highest_decade, config.ratios)
    t1 = config.euler_step * config.euler_steps

    def one(
        ratio: jax.Array, weights: jax.Array, input: jax.Array, output: jax.Array
    ) -> tuple[jax.Array, ...]:
        problem = pcdyn.InferenceProblem(
            network_of(weights, "identity"), input=input, output=output,
            energy=pcdyn.Gaussian([1.0, ratio]),
        )  # fmt: skip
        rest = pcdyn.linear_equilibrium(problem)
        euler = pcdyn.simulate(
            problem, t1=t1, times=[0.0, t1], integrator=pcdyn.Euler(dt=config.euler_step)
        )
        rates = pcdyn.linear.spectrum(problem)
        # The Hessian of a linear network is the same everywhere.
        step = pcdyn.stability(problem, at="feedforward").largest_euler_step
        field = jnp.linalg.norm(euler.vector_field_norms, axis=-1)
        prediction = problem.network.predict(1, input)
        target = pcdyn.target_propagation(problem).values[1]
        delta = pcdyn.backpropagation(problem).deltas[0]
        return (rest[1], euler.activities[1][-1], rates[-1], prediction, target, delta,
                step, field)  # fmt: skip

    over_networks = jax.vmap(one, in_axes=(None, 0, 0, 0))
    batched = eqx.filter_jit(jax.vmap(over_networks, in_axes=(0, None, None, None)))
    results = [np.asarray(r) for r in batched(jnp.asarray(ratios), weights, inputs, outputs)]
    exact, euler, fastest, prediction, target, delta, largest_step, field = results
    dims = ("ratio", "network")
    unstable = fastest * config.euler_step > 2
    # The authors average diverged draws as well, with NaN and 0 replaced by 1: that curve is kept
    # beside the one of the stable draws, in which the diverged are counted but not averaged.
    with np.errstate(over="ignore", invalid="ignore"):
        published = np.nan_to_num(cosine(euler, target), nan=1.0)
    published = np.where(published == 0, 1.0, published)
    euler = np.where(unstable[..., None], np.nan, euler)
    # A stable step shrinks the field of a linear network in every mode.
    diverged = ~(field[..., -1] <= field[..., 0])
    return xarray.Dataset(
        {
            "cosine_to_tp": (dims, cosine(exact, target)),
            "cosine_to_bp": (dims, cosine(exact - prediction, delta)),
            "euler_cosine_to_tp": (dims, cosine(euler, target)),
            "euler_cosine_to_bp": (dims, cosine(euler - prediction, delta)),
            "euler_published_to_tp": (dims, published),
            "euler_unstable": (dims, unstable),
            "euler_diverged": (dims, diverged),
            "largest_euler_step": (dims, largest_step),
        },
        coords={"ratio": ratios},
        attrs={"euler_step": config.euler_step, "euler_steps": config.euler_steps},
    )  # fmt: skip


def check(data: xarray.Dataset) -> list[Evidence]:
    """Monotone in the ratio, ends at one; the crossing; where Euler is unstable and diverges."""
    n = data.sizes["network"]
    claims = []
    for name, sign, end in (("tp", 1, -1), ("bp", -1, 0)):
        values = data[f"cosine_to_{name}"]
        steps = sign * values.diff("ratio")
        excess = float((steps.mean("network") + 2 * steps.std("network", ddof=1) / n**0.5).min())
        word = "falls" if name == "tp" else "rises"
        claims += [
            Evidence(
                "2 left", f"cosine to {name.upper()} {word} as the ratio falls (smallest step + "
                "2 s.e.)", excess, "at least", 0.0, 1e-12, note="up to round-off",
            ),
            Evidence("2 left", f"cosine to {name.upper()} ends near 1", float(values[end].mean()),
                     "above", 0.99),
        ]  # fmt: skip
    share = data.euler_unstable.mean("network")
    return [
        *claims,
        _crossing(data),
        Evidence(
            "2 left", "the authors' Euler step is stable at every ratio (largest share of draws in "
            "which it is not)", float(share.max()), "equal", 0.0, expected_to_hold=False,
            note=f"{float(share.mean()):.0%} overall",
        ),
        _divergence(data),
    ]  # fmt: skip


def _divergence(data: xarray.Dataset) -> Evidence:
    """Whether the draws that diverge are those whose largest stable step is exceeded."""
    excess = data.attrs["euler_step"] / data.largest_euler_step
    agree = (excess > 1) == data.euler_diverged
    # The fastest mode grows by this; where it starts out small and hardly grows, the run is too
    # short to show it.
    growth = (2 * excess - 1) ** data.attrs["euler_steps"]
    too_short = (excess > 1) & (growth < 1e4)
    return Evidence(
        "2 left", "Euler diverges in the draws whose largest stable step it exceeds (share of "
        "those that can tell)", float((agree | too_short).mean()), "equal", 1.0,
        note=f"above it in {float((excess > 1).mean()):.1%} of draws, diverges in "
        f"{float(data.euler_diverged.mean()):.1%}; the same in {int(agree.sum())} of {agree.size}",
    )  # fmt: skip


def _crossing(data: xarray.Dataset) -> Evidence:
    gap = (data.cosine_to_tp - data.cosine_to_bp).mean("network").values
    logs = np.log10(data.ratio.values)
    signs = np.flatnonzero(np.diff(np.sign(gap)) != 0)
    where = [logs[i] - gap[i] * (logs[i + 1] - logs[i]) / (gap[i + 1] - gap[i]) for i in signs]
    return Evidence(
        "2 left", "the two mean curves cross once (crossings)", len(where), "equal", 1,
        note=f"at ratio {', '.join(f'10^{w:.2f}' for w in where) or 'none'}",
    )  # fmt: skip


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """Cosines against the precision ratio, with Euler beside the exact equilibrium."""
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name in ("tp", "bp"):
        values = data[f"cosine_to_{name}"].values.T
        label = f"equilibrium to {name.upper()}"
        plotting.mean_band(data.ratio.values, values, ax=axes[0], label=label)
        color = axes[0].lines[-1].get_color()
        stable = data[f"euler_cosine_to_{name}"].mean("network")
        axes[0].plot(
            data.ratio, stable, "x", ms=4, color=color,
            label=f"Euler, stable draws, to {name.upper()}",
        )  # fmt: skip
    axes[0].plot(
        data.ratio, data.euler_published_to_tp.mean("network"), ":", color="gray",
        label="Euler as published (NaN → 1), to TP",
    )  # fmt: skip
    axes[0].set(ylabel="cosine similarity")
    axes[0].legend(loc="lower right", fontsize=8)
    axes[0].set_ylim(-0.75, 1.1)
    axes[0].set_title(f"Exact equilibria and Euler (η = {data.attrs['euler_step']:g})")
    axes[1].plot(
        data.ratio, (data.attrs["euler_step"] > data.largest_euler_step).mean("network"),
        color="black", label="step above the largest stable one",
    )  # fmt: skip
    axes[1].plot(
        data.ratio, data.euler_diverged.mean("network"), "x", ms=4, color="black",
        label="simulation diverges",
    )  # fmt: skip
    axes[1].legend(loc="lower right", fontsize=8)
    axes[1].set(ylabel="share of draws\nEuler diverges", xlabel="precision ratio $Π_2/Π_1$")
    axes[1].set_xscale("log")
    axes[1].set_ylim(-0.05, 1.05)


EXPERIMENT = Experiment(
    "figure2_interpolation", "2 left", {"paper": Config(), "code": Config(weight_std=0.05)},
    {"networks": 20, "ratios": 13}, run, check, alone(draw, 5.5, 5), draw=draw,
)  # fmt: skip
