"""MNIST and Fashion-MNIST: what is read is what the files hold, or a `DataError` says why not.

The parser is compared with IDX files that the tests write themselves; downloads come from a server
on the loopback interface. The tests that need the full sets run where PCDYN_DATA names them.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import runpy
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcdyn import datasets
from pcdyn.errors import DataError
from pcdyn.io.datasets import Dataset, fashion_mnist, mnist

FULL = os.environ.get("PCDYN_DATA")
needs_full_set = pytest.mark.skipif(
    not FULL, reason="PCDYN_DATA does not name a folder with the full sets"
)
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
ROOT = Path(__file__).parents[2]
PIXELS = np.random.RandomState(0).randint(0, 256, (7, 28, 28)).astype(np.uint8)
PIXELS[0, 0, :2] = 0, 255
CLASSES = np.array([3, 0, 9, 9, 1, 5, 2], dtype=np.uint8)
BOTH = pytest.mark.parametrize("load", [mnist, fashion_mnist], ids=["mnist", "fashion-mnist"])


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file, from the published description of the format."""
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return struct.pack(">BBBB", 0, 0, 0x08, array.ndim) + sizes + array.astype(np.uint8).tobytes()


def write(folder: Path, images: bytes, labels: bytes, *, zipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((IMAGES, images), (LABELS, labels)):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)


def files_under(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own for each test, and no PCDYN_DATA from outside."""
    monkeypatch.delenv("PCDYN_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pcdyn"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that PCDYN_DATA names, with seven training images of each set, not gzipped."""
    root = tmp_path / "data"
    for name in ("mnist", "fashion-mnist"):
        write(root / name, idx(PIXELS), idx(CLASSES), zipped=False)
    monkeypatch.setenv("PCDYN_DATA", str(root))
    return root


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log; an address under /cut breaks off in the middle of the file."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(gzip.compress(idx(CLASSES))[:20])


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """A function that serves a folder on the loopback interface and returns its address."""
    servers: list[tuple[http.server.HTTPServer, threading.Thread]] = []

    def start(root: Path) -> str:
        handler = functools.partial(Handler, directory=str(root))
        server = http.server.HTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def small_server(
    tmp_path: Path, serve: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """A server of seven training digits whose SHA-256 is the expected one: its folder, address."""
    root = tmp_path / "server"
    write(root, idx(PIXELS), idx(CLASSES), zipped=True)
    for name, array in ((IMAGES, PIXELS), (LABELS, CLASSES)):
        digest = hashlib.sha256(idx(array)).hexdigest()
        monkeypatch.setitem(datasets._MNIST.sha256, name, digest)
    return root, serve(root)


# ----------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@BOTH
def test_folder_gives_the_rows_that_were_written(
    load: Callable[..., Dataset], zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row i is image i, pixel by pixel along its rows, over 255; label i is its class."""
    name = "mnist" if load is mnist else "fashion-mnist"
    write(tmp_path / "in" / name, idx(PIXELS), idx(CLASSES), zipped=zipped)
    monkeypatch.setenv("PCDYN_DATA", str(tmp_path / "in"))
    data = load("train", dtype=np.float64)
    assert np.array_equal(data.images, PIXELS.reshape(7, 784) / 255)
    assert np.array_equal(data.labels, CLASSES)
    assert data.labels.dtype == np.int64
    assert (data.name, data.source) == (name, "folder")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_limits_are_reached_exactly_and_the_scale_between_is_linear(dtype: Any):
    """Pixel p becomes low + (high - low) p / 255, with exact ends, in the dtype asked for."""
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.1, 0.9)):
        images = mnist(limits=(low, high), dtype=dtype).images
        expected = low + (high - low) * PIXELS.reshape(7, 784) / 255
        assert images.dtype == dtype
        assert images[0, 0] == images.min() == dtype(low)
        assert images[0, 1] == images.max() == dtype(high)
        np.testing.assert_allclose(images, expected, rtol=0, atol=2 * np.finfo(dtype).eps)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_hot_rows_are_rows_of_the_identity(dtype: Any):
    """One-hot rows sum to one and have their one at the label, in the dtype of the images."""
    data = mnist(dtype=dtype)
    assert data.one_hot.shape == (7, 10)
    assert data.one_hot.dtype == dtype
    assert np.array_equal(data.one_hot.sum(axis=1), np.ones(7))
    assert np.array_equal(data.one_hot.argmax(axis=1), CLASSES)


@pytest.mark.parametrize(("split", "per_class"), [("train", 100), ("test", 50)])
def test_sample_is_the_default_and_balanced(split: Any, per_class: int):
    """With no folder and no cache, `mnist` is the sample: equally many digits of each class."""
    data = mnist(split)
    assert data.source == "sample"
    assert data.images.shape == (10 * per_class, 784)
    assert data.images.dtype == np.float32
    assert (data.images.min(), data.images.max()) == (0.0, 1.0)
    assert np.array_equal(np.bincount(data.labels), np.full(10, per_class))


def test_sample_has_no_digit_twice():
    """All 1500 digits of the sample differ, so that no test digit is a training digit."""
    images = np.concatenate([mnist("train").images, mnist("test").images])
    assert len({row.tobytes() for row in images}) == 1500


def test_import_leaves_pooch_alone():
    """Reading the sample by name needs no HTTP client, nor does importing the module."""
    code = (
        "import sys; from pcdyn import datasets as d; d.mnist(source='sample'); "
        "sys.exit('pooch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ----------------------------------------------------------------------------- which source


@pytest.mark.usefixtures("folder", "small_server")
def test_auto_prefers_folder_then_cache_then_sample(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Each source gives way to the next one only when it is not there at all."""
    write(cache / "mnist", idx(PIXELS), idx(CLASSES), zipped=True)
    assert mnist().source == "folder"
    monkeypatch.delenv("PCDYN_DATA")
    assert mnist().source == "cache"
    (cache / "mnist" / f"{LABELS}.gz").unlink()
    assert mnist().source == "sample"


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch):
    """PCDYN_DATA= does not stand for the working directory."""
    monkeypatch.setenv("PCDYN_DATA", "")
    assert mnist().source == "sample"
    with pytest.raises(DataError, match="PCDYN_DATA is not set"):
        mnist(source="folder")


def test_fashion_mnist_has_no_sample():
    """Without folder and cache, Fashion-MNIST names both remedies instead of making do."""
    for source in ("auto", "sample"):
        with pytest.raises(DataError, match=r'source="download".*PCDYN_DATA'):
            fashion_mnist(source=source)


def test_empty_cache_points_to_the_download():
    """The error of an empty cache names the file and how to get it."""
    with pytest.raises(DataError, match=rf'{IMAGES}\.gz.*source="download"'):
        mnist(source="cache")


@BOTH
def test_missing_folder_is_an_error_that_names_it(
    load: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A PCDYN_DATA that names no folder is not passed over for another source."""
    monkeypatch.setenv("PCDYN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere.*does not exist.*unset PCDYN_DATA"):
        load()


def test_missing_file_is_an_error_that_names_it(folder: Path):
    """A folder without the labels is not passed over for another source."""
    (folder / "mnist" / LABELS).unlink()
    with pytest.raises(DataError, match=rf"mnist: it has no {LABELS}\[\.gz\]"):
        mnist()
    with pytest.raises(DataError, match="it has no t10k-images-idx3-ubyte"):
        mnist("test")


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, 'split must be .*"train", "test".* got \'validation\''),
        ({"source": "internet"}, 'source must be .*"auto", "folder".* got \'internet\''),
        ({"base_url": "http://127.0.0.1/"}, "base_url.*reads no server"),
        ({"dtype": np.int32}, "dtype is int32.*floating-point"),
        ({"limits": (1.0, 0.0)}, "limits.*lower one first"),
        ({"limits": (0.0, np.inf)}, "limits.*finite"),
        ({"limits": (np.nan, 1.0)}, "limits.*finite"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str):
    """An argument outside its range is a `DataError`, hence a `ValueError`, that names it."""
    with pytest.raises(DataError, match=message) as caught:
        mnist(**arguments)
    assert isinstance(caught.value, ValueError)


# ----------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "5503 bytes.*asks for 5504"),
        (lambda data: data + b"\0", "5505 bytes.*asks for 5504"),
        (lambda data: data[:9], "ends after 9 bytes, within the 16 of the IDX header"),
        (lambda data: b"", "ends after 0 bytes"),
        (lambda data: b"\0\0\x09\x03" + data[4:], "magic number is 2307 instead of 2051"),
        (lambda data: idx(CLASSES) + bytes(16), "magic number is 2049 instead of 2051"),
        (lambda data: idx(PIXELS.reshape(7, 14, 56)), "14 by 56 pixels instead of 28 by 28"),
        (lambda data: idx(PIXELS[:0]), "it is empty"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "asks for .* GiB"),
        (lambda data: gzip.compress(data)[:-9], "cannot be read or unzipped"),
        (lambda data: gzip.compress(data)[:5] + b"\xff" * 60, "cannot be read or unzipped"),
        (lambda data: gzip.compress(data) + b"tail", "cannot be read or unzipped"),
        (lambda data: gzip.compress(data)[:-8] + bytes(8), "cannot be read or unzipped"),
    ],
    ids=[
        "one byte short",
        "one byte too many",
        "header cut",
        "no bytes",
        "signed bytes",
        "labels for images",
        "other image size",
        "no images",
        "huge sizes",
        "gzip cut",
        "gzip garbled",
        "gzip with a tail",
        "gzip checksum",
    ],
)
def test_damaged_images_are_an_error_that_names_the_file(
    damage: Callable[[bytes], bytes], message: str, folder: Path
):
    """Every byte of an image file is accounted for; the error names file and remedy."""
    (folder / "mnist" / IMAGES).write_bytes(damage(idx(PIXELS)))
    with pytest.raises(DataError, match=rf"{IMAGES}: .*{message}.*intact copy"):
        mnist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.append(CLASSES, 1), "it holds 8 labels, but .*images-idx3-ubyte holds 7 images"),
        (CLASSES[:-1], "it holds 6 labels, but .*images-idx3-ubyte holds 7 images"),
        (np.where(CLASSES == 5, 10, CLASSES), "label 5 is 10; labels run from 0 to 9"),
    ],
    ids=["more", "fewer", "eleventh class"],
)
def test_labels_that_do_not_fit_the_images(labels: np.ndarray, message: str, folder: Path):
    """There is one label for each image, and it is one of ten."""
    (folder / "mnist" / LABELS).write_bytes(idx(labels))
    with pytest.raises(DataError, match=rf"{LABELS}: {message}"):
        mnist()


def test_cached_file_with_other_contents_is_refused(cache: Path):
    """A well-formed file in the cache that is not the published one fails its SHA-256."""
    write(cache / "mnist", idx(PIXELS), idx(CLASSES), zipped=True)
    with pytest.raises(DataError, match=rf'{IMAGES}\.gz: .*SHA-256.*source="download"'):
        mnist()


# ----------------------------------------------------------------------------- downloads


def test_download_gives_the_served_digits_and_fills_the_cache(
    small_server: tuple[Path, str], cache: Path
):
    """What is downloaded equals what is served, and the next call finds it in the cache."""
    root, url = small_server
    data = mnist(source="download", base_url=url, dtype=np.float64)
    assert data.source == "download"
    assert np.array_equal(data.images, PIXELS.reshape(7, 784) / 255)
    assert np.array_equal(data.labels, CLASSES)
    assert files_under(cache) == {"mnist", f"{IMAGES}.gz", f"{LABELS}.gz"}
    for name in (IMAGES, LABELS):
        served = (root / f"{name}.gz").read_bytes()
        assert (cache / "mnist" / f"{name}.gz").read_bytes() == served
    assert mnist().source == "cache"


def test_download_again_reads_the_cache_and_mends_only_what_is_damaged(
    small_server: tuple[Path, str], cache: Path
):
    """An intact cached file is not fetched again; a damaged one is replaced, never written over."""
    root, url = small_server
    mnist(source="download", base_url=url)
    (root / f"{IMAGES}.gz").unlink()
    damaged = cache / "mnist" / f"{LABELS}.gz"
    damaged.write_bytes(b"damaged")
    # A second name of the same file keeps its bytes only if the first is renamed over at once.
    second_name = cache / "second-name"
    second_name.hardlink_to(damaged)
    data = mnist(source="download", base_url=url + "/")
    assert np.array_equal(data.labels, CLASSES)
    assert second_name.read_bytes() == b"damaged"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: gzip.compress(idx(PIXELS[::-1])),
        lambda data: data[:-20],
        lambda data: b"<html>not found</html>",
    ],
    ids=["other digits", "truncated", "not a data file"],
)
def test_damaged_download_leaves_no_file(
    damage: Callable[[bytes], bytes], small_server: tuple[Path, str], cache: Path
):
    """A download that fails its SHA-256 is an error that names the address, and is not kept."""
    root, url = small_server
    served = root / f"{IMAGES}.gz"
    served.write_bytes(damage(served.read_bytes()))
    with pytest.raises(DataError, match=rf"{url}/{IMAGES}\.gz: .*(SHA-256|unzipped).*base_url"):
        mnist(source="download", base_url=url)
    assert files_under(cache) == {"mnist"}


@pytest.mark.parametrize("place", ["/absent", "/cut"], ids=["404", "connection lost"])
def test_failed_download_leaves_no_file(place: str, small_server: tuple[Path, str], cache: Path):
    """A missing file or a lost connection is an error that names the address and the remedies."""
    url = small_server[1] + place
    with pytest.raises(DataError, match=rf"{url}/{IMAGES}\.gz: could not be .*PCDYN_DATA"):
        mnist(source="download", base_url=url)
    assert files_under(cache) == {"mnist"}


def test_failed_download_keeps_the_file_that_was_there(small_server: tuple[Path, str], cache: Path):
    """The cache changes only once an intact copy is at hand."""
    write(cache / "mnist", b"old images", b"old labels", zipped=False)
    old = cache / "mnist" / f"{IMAGES}.gz"
    old.write_bytes(b"old images")
    with pytest.raises(DataError, match="404"):
        mnist(source="download", base_url=small_server[1] + "/absent")
    assert old.read_bytes() == b"old images"


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "no address", "http://:x", ""])
def test_address_that_is_none(url: str):
    """An address that is not one of HTTP is a `DataError`, not an error of the HTTP client."""
    with pytest.raises(DataError, match=rf"{url}.*could not be downloaded"):
        mnist(source="download", base_url=url)


# ----------------------------------------------------------------------------- the drawn sample


def test_drawing_the_sample_is_deterministic(folder: Path, tmp_path: Path):
    """The script writes the same bytes on each run, and as many digits of each class."""
    script = runpy.run_path(str(ROOT / "experiments" / "shared" / "draw_mnist_sample.py"))
    labels = np.arange(1100) % 10
    write(folder / "mnist", idx(np.resize(PIXELS, (1100, 28, 28))), idx(labels), zipped=False)
    outputs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        script["draw"]("train", tmp_path / name)
        outputs.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert len(outputs[0]) == 2
    assert outputs[0] == outputs[1]
    # Bytes 4 to 7 of a gzip header are its time stamp.
    assert all(data[4:8] == bytes(4) for data in outputs[0])
    drawn = np.frombuffer(gzip.decompress(outputs[0][1])[8:], dtype=np.uint8)
    assert np.array_equal(np.bincount(drawn), np.full(10, 100))


@needs_full_set
@pytest.mark.parametrize("split", ["train", "test"])
def test_sample_digits_are_rows_of_the_full_set(split: Any, monkeypatch: pytest.MonkeyPatch):
    """Each digit of the sample is bit for bit a digit of the full set, with the same label."""
    monkeypatch.setenv("PCDYN_DATA", str(FULL))
    full = mnist(split, source="folder")
    rows = {image.tobytes(): label for image, label in zip(full.images, full.labels, strict=True)}
    sample = mnist(split, source="sample")
    pairs = zip(sample.images, sample.labels, strict=True)
    assert all(rows.get(image.tobytes()) == label for image, label in pairs)


@needs_full_set
@pytest.mark.parametrize("split", ["train", "test"])
def test_script_draws_the_shipped_sample(
    split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The committed script draws the digits that ship; compression may differ with zlib."""
    monkeypatch.setenv("PCDYN_DATA", str(FULL))
    script = runpy.run_path(str(ROOT / "experiments" / "shared" / "draw_mnist_sample.py"))
    script["draw"](split, tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 2
    for path in drawn:
        shipped = ROOT / "pcdyn" / "io" / "data" / path.name
        assert gzip.decompress(path.read_bytes()) == gzip.decompress(shipped.read_bytes())


@needs_full_set
@pytest.mark.parametrize(("split", "count"), [("train", 60000), ("test", 10000)])
@BOTH
def test_published_sets_pass_their_hashes_and_counts(
    load: Callable[..., Dataset],
    split: Any,
    count: int,
    serve: Callable[[Path], str],
):
    """The full sets, served on loopback, pass the SHA-256 that a download is held to."""
    name = "mnist" if load is mnist else "fashion-mnist"
    data = load(split, source="download", base_url=serve(Path(str(FULL)) / name), dtype=np.float16)
    assert data.images.shape == (count, 784)
    assert data.labels.shape == (count,)
    assert set(data.labels) == set(range(10))
