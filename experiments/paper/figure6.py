"""Figure 6: when PC approximates or equals BP, and when TP; each box with its measured distance.

All boxes are of the network of Figure 5. Units are coloured by the activities there; arrows are as
wide as the prediction errors that they carry backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
import xarray
from jax.flatten_util import ravel_pytree
from jaxtyping import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.example import COLORS, Example, problem_of
from experiments.shared.experiment import Experiment
from experiments.shared.networks import network_of
from experiments.shared.precision_paths import TOLERANCE, followed_path, precisions_of
from pcdyn import learning
from pcdyn._support.states import cosine, step
from pcdyn._support.types import Activities, State
from pcdyn.model.energies.interpolation import graded, interpolated
from pcdyn.plotting import schematic
from pcdyn.references import BackpropagationPass
from pcdyn.theory import Evidence

BOXES = ("low precision", "fixed prediction", "first update", "input free", "high precision ratio",
         "neither")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """The network of Figure 5, odds λ/(1 − λ), ratios ρ and times."""

    example: Example = dataclasses.field(default_factory=Example)
    lowest_odds: float = 1e-4
    highest_ratio: float = 1e4
    points: int = 13
    free_time: float = 1000.0


def run(config: Config) -> xarray.Dataset:
    """Distances to BP's deltas in three boxes, to TP's targets in two, and cosines in the last."""
    problem = problem_of(config.example)
    depth = problem.network.depth
    bp, tp = pcdyn.backpropagation(problem), pcdyn.target_propagation(problem)
    targets = tp.targets
    odds = np.geomspace(config.lowest_odds, 1.0, config.points)
    ratios = np.geomspace(1.0, config.highest_ratio, config.points)
    rests = followed(problem, [
        *(interpolated(x / (1 + x), depth) for x in odds), *(graded(x, depth) for x in ratios)
    ])  # fmt: skip
    low, high = rests[: config.points], rests[config.points :]
    scaled = [[e / x for e in errors[:-1]] for x, (_, errors) in zip(odds, low, strict=True)]
    times = np.geomspace(0.01, 30, 40)
    frozen = fixed_predictions(problem, bp, times)
    fixed = learning.FixedPrediction(dt=0.5, steps=80)
    first = learning.ZeroDivergence()
    free, free_times = input_free(config, problem, bp.activities)
    early, first_errors = first_updates(problem, early_times := np.geomspace(1e-3, 1, 25))

    def away(errors: Sequence[ArrayLike]) -> list[np.ndarray]:
        # Predictions are still those of the feedforward pass; the output is at its target.
        pairs = zip(bp.activities[1:], errors, strict=True)
        return [np.asarray(bp.activities[0]), *(np.asarray(x) + e for x, e in pairs)]

    shown = {
        "low precision": (low[0][0], [*scaled[0], low[0][1][-1]]),
        "fixed prediction": (away(bp.deltas), bp.deltas),
        "first update": (away(first_errors), first_errors),
        "input free": (free[-1], problem.prediction_errors(tuple(map(jnp.asarray, free[-1])))),
        "high precision ratio": high[-1],
        "neither": high[0],
    }
    return xarray.Dataset(
        {
            "weight": (("layer", "unit", "from"),
                       np.stack([w.weight for w in problem.network.layers])),
            "activities": (("box", "level", "unit"), np.stack([shown[b][0] for b in BOXES])),
            "errors": (("box", "layer", "unit"), np.stack([shown[b][1] for b in BOXES])),
            "low": (("odds", "hidden"), [_far(row, bp.deltas) for row in scaled]),
            "fixed": (("time", "hidden"), [_far(row, bp.deltas) for row in frozen]),
            "first": (("early", "hidden"), [_far(row, bp.deltas) for row in early]),
            "free": (("free_time", "below"), [_far(x[:-1], targets) for x in free]),
            "high": (("ratio", "hidden"), [_far(x[1:-1], targets[1:]) for x, _ in high]),
            "fixed_gradient": rule_distance(problem, fixed, bp.weight_gradient),
            "first_gradient": rule_distance(problem, first, bp.weight_gradient),
            "cosines": (("reference", "layer"), neither(high[0], bp, targets)),
        },
        coords={"box": list(BOXES), "odds": odds, "ratio": ratios, "time": times,
                "early": early_times, "free_time": free_times, "reference": ["BP", "TP"]},
        attrs={"source": "random numbers"},
    )  # fmt: skip


def followed(problem: pcdyn.InferenceProblem, energies: list[list[pcdyn.Gaussian]]) -> list[Any]:
    """Activities and prediction errors at rest, for one energy after another."""
    path = precisions_of(energies)
    activities, residuals = eqx.filter_jit(followed_path)(problem, path)
    if float(residuals.max()) > TOLERANCE:
        raise pcdyn.PcdynError(f"an equilibrium was not found: residual {residuals.max():.1e}")
    errors = problem.prediction_errors(activities)
    return [
        ([np.asarray(x[i]) for x in activities], [np.asarray(e[i]) for e in errors])
        for i in range(len(energies))
    ]


def _far(values: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> list[float]:
    """Relative distances, as many as there are values."""
    pairs = zip(values, references[: len(values)], strict=True)
    return [float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)) for a, b in pairs]


def fixed_predictions(
    problem: pcdyn.InferenceProblem, bp: BackpropagationPass, times: np.ndarray
) -> list[Any]:
    """Hidden errors with predictions and slopes frozen: `ε̇_l = −ε_l + J_{l+1}ᵀ ε_{l+1}`."""
    network = problem.network
    slopes = [
        np.asarray(jax.jacobian(lambda x, i=index: network.predict(i, x))(bp.activities[index - 1]))
        for index in range(2, network.depth + 1)
    ]
    output = np.asarray(bp.deltas[-1])
    width = len(output)

    def field(_: float, stacked: np.ndarray) -> np.ndarray:
        errors = [*stacked.reshape(-1, width), output]
        return np.concatenate([
            slope.T @ above - own
            for slope, own, above in zip(slopes, errors[:-1], errors[1:], strict=True)
        ])  # fmt: skip

    start = np.zeros(width * len(slopes))
    solved = scipy.integrate.solve_ivp(
        field, (0, times[-1]), start, t_eval=times, rtol=1e-11, atol=1e-14, method="DOP853"
    )
    return [row.reshape(-1, width) for row in solved.y.T]


def first_updates(
    problem: pcdyn.InferenceProblem, times: np.ndarray
) -> tuple[list[Any], list[Any]]:
    """`ε_l (L − l)!/t^{L−l}` early on, and ε_l at the step of size 1 that first moves it."""
    depth = problem.network.depth
    factorials = np.cumprod([1, *range(1, depth)])
    flow = pcdyn.simulate(
        problem, t1=times[-1], times=np.append(0, times),
        integrator=pcdyn.SciPy("DOP853", rtol=1e-12, atol=1e-16),
    )  # fmt: skip
    early = [
        [np.asarray(flow.prediction_errors[l - 1][i]) * factorials[depth - l] / t ** (depth - l)
         for l in range(1, depth)]
        for i, t in enumerate(times, start=1)
    ]  # fmt: skip
    # ε_l for the first time, by as many steps of size 1 as it takes.
    state, errors = problem.feedforward_state(), []
    for index in range(depth, 0, -1):
        errors.insert(0, problem.prediction_errors(problem.activities(state))[index - 1])
        state = step(state, 1.0, problem.vector_field(0.0, state))
    return early, errors


def input_free(
    config: Config, problem: pcdyn.InferenceProblem, start: State
) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Activities along the flow with the input free, from the feedforward pass."""
    free = pcdyn.InferenceProblem(problem.network, output=problem.output)
    times = np.append(0, np.geomspace(0.1, config.free_time, 40))
    flow = pcdyn.simulate(
        free, t1=config.free_time, times=times, initial=start[:-1],
        integrator=pcdyn.SciPy("BDF", rtol=1e-8, atol=1e-11),
    )  # fmt: skip
    return [[np.asarray(x[i]) for x in flow.activities] for i in range(len(times))], times


def rule_distance(
    problem: pcdyn.InferenceProblem, rule: learning.Rule, gradient: pcdyn.Network
) -> float:
    """Relative distance of a rule's weight gradient to another."""
    assert problem.input is not None and problem.output is not None
    batch = problem.with_data(problem.input[None], problem.output[None])
    rule.check(batch)
    learned, _ = rule.learn(batch, ())
    ours, theirs = (
        np.asarray(ravel_pytree(eqx.filter(each, eqx.is_inexact_array))[0])
        for each in (learned.gradient, gradient)
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def neither(
    rest: tuple[list[np.ndarray], list[np.ndarray]], bp: BackpropagationPass, targets: Activities
) -> np.ndarray:
    """Cosines of the prediction errors at unit precisions to BP's deltas and TP's errors."""
    local = [t - x for t, x in zip(targets[1:], bp.activities[1:], strict=True)]
    return np.stack([cosine(np.stack(rest[1]), np.stack(each)) for each in (bp.deltas, local)])


def check(data: xarray.Dataset) -> list[Evidence]:
    """The numbers in the boxes."""

    def order(values: xarray.DataArray, axis: str) -> np.ndarray:
        ends = values.isel({axis: slice(-2, None)}) if axis == "ratio" else values[:2]
        logs = np.log(ends.values)
        return np.diff(logs, axis=0)[0] / np.diff(np.log(ends[axis].values))

    slopes = np.concatenate([
        order(data.low, "odds"), order(data.first, "early"), -order(data.high[:, :1], "ratio"),
        -order(data.high[:, 1:2], "ratio") / 2,
    ])  # fmt: skip
    distances = (
        ("low precision: weighted errors at BP's deltas, at the lowest odds", data.low[0].max(),
         1e-3),
        ("fixed prediction: weight gradient at BP's", data.fixed_gradient, 1e-10),
        ("fixed prediction: errors follow (1 − e^{−t}) δ and (1 − (1 + t)e^{−t}) δ",
         _against_closed_form(data), 1e-8),
        ("first update: weight gradient of Z-IL at BP's", data.first_gradient, 1e-12),
        ("input free: activities at TP's targets", data.free[-1].max(), 1e-6),
        ("high precision ratio: activities at TP's targets, at the highest ratio",
         data.high[-1].max(), 1e-2),
        ("the output that is clamped is the same in every box (largest difference)",
         np.ptp(data.activities.values[:, -1], axis=0).max(), 1e-12),
    )  # fmt: skip
    return [
        *(Evidence("6", text, float(value), "at most", bound) for text, value, bound in distances),
        Evidence(
            "6", "orders in λ, t and 1/ρ at the ends are 1, in the second hidden layer 2 in 1/ρ "
            "(largest relative difference)", float(abs(slopes - 1).max()), "at most", 0.05,
            note="over what is expected: " + ", ".join(f"{s:.3f}" for s in slopes),
        ),
    ]  # fmt: skip


def _against_closed_form(data: xarray.Dataset) -> float:
    """The relative distance to BP is e^{−t} in layer L − 1 and (1 + t)e^{−t} below."""
    t = data.time.values
    expected = np.stack([(1 + t) * np.exp(-t), np.exp(-t)], axis=1)
    return float(np.max(np.abs(data.fixed.values - expected)))


_BP, _TP, _PC = (COLORS[rule] for rule in ("BP", "TP", "PC"))
_TITLES = {
    "low precision": ("≈ BP: low output precision", _BP),
    "fixed prediction": ("= BP: predictions fixed", _BP),
    "first update": ("= BP: first update (Z-IL)", _BP),
    "input free": ("= TP: input free", _TP),
    "high precision ratio": ("≈ TP: high precision ratio", _TP),
    "neither": ("between: equal precisions", _PC),
}


_FOOT = (
    "circles: activities, red above zero, blue below, a heavy edge is clamped\n"
    "arrows and numbers: the size of each layer's weighted prediction error. "
    "Time in activity time constants"
)


def plot(data: xarray.Dataset) -> Figure:
    """One box for each condition: the network and errors there, and the distance measured."""
    network = network_of(jnp.asarray(data.weight.values), "tanh")
    figure = plt.figure(figsize=(11, 8.6), layout="constrained")
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 1, 0.08), hspace=0.03)
    *rows, foot = parts[:, 0]
    foot.text(0.5, 0.5, _FOOT, ha="center", va="center", fontsize=9)
    boxes = [box for row in rows for box in row.subfigures(1, 3, wspace=0.03)]
    for box, name in zip(boxes, BOXES, strict=True):
        title, color = _TITLES[name]
        box.set_facecolor((*to_rgb(color), 0.07))
        top, bottom = box.subplots(2, 1, height_ratios=(1, 1.25))
        top.set_title(title, color=color, weight="bold")
        _draw_network(top, data, name, network, color)
        _draw_curve(bottom, data, name)
        for ax in (top, bottom):
            ax.set_facecolor("none")
    return figure


def _draw_network(
    ax: Axes, data: xarray.Dataset, name: str, network: pcdyn.Network, color: str
) -> None:
    layout = schematic.Layout(network.widths, layer_distance=1.9)
    values = list(data.activities.sel(box=name).values)
    clamped = (0, network.depth) if name != "input free" else (network.depth,)
    schematic.weights(ax, layout, network, width=1.0)
    schematic.units(ax, layout, values, largest=float(abs(data.activities).max()), clamped=clamped)
    sizes = np.linalg.norm(data.errors.sel(box=name).values, axis=-1)
    largest = float(np.linalg.norm(data.errors.values, axis=-1).max())
    schematic.signals(
        ax, layout, sizes, backward=True, largest=largest, color=color,
        offset=-layout.half_height(0) - 0.3,
    )  # fmt: skip
    for layer, size in enumerate(sizes, start=1):
        x, y = layout.middle(layer)
        ax.text(x - 0.95, y - layout.half_height(0) - 0.52, _power(size), ha="center", va="top",
                fontsize=8, color=color)  # fmt: skip
    schematic.frame(ax, (-0.4, 1.9 * network.depth + 0.4), (-1.5, 0.8))


def _power(size: float) -> str:
    if size >= 0.01:
        return f"{size:.2f}"
    exponent = int(np.floor(np.log10(max(size, 1e-300))))
    return "0" if size == 0 else f"$10^{{{exponent}}}$"


def _draw_curve(ax: Axes, data: xarray.Dataset, name: str) -> None:
    if name == "neither":
        for shift, reference, color in ((-0.2, "BP", _BP), (0.2, "TP", _TP)):
            bars = ax.bar(data.layer + 1 + shift, data.cosines.sel(reference=reference), 0.36,
                          color=color, label=f"to {reference}")  # fmt: skip
            ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
        ax.axhline(0, color="black", lw=0.6)
        ax.set(xticks=data.layer.values + 1, xlabel="layer", ylabel="cosine of ε", ylim=(None, 1.4))
        ax.legend(ncols=2, loc="upper center", fontsize=8)
        return
    key, axis, label, what = {
        "low precision": ("low", "odds", "λ/(1 − λ)", "BP's δ"),
        "fixed prediction": ("fixed", "time", "time", "BP's δ"),
        "first update": ("first", "early", "time from the feedforward pass", "BP's δ"),
        "input free": ("free", "free_time", "time", "TP's targets"),
        "high precision ratio": ("high", "ratio", "ratio ρ, $Π_l = ρ^l$", "TP's targets"),
    }[name]
    values = data[key]
    lowest = 0 if name == "input free" else 1
    for column, layer in enumerate(range(lowest, lowest + values.shape[1])):
        ax.plot(data[axis], values[:, column], color=f"C{layer + 2}", label=f"layer {layer}",
                ls="-" if layer < 2 else "--")  # fmt: skip
    logarithmic = axis in ("odds", "early", "ratio")
    ax.set(xscale="log" if logarithmic else "linear", yscale="log", xlabel=label,
           ylabel=f"relative distance\nto {what}")  # fmt: skip
    notes = {"fixed prediction": "fixed_gradient", "first update": "first_gradient"}
    if name in notes:
        apart = float(data[notes[name]])
        ax.set_title(f"weight gradient within {apart:.0e} of BP's", fontsize=9)
    ax.legend(fontsize=8)


EXPERIMENT = Experiment("figure6", "6", {"paper": Config()}, {}, run, check, plot)
