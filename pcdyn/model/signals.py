"""What changes in time: stimuli, precisions and time constants as functions of time."""

# No postponed annotations here: equinox sees an abstract field only as a value.
import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from pcdyn._support.arrays import as_float_array, as_host_array, is_traced
from pcdyn._support.types import Numbers, Scalar
from pcdyn.errors import InputError, ShapeError, TimesError


class BaseSignal(eqx.Module):
    """Base of what changes in time: numbers, arrays or energies at each time t ≥ 0.

    - `jumps`: the times at which it, or a derivative, jumps. At a jump the value is that after it.
    """

    jumps: eqx.AbstractVar[tuple[float, ...]]

    @abc.abstractmethod
    def __call__(self, t: Scalar) -> Any:  # noqa: ANN401
        """Evaluate it at time t."""

    @abc.abstractmethod
    def sample(self, index: ArrayLike) -> "BaseSignal":
        """Take one sample (an index) or several (an array of indices) of a signal for a batch."""

    @property
    def degree(self) -> int | None:
        """Degree of the polynomial of time that it is between jumps, `None` if it is none."""
        return None

    @property
    def end(self) -> float:
        """Time up to which it is known."""
        return math.inf


def holds_signal(*values: object) -> bool:
    """Whether any of the values is a signal, or a list or a dictionary that holds one."""
    inside = [
        *values,
        *(x for value in values if isinstance(value, Mapping) for x in value.values()),
        *(x for value in values if isinstance(value, list | tuple) for x in value),
    ]
    return any(isinstance(x, BaseSignal) for x in inside)


class Signal(BaseSignal):
    """A function of time as a signal.

    **Arguments:**

    - `function`: from a time, in units of the activity time constant, to an array or an energy. JAX
      traces it; it knows the time in the dtype of the network.
    - `jumps`: increasing times at which it or one of its derivatives jumps. Solvers step exactly
      onto them. Of jumps that are not named they know nothing: they take many small steps there.

    **Raises:**

    - `TimesError` for jumps that are no increasing times.
    - `InputError` for what is no function.
    """

    function: Callable[[Scalar], Any]
    jumps: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, function: Callable[[Scalar], Any], jumps: Sequence[float] = ()):
        if not callable(function):
            raise InputError(
                f"function must be a function of time, got {type(function).__name__}; arrays at "
                "given times make a pcdyn.PiecewiseConstant or a pcdyn.PiecewiseLinear"
            )
        self.function = function
        none = isinstance(jumps, list | tuple) and not jumps
        self.jumps = () if none else _increasing(jumps, "jumps")

    def __call__(self, t: Scalar) -> Any:  # noqa: ANN401
        """Evaluate the function at time t."""
        return self.function(t)

    def sample(self, index: ArrayLike) -> "Signal":
        """The function of which one sample or several are taken."""
        return Signal(_SampleOf(self.function, jnp.asarray(index)), self.jumps)


class _SampleOf(eqx.Module):
    """A function of time, one sample or several of its values."""

    function: Callable[[Scalar], Any]
    index: Array

    def __call__(self, t: Scalar) -> Array:
        return jnp.asarray(self.function(t))[self.index]


class _OnGrid(BaseSignal):
    """Values at given times: `values` has them on the first axis of its arrays."""

    values: eqx.AbstractVar[PyTree]

    def sample(self, index: ArrayLike) -> "_OnGrid":
        """The same of one sample or several, whose axis is that after the times."""
        return eqx.tree_at(
            lambda s: s.values, self, jax.tree.map(lambda x: x[:, index], self.values)
        )


class PiecewiseConstant(_OnGrid):
    """Values that hold from given times on, the last one for ever.

    **Arguments:**

    - `times`: increasing, shape `(k,)`, the first of them 0 or before, in units of the activity
      time constant.
    - `values`: one for each time: an array of shape `(k, …)`, or a list of k energies of one kind.

    **Raises:**

    - `TimesError` for other times, and `ShapeError` for another number of values.
    - `DtypeError`, `NonFiniteError` or `InputError` for values that are no numbers or energies.
    """

    jumps: tuple[float, ...] = eqx.field(static=True)
    values: PyTree

    def __init__(self, times: Numbers, values: Any):  # noqa: ANN401
        self.jumps = _grid(times, at_least=1)
        self.values = _values(values, len(self.jumps))

    def __call__(self, t: Scalar) -> Any:  # noqa: ANN401
        """The value of the last of the times that is not after t."""
        index = _place(self.jumps, t)
        return jax.tree.map(lambda x: x[index], self.values)

    @property
    def degree(self) -> int:
        return 0


class PiecewiseLinear(_OnGrid):
    """Values at given times, and straight lines between them.

    **Arguments:**

    - `times`: increasing, shape `(k,)` with k ≥ 2, the first of them 0 or before; the last is the
      end of the signal.
    - `values`: as for `pcdyn.PiecewiseConstant`.

    **Raises:**

    - As `pcdyn.PiecewiseConstant` does.
    """

    jumps: tuple[float, ...] = eqx.field(static=True)
    values: PyTree

    def __init__(self, times: Numbers, values: Any):  # noqa: ANN401
        self.jumps = _grid(times, at_least=2)
        self.values = _values(values, len(self.jumps))

    def __call__(self, t: Scalar) -> Any:  # noqa: ANN401
        """The value on the line between the two times around t."""
        index = jnp.minimum(_place(self.jumps, t), len(self.jumps) - 2)

        def between(x: Array) -> Array:
            times = jnp.asarray(self.jumps, x.dtype)
            share = (jnp.asarray(t, x.dtype) - times[index]) / (times[index + 1] - times[index])
            return (1 - share) * x[index] + share * x[index + 1]

        return jax.tree.map(between, self.values)

    @property
    def degree(self) -> int:
        return 1

    @property
    def end(self) -> float:
        return self.jumps[-1]


class Interpolated(_OnGrid):
    """A smooth curve through values at given times: a cubic spline, twice differentiable.

    **Arguments:**

    - `times`, `values`: as for `pcdyn.PiecewiseLinear`; the values are arrays, and known.

    **Raises:**

    - As `pcdyn.PiecewiseConstant` does, and `InputError` for values that JAX traces.
    """

    values: PyTree
    times: tuple[float, ...] = eqx.field(static=True)
    jumps: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, times: Numbers, values: Numbers):
        from scipy.interpolate import CubicSpline

        self.times, self.jumps = _grid(times, at_least=2), ()
        known = _values(values, len(self.times))
        if is_traced(known):
            raise InputError(
                "the values of a pcdyn.Interpolated must be known, but JAX traces these: make the "
                "signal before jax.jit or jax.vmap, or take a pcdyn.PiecewiseLinear"
            )
        # Time first and the powers after it, the highest first.
        pieces = CubicSpline(self.times, np.asarray(known, float)).c
        self.values = jnp.asarray(np.moveaxis(pieces, 0, -1), known.dtype)

    def __call__(self, t: Scalar) -> Array:
        """The value on the curve at time t."""
        x = self.values
        index = jnp.minimum(_place(self.times, t), len(self.times) - 2)
        since = jnp.asarray(t, x.dtype) - jnp.asarray(self.times, x.dtype)[index]
        pieces = x[index]
        value = pieces[..., 0]
        for power in range(1, pieces.shape[-1]):
            value = value * since + pieces[..., power]
        return value

    @property
    def end(self) -> float:
        return self.times[-1]


def _place(times: tuple[float, ...], t: Scalar) -> Array:
    """The index of the last of the times that is not after t, 0 before the first."""
    time = jnp.asarray(t)
    index = jnp.searchsorted(jnp.asarray(times, time.dtype), time, side="right")
    return jnp.maximum(index - 1, 0)


def _increasing(times: Numbers, name: str) -> tuple[float, ...]:
    array = as_host_array(times, name, error=TimesError)
    if array.ndim != 1 or array.size == 0:
        raise TimesError(f"{name} must be a vector of times, got shape {array.shape}")
    if np.any(np.diff(array) <= 0):
        where = int(np.argmax(np.diff(array) <= 0))
        raise TimesError(
            f"{name} must increase, but {array[where]:g} is followed by {array[where + 1]:g}: sort "
            "them and drop repeats"
        )
    return tuple(array.tolist())


def _grid(times: Numbers, *, at_least: int) -> tuple[float, ...]:
    found = _increasing(times, "times of the signal")
    if len(found) < at_least:
        raise TimesError(f"the signal needs {at_least} times at least, got {len(found)}")
    if found[0] > 0:
        raise TimesError(
            f"the signal begins at {found[0]:g}, but it is needed from 0 on: let its first time be "
            "0 or before"
        )
    return found


def _values(values: Any, count: int) -> PyTree:  # noqa: ANN401
    """The values as a tree of arrays with the time on the first axis."""
    is_list = isinstance(values, list | tuple) and len(values) > 0
    if is_list and all(isinstance(x, eqx.Module) for x in values):
        kinds = {jax.tree.structure(x) for x in values}
        if len(kinds) > 1:
            raise InputError(
                "the values of a signal must be of one kind, with the same settings, and each with "
                "a precision or none: got "
                f"{', '.join(sorted({type(x).__name__ for x in values}))}"
            )
        leaves = zip(*map(jax.tree.leaves, values), strict=True)
        stacked = [_stacked(each) for each in leaves]
        found: PyTree = jax.tree.unflatten(kinds.pop(), stacked)
        length = len(values)
    else:
        found = as_float_array(values, "values of the signal")
        length = found.shape[0] if found.ndim else 0
    if length != count:
        raise ShapeError(f"the signal has {count} times, but {length} values: one for each time")
    return found


def _stacked(each: tuple[Any, ...]) -> Array:
    arrays = [as_float_array(x, "values of the signal") for x in each]
    if len({x.shape for x in arrays}) > 1:
        raise ShapeError(
            f"the values of a signal must have one shape, got {[x.shape for x in arrays]}"
        )
    return jnp.stack(arrays)
