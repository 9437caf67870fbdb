"""What noise at a temperature T makes of the free units of a linear network.

With `τ dy = −(H y − b) dt + √(2Tτ) dW` each amplitude a of a mode of `τ^{-½} H τ^{-½}`, of rate λ,
obeys `da = −λ a dt + √(2T) dW`, an Ornstein–Uhlenbeck process (Uhlenbeck & Ornstein 1930): over a
time s it keeps e^{−λs} of what it was, and gets noise of the variance T(1 − e^{−2λs})/λ, which is
2Ts where λ = 0.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PRNGKeyArray

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import checked_number
from pcdyn._support.forward_only import without_derivative
from pcdyn._support.products import matmul
from pcdyn._support.types import Scalar
from pcdyn.errors import InputError
from pcdyn.linearisation.relaxation import singular_modes, square
from pcdyn.linearisation.whitened import (
    error_matrix,
    has_errors_of_their_own,
    node_that_differs,
    root_rates,
)
from pcdyn.model.problem import InferenceProblem

_NO_DERIVATIVE = (
    "noise in closed form has no derivatives with respect to a network, whose rates can coincide: "
    "take those of pcdyn.linear.stationary_covariance, or forward ones (jax.jvp, jax.jacfwd) of "
    "pcdyn.StochasticHeun(dt=…)"
)


def checked_temperature(value: Scalar) -> Scalar:
    """A number of at least 0, which may be traced; raises `InputError` for anything else."""
    if not is_traced(value):
        return checked_number(value, "temperature", at_least=0)
    array = jnp.asarray(value)
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.ndim or not is_real:
        raise InputError(
            f"temperature must be one real number, got an array of shape {array.shape} and dtype "
            f"{array.dtype}: map over several by jax.vmap"
        )
    return value


def known_modes(problem: InferenceProblem, factor: Float[Array, "M N"]) -> tuple[Array, ...]:
    """`singular_modes` of A over √τ, the sizes of flat directions being 0 and not round-off."""
    left, sizes, right = singular_modes(factor)
    if not has_errors_of_their_own(problem):
        # Round-off in a flat direction would grow with time; neither rate nor drive is there.
        eps, largest = jnp.finfo(sizes.dtype).eps, jnp.max(sizes)
        sizes = jnp.where(sizes <= len(sizes) * eps * largest, 0, sizes)
    return left, sizes, right


class Fluctuations(eqx.Module):
    """The Ornstein–Uhlenbeck process of the free units of one sample, stacked, about its mean.

    - `rates`: λ of the modes of `τ^{-½} H τ^{-½}`; `modes`: these, as columns.
    - `scale`: τ^{-½} of each unit, 0 where the sample has no unit.
    - `temperature`: T.
    """

    rates: Float[Array, " N"]
    modes: Float[Array, "N N"]
    scale: Float[Array, " N"]
    temperature: Float[Array, ""]

    def variances(self, time: Float[Array, ""]) -> Float[Array, " N"]:
        """The variance of each mode after a time, from none."""
        flat = self.rates == 0
        decayed = -jnp.expm1(-2 * self.rates * time) / jnp.where(flat, 1, self.rates)
        return self.temperature * jnp.where(flat, 2 * time, decayed)

    def covariance(self, time: Float[Array, ""]) -> Float[Array, "N N"]:
        """The covariance after a time, from none."""
        columns = self.modes * jnp.broadcast_to(self.scale[:, None], self.modes.shape)
        return _weighted(columns, self.variances(time))

    def carried(
        self, covariance: Float[Array, "N N"], time: Float[Array, ""]
    ) -> Float[Array, "N N"]:
        """What is left after a time of a covariance at the start: e^{−Jt} C e^{−Jᵀt}, J = τ⁻¹H."""
        scale = jnp.broadcast_to(self.scale[:, None], self.modes.shape)
        inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
        decay = jnp.broadcast_to(jnp.exp(-self.rates * time), self.modes.shape)
        propagator = matmul(self.modes * scale * decay, (self.modes * inverse).T)
        left = matmul(matmul(propagator, covariance), propagator.T)
        return (left + left.T) / 2

    def path(self, key: PRNGKeyArray, intervals: Float[Array, " time"]) -> Float[Array, "time N"]:
        """One draw of the process that starts at 0, after each of consecutive intervals.

        Noise is drawn for units, not for modes, of which a decomposition chooses the signs.
        """

        def move(amplitudes: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            number, time = now
            white = jr.normal(jr.fold_in(key, number), amplitudes.shape, amplitudes.dtype)
            kept = jnp.exp(-self.rates * time) * amplitudes
            moved = kept + jnp.sqrt(self.variances(time)) * matmul(white, self.modes)
            return moved, moved

        start = jnp.zeros_like(self.rates)
        _, path = jax.lax.scan(move, start, (jnp.arange(len(intervals)), intervals))
        moved = matmul(path, self.modes.T)
        return moved * jnp.broadcast_to(self.scale, moved.shape)


def _weighted(columns: Array, weights: Array) -> Array:
    rows = columns * jnp.broadcast_to(jnp.sqrt(weights), columns.shape)
    return matmul(rows, rows.T)


def fluctuations(problem: InferenceProblem, temperature: Scalar) -> Fluctuations:
    """Find the modes of a linear network whose samples have the same free units."""
    matrix, scale = error_matrix(problem), root_rates(problem)
    (factor,) = square(matrix * jnp.broadcast_to(scale, matrix.shape))
    found = known_modes(problem, factor)
    _, sizes, modes = without_derivative(found, InputError(_NO_DERIVATIVE))
    ones = tuple(jnp.ones(width, problem.dtype) for width in problem.free_widths)
    present = jnp.concatenate(problem.without_padding(ones))
    return Fluctuations(sizes**2, modes, scale * present, jnp.asarray(temperature, problem.dtype))


def drawn_fluctuations(
    problem: InferenceProblem,
    temperature: Scalar,
    keys: Key[Array, "*batch"],
    intervals: Float[Array, " time"],
) -> Float[Array, "time *batch N"]:
    """Draw `Fluctuations.path` for the key of one sample, or for those of a batch."""

    def one(problem: InferenceProblem, key: PRNGKeyArray) -> Array:
        return fluctuations(problem, temperature).path(key, intervals)

    if keys.ndim == 0:
        return one(problem, keys)
    if node_that_differs(problem) is None:
        shared = fluctuations(problem, temperature)
        paths = jax.vmap(lambda key: shared.path(key, intervals))(keys)
    else:
        paths = problem.map_samples(one, keys)
    return jnp.moveaxis(paths, 0, 1)
