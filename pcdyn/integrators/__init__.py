"""Integrators are values under one contract: diffrax, SciPy, Euler and the exact solution."""

from __future__ import annotations

import functools

from pcdyn.errors import IntegratorError
from pcdyn.integrators.base import Integration, Integrator, UntilEquilibrium
from pcdyn.integrators.diffrax import DIFFRAX_NAMES, Diffrax
from pcdyn.integrators.euler import Euler
from pcdyn.integrators.exact import Exact
from pcdyn.integrators.noise import Langevin
from pcdyn.integrators.scipy import SCIPY_NAMES, SciPy
from pcdyn.integrators.statistics import Statistics
from pcdyn.integrators.stochastic import EulerMaruyama, StochasticHeun

__all__ = [
    "Diffrax",
    "Euler",
    "EulerMaruyama",
    "Exact",
    "Integration",
    "Integrator",
    "Langevin",
    "SciPy",
    "Statistics",
    "StochasticHeun",
    "UntilEquilibrium",
    "get_integrator",
]


def get_integrator(integrator: str | Integrator) -> Integrator:
    """Return the integrator of a name, or the given one itself.

    **Raises:**

    - `pcdyn.errors.IntegratorError` for an unknown name.
    """
    if isinstance(integrator, Integrator):
        return integrator
    if not isinstance(integrator, str):
        raise IntegratorError(
            f"{integrator!r} is no integrator; wrap a diffrax solver as pcdyn.Diffrax(solver)"
        )
    return _named(integrator)


@functools.cache
def _named(integrator: str) -> Integrator:
    if integrator == "exact":
        return Exact()
    if integrator in DIFFRAX_NAMES:
        return Diffrax(integrator)
    if integrator.lower() in SCIPY_NAMES:
        return SciPy(SCIPY_NAMES[integrator.lower()])
    if integrator == "euler":
        raise IntegratorError("Euler needs a step: pcdyn.Euler(dt=0.05)")
    if integrator in ("euler_maruyama", "stochastic_heun"):
        kind = EulerMaruyama if integrator == "euler_maruyama" else StochasticHeun
        raise IntegratorError(f"{kind.__name__} needs a step: pcdyn.{kind.__name__}(dt=0.01)")
    known = ", ".join([*DIFFRAX_NAMES, *SCIPY_NAMES, "exact", "euler"])
    raise IntegratorError(f"unknown integrator {integrator!r}; known names are {known}")
