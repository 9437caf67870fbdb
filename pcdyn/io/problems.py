"""Inference problems as labelled xarray data sets, and back.

The data set holds the network (weights, biases, names of activations), the energies and their
precisions, the time constants and the clamped data. It can be merged with that of a trajectory or
an equilibrium, so that one file says what was computed and of what.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from pcdyn._support.checks import checked_integer
from pcdyn._support.types import Values
from pcdyn.errors import DataError, DtypeError
from pcdyn.io.modules import described_module, module_of
from pcdyn.io.netcdf import attribute, check_dataset, named_values
from pcdyn.io.nodes import Nodes, described_nodes, nodes_of
from pcdyn.model.activations import name_of
from pcdyn.model.clamps import Partial, PartlyClamped
from pcdyn.model.energies.energy import Energy, naming_layer
from pcdyn.model.energies.generalised import arguments_of, named_energy
from pcdyn.model.graph import Constant, Graph, Prediction
from pcdyn.model.network import Dense, Network
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem, check_inference

if TYPE_CHECKING:
    import xarray

# What is written where a layer has something else.
_OPTIONS: dict[str, float] = {"scale": 1.0, "gain": 1.0, "skip": False}
# In place of the name of an activation, for a prior and for a module of equinox.
_CONSTANT, _MODULE = "constant", "module"
_SKIPS = {"True": True, "False": False}


def problem_to_xarray(problem: InferenceProblem) -> xarray.Dataset:
    """Convert a problem to a labelled data set, l = 1 … L, and l = 0 for the energy of a prior.

    Variables: `weight_l`, shape `(unit_l, unit_{l-1})`; `bias_l`, shape `(unit_l,)`, where there
    is one; `precision_l`, a number, `(unit_l,)` or `(unit_l, column_l)`, where one was given;
    `input` and `output`, shape `([sample,] unit)`, where they are clamped; `time_constant`, one
    for each layer l = 0 … L; `prior_mean`, shape `(unit_0,)`, where there is a prior. Of a graph
    l is the number of a prediction, of the attribute `nodes`; `mean_l` is what a prior predicts,
    `module_l_array_i` are the arrays of a module of equinox, of the attribute `module_l`,
    `clamp_i` what node i is clamped to, where `is_clamped_i` is true if it is there. The names of
    the activations are in the attribute `activations`, and in `scales`, `gains` and `skips` what
    layers have of these; where not all energies are Gaussian their
    names are in the attribute `energies`, that of a prior in `prior_energy`, and the parameters of
    those that have one in the variables `energy_parameter_l`.

    **Raises:**

    - `InputError` for a layer that is neither a `pcdyn.Dense` nor a module of equinox that files
      hold (`pcdyn.io.modules`), and for an energy without a name (`pcdyn.named_energy`).
    - `ActivationError` for an activation that pcdyn does not know by name.
    """
    import xarray

    check_inference(problem)
    variables: dict[str, Any] = {}
    names, energies, modules = [], [], {}

    def put_energy(index: int) -> str:
        """Its precision and its parameter, where it has them; returns its name."""
        name, precision, parameter = arguments_of(problem.energy_of(index))
        if parameter is not None:
            variables[f"energy_parameter_{index}"] = ((), np.asarray(parameter))
        if precision is not None:
            unit = f"unit_{problem.target_node(index)}"
            dimensions = (unit, f"column_{index}")[: precision.ndim]
            variables[f"precision_{index}"] = (dimensions, np.asarray(precision))
        return name

    graph = problem.graph
    for index, layer in enumerate(graph.layers, start=1):
        unit = f"unit_{problem.target_node(index)}"
        energies.append(put_energy(index))
        if isinstance(layer, Constant):
            names.append(_CONSTANT)
            variables[f"mean_{index}"] = ((unit,), np.asarray(layer.value).ravel())
            continue
        if not isinstance(layer, Dense):
            names.append(_MODULE)
            described, arrays = described_module(layer, problem.target_name(index))
            modules[f"module_{index}"] = described
            for place, array in enumerate(arrays):
                name, dimensions = _array_of(index, place, array.ndim)
                variables[name] = (dimensions, np.asarray(array))
            continue
        names.append(name_of(layer.activation))
        given = f"unit_{index - 1}" if problem.is_chain else f"given_{index}"
        variables[f"weight_{index}"] = ((unit, given), np.asarray(layer.weight))
        if layer.bias is not None:
            variables[f"bias_{index}"] = ((unit,), np.asarray(layer.bias))
    ends = {0: "input", len(problem.clamp) - 1: "output"}
    for index, value in enumerate(problem.clamp):
        data = value.values if isinstance(value, PartlyClamped) else value
        if data is None:
            continue
        dimensions = (*["sample"][: data.ndim - 1], f"unit_{index}")
        name = ends[index] if problem.is_chain else f"clamp_{index}"
        variables[name] = (dimensions, np.asarray(data))
        if isinstance(value, PartlyClamped):
            variables[f"is_clamped_{index}"] = (dimensions, value.mask)
    constants = np.array([np.asarray(each) for each in problem.time_constants])
    variables["time_constant"] = (("layer",), constants)
    attrs: dict[str, Any] = {"activations": " ".join(names), **modules}
    if problem.is_chain and names[0] == _MODULE:
        attrs["input_width"] = problem.widths[0]
    for name, usual in _OPTIONS.items():
        each = [getattr(layer, name, usual) for layer in graph.layers]
        if any(value != usual for value in each):
            attrs[f"{name}s"] = " ".join(map(repr, each))
    if set(energies) != {"gaussian"}:
        attrs["energies"] = " ".join(energies)
    if problem.prior is not None:
        variables["prior_mean"] = (("unit_0",), np.asarray(problem.prior.mean))
        attrs["prior_energy"] = put_energy(0)
    given = graph.sources if isinstance(graph, Graph) else None
    activities = problem.activities(problem.zeros_state())
    attrs.update(described_nodes(activities, problem.targets, given))
    return xarray.Dataset(variables, attrs=attrs)


def problem_from_xarray(
    dataset: xarray.Dataset, *, dtype: DTypeLike | None = None
) -> InferenceProblem:
    """Make the problem of a data set that `problem_to_xarray` made, alone or merged with others.

    Axes are found by their names, whatever their order. Numbers keep their dtype, unless another is
    given: then they are rounded to that.

    **Raises:**

    - `DataError` if there is no problem in the data set.
    - `DtypeError` for float64 numbers where float64 is off in JAX, unless float32 holds them
      exactly.
    - What the network and the problem raise.
    """
    check_dataset(dataset)

    def values(name: str, *dimensions: str, sample: str = "absent") -> Values:
        found = named_values(dataset, name, *dimensions, kind="real numbers", sample=sample)
        return _rounded(found, dtype, name)

    def values_if_any(name: str, *dimensions: str, sample: str = "absent") -> Values | None:
        return values(name, *dimensions, sample=sample) if name in dataset.variables else None

    nodes = nodes_of(dataset)
    given = None if nodes is None else nodes.given
    names = str(dataset.attrs.get("activations", "")).split()
    indices = range(1, len(names) + 1)
    if given is not None and nodes is not None and len(nodes.targets) != len(names):
        raise DataError(f"{len(nodes.targets)} predictions, but {len(names)} activations")

    def unit(l: int) -> str:
        return f"unit_{l if nodes is None or given is None else nodes.targets[l - 1]}"

    def precision(l: int) -> Values | None:
        ndim = dataset.variables[f"precision_{l}"].ndim if f"precision_{l}" in dataset else 0
        return values_if_any(f"precision_{l}", *(unit(l), f"column_{l}")[:ndim])

    each = ((l, name) for l, name in enumerate(names, start=1) if name != _MODULE)
    wanted = [f"{'mean' if name == _CONSTANT else 'weight'}_{l}" for l, name in each]
    missing = [name for name in wanted if name not in dataset.variables]
    if not names or missing:
        what = missing[0] if missing else "activations"
        raise DataError(
            f"there is no network in this file: it lacks {what!r}; write it with "
            "pcdyn.save_problem, or by a command of pcdyn"
        )

    def array(l: int, place: int, ndim: int) -> Values:
        name, dimensions = _array_of(l, place, ndim)
        return values(name, *dimensions)

    def layer(l: int, name: str, chosen: dict[str, Any]) -> Any:  # noqa: ANN401
        if name == _CONSTANT:
            return values(f"mean_{l}", unit(l))
        if name == _MODULE:
            return module_of(str(attribute(dataset, f"module_{l}")), functools.partial(array, l))
        below = f"unit_{l - 1}" if given is None else f"given_{l}"
        weight, bias = values(f"weight_{l}", unit(l), below), values_if_any(f"bias_{l}", unit(l))
        return Dense(weight, bias, name, **chosen)

    each = zip(indices, names, _options(dataset, len(names)), strict=True)
    layers = [layer(l, name, chosen) for l, name, chosen in each]
    # Older files have one name and one parameter for all layers.
    shared = [str(dataset.attrs.get("energy_function", "gaussian"))] * len(names)
    kinds = str(dataset.attrs.get("energies", " ".join(shared))).split()
    if len(kinds) != len(names):
        raise DataError(f"{len(kinds)} energies for {len(names)} layers in this file")

    def energy(l: int, kind: str) -> Energy:
        parameter = values_if_any(f"energy_parameter_{l}")
        parameter = values_if_any("energy_parameter") if parameter is None else parameter
        with naming_layer(f"layer {l}"):
            return named_energy(kind, precision=precision(l), parameter=parameter)

    constants = values_if_any("time_constant", "layer")
    taus = None if constants is None else list(constants)
    energies = [energy(l, kind) for l, kind in zip(indices, kinds, strict=True)]
    if nodes is not None and given is not None:
        clamp = {
            name: _clamp(dataset, values_if_any, i)
            for i, name in enumerate(nodes.names)
            if f"clamp_{i}" in dataset.variables
        }
        return InferenceProblem(
            _graph(nodes, given, layers, energies),
            clamp=clamp,
            time_constants=taus,
        )
    mean = values_if_any("prior_mean", "unit_0")
    of_prior = str(dataset.attrs.get("prior_energy", "gaussian"))
    width = dataset.attrs.get("input_width")
    return InferenceProblem(
        Network(
            layers,
            input_width=None if width is None else checked_integer(width, "input_width"),
            nodes=None if nodes is None else nodes.names,
        ),
        input=values_if_any("input", "unit_0", sample="optional"),
        output=values_if_any("output", f"unit_{len(names)}", sample="optional"),
        energy=energies,
        prior=None if mean is None else Prior(mean, energy(0, of_prior)),
        time_constants=taus,
    )


def _graph(
    nodes: Nodes,
    given: Sequence[tuple[int, ...]],
    layers: Sequence[Any],
    energies: Sequence[Energy],
) -> Graph:
    predictions = [
        Prediction(nodes.names[target], given=[nodes.names[i] for i in sources], by=by, energy=mine)
        for target, sources, by, mine in zip(nodes.targets, given, layers, energies, strict=True)
    ]
    return Graph(dict(zip(nodes.names, nodes.shapes, strict=True)), predictions)


def _clamp(
    dataset: xarray.Dataset, values_if_any: Callable[..., Values | None], node: int
) -> Values | Partial:
    """What a node is clamped to."""
    value = values_if_any(f"clamp_{node}", f"unit_{node}", sample="optional")
    assert value is not None, "asked for what is there"
    name = f"is_clamped_{node}"
    if name not in dataset.variables:
        return value
    mask = named_values(dataset, name, f"unit_{node}", kind="booleans", sample="optional")
    return Partial(value, mask)


def with_problem(dataset: xarray.Dataset, problem: InferenceProblem) -> xarray.Dataset:
    """Merge the data set of a result with that of the problem that it belongs to."""
    network = problem_to_xarray(problem)
    return dataset.merge(network).assign_attrs({**dataset.attrs, **network.attrs})


def _array_of(index: int, place: int, ndim: int) -> tuple[str, tuple[str, ...]]:
    """The name and the dimensions of one array of a module."""
    name = f"module_{index}_array_{place}"
    return name, tuple(f"{name}_axis_{axis}" for axis in range(ndim))


def _rounded(values: Values, dtype: DTypeLike | None, name: str) -> Values:
    """`values` in a dtype that JAX does not round any more."""
    try:
        wanted = values.dtype if dtype is None else np.dtype(dtype)
    except (TypeError, ValueError):
        wanted = np.dtype(object)
    if not jnp.issubdtype(wanted, jnp.floating):
        raise DtypeError(f"dtype must be a floating-point dtype, got {dtype!r:.40}")
    kept = jax.dtypes.canonicalize_dtype(wanted)
    rounded = values.astype(kept)
    if wanted != kept and not np.array_equal(rounded, values, equal_nan=True):
        raise DtypeError(
            f"{name} is {wanted}, but float64 is off in JAX: switch it on with "
            'jax.config.update("jax_enable_x64", True), or round with dtype=jax.numpy.float32'
        )
    return rounded


def _options(dataset: xarray.Dataset, count: int) -> list[dict[str, Any]]:
    """Scale, gain and skip of every layer, where they are not the usual ones."""
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    for name in _OPTIONS:
        words = str(dataset.attrs.get(f"{name}s", "")).split()
        if not words:
            continue
        if len(words) != count:
            raise DataError(f"{len(words)} {name}s for {count} layers in this file")
        for options, word in zip(found, words, strict=True):
            try:
                options[name] = _SKIPS[word] if name == "skip" else float(word)
            except (KeyError, ValueError):
                raise DataError(f"{word!r:.40} among the {name}s in this file") from None
    return found
