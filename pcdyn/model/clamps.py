"""What is clamped: whole nodes, or some units of them."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pcdyn._support.arrays import as_float_array, as_host_array, converted, is_traced
from pcdyn._support.namespaces import host_namespace
from pcdyn._support.types import Numbers, Values
from pcdyn.errors import DtypeError, InputError, NonFiniteError, ShapeError


class Partial(eqx.Module):
    """Some units of a node clamped, the others free: missing pixels, a cue, a lesion.

    **Arguments:**

    - `values`: of the node, for one sample or a batch; where the mask is false they play no part
      and may be NaN.
    - `mask`: true where a unit is clamped, of the shape of the node, or of `values` where samples
      differ.

    **Raises:**

    - `ShapeError` for a mask that does not fit, `DtypeError` for one that is not of booleans.
    - `NonFiniteError` for values that are clamped and not finite.
    - `InputError` for a mask that is traced, for the size of the state depends on it.
    """

    values: Float[Array, "..."]
    mask: Bool[Array, "..."] | np.ndarray

    def __init__(self, values: Numbers, mask: Numbers):
        if is_traced(mask):
            raise InputError("a mask must be known: the size of the state depends on it")
        self.mask = np.asarray(mask)
        if self.mask.dtype != bool:
            raise DtypeError(f"mask must be of booleans, true where clamped, got {self.mask.dtype}")
        array, xp = values, jnp
        if not is_traced(values):
            array, xp = as_host_array(values, "values", finite=False), np
        shape = np.shape(array)
        if self.mask.size == 0 or self.mask.shape not in (shape, shape[1:]):
            raise ShapeError(
                f"mask has shape {self.mask.shape}, but values {shape}: give the shape of the node "
                "or, where samples differ, of the values"
            )
        whole = np.broadcast_to(self.mask, shape)
        self.values = as_float_array(xp.where(whole, array, xp.zeros_like(array)), "values")


class PartlyClamped(eqx.Module):
    """Values of a node, and which of its units are free.

    `free` are their indices, in order. Where samples differ `shared` is false, and those with fewer
    free units than others are filled up with the index n, which is no unit, where `padded` is true.
    `order` says where each unit stands in the values with the free ones after them.
    """

    values: Float[Values, "*batch n"]
    free: Int[Values, "*batch free"]
    order: Int[Values, "*batch n"]
    shared: bool = eqx.field(static=True)
    padded: bool = eqx.field(static=True)

    def fill(self, free: Float[Values, "*more free"]) -> Float[Values, "*more n"]:
        """Put the activities of free units among those that are clamped."""
        return _gathered((self.values, free), self.order)

    def take(self, activities: Float[Values, "*more n"]) -> Float[Values, "*more free"]:
        """Take the activities of the free units, 0 where there is no unit."""
        nothing = host_namespace(activities).zeros_like(activities[..., :1])
        return _gathered((activities, nothing), self.free)

    def columns(self, matrix: Float[Array, "rows n"]) -> Float[Array, "rows free"]:
        """Take the columns of the free units of one sample, 0 where there is no unit."""
        index = self.free if self.free.ndim == 1 else self.free[0]
        return matrix.at[:, index].get(mode="fill", fill_value=0)

    @property
    def mask(self) -> Bool[np.ndarray, "*batch n"]:
        """True where a unit is clamped, as `Partial` takes it."""
        return np.asarray(self.order) < self.values.shape[-1]

    def missing(self) -> Float[Values, "*batch free"]:
        """Say where there is no unit, by ones."""
        return (self.free == self.values.shape[-1]).astype(self.values.dtype)


def _gathered(parts: tuple[Values, Values], index: Values) -> Values:
    """The entries at `index` of both parts side by side, by NumPy where they are known."""
    xp = host_namespace((*parts, index))
    leading = np.broadcast_shapes(*(x.shape[:-1] for x in (*parts, index)))
    first, last, index = (
        xp.broadcast_to(xp.asarray(x), (*leading, x.shape[-1])) for x in (*parts, index)
    )
    return xp.take_along_axis(xp.concatenate([first, last], axis=-1), index, axis=-1)


# What a node is clamped to, if it is.
Clamp = Values | PartlyClamped | None


def clamped(value: object, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Clamp:
    """What a user clamps a node to, checked, as rows of its units; free ones are `None`."""
    if value is None or isinstance(value, PartlyClamped):
        return value
    if not isinstance(value, Partial):
        array: Any = value
        try:
            array = as_float_array(array, name)
        except NonFiniteError as error:
            hint = "where units are not known, clamp the others with pcdyn.Partial(values, mask)"
            raise NonFiniteError(f"{error}; {hint}") from error
        return _rows(array, name, shape, dtype)
    values = _rows(value.values, name, shape, dtype)
    mask = np.broadcast_to(np.asarray(value.mask), value.values.shape).reshape(values.shape)
    if mask.all():
        return values
    size = values.shape[-1]
    rows = [np.flatnonzero(~row) for row in mask.reshape(-1, size)]
    most = max(len(row) for row in rows)
    free = np.full((len(rows), most), size)
    order = np.broadcast_to(np.arange(size), (len(rows), size)).copy()
    for filled, place, row in zip(free, order, rows, strict=True):
        filled[: len(row)] = row
        place[row] = size + np.arange(len(row))
    batch = values.shape[:-1]
    return PartlyClamped(
        values,
        jnp.asarray(free.reshape(*batch, most)),
        jnp.asarray(order.reshape(*batch, size)),
        shared=bool((free == free[:1]).all()),
        padded=bool((free == size).any()),
    )


def _rows(array: Array, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """An array of the shape of a node, or of its units, as `(n,)` or `(batch, n)`."""
    size, axes = math.prod(shape), len(shape)
    if array.shape[array.ndim - axes :] == shape and array.ndim - axes in (0, 1):
        array = array.reshape(*array.shape[: array.ndim - axes], size)
    if array.ndim not in (1, 2) or array.shape[-1] != size:
        raise ShapeError(
            f"{name} has shape {array.shape}, but the network needs {shape} for one sample or "
            f"{('batch', *shape)}".replace("'batch'", "batch")
        )
    if array.shape[0] == 0:
        raise ShapeError(f"{name} has an empty batch")
    return converted(array, dtype, name)
