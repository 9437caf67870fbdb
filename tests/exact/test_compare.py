"""What `compare` measures, against Euler and the matrix exponential written again in NumPy."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from pcdyn import Diffrax, Euler, InferenceProblem, SciPy, compare, plotting, simulate
from pcdyn.analysis.comparison.reference_solution import Errors, reference_for
from pcdyn.analysis.comparison.table import ERROR_METRICS, METRICS, Comparison, Run
from pcdyn.errors import (
    DataError,
    InputError,
    IntegratorError,
    NotLinearError,
    Status,
    TimesError,
    ToleranceError,
)
from pcdyn.integrators import Statistics
from tests.networks import Case, build_case

T1 = 12.0
TIMES = np.linspace(0, T1, 13)
DT = 0.25
INTEGRATORS = {
    "tsit5": "tsit5",
    "LSODA": SciPy("LSODA"),
    "euler": "euler",
    "out of steps": Diffrax("tsit5", max_steps=2),
    "exact": "exact",
}
OPTIONS: dict[str, Any] = {"t1": T1, "times": TIMES, "repeats": 1}


def linear_case() -> Case:
    return build_case(seed=3, widths=(2, 3, 2, 2), batch=2)


def exact_states(case: Case) -> np.ndarray:
    """y(t) of each sample by the matrix exponential, shape (time, batch, units)."""
    start = case.stack([case.activities[i] for i in case.free])
    matrix, drive, _ = case.linear_flow()
    states = np.empty((len(TIMES), *start.shape))
    for sample, b in enumerate(drive):
        generator = np.block([[-matrix, b[:, None]], [np.zeros((1, len(b) + 1))]])
        for index, t in enumerate(TIMES):
            state = scipy.linalg.expm(generator * t) @ np.append(start[sample], 1.0)
            states[index, sample] = state[:-1]
    return states


def euler_states(case: Case, dt: float) -> np.ndarray:
    matrix, drive, _ = case.linear_flow()
    y = case.stack([case.activities[i] for i in case.free])
    saved = [y]
    for _ in TIMES[1:]:
        for _ in range(round((TIMES[1] - TIMES[0]) / dt)):
            y = y + dt * (drive - y @ matrix)
        saved.append(y)
    return np.stack(saved)


def energies(case: Case, states: np.ndarray) -> np.ndarray:
    layers = dict(zip(case.free, case.split(states), strict=True))
    shape = states.shape[:-1]
    every = [
        layers.get(i, np.broadcast_to(x, (*shape, x.shape[-1])))
        for i, x in enumerate(case.activities)
    ]
    return case.free_energy(every)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    case = linear_case()
    return compare(
        INTEGRATORS, case.problem, initial=case.state, tolerances=[1e-4, 1e-8], steps=[5.0, DT],
        **OPTIONS,
    )  # fmt: skip


@pytest.mark.slow
def test_errors_of_euler_are_those_of_numpy(comparison: Comparison) -> None:
    """Every error by its definition, from Euler's update and expm; round-off is all that differs.

    In units of the root mean square displacement, and of the mean loss of energy.
    """
    case = linear_case()
    exact, euler = exact_states(case), euler_states(case, DT)
    unit = np.sqrt(np.mean(np.sum((exact[-1] - exact[0]) ** 2, axis=-1)))
    distance = np.linalg.norm(euler - exact, axis=-1) / unit
    energy, truth = energies(case, euler), energies(case, exact)
    arrived = (np.linalg.norm(euler - exact[-1], axis=-1) / unit <= 0.01).all(axis=-1)
    squares = np.sum((distance[1:] ** 2 + distance[:-1] ** 2) / 2 * np.diff(TIMES)[:, None], axis=0)
    expected = {
        "final_error": distance[-1].max(),
        "maximum_error": distance.max(),
        "l2_error": np.sqrt(squares / T1).max(),
        "energy_error": np.abs(energy - truth).max() / np.mean(truth[0] - truth[-1]),
        "equilibrium_time": TIMES[np.flatnonzero(~arrived)[-1] + 1],
    }
    row = comparison.of("euler")[1]
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(row, name), value, rtol=1e-9, err_msg=name)
    assert arrived[-1] and not arrived[0]
    assert (row.vector_field_evaluations, row.accepted_steps) == (T1 / DT, T1 / DT)
    assert (row.jacobian_evaluations, row.linear_solves, row.rejected_steps) == (0, 0, 0)


def test_adaptive_methods_keep_their_tolerance_and_the_reference_is_better(
    comparison: Comparison,
) -> None:
    """A tolerance ten thousand times tighter helps a hundredfold at least; 1e-8 leaves 1e-6.

    The exact solution and Dopri8 at 1e-12 agree to 1e-11.
    """
    for name in ("tsit5", "LSODA"):
        loose, tight = comparison.of(name)
        assert (loose.value, tight.value) == (1e-4, 1e-8)
        assert tight.maximum_error < min(1e-6, loose.maximum_error / 100)
        assert loose.vector_field_evaluations < tight.vector_field_evaluations
        for row in (loose, tight):
            assert 0 < row.shortest_seconds <= row.run_seconds <= row.longest_seconds
    assert comparison.reference == "exact"
    assert comparison.reference_error.maximum_error < 1e-11
    (exact,) = comparison.of("exact")
    assert exact.maximum_error < 1e-13
    assert "maximum_error" in exact.below_reference
    assert comparison.resolved(exact, "maximum_error") == comparison.reference_error.maximum_error


def test_runs_that_fail_stay_as_such(comparison: Comparison) -> None:
    """Euler at a step of 5 has errors above 1 and is called unstable; no steps, no errors."""
    unstable = comparison.of("euler")[0]
    assert unstable.status is Status.UNSTABLE_STEP
    assert unstable.maximum_error > 1
    assert np.isnan(unstable.equilibrium_time)
    for row in comparison.of("out of steps"):
        assert row.status is Status.MAX_STEPS
        assert np.isnan([row.final_error, row.l2_error, row.energy_error]).all()
    table = comparison.table()
    assert str(comparison) == repr(comparison) == table
    assert "UNSTABLE_STEP" in table and "MAX_STEPS" in table
    for error in (1e-6, 1e3):
        assert "out of steps" in comparison.recommendation(error).missed


def test_other_tolerances_and_steps_do_not_compile_again(
    comparison: Comparison, compilations: list[str]
) -> None:
    """A comparison of the same shapes at other settings compiles nothing, and says so."""
    case = linear_case()
    again = compare(
        INTEGRATORS, case.problem, initial=case.state, tolerances=[1e-5], steps=[0.125], **OPTIONS
    )
    assert not compilations
    assert all(row.compile_seconds < 0.1 for row in again.rows)


def test_values_run_with_their_own_numbers_unless_a_ladder_is_given() -> None:
    """rtol, dt and the default decades; a given trajectory is the reference."""
    case = linear_case()
    truth = simulate(case.problem, t1=T1, times=TIMES, initial=case.state, integrator="exact")
    integrators = [SciPy("LSODA", rtol=1e-5), Euler(dt=DT), "rk45"]
    result = compare(integrators, case.problem, initial=case.state, reference=truth, **OPTIONS)
    assert [(r.setting, r.value) for r in result.rows[:2]] == [("rtol", 1e-5), ("dt", DT)]
    np.testing.assert_allclose([r.value for r in result.of("RK45")], 10.0 ** -np.arange(2, 10))
    assert result.reference == "given (exact)"
    # A thousandth of rtol is the atol, which counts where activities are small.
    for row in result.of("RK45")[:3]:
        again = simulate(
            case.problem, t1=T1, times=TIMES, initial=case.state,
            integrator=SciPy("RK45", rtol=row.value, atol=1e-3 * row.value),
        )  # fmt: skip
        apart = [a - b for a, b in zip(again.activities, truth.activities, strict=True)]
        error = np.linalg.norm(np.concatenate(apart, axis=-1), axis=-1).max()
        assert row.maximum_error == pytest.approx(error / result.displacement, rel=1e-6)
    np.testing.assert_allclose(
        result.of("euler")[0].maximum_error,
        (np.linalg.norm(euler_states(case, DT) - exact_states(case), axis=-1)).max()
        / result.displacement,
        rtol=1e-9,
    )


def test_the_reference_of_a_nonlinear_network_knows_its_error() -> None:
    """Dopri8 against DOP853 at 1e-13 on the field in plain NumPy: what LSODA says, and 1e-10."""
    case = build_case(seed=3, widths=(2, 3, 2, 2), activations=("tanh",))
    start = case.stack([case.activities[i] for i in case.free])

    def field(t: float, y: np.ndarray) -> np.ndarray:
        free = dict(zip(case.free, case.split(y), strict=True))
        layers = tuple(free.get(i, x) for i, x in enumerate(case.activities))
        return case.stack(case.replace(activities=layers).field())

    expected = scipy.integrate.solve_ivp(
        field, (0, T1), start, method="DOP853", t_eval=TIMES[[3, -1]], rtol=1e-13, atol=1e-14
    ).y.T
    found = reference_for(case.problem, t1=T1, times=TIMES, initial=case.state)
    states = case.stack([found.trajectory.activities[i] for i in case.free])[[3, -1]]
    # DOP853's dense output and round-off are below 1e-10; LSODA's own error is what it reports.
    np.testing.assert_allclose(states, expected, rtol=0, atol=1e-10)
    assert 0 < found.uncertainty.maximum_error < 1e-9
    assert "dopri8" in found.method and "LSODA" in found.second


def test_a_float32_problem_is_measured_in_float64() -> None:
    """Round-off of float32 is seen as an error, also where float64 is off; it stays off."""
    case = linear_case()
    with jax.enable_x64(False):
        result = compare(["exact"], case.problem, initial=case.state, **OPTIONS)
        assert not jax.config.jax_enable_x64  # pyright: ignore
    (row,) = result.rows
    assert 1e-9 < row.maximum_error < 1e-5
    assert result.reference_error.maximum_error < 1e-11
    assert not row.below_reference


def made_row(name: str, value: float, error: float, seconds: float, **changes: Any) -> Run:
    errors = dict.fromkeys((*ERROR_METRICS, "equilibrium_time"), error)
    run = Run(
        integrator=name, setting="rtol", value=value, status=Status.REACHED_T1, message="",
        below_reference=(), statistics=Statistics(error, 0.0, error, error, error, seconds),
        shortest_seconds=seconds, longest_seconds=seconds, **errors,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


@pytest.fixture
def made() -> Comparison:
    return Comparison(
        rows=(
            made_row("fast", 1e-2, 5e-2, 0.1),
            made_row("fast", 1e-4, 5e-4, 0.2),
            made_row("slow", 1e-4, 1e-4, 0.5),
            made_row("slow", 1e-8, 1e-12, 0.7, below_reference=("maximum_error",)),
            made_row("wrong", 1e-4, 0.3, 0.01),
            made_row("broken", 1e-4, 1e-7, 0.01, status=Status.UNSTABLE_STEP),
        ),
        reference="by hand", second="nobody", reference_error=Errors(*[1e-10] * 4, 1.0),
        displacement=1.0, energy_loss=1.0, t1=1.0, repeats=1,
    )  # fmt: skip


def test_the_recommendation_follows_from_the_table(made: Comparison) -> None:
    """Fastest successful run within the error, the next integrator, the ratio, and who missed."""
    found = made.recommendation(1e-3)
    assert found.best is made.rows[1] and found.second is made.rows[2]
    assert found.speedup == 0.5 / 0.2
    assert found.missed == ("wrong", "broken")
    for part in ("fast at rtol 0.0001", "2.5 times", "slow at rtol 0.0001", "wrong, broken"):
        assert part in str(found)
    best = made.recommendation(1e-9)
    assert best.best is made.rows[3] and best.second is None
    assert "no other integrator" in str(best)
    # 1e-12 was measured, but the reference tells 1e-10 only.
    with pytest.raises(InputError, match="1e-10"):
        made.recommendation(1e-11)
    nobody = dataclasses.replace(made, rows=made.rows[4:]).recommendation(1e-3)
    assert nobody.best is None and "No run reached" in str(nobody)
    for error, metric in ((-1.0, "maximum_error"), (1e-3, "run_seconds")):
        with pytest.raises(InputError):
            made.recommendation(error, metric=metric)


def test_equally_fast_settings_give_the_one_with_the_fewest_evaluations(made: Comparison) -> None:
    """A run is equally fast if its repeats overlap the fastest's, or its median is within a fifth.

    Of the other integrators as well; a setting that is slower beyond both stays out, however loose.
    """

    def timed(setting: float, evaluations: float, *seconds: float, name: str = "fast") -> Run:
        row = made_row(name, setting, 1e-6, float(np.median(seconds)))
        return dataclasses.replace(
            row,
            statistics=dataclasses.replace(row.statistics, vector_field_evaluations=evaluations),
            shortest_seconds=min(seconds), longest_seconds=max(seconds),
        )  # fmt: skip

    rows = [
        timed(1e-8, 80, 0.9, 1.0, 1.6),
        timed(1e-7, 60, 1.5, 1.55, 1.7),
        timed(1e-6, 50, 1.61, 1.65, 1.7),
        timed(1e-8, 90, 3.0, 3.0, 3.0, name="other"),
        timed(1e-7, 70, 3.5, 3.5, 3.5, name="other"),
    ]
    found = dataclasses.replace(made, rows=tuple(rows)).recommendation(1e-4)
    assert found.best is rows[1] and found.second is rows[4]
    assert found.speedup == 3.5 / 1.55 and "other at rtol 1e-07" in str(found)
    # The last is faster than the setting that is named, which is as fast as the fastest of all.
    for seconds in (1.6, 1.2):
        rows[4] = timed(1e-7, 70, seconds, seconds, seconds, name="other")
        found = dataclasses.replace(made, rows=tuple(rows)).recommendation(1e-4)
        assert found.best is rows[1] and found.second is rows[4]
        assert "as fast within the noise" in str(found)


def test_no_run_starts_when_the_time_is_up(capfd: pytest.CaptureFixture[str]) -> None:
    """The table has every run, those that never began with a status of their own."""
    case = linear_case()
    result = compare(
        INTEGRATORS, case.problem, initial=case.state, tolerances=[1e-4], steps=[DT],
        seconds=1e-9, progress=True, **OPTIONS,
    )  # fmt: skip
    assert {row.status for row in result.rows} == {Status.TIME_LIMIT}
    assert np.isnan([row.maximum_error for row in result.rows]).all()
    assert np.isnan([row.run_seconds for row in result.rows]).all() and not result.ok
    assert "No run reached" in str(result.recommendation(1e-3))
    assert f"{2 * len(result.rows)}/{2 * len(result.rows)}" in capfd.readouterr().err
    with pytest.raises(InputError, match="seconds"):
        compare(["exact"], case.problem, seconds=0.0, **OPTIONS)


def test_the_table_survives_csv_and_xarray(made: Comparison, tmp_path: Path) -> None:
    """Every number to the last bit, and nothing is left of a file that cannot be written."""
    made.to_csv(tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    data = made.to_xarray()
    assert len(read) == len(made.rows) == data.sizes["run"]
    for index, (row, text) in enumerate(zip(made.rows, read, strict=True)):
        assert (text["integrator"], text["status"]) == (row.integrator, row.status.name)
        for name in METRICS:
            assert float(text[name]) == getattr(row, name) == float(data[name][index])
    assert read[3]["below_reference"] == "maximum_error"
    assert bool(data.maximum_error_below_reference[3])
    assert float(read[0]["reference_final_error"]) == data.reference_final_error == 1e-10
    with pytest.raises(DataError):
        made.to_csv(tmp_path / "missing" / "runs.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_the_plot_shows_successful_runs_and_names_the_failed(made: Comparison) -> None:
    """Points are the metrics; failures are counted in the legend; errors end at the reference."""
    figure, axes = plt.subplots()
    fast, slow, wrong, broken = made.plot(axes, x="run_seconds", y="maximum_error")
    assert str(made) == repr(made) == made.summary() and not made.ok
    assert dataclasses.replace(made, rows=made.rows[:2]).ok
    np.testing.assert_array_equal(np.asarray(fast.get_ydata()), [5e-2, 5e-4])
    np.testing.assert_array_equal(np.asarray(slow.get_ydata()), [1e-4, 1e-10])
    assert len(np.asarray(wrong.get_xdata())) == 1 and len(np.asarray(broken.get_xdata())) == 0
    assert broken.get_label() == "broken (1 failed)"
    assert len({line.get_color() for line in (fast, slow, wrong, broken)}) == 4
    assert axes.get_xlabel() == "run seconds (s)" and axes.get_ylabel() == "maximum error"
    with pytest.raises(InputError, match="x must be one of"):
        plotting.work_precision(made, ax=axes, x="speed")
    plt.close(figure)


@pytest.mark.parametrize(
    ("integrators", "changes", "error", "says"),
    [
        ([], {}, IntegratorError, "no integrator"),
        ("tsit5", {}, IntegratorError, "a list"),
        (["tsit5", Diffrax("tsit5", max_steps=9)], {}, IntegratorError, "dictionary"),
        (["euler"], {}, IntegratorError, r"steps=\["),
        (["implicit_euler"], {"tolerances": [1e-3]}, IntegratorError, r"steps=\["),
        (["euler"], {"steps": [-1.0]}, IntegratorError, "above 0"),
        (["tsit5"], {"tolerances": [0.0]}, ToleranceError, "above 0"),
        (["tsit5"], {"tolerances": [1e-16]}, ToleranceError, "finer"),
        (["tsit5"], {"tolerances": []}, InputError, "empty"),
        (["tsit5"], {"repeats": 0}, InputError, "repeats"),
        (["nonsense"], {}, IntegratorError, "unknown"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(
    integrators: Any, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    case = linear_case()
    with pytest.raises(error, match=says):
        compare(integrators, case.problem, **(OPTIONS | {"initial": case.state} | changes))


def test_problems_that_cannot_be_compared_are_refused(comparison: Comparison) -> None:
    """Exact on tanh; a start at rest; a reference at other times."""
    case = linear_case()
    tanh = build_case(seed=3, widths=(2, 3, 2, 2), activations=("tanh",))
    with pytest.raises(NotLinearError):
        compare(["exact"], tanh.problem, **OPTIONS)
    at_rest = InferenceProblem(case.network, input=case.input)
    with pytest.raises(InputError, match="starts at rest"):
        compare(["exact"], at_rest, **OPTIONS)
    other = simulate(case.problem, t1=T1, initial=case.state, integrator="exact")
    with pytest.raises(TimesError, match="other times"):
        compare(["exact"], case.problem, initial=case.state, reference=other, **OPTIONS)
