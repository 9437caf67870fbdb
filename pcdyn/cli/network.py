"""From options, a TOML table or a NetCDF file to an inference problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import equinox as eqx
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from pcdyn._support.checks import checked_number
from pcdyn._support.types import Numbers
from pcdyn.cli.arrays import load_array, sample_shape
from pcdyn.cli.energies import as_numbers, energy_of, precisions
from pcdyn.cli.graph import graph_problem
from pcdyn.cli.options import NetworkOptions
from pcdyn.cli.tables import OF_GRAPHS, Settings, read_toml
from pcdyn.errors import InputError
from pcdyn.io.results import load_problem
from pcdyn.model.clamps import Partial, PartlyClamped
from pcdyn.model.energies.energy import Energy
from pcdyn.model.energies.generalised import named_energy
from pcdyn.model.graph import Graph
from pcdyn.model.network import Network, mlp
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem

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
        table = read_toml(path)
        if "nodes" in table:
            _refuse(given.keys() - set(OF_GRAPHS), f"{path} already says what the graph is")
        return table | given
    ignored = [name for name in _ONLY_FOR_NEW_NETWORKS if name in given]
    _refuse(ignored, f"{path} already says what the network is")
    return {"network": path, **given}


def _refuse(ignored: Iterable[str], why: str) -> None:
    """Raise `InputError` for options that would be ignored, if there are any."""
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(ignored))
    if flags:
        raise InputError(f"{why}: leave {flags} out")


def build_problem(settings: Settings) -> InferenceProblem:
    """Build the problem that these settings describe.

    Weights are those of `pcdyn.mlp` with `jax.random.key(seed)`, or of `graph_problem`.
    Raises `InputError` and its kinds for what does not fit, each naming what and where.
    """
    key = _key(settings)
    if "nodes" in settings:
        return graph_problem(settings, key)
    dtype = np.float32 if settings.get("float32") else None
    saved = load_problem(settings["network"], dtype=dtype) if "network" in settings else None
    if saved is not None and isinstance(saved.graph, Graph):
        fits = {"network", "energy", "precisions", "float32"}
        _refuse(settings.keys() - fits, f"{settings['network']} holds a graph and its data")
        return InferenceProblem(
            saved.graph,
            clamp=_as_given(saved, saved.graph),
            energy=_energy(settings, saved),
            time_constants=saved.time_constants,
        )
    network = _new_network(settings, key, dtype) if saved is None else saved.network
    input, output = _clamped(settings, network, saved, key)
    # A prior on file has no place where the input is clamped now.
    prior = saved.prior if saved is not None and input is None else None
    if "prior" in settings:
        mean, precision = settings["prior"]
        prior = Prior(mean, named_energy("gaussian", precision=as_numbers(precision)))
    return InferenceProblem(
        network,
        input=input,
        output=output,
        energy=_energy(settings, saved),
        prior=prior,
        time_constants=None if saved is None else saved.time_constants,
    )


def _as_given(saved: InferenceProblem, graph: Graph) -> dict[str, Numbers | Partial]:
    """What the nodes of a graph are clamped to, as a user gives it."""
    each = zip(graph.nodes, saved.clamp, strict=True)
    return {
        name: Partial(x.values, x.mask) if isinstance(x, PartlyClamped) else x
        for name, x in each
        if x is not None
    }


def _energy(
    settings: Settings, saved: InferenceProblem | None
) -> Energy | tuple[Energy, ...] | None:
    """The energy that is asked for, or that of the file."""
    precision = precisions(settings["precisions"]) if "precisions" in settings else None
    if "energy" in settings:
        return energy_of(settings["energy"], precision)
    if precision is None:
        return None if saved is None else saved.energy
    if saved is not None and {each.name for each in saved.energy} != {"gaussian"}:
        raise InputError(
            "the file has another energy than the Gaussian: give --energy beside --precisions"
        )
    return named_energy("gaussian", precision=precision)


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
    one = network.dtype.itemsize * sum(network.widths)
    shape = sample_shape(settings.get("batch"), given, bytes_each=one)
    if "seed" in settings and saved is not None and not random:
        raise InputError("--seed would be ignored: nothing is random; add --input random")
    for name in random:
        index = (1, 0) if name == "input" else (2, -1)
        width = network.widths[index[1]]
        data[name] = jr.normal(jr.fold_in(key, index[0]), (*shape, width), network.dtype)
    return data["input"], data["output"]
