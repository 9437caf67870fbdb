"""Learning as expectation maximisation: what F, ℒ and Ẽ do in each half, for three rules.

E halves are inference to equilibrium from the feedforward pass. M halves are the regression of each
layer to its end, or one step along the gradient, as the paper has it, or one of backpropagation,
beside which inference is only looked at.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray
from jaxtyping import PyTree
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pcdyn
from experiments.shared.experiment import Experiment
from pcdyn import learning
from pcdyn.theory import Evidence

RULES = ("M-step to its end", "one gradient step (PC)", "one gradient step of BP")
PARTS = ("F", "ℒ", "Ẽ")
SECTION = "Section 3.4"
# Relative to what there was at the start; equilibria are known to 1e-6 of their gradient's scale.
RISES = 1e-9
Curves = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """5-5-5-5, weights N(0, 1/5), 20 samples N(0, 1), targets of another such network plus noise.

    Layers are linear, or tanh with a linear output. The rate is that of F averaged over samples.
    """

    activations: tuple[str, ...] = ("identity", "tanh")
    width: int = 5
    depth: int = 3
    samples: int = 20
    noise_std: float = 0.5
    networks: int = 20
    rounds: int = 50
    rate: float = 0.05
    seed: int = 0


def run(config: Config) -> xarray.Dataset:
    """Energies after each half, and ℒ of the feedforward pass after each round, by each rule."""
    energies, losses, residuals = [], [], []
    for activation in config.activations:
        keys = jr.split(jr.key(config.seed), config.networks)
        # In turn: side by side all networks would take the iterations of the slowest.
        *first, residual = jax.jit(
            lambda k, a=activation: jax.lax.map(lambda key: _maximised(config, a, key), k)
        )(keys)
        curves = [first]
        for follow in (_stepped, _backpropagated):
            each = jax.jit(jax.vmap(lambda key, f=follow, a=activation: f(config, a, key)))
            curves.append(each(keys))
        energies.append([np.asarray(c[0]) for c in curves])
        losses.append([np.asarray(c[1]) for c in curves])
        residuals.append(np.asarray(residual))
    dims = ("activation", "rule", "network")
    each = np.stack([np.stack(e) for e in energies])
    parts = (each.sum(-1), each[..., -1], each[..., :-1].sum(-1))
    return xarray.Dataset(
        {
            "energy": (("part", *dims, "round", "half"), np.stack(parts)),
            "loss": ((*dims, "rounds_done"), np.stack([np.stack(l) for l in losses])),
            "residual": (("activation", "network", "round"), np.stack(residuals)),
        },
        coords={
            "part": list(PARTS), "activation": list(config.activations), "rule": list(RULES),
            "half": ["E", "M"], "round": np.arange(1, config.rounds + 1),
            "rounds_done": np.arange(config.rounds + 1),
        },
        attrs={"source": "random numbers", "rate": config.rate},
    )  # fmt: skip


def problem_of(config: Config, activation: str, key: jax.Array) -> pcdyn.InferenceProblem:
    """A network, and data of another one of its kind, with noise that it cannot interpolate."""
    keys = jr.split(key, 4)
    widths = (config.width,) * (config.depth + 1)
    network, teacher = (
        pcdyn.mlp(widths, activation=activation, output_activation="identity", key=k)
        for k in keys[:2]
    )
    inputs, noise = (jr.normal(k, (config.samples, config.width)) for k in keys[2:])
    targets = teacher.feedforward(inputs)[-1] + config.noise_std * noise
    return pcdyn.InferenceProblem(network, input=inputs, output=targets)


def _maximised(config: Config, activation: str, key: jax.Array) -> tuple[jax.Array, ...]:
    problem = problem_of(config, activation, key)
    found = learning.expectation_maximisation(problem, rounds=config.rounds)
    return jnp.asarray(found.energies), jnp.asarray(found.loss), jnp.max(found.residual, axis=-1)


def _stepped(config: Config, activation: str, key: jax.Array) -> Curves:
    found = learning.expectation_maximisation(
        problem_of(config, activation, key), rounds=config.rounds, learning_rate=config.rate
    )
    return jnp.asarray(found.energies), jnp.asarray(found.loss)


def _backpropagated(config: Config, activation: str, key: jax.Array) -> Curves:
    """The same for BP, with what inference finds at its weights before and after each step."""
    problem = problem_of(config, activation, key)
    weights, static = eqx.partition(problem.network, eqx.is_inexact_array)

    def at(weights: PyTree) -> pcdyn.InferenceProblem:
        return eqx.tree_at(lambda p: p.network, problem, eqx.combine(weights, static))

    def one(weights: PyTree, _: None) -> tuple[PyTree, Curves]:
        now = at(weights)
        found = pcdyn.backpropagation(now)
        slope = eqx.filter(found.weight_gradient, eqx.is_inexact_array)
        rate = config.rate / config.samples
        moved = jax.tree.map(lambda w, g: w - rate * g, weights, slope)
        rest = pcdyn.equilibrium(now, method="gauss_newton", throw=False).state
        energies = [jnp.mean(at(w).layer_energies(rest), axis=0) for w in (weights, moved)]
        return moved, (jnp.stack(energies), jnp.mean(found.loss))

    end, (energies, losses) = jax.lax.scan(one, weights, None, length=config.rounds)
    last = jnp.mean(pcdyn.backpropagation(at(end)).loss)
    return energies, jnp.concatenate([losses, last[None]])


def in_turn(energy: xarray.DataArray) -> np.ndarray:
    """Energies of E and M halves in turn, on the last axis."""
    values = energy.transpose(..., "round", "half").values
    return values.reshape(*values.shape[:-2], -1)


def rising(values: np.ndarray) -> np.ndarray:
    """Which values, relative to the first, are above the one before, on the last axis."""
    return np.diff(values) / values[..., :1] > RISES


def share(flags: np.ndarray) -> str:
    """The share of a draw, as its median and its 10 and 90 % quantiles over draws."""
    low, middle, high = np.quantile(flags.mean(-1), (0.1, 0.5, 0.9))
    return f"{middle:.0%} ({low:.0%} to {high:.0%})"


def check(data: xarray.Dataset) -> list[Evidence]:
    """What falls in which half, and what does not."""
    claims = []
    for activation in data.activation.values:
        kind = {"identity": "linear"}.get(str(activation), str(activation))
        here = data.sel(activation=activation)
        claims.append(
            Evidence(SECTION, f"{kind}: every M-step to the end is at its end (largest residual)",
                     float(here.residual.max()), "at most", 1e-8)
        )  # fmt: skip
        of_pass = {rule: rising(here.loss.sel(rule=rule).values) for rule in RULES}
        moved = {rule: rising(in_turn(here.energy.sel(part="ℒ", rule=rule))) for rule in RULES}
        for rule in RULES[:2]:
            free = in_turn(here.energy.sel(part="F", rule=rule))
            claims += [
                Evidence("Section 3.3", f"{kind}, {rule}: F never rises in any half (share of "
                         "halves)", float(rising(free).mean()), "equal", 0.0),
                Evidence(SECTION, f"{kind}, {rule}: ℒ at x* never rises in an M half (share of M "
                         "halves)", float(moved[rule][:, ::2].mean()), "equal", 0.0),
            ]  # fmt: skip
        ends = here.loss.isel(rounds_done=-1)
        inference = {rule: moved[rule][:, 1::2] for rule in RULES}
        claims += [
            Evidence(SECTION, f"{kind}, {RULES[0]}: ℒ at x* never rises in an E half (share of E "
                     "halves)", float(inference[RULES[0]].mean()), "equal", 0.0,
                     expected_to_hold=False,
                     note=f"of a draw {share(inference[RULES[0]])}, with one gradient step "
                     f"{share(inference[RULES[1]])}"),
            Evidence(SECTION, f"{kind}, {RULES[0]}: ℒ of the feedforward pass never rises from "
                     "round to round (share of rounds)", float(of_pass[RULES[0]].mean()), "equal",
                     0.0, expected_to_hold=False,
                     note=f"of a draw {share(of_pass[RULES[0]])}, with one gradient step "
                     f"{share(of_pass[RULES[1]])}; ℒ at the end "
                     + ", ".join(f"{rule} {_quantiles(ends.sel(rule=rule))}" for rule in RULES)),
            Evidence(SECTION, f"{kind}, {RULES[2]}: ℒ of the feedforward pass never rises from "
                     "round to round (share of rounds)", float(of_pass[RULES[2]].mean()), "equal",
                     0.0),
        ]  # fmt: skip
    return claims


def _quantiles(values: xarray.DataArray) -> str:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def plot(data: xarray.Dataset) -> Figure:
    """F, ℒ and Ẽ by half-steps, and ℒ of the feedforward pass by rounds, a row for each network.

    The feedforward pass before the first round, for which a logarithm has no place, is at one half.
    """
    kinds, rules = data.activation.values, data.rule.values
    figure, axes = plt.subplots(
        len(kinds), len(rules), figsize=(11, 3.1 * len(kinds)), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    colors = {"F": "k", "ℒ": "C0", "Ẽ": "C1"}
    texts = {"F": r"$F$", "ℒ": r"$\mathcal{L}$ at $x^*$", "Ẽ": r"$\tilde{E}$"}
    halves = np.arange(1, 2 * data.sizes["round"] + 1) / 2
    for row, kind in zip(axes, kinds, strict=True):
        for ax, rule in zip(row, rules, strict=True):
            here = data.sel(activation=kind, rule=rule)
            for part in PARTS:
                _band(ax, halves, in_turn(here.energy.sel(part=part)), colors[part], texts[part])
            done = data.rounds_done.values
            _band(ax, np.maximum(done, 0.5), here.loss.values, "C2",
                  r"$\mathcal{L}$ of the feedforward pass", "--")  # fmt: skip
            ax.set(xscale="log", yscale="log", title=str(rule))
        name = {"identity": "linear"}.get(str(kind), str(kind))
        row[0].set_ylabel(f"{name} network:\nenergy, mean over samples")
    for ax in axes[-1]:
        ax.set_xlabel("rounds (E halves end between whole numbers)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"median and 10–90 % of {data.sizes['network']} networks")
    return figure


def _band(
    ax: Axes, x: np.ndarray, values: np.ndarray, color: str, label: str, style: str = "-"
) -> None:
    """The median over networks and the band from 10 to 90 %."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0)
    ax.plot(x, middle, style, color=color, label=label, lw=1.2)
    ax.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


EXPERIMENT = Experiment(
    "expectation_maximisation", "extra: expectation maximisation", {"paper": Config()},
    {"activations": ("identity",), "networks": 10, "rounds": 30}, run, check, plot,
)  # fmt: skip
