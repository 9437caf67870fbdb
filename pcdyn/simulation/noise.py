"""What of noise can be known before anything runs: who takes it, its key, and times on steps."""

from __future__ import annotations

import numpy as np
from jaxtyping import PRNGKeyArray

from pcdyn._support.checks import check_instance, check_key
from pcdyn.errors import InputError, IntegratorError, TimesError
from pcdyn.integrators import Integrator, Langevin, UntilEquilibrium
from pcdyn.integrators.base import check_step_count
from pcdyn.integrators.fixed_steps import nearest_steps
from pcdyn.model.flow import Flow
from pcdyn.model.problem import InferenceFlow

_TAKERS = (
    "pcdyn.EulerMaruyama(dt=…), pcdyn.StochasticHeun(dt=…) or, for a linear network, pcdyn.Exact()"
)


def check_noise(
    problem: Flow,
    method: Integrator,
    noise: Langevin | None,
    key: PRNGKeyArray | None,
    until: UntilEquilibrium | None,
    dense: bool,
) -> None:
    """Raise the named error where noise, its key, the integrator and options do not go together."""
    if noise is None:
        if method.needs_noise:
            raise IntegratorError(
                f"{type(method).__name__} is for noise, and there is none: give noise="
                "pcdyn.Langevin(temperature=…) and a key, or take an integrator without noise, "
                "such as pcdyn.Euler(dt=…)"
            )
        if key is not None:
            raise InputError(
                "key would be ignored: without noise nothing is drawn; give noise="
                "pcdyn.Langevin(temperature=…), or leave key out"
            )
        return
    check_instance(noise, "noise", Langevin, "a pcdyn.Langevin(temperature=…)")
    if not method.takes_noise:
        raise IntegratorError(f"{method.name} would ignore the noise: use {_TAKERS}")
    if not isinstance(problem, InferenceFlow):
        raise IntegratorError(
            f"noise is for inference, and {type(problem).__name__} is no pcdyn.InferenceProblem, "
            "whose free energy and time constants say how much there is: leave noise out"
        )
    if key is None:
        raise InputError("noise needs a random key to be drawn from: key=jax.random.key(seed)")
    check_key(key)
    if until is not None:
        raise IntegratorError(
            "until would wait for ever: with noise nothing comes to rest; leave until out, and see "
            "pcdyn.linear.moments or several t1 for when a law is stationary"
        )
    if dense:
        raise IntegratorError(
            "dense=True would draw a smooth line between the saved times of a path that is nowhere "
            "smooth: leave it out, and name the times that you need"
        )


def times_on_steps(times: np.ndarray, t1: float, method: Integrator, *, given: bool) -> np.ndarray:
    """The times at which a method that needs noise can save.

    Those that a user gave must be multiples of its step; others move to the nearest.
    """
    if not method.needs_noise or method.fixed_step is None:
        return times
    # Before steps are counted, for there can be more of them than any number tells.
    check_step_count(method, t1, None)
    dt = float(method.fixed_step)
    name = type(method).__name__
    _check_multiples(np.asarray([t1]), "t1", name, dt)
    if round(t1 / dt) < 1:
        raise TimesError(
            f"t1={t1:g} is before the first step of {name}: take a smaller dt than {dt:g}"
        )
    if given:
        _check_multiples(times, "times", name, dt)
        return times
    moved = np.unique(np.round(times / dt)) * dt
    # The last is t1, whatever the round-off of its product.
    moved[-1] = t1
    return moved


def _check_multiples(times: np.ndarray, what: str, name: str, dt: float) -> None:
    nearest, on_step = nearest_steps(times / dt)
    off = np.flatnonzero(~on_step)
    if off.size:
        first = off[0]
        where = what if what == "t1" else f"{what}[{first}]"
        other = max(nearest[first], what == "t1") * dt
        raise TimesError(
            f"{where} = {times[first]:g} lies between two steps of {name}, which draws noise for "
            f"whole steps of dt={dt:g}: take {other:g}, or a dt of which it is a "
            "multiple"
        )
