"""The output error of a linear network during inference, in closed form, and when its loss rises.

Inference from the feedforward pass with both ends clamped takes the output error from
`e0 = T − feedforward(d)` to `ε_L(t) = M(t) e0`, whatever the data. Whitened by the output
precision, M is symmetric and falls from I to `N(∞) ≻ 0` in the order of symmetric matrices. The
loss is a square of it, and squares need not fall with what is squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.arrays import as_float_array, as_host_array, is_traced
from pcdyn._support.compiling import compiled
from pcdyn._support.products import matmul
from pcdyn._support.types import Numbers, State
from pcdyn.errors import InputError, ShapeError, TimesError
from pcdyn.linearisation.whitened import linear_parts
from pcdyn.model.problem import InferenceProblem, check_problem
from pcdyn.references.linear import linear_modes

LARGEST_RISE = (5**0.5 - 2) / 4
"""No linear network's output loss rises by more than this share, 5.9 %, of its value at the start.

For ℒ ∝ zᵀN²z with `I ≽ N(s) ≽ N(t) ≽ 0`, s < t, a rise from s to t is at most the largest
eigenvalue of B² − A² over `0 ≼ B ≼ A ≼ I`. Here B may be replaced by its part of rank one that
maps z alike, and both may be restricted to the plane of z and Bz; what is left has its maximum
(√5 − 2)/4 where A has the eigenvalues 1 and (√5 − 1)/4.
"""


class OutputErrorFlow(eqx.Module):
    """M(t) of `ε_L(t) = M(t) e0`, a function of time t, in units of the activity time constant.

    `M(t) = I − C H⁻¹(I − e^{−Ht}) Cᵀ Π_L` with C = [0 … 0 W_L] and H = ∂²F/∂y² (time constants τ
    put τ⁻¹H into the exponential). With the Cholesky factor `Π_L = R Rᵀ` the whitened error
    `z = Rᵀ e0` obeys `z(t) = N(t) z` and `ℒ(t) = ½ ‖z(t)‖²`, where
    `N(t) = I − Σ_k (1 − e^{−λ_k t})/λ_k v_k v_kᵀ` is symmetric: each entry of a quadratic form of N
    is completely monotone in t.

    `rates`: λ_k in ascending order, shape `(N,)`; `visible`: v_k as columns, shape `(n_L, N)`;
    `root`: R, shape `(n_L, n_L)`.
    """

    rates: Float[Array, " N"]
    visible: Float[Array, "n_L N"]
    root: Float[Array, "n_L n_L"]

    def __call__(self, t: Numbers) -> Float[Array, "n_L n_L"]:
        """Compute M(t); t may be infinite."""
        return jsl.solve_triangular(self.root.T, matmul(self.whitened(t), self.root.T), lower=False)

    def whitened(self, t: Numbers) -> Float[Array, "n_L n_L"]:
        """Compute N(t), symmetric; t may be infinite."""
        return _whitened(self, _moment(t, self.rates.dtype))

    def speed(self, t: Numbers) -> Float[Array, "n_L n_L"]:
        """Compute −dN/dt, symmetric and positive semidefinite."""
        return _speed(self, _moment(t, self.rates.dtype))

    def loss(self, error: Float[Array, " n_L"], t: Numbers) -> Float[Array, ""]:
        """Compute ℒ(t) of a sample with the output error `error` = e0 at the feedforward pass."""
        return 0.5 * jnp.sum(matmul(self.whitened(t), self._start(error)) ** 2)

    def loss_rate(self, error: Float[Array, " n_L"], t: Numbers) -> Float[Array, ""]:
        """Compute dℒ/dt; the energy gradient bound of A.6.3 says that it is negative."""
        start = self._start(error)
        return -jnp.sum(matmul(self.whitened(t), start) * matmul(self.speed(t), start))

    def rise(self, start: Numbers, end: Numbers) -> Float[Array, ""]:
        """Compute the largest (ℒ(end) − ℒ(start))/ℒ(0) over all targets.

        It is negative if ℒ falls for all, and never exceeds `LARGEST_RISE` for end ≥ start; both
        may be infinite.
        """
        before, after = self.whitened(start), self.whitened(end)
        return jnp.linalg.eigvalsh(matmul(after, after) - matmul(before, before))[-1]

    def largest_rise(self, times: Numbers) -> Float[Array, ""]:
        """Find the largest `rise` from one to a later one of `times`, over all pairs and targets.

        What ℒ does between neighbouring times is not seen: this is a lower bound.

        **Arguments:**

        - `times`: at least two in ascending order, of which the last may be infinite.

        **Raises:**

        - `TimesError` for other times.
        """
        moments = _known_times(times, self.rates.dtype)
        if moments.ndim != 1 or len(moments) < 2:
            raise TimesError(f"times must be two or more in a row, got the shape {moments.shape}")
        if not is_traced(moments) and bool(np.any(np.diff(moments) <= 0)):
            raise TimesError("times must be in ascending order; sort them, and drop repeated ones")
        return _largest_rise(self, moments)

    @compiled
    def rising_share(self) -> Float[Array, ""]:
        """Compute the share of directions of the whitened error with which ℒ rises in the end.

        The slowest mode that is visible at the output alone moves then, so that
        `dℒ/dt ∝ −(z·N(∞)v)(z·v)` with its v: positive between the planes orthogonal to v and to
        N(∞)v, a share θ/π of directions for the angle θ of the two. Zero where v is an eigenvector
        of N(∞): with a scalar output, with one hidden layer of scalar precision. NaN if no mode is
        visible at the output. Rates are taken to be different: of equal ones a single mode is used.
        """
        sizes = jnp.linalg.norm(self.visible, axis=0)
        # v = 0 comes out as round-off, which has a direction too.
        round_off = 10 * len(self.rates) * jnp.finfo(self.rates.dtype).eps
        is_visible = sizes > round_off * jnp.max(sizes)
        slowest = jnp.where(jnp.any(is_visible), self.visible[:, jnp.argmax(is_visible)], jnp.nan)
        moved = matmul(self.whitened(jnp.inf), slowest)
        # The arc cosine of a number near 1 would lose half of the digits.
        a, b = (x / jnp.linalg.norm(x) for x in (slowest, moved))
        return 2 * jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b)) / jnp.pi

    def _start(self, error: Numbers) -> Array:
        vector = as_float_array(error, "error").astype(self.root.dtype)
        if vector.shape != self.root.shape[:1]:
            raise ShapeError(f"error has shape {vector.shape}, but {self.root.shape[:1]} is needed")
        return matmul(self.root.T, vector)


@compiled
def _whitened(flow: OutputErrorFlow, t: Array) -> Array:
    # The derivative by a rate at an infinite time would be 0 times infinity.
    finite = jnp.where(jnp.isinf(t), 0, t)
    shares = jnp.where(jnp.isinf(t), 1, -jnp.expm1(-flow.rates * finite)) / flow.rates
    return jnp.eye(len(flow.root), dtype=flow.root.dtype) - _sum(flow.visible, shares)


@compiled
def _speed(flow: OutputErrorFlow, t: Array) -> Array:
    return _sum(flow.visible, jnp.exp(-flow.rates * t))


@compiled
def _largest_rise(flow: OutputErrorFlow, times: Array) -> Array:
    maps = jax.vmap(partial(_whitened, flow))(times)
    squares = matmul(maps, maps)
    early, late = np.triu_indices(len(times), k=1)
    return jnp.max(jnp.linalg.eigvalsh(squares[late] - squares[early])[:, -1])


def _sum(visible: Array, shares: Array) -> Array:
    return matmul(visible * jnp.broadcast_to(shares, visible.shape), visible.T)


def _known_times(times: Numbers, dtype: np.dtype) -> Array:
    """Times as an array, which may hold infinity but not NaN."""
    if is_traced(times):
        return jnp.asarray(times, dtype)
    array = as_host_array(times, "t", finite=False, error=TimesError)
    if np.isnan(array).any():
        raise TimesError("t is NaN: give times, of which infinity is one")
    return jnp.asarray(array, dtype)


def _moment(t: Numbers, dtype: np.dtype) -> Float[Array, ""]:
    moment = _known_times(t, dtype)
    if moment.ndim:
        raise TimesError(f"t must be one time, got shape {moment.shape}: use jax.vmap for several")
    return moment


def output_error_flow(problem: InferenceProblem) -> OutputErrorFlow:
    """Find M(t) of `ε_L(t) = M(t) e0`, the output error of a linear network during inference.

    Inference starts from the feedforward pass. The data of `problem` only say that both ends are
    clamped. Works under `jax.vmap` over networks.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `InputError` if an end is free.
    """
    rates, modes, scale = linear_modes(problem)
    if not problem.both_ends_clamped:
        raise InputError(
            "the output error moves by M(t) where both ends are clamped; give the problem an input "
            "and an output, or follow the flow with pcdyn.simulate"
        )
    return _flow(problem, rates, modes, scale)


@compiled
def _flow(problem: InferenceProblem, rates: Array, modes: Array, scale: Array) -> OutputErrorFlow:
    network, (*_, precision) = problem.network, linear_parts(problem)[1]
    last: Any = network.layers[-1]
    below, width = network.widths[-2:]
    root = jnp.linalg.cholesky(precision.matrix(width, network.dtype))
    tail = modes[-below:] * scale[-below:, None]
    return OutputErrorFlow(
        rates=rates, visible=matmul(matmul(root.T, last.matrix), tail), root=root
    )


def feedforward_output_error(problem: InferenceProblem) -> Float[Array, "*batch n_L"]:
    """Compute e0 = T − feedforward(d), the output error at which inference starts."""
    check_problem(problem)
    if problem.input is None:
        raise InputError("there is no feedforward pass: this problem's input is free")
    return problem.output_error(problem.network.feedforward(problem.input)[-1])


def energy_gradient_margin(
    problem: InferenceProblem, state: str | Sequence[Numbers]
) -> Float[Array, "*batch"]:
    """Compute −dℒ/dt at a state of any network, which the energy gradient bound says is positive.

    `g·(g + ∂Ẽ/∂x_{L−1})/τ_{L−1}` with g = ∂ℒ/∂x_{L−1}, Eq 47 of A.6.3 for the one hidden layer of
    which ℒ depends; for every layer below both sides of the bound are zero.
    """
    check_problem(problem)
    return _margin(problem, problem.initial_state(state))


@compiled
def _margin(problem: InferenceProblem, state: State) -> Array:
    slope = jax.grad(lambda s: jnp.sum(problem.output_loss(s)))(state)
    field = problem.vector_field(0.0, state)
    parts = [jnp.sum(g * v, axis=-1) for g, v in zip(slope, field, strict=True)]
    return -jnp.sum(jnp.stack(parts), axis=0)
