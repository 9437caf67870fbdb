"""Axes in, artists out; never computes."""

from pcdyn.plotting import schematic
from pcdyn.plotting.curves import (
    TIME_LABEL,
    activities,
    decay_rates,
    distance,
    energies,
    equilibrium,
    mean_band,
    work_precision,
)
from pcdyn.plotting.graph import problem
from pcdyn.plotting.portrait import phase_portrait
from pcdyn.plotting.results import (
    basin,
    convergence_order,
    equilibria,
    frequency_response,
    training,
)
from pcdyn.plotting.style import STYLE_SHEET, style

__all__ = [
    "STYLE_SHEET",
    "TIME_LABEL",
    "activities",
    "basin",
    "convergence_order",
    "decay_rates",
    "distance",
    "energies",
    "equilibria",
    "equilibrium",
    "frequency_response",
    "mean_band",
    "phase_portrait",
    "problem",
    "schematic",
    "style",
    "training",
    "work_precision",
]
