"""Stationarity at kinks: an example by hand, an optimiser without gradients, and the flow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.kinks import has_kinks, slide
from pcdyn.equilibria.multiple import multiple_equilibria
from pcdyn.equilibria.solvers import GaussNewton, PseudoTransient
from pcdyn.errors import EquilibriumStatus
from pcdyn.integrators import Euler
from pcdyn.model.activations import Activation, get_activation, leaky_relu
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.simulation.simulate import simulate
from tests.networks import Case, build_case


def two_units(prediction: float, target: float, activation: Any = "relu") -> InferenceProblem:
    """F = ½ (x − a)² + ½ (T − f(x))² for one free unit x: one below its kink, one above."""
    layers = [Dense(np.eye(1)), Dense(np.eye(1), None, activation)]
    return InferenceProblem(Network(layers), input=[prediction], output=[target])


@pytest.mark.parametrize("start", [-1.0, -1e-3, 1e-3, 0.4, 2.0])
def test_zero_lies_between_the_one_sided_gradients(start: float) -> None:
    """With a = ½, T = −1: F' = x − ½ < 0 below 0 and 2x + ½ > 0 above: the minimum is the kink.

    The slope that makes the gradient vanish there is s = −a/T = ½, between 0 and 1.
    """
    found = equilibrium(two_units(0.5, -1.0), initial=([start],))
    assert found.status is EquilibriumStatus.SLIDING
    assert found.activities[1].tolist() == [0.0]
    assert [mask.tolist() for mask in found.at_kink] == [[False], [True]]
    assert np.all(found.residual_norms <= found.tolerance)
    assert float(found.free_energy) == 0.5 * 0.25 + 0.5


@pytest.mark.parametrize(("prediction", "target"), [(0.5, 1.0), (-0.5, 1.0), (0.5, -0.2)])
def test_a_smooth_equilibrium_beside_a_kink_is_not_sliding(
    prediction: float, target: float
) -> None:
    """With T > −a the minimum is (a + T)/2 if that is positive; with a < 0 one is a itself."""
    found = equilibrium(two_units(prediction, target))
    rest = prediction if prediction < 0 else (prediction + target) / 2
    assert found.status is EquilibriumStatus.CONVERGED
    np.testing.assert_allclose(found.activities[1], [rest], atol=1e-6)
    assert not any(mask.any() for mask in found.at_kink)


def test_a_kink_that_repels_is_no_equilibrium() -> None:
    """With a = −0.1, T = 1 zero is a maximum between minima at −0.1 and 0.45: never reported."""
    problem = two_units(-0.1, 1.0)
    off = slide(problem, (np.array([0.0]),), 1e-9)
    assert off is None or abs(off.state[0][0]) > 0.05
    starts = np.linspace(-1, 1, 9)[:, None]
    both = multiple_equilibria(problem, (starts,))
    np.testing.assert_allclose(np.sort(both.activities[1][:, 0]), [-0.1, 0.45], atol=1e-6)
    assert both.stable.all()


def relu_case(seed: int) -> Case:
    """4-6-6-3 with ReLU below the output and strong feedback: many samples end at kinks."""
    case = build_case(seed=seed, widths=(4, 6, 6, 3), activations=("relu",))
    return case.replace(
        weights=tuple(2 * w for w in case.weights), activations=("relu", "relu", "identity")
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_nearby_point_is_lower(seed: int) -> None:
    """Nelder–Mead with restarts, which needs no gradient, finds nothing lower around the point."""
    case = relu_case(seed)
    found = equilibrium(case.problem)
    assert found.ok
    start = case.stack([np.asarray(x) for x in found.state])

    def energy(y: np.ndarray) -> float:
        layers = [case.activities[0], *case.split(y), case.activities[-1]]
        return float(case.free_energy(layers))

    low = energy(start)
    np.testing.assert_allclose(low, found.free_energy, rtol=1e-12)
    rng = np.random.default_rng(seed)
    for size in (1e-2, 1e-3):
        simplex = start + size * np.vstack([np.zeros(12), rng.normal(size=(12, 12))])
        best = scipy.optimize.minimize(
            energy, start, method="Nelder-Mead",
            options={"initial_simplex": simplex, "maxfev": 4000, "xatol": 1e-10, "fatol": 1e-14},
        )  # fmt: skip
        # The tolerance 1e-6 of the gradient leaves 1e-12 / λ_min in the energy.
        assert best.fun >= low - 1e-9


def test_the_flow_hovers_where_the_kinks_are_solved() -> None:
    """Euler's chatter around a kink is its step times a jump of the gradient, here of order 1."""
    sliding = 0
    for seed in range(8):
        case = relu_case(seed)
        run = simulate(case.problem, t1=60.0, times=[60.0], integrator=Euler(dt=1e-3))
        hovering = tuple(np.asarray(x) for x in case.problem.state_of(run.final))
        found = slide(case.problem, hovering, 1e-8)
        assert found is not None
        distance = np.linalg.norm(case.stack(found.state) - case.stack(hovering))
        assert distance < 5e-3
        sliding += any(mask.any() for mask in found.at_kink)
    assert sliding >= 2


def test_a_batch_reports_each_sample() -> None:
    """One sample of the example slides, the other does not."""
    layers = [Dense(np.eye(1)), Dense(np.eye(1), None, "relu")]
    problem = InferenceProblem(
        Network(layers), input=np.array([[0.5], [0.5]]), output=np.array([[-1.0], [1.0]])
    )
    found = equilibrium(problem)
    assert found.status == (EquilibriumStatus.SLIDING, EquilibriumStatus.CONVERGED)
    np.testing.assert_allclose(found.activities[1], [[0.0], [0.75]], atol=1e-6)
    assert found.at_kink[1].tolist() == [[True], [False]]


def test_custom_activations_say_where_their_kinks_are() -> None:
    """A kink at ½ with slopes 0 and 2: sliding at x = ½ where −a + ½ lies between."""
    hinge = Activation("hinge", lambda x: 2 * jnp.maximum(x - 0.5, 0.0), kinks=(0.5,))
    found = equilibrium(two_units(1.0, -1.0, hinge))
    assert found.status is EquilibriumStatus.SLIDING
    np.testing.assert_allclose(found.activities[1], [0.5], atol=1e-9)
    assert get_activation("relu").kinks == leaky_relu(0.2).kinks == (0.0,)
    smooth = Network([Dense(np.eye(1), None, "tanh")])
    assert not has_kinks(InferenceProblem(smooth, input=np.ones(1)))


def test_several_equilibria_of_a_scalar_chain() -> None:
    """F = ½ (x − a)² + ½ Π (T − tanh(w x))²: its stationary points by bisection in NumPy."""
    a, w, target, precision = -1.2, 6.0, 1.5, 4.0
    layers = [Dense(np.eye(1)), Dense(w * np.eye(1), None, "tanh")]
    problem = InferenceProblem(
        Network(layers), input=[a], output=[target], energy=Gaussian([1.0, precision])
    )

    def slope(x: float) -> float:
        f = np.tanh(w * x)
        return x - a - precision * w * (1 - f**2) * (target - f)

    grid = np.linspace(-4, 4, 4001)
    values = np.array([slope(x) for x in grid])
    roots = [
        scipy.optimize.brentq(slope, grid[i], grid[i + 1], xtol=1e-14)
        for i in np.flatnonzero(values[:-1] * values[1:] < 0)
    ]
    assert len(roots) == 3
    minima = [roots[0], roots[2]]
    found = multiple_equilibria(problem, (np.linspace(-3, 3, 31)[:, None],), tolerance=1e-10)
    stable = found.activities[1][found.stable, 0]
    np.testing.assert_allclose(np.sort(stable), minima, atol=1e-8)
    assert np.all(np.diff(found.free_energy) >= 0)
    assert (found.basin_of >= 0).all()
    # A search that follows the flow ends on the side of the maximum where it began.
    for start, index in zip(np.linspace(-3, 3, 31), found.basin_of, strict=True):
        if abs(start - roots[1]) > 0.2:
            assert (found.activities[1][index, 0] > roots[1]) == (start > roots[1])


def test_methods_on_their_own_do_not_claim_a_kink() -> None:
    """Hovering beside a kink is not convergence; the kink is looked for after any method."""
    for method in (GaussNewton(max_iterations=5), PseudoTransient(max_iterations=5)):
        found = equilibrium(two_units(0.5, -1.0), method=method)
        assert found.status is EquilibriumStatus.SLIDING


@pytest.mark.slow
def test_the_top_of_a_kink_is_no_equilibrium() -> None:
    """All units off at the start, where JAX's slope vanishes and F falls beside.

    By symmetry every unit of a layer is the same: layer 1 at a, layer 2 at s and F =
    ½·3a² + ½·3(s − a)² + (1 − 3s)², least where a = s/2 and s = 6/19.5.
    """
    weights = [-np.eye(3), np.eye(3), np.ones((2, 3))]
    network = Network([Dense(w, None, "relu") for w in weights])
    problem = InferenceProblem(network, input=[1.0, 2.0, 3.0], output=[1.0, 1.0])
    rest = 6 / 19.5
    found = equilibrium(problem)
    assert found.status is EquilibriumStatus.CONVERGED
    np.testing.assert_allclose(found.activities[1], np.full(3, rest / 2), atol=1e-6)
    np.testing.assert_allclose(found.activities[2], np.full(3, rest), atol=1e-6)
    assert found.basin().agrees
    traced = jax.jit(lambda y: equilibrium(problem.with_data(problem.input, y)).activities[2])
    np.testing.assert_allclose(traced(problem.output), np.full(3, rest), atol=1e-6)
