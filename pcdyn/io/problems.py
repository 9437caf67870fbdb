"""Inference problems as labelled xarray data sets, and back.

The data set holds the network (weights, biases, names of activations), the energies and their
precisions, the time constants and the clamped data. It can be merged with that of a trajectory or
an equilibrium, so that one file says what was computed and of what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from pcdyn._support.checks import check_instance
from pcdyn._support.types import Values
from pcdyn.errors import ActivationError, DataError, DtypeError, InputError
from pcdyn.io.netcdf import check_dataset, named_values
from pcdyn.model.activations import Activation, get_activation
from pcdyn.model.energies.energy import Energy, naming_layer
from pcdyn.model.energies.generalised import arguments_of, named_energy
from pcdyn.model.network import Dense, Network
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem

if TYPE_CHECKING:
    import xarray

# What is written where a layer has something else.
_OPTIONS: dict[str, float] = {"scale": 1.0, "gain": 1.0, "skip": False}
_SKIPS = {"True": True, "False": False}


def problem_to_xarray(problem: InferenceProblem) -> xarray.Dataset:
    """Convert a problem to a labelled data set, l = 1 … L, and l = 0 for the energy of a prior.

    Variables: `weight_l`, shape `(unit_l, unit_{l-1})`; `bias_l`, shape `(unit_l,)`, where there
    is one; `precision_l`, a number, `(unit_l,)` or `(unit_l, column_l)`, where one was given;
    `input` and `output`, shape `([sample,] unit)`, where they are clamped; `time_constant`, one
    for each layer l = 0 … L; `prior_mean`, shape `(unit_0,)`, where there is a prior. The names of
    the activations are in the attribute `activations`, and in `scales`, `gains` and `skips` what
    layers have of these; where not all energies are Gaussian their
    names are in the attribute `energies`, that of a prior in `prior_energy`, and the parameters of
    those that have one in the variables `energy_parameter_l`.

    **Raises:**

    - `InputError` for a network of other layers than `pcdyn.Dense`, and for an energy without a
      name (`pcdyn.named_energy`).
    - `ActivationError` for an activation that pcdyn does not know by name.
    """
    import xarray

    check_instance(problem, "problem", InferenceProblem, "a pcdyn.InferenceProblem")
    variables: dict[str, Any] = {}
    names, energies = [], []

    def put_energy(index: int) -> str:
        """Its precision and its parameter, where it has them; returns its name."""
        name, precision, parameter = arguments_of(problem.energy_of(index))
        if parameter is not None:
            variables[f"energy_parameter_{index}"] = ((), np.asarray(parameter))
        if precision is not None:
            dimensions = (f"unit_{index}", f"column_{index}")[: precision.ndim]
            variables[f"precision_{index}"] = (dimensions, np.asarray(precision))
        return name

    for index, layer in enumerate(problem.network.layers, start=1):
        if not isinstance(layer, Dense):
            raise InputError(
                f"a file holds networks of pcdyn.Dense, but layer {index} is a "
                f"{type(layer).__name__}"
            )
        names.append(_name_of(layer.activation))
        unit = f"unit_{index}"
        variables[f"weight_{index}"] = ((unit, f"unit_{index - 1}"), np.asarray(layer.weight))
        if layer.bias is not None:
            variables[f"bias_{index}"] = ((unit,), np.asarray(layer.bias))
        energies.append(put_energy(index))
    ends = {"input": (problem.input, 0), "output": (problem.output, problem.network.depth)}
    for name, (data, index) in ends.items():
        if data is not None:
            dimensions = (*["sample"][: data.ndim - 1], f"unit_{index}")
            variables[name] = (dimensions, np.asarray(data))
    constants = np.array([np.asarray(each) for each in problem.time_constants])
    variables["time_constant"] = (("layer",), constants)
    attrs = {"activations": " ".join(names)}
    for name, usual in _OPTIONS.items():
        each = [getattr(layer, name) for layer in problem.network.layers]
        if any(value != usual for value in each):
            attrs[f"{name}s"] = " ".join(map(repr, each))
    if set(energies) != {"gaussian"}:
        attrs["energies"] = " ".join(energies)
    if problem.prior is not None:
        variables["prior_mean"] = (("unit_0",), np.asarray(problem.prior.mean))
        attrs["prior_energy"] = put_energy(0)
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

    def precision(l: int) -> Values | None:
        ndim = dataset.variables[f"precision_{l}"].ndim if f"precision_{l}" in dataset else 0
        return values_if_any(f"precision_{l}", *(f"unit_{l}", f"column_{l}")[:ndim])

    names = str(dataset.attrs.get("activations", "")).split()
    indices = range(1, len(names) + 1)
    missing = [f"weight_{l}" for l in indices if f"weight_{l}" not in dataset.variables]
    if not names or missing:
        what = missing[0] if missing else "activations"
        raise DataError(
            f"there is no network in this file: it lacks {what!r}; write it with "
            "pcdyn.save_problem, or by a command of pcdyn"
        )
    layers = [
        Dense(
            values(f"weight_{l}", f"unit_{l}", f"unit_{l - 1}"),
            values_if_any(f"bias_{l}", f"unit_{l}"),
            name,
            **chosen,
        )
        for l, name, chosen in zip(indices, names, _options(dataset, len(names)), strict=True)
    ]
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
    mean = values_if_any("prior_mean", "unit_0")
    of_prior = str(dataset.attrs.get("prior_energy", "gaussian"))
    return InferenceProblem(
        Network(layers),
        input=values_if_any("input", "unit_0", sample="optional"),
        output=values_if_any("output", f"unit_{len(names)}", sample="optional"),
        energy=[energy(l, kind) for l, kind in zip(indices, kinds, strict=True)],
        prior=None if mean is None else Prior(mean, energy(0, of_prior)),
        time_constants=None if constants is None else list(constants),
    )


def with_problem(dataset: xarray.Dataset, problem: InferenceProblem) -> xarray.Dataset:
    """Merge the data set of a result with that of the problem that it belongs to."""
    network = problem_to_xarray(problem)
    return dataset.merge(network).assign_attrs({**dataset.attrs, **network.attrs})


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


def _name_of(activation: Activation) -> str:
    name = activation.name.partition("(")[0]
    try:
        known = get_activation(name)
    except ActivationError:
        known = None
    if known != activation:
        raise ActivationError(
            f"{activation} has no name that a file could hold: use one that pcdyn.mlp knows by name"
        )
    return name
