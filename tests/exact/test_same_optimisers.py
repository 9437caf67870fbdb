"""Which optimisers are taken to be the same, so that nothing is compiled twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcdyn._support.functions import ByCode


@pytest.mark.parametrize("make", [
    lambda: optax.scale(0.1), lambda: optax.scale(np.ones(3)), lambda: optax.scale(jnp.ones(3)),
    lambda: optax.scale(float("nan")), lambda: optax.adam(optax.cosine_decay_schedule(1e-3, 10)),
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
])  # fmt: skip
def test_optimisers_are_the_same_by_code_and_settings(make: Any) -> None:
    assert ByCode(make()) == ByCode(make())
    assert hash(ByCode(make())) == hash(ByCode(make()))


@pytest.mark.parametrize(("one", "other"), [
    *((optax.scale(a), optax.scale(b)) for a, b in [
        (0.1, 0.2), (0.0, -0.0), (1.0, 1), (1, True), (np.ones(3), np.ones(3, np.float32)),
        (np.ones(3), np.ones((3, 1))), (np.ones(3), jnp.ones(3)), ([1.0, 2.0], (1.0, 2.0)),
        ({"a": 1.0}, {"b": 1.0}), (object(), object()), (lambda: 1, lambda: 1),
    ]),
    (optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.9, nesterov=True)), (optax.sgd(0.1), optax.adam(0.1)),
    (optax.sgd(optax.linear_schedule(0.1, 0, 10)), optax.sgd(optax.linear_schedule(0.1, 0, 9))),
])  # fmt: skip
def test_optimisers_of_other_settings_are_others(one: Any, other: Any) -> None:
    assert ByCode(one) == ByCode(one)
    assert ByCode(one) != ByCode(other)


def test_functions_with_defaults_that_call_themselves_have_a_signature() -> None:
    """As those of a library would."""
    names: dict[str, Any] = {"__name__": "optax.of_the_test"}
    source = """
def made(default, keyword):
    def function(depth, size=default, *, name=keyword):
        return function(depth - 1, size, name=name) if depth else (size, name)
    return function
"""
    exec(source, names)
    made = names["made"]
    assert ByCode(made(1.0, "a")) == ByCode(made(1.0, "a"))
    assert ByCode(made(1.0, "a")) != ByCode(made(2.0, "a"))
    assert ByCode(made(1.0, "a")) != ByCode(made(1.0, "b"))
    assert ByCode(partial(made, 1.0)) == ByCode(partial(made, 1.0))
    assert ByCode(partial(made, 1.0)) != ByCode(partial(made, 2.0))
