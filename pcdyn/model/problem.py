"""A network, an energy and clamped layers: the state, its free energy and its gradient flow."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from pcdyn._support.arrays import (
    as_float_array,
    check_dtype,
    check_sharding,
    check_size,
    converted,
    is_traced,
)
from pcdyn._support.checks import (
    as_sequence,
    check_instance,
    check_key,
    checked_integer,
    checked_number,
)
from pcdyn._support.compiling import compiled
from pcdyn._support.types import Activities, Numbers, Scalar, State, Tree, Values
from pcdyn.errors import InputError, ShapeError
from pcdyn.model.energies.energy import Energy, in_dtype, naming_layer, one_per_prediction
from pcdyn.model.energies.precision import Precision
from pcdyn.model.flow import Flow
from pcdyn.model.network import Dense, Network
from pcdyn.model.prior import Prior

# Some flow of inference, of which the same kind comes back.
_Flow = TypeVar("_Flow", bound="InferenceFlow")


class InferenceFlow(Flow):
    """`τ dx/dt = −∂F/∂x` of samples that do not meet, each with clamped data of its own."""

    @property
    @abc.abstractmethod
    def data(self) -> tuple[Values | None, Values | None]:
        """Clamped input and output; `None` for an end that is free."""

    @property
    @abc.abstractmethod
    def state_time_constants(self) -> tuple[Values, ...]:
        """Time constant τ of every array of a state: one number, or one for each unit."""

    @abc.abstractmethod
    def with_data(self: _Flow, input: Values | None, output: Values | None) -> _Flow:
        """Return the same with other clamped data, such as one sample of a batch."""

    @abc.abstractmethod
    def gradient(self, state: State) -> State:
        """Compute ∂F/∂x, shaped like `state`, whatever the time constants."""

    def vector_field(self, t: Scalar, state: State) -> State:
        """Compute dx/dt = −(1/τ) ∂F/∂x, shaped like `state`; it does not depend on time."""
        return _velocity(self, state)

    def sample(self: _Flow, index: ArrayLike) -> _Flow:
        """Take one sample of a batch (an index), or several (an array of indices)."""
        return self.with_data(*jax.tree.map(lambda x: x[index], self.data))

    def map_samples(self, function: Callable[..., Tree], *trees: PyTree) -> Tree:
        """Map a function over the problem of each sample and its rows of `trees`, sample first."""

        def one(data: tuple[Values | None, Values | None], *rows: PyTree) -> Tree:
            return function(self.with_data(*data), *rows)

        return eqx.filter_vmap(one)(self.data, *trees)


@compiled
def _velocity(flow: InferenceFlow, state: State) -> State:
    return tuple(
        -g / jnp.broadcast_to(tau, g.shape)
        for g, tau in zip(flow.gradient(state), flow.state_time_constants, strict=True)
    )


class InferenceProblem(InferenceFlow):
    """Inference in a predictive coding network: `τ_l dx_l/dt = −∂F/∂x_l` for every free layer.

    The *state* is the tuple of free layers from the input to the output, each `(n_l,)` or
    `(batch, n_l)`; *activities* are all layers x_0 … x_L, clamped ones included. The dtype of the
    network's weights is the dtype of everything: data are converted to it. With the input free
    there is no prediction of x_0 unless a prior is given, whose mean then is that prediction: the
    prediction errors are ε_0 … ε_L instead of ε_1 … ε_L, the energies E_0 … E_L. The flow is −∂F/∂x
    by automatic differentiation of the energy (docs/maths.md: Eq 1; Eqs 6 and 30–33 have the sign
    reversed).

    **Arguments:**

    - `network`: predictions of the layers l = 1 … L.
    - `input`: the activities x_0 to clamp, shape `(n_0,)` or `(batch, n_0)`; `None` leaves the
      input free.
    - `output`: the target to clamp x_L to, shape `(n_L,)` or `(batch, n_L)`; `None` leaves the
      output free.
    - `energy`: from prediction errors to energies, one for all predictions or a list with one for
      each l = 1 … L; `pcdyn.Gaussian` with unit precision unless given. The attribute is the tuple
      of L energies.
    - `prior`: on a free input, a `pcdyn.Prior`; none unless given.
    - `time_constants`: one positive number τ_l for each layer l = 0 … L (those of clamped layers
      play no part); 1 unless given. Time is in units of the activity time constant.

    **Raises:**

    - `ShapeError`, `DtypeError` or `NonFiniteError` for data that do not fit.
    - `InputError` for what is no energy or does not fit, time constants that are not positive, a
      prior on a clamped input, and a network without hidden layers of which both ends are clamped.
    """

    network: Network
    input: Float[Array, "*batch n_0"] | None
    output: Float[Array, "*batch n_L"] | None
    energy: tuple[Energy, ...]
    prior: Prior | None
    time_constants: tuple[Float[Array, ""], ...]
    first_prediction: Float[Array, "*batch n_1"] | None

    def __init__(
        self,
        network: Network,
        *,
        input: Numbers | None = None,
        output: Numbers | None = None,
        energy: Energy | Sequence[Energy] | None = None,
        prior: Prior | None = None,
        time_constants: Sequence[Numbers] | None = None,
    ):
        check_instance(network, "network", Network, "a pcdyn.Network")
        check_dtype(network.dtype, "dtype of the network")
        self.network = network
        self.input, self.output = _clamped_layers(input, output, network)
        self.energy = in_dtype(one_per_prediction(energy, network.depth), network.dtype)
        for index, each in enumerate(self.energy, start=1):
            with naming_layer(index):
                each.check(network.widths[index], self.target_of(index))
        self.prior = None if prior is None else _checked_prior(prior, self.input, network)
        self.time_constants = _checked_time_constants(time_constants, network)
        self.first_prediction = None

    @property
    def dtype(self) -> np.dtype:
        """Floating-point dtype of the weights, and so of everything."""
        return self.network.dtype

    @property
    def free_layers(self) -> tuple[int, ...]:
        """Indices l of the layers that make up the state."""
        depth = self.network.depth
        clamped = {0: self.input is not None, depth: self.output is not None}
        return tuple(l for l in range(depth + 1) if not clamped.get(l, False))

    @property
    def predicted_layers(self) -> tuple[int, ...]:
        """Indices l of the layers with a prediction: 1 … L, and 0 if there is a prior."""
        return tuple(range(0 if self.prior is not None else 1, self.network.depth + 1))

    @property
    def batch_shape(self) -> tuple[int, ...] | None:
        """Shape `()` for a single sample, `(batch,)` for a batch, `None` if both ends are free."""
        clamped = self.input if self.input is not None else self.output
        return None if clamped is None else clamped.shape[:-1]

    @property
    def data(self) -> tuple[Values | None, Values | None]:
        """Clamped input and output; `None` for an end that is free."""
        return self.input, self.output

    @property
    def both_ends_clamped(self) -> bool:
        """Whether both the input and the output are clamped."""
        return self.input is not None and self.output is not None

    @property
    def state_time_constants(self) -> tuple[Float[Array, ""], ...]:
        """Time constants τ_l of the free layers."""
        return tuple(self.time_constants[index] for index in self.free_layers)

    def with_data(self, input: Numbers | None, output: Numbers | None) -> InferenceProblem:
        """Return the same problem with other clamped data, such as one sample of a batch.

        **Raises:**

        - As the constructor does, for data that do not fit.
        """
        data = _clamped_layers(input, output, self.network)
        if self.prior is not None and data[0] is not None:
            raise InputError(_PRIOR_IGNORED)
        return eqx.tree_at(
            lambda p: (p.input, p.output, p.first_prediction), self, (*data, None),
            is_leaf=lambda x: x is None,
        )  # fmt: skip

    def prepared(self) -> InferenceProblem:
        """Put μ_1 = f(W_1 d + b_1) into `first_prediction` where the input is clamped.

        It is for one network and its data: prepare again after putting in others.
        """
        if self.input is None:
            return self
        first = self.network.predict(1, self.input)
        return eqx.tree_at(lambda p: p.first_prediction, self, first, is_leaf=lambda x: x is None)

    def with_prior_as_layer(self, state: State | None = None) -> InferenceProblem:
        """Return the same problem with its prior as one more layer, above a clamped input.

        That layer has the prior's mean as its bias and no weights. State, F and flow are the same,
        layer l is layer l + 1, and both ends are clamped if the output is. Without a prior it is
        the problem itself.

        **Arguments:**

        - `state`: whose batch size the clamped input gets, needed where the output is free.
        """
        if self.prior is None:
            return self
        batch = state[0].shape[:-1] if state is not None else self.batch_shape or ()
        mean = self.prior.mean
        first = Dense(jnp.zeros((len(mean), 1), self.dtype), mean)
        return InferenceProblem(
            Network((first, *self.network.layers)),
            input=jnp.zeros((*batch, 1), self.dtype),
            output=self.output,
            energy=(self.prior.energy, *self.energy),
            time_constants=(jnp.ones((), self.dtype), *self.time_constants),
        )

    def activities(self, state: State) -> Activities:
        """Return all layers x_0 … x_L: free ones from `state`, clamped ones from the data."""
        free = iter(state)
        layers = []
        for index in range(self.network.depth + 1):
            if index == 0 and self.input is not None:
                layers.append(self.input)
            elif index == self.network.depth and self.output is not None:
                layers.append(self.output)
            else:
                layers.append(next(free))
        return tuple(layers)

    @compiled
    def prediction_errors(self, activities: Activities) -> Activities:
        """Compute ε_l = x_l − f_l(W_l x_{l−1} + b_l) for l = 1 … L, any leading axes.

        With a prior ε_0 = x_0 − m comes before them.
        """
        errors = []
        if self.prior is not None:
            errors.append(activities[0] - jnp.broadcast_to(self.prior.mean, activities[0].shape))
        for index in range(1, self.network.depth + 1):
            if index == 1 and self.first_prediction is not None:
                prediction = self.first_prediction
            else:
                prediction = self.network.predict(index, activities[index - 1])
            errors.append(activities[index] - prediction)
        return tuple(errors)

    @compiled
    def observe(self, t: Scalar, state: State) -> tuple[Activities, Float[Array, "*batch L"]]:
        """Compute the prediction errors ε_1 … ε_L at a state, and the energies E_1 … E_L.

        With a prior those of layer 0 come first, here as in all that follows.
        """
        activities = self.activities(state)
        errors = self.prediction_errors(activities)
        return errors, self.energies_of(errors, activities)

    @compiled
    def layer_energies(self, state: State) -> Float[Array, "*batch L"]:
        """Compute the energies E_1 … E_L of each sample, on the last axis."""
        return self.observe(0.0, state)[1]

    @compiled
    def energies_of(
        self, errors: Sequence[Array], activities: Sequence[Array]
    ) -> Float[Array, "*batch L"]:
        """Compute E_1 … E_L on the last axis, from ε_1 … ε_L and x_0 … x_L."""
        each = zip(self.predicted_layers, errors, strict=True)
        energies = [self.layer_energy(i, e, activities[i]) for i, e in each]
        return jnp.stack(energies, axis=-1)

    def energy_of(self, index: int) -> Energy:
        """Return the energy of layer l = `index`, that of the prior for 0."""
        if index > 0:
            return self.energy[index - 1]
        if self.prior is None:
            raise InputError("layer 0 has no energy: there is no prior on the input")
        return self.prior.energy

    def layer_energy(self, index: int, error: Array, activity: Array | None = None) -> Array:
        """Compute E_l of layer l = `index` for its prediction error, per sample.

        `activity`, x_l, is for energies that depend on more than the error.
        """
        target = self.target_of(index) if activity is None else activity
        return self.energy_of(index).value(error, target)

    def weighted_error(self, index: int, error: Array, activity: Array | None = None) -> Array:
        """Compute ∂E_l/∂ε_l of layer l = `index`: Π_l ε_l where the energy is Gaussian.

        It is −∂E_l/∂μ_l. `activity`, x_l, is for energies that depend on more than the error.
        """
        target = self.target_of(index) if activity is None else activity
        return self.energy_of(index).gradient(error, target)

    def weighted_errors(self, errors: Sequence[Array], activities: Sequence[Array]) -> list[Array]:
        """Compute ∂E_1/∂ε_1 … ∂E_L/∂ε_L from ε_1 … ε_L and x_0 … x_L, or the first of them."""
        each = zip(self.predicted_layers, errors, strict=False)
        return [self.weighted_error(i, e, activities[i]) for i, e in each]

    def curvature(self, index: int, error: Array) -> Precision | None:
        """Return the precision that stands for ∂²E_l/∂ε_l² of layer l = `index`, of one sample.

        Π_l where the energy is Gaussian, `None` where it is not known.
        """
        return self.energy_of(index).curvature(error, self.target_of(index))

    def output_error(self, prediction: Array) -> Array:
        """Subtract a prediction from the target, T − μ_L; `InputError` if the output is free."""
        if self.output is None:
            raise InputError("there is no output error: this problem's output is free")
        return self.output - prediction

    def target_of(self, index: int) -> Array | None:
        """Return the target of layer l = `index`: the clamped output, or `None` below it."""
        return self.output if index == self.network.depth else None

    @compiled
    def free_energy(self, state: State) -> Float[Array, "*batch"]:
        """Compute the free energy F = Σ_l E_l of each sample."""
        return jnp.sum(self.layer_energies(state), axis=-1)

    @compiled
    def output_loss(self, state: State) -> Float[Array, "*batch"]:
        """Compute the output loss ℒ = E_L of each sample."""
        return self.layer_energies(state)[..., -1]

    @compiled
    def residual_energy(self, state: State) -> Float[Array, "*batch"]:
        """Compute Ẽ = F − ℒ of each sample, the energy of the layers below the output."""
        return jnp.sum(self.layer_energies(state)[..., :-1], axis=-1)

    @compiled
    def gradient(self, state: State) -> State:
        """Compute ∂F/∂x_l of every free layer, shaped like `state`."""

        def total(state: State) -> Float[Array, ""]:
            return jnp.sum(self.free_energy(state))

        return jax.grad(total)(state)

    def feedforward_state(self, input: Numbers | None = None) -> State:
        """Return the state of a feedforward pass from the clamped input, or from the one given.

        With a prior on a free input it is the pass from the prior's mean.

        **Raises:**

        - `InputError` if the input is free without a prior, and none is given.
        """
        if input is not None:
            x = _clamped_layer(input, "input", self.network.widths[0], self.network.dtype)
        elif self.prior is not None:
            mean = self.prior.mean
            x = jnp.broadcast_to(mean, (*(self.batch_shape or ()), *mean.shape))
        else:
            x = self.input
        if x is None:
            raise InputError(
                "the input is free, so that there is no feedforward pass to start from: "
                'start from "zeros", problem.random_state(key), a state of your own, or '
                "problem.feedforward_state(input=…)"
            )
        return self.state_of(self.network.feedforward(x))

    def zeros_state(self, *, batch_size: int | None = None) -> State:
        """Return the state with all free activities zero.

        `batch_size` is for problems with both ends free, as for `random_state`.
        """
        shapes = self._state_shapes(batch_size)
        return tuple(jnp.zeros(shape, self.network.dtype) for shape in shapes)

    def random_state(
        self, key: PRNGKeyArray, *, std: float = 1.0, batch_size: int | None = None
    ) -> State:
        """Draw independent Gaussian activities with mean 0.

        **Arguments:**

        - `key`: for the activities.
        - `std`: their standard deviation.
        - `batch_size`: how many samples; only where both ends are free.

        **Raises:**

        - `InputError` for a `batch_size` where the clamped data have their own.
        - `SizeError` for a state that does not fit into memory.
        """
        check_key(key)
        std = checked_number(std, "std", at_least=0)
        shapes = self._state_shapes(batch_size)
        keys = jr.split(key, len(shapes))
        dtype = self.network.dtype
        return tuple(
            std * jr.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)
        )

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return the state `"feedforward"` or `"zeros"`, or a given one, checked.

        **Raises:**

        - `InputError` for an unknown name.
        - `ShapeError`, `DtypeError` or `NonFiniteError` for a state that does not fit.
        """
        self.network.check_one()
        check_sharding(self)
        if isinstance(initial, str):
            return self._named_state(initial)
        given = as_sequence(
            initial,
            "initial",
            '"feedforward", "zeros" or a state, one array for each free layer (of an Equilibrium '
            "its .state, of a Trajectory problem.state_of(trajectory.final))",
        )
        if len(given) != len(self.free_layers):
            raise ShapeError(
                f"the state has the free layers {self.free_layers}, but {len(given)} arrays "
                "were given; clamped layers are not part of it (see problem.state_of)"
            )
        arrays = []
        for index, value in zip(self.free_layers, given, strict=True):
            array = as_float_array(value, f"initial state of layer {index}")
            width = self.network.widths[index]
            batch = array.shape[:-1] if self.batch_shape is None else self.batch_shape
            if array.shape != (*batch, width) or array.ndim > 2 or array.size == 0:
                raise ShapeError(
                    f"initial state of layer {index} has shape {array.shape}, but "
                    f"{(*batch[:1], width)} is needed"
                )
            arrays.append(converted(array, self.dtype, f"initial state of layer {index}"))
        if len({array.shape[:-1] for array in arrays}) != 1:
            raise ShapeError("all layers of a state must have the same batch size")
        return tuple(arrays)

    def _named_state(self, name: str) -> State:
        if name == "feedforward":
            return self.feedforward_state()
        if name == "zeros":
            return self.zeros_state()
        hint = "use initial=problem.random_state(key)" if name == "random" else "or give a state"
        raise InputError(f'unknown initial state {name!r}: "feedforward", "zeros"; {hint}')

    def _state_shapes(self, batch_size: int | None) -> list[tuple[int, ...]]:
        batch = self.batch_shape
        if batch is None:
            batch = (
                ()
                if batch_size is None
                else (checked_integer(batch_size, "batch_size", at_least=1),)
            )
        elif batch_size is not None:
            raise InputError("batch_size would be ignored: the clamped data have their own")
        shapes = [(*batch, self.network.widths[index]) for index in self.free_layers]
        size = self.dtype.itemsize * sum(map(math.prod, shapes))
        check_size(size, f"a state of {batch[0] if batch else 1} samples")
        return shapes


def check_problem(problem: InferenceProblem) -> None:
    """Raise `InputError` unless `problem` is one of inference, in a dtype that JAX is set to."""
    check_instance(problem, "problem", InferenceProblem, "a pcdyn.InferenceProblem")
    check_dtype(problem.dtype, "dtype of the problem")


def _clamped_layer(value: Numbers | None, name: str, width: int, dtype: np.dtype) -> Array | None:
    if value is None:
        return None
    array = as_float_array(value, name)
    if array.ndim not in (1, 2) or array.shape[-1] != width:
        raise ShapeError(
            f"{name} has shape {array.shape}, but the network needs ({width},) for one sample or "
            f"(batch, {width})"
        )
    if array.shape[0] == 0:
        raise ShapeError(f"{name} has an empty batch")
    return converted(array, dtype, name)


def _clamped_layers(
    input: Numbers | None, output: Numbers | None, network: Network
) -> tuple[Array | None, Array | None]:
    """Both ends, checked, in the dtype of the network."""
    first = _clamped_layer(input, "input", network.widths[0], network.dtype)
    last = _clamped_layer(output, "output", network.widths[-1], network.dtype)
    if first is not None and last is not None:
        if first.shape[:-1] != last.shape[:-1]:
            raise ShapeError(
                f"input of shape {first.shape} and output of shape {last.shape} do not have the "
                "same batch size"
            )
        if network.depth == 1:
            raise InputError(
                "nothing to infer: both ends of a network without hidden layers are clamped"
            )
    return first, last


_PRIOR_IGNORED = (
    "a prior on a clamped input would be ignored: leave the input free, or the prior out"
)


def _checked_prior(prior: Prior, input: Array | None, network: Network) -> Prior:
    """The prior with one mean for each unit, all in the dtype of the network."""
    check_instance(prior, "prior", Prior, "a pcdyn.Prior")
    if input is not None:
        raise InputError(_PRIOR_IGNORED)
    width, mean = network.widths[0], converted(prior.mean, network.dtype, "mean of the prior")
    if mean.shape not in ((), (width,)):
        raise ShapeError(
            f"the mean of the prior has shape {mean.shape}, but the input has {width} units: give "
            f"a number or ({width},)"
        )
    with naming_layer(0):
        energy, *_ = in_dtype(prior.energy.per_prediction(1), network.dtype)
        energy.check(width, None)
    return Prior(jnp.broadcast_to(mean, (width,)), energy)


def _checked_time_constants(
    values: Sequence[Numbers] | None, network: Network
) -> tuple[Float[Array, ""], ...]:
    if values is None:
        return tuple(jnp.ones((), network.dtype) for _ in range(network.depth + 1))
    wanted = "a list with one positive number for each layer l = 0 … L"
    values = as_sequence(values, "time_constants", wanted)
    if len(values) != network.depth + 1:
        raise ShapeError(
            f"{len(values)} time constants for {network.depth + 1} layers; give one for each "
            "l = 0 … L"
        )
    arrays = tuple(
        converted(as_float_array(v, "time constant"), network.dtype, "time constant")
        for v in values
    )
    if any(a.ndim for a in arrays):
        raise ShapeError(f"time_constants must be {wanted}, got shapes {[a.shape for a in arrays]}")
    if not is_traced(arrays) and any(float(a) <= 0 for a in arrays):
        raise InputError(f"time constants must be positive, got {[float(a) for a in arrays]}")
    return arrays
