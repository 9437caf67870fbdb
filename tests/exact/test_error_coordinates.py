"""Error coordinates: a stacked network against NumPy, whatever its runs of equal layers are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.solvers.base import energy_round_off
from pcdyn.equilibria.solvers.error_coordinates import ChainCoordinates
from pcdyn.model.energies.energy import Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from tests.networks import EPS, Case, assert_close, build_case

# A pass of nine layers adds fewer than 100 products of numbers of order 1.
ROUND_OFF = 1e3 * EPS
FLOAT32 = float(np.finfo(np.float32).eps)

# Runs of one layer, of few that are written out, of many that are looped over, and mixtures.
STRUCTURES: dict[str, dict[str, Any]] = {
    "all widths differ": {"widths": (3, 5, 4, 2), "activations": ("tanh",)},
    "one hidden layer": {"widths": (3, 4, 2), "activations": ("tanh",)},
    "a loop": {"widths": (3, *[4] * 8, 2), "activations": ("tanh",), "bias": True},
    "a loop with diagonal precisions": {
        "widths": (3, *[4] * 8, 2), "activations": ("tanh",), "precision": "diagonal"},
    "a loop with full precisions": {
        "widths": (3, *[4] * 8, 2), "activations": ("sigmoid",), "precision": "full"},
    "loops apart": {"widths": (4,) * 10, "activations": ("tanh",)},
}  # fmt: skip


def built(name: str) -> tuple[Case, ChainCoordinates, Any]:
    """The case, its chain, and random hidden activities."""
    case = build_case(seed=len(name), batch=3, **STRUCTURES[name])
    if name == "loops apart":
        case = case.replace(activations=(*["tanh"] * 5, "softplus", *["tanh"] * 3))
    return case, ChainCoordinates(case.problem), tuple(jnp.asarray(x) for x in case.state)


@pytest.mark.parametrize("name", STRUCTURES)
def test_errors_and_activities_are_inverse(name: str) -> None:
    """And both are what NumPy says."""
    case, chain, state = built(name)
    errors = chain.errors(state)
    assert_close(chain.unstack(errors), case.errors(case.activities)[:-1], ROUND_OFF)
    hidden, output_error = chain.activities(errors)
    assert_close(chain.unstack(hidden), state, ROUND_OFF)
    assert_close(output_error, case.errors(case.activities)[-1], ROUND_OFF)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_look_is_the_energy_and_both_gradients(name: str) -> None:
    """F and ‖∂F/∂x‖ by NumPy; ∂F/∂e by a difference quotient of NumPy's F along a direction."""
    case, chain, state = built(name)
    errors = chain.errors(state)
    seen = chain.evaluate(errors)
    assert_close(seen.energy, case.free_energy(case.activities), ROUND_OFF)
    largest = np.max([np.linalg.norm(g, axis=-1) for g in case.field()], axis=0)
    assert_close(seen.residual, largest, ROUND_OFF)

    rng = np.random.default_rng(0)
    direction = tuple(rng.normal(size=x.shape) for x in errors)

    def energy(length: float) -> np.ndarray:
        moved = jax.tree.map(lambda e, d: e + length * d, errors, direction)
        hidden = [np.asarray(x) for x in chain.unstack(chain.activities(moved)[0])]
        return case.free_energy((case.activities[0], *hidden, case.activities[-1]))

    step = EPS ** (1 / 3)
    quotient = (energy(step) - energy(-step)) / (2 * step)
    along = sum(
        np.sum(np.asarray(s) * d, axis=(0, 2)) for s, d in zip(seen.slope, direction, strict=True)
    )
    # Round-off of F over the step, and the third derivative times its square.
    assert_close(along, quotient, 1e3 * step**2)


@pytest.mark.parametrize("name", STRUCTURES)
def test_products_with_jacobians_are_adjoint_and_those_of_the_output(name: str) -> None:
    """⟨v, Σ J_l u_l⟩ = Σ ⟨J_lᵀ v, u_l⟩, and Σ J_l u_l is how the prediction of the output moves."""
    _, chain, state = built(name)
    errors = chain.errors(state)
    push, pull = chain.linearise(errors)
    rng = np.random.default_rng(1)
    tangent = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in errors)
    covector = jnp.asarray(rng.normal(size=chain.target.shape))
    pushed, pulled = push(tangent), pull(covector)
    left = np.sum(pushed * covector, axis=1)
    right = sum(np.sum(p * t, axis=(0, 2)) for p, t in zip(pulled, tangent, strict=True))
    assert_close(left, right, ROUND_OFF)

    def output(length: float) -> Any:
        moved = jax.tree.map(lambda e, d: e + length * d, errors, tangent)
        return chain.target - chain.activities(moved)[1]

    step = EPS ** (1 / 3)
    assert_close(pushed, (output(step) - output(-step)) / (2 * step), 1e3 * step**2)


@pytest.mark.slow
def test_a_layer_that_changes_the_width_is_never_looped_over() -> None:
    """The same function, without weights, five times: each takes a unit away."""

    def shorten(x: Any) -> Any:
        return x[:-1]

    first = Dense(np.eye(8), activation="tanh")
    last = Dense(np.ones((2, 3)))
    network = Network([first, *[shorten] * 5, last])
    problem = InferenceProblem(network, input=np.ones((1, 8)), output=np.zeros((1, 2)))
    assert ChainCoordinates(problem).lengths == (1,) * 6
    found = equilibrium(problem, method="gauss_newton")
    assert_close(problem.gradient(found.state), [np.zeros_like(x) for x in found.state], 1e-6)


def test_equal_layers_are_looped_over() -> None:
    """What makes a deep network quick to compile: one run for each kind of layer."""
    lengths = {name: built(name)[1].lengths for name in STRUCTURES}
    assert lengths["all widths differ"] == (1, 1)
    assert lengths["one hidden layer"] == (1,)
    assert lengths["a loop"] == (1, 7)
    assert lengths["loops apart"] == (1, 4, 1, 2)


def test_the_round_off_of_an_energy_is_known() -> None:
    """F in float32 differs from F in float64 by no more, and by more than a few roundings of F.

    Targets of 100 and errors of 1e-3: each error keeps two digits, and F no more.
    """
    rng = np.random.default_rng(0)
    shapes = ((4, 4), (4, 4), (3, 4))
    weights = [rng.normal(size=shape).astype(np.float32) / 2 for shape in shapes]
    biases = [np.zeros(4, np.float32), np.zeros(4, np.float32), np.full(3, 100, np.float32)]
    inputs = rng.normal(size=(20, 4)).astype(np.float32)

    def problem_in(dtype: Any, outputs: Any) -> InferenceProblem:
        layers = [
            Dense(w.astype(dtype), b.astype(dtype), activation)
            for w, b, activation in zip(weights, biases, ("tanh", "tanh", "identity"), strict=True)
        ]
        return InferenceProblem(
            Network(layers), input=inputs.astype(dtype), output=outputs.astype(dtype),
            energy=Gaussian([1.0, 1.0, 1e4]),
        )  # fmt: skip

    exact = problem_in(np.float64, np.zeros((20, 3)))
    outputs = np.asarray(exact.network.feedforward(jnp.asarray(inputs, float))[-1])
    outputs = (outputs + 1e-3 * rng.normal(size=(20, 3))).astype(np.float32)
    rounded, exact = problem_in(np.float32, outputs), problem_in(np.float64, outputs)

    state = rounded.feedforward_state()
    same = tuple(x.astype(float) for x in state)
    energy = np.asarray(exact.free_energy(same))
    in_activities = np.abs(np.asarray(rounded.free_energy(state), float) - energy)
    assert np.all(in_activities <= np.asarray(energy_round_off(rounded, state)))

    chain, errors = ChainCoordinates(rounded), ChainCoordinates(rounded).errors(state)
    energy = np.asarray(
        ChainCoordinates(exact).evaluate(tuple(e.astype(float) for e in errors)).energy
    )
    in_errors = np.abs(np.asarray(chain.evaluate(errors).energy, float) - energy)
    assert np.all(in_errors <= np.asarray(chain.round_off(errors)))
    assert min(np.max(in_activities / energy), np.max(in_errors / energy)) > 100 * FLOAT32
