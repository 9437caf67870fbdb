"""`verify`: measure the statements of the paper on random networks, and give the verdicts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from pcdyn._support.checks import checked_integer
from pcdyn.errors import InputError
from pcdyn.theory.evidence import Evidence, evidence_to_xarray
from pcdyn.theory.registry import select
from pcdyn.theory.statement import Statement

if TYPE_CHECKING:
    import matplotlib.artist
    import matplotlib.axes
    import xarray


@dataclasses.dataclass(frozen=True)
class Measured:
    """A statement with its evidence, and the seconds that it took."""

    statement: Statement
    evidence: tuple[Evidence, ...]
    seconds: float

    @property
    def as_known(self) -> bool:
        """Whether every claim has the verdict on record."""
        return all(e.as_known for e in self.evidence)


@dataclasses.dataclass(frozen=True)
class Verification:
    """Statements with their evidence, in the order of the registry, as `verify` returns them."""

    measured: tuple[Measured, ...]
    seed: int
    networks: int

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The evidence of all statements, one after the other."""
        return tuple(e for each in self.measured for e in each.evidence)

    @property
    def ok(self) -> bool:
        """Whether every verdict is the one on record."""
        return all(each.as_known for each in self.measured)

    @property
    def unexpected(self) -> tuple[str, ...]:
        """The claims with another verdict, one line each."""
        return tuple(
            f"{e.statement}: {e.claim}: {e.measured:.3g}, {e.verdict}"
            for e in self.evidence
            if not e.as_known
        )

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Count the claims that hold, and the verdicts other than those on record."""
        holds = sum(e.holds for e in self.evidence)
        return (
            f"Statements: {len(self.measured)}. Claims: {len(self.evidence)}, of which {holds} "
            f"hold and {len(self.evidence) - holds} do not; {len(self.unexpected)} verdicts are "
            f"other than those on record (seed {self.seed}, {self.networks} networks each)."
        )

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> list[matplotlib.artist.Artist]:
        """Draw a row for each statement, with a mark for each claim: whether it holds."""
        from pcdyn.plotting.style import checked_axes
        from pcdyn.theory.pictures import verdicts

        return [*verdicts(self.evidence, ax=checked_axes(ax))]

    def table(self) -> str:
        """Return each statement with its verdict as printed, then a line for each claim."""
        lines = []
        for each in self.measured:
            statement = each.statement
            lines.append(f"{statement.number}: {statement.title}. As printed: "
                         f"{statement.as_printed}. What holds: {statement.form} "
                         f"{statement.further}".rstrip())  # fmt: skip
            lines += [
                f"  {e.verdict:<24} {e.measured:>10.3g} {expectation(e):<24} {e.claim}"
                for e in each.evidence
            ]
        return "\n".join([*lines, self.summary()])

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each statement, of plain Python types."""
        return [
            {
                "number": each.statement.number,
                "also": each.statement.also,
                "definitions": each.statement.definitions,
                "title": each.statement.title,
                "says": each.statement.says,
                "as_printed": each.statement.as_printed,
                "form": each.statement.form,
                "seconds": each.seconds,
                "evidence": [
                    {**dataclasses.asdict(e), "holds": e.holds, "verdict": e.verdict}
                    for e in each.evidence
                ],
            }
            for each in self.measured
        ]

    def to_xarray(self) -> xarray.Dataset:
        """Return the evidence along the dimension `claim`, settings as JSON."""
        data = evidence_to_xarray(self.evidence)
        return data.assign_attrs(seed=self.seed, networks=self.networks)


def expectation(evidence: Evidence) -> str:
    """Write what a measured number is compared with, such as "= 0 ± 1e-08" or "≤ 1"."""
    sign = {"equal": "=", "at most": "≤", "at least": "≥", "below": "<", "above": ">"}[
        evidence.relation
    ]
    slack = f" ± {evidence.tolerance:.2g}" if evidence.tolerance else ""
    return f"{sign} {evidence.expected:.3g}{slack}"


def verify(
    names: Sequence[str] = (),
    *,
    seed: int = 0,
    networks: int = 20,
    progress: Callable[[Statement], None] | None = None,
) -> Verification:
    """Measure the statements of the paper on random networks.

    **Arguments:**

    - `names`: which statements (see `pcdyn.theory.select`); all unless given.
    - `seed`: of everything random.
    - `networks`: how many random networks each statement is measured on, at least 2 and at most
      10⁶.
    - `progress`: called with each statement before it is measured.

    **Raises:**

    - `InputError` for a name of no statement, other numbers than these, and if float64 is off: in
      float32 most of these numbers are round-off.
    """
    chosen = select(names)
    checked_integer(networks, "networks", at_least=2, at_most=10**6)
    checked_integer(seed, "seed", at_least=0, at_most=2**63 - 1)
    if jnp.zeros(()).dtype != jnp.float64:
        raise InputError(
            "theorems are checked in float64, which is off: "
            'jax.config.update("jax_enable_x64", True) switches it on'
        )
    measured = []
    for statement in chosen:
        if progress is not None:
            progress(statement)
        started = time.perf_counter()
        evidence = statement.measure(seed=seed, networks=networks)
        measured.append(Measured(statement, evidence, time.perf_counter() - started))
    return Verification(tuple(measured), seed, networks)
