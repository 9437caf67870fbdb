"""Files that are written at once or not at all, and read without taking more than they hold."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from pcdyn.errors import DataError

Contents = bytes | Callable[[Path], Any]

_DAY = 24 * 3600
# Random and constant data aside, compression gains a factor of a few; deflate ends at 1032.
_LARGE, _MOST_COMPRESSED = 2**30, 20


def write_atomically(target: Path, contents: Contents, *, replace: bool = True) -> None:
    """Write bytes, or what a function writes to a path, at once or not at all.

    As `write_all` of one file.
    """
    write_all({target: contents}, replace=replace)


def write_all(files: Mapping[Path, Contents], *, replace: bool = True) -> None:
    """Write all of these files at once, or none of them.

    Each is complete in a partial file beside its target, and on the disk, before the first takes
    its name. Of a symbolic link the target is written; the mode of a file that is replaced is
    kept. What killed processes have left of theirs is removed on the way.

    HDF5 crashes, or closes without an error, where the disk is full: hand over bytes, not a
    function that lets it write.

    Raises `DataError`, with every earlier file as it was, if a folder does not exist, a disk is
    full or another reason of the system's; without `replace` also if a file exists.
    """
    staged = []
    with contextlib.ExitStack() as stack:
        for given, contents in files.items():
            with _named(given):
                target = checked_target(given)
                _sweep(target.parent)
                partial = stack.enter_context(_partial(target))
                _fill(partial, contents)
            staged.append((given, partial, target))
        new: list[Path] = []
        try:
            for given, partial, target in staged:
                with _named(given):
                    if replace:
                        os.replace(partial, target)
                    else:
                        _rename_to_new(partial, target)
                        new.append(target)
        except BaseException:
            for target in new:
                target.unlink(missing_ok=True)
            raise


def checked_target(path: Path) -> Path:
    """The file that writing to `path` replaces or makes.

    Raises `DataError` for a folder that does not exist, and where there is something that is no
    file, such as a folder or a device.
    """
    with _named(path):
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise DataError(f"cannot write {path}: create the folder {target.parent} first")
        if target.exists() and not target.is_file():
            raise DataError(f"cannot write {path}: it is not a file; give another name")
        return target


def cache_folder() -> Path:
    """The folder of what pcdyn keeps for the user: data sets and compiled programs."""
    return platformdirs.user_cache_path("pcdyn")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there; raises `DataError`."""
    with _named(path):
        path.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path) -> None:
    """Raise `DataError` unless a file could be written there now; nothing is left of the trial."""
    with _named(path), _partial(checked_target(path)):
        pass


def read_bytes(path: Path, *, hint: str = "check the path") -> bytes:
    """The contents of a file; raises `DataError` if there is none, or if it cannot be read."""
    try:
        # A device or a pipe might have no end.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{path} is not a file: {hint}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}: {hint}") from error
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(f"cannot read {path} ({_reason(error)}): {hint}") from error


def check_unpacked(size: int, packed: int, what: str) -> None:
    """Raise `DataError` for a file that claims to hold far more than it takes on the disk."""
    if size > _LARGE and size > _MOST_COMPRESSED * packed:
        raise DataError(
            f"{what} claims to hold {size / 2**30:.3g} GiB in {packed / 2**20:.3g} MiB: it is "
            "damaged, or meant to fill the memory; if it is neither, unpack it first"
        )


def read_numpy(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, or that of an `.npy` file under the name `""`.

    Raises `DataError` if the file is missing, damaged, holds Python objects, or claims to hold
    gigabytes in megabytes.
    """
    content = read_bytes(path)
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                size = sum(member.file_size for member in archive.infolist())
            check_unpacked(size, len(content), str(path))
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {str(name): loaded[name] for name in loaded.files}
    except DataError:
        raise
    # Which exception a damaged file raises depends on where the damage is.
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as NumPy arrays ({error}): it is truncated, corrupt or another "
            "kind of file"
        ) from error


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system refuses, by our name and with its reason."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or "no memory"


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, of its owner and mode, which is gone in the end."""
    # In the same folder, for a file is replaced at once within a file system only. The suffix is
    # for functions that choose a format by it.
    name = f"{_PREFIX}{_MACHINE}-{os.getpid()}-{uuid.uuid4().hex}.partial{target.suffix[:9]}"
    partial = target.parent / name
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if target.exists():
            # Before anything is in it, for the file may be private.
            _copy_rights(target, partial)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _copy_rights(source: Path, target: Path) -> None:
    if os.name == "posix":
        with contextlib.suppress(PermissionError):
            os.chown(target, source.stat().st_uid, source.stat().st_gid)
    shutil.copymode(source, target)


def _fill(partial: Path, contents: Contents) -> None:
    mode = partial.stat().st_mode
    partial.chmod(mode | 0o200)  # of a target that is read-only
    if callable(contents):
        contents(partial)
    else:
        partial.write_bytes(contents)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    partial.chmod(mode)


def _rename_to_new(partial: Path, target: Path) -> None:
    """Rename to a name that must be free."""
    try:
        os.link(partial, target)
        return
    except FileExistsError as error:
        raise DataError(f"{target} exists by now: give another name") from error
    except OSError:
        pass  # not every file system has links
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))
    except FileExistsError as error:
        raise DataError(f"{target} exists by now: give another name") from error
    os.replace(partial, target)


_PREFIX = ".pcdyn-"
# Process ids are those of one machine; the folder may belong to several.
_MACHINE = f"{zlib.crc32(os.uname().nodename.encode()):08x}" if os.name == "posix" else "other"


def _sweep(folder: Path) -> None:
    """Remove partial files of processes that are dead, or that are older than a day."""
    for path in folder.glob(f"{_PREFIX}*.partial*"):
        with contextlib.suppress(OSError, ValueError):
            machine, process, _ = path.name.removeprefix(_PREFIX).split("-", 2)
            old = time.time() - path.stat().st_mtime > _DAY
            if old or (machine == _MACHINE and os.name == "posix" and not _lives(int(process))):
                path.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
