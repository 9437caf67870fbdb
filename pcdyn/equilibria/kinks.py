"""Equilibria at kinks of the activations, where the flow slides and no gradient vanishes.

At a kink the free energy has two one-sided gradients. A point is stationary in the generalised
sense if zero lies between them: if some slopes between the one-sided ones, for the units at their
kinks, make the gradient vanish. The flow comes to rest there if the kink is a valley and not a
ridge. With a given set of units held at their kinks the free energy is smooth, and the equilibrium
solves a Newton system with one constraint per held unit, whose multipliers are those slopes; which
units are held follows by an active-set search.

On the host in NumPy, for the few samples of a batch that need it.
"""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.states import dot, step
from pcdyn._support.types import State
from pcdyn.linearisation.coupling import by_source, free_columns
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.model.network import Dense
from pcdyn.model.problem import InferenceProblem

_MOST_ROUNDS = 100
_RADII = (1e-4, 1e-3, 1e-2, 3e-2)


@dataclasses.dataclass(frozen=True)
class SlidingPoint:
    """A point of one sample that is stationary in the generalised sense.

    `at_kink[l - 1]` says which units of layer l = 1 … L have their preactivation at a kink;
    `residual_norms` are those of the smallest generalised gradient, per free layer.
    """

    state: State
    at_kink: tuple[np.ndarray, ...]
    residual_norms: np.ndarray


class _Held(eqx.Module):
    """A layer in which some units are replaced by a line through their kink."""

    layer: Dense
    held: Array | np.ndarray
    kinks: Array
    slopes: Array

    def __call__(self, *given: Array) -> Array:
        z = self.layer.preactivation(*given)
        line = self.layer.activation(self.kinks) + self.slopes * (z - self.kinks)
        return self.layer.output(given[0], jnp.where(self.held, line, self.layer.activation(z)))


def has_kinks(problem: InferenceProblem) -> bool:
    """Return whether any `Dense` layer has an activation with kinks."""
    return any(_kinked(layer) for layer in problem.graph.layers)


@eqx.filter_jit
def step_off_ridges(problem: InferenceProblem, state: State) -> tuple[State, Array]:
    """Find a state beside each ridge of F, and whether F falls on the way there, per sample.

    On a ridge units have their preactivations at a kink, up to round-off, on one side of which F
    falls at first order, though its gradient with the slope that JAX takes there vanishes. The way
    is down the gradient with the slope of the other side.
    """

    def one(sample: InferenceProblem, state: State) -> tuple[State, Array]:
        activities = sample.activities(state)
        weighted = sample.weighted_errors(sample.prediction_errors(activities), activities)
        size = jnp.sqrt(dot(activities, activities))
        layers, ridge = list(problem.graph.layers), jnp.asarray(False)
        for index, sources in enumerate(problem.graph.sources, start=1):
            layer = layers[index - 1]
            if not _kinked(layer) or not set(sources) & set(problem.free_layers):
                continue
            z = layer.preactivation(*(activities[node] for node in sources))
            kinks = _nearest_kinks(layer, z)
            left, right = _one_sided_slopes(layer, kinks)
            taken = jax.jvp(layer.activation, (z,), (jnp.ones_like(z),))[1]
            other = jnp.where(jnp.abs(taken - left) > jnp.abs(taken - right), left, right)
            repels = (right - left) * weighted[index - 1] > 0
            held = repels & (jnp.abs(z - kinks) <= _preactivation_round_off(layer, size, kinks))
            layers[index - 1] = _Held(layer, held, kinks, other)
            ridge = ridge | jnp.any(held)
        smooth = sample.with_layers(layers)
        slope = smooth.gradient(state)
        steep = jnp.sqrt(dot(slope, slope))
        length = jnp.sqrt(jnp.finfo(size.dtype).eps) * size / jnp.where(steep > 0, steep, 1)
        beside = step(state, -length, slope)
        return beside, ridge & (sample.free_energy(beside) < sample.free_energy(state))

    return problem.map_samples(one, state)


def _preactivation_round_off(layer: Dense, size: Array, kinks: Array) -> Array:
    """How far from its kink the preactivation of each unit may be by round-off alone.

    Activities have the round-off of sums of terms of the `size` of the whole state.
    """
    terms = size * jnp.sum(jnp.abs(layer.effective_weight), axis=1) + jnp.abs(kinks)
    if layer.bias is not None:
        terms = terms + jnp.abs(layer.bias)
    return 4 * jnp.finfo(terms.dtype).eps * terms


def slide(problem: InferenceProblem, state: State, tolerance: float) -> SlidingPoint | None:
    """Find the generalised stationary point near `state` of one sample, or `None`.

    `state` is where a solver or the flow hovers. Units with a preactivation near a kink are held
    there, those that the gradient pulls off are released, and those that would cross a kink on
    the way are caught. A point with a higher free energy than `state` is not accepted.
    """
    search = _ActiveSet(problem, tolerance)
    y = search.flatten(state)
    ceiling = search.energy(y)
    for radius in _RADII:
        found = search.run(y, radius)
        if found is not None and search.energy(search.flatten(found.state)) <= ceiling + tolerance:
            return found
    return None


class _ActiveSet:
    """The search for one sample. A unit is an index into all predicted units, layer after layer."""

    def __init__(self, problem: InferenceProblem, tolerance: float):
        self.problem, self.tolerance = problem, tolerance
        self.eps = float(jnp.finfo(problem.dtype).eps)
        graph, free = problem.graph, set(problem.free_layers)
        self.free = problem.free_widths
        self.predicted = [problem.widths[node] for node in graph.targets]
        # Held units need a free layer below, whose activities put them at their kinks.
        each = zip(self.predicted, graph.layers, graph.sources, strict=True)
        self.can_slide = np.concatenate(
            [np.full(width, _kinked(lay) and bool(set(below) & free)) for width, lay, below in each]
        )

    def flatten(self, state: State) -> np.ndarray:
        return np.concatenate([np.asarray(x, dtype=float) for x in state])

    def state(self, y: np.ndarray) -> State:
        parts = np.split(y, np.cumsum(self.free)[:-1])
        return tuple(jnp.asarray(x, self.problem.dtype) for x in parts)

    def energy(self, y: np.ndarray) -> float:
        return float(self.problem.free_energy(self.state(y)))

    def run(self, y: np.ndarray, radius: float) -> SlidingPoint | None:
        local = self.linearise_at(y, np.zeros(len(self.can_slide), bool))
        held = self.can_slide & (np.abs(local.gaps) <= radius)
        for _ in range(_MOST_ROUNDS):
            local = self.linearise_at(y, held)
            step, slopes = _constrained_newton(local, held)
            if step is None:
                return None
            length, caught = self._until_next_kink(local, held, step)
            y = y + length * step
            if caught is not None:
                held[caught] = True
                continue
            # Slopes outside of the one-sided ones pull the unit off its kink.
            outside = np.maximum(local.low - slopes, slopes - local.high)
            outside = np.where(held, outside, -np.inf)
            outside[held & ~local.attracts] = np.inf
            if outside.max() > np.sqrt(self.eps):
                held[np.argmax(outside)] = False
            elif np.linalg.norm(step) <= 1e3 * self.eps * (1 + np.linalg.norm(y)):
                break
        return self._verified(y, held)

    def linearise_at(self, y: np.ndarray, held: np.ndarray) -> _Local:
        state = self.state(y)
        parts = np.split(held, np.cumsum(self.predicted)[:-1])
        values = _local(self.problem, state, tuple(parts))
        names = [field.name for field in dataclasses.fields(_Local)]
        arrays = {name: np.asarray(x) for name, x in zip(names, values, strict=True)}
        attracts = arrays.pop("attracts")
        return _Local(**{k: v.astype(float) for k, v in arrays.items()}, attracts=attracts)

    def _until_next_kink(
        self, local: _Local, held: np.ndarray, step: np.ndarray
    ) -> tuple[float, int | None]:
        """How much of the step is possible before another unit meets its kink, and which.

        Preactivations are affine in the layer below, so that this is exact.
        """
        change = local.rows @ step
        crosses = self.can_slide & ~held & (local.gaps * (local.gaps + change) < 0)
        if not crosses.any():
            return 1.0, None
        lengths = np.where(crosses, -local.gaps / np.where(crosses, change, 1), np.inf)
        caught = int(np.argmin(lengths))
        return float(lengths[caught]), caught

    def _verified(self, y: np.ndarray, held: np.ndarray) -> SlidingPoint | None:
        """The point if its smallest generalised gradient is small, by bounded least squares."""
        from scipy.optimize import lsq_linear

        local = self.linearise_at(y, held)
        residual = local.slope
        if held.any():
            columns = -(local.rows[held] * local.weighted[held, None]).T
            # `slope` was taken with the upper slopes.
            bounds = (local.low[held] - local.high[held], np.zeros(held.sum()))
            residual = residual + columns @ lsq_linear(columns, -residual, bounds, tol=1e-14).x
        layers = np.split(residual, np.cumsum(self.free)[:-1])
        norms = np.array([np.linalg.norm(layer) for layer in layers])
        at_rest = np.all(np.abs(local.gaps[held]) <= self.tolerance)
        if not (at_rest and local.attracts[held].all() and np.all(norms <= self.tolerance)):
            return None
        masks = tuple(np.split(held, np.cumsum(self.predicted)[:-1]))
        return SlidingPoint(jax.tree.map(np.asarray, self.state(y)), masks, norms)


@dataclasses.dataclass(frozen=True)
class _Local:
    """What the search knows at a point, over all free units N and all predicted units M.

    `slope` (N) and `hessian` (N, N) of F with the held units on their upper one-sided line;
    `gaps` (M) of the preactivations to their nearest kinks; `rows` (M, N), the derivatives of the
    preactivations; `weighted` (M), −∂F by what the activations give; `low` and `high`
    (M), the smaller and the larger of the one-sided slopes; `attracts` (M), whether F rises on
    both sides of the kink rather than falls: from others the flow runs away.
    """

    slope: np.ndarray
    hessian: np.ndarray
    gaps: np.ndarray
    rows: np.ndarray
    weighted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    attracts: np.ndarray


@eqx.filter_jit
def _local(
    problem: InferenceProblem, state: State, held: tuple[Array | np.ndarray, ...]
) -> tuple[Array, ...]:
    activities = problem.activities(state)
    gaps, lefts, rights, layers = [], [], [], []
    graph = problem.graph
    for sources, layer, mask in zip(graph.sources, graph.layers, held, strict=True):
        if not _kinked(layer):
            nothing = jnp.zeros(mask.shape, problem.dtype)
            gaps.append(nothing)
            lefts.append(nothing)
            rights.append(nothing)
            layers.append(layer)
            continue
        z = layer.preactivation(*(activities[node] for node in sources))
        kinks = _nearest_kinks(layer, z)
        left, right = _one_sided_slopes(layer, kinks)
        gaps.append(z - kinks)
        lefts.append(left)
        rights.append(right)
        layers.append(_Held(layer, mask, kinks, jnp.maximum(left, right)))
    smooth = problem.with_layers(layers)
    slope = smooth.gradient(state)
    hessian = free_energy_hessian(smooth, state).dense()
    weighted = problem.weighted_errors(smooth.prediction_errors(activities), activities)
    weighted = [layer.scale * w if _kinked(layer) else w
                for layer, w in zip(graph.layers, weighted, strict=True)]  # fmt: skip
    left, right, pull = (jnp.concatenate(parts) for parts in (lefts, rights, weighted))
    return (
        jnp.concatenate(slope), hessian, jnp.concatenate(gaps), _preactivation_rows(problem), pull,
        jnp.minimum(left, right), jnp.maximum(left, right), (right - left) * pull <= 0,
    )  # fmt: skip


def _nearest_kinks(layer: Dense, z: Array) -> Array:
    points = jnp.asarray(layer.activation.kinks, z.dtype)
    return points[jnp.argmin(jnp.abs(z[:, None] - points[None]), axis=1)]


def _one_sided_slopes(layer: Dense, kinks: Array) -> tuple[Array, Array]:
    """The slopes to the left and to the right of the kinks."""
    # The derivative is constant or smooth on each side: near is as good as at.
    near = jnp.sqrt(jnp.finfo(kinks.dtype).eps) * (1 + jnp.abs(kinks))
    slope = jax.vmap(jax.grad(layer.activation.function))
    return slope(kinks - near), slope(kinks + near)


def _preactivation_rows(problem: InferenceProblem) -> Array:
    """∂z/∂y of all predicted units, zero for layers without kinks."""
    free, rows = problem.free_layers, []
    for index, layer in enumerate(problem.graph.layers, start=1):
        height = problem.widths[problem.target_node(index)]
        row = [jnp.zeros((height, width), problem.dtype) for width in problem.free_widths]
        if _kinked(layer):
            for node, block in by_source(problem, index, layer.effective_weight).items():
                if node in free:
                    row[free.index(node)] = free_columns(problem, node, block)
        rows.append(jnp.concatenate(row, axis=1))
    return jnp.concatenate(rows)


def _constrained_newton(local: _Local, held: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The step to the stationary point with the held units at their kinks, and their slopes."""
    rows, count = local.rows[held], int(held.sum())
    system = np.block([[local.hessian, rows.T], [rows, np.zeros((count, count))]])
    slopes = local.high.copy()
    try:
        solved = np.linalg.solve(system, -np.concatenate([local.slope, local.gaps[held]]))
    except np.linalg.LinAlgError:
        return None, slopes
    step, multipliers = np.split(solved, [len(local.slope)])
    # A slope s instead of the upper one adds −(s − high) · weighted error · row to the gradient.
    pull = local.weighted[held]
    slopes[held] -= multipliers / np.where(pull == 0, 1, pull)
    return step, slopes


def _kinked(layer: object) -> TypeGuard[Dense]:
    return isinstance(layer, Dense) and bool(layer.activation.kinks)
