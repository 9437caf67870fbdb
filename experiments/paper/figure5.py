"""Figure 5: PC, BP and TP as learning rules, drawn from one network and what each computes on it.

Units are coloured by their activities, errors, deltas or targets; arrows that carry them backward
are as wide as they are large.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.example import COLORS, Example, problem_of
from experiments.shared.experiment import Experiment
from experiments.shared.networks import network_of
from pcdyn._support.states import cosine
from pcdyn.plotting import schematic
from pcdyn.references.algorithms import local_gradient
from pcdyn.theory import Evidence

RULES = ("PC", "BP", "TP")


def run(config: Example) -> xarray.Dataset:
    """Activities, what is passed backward and the weight gradient of each rule."""
    problem = problem_of(config)
    network, depth = problem.network, config.depth
    rest = pcdyn.equilibrium(problem, tolerance=1e-12)
    bp, tp = pcdyn.backpropagation(problem), pcdyn.target_propagation(problem)
    local = [t - x for t, x in zip(tp.targets[1:], bp.activities[1:], strict=True)]
    rules = {
        "PC": jax.tree.map(jnp.asarray, (rest.activities, rest.prediction_errors)),
        "BP": (bp.activities, bp.deltas),
        "TP": (bp.activities, local),
    }
    gradients = np.stack([
        np.stack([layer.weight.reshape(-1) for layer in local_gradient(network, *rule).layers])
        for rule in rules.values()
    ])  # fmt: skip

    def loss(network: pcdyn.Network) -> jax.Array:
        output = network.feedforward(jnp.asarray(problem.input))[-1]
        return 0.5 * jnp.sum(problem.output_error(output) ** 2)

    by_autodiff = np.stack([np.ravel(layer.weight) for layer in jax.grad(loss)(network).layers])
    reached = [network.predict(l, tp.targets[l - 1]) - tp.targets[l] for l in range(1, depth + 1)]
    return xarray.Dataset(
        {
            "weight": (("layer", "unit", "from"), np.stack([w.weight for w in network.layers])),
            "activities": (("rule", "level", "unit"), np.stack([a for a, _ in rules.values()])),
            "credit": (("rule", "layer", "unit"), np.stack([c for _, c in rules.values()])),
            "targets": (("level", "unit"), np.stack(tp.targets)),
            "cosine": (
                ("rule", "other", "layer"), cosine(gradients[:, None], gradients[None])
            ),
            "residual": np.max(rest.residual_norms),
            "bp_difference": np.linalg.norm(gradients[1] - by_autodiff) / np.linalg.norm(
                by_autodiff
            ),
            "tp_difference": np.max(np.abs(reached)),
            "errors_balance": _balance(problem, rest),
        },
        coords={"rule": list(RULES), "other": list(RULES), "layer": range(1, depth + 1)},
        attrs={"source": "random numbers"},
    )  # fmt: skip


def _balance(problem: pcdyn.InferenceProblem, rest: pcdyn.Equilibrium) -> float:
    """The largest entry of ε_l − W_{l+1}ᵀ(f' ∘ ε_{l+1}) at rest, f' of tanh by hand."""
    gaps = []
    for index, layer in enumerate(problem.network.layers[1:], start=1):
        weight = np.asarray(layer.weight)
        slope = 1 - np.tanh(weight @ np.asarray(rest.activities[index])) ** 2
        above = weight.T @ (slope * np.asarray(rest.prediction_errors[index]))
        gaps.append(np.asarray(rest.prediction_errors[index - 1]) - above)
    return float(np.max(np.abs(gaps)))


def check(data: xarray.Dataset) -> list[Evidence]:
    """Each rule's own equation holds for what is drawn, and PC lies between the other two."""
    claims = [
        Evidence("5", text, float(data[name]), "at most", bound)
        for text, name, bound in (
            ("PC at rest, ε_l = W_{l+1}ᵀ(f' ∘ ε_{l+1})", "errors_balance", 1e-11),
            ("BP's gradient is that of the loss by automatic differentiation", "bp_difference",
             1e-12),
            ("each TP target is predicted by the one below it", "tp_difference", 1e-12),
        )
    ]  # fmt: skip
    cosines = data.cosine
    for near, far in (("BP", "TP"), ("TP", "BP")):
        # In the output layer BP and TP are the same.
        gaps = (cosines.sel(rule="PC", other=near) - cosines.sel(rule=near, other=far))[:-1]
        numbers = ", ".join(f"{c:.2f}" for c in cosines.sel(rule="PC", other=near).values)
        claims.append(
            Evidence("5", f"hidden layers: PC's weight gradient is nearer to {near}'s than {far}'s "
                     "is (smallest gain)", float(gaps.min()), "above", 0.0,
                     note=f"cosines {numbers} by layer")
        )  # fmt: skip
    return claims


LEGEND = (
    "circles: activities and targets, squares: errors; red above zero, blue below\n"
    "a heavy edge is clamped; the width of an arrow is the size of what it carries"
)
TEXTS = {
    "PC": (
        "predictive coding",
        "1  inference: all activities fall down "
        r"$F=\Sigma_l\,\frac{1}{2}\|\varepsilon_l\|^2$ until they rest",
        r"2  learning: $\Delta W_l\propto (f'\circ\varepsilon_l)\,x_{l-1}^\top$",
        r"\varepsilon",
    ),
    "BP": (
        "backpropagation",
        r"1  backward pass: $\delta_{l-1}=W_l^\top (f'\circ\delta_l)$, at the feedforward pass",
        r"2  learning: $\Delta W_l\propto (f'\circ\delta_l)\,x_{l-1}^\top$",
        r"\delta",
    ),
    "TP": (
        "target propagation",
        r"1  backward pass: $t_{l-1}=W_l^{-1}f^{-1}(t_l)$",
        r"2  learning: $\Delta W_l\propto (f'\circ(t_l-x_l))\,x_{l-1}^\top$",
        None,
    ),
}
_LOW = -2.9


def plot(data: xarray.Dataset) -> Figure:
    """One row for each rule: the network, what is passed back, and how near the others are."""
    network = network_of(jnp.asarray(data.weight.values), "tanh")
    figure, axes = plt.subplots(
        3, 2, figsize=(8.4, 10.5), width_ratios=(2.3, 1), layout="constrained"
    )
    for rule, (ax, bars) in zip(RULES, axes, strict=True):
        _draw_rule(ax, data, rule, network)
        _draw_cosines(bars, data, rule)
    figure.supxlabel(LEGEND, fontsize=9)
    return figure


def _draw_rule(ax: Axes, data: xarray.Dataset, rule: str, network: pcdyn.Network) -> None:
    upper = schematic.Layout(network.widths, layer_distance=4.6, unit_distance=0.42, radius=0.17)
    lower = dataclasses.replace(upper, origin=(0.0, _LOW))
    activities, credit = data.activities.sel(rule=rule).values, data.credit.sel(rule=rule).values
    depth, color = network.depth, COLORS[rule]
    sizes = np.linalg.norm(credit, axis=-1)
    largest = float(np.abs(data.activities).max())
    schematic.weights(ax, upper, network)
    clamped = (0, depth) if rule == "PC" else (0,)
    schematic.units(ax, upper, list(activities), largest=largest, clamped=clamped)
    below = list(data.targets.values[1:] if rule == "TP" else credit)
    schematic.units(
        ax, lower, below, layers=range(1, depth + 1), square=rule != "TP",
        clamped=(depth,) * (rule == "TP"),
        largest=largest if rule == "TP" else float(np.abs(credit).max()),
    )  # fmt: skip
    if rule == "PC":
        _draw_exchange(ax, upper, lower, sizes, color)
    else:
        passed = np.linalg.norm(below, axis=-1)
        schematic.signals(
            ax, lower, np.append(np.nan, passed[:-1]), backward=True, largest=float(passed.max()),
            color=color,
        )  # fmt: skip
        for layer in range(1, depth + 1):
            top, bottom = _gap(upper, lower, layer)
            schematic.arrow(ax, top, bottom, both_ways=rule == "TP")
    name, first, second, symbol = TEXTS[rule]
    for layer, size in enumerate(sizes, start=1):
        x, y = lower.middle(layer)
        what = f"{symbol}_{layer}" if symbol else f"t_{layer}-x_{layer}"
        ax.text(x, y - lower.half_height(layer) - 0.12, f"$\\|{what}\\|={size:.2f}$",
                ha="center", va="top", fontsize=10, color=color)  # fmt: skip
    for layer in range(depth + 1):
        x, y = upper.middle(layer)
        ax.text(x, y + upper.half_height(layer) + 0.12, f"$x_{layer}$", ha="center", fontsize=10)
    for height, text in ((2.35, first), (1.8, second)):
        ax.text(-0.5, height, text, fontsize=10)
    ax.text(-0.5, 2.95, f"{name} ({rule})", fontsize=12, weight="bold", color=color)
    schematic.frame(ax, (-0.6, 4.6 * depth + 1.0), (_LOW - 1.5, 3.4))
    ax.set_anchor("W")


def _gap(
    upper: schematic.Layout, lower: schematic.Layout, layer: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """From below the activities of a layer to above what is under them."""
    x, y = upper.middle(layer)
    top = y - upper.half_height(layer) - 0.08
    return (x, top), (x, lower.middle(layer)[1] + lower.half_height(layer) + 0.08)


def _draw_exchange(
    ax: Axes, upper: schematic.Layout, lower: schematic.Layout, sizes: np.ndarray, color: str
) -> None:
    """Errors act on the activities of their own layer and of the one below."""
    for layer, size in enumerate(sizes, start=1):
        top, bottom = _gap(upper, lower, layer)
        schematic.arrow(ax, top, bottom, both_ways=True)
        below, _ = _gap(upper, lower, layer - 1)
        points = max(5 * size / float(np.max(sizes)), schematic.THINNEST)
        start = (bottom[0] - 0.55, bottom[1] - 0.1)
        schematic.arrow(ax, start, (below[0] + 0.15, below[1]), color=color, points=points)
        # The prediction comes in where the error is.
        schematic.arrow(ax, (below[0] + 0.7, below[1]), (bottom[0] - 0.2, bottom[1]))


def _draw_cosines(ax: Axes, data: xarray.Dataset, rule: str) -> None:
    """Cosines of the weight gradient to those of the other rules, layer by layer."""
    others = [other for other in RULES if other != rule]
    layers = data.layer.values
    for shift, other in zip((-0.2, 0.2), others, strict=True):
        values = data.cosine.sel(rule=rule, other=other)
        bars = ax.bar(layers + shift, values, 0.36, color=COLORS[other], label=f"to {other}")
        ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    ax.axhline(0, color="black", lw=0.6)
    lowest = min(0.0, float(data.cosine.min()) - 0.15)
    ax.set(xticks=layers, xlabel="layer", ylim=(lowest, 1.35),
           title=f"weight gradient of {rule}:\ncosine")  # fmt: skip
    ax.legend(loc="upper center", ncols=2, fontsize=8)


EXPERIMENT = Experiment("figure5", "5", {"paper": Example()}, {}, run, check, plot)
