"""Three choices beside the method: a step size per sample, float32 or float64, diffrax or SciPy.

The same flows are integrated with one step size for the batch and with one per sample, in float32
and float64, and by two implementations of one method (diffrax's Dopri5 and SciPy's RK45). Errors
are the largest over time and samples, against a float64 solution at 1e-12. Times are the median of
repeats on one machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.networks import classifier, in_float64, trained_classifier
from pcdyn.theory import Evidence

NAME = "choices"
ONE, EACH = "one step size", "one per sample"
METHODS = ("tsit5", "dopri5", "RK45")


@dataclasses.dataclass(frozen=True)
class Config:
    """The 20-20-20-20 tanh network and a trained classifier of digits, both ends clamped."""

    width: int = 20
    batch: int = 64
    digits: bool = True
    hidden: tuple[int, ...] = (128, 64)
    epochs: int = 3
    t1: float = 10.0
    saves: int = 21
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    coarse: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    repeats: int = 3
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Compare on every problem: the methods, then each choice with the same tolerances."""
    tables = []
    cases, source = problems(config)
    options: dict[str, Any] = {
        "t1": config.t1, "times": np.linspace(0, config.t1, config.saves),
        "repeats": config.repeats,
    }  # fmt: skip
    for name, (double, single) in cases.items():
        for dtype, each, problem, methods, tolerances in (
            ("float64", False, double, ("tsit5", "dopri5", "rk45"), config.tolerances),
            ("float64", True, double, ("tsit5",), config.tolerances),
            ("float32", False, single, ("tsit5",), config.coarse),
        ):
            comparison = pcdyn.compare(
                methods, problem, tolerances=tolerances, per_sample=each, **options
            )
            data = comparison.to_xarray()
            labels = {"problem": name, "dtype": dtype, "control": EACH if each else ONE}
            data = data.assign_coords(
                {key: ("run", [label] * data.sizes["run"]) for key, label in labels.items()}
            )
            limit = np.full(data.sizes["run"], comparison.reference_error.maximum_error)
            # From displacements to the root mean square over the units of a sample.
            units = sum(x.shape[-1] for x in problem.zeros_state())
            unit = np.full(data.sizes["run"], comparison.displacement / units**0.5)
            tables.append(data.assign(reference_error=("run", limit), unit=("run", unit)))
    merged = xarray.concat(tables, dim="run", combine_attrs="drop")
    return merged.assign_attrs(source=source, batch=config.batch)


def problems(
    config: Config,
) -> tuple[dict[str, tuple[pcdyn.InferenceProblem, pcdyn.InferenceProblem]], str]:
    """Each problem in float64 and in float32, with the same numbers, and the source of digits."""
    keys = jr.split(jr.key(config.seed), 5)
    widths = [config.width] * 4
    network = pcdyn.mlp(widths, activation="tanh", std=0.05**0.5, key=keys[0], dtype=jnp.float32)
    shape = (config.batch, config.width)
    inputs = (1 + jr.normal(keys[1], shape)).astype(jnp.float32)
    outputs = jnp.tanh(jr.normal(keys[2], shape)).astype(jnp.float32)
    cases = {f"{'-'.join(map(str, widths))} tanh": in_both(network, inputs, outputs)}
    if not config.digits:
        return cases, "random numbers"
    digits = pcdyn.datasets.mnist("train", limits=(0.0, 1.0), dtype=np.float32)
    random = classifier((784, *config.hidden, 10), "tanh", keys[3])
    trained = trained_classifier(random, digits, epochs=config.epochs, key=keys[4])
    chosen = np.random.default_rng(config.seed).choice(len(digits.labels), config.batch, False)
    cases["MNIST, trained"] = in_both(trained, digits.images[chosen], digits.one_hot[chosen])
    return cases, digits.source


def in_both(
    network: pcdyn.Network, inputs: ArrayLike, outputs: ArrayLike
) -> tuple[pcdyn.InferenceProblem, pcdyn.InferenceProblem]:
    """The float32 problem in float64, and itself."""
    single = pcdyn.InferenceProblem(network, input=inputs, output=outputs)
    return in_float64(single), single


def rows(data: xarray.Dataset, problem: str, **labels: str) -> xarray.Dataset:
    """The runs of a problem with these labels; float64 and one step size unless given."""
    labels = {"dtype": "float64", "control": ONE, "integrator": "tsit5"} | labels
    mask = data.problem == problem
    for name, label in labels.items():
        mask = mask & (data[name] == label)
    return data.isel(run=np.flatnonzero(mask.values))


def problem_names(data: xarray.Dataset) -> list[str]:
    """The problems, each once."""
    return list(dict.fromkeys(str(name) for name in data.problem.values))


def check(data: xarray.Dataset) -> list[Evidence]:
    """Steps and errors are what decides; the seconds are in the notes."""
    names = problem_names(data)
    found = (_one_or_each, _precision, _backends)
    return [claim for name in names for claims in found for claim in claims(data, name)]


def _one_or_each(data: xarray.Dataset, problem: str) -> list[Evidence]:
    one, each = (rows(data, problem, control=control) for control in (ONE, EACH))
    steps = (_steps(each) / _steps(one)).values
    seconds = each.run_seconds.values / one.run_seconds.values
    worse = one.maximum_error.values / each.maximum_error.values
    text = f"{problem}: one step size serves a batch of {data.batch}; a sample alone"
    return [
        # Sharing takes the smallest step that any sample needs: never fewer steps than one alone.
        Evidence(
            NAME, f"{text} takes fewer steps (share of the shared ones, at most)",
            float(steps.max()), "at most", 1.05,
            note=f"{steps.min():.2f} at least, in {_range(seconds)} of the seconds",
        ),
        Evidence(NAME, f"{text} is no more accurate (largest error of sharing over its own)",
                 float(worse.max()), "at most", 2.0, note=f"{worse.min():.2g} at least"),
    ]  # fmt: skip


def _precision(data: xarray.Dataset, problem: str) -> list[Evidence]:
    single, double = rows(data, problem, dtype="float32"), rows(data, problem)
    double = double.isel(run=np.isin(double.value, single.value))
    seconds = single.run_seconds.values / double.run_seconds.values
    errors = single.maximum_error.values / double.maximum_error.values
    # Down to where round-off, 1e-6 of the activities, is no longer small beside the tolerance.
    coarse = single.value.values >= 1e-4
    return [
        Evidence(
            NAME, f"{problem}: float32 is as accurate as float64 down to rtol 1e-4 (binary "
            "logarithm of the ratio of their errors, at most)",
            float(abs(np.log2(errors[coarse])).max()), "at most", 1.0,
            note=f"{_range(errors)} of the error of float64 in {_range(seconds)} of its time; "
            f"least error {float(single.maximum_error.min()):.1e}",
        )
    ]  # fmt: skip


def _backends(data: xarray.Dataset, problem: str) -> list[Evidence]:
    ours, theirs = (rows(data, problem, integrator=name) for name in METHODS[1:])
    evaluations = theirs.vector_field_evaluations.values / ours.vector_field_evaluations.values
    seconds = theirs.run_seconds.values / ours.run_seconds.values
    worse = theirs.maximum_error.values / ours.maximum_error.values
    # Two solutions are no further apart than the sum of their errors. SciPy controls the root mean
    # square over the batch: one sample can have √batch times as much.
    errors = (ours.maximum_error.values + theirs.maximum_error.values) * ours.unit.values
    apart = errors / (ours.value.values * data.batch**0.5)
    return [
        Evidence(
            NAME, f"{problem}: diffrax's Dopri5 and SciPy's RK45 agree to the tolerance (√batch "
            "rtol apart, root mean square over units)", float(apart.max()), "at most", 10.0,
            note=f"SciPy's worst sample has {_range(worse)} of the error; it takes "
            f"{evaluations.min():.2f} to {evaluations.max():.2f} of the evaluations and "
            f"{_range(seconds)} of the time",
        )
    ]  # fmt: skip


def _range(values: xarray.DataArray) -> str:
    return f"{values.min():.2g} to {values.max():.2g}"


def _steps(data: xarray.Dataset) -> xarray.DataArray:
    return data.accepted_steps + data.rejected_steps


def plot(data: xarray.Dataset) -> Figure:
    """Error against seconds for each choice, one row for each problem."""
    names = problem_names(data)
    figure, axes = plt.subplots(
        len(names), 3, figsize=(10.5, 3.1 * len(names)), squeeze=False, layout="constrained",
        sharex="row", sharey="row",
    )  # fmt: skip
    for panels, problem in zip(axes, names, strict=True):
        first, second, third = panels
        for control, line in ((ONE, "o-"), (EACH, "s--")):
            _draw(first, rows(data, problem, control=control), line, control)
        for dtype, line in (("float64", "o-"), ("float32", "s--")):
            _draw(second, rows(data, problem, dtype=dtype), line, dtype)
        for name, label, line in (
            ("dopri5", "diffrax Dopri5", "o-"), ("RK45", "SciPy RK45", "s--"),
        ):  # fmt: skip
            _draw(third, rows(data, problem, integrator=name), line, label)
        first.set(ylabel=f"{problem}\nlargest error (displacement)", title="Tsit5: step sizes")
        second.set(title="Tsit5: precision")
        third.set(title="one method, two libraries")
        for panel in panels:
            panel.set(xscale="log", yscale="log", xlabel="seconds for the batch")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.legend()
    return figure


def _draw(axes: Axes, data: xarray.Dataset, line: str, label: str) -> None:
    axes.plot(data.run_seconds, data.maximum_error, line, label=label, markersize=4)


EXPERIMENT = Experiment(
    "integrator_choices", "extra: choices beside the method", {"paper": Config()},
    {
        "width": 4, "batch": 4, "digits": False, "t1": 5.0, "saves": 6, "tolerances": (1e-3, 1e-5),
        "coarse": (1e-3,), "repeats": 1,
    },
    run, check, plot,
)  # fmt: skip
