"""What cannot be allocated is refused by its counted size, before anything is."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

import pcdyn
from pcdyn import linear
from pcdyn._support import arrays
from pcdyn.errors import SizeError

KEY = jax.random.key(0)


def small(widths: list[int], activation: str = "tanh") -> pcdyn.Network:
    return pcdyn.mlp(widths, activation=activation, key=KEY)


def clamped(widths: list[int], activation: str = "tanh") -> pcdyn.InferenceProblem:
    network = small(widths, activation)
    return pcdyn.InferenceProblem(network, input=np.ones(widths[0]), output=np.ones(widths[-1]))


# With the bytes that each would take, in GiB: the product of what it names, 8 bytes a number.
TOO_LARGE: dict[str, tuple[Callable[[], object], float]] = {
    "weights": (lambda: small([10**6, 10**6]), 8e12),
    "a batch": (
        lambda: pcdyn.InferenceProblem(small([3, 4, 2])).random_state(KEY, batch_size=10**11),
        8e11 * 9,
    ),
    "zeros": (
        lambda: pcdyn.InferenceProblem(small([3, 4, 2])).zeros_state(batch_size=10**11), 8e11 * 9
    ),
    "dense output": (
        lambda: pcdyn.simulate(
            clamped([3, 4, 2]), t1=1.0, dense=True, integrator=pcdyn.Diffrax(max_steps=10**12)
        ),
        2 * 4 * 8e12,
    ),
    "a grid": (lambda: pcdyn.phase_portrait(clamped([3, 2, 2]), resolution=10**6), 0.0),
    "a Hessian": (lambda: linear.hessian(clamped([2, 10**6, 2], "identity")), 8e12),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LARGE)
def test_sizes_are_counted_first(case: str) -> None:
    call, size = TOO_LARGE[case]
    with pytest.raises(SizeError, match=r"GiB.*% of the .* GiB of memory") as caught:
        call()
    if size:
        assert f"{size / 2**30:.3g} GiB" in str(caught.value)


def test_saved_states_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine of a megabyte: 4 units, 10000 times, 8 bytes, with the errors.
    monkeypatch.setattr(arrays, "_machine_memory", lambda: 2**20)
    problem = clamped([3, 4, 2])
    with pytest.raises(SizeError, match="saving 10000 times"):
        pcdyn.simulate(problem, t1=1.0, times=np.linspace(0, 1, 10_000))


def test_all_modes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine of a megabyte the Hessian of 200 units fits in, 0.3 MB, but not twice that.
    monkeypatch.setattr(arrays, "_machine_memory", lambda: 2**20)
    with pytest.raises(SizeError, match="all modes of 200 units"):
        linear.spectrum(clamped([2, 200, 2], "identity"))


def test_what_fits_is_not_refused() -> None:
    assert small([1000, 1000]).widths == (1000, 1000)
