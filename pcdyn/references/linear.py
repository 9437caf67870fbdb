"""Closed forms of linear networks: Hessian, equilibrium, exact trajectory, spectrum.

With identity activations the free layers, stacked into y, obey `τ ẏ = −H y + b` with H symmetric
and block tridiagonal. Everything here follows from H and b, for every clamp mode, precision, bias
and time constant, and works under `jax.jit`, `jax.vmap` and `jax.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float, PyTree

from pcdyn._support.arrays import as_float_array, as_host_array, check_size, converted, is_traced
from pcdyn._support.checks import as_sequence, check_choice, checked_integer
from pcdyn._support.compiling import compiled
from pcdyn._support.derivative_rules import with_rule_in_loops
from pcdyn._support.products import matmul
from pcdyn._support.types import Activities, Numbers, Scalar, State
from pcdyn.errors import InputError, ShapeError, SingularHessianError, TimesError
from pcdyn.linearisation.block_sparse import BlockFactor, Blocks
from pcdyn.linearisation.block_tridiagonal import BlockCholesky, BlockTridiagonal, largest_entry
from pcdyn.linearisation.coupling import nodes_of, weighted_squares
from pcdyn.linearisation.fluctuations import checked_temperature, fluctuations, known_modes
from pcdyn.linearisation.hessian import with_derivatives
from pcdyn.linearisation.relaxation import factor_modes, relaxed, square
from pcdyn.linearisation.whitened import (
    check_same_units,
    error_factor,
    error_matrix,
    has_errors_of_their_own,
    linear_parts,
    linear_rows,
    node_that_differs,
    root_rates,
)
from pcdyn.model.clamps import Clamp
from pcdyn.model.energies.precision import Precision
from pcdyn.model.network import Network
from pcdyn.model.problem import InferenceProblem

# The first solves, the others take out what round-off has left of it.
_CORRECTIONS = 3


@compiled
def hessian(problem: InferenceProblem) -> Blocks:
    """Compute H = ∂²F/∂y², the same for every sample and every state of a linear network.

    `H_ll = Π_l + W_{l+1}ᵀ Π_{l+1} W_{l+1}` and `H_{l,l+1} = −W_{l+1}ᵀ Π_{l+1}`; a free input
    without a prior lacks Π_0, a free output the second term. Of a graph it is `Σ_k J_kᵀ Π_k J_k`
    with J_k = ∂ε_k/∂y, which has a block for each pair of free nodes that meet in a prediction.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    """
    layers, precisions = linear_parts(problem)
    if not problem.is_chain:
        check_same_units(problem, "the Hessian")
        _check_size(problem)
        return weighted_squares(problem, linear_rows(problem), precisions)
    problem = problem.with_prior_as_layer()
    jacobians = {index: layer.matrix for index, layer in enumerate(layers, start=1)}
    return gauss_newton_hessian(problem, precisions, jacobians)


def check_linear(problem: InferenceProblem) -> None:
    """Raise what `hessian` raises, and `SizeError` where that does not fit into memory."""
    linear_parts(problem)
    _check_size(problem)


def _check_size(problem: InferenceProblem) -> None:
    entries = sum(float(width) ** 2 for width in problem.free_widths)
    check_size(entries * problem.dtype.itemsize, "the Hessian of the free layers")


def gauss_newton_hessian(
    problem: InferenceProblem, precisions: Sequence[Precision], jacobians: Mapping[int, Array]
) -> BlockTridiagonal:
    """Compute `hessian` with Jacobians J_l = ∂μ_l/∂x_{l−1}, `(n_l, n_{l−1})`, for the weights.

    For one sample of a nonlinear network it is the Hessian of F without the curvature of the
    predictions.
    """
    network = problem.network
    _check_size(problem)
    diagonal, upper = [], []
    for index in problem.free_layers:
        width = network.widths[index]
        block = jnp.zeros((width, width), network.dtype)
        if index > 0:
            block = block + precisions[index - 1].matrix(width, network.dtype)
        if index < network.depth:
            jacobian = jacobians[index + 1]
            weighted = precisions[index].weigh(jacobian.T)
            block = block + matmul(weighted, jacobian)
            if index + 1 in problem.free_layers:
                upper.append(-weighted)
        diagonal.append(block)
    return BlockTridiagonal(tuple(diagonal), tuple(upper))


def forcing(problem: InferenceProblem, like: State | None = None) -> State:
    """Compute b = −∂F/∂y at y = 0, shaped like the state: data and biases in `ẏ = −H y + b`.

    `like` gives the batch size of a problem with both ends free.
    """
    linear_parts(problem)
    zeros = problem.zeros_state() if like is None else jax.tree.map(jnp.zeros_like, like)
    return jax.tree.map(jnp.negative, problem.gradient(zeros))


def linear_equilibrium(
    problem: InferenceProblem, *, method: Literal["cholesky", "output_space"] = "cholesky"
) -> Activities:
    """Compute the equilibrium activities x_0* … x_L* of a linear network, clamped ones included.

    With the input clamped, or a prior on it, there is always one equilibrium, at any ratio of
    precisions. It has derivatives of any order, by the implicit function theorem.

    **Arguments:**

    - `method`: either `"cholesky"` (H⁻¹b with the block Cholesky factor of H, which comes from QR
      factorisations of its square root; any clamps) or `"output_space"` (both ends clamped, or
      the output and a prior on the input; solves an n_L × n_L system, best for a narrow output):
      `Π_l ε_l* = P_lᵀ S⁻¹ (T − feedforward(d))` with `P_l = W_L … W_{l+1}` and
      `S = Σ_l P_l Π_l⁻¹ P_lᵀ`. Both solve the coupled system of Theorems 3.4 and 3.5, and correct
      the solution by the gradient that is left of it, until that is round-off.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `SingularHessianError` if a free end leaves a flat direction, or a ratio is beyond what the
      dtype can resolve. Under a JAX transformation such a problem gives NaN instead, never a point
      that is no equilibrium.
    - `InputError` where the method does not apply.
    """
    check_choice(method, "method", ("cholesky", "output_space"))
    linear_parts(problem)
    given, problem = problem, problem.with_prior_as_layer()
    if method == "output_space" and not problem.both_ends_clamped:
        raise InputError(_USE_CHOLESKY)
    arrays, rest = eqx.partition(problem, eqx.is_array)
    fixed = eqx.combine(jax.lax.stop_gradient(arrays), rest)
    state, regular, pivot = _solved(fixed, method)
    if not is_traced(regular) and not bool(jnp.all(regular)):
        free = f"layers {given.free_layers}"
        if not given.is_chain:
            free = f"nodes {', '.join(map(given.node_name, given.free_layers))}"
        raise SingularHessianError(
            f"the Hessian is singular (smallest scaled pivot {float(jnp.min(pivot)):.1e}): with "
            f"the free {free} the free energy has flat directions, or so nearly that "
            f"{problem.dtype} cannot tell, and no unique equilibrium; clamp or predict more, or "
            "follow the flow from a start with pcdyn.simulate(problem, …, "
            "integrator=pcdyn.Exact())"
        )
    # Where nothing is traced there are no derivatives to put in.
    if not is_traced(problem):
        return given.activities(state)
    certain = jnp.broadcast_to(jnp.asarray(regular), state[0].shape[:-1])
    return given.activities(with_derivatives(problem, state, certain))


@compiled
def _solved(problem: InferenceProblem, method: str) -> tuple[State, Array, Array]:
    """The equilibrium, NaN unless it is regular, whether it is, and the smallest scaled pivot."""
    if node_that_differs(problem) is not None:
        return problem.map_samples(lambda one: _solved(one, method))
    state, pivot, change = _corrected(problem, method)
    eps = jnp.finfo(problem.dtype).eps
    size = sum(problem.free_widths)
    regular = (pivot > 10 * size * eps) & (change <= jnp.sqrt(eps))
    return tuple(jnp.where(regular, x, jnp.nan) for x in state), regular, pivot


def _corrected(problem: InferenceProblem, method: str) -> tuple[State, Array, Array]:
    """The equilibrium, the smallest scaled pivot, and the last correction relative to the state."""
    one = jnp.ones((), problem.dtype)
    if method == "output_space":
        before, state = _in_output_space(problem)
        return state, one, _relative(problem, before, state)
    widths = problem.widths
    if not problem.is_chain:
        state = problem.zeros_state()
    elif problem.input is not None:
        state = problem.feedforward_state()
    else:
        state = problem.zeros_state()
        # A layer of fewer units cannot tell all directions of the input.
        if problem.output is None or widths[0] > min(widths):
            return state, 0 * one, 0 * one
    factor, pivot = error_factor(problem)
    if has_errors_of_their_own(problem):
        # Each free layer has a prediction error of its own: A has full rank whatever the weights.
        pivot = one
    # Beyond, the round-off of the gradient outweighs the slowest directions.
    sizes = jnp.abs(factor.diagonal)
    resolved = jnp.min(sizes) > jnp.finfo(sizes.dtype).eps ** 0.75 * jnp.max(sizes)
    pivot = jnp.where(resolved, pivot, 0)
    before = state
    for _ in range(_CORRECTIONS):
        before = state
        state = jax.tree.map(jnp.subtract, state, factor.solve(problem.gradient(state)))
    return state, pivot, _relative(problem, before, state)


def _in_output_space(problem: InferenceProblem) -> tuple[State, State]:
    """The last two approximations of the equilibrium, from the output error that is left."""
    start, target = problem.input, problem.output
    assert start is not None and target is not None, "linear_equilibrium has refused others"
    products, precisions = _products(problem)
    network, depth = problem.network, problem.network.depth
    # The factor of S from its square root, which holds more digits.
    roots = [precisions[i - 1].spread(product).T for i, product in products.items()]
    factor = BlockCholesky((jnp.linalg.qr(jnp.concatenate(roots), mode="r").T,), ())
    covariances = {i: precisions[i - 1].unweigh(product) for i, product in products.items()}

    def climb(weighted: Array) -> State:
        layers = [start]
        for index in range(1, depth):
            layers.append(network.predict(index, layers[-1]) + matmul(weighted, covariances[index]))
        return tuple(layers[1:])

    weighted = jnp.zeros_like(target)
    before = state = climb(weighted)
    for _ in range(_CORRECTIONS):
        # The prediction is not yet where the weighted output error would pull it.
        left = target - network.predict(depth, state[-1])
        weighted = weighted + factor.solve((left - precisions[-1].unweigh(weighted),))[0]
        before, state = state, climb(weighted)
    return before, state


def _relative(problem: InferenceProblem, before: State, after: State) -> Array:
    """The largest change of an activity, relative to the largest activity."""
    change = jax.tree.map(jnp.subtract, after, before)
    size = largest_entry(problem.activities(after))
    return largest_entry(change) / jnp.where(size > 0, size, 1)


@compiled
def output_covariance(problem: InferenceProblem) -> Float[Array, "n_L n_L"]:
    """Compute the covariance of T that the network predicts: S = Σ_l P_l Π_l⁻¹ P_lᵀ.

    Here P_l = W_L … W_{l+1}. A prior on the input adds the term l = 0, P_0 Π_0⁻¹ P_0ᵀ.

    The generative model of a linear network, in which each layer is its prediction with Gaussian
    noise of covariance Π_l⁻¹ added, gives the output the mean of the feedforward pass and this
    covariance. It is the matrix through which predictive coding sees BP: `Π_l ε_l* = P_lᵀ S⁻¹ e0`
    with e0 = T − feedforward(d).

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `InputError` unless both ends are clamped, or the output and a prior on the input.
    """
    products, precisions = _products(problem)
    problem = problem.with_prior_as_layer()
    if not problem.both_ends_clamped:
        raise InputError(_CLAMP_BOTH)
    parts = (
        matmul(precisions[i - 1].unweigh(product), product.T) for i, product in products.items()
    )
    return sum(parts, start=jnp.zeros((), problem.dtype))


@compiled
def negative_log_likelihood(problem: InferenceProblem) -> Float[Array, "*batch"]:
    """Compute −log p(T | d) of a linear network, per sample: `½ e0ᵀ S⁻¹ e0 + ½ log det 2πS`.

    The hidden layers are integrated out (`output_covariance` is S). With a prior on the input that
    is, too: `−log p(T)`, of probabilistic PCA or factor analysis if there is one prediction.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `InputError` unless both ends are clamped, or the output and a prior on the input.
    """
    factor = jnp.linalg.cholesky(output_covariance(problem))
    problem = problem.with_prior_as_layer()
    assert problem.input is not None, "output_covariance has refused others"
    error = problem.output_error(problem.network.feedforward(problem.input)[-1])
    white = jsl.solve_triangular(factor, jnp.atleast_2d(error).T, lower=True).T
    log_determinant = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    constant = error.shape[-1] * math.log(2 * math.pi) + log_determinant
    return 0.5 * (jnp.sum(white.reshape(error.shape) ** 2, axis=-1) + constant)


_USE_CHOLESKY = (
    'the method "output_space" needs both ends clamped, or a prior on a free input; use '
    'method="cholesky"'
)
_CLAMP_BOTH = (
    "the likelihood is that of an output given an input, or a prior on it: clamp both ends, or the "
    "output alone and give a prior"
)


def _products(problem: InferenceProblem) -> tuple[dict[int, Array], tuple[Precision, ...]]:
    """P_l = W_L … W_{l+1} for each l = L … 1, and the precisions."""
    layers, precisions = linear_parts(problem)
    problem = problem.with_prior_as_layer()
    depth = problem.network.depth
    products = {depth: jnp.eye(problem.network.widths[-1], dtype=problem.network.dtype)}
    for index in range(depth, 1, -1):
        products[index - 1] = matmul(products[index], layers[index - 1].matrix)
    return products, precisions


class ExactFlow(eqx.Module):
    """The exact trajectory y(t) of a linear network, a function of time.

    With F = ½ ‖A y − c‖² (`pcdyn.linearisation.whitened`) and each column of A over √τ, each mode
    moves from the start by (1 − e^{−λt})/λ times its share of Aᵀ(c − A y(0)), which is t where
    λ = 0: no inverse of H is needed, so that free ends with flat directions are covered. It has
    derivatives of any order, also where rates repeat.

    - `factor`: A over √τ, which has at least as many rows as columns; `modes`: its left singular
      vectors, singular values in ascending order and right singular vectors.
    - `initial`: y(0); `residual`: c − A y(0); `scale`: τ^{-½} of each unit; `widths`: n_l of the
      free layers; `slope`: dc/dt where clamped values change along straight lines.
    - `round_off`: an estimate of how far any activity may be off by round-off, per sample: the
      singular values of A are known to eps times the largest, so that a rate that is smaller by a
      factor r has √r · eps as its relative error.
    """

    factor: Float[Array, "M N"]
    modes: tuple[Array, Array, Array]
    initial: Float[Array, "*batch N"]
    residual: Float[Array, "*batch M"]
    scale: Float[Array, " N"]
    round_off: Float[Array, "*batch"]
    widths: tuple[int, ...] = eqx.field(static=True)
    slope: Float[Array, "*batch M"] | None = None

    def __call__(self, t: Scalar) -> State:
        """Evaluate the state at time t, each layer `(n_l,)` or `(batch, n_l)`."""
        return _at(self, jnp.asarray(t))


class ExactFlows(eqx.Module):
    """The exact trajectories of samples that differ in their free units, stacked."""

    each: ExactFlow

    @property
    def round_off(self) -> Array:
        """That of each sample."""
        return self.each.round_off

    def __call__(self, t: Scalar) -> State:
        """Evaluate the state at time t."""
        return jax.vmap(lambda one: one(t))(self.each)


@compiled
def _at(flow: ExactFlow, t: Array) -> State:
    moved = relaxed(flow.factor, flow.modes, flow.residual, t, 0)
    if flow.slope is not None:
        moved = moved + relaxed(flow.factor, flow.modes, flow.slope, t, 1)
    return _split(flow.initial + _times(moved, flow.scale), flow.widths)


def exact_flow(
    problem: InferenceProblem,
    initial: State,
    *,
    towards: tuple[InferenceProblem, Scalar] | None = None,
) -> ExactFlow | ExactFlows:
    """Solve the flow of a linear network from `initial` exactly, as a function of time.

    `y(t) = y* + e^{−Ht}(y(0) − y*)` for the whole network at once. The paper (A.4) says that no
    closed form exists for more than one free layer; stacked, the layers are one linear ODE with
    constant coefficients.

    **Arguments:**

    - `towards`: the problem whose clamped values those of `problem` reach along straight lines, and
      the time when they do; they are constant unless given.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    """
    linear_parts(problem)
    start = problem.initial_state(initial)
    if node_that_differs(problem) is None:
        return _exact_flow(problem, start, towards)
    if towards is None:
        return ExactFlows(problem.map_samples(_exact_flow, start))
    end, time = towards

    def one(problem: InferenceProblem, start: State, data: tuple[Clamp, ...]) -> ExactFlow:
        return _exact_flow(problem, start, (end.with_data(*data), time))

    return ExactFlows(problem.map_samples(one, start, end.data))


@compiled
def _exact_flow(
    problem: InferenceProblem,
    initial: State,
    towards: tuple[InferenceProblem, Scalar] | None = None,
) -> ExactFlow:
    _, precisions = linear_parts(problem)
    problem = problem.with_prior_as_layer(initial)
    scale = root_rates(problem)
    matrix = error_matrix(problem)

    def target(problem: InferenceProblem) -> Array:
        """c − A y(0), with c of its clamped values."""
        errors = problem.prediction_errors(problem.activities(initial))
        each = zip(precisions, errors, problem.predicted_layers, strict=True)
        # Those of what is clamped, from what is clamped, do not depend on the state.
        white = [-p.whiten(error) for p, error, index in each if _bears(problem, index)]
        rows = jnp.concatenate(white, axis=-1)
        # Rows for the units that a sample has not: they stay where they are.
        return jnp.pad(rows, [*[(0, 0)] * (rows.ndim - 1), (0, len(matrix) - rows.shape[-1])])

    factor, residual = square(matrix * jnp.broadcast_to(scale, matrix.shape), target(problem))
    change = slope = None
    if towards is not None:
        end, time = towards
        change = square(matrix, target(end.with_prior_as_layer(initial)))[1] - residual
        slope = change / jnp.asarray(time, change.dtype)
    left, sizes, right = jax.lax.stop_gradient(known_modes(problem, factor))
    eps, largest = jnp.finfo(sizes.dtype).eps, jnp.max(sizes)
    known = jnp.where(sizes > 0, sizes, jnp.inf)
    way = jnp.abs(matmul(jax.lax.stop_gradient(residual), left))
    size = jnp.linalg.norm(jax.lax.stop_gradient(residual), axis=-1, keepdims=True)
    if change is not None:
        way = way + jnp.abs(matmul(jax.lax.stop_gradient(change), left))
        size = size + jnp.linalg.norm(jax.lax.stop_gradient(change), axis=-1, keepdims=True)
    lost = 2 * largest * way / jnp.broadcast_to(known, way.shape) + size
    start = jnp.concatenate(initial, axis=-1)
    own = jnp.max(jnp.abs(jax.lax.stop_gradient(start)), axis=-1)
    return ExactFlow(
        factor=factor,
        modes=(left, sizes, right),
        initial=start,
        residual=residual,
        scale=scale,
        round_off=eps * (own + jnp.max(lost / jnp.broadcast_to(known, way.shape), axis=-1)),
        widths=tuple(x.shape[-1] for x in initial),
        slope=slope,
    )


def single_layer_flow(
    problem: InferenceProblem, layer: int, activities: Sequence[Numbers]
) -> ExactFlow:
    """Solve the flow of one hidden layer with its neighbours held fixed exactly (A.4).

    `x(t) = e^{−At} x(0) + (I − e^{−At}) A⁻¹ [Π_l W_l x_{l−1} + W_{l+1}ᵀ Π_{l+1} x_{l+1}]` with
    `A = Π_l + W_{l+1}ᵀ Π_{l+1} W_{l+1}`; Eq 31 as printed runs backwards in time.

    **Arguments:**

    - `layer`: the index l of a hidden layer.
    - `activities`: x_0 … x_L, of which the layer gives the start and its two neighbours the data.

    **Returns:**

    The trajectory, whose state has the one layer.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `InputError` for a layer that is not hidden, `ShapeError` for another number of activities.
    """
    linear_parts(problem)
    network = problem.network
    if network.depth < 2:
        raise InputError("this network has no hidden layer")
    layer = checked_integer(layer, "layer, a hidden one,", at_least=1, at_most=network.depth - 1)
    wanted = f"activities x_0 … x_{network.depth}"
    activities = as_sequence(activities, "activities", wanted)
    if len(activities) != network.depth + 1:
        raise ShapeError(f"activities must be {wanted}, got {len(activities)} layers")
    neighbours = InferenceProblem(
        Network(network.layers[layer - 1 : layer + 1]),
        input=activities[layer - 1],
        output=activities[layer + 1],
        energy=problem.energy[layer - 1 : layer + 1],
        time_constants=problem.time_constants[layer - 1 : layer + 2],
    )
    return _exact_flow(neighbours, neighbours.initial_state((activities[layer],)))


class Moments(eqx.Module):
    """Mean and covariance of the free units of a linear network with noise, in time.

    - `times`: shape `(time,)`.
    - `mean`: of each free layer, `(time, n_l)` or `(time, batch, n_l)`: the flow without noise.
    - `covariance`: of the units of all free layers, stacked in order, `(time, N, N)`. All samples
      have the same.
    - `layers`: the indices l of the free layers.
    """

    times: Float[Array, " time"]
    mean: State
    covariance: Float[Array, "time N N"]
    layers: tuple[int, ...] = eqx.field(static=True)

    @property
    def standard_deviations(self) -> State:
        """Standard deviation of every unit, `(time, n_l)` for each free layer."""
        variances = jnp.diagonal(self.covariance, axis1=-2, axis2=-1)
        return _split(jnp.sqrt(variances), tuple(x.shape[-1] for x in self.mean))

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a readable account, for all samples together."""
        text = f"Moments of layers {self.layers} with {[x.shape[-1] for x in self.mean]} units"
        if is_traced(self.covariance):
            return f"{text} inside of a JAX transformation"
        if self.covariance.ndim > 3:
            return f"{text}, of {len(self.covariance)} networks"
        lines = [f"{text}, {len(self.times)} times to {float(self.times[-1]):g}"]
        for index, each in zip(self.layers, self.standard_deviations, strict=True):
            low, high = float(jnp.min(each[-1])), float(jnp.max(each[-1]))
            lines.append(f"  layer {index}: standard deviations at the end {low:.3g} … {high:.3g}")
        return "\n".join(lines)


def moments(
    problem: InferenceProblem,
    temperature: Scalar,
    times: Numbers,
    *,
    initial: str | Sequence[Numbers] = "feedforward",
    covariance: Numbers | None = None,
) -> Moments:
    """Compute the law of `τ dx = −∂F/∂x dt + √(2Tτ) dW` for a linear network, without sampling.

    At each time the free units are Gaussian: their mean is the flow without noise, and their
    covariance tends to `stationary_covariance`, if there is one. Flat directions, in which there
    is none, are covered. The mean has derivatives of any order, the covariance none with respect
    to the network, which are refused by name.

    **Arguments:**

    - `temperature`: T, at least 0.
    - `times`: at least one, none negative, in units of the activity time constant.
    - `initial`: where it starts, as for `pcdyn.simulate`: the mean, if there is a `covariance`.
    - `covariance`: that of the start, `(N, N)`; a point unless given.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `InputError` for a temperature or a covariance that is none, and where samples of a batch
      differ in their free units; `TimesError` for negative times.
    - `SizeError` where the covariances do not fit into memory.
    """
    linear_parts(problem)
    check_same_units(problem, "the covariance")
    temperature = checked_temperature(temperature)
    known = as_host_array(times, "times", error=TimesError)
    if known.ndim != 1 or known.size == 0 or np.min(known) < 0:
        raise TimesError(f"times must be a vector of at least one, none negative, got {times!r}")
    units = sum(problem.free_widths)
    size = float(units) ** 2 * problem.dtype.itemsize
    check_size((len(known) + 2) * size, f"covariances of {units} units at {len(known)} times")
    start = None if covariance is None else _checked_covariance(covariance, units, problem.dtype)
    flow = exact_flow(problem, problem.initial_state(initial))
    found = _moments(problem, temperature, flow, jnp.asarray(known, problem.dtype), start)
    return Moments(*found, problem.free_layers)


@compiled
def _moments(
    problem: InferenceProblem,
    temperature: Scalar,
    flow: ExactFlow | ExactFlows,
    times: Array,
    start: Array | None,
) -> tuple[Array, State, Array]:
    process = fluctuations(problem, temperature)
    covariance = jax.vmap(process.covariance)(times)
    if start is not None:
        covariance = covariance + jax.vmap(lambda t: process.carried(start, t))(times)
    return times, jax.vmap(flow)(times), covariance


def _checked_covariance(value: Numbers, units: int, dtype: np.dtype) -> Array:
    array = as_float_array(value, "covariance")
    if array.shape != (units, units):
        raise ShapeError(
            f"covariance has shape {array.shape}, but that of all {units} free units, stacked in "
            f"order, has {(units, units)}"
        )
    if not is_traced(array):
        known = np.asarray(array, float)
        slack = 1e3 * float(jnp.finfo(array.dtype).eps) * np.max(np.abs(known))
        even = np.max(np.abs(known - known.T)) <= slack
        if not even or np.min(np.linalg.eigvalsh((known + known.T) / 2)) < -units * slack:
            raise InputError("covariance must be symmetric and have no negative eigenvalue")
    return converted(array, dtype, "covariance")


def stationary_covariance(problem: InferenceProblem, temperature: Scalar) -> Float[Array, "N N"]:
    """Compute T·H⁻¹, which the covariance of a linear network with noise tends to.

    It is that of the density exp(−F/T) of the free units, stacked in order; at T = 1 of the
    posterior (`pcdyn.posterior`). Time constants play no part in it. All samples have the same. It
    has derivatives of any order.

    **Arguments:**

    - `temperature`: T, at least 0.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `SingularHessianError` as `linear_equilibrium` raises it: along a flat direction the variance
      grows without end (`moments` has it at any time). Under a JAX transformation it is NaN.
    - `InputError` for a temperature that is none, and where samples of a batch differ in their
      free units.
    - `SizeError` where it does not fit into memory.
    """
    linear_parts(problem)
    check_same_units(problem, "the covariance")
    temperature = checked_temperature(temperature)
    units = sum(problem.free_widths)
    size = 3 * float(units) ** 2 * problem.dtype.itemsize
    check_size(size, f"the covariance of {units} units")
    rest = jax.lax.stop_gradient(tuple(linear_equilibrium(problem)))
    regular = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in rest]))
    return _stationary(problem, temperature, regular)


@compiled
def _stationary(problem: InferenceProblem, temperature: Scalar, regular: Array) -> Array:
    scaled: Array = jnp.asarray(temperature, problem.dtype) * _inverse_hessian(problem)
    return jnp.where(regular, scaled, jnp.nan)


@eqx.filter_custom_jvp
def _inverse_hessian_once(problem: InferenceProblem) -> Array:
    """H⁻¹, with 0 where a sample has no unit."""
    factor, _ = error_factor(problem)
    ones = tuple(jnp.ones(width, problem.dtype) for width in problem.free_widths)
    present = jnp.concatenate(problem.without_padding(ones))
    return dense_inverse(factor, problem.free_widths) * jnp.outer(present, present)


_inverse_hessian = with_rule_in_loops(_inverse_hessian_once)


@_inverse_hessian_once.def_jvp
def _inverse_hessian_jvp(
    primals: tuple[InferenceProblem], tangents: tuple[PyTree]
) -> tuple[Array, Array]:
    (problem,), (tangent,) = primals, tangents
    inverse = _inverse_hessian(problem)
    _, change = eqx.filter_jvp(lambda p: hessian(p).dense(), (problem,), (tangent,))
    change = jnp.zeros_like(inverse) if change is None else change
    return inverse, -matmul(matmul(inverse, change), inverse)


@compiled
def dense_inverse(factor: BlockFactor, widths: tuple[int, ...]) -> Array:
    """H⁻¹ as one matrix from the block Cholesky factor of H."""
    eye = jnp.eye(sum(widths), dtype=factor.factors[0].dtype)
    units = jnp.split(eye, np.cumsum(widths)[:-1], axis=1)
    rows = jnp.concatenate(factor.solve(tuple(units)), axis=1)
    return (rows + rows.T) / 2


def spectrum(problem: InferenceProblem) -> Float[Array, " N"]:
    """Compute the decay rates of a linear network's flow in ascending order, in 1/(time units).

    They are the eigenvalues of H (of τ⁻¹H with time constants). Explicit Euler is stable for
    steps below 2 / the largest. Where rates coincide, the derivative of each is that of their mean.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    """
    return linear_modes(problem)[0]


@compiled
def relaxation_times(problem: InferenceProblem) -> Float[Array, " N"]:
    """Compute 1 / `spectrum`, descending; infinite for flat directions (within round-off)."""
    rates = spectrum(problem)
    flat = is_flat(rates)
    return jnp.where(flat, jnp.inf, 1 / jnp.where(flat, 1, rates))


def is_flat(rates: Float[Array, " N"]) -> Array:
    """Which decay rates are zero within round-off."""
    return rates <= rates.size * jnp.finfo(rates.dtype).eps * rates[-1]


@compiled
def linear_modes(problem: InferenceProblem) -> tuple[Array, Array, Array]:
    """Compute the ascending eigenvalues and vectors of `τ^{-½} H τ^{-½}`, and τ^{-½} per unit.

    With that scale, a state y moves as `scale · (modes @ a)`, the amplitudes a decaying at these
    rates.
    """
    linear_parts(problem)
    units = sum(problem.free_widths)
    check_size(2 * float(units) ** 2 * problem.dtype.itemsize, f"all modes of {units} units")
    matrix, scale = error_matrix(problem), root_rates(problem)
    (factor,) = square(matrix * jnp.broadcast_to(scale, matrix.shape))
    return (*factor_modes(factor), scale)


def _bears(problem: InferenceProblem, index: int) -> bool:
    """Whether the error of a prediction depends on the state: in a chain each does."""
    return problem.is_chain or any(n in problem.free_layers for n in nodes_of(problem, index))


def _times(rows: Float[Array, "*batch N"], vector: Float[Array, " N"]) -> Array:
    return rows * jnp.broadcast_to(vector, rows.shape)


def _split(stacked: Float[Array, "*batch N"], widths: tuple[int, ...]) -> State:
    offsets = [sum(widths[:i]) for i in range(1, len(widths))]
    return tuple(jnp.split(stacked, offsets, axis=-1))
