"""The part of the benchmark that times equilibria: ratios, side by side in one process.

All are of calls inside `jax.jit` with the residual of every sample checked, unless it says "whole
call"; batch 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import pcdyn
from experiments.shared.solver_races import (
    ITERATIVE,
    RUNGS,
    Race,
    compiled,
    deep_problem,
    error_descent,
    exact_equilibrium,
    ladder,
    problems,
    to_rest,
)
from experiments.shared.timing import best_times, row
from pcdyn import solvers
from pcdyn.theory import Evidence

_CONFIG = Race(precisions=(1.0, 100.0), deep=())
_TOLERANCE = 1e-4
_TSIT5 = solvers.FlowToRest(pcdyn.Diffrax("tsit5", fallback=None), t1=1000.0)
_FAST = ("conjugate gradients", "Gauss–Newton", "matrix-free Gauss–Newton", "Nesterov")


def rows() -> Iterator[Evidence]:
    """Every measurement with its limit."""
    cases, _ = problems(_CONFIG)
    for precision, limit in ((1, 25), (100, 200)):
        yield from _against_tsit5(cases[f"MNIST trained, Π = {precision}"], precision, limit)
    yield from _against_twenty_steps(cases["MNIST trained, Π = 1"])
    yield from _against_error_descent(cases["MNIST trained, Π = 1"])
    yield from _linear()
    yield from _orthogonal()
    for depth in (32, 64):
        yield _ill_conditioned(depth)


def _against_tsit5(
    problem: pcdyn.InferenceProblem, precision: int, limit: float
) -> Iterator[Evidence]:
    what = f"MNIST trained, output precision {precision}, residual 1e-4: Tsit5 /"
    calls, unsolved = _calls(
        problem, {**{name: ITERATIVE[name] for name in _FAST}, "Tsit5": _TSIT5}
    )
    times = best_times(calls, seconds=20.0)
    note = _notes(times, unsolved)
    for name in _FAST:
        bound = np.inf if name == "Nesterov" else limit
        yield row(f"{what} {name}", times["Tsit5"] / times[name], bound, True, note)
        note = ""
    whole = best_times(
        {
            "whole": lambda: (
                pcdyn.equilibrium(
                    problem, method="gauss_newton", tolerance=_TOLERANCE, throw=False
                ).state
            )
        }
    )["whole"]
    yield row(
        f"{what} whole call of Gauss–Newton", times["Tsit5"] / whole, at_least=True, note=_ms(whole)
    )


def _against_twenty_steps(problem: pcdyn.InferenceProblem) -> Iterator[Evidence]:
    reference = exact_equilibrium(problem)
    euler = compiled(problem, "Euler")
    calls: dict[str, Callable[[], Any]] = {"Euler": lambda: euler(problem, jnp.asarray(20))}
    needed = {}
    for name in _FAST:
        errors = [np.median(error) for _, error in ladder(problem, name, reference, budget=1.0)]
        reached = np.flatnonzero(np.array(errors) <= 0.01)
        if not len(reached):
            raise RuntimeError(f"{name} never came to a median error of 1 %")
        needed[name] = int(RUNGS[reached[0]])
        solve = compiled(problem, name)
        calls[name] = lambda f=solve, k=needed[name]: f(problem, jnp.asarray(k))
    times = best_times(calls)
    for name, count in needed.items():
        yield row(
            f"MNIST trained to 1 % median error: {name} / 20 bare Euler steps",
            times[name] / times["Euler"],
            np.inf if name == "Nesterov" else 1.0,
            note=f"{name} {_ms(times[name])}, {count} iterations; Euler {_ms(times['Euler'])}",
        )


def _against_error_descent(problem: pcdyn.InferenceProblem) -> Iterator[Evidence]:
    """The default beside what it does without a check at a rate that is known to be good."""
    by_hand = eqx.filter_jit(lambda problem: error_descent(problem, 0.4, 20))
    default = eqx.filter_jit(_by_default)
    times = best_times(
        {
            "20 steps at rate .4": lambda: by_hand(problem),
            "the default": lambda: default(problem),
            "its whole call": lambda: _by_default(problem),
        }
    )
    what, note = "MNIST trained, residual 1e-4: the default", _notes(times, {})
    found = pcdyn.equilibrium(problem, tolerance=_TOLERANCE)
    yield row(f"{what}, most passes", np.max(found.passes), 15)
    bare, compiled, whole = times.values()
    yield row(f"{what} / 20 bare steps in error coordinates", compiled / bare, 1.0, note=note)
    yield row(f"{what}, whole call / compiled", whole / compiled, 1.5)


def _linear() -> Iterator[Evidence]:
    keys = jr.split(jr.key(0), 3)
    network = pcdyn.mlp([128] * 16 + [10], activation="identity", key=keys[0], dtype=jnp.float64)
    problem = pcdyn.InferenceProblem(
        network, input=jr.normal(keys[1], (64, 128)), output=jr.normal(keys[2], (64, 10))
    )
    functions: dict[str, Any] = {
        "S-matrix": eqx.filter_jit(lambda p: pcdyn.linear_equilibrium(p, method="output_space")),
        "block Cholesky": eqx.filter_jit(pcdyn.linear_equilibrium),
        "dense solve": eqx.filter_jit(_dense_solve),
    }
    times = best_times({name: (lambda f=f: f(problem)) for name, f in functions.items()})
    for name, limit in (("block Cholesky", 5), ("dense solve", 50)):
        yield row(
            f"linear 16 × 128, output 10, float64: {name} / S-matrix",
            times[name] / times["S-matrix"], limit, True,
            f"S-matrix {_ms(times['S-matrix'])}, {name} {_ms(times[name])}",
        )  # fmt: skip


def _dense_solve(problem: pcdyn.InferenceProblem) -> jax.Array:
    forcing = jnp.concatenate(pcdyn.linear.forcing(problem), axis=-1)
    return jnp.linalg.solve(pcdyn.linear.hessian(problem).dense(), forcing.T).T


def _orthogonal() -> Iterator[Evidence]:
    per_layer = {}
    for depth in (8, 16, 32, 64):
        problem = deep_problem(_CONFIG, depth, 128)
        calls, unsolved = _calls(problem, {name: ITERATIVE[name] for name in _FAST})
        euler = compiled(problem, "Euler")
        calls["Euler"] = lambda f=euler, p=problem: f(p, jnp.asarray(40))
        times = best_times(calls)
        per_layer[depth] = times["Gauss–Newton"] / depth
        yield row(
            f"orthogonal {depth} × 128 tanh, residual 1e-4: Gauss–Newton / 40 bare Euler steps",
            times["Gauss–Newton"] / times["Euler"], 3 if depth == 64 else np.inf,
            note=_notes(times, unsolved),
        )  # fmt: skip
    yield row(
        "the same: time per layer, 64 layers / 8 layers", per_layer[64] / per_layer[8],
        note="1 is linear in depth",
    )  # fmt: skip


def _ill_conditioned(depth: int) -> Evidence:
    problem = deep_problem(_CONFIG, depth, 128, "fan_in")
    first_order = ("Nesterov", "error descent")
    calls, unsolved = _calls(
        problem, {"default": None, **{name: ITERATIVE[name] for name in first_order}}
    )
    times = best_times(calls)
    solved = [name for name in first_order if not unsolved[name]]
    best = min(times[name] for name in solved) if solved else np.inf
    return row(
        f"N(0, 1/128) {depth} × 128 tanh, residual 1e-4: best first-order method / default",
        best / times["default"] if not unsolved["default"] else 0.0, 1.0, True,
        _notes(times, unsolved),
    )  # fmt: skip


def _calls(
    problem: pcdyn.InferenceProblem, methods: dict[str, solvers.Solver | None]
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Calls that solve the problem, and how many samples each leaves unsolved."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, method in methods.items():
        # Under jit a chain of solvers runs to its end; a whole call runs only what is needed.
        function = _by_default if method is None else to_rest(method, _TOLERANCE)
        calls[name] = lambda f=function: f(problem)
    converged = pcdyn.EquilibriumStatus.CONVERGED
    return calls, {name: int(np.sum(call() != converged)) for name, call in calls.items()}


def _by_default(problem: pcdyn.InferenceProblem) -> jax.Array:
    return pcdyn.equilibrium(problem, tolerance=_TOLERANCE, throw=False).status_codes


def _notes(times: dict[str, float], unsolved: dict[str, int]) -> str:
    """The times, and who left samples unsolved."""

    def one(name: str) -> str:
        left = unsolved.get(name)
        return f"{name} {_ms(times[name])}" + (f" ({left} samples unsolved)" if left else "")

    return ", ".join(one(name) for name in times)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
