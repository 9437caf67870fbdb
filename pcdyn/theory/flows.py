"""pcdyn's equilibria and flows of random networks, compiled once for each shape of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array
from scipy.integrate import solve_ivp

from pcdyn._support.types import Activities, State
from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.solvers import GaussNewton
from pcdyn.errors import EquilibriumStatus, NotConvergedError, SimulationError
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import linear_equilibrium
from pcdyn.theory.networks import Layers, Networks, on_each

# Of ‖∂F/∂x_l‖; the equilibria are this over the least curvature from where the search stops.
SETTLED = 1e-11
_FREE = {"both": slice(1, -1), "input": slice(1, None), "output": slice(None, -1)}


def settle(networks: Networks) -> Layers:
    """Find x_0* … x_L* of each network, both ends clamped, by Gauss–Newton.

    Raises `NotConvergedError` if one of them is not found.
    """
    activities, status = on_each(_settle, networks, tuple(networks.start()[1:-1]))
    if np.any(status != EquilibriumStatus.CONVERGED):
        count = int((status != EquilibriumStatus.CONVERGED).sum())
        raise NotConvergedError(
            f"{count} of {len(status)} equilibria were not found; choose another seed", activities
        )
    return list(activities)


def _settle(problem: InferenceProblem, start: State) -> tuple[Activities, Array]:
    found = equilibrium(
        problem, method=GaussNewton(), initial=start, tolerance=SETTLED, throw=False
    )
    return found.activities, found.status_codes


def linear_rest(networks: Networks) -> Layers:
    """Solve for x_0* … x_L* of linear networks by block Cholesky."""
    return list(on_each(linear_equilibrium, networks))


def vector_field(
    networks: Networks, activities: Sequence[np.ndarray], *, clamp: str = "both"
) -> Layers:
    """Evaluate pcdyn's dx/dt of the free layers."""
    return list(on_each(_vector_field, networks, tuple(activities[_FREE[clamp]]), clamp=clamp))


def _vector_field(problem: InferenceProblem, state: State) -> State:
    return problem.vector_field(0.0, state)


def flow(
    networks: Networks,
    activities: Sequence[np.ndarray],
    times: Sequence[float],
    *,
    clamp: str = "both",
    tolerance: float = 1e-10,
) -> list[Layers]:
    """Integrate pcdyn's flow by SciPy's DOP853 from t = 0: x_0 … x_L at each of `times`.

    All networks make one system; `tolerance` is relative, and absolute a hundredth of it. Raises
    `SimulationError` where SciPy fails.
    """
    free = _FREE[clamp]
    shapes = [x.shape for x in activities[free]]
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]

    def layers(y: np.ndarray) -> list[np.ndarray]:
        parts = [part.reshape(s) for part, s in zip(np.split(y, ends), shapes, strict=True)]
        whole = list(activities)
        whole[free] = parts
        return whole

    def field(_: float, y: np.ndarray) -> np.ndarray:
        return np.concatenate([x.ravel() for x in vector_field(networks, layers(y), clamp=clamp)])

    start = np.concatenate([x.ravel() for x in activities[free]])
    found = integrate(field, start, times, method="DOP853", tolerance=tolerance)
    return [layers(y) for y in found]


def integrate(
    field: Callable[[float, np.ndarray], np.ndarray],
    start: np.ndarray,
    times: Sequence[float],
    *,
    method: str,
    tolerance: float,
) -> np.ndarray:
    """Solve y' = field(t, y) by SciPy: y at each of `times`, on the first axis.

    Raises `SimulationError` where SciPy fails.
    """
    found = solve_ivp(
        field, (0, times[-1]), start, method=method, t_eval=times, rtol=tolerance,
        atol=tolerance / 100,
    )  # fmt: skip
    if not found.success:
        raise SimulationError(
            f"{method} did not reach t = {times[-1]:g} ({found.message}); choose another seed, or "
            "fewer networks, which share one step"
        )
    return found.y.T
