"""The path from BP to TP: λ of Eq 48 and graded precisions, over random networks.

Linear equilibria are closed forms; those of tanh networks are followed from the feedforward pass up
the path, with targets that the network can reach. BP is compared in units of the output
precision, `Π_l ε_l / Π_L` with δ_l and likewise for weight gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.beyond import _interpolation_drawing as drawing
from experiments.shared.experiment import Experiment
from experiments.shared.networks import gaussian_weights, network_of
from experiments.shared.precision_paths import (
    TOLERANCE,
    followed_path,
    largest_slope,
    precisions_of,
    with_precisions,
)
from pcdyn._support.states import cosine
from pcdyn._support.types import Activities
from pcdyn.model.energies.interpolation import graded, interpolated
from pcdyn.references.algorithms import local_gradient
from pcdyn.theory import Evidence

NAME = "BP to TP"
FAMILIES = ("lambda", "graded")
KINDS = ("linear", "tanh")
DEPTH = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5-5, weights I + N(0, std²); odds λ/(1 − λ) and ratios ρ in decades about 1."""

    networks: int = 100
    width: int = 5
    weight_std: float = 0.2
    odds_decades: float = 6.0
    ratio_decades: float = 4.0
    points: int = 49
    wide: tuple[int, ...] = (6, 5, 4, 3)
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Equilibria along both families for linear and tanh networks, and wide linear ones."""
    odds = np.logspace(-config.odds_decades, config.odds_decades, config.points)
    ratios = np.logspace(-config.ratio_decades, config.ratio_decades, config.points)
    paths = {
        "lambda": precisions_of([interpolated(x / (1 + x), DEPTH) for x in odds]),
        "graded": precisions_of([graded(x, DEPTH) for x in ratios]),
    }
    keys = jr.split(jr.key(config.seed), 3)
    weights = gaussian_weights(
        keys[0], networks=config.networks, layers=DEPTH, width=config.width,
        std=config.weight_std, identity=True,
    )  # fmt: skip
    inputs, sources = jr.normal(keys[1], (2, config.networks, config.width))
    measured = {
        (family, kind): measure(kind, path, weights, inputs, sources)
        for family, path in paths.items()
        for kind in KINDS
    }
    dims = {"residual": ("network", "point"), "exists": ("network",)}
    variables = {}
    for name in measured["lambda", "linear"]:
        values = np.stack([np.stack([measured[f, k][name] for k in KINDS]) for f in FAMILIES])
        layers = "layer" if values.shape[-1] == DEPTH else "hidden"
        own = dims.get(name, ("network", "point", layers))
        variables[name] = (("family", "kind", *own), values)
    wide = wide_networks(config, odds, keys[2])
    variables |= {name: (("network", "point"), value) for name, value in wide.items()}
    return xarray.Dataset(
        {**variables, "path": (("family", "point"), np.stack([odds, ratios]))},
        coords={"family": list(FAMILIES), "kind": list(KINDS), "layer": range(1, DEPTH + 1),
                "hidden": range(1, DEPTH)},
        attrs={"source": "random numbers", "wide": list(config.wide), "tolerance": TOLERANCE},
    )  # fmt: skip


def measure(
    kind: str, path: jax.Array, weights: jax.Array, inputs: jax.Array, sources: jax.Array
) -> dict[str, Any]:
    """Equilibria of all networks along a path, and how near they are to both ends."""
    found = _MEASURE[kind](path, weights, inputs, sources)
    return {name: np.asarray(value) for name, value in found.items()}


def _measure(kind: str) -> Callable[..., dict[str, jax.Array]]:
    def one(
        path: jax.Array, weights: jax.Array, input: jax.Array, source: jax.Array
    ) -> dict[str, Any]:
        network = network_of(weights, "identity" if kind == "linear" else "tanh")
        # What the network makes of other data can be reached.
        problem = pcdyn.InferenceProblem(
            network, input=input, output=network.feedforward(source)[-1]
        )
        rest = linear_path if kind == "linear" else followed_path
        activities, residual = rest(problem, path)
        targets = pcdyn.target_propagation(problem)
        compared = jax.vmap(lambda row, x: compare(problem, row, x, targets.values))
        return {**compared(path, activities), "residual": residual, "exists": targets.exists}

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))


_MEASURE = {kind: _measure(kind) for kind in KINDS}


def linear_path(problem: pcdyn.InferenceProblem, path: jax.Array) -> tuple[Activities, jax.Array]:
    """Closed-form activities at each point, and their residuals."""

    def at(row: jax.Array) -> tuple[Activities, jax.Array]:
        here = with_precisions(problem, row)
        activities = pcdyn.linear_equilibrium(here)
        return activities, largest_slope(here, activities)

    return jax.vmap(at)(path)


def compare(
    problem: pcdyn.InferenceProblem, row: jax.Array, activities: Activities, targets: Activities
) -> dict[str, Any]:
    """Cosines and relative distances per layer; `problem` has unit precisions."""
    network, bp = problem.network, pcdyn.backpropagation(problem)
    errors = problem.prediction_errors(activities)
    scaled = [(p / row[-1]) * e for p, e in zip(row, errors, strict=True)]
    local = [t - x for t, x in zip(targets[1:], bp.activities[1:], strict=True)]
    moved = [x - y for x, y in zip(activities[1:-1], bp.activities[1:-1], strict=True)]
    learned = weight_vectors(local_gradient(network, activities, scaled))
    by_tp = weight_vectors(local_gradient(network, bp.activities, local))
    by_bp = weight_vectors(bp.weight_gradient)
    hidden = activities[1:-1]
    return {
        "activity_cosine_feedforward": each(cosine, hidden, bp.activities[1:-1]),
        "activity_cosine_tp": each(cosine, hidden, targets[1:-1]),
        "activity_distance_feedforward": each(distances, hidden, bp.activities[1:-1]),
        "activity_distance_tp": each(distances, hidden, targets[1:-1]),
        # Where the way from the feedforward pass to the targets is 1 long.
        "way_from_feedforward": each(lengths, moved, local[:-1]),
        "way_to_tp": each(
            lengths, [x - t for x, t in zip(hidden, targets[1:-1], strict=True)], local[:-1]
        ),
        "error_cosine_bp": each(cosine, scaled, bp.deltas),
        "error_distance_bp": each(distances, scaled, bp.deltas),
        "error_cosine_tp": each(cosine, scaled, local),
        "gradient_cosine_bp": each(cosine, learned, by_bp),
        "gradient_distance_bp": each(distances, learned, by_bp),
        "gradient_cosine_tp": each(cosine, learned, by_tp),
    }


def weight_vectors(gradient: pcdyn.Network) -> list[Any]:
    """The weight gradient of each layer as a vector."""
    return [layer.weight.reshape(-1) for layer in gradient.layers]


def each(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    a: Sequence[jax.Array],
    b: Sequence[jax.Array],
) -> jax.Array:
    """A function of two vectors for every layer, stacked."""
    return jnp.stack([function(x, y) for x, y in zip(a, b, strict=True)])


def lengths(a: jax.Array, b: jax.Array) -> jax.Array:
    """‖a‖ / ‖b‖."""
    return jnp.linalg.norm(a) / jnp.linalg.norm(b)


def distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """‖a − b‖ / ‖b‖."""
    return lengths(a - b, b)


def wide_networks(config: Config, odds: np.ndarray, key: jax.Array) -> dict[str, np.ndarray]:
    """Distances of layer L − 1 to `W⁺T` and to `x_ff + W⁺(T − W x_ff)` where W is wide.

    With one hidden layer, and with two, where the inverse has to be weighted by the covariance C
    that the layers below give to x_{L−1}: `x_ff + C Wᵀ(W C Wᵀ)⁻¹ (T − W x_ff)`.
    """
    keys = jr.split(key, len(config.wide) + 1)
    pairs = zip(keys[2:], config.wide[:-1], config.wide[1:], strict=True)
    weights = [jr.normal(k, (config.networks, m, n)) / n**0.5 for k, n, m in pairs]
    inputs = jr.normal(keys[0], (config.networks, config.wide[0]))
    outputs = jr.normal(keys[1], (config.networks, config.wide[-1]))

    # An argument of the program: as constants they keep XLA folding them for minutes.
    paths = {
        depth: precisions_of([interpolated(x / (1 + x), depth) for x in odds])
        for depth in (len(weights) - 1, len(weights))
    }

    def one(
        paths: dict[int, jax.Array], input: jax.Array, output: jax.Array, *weights: jax.Array
    ) -> dict[str, Any]:
        found = {}
        for name, own in (("one", weights[1:]), ("two", weights)):
            network = pcdyn.Network([pcdyn.Dense(weight) for weight in own])
            data = input[: network.widths[0]]
            problem = pcdyn.InferenceProblem(network, input=data, output=output)
            found |= limits(problem, paths[network.depth], name)
        return found

    mapped = jax.jit(jax.vmap(one, in_axes=(None, *[0] * (2 + len(weights)))))
    values = mapped(paths, inputs, outputs, *weights)
    return {name: np.asarray(value) for name, value in values.items()}


def limits(problem: pcdyn.InferenceProblem, path: jax.Array, name: str) -> dict[str, Any]:
    """Relative distances of x_{L−1} to what it might tend to, at each point of a path."""
    *below, last = [layer.weight for layer in problem.network.layers]
    start = pcdyn.feedforward(problem)
    error = jnp.asarray(problem.output_error(start[-1]))
    covariance, push = jnp.eye(len(below[-1])), jnp.eye(len(below[-1]))
    for weight in reversed(below[1:]):
        push = push @ weight
        covariance = covariance + push @ push.T
    gain = covariance @ last.T @ jnp.linalg.inv(last @ covariance @ last.T)
    candidates = {
        "inverse": jnp.linalg.pinv(last) @ jnp.asarray(problem.output),
        "difference": start[-2] + jnp.linalg.pinv(last) @ error,
        "weighted": start[-2] + gain @ error,
    }
    rest = linear_path(problem, path)[0][-2]
    return {
        f"wide_{name}_{what}": jax.vmap(lambda x, t=target: distances(x, t))(rest)
        for what, target in candidates.items()
    }


def check(data: xarray.Dataset) -> list[Evidence]:
    """Orders at both ends, what the path ends in, and what it does not."""
    graded_, weighted = data.sel(family="graded"), data.sel(family="lambda")
    last = DEPTH - 1
    claims = [
        *_residual(data),
        *_order("λ → 0: Π_l ε_l / Π_L is BP's delta in every layer, error O(λ)",
                weighted.error_distance_bp, weighted.path, low=True),
        *_order("λ → 1: layer L − 1 is at its TP target, error O(1 − λ)",
                weighted.way_to_tp.sel(hidden=last), weighted.path),
        _end("λ → 1: the layers below L − 1 are at their TP targets",
             weighted.way_to_tp.isel(point=-1, hidden=slice(None, -1)), "the way left, over the "
             "way from the feedforward pass", 1e-2, holds=False),
        *_order("ρ → 0: Π_l ε_l / Π_L is BP's delta in every layer, error O(ρ)",
                graded_.error_distance_bp, graded_.path, low=True),
    ]  # fmt: skip
    for layer in range(1, DEPTH):
        text = f"ρ → ∞: layer {layer} is at its TP target, error O(ρ^−{layer})"
        claims += _order(text, graded_.way_to_tp.sel(hidden=layer), graded_.path, order=layer)
    gradients = 1 - graded_.gradient_cosine_tp.isel(point=-1)
    claims += [
        _end("ρ → ∞: the weight gradient of layer 1 has the direction of TP's",
             gradients.sel(layer=1), "1 − cosine", 1e-3, holds=True),
        _end("ρ → ∞: the weight gradients above layer 1 have the direction of TP's",
             gradients.sel(layer=slice(2, None)), "1 − cosine", 1e-3, holds=False),
    ]  # fmt: skip
    return claims + _towards(data) + _wide(data)


def _residual(data: xarray.Dataset) -> list[Evidence]:
    tanh = data.sel(kind="tanh")
    return [
        Evidence(NAME, "tanh: every equilibrium on the path is found (largest residual)",
                 float(tanh.residual.max()), "at most", float(data.attrs["tolerance"]),
                 note=f"in {tanh.residual.size} equilibria"),
        Evidence(NAME, "tanh: every target can be reached (share of networks)",
                 float(tanh.exists.mean()), "equal", 1.0, note=f"of {tanh.exists[0].size}"),
    ]  # fmt: skip


def _slopes(values: xarray.DataArray, path: xarray.DataArray, low: bool) -> np.ndarray:
    """d log(value) / d log(path) over a decade at one end of a path, for every network."""
    decades = np.log10(path.values)
    # At the low end of the long path one decade further in, where round-off plays no part.
    first = decades[0] + (1 if decades[0] < -5 else 0) if low else decades[-1] - 1
    i, j = (int(np.argmin(abs(decades - where))) for where in (first, first + 1))
    ends = values.isel(point=i, drop=True), values.isel(point=j, drop=True)
    return np.asarray((np.log10(ends[1]) - np.log10(ends[0])) / (decades[j] - decades[i]))


def _order(
    text: str,
    values: xarray.DataArray,
    path: xarray.DataArray,
    *,
    low: bool = False,
    order: int = 1,
) -> list[Evidence]:
    slopes = _slopes(values, path, low) * (1 if low else -1)
    medians = [float(np.median(each)) for each in slopes]
    size = float(values.isel(point=0 if low else -1).median())
    return [
        *(
            Evidence(NAME, f"{text} ({kind}: median order)", median, "equal", order, 0.02 * order,
                     note=f"median error at the end {size:.1e}")
            for kind, median in zip(KINDS, medians, strict=True)
        ),
        Evidence(
            NAME, f"{text} (share of networks and layers with this order up to a tenth)",
            float((abs(slopes - order) <= 0.1 * order).mean()), "at least", 0.95,
            note=f"orders from {slopes.min():.3f} to {slopes.max():.3f}",
        ),
    ]  # fmt: skip


def _end(text: str, values: xarray.DataArray, what: str, bound: float, *, holds: bool) -> Evidence:
    medians = ", ".join(f"{float(values.sel(kind=k).median()):.2g} ({k})" for k in KINDS)
    return Evidence(
        NAME, f"{text} ({what}: median)", float(values.median()), "at most", bound,
        expected_to_hold=holds, note=f"{medians}, at most {float(values.max()):.2g}",
    )  # fmt: skip


def _towards(data: xarray.Dataset) -> list[Evidence]:
    """Whether every step of the path leads away from the feedforward pass and nearer to TP."""
    claims = []
    for name, sign, words in (
        ("way_to_tp", -1, "nearer to its TP target"),
        ("way_from_feedforward", 1, "further from the feedforward pass"),
    ):
        back = -sign * data[name].sel(hidden=DEPTH - 1).diff("point")
        # Equilibria are known to about the tolerance of their residuals.
        claims.append(
            Evidence(NAME, f"each step up the path takes layer L − 1 {words} (largest step back)",
                     float(back.max()), "at most", 0.0, float(10 * data.attrs["tolerance"]),
                     note="up to what the residuals allow")
        )  # fmt: skip
    return claims


def _wide(data: xarray.Dataset) -> list[Evidence]:
    """What layer L − 1 tends to where W_L has fewer rows than columns."""
    decades = float(np.log10(data.path.sel(family="lambda").values[-1]))
    texts = {
        "difference": "x_ff + W⁺(T − W x_ff)",
        "inverse": "W⁺T",
        "weighted": "x_ff + CWᵀ(WCWᵀ)⁻¹(T − W x_ff)",
    }
    return [
        Evidence(
            NAME, f"wide W, {hidden} hidden layer{'s' * (hidden == 'two')}: x_{{L−1}} → "
            f"{texts[name]} (median relative distance at λ/(1 − λ) = 10^{decades:g})",
            float(data[f"wide_{hidden}_{name}"].isel(point=-1).median()), "at most", 1e-3,
            expected_to_hold=holds,
        )
        for hidden, name, holds in (
            ("one", "difference", True), ("two", "difference", False), ("two", "weighted", True),
            ("one", "inverse", False),
        )
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """For each family cosines and distances to both ends in tanh networks; layer L − 1 for wide W.

    Linear networks look alike; their numbers are in the claims.
    """
    figure, axes = plt.subplots(2, 4, figsize=(14, 6))
    for row, family, label in (
        (axes[0], "lambda", "λ/(1 − λ)"), (axes[1], "graded", "ratio ρ, $Π_l = ρ^l$"),
    ):  # fmt: skip
        here = data.sel(family=family, kind="tanh")
        drawing.cosines(row[0], here, "activity", "feedforward")
        drawing.cosines(row[1], here, "gradient", "bp")
        drawing.distances(row[2], here)
        for ax in row[:3]:
            ax.set(xscale="log", xlabel=label)
    titles = (
        "activities", f"weight gradients (layer {DEPTH}: BP's are TP's)",
        "errors to BP, activities to TP", "linear, wide W, one hidden layer",
    )  # fmt: skip
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    drawing.wide(axes[0, 3], data, "one", {
        "inverse": "$W^+T$", "difference": "$x_{ff} + W^+(T - Wx_{ff})$",
    })  # fmt: skip
    drawing.wide(axes[1, 3], data, "two", {
        "difference": "$x_{ff} + W^+(T - Wx_{ff})$", "weighted": "the same, $W^+$ weighted",
    })  # fmt: skip
    axes[1, 3].set_title("linear, wide W, two hidden layers")
    figure.suptitle("BP to TP in tanh networks; bands: 10–90 % in the highest layer of a colour")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


EXPERIMENT = Experiment(
    "interpolation", "extra: the path from BP to TP", {"paper": Config()},
    {"networks": 8, "points": 13}, run, check, plot,
)  # fmt: skip
