"""Does learning end at critical points of the BP loss? Where the data can be interpolated, yes.

Weights follow `dW/dt = −dF*/dW`. A tanh network that can interpolate its data ends with ∇F* and ∇ℒ
both zero. A linear one that cannot, with targets (x, c ξ) of which ξ is uncorrelated with x, has a
saddle of ℒ, which it approaches while its output weights grow without end.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from pcdyn import learning
from pcdyn.theory import Evidence
from pcdyn.theory.convergence import noisy_problem

CASES = ("interpolable", "not interpolable")


@dataclasses.dataclass(frozen=True)
class Config:
    """tanh 3-8-2 on three samples, and linear 1-1-2 on noisy ones, by output precision λ."""

    t1: float = 1e5
    saves: int = 61
    starts: int = 12
    precisions: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Follow the weights of both; then the noisy one from many starts for each precision."""
    times = np.append(0, np.geomspace(1e-2, config.t1, config.saves))
    curves = {"learning_gradient": [], "loss_gradient": [], "loss": [], "weight_norm": []}
    for problem in (interpolable(config), noisy(jr.key(config.seed + 1), 1.0)):
        for name, values in follow(problem, config.t1, times).items():
            curves[name].append(values)
    keys = jr.split(jr.key(config.seed + 2), config.starts)
    losses, slopes = np.zeros((2, len(config.precisions), config.starts))
    for i, precision in enumerate(config.precisions):
        for j, key in enumerate(keys):
            # As many times as above: the compiled program is the same.
            end = config.t1 / precision
            ended = follow(
                noisy(key, precision), end, np.append(0, np.geomspace(1e-2, end, config.saves))
            )
            losses[i, j], slopes[i, j] = ended["loss"][-1], ended["loss_gradient"][-1]
    return xarray.Dataset(
        {
            **{name: (("case", "time"), np.stack(values)) for name, values in curves.items()},
            "final_loss": (("precision", "start"), losses),
            "final_loss_gradient": (("precision", "start"), slopes),
        },
        coords={"case": list(CASES), "time": times, "precision": list(config.precisions)},
        attrs={"source": "random numbers"},
    )


def interpolable(config: Config) -> pcdyn.InferenceProblem:
    """tanh 3-8-2 with three samples."""
    keys = jr.split(jr.key(config.seed), 3)
    network = pcdyn.mlp((3, 8, 2), activation="tanh", key=keys[0])
    return pcdyn.InferenceProblem(
        network, input=jr.normal(keys[1], (3, 3)), output=0.5 * jnp.tanh(jr.normal(keys[2], (3, 2)))
    )


def noisy(key: jax.Array, precision: float) -> pcdyn.InferenceProblem:
    """Linear 1-1-2 with random weights; ℒ has a saddle at 5.0 per sample and is least at 4.5."""
    network = pcdyn.mlp((1, 1, 2), activation="identity", key=key)
    return noisy_problem([layer.weight for layer in network.layers], noise=3.0, precision=precision)


def follow(problem: pcdyn.InferenceProblem, t1: float, times: np.ndarray) -> dict[str, np.ndarray]:
    """Gradient norms of F* and ℒ, the loss and the size of the weights along learning.

    ℒ and its gradient are those of unit output precision, means over the samples.
    """
    flow = learning.AdiabaticFlow(problem, tolerance=1e-11)
    trajectory = pcdyn.simulate(
        flow, t1=t1, times=times,
        integrator=pcdyn.Diffrax("kvaerno5", rtol=1e-8, atol=1e-12, max_steps=2**14),
    )  # fmt: skip
    samples = problem.batch_shape[0] if problem.batch_shape else 1
    norms = np.linalg.norm(trajectory.vector_field_norms, axis=-1) / samples
    slopes, losses, sizes = jax.vmap(lambda n: _loss_and_slope(problem, n))(trajectory.network)
    return {
        "learning_gradient": norms, "loss_gradient": np.asarray(slopes) / samples,
        "loss": np.asarray(losses) / samples, "weight_norm": np.asarray(sizes),
    }  # fmt: skip


def _loss_and_slope(
    problem: pcdyn.InferenceProblem, network: pcdyn.Network
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """‖∇ℒ‖ and ℒ at unit output precision, summed over the samples, and ‖W‖."""
    plain = pcdyn.InferenceProblem(network, input=problem.input, output=problem.output)
    found = pcdyn.backpropagation(plain)
    arrays = (eqx.filter(n, eqx.is_inexact_array) for n in (found.weight_gradient, network))
    slope, size = (jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(a))) for a in arrays)
    return slope, jnp.sum(found.loss), size


def check(data: xarray.Dataset) -> list[Evidence]:
    """Both norms vanish where interpolation is possible, and need not elsewhere."""
    ends = data.isel(time=-1)
    good, bad = (ends.sel(case=case) for case in CASES)
    at_saddle = _at_saddle(data)
    counts = ", ".join(
        f"λ = {p:g}: {int(n)} of {data.sizes['start']}"
        for p, n in zip(data.precision.values, at_saddle, strict=True)
    )
    return [
        *(
            Evidence("Thm 3.6", "learning ends at a critical point of ℒ where data can be "
                     f"interpolated ({what})", float(norm), "below", 1e-3)
            for what, norm in (("‖∇F*‖", good.learning_gradient), ("‖∇ℒ‖", good.loss_gradient))
        ),
        Evidence(
            "Thm 3.6", "it ends at a minimum of ℒ in general (linear 1-1-2, noisy, λ = 1; starts "
            "that end at the saddle)", int(at_saddle.sel(precision=1.0)), "equal", 0,
            expected_to_hold=False,
            note=f"‖∇F*‖ {float(bad.learning_gradient):.1e}, ‖∇ℒ‖ {float(bad.loss_gradient):.1e}, "
            f"ℒ {float(bad.loss):.2f}; near the saddle (5.0, least 4.5) {counts}",
        ),
        Evidence(
            "Thm 3.6", "at low output precision the saddle is avoided (starts that end there at "
            f"λ = {float(data.precision.min()):g})",
            int(at_saddle.sel(precision=data.precision.min())), "equal", 0, note=counts,
        ),
    ]  # fmt: skip


def _at_saddle(data: xarray.Dataset) -> xarray.DataArray:
    """How many starts end at the saddle (5.0) rather than where ℒ is least (4.5)."""
    return (data.final_loss > 4.75).sum("start")


def plot(data: xarray.Dataset) -> Figure:
    """Gradient norms in time for both cases, and how many starts end at the saddle."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    for ax, case in zip(axes, CASES, strict=False):
        part = data.sel(case=case).isel(time=slice(1, None))
        ax.loglog(part.time, part.learning_gradient, label="∇F*, which learning follows")
        ax.loglog(part.time, part.loss_gradient, label="∇ℒ, the gradient of BP")
        ax.loglog(part.time, part.loss, "k:", lw=1, label="ℒ")
        ax.set(xlabel="time (weight time constants)", title=case)
    axes[1].legend(loc="lower left")  # for the first panel too, which has no room
    axes[0].set_ylabel("norm, per sample")
    starts = data.sizes["start"]
    bars = axes[2].bar([f"{p:g}" for p in data.precision.values], _at_saddle(data))
    axes[2].bar_label(bars, fmt=f"%d of {starts}", padding=2)
    axes[2].set(xlabel="output precision λ", ylabel="starts", ylim=(0, 1.1 * starts),
                title="end at the saddle, ℒ = 5.0\nrather than 4.5, the least")  # fmt: skip
    return figure


EXPERIMENT = Experiment(
    "critical_points", "extra: critical points of learning", {"paper": Config()},
    {"t1": 100.0, "saves": 5, "starts": 1, "precisions": (1.0, 0.001)}, run, check, plot,
)  # fmt: skip
