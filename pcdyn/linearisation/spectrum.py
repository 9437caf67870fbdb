"""Decay rates and modes of a flow around a state, of inference from the Hessian of F.

`τ dx/dt = −∂F/∂x` has the Jacobian −τ⁻¹H with H = ∂²F/∂x² symmetric. It is similar to the
symmetric −τ^{-½} H τ^{-½}, so that its eigenvalues are real: the rates here are those of the
latter with the sign reversed, and a mode v of it is the mode τ^{-½} v of the activities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike

from pcdyn._support.namespaces import array_namespace
from pcdyn._support.states import dot, scale
from pcdyn._support.types import Scalar, State, Tree, Values
from pcdyn.errors import SpectrumError
from pcdyn.linearisation.block_sparse import BlockFactor, Blocks, BlockSparse
from pcdyn.linearisation.block_tridiagonal import BlockTridiagonal
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.linearisation.relaxation import symmetric_modes
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceFlow, InferenceProblem

if TYPE_CHECKING:
    import scipy.sparse.linalg

# Above so many units, full eigendecompositions take seconds for each sample.
MOST_DENSE_UNITS = 600
_ESTIMATE_ITERATIONS = 24
_BISECTIONS = 6
_MOST_ENTRIES_AT_ONCE = 2**22


class Spectrum(eqx.Module):
    """Decay rates in ascending order, and the modes of the first and of the last.

    The modes are given by the share of each free layer in their squared norm. The leading axis
    is over states.
    """

    rates: Values
    slowest_mode: Values
    fastest_mode: Values


def decay_matrix(problem: InferenceProblem, state: State) -> Blocks:
    """τ^{-½} H τ^{-½} at a state of one sample."""
    matrix = free_energy_hessian(problem, state)
    roots = _roots(problem)
    if isinstance(matrix, BlockSparse):
        each = zip(matrix.pairs, matrix.blocks, strict=True)
        blocks = tuple(block / (roots[i] * roots[j]) for (i, j), block in each)
        return dataclasses.replace(matrix, blocks=blocks)
    return BlockTridiagonal(
        tuple(block / root**2 for block, root in zip(matrix.diagonal, roots, strict=True)),
        tuple(
            block / (roots[i] * roots[i + 1]) for i, block in enumerate(matrix.upper)
        ),
    )  # fmt: skip


def _roots(problem: InferenceFlow) -> list[Array]:
    """√τ for each array of a state."""
    return [jnp.sqrt(tau) for tau in problem.state_time_constants]


@eqx.filter_jit
def full_spectrum(problem: InferenceProblem, states: State) -> Spectrum:
    """All rates at several states, by dense eigendecompositions.

    `problem` has one row of data and `states` one row of activities for each of them.
    """
    units = sum(x.shape[-1] for x in states)
    rows = states[0].shape[0]

    def one(row: tuple[tuple[Any, ...], State]) -> Spectrum:
        data, state = row
        sample = problem.with_data(*data)
        rates, modes = symmetric_modes(decay_matrix(sample, state).dense())
        return Spectrum(rates, *(_shares(sample, modes[:, column]) for column in (0, -1)))

    at_once = min(rows, max(1, _MOST_ENTRIES_AT_ONCE // units**2))
    return jax.lax.map(one, (problem.data, states), batch_size=at_once)


def _shares(problem: InferenceProblem, mode: Values) -> Values:
    """The share of each free layer in the squared norm of a mode of the activities."""
    xp = array_namespace(mode)
    widths = problem.free_widths
    parts = xp.split(mode, [sum(widths[:i]) for i in range(1, len(widths))])
    squares = xp.stack(
        [xp.sum((part / root) ** 2) for part, root in zip(parts, _roots(problem), strict=True)]
    )
    return squares / xp.sum(squares)


def flow_spectrum(flow: Flow, times: ArrayLike, states: State) -> Spectrum:
    """All rates of any flow at several times and states, complex numbers, in NumPy arrays.

    By dense eigendecompositions of its Jacobian on the host, in ascending order of the real parts;
    modes have a share for each array of the state. Raises `SpectrumError` for a Jacobian that is
    not finite.
    """
    matrices = np.asarray(_jacobians(flow, jnp.asarray(times), states))
    if not np.isfinite(matrices).all():
        raise SpectrumError(f"the Jacobian of the {type(flow).__name__} is not finite")
    rates: Any
    rates, modes = np.linalg.eig(-matrices)
    order = np.lexsort((rates.imag, rates.real), axis=-1)
    rates = np.take_along_axis(rates, order, -1).astype(np.result_type(matrices, np.complex64))
    squares = np.abs(np.take_along_axis(modes, order[:, None], -1)) ** 2
    ends = np.cumsum([x[0].size for x in states])[:-1]
    parts = [part.sum(axis=1) for part in np.split(squares, ends, axis=1)]
    shares = np.stack(parts, axis=-1) / squares.sum(1)[..., None]
    return Spectrum(rates, shares[:, 0], shares[:, -1])


@eqx.filter_jit
def _jacobians(flow: Flow, times: Array, states: State) -> Array:
    """∂(dx/dt)/∂x at several times and states, as matrices."""
    prepared = flow.prepared()

    def one(t: Array, state: State) -> Array:
        vector, unravel = ravel_pytree(state)
        return jax.jacfwd(lambda x: ravel_pytree(prepared.vector_field(t, unravel(x)))[0])(vector)

    return jax.vmap(one)(times, states)


def extreme_spectrum(problem: InferenceProblem, state: State) -> Spectrum:
    """The slowest and the fastest rate at a state of one sample, by Lanczos iterations.

    The slowest comes from Lanczos on the inverse, which the block Cholesky factorisation gives in
    O(Σ n³), shifted where the matrix is not positive definite. Raises `SpectrumError` where the
    iterations do not converge.
    """
    from scipy.sparse import linalg

    # SciPy's stubs take the types of its options from their defaults.
    eigsh: Any = linalg.eigsh
    matrix = _decay_matrix(problem, state)
    product, shift, inverse = _operators(matrix)
    options: dict[str, Any] = {
        "k": 1,
        "v0": _start(product.shape, problem.dtype)[0],
        # Of the residual: the error of a rate is of the order of its square.
        "tol": float(np.finfo(problem.dtype).eps) ** (2 / 3),
    }
    try:
        fast, fast_modes = eigsh(product, which="LA", **options)
        slow, slow_modes = eigsh(product, sigma=shift, OPinv=inverse, which="LM", **options)
    except linalg.ArpackNoConvergence as error:
        raise SpectrumError(f"Lanczos iterations did not find the rates: {error}") from error
    return Spectrum(
        cast(Values, np.concatenate([slow, fast])),
        _shares(problem, slow_modes[:, 0]),
        _shares(problem, fast_modes[:, 0]),
    )


@eqx.filter_jit
def _decay_matrix(problem: InferenceProblem, state: State) -> Blocks:
    return decay_matrix(problem, state)


def _operators(
    matrix: Blocks,
) -> tuple[scipy.sparse.linalg.LinearOperator, float, scipy.sparse.linalg.LinearOperator]:
    """The matrix A and (A − shift)⁻¹ for SciPy, the shift being below every eigenvalue."""
    sizes = matrix.sizes
    offsets = [sum(sizes[:i]) for i in range(1, len(sizes))]
    units, dtype = sum(sizes), np.dtype(matrix.dtype)
    factors, shift = _factorised_below(matrix)

    def operator(
        function: Callable[[Tree, State], State], tree: Tree
    ) -> scipy.sparse.linalg.LinearOperator:
        from scipy.sparse.linalg import LinearOperator

        def apply(vector: np.ndarray) -> np.ndarray:
            parts = tuple(jnp.asarray(x) for x in np.split(vector.astype(dtype).ravel(), offsets))
            return np.concatenate([np.asarray(x) for x in function(tree, parts)])

        # SciPy's stubs do not know the constructor's keywords.
        make: Any = LinearOperator
        return make((units, units), matvec=apply, dtype=dtype)

    return operator(_times, matrix), shift, operator(_solve, factors)


def _factorised_below(
    matrix: Blocks,
) -> tuple[BlockFactor, float]:
    """The factors of A − shift, and a shift that is zero or a little below the least eigenvalue."""
    factors = _shifted_cholesky(matrix, 0.0)
    if _is_finite(factors):
        return factors, 0.0
    norm = float(matrix.norm)
    above, below = 0.0, -sum(matrix.sizes) * float(jnp.finfo(matrix.dtype).eps) * norm
    while not _is_finite(factors := _shifted_cholesky(matrix, below)):
        if below < -2 * norm:
            raise SpectrumError("the Hessian has entries that are not finite, or overflows")
        above, below = below, 8 * below
    # The closer the shift, the faster Lanczos iterations on the inverse.
    for _ in range(_BISECTIONS if above < 0 else 0):
        middle = -math.sqrt(above * below)
        closer = _shifted_cholesky(matrix, middle)
        if _is_finite(closer):
            factors, below = closer, middle
        else:
            above = middle
    return factors, below


@jax.jit
def _shifted_cholesky(matrix: Blocks, shift: Scalar) -> BlockFactor:
    return matrix.plus_diagonal(-jnp.asarray(shift, matrix.dtype)).cholesky()


def _is_finite(factors: BlockFactor) -> bool:
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(factors))


@jax.jit
def _times(matrix: Blocks, vector: State) -> State:
    return matrix.times(vector)


@jax.jit
def _solve(factors: BlockFactor, rhs: State) -> State:
    return factors.solve(rhs)


def estimated_fastest_rate(problem: InferenceFlow, state: State) -> np.ndarray:
    """The largest decay rate at a state, per sample: never above it, and mostly within 1 %.

    24 Lanczos iterations for the whole batch at once, each one Hessian-vector product. NaN where
    the vector field is not finite.
    """
    units = sum(x.shape[-1] for x in state)
    start = _start((*state[0].shape[:-1], units), state[0].dtype)
    parts = np.split(start, np.cumsum([x.shape[-1] for x in state])[:-1], axis=-1)
    coefficients = _lanczos(
        problem, state, tuple(jnp.asarray(x) for x in parts), min(_ESTIMATE_ITERATIONS, units)
    )
    diagonals, lengths = (np.atleast_2d(np.asarray(x).T) for x in coefficients)
    # The eigenvalues of the tridiagonal matrix, the Ritz values, lie within the spectrum.
    largest = [
        np.linalg.eigvalsh(np.diag(here) + np.diag(above[:-1], 1) + np.diag(above[:-1], -1))[-1]
        if np.isfinite(here).all() and np.isfinite(above).all()
        else np.nan
        for here, above in zip(diagonals, lengths, strict=True)
    ]
    return np.reshape(largest, state[0].shape[:-1])


def _start(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Unit vectors to start Lanczos iterations from, the same in every call."""
    vectors = np.random.default_rng(0).normal(size=shape).astype(dtype)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@eqx.filter_jit
def _lanczos(
    problem: InferenceFlow, state: State, start: State, iterations: int
) -> tuple[Array, Array]:
    """The diagonal and off-diagonal coefficients of each iteration, iterations first."""
    roots = tuple(jnp.broadcast_to(r, x.shape) for r, x in zip(_roots(problem), state, strict=True))
    flow = problem.prepared()
    _, tangent = jax.linearize(lambda x: flow.vector_field(0.0, x), state)

    def iterate(
        carry: tuple[State, State, Array], _: None
    ) -> tuple[tuple[State, State, Array], tuple[Array, Array]]:
        before, here, coupling = carry
        moved = tangent(tuple(x / root for x, root in zip(here, roots, strict=True)))
        image = tuple(-x * root for x, root in zip(moved, roots, strict=True))
        diagonal = dot(here, image)
        rest = _minus(_minus(image, scale(diagonal, here)), scale(coupling, before))
        length = jnp.sqrt(dot(rest, rest))
        following = scale(jnp.where(length > 0, 1 / length, 0), rest)
        return (here, following, length), (diagonal, length)

    carry = (jax.tree.map(jnp.zeros_like, start), start, jnp.zeros_like(start[0][..., 0]))
    return jax.lax.scan(iterate, carry, None, length=iterations)[1]


def _minus(a: State, b: State) -> State:
    return jax.tree.map(jnp.subtract, a, b)
