"""Files that are written at once or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcdyn.errors import DataError


def write_atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a partial file, and rename it once it is complete and on the disk.

    Raises `DataError` if the folder does not exist and what `write` raises; then nothing is left.
    """
    if not target.parent.is_dir():
        raise DataError(f"cannot write {target}: create the folder {target.parent} first")
    # In the same folder, for a file is replaced at once within a file system only.
    partial = target.parent / f".pcdyn-{uuid.uuid4().hex}.partial{target.suffix}"
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
