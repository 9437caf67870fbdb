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

from pcdyn.analysis.convergence_order import convergence_order, usable_range
from pcdyn.errors import InputError, IntegratorError, NoUsableRangeError
from pcdyn.model.network import Network
from pcdyn.model.problem import InferenceProblem
from tests.networks import Case, build_case

T1 = 1.0
ORDERS = {
    "euler": 1,
    "heun": 2,
    "midpoint": 2,
    "ralston": 2,
    "bosh3": 3,
    "tsit5": 5,
    "dopri5": 5,
    "dopri8": 8,
    "implicit_euler": 1,
    "kvaerno3": 3,
    "kvaerno4": 4,
    "kvaerno5": 5,
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
    return build_case(seed=2, widths=(3, 3, 2, 2), clamp="both", activations=(activation,))


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDERS)
def test_global_error_falls_with_the_order_of_the_method(name: str) -> None:
    """The slope of log error against log dt is p ± 0.1, and at least p − 0.1 above order 4.

    A high order is allowed to look higher: the next term of the error expansion can still show at
    steps that keep the error above round-off.
    """
    order = ORDERS[name]
    for activation in ("identity", "tanh"):
        given = case(activation)
        amount = np.asarray(float(activation == "tanh"))
        layers = [Blend(jnp.asarray(w), jnp.asarray(amount)) for w in given.weights]
        problem = InferenceProblem(
            Network(layers, input_width=given.widths[0]), input=given.input, output=given.output
        )
        end = iter(given.split(truth(given)))
        measured = convergence_order(
            name, problem, t1=T1, initial=given.state, most_steps=2**11,
            reference=[next(end) if i in given.free else None for i in range(given.depth + 1)],
        )  # fmt: skip
        assert measured.order >= order - 0.1, (activation, str(measured))
        assert order > 4 or measured.order <= order + 0.1, (activation, str(measured))


def test_the_usable_range_ends_at_round_off_and_begins_where_one_term_leads() -> None:
    """Errors 3 h² are bent by an unstable step, by h³ and by a floor; the rest gives slope 2."""
    steps = 2.0 ** -np.arange(12)
    errors = 3 * steps**2 + 40 * steps**6
    errors[0] = np.inf
    errors[8:] = 3e-5
    usable = usable_range(steps, errors, 0.0)
    assert usable is not None
    np.testing.assert_array_equal(np.flatnonzero(usable), np.arange(2, 8))
    assert usable_range(steps, np.full(12, 1e-14), 0.0) is None
    assert usable_range(steps, errors, 1.0) is None


def test_without_a_usable_range_there_is_a_named_error_with_what_was_measured() -> None:
    """Three steps that are all unstable; and two steps are no range."""
    problem = case("identity").problem
    with pytest.raises(NoUsableRangeError, match="smoother problem") as caught:
        convergence_order("euler", problem, t1=200.0, steps=[50.0, 40.0, 25.0])
    assert np.isinf(caught.value.errors).all()
    with pytest.raises(InputError, match="at least 3"):
        convergence_order("euler", problem, t1=1.0, steps=[0.5, 0.25])
    with pytest.raises(IntegratorError, match="no fixed step"):
        convergence_order("lsoda", problem, t1=1.0)
