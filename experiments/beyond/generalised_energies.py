"""Energies other than the Gaussian: several minima, robustness to outliers, relaxation.

`E_l = Σ_i h(ε_i)` with h = ½ε², log cosh, pseudo-Huber, Student and divisive (A.8 of the paper).
Bounded slopes make outliers harmless; where h is not convex the price is several equilibria.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray
from jaxtyping import PyTree
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import largest_rise
from experiments.shared.portraits import as_data, portrait_of
from pcdyn import learning, plotting
from pcdyn.model.energies.generalised import (
    CustomEnergy,
    Divisive,
    LogCosh,
    PseudoHuber,
    Separable,
    Student,
)
from pcdyn.theory import Evidence


def _half_square(error: jax.Array) -> jax.Array:
    return error**2 / 2


Energies = pcdyn.Energy | list[pcdyn.Energy]

ENERGIES: dict[str, Separable] = {
    "Gaussian": CustomEnergy(_half_square),
    "Student, s = 1": Student(),
    "log cosh": LogCosh(),
    "pseudo-Huber, δ = ½": PseudoHuber(0.5),
    "divisive, δ = ¼": Divisive(0.25),
}


NAME = "energies"
WHERE = ("both layers", "output only")


@dataclasses.dataclass(frozen=True)
class Config:
    """Inference of 3 causes from 20 observations; learning of sin 2x by 1-12-1 networks."""

    energies: tuple[str, ...] = tuple(ENERGIES)
    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    samples: int = 100
    noise: float = 0.3
    outlier_std: float = 10.0
    target: float = 4.0
    starts: int = 21
    resolution: int = 61
    learning_samples: int = 40
    learning_fraction: float = 0.2
    learning_outlier: float = 4.0
    seeds: int = 8
    updates: int = 2000
    euler_steps: int = 40
    t1: float = 15.0
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """The shapes of h, the Student chains, outliers in inference and learning, and relaxation."""
    error = np.linspace(-4, 4, 401)
    shown = [ENERGIES[name] for name in config.energies]
    h, slope = (
        np.stack([np.asarray(f(jnp.asarray(error))) for f in functions])
        for functions in ([e.h for e in shown], [e.slope for e in shown])
    )
    times = np.linspace(0, config.t1, 61)
    data = {
        "h": (("energy", "error"), h),
        "slope": (("energy", "error"), slope),
        "inference_error": (
            ("energy", "fraction", "sample"),
            np.stack([inference_errors(config, energy) for energy in shown]),
        ),
        **_learning(config, shown),
        "excess": (
            ("energy", "time"),
            np.stack([relaxation(config, energy, times) for energy in shown]),
        ),
        **_well(config),
    }
    return xarray.Dataset(
        data,
        coords={
            "energy": list(config.energies), "error": error, "fraction": list(config.fractions),
            "time": times, "where": list(WHERE),
        },
        attrs={"source": "random numbers", "target": config.target},
    ).merge(_pair(config))  # fmt: skip


def chain(hidden: int, target: float) -> pcdyn.InferenceProblem:
    """0 → x_1 → … → target, all weights 1 and all errors with the energy log(1 + ε²)."""
    network = pcdyn.Network([pcdyn.Dense(jnp.ones((1, 1))) for _ in range(hidden + 1)])
    return pcdyn.InferenceProblem(network, input=[0.0], output=[target], energy=Student())


def _well(config: Config) -> dict[str, Any]:
    """Equilibria and landscape of the chain of one unit."""
    one = chain(1, config.target)
    starts = np.linspace(0, config.target, config.starts)
    found = pcdyn.multiple_equilibria(one, (starts[:, None] + 1e-3,))
    fine = np.linspace(-0.25 * config.target, 1.25 * config.target, 121)
    return {
        "chain_equilibria": ("chain_equilibrium", np.asarray(found.activities[1])[:, 0]),
        "chain_stable": ("chain_equilibrium", np.asarray(found.stable)),
        "landscape": (
            "activity",
            np.asarray(jax.vmap(lambda x: one.free_energy((x,)))(fine[:, None])),
        ),
        "activity": ("activity", fine),
    }


def _pair(config: Config) -> xarray.Dataset:
    """The portrait of the chain of two units."""
    low, high = -0.25 * config.target, 1.25 * config.target
    portrait = pcdyn.phase_portrait(
        chain(2, config.target), extent=(low, high, low, high), resolution=config.resolution
    )
    return as_data("pair", -1, portrait)


def inference_errors(config: Config, energy: Energies) -> np.ndarray:
    """‖x* − x‖ of causes inferred from observations W x + noise, some of them outliers.

    The input is free and the output clamped: equilibrium is the M-estimate of x (robust
    regression), which for the Gaussian is least squares.
    """
    problem, causes = observations(config, energy)
    # A robust estimate starts from the ordinary one, for it can have several equilibria.
    weight = np.asarray(problem.network.layers[0].weight)
    start = np.asarray(problem.output) @ np.linalg.pinv(weight).T
    found = pcdyn.equilibrium(problem, method="pseudo_transient", initial=(start,))
    distance = np.linalg.norm(np.asarray(found.state[0]) - causes, axis=-1)
    return distance.reshape(len(config.fractions), config.samples)


def observations(config: Config, energy: Energies) -> tuple[pcdyn.InferenceProblem, np.ndarray]:
    """The problem with all fractions in one batch, and the causes to be found."""
    rng = np.random.default_rng(config.seed)
    weight = rng.normal(size=(20, 3)) / np.sqrt(3)
    shape = (len(config.fractions), config.samples)
    causes = np.broadcast_to(rng.normal(size=(config.samples, 3)), (*shape, 3))
    clean = causes @ weight.T + config.noise * rng.normal(size=(config.samples, 20))
    rank = rng.random((config.samples, 20)).argsort(-1).argsort(-1)
    hit = rank < 20 * np.array(config.fractions)[:, None, None]
    shown = clean + hit * config.outlier_std * rng.normal(size=(config.samples, 20))
    network = pcdyn.Network([pcdyn.Dense(jnp.asarray(weight))])
    problem = pcdyn.InferenceProblem(network, output=shown.reshape(-1, 20), energy=energy)
    return problem, causes.reshape(-1, 3)


def _learning(config: Config, energies: list[Any]) -> dict[str, Any]:
    """Functions learned from samples of sin 2x of which some are outliers, by energy and seed.

    Once with the energy in both layers, once with it in the output and the Gaussian below.
    """
    keys = jr.split(jr.key(config.seed), config.seeds)
    shown = jnp.linspace(-2, 2, 81)[:, None]
    functions, residuals = [], []
    raised, gaussian = jnp.asarray(config.learning_outlier), energies[0]
    for energy in energies:
        ends = [learn(config, energy, keys, shown, raised)]
        # Of the Gaussian both are the same.
        if energy is not gaussian:
            ends.append(learn(config, [gaussian, energy], keys, shown, raised))
        functions.append([np.asarray(ends[i][0]) for i in (0, -1)])
        residuals.append([np.asarray(ends[i][1]) for i in (0, -1)])
    clean, _ = learn(config, gaussian, keys, shown, 0 * raised)
    rng_x, rng_y, hit = jax.vmap(lambda key: regression(config, key, raised))(keys)
    return {
        "learned": (("energy", "where", "seed", "x"), np.array(functions)),
        "learned_clean": (("seed", "x"), np.asarray(clean)),
        "learning_residual": (("energy", "where", "seed"), np.array(residuals)),
        "x": ("x", np.asarray(shown[:, 0])),
        "data_x": (("seed", "datum"), np.asarray(rng_x[..., 0])),
        "data_y": (("seed", "datum"), np.asarray(rng_y[..., 0])),
        "outlier": (("seed", "datum"), np.asarray(hit)),
    }


def regression(config: Config, key: jax.Array, raised: jax.Array) -> tuple[Any, Any, Any]:
    """Inputs, targets sin 2x with noise, some of them `raised`, and which."""
    keys = jr.split(jr.fold_in(key, 1), 3)
    x = jr.uniform(keys[0], (config.learning_samples, 1), minval=-2, maxval=2)
    count = round(config.learning_fraction * config.learning_samples)
    hit = jr.permutation(keys[1], jnp.arange(config.learning_samples) < count)
    y = jnp.sin(2 * x) + 0.1 * jr.normal(keys[2], x.shape)
    return x, y + raised * hit[:, None].astype(y.dtype), hit


@eqx.filter_jit
def learn(
    config: Config, energy: Energies, keys: jax.Array, shown: jax.Array, raised: jax.Array
) -> tuple[Any, Any]:
    """What networks of all seeds predict after learning, and how far inference was from its end."""
    rule = learning.EulerPredictiveCoding(dt=0.2, steps=config.euler_steps)
    optimiser = optax.adam(1e-2)

    def one(key: jax.Array) -> tuple[Any, Any]:
        x, y, _ = regression(config, key, raised)
        network = pcdyn.mlp(
            (1, 12, 1), activation="tanh", output_activation="identity", bias=True, key=key
        )
        weights, static = eqx.partition(network, eqx.is_inexact_array)

        def update(carry: PyTree, _: None) -> tuple[Any, Any]:
            weights, moments = carry
            problem = pcdyn.InferenceProblem(
                eqx.combine(weights, static), input=x, output=y, energy=energy
            )
            learned, _ = rule.learn(problem, ())
            slope = eqx.filter(learned.gradient, eqx.is_inexact_array)
            slope = jax.tree.map(lambda g: g / len(x), slope)
            # Adam divides floats by powers of its integer count of steps.
            with jax.numpy_dtype_promotion("standard"):
                change, moments = optimiser.update(slope, moments)
            return (optax.apply_updates(weights, change), moments), jnp.median(learned.residual)

        start = (weights, optimiser.init(weights))
        (weights, _), residuals = jax.lax.scan(update, start, length=config.updates)
        return eqx.combine(weights, static).feedforward(shown)[-1][:, 0], residuals[-1]

    return jax.vmap(one)(keys)


def relaxation(config: Config, energy: Energies, times: np.ndarray) -> np.ndarray:
    """(F(t) − F*) / (F(0) − F*) of a tanh 3-5-2 network from its feedforward pass."""
    keys = jr.split(jr.key(config.seed + 1), 3)
    network = pcdyn.mlp((3, 5, 2), activation="tanh", output_activation="identity", key=keys[0])
    problem = pcdyn.InferenceProblem(
        network, input=jr.normal(keys[1], (3,)), output=3 * jr.normal(keys[2], (2,)), energy=energy
    )
    # F* is F at twice the time that is shown, far below what the figure shows.
    shown = np.append(times, 2 * config.t1)
    trajectory = pcdyn.simulate(problem, t1=2 * config.t1, times=shown)
    energies = np.asarray(trajectory.free_energy)
    return ((energies - energies[-1]) / (energies[0] - energies[-1]))[:-1]


def learning_errors(data: xarray.Dataset) -> xarray.DataArray:
    """Root mean square distance of the learned functions from sin 2x."""
    return _distance(data.learned, data.x)


def _distance(learned: xarray.DataArray, x: xarray.DataArray) -> xarray.DataArray:
    return ((learned - np.sin(2 * x)) ** 2).mean("x") ** 0.5


def _listed(values: xarray.DataArray) -> str:
    return "; ".join(
        f"{name} " + ", ".join(f"{float(v):.1f}" for v in values.sel(energy=name))
        for name in values.energy.values
    )


def check(data: xarray.Dataset) -> list[Evidence]:
    """Two minima at 2 ± √3; outliers spoil the Gaussian and not Student; all F fall."""
    return [*_chains(data), *_inference_claims(data), *_learning_claims(data), _falls(data)]


def _chains(data: xarray.Dataset) -> list[Evidence]:
    kinds = data.kinds_pair.values.tolist()
    minima = np.sort(data.chain_equilibria.values[data.chain_stable.values])
    expected = np.array([2 - np.sqrt(3), 2 + np.sqrt(3)])
    text = "Student: in the chain of two units every minimum leaves the jump to one error"
    apart = np.abs(minima - expected).max() if len(minima) == 2 else np.inf
    return [
        Evidence(
            NAME, "Student: the chain 0 → x → 4 has two minima, 2 ± √3 (largest difference)",
            float(apart), "below", 1e-5, note=", ".join(f"{x:.6f}" for x in minima),
        ),
        Evidence(
            NAME, f"{text} (minima)", kinds.count("minimum"), "equal", 3,
            note=f"saddles {kinds.count('saddle')}, maxima {kinds.count('maximum')}",
        ),
        Evidence(NAME, f"{text} (index sum)", int(data.index_sum_pair), "equal", 1),
    ]  # fmt: skip


def _inference_claims(data: xarray.Dataset) -> list[Evidence]:
    spread = data.inference_error.median("sample")
    gauss, student = (spread.sel(energy=name) for name in ("Gaussian", "Student, s = 1"))
    outliers = f"inference: {float(data.fraction.max()):.0%} outliers"
    clean = spread.isel(fraction=0) / gauss[0]
    return [
        Evidence(NAME, f"{outliers} spoil least squares (factor of the median error)",
                 float(gauss[-1] / gauss[0]), "above", 5.0),
        Evidence(NAME, f"{outliers} hardly spoil a Student estimate (factor of the median error)",
                 float(student[-1] / student[0]), "below", 2.5),
        Evidence(
            NAME, "inference: without outliers robust energies cost little (median error over that "
            "of least squares)", float(clean.max()), "at most", 1.5,
            note=", ".join(f"{n} {float(v):.2f}" for n, v in zip(
                data.energy.values, clean, strict=True) if n != "Gaussian"),
        ),
    ]  # fmt: skip


def _learning_claims(data: xarray.Dataset) -> list[Evidence]:
    learned = learning_errors(data)
    listed = "; ".join(
        f"{n} "
        + ", ".join(f"{float(v.mean()):.3f} ± {float(v.std()):.3f}" for v in learned.sel(energy=n))
        for n in data.energy.values
    )
    robust = learned.isel(energy=slice(1, None)).mean("seed")
    gain = learned.isel(energy=0, drop=True) - learned.isel(energy=slice(1, None))
    gains = gain.mean("seed") / (gain.std("seed", ddof=1) / gain.sizes["seed"] ** 0.5)
    clean, gaussian = (
        float(v.mean()) for v in (_distance(data.learned_clean, data.x), learned.isel(energy=0))
    )
    return [
        Evidence(
            NAME, "learning: with outlying targets robust energies of all layers end nearer to the "
            "clean function (least gain, paired by seed, over its standard error)",
            float(gains.sel(where=WHERE[0]).min()), "at least", 2.0,
            note="root mean square error with them in both layers, in the output only: "
            f"{listed}; gains: {_listed(gains)}",
        ),
        Evidence(
            NAME, "learning: robust energies take away what outliers add, as they do in inference "
            "(share that stays in the best of them)",
            (float(robust.min()) - clean) / (gaussian - clean), "at most", 0.1,
            expected_to_hold=False, note=f"without outliers the Gaussian ends at {clean:.3f}",
        ),
    ]  # fmt: skip


def _falls(data: xarray.Dataset) -> Evidence:
    # F is known to round-off: below that there is nothing left to time.
    arrived = data.time.values[np.argmax(data.excess.values < 1e-3, axis=1)]
    return Evidence(
        NAME, "the free energy falls along inference for every energy (largest rise of F − F* over "
        "its start)", largest_rise(data.excess, axis=1), "at most", 1e-6,
        note="time to 1e-3 of it: "
        + ", ".join(f"{n} {t:g}" for n, t in zip(data.energy.values, arrived, strict=True)),
    )  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Shapes, landscapes of the Student chains, robustness and relaxation."""
    figure, grid = plt.subplots(2, 4, figsize=(14, 6.4), layout="constrained")
    (shape, slope, well, phase), (inferred, fitted, errors, relax) = grid
    for name in data.energy.values:
        part = data.sel(energy=name)
        shape.plot(data.error, part.h, label=name)
        slope.plot(data.error, part.slope)
        median = part.inference_error.median("sample")
        (line,) = inferred.plot(100 * data.fraction, median, "o-")
        low, high = (part.inference_error.quantile(q, "sample") for q in (0.25, 0.75))
        inferred.fill_between(100 * data.fraction, low, high, color=line.get_color(), alpha=0.15)
        relax.semilogy(data.time, part.excess.clip(1e-12))
    shape.set(ylim=(0, 4), xlabel="error ε", title="h(ε)")
    shape.legend(loc="upper center", fontsize=7)
    slope.set(ylim=(-2, 2), xlabel="error ε", title="h′(ε), the influence of an error")
    inferred.set_yscale("log")
    inferred.set(xlabel="outliers (%)", ylabel="‖x* − x‖", title="Causes inferred (quartiles)")
    relax.set(xlabel=plotting.TIME_LABEL, ylabel="(F − F*) / (F(0) − F*)", ylim=(1e-8, 1.5),
              title="Relaxation, tanh 3-5-2")  # fmt: skip
    _draw_wells(well, data)
    portrait_of(data, "pair").plot(phase, legend=False)
    phase.set_title(f"Chain 0 → x₁ → x₂ → {data.target:g}")
    _draw_fits(fitted, data)
    learned = learning_errors(data)
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for i, name in enumerate(data.energy.values):
        for where, place, marker in zip(WHERE, (i - 0.15, i + 0.15), "os", strict=True):
            values = learned.sel(energy=name, where=where).values
            errors.plot(np.full(len(values), place), values, marker, alpha=0.4,
                        color=colours[i], label=where if i == 0 else None)  # fmt: skip
            errors.plot([place - 0.12, place + 0.12], [values.mean()] * 2, color=colours[i])
    clean = float(_distance(data.learned_clean, data.x).mean())
    errors.axhline(clean, color="k", ls=":", lw=1, label="Gaussian, no outliers")
    errors.legend(loc="lower left", fontsize=7)
    errors.set_xticks(
        range(len(data.energy)), [str(n).split(",")[0] for n in data.energy.values], rotation=25
    )
    errors.set(ylabel="root mean square error", title="Learned with outliers, by seed")
    errors.set_ylim(bottom=0)
    return figure


def _draw_wells(ax: Axes, data: xarray.Dataset) -> None:
    ax.plot(data.activity, data.landscape, "k")
    for x, stable in zip(data.chain_equilibria.values, data.chain_stable.values, strict=True):
        level = np.interp(x, data.activity.values, data.landscape.values)
        ax.plot(x, level, "o", color="C0" if stable else "w", mec="k")
        if stable:
            ax.annotate(f"{x:.3f}", (x, level), (0, -12), textcoords="offset points", ha="center")
    ax.set_ylim(bottom=float(data.landscape.min()) - 0.5)
    ax.set(xlabel="x", ylabel="F", title=f"Student chain 0 → x → {data.target:g}")


def _draw_fits(ax: Axes, data: xarray.Dataset) -> None:
    hit = data.outlier.values[0]
    x, y = data.data_x.values[0], data.data_y.values[0]
    ax.plot(x[~hit], y[~hit], ".", color="0.6", ms=4)
    ax.plot(x[hit], y[hit], "x", color="0.3", ms=4)
    ax.plot(data.x, np.sin(2 * data.x), "k:", lw=1)
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for i, name in enumerate(data.energy.values):
        learned = data.learned.sel(energy=name, where=WHERE[1])[0]
        ax.plot(data.x, learned, color=colours[i], lw=1)
    ax.set(xlabel="x", ylabel="y", title="Learned with 20 % outliers (×)")


EXPERIMENT = Experiment(
    "generalised_energies", "extra: generalised energies (A.8)", {"paper": Config()},
    {
        "energies": ("Gaussian", "Student, s = 1"), "fractions": (0.0, 0.2), "samples": 20,
        "starts": 9, "resolution": 9, "seeds": 2, "updates": 600,
    },
    run, check, plot,
)  # fmt: skip
