"""Where results go: names, no file replaced unasked, none half written."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcdyn._support import interrupts
from pcdyn._support.files import check_writable, write_all
from pcdyn.cli.options import OutputOptions
from pcdyn.errors import DataError
from pcdyn.io.netcdf import netcdf_bytes

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray

_PICTURES = (".png", ".pdf", ".svg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a command found: text for people, a record for `--json`, and what it can write.

    `failure` says why the exit code is 1 although there are results.
    """

    summary: str
    record: dict[str, Any]
    dataset: Callable[[], xarray.Dataset]
    draw: Callable[[], matplotlib.figure.Figure]
    table: Callable[[], str] | None = None
    failure: str | None = None


def targets(options: OutputOptions, command: str) -> tuple[Path, ...]:
    """Find the files that the command is to write.

    Raises `DataError`, before anything runs, for a file that exists, a folder that does not and a
    kind of file that the command does not write.
    """
    has_table = command == "compare"
    tables = (".csv",) if has_table else ()
    files = []
    if options.out is not None:
        if options.out.exists() and not options.out.is_dir():
            raise DataError(f"{options.out} is not a folder: give another --out")
        files += [options.out / f"{command}{suffix}" for suffix in (".nc", ".png", *tables)]
        existing = next(each for each in (options.out, *options.out.parents) if each.is_dir())
        check_writable(existing / "any")
    named = (("--data", options.data, (".nc", *tables)), ("--picture", options.picture, _PICTURES))
    for flag, file, suffixes in named:
        if file is None:
            continue
        if file.suffix not in suffixes:
            raise DataError(f"{flag} writes {' or '.join(suffixes)}, not {file}")
        check_writable(file)
        files.append(file)
    for file in files:
        if file.exists() and not options.overwrite:
            raise DataError(f"{file} exists: give another name, or --overwrite to replace it")
    return tuple(files)


def contents(result: Result, files: tuple[Path, ...]) -> dict[Path, bytes]:
    """Make the bytes of each output file of a result."""
    return {file: _content(result, file) for file in files}


def _content(result: Result, file: Path) -> bytes:
    if file.suffix == ".nc":
        return netcdf_bytes(result.dataset())
    if file.suffix == ".csv" and result.table is not None:
        return result.table().encode()
    memory = io.BytesIO()
    result.draw().savefig(memory, format=file.suffix[1:])
    return memory.getvalue()


def write(ready: dict[Path, bytes], options: OutputOptions) -> None:
    """Write all files or none; the folder of `--out` is made if it does not exist."""
    out = options.out
    missing = [] if out is None else [each for each in (out, *out.parents) if not each.exists()]
    with interrupts.completed():
        for folder in reversed(missing):
            folder.mkdir()
        try:
            write_all(ready, replace=options.overwrite)
        except BaseException:
            for folder in missing:
                folder.rmdir()
            raise
