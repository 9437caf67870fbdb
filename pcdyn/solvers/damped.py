"""Damped Gauss–Newton descent: Levenberg damping and a line search that never lets F rise.

Gauss–Newton neglects the curvature of the predictions and so converges only linearly where
residuals stay large. Anderson acceleration with a short memory takes out the slowest modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pcdyn.errors import EquilibriumStatus
from pcdyn.solvers.base import Solution
from pcdyn.states import all_finite, choose, dot, layer_norms, step

_SUFFICIENT_DECREASE = 1e-4
_SHORTEST_STEP = 2.0**-10
_FIRST_DAMPING = 1e-3
_LARGEST_DAMPING = 1e8
_REMEMBERED = 3
_RUNNING = int(EquilibriumStatus.ITERATION_LIMIT)
_RIDGE = 1e-6


class Linearisation(eqx.Module):
    """A model of the free energy around a point in the solver's own coordinates.

    `residual` is ∂F/∂x of the activities, which decides convergence; `slope` the gradient in the
    solver's coordinates; `propose(damping)` gives the step that minimises the damped model, and
    the passes that this took; `passes` is what all else costs.
    """

    energy: Any
    residual: Any
    slope: Any
    propose: Callable[[Any], Any]
    passes: Any = eqx.field(static=True)


class _Memory(eqx.Module):
    """The last iterations, for Anderson acceleration; differences have the newest first.

    `proposals` are the differences between what was proposed, `arrivals` those between where that
    would have led; `proposed` and `moved` are of the last iteration.
    """

    proposals: Any
    arrivals: Any
    proposed: Any
    moved: Any

    @staticmethod
    def empty(like: Any) -> _Memory:
        """Before the first iteration."""
        nothing = jax.tree.map(jnp.zeros_like, like)
        stack = jax.tree.map(lambda x: jnp.zeros((_REMEMBERED, *x.shape), x.dtype), like)
        return _Memory(stack, stack, nothing, nothing)

    def with_proposal(self, proposed: Any, first: Any) -> _Memory:
        """One more proposal; before the `first` there is nothing to take differences with."""
        change = jax.tree.map(lambda p, q: jnp.where(first, 0, p - q), proposed, self.proposed)
        arrival = jax.tree.map(jnp.add, change, self.moved)
        return _Memory(
            _push(self.proposals, change), _push(self.arrivals, arrival), proposed, self.moved
        )

    def with_move(self, moved: Any) -> _Memory:
        """What was really moved after the last proposal."""
        return _Memory(self.proposals, self.arrivals, self.proposed, moved)

    def accelerated(self) -> Any:
        """Anderson's step: the combination of this proposal and the last ones that cancels best."""
        gram = _products(self.proposals, self.proposals)
        scale = jnp.trace(gram)
        # Differences of zero, before there are any, get no weight.
        ridge = jnp.where(scale > 0, _RIDGE * scale, 1) * jnp.eye(len(gram), dtype=gram.dtype)
        weights = jnp.linalg.solve(gram + ridge, _products(self.proposals, self.proposed))
        return jax.tree.map(
            lambda p, a: p - jnp.tensordot(weights, a, 1), self.proposed, self.arrivals
        )


class _Search(eqx.Module):
    """What is carried from iteration to iteration."""

    point: Any
    memory: _Memory
    damping: Any
    status: Any
    iterations: Any
    passes: Any


def descend(
    linearise: Callable[[Any], Linearisation],
    energy: Callable[[Any], Any],
    start: Any,
    tolerance: Any,
    max_iterations: int,
) -> Solution:
    """Minimise `energy` from `start` until the residual of every layer is at most `tolerance`.

    The `state` of the solution is in the coordinates of `start`.
    """

    def proceed(now: _Search) -> Any:
        return (now.status == _RUNNING) & (now.iterations < max_iterations)

    def iterate(now: _Search) -> _Search:
        model = linearise(now.point)
        converged = jnp.all(layer_norms(model.residual) <= tolerance)
        proposed, spent = model.propose(now.damping)
        memory = now.memory.with_proposal(proposed, now.iterations == 0)
        direction = _descent_direction(model, memory)
        length, trials = _line_search(energy, now.point, model, direction)
        rests = converged | (length == 0)
        moved = jax.tree.map(lambda d: jnp.where(rests, 0, length * d), direction)
        stalled = (length == 0) & (now.damping >= _LARGEST_DAMPING)
        status = jnp.where(stalled, int(EquilibriumStatus.STALLED), _RUNNING)
        status = jnp.where(converged, int(EquilibriumStatus.CONVERGED), status)
        finite = all_finite((model.energy, model.residual))
        return _Search(
            point=step(now.point, 1, moved),
            memory=memory.with_move(moved),
            damping=_next_damping(now.damping, length),
            status=jnp.where(finite, status, int(EquilibriumStatus.NON_FINITE)),
            iterations=now.iterations + jnp.where(converged, 0, 1),
            # What is computed beside the check of a converged point is not charged to it.
            passes=now.passes + jnp.where(converged, 2, model.passes + spent + trials),
        )

    dtype, zero = jax.tree.leaves(start)[0].dtype, jnp.asarray(0)
    nowhere = _Memory.empty(start)
    first = _Search(start, nowhere, jnp.zeros((), dtype), jnp.asarray(_RUNNING), zero, zero)
    end = jax.lax.while_loop(proceed, iterate, first)
    return Solution(end.point, end.status, end.iterations, end.passes)


def _descent_direction(model: Linearisation, memory: _Memory) -> Any:
    """The accelerated step where it is steep enough, otherwise the proposed one."""
    direction = memory.accelerated()
    steep = dot(model.slope, direction) < 0.1 * dot(model.slope, memory.proposed)
    return choose(steep, direction, memory.proposed)


def _line_search(
    energy: Callable[[Any], Any], point: Any, model: Linearisation, direction: Any
) -> tuple[Any, Any]:
    """The first of the lengths 1, ½, ¼ … at which F has fallen enough, or 0; and the trials."""
    fall = dot(model.slope, direction)
    # Differences below round-off of F say nothing.
    slack = 8 * jnp.finfo(fall.dtype).eps * model.energy

    def is_low(length: Any, value: Any) -> Any:
        return value <= model.energy + _SUFFICIENT_DECREASE * length * fall + slack

    def too_high(carry: Any) -> Any:
        length, value, _ = carry
        return ~is_low(length, value) & (length > _SHORTEST_STEP)

    def shorten(carry: Any) -> Any:
        length, _, trials = carry
        return length / 2, energy(step(point, length / 2, direction)), trials + 1

    one = jnp.ones((), fall.dtype)
    start = (one, energy(step(point, one, direction)), jnp.asarray(1))
    length, value, trials = jax.lax.while_loop(too_high, shorten, start)
    return jnp.where(is_low(length, value) & (fall <= 0), length, 0), trials


def _next_damping(damping: Any, length: Any) -> Any:
    more = jnp.maximum(10 * damping, _FIRST_DAMPING)
    less = jnp.where(damping > _FIRST_DAMPING, damping / 10, 0)
    return jnp.where(length == 1, less, jnp.where(length < 0.1, more, damping))


def _products(a: Any, b: Any) -> Any:
    """Inner products over all layers of each remembered difference with `b`."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(x @ y.T if y.ndim == 2 else x @ y for x, y in pairs)


def _push(stack: Any, newest: Any) -> Any:
    return jax.tree.map(lambda s, x: jnp.concatenate([x[None], s[:-1]]), stack, newest)
