"""Random networks in batches: their theory in plain NumPy, and pcdyn's functions mapped over them.

What is written here in NumPy is an oracle: it shares no code with the rest of pcdyn. All arrays
have the networks as their leading axis.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from scipy.special import expit

from pcdyn._support.types import Numbers
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem

Layers = list[np.ndarray]

# What several statements share: widths of networks whose layers can be inverted,
SQUARE = (3, 3, 3, 3)
# how far a slope fitted over decades, of which the largest size is not small, can be off,
ORDER = 0.1
# what is far above round-off and below a finding, which is a difference of its own size,
UNEQUAL = 1e-3
# and an oracle.
DELTAS = "BP's δ_{l−1} = W_lᵀ (f'_l ∘ δ_l) at the feedforward pass, in NumPy"

# f and f' of each activation.
_FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "identity": (lambda z: z, np.ones_like),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "softplus": (lambda z: np.logaddexp(0, z), expit),
}


@dataclasses.dataclass(frozen=True)
class Networks:
    """Random networks with data: `weights` and `precisions` of layers 1 … L, d and T of each.

    Shapes: weights (networks, n_l, n_{l−1}), precisions (networks, n_l, n_l), data (networks, n).
    """

    weights: tuple[np.ndarray, ...]
    precisions: tuple[np.ndarray, ...]
    input: np.ndarray
    target: np.ndarray
    activation: str = "identity"

    @property
    def depth(self) -> int:
        """The number L of predictions."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths n_0 … n_L of the layers."""
        return (self.weights[0].shape[2], *(weight.shape[1] for weight in self.weights))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that an `Evidence` names."""
        widths = "-".join(map(str, self.widths))
        name = {"identity": "linear"}.get(self.activation, self.activation)
        return {"networks": len(self.input), "network": f"{widths} {name}"}

    def with_precisions(self, *scalars: float) -> Networks:
        """Put one number for each layer 1 … L in place of the precisions."""
        eyes = (np.broadcast_to(np.eye(n), (len(self.input), n, n)) for n in self.widths[1:])
        scaled = tuple(p * eye for p, eye in zip(scalars, eyes, strict=True))
        return dataclasses.replace(self, precisions=scaled)

    def slope(self, layer: int, below: np.ndarray) -> np.ndarray:
        """Compute the slope f'_l at W_l x_{l−1}."""
        return _FUNCTIONS[self.activation][1](times(self.weights[layer - 1], below))

    def predict(self, layer: int, below: np.ndarray) -> np.ndarray:
        """Predict a layer from the one below, μ_l = f(W_l x_{l−1})."""
        return _FUNCTIONS[self.activation][0](times(self.weights[layer - 1], below))

    def feedforward(self) -> Layers:
        """Run the feedforward pass x̂_0 … x̂_L from the input."""
        activities = [self.input]
        for layer in range(1, self.depth + 1):
            activities.append(self.predict(layer, activities[-1]))
        return activities

    def start(self) -> Layers:
        """Return the feedforward pass with the target as x_L."""
        return [*self.feedforward()[:-1], self.target]

    def errors(self, activities: Sequence[np.ndarray]) -> Layers:
        """Compute the prediction errors ε_1 … ε_L."""
        return [
            activities[layer] - self.predict(layer, activities[layer - 1])
            for layer in range(1, self.depth + 1)
        ]

    def weighted_errors(self, activities: Sequence[np.ndarray]) -> Layers:
        """Compute the precision-weighted errors Π_1 ε_1 … Π_L ε_L."""
        pairs = zip(self.precisions, self.errors(activities), strict=True)
        return [times(precision, error) for precision, error in pairs]

    def layer_energies(self, activities: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the energies E_1 … E_L, on the last axis."""
        pairs = zip(self.errors(activities), self.weighted_errors(activities), strict=True)
        return np.stack([0.5 * (error * weighted).sum(-1) for error, weighted in pairs], axis=-1)

    def free_energy(self, activities: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the free energy F of each network."""
        return self.layer_energies(activities).sum(-1)

    def gradient(self, activities: Sequence[np.ndarray]) -> Layers:
        """Compute ∂F/∂x_0 … ∂F/∂x_L by hand: Π_l ε_l − W_{l+1}ᵀ (f'_{l+1} ∘ Π_{l+1} ε_{l+1})."""
        weighted = self.weighted_errors(activities)
        gradients = [np.zeros_like(self.input), *weighted]
        for layer in range(self.depth):
            gradients[layer] = gradients[layer] - self.pull(
                layer + 1, activities[layer], weighted[layer]
            )
        return gradients

    def pull(self, layer: int, below: np.ndarray, credit: np.ndarray) -> np.ndarray:
        """W_lᵀ (f'_l ∘ d_l): what layer l − 1 receives."""
        return times(transpose(self.weights[layer - 1]), self.slope(layer, below) * credit)

    def deltas(self) -> Layers:
        """Compute BP's δ_1 … δ_L: δ_L = Π_L (T − x̂_L), δ_{l−1} = W_lᵀ (f'_l ∘ δ_l)."""
        forward = self.feedforward()
        deltas = [times(self.precisions[-1], self.target - forward[-1])]
        for layer in range(self.depth, 1, -1):
            deltas.insert(0, self.pull(layer, forward[layer - 1], deltas[0]))
        return deltas

    def weight_gradient(self, activities: Sequence[np.ndarray], credits: Layers) -> np.ndarray:
        """Compute −(f'_l ∘ d_l) x_{l−1}ᵀ of all layers, as one vector for each network."""
        parts = []
        for layer, credit in enumerate(credits, start=1):
            below = activities[layer - 1]
            outer = (self.slope(layer, below) * credit)[:, :, None] * below[:, None, :]
            parts.append(-outer.reshape(len(below), -1))
        return np.concatenate(parts, axis=-1)

    def targets(self) -> Layers:
        """Compute t_0 … t_L of target propagation, t_{l−1} = W_l⁻¹ f⁻¹(t_l), for square weights."""
        targets = [self.target]
        for weight in reversed(self.weights):
            inner = np.arctanh(targets[0]) if self.activation == "tanh" else targets[0]
            targets.insert(0, solve(weight, inner))
        return targets

    def linear_flow(self, first: int = 1, last: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """H and b of ẏ = −H y + b for the stacked free layers `first` … `last` (linear networks).

        From ε = A y + c, so that H = AᵀΠA and b = −AᵀΠc, without a word about block rows.
        """
        last = self.depth - 1 if last is None else last
        widths, count = self.widths, len(self.input)
        clamped = [self.input, *(np.zeros((count, n)) for n in widths[1:-1]), self.target]
        clamped = [x * (not first <= i <= last) for i, x in enumerate(clamped)]
        constant = np.concatenate(self.errors(clamped), axis=-1)
        rows = np.cumsum([0, *widths[1:]])
        columns = np.cumsum([0, *widths[first : last + 1]])
        matrix, precision = (np.zeros((count, rows[-1], n)) for n in (columns[-1], rows[-1]))
        for layer in range(1, self.depth + 1):
            here = slice(rows[layer - 1], rows[layer])
            precision[:, here, here] = self.precisions[layer - 1]
            blocks = ((layer, np.eye(widths[layer])), (layer - 1, -self.weights[layer - 1]))
            for index, block in blocks:
                if first <= index <= last:
                    place = slice(columns[index - first], columns[index - first + 1])
                    matrix[:, here, place] = block
        weighted = transpose(matrix) @ precision
        return weighted @ matrix, -times(weighted, constant)

    def stack(self, activities: Sequence[np.ndarray]) -> np.ndarray:
        """Concatenate the hidden layers to one vector for each network."""
        return np.concatenate(list(activities[1:-1]), axis=-1)

    def unstack(self, hidden: np.ndarray) -> Layers:
        """Split the hidden layers as one vector into x_0 … x_L."""
        parts = np.split(hidden, np.cumsum(self.widths[1:-1])[:-1], axis=-1)
        return [self.input, *parts, self.target]

    def rest(self) -> Layers:
        """Solve densely for x_0* … x_L* of linear networks."""
        return self.unstack(solve(*self.linear_flow()))


def draw(
    *,
    seed: int,
    networks: int,
    widths: Sequence[int],
    activation: str = "identity",
    std: float | None = None,
    full_precisions: bool = False,
    near_identity: float | None = None,
) -> Networks:
    """Draw networks with weights N(0, std²), 1/√n_{l−1} unless given, and standard normal data.

    `near_identity` draws W = I + N(0, near_identity²) instead; `full_precisions` draws SPD
    matrices with eigenvalues between 1/e and e in place of the identity.
    """
    rng = np.random.default_rng(seed)
    weights = []
    for n, m in itertools.pairwise(widths):
        size = near_identity or std or 1 / np.sqrt(n)
        weights.append(size * rng.normal(size=(networks, m, n)))
        if near_identity is not None:
            weights[-1] += np.eye(m, n)
    found = Networks(
        weights=tuple(weights),
        precisions=(),
        input=rng.normal(size=(networks, widths[0])),
        target=rng.normal(size=(networks, widths[-1])),
        activation=activation,
    )
    if not full_precisions:
        return found.with_precisions(*[1.0] * found.depth)
    return dataclasses.replace(
        found, precisions=tuple(_random_spd(rng, networks, n) for n in widths[1:])
    )


def _random_spd(rng: np.random.Generator, networks: int, width: int) -> np.ndarray:
    q = np.linalg.qr(rng.normal(size=(networks, width, width)))[0]
    matrix = (q * np.exp(rng.uniform(-1, 1, (networks, 1, width)))) @ transpose(q)
    return (matrix + transpose(matrix)) / 2


def reachable(networks: Networks, *, scale: float = 0.5) -> Networks:
    """Replace the targets by reachable ones: the outputs for other inputs, times `scale`."""
    other = dataclasses.replace(networks, input=scale * networks.input[::-1])
    return dataclasses.replace(networks, target=other.feedforward()[-1])


def on_each(
    measure: Callable[..., PyTree], networks: Networks, *arrays: PyTree, clamp: str = "both"
) -> PyTree:
    """Call `measure(problem, *arrays)` of pcdyn for each network; NumPy arrays come back.

    `clamp` says which ends are clamped: both, input or output. `arrays` have the networks as their
    leading axis. `measure` is a module-level function, so that it is compiled once.
    """
    parts = (networks.weights, networks.precisions, networks.input, networks.target)
    found = _mapped(measure, networks.activation, clamp, parts, arrays)
    return jax.tree.map(np.asarray, found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _mapped(
    measure: Callable[..., PyTree], activation: str, clamp: str, parts: PyTree, arrays: PyTree
) -> PyTree:
    def one(parts: PyTree, arrays: PyTree) -> PyTree:
        weights, precisions, input, target = parts
        problem = InferenceProblem(
            Network([Dense(weight, activation=activation) for weight in weights]),
            input=None if clamp == "output" else input,
            output=None if clamp == "input" else target,
            energy=Gaussian(list(precisions)),
        )
        return measure(problem, *arrays)

    return jax.vmap(one)(parts, arrays)


def weight_differences(
    networks: Networks, function: Callable[[Networks], np.ndarray], *, step: float = 1e-5
) -> np.ndarray:
    """Differentiate a number of each network for all weights, by central differences.

    One vector for each network, in the order of `Networks.weight_gradient`.
    """
    slopes = []
    for layer, weight in enumerate(networks.weights):
        for place in np.ndindex(weight.shape[1:]):
            ends = []
            for moved in (weight.copy(), weight.copy()):
                moved[:, *place] += step if ends else -step
                weights = (*networks.weights[:layer], moved, *networks.weights[layer + 1 :])
                ends.append(function(dataclasses.replace(networks, weights=weights)))
            slopes.append((ends[1] - ends[0]) / (2 * step))
    return np.stack(slopes, axis=-1)


def times(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Multiply a matrix and a vector of each network."""
    return (matrix @ vector[..., None])[..., 0]


def solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Solve A x = b for each network."""
    return np.linalg.solve(matrix, vector[..., None])[..., 0]


def transpose(matrix: np.ndarray) -> np.ndarray:
    """Transpose the last two axes."""
    return np.swapaxes(matrix, -1, -2)


def central_differences(
    function: Callable[[Layers], np.ndarray], arrays: Sequence[np.ndarray], *, step: float = 1e-5
) -> Layers:
    """Differentiate `function(arrays)`, a number for each network, by each entry of each array."""
    slopes = []
    for place, array in enumerate(arrays):
        slopes.append(np.zeros_like(array))
        for entry in np.ndindex(array.shape[1:]):
            rise = 0.0
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[place][:, *entry] += sign * step
                rise = rise + sign * function(moved)
            slopes[-1][:, *entry] = rise / (2 * step)
    return slopes


def largest(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Measure the largest absolute difference between two sequences of arrays."""
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def relative(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Measure ‖a − b‖ / ‖b‖ over all layers, the median over the networks."""
    return float(np.median(_relative_each(ours, theirs)))


def largest_relative(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Measure ‖a − b‖ / ‖b‖ over all layers, the largest of the networks."""
    return float(np.max(_relative_each(ours, theirs)))


def _relative_each(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    a, b = (np.concatenate(list(each), axis=-1) for each in (ours, theirs))
    return np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)


def order(sizes: Numbers, errors: Numbers) -> float:
    """Fit the slope of log error against log size."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])
