"""Phase portraits as arrays, with what their claims are held against, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import xarray

import pcdyn
from pcdyn.analysis.phase_plane import state_at

_MOST_CURVE_POINTS = 1500


def as_data(case: str, seed: int, portrait: pcdyn.PhasePortrait) -> xarray.Dataset:
    """The arrays of a portrait with the name of its panel, and the oracles of its claims."""
    problem = portrait.problem
    assert problem is not None
    curves = np.full((len(portrait.separatrices), _MOST_CURVE_POINTS, 2), np.nan)
    for row, curve in zip(curves, portrait.separatrices, strict=True):
        stride = -(-len(curve) // _MOST_CURVE_POINTS)
        row[: len(curve[::stride])] = curve[::stride]
    point, path = (f"equilibrium_{case}", "xy"), (f"start_{case}", f"time_{case}", "xy")
    grid = (f"y_{case}", f"x_{case}")
    data = {
        "free_energy": (grid, portrait.free_energy),
        "velocity": ((*grid, "xy"), portrait.velocity),
        "basin": (grid, portrait.basin),
        "equilibria": (point, portrait.equilibria),
        "kinds": (point[0], list(portrait.kinds)),
        "equilibrium_energies": (point[0], portrait.equilibrium_energies),
        "rates": ((point[0], "rate"), portrait.rates),
        "modes": ((point[0], "rate", "xy"), portrait.modes),
        "residuals": (point[0], portrait.residuals),
        "separatrices": ((f"curve_{case}", f"along_{case}", "xy"), curves),
        "trajectories": (path, portrait.trajectories),
        "ends": (path[0], portrait.ends),
        "coordinates": (("coordinate", "place"), np.array(portrait.coordinates)),
        "seed": ((), seed),
        "index_sum": ((), portrait.index_sum),
        "differenced_rates": ((point[0], "rate"), differenced_rates(problem, portrait)),
        "distances": (path[0], distances_by_lsoda(problem, portrait)),
    }
    return xarray.Dataset(
        {f"{name}_{case}": values for name, values in data.items()},
        {grid[0]: portrait.y, grid[1]: portrait.x, path[1]: portrait.times},
    )


def differenced_rates(problem: pcdyn.InferenceProblem, portrait: pcdyn.PhasePortrait) -> np.ndarray:
    """Eigenvalues of the Hessian of F by central differences, NaN at a kink."""
    energy = jax.jit(jax.vmap(lambda x: problem.free_energy(state_at(problem, x))))
    step = 1e-4
    units = step * np.eye(2)
    corners = np.array([[[a + b, a - b, b - a, -a - b] for b in units] for a in units])
    rates = np.full(portrait.rates.shape, np.nan)
    for row, point, kind in zip(rates, portrait.equilibria, portrait.kinds, strict=True):
        if kind != "at a kink":
            values = np.asarray(energy((point + corners).reshape(-1, 2))).reshape(2, 2, 4)
            row[:] = np.linalg.eigvalsh(values @ np.array([1, -1, -1, 1]) / (4 * step**2))
    return rates


def distances_by_lsoda(
    problem: pcdyn.InferenceProblem, portrait: pcdyn.PhasePortrait
) -> np.ndarray:
    """From where SciPy's LSODA ends each trajectory to the equilibrium of the start's basin.

    NaN at kinks, along which no solver of smooth equations can go, and where there is no basin.
    """
    starts = portrait.trajectories[:, 0]
    if "at a kink" in portrait.kinds:
        return np.full(len(starts), np.nan)
    column = np.abs(starts[:, None, 0] - portrait.x).argmin(axis=1)
    row = np.abs(starts[:, None, 1] - portrait.y).argmin(axis=1)
    basins = portrait.basin[row, column]
    batch = [
        None if x is None else jnp.broadcast_to(x, (len(starts), x.shape[-1]))
        for x in (problem.input, problem.output)
    ]
    many = problem.with_data(batch[0], batch[1])
    run = pcdyn.simulate(
        many, t1=float(portrait.times[-1]), times=[float(portrait.times[-1])],
        initial=state_at(many, jnp.asarray(starts)),
        integrator=pcdyn.SciPy("LSODA", rtol=1e-8, atol=1e-10),
    )  # fmt: skip
    ends = np.concatenate(many.state_of(run.final), axis=-1)
    found = np.linalg.norm(ends - portrait.equilibria[basins], axis=-1)
    return np.where(basins >= 0, found, np.nan)


def portrait_of(data: xarray.Dataset, case: str) -> pcdyn.PhasePortrait:
    """The portrait of a panel from its arrays."""

    def array(name: str) -> np.ndarray:
        return data[f"{name}_{case}"].values

    curves = [curve[~np.isnan(curve[:, 0])] for curve in array("separatrices")]
    return pcdyn.PhasePortrait(
        problem=None, coordinates=tuple((int(l), int(u)) for l, u in array("coordinates")),
        kinds=tuple(str(kind) for kind in array("kinds")), separatrices=tuple(curves),
        x=array("x"), y=array("y"), times=array("time"),
        **{name: array(name) for name in (
            "free_energy", "velocity", "basin", "equilibria", "equilibrium_energies", "rates",
            "modes", "residuals", "trajectories", "ends",
        )},
    )  # fmt: skip
