"""Functions of H = AᵀA for a factor A: the modes of a linear flow, and its relaxation.

Singular values of A are known to eps · ‖A‖ and so the small eigenvalues of H to twice as many
digits as from H itself. All have derivatives with respect to A that hold where eigenvalues repeat:
those of the relaxation by linear systems, in which no differences of eigenvalues appear.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from pcdyn._support.derivative_rules import with_rule_in_loops
from pcdyn._support.products import matmul

# λt below which the ramp response is a series, and its terms: what is left is below 1e-18.
_SMALL, _TERMS = 0.5, 13


def square(matrix: Float[Array, "M N"], *rows: Float[Array, "*batch M"]) -> tuple[Array, ...]:
    """A matrix and rows that it acts on, with as many rows as columns at least: zeros added."""
    missing = max(0, matrix.shape[1] - matrix.shape[0])
    padded = (jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, missing)]) for x in rows)
    return (jnp.pad(matrix, ((0, missing), (0, 0))), *padded)


@jax.custom_jvp
def _factor_modes(factor: Float[Array, "M N"]) -> tuple[Array, Array]:
    """The eigenvalues of AᵀA in ascending order, M ≥ N, and its eigenvectors as columns.

    Where eigenvalues coincide within round-off, the derivative of each is that of their mean, and
    their eigenvectors do not rotate among themselves: what is symmetric in them has the right
    derivatives.
    """
    _, sizes, modes = singular_modes(factor)
    return sizes**2, modes


factor_modes = with_rule_in_loops(_factor_modes)


@_factor_modes.defjvp
def _factor_modes_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (factor,), (tangent,) = primals, tangents
    rates, modes = factor_modes(factor)
    half = matmul(matmul(factor, modes).T, matmul(tangent, modes))
    together = _together(jnp.sqrt(jnp.maximum(rates, 0)))
    return (rates, modes), _eigen_tangents(rates, modes, half + half.T, together)


@jax.custom_jvp
def _symmetric_modes(matrix: Float[Array, "N N"]) -> tuple[Array, Array]:
    """The eigenvalues of a symmetric matrix in ascending order, and its eigenvectors as columns.

    With derivatives as `factor_modes` has them where eigenvalues coincide.
    """
    rates, modes = jnp.linalg.eigh(matrix)
    return rates, modes


symmetric_modes = with_rule_in_loops(_symmetric_modes)


@_symmetric_modes.defjvp
def _symmetric_modes_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (matrix,), (tangent,) = primals, tangents
    rates, modes = symmetric_modes(matrix)
    bent = matmul(matmul(modes.T, tangent), modes)
    return (rates, modes), _eigen_tangents(rates, modes, (bent + bent.T) / 2, _together(rates))


def _together(values: Array) -> Array:
    """Which of the values, that a decomposition found, coincide within its round-off."""
    resolved = 8 * len(values) * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return jnp.abs(values[:, None] - values[None]) <= resolved


def _eigen_tangents(
    rates: Array, modes: Array, bent: Array, together: Array
) -> tuple[Array, Array]:
    """Of eigenvalues and eigenvectors, from the change of the matrix in its own modes."""
    shares = together.astype(rates.dtype)
    shares = shares / jnp.sum(shares, axis=1, keepdims=True)
    gaps = rates[None] - rates[:, None]
    turning = jnp.where(together, 0, bent / jnp.where(together, 1, gaps))
    return matmul(shares, jnp.diagonal(bent)), matmul(modes, turning)


def singular_modes(factor: Float[Array, "M N"]) -> tuple[Array, Array, Array]:
    """Left singular vectors, singular values in ascending order and right singular vectors of A."""
    left, sizes, right = jnp.linalg.svd(factor, full_matrices=False)
    return left[:, ::-1], sizes[::-1], right[::-1].T


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _relaxed(
    factor: Float[Array, "M N"],
    modes: tuple[Array, Array, Array],
    residual: Float[Array, "*batch M"],
    t: Float[Array, ""],
    power: int = 0,
) -> Float[Array, "*batch N"]:
    """y(t) of `ẏ = Aᵀ(t^power residual − A y)` from y(0) = 0, with A and its singular modes.

    Each mode moves by (1 − e^{−λt})/λ times its share of Aᵀ residual, which is t where λ = 0; with
    power 1 by the integral of that over time. It has derivatives of any order; the modes, which
    follow from A, are not differentiated.
    """
    left, sizes, right = modes
    driven = (_step_response, _ramp_response)[power](sizes**2, t)
    amplitudes = matmul(residual, left)
    return matmul(amplitudes * jnp.broadcast_to(sizes * driven, amplitudes.shape), right.T)


def _step_response(rates: Array, t: Array) -> Array:
    flat = rates == 0
    return jnp.where(flat, t, -jnp.expm1(-rates * t) / jnp.where(flat, 1, rates))


def _ramp_response(rates: Array, t: Array) -> Array:
    """(λt − 1 + e^{−λt})/λ², by its series where most digits would cancel."""
    x = rates * t
    is_small = x < _SMALL
    series = jnp.zeros_like(x)
    for n in reversed(range(_TERMS)):
        series = 1 / math.factorial(n + 2) - x * series
    large = jnp.where(is_small, 1, x)
    return t**2 * jnp.where(is_small, series, (large + jnp.expm1(-large)) / large**2)


relaxed = with_rule_in_loops(_relaxed)


@_relaxed.defjvp
def _relaxed_jvp(
    power: int, primals: tuple[Array, tuple[Array, Array, Array], Array, Array], tangents: PyTree
) -> tuple[Array, Array]:
    factor, _, residual, t = primals
    d_factor, _, d_residual, d_t = tangents
    moved = _tangent(factor, residual, t, d_factor, d_residual, d_t, power)
    return relaxed(*primals, power), moved


# Compiled as one program also where nothing around it is.
@functools.partial(jax.jit, static_argnums=6)
def _tangent(
    factor: Array,
    residual: Array,
    t: Array,
    d_factor: Array,
    d_residual: Array,
    d_t: Array,
    power: int,
) -> Array:
    def moved(factor: Array, residual: Array, t: Array) -> Array:
        return _rational(factor, residual, t, power)

    return jax.jvp(moved, (factor, residual, t), (d_factor, d_residual, d_t))[1]


def _rational(factor: Array, residual: Array, t: Array, power: int) -> Array:
    """`relaxed` by solving linear systems, with (e^x − 1)/x as a sum over poles.

    With another division by the poles it is ((e^x − 1)/x − 1)/x, for power 1.

    With `(t AᵀA + θ) u = Aᵀ residual` written as one system for u and `t A u − residual`, which
    keeps the digits that A has.
    """
    rows, columns = factor.shape
    kind = jnp.complex128 if factor.dtype == jnp.float64 else jnp.complex64
    poles, weights = (jnp.asarray(x, kind) for x in (_POLES, _WEIGHTS))
    matrix, time = factor.astype(kind), jnp.asarray(t).astype(kind)
    units, errors = (jnp.eye(n, dtype=kind) for n in (columns, rows))
    given = jnp.atleast_2d(residual).astype(kind).T
    rhs = jnp.concatenate([jnp.zeros((columns, given.shape[1]), kind), given])

    def term(pole: Array, weight: Array) -> Array:
        upper = jnp.concatenate([pole * units, matrix.T], axis=1)
        lower = jnp.concatenate([time * matrix, -errors], axis=1)
        return (
            -weight
            / pole ** (power + 1)
            * jnp.linalg.solve(jnp.concatenate([upper, lower]), rhs)[:columns]
        )

    total = jnp.sum(jax.vmap(term)(poles, weights), axis=0)
    moved = 2 * jnp.real(time ** (power + 1) * total).astype(factor.dtype)
    return moved.T.reshape(*residual.shape[:-1], columns)


# The best rational approximation of e^x for all x ≤ 0, of degree 14: to 2e-14 everywhere
# (Carpenter, Ruttan & Varga 1984; the coefficients are those of Pusa 2012).
_POLES = (
    -8.8977731864688888199 + 16.630982619902085304j,
    -3.7032750494234480603 + 13.656371871483268171j,
    -0.2087586382501301251 + 10.991260561901260913j,
    3.9933697105785685194 + 6.0048316422350373178j,
    5.0893450605806245066 + 3.5888240290270065102j,
    5.6231425727459771248 + 1.1940690463439669766j,
    2.2697838292311127097 + 8.4617379730402214019j,
)
_WEIGHTS = (
    -7.1542880635890672853e-5 + 1.4361043349541300111e-4j,
    9.4390253107361688779e-3 - 1.7184791958483017511e-2j,
    -3.7636003878226968717e-1 + 3.3518347029450104214e-1j,
    -2.3498232091082701191e1 - 5.8083591297142074004j,
    4.6933274488831293047e1 + 4.5643649768827760791e1j,
    -2.7875161940145646468e1 - 1.0214733999056451434e2j,
    4.8071120988325088907 - 1.3209793837428723881j,
)
