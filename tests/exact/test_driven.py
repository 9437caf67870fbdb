"""Inference under signals, against SciPy on a NumPy field from jump to jump, and limits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import pcdyn

WIDTHS = (3, 5, 4, 2)
T1 = 4.0
# Of the reference, and of saved activities of a size of one.
TIGHT = 1e-10


def network(activation: str, seed: int = 0) -> pcdyn.Network:
    keys = jax.random.split(jax.random.key(seed), 2)
    drawn = pcdyn.mlp(WIDTHS, activation=activation, key=keys[0])
    biases = jax.random.normal(keys[1], (sum(WIDTHS[1:]),)) * 0.3
    layers, start = [], 0
    for layer in drawn.layers:
        width = layer.weight.shape[0]
        layers.append(pcdyn.Dense(layer.weight, biases[start : start + width], activation))
        start += width
    return pcdyn.Network(layers)


def values(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


class Reference:
    """The flow of a chain written in NumPy, and SciPy's solution of it from jump to jump."""

    def __init__(
        self,
        net: pcdyn.Network,
        data: Callable[[float], tuple[np.ndarray, np.ndarray]],
        precisions: Callable[[float], np.ndarray],
        taus: Callable[[float], np.ndarray],
        *,
        linear: bool,
    ):
        self.weights = [np.asarray(layer.weight) for layer in net.layers]
        self.biases = [np.asarray(layer.bias) for layer in net.layers]
        self.data, self.precisions, self.taus = data, precisions, taus
        self.function = (lambda a: a) if linear else np.tanh
        self.slope = (lambda a: np.ones_like(a)) if linear else (lambda a: 1 - np.tanh(a) ** 2)

    def field(self, t: float, y: np.ndarray) -> np.ndarray:
        (low, high), pi, tau = self.data(t), self.precisions(t), self.taus(t)
        x = [low, y[: WIDTHS[1]], y[WIDTHS[1] :], high]
        inner = [
            w @ x[l] + b for l, (w, b) in enumerate(zip(self.weights, self.biases, strict=True))
        ]
        weighted = [pi[l] * (x[l + 1] - self.function(inner[l])) for l in range(3)]
        flow = [
            (-weighted[l - 1] + self.weights[l].T @ (self.slope(inner[l]) * weighted[l])) / tau[l]
            for l in (1, 2)
        ]
        return np.concatenate(flow)

    def solve(self, start: np.ndarray, edges: list[float], times: np.ndarray) -> np.ndarray:
        rows, y = [], start
        for begin, end in itertools.pairwise(edges):
            inside = times[(times >= begin) & ((times < end) | (end == edges[-1]))]
            # Short of the end the values are those before it.
            before = np.nextafter(end, begin)
            run = solve_ivp(
                lambda t, y: self.field(min(max(t, begin), before), y), (begin, end), y,  # noqa: B023
                method="DOP853", rtol=1e-12, atol=1e-13, t_eval=np.unique([*inside, end]),
            )  # fmt: skip
            y = run.y[:, -1]
            rows.append(run.y.T[: len(inside)])
        return np.concatenate(rows)


def constant(times: list[float], rows: np.ndarray) -> Callable[[float], Any]:
    return lambda t: rows[np.searchsorted(times, t, side="right") - 1]


def linear(times: list[float], rows: np.ndarray) -> Callable[[float], np.ndarray]:
    return lambda t: np.array([np.interp(t, times, column) for column in rows.T])


LOW_TIMES, HIGH_TIMES, PI_TIMES = [0.0, 1.3, 2.7], [-1.0, 2.0, 6.0], [0.0, 2.5]
LOW, HIGH = values(3, WIDTHS[0], seed=1), values(3, WIDTHS[-1], seed=2)
EDGES = [0.0, 1.3, 2.0, 2.5, 2.7, 3.0, T1]


def driven(activation: str) -> tuple[pcdyn.DrivenProblem, Reference]:
    """Everything changes: the input jumps, the output has corners, precisions and a τ jump."""
    net = network(activation)
    scales = pcdyn.PiecewiseConstant(PI_TIMES, [pcdyn.Gaussian(1.0), pcdyn.Gaussian(4.0)])
    problem = pcdyn.DrivenProblem(
        net,
        input=pcdyn.PiecewiseConstant(LOW_TIMES, LOW),
        output=pcdyn.PiecewiseLinear(HIGH_TIMES, HIGH),
        energy=[pcdyn.Gaussian(2.0), scales, pcdyn.Gaussian()],
        time_constants=[1, 2.0, pcdyn.PiecewiseConstant([0, 3.0], [1.0, 0.5]), 1],
    )
    reference = Reference(
        net,
        lambda t: (constant(LOW_TIMES, LOW)(t), linear(HIGH_TIMES, HIGH)(t)),
        lambda t: np.array([2.0, 1.0 if t < PI_TIMES[1] else 4.0, 1.0]),
        lambda t: np.array([1, 2.0, 1.0 if t < 3.0 else 0.5, 1]),
        linear=activation == "identity",
    )
    return problem, reference


def stacked(trajectory: pcdyn.Trajectory) -> np.ndarray:
    return np.concatenate([np.asarray(trajectory.activities[l]) for l in (1, 2)], axis=-1)


FINE: Any = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize(
    "integrator",
    [
        *(pcdyn.Diffrax(name, **FINE) for name in ("tsit5", "rodas5p", "kvaerno5")),
        *(pcdyn.SciPy(name, **FINE) for name in ("LSODA", "Radau")),
    ],
    ids=lambda x: x.name,
)
def test_every_kind_of_integrator_follows_the_flow_from_jump_to_jump(
    integrator: pcdyn.integrators.Integrator,
) -> None:
    problem, reference = driven("tanh")
    times = np.array([0.0, 0.5, 1.3, 1.31, 2.0, 2.5, 2.71, 3.0, T1])
    run: Any = pcdyn.simulate(problem, t1=T1, times=times, integrator=integrator)
    start = np.concatenate([np.asarray(x) for x in problem.initial_state()])
    # A hundred times the tolerance of the steps: their errors add up along the way.
    np.testing.assert_allclose(stacked(run), reference.solve(start, EDGES, times), atol=1e-8)
    # At a jump a clamped layer has the value after it.
    np.testing.assert_array_equal(run.activities[0], [constant(LOW_TIMES, LOW)(t) for t in times])
    expected = [linear(HIGH_TIMES, HIGH)(t) for t in times]
    np.testing.assert_allclose(run.activities[3], expected, rtol=1e-14, atol=1e-15)


def test_exact_is_exact_from_jump_to_jump() -> None:
    problem, reference = driven("identity")
    times = np.linspace(0, T1, 41)
    run: Any = pcdyn.simulate(problem, t1=T1, times=times, integrator=pcdyn.Exact(), dense=True)
    start = np.concatenate([np.asarray(x) for x in problem.initial_state()])
    np.testing.assert_allclose(stacked(run), reference.solve(start, EDGES, times), atol=TIGHT)
    for t in (0.0, 1.3, 1.7, T1):
        at = pcdyn.simulate(problem, t1=T1, times=[t], integrator=pcdyn.Exact())
        np.testing.assert_allclose(run(t)[1], at.activities[1][0], atol=1e-14)


@pytest.mark.slow
def test_many_corners_do_not_add_up_errors() -> None:
    """A parabola in a thousand straight pieces is within their distance from it, ⅛ h² 2."""
    net = network("identity")
    grid = np.linspace(0, T1, 1001)
    line = np.array([1.0, -2.0, 0.5])
    pieces = pcdyn.PiecewiseLinear(grid, grid[:, None] ** 2 * line)
    smooth = pcdyn.Signal(lambda t: t**2 * jnp.asarray(line))
    output = values(WIDTHS[-1], seed=3)
    exact = pcdyn.simulate(
        pcdyn.DrivenProblem(net, input=pieces, output=output), t1=T1, times=[T1],
        integrator=pcdyn.Exact(), initial="zeros",
    )  # fmt: skip
    close = pcdyn.simulate(
        pcdyn.DrivenProblem(net, input=smooth, output=output), t1=T1, times=[T1],
        integrator=pcdyn.Diffrax("dopri8", rtol=1e-12, atol=1e-13), initial="zeros",
    )  # fmt: skip
    gain = np.linalg.norm(np.asarray(net.layers[0].weight), 2) * np.linalg.norm(line)
    # |x² − chord| ≤ h²/4, and the flow, which decays, adds up no more than ∫ of it.
    bound = gain * (grid[1] ** 2 / 4) * T1
    assert np.max(np.abs(stacked(exact) - stacked(close))) < bound


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["heun", "tsit5"])
def test_order_is_that_without_jumps(solver: str) -> None:
    problem, _ = driven("tanh")
    still = pcdyn.InferenceProblem(network("tanh"), input=LOW[0], output=HIGH[0])
    expected = pcdyn.convergence_order(solver, still, t1=T1).order
    assert pcdyn.convergence_order(solver, problem, t1=T1).order == pytest.approx(expected, abs=0.2)


def test_a_jump_in_the_middle_of_a_step_would_cost_the_order() -> None:
    """What the test above would see: the same signal as a function whose jumps are not named."""
    signal = pcdyn.PiecewiseConstant(LOW_TIMES, LOW)
    net, output = network("tanh"), HIGH[0]
    hidden = pcdyn.DrivenProblem(net, input=pcdyn.Signal(signal), output=output)
    named = pcdyn.DrivenProblem(net, input=pcdyn.Signal(signal, jumps=(1.3, 2.7)), output=output)
    given = pcdyn.DrivenProblem(net, input=signal, output=output)
    step = pcdyn.Diffrax("tsit5", dt=0.1)
    ends = [
        stacked(pcdyn.simulate(problem, t1=T1, times=[T1], integrator=step))
        for problem in (given, named, hidden)
    ]
    np.testing.assert_array_equal(ends[0], ends[1])
    assert np.max(np.abs(ends[0] - ends[2])) > 1e-4


def test_a_signal_that_does_not_change_is_no_signal() -> None:
    net, low, high = network("tanh"), LOW[0], HIGH[0]
    still = pcdyn.InferenceProblem(net, input=low, output=high)
    same = pcdyn.DrivenProblem(net, input=pcdyn.Signal(lambda t: jnp.asarray(low)), output=high)
    for integrator in ("tsit5", "rodas5p", pcdyn.Euler(dt=0.05)):
        one = pcdyn.simulate(still, t1=T1, integrator=integrator)
        other = pcdyn.simulate(same, t1=T1, integrator=integrator)
        np.testing.assert_allclose(stacked(one), stacked(other), atol=1e-14)
        assert one.accepted_steps == other.accepted_steps


def test_interpolated_is_scipys_spline() -> None:
    from scipy.interpolate import CubicSpline

    times, rows = [0.0, 0.4, 1.1, 2.0, 4.0], values(5, 3, seed=4)
    signal, spline = pcdyn.Interpolated(times, rows), CubicSpline(times, rows)
    for t in (0.0, 0.2, 0.4, 1.7, 4.0):
        np.testing.assert_allclose(signal(t), spline(t), rtol=1e-13, atol=1e-13)
    assert signal.jumps == () and signal.end == 4.0


def test_the_problem_of_one_time() -> None:
    problem, _ = driven("tanh")
    for t in (0.0, 1.3, 2.4, 2.5, 3.2):
        at: Any = problem.at(t)
        np.testing.assert_array_equal(at.input, constant(LOW_TIMES, LOW)(t))
        np.testing.assert_allclose(at.output, linear(HIGH_TIMES, HIGH)(t), rtol=1e-14, atol=1e-15)
        assert float(at.curvature(2, jnp.zeros(4)).values) == (1.0 if t < 2.5 else 4.0)
        assert float(at.time_constants[2]) == (1.0 if t < 3.0 else 0.5)
        rest = pcdyn.equilibrium(at)
        state = at.state_of(tuple(map(jnp.asarray, rest.activities)))
        assert rest.ok and float(jnp.max(jnp.abs(at.gradient(state)[0]))) < 1e-6
        field = problem.vector_field(t, state)
        np.testing.assert_allclose(field[0], at.vector_field(0.0, state)[0], atol=1e-15)


@pytest.mark.slow
def test_samples_of_a_batch() -> None:
    """Each with its own signal, with shared steps, with its own, alone, and under `jax.vmap`."""
    net, count = network("tanh"), 3
    low, high = values(3, count, WIDTHS[0], seed=5), values(count, WIDTHS[-1], seed=6)
    tight = pcdyn.Diffrax("tsit5", rtol=1e-11, atol=1e-13)

    def problem(low: Any, high: Any) -> pcdyn.DrivenProblem:
        signal = pcdyn.PiecewiseConstant(LOW_TIMES, low)
        return pcdyn.DrivenProblem(net, input=signal, output=high)

    whole = pcdyn.simulate(problem(low, high), t1=T1, integrator=tight)
    each: Any = pcdyn.simulate(problem(low, high), t1=T1, integrator=tight, per_sample=True)
    assert len(each.status) == count and each.accepted_steps.shape == (count,)
    host = pcdyn.simulate(
        problem(low, high), t1=T1, per_sample=True,
        integrator=pcdyn.SciPy("DOP853", rtol=1e-11, atol=1e-13),
    )  # fmt: skip

    def run(low: Any, high: Any) -> Any:
        return pcdyn.simulate(problem(low, high), t1=T1, integrator=tight).activities[1]

    mapped = jax.vmap(run, (1, 0))(jnp.asarray(low), jnp.asarray(high))
    for k in range(count):
        alone = pcdyn.simulate(problem(low[:, k], high[k]), t1=T1, integrator=tight)
        for found in (whole, each, host):
            np.testing.assert_allclose(found.activities[1][:, k], alone.activities[1], atol=1e-9)
        np.testing.assert_allclose(mapped[k], alone.activities[1], atol=1e-9)
    np.testing.assert_array_equal(each.activities[0][:, 1], whole.activities[0][:, 1])


@pytest.mark.slow
@pytest.mark.parametrize("integrator", [pcdyn.Exact(), "rodas5p"], ids=str)
def test_derivatives_by_the_values_of_signals(integrator: Any) -> None:
    """Forward through steps, in both modes through the closed form, against differences."""
    net, high = network("identity"), HIGH

    def end(low: Any, high: Any, scale: Any) -> Any:
        problem = pcdyn.DrivenProblem(
            net, input=pcdyn.PiecewiseConstant(LOW_TIMES, low),
            output=pcdyn.PiecewiseLinear(HIGH_TIMES, high),
            energy=pcdyn.PiecewiseConstant(PI_TIMES, [pcdyn.Gaussian(1.0), pcdyn.Gaussian(scale)]),
        )  # fmt: skip
        run: Any = pcdyn.simulate(problem, t1=T1, times=[T1], integrator=integrator)
        return jnp.sum(run.activities[1] ** 2)

    given = (jnp.asarray(LOW), jnp.asarray(high), jnp.asarray(4.0))
    ways = tuple(jnp.asarray(values(*x.shape, seed=7)) if x.ndim else jnp.ones(()) for x in given)
    for number in range(3):
        way = tuple(w if k == number else jnp.zeros_like(w) for k, w in enumerate(ways))
        _, found = jax.jvp(end, given, way)
        h = 1e-4
        up, down = (end(*(x + s * h * w for x, w in zip(given, way, strict=True))) for s in (1, -1))
        # Central differences: h² times a third derivative, and the steps' error over h.
        assert float(found) == pytest.approx(float((up - down) / (2 * h)), rel=1e-3, abs=1e-4)
        if isinstance(integrator, pcdyn.Exact):
            slope = jax.grad(end, argnums=number)(*given)
            assert float(jnp.sum(slope * ways[number])) == pytest.approx(float(found), rel=1e-9)


def test_a_graph_with_clamps_inside_and_missing_units() -> None:
    one, two = pcdyn.Dense(values(4, 3, seed=8)), pcdyn.Dense(values(2, 4, seed=9))
    graph = pcdyn.Graph(
        {"eye": 3, "mind": 4, "word": 2},
        [
            pcdyn.Prediction("mind", given="eye", by=one),
            pcdyn.Prediction("word", given="mind", by=two),
        ],
    )
    mask = np.array([True, False, True, False])
    part = pcdyn.Signal(lambda t: pcdyn.Partial(jnp.full(4, 0.5) * t, mask))
    problem = pcdyn.DrivenProblem(
        graph, clamp={"eye": pcdyn.PiecewiseConstant([0, 1.0], LOW[:2]), "mind": part}
    )
    run: Any = pcdyn.simulate(problem, t1=2.0, integrator="rodas5p")
    np.testing.assert_allclose(
        run.activities["mind"][:, mask], 0.5 * run.times[:, None] + np.zeros(2)
    )
    np.testing.assert_array_equal(run.activities["eye"][-1], LOW[1])
    assert run.activities["word"].shape == (101, 2)


def test_energies_errors_and_files(tmp_path: Any) -> None:
    problem, _ = driven("tanh")
    run: Any = pcdyn.simulate(problem, t1=T1)
    for row in (0, 40, 80, 100):
        at = problem.at(run.times[row])
        state = tuple(jnp.asarray(run.activities[l][row]) for l in (1, 2))
        np.testing.assert_allclose(
            run.energies[row], at.layer_energies(state), rtol=1e-12, atol=1e-15
        )
    run.to_netcdf(tmp_path / "run.nc")
    again: Any = pcdyn.load(tmp_path / "run.nc")
    for one, other in zip(run.activities, again.activities, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_batch_takes_no_dense_matrix_in_implicit_steps() -> None:
    """Each sample has a matrix of its own, as without signals: bits do not depend on the others."""
    net = network("tanh")
    low, high = values(2, 2, WIDTHS[0], seed=10), values(2, WIDTHS[-1], seed=11)
    problem = pcdyn.DrivenProblem(net, input=pcdyn.PiecewiseConstant([0, 1.0], low), output=high)
    step = pcdyn.Diffrax("rodas5p", dt=0.1)
    both = pcdyn.simulate(problem, t1=2.0, integrator=step)
    alone = pcdyn.simulate(problem.sample(1), t1=2.0, integrator=step)
    np.testing.assert_allclose(both.activities[2][:, 1], alone.activities[2], atol=1e-14)
    for name in ("Radau", "BDF"):
        stiff = pcdyn.simulate(problem, t1=2.0, integrator=pcdyn.SciPy(name, rtol=1e-8, atol=1e-10))
        np.testing.assert_allclose(stiff.activities[2], both.activities[2], atol=1e-5)


def test_float32_without_a_word_of_float64() -> None:
    net = pcdyn.mlp(WIDTHS, activation="tanh", key=jax.random.key(0), dtype="float32")
    problem = pcdyn.DrivenProblem(
        net, input=pcdyn.PiecewiseConstant([0, 1.3], LOW[:2]), output=HIGH[0]
    )
    run: Any = pcdyn.simulate(problem, t1=2.0)
    assert run.activities[1].dtype == np.float32 and run.ok
    np.testing.assert_array_equal(run.activities[0][-1], LOW[1].astype(np.float32))


@pytest.mark.usefixtures("as_users_run")
def test_the_guide_runs() -> None:
    """docs/signals.md, and what it says of its example."""
    text = (Path(__file__).parents[2] / "docs" / "signals.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/signals.md", "exec"), names)
    run, images = names["trajectory"], names["images"]
    assert run.ok and names["rest"].ok
    np.testing.assert_array_equal(run.activities[0][[0, -1]], images[[0, 2]])
