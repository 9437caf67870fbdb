"""The energy landscape of inference, cut by a plane, with the ways down: flow, Euler, Gauss–Newton.

For a tanh network the plane holds the equilibrium, the feedforward state where inference starts,
and the direction of the slowest mode; what lies outside of it is projected. For a linear network
it is spanned by the slowest and the fastest mode, and the flow never leaves it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import ArrayLike
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import largest_rise
from pcdyn import plotting
from pcdyn._support.types import State
from pcdyn.linearisation.hessian import free_energy_hessian
from pcdyn.theory import Evidence

NAME = "landscape"
CASES = ("tanh", "linear")
METHODS = ("flow", "Euler", "Gauss–Newton")


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks of square layers with weights N(0, std²/width); Euler steps as shares of 2/λ_max."""

    depth: int = 4
    width: int = 5
    std: float = 1.2
    resolution: int = 121
    euler_share: float = 0.9
    euler_steps: int = 60
    gauss_newton_steps: int = 6
    saves: int = 121
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """The plane, F on it, the three ways down and the energies along the flow."""
    parts = [case_data(case, config) for case in CASES]
    return xarray.concat(parts, xarray.DataArray(list(CASES), dims="case")).assign_attrs(
        source="random numbers"
    )


def problem_of(case: str, config: Config) -> pcdyn.InferenceProblem:
    """Random weights, input N(0, 1) and a target within the range of tanh."""
    keys = jr.split(jr.key(config.seed), 3)
    activation = "tanh" if case == "tanh" else "identity"
    network = pcdyn.mlp(
        (config.width,) * (config.depth + 1), activation=activation,
        output_activation=activation, std=config.std / np.sqrt(config.width), key=keys[0],
    )  # fmt: skip
    return pcdyn.InferenceProblem(
        network, input=jr.normal(keys[1], (config.width,)),
        output=jnp.tanh(jr.normal(keys[2], (config.width,))),
    )  # fmt: skip


def case_data(case: str, config: Config) -> xarray.Dataset:
    """Everything about one network."""
    problem = problem_of(case, config)
    rest = pcdyn.equilibrium(problem, tolerance=1e-10)
    centre = np.concatenate(rest.state)
    hessian = np.asarray(eqx.filter_jit(free_energy_hessian)(problem, rest.state).dense())
    rates, modes = np.linalg.eigh(hessian)
    start = np.concatenate(problem.feedforward_state())
    if case == "linear":
        plane = modes[:, [0, -1]].T
        # In the plane, with both modes excited alike.
        start = centre + np.linalg.norm(start - centre) * plane.sum(axis=0) / np.sqrt(2)
    else:
        away = (start - centre) / np.linalg.norm(start - centre)
        slow = modes[:, 0] - (modes[:, 0] @ away) * away
        plane = np.stack([away, slow / np.linalg.norm(slow)])
    t1 = 12 / rates[0]
    times = np.append(0, np.geomspace(1e-3 / rates[-1], t1, config.saves - 1))
    times[-1] = t1
    initial = split(problem, start)
    flow = pcdyn.simulate(
        problem, t1=t1, times=times, initial=initial,
        integrator=pcdyn.Diffrax("tsit5", rtol=1e-9, atol=1e-12),
    )  # fmt: skip
    paths = {
        "flow": np.concatenate(problem.state_of(flow.activities), -1),
        "Euler": euler_path(problem, initial, config, 2 * config.euler_share / rates[-1]),
        "Gauss–Newton": gauss_newton_path(problem, initial, config),
    }
    reach = 1.35 * max(np.abs((path - centre) @ plane.T).max() for path in paths.values())
    side = np.linspace(-reach, reach, config.resolution)
    points = centre + np.stack(np.meshgrid(side, side), -1) @ plane
    energy = values(problem, points.reshape(-1, len(centre)))[0].reshape(points.shape[:2])
    angles = angles_to_descent(problem, paths["flow"], centre, plane)
    data: dict[str, Any] = {
        "side": ("grid", side), "energy": (("grid_y", "grid"), energy), "angle": ("time", angles),
        "rest_energy": ((), float(rest.free_energy)), "times": ("time", times),
        "start_loss": ((), float(values(problem, start[None])[0][0])),
        "F": ("time", flow.free_energy), "loss": ("time", flow.output_loss),
        "residual_energy": ("time", flow.residual_energy),
        "rates": ("rate", rates[[0, -1]]), "t1": ((), t1),
    }  # fmt: skip
    for method, path in paths.items():
        data[f"path_{method}"] = ((f"step_{method}", "xy"), (path - centre) @ plane.T)
        data[f"energy_{method}"] = (f"step_{method}", values(problem, path)[0])
        inside = (path - centre) @ plane.T @ plane
        data[f"outside_{method}"] = (
            f"step_{method}", np.linalg.norm(path - centre - inside, axis=-1)
        )  # fmt: skip
    return xarray.Dataset(data)


def split(problem: pcdyn.InferenceProblem, points: ArrayLike) -> tuple[Any, ...]:
    """The state, or states, of stacked free layers."""
    widths = [problem.network.widths[index] for index in problem.free_layers]
    return tuple(jnp.split(jnp.asarray(points), list(np.cumsum(widths)[:-1]), axis=-1))


@eqx.filter_jit
def _values(problem: pcdyn.InferenceProblem, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    def energy(point: jax.Array) -> jax.Array:
        return problem.free_energy(split(problem, point))

    return jax.vmap(jax.value_and_grad(energy))(points)


def values(problem: pcdyn.InferenceProblem, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F and ∂F/∂x at stacked free layers."""
    energy, slope = _values(problem, jnp.asarray(points))
    return np.asarray(energy), np.asarray(slope)


def euler_path(
    problem: pcdyn.InferenceProblem, initial: State, config: Config, dt: float
) -> np.ndarray:
    """Explicit Euler, state after state."""
    run = pcdyn.simulate(
        problem, t1=dt * config.euler_steps, times=dt * np.arange(config.euler_steps + 1),
        initial=initial, integrator=pcdyn.Euler(dt=dt), throw=False,
    )  # fmt: skip
    return np.concatenate(problem.state_of(run.activities), -1)


def gauss_newton_path(
    problem: pcdyn.InferenceProblem, initial: State, config: Config
) -> np.ndarray:
    """The state after each number of iterations."""
    path, state = [np.concatenate(initial)], initial
    for _ in range(config.gauss_newton_steps):
        state = pcdyn.equilibrium(
            problem, method=pcdyn.solvers.GaussNewton(max_iterations=1), initial=state,
            tolerance=1e-10, throw=False,
        ).state  # fmt: skip
        path.append(np.concatenate(state))
    return np.stack(path)


def angles_to_descent(
    problem: pcdyn.InferenceProblem, path: np.ndarray, centre: np.ndarray, plane: np.ndarray
) -> np.ndarray:
    """Degrees between the drawn flow and the steepest descent on the drawn contours."""
    moving = -values(problem, path)[1] @ plane.T
    drawn = centre + (path - centre) @ plane.T @ plane
    descent = -values(problem, drawn)[1] @ plane.T
    product = (moving * descent).sum(-1)
    lengths = np.linalg.norm(moving, axis=-1) * np.linalg.norm(descent, axis=-1)
    far = np.linalg.norm(path - centre, axis=-1) > 1e-3 * np.linalg.norm(path[0] - centre)
    cosines = np.clip(product / np.where(far, lengths, 1), -1, 1)
    return np.where(far, np.degrees(np.arccos(cosines)), np.nan)


def check(data: xarray.Dataset) -> list[Evidence]:
    """What the plane shows truly, and what it does not."""
    least = data.energy.min(("grid", "grid_y"))
    middle = data.sizes["grid"] // 2
    centred = [
        int(data.energy.sel(case=case).values.argmin()) == middle * (data.sizes["grid"] + 1)
        for case in CASES
    ]
    angles = {case: float(np.nanmax(data.angle.sel(case=case))) for case in CASES}
    newton = data["energy_Gauss–Newton"].isel({"step_Gauss–Newton": -1}) - data.rest_energy
    ends = data.isel(time=-1)
    lowest = "the lowest point of the plane is the equilibrium"
    squarely = "crosses contours squarely (degrees that it is off)"
    return [
        Evidence(NAME, f"{lowest} (planes in which it is the centre)", sum(centred), "equal",
                 len(CASES)),
        Evidence(NAME, f"{lowest} (difference of F)", float(abs(least - data.rest_energy).max()),
                 "at most", 1e-12),
        Evidence(NAME, "F never rises along the flow (largest rise)",
                 largest_rise(data.energy_flow.values, axis=1), "at most", 1e-12),
        Evidence(NAME, "linear: a plane of two modes is never left (largest distance from it)",
                 float(data["outside_flow"].sel(case="linear").max()), "at most", 1e-6),
        Evidence(NAME, f"linear: in a plane of two modes the flow {squarely}", angles["linear"],
                 "at most", 1e-2),
        Evidence(NAME, f"tanh: the flow as drawn in a plane {squarely}", angles["tanh"], "at most",
                 1.0, expected_to_hold=False),
        Evidence(
            NAME, "Gauss–Newton is at the bottom after a few steps (F above the equilibrium's over "
            "the drop of the flow)",
            float((abs(newton) / (data.start_loss - data.rest_energy)).max()), "at most", 1e-3,
            note=f"after {data.sizes['step_Gauss–Newton'] - 1}",
        ),
        Evidence(
            NAME, "ℒ(x*) ≤ F(x*) ≤ F(start) (largest excess)",
            float(max((ends.loss - ends.F).max(), (ends.F - data.start_loss).max())), "at most",
            0.0, 1e-12, note=", ".join(
                f"{case} {float(ends.loss.sel(case=case)):.3g} ≤ "
                f"{float(ends.F.sel(case=case)):.3g} ≤ {float(data.start_loss.sel(case=case)):.3g}"
                for case in CASES
            ),
        ),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """Both planes with the ways down, and the energies along the flow of the tanh network."""
    titles = {"tanh": "tanh: start, equilibrium, slowest mode", "linear": "linear: two modes"}
    labels = {
        "tanh": ("towards the feedforward state", "slowest mode (orthogonal part)"),
        "linear": ("slowest mode", "fastest mode"),
    }
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 4.1), layout="constrained", width_ratios=(1, 1, 0.9)
    )
    for ax, case in zip(axes, CASES, strict=False):
        _plane(ax, data.sel(case=case))
        ax.set(xlabel=labels[case][0], ylabel=labels[case][1], title=titles[case])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(handles))
    part = data.sel(case="tanh").isel(time=slice(1, None))
    axes[2].semilogx(part.times, part.F, label="free energy $F$")
    axes[2].semilogx(part.times, part.loss, label=r"output loss $\mathcal{L}$")
    axes[2].semilogx(part.times, part.residual_energy, label=r"residual $\widetilde{E}$")
    axes[2].set(xlabel=plotting.TIME_LABEL, ylabel="energy", title="tanh: along the flow")
    axes[2].legend()
    return figure


def _plane(ax: Axes, part: xarray.Dataset) -> None:
    """F above its minimum in logarithmic colours, and the paths."""
    above = part.energy.values - float(part.rest_energy)
    levels = np.geomspace(1e-3, 1, 22) * above.max()
    ax.contourf(
        part.side, part.side, np.log10(np.maximum(above, levels[0])), levels=22, cmap="Blues_r",
        alpha=0.85,
    )  # fmt: skip
    ax.contour(part.side, part.side, above, levels=levels, colors="w", linewidths=0.4)
    looks = {
        "flow": {"color": "k", "linewidth": 2.0},
        "Euler": {"color": "#D55E00", "marker": ".", "linewidth": 0.9},
        "Gauss–Newton": {"color": "#009E73", "marker": "s", "markersize": 4.5, "linewidth": 1.2},
    }
    for method, look in looks.items():
        path = part[f"path_{method}"].values
        ax.plot(*path.T, label=method, **look)
    ax.plot(*part.path_flow.values[0], "o", color="w", markeredgecolor="k", label="start")
    ax.plot(0, 0, "*", color="#F0E442", markeredgecolor="k", markersize=13, label="equilibrium")
    ax.set_aspect("equal")


EXPERIMENT = Experiment(
    "energy_landscape", "extra: energy landscape along the flow", {"paper": Config()},
    {"depth": 3, "width": 2, "resolution": 21, "saves": 21}, run, check, plot,
)  # fmt: skip
