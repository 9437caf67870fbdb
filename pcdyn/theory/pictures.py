"""Axes in, artists out: verdicts by statement, and the curves behind the orders."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from pcdyn.theory.evidence import Evidence

_LEAST, _MOST = 1e-10, 1e10
_COLOURS = {
    "holds": "#0072B2",
    "does not hold (finding)": "#D55E00",
    "FAILS": "black",
    "holds (UNEXPECTED)": "black",
}


def margins(evidence: Sequence[Evidence], *, ax: Axes) -> list[Artist]:
    """Draw how far each number is from what is expected, over its tolerance; it holds left of 1.

    Triangles at the ends stand for distances outside 1e-10 … 1e10; so does the left one for numbers
    that are less than "at most", or more than "at least", asks for.
    """
    numbers = list(dict.fromkeys(e.statement for e in evidence))
    artists: list[Artist] = [ax.axvline(1, color="grey", linewidth=1)]
    labels: dict[tuple[str, str], str] = {}
    for e in evidence:
        distance = _distance(e)
        shown = float(np.clip(distance, _LEAST, _MOST))
        marker = "o" if e.holds else "x"
        labels[marker, _COLOURS[e.verdict]] = e.verdict
        if distance != shown:
            marker = "<" if shown == _LEAST else ">"
            labels[marker, "grey"] = "below $10^{-10}$" if marker == "<" else "above $10^{10}$"
        artists += ax.plot(
            shown, numbers.index(e.statement), marker, markersize=5, color=_COLOURS[e.verdict],
            alpha=0.8,
        )  # fmt: skip
    for (marker, colour), label in labels.items():
        # Drawn apart, so that no label shows the triangle of the first marker that it has.
        ax.plot([], [], marker, markersize=5, color=colour, alpha=0.8, label=label)
    ax.set(xscale="log", xlim=(_LEAST / 3, _MOST * 3), ylim=(len(numbers) - 0.4, -0.6),
           xlabel="distance from the expected value / tolerance")  # fmt: skip
    ax.set_yticks(range(len(numbers)), numbers)
    ax.grid(axis="y", linewidth=0.4)
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, handletextpad=0.2,
        columnspacing=1,
    )  # fmt: skip
    return artists


def _distance(e: Evidence) -> float:
    """Over the tolerance; zero or less where `at most` or `at least` is met without it."""
    excess = e.measured - e.expected
    sign = -1 if e.relation in ("at least", "above") else 1
    distance = abs(excess) if e.relation == "equal" else sign * excess
    scale = e.tolerance if e.tolerance > 0 else 1e-12
    return float(distance / scale) if np.isfinite(distance) else np.inf


def orders(evidence: Sequence[Evidence], *, ax: Axes) -> list[Artist]:
    """Draw the errors of limits of order 1 against their small number, with the slopes."""
    artists: list[Artist] = []
    curves = [
        e for e in evidence
        if e.expected == 1 and "errors" in e.settings and max(e.settings["sizes"]) < 1
    ]  # fmt: skip
    for place, e in enumerate(curves):
        text = f"{e.statement}: {e.claim.removesuffix(' (order)')}  [{e.measured:.2f}]"
        artists += ax.plot(
            e.settings["sizes"], e.settings["errors"], "os^vDP"[place % 6] + "-", markersize=4,
            linewidth=1, color=f"C{place % 10}",
            label=textwrap.fill(text, 92, subsequent_indent="    "),
        )  # fmt: skip
    lowest = min((min(e.settings["errors"]) for e in curves), default=1.0)
    # Room for the legend below the curves, half of the height.
    ax.set(xscale="log", yscale="log", ylim=(lowest**2, 1), ylabel="error",
           xlabel="small number of the limit: λ, 1 − λ, 1/ρ, ε or t")  # fmt: skip
    if curves:
        ax.legend(loc="lower left", fontsize=6.5, frameon=False)
    return artists
