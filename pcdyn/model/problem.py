"""A network, an energy and clamped layers: the state, its free energy and its gradient flow."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

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
from pcdyn.errors import GraphError, InputError, ShapeError
from pcdyn.model.clamps import Clamp, Partial, PartlyClamped, clamped
from pcdyn.model.energies.energy import (
    Energy,
    in_dtype,
    naming_layer,
    one_per_prediction,
    output_loss,
    residual_energy,
)
from pcdyn.model.energies.precision import Precision
from pcdyn.model.flow import SampledFlow
from pcdyn.model.graph import Graph, Prediction
from pcdyn.model.named import index_of
from pcdyn.model.network import Dense, Network
from pcdyn.model.prior import Prior
from pcdyn.model.signals import holds_signal

# In `equinox.tree_at` it can be anything.
if TYPE_CHECKING:
    import matplotlib.artist
    import matplotlib.axes

    _End = Array | None
else:
    _End = Any
# Some flow of inference, of which the same kind comes back.
_Flow = TypeVar("_Flow", bound="InferenceFlow")


class InferenceFlow(SampledFlow):
    """`τ dx/dt = −∂F/∂x` of samples that do not meet, each with clamped data of its own."""

    @property
    @abc.abstractmethod
    def data(self) -> tuple[Clamp, ...]:
        """What is clamped, in order, the sample on the first axis of each array of a batch."""

    @property
    @abc.abstractmethod
    def state_time_constants(self) -> tuple[Values, ...]:
        """Time constant τ of every array of a state: one number, or one for each unit."""

    @abc.abstractmethod
    def with_data(self: _Flow, *data: Numbers | Clamp) -> _Flow:
        """Return the same with other clamped data, such as one sample of a batch."""

    @abc.abstractmethod
    def gradient(self, state: State) -> State:
        """Compute ∂F/∂x, shaped like `state`, whatever the time constants."""

    def vector_field(self, t: Scalar, state: State) -> State:
        """Compute dx/dt = −(1/τ) ∂F/∂x, shaped like `state`; it does not depend on time."""
        return _velocity(self, state)

    def without_padding(self, state: State) -> State:
        """Return the state with 0 where it has no unit; the state itself unless overridden."""
        return state

    def sample(self: _Flow, index: ArrayLike) -> _Flow:
        """Take one sample of a batch (an index), or several (an array of indices)."""
        return self.with_data(*jax.tree.map(lambda x: x[index], self.data))

    def map_samples(self, function: Callable[..., Tree], *trees: PyTree) -> Tree:
        """Map a function over the problem of each sample and its rows of `trees`, sample first."""

        def one(data: tuple[Clamp, ...], *rows: PyTree) -> Tree:
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

    - `network`: predictions of the layers l = 1 … L, or of the nodes of a `pcdyn.Graph`.
    - `input`: the activities x_0 to clamp, shape `(n_0,)` or `(batch, n_0)`; `None` leaves the
      input free.
    - `output`: the target to clamp x_L to, shape `(n_L,)` or `(batch, n_L)`; `None` leaves the
      output free.
    - `clamp`: what else is clamped, or all of it: a dictionary from the names of nodes, of a chain
      the numbers of layers, to values or a `pcdyn.Partial`.
    - `energy`: from prediction errors to energies, one for all predictions or a list with one for
      each l = 1 … L; `pcdyn.Gaussian` with unit precision unless given. The attribute is the tuple
      of L energies.
    - `prior`: on a free input, a `pcdyn.Prior`; none unless given.
    - `time_constants`: one positive number τ_l for each layer l = 0 … L (those of clamped layers
      play no part), of a graph a dictionary by node; 1 unless given. Time is in units of the
      activity time constant.

    **Raises:**

    - `ShapeError`, `DtypeError` or `NonFiniteError` for data that do not fit.
    - `InputError` for what is no energy or does not fit, time constants that are not positive, a
      prior on a clamped input, and a network without hidden layers of which both ends are clamped.
    """

    graph: Network | Graph
    clamp: tuple[Clamp, ...]
    energy: tuple[Energy, ...]
    prior: Prior | None
    time_constants: tuple[Float[Array, ""], ...]
    first_prediction: Float[Array, "*batch n_1"] | None

    def __init__(
        self,
        network: Network | Graph,
        *,
        input: Numbers | None = None,
        output: Numbers | None = None,
        clamp: Mapping[Any, Numbers | Partial] | None = None,
        energy: Energy | Sequence[Energy] | None = None,
        prior: Prior | None = None,
        time_constants: Sequence[Numbers] | Mapping[str, Numbers] | None = None,
    ):
        if holds_signal(input, output, clamp, energy, time_constants):
            raise InputError(
                "this problem would change in time: give the same arguments to a "
                "pcdyn.DrivenProblem, which takes signals"
            )
        wanted = "a pcdyn.Network or a pcdyn.Graph"
        check_instance(network, "network", Network | Graph, wanted)
        check_dtype(network.dtype, "dtype of the network")
        values = _by_node(network, clamp, {"input": input, "output": output})
        if isinstance(network, Graph) and prior is not None:
            raise InputError(
                'a graph has its priors among its predictions: pcdyn.Prediction("node", by=mean, '
                "energy=prior.energy)"
            )
        is_chain = _only_ends(values)
        if isinstance(network, Network) and not is_chain:
            network, energy, prior = as_graph(network, energy, prior), None, None
        elif isinstance(network, Graph) and is_chain:
            chain = network.as_chain(_energies(network, energy), free=values[0] is None)
            network, energy, prior = chain or (network, energy, prior)
        self.graph = network.without_energies() if isinstance(network, Graph) else network
        self.clamp = data = _clamped_nodes(values, network)
        self.energy = energies = in_dtype(_energies(network, energy), network.dtype)
        # Of the module that is being made equinox makes a method slowly: functions instead.
        for node, each in zip(network.targets, energies, strict=True):
            with naming_layer(_node_name(network, node)):
                each.check(network.widths[node], _target(data[node]))
        self.prior = None if prior is None else _checked_prior(prior, data, network)
        self.time_constants = _checked_time_constants(time_constants, network)
        self.first_prediction = None

    @property
    def network(self) -> Network:
        """The chain of layers; `GraphError` for a graph, and for a chain clamped inside."""
        if isinstance(self.graph, Network):
            return self.graph
        raise GraphError(
            "this is known for a chain of layers alone, a pcdyn.Network with nothing but its ends "
            "clamped, and the problem is of a graph"
        )

    @property
    def is_chain(self) -> bool:
        """Whether it is of a `pcdyn.Network` with nothing but its ends clamped."""
        return isinstance(self.graph, Network)

    @property
    def input(self) -> _End:
        """Clamped input of a chain, `None` if it is free; `GraphError` as `network` raises it."""
        return self._ends[0]

    @property
    def output(self) -> _End:
        """Clamped output of a chain, `None` if it is free; `GraphError` as `network` raises it."""
        return self._ends[1]

    @property
    def _ends(self) -> tuple[_End, _End]:
        depth, clamp = self.network.depth, cast(Any, self.clamp)
        return clamp[0], clamp[depth]

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> list[matplotlib.artist.Artist]:
        """Draw who predicts whom and what is clamped; see `pcdyn.plotting.problem`."""
        # plotting stands above this module: importing it here keeps matplotlib out of start-up.
        import pcdyn

        return pcdyn.plotting.problem(self, ax=ax)

    @property
    def dtype(self) -> np.dtype:
        """Floating-point dtype of the weights, and so of everything."""
        return self.graph.dtype

    @property
    def free_layers(self) -> tuple[int, ...]:
        """Indices of the layers or nodes that make up the state, in whole or in part."""
        is_free = (x is None or isinstance(x, PartlyClamped) for x in self.clamp)
        return tuple(index for index, free in enumerate(is_free) if free)

    @property
    def free_widths(self) -> tuple[int, ...]:
        """Number of units of each array of the state."""
        return tuple(self._free_width(index) for index in self.free_layers)

    def _free_width(self, index: int) -> int:
        value = self.clamp[index]
        return value.free.shape[-1] if isinstance(value, PartlyClamped) else self.widths[index]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of units of each layer or node."""
        return self.graph.widths

    @property
    def predicted_layers(self) -> tuple[int, ...]:
        """Indices of the predictions: 1 … L, and 0 if there is a prior; of a graph 1 … K."""
        return tuple(range(0 if self.prior is not None else 1, len(self.energy) + 1))

    @property
    def targets(self) -> tuple[int, ...]:
        """Indices of the layers or nodes that the prediction errors are of."""
        return tuple(map(self.target_node, self.predicted_layers))

    @property
    def outputs(self) -> tuple[int, ...]:
        """Where the energies of the output stand: −1, the last, in a chain.

        In a graph the places of all predictions of what is clamped, in whole or in part.
        """
        if self.is_chain:
            return (-1,)
        each = enumerate(self.graph.targets)
        return tuple(place for place, node in each if self.clamp[node] is not None)

    def target_node(self, index: int) -> int:
        """Index of the layer or node that the prediction `index` is of, l for l in a chain."""
        return 0 if index == 0 else self.graph.targets[index - 1]

    def target_name(self, index: int) -> str:
        """Name of the node that the prediction `index` is of, or of the layer."""
        return self.node_name(self.target_node(index))

    def node_name(self, node: int) -> str:
        """Name a layer or a node in messages."""
        return _node_name(self.graph, node)

    @property
    def batch_shape(self) -> tuple[int, ...] | None:
        """Shape `()` for one sample, `(batch,)` for a batch, `None` if nothing is clamped."""
        arrays = [x for x in jax.tree.leaves(self.clamp) if eqx.is_inexact_array(x)]
        return arrays[0].shape[:-1] if arrays else None

    @property
    def data(self) -> tuple[Clamp, ...]:
        """Clamped input and output, `None` for an end that is free; of a graph `clamp`."""
        return (self.input, self.output) if self.is_chain else self.clamp

    @property
    def both_ends_clamped(self) -> bool:
        """Whether both the input and the output are clamped."""
        return self.input is not None and self.output is not None

    @property
    def state_time_constants(self) -> tuple[Float[Array, ""], ...]:
        """Time constants τ_l of the free layers."""
        return tuple(self.time_constants[index] for index in self.free_layers)

    def with_data(self, *data: Numbers | Partial | Clamp) -> InferenceProblem:
        """Return the same problem with other clamped data, such as one sample of a batch.

        **Arguments:**

        - `data`: the input and the output of a chain, `None` for an end that is free; of a graph
          what each node is clamped to, in the order of `clamp`.

        **Raises:**

        - As the constructor does, for data that do not fit.
        """
        if len(data) != len(self.data):
            wanted = "the input and the output" if self.is_chain else "one for each node"
            raise InputError(f"{len(data)} data were given: give {wanted}, None where free")
        inside = [None] * (len(self.clamp) - 2)
        values = [data[0], *inside, data[1]] if self.is_chain else list(data)
        clamp = _clamped_nodes(values, self.graph)
        if self.prior is not None and clamp[0] is not None:
            raise InputError(_PRIOR_IGNORED)
        return eqx.tree_at(
            lambda p: (p.clamp, p.first_prediction), self, (clamp, None),
            is_leaf=lambda x: x is None,
        )  # fmt: skip

    def repeated(self, count: int) -> InferenceProblem:
        """Return the problem of one sample as a batch of `count` equal ones."""
        return self.with_data(
            *jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), self.data)
        )

    def with_layers(self, layers: Sequence[Any]) -> InferenceProblem:
        """Return the same problem with other functions in place of those that predict."""
        return eqx.tree_at(lambda p: p.graph, self, self.graph.with_layers(layers))

    def prepared(self) -> InferenceProblem:
        """Put μ_1 = f(W_1 d + b_1) into `first_prediction` where the input is clamped.

        It is for one network and its data: prepare again after putting in others.
        """
        if not self.is_chain or self.input is None:
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
        """Return all layers x_0 … x_L: free ones from `state`, clamped ones from the data.

        Those of a graph are a `pcdyn.NamedActivities`.
        """
        free, layers = iter(state), []
        for value in self.clamp:
            if value is None:
                layers.append(next(free))
            else:
                is_partial = isinstance(value, PartlyClamped)
                layers.append(value.fill(next(free)) if is_partial else value)
        return self.graph.named(layers)

    def state_of(self, activities: Sequence[Values]) -> State:
        """Return the state of given activities: those of their units that are free."""
        state = []
        for index in self.free_layers:
            value = self.clamp[index]
            x = activities[index]
            state.append(value.take(x) if isinstance(value, PartlyClamped) else x)
        return tuple(state)

    @compiled
    def prediction_errors(self, activities: Activities) -> Activities:
        """Compute ε_l = x_l − f_l(W_l x_{l−1} + b_l) for l = 1 … L, any leading axes.

        With a prior ε_0 = x_0 − m comes before them.
        """
        errors = []
        if self.prior is not None:
            errors.append(activities[0] - jnp.broadcast_to(self.prior.mean, activities[0].shape))
        for index in range(1, len(self.energy) + 1):
            errors.append(self.prediction_error(index, activities))
        return tuple(errors)

    def prediction_error(self, index: int, activities: Sequence[Values]) -> Array:
        """Compute the error of prediction `index`, counted from 1: ε_l in a chain."""
        here, sources = activities[self.target_node(index)], self.graph.sources[index - 1]
        if index == 1 and self.first_prediction is not None:
            return here - self.first_prediction
        prediction = self.graph.predict_from(index, [activities[i] for i in sources])
        return here - (prediction if sources else jnp.broadcast_to(prediction, here.shape))

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
        self, errors: Sequence[Array], activities: Sequence[Values]
    ) -> Float[Array, "*batch L"]:
        """Compute E_1 … E_L on the last axis, from ε_1 … ε_L and x_0 … x_L."""
        each = zip(self.predicted_layers, errors, strict=True)
        energies = [self.layer_energy(i, e, activities[self.target_node(i)]) for i, e in each]
        return jnp.stack(energies, axis=-1)

    def energy_of(self, index: int) -> Energy:
        """Return the energy of layer l = `index`, that of the prior for 0."""
        if index > 0:
            return self.energy[index - 1]
        if self.prior is None:
            raise InputError("layer 0 has no energy: there is no prior on the input")
        return self.prior.energy

    def layer_energy(self, index: int, error: Array, activity: Values | None = None) -> Array:
        """Compute E_l of layer l = `index` for its prediction error, per sample.

        `activity`, x_l, is for energies that depend on more than the error.
        """
        target = self.target_of(index) if activity is None else jnp.asarray(activity)
        return self.energy_of(index).value(error, target)

    def weighted_error(self, index: int, error: Array, activity: Values | None = None) -> Array:
        """Compute ∂E_l/∂ε_l of layer l = `index`: Π_l ε_l where the energy is Gaussian.

        It is −∂E_l/∂μ_l. `activity`, x_l, is for energies that depend on more than the error.
        """
        target = self.target_of(index) if activity is None else jnp.asarray(activity)
        return self.energy_of(index).gradient(error, target)

    def weighted_errors(self, errors: Sequence[Array], activities: Sequence[Values]) -> list[Array]:
        """Compute ∂E_1/∂ε_1 … ∂E_L/∂ε_L from ε_1 … ε_L and x_0 … x_L, or the first of them."""
        each = zip(self.predicted_layers, errors, strict=False)
        return [self.weighted_error(i, e, activities[self.target_node(i)]) for i, e in each]

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
        """Return what prediction `index` has as its target where that is clamped, else `None`.

        Of a chain it is the clamped output.
        """
        return None if index == 0 else _target(self.clamp[self.target_node(index)])

    @compiled
    def free_energy(self, state: State) -> Float[Array, "*batch"]:
        """Compute the free energy F = Σ_l E_l of each sample."""
        return jnp.sum(self.layer_energies(state), axis=-1)

    @compiled
    def output_loss(self, state: State) -> Float[Array, "*batch"]:
        """Compute the output loss of each sample: ℒ = E_L, of a graph the energies of `outputs`."""
        return output_loss(self.layer_energies(state), self.outputs)

    @compiled
    def residual_energy(self, state: State) -> Float[Array, "*batch"]:
        """Compute Ẽ = F − ℒ of each sample, the energy of all other predictions."""
        return residual_energy(self.layer_energies(state), self.outputs)

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
        if input is None and isinstance(self.graph, Graph):
            return self.state_of(_passed(self, self.graph))
        x: Any
        if input is not None:
            x = clamped(input, "input", self.network.widths[:1], self.network.dtype)
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
        return tuple(jnp.zeros(shape, self.dtype) for shape in shapes)

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
        drawn = (std * jr.normal(k, n, self.dtype) for k, n in zip(keys, shapes, strict=True))
        return self.without_padding(tuple(drawn))

    def without_padding(self, state: State) -> State:
        """Return the state with 0 where a sample has no unit, because fewer of its own are free."""
        tidy = []
        for index, x in zip(self.free_layers, state, strict=True):
            value = self.clamp[index]
            if isinstance(value, PartlyClamped) and value.padded:
                x = jnp.where(value.missing() > 0, 0, x)
            tidy.append(x)
        return tuple(tidy)

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return the state `"feedforward"` or `"zeros"`, or a given one, checked.

        **Raises:**

        - `InputError` for an unknown name.
        - `ShapeError`, `DtypeError` or `NonFiniteError` for a state that does not fit.
        """
        self.graph.check_one()
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
            name = f"initial state of {self.node_name(index)}"
            array = as_float_array(value, name)
            width = self._free_width(index)
            batch = array.shape[:-1] if self.batch_shape is None else self.batch_shape
            if array.shape != (*batch, width) or array.ndim > 2 or array.size == 0:
                raise ShapeError(
                    f"{name} has shape {array.shape}, but {(*batch[:1], width)} is needed"
                )
            arrays.append(converted(array, self.dtype, name))
        if len({array.shape[:-1] for array in arrays}) != 1:
            raise ShapeError("all layers of a state must have the same batch size")
        return self.without_padding(tuple(arrays))

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
        shapes = [(*batch, width) for width in self.free_widths]
        size = self.dtype.itemsize * sum(map(math.prod, shapes))
        check_size(size, f"a state of {batch[0] if batch else 1} samples")
        return shapes


@compiled
def _passed(problem: InferenceProblem, graph: Graph) -> Activities:
    return graph.feedforward(problem.clamp, problem.batch_shape or ())[0]


def check_problem(problem: InferenceProblem) -> None:
    """Raise `InputError` unless `problem` is one of inference, in a dtype that JAX is set to."""
    check_inference(problem)
    check_dtype(problem.dtype, "dtype of the problem")


def check_inference(problem: InferenceProblem) -> None:
    """Raise `InputError` unless `problem` is one of inference that does not change in time."""
    if isinstance(problem, SampledFlow) and not isinstance(problem, InferenceFlow):
        raise InputError(
            f"this {type(problem).__name__} changes in time, and what does not is needed: take the "
            "problem of one time, problem.at(t)"
        )
    check_instance(problem, "problem", InferenceProblem, "a pcdyn.InferenceProblem")


def _by_node(
    network: Network | Graph, clamp: Mapping[Any, Any] | None, ends: Mapping[str, Any]
) -> list[Any]:
    """What each layer or node is clamped to, as given."""
    values: list[Any] = [None] * len(network.widths)
    for name, value in ends.items():
        if value is not None and isinstance(network, Graph):
            raise GraphError(f'a graph has no {name} of its own: give clamp={{"node": {name}}}')
        values[0 if name == "input" else -1] = value
    if clamp is None:
        return values
    wanted = "a dictionary from nodes, of a chain the numbers of layers, to values"
    check_instance(clamp, "clamp", Mapping, wanted)
    for key, value in clamp.items():
        if isinstance(network, Graph):
            node = index_of(key, network.nodes)
        else:
            what = "each layer of clamp"
            node = checked_integer(key, what, at_least=0, at_most=network.depth, error=GraphError)
        if values[node] is not None:
            raise InputError(f"layer {key} is clamped twice, by clamp= and as an end")
        values[node] = value
    return values


def _node_name(graph: Network | Graph, node: int) -> str:
    return repr(graph.nodes[node]) if isinstance(graph, Graph) else f"layer {node}"


def _target(clamp: Clamp) -> Any:  # noqa: ANN401
    """What a node is clamped to as a whole."""
    return None if isinstance(clamp, PartlyClamped) else clamp


def _only_ends(values: Sequence[Any]) -> bool:
    """Whether nothing but whole ends is clamped."""
    inside = any(value is not None for value in values[1:-1])
    return not inside and not any(isinstance(x, Partial) for x in (values[0], values[-1]))


def as_graph(
    network: Network, energy: Energy | Sequence[Energy] | None = None, prior: Prior | None = None
) -> Graph:
    """Write a chain as a graph, whose nodes are called "0" … "L" unless layers have names."""
    energies = one_per_prediction(energy, network.depth)
    names = network.nodes or tuple(map(str, range(network.depth + 1)))
    each = zip(itertools.pairwise(names), network.layers, energies, strict=True)
    predictions = [
        Prediction(above, given=below, by=layer, energy=mine)
        for (below, above), layer, mine in each
    ]
    if prior is not None:
        check_instance(prior, "prior", Prior, "a pcdyn.Prior")
        mean = converted(prior.mean, network.dtype, "mean of the prior")
        predictions.insert(0, Prediction(names[0], by=mean, energy=prior.energy))
    return Graph(dict(zip(names, network.widths, strict=True)), predictions)


def _energies(
    network: Network | Graph, energy: Energy | Sequence[Energy] | None
) -> tuple[Energy, ...]:
    """One energy for each prediction: its own, or that of the problem."""
    if isinstance(network, Network):
        return one_per_prediction(energy, network.depth)
    own = [each.energy for each in network.predictions]
    given = one_per_prediction(energy, len(own))
    if isinstance(energy, list | tuple) and any(mine is not None for mine in own):
        raise InputError("predictions have energies of their own: give one for the rest, no list")
    found = []
    for mine, other in zip(own, given, strict=True):
        found.extend([other] if mine is None else mine.per_prediction(1))
    return tuple(found)


def _clamped_nodes(values: Sequence[Any], network: Network | Graph) -> tuple[Clamp, ...]:
    """All that is clamped, checked, in the dtype of the network."""
    if isinstance(network, Graph):
        names, shapes = [f"clamp[{name!r}]" for name in network.nodes], network.shapes
    else:
        names = ["input", *[f"layer {l}" for l in range(1, network.depth)], "output"]
        shapes = tuple((width,) for width in network.widths)
    found: dict[str, Clamp] = {}
    for name, value, shape in zip(names, values, shapes, strict=True):
        found[name] = clamped(value, name, shape, network.dtype)
    batches = {name: jax.tree.leaves(x)[0].shape for name, x in found.items() if x is not None}
    if len({shape[:-1] for shape in batches.values()}) > 1:
        listed = " and ".join(f"{name} of shape {shape}" for name, shape in batches.items())
        raise ShapeError(f"{listed} do not have the same batch size")
    clamp = tuple(found.values())
    if not any(x is None or isinstance(x, PartlyClamped) for x in clamp):
        what = (
            "both ends of a network without hidden layers are clamped"
            if isinstance(network, Network)
            else "all units of all nodes are clamped"
        )
        raise InputError(f"nothing to infer: {what}")
    return clamp


_PRIOR_IGNORED = (
    "a prior on a clamped input would be ignored: leave the input free, or the prior out"
)


def _checked_prior(prior: Prior, clamp: tuple[Clamp, ...], network: Network | Graph) -> Prior:
    """The prior with one mean for each unit, all in the dtype of the network."""
    check_instance(prior, "prior", Prior, "a pcdyn.Prior")
    if clamp[0] is not None:
        raise InputError(_PRIOR_IGNORED)
    width, mean = network.widths[0], converted(prior.mean, network.dtype, "mean of the prior")
    if mean.shape not in ((), (width,)):
        raise ShapeError(
            f"the mean of the prior has shape {mean.shape}, but the input has {width} units: give "
            f"a number or ({width},)"
        )
    with naming_layer("layer 0"):
        energy, *_ = in_dtype(prior.energy.per_prediction(1), network.dtype)
        energy.check(width, None)
    return Prior(jnp.broadcast_to(mean, (width,)), energy)


def _checked_time_constants(
    values: Sequence[Numbers] | Mapping[str, Numbers] | None, network: Network | Graph
) -> tuple[Float[Array, ""], ...]:
    count = len(network.widths)
    if isinstance(values, Mapping) and network.nodes is not None:
        for name in values:
            index_of(name, network.nodes)
        values = [values.get(name, 1.0) for name in network.nodes]
    if values is None:
        return tuple(jnp.ones((), network.dtype) for _ in range(count))
    is_chain = isinstance(network, Network)
    each = "layer l = 0 … L" if is_chain else "node"
    wanted = f"a list with one positive number for each {each}"
    values = as_sequence(values, "time_constants", wanted)
    if len(values) != count:
        what = "layers; give one for each l = 0 … L" if is_chain else "nodes"
        raise ShapeError(f"{len(values)} time constants for {count} {what}")
    arrays = tuple(
        converted(as_float_array(v, "time constant"), network.dtype, "time constant")
        for v in values
    )
    if any(a.ndim for a in arrays):
        raise ShapeError(f"time_constants must be {wanted}, got shapes {[a.shape for a in arrays]}")
    if not is_traced(arrays) and any(float(a) <= 0 for a in arrays):
        raise InputError(f"time constants must be positive, got {[float(a) for a in arrays]}")
    return arrays
