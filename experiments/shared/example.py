"""The network of Figures 5 and 6."""

from __future__ import annotations

import dataclasses

import jax.random as jr

import pcdyn
from experiments.shared.networks import gaussian_weights, network_of

COLORS = {"PC": "#009E73", "BP": "#0072B2", "TP": "#D55E00"}


@dataclasses.dataclass(frozen=True)
class Example:
    """A 4-4-4-4 tanh network with weights I + N(0, std²) and a target that it can reach.

    The seed is chosen for a drawing in which the rules can be told apart, and in which the flow
    with the input free comes to rest soon; `interpolation` has the same for random draws.
    """

    width: int = 4
    depth: int = 3
    weight_std: float = 0.2
    seed: int = 27


def problem_of(config: Example) -> pcdyn.InferenceProblem:
    """Both ends clamped, unit precisions; the target is what the network makes of other data."""
    keys = jr.split(jr.key(config.seed), 3)
    (weights,) = gaussian_weights(
        keys[0], networks=1, layers=config.depth, width=config.width, std=config.weight_std,
        identity=True,
    )  # fmt: skip
    network = network_of(weights, "tanh")
    input, source = jr.normal(keys[1], (2, config.width))
    return pcdyn.InferenceProblem(network, input=input, output=network.feedforward(source)[-1])
