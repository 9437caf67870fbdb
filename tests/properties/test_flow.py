"""What every flow of every network obeys: descent, clamps, batches, symmetries, time.

The shapes are fixed and only seeds are drawn, so that each program is compiled once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcdyn import Euler, SciPy, UntilEquilibrium, simulate
from tests.networks import EPS, Case, assert_close, build_case, few

WIDTHS = (3, 3, 2, 2)
T1, DT = 2.0, 0.05
TIMES = np.linspace(0, T1, 9)
RTOL, ATOL = 1e-6, 1e-9  # the defaults in float64
SEEDS = st.integers(0, 2**32 - 1)
# Forty updates of fewer than 1000 operations; tanh networks can stretch them by e^(μ T1) < 1e2.
ROUND_OFF = 40 * 1e5 * EPS
# Two runs, each within the tolerance per step, which the flow can stretch ten times.
AGREE = 20 * (RTOL + ATOL)


def tanh_case(seed: int, **options: Any) -> Case:
    return build_case(seed=seed, widths=WIDTHS, activations=("tanh",), bias=True, **options)


def run(case: Case, integrator: Any, **options: Any) -> Any:
    options = {"t1": T1, "times": TIMES, "initial": case.state, **options}
    return simulate(case.problem, integrator=integrator, **options)


def layers_at(trajectory: Any, k: int) -> list[np.ndarray]:
    return [x[k] for x in trajectory.activities]


def gradient_size(case: Case, layers: Any) -> float:
    """‖∂F/∂x‖ in NumPy, with unit time constants."""
    field = case.replace(activities=tuple(layers)).field()
    return float(np.linalg.norm(case.stack(field)))


@few(max_examples=10)
@given(seed=SEEDS)
def test_the_free_energy_never_rises(seed: int) -> None:
    """F in NumPy at saved times, by DOP853 and by Euler with a small step.

    A solver's state is off by δ ≤ 10 (rtol max|y| + atol) √N, and F with it by ‖∂F‖ δ + ½ λ δ²;
    between saved times the exact flow only falls. Euler with dt < 2/λ_max falls at each update.
    """
    case = tanh_case(seed, precision="full")
    for integrator, off in (("dop853", 10.0), (Euler(dt=0.01), 0.0)):
        trajectory = run(case, integrator)
        states = [layers_at(trajectory, k) for k in range(len(TIMES))]
        energies = np.array([case.free_energy(layers) for layers in states])
        slope = max(gradient_size(case, layers) for layers in states)
        largest = max(1.0, *(float(np.abs(x).max()) for x in trajectory.activities))
        delta = off * (RTOL * largest + ATOL) * np.sqrt(5)
        slack = 2 * slope * delta + 1e3 * EPS * energies[0]
        assert np.all(np.diff(energies) <= slack), (energies, slack)
        assert energies[-1] < energies[0]


@few(max_examples=9)
@given(seed=SEEDS, clamp=st.sampled_from(["both", "input", "output"]))
def test_clamped_layers_never_move_and_free_ones_do(seed: int, clamp: str) -> None:
    """To the last bit, at every saved time."""
    case = tanh_case(seed, clamp=clamp, batch=3)
    trajectory = run(case, "dop853")
    for index, x in enumerate(trajectory.activities):
        assert x.shape == (len(TIMES), 3, WIDTHS[index])
        moved = np.any(x != case.activities[index], axis=-1)
        assert not moved[0].any()
        assert np.all(moved[1:] == (index in case.free))


@pytest.mark.slow
@few(max_examples=5)
@given(seed=SEEDS)
def test_a_batch_is_the_loop_over_its_samples(seed: int) -> None:
    """Euler: to round-off. LSODA: the steps differ, so that they agree within the tolerance."""
    case = tanh_case(seed, batch=3)
    for integrator, tolerance in ((Euler(dt=DT), ROUND_OFF), (SciPy("LSODA"), AGREE)):
        together = run(case, integrator)
        for row in range(3):
            alone = run(case.sample(row), integrator)
            for ours, theirs in zip(together.activities, alone.activities, strict=True):
                assert_close(ours[:, row], theirs, tolerance)
            assert_close(together.energies[:, row], alone.energies, 10 * tolerance)


@few(max_examples=10)
@given(seed=SEEDS)
def test_hidden_units_may_be_permuted(seed: int) -> None:
    """Permuting the units of layer 1 permutes its trajectory and changes no other."""
    case = tanh_case(seed)
    order = np.random.default_rng(seed).permutation(WIDTHS[1])
    weights, biases, activities = (list(x) for x in (case.weights, case.biases, case.activities))
    weights[0], weights[1] = weights[0][order], weights[1][:, order]
    biases[0], activities[1] = biases[0][order], activities[1][order]
    permuted = dataclasses.replace(
        case, weights=tuple(weights), biases=tuple(biases), activities=tuple(activities)
    )
    for integrator, tolerance in ((Euler(dt=DT), ROUND_OFF), ("dop853", AGREE)):
        ours = list(run(permuted, integrator).activities)
        theirs = list(run(case, integrator).activities)
        theirs[1] = theirs[1][:, order]
        assert_close(ours, theirs, tolerance)


@pytest.mark.slow
@few(max_examples=10)
@given(seed=SEEDS)
def test_time_has_no_origin(seed: int) -> None:
    """Going on from the middle is the same trajectory: Euler to the last bit."""
    case = tanh_case(seed)
    for integrator, tolerance in ((Euler(dt=DT), 0.0), ("dop853", AGREE)):
        whole = run(case, integrator)
        half = run(case, integrator, t1=T1 / 2, times=TIMES / 2)
        middle = tuple(half.final[i] for i in case.free)
        # Nine times from the middle to the end; those of `whole` are every second of them.
        rest = run(case, integrator, t1=T1 / 2, times=TIMES / 2, initial=middle)
        later = [x[::2] for x in rest.activities]
        assert_close(later, [x[4:] for x in whole.activities], tolerance)


@few(max_examples=8)
@given(seed=SEEDS)
def test_loss_and_free_energy_are_ordered(seed: int) -> None:
    """ℒ(x*) ≤ F(x*) ≤ F(feedforward) = ℒ(feedforward), all in NumPy, for tanh networks.

    The second is strict unless the target is the network's own output. Energies are sums of
    fewer than 1000 operations.
    """
    case = tanh_case(seed, precision="diagonal")
    until = UntilEquilibrium(tolerance=1e-4)
    trajectory = run(case, "lsoda", t1=1e4, times=[0.0, 1e4], initial="feedforward", until=until)
    start, rest = layers_at(trajectory, 0), list(trajectory.final)
    assert_close(start[1:-1], case.feedforward(case.activities[0])[1:-1], 1e3 * EPS)
    before, after = case.layer_energies(start), case.layer_energies(rest)
    slack = 1e3 * EPS * before.sum()
    assert after[-1] <= after.sum() + slack
    assert after.sum() < before.sum()
    assert abs(before.sum() - before[-1]) <= slack
    assert gradient_size(case, rest) <= 1.01e-4 * np.sqrt(2)
    assert abs(trajectory.free_energy[-1] - after.sum()) <= slack
    assert abs(trajectory.output_loss[0] - trajectory.free_energy[0]) <= slack


@pytest.mark.slow
@few(max_examples=10)
@given(seed=SEEDS)
def test_scaling_all_precisions_rescales_time(seed: int) -> None:
    """With c Π_l for all layers, x(t) is x(c t) of Π_l; Euler with dt/c takes the same updates."""
    case = tanh_case(seed, precision="diagonal")
    c = float(np.exp(np.random.default_rng(seed).uniform(-1, 1)))
    scaled = case.replace(precisions=tuple(c * p for p in case.precisions))
    slow = run(case, "dop853")
    fast = run(scaled, "dop853", t1=T1 / c, times=TIMES / c)
    assert_close(fast.activities, slow.activities, AGREE)
    assert_close(fast.energies, c * slow.energies, 10 * AGREE)
    slow = run(case, Euler(dt=DT))
    fast = run(scaled, Euler(dt=DT / c), t1=T1 / c, times=TIMES / c)
    assert fast.accepted_steps == slow.accepted_steps == 40
    assert_close(fast.activities, slow.activities, ROUND_OFF)
