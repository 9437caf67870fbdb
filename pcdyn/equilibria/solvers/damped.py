"""Damped descent: Gauss–Newton steps whose matrix is kept for as long as it serves.

Each step is `−M⁻¹ ∂F`, with M the damped Gauss–Newton matrix where it was last computed, and a line
search that never lets F rise beyond its round-off. M lacks the curvature of the predictions and so
converges only linearly where residuals stay large; Anderson acceleration with a short memory takes
out the slowest modes (Walker & Ni 2011). Where the residual of some sample falls little, M is
computed again.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from pcdyn._support.products import einsum
from pcdyn._support.states import choose, dot, scale, step
from pcdyn._support.types import Scalar, State, Tree
from pcdyn.equilibria.solvers.base import Solution, within_round_off
from pcdyn.errors import EquilibriumStatus

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
Propose = Callable[[State], tuple[State, Scalar]]


class PointEvaluation(eqx.Module):
    """F, its gradient `slope` in the solver's coordinates, and the largest `residual` ‖∂F/∂x_l‖."""

    energy: Array
    slope: State
    residual: Array


class DescentModel(eqx.Module):
    """A batch of problems in the coordinates of a solver: tuples of arrays `(…, batch, n)`."""

    @property
    @abc.abstractmethod
    def evaluation_passes(self) -> int:
        """Passes through the network that an evaluation costs."""

    @property
    @abc.abstractmethod
    def matrix_passes(self) -> int:
        """Passes through the network that a new matrix costs."""

    @abc.abstractmethod
    def evaluate(self, point: State) -> PointEvaluation:
        """Compute F, its slope and the residual at a point."""

    @abc.abstractmethod
    def factorise(self, point: State, damping: Array) -> Propose:
        """Factorise the model around a point, with a damping per sample."""

    @abc.abstractmethod
    def round_off(self, point: State) -> Array:
        """Estimate the round-off of F at a point, per sample."""

    @abc.abstractmethod
    def activities(self, point: State) -> State:
        """Return the free activities that a point stands for."""

    @abc.abstractmethod
    def take(self, samples: Array) -> DescentModel:
        """Select samples of the batch."""


class _Memory(eqx.Module):
    """The last steps, for Anderson acceleration, in no particular order; rows are samples.

    `proposals` are the differences between what was proposed, `arrivals` those between where that
    would have led, `(batch, remembered, N)`; `gram` are the inner products of the proposals.
    `proposed` and `moved`, `(batch, N)`, are of the last step.
    """

    proposals: Array
    arrivals: Array
    gram: Array
    proposed: Array
    moved: Array

    @staticmethod
    def empty(like: State) -> _Memory:
        """Before the first step."""
        nothing = _rows(jax.tree.map(jnp.zeros_like, like))
        stack = jnp.stack([nothing] * _REMEMBERED, axis=1)
        gram = jnp.zeros((len(nothing), _REMEMBERED, _REMEMBERED), nothing.dtype)
        return _Memory(stack, stack, gram, nothing, nothing)

    def with_proposal(
        self, proposed: Array, count: Array, follows: Array, chosen: Array
    ) -> _Memory:
        """Add a proposal of the `chosen` samples.

        Only where it `follows` another is there a difference to take; others forget one instead.
        """
        change, arrival = proposed - self.proposed, proposed - self.proposed + self.moved
        place = count % _REMEMBERED
        change, arrival = (jnp.where(follows[:, None], x, 0) for x in (change, arrival))
        proposals = self.proposals.at[:, place].set(change)
        arrivals = self.arrivals.at[:, place].set(arrival)
        products = einsum("bmn,bn->bm", proposals, change)
        gram = self.gram.at[:, place].set(products).at[:, :, place].set(products)
        proposed = jnp.where(chosen[:, None], proposed, self.proposed)
        return _Memory(proposals, arrivals, gram, proposed, self.moved)

    def accelerated(self) -> Array:
        """Anderson's step: the combination of this proposal and the last ones that cancels best."""
        size = jnp.trace(self.gram, axis1=1, axis2=2)
        # Differences of zero, before there are any, get no weight.
        ridge = jnp.where(size > 0, _RIDGE * size, 1)[:, None, None]
        gram = self.gram + ridge * jnp.eye(_REMEMBERED, dtype=self.gram.dtype)[None]
        rhs = einsum("bmn,bn->bm", self.proposals, self.proposed)
        weights = jnp.linalg.solve(gram, rhs[..., None])[..., 0]
        return self.proposed - einsum("bm,bmn->bn", weights, self.arrivals)


def _rows(point: State) -> Array:
    """All layers of each sample side by side."""
    return jax.vmap(lambda sample: ravel_pytree(sample)[0], in_axes=-2)(point)


def _from_rows(rows: Array, like: State) -> State:
    """The inverse of `_rows`."""
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[..., 0, :], like))
    return jax.vmap(unravel, out_axes=-2)(rows)


class _Search(eqx.Module):
    """What is carried from trial to trial, per sample but for the `count` of trials and `renew`.

    A trial is at `point + length · direction`; `fresh` samples get a new direction first. `renew`
    asks for a new matrix.
    """

    point: State
    evaluation: PointEvaluation
    memory: _Memory
    direction: State
    length: Array
    fresh: Array
    damping: Array
    status: Array
    iterations: Array
    passes: Array
    count: Array
    renew: Array

    def take(self, samples: Array) -> _Search:
        """Select samples of the batch."""

        def rows(tree: Tree) -> Tree:
            return jax.tree.map(lambda x: x[samples], tree)

        def layers(tree: Tree) -> Tree:
            return jax.tree.map(lambda x: x[..., samples, :], tree)

        evaluation = self.evaluation
        return _Search(
            point=layers(self.point),
            evaluation=PointEvaluation(
                rows(evaluation.energy), layers(evaluation.slope), rows(evaluation.residual)
            ),
            memory=rows(self.memory),
            direction=layers(self.direction),
            length=rows(self.length),
            fresh=rows(self.fresh),
            damping=rows(self.damping),
            status=rows(self.status),
            iterations=rows(self.iterations),
            passes=rows(self.passes),
            count=self.count,
            renew=self.renew,
        )


def descend(
    model: DescentModel, start: State, tolerance: Scalar, max_iterations: Scalar
) -> Solution:
    """Minimise F of every sample from `start` until its largest residual is at most `tolerance`.

    The tolerance is one number or one per sample. Once no more than one sample in four is unsolved,
    those go on by themselves. The `state` of the solution is in the coordinates of `start`.
    """
    evaluation = model.evaluate(start)
    zero, none = jnp.zeros_like(evaluation.energy), jnp.zeros(evaluation.energy.shape, int)
    now = _Search(
        point=start,
        evaluation=evaluation,
        memory=_Memory.empty(start),
        direction=jax.tree.map(jnp.zeros_like, start),
        length=zero,
        fresh=jnp.ones_like(none, bool),
        damping=zero,
        status=_verdict(evaluation, tolerance),
        iterations=none,
        passes=none + model.evaluation_passes,
        count=jnp.asarray(0),
        renew=jnp.asarray(True),
    )
    few = len(zero) // 4
    tolerance = jnp.broadcast_to(tolerance, zero.shape)
    now = _search(model, now, tolerance, max_iterations, few)
    end = Solution(now.point, now.status, now.iterations, now.passes)
    if few == 0:
        return end
    samples = jnp.argsort(~_active(now, max_iterations))[:few]
    rest = _search(model.take(samples), now.take(samples), tolerance[samples], max_iterations, 0)
    return Solution(
        jax.tree.map(lambda x, y: x.at[..., samples, :].set(y), end.state, rest.point),
        end.status.at[samples].set(rest.status),
        end.iterations.at[samples].set(rest.iterations),
        end.passes.at[samples].set(rest.passes),
    )


def _active(now: _Search, max_iterations: Scalar) -> Array:
    return (now.status == _RUNNING) & (now.iterations < max_iterations)


def _search(
    model: DescentModel, now: _Search, tolerance: Array, max_iterations: Scalar, few: int
) -> _Search:
    """Search until no more than `few` samples are unsolved."""

    def unfinished(now: _Search) -> Array:
        return jnp.sum(_active(now, max_iterations)) > few

    def with_new_matrix(now: _Search) -> _Search:
        propose, slack = model.factorise(now.point, now.damping), model.round_off(now.point)
        activities = model.activities(now.point)

        def trial(now: _Search) -> _Search:
            active = _active(now, max_iterations)
            now, spent = _with_direction(now, active, propose)
            return _after_trial(model, now, active, slack, activities, tolerance, spent)

        spent = jnp.where(_active(now, max_iterations), model.matrix_passes, 0)
        now = eqx.tree_at(
            lambda s: (s.renew, s.passes), now, (jnp.asarray(False), now.passes + spent)
        )
        return jax.lax.while_loop(lambda now: unfinished(now) & ~now.renew, trial, now)

    return jax.lax.while_loop(unfinished, with_new_matrix, now)


def _with_direction(now: _Search, active: Array, propose: Propose) -> tuple[_Search, Array]:
    """Choose directions for the fresh samples; also returns the passes that each of them spent."""
    starting = active & now.fresh
    # Of the others nothing is asked, so that conjugate gradients do not wait for them.
    proposed, spent = propose(scale(starting.astype(now.length.dtype), now.evaluation.slope))
    follows = starting & (now.iterations > 0)
    memory = now.memory.with_proposal(_rows(proposed), now.count, follows, starting)
    direction = _descent_direction(now.evaluation.slope, proposed, memory)
    # A model that could not be factorised proposes NaN.
    direction = jax.tree.map(lambda d: jnp.where(jnp.isfinite(d), d, 0), direction)
    now = dataclasses.replace(
        now,
        memory=memory,
        direction=choose(starting, direction, now.direction),
        length=jnp.where(starting, 1, now.length),
    )
    return now, jnp.where(starting, spent, 0)


def _after_trial(
    model: DescentModel,
    now: _Search,
    active: Array,
    slack: Array,
    activities: State,
    tolerance: Array,
    spent: Array,
) -> _Search:
    """Take the step where F has fallen enough; elsewhere halve its length, or give up."""
    fall = dot(now.evaluation.slope, now.direction)
    moved = scale(jnp.where(active, now.length, 0), now.direction)
    evaluation = model.evaluate(step(now.point, 1, moved))
    enough = now.evaluation.energy + _SUFFICIENT_DECREASE * now.length * fall + slack
    taken = active & (evaluation.energy <= enough) & (fall < 0) & jnp.isfinite(evaluation.residual)
    given_up = active & ~taken & ((now.length <= _SHORTEST_STEP) | ~(fall < 0))
    decided = taken | given_up
    accepted = jnp.where(taken, now.length, 0)
    moved = scale(jnp.where(taken, 1, 0).astype(accepted.dtype), moved)
    brings_much = (accepted == 1) & (evaluation.residual < _KEPT_BELOW * now.evaluation.residual)
    evaluation = choose(taken, evaluation, now.evaluation)
    status = jnp.where(taken, _verdict(evaluation, tolerance), now.status)
    # A whole step that changes nothing, not even the gradient much, has solved for one of round-off
    # alone.
    still = (accepted == 1) & (now.damping == 0) & within_round_off(moved, activities)
    still = still & ~brings_much
    # Whether it is no more than that is for `pcdyn.equilibrium` to check.
    status = jnp.where(still, int(EquilibriumStatus.CONVERGED), status)
    stalled = given_up & (now.damping >= _LARGEST_DAMPING)
    status = jnp.where(stalled, int(EquilibriumStatus.STALLED), status)
    memory = eqx.tree_at(
        lambda m: m.moved, now.memory,
        jnp.where(decided[:, None], _rows(moved), now.memory.moved),
    )  # fmt: skip
    return dataclasses.replace(
        now,
        point=step(now.point, 1, moved),
        evaluation=evaluation,
        memory=memory,
        length=now.length / 2,
        fresh=decided,
        damping=jnp.where(decided, _next_damping(now.damping, accepted), now.damping),
        status=status,
        iterations=now.iterations + decided.astype(int),
        passes=now.passes + spent + jnp.where(active, model.evaluation_passes, 0),
        count=now.count + 1,
        # The first step is the longest: the matrix of its start serves no further.
        renew=jnp.any((status == _RUNNING) & decided & ((now.iterations == 0) | ~brings_much)),
    )


def _verdict(evaluation: PointEvaluation, tolerance: Scalar) -> Array:
    finite = jnp.isfinite(evaluation.energy) & jnp.isfinite(evaluation.residual)
    status = jnp.where(evaluation.residual <= tolerance, int(EquilibriumStatus.CONVERGED), _RUNNING)
    return jnp.where(finite, status, int(EquilibriumStatus.NON_FINITE))


def _descent_direction(slope: State, proposed: State, memory: _Memory) -> State:
    """The accelerated step where it is steep enough, otherwise the proposed one."""
    direction = _from_rows(memory.accelerated(), proposed)
    steep = dot(slope, direction) < 0.1 * dot(slope, proposed)
    return choose(steep, direction, proposed)


def _next_damping(damping: Array, length: Array) -> Array:
    more = jnp.maximum(10 * damping, _FIRST_DAMPING)
    less = jnp.where(damping > _FIRST_DAMPING, damping / 10, 0)
    return jnp.where(length == 1, less, jnp.where(length < 0.1, more, damping))
