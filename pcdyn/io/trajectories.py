"""Trajectories as labelled xarray data sets, and back.

Every array survives the round trip to the bit. Dense output (`Trajectory.interpolation`) is a
function of the solver and is not stored.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import ArrayLike

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import check_instance
from pcdyn._support.types import Values
from pcdyn.errors import DataError, ShapeError, Status
from pcdyn.integrators.statistics import COUNTS, MEASURES, Statistics
from pcdyn.io.netcdf import attribute, check_dataset, checked_codes, named_values, number
from pcdyn.io.nodes import described_nodes, named, nodes_of, prediction_numbers
from pcdyn.io.stacks import NETWORK, stacked_dataset, unstacked_result
from pcdyn.simulation.trajectory import Trajectory

# xarray and h5netcdf are imported where they are used: `import pcdyn` stays fast.
if TYPE_CHECKING:
    import xarray

TIME_UNITS = "activity time constants"


def to_xarray(trajectory: Trajectory) -> xarray.Dataset:
    """Convert a trajectory to a labelled data set that shares its arrays.

    Dimensions: `time`; `sample` if there is a batch; `unit_l` of each layer l = 0 … L;
    `predicted_layer` = 1 … L, with a prior on the input 0 … L; `free_layer`. Of a graph l are its
    nodes 0 …, `predicted_layer` the numbers 1 … K of its predictions, which `prediction_error_k`
    has too; the attribute `nodes` has the names and shapes of nodes and what each prediction is of.

    Variables:

    - `activity_l` and `prediction_error_l`, shape `(time, [sample,] unit_l)`;
    - `energy`, shape `(time, [sample,] predicted_layer)`;
    - `vector_field_norm`, shape `(time, [sample,] free_layer)`;
    - `free_energy`, `output_loss` and `residual_energy`, shape `(time, [sample])`;
    - `status`, `end_time` and the counts of the solver, one for all or one per sample. A count
      that the integrator does not report is absent;
    - `temperature` of the noise, where there was some.

    Those of several networks, which `jax.vmap` makes, have the dimension `network` first, and the
    seconds as variables. How it was computed is in the attributes. Raises `ShapeError` for a
    trajectory that is being traced.
    """
    import xarray

    check_instance(trajectory, "trajectory", Trajectory, "a pcdyn.Trajectory")
    if trajectory.moving:
        moving = " and ".join(trajectory.moving)
        raise ShapeError(
            f"besides activities this trajectory holds its {moving}, for which there is no file "
            "format: keep both, for example with numpy.savez"
        )
    if not trajectory.prediction_errors:
        raise ShapeError(
            "this trajectory has no prediction errors and no energies, which files hold: give its "
            "flow the method observe, or keep times and activities, for example with numpy.savez"
        )
    if is_traced(trajectory.times, trajectory.energies):
        raise ShapeError("this trajectory is inside of a JAX transformation: return it from there")
    if trajectory.networks is not None:
        without = dataclasses.replace(trajectory, interpolation=None)
        return stacked_dataset(without, to_xarray)
    samples = ("sample",) if np.ndim(trajectory.energies) == 3 else ()
    in_time = ("time", *samples)

    def saved(
        values: ArrayLike, last: tuple[str, ...], name: str, units: str = "1"
    ) -> xarray.Variable:
        attributes = {"long_name": name, "units": units}
        return xarray.Variable((*in_time, *last), np.asarray(values), attributes)

    predicted = prediction_numbers(trajectory.activities, trajectory.targets)

    def once(values: ArrayLike, **attributes: object) -> xarray.Variable:
        array = np.asarray(values)
        return xarray.Variable(samples if array.ndim else (), array, attributes)

    variables = {
        **{
            f"activity_{index}": saved(values, (f"unit_{index}",), f"activity of layer {index}")
            for index, values in enumerate(trajectory.activities)
        },
        **{
            f"prediction_error_{index}": saved(
                values, (f"unit_{layer}",), f"prediction error of layer {layer}"
            )
            for index, layer, values in zip(
                predicted, trajectory.targets, trajectory.prediction_errors, strict=True
            )
        },
        "energy": saved(trajectory.energies, ("predicted_layer",), "energy of a layer"),
        "vector_field_norm": saved(
            trajectory.vector_field_norms,
            ("free_layer",),
            "norm of the vector field of a layer",
            "per activity time constant",
        ),
        "free_energy": saved(trajectory.free_energy, (), "free energy"),
        "output_loss": saved(trajectory.output_loss, (), "output loss"),
        "residual_energy": saved(trajectory.residual_energy, (), "residual energy"),
        "status": once(
            trajectory.status_codes,
            long_name="how the simulation ended",
            flag_values=[int(status) for status in Status],
            flag_meanings=" ".join(status.name for status in Status),
        ),
        "end_time": once(
            trajectory.end_time, long_name="where integration ended", units=TIME_UNITS
        ),
    }
    statistics = vars(trajectory.statistics)
    for name in COUNTS:
        if statistics[name] is not None:
            variables[name] = once(statistics[name], **MEASURES[name])
    if trajectory.temperature is not None:
        variables["temperature"] = once(
            trajectory.temperature, long_name="temperature of the noise", units="of energy"
        )
    coordinates = {
        "time": (
            "time",
            np.asarray(trajectory.times),
            {"long_name": "time", "units": TIME_UNITS},
        ),
        "predicted_layer": np.array(predicted, dtype=int),
        "free_layer": np.array(trajectory.free_layers, dtype=int),
    }
    attributes = {
        "integrator": trajectory.integrator,
        "fallback": trajectory.fallback,
        "message": trajectory.message,
        "compile_seconds": float(statistics["compile_seconds"]),
        "run_seconds": float(statistics["run_seconds"]),
        "free_layers": list(trajectory.free_layers),
        "pcdyn_version": _version(),
        **described_nodes(trajectory.activities, trajectory.targets, outputs=trajectory.outputs),
    }
    return xarray.Dataset(variables, coordinates, attributes)


def from_xarray(dataset: xarray.Dataset) -> Trajectory:
    """Make the trajectory of a data set that `to_xarray` made, with NumPy arrays.

    Axes are found by their names and layers by their coordinates, so that xarray may have reordered
    them, as `xarray.concat` of runs along `"sample"` does. Raises `DataError` if the data set
    lacks a part of a trajectory, or has one that no trajectory has: other dimensions, text for
    numbers, times that do not increase, a status that does not exist.
    """
    check_dataset(dataset)
    try:
        if NETWORK in dataset.dims:
            return unstacked_result(dataset, _from_xarray)
        return _from_xarray(dataset)
    except DataError as error:
        raise DataError(
            f"the data set is not a trajectory of pcdyn: {error}; make it with "
            "Trajectory.to_xarray or Trajectory.to_netcdf"
        ) from error


def _from_xarray(dataset: xarray.Dataset) -> Trajectory:
    variables = dataset.variables
    sample = "present" if "sample" in dataset.sizes else "absent"

    def in_time(name: str, *last: str) -> Values:
        return named_values(dataset, name, "time", *last, kind="real numbers", sample=sample)

    def once(name: str, kind: str) -> Values:
        return named_values(dataset, name, kind=kind, sample="optional")

    predicted = named_values(dataset, "predicted_layer", "predicted_layer", kind="integers")
    free = named_values(dataset, "free_layer", "free_layer", kind="integers")
    nodes = nodes_of(dataset)
    if nodes is None:
        # Layer 0 is predicted where there was a prior on the input.
        first = int(0 in predicted)
        layers = len(predicted) + 1 - first
        targets = tuple(range(1 - first, layers))
        numbers = list(targets)
    else:
        layers, targets = len(nodes.names), nodes.targets
        numbers = prediction_numbers(nodes.names, targets)
    if layers < 2 or f"activity_{layers}" in variables:
        raise DataError(f"it has energies of {layers - 1} layers, but other activities")
    if sorted(predicted) != list(numbers):
        raise DataError(f"predicted_layer is {predicted} instead of {list(numbers)}")
    if len(set(free)) < len(free) or not set(free) <= set(range(layers)):
        raise DataError(f"free_layer is {free} in a network of layers 0 to {layers - 1}")
    return Trajectory(
        times=_checked_times(named_values(dataset, "time", "time", kind="real numbers")),
        activities=named(nodes, [in_time(f"activity_{l}", f"unit_{l}") for l in range(layers)]),
        prediction_errors=tuple(
            in_time(f"prediction_error_{index}", f"unit_{l}")
            for index, l in zip(numbers, targets, strict=True)
        ),
        energies=in_time("energy", "predicted_layer")[..., np.argsort(predicted)],
        vector_field_norms=in_time("vector_field_norm", "free_layer")[..., np.argsort(free)],
        status_codes=checked_codes(once("status", "integers"), Status),
        end_time=once("end_time", "real numbers"),
        statistics=Statistics(
            *(once(name, "integers") if name in variables else None for name in COUNTS),
            compile_seconds=number(dataset, "compile_seconds"),
            run_seconds=number(dataset, "run_seconds"),
        ),
        temperature=once("temperature", "real numbers") if "temperature" in variables else None,
        integrator=str(attribute(dataset, "integrator")),
        fallback=str(attribute(dataset, "fallback")),
        message=str(attribute(dataset, "message")),
        # The coordinate, for NetCDF keeps no attribute of length 0 or 1 as a list.
        free_layers=tuple(sorted(int(index) for index in free)),
        targets=targets,
        outputs=(-1,) if nodes is None else nodes.outputs,
    )


def _checked_times(times: Values) -> Values:
    if not np.isfinite(times).all() or np.any(np.diff(times) <= 0):
        raise DataError("its times are not finite and increasing, such as after sorting or concat")
    return times


def _version() -> str:
    import pcdyn

    return pcdyn.__version__
