"""A network in error coordinates: activities from prediction errors, and products with Jacobians.

With the input clamped the activities follow from the errors e_1 … e_{L−1} by one forward pass,
`x_l = f_l(W_l x_{l−1} + b_l) + e_l`, and `F(e) = ½ Σ e_lᵀ Π_l e_l + ½ rᵀ Π_L r` with the output
error `r = T − μ_L`. One sample throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pcdyn.energy import Gaussian
from pcdyn.problem import InferenceProblem, State

Pull = Callable[[Any], Any]


class Chain(eqx.Module):
    """A problem with both ends clamped, as a function of its errors."""

    problem: InferenceProblem
    first_prediction: Any
    target: Any

    def __init__(self, problem: InferenceProblem):
        self.problem = problem
        self.first_prediction = problem.first_prediction()
        self.target = problem.output

    @property
    def gaussian(self) -> Gaussian:
        """The energy, which the solvers have checked to be Gaussian."""
        energy = self.problem.energy
        assert isinstance(energy, Gaussian)
        return energy

    @property
    def depth(self) -> int:
        return self.problem.network.depth

    def errors(self, state: State) -> State:
        """e_1 … e_{L−1} of hidden activities."""
        activities = self.problem.activities(state)
        return self.problem.prediction_errors(activities, self.first_prediction)[:-1]

    def activities(self, errors: State) -> tuple[State, Any]:
        """The hidden activities x_1 … x_{L−1} and the output error r."""
        hidden = [self.first_prediction + errors[0]]
        for index, error in enumerate(errors[1:], start=2):
            hidden.append(self.problem.network.predict(index, hidden[-1]) + error)
        output = self.problem.network.predict(self.depth, hidden[-1])
        return tuple(hidden), self.target - output

    def energy(self, errors: State) -> Any:
        """F(e)."""
        return self.energy_of(errors, self.activities(errors)[1])

    def energy_of(self, errors: State, output_error: Any) -> Any:
        """F from the errors and the output error that belongs to them."""
        each = [*errors, output_error]
        return sum(self.gaussian.layer_energy(i, e) for i, e in enumerate(each, start=1))

    def weighted(self, errors: State) -> State:
        """Π_l e_l, l = 1 … L−1."""
        return tuple(self.gaussian.weigh(i, e) for i, e in enumerate(errors, start=1))

    def unweighted(self, vectors: State) -> State:
        """Π_l⁻¹ v_l, l = 1 … L−1."""
        return tuple(self.gaussian.unweigh(i, v) for i, v in enumerate(vectors, start=1))

    def with_pulls(self, errors: State) -> tuple[Any, tuple[Pull, ...]]:
        """The output error r; for l = 2 … L the map from covectors of layer l to layer l − 1."""
        x, pulls = self.first_prediction + errors[0], []
        for index in range(2, self.depth + 1):
            prediction, pull = jax.vjp(lambda y, i=index: self.problem.network.predict(i, y), x)
            pulls.append(lambda covector, pull=pull: pull(covector)[0])
            x = prediction + errors[index - 1] if index < self.depth else prediction
        return self.target - x, tuple(pulls)

    def residual(self, errors: State, output_error: Any, pulls: tuple[Pull, ...]) -> State:
        """∂F/∂x_l = Π_l ε_l − (∂μ_{l+1}/∂x_l)ᵀ Π_{l+1} ε_{l+1} of the hidden layers."""
        weighted = [*self.weighted(errors), self.gaussian.weigh(self.depth, output_error)]
        above = [pull(covector) for pull, covector in zip(pulls, weighted[1:], strict=True)]
        return tuple(w - a for w, a in zip(weighted[:-1], above, strict=True))


def pull_through(pulls: tuple[Pull, ...], covector: Any) -> State:
    """J_lᵀ v for l = 1 … L−1: an output covector pulled back through the whole chain."""
    covectors: list[Any] = []
    for pull in reversed(pulls):
        covector = pull(covector)
        covectors.insert(0, covector)
    return tuple(covectors)


def output_jacobians(pulls: tuple[Pull, ...], width: int, dtype: Any) -> State:
    """J_l = ∂μ_L/∂x_l, l = 1 … L−1, each of shape (n_L, n_l), by n_L backward passes."""
    return jax.vmap(lambda v: pull_through(pulls, v))(jnp.eye(width, dtype=dtype))
