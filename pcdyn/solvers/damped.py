"""Damped descent: Gauss–Newton steps whose matrix is kept for as long as it serves.

Each step is `−M⁻¹ ∂F`, with M the damped Gauss–Newton matrix where it was last computed, and a line
search that never lets F rise. M lacks the curvature of the predictions and so converges only
linearly where residuals stay large; Anderson acceleration with a short memory takes out the slowest
modes (Walker & Ni 2011). Where some sample's residual falls little, M is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pcdyn.errors import EquilibriumStatus
from pcdyn.solvers.base import Solution
from pcdyn.states import choose, dot, scale, step

_SUFFICIENT_DECREASE = 1e-4
_SHORTEST_STEP = 2.0**-10
_FIRST_DAMPING = 1e-3
_LARGEST_DAMPING = 1e8
_REMEMBERED = 3
_RIDGE = 1e-6
# Where a step leaves more of the residual, a new matrix pays: it costs about two steps.
_KEPT_BELOW = 0.3
_RUNNING = int(EquilibriumStatus.ITERATION_LIMIT)

# From the slope to the step that minimises the damped model, and the passes that this costs.
Propose = Callable[[Any], tuple[Any, Any]]


class Look(eqx.Module):
    """F, its gradient `slope` in the solver's coordinates, and the largest `residual` ‖∂F/∂x_l‖."""

    energy: Any
    slope: Any
    residual: Any


class _Memory(eqx.Module):
    """The last steps, for Anderson acceleration, in no particular order; rows are samples.

    `proposals` are the differences between what was proposed, `arrivals` those between where that
    would have led, `(batch, remembered, N)`; `gram` are the inner products of the proposals.
    `proposed` and `moved`, `(batch, N)`, are of the last step.
    """

    proposals: Any
    arrivals: Any
    gram: Any
    proposed: Any
    moved: Any

    @staticmethod
    def empty(like: Any) -> _Memory:
        """Before the first step."""
        nothing = _rows(jax.tree.map(jnp.zeros_like, like))
        stack = jnp.stack([nothing] * _REMEMBERED, axis=1)
        gram = jnp.zeros((len(nothing), _REMEMBERED, _REMEMBERED), nothing.dtype)
        return _Memory(stack, stack, gram, nothing, nothing)

    def with_proposal(self, proposed: Any, count: Any) -> _Memory:
        """One more proposal; before the first there is nothing to take differences with."""
        proposed = _rows(proposed)
        change = jnp.where(count == 0, 0, proposed - self.proposed)
        place = count % _REMEMBERED
        proposals = self.proposals.at[:, place].set(change)
        arrivals = self.arrivals.at[:, place].set(change + self.moved)
        products = jnp.einsum("bmn,bn->bm", proposals, change)
        gram = self.gram.at[:, place].set(products).at[:, :, place].set(products)
        return _Memory(proposals, arrivals, gram, proposed, self.moved)

    def accelerated(self) -> Any:
        """Anderson's step: the combination of this proposal and the last ones that cancels best."""
        size = jnp.trace(self.gram, axis1=1, axis2=2)
        # Differences of zero, before there are any, get no weight.
        ridge = jnp.where(size > 0, _RIDGE * size, 1)[:, None, None]
        gram = self.gram + ridge * jnp.eye(_REMEMBERED, dtype=self.gram.dtype)[None]
        rhs = jnp.einsum("bmn,bn->bm", self.proposals, self.proposed)
        weights = jnp.linalg.solve(gram, rhs[..., None])[..., 0]
        return self.proposed - jnp.einsum("bm,bmn->bn", weights, self.arrivals)


def _rows(stacked: Any) -> Any:
    """All layers of each sample side by side."""
    batch = stacked[0].shape[-2]
    return jnp.concatenate([jnp.moveaxis(x, -2, 0).reshape(batch, -1) for x in stacked], axis=1)


def _from_rows(rows: Any, like: Any) -> Any:
    """The inverse of `_rows`."""
    sizes = [x.size // len(rows) for x in like]
    parts = jnp.split(rows, [sum(sizes[:i]) for i in range(1, len(sizes))], axis=1)
    return tuple(
        jnp.moveaxis(part.reshape(len(rows), *x.shape[:-2], x.shape[-1]), 0, -2)
        for part, x in zip(parts, like, strict=True)
    )


class _Search(eqx.Module):
    """What is carried from step to step; `length` of the last one, `renew` the matrix for the next.

    All are per sample except `count`, the steps of the batch, and `renew`.
    """

    point: Any
    seen: Look
    memory: _Memory
    damping: Any
    length: Any
    status: Any
    iterations: Any
    passes: Any
    count: Any
    renew: Any


def descend(
    look: Callable[[Any], Look],
    factorise: Callable[[Any, Any], Propose],
    start: Any,
    tolerance: Any,
    max_iterations: int,
    *,
    look_passes: int,
    matrix_passes: int,
) -> Solution:
    """Minimise F of every sample from `start` until its largest residual is at most `tolerance`.

    `factorise(point, damping)` is the model around a point. A sample that is solved moves no more.
    The `state` of the solution is in the coordinates of `start`.
    """

    def with_new_matrix(now: _Search) -> _Search:
        propose = factorise(now.point, now.damping)

        def go(now: _Search) -> _Search:
            running = now.status == _RUNNING
            proposed, spent = propose(now.seen.slope)
            memory = now.memory.with_proposal(proposed, now.count)
            direction = _descent_direction(now.seen.slope, proposed, memory)
            length, seen, trials = _line_search(look, now, direction, running)
            moved = scale(length, _without_nan(direction))
            brings_much = (length == 1) & (seen.residual < _KEPT_BELOW * now.seen.residual)
            status = _verdict(seen, tolerance)
            stalled = (length == 0) & (now.damping >= _LARGEST_DAMPING) & (status == _RUNNING)
            status = jnp.where(stalled, int(EquilibriumStatus.STALLED), status)
            status = jnp.where(running, status, now.status)
            spent = spent + look_passes * trials
            return _Search(
                point=step(now.point, 1, moved),
                seen=seen,
                memory=eqx.tree_at(lambda m: m.moved, memory, _rows(moved)),
                damping=_next_damping(now.damping, length),
                length=length,
                status=status,
                iterations=now.iterations + running.astype(int),
                passes=now.passes + jnp.where(running, spent, 0),
                count=now.count + 1,
                # The first step is the longest: the matrix of its start serves no further.
                renew=(now.count == 0) | jnp.any((status == _RUNNING) & ~brings_much),
            )

        def keeps_matrix(now: _Search) -> Any:
            return unfinished(now) & ~now.renew

        spent = jnp.where(now.status == _RUNNING, matrix_passes, 0)
        now = eqx.tree_at(
            lambda s: (s.renew, s.passes), now, (jnp.asarray(False), now.passes + spent)
        )
        return jax.lax.while_loop(keeps_matrix, go, now)

    def unfinished(now: _Search) -> Any:
        return jnp.any(now.status == _RUNNING) & (now.count < max_iterations)

    seen = look(start)
    zero, none = jnp.zeros_like(seen.energy), jnp.zeros(seen.energy.shape, int)
    first = _Search(
        point=start,
        seen=seen,
        memory=_Memory.empty(start),
        damping=zero,
        length=zero,
        status=_verdict(seen, tolerance),
        iterations=none,
        passes=none + look_passes,
        count=jnp.asarray(0),
        renew=jnp.asarray(True),
    )
    end = jax.lax.while_loop(unfinished, with_new_matrix, first)
    return Solution(end.point, end.status, end.iterations, end.passes)


def _verdict(seen: Look, tolerance: Any) -> Any:
    finite = jnp.isfinite(seen.energy) & jnp.isfinite(seen.residual)
    status = jnp.where(seen.residual <= tolerance, int(EquilibriumStatus.CONVERGED), _RUNNING)
    return jnp.where(finite, status, int(EquilibriumStatus.NON_FINITE))


def _descent_direction(slope: Any, proposed: Any, memory: _Memory) -> Any:
    """The accelerated step where it is steep enough, otherwise the proposed one."""
    direction = _from_rows(memory.accelerated(), proposed)
    steep = dot(slope, direction) < 0.1 * dot(slope, proposed)
    return choose(steep, direction, proposed)


def _without_nan(direction: Any) -> Any:
    # A model that could not be factorised proposes NaN; its length is 0, which times NaN is NaN.
    return jax.tree.map(lambda d: jnp.where(jnp.isfinite(d), d, 0), direction)


def _line_search(
    look: Callable[[Any], Look], now: _Search, direction: Any, running: Any
) -> tuple[Any, Look, Any]:
    """The first of the lengths 1, ½, ¼ … at which F has fallen enough, or 0; and the trials.

    Also what is seen there.
    """
    fall = dot(now.seen.slope, direction)
    # Differences below round-off of F say nothing.
    slack = 8 * jnp.finfo(fall.dtype).eps * now.seen.energy

    def is_low(length: Any, seen: Look) -> Any:
        enough = now.seen.energy + _SUFFICIENT_DECREASE * length * fall + slack
        return (seen.energy <= enough) & (fall <= 0)

    def too_high(length: Any, seen: Look) -> Any:
        return running & ~is_low(length, seen) & (length > _SHORTEST_STEP)

    def shorten(carry: Any) -> Any:
        length, seen, trials = carry
        high = too_high(length, seen)
        length = jnp.where(high, length / 2, length)
        return length, look_at(length), trials + high.astype(int)

    def look_at(length: Any) -> Look:
        return look(step(now.point, length, direction))

    length = jnp.where(running, 1, 0).astype(fall.dtype)
    start = (length, look_at(length), jnp.ones(length.shape, int))
    length, seen, trials = jax.lax.while_loop(
        lambda carry: jnp.any(too_high(carry[0], carry[1])), shorten, start
    )
    accepted = running & is_low(length, seen)
    return jnp.where(accepted, length, 0), choose(accepted, seen, now.seen), trials


def _next_damping(damping: Any, length: Any) -> Any:
    more = jnp.maximum(10 * damping, _FIRST_DAMPING)
    less = jnp.where(damping > _FIRST_DAMPING, damping / 10, 0)
    return jnp.where(length == 1, less, jnp.where(length < 0.1, more, damping))
