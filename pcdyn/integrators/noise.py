"""Noise as a value: what users ask for, and what a run draws it from."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from pcdyn._support.types import Scalar, State
from pcdyn.linearisation.fluctuations import checked_temperature


class Langevin(eqx.Module):
    """Noise of a temperature T: `τ dx = −∂F/∂x dt + √(2Tτ) dW` instead of `τ dx = −∂F/∂x dt`.

    W is a Wiener process of its own for each free unit of each sample. Whatever the time constants
    τ, the density exp(−F/T) of the activities stays as it is, if it can be normalised
    (docs/noise.md). At T = 0 nothing moves them but the flow.

    **Arguments:**

    - `temperature`: T, at least 0. It may be traced by JAX.

    **Raises:**

    - `pcdyn.errors.InputError` for what is no such number.
    """

    temperature: Scalar = eqx.field(converter=checked_temperature)


class Draws(eqx.Module):
    """Standard normal numbers of a run, which depend on the sample, the step and the unit alone.

    - `temperature`: that of the noise that they are for.
    - `keys`: one for the only sample, or one for each.
    """

    temperature: Scalar
    keys: Key[Array, "*batch"]

    def normals(self, number: Scalar, like: State) -> State:
        """Draw for the step of this number, shaped like a state.

        The units of a sample are drawn side by side, however its state divides them into arrays.
        """
        widths = [x.shape[-1] for x in like]

        def one(key: PRNGKeyArray) -> Array:
            return jr.normal(jr.fold_in(key, number), (sum(widths),), like[0].dtype)

        rows = one(self.keys) if self.keys.ndim == 0 else jax.vmap(one)(self.keys)
        return tuple(jnp.split(rows, np.cumsum(widths)[:-1], axis=-1))


def draws(noise: Langevin, key: PRNGKeyArray, state: State) -> Draws:
    """What a run from a state draws its noise from.

    Sample b of a batch draws what it would draw alone with the key `jax.random.fold_in(key, b)`.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jr.wrap_key_data(key)
    if state[0].ndim > 1:
        key = jax.vmap(lambda sample: jr.fold_in(key, sample))(jnp.arange(state[0].shape[0]))
    return Draws(noise.temperature, key)
