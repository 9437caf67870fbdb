"""What a user computes who never heard of float64: `python -m tests.float32_user GROUP FILE`.

A program of its own, for it must run without the configuration of the tests: JAX as it is
installed, default options, data as NumPy makes them. Each function is one thing that a user does
and returns what came out; the file gets that, or the error, and the warnings. What should have
come out is in `tests/limits/test_float32.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pcdyn
from tests.networks import Case, build_case

RATIOS = (1.0, 1e2, 1e4)
T1 = 0.25
DIFFRAX = ("heun", "midpoint", "ralston", "bosh3", "tsit5", "dopri5", "dopri8", "implicit_euler",
           "kvaerno3", "kvaerno4", "kvaerno5", "rodas5p")  # fmt: skip
SCIPY = ("rk45", "rk23", "dop853", "radau", "bdf", "lsoda")
METHODS = (
    "conjugate_gradients",
    "gauss_newton",
    "nesterov",
    "pseudo_transient",
    "flow",
    "closed_form",
)
README = Path(__file__).parents[1] / "README.md"


@dataclasses.dataclass(frozen=True)
class Came:
    """What came out: the `value`, or an `error` as class names and message; `warnings`, seconds."""

    value: Any = None
    error: tuple[tuple[str, ...], str] | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def case(activation: str, ratio: float = 1.0, batch: int | None = None) -> Case:
    """2-3-2 with biases, both ends clamped, the precision of the output `ratio` times the other.

    Biases and target keep the preactivations of the output away from the kink of ReLU.
    """
    made = build_case(seed=3, widths=(2, 3, 2), activations=(activation,), bias=True, batch=batch)
    made = made.replace(precisions=(1.0, ratio))
    if activation != "relu":
        return made
    biases, target = (made.biases[0], np.array([3.0, 4.0])), np.array([3.0, 1.5])
    activities = (*made.activities[:-1], np.broadcast_to(target, made.activities[-1].shape))
    return made.replace(biases=biases, activities=activities)


def step(ratio: float) -> float:
    """A step with which Euler is stable: all rates are below 1 + 10 · ratio."""
    return 0.05 / (1 + ratio)


# --- What a user does -----------------------------------------------------------------------------


def free(problem: Any, activities: Any) -> np.ndarray:
    """The free layers side by side, as they came."""
    layers = [np.asarray(activities[index]) for index in problem.free_layers]
    assert all(x.dtype == np.float32 for x in layers), [x.dtype for x in layers]
    return np.concatenate(layers, axis=-1)


def simulated(activation: str, ratio: float, integrator: Any, **options: Any) -> Any:
    problem = case(activation, ratio).problem
    run = pcdyn.simulate(problem, t1=T1, integrator=integrator, **options)
    return {"state": free(problem, run.activities), "times": run.times, "fallback": run.fallback,
            "energy": run.free_energy}  # fmt: skip


def simulations() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in (*DIFFRAX, *SCIPY):
        for ratio in RATIOS:
            yield (f"tanh {ratio:g} {name}", lambda n=name, r=ratio: simulated("tanh", r, n))
    for name in ("exact", "tsit5"):
        for ratio in RATIOS:
            yield (
                f"identity {ratio:g} {name}",
                lambda n=name, r=ratio: simulated("identity", r, n),
            )
    for name in ("tsit5", "kvaerno5"):
        for ratio in RATIOS:
            yield (f"relu {ratio:g} {name}", lambda n=name, r=ratio: simulated("relu", r, n))
    for ratio in RATIOS:
        yield (
            f"tanh {ratio:g} euler",
            lambda r=ratio: simulated("tanh", r, pcdyn.Euler(dt=step(r))),
        )
    for name in ("kvaerno3", "rodas5p"):
        yield (
            f"tanh 100 {name} at a fixed step",
            lambda n=name: simulated("tanh", 1e2, pcdyn.Diffrax(n, dt=0.001)),
        )
    yield "tanh 1 tsit5 until equilibrium", until_equilibrium


def until_equilibrium() -> Any:
    problem = case("tanh").problem
    run = pcdyn.simulate(problem, t1=100.0, until="equilibrium")
    return {"state": free(problem, run.final), "status": run.status.name}


def rested(activation: str, ratio: float, method: str | None) -> Any:
    problem = case(activation, ratio).problem
    found = pcdyn.equilibrium(problem, method=method)
    return free(problem, found.activities)


def closed_form(ratio: float) -> Any:
    problem = case("identity", ratio).problem
    return free(problem, pcdyn.linear_equilibrium(problem))


def rates(activation: str, ratio: float) -> Any:
    return pcdyn.stability(case(activation, ratio).problem).rates


def several() -> Any:
    problem = case("tanh", 1e2).problem
    starts = (np.array([[0.0, 0.0, 0.0], [0.5, -0.5, 0.2], [1.0, 1.0, -1.0]]),)
    found = pcdyn.multiple_equilibria(problem, starts)
    return {"state": free(problem, found.activities), "basins": found.basin_of}


def portrait() -> Any:
    made = chain()
    found = pcdyn.phase_portrait(made.problem)
    return {"points": found.equilibria, "kinds": found.kinds, "rates": found.rates}


def chain() -> Case:
    """Two free units in a row."""
    return build_case(seed=1, widths=(1, 1, 1, 1), activations=("tanh",), bias=True)


def rests() -> Iterator[tuple[str, Callable[[], Any]]]:
    for activation in ("tanh", "relu", "identity"):
        for ratio in RATIOS:
            yield (
                f"{activation} {ratio:g} equilibrium",
                lambda a=activation, r=ratio: rested(a, r, None),
            )
    for method in METHODS:
        activation = "identity" if method == "closed_form" else "tanh"
        for ratio in RATIOS:
            yield (
                f"{activation} {ratio:g} {method}",
                lambda a=activation, r=ratio, m=method: rested(a, r, m),
            )
    for ratio in RATIOS:
        yield f"identity {ratio:g} linear_equilibrium", lambda r=ratio: closed_form(r)
        for activation in ("tanh", "identity"):
            yield (
                f"{activation} {ratio:g} stability",
                lambda a=activation, r=ratio: rates(a, r),
            )
    yield "multiple_equilibria", several
    yield "phase_portrait", portrait


def compared() -> Any:
    found = pcdyn.compare(["tsit5", "rodas5p", "lsoda"], case("tanh", 1e2).problem, t1=T1)
    rows = [(r.integrator, r.value, r.status.name, r.maximum_error) for r in found.rows]
    return {"rows": rows, "reference": found.reference_error.maximum_error}  # fmt: skip


def order() -> Any:
    return pcdyn.convergence_order("heun", case("tanh").problem, t1=T1).order


def references(ratio: float) -> Any:
    made = square(ratio)
    problem = made.problem
    back = pcdyn.backpropagation(problem)
    targets = pcdyn.target_propagation(problem)
    return {
        "feedforward": [np.asarray(x) for x in pcdyn.feedforward(problem)],
        "deltas": [np.asarray(x) for x in back.deltas],
        "targets": [np.asarray(x) for x in targets.targets],
    }


def square(ratio: float = 1.0) -> Case:
    """2-2-2 with reachable targets: those of another input."""
    made = build_case(seed=5, widths=(2, 2, 2), activations=("tanh",), bias=True)
    made = made.replace(precisions=(1.0, ratio))
    output = made.feedforward(np.array([0.3, -0.6]))[-1]
    return made.replace(activities=(*made.activities[:-1], output))


def comparisons() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "compare", compared
    yield "convergence_order", order
    for ratio in RATIOS:
        yield f"references {ratio:g}", lambda r=ratio: references(r)
    yield "the ten lines", ten_lines


def ten_lines() -> Any:
    """README's first example without the line that switches float64 on."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    found = next(block for block in blocks if "linear_equilibrium" in block)
    lines = [line for line in found.splitlines() if "jax_enable_x64" not in line]
    assert len(lines) < len(found.splitlines())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(lines), {})
    numbers = re.findall(r"(?:error|to equilibrium) ([\d.e-]+)", printed.getvalue())
    return [float(x) for x in numbers]


# --- Learning -------------------------------------------------------------------------------------

LEARNED = 0.1


def batch(rule: str) -> Case:
    """Four samples; square for exact targets."""
    if rule == "TargetPropagation":
        made = build_case(seed=5, widths=(2, 2, 2), activations=("tanh",), bias=True, batch=4)
        output = made.feedforward(0.5 * made.activities[0][::-1])[-1]
        return made.replace(activities=(*made.activities[:-1], output))
    return case("tanh", batch=4)


def trained(name: str, **options: Any) -> Any:
    """Weights after one step of gradient descent on one batch."""
    import optax

    from pcdyn import learning

    made = batch(name)
    rule = getattr(learning, name)(**options)
    found = learning.train(
        made.network, made.activities[0], made.activities[-1], rule=rule,
        optimiser=optax.sgd(LEARNED), epochs=1, batch_size=4, key=jax.random.key(0), compare=True,
    )  # fmt: skip
    arrays = [x for layer in found.network.layers for x in (layer.weight, layer.bias)]
    assert all(x.dtype == np.float32 for x in arrays)
    history = {name: np.asarray(value) for name, value in found.history.items()}
    return {"arrays": [np.asarray(x) for x in arrays], "history": history}


def trainings() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in ("Backpropagation", "PredictiveCoding", "EulerPredictiveCoding", "FixedPrediction",
                 "IncrementalPredictiveCoding", "ZeroDivergence", "TargetPropagation",
                 "LearnedTargetPropagation"):  # fmt: skip
        yield name, lambda n=name: trained(n)
    yield (
        "LowPrecisionPredictiveCoding",
        lambda: trained("LowPrecisionPredictiveCoding", precision=1e-2),
    )


# --- Files and commands ---------------------------------------------------------------------------


def round_trip() -> Any:
    """Whether everything comes back from files to the bit."""
    problem = case("tanh", 1e2).problem
    run = pcdyn.simulate(problem, t1=T1)
    run.to_netcdf("run.nc")
    pcdyn.save_problem(problem, "problem.nc")
    again, same = pcdyn.load("run.nc"), pcdyn.load_problem("problem.nc")
    pairs = [*zip(run.activities, again.activities, strict=True), (run.energies, again.energies)]
    leaves = [jax.tree.leaves(each) for each in (problem, same)]
    pairs += list(zip(*leaves, strict=True))
    return all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b) for a, b in pairs
    )


def from_float64(path: Path) -> Any:
    """A problem of a file that was written in float64: the equilibrium of what it holds."""
    problem = pcdyn.load_problem(path, dtype=np.float32)
    return free(problem, pcdyn.equilibrium(problem).activities)


def command(*arguments: str) -> Any:
    """What a command prints with --json and --float32."""
    from pcdyn.cli import main

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main([*arguments, "--float32", "--json"])
    return {"code": code, "record": json.loads(out.getvalue() or "null"), "err": err.getvalue()}


def commands(saved: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "files come back", round_trip
    yield "a file of float64", lambda: from_float64(saved)
    network = ("--network", str(saved))
    yield "pcdyn simulate", lambda: command("simulate", *network, "--t1", "1", "--data", "a.nc")
    yield "pcdyn equilibrium", lambda: command("equilibrium", *network)
    yield "pcdyn stability", lambda: command("stability", *network)
    yield "pcdyn compare", lambda: command("compare", *network, "--t1", "1", "--integrators",
                                           "tsit5", "rodas5p", "lsoda")  # fmt: skip


GROUPS: dict[str, Any] = {
    "simulations": simulations, "rests": rests, "comparisons": comparisons,
    "trainings": trainings, "commands": commands,
}  # fmt: skip


def came(action: Callable[[], Any]) -> Came:
    """What comes of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = time.process_time()
        try:
            result = Came(jax.tree.map(np.asarray, action()))
        except Exception as error:
            kinds = tuple(kind.__name__ for kind in type(error).__mro__)
            result = Came(error=(kinds, str(error)))
    seen = [f"{w.category.__name__}: {w.message}" for w in caught]
    spent = time.process_time() - started
    return dataclasses.replace(result, warnings=tuple(seen), seconds=spent)


def main(group: str, file: str, *arguments: str) -> None:
    """Do all of a group, in a folder of its own."""
    assert not jax.config.jax_enable_x64, "this is what happens without float64"
    target, rest = Path(file).resolve(), [Path(a).resolve() for a in arguments]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = {}
        for name, action in GROUPS[group](*rest):
            found[name] = came(action)
            print(f"{found[name].seconds:6.1f} s  {name}", flush=True)
    # Plain values, for this module is called __main__ here.
    target.write_bytes(pickle.dumps({n: dataclasses.asdict(c) for n, c in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
