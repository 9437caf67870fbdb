"""The flow of two free units as a flow in the plane: its equilibria and its separatrices."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pcdyn._support.products import matmul
from pcdyn._support.states import layer_norms
from pcdyn._support.types import State
from pcdyn.equilibria.multiple import multiple_equilibria
from pcdyn.errors import EquilibriumStatus
from pcdyn.linearisation.spectrum import decay_matrix
from pcdyn.model.clamps import PartlyClamped
from pcdyn.model.problem import InferenceProblem

KINDS: tuple[str, ...] = ("minimum", "saddle", "maximum", "at a kink", "degenerate")
# Lowest and highest first coordinate, lowest and highest second one.
Box = tuple[float, float, float, float]

# Two points within this share of the diagonal are one equilibrium.
_SAME = 1e-4
_TOLERANCE = 1e-9
_NEWTON_STEPS = 60
_LONGEST_STEP = 0.1


class PlanarEquilibria(eqx.Module):
    """Equilibria in the order of their free energies; see `pcdyn.phase_portrait`."""

    points: np.ndarray
    kinds: tuple[str, ...] = eqx.field(static=True)
    energies: np.ndarray
    rates: np.ndarray
    modes: np.ndarray
    residuals: np.ndarray


def coordinates(problem: InferenceProblem) -> tuple[tuple[int, int], ...]:
    """List layer and unit of each free activity."""
    found = []
    for layer in problem.free_layers:
        value = problem.clamp[layer]
        units: Any = range(problem.widths[layer])
        if isinstance(value, PartlyClamped):
            units = np.asarray(value.free).tolist()
        found += [(layer, unit) for unit in units]
    return tuple(found)


def diagonal(box: Box) -> float:
    """Return the length of the diagonal of a box."""
    return float(np.hypot(box[1] - box[0], box[3] - box[2]))


def grid(problem: InferenceProblem, box: Box, resolution: int) -> np.ndarray:
    """Space points evenly over a box, shape (y, x, 2)."""
    sides = (np.linspace(*side, resolution) for side in (box[:2], box[2:]))
    return np.stack(np.meshgrid(*sides), axis=-1).astype(problem.dtype)


def state_at(problem: InferenceProblem, points: Array) -> State:
    """Return the state of a problem with two free units at points of the plane, shape (…, 2)."""
    if len(problem.free_layers) == 1:
        return (points,)
    return points[..., :1], points[..., 1:]


@eqx.filter_jit
def _linearised(problem: InferenceProblem, points: Array) -> tuple[Array, Array, Array, Array]:
    """F, the largest ‖∂F/∂x_l‖, and the rates and modes of the flow at points (n, 2)."""

    def one(point: Array) -> tuple[Array, Array, Array, Array]:
        state = state_at(problem, point)
        rates, modes = jnp.linalg.eigh(decay_matrix(problem, state).dense())
        roots = [problem.time_constants[layer] ** 0.5 for layer, _ in coordinates(problem)]
        modes = modes / jnp.stack(roots)[:, None]
        modes = (modes / jnp.linalg.norm(modes, axis=0, keepdims=True)).T
        residual = jnp.max(layer_norms(problem.gradient(state)))
        return problem.free_energy(state), residual, rates, modes

    return jax.vmap(one)(points)


def local_flow(problem: InferenceProblem, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute F and dx/dt at points (n, 2)."""
    energy, velocity = _field(problem, jnp.asarray(points, problem.dtype))
    return np.asarray(energy), np.asarray(velocity)


@eqx.filter_jit
def _field(problem: InferenceProblem, points: Array) -> tuple[Array, Array]:
    def one(point: Array) -> tuple[Array, Array]:
        state = state_at(problem, point)
        return problem.free_energy(state), jnp.concatenate(problem.vector_field(0.0, state))

    return jax.vmap(one)(points)


def planar_equilibria(
    problem: InferenceProblem, box: Box, starts: np.ndarray, tolerance: float | None
) -> PlanarEquilibria:
    """Find the minima that the starts lead to, and saddles and maxima by Newton's method."""
    fine = grid(problem, box, 21).reshape(-1, 2)
    if tolerance is None:
        largest = float(np.max(_linearised(problem, jnp.asarray(fine))[1]))
        tolerance = max(_TOLERANCE, 4 * float(jnp.finfo(problem.dtype).eps) * largest)
    begin = state_at(problem, jnp.asarray(starts, problem.dtype))
    rests = multiple_equilibria(problem, begin, tolerance=tolerance)
    codes, basins = rests.searches.status_codes, rests.basin_of
    firsts = [int(np.flatnonzero(basins == index)[0]) for index in range(len(rests))]
    at_kink = [codes[first] == EquilibriumStatus.SLIDING for first in firsts]
    known = [np.max(rests.searches.residual_norms[first]) for first in firsts]
    points = np.concatenate(problem.state_of(rests.activities), axis=-1)
    roots = np.asarray(_roots(problem, jnp.asarray(fine), _LONGEST_STEP * diagonal(box)))
    slopes = np.asarray(_linearised(problem, jnp.asarray(roots))[1])
    # Outside, on plateaus on which the gradient only fades, there is nothing to find.
    inside = np.all((roots >= fine.min(axis=0)) & (roots <= fine.max(axis=0)), axis=-1)
    for root in roots[inside & (slopes <= tolerance)]:
        if np.all(np.linalg.norm(points - root, axis=-1) > _SAME * diagonal(box)):
            points = np.concatenate([points, root[None]])
    at_kink = np.array([*at_kink, *[False] * (len(points) - len(at_kink))], bool)
    energies, residuals, rates, modes = (
        np.array(part) for part in _linearised(problem, jnp.asarray(points))
    )
    residuals[: len(known)] = np.where(at_kink[: len(known)], known, residuals[: len(known)])
    rates[at_kink], modes[at_kink] = np.nan, np.nan
    kinds = [_kind(*pair) for pair in zip(rates, at_kink, strict=True)]
    order = np.argsort(energies, kind="stable")
    return PlanarEquilibria(
        points[order], tuple(kinds[i] for i in order), energies[order], rates[order],
        modes[order], residuals[order],
    )  # fmt: skip


@eqx.filter_jit
def _roots(problem: InferenceProblem, starts: Array, longest: float) -> Array:
    """Where Newton's method for ∂F/∂x = 0 leads to, which stops at saddles and maxima as well."""

    def velocity(point: Array) -> Array:
        return jnp.concatenate(problem.vector_field(0.0, state_at(problem, point)))

    def one(point: Array) -> Array:
        # Of several solutions, where the Jacobian is singular, the shortest.
        step = -matmul(jnp.linalg.pinv(jax.jacfwd(velocity)(point)), velocity(point))
        length = jnp.linalg.norm(step)
        return point + step * jnp.minimum(1, longest / jnp.maximum(length, longest))

    return jax.lax.fori_loop(0, _NEWTON_STEPS, lambda _, x: jax.vmap(one)(x), starts)


def _kind(rates: np.ndarray, at_kink: np.bool_) -> str:
    if at_kink:
        return "at a kink"
    if np.min(np.abs(rates)) <= 1e-7 * np.max(np.abs(rates)):
        return "degenerate"
    return KINDS[int(np.sum(rates < 0))]


def separatrices(
    problem: InferenceProblem, found: PlanarEquilibria, box: Box
) -> tuple[np.ndarray, ...]:
    """Trace the flow back from each saddle, to both sides along its stable direction."""
    offset = 1e-4 * diagonal(box)
    return tuple(
        _against_the_flow(problem, point, sign * offset * modes[1], box)
        for point, modes, kind in zip(found.points, found.modes, found.kinds, strict=True)
        if kind == "saddle"
        for sign in (1, -1)
    )


def _against_the_flow(
    problem: InferenceProblem, saddle: np.ndarray, offset: np.ndarray, box: Box
) -> np.ndarray:
    """The curve that runs into the saddle, by its length, until it leaves the box or ends."""
    from scipy.integrate import solve_ivp

    def velocity(point: np.ndarray) -> np.ndarray:
        return local_flow(problem, point[None])[1][0]

    # Nearer to a maximum than this the curve would only be traced to and fro across it.
    slowest = 0.5 * np.linalg.norm(velocity(saddle + offset))
    outer = np.reshape(box, (2, 2)) + 0.05 * diagonal(box) * np.array([-1, 1])

    def unit(_: float, point: np.ndarray) -> np.ndarray:
        field = velocity(point)
        return -field / max(np.linalg.norm(field), slowest)

    def leaves(_: float, point: np.ndarray) -> float:
        return float(np.min(np.stack([point - outer[:, 0], outer[:, 1] - point])))

    def rests(_: float, point: np.ndarray) -> float:
        return float(np.linalg.norm(velocity(point)) - slowest)

    events: list[Any] = [leaves, rests]
    for event in events:
        event.terminal = True
    length = 3 * diagonal(box)
    run = solve_ivp(
        unit, (0, length), saddle + offset, events=events, rtol=1e-6,
        atol=1e-6 * length, max_step=length / 300,
    )  # fmt: skip
    return np.concatenate([saddle[None], run.y.T])
