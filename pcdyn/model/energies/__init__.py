"""Energies of prediction errors: Gaussian, cross-entropy, and sums over units of any h."""

from pcdyn.model.energies import interpolation
from pcdyn.model.energies.energy import CrossEntropy, Energy, Gaussian
from pcdyn.model.energies.generalised import (
    CustomEnergy,
    Divisive,
    LogCosh,
    PseudoHuber,
    Separable,
    Split,
    Student,
    named_energy,
)

__all__ = [
    "CrossEntropy",
    "CustomEnergy",
    "Divisive",
    "Energy",
    "Gaussian",
    "LogCosh",
    "PseudoHuber",
    "Separable",
    "Split",
    "Student",
    "interpolation",
    "named_energy",
]
