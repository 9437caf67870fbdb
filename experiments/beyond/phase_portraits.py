"""The whole flow of networks with two free units: nullclines, equilibria, basins.

Linear chains whose slow direction turns with the ratio of precisions, tanh networks with several
equilibria, a ReLU chain that slides to rest along a kink, and a chain with a free input. The
random networks are the first ones, in the order of their seeds, that show what is looked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.portraits import as_data, portrait_of
from pcdyn.theory import Evidence

NAME = "two free units"
CASES = {
    "slow": "linear 1-1-1-1, precisions $Π_l = {low:g}^l$",
    "fast": "linear 1-1-1-1, precisions $Π_l = {high:g}^l$",
    "chain": "tanh 1-1-1-1, strong weights",
    "pair": "tanh 2-2-2, strong weights",
    "kink": "ReLU 1-1-1-1: rest at a kink",
    "free": "tanh 1-1-1, input free",
}
SMOOTH_AND_COERCIVE = ("slow", "fast", "chain", "pair")


@dataclasses.dataclass(frozen=True)
class Config:
    """Weights N(0, std²) where random; `seeds`, how many to look through at most."""

    cases: tuple[str, ...] = tuple(CASES)
    resolution: int = 61
    ratios: tuple[float, float] = (0.2, 5.0)
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    std: float = 3.0
    free_extent: tuple[float, float, float, float] = (-2.5, 2.5, -1.5, 1.5)
    seeds: int = 60


def run(config: Config) -> xarray.Dataset:
    """The portraits, and what their rates and the ends of their trajectories are held against."""
    parts = []
    for case in config.cases:
        seed, problem = problem_of(case, config)
        # With the input free F is flat far out, where nothing would arrive.
        extent = config.free_extent if case == "free" else None
        portrait = pcdyn.phase_portrait(problem, resolution=config.resolution, extent=extent)
        parts.append(as_data(case, seed, portrait))
    ratios = {"low": config.ratios[0], "high": config.ratios[1]}
    titles = {f"title_{case}": text.format(**ratios) for case, text in CASES.items()}
    return xarray.merge(parts).assign_attrs(
        source="random numbers", cases=list(config.cases), **titles
    )


def problem_of(case: str, config: Config) -> tuple[int, pcdyn.InferenceProblem]:
    """The seed (−1 for none) and the problem of a panel."""
    if case in ("slow", "fast"):
        ratio = config.ratios[case == "fast"]
        energy = pcdyn.Gaussian([ratio, ratio**2, ratio**3])
        weights = [np.full((1, 1), w) for w in config.weights]
        network = pcdyn.Network([pcdyn.Dense(w) for w in weights])
        return -1, pcdyn.InferenceProblem(network, input=[1.0], output=[-1.0], energy=energy)
    if case == "chain":
        return first(case, ("tanh",) * 3, 1, config, lambda p: minima(p) >= 3)
    if case == "pair":
        return first(case, ("tanh",) * 2, 2, config, lambda p: minima(p) >= 3)
    if case == "kink":
        return first(case, ("relu", "relu", "identity"), 1, config, slides)
    return first(case, ("tanh",) * 2, 1, config, lambda p: True)


def first(
    case: str,
    activations: tuple[str, ...],
    width: int,
    config: Config,
    wanted: Callable[[pcdyn.InferenceProblem], bool],
) -> tuple[int, pcdyn.InferenceProblem]:
    """The first random problem, by its seed, that has what is wanted."""
    for seed in range(config.seeds):
        rng = np.random.default_rng(seed)
        layers = [
            pcdyn.Dense(config.std * rng.normal(size=(width, width)), activation=name)
            for name in activations
        ]
        clamped, target = rng.normal(size=width), np.tanh(rng.normal(size=width))
        problem = pcdyn.InferenceProblem(
            pcdyn.Network(layers), input=None if case == "free" else clamped, output=target
        )
        if wanted(problem):
            return seed, problem
    raise RuntimeError(f"none of the seeds 0 … {config.seeds - 1} has what {case!r} is to show")


def minima(problem: pcdyn.InferenceProblem) -> int:
    """How many a coarse grid of starts leads to."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1.3, 1.3, 6)] * 2), -1).reshape(-1, 2)
    starts = (grid,) if len(problem.free_layers) == 1 else (grid[:, :1], grid[:, 1:])
    return int(pcdyn.multiple_equilibria(problem, starts).stable.sum())


def slides(problem: pcdyn.InferenceProblem) -> bool:
    """Whether inference comes to rest at a kink."""
    found = pcdyn.equilibrium(problem, throw=False)
    return found.status is pcdyn.EquilibriumStatus.SLIDING


def check(data: xarray.Dataset) -> list[Evidence]:
    """Residuals, the sum of the indices, curvatures and the ends of trajectories."""
    cases = list(data.attrs["cases"])
    whole = [case for case in cases if case in SMOOTH_AND_COERCIVE]
    sums = [int(data[f"index_sum_{case}"]) for case in whole]
    smooth = [case for case in cases if case != "kink"]
    kinds = {case: data[f"kinds_{case}"].values for case in cases}
    ends = {case: data[f"ends_{case}"].values for case in cases}
    stable = np.concatenate([
        (ends[case] >= 0) & np.isin(kinds[case][ends[case]], ("minimum", "at a kink"))
        for case in cases
    ])  # fmt: skip
    counts = ", ".join(
        f"{case} {list(kinds[case]).count('minimum')}−{list(kinds[case]).count('saddle')}"
        f"+{list(kinds[case]).count('maximum')}" for case in whole
    )  # fmt: skip
    return [
        Evidence(NAME, "every equilibrium found is stationary (largest residual)",
                 max(float(data[f"residuals_{case}"].max()) for case in cases), "at most", 1e-9),
        Evidence(
            NAME, "Poincaré–Hopf: minima − saddles + maxima = 1 where F grows in all directions "
            "(panels in which it is)", sums.count(1), "equal", len(whole), note=counts,
        ),
        Evidence(
            NAME, "rates at equilibria are the eigenvalues of the Hessian of F (largest relative "
            "difference)", max(_relative_gap(data, case) for case in smooth), "at most", 1e-4,
            oracle="finite differences of F",
        ),
        Evidence(NAME, "every trajectory of the portraits ends at a stable equilibrium (share)",
                 float(stable.mean()), "equal", 1.0, note=f"of {len(stable)}"),
        Evidence(
            NAME, "every trajectory ends at the minimum in whose basin it starts (largest "
            "distance)",
            max(float(np.nanmax(data[f"distances_{c}"])) for c in smooth if c != "free"), "at most",
            1e-3, oracle="SciPy's LSODA",
        ),
    ]  # fmt: skip


def _relative_gap(data: xarray.Dataset, case: str) -> float:
    ours, theirs = data[f"rates_{case}"].values, data[f"differenced_rates_{case}"].values
    return float(np.max(np.abs(ours - theirs) / np.abs(ours).max(axis=-1, keepdims=True)))


def plot(data: xarray.Dataset) -> Figure:
    """A panel for each portrait, and one legend for all."""
    cases = list(data.attrs["cases"])
    columns = min(3, len(cases))
    figure, axes = plt.subplots(
        -(-len(cases) // columns), columns, squeeze=False, layout="constrained",
        figsize=(3.6 * columns, 3.4 * -(-len(cases) // columns) + 0.5),
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for ax, case in zip(axes.flat, cases, strict=False):
        portrait_of(data, case).plot(ax)
        legend = ax.get_legend()
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            handles.setdefault(_general(text.get_text()), handle)
        legend.remove()
        seed = int(data[f"seed_{case}"])
        ax.set_title(data.attrs[f"title_{case}"] + (f" (seed {seed})" if seed >= 0 else ""),
                     fontsize=10)  # fmt: skip
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=-(-len(handles) // 2),
    )
    return figure


def _general(label: str) -> str:
    """A label that serves all panels, whatever the names of their coordinates."""
    if not label.startswith("nullcline"):
        return label
    horizontal = any(name in label for name in ("x_{1,1}", "x_1$", "x_0"))
    return "first activity at rest" if horizontal else "second activity at rest"


EXPERIMENT = Experiment(
    "phase_portraits", "extra: phase portraits of two free units", {"paper": Config()},
    {"cases": ("slow", "chain"), "resolution": 13, "seeds": 30}, run, check, plot,
)  # fmt: skip
