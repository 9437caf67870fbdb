"""Axes in, artists out: the verdicts on the claims of each statement."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pcdyn.theory.evidence import Evidence

_LOOKS = {
    "holds": ("o", "#0072B2"),
    "does not hold (finding)": ("X", "#D55E00"),
    "FAILS": ("X", "black"),
    "holds (UNEXPECTED)": ("o", "black"),
}


def verdicts(evidence: Sequence[Evidence], *, ax: Axes) -> list[Line2D]:
    """Draw a row for each statement with a mark for each of its claims, those that hold first."""
    numbers = list(dict.fromkeys(e.statement for e in evidence))
    lines: list[Line2D] = []
    for verdict, (marker, color) in _LOOKS.items():
        points = [
            (column, row)
            for row, number in enumerate(numbers)
            for column, e in enumerate(_ordered(evidence, number), start=1)
            if e.verdict == verdict
        ]
        if points:
            lines += ax.plot(*zip(*points, strict=True), marker, color=color, label=verdict)
    ax.set(xlabel="claims", ylim=(len(numbers) - 0.4, -0.6))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yticks(range(len(numbers)), numbers)
    ax.grid(axis="y", linewidth=0.4)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, handletextpad=0.1, columnspacing=1)
    return lines


def _ordered(evidence: Sequence[Evidence], number: str) -> list[Evidence]:
    own = [e for e in evidence if e.statement == number]
    return sorted(own, key=lambda e: list(_LOOKS).index(e.verdict))
