"""Checkpoints of a training: complete or not there, and only for the training they came from."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from pcdyn._support.files import read_numpy, write_atomically
from pcdyn.errors import CheckpointError, DataError

_FORMAT = "pcdyn training checkpoint 2"


def fingerprint(computations: Mapping[str, str], **parts: PyTree) -> dict[str, str]:
    """Compute the SHA-256 of each part of a configuration, and of what it computes.

    The parts are hashed by their structure and the numbers in them. That says nothing of functions,
    such as the schedule of an optimiser, an activation or an energy of the user: they are hashed as
    the code that JAX makes of each of the `computations`, every constant in it included. Raises
    `CheckpointError` for one that calls Python while it runs, of which there is no such code.
    """
    code = {}
    for name, text in computations.items():
        if re.search(r"custom_call @\w*python\w*callback", text):
            raise CheckpointError(
                f"the {name} calls Python while it runs (jax.pure_callback or the like), so that "
                "no later process could know it again: train without a checkpoint"
            )
        code[name] = hashlib.sha256(text.encode()).hexdigest()
    # Code comes last: it differs wherever another part does.
    return {"version of JAX": jax.__version__, **{n: _digest(p) for n, p in parts.items()}, **code}


def _digest(part: PyTree) -> str:
    arrays, static = eqx.partition(part, eqx.is_array_like)
    # Functions print with their address, which is another in each process.
    structure = re.sub(r" at 0x[0-9a-f]+", "", eqx.tree_pformat(static))
    digest = hashlib.sha256(structure.encode())
    for leaf in jax.tree.leaves(arrays):
        values = np.asarray(_plain(leaf))
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _is_key(leaf: object) -> TypeGuard[jax.Array]:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: object) -> object:
    return jr.key_data(leaf) if _is_key(leaf) else leaf


def check_state(state: PyTree) -> None:
    """Raise `CheckpointError` for a state of which a file cannot hold every part."""
    for leaf in jax.tree.leaves(state):
        if np.asarray(_plain(leaf)).dtype.kind not in "biufc":
            raise CheckpointError(
                f"the state of the optimiser or the rule holds {leaf!r:.60}, which a checkpoint "
                "cannot hold: train without one, or keep arrays of numbers in it"
            )


def save(
    path: Path,
    configuration: Mapping[str, str],
    epochs: int,
    state: PyTree,
    records: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Write the state of a training after so many epochs, and what it has recorded, atomically."""
    arrays: dict[str, Any] = {
        f"state_{i}": np.asarray(_plain(x)) for i, x in enumerate(jax.tree.leaves(state))
    }
    for group, values in records.items():
        arrays |= {f"{group}/{name}": np.asarray(value) for name, value in values.items()}
    header = {"format": _FORMAT, "epochs": epochs, "configuration": dict(configuration)}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    memory = io.BytesIO()
    np.savez(memory, **arrays)
    write_atomically(path, memory.getvalue())


def load(
    path: Path, configuration: Mapping[str, str], like: PyTree, epoch_axis: int
) -> tuple[int, PyTree, dict[str, dict[str, np.ndarray]]]:
    """Read the epochs done, the state in the structure of `like`, and the records.

    Raises `CheckpointError` for a file that is truncated, corrupt, not a checkpoint, or of a
    training with another configuration.
    """
    try:
        arrays = read_numpy(path)
    except DataError as error:
        raise CheckpointError(f"{error}; as a checkpoint it is lost: remove it to begin") from error
    epochs, theirs = _header(path, arrays.pop("header", None))
    differing = [name for name in configuration if theirs.get(name) != configuration[name]]
    if differing:
        # What the whole computes differs wherever a part of it does.
        parts = differing[:-1] or differing
        raise CheckpointError(
            f"{path} belongs to another training: its {', '.join(parts)} differ; give another "
            "path, or remove the file to begin anew"
        )
    leaves, structure = jax.tree.flatten(like)
    state = []
    for index, leaf in enumerate(leaves):
        old, new = arrays.pop(f"state_{index}", None), np.asarray(_plain(leaf))
        if old is None or old.shape != new.shape or old.dtype.kind != new.dtype.kind:
            raise CheckpointError(f"{path} lacks a part of the state: remove it and begin anew")
        array = jnp.asarray(old)
        is_key = _is_key(leaf)
        state.append(jr.wrap_key_data(array, impl=jr.key_impl(leaf)) if is_key else array)
    records: dict[str, dict[str, np.ndarray]] = {"history": {}, "evaluations": {}}
    for name, value in arrays.items():
        group, _, entry = name.partition("/")
        count = epochs if group == "history" else epochs + 1
        if group not in records or value.shape[epoch_axis : epoch_axis + 1] != (count,):
            raise CheckpointError(f"{path} holds {name!r}, which no checkpoint does")
        records[group][entry] = value
    if "loss" not in records["history"]:
        raise CheckpointError(f"{path} lacks the history: remove it and begin anew")
    return epochs, jax.tree.unflatten(structure, state), records


def _header(path: Path, stored: np.ndarray | None) -> tuple[int, dict[str, object]]:
    """The epochs done and the configuration."""
    try:
        header = json.loads(b"" if stored is None else stored.tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of pcdyn: give another path") from error
    epochs, theirs = (
        (header.get("epochs"), header.get("configuration"))
        if isinstance(header, dict) and header.get("format") == _FORMAT
        else (None, None)
    )
    if type(epochs) is not int or epochs < 1 or not isinstance(theirs, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint that this version of pcdyn reads: give another path"
        )
    return epochs, theirs
