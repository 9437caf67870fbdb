"""Layers and networks: what each layer of activities predicts of the next."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from pcdyn._support.arrays import as_float_array, check_dtype, check_size, is_traced
from pcdyn._support.checks import (
    as_sequence,
    check_callable,
    check_choice,
    check_flag,
    check_key,
    checked_integer,
    checked_number,
)
from pcdyn._support.functions import as_part
from pcdyn._support.namespaces import host_namespace
from pcdyn._support.products import matmul
from pcdyn._support.types import Activities, Numbers, Scalar, Tree, Values
from pcdyn.errors import DtypeError, GraphError, InputError, ShapeError
from pcdyn.model.activations import Activation, get_activation, identity
from pcdyn.model.named import NamedActivities

Layer = Callable[[Array], Array]


class Dense(eqx.Module):
    """The layer x ↦ f(W x + b), with the weights inside the activation as in the paper.

    With the options it is the residual layer x ↦ x + s f(g W x + b), or its parts.

    **Arguments:**

    - `weight`: W, shape `(n_out, n_in)`; where a graph predicts from several nodes a list with one
      such for each, which stand side by side in W.
    - `bias`: b, shape `(n_out,)`, or `None`.
    - `activation`: f, a name or a `pcdyn.Activation`.
    - `scale`: s, a positive number that is not learned.
    - `gain`: g, the same for the weights. Where they have variance 1 it sets their size, which
      gradients then have by its square.
    - `skip`: whether the activities below are added, unit by unit.

    **Raises:**

    - `ShapeError`, `DtypeError` or `NonFiniteError` for weights that cannot be used, and a skip
      between layers of different widths.
    - `ActivationError` for an unknown activation, and `InputError` for a scale or a gain that is
      not positive.
    """

    weight: Float[Array, "n_out n_in"]
    bias: Float[Array, " n_out"] | None
    activation: Activation = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    gain: float = eqx.field(static=True)
    skip: bool = eqx.field(static=True)

    def __init__(
        self,
        weight: Numbers,
        bias: Numbers | None = None,
        activation: str | Activation = identity,
        *,
        scale: float = 1.0,
        gain: float = 1.0,
        skip: bool = False,
    ):
        weight = _one_weight(weight)
        if weight.ndim != 2 or 0 in weight.shape:
            raise ShapeError(f"weight must have shape (n_out, n_in), got {weight.shape}")
        self.weight = weight
        self.bias = None
        if bias is not None:
            self.bias = as_float_array(bias, "bias").astype(weight.dtype)
            if self.bias.shape != weight.shape[:1]:
                raise ShapeError(
                    f"bias has shape {self.bias.shape}, but the weight of shape {weight.shape} "
                    f"needs {weight.shape[:1]}"
                )
        self.activation = get_activation(activation)
        self.scale = checked_number(scale, "scale", above=0)
        self.gain = checked_number(gain, "gain", above=0)
        check_flag(skip, "skip")
        self.skip = skip
        if skip and weight.shape[0] != weight.shape[1]:
            raise ShapeError(
                f"a skip adds the {weight.shape[1]} activities below to {weight.shape[0]} "
                "predictions: the weight must be square"
            )

    @property
    def effective_weight(self) -> Float[Array, "n_out n_in"]:
        """g W, the slope of the preactivation."""
        return self.weight if self.gain == 1 else self.gain * self.weight

    @property
    def matrix(self) -> Float[Array, "n_out n_in"]:
        """The matrix of a layer without activation, x ↦ (s g W + 1) x + s b; 1 only with a skip."""
        product = self.effective_weight
        scaled = product if self.scale == 1 else self.scale * product
        return scaled + jnp.eye(len(scaled), dtype=scaled.dtype) if self.skip else scaled

    def preactivation(self, *given: Float[Array, "..."]) -> Float[Array, " n_out"]:
        """Compute the preactivation g W x + b; x is all units given, one after the other."""
        x = given[0].ravel() if len(given) == 1 else jnp.concatenate([x.ravel() for x in given])
        z = matmul(self.weight, x)
        z = z if self.gain == 1 else self.gain * z
        return z if self.bias is None else z + self.bias

    def output(
        self, x: Float[Array, "..."], activated: Float[Array, " n_out"]
    ) -> Float[Array, " n_out"]:
        """Compute what the layer predicts from x, given what the activation made of it."""
        scaled = activated if self.scale == 1 else self.scale * activated
        return x.ravel() + scaled if self.skip else scaled

    def __call__(self, *given: Float[Array, "..."]) -> Float[Array, " n_out"]:
        return self.output(given[0], self.activation(self.preactivation(*given)))


def _one_weight(weight: Numbers) -> Array:
    """The weight, or those of several sources side by side."""
    if not (isinstance(weight, list | tuple) and weight and all(np.ndim(w) == 2 for w in weight)):
        return as_float_array(weight, "weight")
    arrays = [as_float_array(w, f"weight {i}") for i, w in enumerate(weight, start=1)]
    if len({len(array) for array in arrays}) > 1:
        raise ShapeError(
            f"the weights of one prediction have the shapes {[x.shape for x in arrays]}: as many "
            "rows are needed, one for each unit that is predicted"
        )
    dtype = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([x.astype(dtype) for x in arrays], axis=1)


class Network(eqx.Module):
    """A chain of layers; layer l predicts the activities x_l from x_{l-1}, l = 1 … L.

    The attribute `widths` holds n_0 … n_L.

    **Arguments:**

    - `layers`: one callable `(n_{l-1},) → (n_l,)` for each prediction, a `pcdyn.Dense` or any
      equinox module.
    - `input_width`: n_0, needed only where the first layer is not a `Dense`.
    - `nodes`: the names of the layers of activities 0 … L, by which they can be asked for then.

    **Raises:**

    - `ShapeError` where layers do not fit together, `GraphError` for names that are none.
    - `DtypeError` for a layer that changes the dtype of activities.
    """

    layers: tuple[Any, ...]
    widths: tuple[int, ...] = eqx.field(static=True)
    nodes: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        input_width: int | None = None,
        nodes: Sequence[str] | None = None,
    ):
        layers = as_sequence(layers, "layers", "a list of layers such as pcdyn.Dense")
        if not layers:
            raise ShapeError("a network needs at least one layer")
        for index, layer in enumerate(layers, start=1):
            wanted = "a function of an array, such as a pcdyn.Dense"
            check_callable(layer, f"layer {index}", wanted)
        self.layers = in_one_dtype(tuple(as_part(layer) for layer in layers), "layer")
        self.widths = _widths(self.layers, input_width)
        self.nodes = None if nodes is None else _checked_names(nodes, len(self.widths))

    def named(self, activities: Sequence[Any]) -> Activities:
        """Let activities be asked for by the names of their layers, where these have names."""
        if self.nodes is None:
            return tuple(activities)
        return NamedActivities(activities, self.nodes, tuple((n,) for n in self.widths))

    @property
    def depth(self) -> int:
        """Number L of predictions; there are L + 1 layers of activities."""
        return len(self.layers)

    @property
    def dtype(self) -> np.dtype:
        """Floating-point dtype of the weights."""
        return dtype_of(self.layers)

    @property
    def targets(self) -> tuple[int, ...]:
        """Index of the layer that each prediction is of: 1 … L."""
        return tuple(range(1, self.depth + 1))

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the layers that each prediction is given: the one below."""
        return tuple((index,) for index in range(self.depth))

    def predict_from(
        self, index: int, given: Sequence[Float[Values, "*batch n_in"]], by: Layer | None = None
    ) -> Float[Array, "*batch n_out"]:
        """Predict the layer l = `index` from its sources, as `predict`, or `by` another one."""
        return apply_layer(self.layers[index - 1] if by is None else by, *given)

    def with_layers(self, layers: Sequence[Any]) -> Network:
        """Return the same network with other functions in place of those that predict."""
        return eqx.tree_at(lambda n: n.layers, self, tuple(layers))

    def predict(self, index: int, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        """Predict the layer l = `index` from the activities x_{l-1}, any batch: μ_l."""
        return apply_layer(self.layers[index - 1], x)

    def feedforward(self, input: Float[Array, "*batch n_0"]) -> Activities:
        """Compute the activities x_0 … x_L of a feedforward pass (Theorem 3.1)."""
        self.check_one()
        if self.depth <= MOST_WRITTEN_OUT:
            return _feedforward(self, input)
        runs = [list(run) for _, run in itertools.groupby(self.layers, structure_of)]
        # A single layer's width may change, which a loop does not allow.
        stacked = [run[0] if len(run) == 1 else stack(run) for run in runs]
        climbed = _feedforward_in_runs(stacked, [len(run) > 1 for run in runs], input)
        return (input, *[x for run in climbed for x in _rows(run)])

    def check_one(self) -> None:
        """Raise `ShapeError` for the stacked weights of several networks."""
        if any(isinstance(layer, Dense) and layer.weight.ndim != 2 for layer in self.layers):
            raise ShapeError(
                "the network holds the weights of several networks: map over them with "
                "equinox.filter_vmap, or take one with jax.tree.map(lambda x: x[0], network)"
            )


def _checked_names(nodes: Sequence[str], count: int) -> tuple[str, ...]:
    names = as_sequence(nodes, "nodes", "a list of names", error=GraphError)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != count:
        raise GraphError(f"nodes must be {count} different names, one for each layer, got {names}")
    return tuple(names)


def dtype_of(layers: tuple[Any, ...]) -> np.dtype:
    """The floating-point dtype of the arrays of layers, JAX's default if there are none."""
    arrays = (x for x in jax.tree.leaves(layers) if eqx.is_inexact_array(x))
    first = next(arrays, None)
    return jnp.zeros(()).dtype if first is None else first.dtype


def in_one_dtype(layers: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """Layers, each called `what`, with all their arrays in the widest of their dtypes."""
    arrays, rest = eqx.partition(layers, eqx.is_inexact_array)
    dtypes = {array.dtype for array in jax.tree.leaves(arrays)}
    for index, layer in enumerate(arrays, start=1):
        for array in jax.tree.leaves(layer):
            check_dtype(array.dtype, f"dtype of {what} {index}")
    if len(dtypes) < 2:
        return layers
    return eqx.combine(jax.tree.map(lambda x: x.astype(np.float64), arrays), rest)


def apply_layer(layer: Layer, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
    """What a layer predicts from activities of shape `(*batch, n_in)`."""
    return jnp.vectorize(layer, signature="(n)->(m)")(x)


@eqx.filter_jit
def _feedforward(network: Network, input: Array) -> Activities:
    activities = [input]
    for index in range(1, network.depth + 1):
        activities.append(network.predict(index, activities[-1]))
    return tuple(activities)


# Of deeper networks, consecutive layers of one kind run in a loop, which XLA compiles once. It runs
# slower than layers that are written out.
MOST_WRITTEN_OUT = 16


@eqx.filter_jit
def _feedforward_in_runs(runs: list[Any], is_stacked: list[bool], input: Array) -> list[Array]:
    """The activities x_1 … x_L, those of each run of equal layers stacked."""

    def climb(x: Array, arrays: PyTree, static: PyTree) -> tuple[Array, Array]:
        x = apply_layer(eqx.combine(arrays, static), x)
        return x, x

    x, found = input, []
    for run, several in zip(runs, is_stacked, strict=True):
        arrays, static = eqx.partition(run, eqx.is_array)
        if several:
            x, activities = jax.lax.scan(functools.partial(climb, static=static), x, arrays)
        else:
            x, activities = climb(x, arrays, static)
            activities = activities[None]
        found.append(activities)
    return found


def _rows(run: Array) -> list[Array]:
    if is_traced(run):
        return [run[index] for index in range(len(run))]
    # On the host, where nothing need be compiled.
    return [jnp.asarray(x) for x in np.asarray(run)]


def structure_of(part: PyTree) -> tuple[object, ...]:
    """What layers share that one loop can run."""
    arrays, static = eqx.partition(part, eqx.is_array)
    leaves, tree = jax.tree.flatten(arrays)
    return [(x.shape, x.dtype) for x in leaves], tree, static


def stack(parts: list[Tree]) -> Tree:
    """Layers of one structure as one, each array with their axis first."""
    arrays = [eqx.filter(part, eqx.is_array) for part in parts]
    static = eqx.filter(parts[0], eqx.is_array, inverse=True)
    xp = host_namespace(arrays)
    return eqx.combine(jax.tree.map(lambda *each: xp.stack(each), *arrays), static)


def _widths(layers: tuple[Layer, ...], input_width: int | None) -> tuple[int, ...]:
    first = layers[0]
    if input_width is not None:
        input_width = checked_integer(input_width, "input_width", at_least=1, error=ShapeError)
    if isinstance(first, Dense):
        expected = first.weight.shape[-1]
        if input_width not in (None, expected):
            raise ShapeError(f"input_width is {input_width}, but layer 1 takes {expected}")
        input_width = expected
    if input_width is None:
        raise ShapeError("give input_width: the first layer is not a pcdyn.Dense")
    widths = [input_width]
    for index, layer in enumerate(layers, start=1):
        widths.append(_output_width(layer, index, widths[-1]))
    return tuple(widths)


def _output_width(layer: Layer, index: int, width: int) -> int:
    arrays = jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
    dtype = jnp.result_type(*arrays) if arrays else jnp.zeros(()).dtype
    probe = jax.ShapeDtypeStruct((width,), dtype)
    try:
        output: Any = eqx.filter_eval_shape(layer, probe)
    # What a layer of the user does with an array that it did not expect is its own affair.
    except Exception as error:
        raise ShapeError(
            f"layer {index} does not accept the {width} activities of layer {index - 1}: "
            f"{type(error).__name__}: {error}"
        ) from error
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) != 1 or 0 in shape:
        raise ShapeError(
            f"layer {index} must return one vector of predictions, got {output}; flatten its output"
        )
    if output.dtype != dtype:
        raise DtypeError(
            f"layer {index} turns activities of dtype {dtype} into predictions of {output.dtype}: "
            "let it keep their dtype"
        )
    return shape[0]


Initialisation = Literal["fan_in", "orthogonal"]
Parameterisation = Literal["standard", "ntp", "mupc"]


def mlp(
    widths: Sequence[int],
    *,
    activation: str | Activation,
    key: PRNGKeyArray,
    std: float | None = None,
    initialisation: Initialisation | None = None,
    output_activation: str | Activation | None = None,
    bias: bool = False,
    residual: bool = False,
    parameterisation: Parameterisation = "standard",
    dtype: DTypeLike | None = None,
) -> Network:
    """Draw a network of `Dense` layers with random weights.

    **Arguments:**

    - `widths`: n_0 … n_L.
    - `activation`: of every layer, except the last one if `output_activation` is given.
    - `key`: for the weights.
    - `std`: the standard deviation of Gaussian weights (never the variance: the paper's "variance
      .05" is `std=.05**.5`).
    - `initialisation`: in place of `std`, `"fan_in"` (Gaussian with standard deviation 1/√n_{l-1},
      the default) or `"orthogonal"`.
    - `output_activation`: that of the last layer.
    - `bias`: whether layers have a bias, which starts at zero.
    - `residual`: whether hidden layers as wide as the hidden layer below have a skip.
    - `parameterisation`: how the size of weights is split into what is learned and what is not.
      `"standard"`: all of it is learned. `"ntp"`: weights are √n_{l-1} times as large, and their
      product with activities is multiplied by 1/√n_{l-1}. `"mupc"`: the same, with 1/n_{L-1} at the
      output, and layers with a skip have a scale of 1/√L (μPC, Innocenti et al. 2025, after
      depth-μP; there the weights stand outside of the activation).
    - `dtype`: of the weights, JAX's default unless given.

    **Raises:**

    - `ShapeError` for widths that are no positive integers, or of which no two neighbours among the
      hidden layers are equal where skips are asked for.
    - `SizeError` for a network that does not fit into memory.
    - `DtypeError` for a dtype that is neither float32 nor float64, and `ActivationError` for an
      unknown activation.
    - `InputError` for an unknown initialisation or parameterisation, or one of them given together
      with `std`.
    """
    wanted = "a list of two or more positive integers"
    widths = tuple(
        checked_integer(n, f"widths[{index}]", at_least=1, at_most=2**31 - 1, error=ShapeError)
        for index, n in enumerate(as_sequence(widths, "widths", wanted, error=ShapeError))
    )
    if len(widths) < 2:
        raise ShapeError(f"widths must be {wanted}, got {list(widths)}")
    check_key(key)
    check_flag(bias, "bias")
    check_flag(residual, "residual")
    check_choice(parameterisation, "parameterisation", get_args(Parameterisation))
    if std is not None and initialisation is not None:
        raise InputError("give std or initialisation, not both: std already says what to draw")
    if std is not None:
        std = checked_number(std, "std", at_least=0)
        if parameterisation != "standard":
            raise InputError(
                f"give std or parameterisation={parameterisation!r}, not both: the latter already "
                "says how large weights are"
            )
    depth = len(widths) - 1
    skips = [residual and 1 < l < depth and widths[l - 1] == widths[l] for l in range(1, depth + 1)]
    if residual and not any(skips):
        raise ShapeError(
            f"residual: no two neighbouring hidden layers of {_shortened(widths)} are of one width"
        )
    initialisation = "fan_in" if initialisation is None else initialisation
    check_choice(initialisation, "initialisation", get_args(Initialisation))
    dtype = jnp.zeros(()).dtype if dtype is None else _checked_dtype(dtype)
    hidden = get_activation(activation)
    last = hidden if output_activation is None else get_activation(output_activation)
    shapes = tuple((n_out, n_in) for n_in, n_out in itertools.pairwise(widths))
    size = dtype.itemsize * sum(float(n_out) * n_in for n_out, n_in in shapes)
    check_size(size, f"a network of widths {_shortened(widths)}")
    drawn = _draw_weights(key, std, shapes, initialisation, dtype)
    weights = [w for run in drawn for w in (_rows(run) if run.ndim == 3 else [run])]
    layers = []
    for index, (weight, skip) in enumerate(zip(weights, skips, strict=True), start=1):
        is_last, gain, scale = index == depth, 1.0, 1.0
        if parameterisation != "standard":
            below = widths[index - 1]
            weight = weight * math.sqrt(below)
            gain = 1 / below if is_last and parameterisation == "mupc" else 1 / math.sqrt(below)
        if skip and parameterisation == "mupc":
            scale = 1 / math.sqrt(depth)
        layers.append(
            Dense(
                weight, jnp.zeros(len(weight), dtype) if bias else None,
                last if is_last else hidden, scale=scale, gain=gain, skip=skip,
            )
        )  # fmt: skip
    return Network(layers)


def _checked_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        known = jnp.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise DtypeError(f"dtype is no dtype: {error}; use float32 or float64") from None
    check_dtype(known, "dtype")
    return known


def _shortened(widths: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, widths[:8]))
    return f"({shown}, …)" if len(widths) > 8 else f"({shown})"


# One program for all layers: its start-up is a part of every first trajectory.
@functools.partial(jax.jit, static_argnames=("shapes", "initialisation", "dtype"))
def _draw_weights(
    key: PRNGKeyArray,
    std: Scalar | None,
    shapes: tuple[tuple[int, int], ...],
    initialisation: str,
    dtype: np.dtype,
) -> list[Array]:
    if std is not None:
        draw = jax.nn.initializers.normal(std)
    elif initialisation == "orthogonal":
        draw = jax.nn.initializers.orthogonal()
    else:
        scaling = jax.nn.initializers.variance_scaling
        draw = scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
    keys, weights = jr.split(key, len(shapes)), []
    for shape, group in itertools.groupby(shapes):
        length = len(list(group))
        run, keys = keys[:length], keys[length:]
        if length <= MOST_WRITTEN_OUT:
            weights += [draw(k, shape, dtype) for k in run]
        else:
            weights.append(jax.lax.map(functools.partial(draw, shape=shape, dtype=dtype), run))
    return weights
