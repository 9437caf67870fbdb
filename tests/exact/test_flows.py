"""Flows of a user's own, those of docs/flows.md, through every door that takes a flow.

The driven network has a closed form; the augmented Lagrangian rests at the errors that
backpropagation sends down, and is linearised by hand.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.linalg import expm

import pcdyn
from pcdyn.analysis.stability import stability_along
from pcdyn.errors import (
    DtypeError,
    InputError,
    IntegratorError,
    NotLinearError,
    PcdynError,
    ShapeError,
)
from pcdyn.learning import AdiabaticFlow, JointFlow, PrecisionFlow
from pcdyn.model.flow import depends_on_time
from tests.networks import assert_close, build_case

BLOCKS = re.findall(r"```python\n(.*?)```", Path("docs/flows.md").read_text(), re.DOTALL)


def examples(*which: int) -> types.SimpleNamespace:
    """What blocks of docs/flows.md define."""
    names: dict[str, Any] = {}
    for index in which:
        exec(BLOCKS[index], names)
    return types.SimpleNamespace(**names)


DOCS = examples(0, 2)
MATRIX, DRIVE, FREQUENCY = np.array([[-1.0, 2.0], [-2.0, -1.0]]), np.array([1.0, 0.5]), 3.0
DRIVEN = DOCS.Driven(jnp.asarray(MATRIX), jnp.asarray(DRIVE), FREQUENCY)
T1 = 1.5


def driven(t: float, drive: np.ndarray = DRIVE) -> np.ndarray:
    """x(t) of `ẋ = A x + b sin ωt` from 0: what the drive forces, and what decays."""
    forced = np.linalg.solve(1j * FREQUENCY * np.eye(2) - MATRIX, drive.astype(complex))
    return np.imag(forced * np.exp(1j * FREQUENCY * t)) - expm(MATRIX * t) @ np.imag(forced)


@pytest.mark.parametrize(
    ("integrator", "order"),
    [("rodas5p", 5), ("kvaerno3", 3), ("tsit5", 5), (pcdyn.Euler(dt=1.0), 1)],
    ids=["rodas5p", "kvaerno3", "tsit5", "euler"],
)
def test_a_driven_flow_is_integrated_with_the_order_of_the_method(
    integrator: Any, order: int
) -> None:
    """A stage at a wrong time, or without ∂f/∂t, has order one or two."""
    steps = [T1 / n for n in ((400, 800, 1600) if order == 1 else (16, 24, 32, 48))]
    found = pcdyn.convergence_order(integrator, DRIVEN, t1=T1, steps=steps, reference=[driven(T1)])
    assert found.usable.sum() >= 3
    # Slopes of neighbouring steps agree within a tenth, so that of all is known so well.
    assert found.order == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("integrator", ["Radau", "LSODA", "RK45"])
def test_scipy_integrates_a_driven_flow(integrator: str) -> None:
    times = np.array([0.3, T1])
    run = pcdyn.simulate(DRIVEN, t1=T1, times=times, integrator=pcdyn.SciPy(integrator, rtol=1e-9))
    # Errors of steps within 1e-9 add up over some dozens of steps.
    assert_close(run.activities[0], np.stack([driven(t) for t in times]), 1e-6)
    assert run.energies.shape == (2, 0)
    assert "free energy" not in run.summary()


def test_derivatives_of_a_driven_flow_are_those_of_its_closed_form() -> None:
    """x(t) is linear in the drive: its derivative is the solution for the change of the drive."""

    def end(drive: Any) -> Any:
        flow = DOCS.Driven(jnp.asarray(MATRIX), drive, FREQUENCY)
        return pcdyn.simulate(flow, t1=T1, times=np.array([T1]), integrator="tsit5").final[0]

    change = np.array([0.3, -1.0])
    _, tangent = jax.jit(lambda: jax.jvp(end, (jnp.asarray(DRIVE),), (jnp.asarray(change),)))()
    assert_close(tangent, driven(T1, change), 1e-5)


def test_a_use_of_time_is_seen_and_nothing_else() -> None:
    state = (jnp.zeros(2),)
    assert depends_on_time(DRIVEN.vector_field, 0.0, state)
    assert depends_on_time(jax.jit(lambda t, s: jax.tree.map(lambda x: t * x, s)), 0.0, state)
    assert not depends_on_time(jax.jit(lambda t, s: s), 0.0, state)
    case = build_case(seed=0, widths=(2, 3, 2))
    assert not depends_on_time(case.problem.vector_field, 0.0, case.state)


# --- The augmented Lagrangian ---------------------------------------------------------------------


CASE = build_case(seed=1, widths=(2, 3, 2, 2), bias=True)
TANH = CASE.replace(activations=("tanh",) * 3)
PENALTY = 0.7
FLOW = DOCS.AugmentedLagrangian(TANH.problem, PENALTY)
LINEAR = DOCS.AugmentedLagrangian(CASE.problem, PENALTY)


def saddle() -> np.ndarray:
    """The Jacobian of the linear network's flow: hidden errors A x + …, output error B x + …."""
    _, second, third = CASE.weights
    hidden = np.block([[np.eye(3), np.zeros((3, 2))], [-second, np.eye(2)]])
    output = np.hstack([np.zeros((2, 3)), -third])
    curvature = PENALTY * hidden.T @ hidden + output.T @ output
    return np.block([[-curvature, -hidden.T], [hidden, np.zeros((5, 5))]])


def test_it_rests_at_the_feedforward_pass_and_at_the_errors_of_backpropagation() -> None:
    integrator = pcdyn.SciPy("LSODA", rtol=1e-10, atol=1e-12)
    until = pcdyn.UntilEquilibrium(tolerance=1e-9)
    run = pcdyn.simulate(FLOW, t1=1e3, integrator=integrator, until=until)
    assert run.status is pcdyn.Status.CONVERGED
    # The slowest rate is above .1, so that a field of 1e-9 is within 1e-8 of where it vanishes.
    hidden = TANH.feedforward(TANH.activities[0])[:-1]
    assert_close(run.final, (*hidden, TANH.activities[-1]), 1e-7)
    expected = pcdyn.backpropagation(TANH.problem).deltas[:-1]
    assert_close([m[-1] for m in run.moving["multipliers"]], expected, 1e-7)
    assert run.network is None and run.precisions is None
    run.plot()
    plt.close("all")


def order_of_heun(flow: pcdyn.Flow) -> float:
    """Far from rest, where errors die out; LSODA at 1e-10 compiles less than a reference would."""
    exact = pcdyn.SciPy("LSODA", rtol=1e-10, atol=1e-12)
    t1, steps = 0.2, [0.02, 0.01, 0.005]
    reference = pcdyn.simulate(flow, t1=t1, times=np.array([t1]), integrator=exact)
    return pcdyn.convergence_order("heun", flow, t1=t1, steps=steps, reference=reference).order


def test_compare_takes_it() -> None:
    table = pcdyn.compare(
        ["tsit5", "lsoda"], FLOW, t1=2.0, times=np.array([1.0, 2.0]), tolerances=[1e-6], repeats=1
    )
    assert table.reference_error.final_error < 1e-10
    assert all(0 < row.final_error < 1e-4 and row.energy_error < 1e-4 for row in table.rows)


def test_convergence_order_takes_it() -> None:
    assert order_of_heun(FLOW) == pytest.approx(2, abs=0.1)


def test_stability_has_its_complex_rates() -> None:
    """Against NumPy's eigenvalues of the saddle, and the polynomials of Euler and Heun."""
    found = pcdyn.stability(LINEAR, at="feedforward")
    expected = np.sort_complex(-np.linalg.eigvals(saddle()))
    assert np.any(np.abs(expected.imag) > 0.1)
    assert_close(np.sort_complex(found.rates), expected, 1e-12)
    assert not found.unstable
    assert float(found.fastest_rate) == pytest.approx(expected.real.max())
    assert float(found.stiffness) == pytest.approx(expected.real.max() / expected.real.min())
    for name, polynomial in (("euler", lambda z: 1 + z), ("heun", lambda z: 1 + z + z**2 / 2)):
        step = float(found.largest_step(name))
        growth = [np.abs(polynomial(-factor * step * expected)).max() for factor in (0.999, 1.001)]
        assert growth[0] < 1 < growth[1]
    assert np.isinf(found.largest_step("kvaerno3"))
    assert "modes oscillate" in found.summary() and "array 3" in found.summary()
    assert found.to_xarray().sizes == {"rate": 10, "free_layer": 4}


def test_stability_along_a_trajectory_and_of_a_saddle() -> None:
    """x′ = A x + …: the rates are those of −A at every time, and with A turned round they grow."""
    run = pcdyn.simulate(DRIVEN, t1=1.0, times=np.array([0.0, 1.0]), integrator="lsoda")
    along = pcdyn.stability_along(DRIVEN, run)
    assert_close(along.rates, np.array(2 * [[1 - 2j, 1 + 2j]]), 1e-12)
    assert_close(pcdyn.stability(DRIVEN, at=run).rates, along.rates[0], 1e-12)
    away = pcdyn.stability(DOCS.Driven(-DRIVEN.matrix, DRIVEN.drive, 1.0), at="feedforward")
    assert away.unstable and "left by the flow" in str(away)
    assert np.isinf(away.largest_euler_step)


# --- Other flows ----------------------------------------------------------------------------------


class Twice(pcdyn.Flow):
    """Inference at twice its speed, with `observe`: what files hold."""

    problem: pcdyn.InferenceProblem

    def initial_state(self, initial: Any = "feedforward") -> Any:
        return self.problem.initial_state(initial)

    def vector_field(self, t: Any, state: Any) -> Any:
        return jax.tree.map(lambda x: 2 * x, self.problem.vector_field(t, state))

    def activities(self, state: Any) -> Any:
        return self.problem.activities(state)

    @property
    def free_layers(self) -> tuple[int, ...]:
        return self.problem.free_layers

    def observe(self, t: Any, state: Any) -> Any:
        return self.problem.observe(t, state)


def test_a_flow_of_activities_is_saved_and_loaded(tmp_path: Path) -> None:
    """At half the times it is where inference is; a batch, whose samples it may not part."""
    case = build_case(seed=2, widths=(2, 3, 2), activations=("tanh",), batch=2)
    times, method = np.array([0.5, 1.0]), pcdyn.SciPy("RK45", rtol=1e-9)
    run = pcdyn.simulate(Twice(case.problem), t1=1.0, times=times, integrator=method)
    slow = pcdyn.simulate(case.problem, t1=2.0, times=2 * times, integrator=method)
    assert_close(run.activities, slow.activities, 1e-7)
    run.to_netcdf(tmp_path / "run.nc")
    assert_close(pcdyn.load(tmp_path / "run.nc").energies, run.energies, 0)
    with pytest.raises(ShapeError, match=r"per_sample.*Twice"):
        pcdyn.simulate(Twice(case.problem), t1=1.0, per_sample=True)


# Linear, for then the equilibrium within two of the flows has a closed form, quick to compile; with
# small data, for the rates of weights grow with their square.
LARGE = build_case(seed=3, widths=(2, 2, 2), batch=2)
SMALL = LARGE.replace(activities=tuple(x / 2 for x in LARGE.activities))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flow",
    [
        JointFlow(SMALL.problem, 0.2),
        AdiabaticFlow(SMALL.problem, "closed_form"),
        PrecisionFlow(SMALL.problem, ("fixed", "scalar")),
    ],
    ids=["joint", "adiabatic", "precisions"],
)
def test_the_flows_of_learning_go_through_the_same_door(flow: Any) -> None:
    """Compared, of order two, and linearised: the Jacobian by differences of the field."""
    table = pcdyn.compare(
        ["RK45"], flow, t1=1.0, times=np.array([0.5, 1.0]), tolerances=[1e-5],
        reference=pcdyn.SciPy("LSODA", rtol=1e-9), repeats=1,
    )  # fmt: skip
    assert 0 < table.rows[0].maximum_error < 1e-3
    assert 0 < table.rows[0].energy_error < 1e-3
    assert order_of_heun(flow) == pytest.approx(2, abs=0.15)
    state = flow.initial_state()
    found = pcdyn.stability(flow, at=state)
    sizes = np.cumsum([x.size for x in state])[:-1]
    start, field = np.concatenate(state), eqx.filter_jit(flow.vector_field)

    def moved(direction: np.ndarray) -> np.ndarray:
        parts = np.split(start + 1e-5 * direction, sizes)
        return np.concatenate(field(0.0, tuple(map(jnp.asarray, parts))))

    units = np.eye(start.size)
    jacobian = np.stack([(moved(e) - moved(-e)) / 2e-5 for e in units], axis=1)
    # Central differences of a step of 1e-5 err by 1e-10, an equilibrium to 1e-12 by 1e-7.
    assert np.trace(jacobian) == pytest.approx(-np.sum(found.rates).real, rel=1e-5, abs=1e-6)
    square = np.trace(jacobian @ jacobian)
    assert square == pytest.approx(np.sum(found.rates**2).real, rel=1e-5, abs=1e-6)


# --- What is refused ------------------------------------------------------------------------------


class Wrong(pcdyn.Flow):
    """A flow with one member that does not fit."""

    fault: str

    def initial_state(self, initial: Any = "feedforward") -> Any:
        dtype = jnp.float32 if self.fault == "dtype" else jnp.float64
        state = (jnp.zeros(() if self.fault == "no units" else 2, dtype),)
        return (*state, jnp.zeros((3, 2))) if self.fault == "batch" else state

    def vector_field(self, t: Any, state: Any) -> Any:
        return state[0] if self.fault == "field" else state

    def activities(self, state: Any) -> Any:
        return (jnp.zeros(3), *state) if self.fault == "layers" else state


def run(flow: Any = DRIVEN, **options: Any) -> pcdyn.Trajectory:
    return pcdyn.simulate(flow, **{"t1": 0.1, "times": [0.1], "integrator": "RK45", **options})


REFUSED: dict[str, tuple[Callable[[], Any], type[PcdynError], str]] = {
    "a dtype": (lambda: run(Wrong("dtype")), DtypeError, r"float64.*initial_state.*float32"),
    "no units": (lambda: run(Wrong("no units")), ShapeError, "axis of units"),
    "other samples": (lambda: run(Wrong("batch")), ShapeError, r"same samples.*\(3, 2\)"),
    "a field": (lambda: run(Wrong("field")), ShapeError, r"Wrong.vector_field must return"),
    "layers": (lambda: run(Wrong("layers")), ShapeError, r"activities.*\(0, 1\).*free_layers"),
    "no flow": (lambda: run(3), InputError, "another pcdyn.Flow"),
    "its class": (lambda: run(DOCS.Driven), InputError, "add parentheses"),
    "an unknown start": (lambda: run(initial="zeros"), InputError, "'zeros' of Driven"),
    "another start": (lambda: run(initial=[np.zeros(3)]), ShapeError, r"\(2,\)\], got \[\(3,\)"),
    "rest": (lambda: run(until="equilibrium"), IntegratorError, "depends on time"),
    "the closed form": (lambda: run(integrator="exact"), NotLinearError, "Driven"),
    "no energies in files": (lambda: run().to_xarray(), ShapeError, "no prediction errors"),
    "no energies to draw": (lambda: pcdyn.plotting.energies(run()), ShapeError, "no energies"),
    "multipliers in files": (lambda: run(FLOW).to_xarray(), ShapeError, "holds its multipliers"),
    "no equilibrium": (lambda: pcdyn.stability(FLOW), InputError, "give a state of the Augmented"),
    "multipliers that moved": (
        lambda: pcdyn.stability(FLOW, at=run(FLOW)), InputError, "multipliers moved"),
    "a transformed stability": (
        lambda: jax.jit(lambda x: pcdyn.stability(DRIVEN, at=(x,)).rates)(jnp.zeros(2)),
        InputError, "cannot transform"),
    "a transformed trajectory": (
        lambda: eqx.filter_jit(lambda run: stability_along(DRIVEN, run).rates)(run()),
        InputError, "cannot transform"),
    "the end of a transformed trajectory": (
        lambda: eqx.filter_jit(lambda run: pcdyn.stability(DRIVEN, at=run).rates)(run()),
        InputError, "cannot transform"),
    "an equilibrium": (lambda: pcdyn.equilibrium(FLOW), InputError, "pcdyn.InferenceProblem"),
}  # fmt: skip


@pytest.mark.unchecked
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_the_page_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = examples(*range(len(BLOCKS)))
    assert_close(names.end, names.deltas[:-1], 1e-5)
    assert "UNSTABLE" not in capsys.readouterr().out
