"""Figure 3 A, B: with full precision matrices inference finds the precision equilibrium."""

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
from experiments.shared.measures import STATISTICS, estimate, largest_rise, statistics
from experiments.shared.networks import linear_problems, network_of
from pcdyn import plotting
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 linear networks; covariances with a unit diagonal and Gaussian entries off it (A.9).

    Entries above the diagonal are drawn and those below are the same, so that each has the variance
    of .1. What is drawn is often no covariance: then it is drawn again.
    """

    networks: int = 50
    width: int = 5
    weight_std: float = 0.05**0.5
    variance: float = 1.0
    covariance_std: float = 0.1**0.5
    draws: int = 10_000
    t1: float = 120.0
    seed: int = 0


def random_covariances(key: jax.Array, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Two covariances per network, and which of all draws are not positive definite."""
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    noise = rng.normal(0, config.covariance_std, (config.draws, config.width, config.width))
    above = np.triu(noise, k=1)
    drawn = above + above.swapaxes(1, 2) + config.variance * np.eye(config.width)
    rejected = np.linalg.eigvalsh(drawn)[:, 0] <= 0
    accepted = drawn[~rejected][: 2 * config.networks]
    return accepted.reshape(config.networks, 2, config.width, config.width), rejected


def run(config: Config) -> xarray.Dataset:
    """Integrate each network from its feedforward pass and compare with the closed form."""
    keys = jr.split(jr.key(config.seed), 4)
    weights, inputs, outputs = linear_problems(
        keys, networks=config.networks, width=config.width, std=config.weight_std
    )
    covariances, rejected = random_covariances(keys[3], config)
    times = np.concatenate([np.linspace(0, 15, 151), np.linspace(15, config.t1, 106)[1:]])

    def one(
        weights: jax.Array, precisions: jax.Array, input: jax.Array, output: jax.Array
    ) -> tuple[jax.Array, ...]:
        problem = pcdyn.InferenceProblem(
            network_of(weights, "identity"), input=input, output=output,
            energy=pcdyn.Gaussian([precisions[0], precisions[1]]),
        )  # fmt: skip
        trajectory = pcdyn.simulate(
            problem, t1=config.t1, times=times,
            integrator=pcdyn.Diffrax("kvaerno5", rtol=1e-10, atol=1e-12),
        )  # fmt: skip
        rest = pcdyn.linear_equilibrium(problem)[1]
        return trajectory.activities[1], trajectory.free_energy, trajectory.status_codes, rest

    precisions = jnp.asarray(np.linalg.inv(covariances))
    results = eqx.filter_jit(jax.vmap(one))(weights, precisions, inputs, outputs)
    hidden, energy, status, rest = (np.asarray(r) for r in results)
    return xarray.Dataset(
        {
            "activity": (("network", "time", "unit"), hidden),
            "equilibrium": (("network", "unit"), rest),
            "free_energy": (("network", "time"), energy),
            "distance": (("network", "time"), np.linalg.norm(hidden - rest[:, None], axis=-1)),
            "status": ("network", status),
            "rejected": ("statistic", statistics(rejected)),
        },
        coords={
            "time": ("time", times, {"units": "activity time constants"}),
            "statistic": list(STATISTICS),
        },
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """The distance vanishes and the free energy only falls."""
    energy = data.free_energy.values
    rejected, error = estimate(data.rejected)
    return [
        Evidence("3A/B", "what A.9 draws is a covariance (share that is not positive definite)",
                 rejected, "equal", 0.0, error=error, expected_to_hold=False,
                 note="drawn again"),
        Evidence(
            "3A/B", "activities reach the precision equilibrium (Thm 3.5; largest distance)",
            float(data.distance[:, -1].max()), "below", 1e-8,
            note=f"of {data.sizes['network']} networks",
        ),
        Evidence("3A/B", "every run comes to its end (share)", float((data.status == 0).mean()),
                 "equal", 1.0),
        Evidence("3B", "free energy never rises (largest relative rise)",
                 largest_rise(energy / energy[:, :1], axis=1), "at most", 1e-11, note="round-off"),
    ]  # fmt: skip


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """Panel A: activities of one network; panel B: distance, all networks."""
    axes = figure.subplots(1, 2)
    shown = data.time <= 15
    for unit in range(data.sizes["unit"]):
        (line,) = axes[0].plot(data.time[shown], data.activity[0, shown, unit])
        axes[0].axhline(float(data.equilibrium[0, unit]), color=line.get_color(), ls="--")
    axes[0].set(xlabel=plotting.TIME_LABEL, ylabel="hidden activity $x_1$")
    axes[0].set_title("A  activities and equilibrium (dashed)")
    # Afterwards it is round-off.
    squared = (data.distance**2)[:, data.time <= 50]
    axes[1].semilogy(squared.time, squared.median("network"), label="median")
    low, high = squared.quantile([0.1, 0.9], dim="network").values
    axes[1].fill_between(squared.time, low, high, alpha=0.2, lw=0, label="10–90 %")
    axes[1].set(xlabel=plotting.TIME_LABEL, ylabel="squared distance")
    axes[1].set_title("B  distance to the precision equilibrium")
    axes[1].legend()


EXPERIMENT = Experiment(
    "figure3_precision", "3A, 3B", {"paper": Config()}, {"networks": 8}, run, check,
    alone(draw, 8, 3.2), draw=draw,
)  # fmt: skip
