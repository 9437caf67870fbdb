"""Whatever a public function is given, it returns a result or raises a named error, and soon.

A result that says it is a success is held against a gradient in NumPy. `python -m tests.fuzzing`
makes more calls of the same kind than a suite has time for.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import attempt, calls, is_long, odd_values

pytestmark = pytest.mark.unchecked

QUICK = [name for name, call in calls().items() if not call.slow]
SLOW = [name for name, call in calls().items() if call.slow]


@st.composite
def odd_calls(draw: st.DrawFn, names: list[str]) -> tuple[str, dict[str, str]]:
    """A public function and odd values for one to three of its arguments."""
    call = calls()[draw(st.sampled_from(names))]
    chosen = draw(st.lists(st.sampled_from(call.parameters), min_size=1, max_size=3, unique=True))
    return call.name, {name: draw(st.sampled_from(sorted(odd_values()))) for name in chosen}


def check(name: str, changes: dict[str, str]) -> None:
    call = calls()[name]
    if not is_long(call, changes):
        outcome = attempt(call, changes)
        assert outcome.fine, f"{name} with {changes}: {outcome.kind}: {outcome.detail}"


@given(odd=odd_calls(QUICK))
@settings(max_examples=900, suppress_health_check=list(HealthCheck))
def test_constructors_and_small_functions(odd: Any) -> None:
    check(*odd)


@given(odd=odd_calls(SLOW))
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_verbs(odd: Any) -> None:
    check(*odd)
