"""The look of every figure of pcdyn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib.style
from matplotlib.axes import Axes

STYLE_SHEET = Path(__file__).with_name("pcdyn.mplstyle")


def style() -> AbstractContextManager[None]:
    """Return a context in which Matplotlib draws in the style of pcdyn, colour-blind safe."""
    return matplotlib.style.context(STYLE_SHEET)


def new_axes() -> Axes:
    """Make axes in a figure of their own, in that style."""
    with style():
        return plt.subplots()[1]
