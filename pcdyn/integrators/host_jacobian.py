"""The Jacobian −T⁻¹H of a batch as SciPy's methods take it: sparse by columns, or in bands."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.types import Scalar, State
from pcdyn.integrators.structured import PaddedChain, sample_hessians
from pcdyn.model.driven import Interval
from pcdyn.model.problem import InferenceProblem
from pcdyn.model.stacked import StackedProblem

if TYPE_CHECKING:
    import scipy.sparse


class ChainPattern:
    """Where the blocks of −T⁻¹H lie in the matrix of all samples, sample after sample.

    `widths` are those of the free layers, of which `pairs` are coupled. Of a chain the
    half-bandwidth is max(n_l + n_{l+1}) − 1.
    """

    def __init__(self, widths: tuple[int, ...], samples: int, pairs: Sequence[tuple[int, int]]):
        starts = np.cumsum([0, *widths])
        ranges = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
        both = [*pairs, *((j, i) for i, j in pairs if i != j)]
        grids = [np.meshgrid(ranges[i], ranges[j], indexing="ij") for i, j in both]
        one = np.concatenate([np.stack(grid).reshape(2, -1) for grid in grids], axis=1)
        shifts = starts[-1] * np.arange(samples)
        self._rows, self._columns = (one[:, None] + shifts[:, None]).reshape(2, -1)
        self.size = int(starts[-1] * samples)
        self.share = one.shape[1] / (int(starts[-1]) ** 2 * samples)
        self.bandwidth = int(np.max(one[0] - one[1]))
        self._order = np.lexsort((self._rows, self._columns))
        self._starts = np.searchsorted(self._columns[self._order], np.arange(self.size + 1))

    def sparse(self, entries: np.ndarray) -> scipy.sparse.csc_array:
        """Return the matrix by columns, as SuperLU factorises it."""
        from scipy.sparse import csc_array

        parts = (entries[self._order], self._rows[self._order], self._starts)
        return csc_array(parts, shape=(self.size, self.size))

    def banded(self, entries: np.ndarray) -> np.ndarray:
        """Store a matrix of this pattern as LAPACK stores banded ones."""
        packed = np.zeros((2 * self.bandwidth + 1, self.size))
        packed[self._rows - self._columns + self.bandwidth, self._columns] = entries
        return packed

    def options(
        self, method: str, entries: Callable[[float, np.ndarray], np.ndarray]
    ) -> dict[str, Any]:
        """Return the arguments of `solve_ivp` for this matrix, with `entries` at a flat state."""
        if method == "LSODA":
            band = self.bandwidth
            return {"jac": lambda t, y: self.banded(entries(t, y)), "lband": band, "uband": band}
        return {"jac": lambda t, y: self.sparse(entries(t, y))}


@eqx.filter_jit
def chain_entries(problem: InferenceProblem, state: State) -> Array:
    """Compute the entries of −T⁻¹H, in the order of `ChainPattern`, sample after sample."""
    hessians, taus = sample_hessians(problem, state), problem.state_time_constants
    each = list(zip(hessians.pairs, hessians.blocks, strict=True))
    blocks = [-block / taus[i] for (i, _), block in each]
    blocks += [-jnp.matrix_transpose(block) / taus[j] for (i, j), block in each if i != j]
    flat = [block.reshape(*block.shape[:-2], -1) for block in blocks]
    return jnp.concatenate(flat, axis=-1).reshape(-1)


@eqx.filter_jit
def driven_entries(problem: Interval, t: Scalar, state: State) -> Array:
    """Compute those of a driven problem at a time."""
    return chain_entries(problem.at(t), state)


@eqx.filter_jit
def deep_entries(problem: StackedProblem, state: State) -> Array:
    """Compute those of a `StackedProblem`, from products with the Jacobian."""
    _, product = jax.linearize(lambda x: problem.vector_field(0.0, (x,))[0], state[0])
    chain = PaddedChain(problem.free_widths)
    matrix = chain.blocks(product, state[0], symmetric=False)
    flat = [x.reshape(*x.shape[:-3], -1) for x in jax.tree.leaves(matrix)]
    return jnp.concatenate(flat, axis=-1)[..., chain.entries].reshape(-1)
