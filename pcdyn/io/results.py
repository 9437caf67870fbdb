"""Files of results: one attribute says what a file holds, and `load` returns the same kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from numpy.typing import DTypeLike

from pcdyn.analysis.comparison.table import Comparison
from pcdyn.analysis.time_scales import Stability
from pcdyn.equilibria.equilibrium import Equilibrium
from pcdyn.errors import DataError, InputError
from pcdyn.io import equilibria, trajectories
from pcdyn.io.analyses import (
    comparison_from_xarray,
    real_valued,
    stability_from_xarray,
)
from pcdyn.io.netcdf import check_dataset, read_dataset, write_dataset
from pcdyn.io.problems import problem_from_xarray, problem_to_xarray
from pcdyn.model.problem import InferenceProblem, check_inference
from pcdyn.simulation.trajectory import Trajectory

if TYPE_CHECKING:
    import xarray

HOLDS = "holds"
"""The attribute of a file that names the class of what it holds."""

_Loaded = Trajectory | Equilibrium | InferenceProblem | Comparison | Stability
_READERS: dict[str, Callable[[xarray.Dataset], _Loaded]] = {
    Trajectory.__name__: trajectories.from_xarray,
    Equilibrium.__name__: equilibria.from_xarray,
    InferenceProblem.__name__: problem_from_xarray,
    Comparison.__name__: comparison_from_xarray,
    Stability.__name__: stability_from_xarray,
}


@runtime_checkable
class _Labelled(Protocol):
    def to_xarray(self) -> xarray.Dataset: ...


def save(thing: InferenceProblem | _Labelled, path: str | os.PathLike[str]) -> None:
    """Write a result, or a problem, to a NetCDF file, whole or not at all.

    `pcdyn.load` makes it again from the file if it is a `Trajectory`, an `Equilibrium` (with its
    problem), a `Comparison`, a `Stability` or an `InferenceProblem`. Any other that has
    `to_xarray`, such as a `learning.Training`, is written for `xarray.open_dataset` to read.

    Of a symbolic link the target is written, and the mode of an earlier file is kept.

    **Raises:**

    - `DataError`, and leaves the earlier file as it was, if the folder does not exist, the disk is
      full or the file cannot be written for another reason.
    - `InputError` for what has no file format, and what the conversion of the thing raises.
    """
    write_dataset(file_of(thing), path)


def load(path: str | os.PathLike[str]) -> _Loaded:
    """Read what `pcdyn.save`, `Trajectory.to_netcdf` or a command of pcdyn wrote, as that kind.

    Arrays are NumPy's and of the precision in the file, those of a problem as
    `pcdyn.load_problem` says. Every array is as it was, to the bit; dense output and
    `Trajectory.round_off` are not in files.

    **Raises:**

    - `DataError` if the file is missing, truncated, corrupt or of another program (one flipped bit
      is found by the digest at its end), and for a result that cannot be made again from a file.
    """
    dataset = read_dataset(path)
    holds = str(dataset.attrs.get(HOLDS, _kind_of_old_file(dataset)))
    if holds not in _READERS:
        raise DataError(
            f"{path} holds a {holds:.40}, which cannot be made again from a file: read its arrays "
            "with xarray.open_dataset"
        )
    try:
        return _READERS[holds](dataset)
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def save_problem(problem: InferenceProblem, path: str | os.PathLike[str]) -> None:
    """Write a problem to a NetCDF file, whole or not at all, as `save` does.

    **Raises:**

    - What `problem_to_xarray` raises.
    - `DataError`, with an earlier file as it was, if the file cannot be written.
    """
    check_inference(problem)
    save(problem, path)


def load_problem(
    path: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> InferenceProblem:
    """Read the problem in a file of `save_problem` or of a command of pcdyn.

    Numbers keep their dtype, unless another is given to round them to.

    **Raises:**

    - `DataError` if the file is missing, truncated, corrupt, without a network, or if it holds
      float64 numbers while float64 is off in JAX and float32 would round them.
    """
    dataset = read_dataset(path)
    try:
        return problem_from_xarray(dataset, dtype=dtype)
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def file_of(thing: InferenceProblem | _Labelled) -> xarray.Dataset:
    """Convert a result or a problem to the data set that a file of it holds, with its kind."""
    if isinstance(thing, InferenceProblem):
        dataset = problem_to_xarray(thing)
    elif isinstance(thing, Equilibrium):
        dataset = equilibria.with_its_problem(thing)
    elif isinstance(thing, _Labelled) and not isinstance(thing, type):
        dataset = thing.to_xarray()
        check_dataset(dataset)
        dataset = real_valued(dataset)
    else:
        raise InputError(
            f"there is no file format for {type(thing).__name__}: give a result of pcdyn, such as "
            "a Trajectory, or an InferenceProblem"
        )
    return dataset.assign_attrs({HOLDS: type(thing).__name__})


def _kind_of_old_file(dataset: xarray.Dataset) -> str:
    """What a file without the attribute holds."""
    is_problem = "activations" in dataset.attrs and "time" not in dataset.dims
    return (InferenceProblem if is_problem else Trajectory).__name__
