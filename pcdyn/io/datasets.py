"""MNIST and Fashion-MNIST as arrays.

The digits come from one of four sources, and `Dataset.source` says from which:

- `"folder"`: the folder that the environment variable `PCDYN_DATA` names. It holds `mnist/` and
  `fashion-mnist/`, each with the four IDX files as they are published (`train-images-idx3-ubyte`,
  `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`), with or without
  `.gz`.
- `"cache"`: what an earlier download left in the user's cache.
- `"download"`: a public server, checked by SHA-256 and kept in the cache. It is never used unless
  it is asked for.
- `"sample"`: 1000 training and 500 test digits of MNIST that ship with pcdyn, 100 and 50 of each
  class. There is no such sample of Fashion-MNIST.

MNIST is the work of Y. LeCun, C. Cortes and C. J. C. Burges; Fashion-MNIST of H. Xiao, K. Rasul
and R. Vollgraf (Zalando).
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pcdyn._support.checks import as_sequence, check_choice, check_instance, checked_number
from pcdyn._support.files import cache_folder, write_atomically
from pcdyn.errors import DataError
from pcdyn.io.idx_files import (
    CLASSES,
    IdxFile,
    checked_contents,
    is_intact,
    parse_images,
    parse_labels,
)

Split = Literal["train", "test"]
Origin = Literal["folder", "cache", "download", "sample"]
Source = Literal["auto", "folder", "cache", "download", "sample"]

FOLDER_VARIABLE = "PCDYN_DATA"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of ten classes, with where they came from.

    - `images`: shape `(n, 784)`, floating point, one image a row (28 rows of 28 pixels).
    - `labels`: shape `(n,)`, int64, each from 0 to 9.
    - `name`: `"mnist"` or `"fashion-mnist"`.
    - `source`: `"folder"`, `"cache"`, `"download"` or `"sample"`; only `"sample"` is not the full
      set.
    """

    images: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]
    name: str
    source: Origin

    @property
    def one_hot(self) -> NDArray[np.floating[Any]]:
        """The labels as rows of the identity, shape `(n, 10)`, in the dtype of the images."""
        return np.eye(CLASSES, dtype=self.images.dtype)[self.labels]


def mnist(
    split: Split = "train",
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    dtype: DTypeLike = np.float32,
    source: Source = "auto",
    base_url: str | None = None,
) -> Dataset:
    """Load MNIST: 60000 training or 10000 test digits, or the 1000 or 500 of the shipped sample.

    **Arguments:**

    - `split`: `"train"` or `"test"`.
    - `limits`: the values of an empty and of a full pixel; between them the scale is linear.
    - `dtype`: floating-point dtype of the images.
    - `source`: where to read from (see `pcdyn.datasets`). `"auto"` takes the folder if `PCDYN_DATA`
      is set (and not empty), else the cache if it holds both files of the split, else the sample;
      it never downloads.
    - `base_url`: address of the folder on the server; only with `source="download"`.

    **Raises:**

    - `DataError` for an argument that is not one of those above, and for a file that is missing,
      damaged, or not what its name says. A folder that is set but incomplete is never passed over.
    """
    return _load(_MNIST, split, limits, dtype, source, base_url)


def fashion_mnist(
    split: Split = "train",
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    dtype: DTypeLike = np.float32,
    source: Source = "auto",
    base_url: str | None = None,
) -> Dataset:
    """Load Fashion-MNIST: 60000 training or 10000 test images of clothing.

    As `mnist`, but without a sample: `source="auto"` takes the folder if `PCDYN_DATA` is set, else
    the cache, and otherwise raises `DataError`, as `source="sample"` does.
    """
    return _load(_FASHION_MNIST, split, limits, dtype, source, base_url)


@dataclass(frozen=True)
class _Archive:
    """Where a data set is published, and the SHA-256 of its four unzipped files."""

    name: str
    base_url: str
    sample: str | None
    sha256: Mapping[str, str]


# The unzipped contents are checked, not the .gz files: those differ from one server to the next
# (in time stamp and compression level) while the images are the same.
_MNIST = _Archive(
    name="mnist",
    base_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    sample="mnist_sample",
    sha256={
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
)
_FASHION_MNIST = _Archive(
    name="fashion-mnist",
    base_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    sample=None,
    sha256={
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
)
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _load(
    archive: _Archive,
    split: str,
    limits: tuple[float, float],
    dtype: DTypeLike,
    source: Source,
    base_url: str | None,
) -> Dataset:
    _check_choices(split, source, base_url)
    values = _pixel_values(limits, dtype)
    origin = _first_available(archive, split) if source == "auto" else source
    image_file, label_file = _locate(archive, split, origin, base_url)
    pixels = parse_images(image_file)
    labels = parse_labels(label_file)
    if len(pixels) != len(labels):
        raise label_file.error(
            f"it holds {len(labels)} labels, but {image_file.label} holds {len(pixels)} images"
        )
    return Dataset(values[pixels], labels.astype(np.int64), archive.name, origin)


def _check_choices(split: str, source: str, base_url: str | None) -> None:
    check_choice(split, "split", _FILES, error=DataError)
    check_choice(source, "source", get_args(Source), error=DataError)
    if base_url is not None:
        wanted = "the address of a folder on a server"
        check_instance(base_url, "base_url", str, wanted, error=DataError)
    if base_url is not None and source != "download":
        raise DataError(
            f"base_url is {base_url!r}, but source={source!r} reads no server; leave base_url out, "
            'or give source="download"'
        )


def _pixel_values(limits: tuple[float, float], dtype: DTypeLike) -> NDArray[np.floating[Any]]:
    """The image value of each of the 256 pixel values, exact at both limits."""
    try:
        dtype = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise DataError(f"dtype is no dtype ({error}): give one such as numpy.float32") from None
    if not np.issubdtype(dtype, np.floating):
        raise DataError(
            f"dtype is {dtype}; images are real numbers: give a floating-point dtype "
            "such as numpy.float32"
        )
    wanted = "two finite numbers, the lower one first, as in (0.0, 1.0)"
    each = [
        checked_number(limit, "each of limits", error=DataError)
        for limit in as_sequence(limits, "limits", wanted, error=DataError)
    ]
    if len(each) != 2 or not each[0] < each[1]:
        raise DataError(f"limits is {limits!r}; give {wanted}")
    low, high = each
    fraction = np.arange(256) / 255
    return (low * (1 - fraction) + high * fraction).astype(dtype)


def _first_available(archive: _Archive, split: str) -> Origin:
    if os.environ.get(FOLDER_VARIABLE):
        return "folder"
    if all(_cache_path(archive, name).is_file() for name in _FILES[split]):
        return "cache"
    if archive.sample is not None:
        return "sample"
    raise DataError(
        f"no {archive.name} is at hand: {FOLDER_VARIABLE} is not set and {_cache(archive)} does "
        f'not hold the files of split={split!r}; give source="download" to fetch them, or set '
        f"{FOLDER_VARIABLE} to a folder that holds {archive.name}/"
    )


def _locate(archive: _Archive, split: str, origin: Origin, base_url: str | None) -> list[IdxFile]:
    """The image file and the label file of a split; missing files are found out here."""
    names = _FILES[split]
    if origin == "folder":
        return [_in_folder(archive, name) for name in names]
    if origin == "sample":
        return [_in_sample(archive, name) for name in names]
    if origin == "download":
        server = archive.base_url if base_url is None else base_url
        for name in names:
            _download(archive, name, server)
    return [_in_cache(archive, name) for name in names]


def _in_folder(archive: _Archive, name: str) -> IdxFile:
    root = os.environ.get(FOLDER_VARIABLE)
    if not root:
        raise DataError(
            f'source is "folder", but {FOLDER_VARIABLE} is not set; set it to a folder that holds '
            f"{archive.name}/{name} or {archive.name}/{name}.gz"
        )
    folder = Path(root).expanduser() / archive.name
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            remedy = f"put an intact copy in its place, or unset {FOLDER_VARIABLE}"
            return IdxFile(path, str(path), remedy)
    missing = "this folder does not exist" if not folder.is_dir() else f"it has no {name}[.gz]"
    raise DataError(
        f"{folder}: {missing}; {FOLDER_VARIABLE} is {root!r} and must be a folder that holds "
        f"{archive.name}/{name} or {archive.name}/{name}.gz: put the file there, or unset "
        f"{FOLDER_VARIABLE}"
    )


def _in_sample(archive: _Archive, name: str) -> IdxFile:
    if archive.sample is None:
        raise DataError(
            f'no sample of {archive.name} ships with pcdyn; give source="download", or set '
            f"{FOLDER_VARIABLE} to a folder that holds {archive.name}/"
        )
    path = importlib.resources.files("pcdyn.io") / "data" / f"{archive.sample}-{name}.gz"
    return IdxFile(path, str(path), "reinstall pcdyn")


def _cache(archive: _Archive) -> Path:
    return cache_folder() / archive.name


def _cache_path(archive: _Archive, name: str) -> Path:
    return _cache(archive) / f"{name}.gz"


def _in_cache(archive: _Archive, name: str) -> IdxFile:
    path = _cache_path(archive, name)
    remedy = 'give source="download", which fetches an intact copy'
    file = IdxFile(path, str(path), remedy, archive.sha256[name])
    if not path.is_file():
        raise file.error("the cache does not hold this file")
    return file


def _download(archive: _Archive, name: str, base_url: str) -> None:
    """Make sure that the cache holds an intact copy of a file."""
    # Imported here because it brings an HTTP client, which slows the import of pcdyn.
    import pooch

    path = _cache_path(archive, name)
    if path.is_file() and is_intact(_in_cache(archive, name)):
        return
    url = f"{base_url.rstrip('/')}/{name}.gz"

    def fetch(partial: Path) -> None:
        try:
            pooch.HTTPDownloader()(url, str(partial), None)
        except OSError as error:
            raise failed(error) from error
        remedy = "try again, or give another base_url"
        checked_contents(IdxFile(partial, url, remedy, archive.sha256[name]))

    def failed(error: OSError) -> DataError:
        return DataError(
            f"{url}: could not be downloaded into {path.parent} ({error}); check the address and "
            f"the connection, give another base_url, or set {FOLDER_VARIABLE} to a folder that "
            f"holds {archive.name}/"
        )

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failed(error) from error
    # A failure or an interruption leaves neither a partial file nor a damaged one behind.
    write_atomically(path, fetch)
