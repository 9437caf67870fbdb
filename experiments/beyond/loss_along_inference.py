"""Does the output loss fall during inference, as the proof of Theorem 3.6 needs? Mostly.

From the feedforward pass it starts to fall. In linear networks its whole course is known in closed
form, so that one can say for which targets it rises later, how often, and by how much at most.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.optimize import minimize

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import within
from pcdyn import plotting
from pcdyn.references.output_error import (
    LARGEST_RISE,
    OutputErrorFlow,
    energy_gradient_margin,
    feedforward_output_error,
    output_error_flow,
)
from pcdyn.theory import Evidence
from pcdyn.theory.convergence import rising_loss_problem

NAME = "A.6.3"
# Above the round-off of the closed form and the tolerance of the ODE solver.
RISES = 1e-6
# The worst target of a network: pairs of every 13th time, then turns of times and target.
COARSE, TURNS = 13, 4
SEARCHED = {
    "2-2-2, full Π": (2, 2, 2), "2-2-2-2": (2, 2, 2, 2), "2-2-2-2-2": (2, 2, 2, 2, 2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks of width 5, weights N(0, gain²/width), inputs and targets N(0, 1)."""

    width: int = 5
    depth: int = 3
    depths: tuple[int, ...] = (2, 3, 4, 6)
    gains: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    widths: tuple[int, ...] = (1, 2, 5, 10)
    ratios: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    networks: int = 1000
    tanh_networks: int = 200
    tanh_gains: tuple[float, ...] = (0.5, 1.0, 2.0)
    tanh_time: float = 200.0
    searched: tuple[str, ...] = tuple(SEARCHED)
    search_starts: int = 12
    seed: int = 0


MEASURES = ("rise", "final_rise", "worst_target", "rising_share")


def run(config: Config) -> xarray.Dataset:
    """The counterexample; random draws by depth and gain, by width and ratio; the worst case."""
    key = jr.key(config.seed)
    by_depth = np.stack([
        [draws(key, (config.width,) * (d + 1), g, 1.0, config.networks) for g in config.gains]
        for d in config.depths
    ])  # fmt: skip
    by_width = np.stack([
        [draws(key, (config.width,) * config.depth + (w,), 1.0, r, config.networks)
         for r in config.ratios]
        for w in config.widths
    ])  # fmt: skip
    tanh = np.stack([tanh_rises(config, key, gain) for gain in config.tanh_gains])
    worst = [search(name, config) for name in config.searched]
    return xarray.Dataset(
        {
            **counterexample(),
            "tanh_loss": ("time", tanh_example()),
            **{f"depth_{m}": (("depth", "gain", "network"), by_depth[:, :, i])
               for i, m in enumerate(MEASURES)},
            **{f"width_{m}": (("width", "ratio", "network"), by_width[:, :, i])
               for i, m in enumerate(MEASURES)},
            "tanh_rise": (("tanh_gain", "output", "tanh_network"), tanh),
            "worst_rise": (("searched", "search"), np.stack(worst)),
        },
        coords={
            "depth": list(config.depths), "gain": list(config.gains),
            "width": list(config.widths), "ratio": list(config.ratios),
            "tanh_gain": list(config.tanh_gains), "output": [config.width, 1],
            "searched": list(config.searched),
        },
        attrs={"source": "random numbers", "width_of_all": config.width,
               "depth_of_widths": config.depth},
    )  # fmt: skip


def counterexample() -> dict[str, Any]:
    """ℒ of the closed form and of an ODE solver, and the two sides of the bound, in time."""
    problem = rising_loss_problem()
    times = np.geomspace(1e-2, 1e3, 121)
    solved = pcdyn.simulate(
        problem, t1=1e3, times=times, integrator=pcdyn.SciPy("LSODA", rtol=1e-10, atol=1e-12)
    )
    flow, error = output_error_flow(problem), feedforward_output_error(problem)
    states = tuple(jnp.asarray(solved.activities[index]) for index in problem.free_layers)
    exact = jax.jit(jax.vmap(lambda t: flow.loss(error, t)))(jnp.asarray(times))
    margins = jax.jit(jax.vmap(lambda s: energy_gradient_margin(problem, s)))(states)
    # g = −W_Lᵀε_L: the bound −g·∂Ẽ/∂x < ‖g‖² divided by ‖g‖².
    last: Any = problem.network.layers[-1]
    squares = np.sum((solved.prediction_errors[-1] @ np.asarray(last.weight)) ** 2, -1)
    return {
        "squared_error": ("time", 2 * np.asarray(exact)),
        "solved_squared_error": ("time", 2 * solved.output_loss),
        "free_energy": ("time", solved.free_energy),
        "bound": ("time", 1 - np.asarray(margins) / squares),
        "time": times,
    }


def tanh_example() -> np.ndarray:
    """ℒ in units of its start in a tanh 2-2-2-2 network, at the times of the counterexample.

    It is the largest rise that gradient ascent over weights and data has found from 48 starts, each
    the best of many random networks; no bound for tanh networks is known.
    """
    weights = (
        [[0.59, 1.65], [-1.38, 3.66]], [[2.29, -2.6], [-4.35, 1.47]],
        [[-1.68, -1.43], [-0.82, 1.82]],
    )  # fmt: skip
    network = pcdyn.Network([pcdyn.Dense(jnp.asarray(w), activation="tanh") for w in weights])
    problem = pcdyn.InferenceProblem(network, input=[0.78, 1.07], output=[0.12, -0.32])
    solved = pcdyn.simulate(
        problem, t1=1e3, times=[0.0, *np.geomspace(1e-2, 1e3, 121)],
        integrator=pcdyn.SciPy("LSODA", rtol=1e-10, atol=1e-12),
    )  # fmt: skip
    return np.asarray(solved.output_loss[1:] / solved.output_loss[0])


@eqx.filter_jit
def measures(
    weights: list[jax.Array], inputs: jax.Array, outputs: jax.Array, ratio: jax.Array
) -> jax.Array:
    """`MEASURES` of each of many networks, all relative to ℒ at the start."""
    times = jnp.asarray([0, *np.geomspace(1e-3, 1e6, 181), np.inf])

    def one(weights: list[jax.Array], input: jax.Array, output: jax.Array) -> jax.Array:
        precisions = [jnp.ones(())] * (len(weights) - 1) + [ratio]
        problem = pcdyn.InferenceProblem(
            pcdyn.Network([pcdyn.Dense(weight) for weight in weights]),
            input=input, output=output, energy=pcdyn.Gaussian(precisions),
        )  # fmt: skip
        flow, error = output_error_flow(problem), feedforward_output_error(problem)
        losses = jax.vmap(lambda t: flow.loss(error, t))(times)
        losses = losses / losses[0]
        return jnp.stack([
            jnp.max(losses - jax.lax.cummin(losses)), losses[-1] - jnp.min(losses),
            worst_target(flow, times), flow.rising_share(),
        ])  # fmt: skip

    return jax.vmap(one, out_axes=1)(weights, inputs, outputs)


def worst_target(flow: OutputErrorFlow, times: jax.Array) -> jax.Array:
    """The largest rise found over all targets, from one of `times` to any later one.

    All pairs of every `COARSE`th time start; then the target of the largest rise chooses the pair
    among all times, and the pair the target, in turns, by which the rise can only grow.
    """
    maps = jax.vmap(flow.whitened)(times)
    squares = maps @ maps
    early, late = (jnp.asarray(index) for index in np.triu_indices(len(times[::COARSE]), k=1))
    coarse = squares[::COARSE]
    best = jnp.argmax(jnp.linalg.eigvalsh(coarse[late] - coarse[early])[:, -1])
    change = coarse[late[best]] - coarse[early[best]]
    for _ in range(TURNS):
        target = jnp.linalg.eigh(change)[1][:, -1]
        losses: jax.Array = squares @ target @ target
        end = jnp.argmax(losses - jax.lax.cummin(losses))
        start = jnp.argmin(jnp.where(jnp.arange(len(times)) <= end, losses, jnp.inf))
        change = squares[end] - squares[start]
    return jnp.linalg.eigvalsh(change)[-1]


def random_weights(
    key: jax.Array, widths: tuple[int, ...], gain: float, networks: int
) -> list[Any]:
    """Weights N(0, gain²/fan-in), each of shape (networks, n_l, n_{l−1})."""
    keys = jr.split(key, len(widths) - 1)
    return [
        gain / m**0.5 * jr.normal(k, (networks, n, m))
        for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def draws(
    key: jax.Array, widths: tuple[int, ...], gain: float, ratio: float, networks: int
) -> np.ndarray:
    """`MEASURES` of random linear networks, shape (measure, network)."""
    inputs, outputs = (
        jr.normal(jr.fold_in(key, i), (networks, n)) for i, n in ((1, widths[0]), (2, widths[-1]))
    )
    weights = random_weights(key, widths, gain, networks)
    return np.asarray(measures(weights, inputs, outputs, jnp.asarray(ratio)))


def tanh_rises(config: Config, key: jax.Array, gain: float) -> np.ndarray:
    """The largest rise of ℒ over its start in tanh networks, wide and scalar output."""
    times = np.append(0, np.geomspace(1e-2, config.tanh_time, 60))
    integrator = pcdyn.Diffrax("tsit5", rtol=1e-9, atol=1e-11, max_steps=2**15, fallback=None)
    rises = []
    for width in (config.width, 1):
        widths = (config.width,) * config.depth + (width,)
        weights = random_weights(key, widths, gain, config.tanh_networks)
        inputs = jr.normal(jr.fold_in(key, 1), (config.tanh_networks, widths[0]))
        outputs = jnp.tanh(jr.normal(jr.fold_in(key, 2), (config.tanh_networks, width)))

        def follow(
            weights: list[jax.Array], input: jax.Array, output: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            network = pcdyn.Network([pcdyn.Dense(w, activation="tanh") for w in weights])
            problem = pcdyn.InferenceProblem(network, input=input, output=output)
            solved = pcdyn.simulate(
                problem, t1=config.tanh_time, times=times, integrator=integrator
            )
            return solved.output_loss, solved.status_codes

        losses, status = jax.jit(jax.vmap(follow))(weights, inputs, outputs)
        worst = pcdyn.Status(int(np.max(status)))
        if not worst.ok:
            raise pcdyn.SimulationError(f"inference in a tanh network: {worst.explanation}")
        losses = np.asarray(losses) / np.asarray(losses)[:, :1]
        rises.append((losses - np.minimum.accumulate(losses, axis=1)).max(axis=1))
    return np.stack(rises)


def search(name: str, config: Config) -> np.ndarray:
    """The largest rise over all targets, maximised over weights (and Π_1) and both times."""
    widths, rng = SEARCHED[name], np.random.default_rng(config.seed)
    full = "Π" in name

    def cost(parameters: jax.Array) -> jax.Array:
        matrices = parameters[:-2].reshape(-1, 2, 2)
        # W_1 plays no part in M(t): its matrix holds a factor of Π_1 instead.
        root = jnp.tril(matrices[0]) + 1e-3 * jnp.eye(2)
        precisions = [root @ root.T if full else jnp.eye(2)] + [1.0] * (len(widths) - 2)
        network = pcdyn.Network([pcdyn.Dense(w) for w in (jnp.eye(2), *matrices[1:])])
        problem = pcdyn.InferenceProblem(
            network, input=jnp.zeros(2), output=jnp.ones(2), energy=pcdyn.Gaussian(precisions)
        )
        start, duration = jnp.exp(parameters[-2:])
        return -output_error_flow(problem).rise(start, start + duration)

    slope = jax.jit(jax.value_and_grad(cost))
    found = []
    for _ in range(config.search_starts):
        start = np.append(1.5 * rng.normal(size=4 * (len(widths) - 1)), [0.0, 5.0])
        best = minimize(
            lambda p: tuple(np.asarray(x, float) for x in slope(jnp.asarray(p))), start,
            jac=True, method="L-BFGS-B",
            bounds=[(-100, 100)] * (len(start) - 2) + [(-7, 7), (-7, 20)],
        )  # fmt: skip
        found.append(-float(best.fun))
    return np.array(found)


def share(rises: xarray.DataArray, threshold: float = RISES) -> xarray.DataArray:
    """Of the draws, how many have a loss that rises by more than `threshold` of its start."""
    return (rises > threshold).mean(axis=-1)


def largest_share(rises: xarray.DataArray) -> tuple[float, float]:
    """The largest share over all settings, and one standard error of it."""
    largest = float(share(rises).max())
    return largest, (largest * (1 - largest) / rises.shape[-1]) ** 0.5


def tanh_rise(data: xarray.Dataset) -> float:
    """The largest rise of ℒ in the tanh network that was found."""
    losses = data.tanh_loss.values
    return float((losses - np.minimum.accumulate(losses)).max())


def check(data: xarray.Dataset) -> list[Evidence]:
    """Where the loss falls, how often it rises, and by how much at most."""
    squares, bound = data.squared_error.values, data.bound.values
    apart = float(abs(data.squared_error - data.solved_squared_error).max())
    deep = data.depth_rise.sel(depth=data.depth > 2)
    linear_shares, (linear_largest, linear_error) = share(deep), largest_share(deep)
    tanh = data.tanh_rise.sel(output=data.attrs["width_of_all"])
    tanh_scalar = data.tanh_rise.sel(output=1)
    tanh_shares, (tanh_largest, tanh_error) = share(tanh), largest_share(tanh)
    worst = (data.worst_rise, data.depth_worst_target, data.width_worst_target)
    found = ", ".join(
        f"{name} {float(part.max()):.4f}"
        for name, part in zip(data.searched.values, data.worst_rise, strict=True)
    )
    return [
        Evidence(
            NAME, "ℒ never rises during inference (2-2-2-2, within the bound at the start; ‖ε_L‖² "
            "at the end above its least)", float(squares[-1] - squares.min()), "at most", 0.0,
            1e-8, expected_to_hold=False,
            note=f"1 → {squares.min():.4f} at t = {float(data.time[int(squares.argmin())]):.2f} → "
            f"{squares[-1]:.4f}; the ODE agrees to {apart:.0e}",
        ),
        Evidence(
            NAME, "the energy gradient bound holds at the feedforward pass and is preserved "
            "(largest −g·∂Ẽ/∂x over ‖g‖²)", float(bound.max()), "below", 1.0,
            expected_to_hold=False, note=f"{bound[0]:.1e} at t = .01",
        ),
        *(
            Evidence(
                NAME, f"ℒ never rises in linear networks with {what} (largest rise over all "
                "targets and pairs of times, of ℒ at the start)", float(rises.max()), "at most",
                RISES, note=f"in {rises.size} networks",
            )
            for what, rises in (
                ("one hidden layer and scalar precisions", data.depth_worst_target.sel(depth=2)),
                ("a scalar output", data.width_worst_target.sel(width=1)),
            )
        ),
        Evidence(
            NAME, f"ℒ never rises in deeper linear networks, by more than {RISES:g} of its start "
            "(largest share of random draws, by depth and weight gain)",
            linear_largest, "equal", 0.0, expected_to_hold=False, error=linear_error,
            note=f"{float(linear_shares.min()):.1%} at least; by more than 1 % in at most "
            f"{float(share(deep, 0.01).max()):.1%}; at worst by {float(deep.max()):.2%}",
        ),
        Evidence(
            NAME, "in no linear network, for no target, does ℒ rise by more than (√5 − 2)/4 of its "
            "start (largest)", max(float(each.max()) for each in worst), "at most", LARGEST_RISE,
            1e-9, note=f"of {data.depth_rise.size + data.width_rise.size} networks and a search "
            f"({found})",
        ),
        Evidence(
            NAME, f"ℒ never rises in tanh networks, by more than {RISES:g} of its start (largest "
            "share of random draws, by weight gain)", tanh_largest, "equal", 0.0,
            expected_to_hold=False, error=tanh_error,
            note=f"{float(tanh_shares.min()):.1%} at least; the largest of these draws "
            f"{float(tanh.max()):.2%}; with a scalar output in "
            f"{float(share(tanh_scalar).mean()):.1%}, the largest {float(tanh_scalar.max()):.1e}",
        ),
        Evidence(
            NAME, "in no tanh network does ℒ rise by more than in linear ones (largest found in "
            "2-2-2-2, of its start: a lower bound)", tanh_rise(data), "at most", LARGEST_RISE,
            expected_to_hold=False,
            note=f"falls to {float(data.tanh_loss.min()):.3f}, ends at "
            f"{float(data.tanh_loss[-1]):.3f}",
        ),
    ]  # fmt: skip


def plot(data: xarray.Dataset) -> Figure:
    """The counterexample, its bound, the share of draws that rise, and by how much."""
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.2), layout="constrained")
    (loss, bound, worst), (depth, width, amount) = axes
    loss.semilogx(data.time, data.squared_error, label=r"$\|\varepsilon_L\|^2$, closed form")
    loss.semilogx(data.time[::6], data.solved_squared_error[::6], "o", ms=3.5, label="ODE solver")
    loss.semilogx(data.time, 2 * data.free_energy, "k--", lw=1, label="$2F$")
    loss.set(xlabel=plotting.TIME_LABEL, ylabel="energy", ylim=(0, 1.05),
             title="falls, then rises: linear 2-2-2-2")  # fmt: skip
    loss.legend()
    bound.semilogx(data.time, data.bound - 1)
    bound.axhline(0, color="0.4", lw=1, ls=":")
    bound.set_yscale("symlog", linthresh=1e-3)
    bound.set(xlabel=plotting.TIME_LABEL, yticks=[-1, -1e-1, -1e-2, -1e-3, 0, 1e-3, 1e-2],
              ylabel=r"$-g\cdot\partial\widetilde{E}/\partial x\;/\;\|g\|^2-1$",
              title=r"the bound: below 0 $\mathcal{L}$ falls")  # fmt: skip
    for i, name in enumerate(data.searched.values):
        values = 100 * np.sort(data.worst_rise.sel(searched=name))
        worst.plot(np.full(len(values), i), values, "o", alpha=0.5)
    worst.axhline(100 * LARGEST_RISE, color="0.4", lw=1, ls=":")
    worst.set_xticks(range(data.sizes["searched"]), data.searched.values)
    worst.set(xlim=(-0.5, data.sizes["searched"] - 0.5), ylim=(0, None),
              ylabel=r"largest rise (% of $\mathcal{L}$ at the start)",
              title=r"worst case found; limit $(\sqrt{5}-2)/4$")  # fmt: skip
    for value in data.depth.values:
        shares = share(data.depth_rise.sel(depth=value))
        (line,) = depth.semilogx(data.gain, 100 * shares, "o-", label=f"L = {value}")
        depth.plot(data.gain, 100 * data.depth_rising_share.sel(depth=value).mean("network"),
                   ":", color=line.get_color(), lw=1)  # fmt: skip
    tanh = share(data.tanh_rise.sel(output=data.attrs["width_of_all"]))
    depth.plot(data.tanh_gain, 100 * tanh, "ks--", ms=4, lw=1,
               label=f"tanh, L = {data.attrs['depth_of_widths']}")  # fmt: skip
    depth.set_xticks(data.gain.values, [f"{g:g}" for g in data.gain.values])
    depth.xaxis.set_minor_formatter(NullFormatter())
    depth.set(xlabel="gain of the weights (std × √width)", ylabel="draws that rise (%)",
              title="by depth (dotted: mean of θ/π)")  # fmt: skip
    for value in data.width.values:
        shares = share(data.width_rise.sel(width=value))
        width.semilogx(
            data.ratio,
            100 * shares,
            "o-",
            label="scalar output" if value == 1 else f"{value} outputs",
        )
    width.set(xlabel="precision ratio", ylabel="draws that rise (%)",
              title=f"by output width, L = {data.attrs['depth_of_widths']}")  # fmt: skip
    for value in data.depth.values[data.depth.values > 2]:
        rises = data.depth_rise.sel(depth=value).values.ravel()
        rises = np.sort(rises[rises > RISES])[::-1]
        total = data.sizes["gain"] * data.sizes["network"]
        amount.loglog(100 * rises, 100 * np.arange(1, len(rises) + 1) / total,
                      label=f"L = {value}")  # fmt: skip
    amount.axvline(100 * LARGEST_RISE, color="0.4", lw=1, ls=":")
    amount.set(xlabel=r"rise (% of $\mathcal{L}$ at the start)",
               ylabel="draws that rise by more (%)", title="by how much")  # fmt: skip
    for axis in (depth, width, amount):
        axis.legend()
    return figure


def _enough(data: xarray.Dataset) -> str:
    """Whether one hidden layer with a full precision lets ℒ rise, in words, if it was searched."""
    if "2-2-2, full Π" not in data.searched.values:
        return "was not searched"
    rise = float(data.worst_rise.sel(searched="2-2-2, full Π").max())
    return f"{'is not' if rise > RISES else 'is'} enough: the searched rise is {rise:.2%}"


def percent(value: float, error: float) -> str:
    """A share ± its standard error."""
    return f"{within(100 * value, 100 * error)} %"


def page(data: xarray.Dataset, folder: Path) -> str:
    """The first half of the proof: the output loss during inference."""
    squares, bound = data.squared_error.values, data.bound.values
    deep = data.depth_rise.sel(depth=data.depth > 2)
    shares = share(deep)
    tanh = data.tanh_rise.sel(output=data.attrs["width_of_all"])
    scalar = data.tanh_rise.sel(output=1)
    worst = "; ".join(
        f"{name} {100 * float(part.max()):.2f} %"
        for name, part in zip(data.searched.values, data.worst_rise, strict=True)
    )
    rises, crosses = squares[-1] > squares.min() + RISES, bool(bound.max() >= 1)
    near = float(data.worst_rise.max()) > 0.9 * LARGEST_RISE
    below = max(float(deep.max()), float(data.worst_rise.max())) <= LARGEST_RISE + 1e-9
    energy = 2 * data.free_energy.values
    return f"""# The convergence theorem, first half: the output loss during inference

Theorem 3.6 says that a network trained by predictive coding converges to a critical point of the
loss ℒ of backpropagation. The proof needs ℒ to fall during inference, and gives a condition, the
energy gradient bound −∂ℒ/∂xᵀ ∂Ẽ/∂x < ‖∂ℒ/∂x‖² (A.6.3), which is nothing but dℒ/dt < 0 for the last
hidden layer; below it both sides are zero. The second half is in
[learning_limits](../learning_limits/page.md). Drawn by `python -m experiments
loss_along_inference`.

![The output loss along inference](figure.png)

**The bound {"holds" if bound[0] < 1 else "does not hold"} at the start.** At the feedforward pass Ẽ
has no slope, so that the left side is zero. In the example below it is {bound[0]:.3f} of the right
side at t = .01.

**It is {"not " * crosses}preserved, and the loss {"can rise" if rises else "did not rise"}.** In a
linear 2-2-2-2 network ‖ε_L‖² falls from 1 to {squares.min():.4f} and then
{"rises to" if rises else "stays at"} {squares[-1]:.4f}, by closed form and by an ODE solver, while
the ratio of the two sides {"passes 1 and reaches" if crosses else "stays below 1, at most"}
{bound.max():.4f}. No learning rate enters: this is the exact flow, without the "overshoot" that a
small rate was to prevent.

**Why.** In a linear network ε_L(t) = M(t) e0. Whitened by the output precision, M is a symmetric
N(t) = N(∞) + Σ e^(−λt)/λ v vᵀ, a completely monotone function: it falls from I to N(∞), which is
positive, in every direction at once. The loss is ½‖N(t) z‖², and squares of matrices need not fall
with the matrices. They do where N(s) and N(t) commute: with a scalar output, with one hidden layer
of scalar precision, and with weights whose singular vectors are aligned. The largest rise found
there, over all targets and from any time to any later one, is
{float(data.width_worst_target.sel(width=1).max()):.0e} in the first case and
{float(data.depth_worst_target.sel(depth=2).max()):.0e} in the second. With a full precision Π₁ one
hidden layer {_enough(data)}.

**How often.** In the end only the slowest mode v that the output sees moves, and ℒ rises if the
whitened error lies between the planes orthogonal to v and to N(∞)v: a share θ/π of directions, θ
the angle of the two.
That is an open set in every network where v is no eigenvector of N(∞); the exception is the rule.
Of random linear networks with more than one hidden layer, {float(shares.min()):.1%} to
{percent(*largest_share(deep))} of draws, by depth and gain, rise by more than a millionth of ℒ at
the start (± one standard error). Tanh networks do so in {float(share(tanh).min()):.1%} to
{percent(*largest_share(tanh))}; with a scalar output, where the linear proof does not reach, in
{float(share(scalar).mean()):.1%}.

**How much.** Among these draws the largest rise is {float(deep.max()):.2%} of ℒ at the start in
linear networks and {float(tanh.max()):.2%} in tanh ones, of which more draws would find larger
ones. A rise need not last: ℒ can fall again after it. In linear networks the largest from any time
to any later one, with any precisions, time constants and target, is
(√5 − 2)/4 = {LARGEST_RISE:.2%} of ℒ at the start: the largest eigenvalue of B² − A² over
0 ≼ B ≼ A ≼ I, which is attained in two dimensions.
{"No network measured exceeds it" if below else "Some networks exceed it"}, and a search over
weights {"comes close" if near else "stays far below"} ({worst}).
For tanh networks no bound is known, and that of linear ones is none: gradient ascent over weights
and data found a 2-2-2-2 network in which ℒ falls to {float(data.tanh_loss.min()):.3f} of its start
and ends at {float(data.tanh_loss[-1]):.3f}, a rise of {tanh_rise(data):.1%} of ℒ at the start. The
largest possible is at least that.

**What is always true.** ℒ(x*) ≤ F(x*) ≤ F(feedforward) = ℒ(feedforward): inference never ends above
the loss at which it started. In the counterexample {squares[-1]:.3f} ≤ {energy[-1]:.3f} ≤ 1. So
the constrained minimisation of Eqs 13 and 15 is not what inference does, yet the loss with which
each inference ends is no larger than that of the feedforward pass.
"""


EXPERIMENT = Experiment(
    "loss_along_inference", "extra: output loss along inference", {"paper": Config()},
    {
        "depths": (2, 3), "gains": (1.0, 2.0), "widths": (1,), "ratios": (1.0, 10.0),
        "networks": 100, "tanh_networks": 20, "tanh_gains": (1.0,), "tanh_time": 30.0,
        "searched": ("2-2-2-2",), "search_starts": 2,
    },
    run, check, plot, page=page,
)  # fmt: skip
