"""Every exception and status of pcdyn, each with its cause and its remedy.

Two kinds of failure are kept apart. What can be known before anything runs (a wrong shape, a
precision that is not SPD, times in reverse) is raised at once as an `InputError`. What is known
only while a solver runs (a diverging step, too many steps) is a `Status` of the trajectory, which
`pcdyn.simulate` raises as a `SimulationError` unless `throw=False`.
"""

from __future__ import annotations

import abc
import collections
import enum
import functools
import operator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pcdyn
    import pcdyn.learning

# Messages name so many samples one by one, and count them beyond.
MOST_SAMPLES_NAMED = 20


_Status = TypeVar("_Status", bound="_Outcome")
# Integers, and booleans in their place.
_Codes = TypeVar("_Codes")


class PcdynError(Exception):
    """Base of every exception that pcdyn raises on purpose."""


class InputError(PcdynError, ValueError):
    """What was asked cannot be computed; nothing has run."""


class ShapeError(InputError):
    """An array, a network or a state has the wrong shape."""


class GraphError(InputError):
    """A graph that does not hang together, or has not what was asked for: nodes, an order."""


class DtypeError(InputError, TypeError):
    """An array has a dtype that the computation cannot use, such as integers for activities."""


class NonFiniteError(InputError):
    """Data, weights or an initial state contain NaN or infinity."""


class SizeError(InputError):
    """What was asked takes more memory than the machine can give to one call."""


class PrecisionError(InputError):
    """A precision is not symmetric positive definite (the flow would not be a gradient)."""


class IllPosedEnergyError(InputError):
    """An energy whose gradient flow does not exist: not finite, not bounded below, or singular."""


class ActivationError(InputError):
    """An activation is unknown, or its inverse is needed and it has none."""


class NotLinearError(InputError):
    """A closed form of linear networks was asked of a network that is not linear."""


class SingularHessianError(InputError):
    """The free energy has a flat direction, so that no unique equilibrium exists."""


class PosteriorError(InputError):
    """A Gaussian posterior has no covariance: the state is no strict minimum of the free energy."""


class SingularWeightError(InputError):
    """A weight matrix has no inverse, so that no target propagation target exists."""


class UnreachableTargetError(InputError):
    """A target lies outside the open range of an activation, so that it has no preimage."""


class TimesError(InputError):
    """Times are reversed, repeated, out of range or not finite."""


class ToleranceError(InputError):
    """A tolerance is not positive, or finer than the dtype of the problem can resolve."""


class IntegratorError(InputError):
    """An integrator is unknown, or was given an option that it would ignore."""


class DenseOutputError(InputError):
    """A trajectory was evaluated between its saved times without dense output."""


class LabelError(InputError):
    """A label is not the index of an output unit."""


class CheckpointError(InputError):
    """A checkpoint is truncated, corrupt, or belongs to another training."""


class DataError(InputError):
    """A file or a folder of data is missing, corrupt, truncated or not what it claims to be."""


class _Outcome(enum.IntEnum):
    """How a computation ended: integers that print as their names."""

    @property
    @abc.abstractmethod
    def ok(self) -> bool:
        """Whether it is a success."""

    @classmethod
    def failed(cls, codes: _Codes) -> _Codes:
        """Return which integers, alone or in an array of any kind, are no success."""
        unlike: Any = (codes != int(s) for s in cls if s.ok)
        return functools.reduce(operator.and_, unlike)

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(self.name, spec)


class Status(_Outcome):
    """How a simulation ended; `explanation` gives cause and remedy.

    The integer values are what `pcdyn.Trajectory.status_codes` holds under `jax.vmap` and in files.
    """

    REACHED_T1 = 0
    CONVERGED = 1
    MAX_STEPS = 2
    STEP_TOO_SMALL = 3
    NON_FINITE = 4
    UNSTABLE_STEP = 5
    SOLVER_FAILED = 6
    TIME_LIMIT = 7

    @property
    def ok(self) -> bool:
        """Whether the trajectory is an accurate solution up to its last time."""
        return self in (Status.REACHED_T1, Status.CONVERGED)

    @property
    def explanation(self) -> str:
        """What a status means: cause and remedy in one sentence."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Status.REACHED_T1: "integrated to the end time",
    Status.CONVERGED: "stopped at equilibrium: the vector field fell below the tolerance",
    Status.MAX_STEPS: (
        "ran out of steps before the end time: raise max_steps, loosen the tolerance, or use an "
        'implicit integrator such as "rodas5p" or "lsoda" if the problem is stiff. Where '
        "activations have kinks, as ReLU has, the flow can slide along one in steps of the size of "
        "the tolerance: the fallback of pcdyn.Diffrax() rounds the kinks and follows it"
    ),
    Status.STEP_TOO_SMALL: (
        "the step size fell below what the floating-point format resolves: loosen the tolerance "
        "or use float64"
    ),
    Status.NON_FINITE: (
        "the state or the vector field became NaN or infinite: with a fixed step, take a smaller "
        "one (explicit Euler needs dt < 2 / largest eigenvalue of the Hessian); otherwise look "
        "for an activation that overflows"
    ),
    Status.UNSTABLE_STEP: (
        "the free energy rose, which the exact flow never does: the fixed step is too large; "
        "explicit Euler needs dt < 2 / largest eigenvalue of the Hessian"
    ),
    Status.SOLVER_FAILED: (
        "the root finder of an implicit step did not converge, or the solver gave up for a reason "
        "of its own that follows: take a smaller step, loosen the tolerance, or use "
        '"rodas5p", which is implicit and finds no roots'
    ),
    Status.TIME_LIMIT: (
        "ran out of the seconds that it was given before the end time: give it more, or an "
        "earlier t1"
    ),
}


class Statuses(tuple[_Status, ...]):
    """The status of each sample; those of many samples print as counts."""

    def __repr__(self) -> str:
        if len(self) <= MOST_SAMPLES_NAMED:
            return super().__repr__()
        return f"({len(self)} samples: {status_counts(self)})"


def all_well(kind: type[_Outcome], codes: object) -> np.ndarray:
    """Which networks, on the first axis of the codes, have no failure."""
    failed = kind.failed(np.asarray(codes))
    return np.logical_not(np.any(failed.reshape(len(failed), -1), axis=1))


def status_counts(statuses: _Outcome | tuple[_Outcome, ...]) -> str:
    """How many of each status there are, in one line."""
    each = statuses if isinstance(statuses, tuple) else (statuses,)
    return ", ".join(f"{n} {s.name}" for s, n in sorted(collections.Counter(each).items()))


class EquilibriumStatus(_Outcome):
    """How the search for an equilibrium ended; `explanation` gives cause and remedy."""

    CONVERGED = 0
    SLIDING = 1
    ITERATION_LIMIT = 2
    STALLED = 3
    NON_FINITE = 4

    @property
    def ok(self) -> bool:
        """Whether the point is stationary, in the generalised sense at kinks."""
        return self in (EquilibriumStatus.CONVERGED, EquilibriumStatus.SLIDING)

    @property
    def explanation(self) -> str:
        """What a status means: cause and remedy in one sentence."""
        return _EQUILIBRIUM_EXPLANATIONS[self]


_EQUILIBRIUM_EXPLANATIONS = {
    EquilibriumStatus.CONVERGED: "the gradient of the free energy is within the tolerance",
    EquilibriumStatus.SLIDING: (
        "stationary at kinks of the activations: zero lies between the one-sided gradients there, "
        "where no gradient vanishes"
    ),
    EquilibriumStatus.ITERATION_LIMIT: (
        "ran out of iterations: raise max_iterations, loosen the tolerance, or use another method"
    ),
    EquilibriumStatus.STALLED: (
        "no step lowered the free energy any more, but its gradient is not below the tolerance: "
        "use float64, loosen the tolerance, or use another method"
    ),
    EquilibriumStatus.NON_FINITE: (
        "the free energy or its gradient became NaN or infinite: take a smaller step, or look for "
        "an activation that overflows"
    ),
}


class NotConvergedError(PcdynError, RuntimeError):
    """No equilibrium was found; `equilibrium` holds what was, with the status of each sample."""

    def __init__(self, message: str, equilibrium: pcdyn.Equilibrium | None = None):
        super().__init__(message)
        self.equilibrium = equilibrium


class MaximisationError(PcdynError, RuntimeError):
    """An M-step did not bring the weight gradient below its tolerance."""


class SimulationError(PcdynError, RuntimeError):
    """A simulation failed while it ran.

    `trajectory` holds what was computed, with the status of each sample, so that nothing is lost.
    """

    def __init__(self, message: str, trajectory: pcdyn.Trajectory | None = None):
        super().__init__(message)
        self.trajectory = trajectory


class SpectrumError(PcdynError, RuntimeError):
    """Lanczos iterations did not find the extreme rates of a large network."""


class StepSizeWarning(UserWarning):
    """A fixed step is above the largest with which its explicit method is stable."""


class JaxlibDeadlockWarning(UserWarning):
    """The installed jaxlib can deadlock on batched linear algebra; another version does not."""


class RoundOffWarning(UserWarning):
    """An exact solution has lost more than half of its digits to round-off."""


class EnergyWarning(UserWarning):
    """The slope of an energy is not Lipschitz: its flow can be stiff without limit, or stop."""


class TrainingDivergedError(PcdynError, RuntimeError):
    """A loss or a weight became NaN or infinite; `training` holds the last finite network."""

    def __init__(self, message: str, training: pcdyn.learning.Training | None = None):
        super().__init__(message)
        self.training = training


class NoUsableRangeError(PcdynError, RuntimeError):
    """No range of steps shows an order of convergence; `steps` and `errors` are what was measured.

    The errors are at round-off or at that of the reference, or the steps are unstable.
    """

    def __init__(
        self, message: str, steps: np.ndarray | None = None, errors: np.ndarray | None = None
    ):
        super().__init__(message)
        self.steps = steps
        self.errors = errors


class DivergedError(SimulationError):
    """The state became non-finite or a fixed step was unstable."""


class StepLimitError(SimulationError):
    """The solver ran out of steps, its step vanished, or it gave up."""


def simulation_error(status: Status, message: str, trajectory: pcdyn.Trajectory) -> SimulationError:
    """The exception for a status that is not ok."""
    diverged = status in (Status.NON_FINITE, Status.UNSTABLE_STEP)
    return (DivergedError if diverged else StepLimitError)(message, trajectory)


def worst_status(codes: object) -> Status:
    """The status to report for several samples: the failure that most of them share, or success."""
    values, counts = np.unique(np.asarray(codes), return_counts=True)
    failed = Status.failed(values)
    if failed.any():
        return Status(max(zip(counts[failed], values[failed], strict=True))[1])
    return Status(values.min())
