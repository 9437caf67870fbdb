"""Every run ends: with the solution, or with a named status and what was reached up to then."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from pcdyn import Diffrax, Euler, SciPy, Status, UntilEquilibrium, mlp, simulate
from pcdyn.errors import IntegratorError, StepLimitError, TimesError
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from tests.networks import EPS, assert_close, build_case

pytestmark = pytest.mark.unchecked

# A flow that slides, in closed form: the hidden layer is drawn to A, the prediction relu(w·h) of
# the target Y < 0 drives it back where w·h > 0, so that w·h = 0 is a valley. Across it the flow
# stops at zero, along it nothing changes.
A, W, Y, START, T1 = np.array([2.0, 0.5]), np.array([0.6, 0.8]), -4.0, np.array([-1.0, -1.0]), 5.0


def sliding_problem(dtype: Any = np.float64) -> InferenceProblem:
    layers = [
        Dense(A[:, None].astype(dtype)),
        Dense(W[None].astype(dtype), activation="relu"),
    ]
    return InferenceProblem(Network(layers), input=[1.0], output=[Y])


def sliding_solution(times: np.ndarray) -> np.ndarray:
    free = A + np.exp(-times)[:, None] * (START - A)
    across = free @ W
    return free - np.maximum(across, 0)[:, None] * W


def run(integrator: Any, dtype: Any = np.float64, **options: Any) -> Any:
    return simulate(
        sliding_problem(dtype), t1=T1, initial=[START.astype(dtype)], integrator=integrator,
        throw=False, **options,
    )  # fmt: skip


def test_the_closed_form_slides() -> None:
    """Within 10⁻³, ten of its steps, of explicit Euler in NumPy."""
    dt, h = 1e-4, START
    for _ in range(round(T1 / dt)):
        z = W @ h
        h = h - dt * (h - A - W * (z > 0) * (Y - max(z, 0)))
    np.testing.assert_allclose(sliding_solution(np.array([T1]))[0], h, atol=10 * dt)


# The width over which kinks are rounded is 1e-6 of a preactivation of at most 4 (float32: √eps =
# 3.5e-4), the activities are wrong by no more, and the steps by a few tolerances (1e-6 and 1e-4).
@pytest.mark.parametrize("name", ["tsit5", "kvaerno3", "implicit_euler", "rodas5p"])
def test_the_fallback_slides(name: str) -> None:
    """Adaptive methods give up after their steps, and the fallback brings the sliding flow."""
    result = run(Diffrax(name, max_steps=600))
    assert result.status is Status.REACHED_T1 and "kinks rounded" in result.fallback
    np.testing.assert_allclose(
        result.activities[1], sliding_solution(result.times), rtol=0, atol=1e-5
    )


def test_the_fallback_slides_in_float32() -> None:
    result = run(Diffrax(max_steps=600), np.float32)
    assert result.status is Status.REACHED_T1 and "kinks rounded" in result.fallback
    np.testing.assert_allclose(
        result.activities[1], sliding_solution(result.times), rtol=0, atol=2e-3
    )


def test_rest_at_a_kink_is_found() -> None:
    """The sliding flow comes to rest, where the field of the kinked problem does not vanish."""
    result = simulate(
        sliding_problem(), t1=100.0, initial=[START], until="equilibrium",
        integrator=Diffrax(max_steps=600),
    )  # fmt: skip
    assert result.status is Status.CONVERGED
    np.testing.assert_allclose(result.final[1], A - (A @ W) * W, atol=1e-5)


@pytest.mark.parametrize("method", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
def test_scipy_ends_with_what_was_reached(method: str) -> None:
    """The saved rows are right up to the end, whether it is t1 or that of the steps."""
    result = run(SciPy(method, max_steps=100))
    # BDF's step vanishes where its Newton iteration jumps between the sides of the kink.
    assert result.status in (Status.REACHED_T1, Status.MAX_STEPS, Status.STEP_TOO_SMALL)
    # The kink is met at ln 1.875 = 0.6286, after a few dozen steps of a smooth flow.
    assert result.end_time > 0.62
    np.testing.assert_allclose(
        result.activities[1], sliding_solution(result.times), rtol=0, atol=1e-4
    )
    if result.status is Status.MAX_STEPS:
        assert result.accepted_steps <= 100 and "kinks" in result.message


def test_a_batch_slides_sample_by_sample() -> None:
    """As one run of the batch: one status, and the rows of explicit Euler in NumPy."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(6, 3)) / 2, rng.normal(size=(4, 6)) / 2]
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 4))
    problem = InferenceProblem(
        Network([Dense(weight, activation="relu") for weight in weights]), input=x, output=y
    )
    dt, h = 1e-4, np.maximum(x @ weights[0].T, 0)
    drive = h
    for _ in range(round(1 / dt)):
        z = h @ weights[1].T
        h = h - dt * (h - drive - ((z > 0) * (y - np.maximum(z, 0))) @ weights[1])
    result = simulate(problem, t1=1.0, integrator=Diffrax(max_steps=400))
    assert result.status is Status.REACHED_T1 and "kinks rounded" in result.fallback
    assert np.shape(result.end_time) == () and result.activities[1].shape == (101, 5, 6)
    # Ten steps of Euler, as above.
    np.testing.assert_allclose(result.final[1], h, rtol=0, atol=10 * dt)


def test_a_start_on_a_ridge_rests_there() -> None:
    """Where the hidden layer is dead all preactivations are zero, at ridges and valleys.

    The activation's slope there is zero, so that nothing moves; the sample beside it slides.
    """
    layers = [Dense(np.eye(2), activation="relu"), Dense(np.eye(2), activation="relu")]
    problem = InferenceProblem(
        Network(layers), input=[[-1.0, -1.0], [0.5, 0.5]], output=[[1.0, 1.0], [-9.0, 1.0]]
    )
    result = simulate(problem, t1=3.0, integrator=Diffrax(max_steps=400))
    assert "kinks rounded" in result.fallback
    np.testing.assert_allclose(result.final[1][0], [0.0, 0.0], atol=1e-12)
    # Unit 0 is driven to the kink and held in it; unit 1 follows h' = 1.5 − 2h.
    expected = [0.0, 0.75 - 0.25 * np.exp(-6.0)]
    np.testing.assert_allclose(result.final[1][1], expected, atol=1e-5)


TANH = build_case(seed=8, widths=(3, 3, 2, 2), activations=("tanh",))
BATCH = build_case(seed=8, widths=(3, 3, 2, 2), activations=("tanh",), batch=2)
LINEAR = build_case(seed=8, widths=(3, 2, 2))


def test_the_fallback_takes_over_from_a_root_finder() -> None:
    """A root finder that may take no step fails at every step, until the step vanishes or so."""
    import diffrax

    solver = diffrax.Kvaerno3(
        root_finder=diffrax.VeryChord(rtol=1e-6, atol=1e-9), root_find_max_steps=1
    )
    result = simulate(TANH.problem, t1=1.0, initial=TANH.state, integrator=Diffrax(solver))
    assert result.ok and "LSODA" in result.fallback


@pytest.mark.parametrize("method", ["RK45", "LSODA", "BDF"])
def test_the_seconds_end_a_run(method: str) -> None:
    """Steps without end, as far as a test is concerned, and the rows before are right."""
    begin = time.monotonic()
    integrator = SciPy(method, rtol=1e-13, atol=1e-16, max_steps=10**9)
    result = simulate(
        TANH.problem, t1=1e9, times=np.linspace(0, 1e9, 10**3), initial=TANH.state,
        until=UntilEquilibrium(1e-300), integrator=integrator, seconds=0.5, throw=False,
    )  # fmt: skip
    # A step's evaluation and the compilation before the first do not stop half-way.
    assert time.monotonic() - begin < 60
    assert result.status in (Status.TIME_LIMIT, Status.REACHED_T1, Status.STEP_TOO_SMALL)
    assert np.isfinite(result.final[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["euler", "until", "dense", "per_sample"])
def test_the_seconds_end_a_compiled_run(name: str) -> None:
    """It stops between two steps, and what it has is what a run without a limit has."""
    method = Euler(dt=1e-3) if name == "euler" else Diffrax("tsit5", dt=1e-3, max_steps=10**5)
    options: dict[str, Any] = {
        "integrator": method, "initial": BATCH.state, "times": [0.0, 0.01, 0.02, 90.0],
    }  # fmt: skip
    if name == "until":
        options["until"] = UntilEquilibrium(1e-300)
    elif name in ("dense", "per_sample"):
        options[name] = True
    # The first call compiles; a slow machine takes a second for the memory of the steps.
    for seconds in (1e-9, 0.5, 8.0):
        result = simulate(BATCH.problem, t1=90.0, seconds=seconds, throw=False, **options)
        assert np.all(np.asarray(result.status_codes) == Status.TIME_LIMIT)
        ends = np.asarray(result.end_time)
        if np.all(ends > 0.02):
            break
    assert np.all((ends > 0.02) & (ends < 90))
    options["times"] = [0.0, 0.01, 0.02]
    free = simulate(BATCH.problem, t1=0.02, **options)
    for limited, unlimited in zip(result.activities, free.activities, strict=True):
        assert_close([limited[:3]], [unlimited], 1e2 * EPS)


def test_seconds_that_would_not_be_kept_are_refused() -> None:
    with pytest.raises(IntegratorError, match="closed form takes no steps"):
        simulate(LINEAR.problem, t1=1.0, integrator="exact", seconds=1.0)
    with pytest.raises(IntegratorError, match="when JAX traces this call"):
        jax.jit(lambda state: simulate(TANH.problem, t1=1.0, initial=state, seconds=1.0).energies)(
            TANH.state
        )


@pytest.mark.parametrize("method", ["rk45", "tsit5", Euler(dt=0.01)])
def test_no_time_at_all_is_a_status(method: Any) -> None:
    result = run(method, seconds=1e-9)
    assert result.status is Status.TIME_LIMIT and result.end_time == 0
    assert_close([result.final[1]], [START], 0)
    with pytest.raises(StepLimitError, match="TIME_LIMIT") as caught:
        simulate(TANH.problem, t1=1.0, integrator="lsoda", seconds=1e-9)
    assert caught.value.trajectory.status is Status.TIME_LIMIT


COUNTED = [
    ("Euler that hardly steps", Euler(dt=1e-300), 1.0),
    ("Euler that steps for ever", Euler(dt=1e-9), 1e9),
    ("Euler's own bound", Euler(dt=0.1, max_steps=9), 1.0),
    ("diffrax's fixed steps", Diffrax("heun", dt=1e-300), 1.0),
    ("diffrax's fixed implicit steps", Diffrax("kvaerno3", dt=1e-9), 1e9),
]


@pytest.mark.parametrize(
    ("integrator", "t1"), [x[1:] for x in COUNTED], ids=[x[0] for x in COUNTED]
)
def test_fixed_steps_are_counted_before_they_run(integrator: Any, t1: float) -> None:
    with pytest.raises(IntegratorError, match="max_steps="):
        simulate(TANH.problem, t1=t1, integrator=integrator)


def test_bounds_are_just_enough() -> None:
    """Ten steps of 0.1 reach 1.0, though 0.1 · 10 and 1.0 / 0.1 are so by rounding only."""
    for integrator in (Euler(dt=0.1, max_steps=10), Diffrax("heun", dt=0.1, max_steps=10)):
        result = simulate(TANH.problem, t1=1.0, initial=TANH.state, integrator=integrator)
        assert result.status is Status.REACHED_T1 and result.accepted_steps == 10


def test_euler_until_equilibrium_ends_at_its_bound() -> None:
    """With `until` t1 may be far: the bound is kept while it runs."""
    result = simulate(
        TANH.problem, t1=1e6, initial=TANH.state, until=UntilEquilibrium(1e-30),
        times=[0.0, 0.5, 1e5], integrator=Euler(dt=0.1, max_steps=20), throw=False,
    )  # fmt: skip
    assert result.status is Status.MAX_STEPS and result.accepted_steps == 20
    # What is saved after a failure are the times asked for, up to where it got.
    assert result.end_time == pytest.approx(2.0) and result.times.tolist() == [0.0, 0.5]


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no steps", {"integrator": lambda: SciPy(max_steps=0)}, Exception, "max_steps"),
    ("half a step", {"integrator": lambda: SciPy(max_steps=2.5)}, Exception, "max_steps"),
    ("no seconds", {"seconds": 0.0, "integrator": "lsoda"}, IntegratorError, "seconds"),
    ("seconds in words", {"seconds": "one", "integrator": "lsoda"}, IntegratorError, "seconds"),
    ("times beyond round-off", {"times": [0.0, 1.0 + 1e-12]}, TimesError, "1.000000000001"),
]


@pytest.mark.parametrize(("name", "options", "error", "says"), BAD)
def test_bad_bounds_are_named(
    name: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        made = {k: v() if callable(v) else v for k, v in options.items()}
        simulate(TANH.problem, t1=1.0, **made)


SINGLE = np.float32
ROUND_OFF = {
    "multiples of 0.1": (0.3, np.arange(1, 4) * 0.1),
    "float32 above its decimal": (0.1, np.linspace(0, 0.1, 5).astype(SINGLE)),
    "t1 in float32": (np.asarray(0.7, SINGLE), np.array([0.0, 0.7])),
}


@pytest.mark.parametrize("name", ROUND_OFF)
def test_times_end_at_t1_up_to_round_off(name: str) -> None:
    t1, times = ROUND_OFF[name]
    options = {"initial": TANH.state, "integrator": "rk45", "dense": True}
    result = simulate(TANH.problem, t1=t1, times=times, **options)
    assert len(result.times) == len(times) and result.times[-1] == result.end_time == float(t1)
    late = result(float(t1) * (1 + 2e-16))
    np.testing.assert_array_equal(late[1], result(float(t1))[1])


INTERRUPTED = """
import os, signal, threading, time
import jax
jax.config.update("jax_enable_x64", True)
import pcdyn

net = pcdyn.mlp([3, 4, 2], activation="tanh", key=jax.random.key(0))
problem = pcdyn.InferenceProblem(net, input=[0.5, -0.2, 1.0], output=[0.3, -0.4])
euler = lambda dt: pcdyn.Euler(dt=dt, max_steps=2**31 - 2)
pcdyn.simulate(problem, t1=1.0, integrator=euler(0.5))

def interrupt():
    time.sleep(1)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    pcdyn.simulate(problem, t1=1.0, integrator=euler(6e-10))
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - sent, flush=True)
    raise
print("not interrupted")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGINT there")
def test_ctrl_c_ends_a_compiled_program() -> None:
    """Within a second, though the program would run for an hour, and the process with it.

    Five are allowed, for other tests share the machine.
    """
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.startswith("interrupted"), done.stdout + done.stderr[-2000:]
    assert float(done.stdout.split()[1]) < 5
    assert done.returncode == 130
    # The last words are Python's, not those of the C++ library.
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.slow
def test_the_default_relu_run_returns() -> None:
    """What `pcdyn simulate --activation relu --t1 1` runs: F(1) of Euler in NumPy is 0.75188."""
    key = jax.random.key(0)
    network = mlp([5, 5, 5], activation="relu", key=key)
    x, y = (jax.random.normal(jax.random.fold_in(key, i), (5,)) for i in (1, 2))
    result = simulate(InferenceProblem(network, input=x, output=y), t1=1.0)
    assert result.free_energy[-1] == pytest.approx(0.75188, abs=1e-5)
