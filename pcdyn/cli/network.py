"""From options, a TOML table or a NetCDF file to an inference problem."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from pcdyn._support.arrays import check_size
from pcdyn._support.checks import checked_integer, checked_number
from pcdyn._support.files import read_bytes
from pcdyn._support.types import Numbers
from pcdyn.cli.arrays import load_array
from pcdyn.cli.options import NetworkOptions
from pcdyn.errors import DataError, InputError
from pcdyn.io.results import load_problem
from pcdyn.model.energies.energy import Energy
from pcdyn.model.energies.generalised import named_energy
from pcdyn.model.network import Network, mlp
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem

Settings = dict[str, Any]

_ONLY_FOR_NEW_NETWORKS = (
    "widths", "activation", "output_activation", "weight_std", "bias", "residual",
    "parameterisation",
)  # fmt: skip


def settings_of(options: NetworkOptions) -> Settings:
    """Collect the settings that were given, those of the command line before those of a file.

    `network` is among them if it is a NetCDF file. Raises `DataError` for a TOML file that is
    missing, broken or has a key or a value that does not fit, and `InputError` for an option that
    would be ignored.
    """
    fields = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options)}
    given = {name: value for name, (value, default) in fields.items() if value != default}
    path = given.pop("network", None)
    if path is None:
        return given
    if path.suffix == ".toml":
        return _read_toml(path) | given
    ignored = [name for name in _ONLY_FOR_NEW_NETWORKS if name in given]
    if ignored:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise InputError(f"{path} already says what the network is: leave {flags} out")
    return {"network": path, **given}


def build_problem(settings: Settings) -> InferenceProblem:
    """Build the problem that these settings describe.

    Weights are those of `pcdyn.mlp` with `jax.random.key(seed)`. Raises `InputError` and its kinds
    for what does not fit, each naming what and where.
    """
    dtype = np.float32 if settings.get("float32") else None
    saved = load_problem(settings["network"], dtype=dtype) if "network" in settings else None
    key = _key(settings)
    network = _new_network(settings, key, dtype) if saved is None else saved.network
    input, output = _clamped(settings, network, saved, key)
    # A prior on file has no place where the input is clamped now.
    prior = saved.prior if saved is not None and input is None else None
    if "prior" in settings:
        mean, precision = settings["prior"]
        prior = Prior(mean, named_energy("gaussian", precision=_as_numbers(precision)))
    energy = None if saved is None else saved.energy
    if "energy" in settings:
        energy = _named_energy(settings["energy"], settings.get("precisions"))
    elif "precisions" in settings:
        if saved is not None and {each.name for each in saved.energy} != {"gaussian"}:
            raise InputError(
                "the file has another energy than the Gaussian: give --energy beside --precisions"
            )
        energy = named_energy("gaussian", precision=_precisions(settings["precisions"]))
    return InferenceProblem(
        network,
        input=input,
        output=output,
        energy=energy,
        prior=prior,
        time_constants=None if saved is None else saved.time_constants,
    )


def _key(settings: Settings) -> PRNGKeyArray:
    # JAX takes only the last 32 bits where float64 is off, and no more than 64 otherwise.
    least, most = (-(2**31), 2**32 - 1) if settings.get("float32") else (-(2**63), 2**63 - 1)
    seed = settings.get("seed", 0)
    if not least <= seed <= most:
        raise InputError(f"--seed must be an integer from {least} to {most}")
    return jr.key(seed)


def _new_network(settings: Settings, key: PRNGKeyArray, dtype: type[np.float32] | None) -> Network:
    std = settings.get("bias")
    if std is not None:
        std = checked_number(std, "the standard deviation of biases", at_least=0)
    network = mlp(
        settings.get("widths", (5, 5, 5)),
        activation=settings.get("activation", "tanh"),
        output_activation=settings.get("output_activation"),
        std=settings.get("weight_std"),
        bias=std is not None,
        residual=settings.get("residual", False),
        parameterisation=settings.get("parameterisation", "standard"),
        key=key,
        dtype=dtype,
    )
    if std is None:
        return network
    keys = jr.split(jr.fold_in(key, 3), network.depth)
    drawn = [
        std * jr.normal(k, layer.bias.shape, layer.bias.dtype)
        for k, layer in zip(keys, network.layers, strict=True)
    ]
    return eqx.tree_at(lambda n: [layer.bias for layer in n.layers], network, drawn)


def _clamped(
    settings: Settings, network: Network, saved: InferenceProblem | None, key: PRNGKeyArray
) -> tuple[Numbers | None, Numbers | None]:
    """Input and output: from files, random with the batch size of the other, or free."""
    sources = {name: settings.get(name) for name in ("input", "output")}
    data: dict[str, Numbers | None] = {"input": None, "output": None}
    random = []
    for name, source in sources.items():
        if source is None and saved is not None:
            data[name] = getattr(saved, name)
        elif source in (None, "random"):
            random.append(name)
        elif source != "free":
            data[name] = load_array(source, name, Path())
    given = [np.shape(values)[:-1] for values in data.values() if values is not None]
    batch = settings.get("batch")
    if batch is not None:
        checked_integer(batch, "--batch", at_least=1, at_most=2**31 - 1)
        size = network.dtype.itemsize * batch * sum(network.widths)
        check_size(size, f"a batch of {batch} samples")
    if batch is not None and given and given[0] != (batch,):
        raise InputError(
            f"a batch of {batch} contradicts data of shape {(*given[0], '…')}: leave --batch out"
        )
    if "seed" in settings and saved is not None and not random:
        raise InputError("--seed would be ignored: nothing is random; add --input random")
    shape = given[0] if given else () if batch is None else (batch,)
    for name in random:
        index = (1, 0) if name == "input" else (2, -1)
        width = network.widths[index[1]]
        data[name] = jr.normal(jr.fold_in(key, index[0]), (*shape, width), network.dtype)
    return data["input"], data["output"]


def _named_energy(text: str, precisions: float | int | Sequence[object] | None) -> Energy:
    """The energy of `"name"` or `"name:parameter"`."""
    name, colon, number = text.partition(":")
    try:
        parameter = float(number) if colon else None
    except ValueError as error:
        raise InputError(
            f"the parameter of the energy {text!r} is not a number: give one as in {name}:0.5"
        ) from error
    return named_energy(name, precision=_precisions(precisions), parameter=parameter)


def _precisions(
    given: float | int | Sequence[object] | None,
) -> np.ndarray | list[np.ndarray] | None:
    if given is None:
        return None
    if isinstance(given, int | float):
        return _as_numbers(given)
    if len(given) == 1:
        return _as_numbers(given[0])
    return [_as_numbers(each) for each in given]


def _as_numbers(precision: object) -> np.ndarray:
    try:
        return np.asarray(precision, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"precision {repr(precision)[:60]} is neither a number, a vector nor a matrix"
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_integers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_integer(each) for each in value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_precisions(value: object) -> bool:
    return _is_number(value) or (isinstance(value, list) and bool(value))


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "widths": (_is_integers, "a list of integers"),
    "activation": (_is_text, "a name"),
    "output_activation": (_is_text, "a name"),
    "weight_std": (_is_number, "a number"),
    "bias": (_is_number, "a number"),
    "residual": (lambda value: isinstance(value, bool), "true or false"),
    "parameterisation": (_is_text, "a name"),
    "energy": (_is_text, "a name, or a name:parameter"),
    "precisions": (_is_precisions, "a number or a list"),
    "prior": (_is_pair, "a list of two numbers, mean and precision"),
    "input": (_is_text, '"random", "free" or a file'),
    "output": (_is_text, '"random", "free" or a file'),
    "batch": (_is_integer, "an integer"),
    "seed": (_is_integer, "an integer"),
    "float32": (lambda value: isinstance(value, bool), "true or false"),
}


def _read_toml(path: Path) -> Settings:
    content = read_bytes(path)
    try:
        # Windows' editors begin a text with a byte order mark.
        document = tomllib.loads(content.decode("utf-8-sig"))
        repr(document)  # which Python refuses for thousands of hexadecimal digits
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not in UTF-8 ({error}): save it as UTF-8, which editors call an encoding"
        ) from error
    # Among them numbers of thousands of digits, and lists within lists without end.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid TOML: {error}") from error
    for name in document:
        if name != "network":
            raise DataError(
                f"{path}: unknown entry {name!r} at the top: the options stand in the table "
                "[network]"
            )
    table = document.get("network")
    if not isinstance(table, dict):
        raise DataError(f"{path} has no table [network]")
    for name, value in table.items():
        if name not in _KINDS:
            near = difflib.get_close_matches(name, _KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_KINDS)}"
            raise DataError(f"{path}: unknown key {name!r} in [network]; {hint}")
        fits, expected = _KINDS[name]
        if not fits(value):
            raise DataError(f"{path}: {name} must be {expected}, got {value!r:.60}")
    # Data stand beside the file that names them, wherever the command is run.
    beside = {
        name: str(path.parent / table[name])
        for name in ("input", "output")
        if table.get(name, "free") not in ("random", "free")
    }
    return table | beside
