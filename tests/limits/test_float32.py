"""What a user gets who never heard of float64, against NumPy and SciPy in float64.

Each test runs `tests/float32_user.py` in a process of its own, without the configuration of these
tests. Everything there must come out right, to what float32's eps = 1.2e-7 and the condition of
the problem allow, without a warning. Size means the largest number or 1.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.integrate

from pcdyn.io.results import save_problem
from tests import float32_user as user
from tests.networks import FUNCTIONS, Case

ROOT = Path(__file__).parents[2]
EPS = float(np.finfo(np.float32).eps)
# The defaults of adaptive integrators in float32.
RTOL, ATOL = 1e-4, 1e-6


def what_came(group: str, folder: Path, *arguments: Path) -> dict[str, user.Came]:
    """Run a group of `tests/float32_user.py`."""
    file = folder / f"{group}.pickle"
    command = [sys.executable, "-m", "tests.float32_user", group, str(file), *map(str, arguments)]
    # A user has neither the tests' JAX configuration nor warnings that are errors.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTHONW"))}
    ran = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    return {name: user.Came(**came) for name, came in pickle.loads(file.read_bytes()).items()}


def wrong(
    came: dict[str, user.Came],
    judge: Callable[[str, Any], str | None],
    *,
    may_fail: Callable[[str, str, str], bool] = lambda name, kind, message: False,
) -> dict[str, str]:
    """What is wrong with what came, by name; nothing, where all is well.

    `may_fail` says which named errors, with which messages, are as good as an answer.
    """
    found = {}
    for name, each in came.items():
        if each.error is not None and may_fail(name, each.error[0][0], each.error[1]):
            continue
        if each.error is not None:
            found[name] = f"{each.error[0][0]}: {each.error[1]}"
        elif each.warnings:
            found[name] = "; ".join(each.warnings)
        elif (complaint := judge(name, each.value)) is not None:
            found[name] = complaint
    return found


def far(actual: Any, expected: Any, bound: float) -> str | None:
    """A complaint if an array is further from what is expected than `bound`."""
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    distance = float(np.max(np.abs(actual - expected), initial=0))
    return None if distance <= bound else f"off by {distance:.1e}, bound {bound:.1e}"


# --- In NumPy -------------------------------------------------------------------------------------


def field(case: Case, y: np.ndarray) -> np.ndarray:
    """dy/dt of the stacked free layers."""
    free = dict(zip(case.free, case.split(y), strict=True))
    layers = tuple(free.get(i, x) for i, x in enumerate(case.activities))
    return case.stack(case.replace(activities=layers).field())


def start(case: Case) -> np.ndarray:
    """The feedforward pass."""
    layers = case.feedforward(case.activities[0])
    return case.stack([layers[i] for i in case.free])


def rest(case: Case) -> np.ndarray:
    """Where inference ends: along the flow by SciPy, then by Newton's method."""
    y = scipy.integrate.solve_ivp(
        lambda t, y: field(case, y), (0, 60), start(case), "LSODA", rtol=1e-9, atol=1e-11
    ).y[:, -1]
    for _ in range(3):
        y = y + np.linalg.solve(curvature(case, y), field(case, y))
    # The round-off of a field that is a difference of two terms of this size.
    assert np.linalg.norm(field(case, y)) < 1e-12 * largest_rate(case, y)
    return y


def curvature(case: Case, y: np.ndarray) -> np.ndarray:
    """∂²F/∂y² by central differences of the field."""
    rows = [(field(case, y + h) - field(case, y - h)) / 2e-6 for h in 1e-6 * np.eye(len(y))]
    matrix = -np.stack(rows, axis=1)
    return (matrix + matrix.T) / 2


def decay_rates(case: Case, y: np.ndarray) -> np.ndarray:
    """Of the flow around y."""
    return np.linalg.eigvalsh(curvature(case, y))


def largest_rate(case: Case, y: np.ndarray) -> float:
    return float(decay_rates(case, y)[-1])


def round_off(case: Case, y: np.ndarray) -> float:
    """What rounding a field of size |y| λ_max moves a state that relaxes with λ_min."""
    rates = decay_rates(case, y)
    return 8 * EPS * float(rates[-1] / rates[0]) * max(1.0, float(np.abs(y).max()))


def at_rest(case: Case, y: np.ndarray) -> str | None:
    """A complaint unless the gradient at y is within 1e-4 of that at the start, and round-off."""
    size = max(1.0, float(np.abs(y).max()))
    allowed = 1e-4 * max(1.0, float(np.linalg.norm(field(case, start(case)))))
    allowed += 8 * EPS * largest_rate(case, y) * size
    gradient = float(np.linalg.norm(field(case, np.asarray(y, float))))
    return None if gradient <= allowed else f"gradient {gradient:.1e}, allowed {allowed:.1e}"


def local(case: Case, activities: Sequence[Any], credits: Sequence[Any]) -> list[np.ndarray]:
    """Weight and bias gradient of each layer in turn, summed over the batch."""
    gradients = []
    for index, credit in enumerate(credits, start=1):
        below = activities[index - 1]
        slope = FUNCTIONS[case.activations[index - 1]][1](case.preactivation(index, below))
        gradients += [-(slope * credit).T @ below, -(slope * credit).sum(0)]
    return gradients


def back(case: Case) -> tuple[Any, list[np.ndarray]]:
    """The feedforward pass and BP's δ_1, δ_2 of a network with one hidden layer."""
    layers = case.feedforward(case.activities[0])
    top = (case.activities[-1] - layers[-1]) @ case.precision(2)
    slope = FUNCTIONS[case.activations[1]][1](case.preactivation(2, layers[1]))
    return layers, [(slope * top) @ case.weights[1], top]


# --- Simulation -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_integrator_follows_the_flow(tmp_path: Path) -> None:
    """At precision ratios of 1, 1e2 and 1e4, and for each activation.

    Each of up to fifty steps errs by its tolerance at most, and the flow contracts.
    """
    truths: dict[tuple[str, float], np.ndarray] = {}

    def truth(activation: str, ratio: float, times: np.ndarray) -> np.ndarray:
        if (activation, ratio) not in truths:
            case = user.case(activation, ratio)
            truths[activation, ratio] = scipy.integrate.solve_ivp(
                lambda t, y: field(case, y), (0, user.T1), start(case), "LSODA", t_eval=times,
                rtol=1e-9, atol=1e-11,
            ).y.T  # fmt: skip
        return truths[activation, ratio]

    def judge(name: str, value: Any) -> str | None:
        activation, number, integrator, *more = name.split()
        case = user.case(activation, float(number))
        if more[:1] == ["until"]:
            # At most 1e-3 of the gradient is left, and no rate is below 1 by much.
            return far(value["state"], rest(case), 1e-3 / decay_rates(case, rest(case))[0])
        expected = truth(activation, float(number), value["times"])
        size = max(1.0, float(np.abs(expected).max()))
        bound = 50 * (RTOL * size + ATOL) + round_off(case, expected[-1])
        if integrator == "euler":
            bound = round_off(case, expected[-1])
            expected = euler(case, user.step(float(number)), value["times"])
        return far(value["state"], expected, bound)

    assert wrong(what_came("simulations", tmp_path), judge) == {}


def euler(case: Case, dt: float, times: np.ndarray) -> np.ndarray:
    """The plain loop, linear between updates."""
    states = [start(case)]
    for _ in range(int(np.ceil(times[-1] / dt - 1e-6))):
        states.append(states[-1] + dt * field(case, states[-1]))
    grid = dt * np.arange(len(states))
    return np.stack([np.interp(times, grid, unit) for unit in np.transpose(states)], axis=1)


# --- Equilibria -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_finds_the_equilibrium(tmp_path: Path) -> None:
    """With its rates, the closed form, several starts, and the portrait of two units.

    What is found by default is found at every ratio. A method that was asked for may say that it
    does not get there, and that another one does.
    """

    def may_fail(name: str, kind: str, message: str) -> bool:
        asked = name.split()[-1] in user.METHODS
        return asked and kind == "NotConvergedError" and "another method" in message

    def judge(name: str, value: Any) -> str | None:
        if name == "phase_portrait":
            case = user.chain()
            points = [at_rest(case, point) for point in value["points"]]
            kinds = [str(kind) for kind in value["kinds"]]
            return points[0] if kinds == ["minimum"] else str(kinds)
        if name == "multiple_equilibria":
            case = user.case("tanh", 1e2)
            lost = "a start found nothing" if (value["basins"] < 0).any() else None
            return lost or next(filter(None, (at_rest(case, y) for y in value["state"])), None)
        activation, number, what = name.split()
        case = user.case(activation, float(number))
        expected = rest(case)
        rates = decay_rates(case, expected)
        slack = round_off(case, expected)
        if what == "linear_equilibrium":
            return far(value, expected, slack)
        # The gradient may be 1e-4 of that at the start.
        slack += 1e-4 * max(1.0, float(np.linalg.norm(field(case, start(case))))) / rates[0]
        if what == "stability":
            # Rates are known to the round-off of the largest, and move with the state.
            moved = 0.0 if activation == "identity" else 4 * slack
            return far(value, rates, (1e2 * EPS + moved) * rates[-1])
        return at_rest(case, value) or far(value, expected, slack)

    assert wrong(what_came("rests", tmp_path), judge, may_fail=may_fail) == {}


# --- Comparison and references --------------------------------------------------------------------


@pytest.mark.slow
def test_comparisons_and_references(tmp_path: Path) -> None:
    """The ladder of tolerances is kept, orders are seen, and README's ten lines say so."""

    def judge(name: str, value: Any) -> str | None:
        if name == "the ten lines":
            return far(value, [0.0, 0.0], 20 * (RTOL * np.sqrt(5) + ATOL))
        if name == "convergence_order":
            return far(value, 2.0, 0.1)
        if name == "compare":
            case = user.case("tanh", 1e2)
            slack = round_off(case, rest(case))
            reached = [str(status) == "REACHED_T1" for _, _, status, _ in value["rows"]]
            close = [float(e) <= 50 * float(tol) + slack for _, tol, _, e in value["rows"]]
            good = all(reached) and all(close) and value["reference"] < 1e-8
            return None if good else str(value)
        case = user.square(float(name.split()[1]))
        layers, deltas = back(case)
        below = case.activities[-1]
        expected, growth = [below], 1.0
        for weight, bias in zip(reversed(case.weights), reversed(case.biases), strict=True):
            growth *= float(np.linalg.cond(weight) / np.min(1 - below**2))
            below = np.linalg.solve(weight, np.arctanh(below) - bias)
            expected.insert(0, below)
        complaints = [
            *(far(a, b, 16 * EPS * max(1.0, np.abs(b).max()))
              for a, b in zip(value["feedforward"], layers, strict=True)),
            *(far(a, b, 32 * EPS * max(1.0, np.abs(deltas[-1]).max()))
              for a, b in zip(value["deltas"], deltas, strict=True)),
            *(far(a, b, 8 * EPS * growth * max(1.0, np.abs(b).max()))
              for a, b in zip(value["targets"], expected, strict=True)),
        ]  # fmt: skip
        return next(filter(None, complaints), None)

    assert wrong(what_came("comparisons", tmp_path), judge) == {}


# --- Learning -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_rule_learns(tmp_path: Path) -> None:
    """One step of gradient descent on a batch of four, against gradients in NumPy."""

    def judge(name: str, value: Any) -> str | None:
        if not all(np.isfinite(x).all() for x in [*value["arrays"], *value["history"].values()]):
            return "not finite"
        case = user.batch(name)
        before = [x for pair in zip(case.weights, case.biases, strict=True) for x in pair]
        gradient, share = expected_gradient(name, case)
        if gradient is None:
            return None
        size = max(1.0, *(float(np.abs(g).max()) for g in gradient))
        complaints = [
            far((w - np.asarray(after, float)) / user.LEARNED * 4, g, share * size)
            for w, after, g in zip(before, value["arrays"], gradient, strict=True)
        ]
        return next(filter(None, complaints), None)

    assert wrong(what_came("trainings", tmp_path), judge) == {}


def expected_gradient(name: str, case: Case) -> tuple[list[np.ndarray] | None, float]:
    """The gradient that a rule follows, and the share of its size that it may be off.

    Weights of order 1 are rounded once more by the update, and the rate .1 / 4 divides that.
    """
    stored = 80 * EPS
    forward, deltas = back(case)
    if name in ("Backpropagation", "FixedPrediction", "ZeroDivergence"):
        return local(case, forward, deltas), stored
    if name == "LowPrecisionPredictiveCoding":
        # The limit is approached in proportion to the precision, 1e-2, by which all is divided.
        return local(case, forward, deltas), 0.1 + stored / 1e-2
    if name == "TargetPropagation":
        hidden = np.linalg.solve(
            case.weights[1], (np.arctanh(case.activities[-1]) - case.biases[1]).T
        ).T
        credits = [hidden - forward[1], case.activities[-1] - forward[-1]]
        growth = np.linalg.cond(case.weights[1]) / np.min(1 - case.activities[-1] ** 2)
        return local(case, forward, credits), stored * growth
    if name == "LearnedTargetPropagation":
        # Its inverses are drawn at random.
        return None, 0.0
    if name == "PredictiveCoding":
        states = np.stack([rest(case.sample(row)) for row in range(4)])
        at = case.replace(activities=(forward[0], states, case.activities[-1]))
        # A sample may lack 2 % of its displacement, and some a few times as much.
        return weight_gradient(at), 0.1
    # Twenty Euler steps of .1, in which weights move as well or not.
    moving = name == "IncrementalPredictiveCoding"
    now = case.replace(activities=(forward[0], forward[1], case.activities[-1]))
    parameters = [x for pair in zip(case.weights, case.biases, strict=True) for x in pair]
    first = parameters
    for _ in range(20):
        slope, hidden = weight_gradient(now), now.activities[1] + 0.1 * now.field()[0]
        if moving:
            parameters = [w - 1e-5 * g for w, g in zip(parameters, slope, strict=True)]
        now = now.replace(
            weights=tuple(parameters[::2]), biases=tuple(parameters[1::2]),
            activities=(now.activities[0], hidden, now.activities[-1]),
        )  # fmt: skip
    if not moving:
        return weight_gradient(now), stored
    moved = [(a - b) / 2e-4 for a, b in zip(first, parameters, strict=True)]
    # Each of twenty steps rounds weights of order 1, and 2e-4 divides what they moved.
    return moved, stored + 20 * EPS / 2e-4


def weight_gradient(case: Case) -> list[np.ndarray]:
    """∂F/∂(weights) at the activities."""
    errors = case.errors(case.activities)
    weighted = [e @ case.precision(index) for index, e in enumerate(errors, start=1)]
    return local(case, case.activities, weighted)


# --- Files and commands ---------------------------------------------------------------------------


@pytest.mark.slow
def test_files_and_commands(tmp_path: Path) -> None:
    """A problem written in float64 is read and computed in float32."""
    case = user.case("tanh", 1e2)
    save_problem(case.problem, tmp_path / "saved.nc")
    end = rest(case)
    rates = decay_rates(case, end)
    slack = round_off(case, end) + 1e-4 * np.linalg.norm(field(case, start(case))) / rates[0]

    def energy(y: np.ndarray) -> float:
        return float(case.free_energy((case.activities[0], y, case.activities[-1])))

    def judge(name: str, value: Any) -> str | None:
        if name == "files come back":
            return None if value else "something else came back"
        if name == "a file of float64":
            return far(value, end, slack)
        if value["code"] != 0 or value["err"]:
            return f"exit code {value['code']}, {value['err']}"
        record = value["record"]
        if str(record["problem"]["dtype"]) != "float32":
            return "not in float32"
        # F is least at the end: what a state is off counts to the second order.
        bound = 32 * EPS * energy(start(case)) + rates[-1] * slack**2
        if name == "pcdyn equilibrium":
            return far(record["free_energy"], energy(end), bound)
        if name == "pcdyn simulate":
            return far(record["free_energy_start"], energy(start(case)), bound)
        if name == "pcdyn stability":
            return far(record["fastest_rate"], rates[-1], (1e2 * EPS + 4 * slack) * rates[-1])
        statuses = {str(run["status"]) for run in record["runs"]}
        return None if statuses == {"REACHED_T1"} else str(statuses)

    assert wrong(what_came("commands", tmp_path, tmp_path / "saved.nc"), judge) == {}
