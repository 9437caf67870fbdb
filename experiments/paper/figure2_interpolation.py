"""Figure 2 left: the precision ratio interpolates between backpropagation and TP."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib.figure import FigureBase
from scipy.interpolate import CubicSpline

import pcdyn
from experiments.shared.experiment import Experiment, alone
from experiments.shared.measures import STATISTICS, draw_band, statistics
from experiments.shared.networks import at_ratios, linear_problems
from pcdyn._support.states import cosine
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 linear networks with Π_1 = 1 and Π_2 the precision ratio; Euler on the first few."""

    networks: int = 5000
    euler_networks: int = 1000
    width: int = 5
    weight_std: float = 0.05**0.5
    lowest_decade: float = -4.0
    highest_decade: float = 8.0
    ratios: int = 37
    euler_step: float = 0.1
    euler_steps: int = 100
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Exact equilibria of all networks at each ratio, and what Euler makes of some."""
    keys = jr.split(jr.key(config.seed), 3)
    networks = linear_problems(
        keys, networks=config.networks, width=config.width, std=config.weight_std
    )
    ratios = np.logspace(config.lowest_decade, config.highest_decade, config.ratios)

    def settle(problem: pcdyn.InferenceProblem) -> tuple[jax.Array, jax.Array]:
        return cosines(problem, pcdyn.linear_equilibrium(problem)[1])

    to_tp, to_bp = at_ratios(settle, ratios, networks)
    return xarray.Dataset(
        {
            "cosine_to_tp": (("ratio", "statistic"), statistics(to_tp, axis=1)),
            "cosine_to_bp": (("ratio", "statistic"), statistics(to_bp, axis=1)),
            "tp_over_bp": (("ratio", "statistic"), statistics(to_tp - to_bp, axis=1)),
            "step_to_tp": (("step", "statistic"), statistics(np.diff(to_tp, axis=0), axis=1)),
            "step_to_bp": (("step", "statistic"), statistics(-np.diff(to_bp, axis=0), axis=1)),
            **euler(config, ratios, [each[: config.euler_networks] for each in networks]),
        },
        coords={"ratio": ratios, "statistic": list(STATISTICS)},
        attrs={"euler_step": config.euler_step, "networks": config.networks},
    )  # fmt: skip


def euler(config: Config, ratios: np.ndarray, networks: Sequence[jax.Array]) -> dict[str, Any]:
    """Where the authors' step is unstable, where it diverges, and the cosines that it ends with."""
    t1 = config.euler_step * config.euler_steps

    def iterate(problem: pcdyn.InferenceProblem) -> tuple[jax.Array, ...]:
        stepped = pcdyn.simulate(
            problem, t1=t1, times=[0.0, t1], integrator=pcdyn.Euler(dt=config.euler_step)
        )
        # The Hessian of a linear network is the same everywhere.
        largest = pcdyn.stability(problem, at="feedforward").largest_euler_step
        field = jnp.linalg.norm(stepped.vector_field_norms, axis=-1)
        return *cosines(problem, stepped.activities[1][-1]), largest, field

    to_tp, to_bp, largest, field = at_ratios(iterate, ratios, networks)
    excess = config.euler_step / largest
    unstable = excess > 1
    # The fastest mode grows by this; where it starts out small and hardly grows, the run is too
    # short to show it.
    with np.errstate(over="ignore"):
        too_short = unstable & ((2 * excess - 1) ** config.euler_steps < 1e4)
    # The authors average diverged draws as well, with NaN and 0 replaced by 1: that curve is kept
    # beside the one of the stable draws, in which the diverged are counted but not averaged.
    published = np.nan_to_num(to_tp, nan=1.0)
    dims = ("ratio", "euler_network")
    return {
        "euler_cosine_to_tp": ("ratio", _mean_where(~unstable, to_tp)),
        "euler_cosine_to_bp": ("ratio", _mean_where(~unstable, to_bp)),
        "euler_published_to_tp": ("ratio", np.where(published == 0, 1, published).mean(axis=1)),
        "euler_unstable": (dims, unstable),
        # A stable step shrinks the field of a linear network in every mode.
        "euler_diverged": (dims, ~(field[..., -1] <= field[..., 0])),
        "euler_too_short": (dims, too_short),
    }


def cosines(problem: pcdyn.InferenceProblem, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of hidden activities to the TP target, and of the prediction error to the delta of BP."""
    backpropagated = pcdyn.backpropagation(problem)
    target = pcdyn.target_propagation(problem).values[1]
    error = hidden - backpropagated.activities[1]
    return cosine(hidden, target), cosine(error, backpropagated.deltas[0])


def _mean_where(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of each row over the chosen entries; NaN where there is none."""
    sums, numbers = np.where(chosen, values, 0).sum(axis=1), chosen.sum(axis=1)
    return np.divide(sums, numbers, out=np.full(len(sums), np.nan), where=numbers > 0)


def check(data: xarray.Dataset) -> list[Evidence]:
    """Monotone in the ratio, ends at one; the crossing; where Euler is unstable and diverges."""
    claims = []
    for name, end in (("TP", -1), ("BP", 0)):
        steps = data[f"step_to_{name.lower()}"]
        excess = steps.sel(statistic="mean") + 2 * steps.sel(statistic="error")
        last = data[f"cosine_to_{name.lower()}"].sel(statistic="mean")[end]
        word = "falls" if name == "TP" else "rises"
        claims += [
            Evidence(
                "2 left", f"cosine to {name} {word} as the ratio falls (smallest step + 2 s.e.)",
                float(excess.min()), "at least", 0.0, 1e-12,
                note=f"{data.attrs['networks']} networks; up to round-off",
            ),
            Evidence("2 left", f"cosine to {name} ends near 1", float(last), "above", 0.99),
        ]  # fmt: skip
    return [*claims, _crossing(data), _stability(data), _divergence(data)]


def _crossing(data: xarray.Dataset) -> Evidence:
    """Where the mean curves cross, on cubic splines, for straight lines are off by a hundredth."""
    logs = np.log10(data.ratio.values)
    gap = CubicSpline(logs, data.tp_over_bp.sel(statistic="mean").values)
    roots = gap.roots(extrapolate=False)
    where = float(roots[0]) if len(roots) == 1 else math.nan
    error = np.interp(where, logs, data.tp_over_bp.sel(statistic="error").values) / gap(where, 1)
    return Evidence(
        "2 left", "the two mean curves cross once, above equal precisions (decades of the ratio)",
        where, "above", 0.0, error=abs(float(error)), note=f"{len(roots)} crossing",
    )  # fmt: skip


def _stability(data: xarray.Dataset) -> Evidence:
    share = data.euler_unstable.mean("euler_network").values
    logs = np.log10(data.ratio.values)
    parts = [f"{each:.1%} at 10^{log:.2f}" for log, each in zip(logs, share, strict=True)
             if 0 < each < 1]  # fmt: skip
    return Evidence(
        "2 left", f"Euler's step {data.attrs['euler_step']:g} is stable at every ratio (largest "
        "share of draws in which it is not)", float(share.max()), "equal", 0.0,
        expected_to_hold=False, note=f"{', '.join(parts)} of {data.sizes['euler_network']} draws; "
        "none below, all above",
    )  # fmt: skip


def _divergence(data: xarray.Dataset) -> Evidence:
    """Whether the draws that diverge are those whose largest stable step is exceeded."""
    agree = data.euler_unstable == data.euler_diverged
    return Evidence(
        "2 left", "Euler diverges in the draws whose largest stable step it exceeds (share of "
        "those that can tell)", float((agree | data.euler_too_short).mean()), "equal", 1.0,
        note=f"the same in {int(agree.sum())} of {agree.size}",
    )  # fmt: skip


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """Cosines against the precision ratio, with Euler beside the exact equilibrium."""
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name in ("tp", "bp"):
        label = f"equilibrium to {name.upper()}"
        draw_band(data.ratio.values, data[f"cosine_to_{name}"], ax=axes[0], label=label)
        color = axes[0].lines[-1].get_color()
        axes[0].plot(
            data.ratio, data[f"euler_cosine_to_{name}"], "x", ms=4, color=color,
            label=f"Euler, stable draws, to {name.upper()}",
        )  # fmt: skip
    axes[0].plot(
        data.ratio, data.euler_published_to_tp, ":", color="gray",
        label="Euler, all draws, NaN and 0 → 1, to TP",
    )  # fmt: skip
    axes[0].set(ylabel="cosine similarity")
    axes[0].legend(loc="lower right", fontsize=8)
    axes[0].set_ylim(-0.75, 1.1)
    axes[0].set_title(
        f"Exact equilibria (mean, 10–90 %) and Euler (η = {data.attrs['euler_step']:g})"
    )
    axes[1].plot(
        data.ratio, data.euler_unstable.mean("euler_network"),
        color="black", label="step above the largest stable one",
    )  # fmt: skip
    axes[1].plot(
        data.ratio, data.euler_diverged.mean("euler_network"), "x", ms=4, color="black",
        label="simulation diverges",
    )  # fmt: skip
    axes[1].legend(loc="lower right", fontsize=8)
    axes[1].set(ylabel="share of draws\nEuler diverges", xlabel="precision ratio $Π_2/Π_1$")
    axes[1].set_xscale("log")
    axes[1].set_ylim(-0.05, 1.05)


EXPERIMENT = Experiment(
    "figure2_interpolation", "2 left", {"paper": Config()},
    {"networks": 100, "euler_networks": 20}, run, check, alone(draw, 5.5, 5), draw=draw,
)  # fmt: skip
