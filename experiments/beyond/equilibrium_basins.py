"""Which equilibrium? How often fast solvers end where the gradient flow ends, as weights grow."""

from __future__ import annotations

import dataclasses

import jax
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import statistics, within
from experiments.shared.networks import network_of
from pcdyn import plotting, solvers
from pcdyn.theory import Evidence

METHODS = {
    "gauss_newton": (solvers.GaussNewton(), solvers.PseudoTransient()),
    "nesterov": (solvers.ErrorDescent(), solvers.PseudoTransient()),
    "pseudo_transient": (solvers.PseudoTransient(),),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Four layers of 20 tanh units with both ends clamped, weights N(0, std²), targets in range."""

    networks: int = 8
    samples: int = 25
    width: int = 20
    stds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    tolerance: float = 1e-6
    t1: float = 5000.0
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Solve each problem by each method and by the flow; compare where they end."""
    shape = (len(config.stds), config.networks, len(METHODS), config.samples)
    agrees, found = np.zeros(shape, bool), np.zeros(shape, bool)
    lower = np.zeros(shape)
    settled = np.zeros((len(config.stds), config.networks, config.samples), bool)
    for i, std in enumerate(config.stds):
        for k in range(config.networks):
            problem = _problem(config, std, jr.fold_in(jr.key(config.seed), 1000 * i + k))
            rest = pcdyn.equilibrium(
                problem, method=solvers.FlowToRest(pcdyn.Diffrax(fallback=None), t1=config.t1),
                tolerance=config.tolerance, throw=False,
            )  # fmt: skip
            settled[i, k] = rest.status_codes == pcdyn.EquilibriumStatus.CONVERGED
            start = np.concatenate(problem.feedforward_state(), axis=-1)
            end = np.concatenate(rest.state, axis=-1)
            way = np.linalg.norm(end - start, axis=-1)
            for j, method in enumerate(METHODS.values()):
                ours = pcdyn.equilibrium(
                    problem, method=method, tolerance=config.tolerance, throw=False
                )
                there = np.concatenate(ours.state, axis=-1)
                found[i, k, j] = ours.status_codes == pcdyn.EquilibriumStatus.CONVERGED
                agrees[i, k, j] = np.linalg.norm(there - end, axis=-1) <= 1e-2 * way
                lower[i, k, j] = ours.free_energy - rest.free_energy
    dims = ("weight_std", "network", "solver", "sample")
    return xarray.Dataset(
        {
            "agrees": (dims, agrees),
            "converged": (dims, found),
            "energy_difference": (dims, lower),
            "flow_settled": (("weight_std", "network", "sample"), settled),
        },
        coords={"weight_std": list(config.stds), "solver": list(METHODS)},
    )


def _problem(config: Config, std: float, key: jax.Array) -> pcdyn.InferenceProblem:
    keys = jr.split(key, 3)
    weights = std * jr.normal(keys[0], (3, config.width, config.width))
    shape = (config.samples, config.width)
    return pcdyn.InferenceProblem(
        network_of(weights, "tanh"),
        input=jr.normal(keys[1], shape),
        output=np.tanh(jr.normal(keys[2], shape)),
    )


def shares(data: xarray.Dataset) -> xarray.DataArray:
    """The share of samples that agree with the flow, where the flow came to rest, per network."""
    counted = data.flow_settled
    return (data.agrees & counted).sum("sample") / counted.sum("sample")


def check(data: xarray.Dataset) -> list[Evidence]:
    """Everything converges; small weights leave no choice, large ones do."""
    agreement = shares(data).mean("network")
    small = agreement.isel(weight_std=0)
    # Samples of one network are no independent draws, networks are.
    large = shares(data).isel(weight_std=-1).transpose("solver", "network").values
    ends = {name: statistics(each) for name, each in zip(METHODS, large, strict=True)}
    percent = {name: within(100 * each[0], 100 * each[1]) for name, each in ends.items()}
    return [
        Evidence("basins", "every method converges on every sample (share)",
                 float(data.converged.mean()), "equal", 1.0,
                 note=f"the flow: {float(data.flow_settled.mean()):.2%}"),
        Evidence("basins", f"at weight std {float(data.weight_std[0]):g} all end where the flow "
                 "ends (least share)", float(small.min()), "equal", 1.0),
        Evidence(
            "basins", f"at weight std {float(data.weight_std[-1]):g} Gauss–Newton can end "
            "elsewhere (share that ends with the flow)",
            float(ends["gauss_newton"][0]), "below", 1.0, error=float(ends["gauss_newton"][1]),
            note=", ".join(f"{name} {each} %" for name, each in percent.items()),
        ),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Share of agreement against the size of the weights, mean ± std over networks."""
    figure, ax = plt.subplots(figsize=(5, 3.4))
    agreement = shares(data)
    for name in METHODS:
        values = agreement.sel(solver=name).transpose("network", "weight_std").values
        plotting.mean_band(data.weight_std.values, values, ax=ax, label=name.replace("_", " "))
    ax.set(xlabel="standard deviation of the weights", ylabel="share that ends with the flow")
    ax.set_ylim(0, 1.05)
    ax.set_title("Solvers that end where the gradient flow ends")
    ax.legend(loc="lower left")
    return figure


EXPERIMENT = Experiment(
    "equilibrium_basins", "extra: basins", {"paper": Config()},
    {"networks": 2, "samples": 10, "stds": (0.1, 0.5), "t1": 500.0}, run, check, plot,
)  # fmt: skip
