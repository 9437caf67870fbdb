"""Every fixed-step method has the order of convergence that its name promises.

Both networks are one compiled program: a layer blends the identity (a = 0) with tanh (a = 1).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from pcdyn.integrators import Diffrax, Euler, Integrator
from pcdyn.network import Network
from pcdyn.problem import InferenceProblem
from pcdyn.simulate import simulate
from tests.networks import Case, build_case

T1 = 2.0
# Order, and the exponents k of the steps 2^-k. The finest step leaves errors above 1e-12 (explicit,
# round-off is 1e-15) or 1e-8 (implicit: a Newton tolerance of 1e-10 per step).
METHODS = {
    "euler": (1, (6, 7, 8, 9)),
    "heun": (2, (5, 6, 7, 8)),
    "tsit5": (5, (2, 3, 4, 5)),
    "dopri5": (5, (3, 4, 5, 6)),
    "dopri8": (8, (1, 2, 3)),
    "implicit_euler": (1, (6, 7, 8, 9)),
    "kvaerno3": (3, (4, 5, 6, 7)),
    "kvaerno5": (5, (4, 5, 6)),
}


class Blend(eqx.Module):
    """x ↦ f(W x) with f between the identity (`amount` 0) and tanh (1)."""

    weight: Any
    amount: Any

    def __call__(self, x: Any) -> Any:
        z = self.weight @ x
        return z + jnp.broadcast_to(self.amount, z.shape) * (jnp.tanh(z) - z)


def case(activation: str) -> Case:
    """Four layers, of which two are free: 2 + 3 units that start away from equilibrium."""
    return build_case(seed=8, widths=(3, 3, 2, 2), clamp="both", activations=(activation,))


def truth(given: Case) -> np.ndarray:
    """y(T1) by the matrix exponential, or by DOP853 at 1e-13 on the field in plain NumPy."""
    start = given.stack([given.activities[i] for i in given.free])
    if set(given.activations) == {"identity"}:
        matrix, drive, _ = given.linear_flow()
        generator = np.block([[-matrix, drive[:, None]], [np.zeros((1, len(drive) + 1))]])
        return (scipy.linalg.expm(generator * T1) @ np.append(start, 1.0))[:-1]

    def field(t: float, y: np.ndarray) -> np.ndarray:
        free = dict(zip(given.free, given.split(y), strict=True))
        layers = tuple(free.get(i, x) for i, x in enumerate(given.activities))
        return given.stack(dataclasses.replace(given, activities=layers).field())

    solution = scipy.integrate.solve_ivp(
        field, (0, T1), start, method="DOP853", rtol=1e-13, atol=1e-14
    )
    return solution.y[:, -1]


def integrator(name: str, dt: float) -> Integrator:
    return Euler(dt=dt) if name == "euler" else Diffrax(name, dt=dt)


@pytest.mark.parametrize("name", METHODS)
def test_global_error_falls_with_the_order_of_the_method(name: str) -> None:
    """The slope of log error against log dt is p ± 0.1, and at least p − 0.1 above order 4.

    A high order is allowed to look higher: the next term of the error expansion can still show at
    steps that keep the error above round-off.
    """
    order, exponents = METHODS[name]
    for activation in ("identity", "tanh"):
        given = case(activation)
        amount = np.asarray(float(activation == "tanh"))
        layers = [Blend(jnp.asarray(w), jnp.asarray(amount)) for w in given.weights]
        problem = InferenceProblem(
            Network(layers, input_width=given.widths[0]), input=given.input, output=given.output
        )
        expected, errors = truth(given), []
        for exponent in exponents:
            run = simulate(
                problem,
                t1=T1,
                times=np.array([T1]),
                initial=given.state,
                integrator=integrator(name, 2.0**-exponent),
            )
            final = given.stack([run.final[i] for i in given.free])
            errors.append(np.linalg.norm(final - expected))
        slope = -np.polyfit(exponents, np.log2(errors), 1)[0]
        assert slope >= order - 0.1, (activation, errors)
        assert order > 4 or slope <= order + 0.1, (activation, errors)
