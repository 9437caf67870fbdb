"""The authors' fixed-point iteration against the flow, and the condition for its convergence.

`x_l ← f(W_l x_{l−1}) + W_{l+1}ᵀ(f' ∘ ε_{l+1})`, all layers at once, is `x ← x − ∂F/∂x`: explicit
Euler with step 1 on the flow. It approaches an equilibrium only where the spectral radius of its
Jacobian there, I − H, is below 1, that is where the largest eigenvalue of H is below 2.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import STATISTICS, draw_band, statistics, within
from experiments.shared.networks import gaussian_weights, network_of
from pcdyn import EquilibriumStatus, solvers
from pcdyn._support.types import State
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.theory import Evidence

NAME = "fixed point"
KINDS = ("identity", "tanh")
SOLVERS = {"identity": "closed_form", "tanh": "pseudo_transient"}
RACE = {
    "iterated": ("step",), "euler": ("step",), "unlike_euler": (),
    "adaptive": ("horizon",), "adaptive_evaluations": ("horizon",), "race_radius": (),
}  # fmt: skip
# After how many updates the iterates are compared with those of Euler.
COMPARED = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """Four layers of weights, 20 units each, inputs N(1, 1), targets N(−1, 1); stds of the weights.

    √.05 is the paper's; the authors' code has .05. Each std has `draws` networks of its own, on the
    first `networks` of which the iteration is run.
    """

    width: int = 20
    weights: int = 4
    stds: tuple[float, ...] = (
        0.02, 0.05, 0.065, 0.07, 0.075, 0.08, 0.085, 0.09, 0.1, 0.15, 0.05**0.5
    )  # fmt: skip
    draws: int = 1000
    networks: int = 40
    iterations: int = 3000
    race_stds: tuple[float, ...] = (0.05, 0.05**0.5)
    euler_step: float = 0.1
    race_iterations: int = 200
    horizons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    tolerance: float = 1e-9
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """The condition over random draws, then error against evaluations for one network."""
    keys = jr.split(jr.key(config.seed), len(config.stds))
    drawn = [draw(config, key, std) for key, std in zip(keys, config.stds, strict=True)]
    found = [[measured(config, kind, networks) for networks in drawn] for kind in KINDS]
    weights, input, output = (each[0] for each in drawn[0])
    races = [
        [race_of(config, kind, (std * (weights / config.stds[0]), input, output))
         for std in config.race_stds] for kind in KINDS
    ]  # fmt: skip
    oracle = [[linear_radius(np.asarray(w)) for w in weights[: config.networks]]
              for weights, *_ in drawn]  # fmt: skip
    over = {"radius_of_draws": "statistic", "below_one": "statistic"}
    return xarray.Dataset(
        {
            **_stacked(found, lambda name: ("kind", "weight_std", over.get(name, "network"))),
            **_stacked(races, lambda name: ("kind", "race_std", *RACE[name])),
            "numpy_radius": (("weight_std", "network"), oracle),
        },
        coords={"kind": list(KINDS), "weight_std": list(config.stds),
                "race_std": list(config.race_stds), "statistic": list(STATISTICS)},
        attrs={"source": "random numbers", "width": config.width, "euler_step": config.euler_step,
               "iterations": config.iterations, "tolerance": config.tolerance,
               "draws": config.draws},
    )  # fmt: skip


def draw(config: Config, key: jax.Array, std: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights, inputs and targets of `draws` networks."""
    keys, shape = jr.split(key, 3), (config.draws, config.width)
    weights = gaussian_weights(
        keys[0], networks=config.draws, layers=config.weights, width=config.width, std=std
    )
    return weights, 1 + jr.normal(keys[1], shape), -1 + jr.normal(keys[2], shape)


def measured(
    config: Config, activation: str, networks: tuple[jax.Array, jax.Array, jax.Array]
) -> dict[str, Any]:
    """The radius over all draws; of the first few too what the iteration does."""
    rest, radius, resting = condition(activation, *networks)
    few = slice(config.networks)
    iterated = iterate(
        activation, config.iterations, config.tolerance,
        *(each[few] for each in networks), [x[few] for x in rest],
    )  # fmt: skip
    return {
        **iterated, "radius": radius[few], "resting": resting[few],
        "radius_of_draws": statistics(np.asarray(radius)),
        "below_one": statistics(np.asarray((radius < 1) & resting)),
    }  # fmt: skip


def _stacked(
    rows: Sequence[Sequence[Mapping[str, ArrayLike]]], dims: Callable[[str], tuple[str, ...]]
) -> dict[str, Any]:
    """Dictionaries of arrays, in rows, as variables."""
    return {
        name: (dims(name), np.stack([np.stack([np.asarray(v[name]) for v in row]) for row in rows]))
        for name in rows[0][0]
    }


@partial(jax.jit, static_argnums=0)
def condition(
    activation: str, weights: jax.Array, inputs: jax.Array, outputs: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """Equilibria of many networks, the radius of I − H there, and whether they are at rest.

    The equilibrium is the closed form, or what is found from the feedforward pass.
    """

    def one(
        weights: jax.Array, input: jax.Array, output: jax.Array
    ) -> tuple[State, jax.Array, jax.Array]:
        problem = problem_of(activation, weights, input, output)
        rest = pcdyn.equilibrium(problem, method=SOLVERS[activation], tolerance=1e-8, throw=False)
        rates = jnp.linalg.eigvalsh(free_energy_hessian(problem, rest.state).dense())
        resting = rest.status_codes == int(EquilibriumStatus.CONVERGED)
        return rest.state, jnp.max(jnp.abs(1 - rates)), resting

    return jax.vmap(one)(weights, inputs, outputs)


@partial(jax.jit, static_argnums=(0, 1, 2))
def iterate(
    activation: str,
    iterations: int,
    tolerance: float,
    weights: jax.Array,
    inputs: jax.Array,
    outputs: jax.Array,
    rest: State,
) -> dict[str, jax.Array]:
    """Whether the iteration converges, and how far from the equilibrium it ends."""

    def one(
        weights: jax.Array, input: jax.Array, output: jax.Array, rest: State
    ) -> dict[str, jax.Array]:
        problem = problem_of(activation, weights, input, output)
        found = pcdyn.equilibrium(
            problem, method=solvers.FixedPoint(iterations), tolerance=tolerance, throw=False
        )
        return {
            "converged": found.status_codes == int(EquilibriumStatus.CONVERGED),
            "finite": found.status_codes != int(EquilibriumStatus.NON_FINITE),
            "distance": distance(found.state, rest),
        }

    return jax.vmap(one)(weights, inputs, outputs, rest)


def problem_of(
    activation: str, weights: jax.Array, input: jax.Array, output: jax.Array
) -> pcdyn.InferenceProblem:
    """Both ends clamped, unit precisions."""
    return pcdyn.InferenceProblem(network_of(weights, activation), input=input, output=output)


def distance(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """The Euclidean distance of two states, any leading axes."""
    squares = [jnp.sum((x - y) ** 2, axis=-1) for x, y in zip(a, b, strict=True)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares), axis=0))


def linear_radius(weights: np.ndarray) -> float:
    """The spectral radius of the iteration matrix of a linear network, by NumPy alone.

    Row l is W_l at layer l − 1, −W_{l+1}ᵀW_{l+1} at layer l and W_{l+1}ᵀ at layer l + 1.
    """
    hidden, width = len(weights) - 1, weights.shape[-1]
    rows = [[np.zeros((width, width)) for _ in range(hidden)] for _ in range(hidden)]
    for i in range(hidden):
        rows[i][i] = -weights[i + 1].T @ weights[i + 1]
        if i > 0:
            rows[i][i - 1] = weights[i]
            rows[i - 1][i] = weights[i].T
    return float(np.max(np.abs(np.linalg.eigvals(np.block(rows)))))


def by_euler(problem: pcdyn.InferenceProblem, step: float, times: np.ndarray) -> pcdyn.Trajectory:
    """Explicit Euler from the feedforward pass, stable or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pcdyn.StepSizeWarning)
        return pcdyn.simulate(
            problem, t1=times[-1], times=times, integrator=pcdyn.Euler(dt=step), throw=False
        )


def race_of(
    config: Config, activation: str, data: tuple[jax.Array, jax.Array, jax.Array]
) -> dict[str, Any]:
    """Distances to the equilibrium of the iteration, of Euler and of an adaptive integrator."""
    problem = problem_of(activation, *data)
    rest = pcdyn.equilibrium(problem, method=SOLVERS[activation], tolerance=1e-12)
    n = config.race_iterations
    found: dict[str, Any] = {
        "race_radius": condition(activation, *(each[None] for each in data))[1][0]
    }
    for name, step in (("iterated", 1.0), ("euler", config.euler_step)):
        run = by_euler(problem, step, step * np.arange(n + 1))
        found[name] = distance(problem.state_of(run.activities), rest.state)
    solved = pcdyn.equilibrium(
        problem, method=solvers.FixedPoint(max_iterations=COMPARED), tolerance=1e-300, throw=False
    )
    stepped = by_euler(problem, 1.0, np.arange(COMPARED + 1.0))
    last = problem.state_of([x[-1] for x in stepped.activities])
    size = distance(last, [0 * x for x in last])
    found["unlike_euler"] = distance(solved.state, last) / size
    ends = [
        pcdyn.simulate(
            problem, t1=t1, times=[0.0, t1], integrator=pcdyn.Diffrax("tsit5", rtol=1e-6, atol=1e-9)
        )
        for t1 in config.horizons
    ]
    found["adaptive"] = [distance(problem.state_of([x[-1] for x in e.activities]), rest.state)
                         for e in ends]  # fmt: skip
    found["adaptive_evaluations"] = [e.vector_field_evaluations for e in ends]
    return {name: np.asarray(value, float) for name, value in found.items()}


def check(data: xarray.Dataset) -> list[Evidence]:
    """What the iteration is, when it converges, how fast, and what the flow does instead."""
    linear, tanh = (data.sel(kind=kind) for kind in KINDS)
    return [
        Evidence(
            NAME, f"it is explicit Euler with step 1 (relative difference after {COMPARED} "
            "updates)", float(data.unlike_euler.max()), "at most", 1e-12,
        ),
        Evidence(
            NAME, "linear: its matrix is I − H (relative difference of the spectral radii)",
            float(abs(linear.radius / data.numpy_radius - 1).max()), "at most", 1e-10,
            oracle="the eigenvalues of the matrix in NumPy",
        ),
        *_prediction("linear", linear, data.attrs),
        *_prediction("tanh", tanh, data.attrs),
        _at_paper_std(data), *(_half(kind, data.sel(kind=kind)) for kind in KINDS), _bounded(tanh),
        _rate(data), _flow(data),
    ]  # fmt: skip


def decidable(here: xarray.Dataset, iterations: int) -> xarray.DataArray:
    """Draws whose radius is far enough from 1 that the iterations given can show on which side.

    The slowest mode shrinks or grows by radius^iterations; 1e13 takes any start to the tolerance.
    """
    return (abs(np.log(here.radius)) * iterations > np.log(1e13)) & here.resting


def _prediction(name: str, here: xarray.Dataset, attrs: dict[str, Any]) -> list[Evidence]:
    clear = decidable(here, attrs["iterations"])
    agree = ((here.radius < 1) == here.converged) & clear
    return [
        Evidence(
            NAME, f"{name}: it converges in the draws whose spectral radius is below 1, and in no "
            "other (share)", float(agree.sum() / clear.sum()), "equal", 1.0,
            note=f"of {int(clear.sum())} draws; radius below 1 in {int((here.radius < 1).sum())} "
            f"of {here.radius.size}, converged in {int(here.converged.sum())}; "
            f"{int((~clear).sum())} too near 1 to tell",
        ),
        Evidence(NAME, f"{name}: where it converges it is at the equilibrium (largest distance)",
                 float(here.distance.where(here.converged).max()), "at most", 1e-6),
    ]  # fmt: skip


def _at_paper_std(data: xarray.Dataset) -> Evidence:
    largest = data.converged.mean("network").isel(weight_std=-1)
    return Evidence(
        NAME, f"it converges at the paper's weights (share at {float(largest.weight_std):.3g})",
        float(largest.min()), "equal", 1.0, expected_to_hold=False,
    )  # fmt: skip


def _half(kind: str, here: xarray.Dataset) -> Evidence:
    """The std at which the radius is below 1 in half of the draws, on straight lines."""
    share, stds = here.below_one.sel(statistic="mean").values, here.weight_std.values
    # From the last std of at least a half to the next one.
    last = np.flatnonzero(share >= 0.5)[-1]
    slope = (share[last + 1] - share[last]) / (stds[last + 1] - stds[last])
    told = [
        f"{within(100 * mean, 100 * error)} % at {float(std):.3g}"
        for std, (mean, error, *_) in zip(stds, here.below_one.values, strict=True)
        if 0 < mean < 1
    ]
    return Evidence(
        NAME, f"{'linear' if kind == 'identity' else kind}: the radius is below 1 at the paper's "
        "weights (std up to which it is in half of the draws)",
        float(stds[last] + (0.5 - share[last]) / slope), "at least", float(stds[-1]),
        expected_to_hold=False, error=abs(float(0.5 / here.attrs["draws"] ** 0.5 / slope)),
        note=f"{', '.join(told)}; always below and never above",
    )  # fmt: skip


def _bounded(tanh: xarray.Dataset) -> Evidence:
    failed = ~tanh.converged
    stays = failed & tanh.finite
    return Evidence(
        NAME, "tanh: where it does not converge it stays finite (draws in which it does not)",
        int(failed.sum() - stays.sum()), "equal", 0,
        note=f"of {int(failed.sum())}: tanh and a clamped output bound it",
    )  # fmt: skip


def _rate(data: xarray.Dataset) -> Evidence:
    errors = data.iterated.isel(race_std=0).values
    radius = data.race_radius.isel(race_std=0).values
    ratios = []
    for row in errors:
        clear = np.flatnonzero(row > 1e-10 * row[0])[-1]
        ratios.append((row[clear] / row[clear // 2]) ** (1 / (clear - clear // 2)))
    excess = np.abs(np.log(ratios) / np.log(radius) - 1)
    return Evidence(
        NAME, "its error shrinks by the spectral radius with each update (relative difference of "
        "the logarithms)", float(excess.max()), "at most", 0.05,
        note=", ".join(f"{a:.4f} (radius {b:.4f})" for a, b in zip(ratios, radius, strict=True)),
    )  # fmt: skip


def _flow(data: xarray.Dataset) -> Evidence:
    left = data.adaptive.isel(horizon=-1) / data.iterated.isel(step=0)
    return Evidence(
        NAME, "the flow comes to rest at the equilibrium where the iteration does not (relative "
        "distance)", float(left.max()), "at most", 1e-4,
        note=f"after {int(data.adaptive_evaluations.max())} evaluations or fewer",
    )  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Error against evaluations, radius and share that converges against the weights."""
    names = dict(zip(KINDS, ("linear", "tanh"), strict=True))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for ax, std in zip(axes[0], data.race_std.values, strict=True):
        for kind, dashes in zip(KINDS, ("-", "--"), strict=True):
            here = data.sel(kind=kind, race_std=std)
            start = float(here.iterated[0])
            methods = (
                ("C1", dashes, here.step, here.iterated, "iteration (Euler, step 1)"),
                ("C2", dashes, here.step, here.euler,
                 f"Euler, step {data.attrs['euler_step']:g}"),
                ("C0", "o" + dashes, here.adaptive_evaluations, here.adaptive, "flow, Tsit5"),
            )  # fmt: skip
            for color, look, evaluations, distance, label in methods:
                ax.plot(evaluations, distance / start, look, ms=3, color=color,
                        label=label if kind == KINDS[0] else None)  # fmt: skip
        ax.set(xscale="log", yscale="log", ylim=(1e-12, 1e4), xlim=(1, None),
               xlabel="evaluations of ∂F/∂x", ylabel="relative distance to equilibrium",
               title=f"weights of std {std:.3g} (solid: linear, dashed: tanh)")  # fmt: skip
        ax.legend(fontsize=8, loc="lower left")
    for kind, shade in zip(KINDS, ("C0", "C1"), strict=True):
        here = data.sel(kind=kind)
        for ax, values, words in (
            (axes[1, 0], here.radius_of_draws, "at the equilibrium"),
            (axes[1, 1], here.converged, "converges"),
        ):
            if ax is axes[1, 0]:
                draw_band(data.weight_std.values, values, ax=ax, label=f"{names[kind]}, {words}")
            else:
                ax.plot(data.weight_std, values.mean("network"), "o", color=shade,
                        mfc="none" if kind == "tanh" else None, ms=8 if kind == "tanh" else 4,
                        label=f"{names[kind]}, {words}")  # fmt: skip
        axes[1, 1].plot(data.weight_std, here.below_one.sel(statistic="mean"), color=shade,
                        label=f"{names[kind]}, radius below 1")  # fmt: skip
    axes[1, 0].axhline(1, color="k", ls=":", lw=1)
    axes[1, 0].set(xlabel="std of the weights", ylabel="spectral radius of I − H",
                   title="condition, mean and 10–90 % of draws")  # fmt: skip
    axes[1, 1].set(xlabel="std of the weights", ylabel="share of draws",
                   title="predicted (lines) and measured")  # fmt: skip
    for ax in axes[1]:
        ax.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(
    "fixed_point", "extra: fixed-point iteration", {"paper": Config()},
    {
        "draws": 60, "networks": 8, "iterations": 1000, "race_iterations": 60,
        "horizons": (4.0, 64.0),
    },
    run, check, plot,
)  # fmt: skip
