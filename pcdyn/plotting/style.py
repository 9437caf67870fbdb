"""The look of every figure of pcdyn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib.style
from matplotlib.axes import Axes

from pcdyn._support.checks import check_instance

STYLE_SHEET = Path(__file__).with_name("pcdyn.mplstyle")


def style() -> AbstractContextManager[None]:
    """Return a context in which Matplotlib draws in the style of pcdyn, colour-blind safe."""
    return matplotlib.style.context(STYLE_SHEET)


def checked_axes(ax: Axes | None) -> Axes:
    """Return the given axes, or new ones in a figure of their own in the style of pcdyn."""
    if ax is None:
        with style():
            return plt.subplots()[1]
    check_instance(ax, "ax", Axes, "the axes of a figure of matplotlib")
    return ax
