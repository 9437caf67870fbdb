"""Images and labels in IDX files, unzipped and checked to the last byte."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from dataclasses import dataclass
from importlib.resources.abc import Traversable

import numpy as np
from numpy.typing import NDArray

from pcdyn.errors import DataError

CLASSES = 10
SIDE = 28
_LARGEST = 2**28  # bytes, five times the images of the largest set


@dataclass(frozen=True)
class IdxFile:
    """A file to read: its name in messages, the remedy if it is bad, its SHA-256 if known."""

    path: Traversable
    label: str
    remedy: str
    sha256: str | None = None

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.label}: {problem}; {self.remedy}")


def is_intact(file: IdxFile) -> bool:
    """Say whether a file can be read and has the SHA-256 that it should have."""
    try:
        checked_contents(file)
    except DataError:
        return False
    return True


def checked_contents(file: IdxFile) -> bytes:
    """Read the unzipped bytes of a file, checked against its SHA-256 if that is known.

    No more are unzipped than its header asks for, and one.
    """
    try:
        packed = file.path.read_bytes()
        # By the first bytes, not by the name: some servers unzip on the fly.
        is_zipped = packed[:2] == b"\x1f\x8b"
        stream = io.BytesIO(packed)
        with gzip.GzipFile(fileobj=stream) if is_zipped else stream as unzipped:
            head = unzipped.read(16)
            asked = _length(head)
            if asked > _LARGEST:
                raise file.error(
                    f"its header asks for {asked / 2**30:.3g} GiB, more than any set of images has"
                )
            data = head + unzipped.read(max(asked + 1 - len(head), 0))
    except (OSError, EOFError, zlib.error) as error:
        raise file.error(f"it cannot be read or unzipped ({error})") from error
    found = hashlib.sha256(data).hexdigest()
    if file.sha256 not in (None, found):
        raise file.error(
            f"its unzipped contents have SHA-256 {found} instead of {file.sha256}, so it is "
            "damaged or another file"
        )
    return data


def _length(head: bytes) -> int:
    """How long an IDX file says it is; as long as can be for what is no IDX file of bytes."""
    ndim = head[3] if len(head) == 16 and head[:3] == b"\0\0\x08" else 0
    if ndim not in (1, 3):
        return _LARGEST
    return 4 + 4 * ndim + math.prod(struct.unpack_from(f">{ndim}I", head, 4))


def parse_images(file: IdxFile) -> NDArray[np.uint8]:
    """Read pixels, shape `(n, 784)`."""
    images = _parse_idx(file, ndim=3)
    if images.shape[1:] != (SIDE, SIDE):
        raise file.error(
            f"its images are {images.shape[1]} by {images.shape[2]} pixels instead of "
            f"{SIDE} by {SIDE}"
        )
    return images.reshape(-1, SIDE * SIDE)


def parse_labels(file: IdxFile) -> NDArray[np.uint8]:
    """Read labels, shape `(n,)`."""
    labels = _parse_idx(file, ndim=1)
    if labels.max() >= CLASSES:
        where = int(labels.argmax())
        raise file.error(f"label {where} is {labels[where]}; labels run from 0 to {CLASSES - 1}")
    return labels


def _parse_idx(file: IdxFile, *, ndim: int) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes, of which every byte is accounted for."""
    data = checked_contents(file)
    start = 4 + 4 * ndim
    if len(data) < start:
        raise file.error(f"it ends after {len(data)} bytes, within the {start} of the IDX header")
    magic, *shape = struct.unpack_from(f">{1 + ndim}I", data)
    # 8 is the IDX code of unsigned bytes.
    expected = 8 << 8 | ndim
    if magic != expected:
        raise file.error(f"its magic number is {magic} instead of {expected}")
    length = start + math.prod(shape)
    if len(data) != length:
        raise file.error(
            f"it has {len(data)} bytes, but its header (shape {tuple(shape)}) asks for {length}"
        )
    if length == start:
        raise file.error(f"it is empty (shape {tuple(shape)})")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
