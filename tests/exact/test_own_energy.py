"""Energies as a user writes them go everywhere, against the same energies in NumPy and SciPy.

A quartic energy with a curvature, one with a weight for each unit, and one that has no more than a
value: what cannot do without a curvature says so.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import root

import pcdyn
from pcdyn import learning
from pcdyn.errors import InputError, NotLinearError, ShapeError
from pcdyn.model import network as networks
from pcdyn.model import stacked
from tests.networks import EPS, assert_close

ROUND_OFF = 1e3 * EPS


class Quartic(pcdyn.Energy):
    """Σ_i ε_i²/2 + ε_i⁴/4."""

    def value(self, error: Any, target: Any) -> Any:
        return jnp.sum(error**2 / 2 + error**4 / 4, axis=-1)

    def curvature(self, error: Any, target: Any) -> Any:
        return pcdyn.energies.Precision(1 + 3 * error**2)


class PerUnit(pcdyn.Energy):
    """½ Σ_i w_i ε_i²."""

    weights: Any

    def value(self, error: Any, target: Any) -> Any:
        return error**2 @ self.weights / 2

    @property
    def quadratic_form(self) -> Any:
        return pcdyn.energies.Precision(self.weights)


class Bare(pcdyn.Energy):
    """Σ_i cosh ε_i − 1, and nothing else is known of it."""

    def value(self, error: Any, target: Any) -> Any:
        return jnp.sum(jnp.cosh(error) - 1, axis=-1)


RNG = np.random.default_rng(0)
WIDTHS = (3, 4, 3, 2)
# Weak enough for one equilibrium, and for the fixed-point iteration to contract.
WEIGHTS = [0.7 * RNG.normal(size=(m, n)) / n for n, m in itertools.pairwise(WIDTHS)]
INPUT, OUTPUT = RNG.normal(size=(2, 3)), RNG.uniform(-1, 1, (2, 2))
UNITS = np.array([1.0, 2.0, 0.5])


def problem(weights: Any = UNITS, last: Any = None, **options: Any) -> pcdyn.InferenceProblem:
    """Both ends clamped; a quartic energy, one with weights, and `last`, quartic unless given."""
    energy = [Quartic(), PerUnit(weights), Quartic() if last is None else last]
    layers = [pcdyn.Dense(w, activation="tanh") for w in WEIGHTS]
    return pcdyn.InferenceProblem(
        pcdyn.Network(layers), **{"input": INPUT, "output": OUTPUT, "energy": energy, **options}
    )


def quartic(error: np.ndarray) -> np.ndarray:
    return error + error**3


def influences(errors: list[np.ndarray]) -> list[np.ndarray]:
    """∂E_l/∂ε_l in NumPy."""
    return [quartic(errors[0]), UNITS * errors[1], quartic(errors[2])]


def look(hidden: list[np.ndarray], weights: list[np.ndarray]) -> tuple[Any, Any]:
    """∂F/∂x of the hidden layers and ∂F/∂W summed over samples, in NumPy."""
    x = [INPUT, *hidden, OUTPUT]
    predictions = [np.tanh(below @ w.T) for below, w in zip(x, weights, strict=False)]
    known = influences([here - mu for here, mu in zip(x[1:], predictions, strict=True)])
    local = [(1 - mu**2) * g for mu, g in zip(predictions, known, strict=True)]
    above = [part @ w for part, w in zip(local, weights, strict=True)]
    slopes = [known[l] - above[l + 1] for l in (0, 1)]
    return slopes, [-part.T @ below for part, below in zip(local, x, strict=False)]


def split(flat: np.ndarray) -> list[np.ndarray]:
    return np.split(flat.reshape(2, 7), [4], axis=1)


def slope(flat: np.ndarray) -> np.ndarray:
    return np.concatenate(look(split(flat), WEIGHTS)[0], axis=1).ravel()


FORWARD = [np.tanh(INPUT @ WEIGHTS[0].T)]
FORWARD.append(np.tanh(FORWARD[0] @ WEIGHTS[1].T))
START = np.concatenate(FORWARD, axis=1).ravel()
REST = root(slope, START, tol=1e-13).x


@pytest.mark.parametrize("integrator", ["tsit5", "rodas5p", "kvaerno5", "lsoda"])
def test_simulation_is_scipys(integrator: str) -> None:
    run = pcdyn.simulate(problem(), t1=1.0, integrator=integrator)
    theirs = solve_ivp(lambda _, y: -slope(y), (0, 1), START, rtol=1e-10, atol=1e-12)
    # A hundred times the tolerance of a step.
    for ours, expected in zip(run.final[1:3], split(theirs.y[:, -1]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    errors = [np.asarray(e[-1]) for e in run.prediction_errors]
    expected = [(e**2 / 2 + e**4 / 4).sum(-1) for e in errors]
    expected[1] = errors[1] ** 2 @ UNITS / 2
    assert_close(run.energies[-1], np.stack(expected, axis=-1), ROUND_OFF)


@pytest.mark.parametrize(
    "method",
    [None, "gauss_newton", "nesterov", "pseudo_transient", "fixed_point", "flow",
     pcdyn.solvers.GradientDescent(dt=0.1)],
    ids=str,
)  # fmt: skip
def test_every_solver_ends_at_scipys_root(method: Any) -> None:
    found = pcdyn.equilibrium(problem(), method=method, tolerance=1e-10)
    # No eigenvalue of the Hessian is below 0.1: weak weights leave most of the least curvature, ½.
    for ours, expected in zip(found.state, split(REST), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_gauss_newton_takes_a_free_input() -> None:
    """There it works in the activities, with a block for each layer; below more outputs."""
    layers = [pcdyn.Dense(3 * w.T, activation="tanh") for w in WEIGHTS[:0:-1]]
    free = pcdyn.InferenceProblem(
        pcdyn.Network(layers), output=np.tile(OUTPUT, 2), energy=[PerUnit(UNITS), Quartic()]
    )
    options: dict[str, Any] = {"tolerance": 1e-10, "initial": free.zeros_state()}
    ends = [
        pcdyn.equilibrium(free, method=method, **options)
        for method in ("gauss_newton", "pseudo_transient")
    ]
    np.testing.assert_allclose(ends[0].free_energy, ends[1].free_energy, atol=1e-12)


def test_rates_are_those_of_numpys_hessian() -> None:
    found = pcdyn.stability(problem())
    size = 1e-5
    steps = size * np.eye(14)
    hessian = np.array([(slope(REST + s) - slope(REST - s)) / (2 * size) for s in steps])
    for rates, sample in zip(found.rates, (slice(0, 7), slice(7, 14)), strict=True):
        # Truncation is of order size², round-off of EPS / size.
        np.testing.assert_allclose(rates, np.linalg.eigvalsh(hessian[sample, sample]), atol=1e-8)


def backpropagated() -> list[np.ndarray]:
    """The gradient of Σ E_L of the feedforward pass."""
    x = [INPUT, *FORWARD]
    x.append(np.tanh(x[-1] @ WEIGHTS[2].T))
    local = -quartic(OUTPUT - x[-1]) * (1 - x[-1] ** 2)
    gradient = [local.T @ x[2]]
    for index in (2, 1):
        local = (local @ WEIGHTS[index]) * (1 - x[index] ** 2)
        gradient.insert(0, local.T @ x[index - 1])
    return gradient


def after_euler(steps: int, dt: float) -> list[np.ndarray]:
    flat = START
    for _ in range(steps):
        flat = flat - dt * slope(flat)
    return split(flat)


RULES: dict[str, tuple[Any, Any, float]] = {
    "at rest": (
        learning.PredictiveCoding(method=None, tolerance=1e-10),
        lambda: look(split(REST), WEIGHTS)[1], 1e-8),
    # As far as the relative residual of 2 % says.
    "truncated": (learning.PredictiveCoding(), lambda: look(split(REST), WEIGHTS)[1], 0.05),
    "Euler": (
        learning.EulerPredictiveCoding(dt=0.1, steps=5),
        lambda: look(after_euler(5, 0.1), WEIGHTS)[1], 1e-12),
    "backpropagation": (learning.Backpropagation(), backpropagated, 1e-12),
    # Of first order in λ.
    "low precision": (learning.LowPrecisionPredictiveCoding(1e-6, method="gauss_newton"),
                      backpropagated, 1e-4),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_each_rule_learns_as_numpy(name: str) -> None:
    rule, expected, tolerance = RULES[name]
    rule.check(problem())
    learned, _ = rule.learn(problem(), ())
    for layer, gradient in zip(learned.gradient.layers, expected(), strict=True):
        far = np.linalg.norm(np.asarray(layer.weight) - gradient)
        assert far <= tolerance * np.linalg.norm(gradient)


def test_training_takes_a_list() -> None:
    """As many energies as predictions, or it is refused before anything runs."""
    ours = problem()
    options: dict[str, Any] = {
        "rule": learning.PredictiveCoding(),
        "optimiser": optax.sgd(0.1),
        "epochs": 5,
        "batch_size": 2,
        "key": jax.random.key(0),
    }
    energy = [Quartic(), PerUnit(UNITS), Quartic()]
    found = learning.train(ours.network, INPUT, OUTPUT, energy=energy, **options)
    assert np.all(np.diff(found.history["loss"].ravel()) < 0)
    with pytest.raises(ShapeError, match="2 energies for 3 predictions"):
        learning.train(ours.network, INPUT, OUTPUT, energy=energy[:2], **options)


def test_what_needs_a_curvature_says_so() -> None:
    """A value is enough for the flow, for Newton's and first-order methods, and for their rules."""
    bare = problem(energy=Bare())
    rest = pcdyn.equilibrium(bare, tolerance=1e-10)
    assert rest.method == "pseudo_transient"
    learned, _ = learning.PredictiveCoding(method="pseudo_transient").learn(bare, ())
    assert np.all(np.isfinite(learned.gradient.layers[0].weight))
    for method in ("gauss_newton", "nesterov", "fixed_point"):
        with pytest.raises(InputError, match="layer 1, Bare, has none: write its method `curv"):
            pcdyn.equilibrium(bare, method=method)
    with pytest.raises(InputError, match="TruncatedGaussNewton needs the curvature"):
        learning.PredictiveCoding().check(bare)
    # Of the output any energy will do where only the hidden layers make the coordinates.
    above = problem(last=Bare())
    ends = [pcdyn.equilibrium(above, method=m, tolerance=1e-9) for m in ("nesterov", None)]
    np.testing.assert_allclose(ends[0].state[0], ends[1].state[0], atol=1e-8)

    class Array(Bare):
        def curvature(self, error: Any, target: Any) -> Any:
            return jnp.cosh(error)

    with pytest.raises(InputError, match="must be a pcdyn"):
        pcdyn.equilibrium(problem(energy=Array()), method="gauss_newton")


def test_closed_forms_ask_for_the_quadratic_form() -> None:
    """Of a linear network with weights for units they are those of the Gaussian."""
    network = pcdyn.Network([pcdyn.Dense(w) for w in WEIGHTS])
    data: dict[str, Any] = {"input": INPUT, "output": OUTPUT}
    own = [PerUnit(np.ones(4)), PerUnit(UNITS), pcdyn.Gaussian(2.0)]
    ours = pcdyn.InferenceProblem(network, energy=own, **data)
    given = pcdyn.Gaussian([1.0, UNITS, 2.0])
    expected = pcdyn.linear_equilibrium(pcdyn.InferenceProblem(network, energy=given, **data))
    assert pcdyn.equilibrium(ours).method == "closed_form"
    assert_close(pcdyn.linear_equilibrium(ours), [np.asarray(x) for x in expected], ROUND_OFF)
    with pytest.raises(NotLinearError, match="layer 1 is Quartic, which has no `quadratic_form`"):
        pcdyn.linear_equilibrium(pcdyn.InferenceProblem(network, energy=Quartic(), **data))


def test_results_are_drawn(tmp_path: Path) -> None:
    """A run and an equilibrium draw themselves and go to a file; the problem has no name."""
    run = pcdyn.simulate(problem(), t1=1.0)
    run.plot()
    pcdyn.equilibrium(problem()).plot()
    plt.close("all")
    run.to_netcdf(tmp_path / "run.nc")
    assert_close(pcdyn.load(tmp_path / "run.nc").energies, run.energies, 0.0)
    with pytest.raises(InputError, match="Quartic is no energy that pcdyn knows by name"):
        pcdyn.save_problem(problem(), tmp_path / "problem.nc")


def test_a_list_of_named_energies_goes_to_a_file_and_back(tmp_path: Path) -> None:
    """Cross-entropy above Student above a Gaussian, each with its own numbers."""
    energy = [pcdyn.Gaussian(UNITS[[0, 1, 2, 2]]), pcdyn.Student(0.5), pcdyn.CrossEntropy(0.25)]
    ours = problem(energy=energy, output=[[1.0, 0.0], [0.5, 0.5]])
    pcdyn.save_problem(ours, tmp_path / "problem.nc")
    assert eqx.tree_equal(pcdyn.load_problem(tmp_path / "problem.nc"), ours)


def test_files_from_before_energies_were_listed_are_read(tmp_path: Path) -> None:
    """One name and one parameter for all layers, as `pcdyn.save_problem` wrote them once."""
    file = tmp_path / "problem.nc"
    file.write_bytes(
        gzip.decompress(Path(__file__, "../student_problem.nc.gz").resolve().read_bytes())
    )
    layers = [
        pcdyn.Dense(0.25 * np.arange(6.0).reshape(3, 2), None, "tanh"),
        pcdyn.Dense(np.ones((2, 3)), np.array([0.5, -0.5])),
    ]
    expected = pcdyn.InferenceProblem(
        pcdyn.Network(layers), input=np.array([1.0, -2.0]), output=np.array([0.25, 0.75]),
        energy=pcdyn.Student(0.5, precision=[2.0, np.array([3.0, 4.0])]),
        time_constants=[1.0, 2.0, 1.0],
    )  # fmt: skip
    assert eqx.tree_equal(pcdyn.load_problem(file), expected)
    # Nor did files say what they hold.
    assert eqx.tree_equal(pcdyn.load(file), expected)


@pytest.mark.slow
def test_own_energies_are_citizens_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied, pickled, compared, mapped over, differentiated by a weight, and stacked when deep."""
    ours = problem()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert eqx.tree_equal(other, ours)
    stack = np.stack([UNITS, 2 * UNITS])

    def least(weights: Any) -> Any:
        return jnp.sum(pcdyn.equilibrium(problem(weights), tolerance=1e-10).free_energy)

    # ∂F*/∂w at fixed activities, for they are where F is least.
    found = jax.vmap(jax.grad(least))(jnp.asarray(stack))
    hidden = split(REST)
    error = hidden[1] - np.tanh(hidden[0] @ WEIGHTS[1].T)
    np.testing.assert_allclose(found[0], (error**2).sum(0) / 2, atol=1e-8)
    # Differences err by h² = 1e-8 times a third derivative and by the tolerance over h.
    moved = [least(2 * UNITS + 1e-4 * sign * np.eye(len(UNITS))[0]) for sign in (1, -1)]
    np.testing.assert_allclose(found[1][0], (moved[0] - moved[1]) / 2e-4, atol=1e-6)
    monkeypatch.setattr(stacked, "MOST_WRITTEN_OUT", 2)
    monkeypatch.setattr(networks, "MOST_WRITTEN_OUT", 2)
    deep = stacked.stacked(ours)
    assert isinstance(deep, stacked.StackedProblem)
    (slopes,) = deep.gradient(deep.pack([jnp.asarray(x) for x in FORWARD]))
    assert_close(slopes, slope(START).reshape(2, 7), ROUND_OFF)


def test_a_value_that_is_no_sum_is_refused() -> None:
    """It would be one energy for each unit."""

    class Unsummed(pcdyn.Energy):
        def value(self, error: Any, target: Any) -> Any:
            return error**2

    with pytest.raises(ShapeError, match="energy of layer 1: value of Unsummed must sum over"):
        problem(energy=Unsummed())
