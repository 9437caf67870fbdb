"""Reverse mode through loops is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pcdyn import Diffrax, Euler, simulate
from pcdyn.errors import IntegratorError
from pcdyn.model.problem import InferenceProblem
from tests.networks import build_case

CASE = build_case(seed=4, widths=(3, 3, 2), activations=("tanh",))
INPUT = jnp.asarray(CASE.activities[0])
METHODS = {"tsit5": Diffrax(rtol=1e-9, atol=1e-12), "euler": Euler(dt=0.1)}


def loss_of(name: str) -> Callable[[Any], Any]:
    def loss(input: Any) -> Any:
        problem = InferenceProblem(CASE.network, input=input, output=CASE.output)
        run = simulate(problem, t1=1.0, times=[1.0], integrator=METHODS[name])
        return run.free_energy[-1]

    return loss


@pytest.mark.parametrize("name", METHODS)
def test_reverse_mode_is_refused_with_the_remedies(name: str) -> None:
    loss, batch = loss_of(name), jnp.stack([INPUT, -INPUT])
    calls: dict[str, Callable[[], Any]] = {
        "grad": lambda: jax.grad(loss)(INPUT),
        "grad of jit": lambda: jax.grad(jax.jit(loss))(INPUT),
        "jit of grad": lambda: jax.jit(jax.grad(loss))(INPUT),
        "vmap of grad": lambda: jax.vmap(jax.grad(loss))(batch),
        "grad of vmap": lambda: jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x)))(batch),
        "jacrev": lambda: jax.jacrev(loss)(INPUT),
    }
    for call in calls.values():
        with pytest.raises(IntegratorError, match=r"jax\.jacfwd.*Exact.*equilibrium"):
            call()
