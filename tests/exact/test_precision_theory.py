"""The evidence on the variational free energy has the verdicts on record."""

from __future__ import annotations

from typing import Any

import pytest

from pcdyn.theory.precisions import (
    degenerate_point_posterior,
    marginal_likelihood,
    recovered_covariance,
)


@pytest.mark.parametrize(
    ("measure", "options", "holding"),
    [
        (marginal_likelihood, {"networks": 2}, [True, False]),
        (degenerate_point_posterior, {}, [False, True, True]),
        (recovered_covariance, {"samples": 500}, [True, True, False, True]),
    ],
)
def test_verdicts(measure: Any, options: dict[str, Any], holding: list[bool]) -> None:
    """Each entry holds or not as its derivation says, here by hand, and as it says itself."""
    entries = measure(**options)
    assert [entry.holds for entry in entries] == holding
    assert all(entry.as_known for entry in entries)
