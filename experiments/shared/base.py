"""What all experiments share: claims, random networks, and saving without partial files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from pcdyn._support.files import write_atomically
from pcdyn.io.netcdf import write_dataset


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper with what was measured.

    `expected_to_hold` is false for findings, `timed` true where seconds are compared, which another
    load of the machine changes: tests do not assert it.
    """

    text: str
    measured: str
    expected: str
    holds: bool
    expected_to_hold: bool = True
    timed: bool = False

    @property
    def verdict(self) -> str:
        """What the tables print."""
        if self.holds == self.expected_to_hold:
            return "holds" if self.holds else "does not hold (finding)"
        return "FAILS" if self.expected_to_hold else "holds (UNEXPECTED)"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every experiment module offers, as its `EXPERIMENT`.

    `run` makes data of one of the settings `presets`, whose numbers of networks `fast` replaces for
    a quick version; `check` and `plot` take those data alone. `summary` is the text of the index
    in place of the table of claims; `page` is a page of its own, given the folder it will be in.
    """

    panels: str
    presets: Mapping[str, Any]
    fast: Mapping[str, Any]
    run: Callable[[Any], xarray.Dataset]
    check: Callable[[xarray.Dataset], list[Claim]]
    plot: Callable[[xarray.Dataset], Figure]
    summary: Callable[[xarray.Dataset], str] | None = None
    page: Callable[[xarray.Dataset, Path], str] | None = None

    def settings(self, preset: str, *, fast: bool) -> Any:
        """The settings of a preset, or of its quick version."""
        chosen = self.presets[preset]
        return dataclasses.replace(chosen, **self.fast) if fast else chosen


def gaussian_weights(
    key: jax.Array, *, networks: int, layers: int, width: int, std: float, identity: bool = False
) -> jax.Array:
    """Square weights N(0, std²), plus the identity if asked; (networks, layers, width, width)."""
    weights = std * jr.normal(key, (networks, layers, width, width))
    return weights + jnp.eye(width)[None, None] if identity else weights


def linear_problems(
    keys: jax.Array, *, networks: int, width: int, std: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The 5-5-5 linear problems of A.9: weights N(0, std²), inputs N(1, 1), targets N(−1, 1)."""
    weights = gaussian_weights(keys[0], networks=networks, layers=2, width=width, std=std)
    inputs, outputs = (jr.normal(key, (networks, width)) for key in keys[1:3])
    return weights, 1 + inputs, -1 + outputs


def network_of(weights: jax.Array, activation: str) -> pcdyn.Network:
    """The network with these weights, shape (layers, n, n), and one activation."""
    return pcdyn.Network([pcdyn.Dense(weight, activation=activation) for weight in weights])


def trained_classifier(
    network: pcdyn.Network, digits: Any, *, epochs: int, key: jax.Array, batch: int = 64
) -> pcdyn.Network:
    """The network after `epochs` of BP on digits: squared error, rate .05, momentum .9."""
    images, targets = jnp.asarray(digits.images), jnp.asarray(digits.one_hot)
    weights, static = eqx.partition(network, eqx.is_array)

    def loss(weights: Any, x: Any, y: Any) -> Any:
        errors = eqx.combine(weights, static).feedforward(x)[-1] - y
        return 0.5 * jnp.mean(jnp.sum(errors**2, axis=-1))

    def update(carry: Any, rows: Any) -> tuple[Any, None]:
        weights, momentum = carry
        slope = jax.grad(loss)(weights, images[rows], targets[rows])
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, slope)
        return (jax.tree.map(lambda w, m: w - 0.05 * m, weights, momentum), momentum), None

    shuffled = jnp.concatenate([jr.permutation(k, len(images)) for k in jr.split(key, epochs)])
    batches = shuffled[: len(shuffled) // batch * batch].reshape(-1, batch)
    start = (weights, jax.tree.map(jnp.zeros_like, weights))
    (weights, _), _ = jax.jit(lambda c, b: jax.lax.scan(update, c, b))(start, batches)
    return eqx.combine(weights, static)


def cosine(a: Any, b: Any) -> Any:
    """Cosine similarity along the last axis."""
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def largest_rise(values: Any, *, axis: int) -> float:
    """The largest increase from one entry to the next along `axis` (negative: always falls)."""
    return np.diff(np.asarray(values, dtype=float), axis=axis).max().item()


def save_data(name: str, folder: Path, data: xarray.Dataset) -> None:
    """Write the data of an experiment, at once or not at all, before anything is made of them."""
    write_dataset(data, folder / f"{name}.nc")


def save_picture(
    name: str, folder: Path, plot: Callable[[xarray.Dataset], Figure], data: xarray.Dataset
) -> None:
    """Draw the data of an experiment as PNG and PDF, each at once or not at all."""
    figure = plot(data)
    # Dates and program versions would make equal pictures differ.
    options: dict[str, dict[str, Any]] = {
        "png": {"dpi": 150, "metadata": {"Software": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    try:
        for suffix, chosen in options.items():
            picture = io.BytesIO()
            figure.savefig(picture, format=suffix, **chosen)
            write_atomically(folder / f"{name}.{suffix}", picture.getvalue())
    finally:
        plt.close(figure)


def save_manifest(
    name: str, folder: Path, settings: Any, data: xarray.Dataset, **notes: Any
) -> None:
    """Write settings, versions, time and the hash of the data beside them."""
    manifest = {
        "experiment": name,
        "settings": dataclasses.asdict(settings),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("pcdyn", "jax", "diffrax", "equinox", "numpy", "scipy")},
        },
        "device": str(jax.devices()[0]),
        "float64": jnp.zeros(()).dtype == jnp.float64,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "values_sha256": values_hash(data),
        "data": data.attrs,
        **notes,
    }
    save_text(folder / f"{name}.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write a text, at once or not at all."""
    write_atomically(path, text.encode())


def values_hash(data: xarray.Dataset) -> str:
    """SHA-256 of the names and values of a data set, whatever file holds it."""
    digest = hashlib.sha256()
    for name in sorted(str(variable) for variable in data.variables):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(data[name].values).tobytes())
    return digest.hexdigest()
