"""Data: arrays from `.npy`, `.npz` and NetCDF files, and how many samples there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pcdyn._support.arrays import check_size
from pcdyn._support.checks import checked_integer
from pcdyn._support.files import read_numpy
from pcdyn.errors import DataError, InputError
from pcdyn.io.netcdf import read_dataset

_SUFFIXES = (".npy", ".npz", ".nc")


def load_array(source: str, name: str, folder: Path) -> np.ndarray:
    """Load the array `FILE` or `FILE:NAME`; of several arrays `name` if no NAME is given.

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
    if file.suffix == ".npy":
        if chosen:
            raise DataError(f"{file} holds one array without a name: leave {chosen!r} out")
        return _only(read_numpy(file), file)
    arrays = read_numpy(file) if file.suffix == ".npz" else _read_netcdf(file)
    wanted = chosen or name
    if not chosen and name not in arrays and len(arrays) == 1:
        return _only(arrays, file)
    if wanted not in arrays:
        raise DataError(
            f"{file} has no array {wanted!r}, but {', '.join(arrays)}; "
            f"choose one as {path}:{next(iter(arrays), 'NAME')}"
        )
    return arrays[wanted]


def sample_shape(
    batch: int | None, given: Sequence[tuple[int, ...]], *, bytes_each: int
) -> tuple[int, ...]:
    """The shape that random data have before their units: that of data `given`, or of a batch.

    Raises `InputError` for a batch that contradicts the data or is no number of samples, and
    `SizeError` for one of which the samples, of so many bytes each, do not fit into memory.
    """
    if batch is not None:
        checked_integer(batch, "--batch", at_least=1, at_most=2**31 - 1)
        check_size(bytes_each * batch, f"a batch of {batch} samples")
        if given and given[0] != (batch,):
            raise InputError(
                f"a batch of {batch} contradicts data of shape {(*given[0], '…')}: leave --batch "
                "out"
            )
    return given[0] if given else () if batch is None else (batch,)


def _read_netcdf(file: Path) -> dict[str, np.ndarray]:
    dataset = read_dataset(file).transpose("sample", ..., missing_dims="ignore")
    return {str(key): value.values for key, value in dataset.data_vars.items()}


def _only(arrays: dict[str, np.ndarray], file: Path) -> np.ndarray:
    if len(arrays) != 1:
        raise DataError(f"{file} holds {len(arrays)} arrays: is it a file .npz?")
    return next(iter(arrays.values()))
