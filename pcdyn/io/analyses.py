"""Comparisons and stability from labelled data sets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pcdyn._support.types import Values
from pcdyn.analysis.comparison.reference_solution import Errors
from pcdyn.analysis.comparison.table import ERROR_METRICS, REPEATS, Comparison, Run
from pcdyn.analysis.time_scales import Stability
from pcdyn.errors import DataError, Status
from pcdyn.integrators.statistics import MEASURES, Statistics
from pcdyn.io.netcdf import attribute, named_values, number

if TYPE_CHECKING:
    import xarray

_ERRORS = [field.name for field in dataclasses.fields(Errors)]
_IMAGINARY = "_imaginary"


def comparison_from_xarray(dataset: xarray.Dataset) -> Comparison:
    """Make the comparison of a data set that `Comparison.to_xarray` made.

    Raises `DataError` if the data set lacks a part of one.
    """

    def column(name: str, kind: str = "real numbers") -> list[Any]:
        return named_values(dataset, name, "run", kind=kind).tolist()

    texts = {name: column(name, "texts") for name in ("integrator", "setting", "message")}
    # Files of before the repeats were kept lack them.
    repeats = [name for name in REPEATS if name in dataset]
    numbers = {name: column(name) for name in ("value", *_ERRORS, *MEASURES, *repeats)}
    below = {name: column(f"{name}_below_reference", "booleans") for name in ERROR_METRICS}
    rows = [
        Run(
            **{name: values[i] for name, values in texts.items()},
            **{name: numbers[name][i] for name in ("value", *_ERRORS, *repeats)},
            status=_status(name),
            below_reference=tuple(metric for metric in ERROR_METRICS if below[metric][i]),
            statistics=Statistics(*(numbers[measure][i] for measure in MEASURES)),
        )
        for i, name in enumerate(column("status", "texts"))
    ]
    return Comparison(
        rows=tuple(rows),
        reference=str(attribute(dataset, "reference")),
        second=str(attribute(dataset, "second")),
        reference_error=Errors(*(number(dataset, f"reference_{name}") for name in _ERRORS)),
        displacement=number(dataset, "displacement"),
        energy_loss=number(dataset, "energy_loss"),
        t1=number(dataset, "t1"),
        repeats=int(number(dataset, "repeats")),
    )


def stability_from_xarray(dataset: xarray.Dataset) -> Stability:
    """Make the stability of a data set that `Stability.to_xarray` made, with NumPy arrays.

    Raises `DataError` if the data set lacks a part of one.
    """
    if "network" in dataset.dims:
        each = [dataset.isel(network=i) for i in range(dataset.sizes["network"])]
        return jax.tree.map(lambda *x: np.stack(x), *map(stability_from_xarray, each))
    axes = ("time",) if "time" in dataset.dims else ()

    def values(name: str, *last: str, kind: str = "real numbers") -> Values:
        return named_values(dataset, name, *axes, *last, kind=kind, sample="optional")

    rates = values("rates", "rate")
    if f"rates{_IMAGINARY}" in dataset.variables:
        rates = rates + 1j * values(f"rates{_IMAGINARY}", "rate")
    free = named_values(dataset, "free_layer", "free_layer", kind="integers")
    return Stability(
        rates,
        values("slowest_mode", "free_layer"),
        values("fastest_mode", "free_layer"),
        values("at_kink", kind="booleans"),
        times=named_values(dataset, "time", "time", kind="real numbers") if axes else None,
        units=int(number(dataset, "units")),
        complete=bool(number(dataset, "complete")),
        free_layers=tuple(free.tolist()),
        at=str(attribute(dataset, "at")),
    )


def real_valued(dataset: xarray.Dataset) -> xarray.Dataset:
    """Split complex variables, which NetCDF lacks, into their real and imaginary parts."""
    complex_ones = {name: x for name, x in dataset.data_vars.items() if np.iscomplexobj(x)}
    parts = {f"{name}{_IMAGINARY}": x.imag for name, x in complex_ones.items()}
    return dataset.assign({name: x.real for name, x in complex_ones.items()} | parts)


def _status(name: str) -> Status:
    if name not in Status.__members__:
        raise DataError(f"the status {name!r:.40} does not exist in this version of pcdyn")
    return Status[name]
