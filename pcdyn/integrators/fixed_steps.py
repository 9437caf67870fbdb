"""What loops with a fixed step have in common, and which times are on its steps."""

from __future__ import annotations

from types import ModuleType

import equinox as eqx
import numpy as np

from pcdyn._support.checks import integer
from pcdyn._support.types import Scalar, Values
from pcdyn.integrators.base import Integrator, check_step

# A time counts as a multiple of dt up to round-off, of the ratio and, where they come in float32,
# of the times: relative to it, and at most so many steps.
_SLACK, _MOST_SLACK = 1e-6, 0.1


class FixedSteps(Integrator):
    """Base of methods that step by `dt`, written as plain loops.

    **Arguments:**

    - `dt`: the step, in units of the activity time constant.
    - `max_steps`: more steps are refused.
    """

    dt: Scalar
    max_steps: int = eqx.field(
        # float32 counts so far without an error in the division of times.
        static=True,
        default=2**20,
        converter=integer("max_steps", at_least=1, at_most=2**31 - 2),
    )

    def __check_init__(self) -> None:
        check_step(type(self).__name__, self.dt)

    @property
    def runs_in_jax(self) -> bool:
        return True

    @property
    def fixed_step(self) -> Scalar:
        return self.dt

    @property
    def most_steps(self) -> int:
        return self.max_steps


def nearest_steps(steps: Values | np.ndarray, xp: ModuleType = np) -> tuple[Values, Values]:
    """The whole numbers next to times over dt, and which of the times are on a step."""
    nearest = xp.round(steps)
    slack = xp.minimum(_SLACK * xp.maximum(nearest, 1), _MOST_SLACK)
    return nearest, xp.abs(steps - nearest) <= slack
