"""Energies and precisions as options and TOML files give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcdyn.errors import InputError
from pcdyn.model.energies.energy import Energy
from pcdyn.model.energies.generalised import named_energy


def energy_of(text: str, precision: np.ndarray | list[np.ndarray] | None) -> Energy:
    """Build the energy of `"name"` or `"name:parameter"`; raises `InputError`."""
    name, colon, number = text.partition(":")
    try:
        parameter = float(number) if colon else None
    except ValueError as error:
        raise InputError(
            f"the parameter of the energy {text!r} is not a number: give one as in {name}:0.5"
        ) from error
    return named_energy(name, precision=precision, parameter=parameter)


def precisions(given: float | int | Sequence[object]) -> np.ndarray | list[np.ndarray]:
    """One precision for all predictions, or a list of one for each; raises `InputError`."""
    if isinstance(given, int | float):
        return as_numbers(given)
    if len(given) == 1:
        return as_numbers(given[0])
    return [as_numbers(each) for each in given]


def as_numbers(precision: object) -> np.ndarray:
    """A number, a vector or a matrix as an array; raises `InputError`."""
    try:
        return np.asarray(precision, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"precision {repr(precision)[:60]} is neither a number, a vector nor a matrix"
        ) from error
