"""The result of `compare`: a table of runs, and what it recommends."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from pcdyn._support.checks import check_choice, check_instance, check_path, checked_number
from pcdyn._support.files import write_atomically
from pcdyn.analysis.comparison.reference_solution import Errors
from pcdyn.errors import DataError, InputError, Status
from pcdyn.integrators.statistics import COUNTS, MEASURES, Statistics, WithStatistics

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.lines
    import xarray

# Runs whose median times differ by less are equally fast, however little their repeats differ.
_TIMING_NOISE = 1.2

ERROR_METRICS = ("final_error", "maximum_error", "l2_error", "energy_error")
REPEATS = ("shortest_seconds", "longest_seconds")
METRICS = (
    *ERROR_METRICS,
    "equilibrium_time",
    "linear_solves",
    *MEASURES,
    *REPEATS,
)
UNITS = {
    **dict.fromkeys(ERROR_METRICS[:3], "displacement to the reference's end"),
    "energy_error": "energy that the reference loses",
    "equilibrium_time": "activity time constants",
    **{name: measure["units"] for name, measure in MEASURES.items()},
    **dict.fromkeys(REPEATS, "s"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run(WithStatistics):
    """One row of a comparison: an integrator at one setting.

    - `integrator`; `setting`, "rtol", "dt" or empty, and `value`, its number (NaN if none).
    - `status`, `message`: how it ended; of several samples what most of the failed ones share.
    - `final_error`, `maximum_error`, `l2_error`, `energy_error`, `equilibrium_time`: see
      `reference_solution.Errors`; NaN where the run did not reach t1.
    - `below_reference`: the errors that are smaller than what the reference can resolve.
    - `statistics`: the `pcdyn.integrators.Statistics`, whose names are attributes here as well.
      Counts are of the whole batch at once, the mean over samples with `per_sample=True`; NaN where
      the method does not report them. `compile_seconds` is of all programs of this integrator,
      which its runs share; 0 if they were compiled before. `run_seconds` is the median of the
      repeats, of a whole call of `pcdyn.simulate` with what it derives at the saved times.
    - `shortest_seconds`, `longest_seconds`: of the repeats.
    - `linear_solves`: 0 where no Jacobian was evaluated, NaN otherwise.
    """

    integrator: str
    setting: str
    value: float
    status: Status
    message: str
    final_error: float
    maximum_error: float
    l2_error: float
    energy_error: float
    equilibrium_time: float
    below_reference: tuple[str, ...]
    statistics: Statistics
    shortest_seconds: float = math.nan
    longest_seconds: float = math.nan

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and _content(self) == _content(other)

    def __hash__(self) -> int:
        return hash(_content(self))

    @property
    def linear_solves(self) -> float:
        """0 where no Jacobian was evaluated, NaN otherwise."""
        return 0.0 if self.jacobian_evaluations == 0 else math.nan

    def record(self) -> dict[str, Any]:
        """Return setting, status, errors and costs by name, as plain types."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "statistics"]
        record = {name: getattr(self, name) for name in dict.fromkeys((*names, *METRICS))}
        return {**record, "status": self.status.name}

    @property
    def title(self) -> str:
        """The integrator and its setting, such as `"tsit5 at rtol 1e-06"`."""
        if not self.setting:
            return self.integrator
        return f"{self.integrator} at {self.setting} {self.value:g}"


def _content(value: Run | Comparison) -> str:
    """A text to compare by: NaN, which stands for what is not known, is equal to itself there."""
    return repr(dataclasses.astuple(value))


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What a comparison recommends at an error; `str()` gives it as a sentence or two.

    `best` is the fastest run that is accurate enough and `second` the fastest of another
    integrator (`None` where there is none), `speedup` the ratio of their times (NaN without a
    second), `missed` the integrators none of whose runs is accurate enough. Of the settings of one
    integrator that are equally fast, the one with the fewest evaluations is taken: settings are
    equally fast where their repeats overlap or their medians differ by less than a fifth.
    """

    error: float
    metric: str
    best: Run | None
    second: Run | None
    speedup: float
    missed: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Runs of several integrators on one problem, measured against one reference.

    - `rows`: the runs, in the order of the integrators and their settings.
    - `reference`: how the reference was computed; `second` the solver that checked it.
    - `reference_error`: the errors between the two: what the reference can resolve. NaN if the
      second solver failed. A smaller error of a run is kept as measured and named in its
      `below_reference`: it is as good as the reference can resolve, not better than another such.
    - `displacement`, `energy_loss`: the units of the errors, see `reference_solution.Errors`.
    - `t1`, `repeats`: as asked.
    """

    rows: tuple[Run, ...]
    reference: str
    second: str
    reference_error: Errors
    displacement: float
    energy_loss: float
    t1: float
    repeats: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Comparison) and _content(self) == _content(other)

    def __hash__(self) -> int:
        return hash(_content(self))

    @property
    def ok(self) -> bool:
        """Whether every run reached its end without a failure."""
        return all(row.status.ok for row in self.rows)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return the table of the runs."""
        return self.table()

    def plot(
        self,
        ax: matplotlib.axes.Axes | None = None,
        *,
        x: str = "run_seconds",
        y: str = "final_error",
    ) -> list[matplotlib.lines.Line2D]:
        """Draw one metric against another; see `pcdyn.plotting.work_precision`."""
        import pcdyn

        return pcdyn.plotting.work_precision(self, ax=ax, x=x, y=y)

    @property
    def integrators(self) -> tuple[str, ...]:
        """The names of the integrators, each once."""
        return tuple(dict.fromkeys(row.integrator for row in self.rows))

    def of(self, integrator: str) -> tuple[Run, ...]:
        """Return the runs of one integrator."""
        check_choice(integrator, "integrator", self.integrators)
        return tuple(row for row in self.rows if row.integrator == integrator)

    def resolved(self, run: Run, metric: str) -> float:
        """Return a metric of a run, an error not below what the reference can resolve."""
        check_instance(run, "run", Run, "one of the rows")
        check_choice(metric, "metric", (*METRICS, "value"))
        value = getattr(run, metric)
        return getattr(self.reference_error, metric) if metric in run.below_reference else value

    def recommendation(
        self, error: float = 1e-3, *, metric: str = "maximum_error"
    ) -> Recommendation:
        """Recommend the fastest successful run whose `metric` is at most `error`.

        **Raises:**

        - `InputError` for an unknown metric, an error that is not positive, and where the
          reference cannot resolve an error so small.
        """
        check_choice(metric, "metric", ERROR_METRICS)
        error = checked_number(error, "error", above=0)
        limit = getattr(self.reference_error, metric)
        if limit > error:
            raise InputError(
                f"the reference is known to a {_words(metric)} of {limit:.1g} only and cannot "
                f"resolve {error:g}; give a larger error, or a better reference"
            )
        enough = [row for row in self.rows if row.status.ok and self.resolved(row, metric) <= error]
        enough.sort(key=lambda row: row.run_seconds)
        best = _cheapest(enough)
        second = _cheapest([row for row in enough if best and row.integrator != best.integrator])
        speedup = math.nan
        if best and second:
            speedup = float(second.run_seconds / best.run_seconds)
        reached = {row.integrator for row in enough}
        missed = tuple(name for name in self.integrators if name not in reached)
        text = _sentence(error, metric, best, second, speedup, missed)
        return Recommendation(error, metric, best, second, speedup, missed, text)

    def table(self) -> str:
        """Return the runs as plain text, one line each, under a line on the reference.

        `<` marks an error below what the reference can resolve.
        """
        lines = [
            f"reference: {self.reference}; {self.second} differs by "
            f"{self.reference_error.maximum_error:.1g} at most, "
            f"{self.reference_error.final_error:.1g} at the end",
            f"errors in units of the displacement, {self.displacement:.3g}; times in s, the median "
            f"of {self.repeats}",
        ]
        header = (
            "integrator", "setting", "status", "final", "maximum", "L2", "energy", "1 % at t",
            "evaluations", "Jacobians", "accepted", "rejected", "compile", "run",
        )  # fmt: skip
        cells = [header, *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = [
                cell.ljust(width) if index < 3 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def _cells(self, row: Run) -> tuple[str, ...]:
        errors = [
            "<" * (metric in row.below_reference) + _number(self.resolved(row, metric), ".1e")
            for metric in ERROR_METRICS
        ]
        counts = [_number(getattr(row, name), ".0f") for name in COUNTS]
        return (
            row.integrator,
            f"{row.setting} {row.value:g}" if row.setting else "",
            row.status.name,
            *errors,
            _number(row.equilibrium_time, ".3g"),
            *counts,
            _number(float(row.compile_seconds), ".2f"),
            _number(float(row.run_seconds), ".2e"),
        )

    def to_xarray(self) -> xarray.Dataset:
        """Return the table as a data set along `run`, with units and the reference."""
        import xarray

        def column(name: str) -> list[Any]:
            return [getattr(row, name) for row in self.rows]

        variables: dict[str, Any] = {
            name: ("run", column(name), {"units": UNITS.get(name, "1")}) for name in METRICS
        }
        for metric in ERROR_METRICS:
            flags = [metric in row.below_reference for row in self.rows]
            variables[f"{metric}_below_reference"] = ("run", flags)
        variables["message"] = ("run", column("message"))
        coordinates = {name: ("run", column(name)) for name in ("integrator", "setting", "value")}
        coordinates["status"] = ("run", [row.status.name for row in self.rows])
        notes = {f"reference_{name}": error for name, error in vars(self.reference_error).items()}
        names = ("reference", "second", "displacement", "energy_loss", "t1", "repeats")
        attributes = {name: getattr(self, name) for name in names} | notes
        return xarray.Dataset(variables, coords=coordinates, attrs=attributes)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as CSV, and write it to a file if one is given, whole or not at all.

        Numbers are in full precision. One column for each attribute of a run (`below_reference`
        separated by spaces), then those of the reference, the same in every row.

        **Raises:**

        - `DataError` where the file cannot be written.
        """
        if path is not None:
            check_path(path, "path", error=DataError)
        reference = {
            "reference": self.reference,
            **{f"reference_{name}": getattr(self.reference_error, name) for name in ERROR_METRICS},
        }
        text = io.StringIO(newline="")
        records = [row.record() | reference for row in self.rows]
        writer = csv.DictWriter(text, records[0])
        writer.writeheader()
        for record in records:
            writer.writerow({**record, "below_reference": " ".join(record["below_reference"])})
        if path is not None:
            write_atomically(Path(path), text.getvalue().encode())
        return text.getvalue()


def _cheapest(ordered: Sequence[Run]) -> Run | None:
    """Of runs in the order of their times the first, or an equally fast one with less work."""
    if not ordered:
        return None
    fastest = ordered[0]
    settings = [row for row in ordered if row.integrator == fastest.integrator]
    return min((row for row in settings if _equally_fast(fastest, row)), key=_evaluations)


def _evaluations(run: Run) -> float:
    count = run.vector_field_evaluations
    return math.inf if count is None or math.isnan(count) else float(count)


def _equally_fast(one: Run, other: Run) -> bool:
    faster, slower = sorted((one, other), key=lambda row: row.run_seconds)
    # False where the repeats were not kept.
    overlap = slower.shortest_seconds <= faster.longest_seconds
    return overlap or bool(slower.run_seconds < _TIMING_NOISE * faster.run_seconds)


def _sentence(
    error: float,
    metric: str,
    best: Run | None,
    second: Run | None,
    speedup: float,
    missed: Sequence[str],
) -> str:
    what = f"a {_words(metric)} of at most {error:g}"
    if best is None:
        return f"No run reached {what}: tried {', '.join(missed)}."
    text = f"For {what}, {best.title} is the fastest ({_seconds(best)})"
    if second is None:
        text += "; no other integrator reached it."
    # The setting with less work may take longer than the next, which its own fastest does not.
    elif speedup < 1 or _equally_fast(best, second):
        text += f", as fast within the noise of timing as {second.title} ({_seconds(second)})."
    else:
        text += f", {speedup:.2g} times faster than the next, {second.title} ({_seconds(second)})."
    return text + (f" Not reached by {', '.join(missed)}." if missed and second else "")


def _seconds(run: Run) -> str:
    return f"{run.run_seconds:.2g} s"


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
