"""First-order methods: as the field runs inference, and Nesterov's in error coordinates."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from pcdyn._support.checks import flag, integer, number, optional
from pcdyn._support.states import all_finite, choose, dot, largest_norm, step
from pcdyn._support.types import Scalar, State
from pcdyn.equilibria.solvers.base import Solution, Solver, final_status, solve_each
from pcdyn.equilibria.solvers.error_coordinates import (
    ErrorCoordinates,
    Stacked,
    error_coordinates,
)
from pcdyn.equilibria.solvers.gauss_newton import (
    check_curvature,
    check_error_coordinates,
    curvatures,
)
from pcdyn.errors import EquilibriumStatus, InputError
from pcdyn.model.problem import InferenceProblem

# The next state, from the problem of one sample, its state and ∂F/∂x there.
_Update = Callable[[InferenceProblem, State, State], State]
# A state, ∂F/∂x there, and how many updates led to it.
_Carry = tuple[State, State, Array]


class GradientDescent(Solver):
    """The paper's update `x ← x − dt · ∂F/∂x`, explicit Euler on the flow, until it rests.

    **Arguments:**

    - `dt`: the step, in units of the activity time constant; below 2 / the largest eigenvalue of
      the Hessian.
    - `max_iterations`: updates after which it gives up.
    """

    dt: Scalar = eqx.field(converter=number("GradientDescent: dt", above=0))
    max_iterations: int = eqx.field(
        default=10_000, converter=integer("GradientDescent: max_iterations", at_least=1)
    )

    @property
    def name(self) -> str:
        return "gradient_descent"

    def check(self, problem: InferenceProblem) -> None:
        """Take every problem."""

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        def update(_: InferenceProblem, state: State, slope: State) -> State:
            return step(state, -jnp.asarray(self.dt, problem.dtype), slope)

        return solve_each(
            lambda p, x, goal: _iterate(p, x, goal, update, self.max_iterations),
            problem, state, tolerance,
        )  # fmt: skip


class FixedPoint(Solver):
    """The authors' fixed-point iteration `x_l ← μ_l + Π_l⁻¹ (∂μ_{l+1}/∂x_l)ᵀ Π_{l+1} ε_{l+1}`.

    All layers at once. It is gradient descent with the step Π_l⁻¹, which for energies that are not
    Gaussian is the inverse of their curvature at the errors. It converges only where every
    eigenvalue of Π⁻¹H is below 2, H being the Hessian at the equilibrium; otherwise it runs away
    and says so.

    **Arguments:**

    - `max_iterations`: updates after which it gives up.
    """

    max_iterations: int = eqx.field(
        default=10_000, converter=integer("FixedPoint: max_iterations", at_least=1)
    )

    @property
    def name(self) -> str:
        return "fixed_point"

    def check(self, problem: InferenceProblem) -> None:
        check_curvature(self.name, problem, of_output=problem.output is None)
        if problem.input is None and problem.prior is None:
            raise InputError(
                "fixed_point needs a clamped input, or a prior on a free one: x_0 has no "
                "prediction to go to"
            )

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        def update(problem: InferenceProblem, state: State, slope: State) -> State:
            precisions = curvatures(problem, state)
            return tuple(
                x - precisions[index - 1].unweigh(g)
                for index, x, g in zip(problem.free_layers, state, slope, strict=True)
            )

        return solve_each(
            lambda p, x, goal: _iterate(p, x, goal, update, self.max_iterations),
            problem, state, tolerance,
        )  # fmt: skip


def _iterate(
    problem: InferenceProblem,
    state: State,
    tolerance: Scalar,
    update: _Update,
    max_iterations: Scalar,
) -> Solution:
    """Repeat an update of the activities until their gradient is small."""

    def proceed(carry: _Carry) -> Array:
        _, slope, iterations = carry
        resting = largest_norm(slope) <= tolerance
        return ~resting & (iterations < max_iterations) & all_finite(slope)

    def body(carry: _Carry) -> _Carry:
        state, slope, iterations = carry
        state = update(problem, state, slope)
        return state, problem.gradient(state), iterations + 1

    start = (state, problem.gradient(state), jnp.asarray(0))
    state, slope, iterations = jax.lax.while_loop(proceed, body, start)
    converged = largest_norm(slope) <= tolerance
    status = final_status(converged, all_finite(slope), EquilibriumStatus.ITERATION_LIMIT)
    return Solution(state, status, iterations, 2 * (iterations + 1))


_RUNNING = int(EquilibriumStatus.ITERATION_LIMIT)
_PATIENCE = 50
_STALLED = int(EquilibriumStatus.STALLED)


class _Descent(eqx.Module):
    """What is carried from iteration to iteration, per sample.

    `ahead` is `errors` moved on by momentum, and where F is looked at; `best` is where it was
    lowest, `stale` counts iterations since.
    """

    errors: Stacked
    ahead: Stacked
    best: Stacked
    lowest: Array
    stale: Array
    rate: Array
    status: Array
    iterations: Array


class ErrorDescent(Solver):
    """Gradient descent in error coordinates (ePC), preconditioned by precisions or curvatures.

    The signal of an output error reaches every layer in one pass, where in the activities it
    travels one layer per step. The model's Hessian `1 + Π⁻½ Jᵀ Π_L J Π⁻½` has no eigenvalue below
    1. A rate at which F grows, or does not fall for long, is halved.

    **Arguments:**

    - `nesterov`: add momentum, dropped where it points uphill; it then takes about √κ instead of κ
      iterations.
    - `rate`: the step; unless given 1 / the largest eigenvalue, which is estimated.
    - `power_iterations`: products that estimate it.
    - `max_iterations`: steps after which it gives up, for each sample.
    """

    nesterov: bool = eqx.field(static=True, default=True, converter=flag("ErrorDescent: nesterov"))
    rate: Scalar | None = eqx.field(
        default=None, converter=optional(number("ErrorDescent: rate", above=0))
    )
    power_iterations: int = eqx.field(
        static=True, default=6, converter=integer("ErrorDescent: power_iterations", at_least=1)
    )
    max_iterations: int = eqx.field(
        default=5_000, converter=integer("ErrorDescent: max_iterations", at_least=1)
    )

    @property
    def name(self) -> str:
        return "nesterov" if self.nesterov else "error_descent"

    def check(self, problem: InferenceProblem) -> None:
        check_error_coordinates(self.name, problem)

    def solve(self, problem: InferenceProblem, state: State, tolerance: Scalar) -> Solution:
        coordinates, dtype = error_coordinates(problem), problem.dtype

        def runs(now: _Descent) -> Array:
            return (now.status == _RUNNING) & (now.iterations < self.max_iterations)

        def iterate(now: _Descent) -> _Descent:
            # One look serves the step from `ahead` and the check of convergence there.
            seen, running = coordinates.evaluate(now.ahead), runs(now)
            converged = seen.residual <= tolerance
            new = step(now.ahead, -now.rate, coordinates.apply_covariance(seen.slope, now.ahead))
            progress = jax.tree.map(jnp.subtract, new, now.errors)
            root = jnp.sqrt(now.rate)
            keeps = (dot(seen.slope, progress) <= 0) & self.nesterov
            momentum = jnp.where(keeps, (1 - root) / (1 + root), 0)
            lower: jax.Array = seen.energy < now.lowest
            best = choose(lower, now.ahead, now.best)
            stale: Array = jnp.where(lower, 0, now.stale + 1)
            grew = ~(seen.energy <= 2 * now.lowest)
            too_fast = grew | (stale > _PATIENCE)
            status = jnp.where(now.rate < jnp.finfo(dtype).eps, _STALLED, _RUNNING)
            status = jnp.where(converged, int(EquilibriumStatus.CONVERGED), status)
            # Near the end F is round-off: where it was lowest says little, unless it has grown.
            back = choose(grew, best, now.errors)
            errors = choose(converged, now.ahead, choose(too_fast, back, new))
            ahead = choose(too_fast, back, step(new, momentum, progress))
            return _Descent(
                errors=choose(running, errors, now.errors),
                ahead=choose(running, ahead, now.ahead),
                best=choose(running, best, now.best),
                lowest=jnp.where(lower, seen.energy, now.lowest),
                stale=jnp.where(too_fast, 0, stale),
                rate=jnp.where(too_fast & running, now.rate / 2, now.rate),
                status=jnp.where(running, status, now.status),
                iterations=now.iterations + running.astype(int),
            )

        start = coordinates.errors(state)
        batch = (len(coordinates.target),)
        rate = self._first_rate(coordinates, start) if self.rate is None else self.rate
        none = jnp.zeros(batch, int)
        first = _Descent(
            errors=start,
            ahead=start,
            best=start,
            lowest=jnp.full(batch, jnp.inf, dtype),
            stale=none,
            rate=jnp.broadcast_to(jnp.asarray(rate, dtype), batch),
            status=none + _RUNNING,
            iterations=none,
        )
        end = jax.lax.while_loop(lambda now: jnp.any(runs(now)), iterate, first)
        hidden, output_error = coordinates.activities(end.errors)
        state = coordinates.unstack(hidden)
        finite = jax.vmap(all_finite)((*state, output_error))
        status = jnp.where(finite, end.status, int(EquilibriumStatus.NON_FINITE))
        estimate = 0 if self.rate is not None else 1 + 2 * self.power_iterations
        return Solution(state, status, end.iterations, 4 * end.iterations + estimate)

    def _first_rate(self, coordinates: ErrorCoordinates, errors: Stacked) -> Array:
        """1 / the largest eigenvalue of the Gauss–Newton Hessian, by power iteration."""
        push, pull = coordinates.linearise(errors)
        curve = coordinates.output_curvature(coordinates.activities(errors)[1])

        def body(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            covector, _ = carry
            # Zero stays zero: the output does not move, and the rate is 1.
            size = jnp.linalg.norm(covector, axis=-1, keepdims=True)
            covector = covector / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
            image = curve(push(coordinates.apply_covariance(pull(covector), errors)))
            return image, jnp.linalg.norm(image, axis=-1)

        batch, width = coordinates.target.shape
        probe = jnp.cos(jnp.arange(1.0, width + 1, dtype=coordinates.target.dtype))
        start = (jnp.broadcast_to(probe, (batch, width)), jnp.zeros(batch, probe.dtype))
        _, largest = jax.lax.fori_loop(0, self.power_iterations, body, start)
        # Power iteration approaches from below.
        return 1 / (1 + 1.1 * largest)
