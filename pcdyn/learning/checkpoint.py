"""Checkpoints of a training: complete or not there, and only for the training they came from."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from pcdyn.errors import CheckpointError
from pcdyn.files import write_atomically

_FORMAT = "pcdyn training checkpoint 1"


def fingerprint(**parts: Any) -> dict[str, str]:
    """SHA-256 of each part of a configuration: of its structure and of the numbers in it."""
    return {name: _digest(part) for name, part in parts.items()}


def optimiser_behaviour(optimiser: Any, weights: Any) -> Any:
    """What an optimiser makes of three gradients: its settings cannot be looked at."""
    state, updates = optimiser.init(weights), []
    for scale in (1.0, -0.3, 2.0):
        gradient = jax.tree.map(lambda w, s=scale: s * jnp.cos(jnp.arange(w.size)).reshape(
            w.shape).astype(w.dtype), weights)  # fmt: skip
        update, state = optimiser.update(gradient, state, weights)
        updates.append(update)
    return updates


def _digest(part: Any) -> str:
    arrays, static = eqx.partition(part, eqx.is_array_like)
    # Functions print with their address, which is another in each process.
    structure = re.sub(r" at 0x[0-9a-f]+", "", eqx.tree_pformat(static))
    digest = hashlib.sha256(structure.encode())
    for leaf in jax.tree.leaves(arrays):
        values = np.asarray(_plain(leaf))
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jr.key_data(leaf) if _is_key(leaf) else leaf


def save(
    path: Path, configuration: Mapping[str, str], epochs: int, state: Any, records: Any
) -> None:
    """Write the state of a training after so many epochs, and what it has recorded, atomically."""
    arrays: dict[str, Any] = {
        f"state_{i}": np.asarray(_plain(x)) for i, x in enumerate(jax.tree.leaves(state))
    }
    for group, values in records.items():
        arrays |= {f"{group}/{name}": np.asarray(value) for name, value in values.items()}
    header = {"format": _FORMAT, "epochs": epochs, "configuration": dict(configuration)}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)

    write_atomically(path, write)


def load(
    path: Path, configuration: Mapping[str, str], like: Any
) -> tuple[int, Any, dict[str, dict[str, np.ndarray]]]:
    """The epochs done, the state in the structure of `like`, and the records.

    Raises `CheckpointError` for a file that is truncated, corrupt, not a checkpoint, or of a
    training with another configuration.
    """
    arrays = _read(path)
    header = _header(path, arrays.pop("header", None))
    theirs = header["configuration"]
    differing = [name for name in configuration if theirs.get(name) != configuration[name]]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another training: its {', '.join(differing)} differ; give another "
            "path, or remove the file to begin anew"
        )
    leaves, structure = jax.tree.flatten(like)
    stored = [arrays.pop(f"state_{index}", None) for index in range(len(leaves))]
    for old, leaf in zip(stored, leaves, strict=True):
        if old is None or old.shape != np.shape(_plain(leaf)):
            raise CheckpointError(f"{path} lacks a part of the state: remove it and begin anew")
    state = [
        jr.wrap_key_data(jnp.asarray(old)) if _is_key(leaf) else jnp.asarray(old)
        for old, leaf in zip(stored, leaves, strict=True)
    ]
    records: dict[str, dict[str, np.ndarray]] = {"history": {}, "evaluations": {}}
    for name, value in arrays.items():
        group, _, entry = name.partition("/")
        if group not in records:
            raise CheckpointError(f"{path} holds {name!r}, which no checkpoint does")
        records[group][entry] = value
    return header["epochs"], jax.tree.unflatten(structure, state), records


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        # NumPy would not close a file that it cannot read.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # Which exception a damaged file raises depends on where the damage is.
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({error}): it is truncated, corrupt or another "
            "kind of file; remove it to begin anew"
        ) from error


def _header(path: Path, stored: np.ndarray | None) -> dict[str, Any]:
    try:
        header = json.loads(b"" if stored is None else stored.tobytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of pcdyn: give another path") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint that this version of pcdyn reads: give another path"
        )
    return header
