"""Elementwise activations that know their inverse and their open range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pcdyn._support.checks import as_sequence, check_callable, check_instance, checked_number
from pcdyn._support.functions import ByName, reference, referred
from pcdyn.errors import ActivationError

Elementwise = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Activation:
    """An elementwise function f with, where they exist, its inverse and open range.

    A target propagation target exists only for values strictly inside `(lower, upper)`, the set
    on which `inverse` is the unique preimage (for ReLU, the positive numbers).

    Calling an activation applies it. Two activations are equal, and share compiled code, when
    they hold the same functions: build a custom one once and reuse it. Those of pcdyn pickle by
    their name; a custom one pickles where its functions do, that is, with a `def` of their own at
    the top of a module.

    **Arguments:**

    - `name`: for messages.
    - `function`: f, applied to arrays of any shape.
    - `inverse`: f⁻¹, or `None` if f is not injective.
    - `lower`, `upper`: the ends of the open range.
    - `kinks`: the points where the derivative jumps.

    **Raises:**

    - `ActivationError` for what is no function, an empty range or a kink that is no number.
    """

    name: str
    function: Elementwise
    inverse: Elementwise | None = None
    lower: float = -math.inf
    upper: float = math.inf
    kinks: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_instance(self.name, "name of an activation", str, "a text", error=ActivationError)
        for name in ("function", "inverse"):
            if name == "function" or self.inverse is not None:
                what = f"{name} of activation {self.name!r}"
                check_callable(
                    getattr(self, name), what, "a function of an array", error=ActivationError
                )
        for name in ("lower", "upper"):
            what = f"{name} of activation {self.name!r}"
            if not _is_infinite(getattr(self, name)):
                checked_number(getattr(self, name), what, error=ActivationError)
        wanted = "a tuple of the points where the derivative jumps"
        kinks = as_sequence(self.kinks, "kinks", wanted, error=ActivationError)
        kinks = tuple(checked_number(x, "each of kinks", error=ActivationError) for x in kinks)
        # A tuple, for activations are compared and hashed.
        object.__setattr__(self, "kinks", kinks)
        if not self.lower < self.upper:
            raise ActivationError(
                f"activation {self.name!r} has the empty range ({self.lower}, {self.upper}); "
                "lower must be below upper"
            )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.function(x)

    def in_range(self, y: Float[Array, "..."]) -> Array:
        """Return whether each entry lies strictly inside the open range, shaped like `y`."""
        return (y > self.lower) & (y < self.upper)

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"

    def __deepcopy__(self, memo: object) -> Activation:
        return self

    def __reduce__(self) -> tuple[Callable[..., Activation], tuple[object, ...]]:
        # Functions of JAX are jitted objects, which pickle does not find under their name.
        if _BY_NAME.get(self.name) == self:
            return get_activation, (self.name,)
        function, inverse = reference(self.function), self.inverse and reference(self.inverse)
        return _activation, (self.name, function, inverse, self.lower, self.upper, self.kinks)


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _softplus_inverse(y: Array) -> Array:
    # log(expm1(y)) overflows for large y; this form does not.
    return y + jnp.log(-jnp.expm1(-y))


def _identity(x: Array) -> Array:
    return x


identity = Activation("identity", _identity, _identity)
tanh = Activation("tanh", jnp.tanh, jnp.arctanh, -1.0, 1.0)
sigmoid = Activation("sigmoid", jax.nn.sigmoid, jax.scipy.special.logit, 0.0, 1.0)
relu = Activation("relu", jax.nn.relu, _identity, 0.0, kinks=(0.0,))
softplus = Activation("softplus", jax.nn.softplus, _softplus_inverse, 0.0)


@dataclasses.dataclass(frozen=True)
class _TwoSlopes:
    """x for positive x, and slope·x for others; equal slopes are equal functions."""

    slope: float

    def __call__(self, x: Array) -> Array:
        return jnp.where(x > 0, x, self.slope * x)


@dataclasses.dataclass(frozen=True)
class _TwoSlopesInverse:
    """The inverse of `_TwoSlopes`."""

    slope: float

    def __call__(self, y: Array) -> Array:
        return jnp.where(y > 0, y, y / self.slope)


def leaky_relu(slope: float = 0.01) -> Activation:
    """Make max(x, slope·x) with 0 < slope < 1, which is invertible on the whole line.

    **Raises:**

    - `ActivationError` for a slope outside (0, 1).
    """
    slope = checked_number(slope, "slope", above=0, below=1, error=ActivationError)
    forward, inverse = _TwoSlopes(slope), _TwoSlopesInverse(slope)
    return Activation(f"leaky_relu({slope:g})", forward, inverse, kinks=(0.0,))


def _activation(
    name: str,
    function: ByName,
    inverse: ByName | None,
    lower: float,
    upper: float,
    kinks: tuple[float, ...],
) -> Activation:
    inverse = inverse and referred(inverse)
    return Activation(name, referred(function), inverse, lower, upper, kinks)


_BY_NAME = {a.name: a for a in (identity, tanh, sigmoid, relu, softplus)}


def name_of(function: Activation | Elementwise) -> str:
    """The name by which `get_activation` finds this activation, or the one of this function.

    **Raises:**

    - `ActivationError` if there is none.
    """
    for name in (*_BY_NAME, "leaky_relu"):
        known = get_activation(name)
        if function in (known, known.function):
            return name
    raise ActivationError(
        f"{function} has no name that a file could hold: use one that pcdyn.mlp knows by name"
    )


def get_activation(activation: str | Activation) -> Activation:
    """Find the activation of that name; an `Activation` is returned as it is.

    **Raises:**

    - `ActivationError` for an unknown name.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation == "leaky_relu":
        return leaky_relu()
    if not isinstance(activation, str) or activation not in _BY_NAME:
        known = ", ".join([*_BY_NAME, "leaky_relu"])
        raise ActivationError(
            f"unknown activation {activation!r}; known are {known}, "
            "or pass pcdyn.Activation(name, function, inverse, lower, upper)"
        )
    return _BY_NAME[activation]
