"""Target propagation as learning rules: exact inverses, learned inverses, and the difference form.

Targets t_l are passed down from the output; layer l then learns from its local error
`t_l − x_l` at the feedforward pass, `∂/∂W_l = −(f'_l ∘ (t_l − x_l)) x_{l−1}ᵀ` (Eq 26).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray, PyTree

from pcdyn._support.checks import checked_number, flag, integer, optional
from pcdyn._support.types import Activities
from pcdyn.errors import ShapeError
from pcdyn.learning.rules.base import BatchGradient, Rule, check_clamped_input
from pcdyn.model.activations import Activation, get_activation
from pcdyn.model.network import Dense, Network, apply_layer
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import (
    NetworkOrGraph,
    feedforward,
    local_gradient,
    target_propagation,
)


class TargetPropagation(Rule):
    """Target propagation by exact inverses, `t_{l−1} = W_l⁺ (f_l⁻¹(t_l) − b_l)`.

    A target outside the range of an activation has no preimage: samples without targets contribute
    nothing, and their `residual` is infinite. Where targets exist they are the equilibrium of
    predictive coding with the input free (Theorem 3.3).
    """

    @property
    def name(self) -> str:
        return "target propagation"

    def check(self, problem: InferenceProblem) -> None:
        """Raise what `pcdyn.target_propagation` raises, and `InputError` for a latent input."""
        check_clamped_input(self.name, problem)
        target_propagation(problem)

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        return ()

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        found = target_propagation(problem)
        activities = feedforward(problem)
        errors = _local_errors(found.values, activities)
        learned = _from_targets(problem, activities, _where_kept(found.exists, errors))
        residual = jnp.where(found.exists, learned.residual, jnp.inf)
        return dataclasses.replace(learned, residual=residual), state


class LearnedTargetPropagation(Rule):
    """Target propagation by inverse weights that are learned beside those of the network.

    Targets are `t_{l−1} = g_l(t_l)`, or with `difference` `t_{l−1} = x_{l−1} + g_l(t_l) − g_l(x_l)`
    (Lee et al. 2015), which corrects for an inexact inverse; `t_L = x_L + β (T − x_L)` with
    β = `output_step`. The inverse `g_l(x) = h_l(V_l x + c_l)` descends its reconstruction error
    `½ ‖x_{l−1} − g_l(f_l(W_l x_{l−1} + b_l))‖²`, averaged over the batch, by `inverse_steps` steps
    of `inverse_rate` per batch (Eq 26 with the sign of the inverse's update corrected). `noise` is
    the standard deviation of Gaussian noise added to the x_{l−1} that it reconstructs.

    h_l is `activation`, or that of the layer below, whose activities it must give.
    """

    difference: bool = eqx.field(static=True, default=True, converter=flag("difference"))
    inverse_rate: float = 0.05
    inverse_steps: int = eqx.field(
        static=True, default=1, converter=integer("inverse_steps", at_least=0)
    )
    noise: float = 0.0
    output_step: float = 1.0
    activation: Activation | str | None = eqx.field(
        static=True, default=None, converter=optional(get_activation)
    )

    def __check_init__(self) -> None:
        for name in ("inverse_rate", "output_step"):
            checked_number(getattr(self, name), name, above=0)
        checked_number(self.noise, "noise", at_least=0)

    @property
    def name(self) -> str:
        kind = "difference target propagation" if self.difference else "target propagation"
        return kind if self.difference else f"{kind}, learned inverses"

    def check(self, problem: InferenceProblem) -> None:
        """Raise `ShapeError` for layers that are not `Dense`, unless an activation is given.

        A latent input is an `InputError`.
        """
        check_clamped_input(self.name, problem)
        for index, layer in enumerate(problem.network.layers[:-1], start=1):
            if self.activation is None and not isinstance(layer, Dense):
                raise ShapeError(
                    f"layer {index} is a {type(layer).__name__}, whose inverse needs an activation"
                )

    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        """Draw inverses g_2 … g_L with Gaussian weights of standard deviation 1/√n_l.

        Returns them and a key.
        """
        key, *keys = jr.split(key, network.depth)
        inverses = []
        for index, each in enumerate(keys, start=2):
            below, here = network.widths[index - 1], network.widths[index]
            activation = self.activation
            if activation is None:
                activation = network.layers[index - 2].activation
            weight = jr.normal(each, (below, here), network.dtype) / math.sqrt(here)
            bias = jnp.zeros(below, network.dtype)
            inverses.append(Dense(weight, bias, get_activation(activation)))
        return tuple(inverses), key

    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        inverses, key = state
        key, draw = jr.split(key)
        activities = feedforward(problem)
        inverses = self._autoencode(problem.network, inverses, activities, draw)
        targets = self.targets(problem, inverses)
        learned = _from_targets(problem, activities, _local_errors(targets, activities))
        return learned, (inverses, key)

    def targets(self, problem: InferenceProblem, inverses: Sequence[Dense]) -> Activities:
        """Compute the targets t_1 … t_L, after x_0, which needs none."""
        activities = feedforward(problem)
        top = activities[-1] + self.output_step * problem.output_error(activities[-1])
        targets = [top]
        for index in range(problem.network.depth, 1, -1):
            inverse = inverses[index - 2]
            below = apply_layer(inverse, targets[0])
            if self.difference:
                below = below + activities[index - 1] - apply_layer(inverse, activities[index])
            targets.insert(0, below)
        return (activities[0], *targets)

    def _autoencode(
        self,
        network: Network,
        inverses: tuple[Dense, ...],
        activities: Activities,
        key: PRNGKeyArray,
    ) -> tuple[Dense, ...]:
        """The inverses after their own descent."""
        corrupted = [
            x + self.noise * jr.normal(k, x.shape, x.dtype)
            for x, k in zip(activities[1:-1], jr.split(key, network.depth - 1), strict=True)
        ]
        above = [network.predict(index, x) for index, x in enumerate(corrupted, start=2)]
        arrays, static = eqx.partition(inverses, eqx.is_inexact_array)

        def reconstruction(arrays: PyTree) -> Array:
            layers = eqx.combine(arrays, static)
            errors = [
                x - apply_layer(layer, y)
                for layer, x, y in zip(layers, corrupted, above, strict=True)
            ]
            return 0.5 * jnp.sum(jnp.stack([jnp.mean(jnp.sum(e**2, -1)) for e in errors]))

        for _ in range(self.inverse_steps):
            slope = jax.grad(reconstruction)(arrays)
            arrays = jax.tree.map(lambda v, g: v - self.inverse_rate * g, arrays, slope)
        return eqx.combine(arrays, static)


def _local_errors(targets: Activities, activities: Activities) -> tuple[Array, ...]:
    """t_l − x_l for l = 1 … L."""
    return tuple(t - x for t, x in zip(targets[1:], activities[1:], strict=True))


def _where_kept(keep: Array, errors: tuple[Array, ...]) -> tuple[Array, ...]:
    """Zero where a sample is not kept, even if it is NaN there."""
    return tuple(jnp.where(keep[:, None], e, 0) for e in errors)


def _from_targets(
    problem: InferenceProblem, activities: Activities, errors: tuple[Array, ...]
) -> BatchGradient:
    gradient = local_gradient(problem.network, activities, errors)
    residual = jnp.zeros(activities[0].shape[0], problem.network.dtype)
    return BatchGradient(gradient, problem.activities(problem.state_of(activities)), residual)
