"""Figure 1 C, D: a linear network converges to its closed-form equilibrium."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import xarray
from matplotlib.figure import FigureBase

import pcdyn
from experiments.shared.experiment import Experiment, alone
from experiments.shared.measures import largest_rise
from experiments.shared.networks import linear_problems, network_of
from pcdyn import plotting
from pcdyn.theory import Evidence


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5 linear networks, both ends clamped to Gaussian data with means 1 and −1.

    The hidden layer starts at N(0, start_std²), or at the feedforward pass where that is zero.
    """

    networks: int = 50
    width: int = 5
    weight_std: float = 0.05**0.5
    start_std: float = 0.0
    euler_step: float = 0.05
    euler_steps: int = 100
    rtol: float = 1e-9
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """The exact, the adaptive and the Euler trajectory of each network at the Euler times."""
    keys = jr.split(jr.key(config.seed), 4)
    weights, inputs, outputs = linear_problems(
        keys, networks=config.networks, width=config.width, std=config.weight_std
    )
    times = config.euler_step * np.arange(config.euler_steps + 1)
    integrators = {
        "exact": pcdyn.Exact(),
        "tsit5": pcdyn.Diffrax("tsit5", rtol=config.rtol, atol=config.rtol),
        "euler": pcdyn.Euler(dt=config.euler_step),
    }

    starts = config.start_std * jr.normal(keys[3], inputs.shape)

    def one(
        weights: jax.Array, input: jax.Array, output: jax.Array, start: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        problem = pcdyn.InferenceProblem(
            network_of(weights, "identity"), input=input, output=output
        )
        initial = [start] if config.start_std else problem.feedforward_state()
        runs = [
            pcdyn.simulate(
                problem, t1=times[-1], times=times, initial=initial, integrator=integrator
            )
            for integrator in integrators.values()
        ]
        return [r.activities[1] for r in runs], pcdyn.linear_equilibrium(problem)[1]

    hidden, equilibrium = eqx.filter_jit(jax.vmap(one))(weights, inputs, outputs, starts)
    hidden, equilibrium = np.stack([np.asarray(h) for h in hidden]), np.asarray(equilibrium)
    distance = np.linalg.norm(hidden - equilibrium[None, :, None], axis=-1)
    return xarray.Dataset(
        {
            "activity": (("integrator", "network", "time", "unit"), hidden),
            "equilibrium": (("network", "unit"), equilibrium),
            "distance": (("integrator", "network", "time"), distance),
        },
        coords={
            "time": ("time", times, {"units": "activity time constants"}),
            "integrator": list(integrators),
        },
        attrs={"euler_step": config.euler_step, "euler_steps": config.euler_steps},
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """Monotone approach; exact and adaptive agree; Euler contracts by its own factor."""
    exact, adaptive = (data.activity.sel(integrator=name) for name in ("exact", "tsit5"))
    euler = data.distance.sel(integrator="euler")
    ratio = float(np.median((euler[:, -1] / euler[:, 0]) ** 2))
    predicted = (1 - data.attrs["euler_step"]) ** (2 * data.attrs["euler_steps"])
    return [
        Evidence(
            "1C", "distance to the linear equilibrium (Thm 3.4) falls monotonically (largest rise)",
            largest_rise(data.distance, axis=2), "below", 0.0,
            note="at every time, of every network and integrator",
        ),
        Evidence(
            "1C", "adaptive and exact trajectory agree (largest difference)",
            float(abs(adaptive - exact).max()), "at most", 1e-7, note="100 × solver tolerance",
        ),
        Evidence(
            "1D", "Euler's squared distance shrinks by about (1 − η)^200, no rate being below 1 "
            "(decades that it shrinks further)", float(np.log10(predicted / ratio)),
            "equal", 0.5, 0.5 + 1e-9, note=f"median factor {ratio:.2e}, (1 − η)^200 "
            f"{predicted:.2e}",
        ),
    ]  # fmt: skip


def draw(figure: FigureBase, data: xarray.Dataset) -> None:
    """Panel C: activities of one network; panel D: mean distance of each integrator."""
    axes = figure.subplots(1, 2)
    exact = data.activity.sel(integrator="exact")[0]
    euler = data.activity.sel(integrator="euler")[0]
    for unit in range(data.sizes["unit"]):
        (line,) = axes[0].plot(data.time, exact[:, unit])
        color = line.get_color()
        axes[0].plot(data.time[::8], euler[::8, unit], "o", ms=2.5, color=color)
        axes[0].axhline(float(data.equilibrium[0, unit]), color=color, ls="--", lw=0.8)
    axes[0].set(xlabel=plotting.TIME_LABEL, ylabel="hidden activity $x_1$")
    axes[0].set_title("C  exact (lines), Euler (dots), equilibrium (dashed)")
    for name, style in (("exact", "-"), ("tsit5", "--"), ("euler", "-")):
        squared = data.distance.sel(integrator=name) ** 2
        plotting.mean_band(data.time.values, squared.values, ax=axes[1], label=name)
        axes[1].lines[-1].set_linestyle(style)
    axes[1].set_yscale("log")
    axes[1].set(xlabel=plotting.TIME_LABEL, ylabel="squared distance")
    axes[1].set_title("D  distance to equilibrium (mean ± std)")
    axes[1].legend()


EXPERIMENT = Experiment(
    "figure1_linear_equilibrium", "1C, 1D",
    {"paper": Config(), "authors": Config(weight_std=0.05, start_std=1.0, euler_step=0.1)},
    {"networks": 8}, run, check, alone(draw, 8, 3.2), draw=draw,
)  # fmt: skip
