"""The adjoint condition: which interactions of layers give backpropagation's recursion (Eq 51).

For energies h(g(x_l, x_{l−1})) equilibria satisfy `B_lᵀ h'(g_l) + A_{l+1}ᵀ h'(g_{l+1}) = 0` with
B_l = ∂g(x_l, x_{l−1})/∂x_l and A_{l+1} = ∂g(x_{l+1}, x_l)/∂x_l. That is backpropagation's recursion
`h'(g_l) = J_{l+1}ᵀ h'(g_{l+1})`, for every h, if and only if `A_{l+1} = −J_{l+1} B_l`, where
J_{l+1} = ∂μ_{l+1}/∂x_l. (The paper divides A by B, which is this with B on the right.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pcdyn._support.arrays import as_float_array, check_dtype
from pcdyn._support.checks import as_sequence, check_callable, check_instance, checked_number
from pcdyn._support.products import matmul
from pcdyn._support.types import Numbers
from pcdyn.errors import ShapeError, ToleranceError
from pcdyn.model.energies.generalised import check_interaction
from pcdyn.model.network import Network


def difference(here: Array, prediction: Array) -> Array:
    """`g = x_l − μ_l`, the prediction error: the interaction of most energies of pcdyn."""
    return here - prediction


class AdjointCondition(eqx.Module):
    """How far an interaction is from the adjoint condition, layer by layer.

    - `residuals`: ‖A_{l+1} + J_{l+1} B_l‖ over the larger of ‖A_{l+1}‖ and ‖J_{l+1} B_l‖, in the
      Frobenius norm, for l = 1 … L − 1: 0 where the condition holds, of order 1 where it does not.
    - `tolerance`: up to which residual it counts as holding.
    """

    residuals: Float[Array, " hidden"]
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the condition holds in every hidden layer; not for residuals that are NaN."""
        return bool(np.all(np.asarray(self.residuals) <= self.tolerance))

    @property
    def explanation(self) -> str:
        """Verdict in one sentence, with the worst layer."""
        worst = int(np.argmax(np.asarray(self.residuals))) + 1
        size = float(np.asarray(self.residuals)[worst - 1])
        if self.holds:
            return f"dg obeys the adjoint condition in every layer (residual at most {size:.1e})"
        return (
            f"dg does not obey the adjoint condition: relative residual {size:.1e} in layer "
            f"{worst}, so that equilibria do not carry the gradients of backpropagation"
        )


def adjoint_condition(
    network: Network,
    activities: Sequence[Numbers],
    *,
    interaction: Callable[[Array, Array], Array] = difference,
    tolerance: float | None = None,
) -> AdjointCondition:
    """Test at some activities, by autodiff, whether energies h(g(x_l, μ_l(x_{l−1}))) obey Eq 51.

    One point can refute the condition and not prove it: try random activities.

    **Arguments:**

    - `network`: with at least one hidden layer.
    - `activities`: x_0 … x_L of one sample, each `(n_l,)`.
    - `interaction`: g as a function of x_l and its prediction μ_l.
    - `tolerance`: of the relative residual, 1000 units of round-off unless given.

    **Raises:**

    - `ShapeError` for activities that do not fit, no hidden layer or a g that is not shaped like
      x_l.
    - `DtypeError` or `NonFiniteError` for activities that are no real numbers.
    """
    check_instance(network, "network", Network, "a pcdyn.Network")
    check_dtype(network.dtype, "dtype of the network")
    check_callable(interaction, "interaction", "a function of x_l and its prediction")
    if tolerance is not None:
        tolerance = checked_number(tolerance, "tolerance", above=0, error=ToleranceError)
    activities = as_sequence(activities, "activities", f"activities x_0 … x_{network.depth}")
    layers = [
        as_float_array(x, f"activities of layer {index}").astype(network.dtype)
        for index, x in enumerate(activities)
    ]
    if network.depth < 2 or [x.shape for x in layers] != [(n,) for n in network.widths]:
        raise ShapeError(
            f"the adjoint condition is one of hidden layers and one sample: layers of shape "
            f"{[x.shape for x in layers]} were given for widths {network.widths}"
        )

    for index in range(1, network.depth + 1):
        check_interaction(interaction, layers[index], f" of layer {index}")

    residuals = _residuals(network, layers, interaction)
    if tolerance is None:
        tolerance = 1e3 * float(jnp.finfo(network.dtype).eps)
    return AdjointCondition(residuals, tolerance)


@eqx.filter_jit
def _residuals(
    network: Network, layers: list[Array], interaction: Callable[[Array, Array], Array]
) -> Array:
    def residual(index: int) -> Array:
        below, here, above = layers[index - 1 : index + 2]
        own = jax.jacfwd(lambda x: interaction(x, network.predict(index, below)))(here)
        lower = jax.jacfwd(lambda x: interaction(above, network.predict(index + 1, x)))(here)
        expected = -matmul(jax.jacfwd(lambda x: network.predict(index + 1, x))(here), own)
        size = jnp.maximum(jnp.linalg.norm(lower), jnp.linalg.norm(expected))
        return jnp.linalg.norm(lower - expected) / jnp.where(size > 0, size, 1)

    return jnp.stack([residual(index) for index in range(1, network.depth)])
