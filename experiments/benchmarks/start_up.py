"""The part of the benchmark that times fresh Python processes: the first answer of each verb."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from experiments.shared.timing import row
from pcdyn.theory import Evidence

_REPEATS = 3
_START = """
import sys, time, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", {x64})
import pcdyn
pcdyn.compilation_cache(sys.argv[1])
widths = {widths}
network = pcdyn.mlp(widths, activation="tanh", bias=True, key=jax.random.key(0))
x, y = (jax.random.normal(jax.random.key(1), ({batch} n,)) for n in (widths[0], widths[-1]))
problem = pcdyn.InferenceProblem(network, input=x, output=0.1 * y)
# What is imported only now is part of a first answer.
started = time.perf_counter()
{prepared}
{call}
print(time.perf_counter() - started)
"""
_SMALL = {"x64": True, "widths": (20, 20, 20, 20), "batch": ""}
_MNIST = {"x64": False, "widths": (784, 128, 64, 10), "batch": "64,"}
# As somebody would write it who has no pcdyn.
_BY_HAND = """
import diffrax
weights, biases = zip(*[(layer.weight, layer.bias) for layer in network.layers])

def energy(state):
    layers = (x, *state, 0.1 * y)
    errors = [b - jnp.tanh(w @ a + c)
              for w, c, a, b in zip(weights, biases, layers[:-1], layers[1:])]
    return 0.5 * sum(jnp.sum(e**2) for e in errors)

def field(t, state, args):
    return jax.tree.map(jnp.negative, jax.grad(energy)(state))

@jax.jit
def solve(state):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, 20.0, None, state,
        saveat=diffrax.SaveAt(ts=jnp.linspace(0, 20, 101)), max_steps=16384, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9)).ys

state = problem.feedforward_state()
"""
_GRADIENT = """
def loss(weights, x, y):
    for w, b in weights[:-1]:
        x = jnp.tanh(x @ w.T + b)
    w, b = weights[-1]
    return 0.5 * jnp.sum((x @ w.T + b - y) ** 2)

weights = [(layer.weight, layer.bias) for layer in network.layers]
"""
_TRAIN = """
import optax
from pcdyn import learning
"""
_PROGRAMS = {
    "trajectory": _START.format(
        **_SMALL, prepared="", call="pcdyn.simulate(problem, t1=20.0)"),
    "trajectory by hand": _START.format(
        **_SMALL, prepared=_BY_HAND, call="jax.block_until_ready(solve(state))"),
    "trajectory by LSODA": _START.format(
        **_SMALL, prepared="", call="pcdyn.simulate(problem, t1=20.0, integrator='lsoda')"),
    "equilibrium": _START.format(
        **_MNIST, prepared="", call="pcdyn.equilibrium(problem)"),
    "feedforward and gradient by hand": _START.format(
        **_MNIST, prepared=_GRADIENT,
        call="jax.block_until_ready(jax.jit(jax.grad(loss))(weights, x, y))"),
    "training by PC": _START.format(
        **_MNIST, prepared=_TRAIN,
        call="learning.train(network, x, 0.1 * y, rule=learning.PredictiveCoding(), "
             "optimiser=optax.adam(1e-3), epochs=1, batch_size=16, key=jax.random.key(2))"),
}  # fmt: skip
# Of the call, and of the process without and with the cache.
_LIMITS = {
    "trajectory": (np.inf, 4.0, 2.0),
    "trajectory by LSODA": (np.inf, 2.5, 2.0),
    "equilibrium": (3.0, np.inf, 2.5),
    "training by PC": (4.0, np.inf, np.inf),
}
_NONE = (np.inf, np.inf, np.inf)


def seconds_of(*arguments: str, **variables: str) -> tuple[float, str]:
    """Wall time and output of a fresh Python process with these arguments and variables."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], check=True, text=True, env={**os.environ, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - started, done.stdout


def rows() -> Iterator[Evidence]:
    """The first call and its process, without and with a compilation cache; median of 3."""
    calls: dict[str, float] = {}
    for name, program in _PROGRAMS.items():
        times = np.array([_cold_and_warm(program) for _ in range(_REPEATS)])
        (cold, call), (warm, _) = np.median(times, axis=0)
        calls[name] = call
        note = f"{times[:, 0, 1].min():.2f} … {times[:, 0, 1].max():.2f} s"
        of_call, of_cold, of_warm = _LIMITS.get(name, _NONE)
        yield row(f"first {name}: the call, cold, seconds", call, of_call, note=note)
        yield row(f"first {name}: from process start, cold, seconds", cold, of_cold)
        yield row(f"first {name}: from process start, with the cache, seconds", warm, of_warm)
    ratio = calls["trajectory"] / calls["trajectory by hand"]
    yield row("first trajectory / the same by hand with diffrax", ratio, 1.15)
    ratio = calls["equilibrium"] / calls["feedforward and gradient by hand"]
    yield row("first equilibrium / feedforward and gradient by hand", ratio)
    with tempfile.TemporaryDirectory() as cache:
        figures, _ = seconds_of("-m", "experiments", "--output", cache, XDG_CACHE_HOME=cache)
    yield row("all figures, paper preset: seconds, cold", figures, 180.0)


def _cold_and_warm(program: str) -> list[tuple[float, float]]:
    """Seconds of the process and of its call, before and after the cache has been filled."""
    found = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            whole, printed = seconds_of("-c", program, cache)
            found.append((whole, float(printed)))
    return found
