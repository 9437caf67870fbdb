"""What cannot be simulated raises before it runs; what fails while it runs says how and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn import Diffrax, Euler, Exact, SciPy, Status, UntilEquilibrium, simulate
from pcdyn.errors import (
    DivergedError,
    InputError,
    IntegratorError,
    NotLinearError,
    ShapeError,
    SimulationError,
    StepLimitError,
    StepSizeWarning,
    TimesError,
    ToleranceError,
)
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from tests.networks import Case, build_case

pytestmark = pytest.mark.unchecked

CASE = build_case(seed=8, widths=(3, 3, 2, 2))
TANH = build_case(seed=8, widths=(3, 3, 2, 2), activations=("tanh",))
Call = Callable[[], Any]


def run(case: Case = CASE, *, t1: Any = 2.0, **options: Any) -> Any:
    return simulate(case.problem, t1=t1, initial=case.state, **options)


def float32(**options: Any) -> Any:
    layers = [Dense(np.asarray(weight, np.float32)) for weight in CASE.weights]
    return simulate(InferenceProblem(Network(layers), input=CASE.input), t1=1.0, **options)


STEPS = diffrax.ConstantStepSize()

# What is wrong, the call, its error, and what the message must name.
BAD: list[tuple[str, Call, type[InputError], str]] = [
    # Times.
    ("negative t1", lambda: run(t1=-1.0), TimesError, "-1.0"),
    ("zero t1", lambda: run(t1=0.0), TimesError, "t1 must be"),
    ("NaN t1", lambda: run(t1=np.nan), TimesError, "nan"),
    ("infinite t1", lambda: run(t1=np.inf), TimesError, "inf"),
    ("reversed times", lambda: run(times=[1.0, 0.5]), TimesError, "times[1] = 0.5 follows 1"),
    ("repeated times", lambda: run(times=[0.0, 1.0, 1.0]), TimesError, "times[2] = 1"),
    ("negative times", lambda: run(times=[-0.1, 1.0]), TimesError, "-0.1"),
    ("times after t1", lambda: run(times=[0.0, 2.1]), TimesError, "2.1"),
    ("NaN times", lambda: run(times=[0.0, np.nan]), TimesError, "NaN"),
    ("no times", lambda: run(times=[]), TimesError, "(0,)"),
    ("matrix of times", lambda: run(times=np.ones((2, 2))), TimesError, "(2, 2)"),
    # Names.
    ("unknown integrator", lambda: run(integrator="rk4"), IntegratorError, "'rk4'"),
    ("euler without a step", lambda: run(integrator="euler"), IntegratorError, "dt="),
    ("no integrator", lambda: run(integrator=3), IntegratorError, "3 is no integrator"),
    ("bare diffrax solver", lambda: run(integrator=diffrax.Tsit5()), IntegratorError, "Diffrax("),
    ("unknown diffrax solver", lambda: Diffrax("rk4"), IntegratorError, "'rk4'"),
    ("unknown SciPy method", lambda: SciPy("RK4"), IntegratorError, "'RK4'"),
    ("unknown fallback", lambda: Diffrax(fallback="RK4"), IntegratorError, "'RK4'"),
    ("unknown until", lambda: run(until="converged"), IntegratorError, "'converged'"),
    ("until a number", lambda: run(until=1e-3), IntegratorError, "0.001"),
    # Options that would be ignored.
    ("rtol beside dt", lambda: Diffrax(dt=0.1, rtol=1e-3), IntegratorError, "next to dt"),
    ("atol beside controller", lambda: Diffrax(controller=STEPS, atol=1e-3), IntegratorError,
     "next to controller"),
    ("dt beside controller", lambda: Diffrax(dt=0.1, controller=STEPS), IntegratorError,
     "not both"),
    ("Exact until equilibrium", lambda: run(integrator=Exact(), until="equilibrium"),
     IntegratorError, "linear_equilibrium"),
    ("dense Euler", lambda: run(integrator=Euler(dt=0.1), dense=True), IntegratorError, "dense"),
    ("per_sample without a batch", lambda: run(per_sample=True), ShapeError, "per_sample"),
    # Tolerances.
    ("zero rtol", lambda: Diffrax(rtol=0.0), ToleranceError, "rtol must be a finite"),
    ("negative atol", lambda: Diffrax(atol=-1e-3), ToleranceError, "atol must be a finite"),
    ("NaN rtol", lambda: Diffrax(rtol=np.nan), ToleranceError, "nan"),
    ("infinite rtol", lambda: SciPy(rtol=np.inf), ToleranceError, "inf"),
    ("zero SciPy atol", lambda: SciPy(atol=0.0), ToleranceError, "atol must be a finite"),
    ("rtol too fine", lambda: run(integrator=Diffrax(rtol=1e-16)), ToleranceError, "float64 can"),
    ("SciPy rtol too fine", lambda: run(integrator=SciPy(rtol=1e-16)), ToleranceError,
     "float64 can"),
    ("rtol too fine for float32", lambda: float32(integrator=Diffrax(rtol=1e-8)), ToleranceError,
     "switch on float64"),
    ("SciPy rtol too fine for float32", lambda: float32(integrator=SciPy(rtol=1e-8)),
     ToleranceError, "switch on float64"),
    ("zero equilibrium tolerance", lambda: UntilEquilibrium(tolerance=0.0), ToleranceError, "0.0"),
    ("NaN equilibrium tolerance", lambda: UntilEquilibrium(tolerance=np.nan), ToleranceError,
     "nan"),
    ("negative minimum time", lambda: UntilEquilibrium(minimum_time=-1.0), ToleranceError, "-1"),
    # Steps.
    ("zero dt", lambda: Euler(dt=0.0), IntegratorError, "above 0, got 0.0"),
    ("negative dt", lambda: Diffrax(dt=-0.1), IntegratorError, "above 0, got -0.1"),
    ("NaN dt", lambda: Euler(dt=np.nan), IntegratorError, "above 0, got nan"),
    ("infinite dt", lambda: Diffrax(dt=np.inf), IntegratorError, "above 0, got inf"),
    ("no steps", lambda: Diffrax(max_steps=0), IntegratorError, "max_steps"),
    ("euler of diffrax without dt", lambda: run(integrator=Diffrax("euler")), IntegratorError,
     "give dt"),
    ("Euler solver without dt",
     lambda: run(integrator=Diffrax(diffrax.Euler())), IntegratorError, "give dt"),
    # Networks.
    ("exact of tanh", lambda: run(TANH, integrator=Exact()), NotLinearError, "'tanh'"),
    ("state of another network", lambda: simulate(CASE.problem, t1=1.0, initial=(np.ones(3),)),
     ShapeError, "1 arrays"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "named"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_what_cannot_be_simulated_raises_its_error(
    call: Call, error: type[InputError], named: str
) -> None:
    """The error is of the class documented, and its message names what is wrong."""
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        call()
    assert type(caught.value) is error


class Root(eqx.Module):
    """x ↦ √x, NaN below zero."""

    def __call__(self, x: Any) -> Any:
        return jnp.sqrt(x)


def falling(integrator: Any, **options: Any) -> Any:
    """x' = −(x + 1) − (1 + √x) / (2 √x) from 1: zero at t ≈ 0.345, beyond which it is NaN.

    A fixed step of 0.05 leaves the domain within two steps of that.
    """
    network = Network([Dense(np.eye(1)), Root()])
    problem = InferenceProblem(network, input=-np.ones(1), output=-np.ones(1))
    return simulate(
        problem, t1=2.0, times=np.linspace(0, 2, 41), initial=(np.ones(1),),
        integrator=integrator, **options,
    )  # fmt: skip


# Adaptive methods approach the singularity: they can also end for want of a smaller step.
LEAVES = {
    "euler": (Euler(dt=0.05), (Status.NON_FINITE,)),
    "diffrax fixed": (Diffrax("tsit5", dt=0.05), (Status.NON_FINITE,)),
    "tsit5": (Diffrax("tsit5"), (Status.NON_FINITE, Status.STEP_TOO_SMALL)),
    "RK45": (SciPy("RK45"), (Status.NON_FINITE, Status.STEP_TOO_SMALL)),
    "LSODA": (SciPy("LSODA"), (Status.NON_FINITE, Status.STEP_TOO_SMALL)),
    "BDF": (SciPy("BDF"), (Status.NON_FINITE, Status.STEP_TOO_SMALL, Status.SOLVER_FAILED)),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_state_that_leaves_the_domain_ends_the_trajectory(name: str) -> None:
    """The error carries the status, what was computed, and no number that is not finite."""
    integrator, statuses = LEAVES[name]
    with pytest.raises(SimulationError) as caught:
        falling(integrator)
    trajectory = caught.value.trajectory
    assert trajectory.status in statuses and not trajectory.ok
    diverged = trajectory.status is Status.NON_FINITE
    assert type(caught.value) is (DivergedError if diverged else StepLimitError)
    assert trajectory.status.explanation in str(caught.value)
    assert 0 <= trajectory.times[-1] <= trajectory.end_time < 0.5
    assert all(np.isfinite(layer).all() for layer in trajectory.activities)
    # The last finite state may itself lie outside of the domain.
    for derived in (trajectory.energies, trajectory.vector_field_norms):
        assert len(derived) == len(trajectory.times) and np.isfinite(derived[:-1]).all()
    quiet = falling(integrator, throw=False)
    assert quiet.status is trajectory.status
    np.testing.assert_array_equal(quiet.activities[1], trajectory.activities[1])
    if name in ("euler", "RK45"):
        # x stays positive until 0.3: what precedes the failure is the solution.
        assert trajectory.times[-1] >= 0.3


def test_the_last_finite_row_of_euler_is_that_of_a_plain_loop() -> None:
    """The trajectory ends at the last saved time whose state NumPy's loop finds finite."""
    x, rows = np.ones(1), [np.ones(1)]
    with np.errstate(invalid="ignore"):
        while True:
            x = x + 0.05 * (-(x + 1) - (1 + np.sqrt(x)) / (2 * np.sqrt(x)))
            if not np.isfinite(x).all():
                break
            rows.append(x)
    # The state after the last finite one is NaN; the field of a negative state is NaN as well.
    trajectory = falling(Euler(dt=0.05), throw=False)
    finite = [r for r in rows if r[0] > 0]
    count = len(trajectory.times)
    assert len(finite) <= count <= len(rows)
    np.testing.assert_allclose(trajectory.activities[1][: len(finite)], finite, rtol=1e-12)


LARGEST = float(np.linalg.eigvalsh(CASE.linear_flow()[0])[-1])


@pytest.mark.parametrize(
    "fixed",
    [lambda dt: Euler(dt=dt), lambda dt: Diffrax("euler", dt=dt)],
    ids=["euler", "diffrax"],
)
def test_euler_is_unstable_beyond_two_over_the_largest_eigenvalue(fixed: Any) -> None:
    """dt = 1.05 × 2/λ_max multiplies its mode by −1.1 a step: F rises 6-fold in 10, still finite.

    dt = 0.95 × 2/λ_max is stable; eigenvalues by LAPACK, F in NumPy.
    """
    slow, fast = 0.95 * 2 / LARGEST, 1.05 * 2 / LARGEST
    stable = run(t1=60 * slow, times=slow * np.arange(61), integrator=fixed(slow))
    assert stable.status is Status.REACHED_T1
    bound = f"dt={fast:g} is above {2 / LARGEST:.3g}, the largest stable step of euler"
    with (
        pytest.warns(StepSizeWarning, match=re.escape(bound)),
        pytest.raises(DivergedError, match=f"dt={fast:g}") as caught,
    ):
        run(t1=60 * fast, times=fast * np.arange(61), integrator=fixed(fast))
    trajectory = caught.value.trajectory
    assert trajectory.status is Status.UNSTABLE_STEP
    energies = [
        CASE.free_energy([x[k] for x in trajectory.activities])
        for k in range(len(trajectory.times))
    ]
    assert np.isfinite(energies).all() and energies[-1] > 2 * energies[0]


def test_the_error_is_that_of_most_failing_samples_and_names_them() -> None:
    """Two of three samples leave the domain."""
    network = Network([Dense(np.eye(1)), Root()])
    ends = np.array([[-1.0], [1.0], [-1.0]])
    problem = InferenceProblem(network, input=ends, output=ends)
    with pytest.raises(DivergedError, match=re.escape("2 of 3 samples: 0, 2")) as caught:
        simulate(problem, t1=2.0, initial=(np.ones((3, 1)),), integrator=Euler(dt=0.05),
                 per_sample=True)  # fmt: skip
    status = caught.value.trajectory.status
    assert status == (Status.NON_FINITE, Status.REACHED_T1, Status.NON_FINITE)
