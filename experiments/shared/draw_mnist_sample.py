"""Draw the sample of MNIST that ships with pcdyn: 1000 training and 500 test digits.

Each class gets the same number of digits, drawn without replacement from the full set with a fixed
seed and kept in the order of the full set. The four IDX files are the same, byte for byte, on each
run. The full set is read from the folder that the environment variable PCDYN_DATA names:

    PCDYN_DATA=FOLDER python experiments/shared/draw_mnist_sample.py [OUTPUT]
"""

from __future__ import annotations

import argparse
import gzip
import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcdyn.io.datasets import Split, mnist
from pcdyn.io.idx_files import CLASSES, SIDE

SEED = 20240
PER_CLASS: dict[Split, int] = {"train": 100, "test": 50}
PREFIX: dict[Split, str] = {"train": "mnist_sample-train", "test": "mnist_sample-t10k"}
OUTPUT = Path(__file__).parents[2] / "pcdyn" / "io" / "data"


def balanced_rows(labels: NDArray[np.int64], per_class: int) -> NDArray[np.intp]:
    """Rows, in increasing order, that hold `per_class` randomly drawn members of each class."""
    # Raw bits of a bit generator, because NumPy may change what a Generator's methods draw.
    keys = np.random.PCG64(SEED).random_raw(len(labels))
    order = np.argsort(keys, kind="stable")
    drawn = [order[labels[order] == label][:per_class] for label in range(CLASSES)]
    if min(map(len, drawn)) < per_class:
        raise ValueError(f"a class has fewer than {per_class} digits; read the full MNIST")
    return np.sort(np.concatenate(drawn))


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write unsigned bytes as a gzipped IDX file without name or time stamp."""
    header = struct.pack(f">{1 + array.ndim}I", 8 << 8 | array.ndim, *array.shape)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(header + array.tobytes())
    path.write_bytes(buffer.getvalue())


def draw(split: Split, output: Path) -> None:
    """Draw the digits of one split and write its images and its labels."""
    # With these limits the images are the pixel values up to rounding.
    full = mnist(split, source="folder", limits=(0.0, 255.0))
    rows = balanced_rows(full.labels, PER_CLASS[split])
    pixels = np.rint(full.images[rows]).astype(np.uint8).reshape(-1, SIDE, SIDE)
    write_idx(output / f"{PREFIX[split]}-images-idx3-ubyte.gz", pixels)
    write_idx(output / f"{PREFIX[split]}-labels-idx1-ubyte.gz", full.labels[rows].astype(np.uint8))


def main() -> None:
    """Draw both splits into the folder given on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT, help="folder to write to")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for split in PER_CLASS:
        draw(split, output)


if __name__ == "__main__":
    main()
