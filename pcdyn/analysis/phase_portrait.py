"""`phase_portrait`: the whole flow of a network with two free units, equilibria and basins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from pcdyn._support.arrays import as_host_array, check_size
from pcdyn._support.checks import checked_integer, checked_number
from pcdyn._support.types import Numbers
from pcdyn.analysis.phase_plane import (
    KINDS,
    Box,
    PlanarEquilibria,
    coordinates,
    diagonal,
    grid,
    local_flow,
    planar_equilibria,
    separatrices,
    state_at,
)
from pcdyn.equilibria.kinks import has_kinks
from pcdyn.errors import InputError, ShapeError, TimesError, ToleranceError
from pcdyn.integrators import Diffrax, Integrator, get_integrator
from pcdyn.model.problem import InferenceProblem, check_problem
from pcdyn.simulation.simulate import simulate

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.lines
    import xarray

# A flow has arrived at an equilibrium within this share of the diagonal. An explicit method hovers
# about a kink, farther from it the more the field jumps there.
_ARRIVED, _ARRIVED_AT_KINK = 1e-2, 3e-2
_SAVES = 81
_LEAST_T1, _LEAST_T1_AT_KINKS, _MOST_T1 = 10.0, 30.0, 1000.0


class PhasePortrait(eqx.Module):
    """The flow `τ dx/dt = −∂F/∂x` of two free units, in the plane of their activities.

    Arrays are NumPy arrays. Points have their two coordinates on the last axis, in the order of
    the state; time is in units of the activity time constant.

    - `problem`: what was drawn; `None` where the arrays alone were kept.
    - `coordinates`: layer and unit of the first and of the second coordinate.
    - `x`, `y`: the grid's coordinates, shape `(resolution,)`. On the grid, second coordinate
      first: `free_energy` F, shape `(y, x)`; `velocity` dx/dt, shape `(y, x, 2)`, which has a
      nullcline where one component vanishes; `basin`, the index of the equilibrium where the flow
      from there ends, −1 where it had not arrived at any after the time `t1`.
    - `equilibria`, shape `(n, 2)`, in the order of `equilibrium_energies`; `kinds`, one of
      `"minimum"` (a stable node), `"saddle"`, `"maximum"` (an unstable node), `"at a kink"` of an
      activation, where the flow slides to rest, and `"degenerate"`, where a rate is zero.
    - `rates`, shape `(n, 2)`: the eigenvalues of τ⁻¹∂²F/∂x² in ascending order, NaN at a kink;
      `modes[i, j]` is the unit vector along which the deviation decays with `rates[i, j]`.
    - `residuals`: the largest ‖∂F/∂x_l‖ at each equilibrium (of the smallest generalised
      gradient at a kink).
    - `separatrices`: for each saddle two curves, shape `(points, 2)`, along which the flow runs
      into it: they part the basins.
    - `trajectories`, shape `(starts, time, 2)`, at `times`; `ends`, the index of the equilibrium
      each arrives at, or −1.
    """

    problem: InferenceProblem | None
    coordinates: tuple[tuple[int, int], ...] = eqx.field(static=True)
    x: np.ndarray
    y: np.ndarray
    free_energy: np.ndarray
    velocity: np.ndarray
    basin: np.ndarray
    equilibria: np.ndarray
    kinds: tuple[str, ...] = eqx.field(static=True)
    equilibrium_energies: np.ndarray
    rates: np.ndarray
    modes: np.ndarray
    residuals: np.ndarray
    separatrices: tuple[np.ndarray, ...]
    trajectories: np.ndarray
    times: np.ndarray
    ends: np.ndarray

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The lowest and highest first coordinate, then those of the second."""
        return float(self.x[0]), float(self.x[-1]), float(self.y[0]), float(self.y[-1])

    @property
    def stable(self) -> np.ndarray:
        """Whether the flow returns to each equilibrium after a small push."""
        return np.array([kind in ("minimum", "at a kink") for kind in self.kinds], bool)

    @property
    def index_sum(self) -> int:
        """The number of minima (those at kinks too) and maxima less that of saddles.

        It is 1 for every free energy that grows without bound in all directions and has no
        degenerate equilibrium (Poincaré and Hopf), if all of them were found.
        """
        signs = dict(zip(KINDS, (1, -1, 1, 1, 0), strict=True))
        return sum(signs[kind] for kind in self.kinds)

    def plot(
        self, ax: matplotlib.axes.Axes | None = None, *, legend: bool = True, arrows: int = 17
    ) -> list[matplotlib.lines.Line2D]:
        """Draw flow, nullclines, equilibria and basins; see `pcdyn.plotting.phase_portrait`."""
        import pcdyn

        return pcdyn.plotting.phase_portrait(self, ax=ax, legend=legend, arrows=arrows)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return in one line how many equilibria of each kind there are."""
        counts = [f"{kind}: {self.kinds.count(kind)}" for kind in KINDS if kind in self.kinds]
        return f"PhasePortrait of {self.coordinates} ({', '.join(counts) or 'no equilibrium'})"

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled data set; points have their coordinates along `coordinate`.

        The other dimensions are `x` and `y` of the grid, `equilibrium`, `rate`, `start`, `time` and
        `separatrix`, whose points along `point` end with NaN where it is shorter than the longest.
        """
        import xarray

        longest = max((len(curve) for curve in self.separatrices), default=0)
        curves = np.full((len(self.separatrices), longest, 2), np.nan)
        for row, curve in zip(curves, self.separatrices, strict=True):
            row[: len(curve)] = curve
        at = "coordinate"
        variables: dict[str, Any] = {
            "free_energy": (("y", "x"), self.free_energy),
            "velocity": (("y", "x", at), self.velocity),
            "basin": (("y", "x"), self.basin),
            "equilibria": (("equilibrium", at), self.equilibria),
            "kinds": ("equilibrium", list(self.kinds)),
            "equilibrium_energies": ("equilibrium", self.equilibrium_energies),
            "rates": (("equilibrium", "rate"), self.rates),
            "modes": (("equilibrium", "rate", at), self.modes),
            "residuals": ("equilibrium", self.residuals),
            "separatrices": (("separatrix", "point", at), curves),
            "trajectories": (("start", "time", at), self.trajectories),
            "ends": ("start", self.ends),
            "layer": (at, [layer for layer, _ in self.coordinates]),
            "unit": (at, [unit for _, unit in self.coordinates]),
        }
        return xarray.Dataset(variables, {"x": self.x, "y": self.y, "time": self.times})


def phase_portrait(
    problem: InferenceProblem,
    *,
    extent: Numbers | None = None,
    resolution: int = 61,
    starts: Numbers | None = None,
    t1: float | None = None,
    integrator: str | Integrator | None = None,
    tolerance: float | None = None,
) -> PhasePortrait:
    """Compute the phase portrait of a problem with two free units and one sample.

    Minima, and equilibria at kinks, are where `pcdyn.multiple_equilibria` leads to from a coarse
    grid; saddles and maxima are those that Newton's method for ∂F/∂x = 0 finds within the extent.
    An equilibrium with a basin narrower than that grid can be missed: see `index_sum`. Ridges at
    kinks, where no gradient vanishes, are not searched for.

    **Arguments:**

    - `problem`: two free units in all, in one layer or in two, with any clamps, layers, energy,
      precisions and time constants.
    - `extent`: lowest and highest first coordinate, then lowest and highest second one; what holds
      the equilibria found, with a margin, unless given.
    - `resolution`: points of the grid on each axis.
    - `starts`: of the trajectories, shape `(starts, 2)`; on the border of the extent unless given.
    - `t1`: how long to follow the flow from the grid and the starts; twelve times the slowest
      relaxation time of the minima unless given, between 10 and 1000.
    - `integrator`: of that flow, which runs as one batch; `"tsit5"` unless given.
    - `tolerance`: of the gradient at an equilibrium, absolute; unless given 1e-9, or in float32
      what round-off leaves of the largest gradient within the extent.

    **Raises:**

    - `ShapeError` for another number of free units or a batch.
    - `InputError` for an extent, a resolution or another problem that does not fit, and what
      `pcdyn.simulate` raises.
    """
    _check_problem(problem)
    resolution = checked_integer(
        resolution, "resolution, points on each axis,", at_least=2, at_most=2**31
    )
    if tolerance is not None:
        tolerance = checked_number(tolerance, "tolerance", above=0, error=ToleranceError)
    size = 2 * _SAVES * float(resolution) ** 2 * sum(problem.widths) * 8
    check_size(size, f"the flow from a grid of {resolution} by {resolution} points")
    if t1 is not None:
        t1 = checked_number(t1, "t1", above=0, error=TimesError)
    if integrator is not None:
        get_integrator(integrator)  # refuses what is none
    if starts is not None:
        starts = as_host_array(starts, "starts")
        if starts.shape[1:] != (2,):
            raise ShapeError(f"starts need the shape (starts, 2), got {starts.shape}")
    box = _checked_extent((-4.0, 4.0, -4.0, 4.0) if extent is None else extent)
    if integrator is None:
        # Along a kink the flow crosses to and fro within the tolerance: the less, the more steps.
        kinked = has_kinks(problem)
        integrator = Diffrax("tsit5", rtol=1e-3, atol=1e-3) if kinked else "tsit5"
    found = planar_equilibria(problem, box, _search_starts(problem, box, integrator), tolerance)
    if extent is None:
        box = _around(found.points)
    points = grid(problem, box, resolution)
    energy, velocity = local_flow(problem, points.reshape(-1, 2))
    border = _border(box) if starts is None else starts
    t1 = _default_t1(problem, found) if t1 is None else t1
    times, paths = _follow(problem, np.concatenate([points.reshape(-1, 2), border]), t1, integrator)
    arrived = _nearest(found, paths[-1], diagonal(box))
    return PhasePortrait(
        problem=problem, coordinates=coordinates(problem), x=points[0, :, 0], y=points[:, 0, 1],
        free_energy=energy.reshape(points.shape[:2]), velocity=velocity.reshape(points.shape),
        basin=arrived[: resolution**2].reshape(points.shape[:2]), equilibria=found.points,
        kinds=found.kinds, equilibrium_energies=found.energies, rates=found.rates,
        modes=found.modes, residuals=found.residuals,
        separatrices=separatrices(problem, found, box),
        trajectories=paths[:, resolution**2 :].swapaxes(0, 1), times=times,
        ends=arrived[resolution**2 :],
    )  # fmt: skip


def _search_starts(problem: InferenceProblem, box: Box, integrator: str | Integrator) -> np.ndarray:
    """A coarse grid; where activations have kinks, the few points to which the flow carries it."""
    # A little off the round numbers, at which kinks are.
    coarse = grid(problem, box, 7).reshape(-1, 2)
    coarse = coarse + (1e-3 * diagonal(box) * np.array([1.0, 0.7])).astype(problem.dtype)
    if not has_kinks(problem):
        return coarse
    chosen: list[np.ndarray] = []
    for end in _follow(problem, coarse, _LEAST_T1_AT_KINKS, integrator)[1][-1]:
        if all(np.linalg.norm(end - other) > _ARRIVED * diagonal(box) for other in chosen):
            chosen.append(end)
    return np.stack(chosen)


def _check_problem(problem: InferenceProblem) -> None:
    check_problem(problem)
    widths = dict(zip(problem.free_layers, problem.free_widths, strict=True))
    if sum(widths.values()) != 2:
        raise ShapeError(
            f"a phase portrait needs two free units in all, but the free layers have {widths}; "
            "clamp an end, or look at a larger network with pcdyn.stability"
        )
    if problem.batch_shape not in ((), None):
        raise ShapeError(
            f"a phase portrait is of one sample, but the data are a batch of "
            f"{problem.batch_shape[0]}: clamp one row of them"
        )


def _checked_extent(extent: Numbers) -> Box:
    box = as_host_array(extent, "extent", finite=False, error=InputError)
    if box.shape != (4,) or not np.isfinite(box).all() or box[0] >= box[1] or box[2] >= box[3]:
        raise InputError(
            f"extent={extent!r}: give four finite numbers, the lowest and the highest first "
            "coordinate, then those of the second"
        )
    return float(box[0]), float(box[1]), float(box[2]), float(box[3])


def _around(points: np.ndarray) -> Box:
    if not len(points):
        return -4.0, 4.0, -4.0, 4.0
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum(1.0, 0.5 * (high - low))
    box = np.stack([low - margin, high + margin], axis=-1)
    return _checked_extent(box.ravel().tolist())


def _border(box: Box) -> np.ndarray:
    """Sixteen points on the border, clockwise."""
    share = np.arange(4) / 4
    sides = [(share, 0 * share + 1), (0 * share + 1, 1 - share), (1 - share, 0 * share),
             (0 * share, share)]  # fmt: skip
    corners = np.concatenate([np.stack(side, axis=-1) for side in sides])
    return np.array(box[::2]) + corners * np.array([box[1] - box[0], box[3] - box[2]])


def _default_t1(problem: InferenceProblem, found: PlanarEquilibria) -> float:
    slowest = [rates[0] for rates, kind in zip(found.rates, found.kinds, strict=True)
               if kind == "minimum"]  # fmt: skip
    least = _LEAST_T1_AT_KINKS if has_kinks(problem) else _LEAST_T1
    return float(np.clip(12 / min(slowest, default=1.0), least, _MOST_T1))


def _follow(
    problem: InferenceProblem, points: np.ndarray, t1: float, integrator: str | Integrator
) -> tuple[np.ndarray, np.ndarray]:
    """The flow from all points in one batch: times, and activities (time, points, 2)."""
    times = np.append(0, np.geomspace(1e-3 * t1, t1, _SAVES - 1))
    times[-1] = t1
    run = simulate(
        problem.repeated(len(points)), t1=t1, times=times, integrator=integrator,
        initial=state_at(problem, jnp.asarray(points, problem.dtype)),
    )  # fmt: skip
    return times, np.concatenate(problem.state_of(run.activities), axis=-1)


def _nearest(found: PlanarEquilibria, ends: np.ndarray, size: float) -> np.ndarray:
    """The index of the equilibrium at which each end has arrived in a box of this size, or −1."""
    if not len(found.points):
        return np.full(len(ends), -1)
    shares = [_ARRIVED_AT_KINK if kind == "at a kink" else _ARRIVED for kind in found.kinds]
    distances = np.linalg.norm(ends[:, None] - found.points[None], axis=-1) / size
    nearest = distances.argmin(axis=1)
    return np.where(distances.min(axis=1) <= np.array(shares)[nearest], nearest, -1)
