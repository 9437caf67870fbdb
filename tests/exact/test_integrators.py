"""Every integrator against the matrix exponential, and what `simulate` reports against counts.

Compiling costs more than running: most tests share one network (`CASE`), whose layers blend the
identity with tanh so that both are one program, and one vector of times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

import pcdyn
from pcdyn import Diffrax, Euler, Exact, SciPy, Status, UntilEquilibrium, simulate
from pcdyn.errors import DenseOutputError, IntegratorError, StepLimitError, TimesError
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from tests.networks import CLAMPS, EPS, Case, assert_close, build_case

T1 = 2.0
TIMES = np.linspace(0.0, T1, 9)
WIDTHS = (3, 3, 2, 2)
# Two free layers of 3 + 2 units that start away from equilibrium; rates from 0.3 to 3.6.
CASE = build_case(seed=8, widths=WIDTHS)
TANH = build_case(seed=8, widths=WIDTHS, activations=("tanh",))
BATCH = build_case(seed=8, widths=WIDTHS, batch=3)
SCIPY = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
RTOL, ATOL = 1e-6, 1e-9  # the defaults in float64
ROUND_OFF = 1e3 * EPS  # fewer than 1000 operations on numbers of order 1


class Blend(eqx.Module):
    """x ↦ f(W x) with f between the identity (`amount` 0) and tanh (1)."""

    weight: Any
    amount: Any

    def __call__(self, x: Any) -> Any:
        z = self.weight @ x
        return z + jnp.broadcast_to(self.amount, z.shape) * (jnp.tanh(z) - z)


def blend(case: Case) -> InferenceProblem:
    """The problem of `case`, identity or tanh, as one program."""
    amount = jnp.asarray(float(case.activations[0] == "tanh"))
    layers = [Blend(jnp.asarray(weight), amount) for weight in case.weights]
    network = Network(layers, input_width=case.widths[0])
    return InferenceProblem(network, input=case.input, output=case.output)


def stacked(case: Case, activities: Any) -> np.ndarray:
    """The free layers side by side."""
    return case.stack([activities[i] for i in case.free])


def linear_solution(case: Case, times: Any) -> np.ndarray:
    """y(t) of τ ẏ = −H y + b, by the exponential of the matrix with b appended."""
    matrix, drive, tau = case.linear_flow()
    start = np.atleast_2d(stacked(case, case.activities))
    drive, n = np.atleast_2d(drive), len(tau)
    generator = np.zeros((n + len(drive),) * 2)
    generator[:n, :n], generator[:n, n:] = -matrix / tau[:, None], (drive / tau).T
    propagators = [scipy.linalg.expm(generator * t) for t in times]
    rows = np.stack([start @ p[:n, :n].T + p[:n, n:].T for p in propagators])
    return rows if case.batched else rows[:, 0]


def numpy_field(case: Case, activities: Any) -> list[np.ndarray]:
    """dx/dt of the free layers at one state, in NumPy."""
    return case.replace(activities=tuple(np.asarray(x) for x in activities)).field()


def numpy_solution(case: Case, times: Any) -> np.ndarray:
    """y(t) of one sample by DOP853 at 1e-13 on the field in NumPy."""

    def field(t: float, y: np.ndarray) -> np.ndarray:
        free = dict(zip(case.free, case.split(y), strict=True))
        layers = [free.get(i, x) for i, x in enumerate(case.activities)]
        return case.stack(numpy_field(case, layers))

    start = stacked(case, case.activities)
    solution = scipy.integrate.solve_ivp(
        field, (0, times[-1]), start, method="DOP853", rtol=1e-13, atol=1e-14, t_eval=times
    )
    return solution.y.T


EXPECTED = {"identity": linear_solution(CASE, TIMES), "tanh": numpy_solution(TANH, TIMES)}


def norms(case: Case, activities: Any) -> np.ndarray:
    """‖dx_l/dt‖ of each free layer, and sample, in NumPy."""
    return np.stack([np.linalg.norm(x, axis=-1) for x in numpy_field(case, activities)], -1)


def equilibrium(case: Case) -> np.ndarray:
    """H⁻¹ b by LAPACK."""
    matrix, drive, _ = case.linear_flow()
    return np.linalg.solve(matrix, np.atleast_2d(drive).T).T.reshape(drive.shape)


def repeated(case: Case, batch: int) -> Case:
    """`batch` times the same sample."""
    return case.replace(activities=tuple(np.tile(x, (batch, 1)) for x in case.activities))


# --- Accuracy -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tsit5", "dopri5", "dopri8", "heun", "kvaerno3", "kvaerno5"])
def test_diffrax_is_the_exact_solution(name: str) -> None:
    """Linear: expm; tanh: DOP853 in NumPy; at the saved times and, densely, between them.

    The flow contracts, so that a local error of at most rtol |y| + atol per step is forgotten as
    others arrive: within once the tolerance at the end of a step. At other times kvaerno5 is
    interpolated by a cubic, with an error of (λh)⁴/384 ≈ 1e-5 for its steps h ≈ 0.1.
    """
    tolerance = (10 if name == "kvaerno5" else 1) * (RTOL + ATOL)
    for case in (CASE, TANH):
        run = simulate(
            blend(case), t1=T1, times=TIMES, initial=case.state, integrator=name, dense=True
        )
        expected = EXPECTED[case.activations[0]]
        assert run.status is Status.REACHED_T1 and run.fallback == "" and run.end_time == T1
        assert_close(stacked(case, run.activities), expected, tolerance)
        assert_close(stacked(case, run.final), expected[-1], RTOL + ATOL)
        assert_close([run.activities[0][3], run.activities[3][5]], [case.input, case.output], 0)
    between = 0.37
    # `run` is that of tanh; the clamped layers are there as well.
    assert_close(stacked(TANH, run(between)), numpy_solution(TANH, [0, between])[-1], tolerance)
    assert_close(run(between)[0], TANH.input, 0)


@pytest.mark.parametrize("method", SCIPY)
def test_scipy_is_the_exact_solution(method: str) -> None:
    """The same for SciPy, and for a batch, whose Jacobian is sparse or banded.

    Within once the tolerance, as above; the seven steps of DOP853 allow no more.
    """
    for case in (CASE, TANH):
        run = simulate(
            blend(case), t1=T1, times=TIMES, initial=case.state, integrator=method.lower(),
            dense=True,
        )  # fmt: skip
        expected = EXPECTED[case.activations[0]]
        assert run.status is Status.REACHED_T1 and run.integrator == method
        assert_close(stacked(case, run.activities), expected, RTOL + ATOL)
    assert_close(stacked(TANH, run(0.37)), numpy_solution(TANH, [0, 0.37])[-1], RTOL + ATOL)
    if method in ("Radau", "BDF", "LSODA"):
        batch = simulate(
            blend(BATCH), t1=T1, times=TIMES, initial=BATCH.state, integrator=SciPy(method)
        )
        assert_close(stacked(BATCH, batch.activities), linear_solution(BATCH, TIMES), RTOL + ATOL)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("method", ["Radau", "BDF", "LSODA"])
def test_scipy_is_given_the_jacobian(
    method: str, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """−τ⁻¹H, which τ makes asymmetric; of a batch block diagonal, sparse or in LAPACK's bands.

    A wrong Jacobian would cost steps only: look at what SciPy's solver is handed.
    """
    case = build_case(seed=5, widths=WIDTHS, slow=True, batch=batch)
    handed: dict[str, Any] = {}
    solver = getattr(scipy.integrate, method)

    def spy(*args: Any, **options: Any) -> Any:
        handed.update(options)
        return solver(*args, **options)

    monkeypatch.setattr(scipy.integrate, method, spy)
    simulate(case.problem, t1=0.1, initial=case.state, integrator=SciPy(method))
    matrix, _, tau = case.linear_flow()
    expected = np.kron(np.eye(batch or 1), -matrix / tau[:, None])
    given = handed["jac"](0.0, stacked(case, case.activities).reshape(-1))
    if batch and method == "LSODA":
        lower, upper = handed["lband"], handed["uband"]
        i, j = np.indices(expected.shape)
        inside = (i - j <= lower) & (j - i <= upper)
        assert not expected[~inside].any()
        # What the bands hold beyond the matrix itself is never read.
        given = np.where(inside, given[np.where(inside, i - j + upper, 0), j], 0.0)
    elif batch:
        given = given.toarray()
    assert_close(given, expected, ROUND_OFF)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_every_clamp_and_time_constant_follows_the_matrix_exponential(clamp: str) -> None:
    """Exact (round-off) and SciPy's DOP853 (its tolerance); H is singular where the input is free.

    The eigenvectors of Exact and the scaling and squaring of expm each lose up to κ(H) ≲ 100.
    """
    case = build_case(
        seed=5, widths=WIDTHS, clamp=clamp, precision="full", bias=True, slow=True, batch=3
    )
    expected = linear_solution(case, TIMES)
    options = {"t1": T1, "times": TIMES, "initial": case.state}
    exact = simulate(case.problem, integrator=Exact(), dense=True, **options)
    assert_close(stacked(case, exact.activities), expected, 100 * ROUND_OFF)
    assert_close([exact.activities[i][0] for i in case.free], case.state, 0)
    solved = simulate(case.problem, integrator="dop853", **options)
    assert_close(stacked(case, solved.activities), expected, RTOL + ATOL)
    if clamp == "none":
        assert np.linalg.eigvalsh(case.linear_flow()[0])[0] < 1e-12
        assert_close(stacked(case, exact(0.37)), linear_solution(case, [0.37])[0], 100 * ROUND_OFF)


def test_an_exact_run_of_one_sample_is_the_matrix_exponential() -> None:
    """Without a batch, at the default of 101 times; nothing is evaluated or stepped."""
    run = simulate(CASE.problem, t1=T1, initial=CASE.state, integrator="exact")
    np.testing.assert_array_equal(run.times, np.linspace(0, T1, 101))
    assert_close(stacked(CASE, run.activities), linear_solution(CASE, run.times), ROUND_OFF)
    assert (run.vector_field_evaluations, run.accepted_steps, run.rejected_steps) == (0, 0, 0)


# --- Euler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASE, BATCH], ids=["single", "batch"])
def test_euler_is_the_plain_loop_bit_for_bit(case: Case) -> None:
    """40 times x ← x + dt·v(x), the update compiled alone, with μ_1 computed once beforehand.

    (Compiled together with the update, μ_1 would be fused into ε_1 by a multiply-add that rounds
    once instead of twice.) A NumPy loop agrees within round-off: 40 contracting updates.
    """
    dt, problem = 0.05, blend(case)
    prepared = problem.prepared()
    update = jax.jit(
        lambda s: jax.tree.map(lambda x, v: x + dt * v, s, prepared.vector_field(0.0, s))
    )
    states, layers = [case.state], [[np.asarray(x) for x in case.activities]]
    for _ in range(40):
        states.append(update(states[-1]))
        field = dict(zip(case.free, numpy_field(case, layers[-1]), strict=True))
        layers.append([x + dt * field.get(i, 0.0) for i, x in enumerate(layers[-1])])
    run = simulate(problem, t1=T1, times=TIMES, initial=case.state, integrator=Euler(dt=dt))
    saved = [states[5 * k] for k in range(9)]
    for place, index in enumerate(case.free):
        expected = np.array([s[place] for s in saved])
        if jax.default_backend() == "cpu":
            np.testing.assert_array_equal(run.activities[index], expected)
        else:  # where the same operations in another program are fused in another way
            assert_close(run.activities[index], expected, 40 * ROUND_OFF)
    assert_close(run.final, layers[-1], 40 * ROUND_OFF)
    assert run.accepted_steps == 40 and run.rejected_steps == 0 and run.end_time == T1


def test_euler_interpolates_linearly_between_updates() -> None:
    """At t = (n + θ) dt the state is (1 − θ) x_n + θ x_{n+1}."""
    dt, problem = 0.05, blend(CASE)
    grid = simulate(problem, t1=T1, times=dt * np.arange(32, 41), initial=CASE.state,
                    integrator=Euler(dt=dt))  # fmt: skip
    fractions = np.array([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.4, 0.2, 1.0])
    steps = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7])
    run = simulate(problem, t1=T1, times=dt * (32 + steps + fractions), initial=CASE.state,
                   integrator=Euler(dt=dt))  # fmt: skip
    rows = stacked(CASE, grid.activities)
    expected = (1 - fractions)[:, None] * rows[steps] + fractions[:, None] * rows[steps + 1]
    # The fraction of a step carries the round-off of t / dt ≈ 40.
    assert_close(stacked(CASE, run.activities), expected, 40 * ROUND_OFF)


# --- Counts ---------------------------------------------------------------------------------------

CALLS: list[tuple[int, ...]] = []


@jax.custom_vjp
def tick(error: Any) -> Any:
    """The identity, whose derivative reports that it was really computed."""
    return error


def _backward(_: None, cotangent: Any) -> tuple[Any]:
    jax.debug.callback(lambda x: CALLS.append(x.shape), cotangent)
    return (cotangent,)


tick.defvjp(lambda error: (error, None), _backward)


class Counted(pcdyn.Energy):
    """½ ‖ε‖², each gradient of which counts itself once while it runs."""

    def value(self, error: Any, target: Any) -> Any:
        return 0.5 * jnp.sum(tick(error) ** 2, axis=-1)


def counted_run(integrator: Any, until: UntilEquilibrium | None) -> tuple[int, Any]:
    """How often the solver evaluated the field of `CASE`, and the trajectory.

    `simulate` itself evaluates it at the two saved rows and at the end, to report the norms, and
    at the start, to look whether a fixed step is stable.
    """
    energy = [Counted(), *[pcdyn.Gaussian()] * (CASE.depth - 1)]
    problem = InferenceProblem(CASE.network, input=CASE.input, output=CASE.output, energy=energy)
    CALLS.clear()
    run = simulate(problem, t1=T1, times=np.array([0.97, T1]), initial=CASE.state,
                   integrator=integrator, until=until)  # fmt: skip
    jax.effects_barrier()
    assert set(CALLS) == {(3,)}
    fixed = getattr(integrator, "fixed_step", None) is not None
    return len(CALLS) - 3 - int(fixed), run


# The field falls to 0.5 at t ≈ 0.96.
SOON = UntilEquilibrium(tolerance=0.5)
COUNTED = {
    "tsit5": ("tsit5", None),
    "tsit5 until": ("tsit5", SOON),
    "fixed step": (Diffrax("heun", dt=0.05), None),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_diffrax_evaluations_are_those_really_made(kind: str) -> None:
    """A field that counts its calls while it runs agrees exactly; explicit: no Jacobian."""
    calls, run = counted_run(*COUNTED[kind])
    assert run.vector_field_evaluations == calls
    assert run.jacobian_evaluations == 0
    assert (run.status is Status.CONVERGED) == (kind == "tsit5 until")


def test_a_solver_object_and_a_controller_are_used_as_given() -> None:
    """Ralston's method on a given uneven grid is the NumPy loop over it; two calls a step."""
    grid = np.array([0.0, 0.1, 0.4, 0.5, 0.9, 1.0, 1.5, 2.0])
    integrator = Diffrax(diffrax.Ralston(), controller=diffrax.StepTo(ts=jnp.asarray(grid)))
    calls, run = counted_run(integrator, None)
    matrix, drive, _ = CASE.linear_flow()
    y = stacked(CASE, CASE.activities)
    for h in np.diff(grid):
        slope = drive - matrix @ y
        later = drive - matrix @ (y + 0.75 * h * slope)
        y = y + h * (slope + 2 * later) / 3
    assert_close(stacked(CASE, run.final), y, ROUND_OFF)
    assert run.accepted_steps == len(grid) - 1 and run.integrator == "ralston"
    assert run.vector_field_evaluations == calls == 2 * run.accepted_steps


@pytest.mark.parametrize("until", [None, SOON], ids=["to t1", "until"])
def test_euler_evaluations_are_those_really_made(until: UntilEquilibrium | None) -> None:
    """One per update, per stopping test, and to interpolate at the save between two updates."""
    calls, run = counted_run(Euler(dt=0.05), until)
    assert run.vector_field_evaluations == calls
    assert run.accepted_steps == round(run.end_time / 0.05)
    tests = 0 if until is None else run.accepted_steps + 1
    assert 0 <= calls - run.accepted_steps - tests <= 1


@pytest.mark.parametrize("until", [None, SOON], ids=["to t1", "until"])
@pytest.mark.parametrize("method", SCIPY)
def test_scipy_evaluations_are_those_really_made(
    method: str, until: UntilEquilibrium | None
) -> None:
    """Each Jacobian, by automatic differentiation, adds one pass through the field."""
    calls, run = counted_run(SciPy(method), until)
    implicit = method in ("Radau", "BDF")
    assert run.vector_field_evaluations == calls - run.jacobian_evaluations
    assert (run.jacobian_evaluations > 0) == implicit or method == "LSODA"
    if method in ("RK45", "RK23") and until is None:
        # One to start, one to choose the step, 6 or 3 a step; perhaps one to look at the start.
        stages = {"RK45": 6, "RK23": 3}[method]
        steps = run.accepted_steps + run.rejected_steps
        assert 2 <= run.vector_field_evaluations - stages * steps <= 3


@pytest.mark.slow
def test_implicit_diffrax_does_not_report_evaluations() -> None:
    """diffrax does not count Newton iterations: `None`, never a guess; steps are counted."""
    run = simulate(blend(CASE), t1=T1, times=TIMES, initial=CASE.state, integrator="kvaerno5",
                   dense=True)  # fmt: skip
    assert run.vector_field_evaluations is None and run.jacobian_evaluations is None
    assert run.accepted_steps > 0 and "evaluations not reported" in repr(run)


# --- Dense output ---------------------------------------------------------------------------------


def test_without_dense_output_only_saved_times_are_there() -> None:
    """DenseOutputError, not a guess."""
    run = simulate(blend(CASE), t1=T1, times=TIMES, initial=CASE.state, integrator=Euler(dt=0.05))
    with pytest.raises(DenseOutputError):
        run(0.5)


@pytest.mark.parametrize("t", [-1e-9, T1 + 1e-9, np.nan])
def test_dense_output_ends_where_integration_did(t: float) -> None:
    """No extrapolation."""
    run = simulate(CASE.problem, t1=T1, initial=CASE.state, integrator="exact", dense=True)
    assert_close(stacked(CASE, run(T1)), EXPECTED["identity"][-1], ROUND_OFF)
    with pytest.raises(TimesError, match="t, a time of the integrated range"):
        run(t)


# --- Batches and equilibrium ----------------------------------------------------------------------

TOLERANCE = 1e-6
SLOWEST = float(np.linalg.eigvalsh(CASE.linear_flow()[0])[0])
FAR = 100.0


def to_equilibrium(case: Case, integrator: Any, **options: Any) -> Any:
    """From zero or the given start, until the field vanishes."""
    until = UntilEquilibrium(tolerance=TOLERANCE)
    options = {"initial": "zeros", "until": until, "t1": FAR, **options}
    times = np.linspace(0, options["t1"], 9)
    return simulate(blend(case), times=times, integrator=integrator, **options)


def assert_at_equilibrium(run: Any, case: Case, tolerance: float = TOLERANCE) -> None:
    """It stopped, not before and not long after the field fell below the tolerance.

    The norms are computed in NumPy: ‖H (y − y*)‖ ≤ √2 tolerance for two layers, hence the
    distance. Round-off and SciPy's search for the stopping time leave 1e-3 of the tolerance.
    """
    assert run.status is Status.CONVERGED
    before = [norms(case, [x[k] for x in run.activities]).max() for k in range(len(run.times))]
    assert before[-1] <= tolerance * 1.001
    assert min(before[:-1]) > tolerance
    distance = np.linalg.norm(stacked(case, run.final) - equilibrium(case), axis=-1)
    assert distance.max() <= 1.001 * np.sqrt(2) * tolerance / SLOWEST
    assert run.end_time == run.times[-1] < FAR


@pytest.mark.parametrize("integrator", ["tsit5", Euler(dt=0.05)], ids=["tsit5", "euler"])
@pytest.mark.parametrize("batch", [1, 8, 256])
def test_a_batch_stops_together_and_rows_do_not_depend_on_it(integrator: Any, batch: int) -> None:
    """Equal rows stay equal to the last bit, and are those of the sample alone.

    Alone, sums run in another order: differences of round-off, which an adaptive step carries on.
    They are compared before stability limits the step, where its choice amplifies round-off.
    """
    same, one = repeated(CASE, batch), repeated(CASE, 1)
    run = to_equilibrium(same, integrator, initial=same.state, t1=T1)
    alone = to_equilibrium(one, integrator, initial=one.state, t1=T1)
    assert run.status is alone.status is Status.REACHED_T1
    rows = stacked(same, run.activities)
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape))
    assert_close(rows[:, :1], stacked(same, alone.activities), 100 * ROUND_OFF)
    assert run.accepted_steps == alone.accepted_steps
    # Neighbours at rest do not dilute the error of a moving sample: it takes the same steps.
    start = np.tile(equilibrium(CASE), (batch, 1))
    start[0] = stacked(CASE, CASE.activities)
    among = to_equilibrium(same, integrator, initial=tuple(CASE.split(start)), t1=T1)
    assert among.accepted_steps == alone.accepted_steps
    assert_close(stacked(same, among.activities)[:, :1], rows[:, :1], 100 * ROUND_OFF)
    different = build_case(seed=8, widths=WIDTHS, batch=batch).replace(weights=CASE.weights)
    assert_at_equilibrium(to_equilibrium(different, integrator), different)


STOPPING = {
    "tsit5": "tsit5", "kvaerno5": "kvaerno5", "lsoda": "lsoda", "euler": Euler(dt=0.05),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPING)
def test_equilibrium_is_absolute_per_layer_and_not_before_its_time(name: str) -> None:
    """Zero start, data of 1e3, a small move beside a large constant, and `minimum_time`."""
    case = build_case(seed=9, widths=WIDTHS, batch=8).replace(weights=CASE.weights)
    integrator = STOPPING[name]
    assert_at_equilibrium(to_equilibrium(case, integrator), case)
    ends = (case.activities[0] * 1e3, *case.activities[1:-1], case.activities[-1] * 1e3)
    large = case.replace(activities=ends)
    assert_at_equilibrium(to_equilibrium(large, integrator), large)
    # 1e-3 off in one unit of one sample: 1e-6 of the largest activity, which must still relax.
    start = equilibrium(large)
    start[5, 4] += 1e-3
    near = to_equilibrium(large, integrator, initial=tuple(large.split(start)))
    assert_at_equilibrium(near, large)
    # Relaxing 1e-3 to 1e-6 takes ln(1e3) of the fastest time constant at the very least.
    assert near.end_time > np.log(1e3) / 4
    short = to_equilibrium(case, integrator, t1=5.0)
    assert short.status is Status.REACHED_T1 and short.end_time == 5.0


@pytest.mark.parametrize("name", ["tsit5", "lsoda", "euler"])
def test_a_start_at_equilibrium_stops_at_once_or_at_the_minimum_time(name: str) -> None:
    """Unmoved within round-off; Euler and SciPy find the minimum time itself."""
    case = build_case(seed=9, widths=WIDTHS, batch=8).replace(weights=CASE.weights)
    there = tuple(case.split(equilibrium(case)))
    run = to_equilibrium(case, STOPPING[name], initial=there)
    assert run.status is Status.CONVERGED and run.end_time == 0 and len(run.times) == 1
    assert_close([run.final[i] for i in case.free], there, 0)
    later = to_equilibrium(case, STOPPING[name], initial=there,
                           until=UntilEquilibrium(minimum_time=3.0))  # fmt: skip
    assert later.status is Status.CONVERGED and 3.0 - 1e-9 <= later.end_time < FAR
    if name != "tsit5":
        assert abs(later.end_time - 3.0) < 1e-9
    assert_close([later.final[i] for i in case.free], there, TOLERANCE)


def test_float32_stops_at_its_own_tolerance() -> None:
    """1e-3 unless given; the field is computed in float64 from the float32 activities."""
    layers = [Dense(np.asarray(w, np.float32)) for w in CASE.weights]
    problem = InferenceProblem(Network(layers), input=CASE.input, output=CASE.output)
    run = simulate(problem, t1=FAR, times=np.linspace(0, FAR, 201), initial="zeros",
                   until="equilibrium")  # fmt: skip
    assert {x.dtype for x in run.activities} == {np.dtype(np.float32)}
    rounded = CASE.replace(weights=tuple(np.float64(np.float32(w)) for w in CASE.weights))
    last = norms(rounded, [np.float64(x[-1]) for x in run.activities]).max()
    # It is tested after each step, which stability keeps below about 3/λ_max: even a mode with the
    # rate λ_max falls by no more than e⁻³ in the step that takes it below the tolerance.
    assert 1e-3 * np.exp(-3) < last <= 1e-3 * 1.001
    assert run.status is Status.CONVERGED


# --- Sample by sample -----------------------------------------------------------------------------


class Root(eqx.Module):
    """x ↦ √x, NaN below zero: the flow of a negative target meets zero in finite time."""

    def __call__(self, x: Any) -> Any:
        return jnp.sqrt(x)


def root_problem(samples: Any) -> InferenceProblem:
    """Samples 0 and 2 have equilibria; sample 1 leaves the domain of the root at t ≈ 0.35."""
    inputs, outputs = np.array([[2.0], [-1.0], [3.0]]), np.array([[1.0], [-1.0], [2.0]])
    network = Network([Dense(np.eye(1)), Root()])
    return InferenceProblem(network, input=inputs[samples], output=outputs[samples])


def root_run(integrator: Any, samples: Any, **options: Any) -> Any:
    shape = (3, 1) if isinstance(samples, slice) else (1,)
    return simulate(
        root_problem(samples), t1=30.0, times=np.linspace(0, 30, 121), initial=(np.ones(shape),),
        integrator=integrator, until="equilibrium", throw=False, **options,
    )  # fmt: skip


ROOTS = {"euler": Euler(dt=0.05), "tsit5": Diffrax("tsit5", fallback=None), "RK45": SciPy("RK45")}


@pytest.mark.parametrize("name", ROOTS)
def test_each_sample_runs_as_if_it_were_alone(name: str) -> None:
    """Times, statistics, status and values; a sample that fails leaves the others intact.

    After its end a converged sample keeps its last state, and a failed one is NaN.
    """
    run = root_run(ROOTS[name], slice(None), per_sample=True)
    assert [s.ok for s in run.status] == [True, False, True] and not run.ok
    for sample in range(3):
        alone = root_run(ROOTS[name], sample)
        assert run.status[sample] is alone.status
        for field in ("end_time", "vector_field_evaluations", "accepted_steps", "rejected_steps"):
            mine = np.broadcast_to(getattr(run, field), (3,))[sample]
            assert mine == pytest.approx(getattr(alone, field), rel=1e-9)
        mine = run.activities[1][:, sample]
        last = np.searchsorted(run.times, alone.end_time, side="right")
        count = min(last, len(alone.times))
        assert_close(mine[:count], alone.activities[1][:count], 100 * ROUND_OFF)
        if alone.ok:
            assert_close(mine[-1], alone.final[1], 100 * ROUND_OFF)
            assert alone.end_time < 30
            assert len(np.unique(mine[count:-1])) <= 1
        else:
            # Nothing non-finite before the end, nothing finite after it.
            assert np.isfinite(mine[run.times <= run.end_time[1]]).all()
            assert np.isnan(mine[run.times > run.end_time[1]]).all() and run.end_time[1] < 0.5
    assert "1 of 3 samples: 1" in run.message


def test_a_failed_sample_raises_with_the_trajectory_of_all() -> None:
    """Nothing of the good samples is lost."""
    expected = root_run(ROOTS["euler"], slice(None), per_sample=True)
    with pytest.raises(pcdyn.SimulationError) as caught:
        simulate(
            root_problem(slice(None)), t1=30.0, times=np.linspace(0, 30, 121),
            initial=(np.ones((3, 1)),), integrator=ROOTS["euler"], until="equilibrium",
            per_sample=True,
        )  # fmt: skip
    np.testing.assert_array_equal(caught.value.trajectory.activities[1], expected.activities[1])
    assert caught.value.trajectory.status == expected.status


# --- Fallback -------------------------------------------------------------------------------------


def test_lsoda_takes_over_and_says_so() -> None:
    """Five steps are too few for tsit5; the result is right all the same."""
    run = simulate(blend(CASE), t1=T1, times=TIMES, initial=CASE.state,
                   integrator=Diffrax("tsit5", max_steps=5))  # fmt: skip
    assert run.status is Status.REACHED_T1 and run.end_time == T1
    assert "LSODA" in run.fallback and "steps" in run.fallback
    assert_close(stacked(CASE, run.activities), EXPECTED["identity"], RTOL + ATOL)


def test_without_fallback_it_raises_with_what_was_computed() -> None:
    """The rows before the end are the solution, and there are no others."""
    with pytest.raises(StepLimitError, match="raise max_steps") as caught:
        simulate(blend(CASE), t1=T1, times=TIMES, initial=CASE.state,
                 integrator=Diffrax("tsit5", max_steps=5, fallback=None))  # fmt: skip
    run = caught.value.trajectory
    assert run.status is Status.MAX_STEPS and run.fallback == "" and 0 < run.end_time < T1
    assert run.accepted_steps + run.rejected_steps == 5
    assert 1 < len(run.times) < 9 and run.times[-1] <= run.end_time < run.times[-1] + T1 / 8
    expected = EXPECTED["identity"][: len(run.times)]
    assert_close(stacked(CASE, run.activities), expected, RTOL + ATOL)


@pytest.mark.slow
def test_the_fallback_takes_only_the_samples_that_need_it() -> None:
    """A sample at equilibrium needs few steps of tsit5; those of its neighbours go to LSODA."""
    start = stacked(BATCH, BATCH.activities)
    start[1] = equilibrium(BATCH)[1]
    free = dict(zip(BATCH.free, BATCH.split(start), strict=True))
    case = BATCH.replace(activities=tuple(free.get(i, x) for i, x in enumerate(BATCH.activities)))
    run = simulate(blend(case), t1=T1, times=TIMES, initial=case.state, per_sample=True,
                   integrator=Diffrax("tsit5", max_steps=12))  # fmt: skip
    assert run.status == (Status.REACHED_T1,) * 3
    assert "2 of 3 samples: 0, 2" in run.fallback and run.accepted_steps[1] <= 12
    assert min(run.accepted_steps[[0, 2]]) > 12
    assert_close(stacked(case, run.activities), linear_solution(case, TIMES), RTOL + ATOL)


# --- Transformations and compilation --------------------------------------------------------------


def over_networks(integrator: Any, **options: Any) -> Callable[..., Any]:
    """A simulation as a function of weights and data, with the network built inside."""

    def run(weights: Any, input: Any, output: Any, initial: Any) -> Any:
        if integrator == "exact":
            layers: list[Any] = [Dense(weight) for weight in weights]
        else:
            layers = [Blend(weight, jnp.zeros(())) for weight in weights]
        network = Network(layers, input_width=WIDTHS[0])
        problem = InferenceProblem(network, input=input, output=output)
        return simulate(
            problem, t1=T1, times=TIMES, initial=initial, integrator=integrator, **options
        )

    return run


def arguments(case: Case) -> Any:
    return jax.tree.map(jnp.asarray, (case.weights, case.input, case.output, case.state))


NETWORKS = [build_case(seed=seed, widths=WIDTHS) for seed in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tsit5", "euler", "exact"])
def test_vmap_over_networks_and_data_is_the_loop(name: str) -> None:
    """Five networks at once, each against itself alone and against a solution in NumPy.

    Euler's own is (I − dt H)ⁿ applied to the distance from equilibrium; H⁻¹ and the eigenvectors
    lose κ(H) < 1e3. tsit5 amplifies round-off only where stability limits the step, not here.
    """
    integrator = Euler(dt=0.05) if name == "euler" else name
    columns = jax.tree.map(lambda *x: jnp.stack(x), *[arguments(case) for case in NETWORKS])
    mapped = jax.jit(jax.vmap(over_networks(integrator)))(*columns)
    assert mapped.status_codes.tolist() == [0] * 5
    for index, case in enumerate(NETWORKS):
        rows = stacked(case, [np.asarray(x[index]) for x in mapped.activities])
        expected = linear_solution(case, TIMES)
        if name == "euler":
            matrix, rest = case.linear_flow()[0], equilibrium(case)
            assert np.linalg.cond(matrix) < 1e3
            update = np.eye(len(matrix)) - 0.05 * matrix
            offset = stacked(case, case.activities) - rest
            powers = [np.linalg.matrix_power(update, 5 * k) for k in range(9)]
            expected = np.stack([rest + power @ offset for power in powers])
        assert_close(rows, expected, RTOL + ATOL if name == "tsit5" else 1e3 * ROUND_OFF)
        alone = over_networks(integrator, dense=name == "tsit5")(*arguments(case))
        assert_close(rows, stacked(case, alone.activities), 100 * ROUND_OFF)
        assert_close(np.asarray(mapped.energies[index]), alone.energies, 100 * ROUND_OFF)
        assert int(np.broadcast_to(mapped.accepted_steps, 5)[index]) == alone.accepted_steps


def test_scipy_cannot_be_transformed() -> None:
    """It runs on the host: refused by name, not by an obscure tracer error."""
    columns = jax.tree.map(lambda x: x[None], arguments(CASE))
    with pytest.raises(IntegratorError, match="LSODA runs on the host"):
        jax.vmap(over_networks("lsoda"))(*columns)


@pytest.mark.parametrize("name", ["tsit5", "euler", "radau"])
def test_nothing_compiles_again_for_new_numbers(name: str, compilations: list[str]) -> None:
    """New data, weights, t1, times, tolerance, step and start; a new batch size does compile.

    The first run has compiled everything, also what builds the problem and the start.
    """

    def run(seed: int, fine: bool, batch: int | None = None, **options: Any) -> Any:
        case = build_case(seed=seed, widths=WIDTHS, batch=batch)
        size = 0.5 if fine else 1.0
        integrators = {
            "tsit5": Diffrax("tsit5", rtol=1e-6 * size, atol=1e-9 * size),
            "euler": Euler(dt=0.05 * size),
            "radau": SciPy("Radau", rtol=1e-6 * size, atol=1e-9 * size),
        }
        options = {"t1": T1, "times": TIMES, **options}
        return simulate(blend(case), initial=case.state, integrator=integrators[name], **options)

    run(0, False)
    compilations.clear()
    assert run(1, True, t1=3.0, times=1.3 * TIMES).end_time == 3.0
    assert run(2, False, t1=1.0, times=TIMES / 2).end_time == 1.0
    assert compilations == []
    if name == "euler":
        run(0, False, batch=5)
        assert len(compilations) > 0


# --- What a trajectory holds ----------------------------------------------------------------------


def test_a_trajectory_holds_what_numpy_derives_from_its_activities() -> None:
    """Errors, energies and field norms at every saved time, for a batch with an early stop."""
    case = build_case(seed=3, widths=WIDTHS, precision="full", bias=True, batch=3, slow=True,
                      activations=("tanh",))  # fmt: skip
    run = simulate(case.problem, t1=60.0, times=np.linspace(0, 60, 25), initial=case.state,
                   integrator="lsoda", until=UntilEquilibrium(tolerance=1e-3))  # fmt: skip
    assert run.status is Status.CONVERGED and 2 < len(run.times) < 25
    assert run.times[-1] == run.end_time and np.all(np.diff(run.times) > 0)
    arrays = (*run.activities, *run.prediction_errors, run.energies, run.vector_field_norms)
    for array in arrays:
        assert isinstance(array, np.ndarray) and len(array) == len(run.times)
        assert np.isfinite(array).all()
    for k in range(len(run.times)):
        layers = [x[k] for x in run.activities]
        assert_close([e[k] for e in run.prediction_errors], case.errors(layers), ROUND_OFF)
        energies = case.layer_energies(layers)
        assert_close(run.energies[k], energies, ROUND_OFF)
        assert_close(run.free_energy[k], energies.sum(-1), ROUND_OFF)
        assert_close(run.output_loss[k], energies[:, -1], ROUND_OFF)
        assert_close(run.residual_energy[k], energies[:, :-1].sum(-1), ROUND_OFF)
        assert_close(run.vector_field_norms[k], norms(case, layers), ROUND_OFF)
    assert_close(run.output_loss + run.residual_energy, run.free_energy, ROUND_OFF)
    assert run.free_layers == case.free
    assert run.compile_seconds >= 0 and run.run_seconds >= 0
    text = repr(run)
    for part in ("[3, 3, 2, 2] units", "3 samples", "CONVERGED", "LSODA",
                 f"evaluations {run.vector_field_evaluations}"):  # fmt: skip
        assert part in text


def test_distances_cosines_and_angles_are_those_of_numpy() -> None:
    """To fixed activities, to another trajectory, of the free or of chosen layers; zero is NaN."""
    run = simulate(blend(BATCH), t1=T1, times=TIMES, initial=BATCH.state, integrator="lsoda")
    other = simulate(blend(BATCH), t1=T1, times=TIMES, initial="zeros", integrator="lsoda")
    fixed = tuple(np.random.default_rng(0).normal(size=x.shape) for x in BATCH.activities)
    for reference, layers in ((fixed, None), (other, None), (fixed, [2]), (other, [0, 1])):
        chosen = BATCH.free if layers is None else layers
        here = np.concatenate([run.activities[i] for i in chosen], axis=-1)
        there = fixed if reference is fixed else other.activities
        there = np.broadcast_to(np.concatenate([there[i] for i in chosen], axis=-1), here.shape)
        expected = np.linalg.norm(here - there, axis=-1)
        assert_close(run.distance_to(reference, layers=layers), expected, ROUND_OFF)
        lengths = np.linalg.norm(here, axis=-1) * np.linalg.norm(there, axis=-1)
        zero = lengths == 0
        cosine = np.sum(here * there, axis=-1) / np.where(zero, np.nan, lengths)
        ours = run.cosine_to(reference, layers=layers)
        np.testing.assert_array_equal(np.isnan(ours), zero)
        assert zero.any() == (reference is other and layers is None)
        assert_close(ours[~zero], cosine[~zero], ROUND_OFF)
        # The arc cosine turns round-off δ into up to √(2δ) next to angle 0.
        angle = run.angle_to(reference, layers=layers)
        assert_close(angle[~zero], np.arccos(np.clip(cosine[~zero], -1, 1)), np.sqrt(2 * ROUND_OFF))
    with pytest.raises(pcdyn.errors.ShapeError, match="2 layers"):
        run.distance_to(fixed[:2])
