"""Random predictive coding problems, and docs/maths.md §1–2 written again in plain NumPy.

A `Case` holds NumPy arrays only, so that an oracle computed from it shares no code with pcdyn;
`Case.network` and `Case.problem` hand the same numbers to pcdyn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem

EPS = float(np.finfo(np.float64).eps)
CLAMPS = ("both", "input", "output", "none")
PRECISIONS = ("unit", "number", "scalar", "diagonal", "full", "mixed")
# JAX compiles every operation anew for a new shape: a few shapes, wide, narrow, square and of
# width one, keep random tests quick.
SHAPES = ((2, 3), (3, 2), (1, 1), (2, 3, 2), (3, 1, 2), (3, 3, 3), (3, 2, 3, 2), (2, 2, 2, 2))
SMOOTH = ("identity", "tanh", "sigmoid", "softplus")

# f and f' of each activation.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "identity": (lambda z: z, np.ones_like),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: 1 / (2 + np.exp(z) + np.exp(-z))),
    "softplus": (lambda z: np.log1p(np.exp(z)), lambda z: 1 / (1 + np.exp(-z))),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    "leaky_relu": (lambda z: np.maximum(z, 0.01 * z), lambda z: np.where(z > 0, 1, 0.01)),
}
JAX_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda z: z,
    "tanh": jnp.tanh,
    "sigmoid": lambda z: 1 / (1 + jnp.exp(-z)),
    "softplus": lambda z: jnp.log1p(jnp.exp(z)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One random problem and a state of it; `activities` are x_0 … x_L, the clamped data included.

    `weights`, `biases` and `activations` have one entry for each l = 1 … L; `precisions` is what
    `pcdyn.Gaussian` takes.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray | None, ...]
    activations: tuple[str, ...]
    precisions: Any
    clamp: str
    time_constants: tuple[float, ...] | None
    activities: tuple[np.ndarray, ...]

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.weights[0].shape[1], *(weight.shape[0] for weight in self.weights))

    @property
    def batched(self) -> bool:
        return self.activities[0].ndim == 2

    @property
    def free(self) -> tuple[int, ...]:
        """The indices of the free layers."""
        first = 1 if self.clamp in ("both", "input") else 0
        last = self.depth if self.clamp in ("both", "output") else self.depth + 1
        return tuple(range(first, last))

    @property
    def input(self) -> np.ndarray | None:
        return self.activities[0] if self.clamp in ("both", "input") else None

    @property
    def output(self) -> np.ndarray | None:
        return self.activities[-1] if self.clamp in ("both", "output") else None

    @property
    def state(self) -> tuple[Any, ...]:
        """The free layers, for pcdyn."""
        return tuple(jnp.asarray(self.activities[index]) for index in self.free)

    @property
    def network(self) -> Network:
        parts = zip(self.weights, self.biases, self.activations, strict=True)
        return Network([Dense(weight, bias, name) for weight, bias, name in parts])

    @property
    def problem(self) -> InferenceProblem:
        return InferenceProblem(
            self.network,
            input=self.input,
            output=self.output,
            energy=Gaussian(self.precisions),
            time_constants=self.time_constants,
        )

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def sample(self, row: int) -> Case:
        """One sample of a batch, as a problem of its own."""
        return self.replace(activities=tuple(x[row] for x in self.activities))

    def precision(self, index: int) -> np.ndarray:
        """Π_l as a full matrix."""
        given = self.precisions
        value = np.asarray(given[index - 1] if isinstance(given, tuple) else given or 1.0)
        if value.ndim == 2:
            return value
        return np.diag(np.broadcast_to(value, (self.widths[index],)))

    def preactivation(self, index: int, x: np.ndarray) -> np.ndarray:
        """W_l x + b_l."""
        bias = self.biases[index - 1]
        return x @ self.weights[index - 1].T + (0.0 if bias is None else bias)

    def predict(self, index: int, x: np.ndarray) -> np.ndarray:
        """f_l(W_l x + b_l)."""
        return FUNCTIONS[self.activations[index - 1]][0](self.preactivation(index, x))

    def feedforward(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        layers = [x]
        for index in range(1, self.depth + 1):
            layers.append(self.predict(index, layers[-1]))
        return tuple(layers)

    def errors(self, activities: Sequence[np.ndarray]) -> list[np.ndarray]:
        """ε_1 … ε_L."""
        pairs = itertools.pairwise(activities)
        return [x - self.predict(index, below) for index, (below, x) in enumerate(pairs, start=1)]

    def layer_energies(self, activities: Sequence[np.ndarray]) -> np.ndarray:
        """½ ε_lᵀ Π_l ε_l, l = 1 … L, on the last axis."""
        errors = enumerate(self.errors(activities), start=1)
        values = [
            0.5 * np.einsum("...i,ij,...j", error, self.precision(index), error)
            for index, error in errors
        ]
        return np.stack(values, axis=-1)

    def free_energy(self, activities: Sequence[np.ndarray]) -> np.ndarray:
        return self.layer_energies(activities).sum(axis=-1)

    def field(self) -> list[np.ndarray]:
        """τ_l ẋ_l = −Π_l ε_l + W_{l+1}ᵀ diag(f'_{l+1}) Π_{l+1} ε_{l+1} (docs/maths.md §2)."""
        weighted = [
            error @ self.precision(index)
            for index, error in enumerate(self.errors(self.activities), start=1)
        ]
        flow = []
        for index in self.free:
            rate = np.zeros_like(self.activities[index])
            if index > 0:
                rate = rate - weighted[index - 1]
            if index < self.depth:
                z = self.preactivation(index + 1, self.activities[index])
                slope = FUNCTIONS[self.activations[index]][1](z)
                rate = rate + (slope * weighted[index]) @ self.weights[index]
            flow.append(rate / (1.0 if self.time_constants is None else self.time_constants[index]))
        return flow

    def stack(self, layers: Sequence[Any]) -> np.ndarray:
        """The free layers as one vector per sample."""
        return np.concatenate([np.asarray(x) for x in layers], axis=-1)

    def split(self, stacked: np.ndarray) -> list[np.ndarray]:
        """The inverse of `stack`."""
        sizes = [self.widths[index] for index in self.free]
        return np.split(stacked, np.cumsum(sizes)[:-1], axis=-1)

    def affine_errors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, c, Π such that a linear network has ε = A y + c, for the stacked free layers y.

        Then F = ½ εᵀΠε gives H = AᵀΠA and b = −AᵀΠc, without a word about block rows.
        """
        probe = self.replace(activities=tuple(x * 0.0 for x in self.activities))
        zeros = [
            probe.activities[i] if i in self.free else self.activities[i]
            for i in range(self.depth + 1)
        ]
        constant = np.concatenate(self.errors(zeros), axis=-1)
        rows = np.cumsum([0, *self.widths[1:]])
        columns = np.cumsum([0, *(self.widths[i] for i in self.free)])
        matrix = np.zeros((rows[-1], columns[-1]))
        precision = np.zeros((rows[-1], rows[-1]))
        for index in range(1, self.depth + 1):
            here = slice(rows[index - 1], rows[index])
            precision[here, here] = self.precision(index)
            for layer, block in ((index, np.eye(self.widths[index])),
                                 (index - 1, -self.weights[index - 1])):  # fmt: skip
                if layer in self.free:
                    place = self.free.index(layer)
                    matrix[here, columns[place] : columns[place + 1]] = block
        return matrix, constant, precision

    def linear_flow(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """H, b and the time constants of τ ẏ = −H y + b."""
        matrix, constant, precision = self.affine_errors()
        constants = self.time_constants or (1.0,) * (self.depth + 1)
        tau = np.concatenate([np.full(self.widths[i], constants[i]) for i in self.free])
        return matrix.T @ precision @ matrix, -constant @ precision @ matrix, tau


def jax_free_energy(case: Case, activities: Sequence[Any]) -> Any:
    """F of one sample, written for automatic differentiation."""
    total = jnp.zeros(())
    for index in range(1, case.depth + 1):
        z = jnp.asarray(case.weights[index - 1]) @ activities[index - 1]
        bias = case.biases[index - 1]
        if bias is not None:
            z = z + jnp.asarray(bias)
        error = activities[index] - JAX_FUNCTIONS[case.activations[index - 1]](z)
        total = total + 0.5 * error @ (jnp.asarray(case.precision(index)) @ error)
    return total


def per_sample(case: Case, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of one sample, mapped over the batch if the case has one."""
    return jax.vmap(function) if case.batched else function


def random_spd(rng: np.random.Generator, width: int) -> np.ndarray:
    """A symmetric positive definite matrix with eigenvalues between 1/e and e."""
    q, _ = np.linalg.qr(rng.normal(size=(width, width)))
    matrix = (q * np.exp(rng.uniform(-1, 1, width))) @ q.T
    return (matrix + matrix.T) / 2


def random_precision(rng: np.random.Generator, width: int, kind: str) -> np.ndarray:
    """A precision with eigenvalues between 1/e and e; `kind` is scalar, diagonal, full or mixed."""
    if kind == "mixed":
        kind = str(rng.choice(["scalar", "diagonal", "full"]))
    if kind == "full":
        return random_spd(rng, width)
    return np.exp(rng.uniform(-1, 1, () if kind == "scalar" else (width,)))


def build_case(
    *,
    seed: int,
    widths: Sequence[int],
    clamp: str = "both",
    precision: str = "unit",
    bias: bool = False,
    activations: Sequence[str] = ("identity",),
    slow: bool = False,
    batch: int | None = None,
) -> Case:
    """A random case; each layer takes one of `activations`; `slow` draws time constants."""
    rng = np.random.default_rng(seed)
    pairs = list(itertools.pairwise(widths))
    precisions: Any = None
    if precision == "number":
        precisions = float(np.exp(rng.uniform(-1, 1)))
    elif precision != "unit":
        precisions = tuple(random_precision(rng, n, precision) for n in widths[1:])
    shape = () if batch is None else (batch,)
    return Case(
        weights=tuple(rng.normal(size=(m, n)) / np.sqrt(n) for n, m in pairs),
        biases=tuple(rng.normal(size=m) if bias else None for _, m in pairs),
        activations=tuple(str(rng.choice(list(activations))) for _ in pairs),
        precisions=precisions,
        clamp=clamp,
        time_constants=tuple(np.exp(rng.uniform(-1, 1, len(widths))).tolist()) if slow else None,
        activities=tuple(rng.normal(size=(*shape, n)) for n in widths),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    clamps: Sequence[str] = CLAMPS,
    activations: Sequence[str] = ("identity",),
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    batches: Sequence[int | None] = (None, 3),
    slow: st.SearchStrategy[bool] | None = None,
) -> Case:
    """Random problems; both ends clamped needs a hidden layer."""
    clamp = draw(st.sampled_from(list(clamps)))
    fitting = [widths for widths in shapes if clamp != "both" or len(widths) > 2]
    return build_case(
        seed=draw(st.integers(0, 2**32 - 1)),
        widths=draw(st.sampled_from(fitting)),
        clamp=clamp,
        precision=draw(st.sampled_from(PRECISIONS)),
        bias=draw(st.booleans()),
        activations=activations,
        slow=draw(st.booleans() if slow is None else slow),
        batch=draw(st.sampled_from(list(batches))),
    )


# Examples that compile cost far more than in plain Python: each test says how many it can afford.
few = functools.partial(settings, deadline=None)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Every array of `actual` agrees with `expected` to `tolerance` of the largest entry or 1."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    scale = max([1.0, *(float(np.max(np.abs(x), initial=0)) for x in expected)])
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.shape(ours) == np.shape(theirs)
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance * scale)


def least_curvature(problem: InferenceProblem, state: Any) -> float:
    """The smallest eigenvalue of ∂²F/∂x², over the batch."""

    def one(input: Any, output: Any, state: Any) -> Any:
        return free_energy_hessian(problem.with_data(input, output), state).dense()

    hessians = eqx.filter_vmap(one)(problem.input, problem.output, state)
    return float(np.min(np.linalg.eigvalsh(hessians)))
