"""What each subcommand computes, and what it reports."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from pcdyn._support.arrays import check_size
from pcdyn._support.checks import checked_integer, checked_number
from pcdyn.cli.files import Result
from pcdyn.cli.network import Settings, build_problem
from pcdyn.cli.options import Compare, Equilibrium, Simulate, Stability, Verify
from pcdyn.cli.report import counts, describe, describe_record, lines
from pcdyn.errors import DataError, InputError, IntegratorError, TimesError, worst_status
from pcdyn.integrators import Diffrax, Euler, Integrator, SciPy, get_integrator
from pcdyn.model.problem import InferenceProblem

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

    import pcdyn.equilibria.equilibrium
    import pcdyn.simulation.trajectory

# Tolerances belong to adaptive integrators; Euler has none, and needs steps.
_EXPLICIT = ("euler", "heun", "bosh3", "tsit5", "dopri5", "dopri8")
_EULER_STEPS = (0.2, 0.1, 0.05, 0.02, 0.01)


def run_simulate(options: Simulate, settings: Settings, _: tqdm) -> Result:
    """Run `pcdyn simulate` with these options."""
    from pcdyn.io.problems import with_problem
    from pcdyn.io.results import file_of
    from pcdyn.simulation.simulate import simulate

    integrator = _integrator(options)
    checked_integer(options.times, "--times", at_least=2, at_most=2**31 - 1, error=TimesError)
    problem = build_problem(settings)
    samples = math.prod(problem.batch_shape or ())
    state = problem.dtype.itemsize * samples * sum(problem.widths)
    check_size(2 * state * options.times, f"a trajectory of {options.times} times")
    trajectory = simulate(
        problem,
        t1=options.t1,
        times=_times(options.t1, options.times),
        initial=options.initial,
        integrator=integrator,
        until="equilibrium" if options.until_equilibrium else None,
        per_sample=options.per_sample,
    )
    status = worst_status(trajectory.status_codes)
    first, last = (float(np.mean(trajectory.free_energy[i])) for i in (0, -1))
    end_time = float(np.max(trajectory.end_time))
    statistics = trajectory.statistics.total()
    summary = [
        ("network", describe(problem)),
        ("status", trajectory.message),
        ("end time", f"{end_time:g} activity time constants"),
        ("free energy", f"{first:.6g} at the start, {last:.6g} at the end{_mean(problem)}"),
        ("evaluations", f"{_reported(statistics.vector_field_evaluations)} of the vector field; "
         f"steps accepted {_reported(statistics.accepted_steps)}, "
         f"rejected {_reported(statistics.rejected_steps)}"),
        ("seconds", f"{trajectory.compile_seconds:.3g} to compile, {trajectory.run_seconds:.3g} "
         f"to run ({trajectory.integrator})"),
    ]  # fmt: skip
    if trajectory.fallback:
        summary.insert(2, ("fallback", trajectory.fallback))
    record = {
        "problem": describe_record(problem),
        "integrator": trajectory.integrator,
        "fallback": trajectory.fallback or None,
        "status": status.name,
        "status_counts": counts(trajectory.status),
        "message": trajectory.message,
        "end_time": end_time,
        "free_energy_start": first,
        "free_energy_end": last,
        **vars(statistics),
    }

    def draw(upper: matplotlib.axes.Axes, lower: matplotlib.axes.Axes) -> None:
        from pcdyn import plotting

        plotting.activities(trajectory, ax=upper)
        plotting.energies(trajectory, ax=lower)

    return Result(
        summary=lines(summary),
        record=record,
        dataset=lambda: with_problem(file_of(trajectory), problem),
        draw=lambda: _figure(draw, panels=2, height=7.2),
    )


def run_equilibrium(options: Equilibrium, settings: Settings, _: tqdm) -> Result:
    """Run `pcdyn equilibrium` with these options."""
    from pcdyn.equilibria.equilibrium import equilibrium
    from pcdyn.equilibria.solvers import get_solver
    from pcdyn.io.results import file_of

    solvers = [get_solver(name) for name in options.method]
    problem = build_problem(settings)
    found = equilibrium(
        problem,
        method=solvers or None,
        initial=options.initial,
        tolerance=options.tolerance,
    )
    residual, tolerance = (float(np.max(x)) for x in (found.residual_norms, found.tolerance))
    statuses = counts(found.status)
    free_energy = float(np.mean(found.free_energy))
    summary = [
        ("network", describe(problem)),
        ("status", ", ".join(f"{name} {count}" for name, count in statuses.items())),
        ("residual", f"{residual:.2g} at most (tolerance {tolerance:.2g})"),
        ("free energy", f"{free_energy:.6g}{_mean(problem)}"),
        ("method", f"{found.method}; at most {np.max(found.iterations)} iterations, "
         f"{np.max(found.passes)} passes through the network"),
        ("seconds", f"{found.compile_seconds:.3g} to compile, {found.run_seconds:.3g} to run"),
    ]  # fmt: skip
    record = {
        "problem": describe_record(problem),
        "method": found.method,
        "status_counts": statuses,
        "message": found.message,
        "residual": residual,
        "tolerance": tolerance,
        "free_energy": free_energy,
        "iterations": int(np.max(found.iterations)),
        "passes": int(np.max(found.passes)),
        "compile_seconds": found.compile_seconds,
        "run_seconds": found.run_seconds,
    }
    return Result(
        summary=lines(summary),
        record=record,
        dataset=lambda: file_of(found),
        draw=lambda: _figure(found.plot),
    )


def run_compare(options: Compare, settings: Settings, _: tqdm) -> Result:
    """Run `pcdyn compare` with these options."""
    from pcdyn.analysis.comparison.compare import compare
    from pcdyn.analysis.comparison.table import ERROR_METRICS
    from pcdyn.io.problems import with_problem
    from pcdyn.io.results import file_of

    checked_number(options.error, "--error", above=0)
    problem = build_problem(settings)
    comparison = compare(
        options.integrators,
        problem,
        t1=options.t1,
        initial=options.initial,
        tolerances=options.tolerances or None,
        steps=options.steps or (_EULER_STEPS if "euler" in options.integrators else None),
        repeats=options.repeats,
        per_sample=options.per_sample,
        seconds=options.seconds,
    )
    best = None
    try:
        advice = comparison.recommendation(error=options.error)
        text, best = str(advice), advice.best
    # A reference that cannot resolve so small an error still leaves a table worth having.
    except InputError as error:
        text = f"No recommendation: {error}."
    record = {
        "problem": describe_record(problem),
        "reference": comparison.reference,
        "reference_error": {
            name: getattr(comparison.reference_error, name) for name in ERROR_METRICS
        },
        "runs": [row.record() for row in comparison.rows],
        "recommendation": text,
        "recommended": None if best is None else best.title,
    }
    parts = [lines([("network", describe(problem))]), comparison.table(), text]
    return Result(
        summary="\n\n".join(parts),
        record=record,
        dataset=lambda: with_problem(file_of(comparison), problem),
        draw=lambda: _figure(comparison.plot),
        table=comparison.to_csv,
    )


def run_stability(options: Stability, settings: Settings, _: tqdm) -> Result:
    """Run `pcdyn stability` with these options."""
    from pcdyn.analysis.stability import stability
    from pcdyn.io.problems import with_problem
    from pcdyn.io.results import file_of

    problem, at = _stability_at(options.at, settings)
    found = stability(problem, at=at)
    one_for_each = (
        "slowest_rate", "fastest_rate", "condition_number", "stiffness", "unstable", "at_kink",
        "largest_euler_step", "slowest_mode", "fastest_mode", "relaxation_times",
    )  # fmt: skip
    record = {
        "problem": describe_record(problem),
        "at": found.at,
        "verdict": found.verdict,
        "recommended": found.recommended,
        **{name: getattr(found, name) for name in one_for_each},
        "largest_stable_steps": {name: found.largest_step(name) for name in _EXPLICIT},
    }
    return Result(
        summary="\n".join([lines([("network", describe(problem))]), found.summary()]),
        record=record,
        dataset=lambda: with_problem(file_of(found), problem),
        draw=lambda: _figure(found.plot),
    )


def run_verify(options: Verify, _: Settings, bar: tqdm) -> Result:
    """Run `pcdyn verify` with these options; the bar is over the statements."""
    from pcdyn.io.results import file_of
    from pcdyn.theory import Statement, select, verify

    bar.bar_format = "{desc}: |{bar}| {n_fmt}/{total_fmt} {elapsed}"
    bar.total = len(select(options.statements))
    done = itertools.count()

    def begin(statement: Statement) -> None:
        bar.n = next(done)
        bar.set_description_str(f"verify {statement.number}")

    found = verify(options.statements, seed=options.seed, networks=options.networks, progress=begin)
    unexpected = found.unexpected
    failure = None
    if unexpected:
        failure = f"{len(unexpected)} verdicts are not those on record: {'; '.join(unexpected)}"
    return Result(
        summary=found.table(),
        record={
            "seed": found.seed,
            "networks": found.networks,
            "ok": found.ok,
            "statements": found.records(),
        },
        dataset=lambda: file_of(found),
        draw=lambda: _figure(found.plot, height=6.4),
        failure=failure,
    )


def _stability_at(
    at: str, settings: Settings
) -> tuple[
    InferenceProblem,
    str | pcdyn.simulation.trajectory.Trajectory | pcdyn.equilibria.equilibrium.Equilibrium,
]:
    """The problem and the state at which its flow is linearised."""
    if not at.endswith(".nc"):
        return build_problem(settings), at
    from pcdyn.equilibria.equilibrium import Equilibrium
    from pcdyn.io.results import load
    from pcdyn.simulation.trajectory import Trajectory

    result = load(at)
    if not isinstance(result, Trajectory | Equilibrium):
        raise DataError(
            f"{at} holds a {type(result).__name__}, but --at takes the file of a trajectory or an "
            "equilibrium"
        )
    chosen = {name for name in settings if name != "float32"}
    return build_problem(settings if chosen else {**settings, "network": Path(at)}), result


def _times(t1: float, count: int) -> np.ndarray | None:
    # Whether t1 is a time at all is for `simulate` to say.
    return np.linspace(0.0, t1, count) if 0 < t1 < float("inf") else None


def _integrator(options: Simulate) -> Integrator:
    """The integrator of that name with the given tolerances or step."""
    name = options.integrator
    given: dict[str, Any] = {
        key: getattr(options, key)
        for key in ("rtol", "atol", "dt")
        if getattr(options, key) is not None
    }
    if name == "euler":
        if set(given) != {"dt"}:
            raise IntegratorError("euler needs a step, --dt, and has no tolerances")
        return Euler(dt=given["dt"])
    method = get_integrator(name)
    if isinstance(method, SciPy) and "dt" in given:
        raise IntegratorError(f"{name} chooses its own steps: leave --dt out")
    if isinstance(method, Diffrax | SciPy):
        return dataclasses.replace(method, **given)
    if given:
        flags = ", ".join(f"--{key}" for key in given)
        raise IntegratorError(f"{name} has neither steps nor tolerances: leave {flags} out")
    return method


def _mean(problem: InferenceProblem) -> str:
    return " (mean over samples)" if problem.batch_shape else ""


def _reported(count: object) -> str:
    return "not reported" if count is None else str(count)


def _figure(
    draw: Callable[..., object], *, panels: int = 1, height: float = 4.0
) -> matplotlib.figure.Figure:
    """A figure of panels one above the other, in the style of pcdyn."""
    from matplotlib.figure import Figure

    from pcdyn import plotting

    with plotting.style():
        figure = Figure(figsize=(6.4, height), layout="constrained")
        draw(*figure.subplots(panels, 1, squeeze=False).flat)
    return figure


COMMANDS: dict[type, tuple[str, Callable[[Any, Settings, tqdm], Result]]] = {
    Simulate: ("simulate", run_simulate),
    Equilibrium: ("equilibrium", run_equilibrium),
    Compare: ("compare", run_compare),
    Stability: ("stability", run_stability),
    Verify: ("verify", run_verify),
}
