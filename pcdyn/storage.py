"""Trajectories as labelled xarray data sets and NetCDF files.

Every array survives the round trip to the bit. Dense output (`Trajectory.interpolation`) is a
function of the solver and is not stored.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pcdyn.checks import check_instance, check_path, is_traced
from pcdyn.errors import DataError, ShapeError, Status
from pcdyn.files import write_atomically
from pcdyn.trajectory import Trajectory

# xarray and h5netcdf are imported where they are used: `import pcdyn` stays fast.
if TYPE_CHECKING:
    import xarray

TIME_UNITS = "activity time constants"

_COUNTS = {
    "vector_field_evaluations": "evaluations of the vector field",
    "jacobian_evaluations": "evaluations of its Jacobian",
    "accepted_steps": "accepted steps",
    "rejected_steps": "rejected steps",
}
_TEXTS = ("integrator", "fallback", "message")
_SECONDS = ("compile_seconds", "run_seconds")


def to_xarray(trajectory: Trajectory) -> xarray.Dataset:
    """A trajectory as a labelled data set, sharing its arrays.

    Dimensions: `time`; `sample` if there is a batch; `unit_l` of each layer l = 0 … L;
    `predicted_layer` = 1 … L; `free_layer`.

    Variables:

    - `activity_l` and `prediction_error_l`, shape `(time, [sample,] unit_l)`;
    - `energy`, shape `(time, [sample,] predicted_layer)`;
    - `vector_field_norm`, shape `(time, [sample,] free_layer)`;
    - `free_energy`, `output_loss` and `residual_energy`, shape `(time, [sample])`;
    - `status`, `end_time` and the counts of the solver, one for all or one per sample. A count
      that the integrator does not report is absent.

    How it was computed is in the attributes. Raises `ShapeError` for a trajectory of several
    networks, which `jax.vmap` makes, and for one that is being traced.
    """
    import xarray

    check_instance(trajectory, "trajectory", Trajectory, "a pcdyn.Trajectory")
    if trajectory.network is not None or trajectory.precisions is not None:
        moving = "precisions" if trajectory.network is None else "weights"
        raise ShapeError(
            f"{moving} move in this trajectory, for which there is no file format: keep its "
            f"activities and its {moving}, for "
            "example with numpy.savez"
        )
    if is_traced(trajectory.times, trajectory.energies) or np.ndim(trajectory.times) != 1:
        raise ShapeError(
            "this trajectory is of several networks, or inside of a JAX transformation: take one "
            "network first, such as jax.tree.map(lambda x: x[0], trajectory)"
        )
    samples = ("sample",) if np.ndim(trajectory.energies) == 3 else ()
    in_time = ("time", *samples)

    def saved(values: Any, last: tuple[str, ...], name: str, units: str = "1") -> Any:
        attributes = {"long_name": name, "units": units}
        return xarray.Variable((*in_time, *last), np.asarray(values), attributes)

    def once(values: Any, **attributes: Any) -> Any:
        array = np.asarray(values)
        return xarray.Variable(samples if array.ndim else (), array, attributes)

    variables = {
        **{
            f"activity_{index}": saved(values, (f"unit_{index}",), f"activity of layer {index}")
            for index, values in enumerate(trajectory.activities)
        },
        **{
            f"prediction_error_{index}": saved(
                values, (f"unit_{index}",), f"prediction error of layer {index}"
            )
            for index, values in enumerate(trajectory.prediction_errors, start=1)
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
    for name, meaning in _COUNTS.items():
        count = getattr(trajectory, name)
        if count is not None:
            variables[name] = once(count, long_name=meaning, units="1")
    coordinates = {
        "time": (
            "time",
            np.asarray(trajectory.times),
            {"long_name": "time", "units": TIME_UNITS},
        ),
        "predicted_layer": np.arange(1, len(trajectory.activities)),
        "free_layer": np.array(trajectory.free_layers, dtype=int),
    }
    attributes = {
        **{name: getattr(trajectory, name) for name in _TEXTS},
        **{name: float(getattr(trajectory, name)) for name in _SECONDS},
        "free_layers": list(trajectory.free_layers),
        "pcdyn_version": _version(),
    }
    return xarray.Dataset(variables, coordinates, attributes)


def from_xarray(dataset: xarray.Dataset) -> Trajectory:
    """The trajectory of a data set that `to_xarray` made, with NumPy arrays.

    Raises `DataError` if the data set lacks a part of a trajectory.
    """
    check_dataset(dataset)
    # Indexing the data set itself would make up a coordinate that is missing.
    variables = dataset.variables
    layers = sum(str(name).startswith("activity_") for name in variables)
    try:
        return Trajectory(
            times=variables["time"].values,
            activities=tuple(variables[f"activity_{l}"].values for l in range(layers)),
            prediction_errors=tuple(
                variables[f"prediction_error_{l}"].values for l in range(1, layers)
            ),
            energies=variables["energy"].values,
            vector_field_norms=variables["vector_field_norm"].values,
            status_codes=variables["status"].values,
            end_time=variables["end_time"].values,
            **{name: variables[name].values if name in variables else None for name in _COUNTS},
            **{name: float(dataset.attrs[name]) for name in _SECONDS},
            **cast(Any, {name: str(dataset.attrs[name]) for name in _TEXTS}),
            # The coordinate, for NetCDF keeps no attribute of length 0 or 1 as a list.
            free_layers=tuple(int(index) for index in variables["free_layer"].values),
        )
    except KeyError as error:
        raise DataError(
            f"the data set is not a trajectory of pcdyn: it lacks {error.args[0]!r}; make it with "
            "Trajectory.to_xarray or Trajectory.to_netcdf"
        ) from error


def check_dataset(dataset: Any) -> None:
    """Raise `DataError` for what is no data set of xarray."""
    import xarray

    check_instance(dataset, "dataset", xarray.Dataset, "an xarray.Dataset", error=DataError)


def save(trajectory: Trajectory, path: str | os.PathLike[str]) -> None:
    """Write a trajectory to a NetCDF file, at once or not at all.

    A file of that name is replaced only once the new one is complete and on the disk. Raises
    `DataError` if the folder does not exist, `ShapeError` as `to_xarray`, and `OSError` if the
    file cannot be written.
    """
    write_dataset(to_xarray(trajectory), path)


def write_dataset(dataset: xarray.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a data set to a NetCDF file, every bit of it, at once or not at all.

    Raises `DataError` if the folder does not exist and `OSError` if the file cannot be written.
    """
    check_dataset(dataset)
    check_path(path, "path", error=DataError)
    # xarray would mark NaN as missing, and then replace each NaN by its own.
    exact = {str(name): {"_FillValue": None} for name in dataset.variables}
    write_atomically(
        Path(path),
        lambda partial: dataset.to_netcdf(partial, engine="h5netcdf", encoding=exact),
    )


def load(path: str | os.PathLike[str]) -> Trajectory:
    """Read a trajectory that `save` or `Trajectory.to_netcdf` wrote.

    Raises `DataError` if the file is missing, truncated, corrupt or not a trajectory.
    """
    dataset = read_dataset(path)
    try:
        return from_xarray(dataset)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_dataset(path: str | os.PathLike[str]) -> xarray.Dataset:
    """Read a NetCDF file into memory, every number as it was written.

    Raises `DataError` if the file is missing, truncated or corrupt.
    """
    import xarray

    check_path(path, "path", error=DataError)
    source = Path(path)
    if not source.is_file():
        raise DataError(
            f"there is no file {source}: check the path, or write it with Trajectory.to_netcdf"
        )
    try:
        with xarray.open_dataset(
            source, engine="h5netcdf", decode_times=False, mask_and_scale=False
        ) as dataset:
            return dataset.load()
    # Which exception a damaged file raises depends on where the damage is.
    except Exception as error:
        raise DataError(
            f"{source} cannot be read as NetCDF ({error}): it is truncated, corrupt or another "
            "kind of file; copy it again, or write it again with pcdyn"
        ) from error


def _version() -> str:
    # pcdyn itself imports this module.
    import pcdyn

    return pcdyn.__version__
