"""How fast can inference be? Error against time for every solver, and cost against depth and width.

Times are of compiled calls in one process, the best of a few; compare them with each other, not
with those of another machine.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.solver_races import (
    ITERATIVE,
    RUNGS,
    Race,
    compiled,
    deep_problem,
    exact_equilibrium,
    ladder,
    problems,
    to_rest,
)
from experiments.shared.timing import best_time
from pcdyn.theory import Evidence

# Shown against depth and width, timed to a residual rather than to an error.
_SCALED = ("Gauss–Newton", "Nesterov")


def run(config: Race) -> xarray.Dataset:
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


def costs(config: Race, axis: str) -> np.ndarray:
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


def check(data: xarray.Dataset) -> list[Evidence]:
    """What does not depend on the machine: where methods end."""
    newton = data.sel(solver="Gauss–Newton")
    ends = np.array([row[np.isfinite(row)][-1] for row in newton.median_error.values])
    gain = data.median_error.sel(solver="Euler", rung=20) / newton.median_error.sel(rung=1)
    chained = [str(name) for name in data.case[~data.without_fallback].values]
    return [
        Evidence(
            "speed", "by default every sample of every problem converges (share of problems)",
            float(data.default_converged.mean()), "equal", 1.0,
            note=f"of {data.sizes['case']}; a fallback was needed in "
            f"{', '.join(chained) or 'none'}",
        ),
        Evidence("speed", "the median error of Gauss–Newton in float32 ends below 1 % (largest)",
                 float(ends.max()), "below", 1e-2),
        Evidence("speed", "one step of Gauss–Newton is nearer than twenty Euler steps (times, at "
                 "least)", float(gain.min()), "above", 1.0, note=f"to {float(gain.max()):.0f}"),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Median error against milliseconds, one panel for each problem; cost by depth and width."""
    names = list(data.case.values)
    # The same in every picture, however many methods are run.
    colors = {name: f"C{i}" for i, name in enumerate(Race().solvers)}
    columns = 4
    rows = -(-(len(names) + 2) // columns)
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


EXPERIMENT = Experiment(
    "inference_speed", "extra: speed of inference", {"paper": Race()},
    {
        "batch": 8, "mnist": False, "depths": (2,), "widths": (8,), "width": 16,
        "deep": ((4, "orthogonal"),), "solvers": ("Gauss–Newton", "Euler"), "seconds": 0.05,
    },
    run, check, plot,
)  # fmt: skip
