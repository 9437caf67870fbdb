"""Deep residual networks: how much of the output error reaches the first block, and when.

Innocenti et al. (2025) train predictive coding networks of more than a hundred layers in the
scaling μPC with about as many steps of inference as there are layers; others find that no signal
reaches the layers near the input. Inference that ends at its equilibrium and inference that stops
after a budget of Euler steps are told apart here, with both ends clamped: in μPC, in the standard
parameterisation of a residual network, and without skips.

A linear network is followed by its distance from the feedforward pass, which obeys the same flow
with input 0 and the output error as target: numbers far smaller than activities are kept so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.sparse.linalg as sparse
import xarray
from jax.typing import ArrayLike, DTypeLike
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

import pcdyn
from experiments.shared.experiment import Experiment
from experiments.shared.measures import within
from pcdyn.references.algorithms import local_gradient
from pcdyn.references.linear import spectrum
from pcdyn.theory import Evidence

NAME = "residual depth"
PLAIN, STANDARD, MUPC = KINDS = ("no skips", "standard", "μPC")
COLORS = {PLAIN: "C2", STANDARD: "C1", MUPC: "C0"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Blocks between a layer from the input and one to the output, weights and data N(0, 1)."""

    blocks: tuple[int, ...] = (8, 16, 32, 64)
    width: int = 32
    outputs: int = 10
    batch: int = 8
    draws: int = 5
    step: float = 0.1
    budgets: tuple[int, ...] = (20, 64, 200, 2000)
    # Of the square of the number of free layers, in time constants.
    horizon: float = 0.6
    saved: int = 40
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Linear networks of every depth, wider ones of μPC, and tanh at the largest depth."""
    keys = jr.split(jr.key(config.seed), 3)
    drawn = [draws_of(config, blocks, keys[0]) for blocks in config.blocks]
    shape = len(KINDS), config.draws
    rates = [np.reshape([case.rates() for case in cases], (*shape, 2)) for cases in drawn]
    in_errors = [[np.linalg.eigvalsh(case.covariance)[-1] for case in cases] for cases in drawn]
    # μPC is the last of the kinds.
    half = [[half_time(config, case) for case in cases[-config.draws :]] for cases in drawn]
    curved = tanh(config, keys[1])
    wide = [[wide_one(config, width, key) for key in jr.split(keys[2], config.draws)]
            for width in config.widths]  # fmt: skip
    deepest = linear(config, drawn[-1])
    dims = {"signal": ("budget", "layer"), "cosine": ("budget",), "rest": ("layer",),
            "delta": ("layer",), "rest_cosine": ()}  # fmt: skip
    only_linear = {"off_closed_form": (), "arrival": ("around",), "moved_in_float32": ()}
    only_tanh = {"converged": (), "condition": ()}
    return xarray.Dataset(
        {
            **{name: (("kind", "draw", *more), np.reshape(deepest[name], (*shape, *np.shape(
                deepest[name])[1:]))) for name, more in (dims | only_linear).items()},
            **{f"tanh_{name}": (("draw", *more), curved[name])
               for name, more in (dims | only_tanh).items()},
            "rates": (("blocks", "kind", "draw", "end"), rates),
            "in_errors": (("blocks", "kind", "draw"), np.reshape(in_errors, (-1, *shape))),
            "half": (("blocks", "draw"), half),
            "skips_alone": (("blocks", "measure"), [skips_alone(b + 1) for b in config.blocks]),
            "off_spectrum": (("kind", "draw"), np.reshape(
                [off_spectrum(case) for case in drawn[0]], shape)),
            "wide": (("width", "draw", "share"), wide),
        },
        coords={
            "blocks": list(config.blocks), "kind": list(KINDS), "budget": list(config.budgets),
            "width": list(config.widths),
            "end": ["slowest", "fastest"], "around": ["before", "at"],
            "share": ["energy", "variance", "cosine", "size"],
            "measure": ["slowest", "fastest", "half"],
        },
        attrs={"source": "random numbers", "hidden": config.width, "step": config.step},
    )  # fmt: skip


def network(
    config: Config, kind: str, blocks: int, activation: str, key: jax.Array, width: int = 0
) -> pcdyn.Network:
    """One draw, from an input as wide as the hidden layers."""
    width = width or config.width
    return pcdyn.mlp(
        (*[width] * (blocks + 2), config.outputs), activation=activation,
        output_activation="identity", key=key, residual=kind != PLAIN,
        parameterisation="mupc" if kind == MUPC else "standard",
    )  # fmt: skip


class Closed:
    """A linear network in NumPy, its layers as matrices, with data and its output error."""

    def __init__(self, network: pcdyn.Network, key: jax.Array, batch: int):
        self.matrices = [np.asarray(layer.matrix) for layer in network.layers]
        keys = jr.split(key)
        self.passed = [np.asarray(jr.normal(keys[0], (batch, self.matrices[0].shape[1])))]
        for matrix in self.matrices:
            self.passed.append(self.passed[-1] @ matrix.T)
        target = np.asarray(jr.normal(keys[1], (batch, len(self.matrices[-1]))))
        self.error = target - self.passed[-1]
        # P_l = W_L … W_{l+1}, of l = 1 … L.
        self.products = [np.eye(len(self.matrices[-1]))]
        for matrix in self.matrices[:0:-1]:
            self.products.insert(0, self.products[0] @ matrix)
        self.covariance = sum(p @ p.T for p in self.products)
        self.deltas = [self.error @ p for p in self.products]
        seen = np.linalg.solve(self.covariance, self.error.T).T
        self.rest = [seen @ p for p in self.products]

    def problem(
        self, dtype: DTypeLike = float, *, from_pass: bool = True
    ) -> pcdyn.InferenceProblem:
        """Inference of the distance from the feedforward pass, or of activities themselves."""
        # One structure for all kinds, so that a depth is compiled once.
        network = pcdyn.Network([pcdyn.Dense(jnp.asarray(m, dtype)) for m in self.matrices])
        first, last = self.passed[0], self.error + self.passed[-1]
        ends = (0 * first, self.error) if from_pass else (first, last)
        given, target = (jnp.asarray(x, dtype) for x in ends)
        return pcdyn.InferenceProblem(network, input=given, output=target)

    def gradient(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """That of the first block, from its errors and the distance of x_1 from the pass."""
        return np.einsum("...bi,...bj->...ij", above, self.passed[1] + below)

    def cosine(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Of the gradient of the first block with BP's."""
        return cosine(self.gradient(above, below), self.gradient(self.deltas[1], 0 * below))

    def rates(self) -> tuple[float, float]:
        """The slowest and the fastest rate.

        H is factorised from the output down, where every pivot is 1 + K_l with K_l ≽ 0: nothing
        cancels, however slow the slowest is.
        """
        free, above = len(self.matrices) - 1, self.matrices[1:]
        widths = [len(m) for m in self.matrices[:-1]]
        cuts = np.cumsum(widths)[:-1]
        inverses: list[Any] = [None] * free
        left = np.eye(len(self.matrices[-1]))
        for index in reversed(range(free)):
            pivot = np.eye(widths[index]) + above[index].T @ left @ above[index]
            inverses[index] = np.linalg.inv(pivot)
            left = np.eye(widths[index]) - inverses[index]

        def solve(flat: np.ndarray) -> np.ndarray:
            parts = np.split(flat.ravel(), cuts)
            for i in reversed(range(free - 1)):
                parts[i] = parts[i] + above[i].T @ (inverses[i + 1] @ parts[i + 1])
            found = [inverses[0] @ parts[0]]
            for i in range(1, free):
                found.append(inverses[i] @ (parts[i] + above[i - 1] @ found[-1]))
            return np.concatenate(found)

        def times(flat: np.ndarray) -> np.ndarray:
            x = np.split(flat.ravel(), cuts)
            errors = [x[0], *(x[i] - above[i - 1] @ x[i - 1] for i in range(1, free))]
            errors.append(-above[-1] @ x[-1])
            return np.concatenate([errors[i] - above[i].T @ errors[i + 1] for i in range(free)])

        # SciPy's types do not know that it takes a function.
        linear_operator: Any = sparse.LinearOperator
        largest = []
        for product in (solve, times):
            operator = linear_operator((sum(widths),) * 2, matvec=product, dtype=float)
            start = np.ones(sum(widths))
            values: Any = sparse.eigsh(operator, k=1, v0=start, return_eigenvectors=False)
            largest.append(float(values[0]))
        return 1 / largest[0], largest[1]


def norm(x: np.ndarray) -> np.ndarray:
    """Over the last two axes, of a batch or of a weight."""
    return np.linalg.norm(x, axis=(-2, -1))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over the last two axes; NaN where one vanishes."""
    # By its largest entry first, for the square of what is smaller than 1e-154 vanishes.
    size = np.max(np.abs(a), axis=(-2, -1), keepdims=True)
    a = a / np.where(size > 0, size, np.nan)
    return np.sum(a * b, axis=(-2, -1)) / norm(a) / norm(b)


def skips_alone(free: int) -> tuple[float, float, float]:
    """The slowest and the fastest rate of a chain of skips, and the half-time of its first unit.

    The output only pushes; then errors spread like heat in a rod that is held at that end, and the
    first one nears its own by 1 − 4/π e^{−(π/2n)² t}.
    """
    slowest = 4 * np.sin(np.pi / (4 * free + 2)) ** 2
    return slowest, 4 * np.cos(np.pi / (2 * free + 1)) ** 2, float(np.log(8 / np.pi) / slowest)


def draws_of(config: Config, blocks: int, key: jax.Array) -> list[Closed]:
    """Linear networks of one depth: all draws of the first kind, then of the second, …"""
    keys = jr.split(jr.fold_in(key, blocks), (config.draws, 2))
    return [Closed(network(config, kind, blocks, "identity", k), data, config.batch)
            for kind in KINDS for k, data in keys]  # fmt: skip


def half_time(config: Config, case: Closed) -> float:
    """When Euler, at half of its largest stable step, has brought half of its error to block 1."""
    problem, step = case.problem(), 1 / case.rates()[1]
    last = int(config.horizon * (len(case.matrices) - 1) ** 2 / step)
    steps = np.concatenate([[0], np.linspace(0.05, 1, config.saved) * last]).astype(int)
    euler = pcdyn.simulate(
        problem, t1=last * step, times=steps * step, initial="zeros",
        integrator=pcdyn.Euler(dt=jnp.asarray(step)),
    )  # fmt: skip
    signal = norm(np.asarray(euler.prediction_errors[1])) / norm(case.rest[1])
    after = int(np.argmax(signal >= 0.5))
    if not after:
        return np.nan
    around = slice(after - 1, after + 1)
    return step * float(np.interp(0.5, signal[around], steps[around]))


def linear(config: Config, cases: list[Closed]) -> dict[str, list[Any]]:
    """All kinds and draws of one depth: Euler's budgets, and the equilibrium."""
    step, found = config.step, {}
    # The first block is layer 2, which the output error reaches in as many steps as lie between.
    reached = len(cases[0].matrices) - 2
    steps = np.array(sorted({0, reached - 1, reached, *config.budgets}))
    for case in cases:
        problem, size = case.problem(), norm(case.error)
        euler = pcdyn.simulate(
            problem, t1=steps[-1] * step, times=steps * step, initial="zeros",
            integrator=pcdyn.Euler(dt=step),
        )  # fmt: skip
        rest = pcdyn.linear_equilibrium(problem, method="output_space")
        climbed = [0 * case.passed[0]]
        for matrix, error in zip(case.matrices[:-1], case.rest[:-1], strict=True):
            climbed.append(climbed[-1] @ matrix.T + error)
        away = max(np.max(np.abs(a - b)) for a, b in zip(rest, climbed, strict=False))
        at = np.searchsorted(steps, config.budgets)
        signal = np.transpose(sizes_of(euler.prediction_errors))
        second, first = (np.asarray(x) for x in (euler.prediction_errors[1], euler.activities[1]))
        before, arrived = (second[list(steps).index(k)] for k in (reached - 1, reached))
        expected = step**reached * case.deltas[1]
        row = {
            "signal": signal[at] / size,
            "cosine": [case.cosine(second[k], first[k]) for k in at],
            "rest": sizes_of(case.rest) / size,
            "delta": sizes_of(case.deltas) / size,
            "rest_cosine": case.cosine(case.rest[1], case.rest[0]),
            "off_closed_form": away / max(np.max(np.abs(x)) for x in climbed),
            "arrival": [np.max(np.abs(before)), np.max(np.abs(arrived / expected - 1))],
            "moved_in_float32": moved_in_float32(config, case),
        }
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def moved_in_float32(config: Config, case: Closed) -> float:
    """Which share of the free layers has moved after as many steps as layers, in float32."""
    problem = case.problem(jnp.float32, from_pass=False)
    t1 = len(case.matrices) * config.step
    ends = pcdyn.simulate(problem, t1=t1, times=[0, t1], integrator=pcdyn.Euler(dt=config.step))
    return float(np.mean([np.any(x[0] != x[1]) for x in ends.activities[1:-1]]))


def off_spectrum(case: Closed) -> float:
    """How far the slowest and the fastest rate are from those of the whole spectrum."""
    found = np.asarray(spectrum(case.problem()))[[0, -1]]
    return float(np.max(np.abs(np.array(case.rates()) / found - 1)))


def sizes_of(errors: Sequence[ArrayLike]) -> np.ndarray:
    """The norm of each layer's errors over the batch."""
    return np.array([norm(np.asarray(error)) for error in errors])


def tanh(config: Config, key: jax.Array) -> dict[str, np.ndarray]:
    """μPC of the largest depth with tanh: Euler's budgets, and the certified equilibrium."""
    blocks, step, found = config.blocks[-1], config.step, {}
    times = np.array([0, *config.budgets]) * step
    for one in jr.split(key, config.draws):
        keys = jr.split(one, 3)
        inputs = jr.normal(keys[1], (config.batch, config.width))
        targets = jr.normal(keys[2], (config.batch, config.outputs))
        problem = pcdyn.InferenceProblem(
            network(config, MUPC, blocks, "tanh", keys[0]), input=inputs, output=targets
        )
        euler = pcdyn.simulate(problem, t1=times[-1], times=times, integrator=pcdyn.Euler(dt=step))
        rest = pcdyn.equilibrium(problem, throw=False)
        bp, net = pcdyn.backpropagation(problem), problem.network
        size = norm(np.asarray(bp.deltas[-1]))
        ends = [[x[i] for x in euler.activities] for i in range(1, len(times))]
        ends.append([jnp.asarray(x) for x in rest.activities])
        errors = [problem.prediction_errors(tuple(x)) for x in ends]
        cosines = []
        for x, e in zip(ends, errors, strict=True):
            ours = local_gradient(net, x, e).layers[1].weight
            cosines.append(
                cosine(np.asarray(ours), np.asarray(bp.weight_gradient.layers[1].weight))
            )
        at = pcdyn.stability(problem.sample(0), at=[x[0] for x in rest.state])
        row = {
            "signal": [sizes_of(e) / size for e in errors[:-1]],
            "rest": sizes_of(errors[-1]) / size,
            "delta": sizes_of(bp.deltas) / size,
            "cosine": cosines[:-1],
            "rest_cosine": cosines[-1],
            "converged": np.mean(np.equal(rest.status, pcdyn.EquilibriumStatus.CONVERGED)),
            "condition": at.condition_number,
        }
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: np.asarray(values) for name, values in found.items()}


def wide_one(config: Config, width: int, key: jax.Array) -> list[float]:
    """μPC of the largest depth and some width: what its equilibrium has of BP.

    The share of the free energy in BP's loss, the mean variance that the network predicts of the
    output, and the cosine and the relative size of the gradient of the first block.
    """
    keys = jr.split(key)
    net = network(config, MUPC, config.blocks[-1], "identity", keys[0], width)
    case = Closed(net, keys[1], config.batch)
    seen = np.linalg.solve(case.covariance, case.error.T).T
    ours = case.gradient(case.rest[1], case.rest[0])
    return [
        float(np.sum(seen * case.error) / np.sum(case.error**2)),
        float(np.trace(case.covariance) / config.outputs),
        float(case.cosine(case.rest[1], case.rest[0])),
        float(norm(ours) / norm(case.gradient(case.deltas[1], 0 * case.rest[0]))),
    ]


def check(data: xarray.Dataset) -> list[Evidence]:
    """Conditioning, what arrives when, and what the equilibrium has of BP."""
    deep, step = int(data.blocks[-1]), data.attrs["step"]
    budget = _within_depth(data)
    condition = data.rates.sel(end="fastest") / data.rates.sel(end="slowest")
    logs = np.log(condition)
    far = np.log((data.blocks[-1] + 1) / (data.blocks[0] + 1)).item()
    powers = (logs[-1] - logs[0]) / far
    last = condition.isel(blocks=-1).mean("draw")
    growth = logs.sel(kind=STANDARD).diff("blocks").mean("draw")
    spans = np.diff(data.blocks.values)
    per_block = growth.values / spans / np.log(2)
    mupc, hidden = data.sel(kind=MUPC), data.attrs["hidden"]
    speed = np.log(data.half[-1] / data.half[0]) / far
    late = data.half[-1] / step
    fewest = data.half[-1] * data.rates[-1].sel(kind=MUPC, end="fastest") / 2
    rod = data.skips_alone[[0, -1]]
    alone = xarray.DataArray(
        [np.log(x[-1] / x[0]) / far for x in (rod[:, 1] / rod[:, 0], rod[:, 2])],
        dims="power", coords={"power": ["condition", "half"]},
    )  # fmt: skip
    power = powers.sel(kind=MUPC)
    even = (mupc.rest[:, 1] / mupc.rest[:, -2]) ** 2
    variance = data.wide.sel(share="variance")
    expected = 1 + sum((1 + 1 / (deep + 2)) ** j for j in range(deep + 1)) / data.width
    off = variance / expected
    energy = data.wide.sel(share="energy")
    jensen = energy * expected
    at_rest = mupc.rest_cosine
    in_time = mupc.sel(budget=budget)
    share = in_time.signal[:, 1] / mupc.rest[:, 1]
    tanh_share = data.tanh_signal.sel(budget=budget)[:, 1] / data.tanh_rest[:, 1]

    def of(
        claim: str,
        values: xarray.DataArray,
        relation: Literal["equal", "at most", "at least", "below", "above"],
        limit: float,
        *,
        tolerance: float = 0.0,
        oracle: str = "",
        note: str = "",
        expected_to_hold: bool = True,
    ) -> Evidence:
        mean, error = _mean(values)
        return Evidence(
            NAME, claim, mean, relation, limit, tolerance, oracle, error=error, note=note,
            expected_to_hold=expected_to_hold,
        )  # fmt: skip

    return [
        Evidence(
            NAME, "rates, factorised from the output down, are those of the whole spectrum "
            "(largest relative difference of the slowest and the fastest, smallest depth)",
            float(data.off_spectrum.max()), "at most", 1e-8, oracle="NumPy",
        ),
        Evidence(
            NAME, "the equilibrium is P_lᵀ S⁻¹ e0 (largest difference of activities, relative)",
            float(data.off_closed_form.max()), "at most", 1e-8, oracle="NumPy",
        ),
        of("μPC: the condition number grows with depth as that of skips alone (power)", power,
           "equal", float(alone.sel(power="condition")), tolerance=3 * _mean(power)[1],
           note=f"within three standard errors; at {deep} blocks {last.sel(kind=MUPC).item():.2g}, "
           f"without skips {last.sel(kind=PLAIN).item():.2g} (power "
           f"{powers.sel(kind=PLAIN).mean().item():.2g})"),
        of(f"standard residual: it is larger than that of μPC (decades, {deep} blocks)",
           np.log10(condition[-1].sel(kind=STANDARD) / condition[-1].sel(kind=MUPC)), "above", 0.0,
           note=f"{last.sel(kind=STANDARD).item():.2g}; doublings for each block between depths "
           + ", ".join(f"{x:.2f}" for x in per_block)),
        Evidence(
            NAME, "until Euler has made a step for each layer above the first block, that has no "
            "error (largest)", float(data.arrival.sel(around="before").max()), "equal", 0.0,
        ),
        Evidence(
            NAME, "at that step its error is BP's δ times a power of the step size η, η^(L−2) δ "
            "(largest relative difference)", float(data.arrival.sel(around="at").max()), "at most",
            1e-8, oracle="BP in NumPy", note=f"a factor of {step ** float(deep):.0e}",
        ),
        of("μPC, float32: as many steps as layers move every layer (share that moved)",
           mupc.moved_in_float32, "equal", 1.0, expected_to_hold=False),
        of(f"μPC: {budget} steps, at most one for each layer, bring the first block half of its "
           "error at equilibrium (decades)", np.log10(share), "at least", float(np.log10(0.5)),
           expected_to_hold=False,
           note=f"tanh {float(tanh_share.mean()):.1g}"),
        of("μPC: the time until half of it grows faster than the number of layers (power)", speed,
           "above", 1.0, note=f"skips alone {float(alone.sel(power='half')):.3g}; at {deep} blocks "
           f"as long as {late.mean().item():.0f} steps of {step:g}, or {fewest.mean().item():.0f} "
           "of the largest stable one"),
        of("μPC, at equilibrium: the error of the first block is as large as that of the last but "
           "for the growth of branches of 1/√L (ratio of squares)", even, "at most", float(np.e),
           tolerance=3 * _mean(even)[1],
           note=f"{within(*_mean(mupc.rest[:, 1]))} of the output error"),
        Evidence(
            NAME, "μPC: in error coordinates the condition number is smaller (largest ratio)",
            float((data.in_errors / condition).sel(kind=MUPC).max()), "below", 1.0,
            note=f"at {deep} blocks {within(*_mean(data.in_errors[-1].sel(kind=MUPC)))}",
        ),
        of("μPC: the mean eigenvalue of S is 1 + Σ_j (1 + 1/L)^j / width (ratio)", off, "equal",
           1.0, tolerance=3 * float(off.std(ddof=1) / off.size**0.5),
           oracle="independent Gaussian weights", note="within three standard errors"),
        of("μPC: the energy at equilibrium is at least BP's loss over that (ratio)",
           jensen.mean("width"), "at least", 1.0),
        of("μPC: it nears BP's loss as the width grows (share at the largest width less that at "
           "the smallest)", energy[-1] - energy[0], "above", 0.0,
           note=", ".join(f"{within(*_mean(e))} at {e.width.item()}" for e in energy)),
        of(f"μPC, width {hidden}, at equilibrium: the gradient of the first block has BP's "
           "direction (cosine)", at_rest, "above", 0.0,
           note=f"standard {within(*_mean(data.rest_cosine.sel(kind=STANDARD)))}"),
        of("tanh, μPC: every sample has an equilibrium within the tolerance (share)",
           data.tanh_converged, "equal", 1.0,
           note=f"condition number {within(*_mean(data.tanh_condition))}"),
    ]  # fmt: skip


def _within_depth(data: xarray.Dataset) -> int:
    """The largest budget of at most one step for each layer."""
    layers = data.sizes["layer"]
    return int(max(b for b in data.budget.values if b <= layers))


def _mean(values: xarray.DataArray) -> tuple[float, float]:
    """The mean over draws, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / values.size**0.5)


def plot(data: xarray.Dataset) -> Figure:
    """Condition numbers, half-times and widths above; below, errors along networks."""
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.6), layout="constrained")
    blocks, deep = data.blocks, data.blocks.values[-1]
    condition = data.rates.sel(end="fastest") / data.rates.sel(end="slowest")
    ax = axes[0, 0]
    for kind in KINDS:
        _spread(ax, blocks, condition.sel(kind=kind), COLORS[kind], kind)
        _spread(ax, blocks, data.in_errors.sel(kind=kind), COLORS[kind], None, ":")
    alone = data.skips_alone
    ax.plot(blocks, alone[:, 1] / alone[:, 0], "k--", lw=1, label="skips alone")
    ax.plot([], [], "k:", label="in error coordinates")
    ax.set(xlabel="blocks", ylabel="condition number", title="linear networks")
    ax = axes[0, 1]
    step = data.attrs["step"]
    _spread(ax, blocks, data.half / step, COLORS[MUPC], "half of its error at equilibrium")
    ax.plot(blocks, alone[:, 2] / step, "k--", lw=1, label="heat in a rod")
    ax.plot(blocks, blocks + 2, color="0.5", label="as many steps as layers")
    ax.set(xlabel="blocks", ylabel=f"Euler steps of {step:g}", title="until block 1 has half (μPC)")
    for ax in axes[0, :2]:
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(blocks.values, [f"{b}" for b in blocks.values])
        ax.minorticks_off()
    ax = axes[0, 2]
    for name, label, color in (
        ("energy", "energy over BP's loss", "C0"), ("cosine", "gradient of block 1: cosine", "C3"),
        ("size", "its size over BP's", "C4"),
    ):  # fmt: skip
        _spread(ax, data.width, data.wide.sel(share=name), color, label)
    ax.set(xlabel="width", xscale="log", ylim=(0, 1.05), title=f"μPC at equilibrium, {deep} blocks")
    ax.set_xticks(data.width.values, [f"{w}" for w in data.width.values])
    ax.minorticks_off()
    layers = np.arange(1, data.sizes["layer"] + 1)
    panels = (
        (f"linear μPC, {deep} blocks", data.sel(kind=MUPC), ""),
        (f"tanh μPC, {deep} blocks", data, "tanh_"),
        (f"linear standard, {deep} blocks", data.sel(kind=STANDARD), ""),
    )
    for ax, (title, part, prefix) in zip(axes[1], panels, strict=True):
        shades = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, data.sizes["budget"]))
        for budget, color in zip(data.budget.values, shades, strict=True):
            line = part[f"{prefix}signal"].sel(budget=budget)
            _spread(
                ax, layers, line.transpose("layer", "draw"), color, f"{budget} steps", fill=False
            )
        for name, style, label in (("rest", "k-", "equilibrium"), ("delta", "r--", "BP")):
            values = part[f"{prefix}{name}"].transpose("layer", "draw")
            _spread(ax, layers, values, style[0], label, style[1:])
        ax.set(yscale="log", ylim=(1e-12, 1e3), xlabel="layer, from the input", title=title)
    axes[1, 0].set_ylabel("error over output error of the pass")
    for ax in axes.flat:
        ax.legend(fontsize=7)
    return figure


def _spread(
    ax: Axes,
    x: ArrayLike,
    values: xarray.DataArray,
    color: ColorType,
    label: str | None,
    style: str = "-",
    *,
    fill: bool = True,
) -> None:
    """The median over draws, in a band of all of them."""
    (line,) = ax.plot(x, values.median("draw"), style, color=color, label=label, lw=1.4)
    if fill:
        low, high = values.min("draw"), values.max("draw")
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)


EXPERIMENT = Experiment(
    "residual_depth", "extra: deep residual networks", {"paper": Config()},
    {"blocks": (16, 36), "width": 16, "outputs": 4, "batch": 2, "draws": 3, "widths": (16, 64),
     "budgets": (8, 36, 400)},
    run, check, plot,
)  # fmt: skip
