"""Energies of another interaction than x − μ, as a user writes them, against NumPy and SciPy.

The ratio x/μ − 1 above softplus predictions, with its derivatives by hand, in layers 1 and 2 of a
3-4-3-2 network whose output has a Gaussian energy.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import root
from scipy.special import expit

import pcdyn
from pcdyn import learning
from pcdyn.errors import InputError, NotLinearError, PcdynError, ShapeError
from pcdyn.model import network as networks
from pcdyn.model import stacked
from pcdyn.model.energies import Interaction
from tests.networks import EPS, assert_close

ROUND_OFF = 1e3 * EPS
RNG = np.random.default_rng(0)
WIDTHS = (3, 4, 3, 2)
WEIGHTS = [0.5 * RNG.normal(size=(m, n)) for n, m in itertools.pairwise(WIDTHS)]
INPUT, OUTPUT = RNG.normal(size=(2, 3)), np.exp(0.5 * RNG.normal(size=(2, 2)))
PRECISIONS = np.array([2.0, 0.5, 1.5])


def ratio(x: Any, mu: Any) -> Any:
    return x / mu - 1


def problem(activation: str = "softplus", **options: Any) -> pcdyn.InferenceProblem:
    layers = [pcdyn.Dense(w, activation=activation) for w in WEIGHTS]
    hidden = Interaction(ratio, pcdyn.Gaussian(list(PRECISIONS[:2])))
    energy = [*hidden.per_prediction(2), pcdyn.Gaussian(PRECISIONS[2])]
    data = {"input": INPUT, "output": OUTPUT, "energy": energy}
    return pcdyn.InferenceProblem(pcdyn.Network(layers), **{**data, **options})


def look(hidden: list[np.ndarray], weights: Any = WEIGHTS) -> tuple[Any, Any, Any]:
    """F, ∂F/∂x of the hidden layers and ∂F/∂W summed over samples, in NumPy."""
    x = [INPUT, *hidden, OUTPUT]
    inner = [below @ w.T for below, w in zip(x, weights, strict=False)]
    mu = [np.logaddexp(0, z) for z in inner]
    error = x[-1] - mu[-1]
    total = PRECISIONS[2] * (error**2).sum(-1) / 2
    own, credit = [], []
    for l in (0, 1):
        g = x[l + 1] / mu[l] - 1
        total = total + PRECISIONS[l] * (g**2).sum(-1) / 2
        own.append(PRECISIONS[l] * g / mu[l])
        credit.append(PRECISIONS[l] * g * x[l + 1] / mu[l] ** 2)
    credit.append(PRECISIONS[2] * error)
    local = [expit(z) * c for z, c in zip(inner, credit, strict=True)]
    slopes = [own[l] - local[l + 1] @ weights[l + 1] for l in (0, 1)]
    return total, slopes, [-d.T @ below for d, below in zip(local, x, strict=False)]


def split(flat: np.ndarray) -> list[np.ndarray]:
    return np.split(flat.reshape(2, 7), [4], axis=1)


def slope(flat: np.ndarray) -> np.ndarray:
    return np.concatenate(look(split(flat))[1], axis=1).ravel()


FORWARD = [np.logaddexp(0, INPUT @ WEIGHTS[0].T)]
FORWARD.append(np.logaddexp(0, FORWARD[0] @ WEIGHTS[1].T))
START = np.concatenate(FORWARD, axis=1).ravel()
REST = split(root(slope, START, tol=1e-13).x)


@pytest.mark.parametrize("integrator", ["tsit5", "lsoda"])
def test_simulation_is_scipys(integrator: str) -> None:
    """Activities, F, and prediction errors that stay x − μ."""
    run = pcdyn.simulate(problem(), t1=1.0, integrator=integrator)
    theirs = solve_ivp(lambda _, y: -slope(y), (0, 1), START, rtol=1e-10, atol=1e-12)
    expected = split(theirs.y[:, -1])
    # A hundred times the tolerance of a step.
    for ours, end in zip(run.final[1:3], expected, strict=True):
        np.testing.assert_allclose(ours, end, atol=1e-4)
    hidden = [np.asarray(x[-1]) for x in run.activities[1:3]]
    assert_close(run.free_energy[-1], look(hidden)[0], ROUND_OFF)
    error = hidden[1] - np.logaddexp(0, hidden[0] @ WEIGHTS[1].T)
    assert_close(run.prediction_errors[1][-1], error, ROUND_OFF)


@pytest.mark.parametrize(
    "method",
    [None, pytest.param("flow", marks=pytest.mark.slow), pcdyn.solvers.GradientDescent(dt=0.02)],
    ids=str,
)
def test_solvers_that_need_no_curvature_end_at_scipys_root(method: Any) -> None:
    found = pcdyn.equilibrium(problem(), method=method, tolerance=1e-9)
    # No eigenvalue of the Hessian is below a tenth.
    for ours, expected in zip(found.state, REST, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-8)


@pytest.mark.slow
def test_rates_are_those_of_numpys_hessian() -> None:
    found = pcdyn.stability(problem())
    at, size = np.concatenate(REST, axis=1).ravel(), 1e-5
    hessian = np.array([(slope(at + s) - slope(at - s)) / (2 * size) for s in size * np.eye(14)])
    for rates, sample in zip(found.rates, (slice(0, 7), slice(7, 14)), strict=True):
        # Truncation is of order size², round-off of EPS / size, on rates up to a hundred.
        np.testing.assert_allclose(rates, np.linalg.eigvalsh(hessian[sample, sample]), atol=1e-6)


def test_weights_learn_by_the_prediction() -> None:
    """−∂E/∂μ at rest and after Euler steps; joint learning and training descend F."""
    rest = learning.PredictiveCoding(method="pseudo_transient", tolerance=1e-10)
    flat = START
    for _ in range(5):
        flat = flat - 0.02 * slope(flat)
    for rule, hidden, tolerance in (
        (rest, REST, 1e-8), (learning.EulerPredictiveCoding(dt=0.02, steps=5), split(flat), 1e-12),
    ):  # fmt: skip
        rule.check(problem())
        learned, _ = rule.learn(problem(), ())
        layers = zip(learned.gradient.layers, look(hidden)[2], strict=True)
        for layer, expected in layers:
            far = np.linalg.norm(np.asarray(layer.weight) - expected)
            assert far <= tolerance * np.linalg.norm(expected)


@pytest.mark.slow
def test_training_takes_it() -> None:
    made = problem()
    found = learning.train(
        made.network, INPUT, OUTPUT, energy=list(made.energy), rule=learning.PredictiveCoding(None),
        optimiser=optax.sgd(0.02), epochs=5, batch_size=2, key=jax.random.key(0),
    )  # fmt: skip
    assert np.all(np.diff(found.history["free_energy"].ravel()) < 0)
    flow = learning.JointFlow(made, ratio=0.1)
    run = pcdyn.simulate(flow, t1=5.0)
    assert np.all(np.diff(run.free_energy.sum(-1)) <= 0)


@pytest.mark.slow
def test_it_is_a_citizen_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied, pickled, differentiated by a weight at rest, mapped over, and stacked when deep."""
    made = problem()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert eqx.tree_equal(other, made)

    def least(weight: Any) -> Any:
        moved = eqx.tree_at(lambda p: p.network.layers[1].weight, made, weight)
        return jnp.sum(pcdyn.equilibrium(moved, tolerance=1e-10).free_energy)

    weights = jnp.asarray(np.stack([WEIGHTS[1], 1.1 * WEIGHTS[1]]))
    # ∂F*/∂W is ∂F/∂W at fixed activities, for they are where F is least.
    assert_close(jax.vmap(jax.grad(least))(weights)[0], look(REST)[2][1], 1e-8)
    monkeypatch.setattr(stacked, "MOST_WRITTEN_OUT", 2)
    monkeypatch.setattr(networks, "MOST_WRITTEN_OUT", 2)
    deep = stacked.stacked(made)
    assert isinstance(deep, stacked.StackedProblem)
    at = deep.pack([1.2 * x for x in FORWARD])
    energy, (slopes,) = eqx.filter_jit(lambda d, x: (d.free_energy(x), d.gradient(x)))(deep, at)
    assert_close(slopes, slope(1.2 * START).reshape(2, 7), ROUND_OFF)
    assert_close(energy, look([1.2 * x for x in FORWARD])[0], ROUND_OFF)


@pytest.mark.slow
def test_the_difference_is_the_gaussian() -> None:
    """g = x − μ, at an equilibrium along kinks of the activation too."""

    def difference(x: Any, mu: Any) -> Any:
        return x - mu

    plain = pcdyn.Gaussian([1.0, 2.0, 0.5])
    ends = [
        pcdyn.equilibrium(problem("relu", energy=energy), method="pseudo_transient", tolerance=1e-9)
        for energy in (Interaction(difference, plain), plain)
    ]
    assert ends[0].status == ends[1].status
    assert_close(ends[0].activities, [np.asarray(x) for x in ends[1].activities], 1e-7)


@pytest.mark.unchecked
def test_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    """Solvers and rules of the prediction error alone, closed forms, files, and odd functions."""
    made, network = problem(), problem().network

    def of(function: Any, energy: Any = None) -> Any:
        given = Interaction(function) if energy is None else Interaction(function, energy)
        return pcdyn.InferenceProblem(network, input=INPUT[0], energy=given)

    calls: Any = [
        *((lambda m=m: pcdyn.equilibrium(made, method=m), InputError, "Interaction, has none")
          for m in ("gauss_newton", "nesterov", "fixed_point")),
        (lambda: learning.PredictiveCoding().check(made), InputError, "Interaction, has none"),
        (lambda: learning.ZeroDivergence().check(made), InputError, "depends on the activity"),
        (lambda: pcdyn.linear_equilibrium(problem("identity")), NotLinearError, "Interaction"),
        (lambda: pcdyn.save_problem(made, tmp_path / "p.nc"), InputError, "Interaction is no"),
        (lambda: of(lambda x, mu: jnp.sum(x, -1)), ShapeError, "layer 1: .* gives"),
        (lambda: of(lambda x: x), ShapeError, "cannot take x_l and μ_l"),
        (lambda: of(3.0), InputError, "function must be a function of"),
        (lambda: of(ratio, ratio), InputError, "energy must be the energy h"),
        (lambda: of(ratio, pcdyn.CrossEntropy()), InputError, "energy must be the energy h"),
        (lambda: of(ratio, pcdyn.Gaussian([1.0])), ShapeError, "1 precisions for 3 predictions"),
    ]  # fmt: skip
    for call, error, words in calls:
        with pytest.raises(error, match=words):
            call()
    # Predictions of tanh change their sign, and the logarithm ends in NaN, which is said.
    with pytest.raises(PcdynError):
        pcdyn.simulate(problem("tanh", energy=Interaction(lambda x, mu: jnp.log(x / mu))), t1=1.0)
