"""How large a step a one-step method can take on decaying modes, from its Butcher tableau.

On `ẋ = −λx` a Runge–Kutta method multiplies x by R(−λ·dt) in each step, with the stability
function `R(z) = 1 + z bᵀ(1 − zA)⁻¹𝟙` (Hairer & Wanner, Solving ODEs II, IV.2–3). The Jacobian of
a gradient flow has a real spectrum, so that only the real axis matters; other flows have complex
rates, each a ray in the complex plane.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import TYPE_CHECKING

import numpy as np

from pcdyn.errors import InputError, IntegratorError
from pcdyn.integrators.base import Integrator
from pcdyn.integrators.diffrax import DIFFRAX_NAMES, Diffrax, solver_class
from pcdyn.integrators.euler import Euler
from pcdyn.integrators.stochastic import EulerMaruyama, StochasticHeun

if TYPE_CHECKING:
    import diffrax


def stability_interval(
    method: str | Integrator | diffrax.AbstractSolver, direction: float | complex = 1.0
) -> float:
    """Find the largest s with |R(−x)| ≤ 1 for all 0 ≤ x ≤ s.

    Steps up to s / fastest rate are stable. It is 2 for explicit Euler, and infinite for diffrax's
    implicit methods.

    **Arguments:**

    - `method`: a name, a diffrax solver, `pcdyn.Euler` or `pcdyn.Diffrax`.
    - `direction`: a complex number of size 1 and no negative real part. x is on the ray from 0
      through it, for a mode that oscillates as it decays: its rate is |rate| · direction.

    **Raises:**

    - `pcdyn.errors.IntegratorError` for a method that is not a Runge–Kutta method of diffrax:
      multistep, stochastic, splitting or unknown.
    - `pcdyn.errors.InputError` for what is no direction.
    """
    known = isinstance(direction, numbers.Complex) and not isinstance(direction, bool)
    if not (known and abs(abs(direction) - 1) < 1e-6 and direction.real >= 0):
        raise InputError(
            "direction must be a complex number of size 1 and no negative real part, got "
            f"{direction!r}"
        )
    interval = known_interval(method, direction)
    if interval is None:
        label = method if isinstance(method, str) else getattr(method, "name", None)
        label = type(method).__name__ if label is None else label
        raise IntegratorError(
            f"the largest stable step of {label!r} is not known: it follows from the Butcher "
            "tableau of a one-step Runge–Kutta method, such as "
            f"{', '.join(['euler', *DIFFRAX_NAMES])} or a diffrax solver with a tableau"
        )
    return interval


def known_interval(
    method: str | Integrator | diffrax.AbstractSolver, direction: float | complex = 1.0
) -> float | None:
    """Return `stability_interval`, or `None` where no stability function is known."""
    if isinstance(method, Euler):
        method = "euler"
    elif isinstance(method, EulerMaruyama | StochasticHeun):
        # The mean moves as without noise, and the variance stays bounded where the mean does.
        method = "euler" if isinstance(method, EulerMaruyama) else "heun"
    elif isinstance(method, Diffrax):
        method = method.solver
    elif isinstance(method, Integrator):
        return None
    solver = solver_class(method)
    return None if solver is None else _interval_of(solver, direction)


@functools.lru_cache(maxsize=2**10)
def _interval_of(solver: type[diffrax.AbstractSolver], direction: float | complex) -> float | None:
    from pcdyn.integrators.rosenbrock import Rodas5P

    if issubclass(solver, Rodas5P):
        return math.inf  # L-stable (Steinebach 2023)
    matrix_and_weights = _tableau(solver)
    return None if matrix_and_weights is None else _interval(*matrix_and_weights, direction)


def _tableau(solver: type[diffrax.AbstractSolver]) -> tuple[np.ndarray, np.ndarray] | None:
    """A and b of a diffrax solver."""
    import diffrax

    # diffrax writes these two without a tableau.
    if issubclass(solver, diffrax.Euler):
        return np.zeros((1, 1)), np.ones(1)
    if issubclass(solver, diffrax.ImplicitEuler):
        return np.ones((1, 1)), np.ones(1)
    tableau = getattr(solver, "tableau", None)
    if not isinstance(tableau, diffrax.ButcherTableau):
        return None
    matrix = np.zeros((tableau.num_stages, tableau.num_stages))
    for row, entries in enumerate(tableau.a_lower, start=1):
        matrix[row, :row] = entries
    if tableau.a_diagonal is not None:
        np.fill_diagonal(matrix, tableau.a_diagonal)
    return matrix, np.asarray(tableau.b_sol)


def _interval(matrix: np.ndarray, weights: np.ndarray, direction: float | complex) -> float:
    """Where |R(−x)| = |N(−x) / D(−x)| first exceeds 1, from roots of N ± D or |N|² − |D|²."""
    straight = np.imag(direction) == 0
    turned = (-1.0 if straight else -direction) ** np.arange(len(weights) + 1)
    parts = (np.polynomial.Polynomial(p * turned) for p in _stability_function(matrix, weights))
    numerator, denominator = parts
    if straight:
        differences, least = (numerator - denominator, numerator + denominator), 1e-7
    else:
        squares = [np.real(np.convolve(p.coef, np.conj(p.coef))) for p in (numerator, denominator)]
        # Both are 1 at x = 0: without that root, all that are positive count.
        differences, least = (np.polynomial.Polynomial((squares[0] - squares[1])[1:]),), 0.0
    crossings = [0.0]
    for difference in differences:
        roots = difference.trim().roots()
        real = np.abs(roots.imag) <= 1e-7 * np.abs(roots)
        crossings += [float(x) for x in roots.real[real] if x > least]
    crossings.sort()
    for left, right in zip(crossings, [*crossings[1:], 2 * crossings[-1] + 2], strict=True):
        between = (left + right) / 2
        # Where R only touches ±1, two roots a rounding error apart enclose no instability.
        if abs(numerator(between)) > (1 + 1e-9) * abs(denominator(between)):
            return left
    return math.inf


def _stability_function(matrix: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of N and D, R = N / D, by rising powers, for a lower triangular A."""
    stages = len(weights)
    denominator = np.poly(np.diagonal(matrix))
    series, sizes = np.ones(stages + 1), np.ones(stages + 1)
    power, power_size = np.ones(stages), np.ones(stages)
    for k in range(1, stages + 1):
        series[k], sizes[k] = weights @ power, np.abs(weights) @ power_size
        power, power_size = matrix @ power, np.abs(matrix) @ power_size
    numerator = np.convolve(denominator, series)[: stages + 1]
    rounding = np.convolve(np.abs(denominator), sizes)[: stages + 1]
    # A coefficient that is round-off would bend R far out on the axis.
    exact_zero = np.abs(numerator) <= 4 * stages * np.finfo(float).eps * rounding
    return np.where(exact_zero, 0, numerator), denominator
