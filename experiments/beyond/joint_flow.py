"""Activities and weights as one flow: how far it is from learning with inference at equilibrium.

The weights of a small network move by `dW/dt = −ε ∂F/∂W` while its activities move by −∂F/∂x. In
slow time εt they are compared with the flow of F*(W) = min_x F, the limit ε → 0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from pcdyn import learning
from pcdyn.theory import Evidence

STARTS = ("equilibrium", "feedforward")


@dataclasses.dataclass(frozen=True)
class Config:
    """A 3-4-2 tanh network with biases and five samples; explicit and implicit integrators."""

    widths: tuple[int, ...] = (3, 4, 2)
    samples: int = 5
    ratios: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    slow_time: float = 2.0
    saves: int = 21
    integrators: tuple[str, ...] = ("tsit5", "kvaerno5")
    rtol: float = 1e-8
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """The adiabatic flow once; the joint flow for each ratio, integrator and start."""
    keys = jr.split(jr.key(config.seed), 3)
    network = pcdyn.mlp(config.widths, activation="tanh", bias=True, key=keys[0])
    problem = pcdyn.InferenceProblem(
        network,
        input=jr.normal(keys[1], (config.samples, config.widths[0])),
        output=jnp.tanh(jr.normal(keys[2], (config.samples, config.widths[-1]))),
    )
    slow = np.linspace(0, config.slow_time, config.saves)[1:]
    options = {"rtol": config.rtol, "atol": 1e-2 * config.rtol, "max_steps": 2**20}
    adiabatic = pcdyn.simulate(
        learning.AdiabaticFlow(problem, tolerance=1e-11), t1=config.slow_time, times=slow,
        integrator=pcdyn.Diffrax("tsit5", **options),
    )  # fmt: skip
    starts = dict(
        zip(STARTS, (pcdyn.equilibrium(problem, tolerance=1e-11).state, "feedforward"), strict=True)
    )
    shape = (len(STARTS), len(config.integrators), len(config.ratios))
    distance, steps = np.zeros((*shape, len(slow))), np.zeros(shape, int)
    energy = np.zeros((len(config.ratios), len(slow)))
    for i, start in enumerate(starts.values()):
        for j, name in enumerate(config.integrators):
            for k, ratio in enumerate(config.ratios):
                joint = pcdyn.simulate(
                    learning.JointFlow(problem, ratio), t1=config.slow_time / ratio,
                    times=slow / ratio, initial=start, integrator=pcdyn.Diffrax(name, **options),
                )  # fmt: skip
                distance[i, j, k] = weight_distance(
                    joint.moving["network"], adiabatic.moving["network"]
                )
                steps[i, j, k] = joint.accepted_steps
                if not i and not j:
                    energy[k] = joint.free_energy.sum(-1)
    dims = ("start", "integrator", "ratio")
    return xarray.Dataset(
        {
            "distance": ((*dims, "slow_time"), distance),
            "steps": (dims, steps),
            "free_energy": (("ratio", "slow_time"), energy),
            "adiabatic_free_energy": ("slow_time", adiabatic.free_energy.sum(-1)),
        },
        coords={
            "start": list(STARTS), "integrator": list(config.integrators),
            "ratio": list(config.ratios), "slow_time": slow,
        },
        attrs={"source": "random numbers", "rtol": config.rtol},
    )  # fmt: skip


def weight_distance(a: pcdyn.Network, b: pcdyn.Network) -> np.ndarray:
    """The Euclidean distance of all weights and biases, for each time on the leading axis."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    squares = [
        np.sum((np.asarray(x) - np.asarray(y)).reshape(len(x), -1) ** 2, -1) for x, y in pairs
    ]
    return np.sqrt(sum(squares))


def check(data: xarray.Dataset) -> list[Evidence]:
    """The distance is in proportion to ε, whatever integrates the flow."""
    largest = data.distance.max("slow_time")
    ends = largest.isel(ratio=[-2, -1])
    order = np.log(ends.isel(ratio=0, drop=True) / ends.isel(ratio=1, drop=True)) / np.log(
        data.ratio.values[-2] / data.ratio.values[-1]
    )
    apart = abs(data.distance.diff("integrator") / data.distance.isel(integrator=0))
    numbers = ", ".join(f"{float(v):.1e}" for v in largest.isel(start=0, integrator=0))
    smallest = data.steps.sel(start=STARTS[0]).isel(ratio=-1)
    return [
        Evidence(
            "joint flow", "the distance to the adiabatic weights is O(ε) (order that is furthest "
            "from 1)", float(order.values.flat[abs(order.values - 1).argmax()]), "equal", 1.0, 0.1,
            note=f"{float(order.min()):.3f} to {float(order.max()):.3f} between the two smallest "
            f"ε; {numbers} for ε = {', '.join(f'{r:g}' for r in data.ratio.values)}",
        ),
        Evidence(
            "joint flow", "explicit and implicit integrators agree (relative difference of the "
            "distances)", float(apart.max()), "at most", 1e-3,
            note="at the smallest ε " + ", ".join(
                f"{n} {int(s)} steps"
                for n, s in zip(data.integrator.values, smallest, strict=True)
            ),
        ),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """How far F is from the limit in slow time, the weights against ε, and the steps it costs."""
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    away = abs(data.free_energy / data.adiabatic_free_energy - 1)
    for ratio in data.ratio.values:
        first.semilogy(data.slow_time, away.sel(ratio=ratio), label=f"ε = {ratio:g}")
    first.set(xlabel="slow time εt", ylabel="relative distance from the limit", ylim=(None, 3),
              title="free energy and ε → 0")  # fmt: skip
    first.legend(ncols=2)
    largest = data.distance.max("slow_time").isel(integrator=0)
    for start in data.start.values:
        second.loglog(data.ratio, largest.sel(start=start), "o-", label=f"from {start}")
    guide = float(largest.isel(start=0, ratio=0)) * data.ratio / data.ratio[0]
    second.loglog(data.ratio, guide, "k:", lw=1, label="∝ ε")
    second.set(xlabel="ε", ylabel="largest distance from the limit", title="weights and ε → 0")
    second.legend()
    for name in data.integrator.values:
        third.loglog(data.ratio, data.steps.sel(integrator=name).isel(start=0), "o-", label=name)
    third.set(xlabel="ε", ylabel="accepted steps", title=f"cost (rtol {data.attrs['rtol']:g})")
    third.legend()
    return figure


EXPERIMENT = Experiment(
    "joint_flow", "extra: the joint flow of activities and weights", {"paper": Config()},
    {"ratios": (1e-1, 1e-2), "saves": 3}, run, check, plot,
)  # fmt: skip
