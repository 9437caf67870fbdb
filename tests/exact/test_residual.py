"""Layers with a scale, a gain and a skip, x ↦ x + s f(g W x + b), against what they stand for.

A layer without activation is one with another matrix, and one of ReLUs takes its scale inside, so
that everything known of plain layers holds; the rest against NumPy and SciPy.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import pcdyn
from pcdyn import learning, linear, output_error, references
from pcdyn.cli import main
from pcdyn.errors import DataError, InputError, ShapeError
from tests.networks import FUNCTIONS

WIDTHS = (3, 4, 4, 4, 2)
SEEDS = range(3)


def chain(seed: int, activation: str, *, skip: bool = True) -> pcdyn.Network:
    """Layers of different scales and gains, the two between equal widths with a skip."""
    rng = np.random.default_rng(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(WIDTHS):
        scale, gain = rng.uniform(0.3, 2, 2)
        weight, bias = rng.normal(size=(n_out, n_in)), 0.3 * rng.normal(size=n_out)
        layers.append(pcdyn.Dense(weight, bias, activation, scale=scale, gain=gain,
                                  skip=skip and n_in == n_out))  # fmt: skip
    return pcdyn.Network(layers)


def plain(network: pcdyn.Network) -> pcdyn.Network:
    """The same network of layers without options, of linear layers or of ReLUs without skips."""
    layers = []
    for layer in network.layers:
        matrix = layer.scale * layer.gain * np.asarray(layer.weight)
        if layer.skip:
            matrix = matrix + np.eye(len(matrix))
        layers.append(pcdyn.Dense(matrix, layer.scale * np.asarray(layer.bias), layer.activation))
    return pcdyn.Network(layers)


def problem(network: pcdyn.Network, seed: int, batch: int = 2) -> pcdyn.InferenceProblem:
    rng = np.random.default_rng([seed, 1])
    a = rng.normal(size=(WIDTHS[2], WIDTHS[2]))
    precisions = [0.7, rng.uniform(0.5, 2, WIDTHS[2]), a @ a.T + np.eye(len(a)),
                  np.array([1.5, 0.4])]  # fmt: skip
    return pcdyn.InferenceProblem(
        network, input=rng.normal(size=(batch, WIDTHS[0])), energy=pcdyn.Gaussian(precisions),
        output=rng.normal(size=(batch, WIDTHS[-1])), time_constants=[1.0, 0.5, 2.0, 1.0, 1.0],
    )  # fmt: skip


def predicted(layer: Any, x: np.ndarray) -> np.ndarray:
    """What a layer predicts, in NumPy."""
    function, _ = FUNCTIONS[layer.activation.name]
    z = layer.gain * x @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    return layer.scale * function(z) + (x if layer.skip else 0)


def velocity(problem: pcdyn.InferenceProblem, state: list[np.ndarray]) -> list[np.ndarray]:
    """dx/dt in NumPy, both ends clamped."""
    layers = problem.network.layers
    x = [np.asarray(problem.input), *state, np.asarray(problem.output)]
    weighted = []
    for index, layer in enumerate(layers, start=1):
        energy: Any = problem.energy[index - 1]
        precision = np.asarray(energy.precision)
        error = x[index] - predicted(layer, x[index - 1])
        weighted.append(error @ precision if precision.ndim == 2 else precision * error)
    moves = []
    for index in range(1, len(layers)):
        layer: Any = layers[index]
        _, slope = FUNCTIONS[layer.activation.name]
        weight = layer.gain * np.asarray(layer.weight)
        inner = layer.scale * slope(x[index] @ weight.T + np.asarray(layer.bias)) * weighted[index]
        pull = inner @ weight + (weighted[index] if layer.skip else 0)
        moves.append((pull - weighted[index - 1]) / float(problem.time_constants[index]))
    return moves


def same(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    """Two formulations of a well-conditioned problem of order one, solved to round-off."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_layers_are_layers_of_another_matrix(seed: int) -> None:
    network = chain(seed, "identity")
    ours, folded = problem(network, seed), problem(plain(network), seed)
    for method in ("cholesky", "output_space"):
        same(pcdyn.linear_equilibrium(ours, method=method),
             pcdyn.linear_equilibrium(folded, method=method))  # fmt: skip
    same(linear.hessian(ours).dense(), linear.hessian(folded).dense())
    same(linear.spectrum(ours), linear.spectrum(folded))
    exact = [pcdyn.simulate(each, t1=3.0, integrator="exact", times=[0.0, 1.0, 3.0])
             for each in (ours, folded)]  # fmt: skip
    same(exact[0].activities, exact[1].activities)
    # The default of simulate, with its tolerances; both follow the same flow.
    run = pcdyn.simulate(ours, t1=3.0, times=[0.0, 1.0, 3.0])
    same(run.activities, exact[0].activities, rtol=1e-5)
    posteriors = [pcdyn.posterior(each) for each in (ours, folded)]
    same(posteriors[0].mean, posteriors[1].mean)
    flows = [output_error.output_error_flow(each) for each in (ours, folded)]
    error = output_error.feedforward_output_error(ours)[0]
    same(flows[0].loss(error, t=0.7), flows[1].loss(error, t=0.7))


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
def test_the_flow_is_that_of_scipy(activation: str) -> None:
    ours = problem(chain(0, activation), 0, batch=1)
    start = [np.asarray(x) for x in ours.feedforward_state()]
    x = np.asarray(ours.input)
    for layer, reached in zip(ours.network.layers, start, strict=False):
        x = predicted(layer, x)
        np.testing.assert_allclose(reached, x, rtol=1e-13, atol=1e-13)
    sizes = np.cumsum([x.size for x in start])[:-1]

    def field(t: float, y: np.ndarray) -> np.ndarray:
        state = [part.reshape(1, -1) for part in np.split(y, sizes)]
        return np.concatenate([x.ravel() for x in velocity(ours, state)])

    expected = scipy.integrate.solve_ivp(
        field, (0, 2), np.concatenate([x.ravel() for x in start]), method="DOP853", rtol=1e-12,
        atol=1e-13,
    ).y[:, -1]  # fmt: skip
    for integrator in ("tsit5", "rodas5p"):
        run = pcdyn.simulate(ours, t1=2.0, integrator=integrator)
        found = np.concatenate([np.ravel(x) for x in ours.state_of(run.final)])
        # Of tolerances of 1e-6 per step.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [None, "gauss_newton", "pseudo_transient", "nesterov"])
@pytest.mark.parametrize("seed", SEEDS)
def test_at_equilibrium_the_field_of_numpy_is_at_rest(method: str | None, seed: int) -> None:
    ours = problem(chain(seed, "tanh"), seed)
    rest = pcdyn.equilibrium(ours, method=method)
    moves = velocity(ours, [np.asarray(x) for x in rest.state])
    largest = np.stack([np.linalg.norm(x, axis=-1) for x in moves], axis=-1)
    # The tolerance is of ∂F/∂x, which the time constant of .5 divides; round-off has its share.
    assert np.all(largest <= 2 * np.asarray(rest.tolerance) * 1.01)


@pytest.mark.parametrize("seed", range(6))
def test_at_kinks_the_scale_may_stand_inside(seed: int) -> None:
    """s relu(g W x + b) = relu(s g W x + s b): the same equilibria, sliding ones among them."""
    network = chain(seed, "relu", skip=False)
    ours, folded = problem(network, seed), problem(plain(network), seed)
    found, expected = (pcdyn.equilibrium(each) for each in (ours, folded))
    assert found.status == expected.status
    # Both to a gradient below the tolerance, at curvatures not far below one.
    same(found.activities, expected.activities, rtol=1e-4)
    energies = [
        pcdyn.simulate(each, t1=1.0, times=[0.0, 1.0]).free_energy for each in (ours, folded)
    ]
    # Of tolerances of 1e-6 per step, and of rounded kinks.
    same(*energies, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_targets_are_predicted_by_the_targets_below(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = [pcdyn.Dense(rng.normal(size=(3, 3)), rng.normal(size=3), "tanh", scale=1.7, gain=0.4)
              for _ in range(3)]  # fmt: skip
    targets = references.target_propagation(
        pcdyn.InferenceProblem(pcdyn.Network(layers), output=[0.9, -1.4, 1.6])
    )
    t = np.asarray(targets.values[-2])
    np.testing.assert_allclose(predicted(layers[-1], t), targets.values[-1], rtol=1e-12)
    # 1.4 lies beyond the range of tanh, and within that of 1.7 tanh.
    assert bool(targets.reachable[-1].all())
    skipping = pcdyn.Network([pcdyn.Dense(np.eye(2), activation="tanh", skip=True)] * 2)
    with pytest.raises(InputError, match="layer 2 has a skip"):
        references.target_propagation(pcdyn.InferenceProblem(skipping, output=[0.1, 0.2]))


def test_the_best_weights_predict_as_those_of_the_folded_network() -> None:
    network = chain(0, "identity")
    ours, folded = problem(network, 0, batch=20), problem(plain(network), 0, batch=20)
    state = jax.tree.map(jnp.asarray, pcdyn.equilibrium(ours).state)
    after = [learning.maximisation_step(each, state).network for each in (ours, folded)]
    for index, x in enumerate(ours.activities(state)[:-1], start=1):
        same(after[0].predict(index, x), after[1].predict(index, x), rtol=1e-9)


def test_gradients_of_learning_are_those_of_finite_differences() -> None:
    ours = problem(chain(1, "tanh"), 1)
    rest = jax.tree.map(jnp.asarray, pcdyn.equilibrium(ours).state)
    by_layer = eqx.filter_grad(
        lambda network: jnp.sum(eqx.tree_at(lambda p: p.network, ours, network).free_energy(rest))
    )(ours.network)
    found = learning.PredictiveCoding("gauss_newton").learn(ours, ())[0].gradient
    for index, layer in enumerate(found.layers):
        # The weights that the rule saw are at its own equilibrium, to its tolerance.
        np.testing.assert_allclose(layer.weight, by_layer.layers[index].weight, atol=1e-5)
    step, where = 1e-6, lambda n: n.layers[2].weight
    moved = [
        float(jnp.sum(eqx.tree_at(
            lambda p: p.network.layers[2].weight, ours, where(ours.network).at[1, 2].add(h)
        ).free_energy(rest)))
        for h in (step, -step)
    ]  # fmt: skip
    expected = (moved[0] - moved[1]) / (2 * step)
    np.testing.assert_allclose(by_layer.layers[2].weight[1, 2], expected, rtol=1e-7, atol=1e-9)


# --- pcdyn.mlp ------------------------------------------------------------------------------------


def test_parameterisations_of_the_same_draw() -> None:
    """NTP predicts as the standard one; μPC as NumPy says; W of both has entries of size one."""
    widths, key = (6, 400, 400, 400, 5), jax.random.key(0)

    def drawn(**options: Any) -> pcdyn.Network:
        return pcdyn.mlp(widths, activation="tanh", key=key, **options)

    standard, ntp = drawn(residual=True), drawn(residual=True, parameterisation="ntp")
    x = jnp.asarray(np.random.default_rng(0).normal(size=6))
    same(ntp.feedforward(x), standard.feedforward(x))
    mupc = drawn(residual=True, parameterisation="mupc")
    assert [layer.skip for layer in mupc.layers] == [False, True, True, False]
    z = np.asarray(x)
    for index, layer in enumerate(standard.layers):
        branch = np.tanh(np.asarray(layer.weight) @ z / (20 if index == 3 else 1))
        z = z + branch / 2 if layer.skip else branch
    same(mupc.feedforward(x)[-1], z)
    for layer in (*ntp.layers, *mupc.layers):
        # Of 2000 numbers and more.
        assert np.std(layer.weight) == pytest.approx(1, abs=0.1)
    assert np.std(standard.layers[1].weight) == pytest.approx(0.05, abs=0.001)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": 0.0}, InputError, "scale"),
    ({"gain": float("nan")}, InputError, "gain"),
    ({"skip": 1}, InputError, "skip"),
    ({"weight": np.ones((2, 3)), "skip": True}, ShapeError, "square"),
]


@pytest.mark.unchecked
@pytest.mark.parametrize(("options", "error", "says"), BAD)
def test_layers_that_cannot_be(options: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        pcdyn.Dense(**{"weight": np.eye(2), **options})


BAD_NETWORKS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"residual": True, "widths": [3, 3, 2, 3]}, ShapeError, "no two neighbouring"),
    ({"residual": None}, InputError, "residual"),
    ({"parameterisation": "mup"}, InputError, "parameterisation"),
    ({"parameterisation": "ntp", "std": 0.1}, InputError, "not both"),
]


@pytest.mark.unchecked
@pytest.mark.parametrize(("options", "error", "says"), BAD_NETWORKS)
def test_networks_that_cannot_be(options: dict[str, Any], error: Any, says: str) -> None:
    made = {"widths": [3, 4, 4, 2], "activation": "tanh", "key": jax.random.key(0), **options}
    with pytest.raises(error, match=says):
        pcdyn.mlp(**made)


# --- Files and the command line -------------------------------------------------------------------


def test_files_hold_scales_gains_and_skips(tmp_path: Path) -> None:
    ours = problem(chain(0, "tanh"), 0)
    pcdyn.save(ours, tmp_path / "ours.nc")
    assert eqx.tree_equal(pcdyn.load(tmp_path / "ours.nc"), ours)
    usual = pcdyn.InferenceProblem(plain(ours.network), input=np.ones(3), output=np.ones(2))
    kept = pcdyn.io.problems.problem_to_xarray(usual)
    assert not {"scales", "gains", "skips"} & set(kept.attrs)
    for name, text in (("skips", "True"), ("scales", "1 1 x 1"), ("skips", "1 0 0 1")):
        with pytest.raises(DataError, match=name):
            pcdyn.io.problems.problem_from_xarray(kept.assign_attrs({name: text}))


def test_commands_take_residual_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    as_users_run: None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.toml").write_text(
        '[network]\nwidths = [3, 4, 4, 2]\nresidual = true\nparameterisation = "mupc"\n'
    )
    options = ["--widths", "3", "4", "4", "2", "--residual", "--parameterisation", "mupc"]
    for index, chosen in enumerate((options, ["--network", "net.toml"])):
        assert main(["equilibrium", *chosen, "--data", f"{index}.nc"]) == 0
        assert "residual" in capsys.readouterr().out
    loaded: list[Any] = [pcdyn.load(tmp_path / f"{index}.nc") for index in range(2)]
    one, other = loaded
    same(one.activities, other.activities, rtol=0)
    assert [layer.skip for layer in one.problem.network.layers] == [False, True, False]
    assert main(["equilibrium", "--network", "0.nc", "--residual"]) == 2
    assert "leave --residual out" in capsys.readouterr().err
