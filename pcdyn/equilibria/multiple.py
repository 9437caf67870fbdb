"""The several equilibria of one problem, with their energies and their stability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.arrays import as_float_array
from pcdyn._support.checks import as_sequence, checked_number
from pcdyn._support.types import Activities, Numbers, State, Values
from pcdyn.equilibria.equilibrium import Equilibrium, equilibrium
from pcdyn.equilibria.solvers import Solver
from pcdyn.errors import MOST_SAMPLES_NAMED, EquilibriumStatus, ShapeError
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.model.problem import InferenceProblem, check_problem

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.lines
    import xarray


class Equilibria(eqx.Module):
    """What `multiple_equilibria` finds, in the order of the free energy.

    - `activities`: `activities[l]` of shape `(equilibria, n_l)`.
    - `free_energy`: F of each.
    - `smallest_eigenvalue` of the Hessian of F at each: the flow returns after a small push if it
      is positive. At a kink it is that of one side.
    - `basin_of`: for each start, the index of the equilibrium it led to, or −1 if none was found.
    - `searches`: where each start ended.
    """

    activities: Activities
    free_energy: Values
    smallest_eigenvalue: Values
    basin_of: Values
    searches: Equilibrium

    @property
    def stable(self) -> Values:
        """Which equilibria are strict minima of the free energy."""
        return self.smallest_eigenvalue > 0

    @property
    def status(self) -> EquilibriumStatus | tuple[EquilibriumStatus, ...]:
        """Outcome of the search from each start."""
        return self.searches.status

    @property
    def ok(self) -> bool:
        """Whether every start led to an equilibrium."""
        return bool(np.all(np.asarray(self.basin_of) >= 0))

    @property
    def message(self) -> str:
        """Count of the equilibria, and of the starts that led to them."""
        lost = int(np.sum(np.asarray(self.basin_of) < 0))
        found = f"{len(self)} equilibria, {int(np.sum(self.stable))} of them stable"
        return f"{found}, from {len(self.basin_of)} starts, {lost} of which found none"

    def __len__(self) -> int:
        return len(self.free_energy)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return a readable account: a line for each equilibrium, the lowest free energy first."""
        lines = [self.message]
        for i in range(min(len(self), MOST_SAMPLES_NAMED)):
            starts = int(np.sum(np.asarray(self.basin_of) == i))
            lines.append(
                f"  free energy {self.free_energy[i]:.6g}, smallest eigenvalue "
                f"{self.smallest_eigenvalue[i]:.3g}, reached from {starts}"
            )
        if len(self) > MOST_SAMPLES_NAMED:
            lines.append(f"  and {len(self) - MOST_SAMPLES_NAMED} more")
        return "\n".join(lines)

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> list[matplotlib.lines.Line2D]:
        """Draw the activities of each; see `pcdyn.plotting.equilibria`."""
        import pcdyn

        return pcdyn.plotting.equilibria(self, ax=ax)

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled data set with the dimensions `equilibrium`, `start` and `unit_l`."""
        import xarray

        variables: dict[str, Any] = {
            f"activity_{l}": (("equilibrium", f"unit_{l}"), np.asarray(x))
            for l, x in enumerate(self.activities)
        }
        for name in ("free_energy", "smallest_eigenvalue", "stable"):
            variables[name] = (("equilibrium",), np.asarray(getattr(self, name)))
        variables["basin_of"] = (("start",), np.asarray(self.basin_of))
        return xarray.Dataset(variables, attrs={"message": self.message})


def multiple_equilibria(
    problem: InferenceProblem,
    starts: Sequence[Numbers],
    *,
    method: str | Solver | Sequence[Solver | str] | None = "pseudo_transient",
    separation: float = 1e-3,
    tolerance: float | None = None,
) -> Equilibria:
    """Find the distinct equilibria of one sample that many starts lead to.

    Starts that find nothing are counted in `basin_of`, and raise nothing.

    **Arguments:**

    - `problem`: with a single sample.
    - `starts`: an array of shape `(starts, n_l)` for each free layer, in their order.
    - `method`, `tolerance`: as for `pcdyn.equilibrium`.
    - `separation`: two ends are one equilibrium if their distance is at most this times 1 + the
      length of the state.

    **Raises:**

    - `pcdyn.errors.ShapeError` for a problem with a batch.
    - What `pcdyn.equilibrium` raises for starts that do not fit.
    """
    check_problem(problem)
    separation = checked_number(separation, "separation", at_least=0)
    if problem.batch_shape not in ((), None):
        raise ShapeError("multiple_equilibria takes one sample; select one of the batch")
    wanted = "a list with an array of shape (starts, n_l) for each free layer"
    starts = tuple(
        as_float_array(x, "each of starts") for x in as_sequence(starts, "starts", wanted)
    )
    if len(starts) != len(problem.free_layers) or any(x.ndim != 2 or not x.size for x in starts):
        raise ShapeError(
            f"starts must be {wanted}, {problem.free_layers}; got shapes "
            f"{[x.shape for x in starts]}"
        )
    count = len(starts[0])
    many = problem.repeated(count)
    found = equilibrium(many, method=method, initial=starts, tolerance=tolerance, throw=False)
    ends = np.concatenate(found.state, axis=-1)
    rests = ~EquilibriumStatus.failed(np.asarray(found.status_codes))
    order = np.argsort(np.where(rests, found.free_energy, np.inf), kind="stable")
    chosen: list[int] = []
    basin_of = np.full(count, -1)
    for start in order[: rests.sum()]:
        distances = np.linalg.norm(ends[chosen] - ends[start], axis=-1)
        near = np.flatnonzero(distances <= separation * (1 + np.linalg.norm(ends[start])))
        if near.size == 0:
            chosen.append(int(start))
        basin_of[start] = near[0] if near.size else len(chosen) - 1
    return Equilibria(
        activities=tuple(x[chosen] for x in found.activities),
        free_energy=found.free_energy[chosen],
        smallest_eigenvalue=_smallest_eigenvalues(problem, tuple(x[chosen] for x in found.state)),
        basin_of=cast(Values, basin_of),
        searches=found,
    )


def _smallest_eigenvalues(problem: InferenceProblem, states: State) -> Values:
    if len(states[0]) == 0:
        return cast(Values, np.zeros(0))

    def one(state: State) -> Array:
        return jnp.linalg.eigvalsh(free_energy_hessian(problem, state).dense())[0]

    found = eqx.filter_jit(jax.vmap(one))(jax.tree.map(jnp.asarray, states))
    return cast(Values, np.asarray(found))
