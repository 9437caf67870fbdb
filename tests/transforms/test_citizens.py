"""Values of pcdyn go where values go: pickle, copies, comparison, pytrees of JAX, other threads.

Oracle: the value itself. A round trip gives an equal one, and a transformation that changes nothing
the same numbers. What fails here fails in multiprocessing, joblib and dask, or in `jax.tree.map`.
"""

from __future__ import annotations

import copy
import functools
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pcdyn
from pcdyn import learning
from pcdyn.errors import DenseOutputError, ShapeError, Status, Statuses
from pcdyn.integrators import Diffrax, Euler, Exact, SciPy
from pcdyn.model.activations import leaky_relu
from pcdyn.simulation.simulate import simulate

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(3, 3))
Y = np.random.default_rng(1).normal(size=(3, 2))
ACTIVATIONS = ("identity", "tanh", "sigmoid", "relu", "softplus", "leaky_relu")


def square(error: Any) -> Any:
    return error**2 / 2


def first_two(x: Any) -> Any:
    return x[:2]


def network(activation: Any = "tanh") -> pcdyn.Network:
    return pcdyn.mlp([3, 4, 2], activation=activation, key=KEY, bias=True)


def problem(**options: Any) -> pcdyn.InferenceProblem:
    return pcdyn.InferenceProblem(network(), input=X[0], output=Y[0], **options)


BATCH = pcdyn.InferenceProblem(
    network(), input=X, output=Y, energy=pcdyn.Gaussian([1.0, 2.0]), time_constants=[1.0, 1.0, 2.0]
)
FALLS_BACK = Diffrax(max_steps=3)


def of_each(verb: Callable[[Any], Any]) -> Any:
    """What a verb makes of three networks that share their data, mapped over by JAX."""
    keys = jax.random.split(KEY, 3)

    def one(key: Any) -> Any:
        own = pcdyn.mlp([3, 4, 2], activation="tanh", key=key)
        return verb(pcdyn.InferenceProblem(own, input=X[0], output=Y[0]))

    return eqx.filter_vmap(one)(keys)


MAKERS: dict[str, Callable[[], Any]] = {
    **{f"network, {name}": functools.partial(network, name) for name in ACTIVATIONS},
    "network, custom activation": lambda: network(pcdyn.Activation("square", square)),
    "network, jitted activation": lambda: network(pcdyn.Activation("atan", jnp.arctan, jnp.tan)),
    "network, function as a layer": lambda: pcdyn.Network(
        [first_two, pcdyn.Dense(jnp.ones((2, 2)))], input_width=3
    ),
    "problem": problem,
    "problem, batch": lambda: BATCH,
    "problem, custom energy": lambda: problem(energy=pcdyn.CustomEnergy(square)),
    "problem, two energies": lambda: problem(energy=[pcdyn.LogCosh(), pcdyn.Student()]),
    "integrator, named": Diffrax,
    "integrator, euler": lambda: Euler(dt=0.1),
    "integrator, euler_maruyama": lambda: pcdyn.EulerMaruyama(dt=0.1),
    "integrator, stochastic_heun": lambda: pcdyn.StochasticHeun(dt=0.1),
    "noise": lambda: pcdyn.Langevin(temperature=0.1),
    "integrator, exact": Exact,
    "integrator, scipy": SciPy,
    "solver, gauss_newton": pcdyn.solvers.GaussNewton,
    "solver, flow": pcdyn.solvers.FlowToRest,
    "rule": learning.PredictiveCoding,
    "trajectory": lambda: simulate(problem(), t1=2.0),
    "trajectory, dense": lambda: simulate(problem(), t1=2.0, dense=True),
    "trajectory, rodas5p, dense": lambda: simulate(
        problem(), t1=2.0, integrator="rodas5p", dense=True
    ),
    "trajectory, lsoda": lambda: simulate(problem(), t1=2.0, integrator="lsoda"),
    **{
        f"trajectory, {name}, dense": functools.partial(
            lambda name: simulate(problem(), t1=2.0, integrator=name, dense=True), name
        )
        for name in ("rk45", "dop853", "radau", "bdf", "lsoda")
    },
    "trajectory, fallen back": lambda: simulate(problem(), t1=2.0, integrator=FALLS_BACK),
    "trajectory, per sample": lambda: simulate(
        BATCH, t1=2.0, per_sample=True, integrator=FALLS_BACK, dense=True
    ),
    "trajectory, several networks": lambda: of_each(lambda p: simulate(p, t1=2.0)),
    "equilibrium": lambda: pcdyn.equilibrium(problem()),
    "equilibrium, several networks": lambda: of_each(pcdyn.equilibrium),
    "basin": lambda: pcdyn.equilibrium(problem()).basin(),
    "stability": lambda: pcdyn.stability(BATCH),
    "comparison": lambda: pcdyn.compare(
        ["tsit5", "rk45"], problem(), t1=2.0, tolerances=[1e-3], repeats=1
    ),
    "training": lambda: learning.train(
        network(), X, Y, rule=learning.PredictiveCoding(), optimiser=optax.sgd(1e-3, 0.9), epochs=1,
        batch_size=3, key=KEY, compare=True,
    ),
}  # fmt: skip


@functools.cache
def thing(name: str) -> Any:
    return MAKERS[name]()


def _each(name: str) -> Any:
    slow = "several networks" in name or "per sample" in name
    return pytest.param(name, marks=pytest.mark.slow) if slow else name


EACH = [_each(name) for name in MAKERS]


@pytest.mark.parametrize("name", EACH)
def test_round_trips_give_an_equal_value(name: str) -> None:
    """Equality is exact: the numbers are the same bits, the functions the same functions."""
    value = thing(name)
    assert value == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value
    assert jax.tree.map(lambda x: x, value) == value


@pytest.mark.parametrize("name", EACH)
def test_jax_takes_it_as_a_pytree_of_arrays(name: str) -> None:
    """As an argument and a result of `jax.jit`, in `jax.tree.map` and `jax.device_put`."""
    value = thing(name)
    leaves = jax.tree.leaves(value)
    for made in (jax.jit(lambda x: x)(value), jax.device_put(value)):
        assert type(made) is type(value)
        for ours, theirs in zip(jax.tree.leaves(made), leaves, strict=True):
            assert jnp.array_equal(ours, theirs, equal_nan=not is_key(theirs))
    jax.tree.map(lambda x: x if is_key(x) else x + x, value)


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def test_activations_come_back_as_themselves() -> None:
    """As the very object, so that what is compiled for it serves its copies."""
    for name in ACTIVATIONS[:-1]:
        activation = network(name).layers[0].activation
        assert pickle.loads(pickle.dumps(activation)) is activation
        assert copy.deepcopy(activation) is activation
    assert hash(leaky_relu(0.2)) == hash(pickle.loads(pickle.dumps(leaky_relu(0.2))))


@pytest.mark.parametrize("name", ["rk45", "radau", "lsoda"])
def test_dense_output_of_scipy_survives(name: str) -> None:
    """The same function of time; under a JAX transformation it is refused by name."""
    run = thing(f"trajectory, {name}, dense")
    again = pickle.loads(pickle.dumps(run))
    assert all(np.array_equal(a, b) for a, b in zip(run(0.777), again(0.777), strict=True))
    with pytest.raises(DenseOutputError, match="on the host"):
        jax.jit(lambda t: run(t))(0.5)
    # As with diffrax, it is there where it was asked for.
    with pytest.raises(DenseOutputError, match="dense=True"):
        thing("trajectory, lsoda")(0.5)


def test_the_end_of_several_networks_is_that_of_each() -> None:
    """`final` is x_l(t1) of every network; what has no meaning for several is refused by name."""
    runs = thing("trajectory, several networks")
    for l, end in enumerate(runs.final):
        assert np.array_equal(end, runs.activities[l][:, -1])
    one = jax.tree.map(lambda x: x[1], runs)
    assert all(np.array_equal(a[1], b) for a, b in zip(runs.final, one.final, strict=True))
    target = [None, np.zeros(4), None]
    for use in (lambda: runs(0.5), lambda: runs.distance_to(target),
                lambda: runs.cosine_to(target)):  # fmt: skip
        with pytest.raises(ShapeError, match="several networks"):
            use()
    assert f"{runs.networks} networks" in repr(runs) and runs.ok
    assert runs.status == (Status.REACHED_T1,) * runs.networks
    data = runs.to_xarray()
    assert data.activity_1.dims[0] == "network"
    assert np.array_equal(data.activity_1, runs.activities[1])


@pytest.mark.slow
@pytest.mark.unchecked
def test_stacked_networks_are_refused_by_name(tmp_path: Path) -> None:
    """The verbs take one network; that of a mapped result holds several."""
    found = thing("equilibrium, several networks")
    for use in (found.basin, lambda: pcdyn.equilibrium(found.problem),
                lambda: simulate(found.problem, t1=1.0), lambda: pcdyn.stability(found.problem),
                lambda: found.problem.network.feedforward(X[0])):  # fmt: skip
        with pytest.raises(ShapeError, match="several networks"):
            use()
    pcdyn.save(found, tmp_path / "found.nc")
    again = pcdyn.load(tmp_path / "found.nc")
    assert again.networks == 3 and np.array_equal(again.activities[1], found.activities[1])
    batches = eqx.filter_vmap(
        lambda x: pcdyn.equilibrium(pcdyn.InferenceProblem(network(), input=x, output=Y))
    )(jnp.stack([X, X + 1]))
    assert batches.ok and batches.networks == 2 and len(batches.status) == 2 * len(X)


def test_many_statuses_print_as_counts() -> None:
    """A thousand samples in one line, few by name; equal to a tuple all the same."""
    many = Statuses([Status.REACHED_T1] * 997 + [Status.MAX_STEPS] * 3)
    assert repr(many) == "(1000 samples: 997 REACHED_T1, 3 MAX_STEPS)" == str(many)
    assert many == (Status.REACHED_T1,) * 997 + (Status.MAX_STEPS,) * 3
    assert "REACHED_T1" in repr(many[:2]) and pickle.loads(pickle.dumps(many)) == many
    samples = np.random.default_rng(0).normal(size=(50, 3))
    batch = pcdyn.InferenceProblem(network(), input=samples, output=samples[:, :2])
    run = simulate(batch, t1=2.0, per_sample=True, integrator=FALLS_BACK)
    assert repr(run.status) == "(50 samples: 50 REACHED_T1)" and len(run.fallback) < 200


def test_threads_measure_their_own_seconds() -> None:
    """Compiling and running together take no longer than the call; one waits for no other."""

    def work(width: int) -> tuple[float, float, float]:
        own = pcdyn.mlp([3, width, 2], activation="tanh", key=KEY)
        data = pcdyn.InferenceProblem(own, input=X[0], output=Y[0])
        start = time.perf_counter()
        run = simulate(data, t1=2.0)
        return time.perf_counter() - start, run.compile_seconds, run.run_seconds

    with ThreadPoolExecutor(3) as pool:
        for wall, compiling, running in pool.map(work, range(11, 14)):
            # Half of the wall time: what is not compiled runs for milliseconds.
            assert wall / 2 < compiling and running > 0 and compiling + running <= wall


def test_diffrax_objects_in_an_integrator_pickle() -> None:
    """A controller and a solver of diffrax come back, with their own numbers."""
    controller = diffrax.PIDController(1e-3, 1e-6)
    integrator = Diffrax(diffrax.Tsit5(), controller=controller)
    again = pickle.loads(pickle.dumps(integrator))
    assert again == integrator and again.controller.rtol == 1e-3
