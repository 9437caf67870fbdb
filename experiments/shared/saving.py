"""The files of an experiment, each written at once or not at all.

The same code writes the same bytes again, but for `run.json`, which says when, where and how long,
and but for what is measured in seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Settings
from pcdyn import plotting
from pcdyn._support.files import write_atomically
from pcdyn.io.netcdf import write_dataset


def save_data(folder: Path, data: xarray.Dataset) -> None:
    """Write the data of an experiment, before anything is made of them."""
    write_dataset(data, folder / "data.nc", compressed=True)


def save_picture(folder: Path, plot: Callable[[], Figure]) -> None:
    """Draw a picture as PNG and PDF."""
    # Dates and program versions would make equal pictures differ.
    options: dict[str, dict[str, Any]] = {
        "png": {"dpi": 150, "metadata": {"Software": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    # Ticks, and colours by number, get their style only when they are saved.
    with plotting.style():
        figure = plot()
        try:
            for suffix, chosen in options.items():
                picture = io.BytesIO()
                figure.savefig(picture, format=suffix, **chosen)
                write_atomically(folder / f"figure.{suffix}", picture.getvalue())
        finally:
            plt.close(figure)


def facts(settings: Settings, data: xarray.Dataset) -> dict[str, Any]:
    """What the data come from: settings, versions, device; and their hash and attributes."""
    packages = ("jax", "diffrax", "equinox", "numpy", "scipy")
    versions = {"python": platform.python_version(), "pcdyn": pcdyn.__version__}
    return {
        "settings": dataclasses.asdict(settings),
        "versions": versions | {package: version(package) for package in packages},
        "device": str(jax.devices()[0]),
        "float64": jnp.zeros(()).dtype == jnp.float64,
        "values_sha256": values_hash(data),
        "data": data.attrs,
    }


def save_run(folder: Path, seconds: float) -> None:
    """Write what differs from run to run, and is not committed."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    save_json(folder / "run.json", {"time": now, "seconds": round(seconds, 2), "machine": machine})


def save_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record of plain values as JSON."""
    save_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write a text."""
    write_atomically(path, text.encode())


def values_hash(data: xarray.Dataset) -> str:
    """SHA-256 of the names and values of a data set, whatever file holds it."""
    digest = hashlib.sha256()
    for name in sorted(str(variable) for variable in data.variables):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(data[name].values).tobytes())
    return digest.hexdigest()
