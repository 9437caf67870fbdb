"""Which integrator, at what cost: work against error on four problems, orders, and stability."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffrax
import jax.numpy as jnp
import jax.random as jr
import lineax
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.networks import gaussian_weights, linear_problems, network_of
from pcdyn.theory import Evidence

NAME = "integrators"
STEPPED = ("euler", "implicit_euler")
EXPLICIT = ("heun", "midpoint", "ralston", "bosh3", "tsit5", "dopri5", "dopri8")
IMPLICIT = ("kvaerno3", "kvaerno4", "kvaerno5", "rodas5p")
# What diffrax does by itself: one dense matrix for all layers and samples together.
DENSE = "kvaerno5, dense"
HOST = ("RK45", "DOP853", "Radau", "BDF", "LSODA")
ORDERS = {
    "euler": 1, "heun": 2, "midpoint": 2, "ralston": 2, "bosh3": 3, "tsit5": 5, "dopri5": 5,
    "dopri8": 8, "implicit_euler": 1, "kvaerno3": 3, "kvaerno4": 4, "kvaerno5": 5, "rodas5p": 5,
}  # fmt: skip
DEFAULT = "tsit5"
_METRICS = ("maximum_error", "final_error", "vector_field_evaluations", "run_seconds")


@dataclasses.dataclass(frozen=True)
class Config:
    """Random 5-5-5 networks of A.9, linear and tanh; a stiff tanh network, whose output precision
    is `ratio` times that of its hidden layers; and a deep one."""

    problems: tuple[str, ...] = ("linear", "tanh", "stiff", "deep")
    batches: tuple[int, ...] = (16, 16, 4, 1)
    ends: tuple[float, ...] = (10.0, 10.0, 2.0, 5.0)
    ratio: float = 1e4
    stiff_widths: tuple[int, ...] = (20, 20, 20, 10)
    depth: int = 16
    width: int = 64
    integrators: tuple[str, ...] = (*STEPPED, *EXPLICIT, *IMPLICIT, DENSE, *HOST)
    # On the stiff problem SciPy's explicit methods would take minutes.
    left_out_if_stiff: tuple[str, ...] = ("RK45", "DOP853")
    tolerances: tuple[float, ...] = (1e-2, 1e-4, 1e-6, 1e-8)
    # Shares of the largest stable step of Euler, and numbers of steps of implicit Euler.
    shares: tuple[float, ...] = (0.9, 0.3, 0.1, 0.03, 0.01)
    implicit_steps: tuple[int, ...] = (10, 30, 100)
    most_steps: int = 200_000
    errors: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
    orders: tuple[str, ...] = tuple(ORDERS)
    repeats: int = 2
    seed: int = 0


def problem(name: str, config: Config, batch: int) -> pcdyn.InferenceProblem:
    """One of the four problems, both ends clamped."""
    keys = jr.split(jr.key(config.seed), 4)
    if name == "linear":
        weights, inputs, outputs = linear_problems(keys, networks=batch, width=5, std=0.05**0.5)
        return pcdyn.InferenceProblem(
            network_of(weights[0], "identity"), input=inputs, output=outputs
        )
    if name == "tanh":
        weights = gaussian_weights(keys[0], networks=1, layers=2, width=5, std=0.05, identity=True)
        network, energy = network_of(weights[0], "tanh"), pcdyn.Gaussian()
    elif name == "stiff":
        network = pcdyn.mlp(config.stiff_widths, activation="tanh", key=keys[0])
        layers = len(config.stiff_widths) - 1
        energy = pcdyn.Gaussian([*[1.0] * (layers - 1), config.ratio])
    else:
        widths = (config.width,) * (config.depth + 1)
        network, energy = pcdyn.mlp(widths, activation="tanh", key=keys[0]), pcdyn.Gaussian()
    return pcdyn.InferenceProblem(
        network, energy=energy,
        input=1 + jr.normal(keys[1], (batch, network.widths[0])),
        output=jnp.tanh(jr.normal(keys[2], (batch, network.widths[-1]))),
    )  # fmt: skip


def run(config: Config) -> xarray.Dataset:
    """Compare all integrators on each problem, and measure their orders and the spectra."""
    tables, spectra = [], []
    for name, batch, t1 in zip(config.problems, config.batches, config.ends, strict=True):
        posed = problem(name, config, batch)
        spectrum = pcdyn.stability(posed)
        largest = float(np.min(spectrum.largest_euler_step))
        steps = [largest * share for share in config.shares]
        ladders = {
            "euler": [dt for dt in steps if t1 <= dt * config.most_steps],
            "implicit_euler": [t1 / count for count in config.implicit_steps],
        }
        methods = chosen(name, config)
        adaptive = {label: one for label, one in methods.items() if label not in STEPPED}
        comparisons = [
            pcdyn.compare(
                {label: methods[label]}, posed, t1=t1, steps=ladder, repeats=config.repeats
            )
            for label, ladder in ladders.items() if label in methods
        ]  # fmt: skip
        comparisons.append(
            pcdyn.compare(
                adaptive, posed, t1=t1, tolerances=config.tolerances, repeats=config.repeats
            )
        )
        for comparison in comparisons:
            table = comparison.to_xarray()
            tables.append(table.assign_coords(problem=("run", [name] * table.sizes["run"])))
        spectra.append(
            {
                "slowest_rate": float(np.min(spectrum.slowest_rate)),
                "fastest_rate": float(np.max(spectrum.fastest_rate)),
                "largest_euler_step": largest,
                "largest_default_step": float(np.min(spectrum.largest_step(DEFAULT))),
                "reference_error": comparisons[-1].reference_error.maximum_error,
            }
        )
    data = xarray.concat(tables, "run", combine_attrs="drop")
    measured = orders(config)
    return data.assign(
        {
            **{name: ("problem_name", [s[name] for s in spectra]) for name in spectra[0]},
            "order": (("order_method", "order_problem"), measured),
        }
    ).assign_coords(
        problem_name=list(config.problems), order_method=list(config.orders),
        order_problem=["linear", "tanh"], error=list(config.errors),
    ).assign_attrs(source="random numbers", repeats=config.repeats)  # fmt: skip


def chosen(name: str, config: Config) -> Mapping[str, Any]:
    """The integrators by name, with steps enough for a stiff problem; the exact one where it is."""
    found: dict[str, Any] = {}
    for method in config.integrators:
        if name == "stiff" and method in config.left_out_if_stiff:
            continue
        if method == DENSE:
            if name == "stiff":
                found[method] = pcdyn.Diffrax(dense_kvaerno5(), max_steps=config.most_steps)
            continue
        if method in HOST:
            found[method] = pcdyn.SciPy(method)
        elif method == "euler":
            found[method] = pcdyn.Euler(dt=1.0)
        elif method in STEPPED:
            found[method] = pcdyn.Diffrax(method, dt=1.0, max_steps=config.most_steps)
        else:
            found[method] = pcdyn.Diffrax(method, max_steps=config.most_steps)
    return found | ({"exact": pcdyn.Exact()} if name == "linear" else {})


def dense_kvaerno5() -> diffrax.Kvaerno5:
    """Kvaerno5 as diffrax would run it, with a dense factorisation of the whole Jacobian."""
    finder = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)(linear_solver=lineax.LU())
    return diffrax.Kvaerno5(root_finder=finder)


def orders(config: Config) -> np.ndarray:
    """The order of each method on the linear and the tanh problem, one sample, to t = 1."""
    posed = [problem(name, config, 1) for name in ("linear", "tanh")]
    return np.array(
        [[pcdyn.convergence_order(m, p, t1=1.0).order for p in posed] for m in config.orders]
    )


def fastest(data: xarray.Dataset, name: str, error: float) -> dict[str, float]:
    """For each integrator the least seconds of its runs with a maximum error of at most `error`.

    From the least on; integrators that do not reach the error are left out.
    """
    good = (
        (data.problem == name) & data.status.isin(["REACHED_T1", "CONVERGED"])
        & (data.maximum_error <= error)
    )  # fmt: skip
    part = data.isel(run=np.flatnonzero(good.values)).sortby("run_seconds")
    found: dict[str, float] = {}
    for method, seconds in zip(part.integrator.values, part.run_seconds.values, strict=True):
        found.setdefault(str(method), float(seconds))
    return found


def check(data: xarray.Dataset) -> list[Evidence]:
    """Euler never wins, orders are those of the methods, and what the table recommends."""
    names, errors = data.problem_name.values, [e for e in data.error.values if e <= 1e-2]
    wins = [
        (name, e) for name in names for e in errors
        if next(iter(fastest(data, name, e)), "") == "euler"
    ]  # fmt: skip
    lags = {
        str(name): lag(data, str(name), DEFAULT)
        for name in names
        if name in ("linear", "tanh", "deep")
    }
    claims = [
        Evidence(
            NAME, "fixed-step Euler is never the fastest for an error of at most 1e-2 (cases in "
            "which it is)", len(wins), "equal", 0, note=f"of {len(names) * len(errors)}",
            timed=True,
        ),
        *_order_claims(data),
    ]  # fmt: skip
    if lags:
        claims.append(Evidence(
            NAME, f"{DEFAULT}, the default, is no more than twice as slow as the fastest where "
            "nothing is stiff (times at worst)", max(lags.values()), "at most", 2.0, timed=True,
            note=", ".join(f"{name}: {value:.2g}" for name, value in lags.items()),
        ))  # fmt: skip
    return [*claims, _stiff_claim(data)] if "stiff" in names else claims


def _order_claims(data: xarray.Dataset) -> list[Evidence]:
    """Orders on a linear and a tanh network; of order 8 too few steps are clear of round-off."""
    claims = []
    for high, text in (
        (False, "every integrator of order up to 5 has its order"),
        (True, "dopri8 shows its order 8 above round-off"),
    ):
        methods = [str(m) for m in data.order_method.values if (ORDERS[str(m)] > 5) == high]
        found = {m: data.order.sel(order_method=m).values for m in methods}
        # What is missing, and up to order 4 what is too much: beyond it errors can fall faster.
        off = [
            max(ORDERS[m] - orders.min(), (orders.max() - ORDERS[m]) * (ORDERS[m] <= 4))
            for m, orders in found.items()
        ]
        if off:
            claims.append(Evidence(
                NAME, f"{text}, on a linear and on a tanh network (largest difference)",
                float(max(off)), "at most", 0.1, expected_to_hold=not high,
                note="; ".join(
                    f"{m} {', '.join(f'{o:.2f}' for o in orders)}" for m, orders in found.items()
                ),
            ))  # fmt: skip
    return claims


def lag(data: xarray.Dataset, name: str, method: str) -> float:
    """How much slower than the fastest adaptive or fixed method it is, at worst over the errors."""
    ratios = []
    for error in data.error.values:
        found = fastest(data, name, error)
        found.pop("exact", None)
        if method in found:
            ratios.append(found[method] / min(found.values()))
    return float(max(ratios, default=np.inf))


def _stiff_claim(data: xarray.Dataset) -> Evidence:
    found = fastest(data, "stiff", 1e-6)
    structured = [found[m] for m in found if m in IMPLICIT]
    others = [found[m] for m in found if m in (*EXPLICIT, DENSE, "LSODA")]
    gain = others[0] / structured[0] if structured and others else np.nan
    return Evidence(
        NAME, "stiff (precision ratio 1e4): block-tridiagonal implicit steps against the best "
        "explicit method, dense Kvaerno5 and LSODA, error ≤ 1e-6 (times faster)", float(gain),
        "at least", 10.0, note=", ".join(f"{m} {t:.2g} s" for m, t in found.items()), timed=True,
    )  # fmt: skip


_FAMILIES = {
    "Euler": (("euler",), "0.6"),
    "best other explicit": ((*(m for m in EXPLICIT if m != DEFAULT),), "#0072B2"),
    "best implicit": (IMPLICIT, "#D55E00"),
    "best of SciPy": (HOST, "#009E73"),
}


def best(data: xarray.Dataset, name: str, methods: Sequence[str]) -> list[tuple[str, float]]:
    """The fastest of these integrators for each error and its seconds; NaN if none reaches it."""
    found = [fastest(data, name, float(error)) for error in data.error.values]
    return [
        next(((m, seconds) for m, seconds in each.items() if m in methods), ("", np.nan))
        for each in found
    ]


def plot(data: xarray.Dataset) -> Figure:
    """Seconds for an error on each problem: the default, and the best of each family."""
    names = [str(name) for name in data.problem_name.values]
    figure, axes = plt.subplots(
        1, len(names), figsize=(2.8 * len(names) + 0.6, 3.6), sharey=True, squeeze=False
    )
    for ax, name in zip(axes[0], names, strict=True):
        for (family, (methods, color)), marker in zip(_FAMILIES.items(), "sovD", strict=True):
            seconds = [s for _, s in best(data, name, methods)]
            ax.loglog(data.error, seconds, marker + "-", ms=4, color=color, label=family)
        seconds = [s for _, s in best(data, name, (DEFAULT,))]
        ax.loglog(data.error, seconds, "k-", lw=3, label=f"{DEFAULT}, the default")
        part = data.sel(problem_name=name)
        ax.set_title(f"{name}\nstiffness {float(part.fastest_rate / part.slowest_rate):,.0f}")
        ax.set(xlabel="error, at most", xticks=data.error.values)
        ax.xaxis.set_inverted(True)
        ax.minorticks_off()
    axes[0, 0].set_ylabel("seconds")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=len(labels), frameon=False
    )
    return figure


def page(data: xarray.Dataset, folder: Path) -> str:
    """The tables in words: recommendations, orders, spectra, and every run."""
    lines = ["# Integrators: what to use, and what it costs to be wrong", ""]
    lines += [
        "Errors are the largest over time of the worst sample, in units of its displacement from "
        f"start to end; seconds are the median of {data.attrs['repeats']} interleaved repeats on "
        "the machine that drew the picture. Drawn by `python -m experiments integrators`.", "",
        "## The fastest integrator for an error", "",
        "| problem | " + " | ".join(f"≤ {e:g}" for e in data.error.values) + " |",
        "|---" * (1 + data.sizes["error"]) + "|",
    ]  # fmt: skip
    for name in data.problem_name.values:
        cells = []
        for error in data.error.values:
            found = fastest(data, name, error)
            found.pop("exact", None)
            cells.append(
                "none" if not found else
                f"{next(iter(found))} {1e3 * min(found.values()):.2g} ms"
                + (f" ({DEFAULT} {1e3 * found[DEFAULT]:.2g})" if DEFAULT in found else "")
            )  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## The fastest of each family", "",
              "| problem | | " + " | ".join(f"≤ {e:g}" for e in data.error.values) + " |",
              "|---" * (2 + data.sizes["error"]) + "|"]  # fmt: skip
    for name in data.problem_name.values:
        for family, (methods, _) in _FAMILIES.items():
            cells = [
                f"{method} {1e3 * seconds:.2g} ms" if method else "none"
                for method, seconds in best(data, str(name), methods)
            ]
            lines.append(f"| {name} | {family} | " + " | ".join(cells) + " |")
    lines += ["", "## Spectra", "",
              "| problem | slowest rate | fastest rate | largest step of Euler | of "
              f"{DEFAULT} | error of the reference |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name in data.problem_name.values:
        part = data.sel(problem_name=name)
        columns = ("slowest_rate", "fastest_rate", "largest_euler_step", "largest_default_step",
                   "reference_error")  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(f"{float(part[c]):.2g}" for c in columns) + " |")
    lines += ["", "## Orders", "", "| method | order | linear | tanh |", "|---|---|---|---|"]
    for method in data.order_method.values:
        values = " | ".join(f"{o:.3f}" for o in data.order.sel(order_method=method).values)
        lines.append(f"| {method} | {ORDERS[str(method)]} | {values} |")
    lines += ["", "## Every run", "",
              "| problem | integrator | setting | status | error, largest | at the end | "
              "evaluations | seconds |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for i in range(data.sizes["run"]):
        row = data.isel(run=i)
        numbers = " | ".join(f"{float(row[m]):.3g}" for m in _METRICS)
        setting = f"{row.setting.item()} {float(row.value):.2g}" if row.setting.item() else ""
        lines.append(
            f"| {row.problem.item()} | {row.integrator.item()} | {setting} | {row.status.item()} | "
            f"{numbers} |"
        )
    return "\n".join(lines).replace("nan", "–") + "\n"


EXPERIMENT = Experiment(
    "integrators", "extra: integrators", {"paper": Config()},
    {
        "problems": ("tanh",), "batches": (2,), "ends": (5.0,), "repeats": 1,
        "integrators": ("euler", "tsit5"), "tolerances": (1e-4, 1e-7), "shares": (0.3, 0.03),
        "errors": (1e-2, 1e-3), "orders": ("heun",),
    },
    run, check, plot, page=page,
)  # fmt: skip
