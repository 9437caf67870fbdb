"""Activations, layers, networks, energies, and the problem that they make with clamped data."""

from pcdyn.model import activations, energies

__all__ = ["activations", "energies"]
