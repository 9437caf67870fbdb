"""Failure is a property of a status, whatever its number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn import EquilibriumStatus, Status
from pcdyn.errors import worst_status


@pytest.mark.parametrize("kind", [Status, EquilibriumStatus])
def test_what_failed_is_what_is_not_ok(kind: Any) -> None:
    codes = np.array([int(status) for status in kind])
    expected = [not status.ok for status in kind]
    assert [bool(kind.failed(status)) for status in kind] == expected
    np.testing.assert_array_equal(kind.failed(codes), expected)
    np.testing.assert_array_equal(jax.jit(kind.failed)(jnp.asarray(codes)), expected)


def test_the_failure_that_most_samples_share_is_reported() -> None:
    limit, diverged = int(Status.MAX_STEPS), int(Status.NON_FINITE)
    assert worst_status([0, limit, diverged, limit, 1, 1, 1]) is Status.MAX_STEPS
    assert worst_status([1, 0]) is Status.REACHED_T1
    assert worst_status(np.array(1)) is Status.CONVERGED
