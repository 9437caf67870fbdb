"""Equilibria as labelled data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pcdyn._support.checks import check_instance, is_traced
from pcdyn.equilibria.equilibrium import Equilibrium
from pcdyn.errors import EquilibriumStatus, ShapeError

if TYPE_CHECKING:
    import xarray


def to_xarray(equilibrium: Equilibrium) -> xarray.Dataset:
    """An equilibrium on the host as a labelled data set.

    Variables: `activity_l` and `prediction_error_l`, shape `([sample,] unit_l)`; `energy`, shape
    `([sample,] predicted_layer)`; `residual_norm`, shape `([sample,] free_layer)`; `free_energy`,
    `status`, `iterations` and `passes`, per sample. How it was computed is in the attributes.

    Raises `ShapeError` for an equilibrium of several networks, and for one that is being traced.
    """
    import xarray

    check_instance(equilibrium, "equilibrium", Equilibrium, "a pcdyn.Equilibrium")
    if is_traced(equilibrium.energies) or np.ndim(equilibrium.energies) > 2:
        raise ShapeError(
            "this equilibrium is of several networks, or inside of a JAX transformation: take one "
            "network first, such as jax.tree.map(lambda x: x[0], equilibrium)"
        )
    sample = ("sample",) if np.ndim(equilibrium.energies) == 2 else ()
    variables: dict[str, Any] = {}

    def put(name: str, values: Any, last: Sequence[str], meaning: str, **attributes: Any) -> None:
        named = {"long_name": meaning, **attributes}
        variables[name] = ((*sample, *last), np.asarray(values), named)

    for l, values in enumerate(equilibrium.activities):
        put(f"activity_{l}", values, (f"unit_{l}",), f"activity of layer {l}")
    for l, values in enumerate(equilibrium.prediction_errors, start=1):
        put(f"prediction_error_{l}", values, (f"unit_{l}",), f"prediction error of layer {l}")
    put("energy", equilibrium.energies, ("predicted_layer",), "energy of a layer")
    put("free_energy", equilibrium.free_energy, (), "free energy")
    put(
        "residual_norm",
        equilibrium.residual_norms,
        ("free_layer",),
        "norm of the gradient of the free energy in a layer",
    )
    put(
        "status",
        equilibrium.status_codes,
        (),
        "how the search ended",
        flag_values=[int(status) for status in EquilibriumStatus],
        flag_meanings=" ".join(status.name for status in EquilibriumStatus),
    )
    put("iterations", equilibrium.iterations, (), "iterations of the last solver")
    put("passes", equilibrium.passes, (), "passes through the network")
    coordinates = {
        "predicted_layer": np.arange(1, len(equilibrium.activities)),
        "free_layer": np.array(equilibrium.problem.free_layers, dtype=int),
    }
    attributes = {
        "method": equilibrium.method,
        "message": equilibrium.message,
        "tolerance": float(np.max(equilibrium.tolerance)),
        "compile_seconds": float(equilibrium.compile_seconds),
        "run_seconds": float(equilibrium.run_seconds),
    }
    return xarray.Dataset(variables, coordinates, attributes)
