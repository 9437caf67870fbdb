"""Inference while what is clamped, precisions or time constants change in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import check_instance, checked_number
from pcdyn._support.types import Activities, Numbers, Scalar, State, Values
from pcdyn.errors import InputError, TimesError
from pcdyn.model.clamps import Clamp, Partial
from pcdyn.model.energies.energy import Energy, in_dtype
from pcdyn.model.flow import FlowOfProblem, SampledFlow
from pcdyn.model.graph import Graph
from pcdyn.model.named import index_of
from pcdyn.model.network import Network
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem
from pcdyn.model.signals import BaseSignal, holds_signal

_Given = Numbers | Partial | BaseSignal
_CHANGING = ("input", "output", "clamp", "energy", "time_constants")


class _EnergyOf(eqx.Module):
    """The energy of one prediction from a signal, of one energy for `count` of them."""

    signal: BaseSignal
    place: int = eqx.field(static=True)
    count: int = eqx.field(static=True)

    def __call__(self, t: Scalar) -> Energy:
        energy = self.signal(t)
        check_instance(energy, "the value of a signal for an energy", Energy, "a pcdyn.Energy")
        return energy.per_prediction(self.count)[self.place]


class DrivenProblem(SampledFlow, FlowOfProblem):
    """Inference while its data, precisions or time constants change: `τ dx/dt = −∂F(t, x)/∂x`.

    It takes what `pcdyn.InferenceProblem` takes, of which any clamped value, energy or time
    constant may be a signal: `pcdyn.PiecewiseConstant`, `pcdyn.PiecewiseLinear`,
    `pcdyn.Interpolated` or `pcdyn.Signal`. `pcdyn.simulate` steps exactly onto their jumps, and
    activities in between are as exact as without; at a jump a clamped layer has the value after it.
    `at(t)` is the problem of one moment, for all that asks for one that does not change; the
    attribute `problem` is that of t = 0.

    **Arguments:**

    - `network`, `input`, `output`, `clamp`, `energy`, `prior`, `time_constants`: as for
      `pcdyn.InferenceProblem`. `energy` is a signal of one energy for all predictions, or a list in
      which each may be one. Whatever its values at other times, a signal keeps the shape that it
      has at t = 0.

    **Raises:**

    - As `pcdyn.InferenceProblem` does of the problem at t = 0.
    - `InputError` if nothing changes in time.
    """

    problem: InferenceProblem
    data: tuple[Any, ...]
    energies: tuple[Any, ...]
    time_constants: tuple[Any, ...]

    def __init__(
        self,
        network: Network | Graph,
        *,
        input: Numbers | BaseSignal | None = None,
        output: Numbers | BaseSignal | None = None,
        clamp: Mapping[Any, _Given] | None = None,
        energy: Energy | BaseSignal | Sequence[Energy | BaseSignal] | None = None,
        prior: Prior | None = None,
        time_constants: Sequence[Numbers | BaseSignal]
        | Mapping[str, Numbers | BaseSignal]
        | None = None,
    ):
        given = (input, output, clamp, energy, time_constants)
        if not holds_signal(*given):
            raise InputError("nothing changes in time: this is a pcdyn.InferenceProblem")
        first = dict(zip(_CHANGING, map(_at_start, given), strict=True))
        self.problem = start = InferenceProblem(network, prior=prior, **first)
        places = _by_place(start, clamp, {"input": input, "output": output})
        self.data = tuple(_put(old, new) for old, new in zip(start.data, places, strict=True))
        self.energies = _energies(start, network, energy)
        taus = _constants(start, time_constants)
        each = zip(start.time_constants, taus, strict=True)
        self.time_constants = tuple(_put(old, new) for old, new in each)

    def at(self, t: Scalar) -> InferenceProblem:
        """Return the problem of time t, which does not change.

        **Raises:**

        - `TimesError` for a time before 0 or after the end of a signal.
        - What `pcdyn.InferenceProblem` raises, for values of signals at that time.
        """
        if not is_traced(t):
            checked_number(t, "t", at_least=0, at_most=self.end, error=TimesError)
        problem, dtype = self.problem, self.dtype
        time = jnp.asarray(t, dtype)

        def now(value: Any) -> Any:  # noqa: ANN401
            return value(time) if isinstance(value, BaseSignal | _EnergyOf) else value

        if any(map(_is_signal, self.data)):
            problem = problem.with_data(*map(now, self.data))
        energies = in_dtype(tuple(map(now, self.energies)), dtype)
        taus = tuple(jnp.asarray(now(x), dtype) for x in self.time_constants)
        return eqx.tree_at(lambda p: (p.energy, p.time_constants), problem, (energies, taus))

    @property
    def signals(self) -> tuple[BaseSignal, ...]:
        """All that changes in time."""
        parts = (self.data, self.energies, self.time_constants)
        return tuple(filter(_is_signal, jax.tree.leaves(parts, is_leaf=_is_signal)))

    @property
    def jumps(self) -> tuple[float, ...]:
        """Times at which anything jumps, in order."""
        return tuple(sorted({t for signal in self.signals for t in signal.jumps}))

    @property
    def end(self) -> float:
        """Time at which the first of its signals ends."""
        return min(signal.end for signal in self.signals)

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether data change along straight lines between jumps, and all else at jumps only."""
        others = [x.signal for x in self.energies if isinstance(x, _EnergyOf)]
        others += filter(_is_signal, self.time_constants)
        moving = filter(_is_signal, self.data)
        return all(x.degree in (0, 1) for x in moving) and all(x.degree == 0 for x in others)

    @property
    def has_constant_rates(self) -> bool:
        """Whether no time constant changes between jumps."""
        return all(x.degree == 0 for x in filter(_is_signal, self.time_constants))

    def edges(self, t1: float) -> tuple[float, ...]:
        """Times from 0 to t1 between which nothing jumps.

        **Raises:**

        - `TimesError` for a signal that ends before.
        """
        if self.end < t1:
            raise TimesError(
                f"a signal ends at {self.end:g}, before t1={t1:g}: give it values up to there, or "
                "stop earlier"
            )
        return (0.0, *(t for t in self.jumps if 0 < t < t1), t1)

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return the state to start from, as the problem at t = 0 does."""
        return self.problem.initial_state(initial)

    def vector_field(self, t: Scalar, state: State) -> State:
        """Compute dx/dt = −(1/τ) ∂F/∂x at time t, shaped like `state`."""
        return self.at(t).vector_field(t, state)

    def observe(self, t: Scalar, state: State) -> tuple[Activities, Array]:
        """Compute the prediction errors and the energies at a state at time t."""
        return self.at(t).observe(t, state)

    def activities(self, state: State) -> Activities:
        """Return all layers at a state, clamped ones as they are at t = 0."""
        return self.problem.activities(state)

    def activities_along(self, times: Values, states: State) -> Activities:
        """Return all layers at several times, the time on the first axis."""
        found = _activities_along(self, jnp.asarray(times, self.dtype), states)
        return found if is_traced(found) else jax.tree.map(np.asarray, found)

    def sample(self, index: ArrayLike) -> DrivenProblem:
        """Take one sample of a batch (an index), or several (an array of indices)."""
        start = self.problem.sample(index)
        signals = [x.sample(index) if _is_signal(x) else None for x in self.data]
        data = tuple(_put(old, new) for old, new in zip(start.data, signals, strict=True))
        return eqx.tree_at(lambda p: (p.problem, p.data), self, (start, data))


class Interval(SampledFlow, FlowOfProblem):
    """A driven problem between two jumps, with its time counted from the first of them.

    Short of the second it has the values before that, whatever the round-off of a time.
    """

    problem: DrivenProblem
    begin: Scalar
    end: Scalar

    def at(self, t: Scalar) -> InferenceProblem:
        """Return the problem of time t after the beginning."""
        dtype = self.dtype
        begin, end = (jnp.asarray(x, dtype) for x in (self.begin, self.end))
        return self.problem.at(
            jnp.clip(begin + jnp.asarray(t, dtype), begin, jnp.nextafter(end, begin))
        )

    def initial_state(self, initial: str | Sequence[Numbers] = "feedforward") -> State:
        """Return the state to start from, as the problem at t = 0 does."""
        return self.problem.initial_state(initial)

    def vector_field(self, t: Scalar, state: State) -> State:
        """Compute dx/dt at time t after the beginning."""
        return self.at(t).vector_field(t, state)

    def activities(self, state: State) -> Activities:
        """Return all layers at a state, clamped ones as at the beginning of the run."""
        return self.problem.activities(state)

    def sample(self, index: ArrayLike) -> Interval:
        """Take one sample of a batch, or several."""
        return Interval(self.problem.sample(index), self.begin, self.end)


@eqx.filter_jit
def _activities_along(problem: DrivenProblem, times: Array, states: State) -> Activities:
    return jax.vmap(lambda t, state: problem.at(t).activities(state))(times, states)


def _at_start(given: Any) -> Any:  # noqa: ANN401
    """What was given, with signals as they are at t = 0."""
    if _is_signal(given):
        return given(0.0)
    if not holds_signal(given):
        return given
    if isinstance(given, Mapping):
        return {name: _at_start(value) for name, value in given.items()}
    return [_at_start(value) for value in given]


def _is_signal(value: object) -> bool:
    return isinstance(value, BaseSignal)


def _put(old: Clamp, new: object) -> Any:  # noqa: ANN401
    """A signal where there is one, otherwise what the problem at t = 0 has."""
    return new if _is_signal(new) else old


def _by_place(
    start: InferenceProblem, clamp: Mapping[Any, Any] | None, ends: Mapping[str, Any]
) -> list[Any]:
    """What was given for each of `start.data`."""
    nodes = start.graph.nodes
    found: list[Any] = [None] * len(start.widths)
    found[0], found[-1] = ends["input"], ends["output"]
    for name, value in (clamp or {}).items():
        found[index_of(name, nodes) if isinstance(name, str) and nodes else int(name)] = value
    return [found[0], found[-1]] if start.is_chain else found


def _constants(start: InferenceProblem, given: Any) -> list[Any]:  # noqa: ANN401
    """The time constants given for each layer or node."""
    if isinstance(given, Mapping) and start.graph.nodes is not None:
        return [given.get(name) for name in start.graph.nodes]
    return [None] * len(start.widths) if given is None else list(given)


def _energies(
    start: InferenceProblem,
    network: Network | Graph,
    given: Any,  # noqa: ANN401
) -> tuple[Any, ...]:
    """For each energy of the problem at t = 0 that, or the signal that it comes from."""
    found: list[Any] = list(start.energy)
    count = network.depth if isinstance(network, Network) else len(network.predictions)
    several = isinstance(given, list | tuple)
    for place in range(count):
        signal = given[place] if several else given
        if not _is_signal(signal):
            continue
        index = place + len(found) - count
        if isinstance(network, Graph):
            if network.predictions[place].energy is not None:
                continue
            if start.is_chain and not network.sources[place]:
                raise InputError(
                    f"the energy of the prior on {network.nodes[0]!r} cannot change in time"
                )
            if start.is_chain:
                index = sum(bool(x) for x in network.sources[:place])
        one = (0, 1) if several else (place, count)
        found[index] = _EnergyOf(signal, *one)
    return tuple(found)
