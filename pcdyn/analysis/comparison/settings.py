"""Integrators at each of several tolerances or steps."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from numpy.typing import DTypeLike

from pcdyn._support.checks import as_sequence, check_instance
from pcdyn.errors import IntegratorError, StepSizeWarning
from pcdyn.integrators import Diffrax, Euler, Exact, Integrator, get_integrator
from pcdyn.integrators.base import check_step, check_tolerances
from pcdyn.model.flow import Flow

# As the defaults of pcdyn.Diffrax in float64: rtol 1e-6 and atol 1e-9.
ATOL_PER_RTOL = 1e-3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One integrator at one setting: `setting` is "rtol", "dt" or empty, `value` its number."""

    label: str
    setting: str
    value: float
    integrator: Integrator


@contextlib.contextmanager
def unstable_steps_expected() -> Iterator[None]:
    """Silence `StepSizeWarning`: the result says which steps are too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StepSizeWarning)
        yield


def with_tolerance(integrator: Integrator, rtol: float) -> Integrator:
    """Give an adaptive integrator this `rtol`, and a thousandth of it as `atol`."""
    check_tolerances(integrator.name, rtol, None)
    changes: dict[str, Any] = {"rtol": float(rtol), "atol": ATOL_PER_RTOL * rtol}
    return dataclasses.replace(integrator, **changes)


def with_step(integrator: str | Integrator, dt: float) -> Integrator:
    """Give a method this fixed step; a diffrax solver of variable step, or a name, takes one too.

    Raises `IntegratorError` for methods without a fixed step, and for a step that is not positive.
    """
    is_euler = isinstance(integrator, str) and integrator == "euler"
    method = Euler(dt=1.0) if is_euler else get_integrator(integrator)
    check_step(method.name, dt)
    changes: dict[str, Any] = {"dt": float(dt)}
    if isinstance(method, Diffrax):
        if method.controller is not None:
            raise IntegratorError(f"{method.name} has a step size controller, not a fixed step")
        changes |= {"rtol": None, "atol": None}
    elif method.fixed_step is None:
        raise IntegratorError(f"{method.name} has no fixed step")
    return dataclasses.replace(method, **changes)


def labelled(
    integrators: Sequence[str | Integrator] | Mapping[str, str | Integrator],
) -> dict[str, str | Integrator]:
    """Collect integrators by the names that tables give them.

    Raises `IntegratorError` for two of one name, for what is none, and for none at all.
    """
    if isinstance(integrators, Mapping):
        chosen = dict(integrators)
    elif isinstance(integrators, str | Integrator):
        raise IntegratorError('give a list of integrators, such as ["tsit5", "lsoda"]')
    else:
        chosen = {}
        wanted = "a list of integrators, or a dictionary of names and integrators"
        for integrator in as_sequence(integrators, "integrators", wanted, error=IntegratorError):
            is_euler = isinstance(integrator, str) and integrator == "euler"
            label = "euler" if is_euler else get_integrator(integrator).name
            if label in chosen:
                raise IntegratorError(
                    f"two integrators are called {label!r}: give a dictionary of names and "
                    "integrators instead of a list"
                )
            chosen[label] = integrator
    for label, integrator in chosen.items():
        check_instance(label, "each name of integrators", str, "a text", error=IntegratorError)
        if not (isinstance(integrator, str) and integrator == "euler"):
            get_integrator(integrator)  # refuses what is none
    if not chosen:
        raise IntegratorError("there is no integrator to compare")
    return chosen


def candidates(
    label: str,
    integrator: str | Integrator,
    problem: Flow,
    tolerances: Sequence[float] | None,
    steps: Sequence[float] | None,
) -> list[Candidate]:
    """Set the integrator to each of `tolerances` if it adapts its step, of `steps` if it does not.

    Without them a value runs once with the numbers that it carries, and a name at decades of
    tolerances; a fixed-step method without any number raises `IntegratorError`. The fallback of
    diffrax is switched off: a candidate is of the method that it names.
    """
    if isinstance(integrator, str) and integrator == "euler":
        return _at_steps(label, integrator, steps)
    method = get_integrator(integrator)
    if isinstance(method, Diffrax):
        method = dataclasses.replace(method, fallback=None)
    if isinstance(method, Exact) or (isinstance(method, Diffrax) and method.controller is not None):
        return [Candidate(label, "", float("nan"), method)]
    if method.fixed_step is not None and steps is None:
        return [Candidate(label, "dt", float(method.fixed_step), method)]
    if method.fixed_step is not None or not _adapts(method):
        return _at_steps(label, method, steps)
    given: Any = dataclasses.replace(method)
    if tolerances is None and given.rtol is not None:
        return [Candidate(label, "rtol", float(given.rtol), method)]
    each = decades_of_rtol(problem.dtype) if tolerances is None else tolerances
    return [Candidate(label, "rtol", float(r), with_tolerance(method, r)) for r in each]


def decades_of_rtol(dtype: DTypeLike) -> tuple[float, ...]:
    """List the decades of rtol that the dtype can resolve with room to spare."""
    last = 9 if dtype == jnp.float64 else 5
    return tuple(10.0**-k for k in range(2, last + 1))


def _adapts(method: Integrator) -> bool:
    """Whether a method without a fixed step can choose one."""
    import diffrax

    solver = method.solver if isinstance(method, Diffrax) else None
    if isinstance(solver, str):
        return solver not in ("euler", "implicit_euler")
    return solver is None or isinstance(solver, diffrax.AbstractAdaptiveSolver)


def _at_steps(
    label: str, integrator: str | Integrator, steps: Sequence[float] | None
) -> list[Candidate]:
    if steps is None:
        raise IntegratorError(
            f"{label} has a fixed step and none is given: use steps=[…], in units of the activity "
            "time constant"
        )
    return [Candidate(label, "dt", float(dt), with_step(integrator, dt)) for dt in steps]
