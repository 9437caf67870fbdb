"""The whole flow of networks with two free units: nullclines, equilibria, basins.

Linear chains whose slow direction turns with the ratio of precisions, tanh networks with several
equilibria, a ReLU chain that slides to rest along a kink, and a chain with a free input. The
random networks are the first ones, in the order of their seeds, that show what is looked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.base import Claim, Experiment
from pcdyn import plotting

CASES = {
    "slow": "linear 1-1-1-1, precisions $Π_l = {low:g}^l$",
    "fast": "linear 1-1-1-1, precisions $Π_l = {high:g}^l$",
    "chain": "tanh 1-1-1-1, strong weights",
    "pair": "tanh 2-2-2, strong weights",
    "kink": "ReLU 1-1-1-1: rest at a kink",
    "free": "tanh 1-1-1, input free",
}
SMOOTH_AND_COERCIVE = ("slow", "fast", "chain", "pair")
_MOST_CURVE_POINTS = 1500


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


PRESETS = {"paper": Config(), "code": Config()}
FAST = {"cases": ("slow", "chain"), "resolution": 13, "seeds": 30}


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


def as_data(case: str, seed: int, portrait: pcdyn.PhasePortrait) -> xarray.Dataset:
    """The arrays of a portrait with the name of its panel, and the oracles of its claims."""
    problem = portrait.problem
    assert problem is not None
    curves = np.full((len(portrait.separatrices), _MOST_CURVE_POINTS, 2), np.nan)
    for row, curve in zip(curves, portrait.separatrices, strict=True):
        stride = -(-len(curve) // _MOST_CURVE_POINTS)
        row[: len(curve[::stride])] = curve[::stride]
    point, path = (f"equilibrium_{case}", "xy"), (f"start_{case}", f"time_{case}", "xy")
    grid = (f"y_{case}", f"x_{case}")
    data = {
        "free_energy": (grid, portrait.free_energy),
        "velocity": ((*grid, "xy"), portrait.velocity),
        "basin": (grid, portrait.basin),
        "equilibria": (point, portrait.equilibria),
        "kinds": (point[0], list(portrait.kinds)),
        "equilibrium_energies": (point[0], portrait.equilibrium_energies),
        "rates": ((point[0], "rate"), portrait.rates),
        "modes": ((point[0], "rate", "xy"), portrait.modes),
        "residuals": (point[0], portrait.residuals),
        "separatrices": ((f"curve_{case}", f"along_{case}", "xy"), curves),
        "trajectories": (path, portrait.trajectories),
        "ends": (path[0], portrait.ends),
        "coordinates": (("coordinate", "place"), np.array(portrait.coordinates)),
        "seed": ((), seed),
        "index_sum": ((), portrait.index_sum),
        "differenced_rates": ((point[0], "rate"), differenced_rates(problem, portrait)),
        "distances": (path[0], distances_by_lsoda(problem, portrait)),
    }
    return xarray.Dataset(
        {f"{name}_{case}": values for name, values in data.items()},
        {grid[0]: portrait.y, grid[1]: portrait.x, path[1]: portrait.times},
    )


def state_at(problem: pcdyn.InferenceProblem, points: Any) -> tuple[Any, ...]:
    """The state at points (…, 2)."""
    points = jnp.asarray(points)
    return (points,) if len(problem.free_layers) == 1 else (points[..., :1], points[..., 1:])


def differenced_rates(
    problem: pcdyn.InferenceProblem, portrait: pcdyn.PhasePortrait, step: float = 1e-4
) -> np.ndarray:
    """Eigenvalues of the Hessian of F by central differences, NaN at a kink."""
    energy = jax.jit(jax.vmap(lambda x: problem.free_energy(state_at(problem, x))))
    units = step * np.eye(2)
    corners = np.array([[[a + b, a - b, b - a, -a - b] for b in units] for a in units])
    rates = np.full(portrait.rates.shape, np.nan)
    for row, point, kind in zip(rates, portrait.equilibria, portrait.kinds, strict=True):
        if kind != "at a kink":
            values = np.asarray(energy((point + corners).reshape(-1, 2))).reshape(2, 2, 4)
            row[:] = np.linalg.eigvalsh(values @ np.array([1, -1, -1, 1]) / (4 * step**2))
    return rates


def distances_by_lsoda(
    problem: pcdyn.InferenceProblem, portrait: pcdyn.PhasePortrait
) -> np.ndarray:
    """From where SciPy's LSODA ends each trajectory to the equilibrium of the start's basin.

    NaN at kinks, along which no solver of smooth equations can go, and where there is no basin.
    """
    starts = portrait.trajectories[:, 0]
    if "at a kink" in portrait.kinds:
        return np.full(len(starts), np.nan)
    column = np.abs(starts[:, None, 0] - portrait.x).argmin(axis=1)
    row = np.abs(starts[:, None, 1] - portrait.y).argmin(axis=1)
    basins = portrait.basin[row, column]
    batch = [
        None if x is None else jnp.broadcast_to(x, (len(starts), x.shape[-1]))
        for x in (problem.input, problem.output)
    ]
    many = problem.with_data(batch[0], batch[1])
    run = pcdyn.simulate(
        many, t1=float(portrait.times[-1]), times=[float(portrait.times[-1])],
        initial=state_at(many, starts), integrator=pcdyn.SciPy("LSODA", rtol=1e-8, atol=1e-10),
    )  # fmt: skip
    ends = np.concatenate(many.state_of(run.final), axis=-1)
    found = np.linalg.norm(ends - portrait.equilibria[basins], axis=-1)
    return np.where(basins >= 0, found, np.nan)


def check(data: xarray.Dataset) -> list[Claim]:
    """Residuals, the sum of the indices, curvatures and the ends of trajectories."""
    cases = list(data.attrs["cases"])
    worst = max(float(data[f"residuals_{case}"].max()) for case in cases)
    whole = [case for case in cases if case in SMOOTH_AND_COERCIVE]
    sums = [int(data[f"index_sum_{case}"]) for case in whole]
    smooth = [case for case in cases if case != "kink"]
    gaps = [_relative_gap(data, case) for case in smooth]
    ends = np.concatenate([data[f"ends_{case}"].values for case in cases])
    kinds = {case: data[f"kinds_{case}"].values for case in cases}
    rests = np.concatenate(
        [np.isin(kinds[case][data[f"ends_{case}"]], ("minimum", "at a kink")) for case in cases]
    )
    far = [float(np.nanmax(data[f"distances_{case}"])) for case in smooth if case != "free"]
    counts = ", ".join(
        f"{case} {list(kinds[case]).count('minimum')}−{list(kinds[case]).count('saddle')}"
        f"+{list(kinds[case]).count('maximum')}" for case in whole
    )  # fmt: skip
    return [
        Claim(
            "two free units: every equilibrium found is stationary",
            f"largest residual {worst:.1e}", "≤ 1e-9", worst <= 1e-9,
        ),
        Claim(
            "Poincaré–Hopf: minima − saddles + maxima = 1 where F grows in all directions",
            counts, "1 in each", all(s == 1 for s in sums),
        ),
        Claim(
            "rates at equilibria are the eigenvalues of the Hessian of F by finite differences",
            f"largest relative difference {max(gaps):.1e}", "≤ 1e-4", max(gaps) <= 1e-4,
        ),
        Claim(
            "every trajectory of the portraits ends at a stable equilibrium",
            f"{int(np.sum((ends >= 0) & rests))} of {len(ends)}", "all",
            bool(np.all((ends >= 0) & rests)),
        ),
        Claim(
            "LSODA ends at the minimum in whose basin it starts",
            f"largest distance {max(far):.1e}", "≤ 1e-3", max(far) <= 1e-3,
        ),
    ]  # fmt: skip


def _relative_gap(data: xarray.Dataset, case: str) -> float:
    ours, theirs = data[f"rates_{case}"].values, data[f"differenced_rates_{case}"].values
    return float(np.max(np.abs(ours - theirs) / np.abs(ours).max(axis=-1, keepdims=True)))


def plot(data: xarray.Dataset) -> Figure:
    """A panel for each portrait, and one legend for all."""
    cases = list(data.attrs["cases"])
    columns = min(3, len(cases))
    with plotting.style():
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


def portrait_of(data: xarray.Dataset, case: str) -> pcdyn.PhasePortrait:
    """The portrait of a panel from its arrays."""

    def array(name: str) -> np.ndarray:
        return data[f"{name}_{case}"].values

    curves = [curve[~np.isnan(curve[:, 0])] for curve in array("separatrices")]
    return pcdyn.PhasePortrait(
        problem=None, coordinates=tuple((int(l), int(u)) for l, u in array("coordinates")),
        kinds=tuple(str(kind) for kind in array("kinds")), separatrices=tuple(curves),
        x=array("x"), y=array("y"), times=array("time"),
        **{name: array(name) for name in (
            "free_energy", "velocity", "basin", "equilibria", "equilibrium_energies", "rates",
            "modes", "residuals", "trajectories", "ends",
        )},
    )  # fmt: skip


EXPERIMENT = Experiment("extra: phase portraits of two free units", PRESETS, FAST, run, check, plot)
