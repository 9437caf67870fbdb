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


@pytest.mark.slow
@given(odd=odd_calls(QUICK))
@settings(max_examples=900, suppress_health_check=list(HealthCheck))
def test_constructors_and_small_functions(odd: Any) -> None:
    check(*odd)


@pytest.mark.slow
@given(odd=odd_calls(SLOW))
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_verbs(odd: Any) -> None:
    check(*odd)


# What ended in another way once, in a run of `tests.fuzzing`.
FOUND: list[tuple[str, dict[str, str]]] = [
    ("Dense", {"activation": "ndarray (3,) float64"}),
    ("Network", {"input_width": "ndarray (3,) float64"}),
    ("Network", {"input_width": "one Series"}),
    ("mlp", {"dtype": "the samples"}),
    ("mlp", {"dtype": "PRNGKeyArray (2,) key<fry>"}),
    ("load_problem", {"dtype": "PRNGKeyArray (2,) key<fry>"}),
    ("interpolated", {"depth": "int 1000000000000000000000000000000000000000"}),
    ("interpolated", {"depth": "int 2147483648"}),
    ("interpolated", {"depth": "ArrayImpl 2"}),
    ("open random_state", {"batch_size": "int 1000000000000000000000000000000000000000"}),
    ("stability_interval", {"method": "ndarray (0,) float64"}),
    ("Trajectory.to_netcdf", {"path": "PosixPath ."}),
    ("of", {"integrator": "one Series"}),
    ("rise", {"start": "generator"}),
    ("rise", {"end": "ndarray (3,) float64"}),
    ("loss", {"error": "ndarray (2, 3, 4) float64"}),
    ("CustomEnergy", {"function": "one Dropout"}),
    ("compare", {"t1": "Fraction 1/3"}),
    ("convergence_order", {"reference": "list [0.5, -0.2, 1.0]"}),
    ("phase_portrait", {"resolution": "int 1000000000000000000000000000000000000000"}),
    ("single_layer_flow", {"problem": "NoneType None"}),
    ("train", {"batch_size": "ArrayImpl 2"}),
    ("train", {"evaluate": "builtin_function_or_method <built-in function len>"}),
    ("train", {"evaluate": "Activation Activation('tanh')"}),
    ("plotting.distance", {"label": "list [1, 2]"}),
    ("plotting.mean_band", {"color": "map"}),
    ("Posterior.sample", {"count": "int 1000000000000000000000000000000000000000"}),
]


@pytest.mark.parametrize(("name", "changes"), FOUND)
def test_what_was_found(name: str, changes: dict[str, str]) -> None:
    check(name, changes)
