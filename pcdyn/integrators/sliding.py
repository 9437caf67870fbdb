"""Flows that slide along kinks of the activations, followed by rounding the kinks.

Where the free energy has a valley at a kink, the flow stays in it (Filippov's sliding solution),
and the field jumps from one side to the other: a method with error control takes steps of the size
of its tolerance there. With the slope of the activation made linear over a small width the field is
continuous and stiff, which is what an implicit method is for, and its solution tends to the sliding
one, with an error of the order of the width (Filippov 1988, §8; Sotomayor & Teixeira 1996).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.types import State
from pcdyn.model.activations import Activation
from pcdyn.model.flow import Flow
from pcdyn.model.network import Dense
from pcdyn.model.problem import InferenceProblem


def rounded(problem: Flow, state: State, rtol: float) -> tuple[Flow, float] | None:
    """Round the kinks of a problem; also returns the largest width. `None` if it has no kinks.

    The width is `rtol`, but no less than √eps, of the preactivations that activities as large as
    those at `state` can cause.
    """
    if not isinstance(problem, InferenceProblem):
        return None
    dtype, given = problem.dtype, problem.graph.layers
    kinked = [isinstance(layer, Dense) and bool(layer.activation.kinks) for layer in given]
    if not any(kinked):
        return None
    activity = max(float(jnp.max(jnp.abs(x))) for x in problem.activities(state))
    # Below √eps of the preactivation its own round-off would show in the slope.
    share = max(rtol, float(jnp.finfo(dtype).eps) ** 0.5)
    widths = [
        share * _largest_preactivation(layer, activity) if has_kinks else 0.0
        for layer, has_kinks in zip(given, kinked, strict=True)
    ]
    layers = tuple(
        _Rounded(layer, jnp.asarray(width, dtype)) if width > 0 else layer
        for layer, width in zip(given, widths, strict=True)
    )
    return problem.with_layers(layers), max(widths)


def _largest_preactivation(layer: Dense, activity: float) -> float:
    """How large W x + b gets where every entry of x is at most `activity`, give or take signs."""
    kinks = max(abs(kink) for kink in layer.activation.kinks)
    bias = 0.0 if layer.bias is None else float(jnp.max(jnp.abs(layer.bias)))
    rows = jnp.linalg.norm(layer.effective_weight, axis=1)
    return float(jnp.max(rows)) * activity + bias + kinks


class _Rounded(eqx.Module):
    """A `Dense` layer whose activation has its kinks rounded over `width`."""

    layer: Dense
    width: Array

    def __call__(self, *given: Array) -> Array:
        layer = self.layer
        z = layer.preactivation(*given)
        return layer.output(given[0], _value(layer.activation, z, self.width))


# The preactivation and the width; a value and its derivative.
_Pair = tuple[Array, Array]


# The value is the activation's own, for rounding would change it by no more than the width; the
# slope is a mean slope, and the curvature that of the slope.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(activation: Activation, z: Array, width: Array) -> Array:
    return activation(z)


@_value.defjvp
def _value_jvp(activation: Activation, primals: _Pair, tangents: _Pair) -> _Pair:
    (z, width), (dz, _) = primals, tangents
    return _value(activation, z, width), _slope(activation, z, width) * dz


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _slope(activation: Activation, z: Array, width: Array) -> Array:
    return _mean_rate(activation, activation.function, z, width)


@_slope.defjvp
def _slope_jvp(activation: Activation, primals: _Pair, tangents: _Pair) -> _Pair:
    (z, width), (dz, _) = primals, tangents
    curvature = _mean_rate(activation, _derivative(activation.function), z, width)
    return _slope(activation, z, width), curvature * dz


def _mean_rate(
    activation: Activation, function: Callable[[Array], Array], z: Array, width: Array
) -> Array:
    """The derivative of `function`, or within `width` above a kink its mean over `width` below z.

    At a kink it is that from below, as in the activations themselves: a flow that starts on the
    ridge of one (a hidden layer that is dead, without biases) rests there in both.
    """
    near = [(z >= kink) & (z < kink + width) for kink in activation.kinks]
    inside = functools.reduce(jnp.logical_or, near)
    mean = (function(z) - function(z - width)) / width
    return jnp.where(inside, mean, _derivative(function)(z))


def _derivative(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda z: jax.jvp(function, (z,), (jnp.ones_like(z),))[1]
