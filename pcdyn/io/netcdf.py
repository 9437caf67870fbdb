"""NetCDF files: written from memory, checked by a digest when they are read, read by names.

Every file ends with the SHA-256 of all bytes before it, beyond what HDF5 takes for its own, so that
other programs read it as any NetCDF file, and those that change it drop the digest with the change.
A file without one, of another program, is read as it is.
"""

from __future__ import annotations

import enum
import hashlib
import io
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pcdyn._support.checks import check_instance, check_path
from pcdyn._support.files import check_unpacked, read_bytes, write_atomically
from pcdyn._support.types import Values
from pcdyn.errors import DataError, DtypeError

# xarray and h5py are imported where they are used: `import pcdyn` stays fast.
if TYPE_CHECKING:
    import h5py
    import xarray

_MARK = b"\npcdyn sha256 "
_HDF5 = b"\x89HDF\r\n\x1a\n"
_SMALL = 2**13
_KINDS = {"real numbers": "f", "integers": "iu", "booleans": "b", "texts": "OTU"}


def netcdf_bytes(dataset: xarray.Dataset, *, compressed: bool = False) -> bytes:
    """Pack a data set as the contents of a NetCDF file, bit for bit, also if `compressed`.

    Raises `DtypeError` for numbers that the format does not have, such as float16.
    """
    check_dataset(dataset)
    for name, variable in dataset.variables.items():
        kind, size = variable.dtype.kind, variable.dtype.itemsize
        if kind in "Vc" or (kind == "f" and size not in (4, 8)):
            raise DtypeError(
                f"{name} holds {variable.dtype}, but NetCDF files hold float32 and float64: "
                "convert it with .astype"
            )
    # xarray would mark NaN as missing, and then replace each NaN by its own.
    exact: dict[str, dict[str, Any]] = {str(n): {"_FillValue": None} for n in dataset.variables}
    for name, variable in dataset.variables.items():
        # HDF5 cannot compress texts; what it adds to an array takes more than a small one saves.
        if compressed and variable.nbytes > _SMALL and variable.dtype.kind in "fiub":
            exact[str(name)] |= {"zlib": True, "complevel": 9, "shuffle": True}
    # In memory, for HDF5 crashes on a full disk, or closes a wrong file without an error.
    memory = io.BytesIO()
    dataset.to_netcdf(memory, engine="h5netcdf", encoding=exact)
    content = memory.getvalue()
    return content + _MARK + hashlib.sha256(content).hexdigest().encode()


def write_dataset(
    dataset: xarray.Dataset, path: str | os.PathLike[str], *, compressed: bool = False
) -> None:
    """Write a data set to a NetCDF file, every bit of it, at once or not at all.

    Raises `DataError`, and leaves an earlier file as it was, if the file cannot be written.
    """
    check_path(path, "path", error=DataError)
    write_atomically(Path(path), netcdf_bytes(dataset, compressed=compressed))


def read_dataset(path: str | os.PathLike[str]) -> xarray.Dataset:
    """Read a NetCDF file into memory, every number as it was written.

    Raises `DataError` if the file is missing, truncated, changed by as much as one bit, another
    kind of file, or claims to hold gigabytes in megabytes.
    """
    import h5py
    import xarray

    check_path(path, "path", error=DataError)
    source = Path(path)
    content = read_bytes(source, hint="check the path, or write it with pcdyn.save")
    try:
        _check_digest(content)
        with h5py.File(io.BytesIO(content), "r") as file:
            check_unpacked(_declared(file), len(content), str(source))
        with xarray.open_dataset(
            io.BytesIO(content), engine="h5netcdf", decode_times=False, mask_and_scale=False
        ) as dataset:
            return dataset.load()
    # Which exception a damaged file raises depends on where the damage is.
    except Exception as error:
        raise DataError(
            f"{source} cannot be read as NetCDF ({error}): it is truncated, corrupt or another "
            "kind of file; copy it again, or write it again with pcdyn"
        ) from error


def named_values(
    dataset: xarray.Dataset, name: str, *dimensions: str, kind: str, sample: str = "absent"
) -> Values:
    """Read a variable as a NumPy array with its axes in the order of these names.

    **Arguments:**

    - `dimensions`: the names of the axes, whatever their order in the data set.
    - `kind`: `"real numbers"`, `"integers"`, `"booleans"` or `"texts"`.
    - `sample`: whether there is an axis `"sample"` as well, after `"time"` if that is the first and
      otherwise before all: `"absent"`, `"optional"`, or `"present"`, for which values without it
      are repeated.

    **Raises:**

    - `DataError` if the variable is missing, has other dimensions or is of another kind.
    """
    # Indexing the data set itself would make up a coordinate that is missing.
    if name not in dataset.variables:
        raise DataError(f"it lacks {name!r}")
    variable = dataset.variables[name]
    wanted = list(dimensions)
    if sample == "present" or (sample == "optional" and "sample" in variable.dims):
        wanted.insert(int(dimensions[:1] == ("time",)), "sample")
    missing = set(wanted) - set(variable.dims)
    if set(variable.dims) - set(wanted) or missing - {"sample"}:
        raise DataError(
            f"{name} has the dimensions {variable.dims} instead of {tuple(wanted)}: rename or "
            "select them"
        )
    if missing:
        variable = variable.set_dims({each: dataset.sizes[each] for each in wanted})
    values = np.asarray(variable.transpose(*wanted).values)
    if values.dtype.kind not in _KINDS[kind]:
        raise DataError(f"{name} holds {values.dtype}, but should hold {kind}")
    if kind != "texts":
        values = values.astype(values.dtype.newbyteorder("="), order="C", copy=False)
    return cast(Values, values)


def attribute(dataset: xarray.Dataset, name: str) -> object:
    """Return an attribute; raise `DataError` if it is missing."""
    if name not in dataset.attrs:
        raise DataError(f"it lacks {name!r}")
    return dataset.attrs[name]


def number(dataset: xarray.Dataset, name: str) -> float:
    """Return an attribute that is a number; raise `DataError` if it is missing or none."""
    value = attribute(dataset, name)
    try:
        return float(cast(Any, value))
    except (TypeError, ValueError) as error:
        raise DataError(f"the attribute {name} is {value!r:.40}, but should be a number") from error


def checked_codes(codes: Values, kind: type[enum.IntEnum]) -> Values:
    """Return codes of statuses; raise `DataError` for one that there is not."""
    unknown = set(codes.ravel().tolist()) - {int(status) for status in kind}
    if unknown:
        raise DataError(f"status {min(unknown)} does not exist in this version of pcdyn")
    return codes


def check_dataset(dataset: object) -> None:
    """Raise `DataError` for what is no data set of xarray."""
    import xarray

    check_instance(dataset, "dataset", xarray.Dataset, "an xarray.Dataset", error=DataError)


def _check_digest(content: bytes) -> None:
    if len(content) < 48 or not content.startswith(_HDF5):
        return
    # Where HDF5's own contents end stands in its superblock, of which there are two layouts.
    (end,) = struct.unpack_from("<Q", content, 40 if content[8] < 2 else 28)
    digest = hashlib.sha256(content[:end]).hexdigest().encode()
    if len(content) > end and content[end:] != _MARK + digest:
        raise ValueError("its bytes are not those that were written")


def _declared(file: h5py.File) -> int:
    """The bytes that all arrays of an HDF5 file take in memory."""
    import h5py

    sizes = []

    def count(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            sizes.append(int(item.size or 0) * item.dtype.itemsize)

    file.visititems(count)
    return sum(sizes)
