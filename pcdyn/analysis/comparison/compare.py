"""`compare`: run integrators on one problem and measure what each costs and how wrong it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pcdyn._support.checks import as_sequence, checked_integer, checked_number
from pcdyn._support.types import Numbers
from pcdyn.analysis.comparison.reference_solution import Errors, Reference, reference_for
from pcdyn.analysis.comparison.settings import (
    Candidate,
    candidates,
    labelled,
    unstable_steps_expected,
)
from pcdyn.analysis.comparison.table import ERROR_METRICS, Comparison, Run
from pcdyn.errors import (
    InputError,
    IntegratorError,
    TimesError,
    ToleranceError,
    worst_status,
)
from pcdyn.integrators import Integrator, get_integrator
from pcdyn.model.flow import Flow, check_flow
from pcdyn.simulation.simulate import simulate
from pcdyn.simulation.trajectory import Trajectory


def compare(
    integrators: Sequence[str | Integrator] | Mapping[str, str | Integrator],
    problem: Flow,
    *,
    t1: float,
    times: Numbers | None = None,
    initial: str | Sequence[Numbers] = "feedforward",
    tolerances: Sequence[float] | None = None,
    steps: Sequence[float] | None = None,
    reference: Trajectory | str | Integrator | None = None,
    repeats: int = 3,
    per_sample: bool = False,
) -> Comparison:
    """Run every integrator at every setting, and measure errors, work and seconds.

    `pcdyn.Exact` and values with a controller of their own run once. diffrax's fallback to SciPy
    is off: a row is the method that it says, and a run that fails stays in the table with its
    status. Errors are those of the worst sample; see `reference_solution.Errors` for their units.

    **Arguments:**

    - `integrators`: names or values as `pcdyn.simulate` takes them, or a dictionary that gives
      them other names.
    - `problem`, `t1`, `times`, `initial`, `per_sample`: as for `pcdyn.simulate`. Errors are those
      of activities, whatever else a flow moves.
    - `tolerances`: adaptive integrators run at each as rtol, with a thousandth of it as atol.
      Unless given, a value runs once with the tolerance that it carries, and a name at the decades
      from 1e-2 to 1e-9 (1e-5 in float32).
    - `steps`: fixed-step methods (`"euler"`, `"implicit_euler"`, or a value with `dt`) run at each,
      in units of the activity time constant. Unless given, a value runs once with its own step.
    - `reference`: a `Trajectory` saved at the same times or an integrator; unless given, the
      exact solution of a linear network and Dopri8 or LSODA at rtol 1e-12 for others, in float64.
      A second solver says how good it is (`Comparison.reference_error`).
    - `repeats`: how often each run is timed, after a first time that compiles. The repeats go
      through all runs in order, so that a slow spell of the machine hits them alike.

    **Raises:**

    - `IntegratorError`, `ToleranceError`, `NotLinearError` and what `pcdyn.simulate` raises for
      bad input, before anything is timed.
    - `InputError` for a problem that starts at rest.
    - `StepLimitError` if no reference can be computed.
    """
    check_flow(problem)
    t1 = checked_number(t1, "t1", above=0, error=TimesError)
    repeats = checked_integer(repeats, "repeats", at_least=1)
    tolerances = _checked_settings(tolerances, "tolerances", ToleranceError)
    steps = _checked_settings(steps, "steps", IntegratorError)
    if not (reference is None or isinstance(reference, Trajectory)):
        get_integrator(reference)  # refuses what is none
    chosen = [
        candidate
        for label, integrator in labelled(integrators).items()
        for candidate in candidates(label, integrator, problem, tolerances, steps)
    ]
    for candidate in chosen:
        candidate.integrator.check(problem, None, False)
    options: dict[str, Any] = {
        "t1": t1, "times": times, "initial": initial, "per_sample": per_sample, "throw": False,
    }  # fmt: skip
    # The first run, which compiles, also checks what all runs share before the reference does.
    with unstable_steps_expected():
        firsts = [
            simulate(problem, integrator=candidate.integrator, **options) for candidate in chosen
        ]
        truth = reference_for(problem, t1=t1, times=times, initial=initial, given=reference)
        seconds = np.array(
            [
                [simulate(problem, integrator=candidate.integrator, **options).run_seconds]
                for _ in range(repeats)
                for candidate in chosen
            ]
        ).reshape(repeats, len(chosen))
    compiling: dict[str, float] = {}
    for candidate, run in zip(chosen, firsts, strict=True):
        compiling[candidate.label] = compiling.get(candidate.label, 0.0) + float(
            run.compile_seconds
        )
    rows = [
        _row(candidate, run, truth, compiling[candidate.label], float(spent))
        for candidate, run, spent in zip(chosen, firsts, np.median(seconds, axis=0), strict=True)
    ]
    return Comparison(
        rows=tuple(rows),
        reference=truth.method,
        second=truth.second,
        reference_error=truth.uncertainty,
        displacement=truth.displacement,
        energy_loss=truth.energy_loss,
        t1=float(t1),
        repeats=repeats,
    )


def _checked_settings(
    values: Sequence[float] | None, name: str, error: type[InputError]
) -> tuple[float, ...] | None:
    if values is None:
        return None
    wanted = "a list of positive numbers"
    given = as_sequence(values, name, wanted, error=error)
    if not given:
        raise InputError(f"{name} is empty: give at least one, or leave it out")
    return tuple(checked_number(x, f"each of {name}", above=0, error=error) for x in given)


def _row(
    candidate: Candidate, run: Trajectory, truth: Reference, compiling: float, spent: float
) -> Run:
    errors = truth.errors(run)
    statistics = run.statistics.mean()
    return Run(
        integrator=candidate.label,
        setting=candidate.setting,
        value=candidate.value,
        status=worst_status(run.status_codes),
        message=run.message,
        final_error=errors.final_error,
        maximum_error=errors.maximum_error,
        l2_error=errors.l2_error,
        energy_error=errors.energy_error,
        equilibrium_time=errors.equilibrium_time,
        below_reference=_below(errors, truth.uncertainty),
        statistics=dataclasses.replace(statistics, compile_seconds=compiling, run_seconds=spent),
    )


def _below(errors: Errors, uncertainty: Errors) -> tuple[str, ...]:
    return tuple(
        name for name in ERROR_METRICS if getattr(errors, name) < getattr(uncertainty, name)
    )
