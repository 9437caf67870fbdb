"""`compare`: run integrators on one problem and measure what each costs and how wrong it is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from pcdyn._support.checks import as_sequence, check_flag, checked_integer, checked_number
from pcdyn._support.types import Numbers
from pcdyn.analysis.comparison.reference_solution import NO_ERRORS, Errors, Reference, reference_for
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
    Status,
    TimesError,
    ToleranceError,
    worst_status,
)
from pcdyn.integrators import Integrator, get_integrator
from pcdyn.integrators.statistics import MEASURES, Statistics
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
    seconds: float | None = None,
    progress: bool = False,
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
    - `seconds`: after so much wall time no run starts but those of the reference; what has not run
      has the status `TIME_LIMIT`, and medians are of the repeats until then.
    - `progress`: show a bar over the runs.

    **Raises:**

    - `IntegratorError`, `ToleranceError`, `NotLinearError` and what `pcdyn.simulate` raises for
      bad input, before anything is timed.
    - `InputError` for a problem that starts at rest.
    - `StepLimitError` if no reference can be computed.
    """
    check_flow(problem)
    t1 = checked_number(t1, "t1", above=0, error=TimesError)
    repeats = checked_integer(repeats, "repeats", at_least=1)
    if seconds is not None:
        seconds = checked_number(seconds, "seconds", above=0)
    check_flag(progress, "progress")
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
    begun = time.monotonic()
    spent: list[list[float]] = [[] for _ in chosen]
    with (
        unstable_steps_expected(),
        tqdm(total=len(chosen) * (1 + repeats), disable=not progress, unit="run") as bar,
    ):

        def run(candidate: Candidate) -> Trajectory | None:
            bar.set_description(candidate.label)
            bar.update()
            if seconds is not None and time.monotonic() - begun > seconds:
                return None
            return simulate(problem, integrator=candidate.integrator, **options)

        # The first run, which compiles, also checks what all runs share before the reference does.
        firsts = [run(candidate) for candidate in chosen]
        bar.set_description("reference")
        truth = reference_for(problem, t1=t1, times=times, initial=initial, given=reference)
        for _ in range(repeats):
            for candidate, each in zip(chosen, spent, strict=True):
                if (again := run(candidate)) is not None:
                    each.append(float(again.run_seconds))
    compiling = dict.fromkeys((candidate.label for candidate in chosen), 0.0)
    for candidate, first in zip(chosen, firsts, strict=True):
        compiling[candidate.label] += 0.0 if first is None else float(first.compile_seconds)
    rows = [
        _not_run(candidate)
        if first is None
        else _row(candidate, first, truth, compiling[candidate.label], each)
        for candidate, first, each in zip(chosen, firsts, spent, strict=True)
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
    candidate: Candidate, run: Trajectory, truth: Reference, compiling: float, spent: list[float]
) -> Run:
    errors = truth.errors(run)
    statistics = run.statistics.mean()
    # The first run's, without what it compiled, if the time was up before the repeats.
    seconds = spent or [float(statistics.run_seconds)]
    return Run(
        **_setting(candidate),
        status=worst_status(run.status_codes),
        message=run.message,
        **vars(errors),
        below_reference=_below(errors, truth.uncertainty),
        statistics=dataclasses.replace(
            statistics, compile_seconds=compiling, run_seconds=float(np.median(seconds))
        ),
        shortest_seconds=min(seconds),
        longest_seconds=max(seconds),
    )


def _not_run(candidate: Candidate) -> Run:
    return Run(
        **_setting(candidate),
        status=Status.TIME_LIMIT,
        message="the time was up before this run began; allow more seconds",
        **vars(NO_ERRORS),
        below_reference=(),
        statistics=Statistics(*[math.nan] * len(MEASURES)),
    )


def _setting(candidate: Candidate) -> dict[str, Any]:
    return {
        "integrator": candidate.label, "setting": candidate.setting, "value": candidate.value,
    }  # fmt: skip


def _below(errors: Errors, uncertainty: Errors) -> tuple[str, ...]:
    return tuple(
        name for name in ERROR_METRICS if getattr(errors, name) < getattr(uncertainty, name)
    )
