"""The variational free energy with the log-determinants that the paper drops.

Each layer is its prediction with Gaussian noise of covariance Π_l⁻¹ added, so that a network is a
density p(x_1 … x_L | x_0) and F = ½ Σ ε_lᵀ Π_l ε_l is −log of it only up to terms in which the
precisions appear. They matter as soon as precisions are learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from pcdyn._support.arrays import as_float_array, is_traced
from pcdyn._support.types import Numbers, State
from pcdyn.errors import InputError, PosteriorError, ShapeError
from pcdyn.linearisation.block_sparse import Blocks
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.linearisation.whitened import is_linear, node_that_differs, precisions_of
from pcdyn.model.energies.precision import Precision, asymmetry_of
from pcdyn.model.problem import InferenceProblem, check_problem
from pcdyn.references.linear import hessian
from pcdyn.references.posterior import log_normaliser

PosteriorName = Literal["delta", "laplace"]


def variational_free_energy(
    problem: InferenceProblem,
    state: Sequence[Numbers],
    *,
    posterior: PosteriorName | ArrayLike = "laplace",
) -> Float[Array, "*batch"]:
    """Compute −log p(T | d) or a bound of it, per sample, from a posterior with mean `state`.

    `−log p(x_1 … x_L | d) = Σ_l ½ ε_lᵀ Π_l ε_l − ½ log det Π_l + ½ n_l log 2π` is averaged over the
    posterior of the free layers, and its entropy subtracted. With H = ∂²F/∂x² and N free units,
    `posterior` is

    - `"delta"`: all of the posterior at `state`, as in the paper. Its entropy, an infinite
      constant, is left out, so that this is no bound: it has no lower bound in the precisions.
    - `"laplace"`: Gaussian with covariance H⁻¹, which adds `½ log det H − ½ N log 2π`. For a linear
      network an upper bound, at the equilibrium equal to `pcdyn.linear.negative_log_likelihood`.
    - a covariance Σ of the stacked free layers, shape `(N, N)`, the same for every sample, which
      adds `½ tr(HΣ) − ½ log det Σ − ½ N (1 + log 2π)`. For a linear network an upper bound.

    Of a nonlinear network H is the whole Hessian at the state, and the average over the posterior
    is to second order: the Laplace approximation, which can lie on either side of −log p(T | d).

    Sources: Friston 2003; Bogacz 2017, A tutorial on the free-energy framework.

    **Raises:**

    - `InputError` for energies that are no densities (only `pcdyn.Gaussian` is one).
    - `PosteriorError` where a Hessian or a covariance is not positive definite (NaN under a JAX
      transformation) or a covariance is not symmetric.
    - What a state that does not fit raises.
    """
    check_problem(problem)
    check_gaussian(problem)
    state = problem.initial_state(state)
    if isinstance(posterior, str):
        check_posterior(posterior)
    else:
        posterior = _checked_covariance(posterior, state).astype(problem.dtype)
    found = _free_energy(problem, state, posterior)
    if not is_traced(found) and np.isnan(np.asarray(found)).any():
        raise PosteriorError(
            f"{int(np.isnan(np.asarray(found)).sum())} of {np.size(found)} samples have a Hessian "
            "or a covariance that is not positive definite: take a state at an equilibrium "
            "(pcdyn.equilibrium) that is a minimum, a symmetric positive definite covariance, or "
            'posterior="delta"'
        )
    return found


@eqx.filter_jit
def _free_energy(
    problem: InferenceProblem, state: State, posterior: PosteriorName | Array
) -> Float[Array, "*batch"]:
    free_energy = problem.free_energy(state) + log_normaliser(problem)
    count = sum(x.shape[-1] for x in state)
    if isinstance(posterior, str):
        if posterior == "delta":
            return free_energy
        curvature = _over_samples(problem, state, lambda h: h.cholesky().log_determinant)
        return free_energy + 0.5 * (curvature - count * math.log(2 * math.pi))
    spread = _over_samples(problem, state, lambda h: jnp.sum(h.dense() * posterior))
    entropy = Precision(posterior).log_determinant(count) + count * (1 + math.log(2 * math.pi))
    return free_energy + 0.5 * (spread - entropy)


def check_gaussian(problem: InferenceProblem) -> None:
    """Raise `InputError` unless the energy is −log of a density up to a known constant."""
    precisions_of(problem, "densities of Gaussian noise need")


def check_posterior(posterior: object) -> None:
    """Raise `InputError` for a posterior that is no known name."""
    if isinstance(posterior, str) and posterior in get_args(PosteriorName):
        return
    given = repr(posterior) if isinstance(posterior, str) else f"a {type(posterior).__name__}"
    raise InputError(
        f'unknown posterior {given}: use "delta" or "laplace"; a covariance is taken by '
        "variational_free_energy only"
    )


def _over_samples(
    problem: InferenceProblem, state: State, function: Callable[[Blocks], Array]
) -> Array:
    """`function` of H, per sample; once for all samples if the network is linear."""
    if is_linear(problem.graph) and node_that_differs(problem) is None:
        return function(hessian(problem))
    if state[0].ndim == 1:
        return function(free_energy_hessian(problem, state))
    return problem.map_samples(lambda one, at: function(free_energy_hessian(one, at)), state)


def _checked_covariance(value: ArrayLike, state: State) -> Array:
    covariance = as_float_array(value, "posterior")
    count = sum(x.shape[-1] for x in state)
    if covariance.shape != (count, count):
        raise ShapeError(
            f"the posterior covariance has shape {covariance.shape}, but the free layers have "
            f"{count} units: give ({count}, {count})"
        )
    if not is_traced(covariance) and (asymmetry := asymmetry_of(np.asarray(covariance))):
        raise PosteriorError(
            f"the posterior covariance is not symmetric (relative asymmetry {asymmetry:.1e}); use "
            "(S + S.T) / 2 if that is what you mean"
        )
    return covariance
