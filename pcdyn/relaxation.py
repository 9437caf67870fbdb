"""Functions of H = AᵀA for a factor A: the modes of a linear flow, and its relaxation.

Singular values of A are known to eps · ‖A‖ and so the small eigenvalues of H to twice as many
digits as from H itself. All have derivatives with respect to A that hold where eigenvalues repeat:
those of the relaxation by divided differences of the exponential (Daleckii and Krein), which do not
divide by differences of eigenvalues that are close.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pcdyn.errors import InputError

_TERMS = 15
_NEAR = 0.5

# `(1 − e^{−λt})/λ` and `e^{−λt}`.
Kind = Literal["relax", "decay"]


def square(matrix: Float[Array, "M N"], *rows: Float[Array, "*batch M"]) -> tuple[Array, ...]:
    """A matrix and rows that it acts on, with as many rows as columns at least: zeros added."""
    missing = max(0, matrix.shape[1] - matrix.shape[0])
    padded = (jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, missing)]) for x in rows)
    return (jnp.pad(matrix, ((0, missing), (0, 0))), *padded)


@jax.custom_jvp
def factor_modes(factor: Float[Array, "M N"]) -> tuple[Array, Array]:
    """The eigenvalues of AᵀA in ascending order, M ≥ N, and its eigenvectors as columns.

    Where eigenvalues coincide within round-off, the derivative of each is that of their mean, and
    their eigenvectors do not turn into one another: what is symmetric in them has the right
    derivatives.
    """
    _, sizes, modes = singular_modes(factor)
    return sizes**2, modes


@factor_modes.defjvp
def _factor_modes_jvp(primals: Any, tangents: Any) -> Any:
    (factor,), (tangent,) = primals, tangents
    rates, modes = factor_modes(factor)
    half = (factor @ modes).T @ (tangent @ modes)
    bent = half + half.T
    return (rates, modes), eigen_tangents(rates, modes, bent)


def eigen_tangents(rates: Array, modes: Array, bent: Array) -> tuple[Array, Array]:
    """Of eigenvalues and eigenvectors, from the change of the matrix in its own modes."""
    sizes = jnp.sqrt(jnp.maximum(rates, 0))
    resolved = 8 * len(rates) * jnp.finfo(rates.dtype).eps * jnp.max(sizes)
    together = jnp.abs(sizes[:, None] - sizes[None]) <= resolved
    shares = together / jnp.sum(together, axis=1, keepdims=True).astype(rates.dtype)
    gaps = rates[None] - rates[:, None]
    turning = jnp.where(together, 0, bent / jnp.where(together, 1, gaps))
    return shares @ jnp.diagonal(bent), modes @ turning


def singular_modes(factor: Float[Array, "M N"]) -> tuple[Array, Array, Array]:
    """Left singular vectors, singular values in ascending order and right singular vectors of A."""
    left, sizes, right = jnp.linalg.svd(factor, full_matrices=False)
    return left[:, ::-1], sizes[::-1], right[::-1].T


def function_of(kind: Kind, parts: Any, residual: Any, force: Any, t: Any) -> Any:
    """`f(AᵀA) (Aᵀ residual + force)`, shape `(*batch, N)`.

    `parts` are A and its singular modes, of which only A is differentiated. It has derivatives up
    to the second.
    """
    factor, modes = parts
    return _function(kind, factor, jax.lax.stop_gradient(modes), residual, force, t)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _function(kind: Kind, factor: Any, modes: Any, residual: Any, force: Any, t: Any) -> Any:
    _, sizes, right = modes
    amplitudes = _in_modes(modes, residual, force)
    return (amplitudes * _rows(_differences(kind, [sizes**2], t), amplitudes)) @ right.T


@_function.defjvp
def _function_jvp(kind: Kind, primals: Any, tangents: Any) -> Any:
    factor, modes, residual, force, t = primals
    d_factor, _, d_residual, d_force, d_t = tangents
    none = jnp.zeros((factor.shape[1],) * 2, factor.dtype)
    moved = _function(kind, factor, modes, d_residual, residual @ d_factor + d_force, t)
    bent = _bent(kind, factor, modes, d_factor, none, residual, force, t)
    if kind == "relax":
        later = _function("decay", factor, modes, residual, force, t)
    else:
        driven = (residual @ factor + force) @ factor.T
        later = -_function("decay", factor, modes, driven, jnp.zeros_like(force), t)
    return _function(kind, *primals), moved + bent + d_t * later


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _bent(
    kind: Kind, factor: Any, modes: Any, turn: Any, bend: Any, residual: Any, force: Any, t: Any
) -> Any:
    """The derivative of f(H) (Aᵀ residual + force), for H towards Aᵀturn + turnᵀA + bend."""
    _, sizes, right = modes
    first = _differences(kind, [sizes[:, None] ** 2, sizes[None] ** 2], t)
    amplitudes = _in_modes(modes, residual, force)
    return amplitudes @ (first * _direction(modes, turn, bend)) @ right.T


@_bent.defjvp
def _bent_jvp(kind: Kind, primals: Any, tangents: Any) -> Any:
    factor, modes, turn, bend, residual, force, t = primals
    d_factor, _, d_turn, d_bend, d_residual, d_force, d_t = tangents
    both = turn.T @ d_factor
    moved = _bent(kind, factor, modes, d_turn, d_bend + both + both.T, residual, force, t)
    d_force = residual @ d_factor + d_force
    driven = _bent(kind, factor, modes, turn, bend, d_residual, d_force, t)
    twice = _twice_bent(kind, factor, modes, (turn, bend), d_factor, residual, force, t)
    later = _bent("decay", factor, modes, turn, bend, residual, force, t)
    if kind == "decay":
        half = factor.T @ turn
        now = _function("decay", factor, modes, residual, force, t)
        later = -now @ (half + half.T + bend) - (later @ factor.T) @ factor
    return _bent(kind, *primals), moved + driven + twice + d_t * later


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def _twice_bent(
    kind: Kind, factor: Any, modes: Any, one: Any, turn: Any, residual: Any, force: Any, t: Any
) -> Any:
    """The second derivative of f(H) b, for H in one direction and in that of `turn`."""
    _, sizes, right = modes
    rates = sizes**2
    second = _differences(kind, [rates[:, None, None], rates[:, None], rates], t)
    first, other = _direction(modes, *one), _direction(modes, turn, jnp.zeros_like(one[1]))
    paths = jnp.einsum("ijk,ij,jk->ik", second, first, other)
    paths = paths + jnp.einsum("ijk,ij,jk->ik", second, other, first)
    return _in_modes(modes, residual, force) @ paths @ right.T


@_twice_bent.defjvp
def _twice_bent_jvp(kind: Kind, primals: Any, tangents: Any) -> Any:
    raise InputError(
        "the exact flow of a linear network has first and second derivatives only: integrate it "
        'with another integrator, such as "tsit5", for the third'
    )


def _direction(modes: Any, turn: Any, bend: Any) -> Any:
    """`Aᵀturn + turnᵀA + bend` in the modes of AᵀA."""
    left, sizes, right = modes
    half = sizes[:, None] * (left.T @ turn @ right)
    return half + half.T + right.T @ bend @ right


def _in_modes(modes: Any, residual: Any, force: Any) -> Any:
    """The amplitudes of `Aᵀ residual + force`, with the digits that A has."""
    left, sizes, right = modes
    projected = residual @ left
    return projected * _rows(sizes, projected) + force @ right


def _rows(vector: Any, like: Any) -> Any:
    return jnp.broadcast_to(vector, like.shape)


def _differences(kind: Kind, rates: list[Any], t: Any) -> Any:
    """The divided difference of f at some rates, which broadcast with one another."""
    order = len(rates) - 1
    nodes = [-rate * t for rate in rates]
    if kind == "decay":
        return (-t) ** order * _exponential(nodes)
    # (1 − e^{−λt})/λ is itself the divided difference of −e^{−λt} at λ and 0.
    return -((-t) ** (order + 1)) * _exponential([*nodes, jnp.zeros_like(nodes[0])])


def _exponential(nodes: list[Any]) -> Any:
    """The divided difference of eˣ at any nodes, element by element, also where they coincide.

    By Taylor's series where the nodes are near, otherwise by recursion over the two farthest.
    """
    x = jnp.sort(jnp.stack(jnp.broadcast_arrays(*nodes)), axis=0)
    table = [jnp.exp(each) for each in x]
    for gap in range(1, len(x)):
        following = []
        for i in range(len(x) - gap):
            spread = x[i + gap] - x[i]
            near = spread < _NEAR
            far = (table[i + 1] - table[i]) / jnp.where(near, 1, spread)
            following.append(jnp.where(near, _series(x[i : i + gap + 1]), far))
        table = following
    return table[0]


def _series(x: Any) -> Any:
    """`e^c Σ_m h_m(x − c) / (m + n − 1)!`, h_m the complete homogeneous polynomials, c = max x."""
    shifts = x - x[-1]
    polynomials = [jnp.ones_like(x[0])] + [jnp.zeros_like(x[0])] * (_TERMS - 1)
    for shift in shifts:
        for m in range(1, _TERMS):
            polynomials[m] = polynomials[m] + shift * polynomials[m - 1]
    total, factorial = jnp.zeros_like(x[0]), 1.0
    for n in range(1, len(x)):
        factorial *= n
    for m, polynomial in enumerate(polynomials):
        if m:
            factorial *= m + len(x) - 1
        total = total + jnp.where(shifts[0] < -_NEAR, 0, polynomial) / factorial
    return jnp.exp(x[-1]) * total
