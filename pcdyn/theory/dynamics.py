"""How fast inference is: condition numbers of the Hessian, and its spectrum for wide layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import hessian
from pcdyn.theory.evidence import Evidence
from pcdyn.theory.statement import Statement

EPS = float(np.finfo(np.float64).eps)


@eqx.filter_jit
def linear_spectra(
    weights: Sequence[Array], precisions: Array | Sequence[float] | None = None
) -> Array:
    """Compute the eigenvalues of H = ∂²F/∂x² of linear networks with both ends clamped, ascending.

    `weights` are W_1 … W_L, each of shape `(networks, n_l, n_{l−1})`, `precisions` a number for
    each l = 1 … L, 1 unless given. Returns the shape `(networks, n_1 + … + n_{L−1})`.
    """

    def one(weights: Sequence[Array]) -> Array:
        network = Network([Dense(w) for w in weights])
        zeros = (jnp.zeros(n, network.dtype) for n in (network.widths[0], network.widths[-1]))
        input, output = zeros
        energy = None if precisions is None else Gaussian(list(precisions))
        problem = InferenceProblem(network, input=input, output=output, energy=energy)
        return jnp.linalg.eigvalsh(hessian(problem).dense())

    return jax.vmap(one)(list(weights))


def random_square_weights(
    key: PRNGKeyArray, *, networks: int, depth: int, width: int
) -> list[Array]:
    """Draw W_1 … W_L with entries N(0, 1/width), each of shape `(networks, width, width)`."""
    shape = (networks, width, width)
    return [jr.normal(k, shape) / math.sqrt(width) for k in jr.split(key, depth)]


def rapid_convergence(*, seed: int = 0, networks: int = 20) -> tuple[Evidence, ...]:
    """A.3: whether convergence is rapid, by depth, and the rates of one wide layer."""
    return (
        *condition_numbers(seed=seed, networks=max(networks, 50)),
        *marchenko_pastur_edges(seed=seed, networks=networks),
    )


def condition_numbers(
    *, depths: Sequence[int] = (2, 4, 8, 16), width: int = 10, networks: int = 100, seed: int = 0
) -> tuple[Evidence, ...]:
    """Is "convergence rapid" because F is convex? The condition number of H grows with depth.

    One row for each depth: the median from `pcdyn.linear.hessian` against that of matrices written
    row by row in NumPy for the same networks, within the round-off of a least eigenvalue. Then, as
    a finding, whether the slowest time stays within ten of the fastest at the largest depth.
    """
    rows = []
    settings = {"width": width, "networks": networks, "seed": seed, "weights": "N(0, 1/width)"}
    measured = math.nan
    for depth, key in zip(depths, jr.split(jr.key(seed), len(depths)), strict=True):
        weights = random_square_weights(key, networks=networks, depth=depth, width=width)
        rates = np.asarray(linear_spectra(weights))
        measured = float(np.median(rates[:, -1] / rates[:, 0]))
        stacked = np.stack([np.asarray(weight) for weight in weights], axis=1)
        by_rows = np.stack([_hessian_by_rows(network) for network in stacked])
        expected = float(np.median(np.linalg.cond(by_rows)))
        rows.append(
            Evidence(
                "Eq 28", f"median condition number of ∂²F/∂x² at depth {depth}",
                # The least eigenvalue errs by round-off of the largest.
                measured, "equal", expected, 1e2 * EPS * expected**2,
                "NumPy condition numbers of AᵀA for the stacked errors ε = A y, same weights",
                {**settings, "depth": depth},
            )
        )  # fmt: skip
    rows.append(
        Evidence(
            "Eq 28", f"convergence is rapid: condition number at most 10 at depth {depths[-1]}",
            measured, "at most", 10.0, 0.0, "the condition number of a convex F has no bound",
            {**settings, "depth": depths[-1]}, expected_to_hold=False,
        )
    )  # fmt: skip
    return tuple(rows)


def _hessian_by_rows(weights: np.ndarray) -> np.ndarray:
    """AᵀA, where ε_l = y_l − W_l y_{l−1} are the rows of A; the ends are clamped."""
    depth, width = weights.shape[:2]
    matrix = np.eye(depth * width)
    for layer in range(1, depth):
        here, below = (slice(i * width, (i + 1) * width) for i in (layer, layer - 1))
        matrix[here, below] = -weights[layer]
    free = matrix[:, : (depth - 1) * width]
    return free.T @ free


def marchenko_pastur_edges(
    *, width: int = 100, ratio: float = 0.5, networks: int = 16, seed: int = 0
) -> tuple[Evidence, ...]:
    """The extreme rates of one wide hidden layer of n units below an output of m = n/ratio units.

    H = I + WᵀW with entries of W N(0, 1/m) has its rates in 1 + (1 ± √ratio)² as n → ∞ (Marchenko
    and Pastur 1967), the largest with fluctuations of order n^{−2/3} (Johnstone 2001), which give
    the tolerance.
    """
    outputs = round(width / ratio)
    keys = jr.split(jr.key(seed))
    weights = [
        jnp.zeros((networks, width, 1)),
        jr.normal(keys[0], (networks, outputs, width)) / math.sqrt(outputs),
    ]
    rates = np.asarray(linear_spectra(weights))
    root = math.sqrt(width / outputs)
    settings = {"width": width, "outputs": outputs, "networks": networks, "seed": seed}
    rows = []
    for name, sign, measured in (
        ("smallest", -1, float(rates[:, 0].mean())), ("largest", 1, float(rates[:, -1].mean())),
    ):  # fmt: skip
        # The scale of the Tracy–Widom law, of mean −1.2 and standard deviation 1.3.
        sides = math.sqrt(outputs) + sign * math.sqrt(width)
        scale = abs(sides) / outputs * abs(outputs**-0.5 + sign * width**-0.5) ** (1 / 3)
        rows.append(
            Evidence(
                "Eq 28", f"{name} rate of one wide hidden layer, at the edge of Marchenko–Pastur",
                measured, "equal", 1 + (1 + sign * root) ** 2,
                scale * (1.21 + 3 * 1.27 / math.sqrt(networks)),
                "1 + (1 ± √(n/m))², tolerance from the law of Tracy and Widom", settings,
            )
        )  # fmt: skip
    return tuple(rows)


STATEMENTS = (
    Statement(
        number="Eq 28", title="Rapid convergence of linear networks",
        says="F being convex, convergence is straightforward and rapid.",
        as_printed="does not hold",
        form="Convex is not well conditioned: the median of cond(H) for weights N(0, 1/width) "
        "grows from 4 at depth 2 to some 800 at depth 16. One wide hidden layer has its rates "
        "between 1 + (1 ± √(n/m))².",
        measure=rapid_convergence,
    ),
)  # fmt: skip
