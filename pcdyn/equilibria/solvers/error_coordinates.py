"""A network in error coordinates: activities from prediction errors, one pass for all layers.

With both ends of a chain clamped the activities follow from the errors e_1 … e_{L−1} by one forward
pass, `x_l = f_l(W_l x_{l−1} + b_l) + e_l`, and `F(e) = Σ E_l(e_l) + E_L(r)` with the output error
`r = T − μ_L`. The energies of hidden layers have a curvature; that of the output need not. The same
holds of a graph in which each free node is predicted once, from what does not depend on it; its
output are the predictions of all that is clamped, side by side.

*Stacked* values hold one array `(layers, batch, n)` for each run of consecutive layers of a chain
that are of the same kind, which are run in a loop that is compiled once, so that a deep network
does not take long to compile; the first hidden layer stands alone, for its prediction is constant.
Of a graph they hold one array `(1, batch, n)` for each free node.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, PyTree

from pcdyn._support.states import dot, largest_norm
from pcdyn._support.types import State, Values
from pcdyn.equilibria.solvers.base import round_off
from pcdyn.equilibria.solvers.damped import PointEvaluation
from pcdyn.model.clamps import Clamp, PartlyClamped
from pcdyn.model.energies.energy import Energy
from pcdyn.model.energies.precision import Precision
from pcdyn.model.graph import Graph
from pcdyn.model.network import Layer, apply_layer, stack, structure_of
from pcdyn.model.problem import InferenceProblem

Stacked = tuple[Values, ...]
# Of a matrix and one vector per sample.
Product = Callable[[Values], Array]
# Loops of up to so many layers are written out, which is faster to run and not slow to compile.
_WRITTEN_OUT = 4


class ErrorCoordinates(eqx.Module):
    """A problem as a function of its errors.

    `target` is what the output is clamped to. `energies` are those of the runs of hidden layers,
    stacked; `covariances` the Π⁻¹ of those that are quadratic, `None` for the others.
    """

    target: eqx.AbstractVar[Values]
    energies: eqx.AbstractVar[tuple[Energy, ...]]
    covariances: eqx.AbstractVar[tuple[Precision | None, ...]]
    output_energy: eqx.AbstractVar[Energy]
    lengths: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def take(self, samples: Array | slice) -> ErrorCoordinates:
        """Select samples of the batch."""

    @abc.abstractmethod
    def predictions(self, activities: Stacked) -> tuple[Values, ...]:
        """Predict the hidden layers from the hidden activities, stacked, and the output."""

    @abc.abstractmethod
    def activities(self, errors: Stacked) -> tuple[Stacked, Array]:
        """The hidden activities and the output error r."""

    def stack(self, layers: State) -> Stacked:
        """Stack one array per hidden layer into one array per run."""
        each = iter(layers)
        return tuple(jnp.stack(list(itertools.islice(each, n))) for n in self.lengths)

    def unstack(self, stacked: Stacked) -> State:
        """Take one array per run apart into one array per hidden layer."""
        return tuple(layer for run in stacked for layer in run)

    def errors(self, state: State) -> Stacked:
        """Compute the prediction errors of hidden activities."""
        activities = self.stack(state)
        return jax.tree.map(jnp.subtract, activities, self.predictions(activities)[:-1])

    def output_error(self, errors: Stacked) -> tuple[Array, Stacked]:
        """The output error r, and the hidden activities."""
        hidden, output_error = self.activities(errors)
        return output_error, hidden

    def evaluate(self, errors: Stacked) -> PointEvaluation:
        """F, ∂F/∂e and the size of ∂F/∂x by two forward and two backward passes."""
        output_error, pull, hidden = jax.vjp(self.output_error, errors, has_aux=True)
        weighted = self.weighted(errors)
        output_weighted = self.output_gradient(output_error)
        energy = self.free_energy(errors, output_error)
        slope = jax.tree.map(jnp.add, weighted, pull(output_weighted)[0])
        return PointEvaluation(energy, slope, self.residual(hidden, weighted, output_weighted))

    def residual(self, hidden: Stacked, weighted: Stacked, output_weighted: Values) -> Array:
        """The largest ‖∂F/∂x_l‖, by a forward and a backward pass from the weighted errors."""
        _, pull = jax.vjp(self.predictions, hidden)
        (above,) = pull((*weighted, output_weighted))
        return largest_norm(jax.tree.map(jnp.subtract, weighted, above))

    def free_energy(self, errors: Stacked, output_error: Values) -> Array:
        """F from the errors of all layers."""
        if self.is_quadratic:
            hidden = 0.5 * dot(errors, self.weighted(errors))
        else:
            each = self._each_run(lambda energy, error: energy.value(error, None), errors)
            hidden = sum(jnp.sum(run, axis=0) for run in each)
        return hidden + self.output_energy.value(output_error, self.target)

    def output_gradient(self, output_error: Values) -> Array:
        """∂E_L/∂r: Π_L r where the output energy is Gaussian."""
        return self.output_energy.gradient(output_error, self.target)

    def output_curvature(self, output_error: Values) -> Product:
        """Products with the curvature of E_L, or with ∂²E_L/∂r² where that is not known."""
        known = self._output_products(output_error, lambda curvature: curvature)
        return known or jax.linearize(self.output_gradient, output_error)[1]

    def output_covariance(self, output_error: Values) -> Product:
        """Products with the inverse of the curvature of E_L, for an energy that has one."""
        known = self._output_products(output_error, Precision.inverse)
        assert known is not None, "the solvers have checked this"
        return known

    def _output_products(
        self, output_error: Values, form: Callable[[Precision], Precision]
    ) -> Product | None:
        constant = self.output_energy.quadratic_form
        if constant is not None:
            return form(constant).weigh

        def one(error: Array, target: Array) -> Precision | None:
            curvature = self.output_energy.curvature(error, target)
            return None if curvature is None else form(curvature)

        each = jax.vmap(one)(output_error, self.target)
        return None if each is None else partial(jax.vmap(Precision.weigh), each)

    @property
    def is_quadratic(self) -> bool:
        """Whether the energies of the hidden layers are."""
        return all(covariance is not None for covariance in self.covariances)

    def round_off(self, errors: Stacked) -> Array:
        """Estimate the round-off of F at these errors, per sample."""
        hidden, output_error = self.activities(errors)
        weighted = (*self.weighted(errors), self.output_gradient(output_error))
        energy = self.free_energy(errors, output_error)
        return round_off(energy, weighted, (*hidden, self.target), (*errors, output_error))

    def linearise(
        self, errors: Stacked
    ) -> tuple[Callable[[Stacked], Array], Callable[[Values], Stacked]]:
        """Products with the Jacobians J_l = ∂μ_L/∂x_l: `Σ_l J_l v_l`, and `J_lᵀ v` for all l."""
        _, push = jax.linearize(lambda e: self.target - self.activities(e)[1], errors)
        transposed = jax.linear_transpose(push, errors)
        return push, lambda covector: transposed(covector)[0]

    def weighted(self, errors: Stacked) -> Stacked:
        """∂E_l/∂e_l, l = 1 … L−1: Π_l e_l where they are Gaussian."""
        return self._each_run(lambda energy, error: energy.gradient(error, None), errors)

    def apply_covariance(self, vectors: Stacked, errors: Stacked) -> Stacked:
        """Π_l⁻¹ v_l, l = 1 … L−1, or the inverse of the energies' curvature at `errors`."""

        def at_error(energy: Energy, vector: Array, error: Array) -> Array:
            def one(vector: Array, error: Array) -> Array:
                curvature = energy.curvature(error, None)
                assert curvature is not None, "the solvers have checked this"
                return curvature.unweigh(vector)

            return jax.vmap(one)(vector, error)

        each = zip(self.energies, self.covariances, vectors, errors, strict=True)
        return tuple(
            _each_layer(at_error, energy, vector, error)
            if covariance is None
            else _each_layer(Precision.weigh, covariance, vector)
            for energy, covariance, vector, error in each
        )

    def _each_run(self, function: Callable[..., Array], errors: Stacked) -> Stacked:
        """`function(energy, error)` of each layer, stacked."""
        pairs = zip(self.energies, errors, strict=True)
        return tuple(_each_layer(function, energy, error) for energy, error in pairs)


class ChainCoordinates(ErrorCoordinates):
    """A chain with both ends clamped as a function of e_1 … e_{L−1}."""

    first_prediction: Values
    target: Values
    layers: tuple[Layer, ...]
    output_layer: Layer
    energies: tuple[Energy, ...]
    covariances: tuple[Precision | None, ...]
    output_energy: Energy
    lengths: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, problem: InferenceProblem):
        network, (first, *_, last) = problem.network, problem.energy
        prepared = problem.prepared()
        assert prepared.first_prediction is not None and prepared.output is not None
        self.first_prediction, self.target = prepared.first_prediction, prepared.output
        self.output_layer = network.layers[-1]
        self.output_energy = last
        each = [
            (network.layers[i - 1], problem.energy[i - 1], network.widths[i - 1 : i + 1])
            for i in range(2, network.depth)
        ]
        runs = [list(run) for _, run in itertools.groupby(each, structure_of)]
        stacked = [stack(run) for run in runs]
        self.layers = tuple(layer for layer, _, _ in stacked)
        self.energies = (stack([first]), *(energy for _, energy, _ in stacked))
        self.covariances = tuple(map(_covariances, self.energies))
        self.lengths = (1, *map(len, runs))

    def take(self, samples: Array | slice) -> ChainCoordinates:
        return eqx.tree_at(
            lambda c: (c.first_prediction, c.target), self,
            (self.first_prediction[samples], self.target[samples]),
        )  # fmt: skip

    def predictions(self, activities: Stacked) -> tuple[Values, ...]:
        results, below = [self.first_prediction[None]], activities[0][-1]
        for layer, here in zip(self.layers, activities[1:], strict=True):
            lower = jnp.concatenate([below[None], here[:-1]]) if len(here) > 1 else below[None]
            # Layer by layer: XLA multiplies one after the other faster than a batch of matrices.
            results.append(_scan(lambda _, f, x: (None, apply_layer(f, x)), None, layer, lower)[1])
            below = here[-1]
        return (*results, apply_layer(self.output_layer, below))

    def activities(self, errors: Stacked) -> tuple[Stacked, Array]:
        def climb(x: Array, layer: Layer, error: Array) -> tuple[Array, Array]:
            x = apply_layer(layer, x) + error
            return x, x

        x = self.first_prediction + errors[0][0]
        hidden = [x[None]]
        for layer, error in zip(self.layers, errors[1:], strict=True):
            x, run = _scan(climb, x, layer, error)
            hidden.append(run)
        return tuple(hidden), self.target - apply_layer(self.output_layer, x)


class GraphCoordinates(ErrorCoordinates):
    """A graph as a function of the errors of its free nodes.

    `order` are these nodes, each after what it is predicted from.
    """

    graph: Graph
    clamp: tuple[Clamp, ...]
    target: Values
    energies: tuple[Energy, ...]
    covariances: tuple[Precision | None, ...]
    output_energy: Energy
    order: tuple[int, ...] = eqx.field(static=True)
    lengths: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, problem: InferenceProblem):
        graph = problem.graph
        assert isinstance(graph, Graph), "there are chains and graphs"
        self.graph, self.clamp = graph, problem.clamp
        self.order = graph.feedforward_order(problem.free_layers)
        self.lengths = (1,) * len(self.order)
        own = [problem.energy[graph.targets.index(node)] for node in problem.free_layers]
        self.energies = tuple(stack([energy]) for energy in own)
        self.covariances = tuple(map(_covariances, self.energies))
        values: list[Any] = [self.clamp[graph.targets[k]] for k in self._outputs]
        self.target = jnp.concatenate(values, axis=-1)
        parts = tuple(problem.energy[k] for k in self._outputs)
        widths = tuple(x.shape[-1] for x in values)
        together = SideBySide(parts, widths, problem.dtype)
        self.output_energy = together if len(parts) > 1 else together.parts[0]

    @property
    def free(self) -> tuple[int, ...]:
        """The free nodes as the state has them."""
        return tuple(sorted(self.order))

    @property
    def _outputs(self) -> tuple[int, ...]:
        """The predictions of what is clamped, counted from 0."""
        return tuple(k for k, node in enumerate(self.graph.targets) if node not in self.order)

    def take(self, samples: Array | slice) -> GraphCoordinates:
        rows = jax.tree.map(lambda x: x[samples], (self.clamp, self.target))
        return eqx.tree_at(lambda c: (c.clamp, c.target), self, rows)

    def predictions(self, activities: Stacked) -> tuple[Values, ...]:
        values = list(self.clamp)
        for node, x in zip(self.free, activities, strict=True):
            values[node] = x[0]
        each = (self._prediction(self.graph.targets.index(node), values) for node in self.free)
        return (*(x[None] for x in each), self._output(values))

    def activities(self, errors: Stacked) -> tuple[Stacked, Array]:
        values, moved = list(self.clamp), dict(zip(self.free, errors, strict=True))
        for node in self.order:
            prediction = self._prediction(self.graph.targets.index(node), values)
            values[node] = prediction + moved[node][0]
        hidden: Any = tuple(values[node] for node in self.free)
        return tuple(x[None] for x in hidden), self.target - self._output(values)

    def _output(self, values: Sequence[Clamp]) -> Array:
        each = [self._prediction(k, values) for k in self._outputs]
        return jnp.concatenate(each, axis=-1)

    def _prediction(self, k: int, values: Sequence[Any]) -> Array:
        found = self.graph.predict_from(k + 1, [values[node] for node in self.graph.sources[k]])
        return jnp.broadcast_to(found, (len(self.target), found.shape[-1]))


class SideBySide(Energy):
    """The sum of energies of several outputs, whose units stand side by side."""

    parts: tuple[Energy, ...]
    widths: tuple[int, ...] = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)

    def value(self, error: Array, target: Array | None) -> Array:
        each = self._each(lambda energy, e, t: energy.value(e, t), error, target)
        return jnp.sum(jnp.stack(each), axis=0)

    def gradient(self, error: Array, target: Array | None) -> Array:
        each = self._each(lambda energy, e, t: energy.gradient(e, t), error, target)
        return jnp.concatenate(each, axis=-1)

    def curvature(self, error: Array, target: Array | None) -> Precision | None:
        return self._joined(self._each(lambda energy, e, t: energy.curvature(e, t), error, target))

    @property
    def quadratic_form(self) -> Precision | None:
        return self._joined([energy.quadratic_form for energy in self.parts])

    def _each(self, function: Callable[..., Any], error: Array, target: Array | None) -> list[Any]:
        ends = list(itertools.accumulate(self.widths))[:-1]
        errors = jnp.split(error, ends, axis=-1)
        targets: Any = errors if target is None else jnp.split(target, ends, axis=-1)
        return [function(*each) for each in zip(self.parts, errors, targets, strict=True)]

    def _joined(self, each: Sequence[Precision | None]) -> Precision | None:
        known = [precision for precision in each if precision is not None]
        if len(known) < len(each):
            return None
        if all(p.values is None or p.values.ndim < 2 for p in known):
            diagonals = [
                jnp.ones(n, self.dtype) if p.values is None else jnp.broadcast_to(p.values, (n,))
                for p, n in zip(known, self.widths, strict=True)
            ]
            return Precision(jnp.concatenate(diagonals))
        blocks = [p.matrix(n, self.dtype) for p, n in zip(known, self.widths, strict=True)]
        return Precision(jsl.block_diag(*blocks))


def has_error_coordinates(problem: InferenceProblem) -> bool:
    """Whether the errors of its free units determine all activities, and there is an output."""
    graph = problem.graph
    if not isinstance(graph, Graph):
        return problem.both_ends_clamped
    free = problem.free_layers
    if any(isinstance(value, PartlyClamped) for value in problem.clamp):
        return False
    once = all(graph.targets.count(node) == 1 for node in free)
    return once and len(graph.targets) > len(free) and graph.has_order(free)


def error_coordinates(problem: InferenceProblem) -> ErrorCoordinates:
    """Take the errors of a problem as its coordinates, if it has them."""
    return ChainCoordinates(problem) if problem.is_chain else GraphCoordinates(problem)


def _scan(
    body: Callable[..., tuple[PyTree, Array]], carry: PyTree, layers: PyTree, values: Values
) -> tuple[PyTree, Array]:
    """`body(carry, layer, value)` over a run of layers and stacked values."""
    arrays, static = eqx.partition(layers, eqx.is_array)

    def step(carry: PyTree, now: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        return body(carry, eqx.combine(now[0], static), now[1])

    if len(values) == 1:
        # Its width may change, which a loop does not allow.
        carry, result = step(carry, jax.tree.map(lambda x: x[0], (arrays, values)))
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(step, carry, (arrays, values), unroll=len(values) <= _WRITTEN_OUT)


def _each_layer(function: Callable[..., Array], stacked: PyTree, *values: Values) -> Array:
    """`function` of each layer of a run, of its energy or precision and its values."""
    arrays, static = eqx.partition(stacked, eqx.is_array)
    return jax.vmap(lambda part, *each: function(eqx.combine(part, static), *each))(arrays, *values)


def _covariances(energies: Energy) -> Precision | None:
    """The stacked Π⁻¹ of stacked energies; `None` where they are not quadratic."""

    def one(energy: Energy) -> Precision | None:
        precision = energy.quadratic_form
        return None if precision is None else precision.inverse()

    arrays, static = eqx.partition(energies, eqx.is_array)
    if not jax.tree.leaves(arrays):
        return one(energies)
    return jax.vmap(lambda part: one(eqx.combine(part, static)))(arrays)
