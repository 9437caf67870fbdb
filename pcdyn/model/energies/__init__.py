"""Energies of prediction errors, one per prediction: Gaussian, cross-entropy, sums of any h."""

from pcdyn.model.energies import interpolation
from pcdyn.model.energies.energy import CrossEntropy, Energy, Gaussian
from pcdyn.model.energies.generalised import (
    CustomEnergy,
    Divisive,
    Interaction,
    LogCosh,
    PseudoHuber,
    Separable,
    Student,
    named_energy,
)
from pcdyn.model.energies.precision import Precision

__all__ = [
    "CrossEntropy",
    "CustomEnergy",
    "Divisive",
    "Energy",
    "Gaussian",
    "Interaction",
    "LogCosh",
    "Precision",
    "PseudoHuber",
    "Separable",
    "Student",
    "interpolation",
    "named_energy",
]
