"""Frequency responses against NumPy's dense solution and against driven trajectories."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt

import pcdyn
from pcdyn.errors import InputError, NotLinearError, ShapeError, SingularHessianError

OMEGAS = np.array([0.0, 0.01, 0.3, 1.0, 7.0, 1e3])


def problem(seed: int, **changes: Any) -> pcdyn.InferenceProblem:
    """A chain with precisions and time constants of its own."""
    rng = np.random.default_rng(seed)
    net = pcdyn.mlp([3, 4, 5, 2], activation="identity", key=jax.random.key(seed))
    energy = [pcdyn.Gaussian(p) for p in np.exp(rng.normal(size=3))]
    options = {"input": rng.normal(size=3), "output": rng.normal(size=2), "energy": energy}
    taus = np.exp(rng.normal(size=4)).tolist()
    return pcdyn.InferenceProblem(net, **{**options, "time_constants": taus, **changes})


def dense(problem: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """H, τ of each unit, and what input and output add to the flow, by matrices."""
    w = [np.asarray(layer.weight) for layer in problem.network.layers]
    p = [float(energy.precision) for energy in problem.energy]
    h = np.block(
        [
            [p[0] * np.eye(4) + p[1] * w[1].T @ w[1], -p[1] * w[1].T],
            [-p[1] * w[1], p[1] * np.eye(5) + p[2] * w[2].T @ w[2]],
        ]
    )
    tau = np.concatenate([np.full(n, problem.time_constants[l]) for l, n in ((1, 4), (2, 5))])
    low = np.concatenate([p[0] * w[0], np.zeros((5, 3))])
    high = np.concatenate([np.zeros((4, 2)), p[2] * w[2].T])
    return h, tau, {"input": low, "output": high}


@pytest.mark.parametrize("drive", ["input", "output"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_of_dense_matrices(seed: int, drive: str) -> None:
    given: Any = problem(seed)
    h, tau, columns = dense(given)
    found = pcdyn.frequency_response(given, OMEGAS, drive=drive)
    stacked = np.concatenate(found.response, axis=1)
    for omega, response in zip(OMEGAS, stacked, strict=True):
        expected = np.linalg.solve(1j * omega * np.diag(tau) + h, columns[drive])
        np.testing.assert_allclose(response, expected, rtol=1e-10, atol=1e-13)
    assert found.layers == (1, 2)
    gain, phase = np.asarray(found.gain[0]), np.asarray(found.phase[0])
    np.testing.assert_allclose(gain * np.exp(1j * phase), found.response[0], rtol=1e-12)


def test_at_rest_it_is_how_the_equilibrium_moves() -> None:
    given: Any = problem(5)

    def rest(low: Any) -> Any:
        return pcdyn.linear_equilibrium(given.with_data(low, given.output))[1]

    found = pcdyn.frequency_response(given, [0.0])
    np.testing.assert_allclose(found.response[0][0].real, jax.jacfwd(rest)(given.input), rtol=1e-10)


def test_a_slow_rate_is_no_flat_direction() -> None:
    """Where each free layer is predicted there is a response at rest, whatever the precisions."""
    given: Any = problem(11, energy=[pcdyn.Gaussian(p) for p in (1e10, 1e-10, 1e-10)])
    found = pcdyn.frequency_response(given, [0.0])
    # The first layer stays at its prediction.
    weight = given.network.layers[0].weight
    np.testing.assert_allclose(found.response[0][0].real, weight, rtol=1e-6)


def test_a_driven_trajectory_ends_on_it() -> None:
    given: Any = problem(6)
    omega, rest = 0.7, pcdyn.linear_equilibrium(given)
    way = np.array([1.0, -0.5, 0.2])
    found = pcdyn.frequency_response(given, [omega])
    driven = pcdyn.DrivenProblem(
        given.network, output=given.output, energy=list(given.energy),
        input=pcdyn.Signal(lambda t: given.input + jnp.asarray(way) * jnp.cos(omega * t)),
        time_constants=list(given.time_constants),
    )  # fmt: skip
    slowest = float(pcdyn.linear.spectrum(given)[0])
    # What the start has left is below 1e-12 of itself then.
    t1 = 28 / slowest
    times = t1 - np.linspace(2 * np.pi / omega, 0, 20)
    fine = pcdyn.Diffrax("rodas5p", rtol=1e-10, atol=1e-12, max_steps=2**17)
    run = pcdyn.simulate(driven, t1=t1, times=times, integrator=fine)
    swing: Any = (np.asarray(found.response[0][0]) @ way)[None] * np.exp(1j * omega * times)[
        :, None
    ]
    np.testing.assert_allclose(run.activities[1], np.asarray(rest[1]) + swing.real, atol=1e-8)


def test_batches_graphs_transformations_and_float32() -> None:
    given: Any = problem(7)
    batch = given.with_data(np.ones((4, 3)), np.ones((4, 2)))
    expected = pcdyn.frequency_response(given, OMEGAS)
    found = pcdyn.frequency_response(batch, OMEGAS)
    np.testing.assert_array_equal(found.response[1], expected.response[1])
    named = pcdyn.Network(given.network.layers, nodes=["eye", "low", "high", "word"])
    same = pcdyn.InferenceProblem(
        named, input=given.input, output=given.output, energy=list(given.energy),
        time_constants=list(given.time_constants),
    )  # fmt: skip
    by_name = pcdyn.frequency_response(same, OMEGAS, drive="eye")
    np.testing.assert_allclose(by_name.response[0], expected.response[0], rtol=1e-12)
    compiled = jax.jit(lambda p: pcdyn.frequency_response(p, OMEGAS).response[0])(given)
    np.testing.assert_allclose(compiled, expected.response[0], rtol=1e-12)
    net = pcdyn.mlp([3, 4, 2], activation="identity", key=jax.random.key(0), dtype="float32")
    single = pcdyn.InferenceProblem(net, input=np.ones(3), output=np.ones(2))
    assert pcdyn.frequency_response(single, OMEGAS).response[0].dtype == np.complex64


def test_what_cannot_be_is_refused() -> None:
    given: Any = problem(8)
    refused: list[tuple[Any, type[Exception], str]] = [
        (lambda: pcdyn.frequency_response(given, [-1.0]), InputError, "negative"),
        (lambda: pcdyn.frequency_response(given, 1.0), ShapeError, "vector"),
        (lambda: pcdyn.frequency_response(given, [1.0], drive=1), InputError, "not clamped"),
        (lambda: pcdyn.frequency_response(given, [1.0], drive="retina"), InputError, "drive"),
        (lambda: pcdyn.frequency_response(given, [1.0], drive=9), InputError, "drive"),
    ]
    net = pcdyn.mlp([3, 4, 2], activation="tanh", key=jax.random.key(0))
    tanh = pcdyn.InferenceProblem(net, input=np.ones(3), output=np.ones(2))
    refused.append((lambda: pcdyn.frequency_response(tanh, [1.0]), NotLinearError, "identity"))
    flat = problem(9, input=None)
    refused.append(
        (
            lambda: pcdyn.frequency_response(flat, [0.0], drive="output"),
            SingularHessianError,
            "drift",
        )
    )
    for do, error, words in refused:
        with pytest.raises(error, match=words):
            do()
    assert np.isfinite(pcdyn.frequency_response(flat, [0.1], drive="output").response[0]).all()


def test_the_picture() -> None:
    found = pcdyn.frequency_response(problem(10), np.geomspace(0.01, 100, 50))
    for quantity in ("gain", "phase"):
        lines = found.plot(quantity)
        assert [line.get_label() for line in lines] == ["layer 1", "layer 2"]
        assert all(np.isfinite(np.asarray(line.get_ydata())).all() for line in lines)
    gains = np.asarray(found.leading)
    # At the first frequency it is the largest gain of any pattern.
    largest = [np.linalg.norm(np.asarray(x[0]), 2) for x in found.response]
    np.testing.assert_allclose(np.abs(gains[:, 0]), largest, rtol=1e-10)
    plt.close("all")
