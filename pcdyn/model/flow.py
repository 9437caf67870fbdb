"""What `pcdyn.simulate` integrates: a state and its vector field, which may depend on time."""

# No postponed annotations here: equinox sees an abstract field only as a value.

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, ArrayLike, PyTree

from pcdyn._support.arrays import as_float_array, check_dtype, converted
from pcdyn._support.checks import as_sequence, check_instance
from pcdyn._support.namespaces import array_namespace
from pcdyn._support.states import layer_norms
from pcdyn._support.types import Activities, Numbers, Scalar, State, Tree, Values
from pcdyn.errors import DtypeError, InputError, ShapeError

# Some flow of inference, of which the same kind comes back.
_Sampled = TypeVar("_Sampled", bound="SampledFlow")


class Flow(eqx.Module):
    """What `pcdyn.simulate` integrates: `dx/dt = vector_field(t, x)` from `initial_state`.

    A flow of one's own is one class with these two methods; docs/flows.md has examples. All other
    members have defaults, which suit a state whose arrays are the layers of activities themselves
    and of which nothing more is known. `pcdyn.simulate`, `pcdyn.compare`,
    `pcdyn.convergence_order` and `pcdyn.stability` take every flow; `pcdyn.InferenceProblem` and
    the flows of `pcdyn.learning` are some.

    The state is a tuple of arrays of one dtype, float32 or float64. Their last axis is over units
    and is summed over in norms; an axis before it, which all have or none, is over the samples of
    a batch. Time is in units of the activity time constant.
    """

    @abc.abstractmethod
    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return the state to start from, checked.

        `initial` is that of `pcdyn.simulate`, where `"feedforward"`, the default, stands for the
        start that is natural for the flow. See `checked_state`.
        """

    @abc.abstractmethod
    def vector_field(self, t: Scalar, state: State) -> State:
        """Compute the time derivative of the state at time t, shaped like the state."""

    @property
    def dtype(self) -> np.dtype:
        """Floating-point dtype of the state: that of the arrays of the flow, if it has any."""
        arrays = jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array))
        return jnp.result_type(*arrays) if arrays else jnp.zeros(()).dtype

    @property
    def free_layers(self) -> tuple[int, ...]:
        """Indices of the layers of `activities` that move; all of them unless overridden."""
        return tuple(range(len(self.activities(self.initial_state()))))

    @property
    def outputs(self) -> tuple[int, ...]:
        """Where the energies of the output stand, the last place unless overridden."""
        return (-1,)

    @property
    def targets(self) -> tuple[int, ...] | None:
        """Indices of the layers that the prediction errors of `observe` are of.

        `None`, unless overridden, is as many as there are, up to the last layer.
        """
        return None

    def prepared(self) -> "Flow":
        """Compute what is constant during a run; returns the flow itself unless overridden."""
        return self

    def activities(self, state: State) -> Activities:
        """Return all layers at a state, or at several with a leading axis.

        Layers that do not move need not have that axis. Unless overridden it is the state itself.
        """
        return state

    def state_of(self, activities: Sequence[Values]) -> State:
        """Return the state of given `activities`, their free layers, if nothing else moves."""
        return tuple(activities[index] for index in self.free_layers)

    def activities_along(self, times: Values, states: State) -> Activities:
        """Return all layers at several times, whose axis is the first.

        Unless overridden they are those of `activities`, whatever the times.
        """
        layers = self.activities(states)
        xp = array_namespace(times)
        each = [
            xp.broadcast_to(xp.asarray(x), (len(times), *x.shape))
            if index not in self.free_layers
            else xp.asarray(x)
            for index, x in enumerate(layers)
        ]
        # With the names of nodes, if they have any.
        return jax.tree.unflatten(jax.tree.structure(layers), each)

    def moving(self, state: State) -> dict[str, PyTree]:
        """Return what moves besides activities, by name, at a state or at several.

        Nothing unless overridden.
        """
        return {}

    def observe(self, t: Scalar, state: State) -> tuple[Activities, Array]:
        """Compute the prediction errors ε_1 … ε_L, and the energies E_1 … E_L on the last axis.

        Empty unless overridden.
        """
        return (), jnp.zeros((*state[0].shape[:-1], 0), state[0].dtype)

    def free_energy(self, state: State) -> Array:
        """Compute what never rises along the flow, per sample or in all; 0 unless overridden.

        A fixed step that lets it rise has the status `UNSTABLE_STEP`.
        """
        return jnp.zeros((), state[0].dtype)

    def norms(self, state: State) -> Array:
        """Compute the Euclidean norm of each array of a state, per sample."""
        return layer_norms(state)

    def checked_state(self, initial: str | Sequence[Numbers], default: State) -> State:
        """Return `default` for `"feedforward"`, otherwise `initial`, shaped like `default`.

        **Raises:**

        - `InputError` for any other name.
        - `ShapeError`, `DtypeError` or `NonFiniteError` for arrays that do not fit.
        """
        name = type(self).__name__
        if isinstance(initial, str):
            if initial == "feedforward":
                return default
            raise InputError(
                f"unknown initial state {initial!r} of {name}: leave it out, or give a state"
            )
        wanted = f"a state of {name}, {len(default)} arrays"
        given = as_sequence(initial, "initial", wanted)
        arrays = [as_float_array(x, f"array {i} of initial") for i, x in enumerate(given)]
        shapes, needed = [x.shape for x in arrays], [x.shape for x in default]
        if shapes != needed:
            raise ShapeError(f"initial must be {wanted} of shapes {needed}, got {shapes}")
        return tuple(converted(x, y.dtype, "initial") for x, y in zip(arrays, default, strict=True))


class SampledFlow(Flow):
    """A flow of inference, of which the samples of a batch do not meet."""

    @abc.abstractmethod
    def sample(self: _Sampled, index: ArrayLike) -> _Sampled:
        """Take one sample of a batch (an index), or several (an array of indices)."""

    def map_samples(self, function: Callable[..., Tree], *trees: PyTree) -> Tree:
        """Map a function over the flow of each sample and its rows of `trees`, sample first."""
        count = jax.tree.leaves(trees)[0].shape[0]
        each = jnp.arange(count)
        return eqx.filter_vmap(lambda index, *rows: function(self.sample(index), *rows))(
            each, *trees
        )


class FlowOfProblem(Flow):
    """A flow whose layers are those of its `problem`, such as one in which weights move as well."""

    problem: eqx.AbstractVar[Any]

    @property
    def dtype(self) -> np.dtype:
        return self.problem.dtype

    @property
    def free_layers(self) -> tuple[int, ...]:
        return self.problem.free_layers

    @property
    def targets(self) -> tuple[int, ...] | None:
        return self.problem.targets

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.problem.outputs


def check_flow(flow: Flow) -> None:
    """Raise the named error for what is no flow, or one in a dtype that JAX is not set to."""
    check_instance(flow, "problem", Flow, "a pcdyn.InferenceProblem or another pcdyn.Flow")
    check_dtype(flow.dtype, f"dtype of the {type(flow).__name__}")


def check_contract(flow: Flow, state: State) -> None:
    """Raise `ShapeError` or `DtypeError` where a flow's members do not fit each other at a state.

    Nothing is computed: the members are traced once.
    """
    name = type(flow).__name__
    if any(x.dtype != flow.dtype for x in state):
        raise DtypeError(
            f"{name}.dtype is {flow.dtype}, but its initial_state has {[x.dtype for x in state]}"
        )
    shapes = [x.shape for x in state]
    if len({shape[:-1] for shape in shapes}) != 1 or not all(0 < len(s) < 3 for s in shapes):
        raise ShapeError(
            f"{name}.initial_state must be a tuple of arrays with an axis of units, and before it "
            f"one of the same samples or none, got shapes {shapes}"
        )
    now, rate = jax.eval_shape(lambda s: (s, flow.vector_field(_time(flow), s)), state)
    if now != rate:
        raise ShapeError(
            f"{name}.vector_field must return what is shaped like the state, {now}, not {rate}"
        )
    one = jax.eval_shape(flow.activities, state)
    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), state)
    layers = jax.eval_shape(flow.activities, several)
    free = flow.free_layers
    if any(i >= len(layers) or layers[i].shape != (2, *one[i].shape) for i in free):
        raise ShapeError(
            f"{name}.activities must give the layers {free}, which {name}.free_layers names, with "
            f"the axis that a state has before all others: shapes {[x.shape for x in layers]} for "
            f"states of shapes {[x.shape for x in several]}"
        )


def _time(flow: Flow) -> Array:
    return jnp.zeros((), flow.dtype)


def depends_on_time(field: Callable[[Scalar, State], State], t: Scalar, state: State) -> bool:
    """Whether a vector field makes any use of the time that it is given."""
    program = jax.make_jaxpr(field)(t, state).jaxpr
    return dce_jaxpr(program, [True] * len(program.outvars))[1][0]
