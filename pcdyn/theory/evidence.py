"""One measured number, what it is compared with, and the verdict: for theory and for figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import xarray

_COLUMNS = (
    "statement", "relation", "oracle", "measured", "expected", "tolerance", "expected_to_hold",
    "holds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One number measured for one statement of the paper.

    **Arguments:**

    - `statement`: where the paper says it, such as "Theorem 3.4", "Eq 31" or "3A" for a panel.
    - `claim`: what is measured, in one line; for an erratum with the form that is meant.
    - `measured`, `relation`, `expected`, `tolerance`: the claim holds if `measured` is `equal` to
      `expected` within `tolerance`, `at most` or `at least` `expected`, or strictly `below` or
      `above` it, `tolerance` allowed. A measured value that is not finite never holds, and is not
      as known for a finding either.
    - `oracle`: what the code under test is compared with, which does not share that code.
    - `settings`: how many networks, widths, seeds, tolerances.
    - `expected_to_hold`: false for a claim of the paper that is known not to hold (a finding).
    - `note`: what else was measured, in words.
    - `timed`: whether seconds are compared, which another load of the machine changes.
    - `error`: one standard error of `measured` over random draws, zero if it is no estimate.
    """

    statement: str
    claim: str
    measured: float | int
    relation: Literal["equal", "at most", "at least", "below", "above"]
    expected: float | int
    tolerance: float = 0.0
    oracle: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    expected_to_hold: bool = True
    note: str = ""
    timed: bool = False
    error: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the number is what the claim says."""
        excess = self.measured - self.expected
        verdicts = {
            "equal": abs(excess) <= self.tolerance,
            "at most": excess <= self.tolerance,
            "at least": excess >= -self.tolerance,
            "below": excess < self.tolerance,
            "above": excess > -self.tolerance,
        }
        # A NumPy number gives a NumPy verdict.
        return bool(math.isfinite(self.measured) and verdicts[self.relation])

    @property
    def as_known(self) -> bool:
        """Whether the verdict is the one on record; a run with another verdict fails."""
        # Code that gives NaN or infinity would otherwise confirm any finding.
        return math.isfinite(self.measured) and self.holds == self.expected_to_hold

    @property
    def verdict(self) -> str:
        """The verdict in words, as tables print it."""
        if self.as_known:
            return "holds" if self.holds else "does not hold (finding)"
        return "holds (UNEXPECTED)" if self.holds else "FAILS"


def evidence_to_xarray(evidence: Sequence[Evidence]) -> xarray.Dataset:
    """Lay evidence out along the dimension `claim`, without `note`, `timed` and `error`.

    Settings are JSON.
    """
    import xarray

    columns = {name: [getattr(e, name) for e in evidence] for name in _COLUMNS}
    columns["settings"] = [json.dumps(dict(e.settings), ensure_ascii=False) for e in evidence]
    # Not a coordinate: the texts of claims are data.
    columns["text"] = [e.claim for e in evidence]
    return xarray.Dataset({name: ("claim", values) for name, values in columns.items()})


def evidence_from_xarray(data: xarray.Dataset) -> list[Evidence]:
    """Take the evidence out of a data set that `evidence_to_xarray` made, whatever else it has."""
    columns = {name: data[name].values.tolist() for name in _COLUMNS if name != "holds"}
    columns["claim"] = data.text.values.tolist()
    columns["settings"] = [json.loads(text) for text in data.settings.values]
    return [
        Evidence(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]
