"""`stability`: the time scales of a flow, and which steps and integrators suit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import check_instance
from pcdyn._support.namespaces import array_namespace
from pcdyn._support.types import Activities, Numbers, State, Values
from pcdyn.analysis.time_scales import Stability
from pcdyn.equilibria.equilibrium import Equilibrium, equilibrium
from pcdyn.errors import (
    EquilibriumStatus,
    InputError,
    NotConvergedError,
    ShapeError,
    SpectrumError,
)
from pcdyn.integrators.run import on_host
from pcdyn.linearisation.spectrum import (
    MOST_DENSE_UNITS,
    Spectrum,
    extreme_spectrum,
    flow_spectrum,
    full_spectrum,
)
from pcdyn.model.flow import Flow, check_contract, check_flow
from pcdyn.model.problem import InferenceProblem
from pcdyn.simulation.trajectory import Trajectory


def stability(
    problem: Flow,
    *,
    at: str | Equilibrium | Trajectory | Sequence[Numbers] = "equilibrium",
) -> Stability:
    """Compute the spectrum of the flow linearised at a state: time scales, stable steps, stiffness.

    Up to 600 free units all rates are computed; above, Lanczos iterations on the block-tridiagonal
    Hessian give the extreme ones only, and `complete` is false.

    Another flow is linearised by automatic differentiation as a whole, all samples together, at a
    state or a trajectory's end; a field that depends on time at the time there, 0 at a given state.

    **Arguments:**

    - `problem`: with any clamps, precisions and time constants, one sample or a batch; or another
      `pcdyn.Flow`.
    - `at`: `"equilibrium"` (found by `pcdyn.equilibrium`), `"feedforward"`, `"zeros"`, a state, an
      `Equilibrium`, or a `Trajectory`, whose last state is taken.

    **Raises:**

    - `NotConvergedError` where no equilibrium is found.
    - `InputError` for what another flow does not have: an equilibrium to be found, more than 600
      units, JAX transformations.
    - `SpectrumError` where Lanczos iterations fail or the Jacobian is not finite.
    - What a state or a trajectory raises that does not fit the problem.
    """
    check_flow(problem)
    if not isinstance(problem, InferenceProblem):
        return _of_flow(problem, at)
    if isinstance(at, str) and at == "equilibrium":
        at = equilibrium(problem)
    if isinstance(at, Equilibrium):
        return _at_equilibrium(problem, at)
    if isinstance(at, Trajectory):
        state = _states(problem, at, at.final)
        where = "the end of a trajectory"
    else:
        state = problem.initial_state(at)
        where = f"the {at} state" if isinstance(at, str) else "the given state"
    return _build(problem, state, at=where)


def stability_along(problem: Flow, trajectory: Trajectory) -> Stability:
    """Compute `stability` at every saved time of a trajectory, time on the first axis.

    Raises as `stability` does.
    """
    check_flow(problem)
    check_instance(trajectory, "trajectory", Trajectory, "a pcdyn.Trajectory")
    rows = [tuple(x[i] for x in trajectory.activities) for i in range(len(trajectory.times))]
    if not rows:
        raise InputError(f"the trajectory has no saved times: {trajectory.message}")
    states = [_states(problem, trajectory, activities) for activities in rows]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    where = "all times of a trajectory"
    if not isinstance(problem, InferenceProblem):
        found = _linearised(problem, trajectory.times, stacked, where)
        return dataclasses.replace(found, times=trajectory.times)
    return _build(problem, stacked, at=where, times=trajectory.times)


def _of_flow(flow: Flow, at: str | Equilibrium | Trajectory | Sequence[Numbers]) -> Stability:
    """`stability` of a flow that is none of inference."""
    name = type(flow).__name__
    if isinstance(at, Equilibrium) or (isinstance(at, str) and at == "equilibrium"):
        raise InputError(
            f"only inference has a solver for its equilibrium: give a state of the {name} as at=…, "
            'such as where pcdyn.simulate(…, until="equilibrium") has ended'
        )
    if isinstance(at, Trajectory):
        state, times, where = _states(flow, at, at.final), at.times[-1:], "the end of a trajectory"
    else:
        state, times = flow.initial_state(at), np.zeros(1)
        where = f"the {at} state" if isinstance(at, str) else "the given state"
    states = jax.tree.map(lambda x: x[None], state)
    return jax.tree.map(lambda x: x[0], _linearised(flow, times, states, where))


def _linearised(flow: Flow, times: Values | np.ndarray, states: State, where: str) -> Stability:
    """`Stability` of any flow at several times and states."""
    name, units = type(flow).__name__, sum(x[0].size for x in states)
    if is_traced(flow, states):
        raise InputError(f"the rates of a {name} come from the host, which JAX cannot transform")
    check_contract(flow, jax.tree.map(lambda x: x[0], states))
    if units > MOST_DENSE_UNITS:
        raise InputError(
            f"the {name} moves {units} units, but all rates are known only up to {MOST_DENSE_UNITS}"
        )
    try:
        found = flow_spectrum(flow, np.asarray(times, flow.dtype), states)
    except SpectrumError as error:
        raise SpectrumError(f"{error}, at {where}") from error
    return Stability(
        found.rates, found.slowest_mode, found.fastest_mode,
        cast(Values, np.zeros(len(found.rates), bool)),
        units=units, free_layers=tuple(range(len(states))), at=where,
    )  # fmt: skip


def _states(problem: Flow, trajectory: Trajectory, activities: Activities) -> State:
    """The free layers of `activities`, checked against the problem."""
    if trajectory.moving:
        raise InputError(
            f"besides activities {' and '.join(trajectory.moving)} moved along this trajectory: "
            "give a state, at=(…, …)"
        )
    if trajectory.free_layers != problem.free_layers:
        raise ShapeError(
            f"the free layers of the trajectory are {trajectory.free_layers}, those of the problem "
            f"{problem.free_layers}"
        )
    state = problem.initial_state(problem.state_of(activities))
    layers = problem.activities(state)
    if len(layers) != len(activities):
        raise ShapeError(f"the trajectory has {len(activities)} layers, the problem {len(layers)}")
    if not is_traced(problem, activities):
        for index, (ours, theirs) in enumerate(zip(layers, activities, strict=True)):
            if not np.array_equal(np.asarray(ours), np.asarray(theirs)):
                raise InputError(
                    f"the trajectory was clamped to other data in layer {index} than the problem"
                )
    return state


def _at_equilibrium(problem: InferenceProblem, found: Equilibrium) -> Stability:
    codes = found.status_codes
    if not is_traced(codes) and not found.ok:
        raise NotConvergedError(
            f"there is no equilibrium at which to linearise: {found.message}", found
        )
    state = problem.initial_state(tuple(found.state))
    at_kink = codes == EquilibriumStatus.SLIDING
    return _build(problem, state, at="equilibrium", at_kink=at_kink)


def _build(
    problem: InferenceProblem,
    state: State,
    *,
    at: str,
    times: Values | None = None,
    at_kink: Values | None = None,
) -> Stability:
    leading, units = state[0].shape[:-1], sum(x.shape[-1] for x in state)
    traced = is_traced(problem, state)
    if traced and units > MOST_DENSE_UNITS:
        raise InputError(
            f"{units} free units need Lanczos iterations on the host, which JAX cannot transform"
        )
    spectrum = _spectrum(problem, state, units)
    spectrum = jax.tree.map(lambda x: x.reshape(*leading, x.shape[-1]), spectrum)
    spectrum = spectrum if traced else on_host(spectrum)
    xp = array_namespace(spectrum.rates)
    kink = xp.broadcast_to(xp.asarray(False if at_kink is None else at_kink), leading)
    hidden = jax.tree.map(lambda x: xp.where(kink[..., None], xp.nan, x), spectrum)
    return Stability(
        hidden.rates, hidden.slowest_mode, hidden.fastest_mode, kink, times,
        units=units, complete=units <= MOST_DENSE_UNITS, free_layers=problem.free_layers, at=at,
    )  # fmt: skip


def _spectrum(problem: InferenceProblem, state: State, units: int) -> Spectrum:
    """The spectrum of every state, in rows."""
    leading = state[0].shape[:-1]

    def row(x: Values) -> Values:
        return jnp.broadcast_to(x, (*leading, x.shape[-1])).reshape(-1, x.shape[-1])

    data, states = jax.tree.map(row, (problem.data, state))
    rows = problem.with_data(*data)
    if units <= MOST_DENSE_UNITS:
        return full_spectrum(rows, states)
    found = []
    for i in range(len(states[0])):
        one = jax.tree.map(lambda x, i=i: x[i], states)
        found.append(extreme_spectrum(rows.sample(i), one))
    return jax.tree.map(lambda *x: np.stack(x), *found)
