"""Equilibria as labelled data sets, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import check_instance
from pcdyn._support.types import Values
from pcdyn.equilibria.equilibrium import Equilibrium
from pcdyn.errors import EquilibriumStatus, ShapeError
from pcdyn.integrators.run import on_host
from pcdyn.io.netcdf import attribute, checked_codes, named_values, number
from pcdyn.io.nodes import described_nodes
from pcdyn.io.problems import problem_from_xarray, with_problem
from pcdyn.io.stacks import NETWORK, stacked_dataset, unstacked_result
from pcdyn.model.clamps import PartlyClamped
from pcdyn.model.problem import InferenceProblem

if TYPE_CHECKING:
    import xarray


def to_xarray(equilibrium: Equilibrium) -> xarray.Dataset:
    """Convert an equilibrium on the host to a labelled data set.

    Variables: `activity_l` and `prediction_error_l`, shape `([sample,] unit_l)`; `energy`, shape
    `([sample,] predicted_layer)`; `residual_norm`, shape `([sample,] free_layer)`; `free_energy`,
    `status`, `iterations` and `passes`, per sample. How it was computed is in the attributes.

    Those of several networks have the dimension `network` first, and the seconds as variables.
    Raises `ShapeError` for an equilibrium that is being traced.
    """
    import xarray

    check_instance(equilibrium, "equilibrium", Equilibrium, "a pcdyn.Equilibrium")
    if is_traced(equilibrium.energies):
        raise ShapeError("this equilibrium is inside of a JAX transformation: return it from there")
    if equilibrium.networks is not None:
        return stacked_dataset(equilibrium, to_xarray)
    sample = ("sample",) if np.ndim(equilibrium.energies) == 2 else ()
    variables: dict[str, Any] = {}

    def put(
        name: str, values: ArrayLike, last: Sequence[str], meaning: str, **attributes: object
    ) -> None:
        named = {"long_name": meaning, **attributes}
        variables[name] = ((*sample, *last), np.asarray(values), named)

    for l, values in enumerate(equilibrium.activities):
        put(f"activity_{l}", values, (f"unit_{l}",), f"activity of layer {l}")
    problem = equilibrium.problem
    predicted, targets = problem.predicted_layers, problem.targets
    for k, l, values in zip(predicted, targets, equilibrium.prediction_errors, strict=True):
        put(f"prediction_error_{k}", values, (f"unit_{l}",), f"prediction error of layer {l}")
    put("energy", equilibrium.energies, ("predicted_layer",), "energy of a layer")
    put("free_energy", equilibrium.free_energy, (), "free energy")
    meaning = "norm of the gradient of the free energy in a layer"
    put("residual_norm", equilibrium.residual_norms, ("free_layer",), meaning)
    put("tolerance", equilibrium.tolerance, ("free_layer",), "what that norm was to be")
    for l, values in zip(problem.free_layers, equilibrium.start, strict=True):
        put(f"start_{l}", values, (_unit(problem, l),), f"where the search began in layer {l}")
    for k, l, values in zip(predicted, targets, equilibrium.at_kink, strict=True):
        put(f"at_kink_{k}", values, (f"unit_{l}",), f"whether a unit of layer {l} is at a kink")
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
        "predicted_layer": np.array(predicted, dtype=int),
        "free_layer": np.array(equilibrium.problem.free_layers, dtype=int),
    }
    attributes = {
        "method": equilibrium.method,
        "message": equilibrium.message,
        "compile_seconds": float(equilibrium.compile_seconds),
        "run_seconds": float(equilibrium.run_seconds),
        **described_nodes(equilibrium.activities, targets),
    }
    if equilibrium.given_tolerance is not None:
        attributes["given_tolerance"] = equilibrium.given_tolerance
    return xarray.Dataset(variables, coordinates, attributes)


def _unit(problem: InferenceProblem, layer: int) -> str:
    """The dimension of a layer of a state."""
    is_partial = isinstance(problem.clamp[layer], PartlyClamped)
    return f"free_unit_{layer}" if is_partial else f"unit_{layer}"


def with_its_problem(equilibrium: Equilibrium) -> xarray.Dataset:
    """Convert an equilibrium to a data set with the problem that it is of, as files hold it."""
    if equilibrium.networks is not None:
        return stacked_dataset(equilibrium, with_its_problem)
    return with_problem(to_xarray(equilibrium), equilibrium.problem)


def from_xarray(dataset: xarray.Dataset) -> Equilibrium:
    """Make the equilibrium of a data set that holds its problem as well, with NumPy arrays.

    `with_its_problem` makes the data set. Raises `DataError` if it lacks a part of an equilibrium,
    and what `problem_from_xarray` raises.
    """
    if NETWORK in dataset.dims:
        return unstacked_result(dataset, from_xarray)
    problem = on_host(problem_from_xarray(dataset))
    sample = "present" if "sample" in dataset.sizes else "absent"

    def values(name: str, *last: str, kind: str = "real numbers") -> Values:
        return named_values(dataset, name, *last, kind=kind, sample=sample)

    layers, predicted = range(len(problem.widths)), problem.predicted_layers
    each = list(zip(predicted, problem.targets, strict=True))
    given = "given_tolerance" in dataset.attrs
    return Equilibrium(
        problem=problem,
        start=tuple(values(f"start_{l}", _unit(problem, l)) for l in problem.free_layers),
        activities=problem.graph.named([values(f"activity_{l}", f"unit_{l}") for l in layers]),
        prediction_errors=tuple(values(f"prediction_error_{k}", f"unit_{l}") for k, l in each),
        energies=values("energy", "predicted_layer"),
        residual_norms=values("residual_norm", "free_layer"),
        tolerance=values("tolerance", "free_layer"),
        status_codes=checked_codes(values("status", kind="integers"), EquilibriumStatus),
        at_kink=tuple(values(f"at_kink_{k}", f"unit_{l}", kind="booleans") for k, l in each),
        iterations=values("iterations", kind="integers"),
        passes=values("passes", kind="integers"),
        compile_seconds=number(dataset, "compile_seconds"),
        run_seconds=number(dataset, "run_seconds"),
        given_tolerance=number(dataset, "given_tolerance") if given else None,
        method=str(attribute(dataset, "method")),
        message=str(attribute(dataset, "message")),
    )
