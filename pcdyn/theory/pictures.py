"""Axes in, artists out: verdicts by statement, and the curves behind the orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pcdyn.theory.evidence import Evidence

_LEAST, _MOST = 1e-10, 1e10
_COLOURS = {
    "holds": "#0072B2",
    "does not hold (finding)": "#D55E00",
    "FAILS": "black",
    "holds (UNEXPECTED)": "black",
}


def margins(evidence: Sequence[Evidence], *, ax: Axes) -> list[Any]:
    """How far each number is from what is expected, over its tolerance; left of 1 it holds.

    Distances outside 1e-10 … 1e10 are drawn at these ends.
    """
    numbers = list(dict.fromkeys(e.statement for e in evidence))
    artists: list[Any] = [ax.axvline(1, color="grey", linewidth=1)]
    seen = set()
    for e in evidence:
        label = None if e.verdict in seen else e.verdict
        seen.add(e.verdict)
        artists += ax.plot(
            _distance(e), numbers.index(e.statement), "o" if e.holds else "x", markersize=5,
            color=_COLOURS[e.verdict], label=label, alpha=0.8,
        )  # fmt: skip
    ax.set(xscale="log", xlim=(_LEAST / 3, _MOST * 3), ylim=(len(numbers) - 0.4, -0.6),
           xlabel="distance from the expected value / tolerance")  # fmt: skip
    ax.set_yticks(range(len(numbers)), numbers)
    ax.grid(axis="y", linewidth=0.4)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.06), ncols=2, frameon=False)
    return artists


def _distance(e: Evidence) -> float:
    excess = e.measured - e.expected
    distance = {"equal": abs(excess), "at most": excess, "at least": -excess}[e.relation]
    scale = e.tolerance if e.tolerance > 0 else 1e-12
    return float(np.clip(distance / scale, _LEAST, _MOST)) if np.isfinite(distance) else _MOST


def orders(evidence: Sequence[Evidence], *, ax: Axes) -> list[Any]:
    """Errors of the limits of order 1 against their small number; measured slopes in brackets."""
    artists = []
    curves = [
        e for e in evidence
        if e.expected == 1 and "errors" in e.settings and max(e.settings["sizes"]) < 1
    ]  # fmt: skip
    for place, e in enumerate(curves):
        text = e.claim.removesuffix(" (order)")
        text = text if len(text) < 58 else f"{text[:56]}…"
        artists += ax.plot(
            e.settings["sizes"], e.settings["errors"], "os^vDP"[place % 6] + "-", markersize=4,
            linewidth=1, color=f"C{place % 10}",
            label=f"{e.statement}: {text}  [{e.measured:.2f}]",
        )  # fmt: skip
    lowest = min((min(e.settings["errors"]) for e in curves), default=1.0)
    # Room for the legend below the curves, half of the height.
    ax.set(xscale="log", yscale="log", ylim=(lowest**2, 1), ylabel="error",
           xlabel="small number of the limit: λ, 1 − λ, 1/ρ, ε or t")  # fmt: skip
    if curves:
        ax.legend(loc="lower left", fontsize=6.5, frameon=False)
    return artists
