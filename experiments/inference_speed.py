"""How fast can inference be? Error against time for every solver, and cost against depth and width.

Times are of compiled calls in one process on the machine that the manifest names, the best of a
few; compare them with each other, not with those of another machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import pcdyn
from experiments.base import Claim, Experiment, trained_classifier
from experiments.timing import best_time
from pcdyn import plotting, solvers

# Work by which each method is let run further and further: iterations, or time constants.
RUNGS = np.array([1, 2, 3, 5, 8, 12, 20, 50, 100, 300, 1000, 3000, 10_000])

ITERATIVE = {
    "Gauss–Newton": solvers.GaussNewton(),
    "matrix-free Gauss–Newton": solvers.GaussNewton(explicit_width=0, cg_tolerance=1e-2),
    "Nesterov": solvers.ErrorDescent(),
    "error descent": solvers.ErrorDescent(nesterov=False),
    "pseudo-transient": solvers.PseudoTransient(),
    "fixed point": solvers.FixedPoint(),
}
# Shown against depth and width, timed to a residual rather than to an error.
_SCALED = ("Gauss–Newton", "Nesterov")


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks with both ends clamped, a batch of 64, float32; references in float64."""

    batch: int = 64
    mnist: bool = True
    epochs: int = 3
    precisions: tuple[float, ...] = (0.01, 1.0, 100.0, 1000.0)
    depths: tuple[int, ...] = (8, 16, 32, 64)
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    width: int = 128
    deep: tuple[tuple[int, str], ...] = (
        (8, "orthogonal"), (64, "orthogonal"), (32, "fan_in"),
    )  # fmt: skip
    solvers: tuple[str, ...] = (
        "Gauss–Newton", "Nesterov", "error descent", "pseudo-transient", "fixed point", "Tsit5",
        "Euler",
    )  # fmt: skip
    seconds: float = 1.0
    seed: int = 0


PRESETS = {"paper": Config(), "code": Config()}
FAST = {
    "batch": 8, "mnist": False, "depths": (2,), "widths": (8,), "width": 16,
    "deep": ((4, "orthogonal"),), "solvers": ("Gauss–Newton", "Euler"), "seconds": 0.05,
}  # fmt: skip


def run(config: Config) -> xarray.Dataset:
    """Run every method on every problem with more and more work; time it and measure its error."""
    cases, source = problems(config)
    dims = ("case", "solver", "rung")
    shape = (len(cases), len(config.solvers), len(RUNGS))
    data = {name: np.full(shape, np.nan) for name in ("seconds", "median_error", "largest_error")}
    alone, found = np.zeros(len(cases), bool), np.zeros(len(cases), bool)
    for i, problem in enumerate(cases.values()):
        by_default = pcdyn.equilibrium(problem, throw=False)
        alone[i], found[i] = "," not in by_default.method, by_default.ok
        reference = exact_equilibrium(problem)
        for j, name in enumerate(config.solvers):
            for k, (seconds, errors) in enumerate(ladder(problem, name, reference, config.seconds)):
                data["seconds"][i, j, k] = seconds
                data["median_error"][i, j, k] = np.median(errors)
                data["largest_error"][i, j, k] = np.max(errors)
    by_size = {axis: costs(config, axis) for axis in ("depth", "width")}
    return xarray.Dataset(
        {
            **{name: (dims, values) for name, values in data.items()},
            "default_converged": ("case", found),
            "without_fallback": ("case", alone),
            **{f"seconds_by_{axis}": (("scaled", axis), v) for axis, v in by_size.items()},
        },
        coords={
            "case": list(cases), "solver": list(config.solvers), "rung": RUNGS,
            "scaled": [*_SCALED, "40 Euler steps"],
            "depth": list(config.depths), "width": list(config.widths),
        },
        attrs={"source": source},
    )  # fmt: skip


def problems(config: Config) -> tuple[dict[str, pcdyn.InferenceProblem], str]:
    """The problems by name, and where the digits come from."""
    keys = jr.split(jr.key(config.seed), 8)
    cases = {}
    for name, widths, activation in (
        ("5-5-5 linear", (5, 5, 5), "identity"),
        ("20-20-20-20 tanh", (20, 20, 20, 20), "tanh"),
    ):
        network = pcdyn.mlp(
            widths, activation=activation, std=0.05**0.5, key=keys[0], dtype=jnp.float32
        )
        cases[name] = pcdyn.InferenceProblem(
            network,
            input=1 + jr.normal(keys[1], (config.batch, widths[0])),
            output=jnp.tanh(jr.normal(keys[2], (config.batch, widths[-1]))),
        )
    digits, source = digit_problems(config, keys[3:]) if config.mnist else ({}, "none")
    cases |= digits
    for depth, initialisation in config.deep:
        name = f"{depth} × {config.width} {initialisation.replace('_', ' ')}"
        cases[name] = deep_problem(config, depth, config.width, initialisation)
    return cases, source


def digit_problems(
    config: Config, keys: jax.Array
) -> tuple[dict[str, pcdyn.InferenceProblem], str]:
    """A random and a trained classifier of digits, and where the digits come from."""
    digits = pcdyn.datasets.mnist("train", limits=(0.0, 1.0), dtype=np.float32)
    random = pcdyn.mlp(
        (784, 128, 64, 10), activation="tanh", output_activation="identity", bias=True,
        key=keys[0], dtype=jnp.float32,
    )  # fmt: skip
    trained = trained_classifier(random, digits, epochs=config.epochs, key=keys[1])
    chosen = np.random.default_rng(config.seed).choice(len(digits.labels), config.batch, False)
    images, targets = digits.images[chosen], digits.one_hot[chosen]
    cases = {"MNIST random": pcdyn.InferenceProblem(random, input=images, output=targets)}
    for precision in config.precisions:
        cases[f"MNIST trained, Π = {precision:g}"] = pcdyn.InferenceProblem(
            trained, input=images, output=targets, energy=pcdyn.Gaussian([1.0, 1.0, precision])
        )
    return cases, digits.source


def deep_problem(
    config: Config, depth: int, width: int, initialisation: Any = "orthogonal"
) -> pcdyn.InferenceProblem:
    """`depth` tanh layers of equal width below 10 linear outputs; Gaussian inputs, one-hot targets.

    The batch and the seed are those of `config`.
    """
    keys = jr.split(jr.fold_in(jr.key(config.seed), depth), 3)
    network = pcdyn.mlp(
        [width] * depth + [10], activation="tanh", output_activation="identity",
        initialisation=initialisation, key=keys[0], dtype=jnp.float32,
    )  # fmt: skip
    labels = jr.randint(keys[2], (config.batch,), 0, 10)
    return pcdyn.InferenceProblem(
        network,
        input=jr.normal(keys[1], (config.batch, width)),
        output=jax.nn.one_hot(labels, 10),
    )


def exact_equilibrium(problem: pcdyn.InferenceProblem) -> np.ndarray:
    """The equilibrium in float64 to a residual of 1e-10, all layers side by side."""
    double = jax.tree.map(
        lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, problem
    )
    methods = (solvers.GaussNewton(), solvers.ErrorDescent(), solvers.PseudoTransient())
    return _rows(pcdyn.equilibrium(double, method=methods, tolerance=1e-10).state)


def ladder(
    problem: pcdyn.InferenceProblem, name: str, reference: np.ndarray, budget: float
) -> list[tuple[float, np.ndarray]]:
    """Seconds and relative errors, rung by rung, until it arrives, diverges or takes too long.

    Errors are relative to the displacement between the feedforward pass and the equilibrium.
    """
    solve = compiled(problem, name)
    way = np.linalg.norm(_rows(problem.feedforward_state()) - reference, axis=1)
    results: list[tuple[float, np.ndarray]] = []
    for rung in RUNGS:
        state, seconds = best_time(solve, problem, jnp.asarray(rung))
        results.append((seconds, np.linalg.norm(_rows(state) - reference, axis=1) / way))
        medians = [float(np.median(errors)) for _, errors in results]
        diverges = not medians[-1] < 2
        arrived = medians[-1] < 1e-3 and len(medians) > 2 and medians[-1] > 0.8 * medians[-3]
        if seconds > budget or diverges or arrived:
            break
    return results


def compiled(problem: pcdyn.InferenceProblem, name: str) -> Callable[..., Any]:
    """A compiled function from the problem and the amount of work to the state."""
    if name == "Euler":
        step = min(0.1, 1 / float(largest_curvature(problem)))
        return eqx.filter_jit(lambda problem, steps: euler(problem, step, steps))
    # What it has found after so much work, not when it would stop.
    options: dict[str, Any] = {"tolerance": 1e-30, "throw": False}

    def solve(problem: pcdyn.InferenceProblem, work: Any) -> Any:
        if name == "Tsit5":
            solver = solvers.FlowToRest(pcdyn.Diffrax("tsit5", fallback=None), t1=work)
        else:
            solver = eqx.tree_at(lambda s: s.max_iterations, ITERATIVE[name], work)
        return pcdyn.equilibrium(problem, method=solver, **options).state

    return eqx.filter_jit(solve)


def euler(problem: pcdyn.InferenceProblem, step: float, steps: Any) -> Any:
    """A bare loop of Euler steps, without any check: the least that an update can cost."""
    prepared = problem.prepared()

    def update(_: Any, state: Any) -> Any:
        slope = prepared.gradient(state)
        return jax.tree.map(lambda x, g: x - step * g, state, slope)

    return jax.lax.fori_loop(0, steps, update, problem.feedforward_state())


@eqx.filter_jit
def largest_curvature(problem: pcdyn.InferenceProblem) -> Any:
    """The largest eigenvalue of the Hessian at the feedforward pass, by power iteration."""
    state = problem.feedforward_state()
    _, product = jax.linearize(problem.gradient, state)

    def iterate(_: Any, carry: Any) -> Any:
        direction, _ = carry
        image = product(direction)
        size = jnp.sqrt(sum(jnp.sum(x**2, -1) for x in image))
        return jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1)[:, None], image), size

    start = problem.random_state(jr.key(0))
    sizes = jnp.zeros(len(start[0]), start[0].dtype)
    return jnp.max(jax.lax.fori_loop(0, 50, iterate, (start, sizes))[1])


def costs(config: Config, axis: str) -> np.ndarray:
    """Seconds to a residual of 1e-4 in every sample, and of 40 Euler steps, by depth or width.

    NaN where some sample does not get there.
    """
    table = []
    for size in config.depths if axis == "depth" else config.widths:
        shape = (size, config.width) if axis == "depth" else (config.depths[0], size)
        problem = deep_problem(config, *shape)
        column = []
        for name in _SCALED:
            codes, seconds = best_time(to_rest(ITERATIVE[name]), problem)
            column.append(seconds if np.all(codes == pcdyn.EquilibriumStatus.CONVERGED) else np.nan)
        column.append(best_time(compiled(problem, "Euler"), problem, jnp.asarray(40))[1])
        table.append(column)
    return np.transpose(table)


def to_rest(solver: pcdyn.solvers.Solver, tolerance: float = 1e-4) -> Callable[..., Any]:
    """A compiled function from a problem to the status of each sample."""

    def solve(problem: pcdyn.InferenceProblem) -> Any:
        found = pcdyn.equilibrium(problem, method=solver, tolerance=tolerance, throw=False)
        return found.status_codes

    return eqx.filter_jit(solve)


def _rows(state: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64) for x in state], axis=-1)


def check(data: xarray.Dataset) -> list[Claim]:
    """What does not depend on the machine: where methods end."""
    newton = data.sel(solver="Gauss–Newton")
    ends = np.array([row[np.isfinite(row)][-1] for row in newton.median_error.values])
    gain = data.median_error.sel(solver="Euler", rung=20) / newton.median_error.sel(rung=1)
    chained = [str(name) for name in data.case[~data.without_fallback].values]
    return [
        Claim(
            "speed: by default every sample of every problem converges",
            f"{int(data.default_converged.sum())} of {data.sizes['case']} problems; a fallback "
            f"was needed in {', '.join(chained) or 'none'}",
            "all",
            bool(data.default_converged.all()),
        ),
        Claim(
            "speed: the median error of Gauss–Newton in float32 ends below 1 %",
            f"{float(ends.max()):.1e} at most",
            "< 1e-2",
            bool(ends.max() < 1e-2),
        ),
        Claim(
            "speed: one step of Gauss–Newton is nearer than twenty Euler steps",
            f"{float(gain.min()):.1f} to {float(gain.max()):.0f} times",
            "> 1",
            bool((gain > 1).all()),
        ),
    ]


def plot(data: xarray.Dataset) -> Figure:
    """Median error against milliseconds, one panel for each problem; cost by depth and width."""
    names = list(data.case.values)
    # The same in every picture, however many methods are run.
    colors = {name: f"C{i}" for i, name in enumerate(Config().solvers)}
    columns = 4
    rows = -(-(len(names) + 2) // columns)
    with plotting.style():
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.1 * columns, 2.7 * rows), squeeze=False, layout="constrained"
        )
        flat = list(axes.flat)
        for ax, name in zip(flat, names, strict=False):
            for solver in data.solver.values:
                line = data.sel(case=name, solver=solver)
                ax.loglog(
                    1e3 * line.seconds, line.median_error.clip(1e-8, 10), "o-",
                    markersize=3, color=colors[solver], label=solver,
                )  # fmt: skip
            ax.set(title=name, ylim=(5e-9, 20))
        for ax in axes[:, 0]:
            ax.set_ylabel("median relative error")
        for ax, axis in zip(flat[len(names) :], ("depth", "width"), strict=False):
            for name in data.scaled.values:
                values = 1e3 * data[f"seconds_by_{axis}"].sel(scaled=name)
                color = colors[name.removeprefix("40 ").removesuffix(" steps")]
                ax.loglog(data[axis], values, "o-", markersize=3, color=color, label=name)
            ax.set(xlabel=axis, ylabel="ms to residual 1e-4", title=f"Cost against {axis}")
            ax.set_xticks(data[axis].values, [str(size) for size in data[axis].values])
            for direction in (ax.xaxis, ax.yaxis):
                direction.set_minor_formatter(NullFormatter())
            ax.legend(fontsize="x-small")
        for ax in flat[len(names) + 2 :]:
            ax.remove()
        for ax in flat[: len(names)]:
            ax.set_xlabel("ms")
        handles, labels = flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


EXPERIMENT = Experiment("extra: speed of inference", PRESETS, FAST, run, check, plot)
