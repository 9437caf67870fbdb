"""Activities and weights as one flow, and its limit in which the activities are always at rest.

`pcdyn.simulate` integrates both. F is summed over the batch, whose samples share the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import checked_number, number, optional
from pcdyn._support.types import Activities, Numbers, Scalar, State, Tree, Values
from pcdyn.equilibria.equilibrium import Equilibrium, equilibrium
from pcdyn.equilibria.solvers import GaussNewton, Solver, get_solver
from pcdyn.errors import EquilibriumStatus, ToleranceError
from pcdyn.learning.rules.base import start_of
from pcdyn.model.flow import FlowOfProblem
from pcdyn.model.graph import Graph, learnable
from pcdyn.model.network import Network
from pcdyn.model.problem import InferenceProblem, check_problem


class _WeightsMove(FlowOfProblem):
    """What both flows have of their problem."""

    problem: eqx.AbstractVar[InferenceProblem]

    def _at(self, state: State) -> InferenceProblem:
        return eqx.tree_at(lambda p: p.graph, self.problem, self.moving(state)["network"])


class JointFlow(_WeightsMove):
    """The flow of activities and weights: `τ_l dx_l/dt = −∂F/∂x_l` and `dW/dt = −ε ∂F/∂W`.

    Weights are slower than activities by 1/ε, with ε = `ratio`. As ε → 0 they follow
    `AdiabaticFlow`, with time counted in units of 1/ε, at a distance in proportion to ε. Time is in
    units of the activity time constant. Biases and all other parameters of the layers move like
    weights, of a graph all but the means of priors.

    The state is the free activities, then the arrays of the network, each as one vector.

    **Arguments:**

    - `problem`: its free activities and its network are the start.
    - `ratio`: ε.

    **Raises:**

    - `InputError` for a ratio that is not positive.
    """

    problem: InferenceProblem
    ratio: ArrayLike

    def __check_init__(self) -> None:
        check_problem(self.problem)
        if not is_traced(self.ratio):
            checked_number(self.ratio, "ratio", above=0)

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return a whole state, or that of an inference problem with the weights of its network."""

        def start(activities: str | Sequence[Numbers]) -> State:
            free = self.problem.initial_state(activities)
            return (*(x.reshape(-1) for x in free), *_vectors(self.problem.graph))

        if isinstance(initial, list | tuple) and len(initial) > len(self.free_layers):
            return self.checked_state(initial, start("zeros"))
        return start(initial)

    def activities(self, state: State) -> Activities:
        return self.problem.activities(self._inner_state(state))

    def moving(self, state: State) -> dict[str, Any]:
        """Name what moves besides activities: the network, as `"network"`."""
        return {"network": _with_vectors(self.problem.graph, state[len(self.free_layers) :])}

    def observe(self, t: Scalar, state: State) -> tuple[Activities, Array]:
        return self._at(state).observe(t, self._inner_state(state))

    def free_energy(self, state: State) -> Array:
        """Sum F over the batch: what the flow never lets rise."""
        return jnp.sum(self._at(state).free_energy(self._inner_state(state)))

    def vector_field(self, t: Scalar, state: State) -> State:
        count = len(self.free_layers)
        slope = jax.grad(self.free_energy)(state)
        constants = self.problem.state_time_constants
        activities = (-g / tau for g, tau in zip(slope[:count], constants, strict=True))
        ratio = jnp.asarray(self.ratio, self.dtype)
        return (*activities, *(-ratio * g for g in slope[count:]))

    def _inner_state(self, state: State) -> State:
        """The free activities as the inference problem has them."""
        shape = self.problem.batch_shape or ()
        return tuple(
            x.reshape(*x.shape[:-1], *shape, width)
            for width, x in zip(self.problem.free_widths, state, strict=False)
        )


class AdiabaticFlow(_WeightsMove):
    """The flow of weights with inference always at its equilibrium: `dW/dt = −dF*/dW`.

    F*(W) is the minimum of F over x. Time is in units of the weights' time constant. The state is
    the arrays of the network, each as one vector. The equilibrium is solved, from the feedforward
    pass or, in a graph that has none, from zero, at every evaluation of the vector field; where it
    is not found the field is NaN and the simulation says so.

    **Arguments:**

    - `problem`: its network is the start.
    - `method`, `tolerance`: of the equilibrium, as for `pcdyn.equilibrium`.
    """

    problem: InferenceProblem
    method: Solver = eqx.field(default_factory=GaussNewton, converter=get_solver)
    tolerance: float | None = eqx.field(
        static=True,
        default=None,
        converter=optional(number("AdiabaticFlow: tolerance", above=0, error=ToleranceError)),
    )

    def __check_init__(self) -> None:
        check_problem(self.problem)
        self.method.check(self.problem)

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return the weights of the problem's network, or others; activities have no start."""
        return self.checked_state(initial, _vectors(self.problem.graph))

    def activities(self, state: State) -> Activities:
        flow, state = as_jax((self, state))
        if state[0].ndim > 1:
            return jax.vmap(flow.activities)(state)
        moved = flow._at(state)
        return activities_at_rest(moved, self.method, self.tolerance, start_of(moved))

    def moving(self, state: State) -> dict[str, Any]:
        """Name what moves besides activities: the network, as `"network"`."""
        return {"network": _with_vectors(self.problem.graph, state)}

    def observe(self, t: Scalar, state: State) -> tuple[Activities, Array]:
        return self._at(state).observe(t, self.problem.state_of(self.activities(state)))

    def free_energy(self, state: State) -> Array:
        """Sum the free energy at equilibrium over the batch: what the flow never lets rise."""
        return jnp.sum(self.observe(0.0, state)[1])

    def vector_field(self, t: Scalar, state: State) -> State:
        # At the equilibrium ∂F/∂x = 0, so that dF*/dW is ∂F/∂W with x held.
        rest = self.problem.state_of(self.activities(state))
        slope = jax.grad(lambda s: jnp.sum(self._at(s).free_energy(rest)))(state)
        return jax.tree.map(jnp.negative, slope)


def as_jax(tree: Tree) -> Tree:
    """Replace the NumPy arrays of a tree, which a trajectory on the host holds, by those of JAX."""
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(jnp.asarray, arrays), static)


def activities_at_rest(
    problem: InferenceProblem,
    method: Solver | None,
    tolerance: float | None,
    initial: str | State = "feedforward",
) -> Activities:
    """Solve for the equilibrium x_0 … x_L inside a JAX transformation; NaN where there is none."""
    found = equilibrium(problem, method=method, initial=initial, tolerance=tolerance, throw=False)
    return problem.activities(tuple(jnp.where(_ok(found, x), x, jnp.nan) for x in found.state))


def _ok(found: Equilibrium, like: Values) -> Values:
    """Whether each sample is at its equilibrium, to broadcast with activities."""
    converged = found.status_codes == EquilibriumStatus.CONVERGED
    return converged[..., None] if like.ndim == 2 else converged


def _vectors(network: Network | Graph) -> State:
    """The arrays of a network that are learned, each as one vector."""
    return tuple(x.reshape(-1) for x in jax.tree.leaves(learnable(network)))


def _with_vectors(network: Network | Graph, vectors: Sequence[Values]) -> Network | Graph:
    """The network with these arrays, which may have a leading axis."""
    leaves, structure = jax.tree.flatten(learnable(network))
    shaped = [v.reshape(*v.shape[:-1], *x.shape) for v, x in zip(vectors, leaves, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, shaped), network)
