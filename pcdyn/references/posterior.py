"""The posterior of a linear network: what message passing along its layers computes.

Each layer is its prediction with Gaussian noise of covariance Π_l⁻¹ added, so that the free layers
given the clamped ones are Gaussian, with mean x* = H⁻¹b and covariance H⁻¹. The layers are a chain,
on which belief propagation is exact: messages once up and once down, in O(Σ n³), give each layer
its mean and its diagonal block of H⁻¹. Here the factor of H is the pass up (a Kalman filter over
depth in its square-root information form) and `BlockCholesky.inverse_diagonal` the pass down (the
smoother of Rauch, Tung and Striebel). The discussion of the paper asks for such an inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from pcdyn._support.arrays import as_float_array, check_size, is_traced
from pcdyn._support.checks import as_sequence, check_key, checked_integer
from pcdyn._support.compiling import compiled
from pcdyn._support.derivative_rules import with_rule_in_loops
from pcdyn._support.products import matmul
from pcdyn._support.types import Numbers, State
from pcdyn.errors import ShapeError
from pcdyn.linearisation.block_sparse import BlockFactor
from pcdyn.linearisation.block_tridiagonal import BlockCholesky
from pcdyn.linearisation.whitened import (
    check_same_units,
    error_factor,
    linear_parts,
    precisions_of,
)
from pcdyn.model.graph import Graph
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import dense_inverse, hessian, linear_equilibrium


class Posterior(eqx.Module):
    """The Gaussian of the free layers of a linear network, given the clamped ones.

    - `mean`: of each free layer, `(n_l,)` or `(batch, n_l)`: the equilibrium of inference.
    - `covariances`: of each free layer, `(n_l, n_l)`, the diagonal blocks of H⁻¹. All samples have
      the same.
    - `log_evidence`: log p(clamped output | clamped input), per sample. NaN for a graph that is no
      generative model, for it has a cycle or a node with several predictions.
    - `factor`: the block Cholesky factor of H, the precision of all free layers together.
    - `layers`: the indices l of the free layers.
    """

    mean: State
    covariances: tuple[Float[Array, "_ _"], ...]
    log_evidence: Float[Array, "*batch"]
    factor: BlockFactor
    layers: tuple[int, ...] = eqx.field(static=True)

    @property
    def standard_deviations(self) -> tuple[Float[Array, "*networks _"], ...]:
        """Standard deviation of every unit, `(n_l,)` for each free layer."""
        diagonals = (jnp.diagonal(c, axis1=-2, axis2=-1) for c in self.covariances)
        return tuple(jnp.sqrt(each) for each in diagonals)

    def covariance(self) -> Float[Array, "N N"]:
        """Compute H⁻¹, the covariance of all free layers stacked, N = Σ n_l.

        **Raises:**

        - `SizeError` where it does not fit into memory.
        """
        widths = [x.shape[-1] for x in self.mean]
        dtype = self.mean[0].dtype
        check_size(2 * float(sum(widths)) ** 2 * dtype.itemsize, "the covariance of all free units")
        return dense_inverse(self.factor, tuple(widths))

    def log_density(self, state: Sequence[Numbers]) -> Float[Array, "*shape"]:
        """Compute the log of the posterior's density at a state of the free layers.

        **Arguments:**

        - `state`: an array for each free layer, shaped like `mean`, or like what `sample` returns.

        **Returns:**

        One number for each state, per sample.

        **Raises:**

        - `ShapeError`, `DtypeError` or `NonFiniteError` for a state that does not fit.
        """
        return _log_density(self, self._checked(state))

    def sample(self, key: PRNGKeyArray, *, count: int | None = None) -> State:
        """Draw states of the free layers, for each sample of a batch.

        **Arguments:**

        - `key`: for the noise.
        - `count`: how many; one without an axis of its own unless given.

        **Returns:**

        An array for each free layer, shaped like `mean` with an axis of `count` before it.

        **Raises:**

        - `SizeError` for more states than fit into memory.
        """
        check_key(key)
        leading = () if count is None else (checked_integer(count, "count", at_least=1),)
        numbers = math.prod(leading) * sum(x.size for x in self.mean)
        check_size(self.mean[0].dtype.itemsize * numbers, "the drawn states")
        return _draw(self, key, leading)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a readable account, for all samples together."""
        names = ", ".join(map(str, self.layers))
        layers = "layer" if len(self.layers) == 1 else "layers"
        text = f"Posterior of {layers} {names} with {[x.shape[-1] for x in self.mean]} units"
        if is_traced(self.log_evidence):
            return f"{text} inside of a JAX transformation"
        if self.covariances[0].ndim > 2:
            return f"{text}, of {len(self.covariances[0])} networks"
        evidence = np.asarray(self.log_evidence)
        samples = "one sample" if evidence.ndim == 0 else f"{len(evidence)} samples"
        spreads = [
            f"  layer {index}: standard deviations {np.min(s):.3g} … {np.max(s):.3g}"
            for index, s in zip(self.layers, self.standard_deviations, strict=True)
        ]
        average = "" if evidence.ndim == 0 else ", mean over the samples"
        return "\n".join(
            [f"{text}, {samples}", *spreads, f"  log evidence {evidence.mean():.4g}{average}"]
        )

    def _checked(self, state: Sequence[Numbers]) -> State:
        wanted = f"a state of the free layers {self.layers}, an array for each"
        given = as_sequence(state, "state", wanted)
        arrays = [as_float_array(x, f"state {i}") for i, x in enumerate(given)]
        shapes, needed = [x.shape for x in arrays], [x.shape for x in self.mean]
        fits = len(shapes) == len(needed) and all(
            shape[max(0, len(shape) - len(need)) :] == need
            for shape, need in zip(shapes, needed, strict=True)
        )
        if not fits or len({shape[:-1] for shape in shapes}) != 1:
            raise ShapeError(
                f"state must be {wanted}, of shapes {needed}, with the same axes before them or "
                f"none, got {shapes}"
            )
        return tuple(x.astype(m.dtype) for x, m in zip(arrays, self.mean, strict=True))


@compiled
def _log_density(given: Posterior, state: State) -> Array:
    away = jax.tree.map(lambda x, m: x - jnp.broadcast_to(m, x.shape), state, given.mean)
    white = jnp.concatenate(given.factor.times_transposed(away), axis=-1)
    constant = given.factor.log_determinant - white.shape[-1] * math.log(2 * math.pi)
    return 0.5 * (constant - jnp.sum(white**2, axis=-1))


@compiled
def _draw(given: Posterior, key: PRNGKeyArray, leading: tuple[int, ...]) -> State:
    keys = jr.split(key, len(given.mean))
    white = tuple(
        jr.normal(k, (*leading, *x.shape), x.dtype) for k, x in zip(keys, given.mean, strict=True)
    )
    noise = given.factor.solve_transposed(white)
    return jax.tree.map(lambda e, m: jnp.broadcast_to(m, e.shape) + e, noise, given.mean)


def posterior(problem: InferenceProblem) -> Posterior:
    """Compute the Gaussian posterior of a linear network's free layers, given the clamped ones.

    The marginals of each layer are those of belief propagation along the layers, which is exact
    for a chain, and cost O(Σ n³): no inverse of H as a whole is formed. With the output free it is
    the prediction of the network with its noise. With the input free and no prior on it, its prior
    is flat, of density 1, and so is meant the evidence. It has derivatives of any order.

    **Returns:**

    The posterior: means, covariances and standard deviations of layers, the log evidence, and
    methods for the covariance of all free layers, for its density and for samples.

    **Raises:**

    - `NotLinearError` for networks that are not linear and energies that are not Gaussian.
    - `SingularHessianError` if a free end leaves a flat direction, in which there is no posterior.
      Under a JAX transformation everything is NaN instead.

    Source: Kschischang, Frey & Loeliger 2001; Rauch, Tung & Striebel 1965.
    """
    linear_parts(problem)
    check_same_units(problem, "the covariance")
    rest = linear_equilibrium(problem)
    mean = problem.state_of(rest)
    factor, covariances, log_evidence = _given_mean(problem.with_prior_as_layer(), mean)
    if isinstance(problem.graph, Graph) and not problem.graph.is_generative:
        log_evidence = jnp.full_like(log_evidence, jnp.nan)
    return Posterior(mean, covariances, log_evidence, factor, problem.free_layers)


@eqx.filter_jit
def _given_mean(
    problem: InferenceProblem, mean: State
) -> tuple[BlockFactor, tuple[Array, ...], Array]:
    """The factor of H, the diagonal blocks of H⁻¹ and the log evidence."""
    factor = _factor(problem) if problem.is_chain else hessian(problem).cholesky()
    # NaN where `linear_equilibrium` has found H singular.
    known = jnp.where(jnp.isfinite(jax.lax.stop_gradient(mean[0]).ravel()[0]), 1.0, jnp.nan)
    known = known.astype(problem.dtype)
    factor = jax.tree.map(lambda x: known * x, factor)
    units = sum(x.shape[-1] for x in mean)
    volume = 0.5 * (units * math.log(2 * math.pi) - factor.log_determinant)
    log_evidence = volume - problem.free_energy(mean) - log_normaliser(problem)
    return factor, factor.inverse_diagonal(), log_evidence


def log_normaliser(problem: InferenceProblem) -> Array:
    """Σ_l ½ n_l log 2π − ½ log det Π_l over the predicted layers: F plus this is −log p(x)."""
    total = jnp.zeros((), problem.dtype)
    precisions = precisions_of(problem, "densities of Gaussian noise need")
    for precision, index in zip(precisions, problem.predicted_layers, strict=True):
        width = problem.widths[problem.target_node(index)]
        log_determinant = precision.log_determinant(width)
        total = total + 0.5 * (width * math.log(2 * math.pi) - log_determinant)
    return total


@eqx.filter_custom_jvp
def _factor_once(problem: InferenceProblem) -> BlockCholesky:
    """The factor of `error_factor`, whose QR factorisations have no derivative of their own where
    they are padded with zeros."""
    factor, _ = error_factor(problem)
    assert isinstance(factor, BlockCholesky), "it is asked for chains alone"
    return factor


_factor = with_rule_in_loops(_factor_once)


@_factor_once.def_jvp
def _factor_jvp(
    primals: tuple[InferenceProblem], tangents: tuple[PyTree]
) -> tuple[BlockCholesky, BlockCholesky]:
    """From dH = dL Lᵀ + L dLᵀ, block after block."""
    (problem,), (tangent,) = primals, tangents
    factor = _factor(problem)
    matrix: Any
    change: Any
    matrix, change = eqx.filter_jvp(hessian, (problem,), (tangent,))
    # Blocks that do not depend on what moves have no tangent at all.
    change = jax.tree.map(lambda x, c: jnp.zeros_like(x) if c is None else c, matrix, change)
    factors: list[Array] = []
    couplings: list[Array] = []
    for i, (lower, moved) in enumerate(zip(factor.factors, change.diagonal, strict=True)):
        if i > 0:
            across = matmul(couplings[-1].T, factor.couplings[i - 1])
            moved = moved - across - across.T
        inner = jsl.solve_triangular(lower, moved, lower=True)
        inner = jsl.solve_triangular(lower, inner.T, lower=True)
        half = jnp.tril(inner) - jnp.diag(jnp.diagonal(inner)) / 2
        factors.append(matmul(lower, half))
        if i < len(factor.couplings):
            rest = change.upper[i] - matmul(factors[-1], factor.couplings[i])
            couplings.append(jsl.solve_triangular(lower, rest, lower=True))
    return factor, BlockCholesky(tuple(factors), tuple(couplings))
