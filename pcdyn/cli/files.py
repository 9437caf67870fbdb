"""Where results go: names, no file replaced unasked, none half written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcdyn.cli.options import OutputOptions
from pcdyn.errors import DataError
from pcdyn.files import write_atomically
from pcdyn.storage import write_dataset

if TYPE_CHECKING:
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
    draw: Callable[[], Any]
    write_table: Callable[[Path], None] | None = None
    failure: str | None = None


def targets(options: OutputOptions, command: str) -> tuple[Path, ...]:
    """The files that the command is to write.

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
    named = (("--data", options.data, (".nc", *tables)), ("--picture", options.picture, _PICTURES))
    for flag, file, suffixes in named:
        if file is None:
            continue
        if file.suffix not in suffixes:
            raise DataError(f"{flag} writes {' or '.join(suffixes)}, not {file}")
        if not file.parent.is_dir():
            raise DataError(f"cannot write {file}: create the folder {file.parent} first")
        files.append(file)
    for file in files:
        if file.exists() and not options.overwrite:
            raise DataError(f"{file} exists: give another name, or --overwrite to replace it")
    return tuple(files)


def write(result: Result, files: tuple[Path, ...], options: OutputOptions) -> None:
    """Write each file at once or not at all; the folder of `--out` is made if it does not exist."""
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.suffix == ".nc":
            write_dataset(result.dataset(), file)
        elif file.suffix == ".csv" and result.write_table is not None:
            result.write_table(file)
        else:
            figure = result.draw()
            write_atomically(file, lambda partial, figure=figure: figure.savefig(partial))
