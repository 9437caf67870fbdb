"""Noise that makes no sense raises its error before anything runs; runs that fail say how."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcdyn
from pcdyn import Euler, EulerMaruyama, Exact, Langevin, Status, StochasticHeun, learning, simulate
from pcdyn.errors import (
    DivergedError,
    InputError,
    IntegratorError,
    NotLinearError,
    ShapeError,
    SingularHessianError,
    SizeError,
    StepSizeWarning,
    TimesError,
)
from pcdyn.references.linear import moments, stationary_covariance
from tests.graphs import random_graph
from tests.networks import build_case

pytestmark = pytest.mark.unchecked

CASE = build_case(seed=8, widths=(3, 3, 2, 2))
TANH = build_case(seed=8, widths=(3, 3, 2, 2), activations=("tanh",))
KEY = jax.random.key(0)
NOISE = Langevin(temperature=0.1)
STEPS = EulerMaruyama(dt=0.05)


def run(problem: Any = CASE.problem, **options: Any) -> Any:
    given: dict[str, Any] = {"t1": 1.0, "noise": NOISE, "key": KEY, "integrator": STEPS, **options}
    return simulate(problem, **given)


BAD: list[tuple[str, Callable[[], Any], type[InputError], str]] = [
    # Temperatures.
    ("negative temperature", lambda: Langevin(temperature=-0.1), InputError, "at least 0, got -0"),
    ("NaN temperature", lambda: Langevin(temperature=np.nan), InputError, "nan"),
    ("infinite temperature", lambda: Langevin(temperature=np.inf), InputError, "inf"),
    ("several temperatures", lambda: Langevin(temperature=np.ones(2)), InputError, "(2,)"),
    ("traced temperatures", lambda: jax.jit(lambda t: Langevin(t).temperature)(np.ones(2)),
     InputError, "jax.vmap"),
    ("no temperature", lambda: Langevin(temperature=None), InputError, "None"),
    # Who takes noise.
    ("the default with noise", lambda: run(integrator="tsit5"), IntegratorError, "EulerMaruyama("),
    ("Euler with noise", lambda: run(integrator=Euler(dt=0.1)), IntegratorError, "StochasticHeun("),
    ("SciPy with noise", lambda: run(integrator="lsoda"), IntegratorError, "LSODA would ignore"),
    ("steps without noise", lambda: run(noise=None, key=None), IntegratorError, "pcdyn.Langevin("),
    ("key without noise", lambda: run(noise=None, integrator="tsit5"), InputError, "key would be"),
    ("noise without key", lambda: run(key=None), InputError, "key=jax.random.key(seed)"),
    ("a seed for a key", lambda: run(key=3), InputError, "key must be one random key"),
    ("several keys", lambda: run(key=jax.random.split(KEY)), InputError, "one random key"),
    ("a number for noise", lambda: run(noise=0.1), InputError, "pcdyn.Langevin("),
    ("the class for noise", lambda: run(noise=Langevin), InputError, "add parentheses"),
    ("a name of steps", lambda: run(integrator="euler_maruyama"), IntegratorError, "(dt="),
    ("another name of steps", lambda: run(integrator="stochastic_heun"), IntegratorError, "(dt="),
    ("a flow that is no inference", lambda: run(learning.JointFlow(CASE.problem, ratio=0.1)),
     IntegratorError, "JointFlow"),
    ("exact noise of tanh", lambda: run(TANH.problem, integrator=Exact()), NotLinearError, "tanh"),
    ("compared without noise", lambda: STEPS.check(CASE.problem, pcdyn.UntilEquilibrium(), False),
     IntegratorError, "comes to rest"),
    # Options that would be ignored.
    ("until", lambda: run(until="equilibrium"), IntegratorError, "nothing comes to rest"),
    ("dense", lambda: run(dense=True), IntegratorError, "nowhere smooth"),
    ("exact and dense", lambda: run(integrator=Exact(), dense=True), IntegratorError, "smooth"),
    ("exact and until", lambda: run(integrator=Exact(), until="equilibrium"), IntegratorError,
     "moments"),
    ("exact and seconds", lambda: run(integrator=Exact(), seconds=1.0), IntegratorError, "seconds"),
    # Steps.
    ("zero dt", lambda: EulerMaruyama(dt=0.0), IntegratorError, "EulerMaruyama: dt"),
    ("NaN dt", lambda: StochasticHeun(dt=np.nan), IntegratorError, "StochasticHeun: dt"),
    ("no steps", lambda: EulerMaruyama(dt=0.1, max_steps=0), InputError, "max_steps"),
    ("too many steps", lambda: run(integrator=EulerMaruyama(dt=0.01, max_steps=9)),
     IntegratorError, "max_steps=9"),
    ("more steps than numbers", lambda: run(integrator=EulerMaruyama(dt=1e-320)), IntegratorError,
     "max_steps"),
    ("t1 within the first step", lambda: run(integrator=EulerMaruyama(dt=3.0)), TimesError,
     "take 3"),
    ("t1 between steps", lambda: run(t1=1.02), TimesError, "take 1"),
    ("times between steps", lambda: run(times=[0.0, 0.51]), TimesError, "times[1] = 0.51"),
    ("t1 before the first step", lambda: run(t1=1e-9), TimesError, "smaller dt"),
    # Laws.
    ("law of tanh", lambda: moments(TANH.problem, 0.1, [1.0]), NotLinearError, "tanh"),
    ("negative times", lambda: moments(CASE.problem, 0.1, [-1.0]), TimesError, "negative"),
    ("no times", lambda: moments(CASE.problem, 0.1, []), TimesError, "at least one"),
    ("negative law", lambda: moments(CASE.problem, -0.1, [1.0]), InputError, "temperature"),
    ("negative stationary law", lambda: stationary_covariance(CASE.problem, -1), InputError, "-1"),
    ("covariance of one layer", lambda: moments(CASE.problem, 0.1, [1.0], covariance=np.eye(3)),
     ShapeError, "(5, 5)"),
    ("no covariance", lambda: moments(CASE.problem, 0.1, [1.0], covariance=-np.eye(5)),
     InputError, "no negative eigenvalue"),
    ("lopsided covariance",
     lambda: moments(CASE.problem, 0.1, [1.0], covariance=np.eye(5) + np.eye(5, k=1)),
     InputError, "symmetric"),
    ("samples that differ",
     lambda: moments(random_graph(4, 3, batch=3, differ=True).problem, 0.1, [1.0]),
     InputError, "differ from sample to sample"),
    ("flat", lambda: stationary_covariance(CASE.replace(clamp="none").problem, 0.1),
     SingularHessianError, "flat"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "named"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_noise_that_makes_no_sense_raises_its_error(
    call: Callable[[], Any], error: type[InputError], named: str
) -> None:
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        call()
    assert type(caught.value) is error


def test_covariances_that_do_not_fit_are_refused() -> None:
    """A thousand times of 9 TB each; nothing of the size is made first."""
    wide = pcdyn.Network([pcdyn.Dense(np.zeros((2**10, 1))), pcdyn.Dense(np.zeros((1, 2**10)))])
    problem = pcdyn.InferenceProblem(wide, input=[0.0], output=[0.0])
    with pytest.raises(SizeError, match="1024 units at 1000000 times"):
        moments(problem, 0.1, np.arange(1e6))


def test_others_that_take_integrators_refuse_steps_with_noise() -> None:
    """They integrate without noise: named, not garbage."""
    with pytest.raises(IntegratorError, match="EulerMaruyama"):
        pcdyn.solvers.FlowToRest(integrator=STEPS).check(CASE.problem)
    with pytest.raises(IntegratorError, match="for noise"):
        pcdyn.convergence_order(STEPS, CASE.problem, t1=1.0)


@pytest.mark.parametrize("kind", [EulerMaruyama, StochasticHeun])
def test_a_step_that_is_too_large_is_warned_of_and_ends_the_run(kind: Any) -> None:
    """What is finite stays, and the status says why it ended; noise alone is no instability."""
    with pytest.warns(StepSizeWarning, match="largest stable step"):
        found = run(t1=4e4, times=[0.0, 10.0, 4e4], integrator=kind(dt=10.0), throw=False)
    assert found.status is Status.NON_FINITE and found.end_time < 4e4
    assert all(np.isfinite(x[:2]).all() for x in found.activities)
    with pytest.warns(StepSizeWarning), pytest.raises(DivergedError, match="dt=10"):
        run(t1=4e4, times=[4e4], integrator=kind(dt=10.0))
    # From its minimum the free energy can only rise: no fault of the step.
    rest = CASE.problem.state_of(pcdyn.linear_equilibrium(CASE.problem))
    found = run(initial=rest, integrator=kind(dt=0.05))
    assert found.status is Status.REACHED_T1
    assert found.free_energy[-1] > found.free_energy[0]


def test_the_seconds_end_a_run_with_noise() -> None:
    found = run(t1=5000.0, times=[0.0, 5000.0], seconds=1e-9, throw=False)
    assert found.status is Status.TIME_LIMIT and found.end_time < 1


def test_a_singular_law_is_nan_under_a_transformation() -> None:
    """Nothing can be raised there; a regular one is what it is outside."""
    flat = CASE.replace(clamp="none").problem
    mapped = jax.jit(lambda t, p: stationary_covariance(p, t))
    assert np.isnan(mapped(0.1, flat)).all()
    regular = stationary_covariance(CASE.problem, 0.1)
    np.testing.assert_allclose(mapped(0.1, CASE.problem), regular, rtol=1e-10, atol=1e-14)
    assert jnp.all(jnp.isfinite(regular))
