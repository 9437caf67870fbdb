"""What inference is compared with: the feedforward pass, backpropagation, target propagation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from pcdyn._support.arrays import is_traced
from pcdyn._support.compiling import compiled
from pcdyn._support.products import matmul
from pcdyn._support.types import Activities
from pcdyn.errors import (
    ActivationError,
    GraphError,
    InputError,
    ShapeError,
    SingularWeightError,
    UnreachableTargetError,
)
from pcdyn.model.activations import Elementwise
from pcdyn.model.graph import Graph
from pcdyn.model.network import Dense, Layer, Network
from pcdyn.model.problem import InferenceProblem, check_problem


def feedforward(problem: InferenceProblem) -> Activities:
    """Compute the activities x_0 … x_L of a feedforward pass from the clamped input.

    They are the equilibrium when the output is free, for any activation (Theorem 3.1). In a graph
    each node has the prediction of it that is listed first; what is predicted from a clamped node
    is predicted from the data.

    **Raises:**

    - `InputError` if the input is free.
    - `GraphError` for a graph in which nodes predict each other, or nothing predicts or clamps one.
    """
    check_problem(problem)
    if isinstance(problem.graph, Graph):
        return _graph_pass(problem, problem.graph)
    if problem.input is None:
        raise InputError(
            "a feedforward pass needs a clamped input; this problem's input is free (that from the "
            "mean of a prior is problem.feedforward_state())"
        )
    return problem.network.feedforward(problem.input)


# Of a graph a graph, of a chain a chain.
if TYPE_CHECKING:
    NetworkOrGraph = Network
else:
    NetworkOrGraph = Network | Graph


class BackpropagationPass(eqx.Module):
    """The feedforward pass of backpropagation with its errors δ_l and gradients.

    - `activities`: the feedforward pass x_0 … x_L.
    - `deltas`: δ_l = −∂ℒ/∂x̂_l for l = 1 … L, each shaped like its layer; the limit of the
      prediction errors Π_l ε_l (Theorem 3.2 with its sign corrected). Of a graph there is one for
      each prediction, 0 where the pass does not use it.
    - `weight_gradient`: ∂ℒ/∂(weights), a network whose arrays are the gradients, summed over the
      batch.
    - `loss`: ℒ of the feedforward pass, per sample.
    """

    activities: Activities
    deltas: Activities
    weight_gradient: NetworkOrGraph
    loss: Float[Array, "*batch"]


def backpropagation(problem: InferenceProblem) -> BackpropagationPass:
    """Propagate the output loss ℒ back through the feedforward pass.

    `δ_L = Π_L (T − x̂_L)`, `δ_{l−1} = W_lᵀ (f'_l ∘ δ_l)` and `∂ℒ/∂W_l = −(f'_l ∘ δ_l) x_{l−1}ᵀ`,
    for any kind of layer and any energy. The loss of a graph is the energy of the predictions of
    what is clamped.

    **Raises:**

    - `InputError` unless both ends are clamped.
    - `GraphError` where a graph has no feedforward pass, or predicts nothing that is clamped.
    """
    check_problem(problem)
    if isinstance(problem.graph, Graph):
        return _graph_backpropagation(problem, problem.graph)
    if problem.output is None:
        raise InputError("backpropagation needs a target: this problem's output is free")
    return _backpropagation(problem, feedforward(problem))


@compiled
def _graph_pass(problem: InferenceProblem, graph: Graph) -> Activities:
    return graph.feedforward(problem.clamp, problem.batch_shape or ())[1]


@compiled
def _graph_backpropagation(problem: InferenceProblem, graph: Graph) -> BackpropagationPass:
    """By automatic differentiation of the pass, with something added to every prediction."""
    if not problem.outputs:
        raise GraphError("backpropagation needs a target: nothing that is predicted is clamped")
    batch = problem.batch_shape or ()
    nudges = [jnp.zeros((*batch, graph.widths[node]), problem.dtype) for node in graph.targets]

    def loss(arrays: Graph, nudges: list[Array]) -> tuple[Array, tuple[Array, Activities]]:
        predicted, energies = _graph_loss(problem, eqx.combine(arrays, rest), nudges)
        return jnp.sum(energies), (energies, predicted)

    arrays, rest = eqx.partition(graph, eqx.is_inexact_array)
    differentiated = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, (energies, predicted)), (gradient, slopes) = differentiated(arrays, nudges)
    deltas = tuple(-slope for slope in slopes)
    weights: Any = eqx.combine(gradient, rest)
    return BackpropagationPass(predicted, deltas, weights, energies)


def _graph_loss(
    problem: InferenceProblem, graph: Graph, nudges: Sequence[Array] | None = None
) -> tuple[Activities, Array]:
    """The predictions of a feedforward pass, and the energy of those of what is clamped."""
    batch = problem.batch_shape or ()
    activities, predicted = graph.feedforward(problem.clamp, batch, nudges)
    energies = jnp.zeros(batch, problem.dtype)
    for node in dict.fromkeys(graph.targets[place] for place in problem.outputs):
        error = activities[node] - predicted[node]
        index = graph.targets.index(node) + 1
        energies = energies + problem.layer_energy(index, error, activities[node])
    return predicted, energies


def feedforward_loss(problem: InferenceProblem) -> tuple[Activities, Float[Array, "*batch"]]:
    """Compute the feedforward pass and its output loss ℒ, per sample: what BP descends.

    **Raises:**

    - As `feedforward`, and `InputError` where the output of a chain is free.
    """
    if isinstance(problem.graph, Graph):
        return _graph_loss(problem, problem.graph)
    activities = feedforward(problem)
    error = problem.output_error(activities[-1])
    return activities, problem.layer_energy(problem.network.depth, error)


@compiled
def _backpropagation(problem: InferenceProblem, activities: Activities) -> BackpropagationPass:
    network = problem.network

    def output_energy(prediction: Array) -> tuple[Array, Array]:
        energy = problem.layer_energy(network.depth, problem.output_error(prediction))
        return jnp.sum(energy), energy

    gradient, loss = jax.grad(output_energy, has_aux=True)(activities[-1])
    deltas, gradients = [-gradient], []
    for index in range(network.depth, 0, -1):
        given = activities[index - 1 : index]
        layer_gradient, (delta,) = _layer_vjp(network, index, given, deltas[0])
        gradients.insert(0, layer_gradient)
        if index > 1:
            deltas.insert(0, delta)
    return BackpropagationPass(activities, tuple(deltas), network.with_layers(gradients), loss)


@compiled
def local_gradient(
    network: Network | Graph, activities: Sequence[Array], deltas: Sequence[Array]
) -> NetworkOrGraph:
    """Compute `−(f'_l ∘ d_l) x_{l−1}ᵀ` for each layer, summed over the batch: local learning.

    With d_l = Π_l ε_l it is ∂F/∂(weights) of predictive coding (Eq 2); with BP's δ_l and the
    feedforward pass it is ∂ℒ/∂(weights).

    **Arguments:**

    - `network`: whose weights it is the gradient of, or a graph.
    - `activities`: x_0 … x_L, those of all nodes.
    - `deltas`: d_1 … d_L, what is credited to each layer or prediction, shaped like it.

    **Returns:**

    A network, or a graph, whose arrays are the gradients.
    """
    gradients = []
    for index, (sources, delta) in enumerate(zip(network.sources, deltas, strict=True), start=1):
        given = [activities[node] for node in sources]
        gradients.append(_layer_vjp(network, index, given, delta)[0])
    weights: Any = network.with_layers(gradients)
    return weights


def _layer_vjp(
    network: Network | Graph, index: int, given: Sequence[Array], delta: Array
) -> tuple[Layer, Sequence[Array]]:
    """The gradient of a layer, and what is credited to each of the layers that it is given."""
    arrays, rest = eqx.partition(network.layers[index - 1], eqx.is_inexact_array)

    def predict(arrays: PyTree, given: list[Array]) -> Array:
        predicted = network.predict_from(index, given, eqx.combine(arrays, rest))
        # That of a prior is one for all samples.
        return predicted if given else jnp.broadcast_to(predicted, delta.shape)

    _, vjp = jax.vjp(predict, arrays, list(given))
    layer_gradient, below = vjp(delta)
    return jax.tree.map(jnp.negative, layer_gradient), below


class TargetPropagationPass(eqx.Module):
    """The targets of target propagation, and for which samples they exist.

    - `reachable`: for each layer l = 1 … L, whether each unit's target lies strictly inside the
      range of the activation, boolean, shaped like the layer.
    - `exists`: whether all targets of a sample exist, boolean, per sample: they are reachable and,
      where a weight is tall, consistent.
    - `values`: numbers for x_0 … x_L that are targets only for the samples that exist, and mean
      nothing for the others; `targets` is the checked way to them.
    """

    values: Activities
    reachable: tuple[Bool[Array, "..."], ...]
    exists: Bool[Array, "*batch"]

    @property
    def targets(self) -> Activities:
        """Targets t_0 … t_L; raises `UnreachableTargetError` if a sample has none."""
        if not is_traced(self.exists) and not bool(jnp.all(self.exists)):
            raise UnreachableTargetError(self._explanation())
        return self.values

    def _explanation(self) -> str:
        exists = np.asarray(self.exists)
        parts = []
        for index, mask in enumerate(self.reachable, start=1):
            units = np.unique(np.argwhere(~np.asarray(mask))[:, -1])
            if units.size:
                parts.append(f"layer {index} units {units.tolist()}")
        where = f"outside the open range of the activation at {'; '.join(parts)}"
        inconsistent = "a weight with more rows than columns does not reach the layer above"
        return (
            f"{int((~exists).sum())} of {exists.size} samples have no target propagation target: "
            f"{where if parts else inconsistent}. Choose other targets, or select the samples "
            "whose `exists` is true"
        )


def target_propagation(problem: InferenceProblem) -> TargetPropagationPass:
    """Propagate targets by exact inverses: `t_L = T`, `t_{l−1} = W_l⁺ (f_l⁻¹(t_l) − b_l)`.

    The equilibrium of the flow with the input free, where the targets exist (Theorem 3.3, Eq 3).
    They exist only where every t_l, l ≥ 1, lies strictly inside the range of f_l; an unreachable
    target is reported as such and never replaced by a number. For weights that are not square the
    Moore–Penrose inverse is used (paper, A.9): a wide weight has many targets, of which this is
    the one of least norm; a tall one has none unless T happens to be consistent, and then
    `values` holds the least-squares solution while `exists` is false.

    **Raises:**

    - `InputError` if the output is free.
    - `ShapeError` for a layer that is not a `Dense`, and `InputError` for one with a skip.
    - `ActivationError` for an activation without inverse.
    - `SingularWeightError` for a singular weight matrix.
    """
    check_problem(problem)
    if problem.output is None:
        raise InputError("target propagation needs a target: this problem's output is free")
    # From the output down, as targets go.
    each = [_invertible_dense(problem.network, i) for i in range(problem.network.depth, 0, -1)]
    return _targets(each, problem.output)


@compiled
def _targets(each: list[tuple[Dense, Elementwise]], target: Array) -> TargetPropagationPass:
    values, reachable = [target], []
    exists = jnp.ones(target.shape[:-1], bool)
    for layer, inverse in each:
        activated = values[0] / layer.scale
        in_range = layer.activation.in_range(activated)
        exists = exists & jnp.all(in_range, axis=-1)
        reachable.insert(0, in_range)
        # Where a target does not exist any number may stand, as long as it is inside the range:
        # f(1) is, and it keeps NaN out of the reachable samples' derivatives.
        inside = layer.activation(jnp.ones_like(activated))
        preimage = inverse(jnp.where(in_range, activated, inside))
        below = _solve_layer(layer, preimage)
        exists = exists & _solves(layer, below, preimage)
        values.insert(0, below)
    return TargetPropagationPass(tuple(values), tuple(reachable), exists)


def _invertible_dense(network: Network, index: int) -> tuple[Dense, Elementwise]:
    """A layer and the inverse of its activation."""
    layer = network.layers[index - 1]
    if not isinstance(layer, Dense):
        raise ShapeError(f"layer {index} is a {type(layer).__name__}: only Dense can be inverted")
    if layer.skip:
        raise InputError(f"layer {index} has a skip, with which its inverse has no closed form")
    inverse = layer.activation.inverse
    if inverse is None:
        raise ActivationError(
            f"activation {layer.activation.name!r} of layer {index} has no inverse; give one with "
            "pcdyn.Activation(name, function, inverse, lower, upper)"
        )
    if not is_traced(layer.weight):
        _check_full_rank(np.asarray(layer.weight), index)
    return layer, inverse


def _check_full_rank(weight: np.ndarray, index: int) -> None:
    singular_values = np.linalg.svd(weight, compute_uv=False)
    smallest, largest = float(singular_values[-1]), float(singular_values[0])
    if smallest <= max(weight.shape) * np.finfo(weight.dtype).eps * largest:
        raise SingularWeightError(
            f"the weight of layer {index} is singular: its singular values range from "
            f"{smallest:.2e} to {largest:.2e}; no target propagation target exists"
        )


def _solves(layer: Dense, below: Array, preimage: Array) -> Array:
    """Whether W t_{l−1} + b_l is f_l⁻¹(t_l), to what a solve can give; a tall weight may fail."""
    rows, columns = layer.weight.shape
    if rows <= columns:
        return jnp.ones(below.shape[:-1], bool)
    reached = jnp.vectorize(layer.preactivation, signature="(n)->(m)")(below)
    size = jnp.linalg.norm(preimage, axis=-1)
    eps = jnp.finfo(preimage.dtype).eps
    return jnp.linalg.norm(reached - preimage, axis=-1) <= jnp.sqrt(eps) * size


def _solve_layer(layer: Dense, preimage: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
    centred = preimage
    if layer.bias is not None:
        centred = preimage - jnp.broadcast_to(layer.bias, preimage.shape)
    weight = layer.effective_weight
    if weight.shape[0] == weight.shape[1]:
        flat = centred.reshape(-1, centred.shape[-1])
        return jnp.linalg.solve(weight, flat.T).T.reshape(centred.shape)
    return matmul(centred, jnp.linalg.pinv(weight).T)
