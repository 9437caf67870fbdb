"""Deep networks as runs of equal layers, so that compiling takes no longer for more layers.

XLA compiles every operation that it is shown, and a network of 200 layers shows it each one 200
times. Here the state is one array with the units of all free layers side by side, and consecutive
layers of one kind are stacked and run in a loop that is compiled once. The numbers agree with those
of `pcdyn.InferenceProblem` up to round-off. A network of at most `network.MOST_WRITTEN_OUT` layers
stays as it is, for loops run slower.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from pcdyn._support.namespaces import host_namespace
from pcdyn._support.types import Activities, Numbers, Scalar, State, Values
from pcdyn.model.clamps import Clamp
from pcdyn.model.energies.energy import Energy
from pcdyn.model.flow import Flow
from pcdyn.model.network import MOST_WRITTEN_OUT, Layer, apply_layer, stack, structure_of
from pcdyn.model.problem import InferenceFlow, InferenceProblem


class Run(eqx.Module):
    """Predictions of consecutive layers l = `first` … of one kind, their arrays stacked."""

    layer: Layer
    energy: Energy
    first: int = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def observe(
        self,
        lower: Float[Array, "*batch length below"],
        here: Float[Array, "*batch length n"],
        prediction: Float[Array, "*batch n"] | None,
    ) -> tuple[Float[Array, "*batch length n"], Float[Array, "*batch length"]]:
        """Prediction errors and energies from activities `(*batch, length, n)` below and here."""
        arrays, static = eqx.partition((self.layer, self.energy), eqx.is_array)
        by_layer = tuple(jnp.moveaxis(x, -2, 0) for x in (lower, here))

        def one(_: None, now: PyTree) -> tuple[None, tuple[Array, Array]]:
            mine, (below, x) = now
            layer, energy = eqx.combine(mine, static)
            error = x - (apply_layer(layer, below) if prediction is None else prediction)
            return None, (error, energy.value(error, x))

        if self.length == 1:
            now = jax.tree.map(lambda x: x[0], (arrays, by_layer))
            errors, energies = jax.tree.map(lambda x: x[None], one(None, now)[1])
        else:
            errors, energies = jax.lax.scan(one, None, (arrays, by_layer))[1]
        return jnp.moveaxis(errors, 0, -2), jnp.moveaxis(energies, 0, -1)


class StackedProblem(InferenceFlow):
    """An inference problem whose state is one array `(*batch, N)` of all free units.

    `time_constants`: τ of every free unit. `widths`: n_0 … n_L. `first_prediction`: μ_1 where it is
    `prepared`.
    """

    runs: tuple[Run, ...]
    input: Values | None
    output: Values | None
    time_constants: Values
    widths: tuple[int, ...] = eqx.field(static=True)
    free: tuple[int, ...] = eqx.field(static=True)
    first_prediction: Values | None = None

    @property
    def free_layers(self) -> tuple[int, ...]:
        """The indices l of the layers that make up the state."""
        return self.free

    @property
    def free_widths(self) -> tuple[int, ...]:
        """n_l of the layers that make up the state."""
        return tuple(self.widths[index] for index in self.free)

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """The state of activities of the free layers, which need to be given."""
        return self.pack(initial)

    @property
    def data(self) -> tuple[Clamp, ...]:
        """The clamped input and output; `None` for an end that is free."""
        return self.input, self.output

    @property
    def state_time_constants(self) -> tuple[Values, ...]:
        """τ of the one array of the state."""
        return (self.time_constants,)

    def with_data(self, *data: Numbers | Clamp) -> StackedProblem:
        """The same problem with other clamped data, such as one sample of a batch."""
        input: Any
        output: Any
        input, output = data
        return dataclasses.replace(self, input=input, output=output, first_prediction=None)

    def pack(self, layers: Sequence[Numbers]) -> State:
        """One array of what the free layers have an array each of."""
        xp = host_namespace(layers)
        return (xp.concatenate([xp.asarray(x) for x in layers], axis=-1),)

    def unpack(self, state: State) -> State:
        """Take a packed state apart into layers; the inverse of `pack`."""
        return _split(state[0], self.free_widths)

    def unpack_errors(self, errors: Activities) -> Activities:
        """ε_1 … ε_L from the one array that `observe` gives."""
        return _split(errors[0], self.widths[1:])

    def activities(self, state: State) -> Activities:
        """All layers side by side, as one array."""
        ends = (self.input, state[0], self.output)
        return (jnp.concatenate([x for x in ends if x is not None], axis=-1),)

    def prepared(self) -> StackedProblem:
        """The same problem with μ_1, constant during inference, in `first_prediction`."""
        if self.input is None:
            return self
        layer = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, self.runs[0].layer)
        return dataclasses.replace(self, first_prediction=apply_layer(layer, self.input))

    def observe(self, t: Scalar, state: State) -> tuple[Activities, Float[Array, "*batch L"]]:
        """The prediction errors of all layers side by side, and the energies E_1 … E_L."""
        (x,) = self.activities(state)
        starts, errors, energies = np.cumsum([0, *self.widths]), [], []

        def layers(first: int, length: int) -> Array:
            width = self.widths[first]
            part = x[..., starts[first] : starts[first] + length * width]
            return part.reshape(*part.shape[:-1], length, width)

        for run in self.runs:
            found = run.observe(
                layers(run.first - 1, run.length),
                layers(run.first, run.length),
                self.first_prediction if run.first == 1 else None,
            )
            errors.append(found[0].reshape(*found[0].shape[:-2], -1))
            energies.append(found[1])
        return (jnp.concatenate(errors, axis=-1),), jnp.concatenate(energies, axis=-1)

    def target_of(self, run: Run) -> Values | None:
        """What the output is clamped to, for the run of its prediction; `None` for others."""
        return self.output if run.first == len(self.widths) - 1 else None

    def free_energy(self, state: State) -> Float[Array, "*batch"]:
        """Compute the free energy F of each sample."""
        return jnp.sum(self.observe(0.0, state)[1], axis=-1)

    def gradient(self, state: State) -> State:
        """Compute ∂F/∂x of all free units."""
        return jax.grad(lambda x: jnp.sum(self.free_energy(x)))(state)

    def norms(self, state: State) -> Array:
        """The Euclidean norm of each free layer, per sample."""
        return _norms(state[0], self.free_widths)

    def error_norms(self, errors: Activities) -> Array:
        """The Euclidean norm of ε_1 … ε_L, per sample."""
        return _norms(errors[0], self.widths[1:])


def stacked(problem: Flow, state: State | None = None) -> Flow:
    """The same problem as a `StackedProblem` if it is deep; otherwise the problem itself.

    `state` is for `InferenceProblem.with_prior_as_layer`.
    """
    if not (isinstance(problem, InferenceProblem) and problem.is_chain):
        return problem
    if problem.network.depth <= MOST_WRITTEN_OUT:
        return problem
    problem = problem.with_prior_as_layer(state)
    network, depth = problem.network, problem.network.depth
    # The first prediction is constant, and the output has a target: they stand alone.
    alone = {1 if problem.input is not None else 0, depth if problem.output is not None else 0}
    each = list(enumerate(zip(network.layers, problem.energy, strict=True), start=1))

    def kind(item: tuple[int, tuple[Layer, Energy]]) -> tuple[object, ...]:
        index, parts = item
        return (index if index in alone else 0), structure_of(parts)

    runs = [list(run) for _, run in itertools.groupby(each, kind)]
    taus = problem.state_time_constants
    xp = host_namespace(taus)
    repeated = [xp.broadcast_to(xp.asarray(tau), (network.widths[index],))
                for index, tau in zip(problem.free_layers, taus, strict=True)]  # fmt: skip
    return StackedProblem(
        runs=tuple(_run(run) for run in runs),
        input=problem.input,
        output=problem.output,
        time_constants=xp.concatenate(repeated),
        widths=network.widths,
        free=problem.free_layers,
    )


def _run(numbered: list[tuple[int, tuple[Layer, Energy]]]) -> Run:
    """Consecutive predictions, each with its index, its layer and its energy, as one run."""
    layer, energy = stack([parts for _, parts in numbered])
    return Run(layer, energy, numbered[0][0], len(numbered))


def _norms(x: Values, widths: tuple[int, ...]) -> Array:
    start, norms = 0, []
    for width, group in itertools.groupby(widths):
        length = len(list(group))
        part = x[..., start : start + length * width]
        norms.append(jnp.linalg.norm(part.reshape(*x.shape[:-1], length, width), axis=-1))
        start += length * width
    return jnp.concatenate(norms, axis=-1)


def _split(x: Values, widths: tuple[int, ...]) -> State:
    ends = np.cumsum(widths)
    return tuple(x[..., end - width : end] for width, end in zip(widths, ends, strict=True))
