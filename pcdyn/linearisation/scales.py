"""The scales of an inference problem: what its gradient is small beside, and its round-off."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.states import largest_norm, layer_norms
from pcdyn._support.types import Activities, Scalar, State, Values
from pcdyn.model.energies.energy import Energy
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceProblem
from pcdyn.model.stacked import Run, StackedProblem, stacked

_PROBES = 4
# Solvers come to a stop within so many units in the last place, for errors pass through layers.
_PLACES = 32


def smallest_precision(problem: Flow) -> Float[Array, ""]:
    """The smallest eigenvalue of any Π_l, of the curvature at zero error where there is no Π_l.

    Infinite where no energy has a curvature.
    """
    if isinstance(problem, StackedProblem):
        each = [
            _smallest_of_run(run, problem.widths[run.first], problem.target_of(run), problem.dtype)
            for run in problem.runs
        ]
    elif isinstance(problem, InferenceProblem):
        widths, dtype = problem.widths, problem.dtype
        each = [
            _smallest(
                problem.energy_of(i), widths[problem.target_node(i)], problem.target_of(i), dtype
            )
            for i in problem.predicted_layers
        ]
    else:
        return jnp.asarray(jnp.inf, problem.dtype)
    return jnp.min(jnp.stack(each))


def _smallest_of_run(
    run: Run, width: int, target: Values | None, dtype: np.dtype
) -> Float[Array, ""]:
    """`_smallest` of the stacked energies of a run of predictions."""
    if not jax.tree.leaves(eqx.filter(run.energy, eqx.is_array)):
        return _smallest(run.energy, width, target, dtype)
    return jnp.min(eqx.filter_vmap(lambda e: _smallest(e, width, target, dtype))(run.energy))


def _smallest(
    energy: Energy, width: int, target: Values | None, dtype: np.dtype
) -> Float[Array, ""]:
    precision = energy.quadratic_form
    if precision is None and target is not None and target.ndim > 1:
        return jnp.min(jax.vmap(lambda t: _smallest(energy, width, t, dtype))(target))
    if precision is None:
        precision = energy.curvature(jnp.zeros(width, dtype), target)
    return jnp.asarray(jnp.inf, dtype) if precision is None else precision.smallest(dtype)


def gradient_scale(problem: InferenceProblem, state: State) -> Float[Array, "*batch"]:
    """Compute the size beside which ‖∂F/∂x_l‖ is small at an equilibrium, per sample.

    The least of 1, of the largest ‖∂F/∂x_l‖ at the start, and of the largest prediction error there
    times the smallest precision: where precisions differ much, the large ones dominate the gradient
    at the start, and beside it that of the slow directions would be small before it has moved.
    """
    deep = stacked(problem, state)
    if isinstance(deep, StackedProblem):
        together = deep.pack(state)
        field = jnp.max(deep.norms(deep.gradient(together)), axis=-1)
        largest = jnp.max(deep.error_norms(deep.observe(0.0, together)[0]), axis=-1)
    else:
        field = largest_norm(problem.gradient(state))
        largest = largest_norm(problem.prediction_errors(problem.activities(state)))
    return jnp.minimum(1, jnp.minimum(field, smallest_precision(deep) * largest))


def resting_tolerance(
    problem: InferenceProblem, start: State, relative: Scalar
) -> Float[Array, "*batch"]:
    """Scale a relative tolerance by `gradient_scale`, per sample.

    Where the gradient at the start is no more than its round-off, the start is at rest, and the
    tolerance is that round-off.
    """
    problem = problem.with_prior_as_layer(start)
    norms, sizes = layer_norms(problem.gradient(start)), _error_sizes(problem, start)
    weighted = problem.weighted_errors(sizes, problem.activities(start))
    terms = [jnp.linalg.norm(x, axis=-1) for x in weighted]
    # The gradient of a layer has the terms of its own errors and of those that it predicts.
    sums = [jnp.zeros_like(terms[0])] * len(problem.widths)
    for index, term in enumerate(terms, start=1):
        for node in {problem.target_node(index), *problem.graph.sources[index - 1]}:
            sums[node] = sums[node] + term
    each = jnp.stack([sums[node] for node in problem.free_layers], axis=-1)
    floor = _PLACES * jnp.finfo(each.dtype).eps * each
    at_rest = jnp.all(norms <= floor, axis=-1)
    tiny = jnp.finfo(each.dtype).tiny
    wanted = jnp.maximum(relative * gradient_scale(problem, start), tiny)
    return jnp.where(at_rest, jnp.maximum(wanted, 2 * jnp.max(floor, axis=-1)), wanted)


def gradient_round_off(problem: InferenceProblem, state: State) -> Float[Array, "*batch free"]:
    """How well ‖∂F/∂x_l‖ can vanish in the dtype of the problem, per sample and free layer.

    It is what a unit in the last place of every activity and of every prediction makes of the
    gradient, with the signs drawn at random a few times (root mean square), times the places within
    which a solver's last step is taken to change nothing: of the order of eps · Σ |terms|.
    """
    problem = problem.with_prior_as_layer(state)
    sizes, eps = _error_sizes(problem, state), float(jnp.finfo(problem.dtype).eps)

    def slope(state: State, offsets: State) -> State:
        def total(state: State) -> Array:
            activities = problem.activities(state)
            errors = jax.tree.map(jnp.add, problem.prediction_errors(activities), offsets)
            return jnp.sum(problem.energies_of(errors, activities))

        return jax.grad(total)(state)

    zeros = jax.tree.map(jnp.zeros_like, sizes)
    _, tangent = jax.linearize(slope, state, zeros)
    signs = np.random.default_rng(0)

    def rounded(x: Array) -> Array:
        each = signs.choice([-1.0, 1.0], x.shape[-1:]).astype(x.dtype)
        return eps * jnp.abs(x) * jnp.broadcast_to(each, x.shape)

    squares = [
        layer_norms(tangent(*jax.tree.map(rounded, (state, sizes)))) ** 2 for _ in range(_PROBES)
    ]
    return _PLACES * jnp.sqrt(jnp.mean(jnp.stack(squares), axis=0))


def _error_sizes(problem: InferenceProblem, state: State) -> Activities:
    """|x_l| + |μ_l|, the numbers whose difference a prediction error is."""
    activities = problem.activities(state)
    errors = problem.prediction_errors(activities)
    return tuple(
        jnp.abs(activities[node]) + jnp.abs(activities[node] - error)
        for node, error in zip(problem.graph.targets, errors, strict=True)
    )
