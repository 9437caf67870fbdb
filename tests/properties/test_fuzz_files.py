"""Files and words that nobody would write: refused by name, or read as what they were.

Each kind takes a random generator and makes one input. If this fails, a damaged file raises an
exception of NumPy, zlib or HDF5, or is read as numbers that nobody wrote. `run(kind, count)` goes
on for as long as one likes.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
import optax
import pytest

import pcdyn
from pcdyn.cli import main
from pcdyn.cli.network import build_problem, settings_of
from pcdyn.cli.options import NetworkOptions
from pcdyn.errors import CheckpointError, DataError, InputError
from pcdyn.io import datasets
from pcdyn.learning import Backpropagation, checkpoint, train

Rng = np.random.Generator


def mutated(content: bytes, rng: Rng) -> bytes:
    """One to four changes: bits, bytes, runs of a byte, pieces cut out, put in or exchanged."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
        match int(rng.integers(7)):
            case 0 if at < len(data):
                data[at] ^= 1 << int(rng.integers(8))
            case 1 if at < len(data):
                data[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:
                data[at : at + length] = bytes([int(rng.integers(256))]) * len(
                    data[at : at + length]
                )
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = rng.bytes(length)
            case 5:
                del data[at:]
            case _:
                other = int(rng.integers(len(data) + 1))
                data[at : at + length] = data[other : other + length]
        if not data:
            break
    return bytes(data)


def same(found: Any, expected: Any) -> bool:
    """Bit for bit, keys included."""
    ours, theirs = (
        [np.asarray(checkpoint._plain(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]
        for tree in (found, expected)
    )
    return ours == theirs


# --- Kinds of inputs ------------------------------------------------------------------------------


@functools.cache
def _trajectory(folder: Path) -> tuple[pcdyn.Trajectory, bytes]:
    network = pcdyn.mlp([2, 3, 2], activation="identity", key=jr.key(0))
    problem = pcdyn.InferenceProblem(network, input=np.ones(2), output=np.ones(2))
    run = pcdyn.simulate(problem, t1=1.0, times=[0.0, 0.5, 1.0], integrator="dopri8")
    run.to_netcdf(folder / "good.nc")
    return run, (folder / "good.nc").read_bytes()


def netcdf(rng: Rng, folder: Path) -> None:
    run, good = _trajectory(folder)
    path = folder / "bad.nc"
    path.write_bytes(mutated(good, rng))
    with contextlib.suppress(DataError):
        assert same(pcdyn.load(path), run)
    with contextlib.suppress(DataError):
        pcdyn.load_problem(path)


@functools.cache
def _checkpoint(folder: Path) -> tuple[Any, bytes]:
    """The arguments of `checkpoint.load` without the path, with what it returned."""
    seen: list[Any] = []
    load = checkpoint.load

    def spy(path: Path, *arguments: Any) -> Any:
        found = load(path, *arguments)
        seen.append((arguments, found))
        return found

    network = pcdyn.mlp([2, 3, 2], activation="tanh", key=jr.key(0))
    options: dict[str, Any] = {
        "rule": Backpropagation(), "optimiser": optax.sgd(0.1, 0.9), "batch_size": 2,
        "key": jr.key(0), "epochs": 2, "checkpoint": folder / "good.npz",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", spy)
        for _ in range(2):
            train(network, np.ones((4, 2)), np.ones((4, 2)), **options)
    return seen[0], (folder / "good.npz").read_bytes()


def checkpoints(rng: Rng, folder: Path) -> None:
    (arguments, expected), good = _checkpoint(folder)
    path = folder / "bad.npz"
    path.write_bytes(mutated(good, rng))
    with contextlib.suppress(CheckpointError):
        assert same(checkpoint.load(path, *arguments), expected)


def idx(rng: Rng, folder: Path) -> None:
    """Images or labels, zipped or not; what is read has as many of both, and only classes."""
    pixels = np.arange(3 * 784, dtype=np.uint8)
    parts = {
        "train-images-idx3-ubyte": b"\0\0\x08\x03" + np.array([3, 28, 28], ">u4").tobytes()
        + pixels.tobytes(),
        "train-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x03\1\2\3",
    }  # fmt: skip
    chosen = str(rng.choice(list(parts)))
    (folder / "mnist").mkdir(exist_ok=True)
    for name, content in parts.items():
        packed = gzip.compress(content, 1) if rng.random() < 0.5 else content
        damaged = mutated(packed, rng) if name == chosen else packed
        if name == chosen and rng.random() < 0.3:
            damaged = gzip.compress(mutated(content, rng), 1)
        (folder / "mnist" / name).write_bytes(damaged)
    with contextlib.suppress(DataError):
        found = datasets.mnist(source="folder")
        assert found.images.shape == (len(found.labels), 784)
        assert found.images.min() >= 0 and found.images.max() <= 1
        assert set(found.labels) <= set(range(10))


_VALUES = (
    "2", "[2, 3, 2]", "[2, 2]", "-1", "0", "1e308", "nan", "inf", "-inf", "true", '"tanh"', "[]",
    '"random"', '"free"', '"student:0.5"', '"student:x"', '"log:"', '""', "[1, 2]", "[[1, 0], [0]]",
    "[[[1]]]", "9" * 20, "0x" + "f" * 40, '"a\\u0000b.npy"', '"/dev/null"', '"x.npy:y"', "{}",
    "1979-05-27", '"""', "[1, [2, 3]]", "1_000", '"ℒ"', "'", "[true]", '["a"]', "0.5", "[1e400]",
    '"gaussian"', '"log_cosh"', '"divisive:1e-320"', "{a = 1}", "1e-320",
)  # fmt: skip
_KEYS = (
    "widths", "activation", "output_activation", "weight_std", "bias", "energy", "precisions",
    "input", "output", "batch", "seed", "float32", "width", "", '"a b"', "network", "a.b",
)  # fmt: skip


def toml(rng: Rng, folder: Path) -> None:
    """Keys and values by chance, sometimes with bytes changed as well."""
    chosen = rng.choice(len(_KEYS), int(rng.integers(0, 4)), replace=False)
    lines = [f"{_KEYS[i]} = {rng.choice(_VALUES)}" for i in chosen]
    text = "\n".join([str(rng.choice(["[network]", "[network", "", "[[network]]"])), *lines])
    content = text.encode(str(rng.choice(["utf-8", "utf-8-sig", "utf-16"], p=[0.8, 0.1, 0.1])))
    path = folder / "net.toml"
    path.write_bytes(mutated(content, rng) if rng.random() < 0.3 else content)
    with contextlib.suppress(InputError):
        settings = settings_of(NetworkOptions(network=path))
        widths = settings.get("widths", (5, 5, 5))
        # Every new shape is compiled anew.
        if max(widths) < 10 and len(widths) < 5:
            problem = build_problem(settings)
            for values in (problem.input, problem.output):
                assert values is None or np.isfinite(values).all()


_WORDS = (
    "simulate", "equilibrium", "compare", "stability", "verify", "--help", "--version", "", "-1",
    "--t1", "--times", "--rtol", "--dt", "--integrator", "--method", "--tolerance", "--widths",
    "--seed", "--batch", "--precisions", "--energy", "--input", "--output", "--network", "--data",
    "--picture", "--out", "--json", "--quiet", "--float32", "--at", "--networks", "--error", "nan",
    "inf", "0", "3", "2", "1e-300", "1e300", "9" * 20, "9" * 4500, "tanh", "exact", "x.nc", "a\nb",
    "x.npy", ".", "/dev/null", "no/x.nc", "\udcff", "ℒ", "student:0", "log", "free", "3.4", "--",
)  # fmt: skip


def words(rng: Rng, folder: Path) -> None:
    """A command with options of which at least one cannot be, so that nothing is computed."""
    some = [str(word) for word in rng.choice(_WORDS, int(rng.integers(0, 6)))]
    arguments = [*rng.choice(["simulate", "equilibrium", "stability", "compare"], 1),
                 "--activation", "unknown", *some]  # fmt: skip
    if rng.random() < 0.3:
        arguments = [word for word in some if word not in _COMMANDS]
    before = sorted(folder.iterdir())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in arguments])
    told = {"--help", "--version"} & set(arguments)
    assert code == 2 or (code == 0 and told), (arguments, code)
    assert err.getvalue() or told, arguments
    assert "Traceback" not in err.getvalue()
    assert sorted(folder.iterdir()) == before


_COMMANDS = ("simulate", "equilibrium", "compare", "stability", "verify")
KINDS: dict[Callable[[Rng, Path], None], int] = {
    netcdf: 200, checkpoints: 300, idx: 300, toml: 150, words: 60,
}  # fmt: skip


def run(kind: Callable[[Rng, Path], None], count: int, folder: Path, start: int = 0) -> None:
    """Inputs `start` to `start + count` of a kind; the message names the one that failed."""
    for number in range(start, start + count):
        try:
            kind(np.random.default_rng([number]), folder)
        except BaseException as error:
            raise AssertionError(f"input {number} of {kind.__name__}") from error


@pytest.fixture(autouse=True)
def _images_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(datasets.FOLDER_VARIABLE, os.fspath(tmp_path))
    yield
    _trajectory.cache_clear()
    _checkpoint.cache_clear()


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_nobody_would_write_is_refused_by_name(
    kind: Callable[[Rng, Path], None], tmp_path: Path
) -> None:
    run(kind, KINDS[kind], tmp_path)
