"""Activations: values, inverses and open ranges against NumPy and SciPy."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from pcdyn import activations
from pcdyn.errors import ActivationError
from pcdyn.model.activations import Activation, get_activation, leaky_relu
from tests.networks import EPS, few

# Custom: the open range (−π/2, π/2) is neither the line nor a unit interval.
ARCTAN = Activation("arctan", jnp.arctan, jnp.tan, -math.pi / 2, math.pi / 2)
ALL = [
    activations.identity,
    activations.tanh,
    activations.sigmoid,
    activations.relu,
    activations.softplus,
    leaky_relu(),
    leaky_relu(0.3),
    ARCTAN,
]
ORACLES = {
    "identity": lambda x: x,
    "tanh": np.tanh,
    "sigmoid": scipy.special.expit,
    "relu": lambda x: np.maximum(x, 0),
    "softplus": lambda x: np.logaddexp(0, x),
    "leaky_relu(0.01)": lambda x: np.maximum(x, 0.01 * x),
    "leaky_relu(0.3)": lambda x: np.maximum(x, 0.3 * x),
    "arctan": np.arctan,
}
EACH = pytest.mark.parametrize("activation", ALL, ids=lambda a: a.name)


@EACH
def test_values_are_those_of_numpy(activation: Activation) -> None:
    """f(x) equals NumPy's f, for tiny, ordinary and large x of both signs."""
    x = np.concatenate([np.linspace(-40, 40, 161), [-1e-9, 1e-9, -700.0, 700.0]])
    # A few units in the last place: two libraries' exp and tanh are not rounded alike.
    np.testing.assert_allclose(
        activation(jnp.asarray(x)), ORACLES[activation.name](x), rtol=16 * EPS, atol=4 * EPS
    )


@EACH
@few(max_examples=40)
@given(data=st.data())
def test_function_undoes_inverse(activation: Activation, data: st.DataObject) -> None:
    """f(f⁻¹(y)) = y on the open range."""
    y = data.draw(
        st.floats(
            max(activation.lower, -1e6),
            min(activation.upper, 1e6),
            exclude_min=math.isfinite(activation.lower),
            exclude_max=math.isfinite(activation.upper),
            # XLA flushes subnormal numbers to zero, which is outside (0, …).
            allow_subnormal=False,
        )
    )
    assert activation.inverse is not None
    assert bool(activation.in_range(jnp.asarray(y)))
    returned = float(activation(activation.inverse(jnp.asarray(y))))
    # Round-off of x = f⁻¹(y) moves f(x) by |x f'(x)| EPS ≤ max(1, |y|) EPS for all of them. XLA's
    # arctanh itself is off by up to 33 EPS (near √2 − 1, against NumPy's).
    assert abs(returned - y) <= 64 * EPS * max(1, abs(y))


@pytest.mark.parametrize("y", [1e-300, 1e-12, 1e-3, 1.0, 40.0, 1e3, 1e300])
def test_softplus_inverse_keeps_relative_accuracy(y: float) -> None:
    """softplus(softplus⁻¹(y)) = y relative to y, where log(expm1(y)) would overflow too."""
    assert activations.softplus.inverse is not None
    x = float(activations.softplus.inverse(jnp.asarray(y)))
    returned = float(activations.softplus(jnp.asarray(x)))
    # For small y, y = eˣ: the relative error is the absolute error of x, |x| EPS.
    assert abs(returned - y) <= 16 * EPS * max(1, abs(x) if x < 0 else 1) * y


@EACH
def test_range_is_open_and_reached_in_the_limit(activation: Activation) -> None:
    """The ends are outside, their inner neighbours inside, and f(±∞) tends to finite ends."""
    lower, upper = activation.lower, activation.upper
    inner = np.nextafter(lower, np.inf) if lower != 0 else 1e-300
    for end, neighbour in ((lower, inner), (upper, np.nextafter(upper, -np.inf))):
        assert not bool(activation.in_range(jnp.asarray(end)))
        assert bool(activation.in_range(jnp.asarray(neighbour)))
    far = np.asarray(activation(jnp.asarray([-1e18, 1e18])))
    for end, value in zip((lower, upper), far, strict=True):
        if math.isfinite(end):
            # 2/π·1e-18 is what is left of arctan at 1e18, far below round-off.
            assert abs(value - end) <= EPS * max(1, abs(end))
        else:
            assert abs(value) >= 0.01 * 1e18


@EACH
def test_range_check_is_elementwise(activation: Activation) -> None:
    """`in_range` is a boolean array equal to lower < y < upper, entry by entry."""
    y = np.linspace(-2, 2, 12).reshape(3, 4)
    mask = np.asarray(activation.in_range(jnp.asarray(y)))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, (activation.lower < y) & (y < activation.upper))


def test_equal_slopes_are_one_activation() -> None:
    """leaky_relu(0.1) is equal to itself and hashes alike, so that it shares compiled code."""
    assert leaky_relu(0.1) == leaky_relu(0.1)
    assert hash(leaky_relu(0.1)) == hash(leaky_relu(0.1))
    assert leaky_relu(0.1) != leaky_relu(0.2)


@pytest.mark.parametrize("name", ["identity", "tanh", "sigmoid", "relu", "softplus"])
def test_names_give_the_activations_of_the_module(name: str) -> None:
    """A name, and an activation itself, both give the module's activation."""
    activation = getattr(activations, name)
    assert get_activation(name) is activation
    assert get_activation(activation) is activation


def test_custom_and_leaky_activations_are_accepted() -> None:
    """A custom activation is used as given; "leaky_relu" is that of slope 0.01."""
    assert get_activation(ARCTAN) is ARCTAN
    assert get_activation("leaky_relu") == leaky_relu(0.01) == leaky_relu()


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    """The message names the unknown activation and every known one."""
    with pytest.raises(ActivationError, match="'tnah'") as caught:
        get_activation("tnah")
    for name in ("identity", "tanh", "sigmoid", "relu", "softplus", "leaky_relu"):
        assert name in str(caught.value)


@pytest.mark.parametrize("slope", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_slopes_without_inverse_are_refused(slope: float) -> None:
    """max(x, slope·x) is a leaky ReLU for 0 < slope < 1 only."""
    with pytest.raises(ActivationError, match=f"{slope}"):
        leaky_relu(slope)


@pytest.mark.parametrize(("lower", "upper"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_empty_range_is_refused(lower: float, upper: float) -> None:
    """lower must be below upper."""
    with pytest.raises(ActivationError, match="'wrong'"):
        Activation("wrong", jnp.sin, None, lower, upper)
