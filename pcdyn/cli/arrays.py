"""Arrays from `.npy`, `.npz` and NetCDF files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from pcdyn.errors import DataError
from pcdyn.netcdf import read_dataset

_SUFFIXES = (".npy", ".npz", ".nc")


def load_array(source: str, name: str, folder: Path) -> np.ndarray:
    """The array `FILE` or `FILE:NAME`; in a file of several, the one called `name` unless said.

    A relative path is relative to `folder`. Raises `DataError` if the file is missing, of another
    kind, corrupt, or without that array.
    """
    # Only what follows the suffix is a name: a path may hold a colon.
    path, colon, chosen = source.rpartition(":")
    if not colon or Path(path).suffix not in _SUFFIXES:
        path, chosen = source, ""
    file = folder / path
    if file.suffix not in _SUFFIXES:
        raise DataError(
            f'{name} {source!r} is neither "random" nor "free" nor a file .npy, .npz or .nc'
        )
    if not file.is_file():
        raise DataError(f"there is no file {file} to take the {name} from: check the path")
    if file.suffix == ".npy":
        if chosen:
            raise DataError(f"{file} holds one array without a name: leave {chosen!r} out")
        return _read_numpy(file)[""]
    arrays = _read_numpy(file) if file.suffix == ".npz" else _read_netcdf(file)
    wanted = chosen or name
    if not chosen and name not in arrays and len(arrays) == 1:
        return next(iter(arrays.values()))
    if wanted not in arrays:
        raise DataError(
            f"{file} has no array {wanted!r}, but {', '.join(arrays)}; "
            f"choose one as {path}:{next(iter(arrays), 'NAME')}"
        )
    return arrays[wanted]


def _read_numpy(file: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {str(key): loaded[key] for key in loaded.files}
    # OSError, EOFError, ValueError or BadZipFile, as the damage is.
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} cannot be read as NumPy arrays: {error}") from error


def _read_netcdf(file: Path) -> dict[str, np.ndarray]:
    return {str(key): value.values for key, value in read_dataset(file).data_vars.items()}
