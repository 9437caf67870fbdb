"""Calls of the public interface, and odd values for each of their arguments.

`python -m tests.fuzzing 100000` makes so many calls, prints what ended in another way than a
result or a named error, and how many of each there were; `… 100000 quick 1` only those that take
no compilation, from another seed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import decimal
import fractions
import inspect
import itertools
import pathlib
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pandas
import xarray

import pcdyn
import pcdyn.plotting
from pcdyn import datasets, interpolation, learning, linear, output_error, references, solvers
from pcdyn.integrators.stability_function import stability_interval
from pcdyn.model.activations import leaky_relu

# Seconds after which a call counts as one that does not come back.
PATIENCE = 120
WIDTHS = (3, 4, 2)
INPUT, OUTPUT = (0.5, -0.2, 1.0), (0.3, -0.4)
# The activations of the networks here and their slopes, in NumPy.
_SLOPES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "identity": (lambda z: z, np.ones_like),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}


@dataclasses.dataclass
class Call:
    """A public function and arguments that work; `slow` where these take more than a moment."""

    name: str
    make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]
    slow: bool

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of its arguments."""
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        parameters = inspect.signature(self.make()[0]).parameters
        return tuple(name for name, each in parameters.items() if each.kind not in kinds)


class Things:
    """Networks, problems and results that calls take, and that are odd elsewhere, made once."""

    @cached_property
    def key(self) -> Any:
        return jax.random.key(0)

    @cached_property
    def network(self) -> Any:
        return pcdyn.mlp(WIDTHS, activation="tanh", key=self.key)

    @cached_property
    def problem(self) -> Any:
        return pcdyn.InferenceProblem(self.network, input=INPUT, output=OUTPUT)

    @cached_property
    def signal(self) -> Any:
        return pcdyn.PiecewiseConstant([0.0, 0.5], np.stack([INPUT, np.zeros(3)]))

    @cached_property
    def driven(self) -> Any:
        return pcdyn.DrivenProblem(self.network, input=self.signal, output=OUTPUT)

    @cached_property
    def linear_problem(self) -> Any:
        network = pcdyn.mlp(WIDTHS, activation="identity", key=self.key)
        return pcdyn.InferenceProblem(network, input=INPUT, output=OUTPUT)

    @cached_property
    def planar_problem(self) -> Any:
        network = pcdyn.mlp([3, 2, 2], activation="tanh", key=self.key)
        return pcdyn.InferenceProblem(network, input=INPUT, output=OUTPUT)

    @cached_property
    def open_problem(self) -> Any:
        return pcdyn.InferenceProblem(self.network)

    @cached_property
    def batch_problem(self) -> Any:
        return pcdyn.InferenceProblem(self.network, input=np.ones((2, 3)), output=np.ones((2, 2)))

    @cached_property
    def joint_flow(self) -> Any:
        return learning.JointFlow(self.problem, ratio=1e-2)

    @cached_property
    def trajectory(self) -> Any:
        return pcdyn.simulate(self.problem, t1=2.0, dense=True)

    @cached_property
    def equilibrium(self) -> Any:
        return pcdyn.equilibrium(self.problem)

    @cached_property
    def posterior(self) -> Any:
        return pcdyn.posterior(self.linear_problem)

    @cached_property
    def comparison(self) -> Any:
        return pcdyn.compare(["tsit5"], self.problem, t1=1.0, tolerances=[1e-3], repeats=1)

    @cached_property
    def portrait(self) -> Any:
        return pcdyn.phase_portrait(self.planar_problem, resolution=3, t1=1.0)

    @cached_property
    def precision_flow(self) -> Any:
        return learning.PrecisionFlow(self.problem, ["fixed", "diagonal"])

    @cached_property
    def output_error_flow(self) -> Any:
        return output_error.output_error_flow(self.linear_problem)

    @cached_property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))

    @cached_property
    def stored_problem(self) -> pathlib.Path:
        pcdyn.save_problem(self.problem, self.folder / "problem.nc")
        return self.folder / "problem.nc"

    @cached_property
    def stored_trajectory(self) -> pathlib.Path:
        self.trajectory.to_netcdf(self.folder / "trajectory.nc")
        return self.folder / "trajectory.nc"

    @cached_property
    def samples(self) -> dict[str, Any]:
        rows = np.linspace(-1, 1, 8)[:, None]
        return {"inputs": rows * np.ones((1, 3)), "targets": rows * np.ones((1, 2))}


KNOWN = Things()
_PASSED_AROUND = (
    "key", "network", "problem", "linear_problem", "planar_problem", "open_problem",
    "batch_problem", "joint_flow", "trajectory", "equilibrium", "samples",
)  # fmt: skip


@cache
def odd_values() -> dict[str, Callable[[], Any]]:
    """Values that people pass by mistake, each made anew for those that can be read only once."""
    numbers = [
        0, 1, -1, 2, 3, 10**400, 2**31, 2**63, 2.5, 3.0, -0.0, 1e-300, 1e300, float("nan"),
        float("inf"), -float("inf"), 1j, True, False,
        np.float32(0.5), np.float64(0.5), np.int64(2), np.bool_(True), np.float16(0.5),
        fractions.Fraction(1, 3), decimal.Decimal("0.5"),
    ]  # fmt: skip
    sequences = [
        [], (), [1], [1, 2], [0.5, -0.2, 1.0], [1e-3, 1e-4], [[1.0, 2.0], [3.0]], [None], ["tsit5"],
        [float("nan")] * 3, [True, False], (0.0, 1.0), [np.float32(0.1), np.float64(0.2)],
        [jnp.asarray(0.1), jnp.asarray(0.2)], {}, {"a": 1}, {1, 2}, range(3), [[]], [0.3, 0.1],
    ]  # fmt: skip
    texts = ["", "tsit5", "feedforward", "relu", "equilibrium", "3", b"tsit5", "ü→"]
    x = np.array(INPUT)
    arrays = [
        x, x.astype(">f8"), x.astype(np.float16), x.astype(np.longdouble), x.astype(object),
        np.ma.array(x, mask=[0, 1, 0]), np.ma.array(x, mask=[0, 0, 0]), x > 0, x + 1j,
        x.astype(str), x.astype(jnp.bfloat16), np.arange(3), np.zeros(0), np.zeros((0, 3)),
        np.zeros((2, 3)), np.ones((4, 3)), np.ones((2, 2)), np.full(3, np.nan), np.zeros(()),
        np.array(["2020"], "M8"), jnp.zeros(3), jnp.zeros((2, 4)), jnp.asarray(0.5),
        jnp.asarray(2), np.ones((2, 3, 4)), np.eye(4), np.zeros(2, [("a", float)]),
        pandas.Series(x), pandas.Series([1.0, None], dtype="Float64"), xarray.DataArray(x),
        memoryview(x),
    ]  # fmt: skip
    objects = [
        None, object(), Ellipsis, slice(3), int, np.float64, jnp.float32, float, datetime.date.max,
        pathlib.Path("."), ValueError("x"), pcdyn, len, lambda: None, lambda x: x, lambda x, y: x,
        jax.random.key(1), jax.random.split(jax.random.key(1), 2), jax.random.PRNGKey(0),
        pcdyn.Gaussian, learning.PredictiveCoding, pcdyn.Dense, pcdyn.Trajectory,
        pcdyn.Gaussian(), pcdyn.Gaussian([1.0, 2.0]), pcdyn.CrossEntropy(), pcdyn.LogCosh(),
        pcdyn.Prior(),
        pcdyn.Euler(dt=0.1), pcdyn.Exact(), pcdyn.SciPy("RK45"), pcdyn.Diffrax(),
        pcdyn.EulerMaruyama(dt=0.1), pcdyn.Langevin(temperature=0.1),
        pcdyn.PiecewiseConstant([0.0, 1.0], np.ones((2, 2))), pcdyn.Signal(jnp.sin),
        pcdyn.UntilEquilibrium(), diffrax.Tsit5(), diffrax.KenCarp3(), diffrax.Tsit5,
        diffrax.PIDController(1e-3, 1e-6), solvers.GaussNewton(), solvers.FixedPoint(),
        solvers.FlowToRest(), learning.PredictiveCoding(), learning.TruncatedGaussNewton(),
        pcdyn.activations.tanh, optax.sgd(0.1), optax.lbfgs(), eqx.nn.Dropout(0.5),
        xarray.Dataset(),
    ]  # fmt: skip
    fixed = [*numbers, *sequences, *texts, *arrays, *objects]
    values: dict[str, Callable[[], Any]] = {}
    for value in fixed:
        label = _label(value)
        count = sum(each.split(" no. ")[0] == label for each in values)
        values[f"{label} no. {count + 1}" if count else label] = lambda value=value: value
    values |= {f"the {name}": (lambda name=name: getattr(KNOWN, name)) for name in _PASSED_AROUND}
    values |= {
        "generator": lambda: (t for t in (0.0, 1.0)),
        "endless": itertools.count,
        "map": lambda: map(float, (0, 1)),
    }
    return values


def _label(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        return f"{kind} {value.shape} {value.dtype}"
    if isinstance(value, eqx.Module | pandas.Series | xarray.DataArray | xarray.Dataset):
        return f"one {kind}"
    # Without addresses, so that the same seed draws the same values in every process.
    return f"{kind} {re.sub('0x[0-9a-f]+', '', str(value))[:40]}"


@cache
def calls() -> dict[str, Call]:
    """Every public constructor, verb, and method of a result with arguments."""

    quick: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
        "Dense": lambda: (pcdyn.Dense, {"weight": np.ones((2, 3))}),
        "Network": lambda: (pcdyn.Network, {"layers": list(KNOWN.network.layers)}),
        "mlp": lambda: (
            pcdyn.mlp,
            {"widths": list(WIDTHS), "activation": "tanh", "key": KNOWN.key},
        ),
        "Activation": lambda: (pcdyn.Activation, {"name": "sin", "function": jnp.sin}),
        "leaky_relu": lambda: (leaky_relu, {}),
        "InferenceProblem": lambda: (
            pcdyn.InferenceProblem,
            {"network": KNOWN.network, "input": INPUT, "output": OUTPUT},
        ),
        "Gaussian": lambda: (pcdyn.Gaussian, {}),
        "Prior": lambda: (pcdyn.Prior, {}),
        "generate": lambda: (
            pcdyn.generate,
            {"problem": pcdyn.InferenceProblem(KNOWN.network, input=INPUT), "key": KNOWN.key},
        ),
        "CrossEntropy": lambda: (pcdyn.CrossEntropy, {}),
        "LogCosh": lambda: (pcdyn.LogCosh, {}),
        "PseudoHuber": lambda: (pcdyn.PseudoHuber, {}),
        "Student": lambda: (pcdyn.Student, {}),
        "Divisive": lambda: (pcdyn.Divisive, {}),
        "Interaction": lambda: (pcdyn.energies.Interaction, {"function": jnp.subtract}),
        "Posterior.sample": lambda: (KNOWN.posterior.sample, {"key": KNOWN.key}),
        "Posterior.log_density": lambda: (
            KNOWN.posterior.log_density,
            {"state": KNOWN.posterior.mean},
        ),
        "named_energy": lambda: (pcdyn.named_energy, {"name": "student"}),
        "Diffrax": lambda: (pcdyn.Diffrax, {}),
        "SciPy": lambda: (pcdyn.SciPy, {}),
        "Euler": lambda: (pcdyn.Euler, {"dt": 0.1}),
        "EulerMaruyama": lambda: (pcdyn.EulerMaruyama, {"dt": 0.1}),
        "StochasticHeun": lambda: (pcdyn.StochasticHeun, {"dt": 0.1}),
        "Langevin": lambda: (pcdyn.Langevin, {"temperature": 0.1}),
        "PiecewiseConstant": lambda: (
            pcdyn.PiecewiseConstant,
            {"times": [0.0, 1.0], "values": np.ones((2, 2))},
        ),
        "PiecewiseLinear": lambda: (
            pcdyn.PiecewiseLinear,
            {"times": [0.0, 1.0], "values": np.ones((2, 2))},
        ),
        "Interpolated": lambda: (
            pcdyn.Interpolated,
            {"times": [0.0, 1.0], "values": np.ones((2, 2))},
        ),
        "Signal": lambda: (pcdyn.Signal, {"function": jnp.sin, "jumps": ()}),
        "UntilEquilibrium": lambda: (pcdyn.UntilEquilibrium, {}),
        "ClosedForm": lambda: (solvers.ClosedForm, {}),
        "GaussNewton": lambda: (solvers.GaussNewton, {}),
        "PseudoTransient": lambda: (solvers.PseudoTransient, {}),
        "GradientDescent": lambda: (solvers.GradientDescent, {"dt": 0.1}),
        "FixedPoint": lambda: (solvers.FixedPoint, {}),
        "ConjugateGradients": lambda: (solvers.ConjugateGradients, {}),
        "ErrorDescent": lambda: (solvers.ErrorDescent, {}),
        "FlowToRest": lambda: (solvers.FlowToRest, {}),
        "get_solver": lambda: (solvers.get_solver, {"method": "flow"}),
        "TruncatedGaussNewton": lambda: (learning.TruncatedGaussNewton, {}),
        "FixedPrediction": lambda: (learning.FixedPrediction, {}),
        "ZeroDivergence": lambda: (learning.ZeroDivergence, {}),
        "PredictiveCoding": lambda: (learning.PredictiveCoding, {}),
        "EulerPredictiveCoding": lambda: (learning.EulerPredictiveCoding, {}),
        "LowPrecision": lambda: (learning.LowPrecisionPredictiveCoding, {"precision": 0.1}),
        "IncrementalPredictiveCoding": lambda: (learning.IncrementalPredictiveCoding, {}),
        "LearnedTargetPropagation": lambda: (learning.LearnedTargetPropagation, {}),
        "Evaluation": lambda: (learning.Evaluation, KNOWN.samples),
        "JointFlow": lambda: (learning.JointFlow, {"problem": KNOWN.problem, "ratio": 0.1}),
        "AdiabaticFlow": lambda: (learning.AdiabaticFlow, {"problem": KNOWN.problem}),
        "PrecisionFlow": lambda: (
            learning.PrecisionFlow,
            {"problem": KNOWN.problem, "structures": ["fixed", "diagonal"]},
        ),
        "JointFlow.initial_state": lambda: (KNOWN.joint_flow.initial_state, {}),
        "PrecisionFlow.initial_state": lambda: (KNOWN.precision_flow.initial_state, {}),
        "PrecisionFlow.free_energy_along": lambda: (
            KNOWN.precision_flow.free_energy_along,
            {"trajectory": None},
        ),
        "interpolated": lambda: (interpolation.interpolated, {"weight": 0.5, "depth": 3}),
        "graded": lambda: (interpolation.graded, {"ratio": 0.5, "depth": 3}),
        "random_state": lambda: (KNOWN.problem.random_state, {"key": KNOWN.key}),
        "open random_state": lambda: (KNOWN.open_problem.random_state, {"key": KNOWN.key}),
        "open zeros_state": lambda: (KNOWN.open_problem.zeros_state, {}),
        "initial_state": lambda: (KNOWN.problem.initial_state, {}),
        "feedforward_state": lambda: (KNOWN.problem.feedforward_state, {}),
        "stability_interval": lambda: (stability_interval, {"method": "tsit5"}),
        "distance_to": lambda: (KNOWN.trajectory.distance_to, {"reference": KNOWN.equilibrium}),
        "cosine_to": lambda: (KNOWN.trajectory.cosine_to, {"reference": KNOWN.equilibrium}),
        "angle_to": lambda: (KNOWN.trajectory.angle_to, {"reference": KNOWN.equilibrium}),
        "Trajectory.__call__": lambda: (KNOWN.trajectory.__call__, {"t": 1.0}),
        "Trajectory.to_netcdf": lambda: (
            KNOWN.trajectory.to_netcdf,
            {"path": KNOWN.stored_trajectory},
        ),
        "recommendation": lambda: (KNOWN.comparison.recommendation, {"error": 0.1}),
        "resolved": lambda: (
            KNOWN.comparison.resolved,
            {"run": KNOWN.comparison.rows[0], "metric": "final_error"},
        ),
        "of": lambda: (KNOWN.comparison.of, {"integrator": "tsit5"}),
        "mnist": lambda: (datasets.mnist, {"source": "sample"}),
        "fashion_mnist": lambda: (datasets.fashion_mnist, {}),
        "feedforward": lambda: (references.feedforward, {"problem": KNOWN.problem}),
        "load": lambda: (pcdyn.load, {"path": KNOWN.stored_trajectory}),
        "load_problem": lambda: (pcdyn.load_problem, {"path": KNOWN.stored_problem}),
        "save": lambda: (pcdyn.save, {"thing": KNOWN.problem, "path": KNOWN.stored_problem}),
        "save_problem": lambda: (
            pcdyn.save_problem,
            {"problem": KNOWN.problem, "path": KNOWN.stored_problem},
        ),
        "to_xarray": lambda: (pcdyn.io.trajectories.to_xarray, {"trajectory": KNOWN.trajectory}),
        "from_xarray": lambda: (
            pcdyn.io.trajectories.from_xarray,
            {"dataset": KNOWN.trajectory.to_xarray()},
        ),
        "loss": lambda: (KNOWN.output_error_flow.loss, {"error": np.ones(2), "t": 1.0}),
        "rise": lambda: (KNOWN.output_error_flow.rise, {"start": 0.0, "end": 1.0}),
        "largest_rise": lambda: (KNOWN.output_error_flow.largest_rise, {"times": [0.0, 1.0]}),
        "whitened": lambda: (KNOWN.output_error_flow.whitened, {"t": 1.0}),
    }
    slow: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
        "CustomEnergy": lambda: (pcdyn.CustomEnergy, {"function": jnp.square}),
        "simulate": lambda: (pcdyn.simulate, {"problem": KNOWN.problem, "t1": 1.0}),
        "DrivenProblem": lambda: (
            pcdyn.DrivenProblem,
            {"network": KNOWN.problem.network, "input": KNOWN.signal},
        ),
        "simulate with signals": lambda: (pcdyn.simulate, {"problem": KNOWN.driven, "t1": 1.0}),
        "frequency_response": lambda: (
            pcdyn.frequency_response,
            {"problem": KNOWN.linear_problem, "frequencies": [0.1, 1.0]},
        ),
        "simulate with noise": lambda: (
            pcdyn.simulate,
            {
                "problem": KNOWN.problem,
                "t1": 1.0,
                "integrator": pcdyn.EulerMaruyama(dt=0.1),
                "noise": pcdyn.Langevin(temperature=0.1),
                "key": KNOWN.key,
            },
        ),
        "equilibrium": lambda: (pcdyn.equilibrium, {"problem": KNOWN.problem}),
        "linear equilibrium": lambda: (pcdyn.equilibrium, {"problem": KNOWN.linear_problem}),
        "basin": lambda: (KNOWN.equilibrium.basin, {"perturbation": 0.1, "key": KNOWN.key}),
        "compare": lambda: (
            pcdyn.compare,
            {
                "integrators": ["tsit5"],
                "problem": KNOWN.problem,
                "t1": 1.0,
                "tolerances": [0.001],
                "repeats": 1,
            },
        ),
        "convergence_order": lambda: (
            pcdyn.convergence_order,
            {
                "integrator": "heun",
                "problem": KNOWN.problem,
                "t1": 1.0,
                "steps": [0.1, 0.05, 0.025],
            },
        ),
        "stability": lambda: (pcdyn.stability, {"problem": KNOWN.problem}),
        "stability_along": lambda: (
            pcdyn.stability_along,
            {"problem": KNOWN.problem, "trajectory": KNOWN.trajectory},
        ),
        "largest_step": lambda: (pcdyn.stability(KNOWN.problem).largest_step, {"method": "tsit5"}),
        "multiple_equilibria": lambda: (
            pcdyn.multiple_equilibria,
            {"problem": KNOWN.problem, "starts": [np.zeros((2, 4))]},
        ),
        "phase_portrait": lambda: (
            pcdyn.phase_portrait,
            {"problem": KNOWN.planar_problem, "resolution": 3, "t1": 1.0},
        ),
        "linear_equilibrium": lambda: (pcdyn.linear_equilibrium, {"problem": KNOWN.linear_problem}),
        "exact_flow": lambda: (
            linear.exact_flow,
            {"problem": KNOWN.linear_problem, "initial": "zeros"},
        ),
        "single_layer_flow": lambda: (
            linear.single_layer_flow,
            {
                "problem": KNOWN.linear_problem,
                "layer": 1,
                "activities": list(KNOWN.equilibrium.activities),
            },
        ),
        "posterior": lambda: (pcdyn.posterior, {"problem": KNOWN.linear_problem}),
        "maximisation_step": lambda: (
            learning.maximisation_step,
            {"problem": KNOWN.problem, "state": KNOWN.equilibrium.state},
        ),
        "expectation_maximisation": lambda: (
            learning.expectation_maximisation,
            {"problem": KNOWN.problem, "rounds": 1, "learning_rate": 0.1},
        ),
        "spectrum": lambda: (linear.spectrum, {"problem": KNOWN.linear_problem}),
        "moments": lambda: (
            linear.moments,
            {"problem": KNOWN.linear_problem, "temperature": 0.1, "times": [1.0]},
        ),
        "stationary_covariance": lambda: (
            linear.stationary_covariance,
            {"problem": KNOWN.linear_problem, "temperature": 0.1},
        ),
        "relaxation_times": lambda: (linear.relaxation_times, {"problem": KNOWN.linear_problem}),
        "output_covariance": lambda: (linear.output_covariance, {"problem": KNOWN.linear_problem}),
        "negative_log_likelihood": lambda: (
            linear.negative_log_likelihood,
            {"problem": KNOWN.linear_problem},
        ),
        "backpropagation": lambda: (references.backpropagation, {"problem": KNOWN.problem}),
        "target_propagation": lambda: (references.target_propagation, {"problem": KNOWN.problem}),
        "output_error_flow": lambda: (
            output_error.output_error_flow,
            {"problem": KNOWN.linear_problem},
        ),
        "energy_gradient_margin": lambda: (
            output_error.energy_gradient_margin,
            {"problem": KNOWN.problem, "state": KNOWN.equilibrium.state},
        ),
        "adjoint_condition": lambda: (
            pcdyn.adjoint_condition,
            {"network": KNOWN.network, "activities": list(KNOWN.equilibrium.activities)},
        ),
        "train": lambda: (
            learning.train,
            {
                **KNOWN.samples,
                "network": KNOWN.network,
                "rule": learning.Backpropagation(),
                "key": KNOWN.key,
                "optimiser": optax.sgd(0.001),
                "epochs": 1,
                "batch_size": 4,
            },
        ),
        "variational_free_energy": lambda: (
            learning.variational_free_energy,
            {"problem": KNOWN.problem, "state": KNOWN.equilibrium.state},
        ),
        "output_noise": lambda: (learning.output_noise, {"problem": KNOWN.batch_problem}),
        "plotting.activities": lambda: (
            pcdyn.plotting.activities,
            {"trajectory": KNOWN.trajectory},
        ),
        "plotting.energies": lambda: (pcdyn.plotting.energies, {"trajectory": KNOWN.trajectory}),
        "plotting.equilibrium": lambda: (pcdyn.plotting.equilibrium, {"found": KNOWN.equilibrium}),
        "plotting.distance": lambda: (
            pcdyn.plotting.distance,
            {"times": KNOWN.trajectory.times, "values": KNOWN.trajectory.energies[..., 0]},
        ),
        "plotting.decay_rates": lambda: (pcdyn.plotting.decay_rates, {"rates": [1.0, 2.0]}),
        "plotting.mean_band": lambda: (
            pcdyn.plotting.mean_band,
            {"x": [0.0, 1.0], "values": np.ones((3, 2))},
        ),
        "plotting.work_precision": lambda: (
            pcdyn.plotting.work_precision,
            {"comparison": KNOWN.comparison},
        ),
        "plotting.phase_portrait": lambda: (
            pcdyn.plotting.phase_portrait,
            {"portrait": KNOWN.portrait},
        ),
    }
    return {
        name: Call(name, make, slow=group is slow)
        for group in (quick, slow)
        for name, make in group.items()
    }


# Where a large number is a wish for a long computation, and no mistake.
_LONG = {"epochs", "repeats", "most_steps"}


def is_long(call: Call, changes: dict[str, str]) -> bool:
    """Whether a call with these labels of odd values would be right to take for ever."""
    return any(
        name in _LONG and label.startswith(("int 2147", "int 9223", "int 1000"))
        for name, label in changes.items()
    )


class _NotBack(BaseException):
    """A call has not come back in time; nothing that is not named so may catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, as Ctrl-C would."""

    def interrupt(*_: Any) -> None:
        raise _NotBack

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call ended: `kind` is accepted, named, foreign, hangs or wrong."""

    kind: str
    detail: str = ""

    @property
    def fine(self) -> bool:
        """Whether it is a result or a named error."""
        return self.kind in ("accepted", "named")


def attempt(call: Call, changes: dict[str, str]) -> Outcome:
    """Call a function with odd values, given by their labels, in place of some arguments."""
    odd = {name: odd_values()[label]() for name, label in changes.items()}
    function, valid = call.make()
    arguments = {**valid, **odd}
    try:
        with time_limit(PATIENCE), warnings.catch_warnings(), _scratch():
            warnings.simplefilter("ignore")
            result = function(**arguments)
    except pcdyn.PcdynError as error:
        return Outcome("named", f"{type(error).__name__}: {error}")
    except _NotBack:
        return Outcome("hangs", f"more than {PATIENCE} s")
    except Exception as error:
        inside = [f for f in traceback.extract_tb(error.__traceback__) if "pcdyn/" in f.filename]
        where = f"{pathlib.Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else "?"
        text = str(error).splitlines()[0][:90] if str(error) else ""
        return Outcome("foreign", f"{type(error).__name__} at {where}: {text}")
    finally:
        if "matplotlib.pyplot" in sys.modules:
            matplotlib.pyplot.close("all")
    problem = nonsense(result)
    return Outcome("wrong", problem) if problem else Outcome("accepted", type(result).__name__)


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """A text that is taken for a path is one in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, contextlib.chdir(folder):
        yield


def nonsense(result: Any) -> str:
    """What is wrong with a result that says it is a success, by a gradient in NumPy."""
    if isinstance(result, pcdyn.Equilibrium) and result.ok:
        slopes = gradient(result.problem, result.activities)
        if slopes is None:
            return ""
        worst = max(np.linalg.norm(slope, axis=-1).max() for slope in slopes)
        # Twice the tolerance, for the sum is one in another order.
        if not worst <= 2 * float(result.tolerance):
            return f"converged with a gradient of {worst:.2g}, tolerance {result.tolerance:.2g}"
    if isinstance(result, pcdyn.Trajectory) and result.ok:
        if not all(np.isfinite(x).all() for x in result.activities):
            return "ended well with activities that are not finite"
        rise = np.max(np.diff(result.free_energy, axis=0), initial=0)
        # Noise and signals may let it rise.
        driven = result.activities[0].ndim > 1 and np.ptp(result.activities[0], axis=0).any()
        if result.temperature is None and not driven and rise > 1e-3 * np.max(result.free_energy):
            return "ended well with a free energy that rises"
    return ""


def gradient(problem: Any, activities: Any) -> list[np.ndarray] | None:
    """∂F/∂x_l of the free layers in NumPy; `None` for layers and energies not known here."""
    layers, energies = problem.network.layers, problem.energy
    names = [layer.activation.name for layer in layers if isinstance(layer, pcdyn.Dense)]
    known = len(names) == len(layers) and set(names) <= set(_SLOPES)
    if not known or not all(isinstance(energy, pcdyn.Gaussian) for energy in energies):
        return None
    x = [np.asarray(layer, float) for layer in activities]
    weighted, pulled = [], []
    for index, layer in enumerate(layers, start=1):
        function, slope = _SLOPES[layer.activation.name]
        weight = np.asarray(layer.weight, float)
        z = x[index - 1] @ weight.T + (0 if layer.bias is None else np.asarray(layer.bias, float))
        error = x[index] - function(z)
        given = energies[index - 1].precision
        precision = np.asarray(1.0 if given is None else given, float)
        weighted.append(error @ precision if precision.ndim == 2 else error * precision)
        pulled.append((weighted[-1] * slope(z)) @ weight)
    slopes = []
    for index in problem.free_layers:
        own = weighted[index - 1] if index > 0 else 0.0
        above = pulled[index] if index < len(layers) else 0.0
        slopes.append(own - above)
    return slopes


def single_changes(name: str) -> Iterator[dict[str, str]]:
    """One odd value in place of one argument, for every argument and value."""
    call = calls()[name]
    for parameter in call.parameters:
        for label in odd_values():
            if not is_long(call, {parameter: label}):
                yield {parameter: label}


def random_changes(generator: random.Random, call: Call) -> dict[str, str]:
    """Odd values in place of a few arguments."""
    labels = list(odd_values())
    while True:
        count = generator.randint(1, min(3, len(call.parameters)))
        names = generator.sample(call.parameters, count)
        changes = {name: generator.choice(labels) for name in names}
        if not is_long(call, changes):
            return changes


def main(count: int, only: str = "", seed: int = 0) -> int:
    """Make `count` calls: first one odd value at a time, then several at random."""
    matplotlib.use("Agg")
    # What would take all the memory of a machine ends in a MemoryError instead.
    resource.setrlimit(resource.RLIMIT_AS, (14 * 2**30, resource.RLIM_INFINITY))
    jax.config.update("jax_enable_x64", True)
    start, generator = time.perf_counter(), random.Random(seed)
    groups: dict[str, Callable[[Call], bool]] = {
        "": lambda call: True,
        "quick": lambda call: not call.slow,
        "slow": lambda call: call.slow,
    }
    choose = groups.get(only, lambda call: call.name == only)
    names = [call.name for call in calls().values() if choose(call)]

    def all_changes() -> Iterator[tuple[str, dict[str, str]]]:
        for name in names:
            for changes in single_changes(name):
                yield name, changes
        while only in groups:
            name = generator.choice(names)
            yield name, random_changes(generator, calls()[name])

    totals: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for name, changes in itertools.islice(all_changes(), count):
        began = time.perf_counter()
        outcome = attempt(calls()[name], changes)
        totals[outcome.kind] += 1
        spent = time.perf_counter() - began
        kind = (name, ", ".join(changes), outcome.detail)
        if not outcome.fine and not seen[kind]:
            print(f"{outcome.kind:8} {name}({changes}) {outcome.detail}", flush=True)
        if spent > 5:
            print(f"slow     {name}({changes}) {outcome.kind} after {spent:.1f} s", flush=True)
        seen[kind] += not outcome.fine
    print(f"{sum(totals.values())} calls in {time.perf_counter() - start:.0f} s: {dict(totals)}")
    return int(any(seen.values()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4])))
