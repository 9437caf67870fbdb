"""A network in error coordinates: activities from prediction errors, one pass for all layers.

With both ends clamped the activities follow from the errors e_1 … e_{L−1} by one forward pass,
`x_l = f_l(W_l x_{l−1} + b_l) + e_l`, and `F(e) = Σ E_l(e_l) + E_L(r)` with the output error
`r = T − μ_L`. The energies of hidden layers are Gaussian or sums over units; that of the output can
be another one.

Consecutive layers of the same kind are stacked and run in a loop that is compiled once, so that a
deep network does not take long to compile. *Stacked* values hold one array `(layers, batch, n)` for
each such run of layers; the first hidden layer stands alone, for its prediction is constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from pcdyn._support.states import dot, largest_norm
from pcdyn.equilibria.solvers.base import round_off
from pcdyn.equilibria.solvers.damped import Look
from pcdyn.model.energies.energy import Energy, Gaussian, error_gradient, weigh
from pcdyn.model.energies.generalised import Separable, curvature, output_part, residual_part
from pcdyn.model.network import apply_layer, stack, structure_of
from pcdyn.model.problem import InferenceProblem, State

Stacked = tuple[Any, ...]
# Loops of up to so many layers are written out, which is faster to run and not slow to compile.
_WRITTEN_OUT = 4


class Chain(eqx.Module):
    """A problem with both ends clamped, as a function of its errors."""

    first_prediction: Any
    target: Any
    layers: tuple[Any, ...]
    output_layer: Any
    precisions: tuple[Any, ...]
    covariances: tuple[Any, ...]
    energy: Energy
    hidden: Gaussian | Separable
    lengths: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, problem: InferenceProblem):
        network, energy = problem.network, problem.energy
        hidden = residual_part(energy)
        assert isinstance(hidden, Gaussian | Separable), "the solvers have checked this"
        self.first_prediction = problem.prepared().first_prediction
        self.target = problem.output
        self.output_layer = network.layers[-1]
        self.energy, self.hidden = energy, hidden
        each = [
            (network.layers[i - 1], hidden.precision(i), network.widths[i - 1 : i + 1])
            for i in range(2, network.depth)
        ]
        runs = [list(run) for _, run in itertools.groupby(each, structure_of)]
        stacked = [stack(run) for run in runs]
        self.layers = tuple(layer for layer, _, _ in stacked)
        self.precisions = (stack([hidden.precision(1)]), *(p for _, p, _ in stacked))
        self.covariances = tuple(
            None if p is None else jax.vmap(covariance)(p) for p in self.precisions
        )
        self.lengths = (1, *map(len, runs))

    def take(self, samples: Any) -> Chain:
        """Some samples of the batch."""
        return eqx.tree_at(
            lambda c: (c.first_prediction, c.target), self,
            (self.first_prediction[samples], self.target[samples]),
        )  # fmt: skip

    def stack(self, layers: State) -> Stacked:
        """One array per hidden layer as one array per run."""
        each = iter(layers)
        return tuple(jnp.stack(list(itertools.islice(each, n))) for n in self.lengths)

    def unstack(self, stacked: Stacked) -> State:
        """One array per run as one array per hidden layer."""
        return tuple(layer for run in stacked for layer in run)

    def errors(self, state: State) -> Stacked:
        """e_1 … e_{L−1} of hidden activities."""
        activities = self.stack(state)
        predictions = (self.first_prediction[None], *self.predictions(activities)[:-1])
        return jax.tree.map(jnp.subtract, activities, predictions)

    def predictions(self, activities: Stacked) -> tuple[Any, ...]:
        """μ_2 … μ_L from the hidden activities, stacked, and the output's by itself."""
        results, below = [], activities[0][-1]
        for layer, here in zip(self.layers, activities[1:], strict=True):
            lower = jnp.concatenate([below[None], here[:-1]]) if len(here) > 1 else below[None]
            # Layer by layer: XLA multiplies one after the other faster than a batch of matrices.
            results.append(_scan(lambda _, f, x: (None, apply_layer(f, x)), None, layer, lower)[1])
            below = here[-1]
        return (*results, apply_layer(self.output_layer, below))

    def activities(self, errors: Stacked) -> tuple[Stacked, Any]:
        """The hidden activities x_1 … x_{L−1} and the output error r."""

        def climb(x: Any, layer: Any, error: Any) -> tuple[Any, Any]:
            x = apply_layer(layer, x) + error
            return x, x

        x = self.first_prediction + errors[0][0]
        hidden = [x[None]]
        for layer, error in zip(self.layers, errors[1:], strict=True):
            x, run = _scan(climb, x, layer, error)
            hidden.append(run)
        return tuple(hidden), self.target - apply_layer(self.output_layer, x)

    def output_error(self, errors: Stacked) -> tuple[Any, Stacked]:
        """The output error r, and the hidden activities."""
        hidden, output_error = self.activities(errors)
        return output_error, hidden

    def look(self, errors: Stacked) -> Look:
        """F, ∂F/∂e and the size of ∂F/∂x by two forward and two backward passes."""
        output_error, pull_chain, hidden = jax.vjp(self.output_error, errors, has_aux=True)
        weighted = self.weighted(errors)
        output_weighted = self.output_gradient(output_error)
        energy = self.free_energy(errors, output_error)
        slope = jax.tree.map(jnp.add, weighted, pull_chain(output_weighted)[0])
        _, pull = jax.vjp(self.predictions, hidden)
        (above,) = pull((*weighted[1:], output_weighted))
        residual = jax.tree.map(jnp.subtract, weighted, above)
        return Look(energy, slope, largest_norm(residual))

    def free_energy(self, errors: Stacked, output_error: Any) -> Any:
        """F from the errors of all layers."""
        if isinstance(self.hidden, Gaussian):
            hidden = 0.5 * dot(errors, self.weighted(errors))
        else:
            each = _each_layer(self.precisions, jax.tree.map(self.hidden.h, errors))
            hidden = dot(each, jax.tree.map(jnp.ones_like, each))
        return hidden + self.energy.layer_energy(self._depth, output_error, self.target)

    def output_gradient(self, output_error: Any) -> Any:
        """∂E_L/∂r: Π_L r where the output energy is Gaussian."""
        return error_gradient(self.energy, self._depth, output_error, self.target)

    def output_curvature(self, output_error: Any) -> Callable[[Any], Any]:
        """Products with ∂²E_L/∂r², or a positive stand-in; Π_L where that energy is Gaussian."""
        energy, index = output_part(self.energy, self._depth)
        if isinstance(energy, Separable):
            return partial(jnp.multiply, energy.precision_at(index, output_error))
        return jax.linearize(self.output_gradient, output_error)[1]

    def output_covariance(self, output_error: Any) -> Callable[[Any], Any]:
        """Products with the inverse of `output_curvature`, for an energy that has one."""
        energy, index = output_part(self.energy, self._depth)
        if isinstance(energy, Separable):
            return partial(jnp.multiply, 1 / energy.precision_at(index, output_error))
        return partial(weigh, covariance(curvature(energy, index, output_error)))

    @property
    def _depth(self) -> int:
        return sum(self.lengths) + 1

    def round_off(self, errors: Stacked) -> Any:
        """The round-off of F."""
        hidden, output_error = self.activities(errors)
        weighted = (*self.weighted(errors), self.output_gradient(output_error))
        return round_off(weighted, (*hidden, self.target))

    def linearise(
        self, errors: Stacked
    ) -> tuple[Callable[[Stacked], Any], Callable[[Any], Stacked]]:
        """Products with the Jacobians J_l = ∂μ_L/∂x_l: `Σ_l J_l v_l`, and `J_lᵀ v` for all l."""
        _, push = jax.linearize(lambda e: self.target - self.activities(e)[1], errors)
        transposed = jax.linear_transpose(push, errors)
        return push, lambda covector: transposed(covector)[0]

    def weighted(self, errors: Stacked) -> Stacked:
        """∂E_l/∂e_l, l = 1 … L−1: Π_l e_l where they are Gaussian."""
        if isinstance(self.hidden, Separable):
            errors = jax.tree.map(self.hidden.slope, errors)
        return _each_layer(self.precisions, errors)

    def unweighted(self, vectors: Stacked, errors: Stacked) -> Stacked:
        """Π_l⁻¹ v_l, l = 1 … L−1, or the inverse of the energies' curvature at `errors`."""
        if isinstance(self.hidden, Separable):
            bend = jax.tree.map(self.hidden.curvature, errors)
            vectors = jax.tree.map(jnp.divide, vectors, bend)
        return _each_layer(self.covariances, vectors)


def _scan(body: Any, carry: Any, layers: Any, values: Any) -> tuple[Any, Any]:
    """`body(carry, layer, value)` over a run of layers and stacked values."""
    arrays, static = eqx.partition(layers, eqx.is_array)

    def step(carry: Any, now: Any) -> tuple[Any, Any]:
        return body(carry, eqx.combine(now[0], static), now[1])

    if len(values) == 1:
        # Its width may change, which a loop does not allow.
        carry, result = step(carry, jax.tree.map(lambda x: x[0], (arrays, values)))
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(step, carry, (arrays, values), unroll=len(values) <= _WRITTEN_OUT)


def _each_layer(precisions: tuple[Any, ...], vectors: Stacked) -> Stacked:
    return tuple(jax.vmap(weigh)(p, v) for p, v in zip(precisions, vectors, strict=True))


def covariance(precision: Any) -> Any:
    """Π⁻¹ of a precision as given; `None` means 1."""
    if precision is None:
        return None
    if precision.ndim < 2:
        return 1 / precision
    identity = jnp.eye(len(precision), dtype=precision.dtype)
    return jsl.cho_solve(jsl.cho_factor(precision, lower=True), identity)
