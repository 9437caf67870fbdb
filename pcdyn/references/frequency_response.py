"""How the activities of a linear network follow a clamped value that oscillates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pcdyn._support.arrays import as_float_array, converted, is_traced
from pcdyn._support.checks import check_choice, checked_integer
from pcdyn._support.compiling import compiled
from pcdyn._support.products import einsum, matmul
from pcdyn._support.types import Numbers
from pcdyn.errors import InputError, ShapeError, SingularHessianError
from pcdyn.linearisation.whitened import check_same_units, has_errors_of_their_own, linear_parts
from pcdyn.model.clamps import PartlyClamped
from pcdyn.model.named import index_of
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import forcing, is_flat, linear_modes

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.lines


class FrequencyResponse(eqx.Module):
    """Gain and phase with which free layers follow oscillations of what is clamped.

    - `frequencies`: angular frequencies ω, shape `(frequency,)`, in 1/(time units).
    - `response`: of each free layer, complex, shape `(frequency, n_l, n)` for a driven layer of n
      units: where it is `d + Re(û e^{iωt})`, activities are those of d plus
      `Re(response û e^{iωt})` once what the start has left is gone.
    - `layers`: the indices of the free layers.
    """

    frequencies: Float[Array, " frequency"]
    response: tuple[Complex[Array, "frequency _ _"], ...]
    layers: tuple[int, ...] = eqx.field(static=True)

    @property
    def gain(self) -> tuple[Float[Array, "frequency _ _"], ...]:
        """Amplitude of each unit over that of each driven unit."""
        return tuple(jnp.abs(x) for x in self.response)

    @property
    def phase(self) -> tuple[Float[Array, "frequency _ _"], ...]:
        """Angle by which each unit is ahead of each driven unit, in radians from −π to π."""
        return tuple(jnp.angle(x) for x in self.response)

    @property
    def leading(self) -> tuple[Complex[Array, " frequency"], ...]:
        """Response of each free layer along one pattern.

        It is the pattern of driven units that moves the layer most at the first frequency, and the
        response in the pattern of the layer that it makes there.
        """
        found = []
        for x in self.response:
            left, _, right = jnp.linalg.svd(x[0], full_matrices=False)
            found.append(jnp.einsum("i,fij,j->f", left[:, 0].conj(), x, right[0].conj()))
        return tuple(found)

    def plot(
        self,
        quantity: Literal["gain", "phase"] = "gain",
        ax: matplotlib.axes.Axes | None = None,
    ) -> list[matplotlib.lines.Line2D]:
        """Draw the gain or the phase of `leading`; see `pcdyn.plotting.frequency_response`."""
        import pcdyn

        return pcdyn.plotting.frequency_response(self, quantity, ax=ax)


def frequency_response(
    problem: InferenceProblem, frequencies: Numbers, *, drive: str | int = "input"
) -> FrequencyResponse:
    """Compute how a linear network follows oscillations of one of its clamped layers.

    With `τ ẏ = −H y + B u` and u = û e^{iωt} it is `(iωτ + H)⁻¹ B`, from the modes of
    `τ^{-½} H τ^{-½}`: each follows as a low-pass filter of its rate.

    **Arguments:**

    - `problem`: a linear network; a batch has the response of any of its samples.
    - `frequencies`: angular frequencies ω ≥ 0, shape `(frequency,)`, in 1/(time units).
    - `drive`: the layer that oscillates: `"input"`, `"output"`, a number or the name of a node.

    **Raises:**

    - `NotLinearError` for other networks and energies.
    - `InputError` for a layer that is not clamped as a whole, and for negative frequencies.
    - `ShapeError` for frequencies that are no vector.
    - `SingularHessianError` for the frequency 0 where the Hessian is singular.
    """
    linear_parts(problem)
    check_same_units(problem, "a frequency response")
    node = _node(problem, drive)
    given = converted(as_float_array(frequencies, "frequencies"), problem.dtype, "frequencies")
    if given.ndim != 1 or given.size == 0:
        raise ShapeError(f"frequencies must be a vector, got shape {given.shape}")
    if not is_traced(given) and bool(jnp.any(given < 0)):
        raise InputError("frequencies must not be negative: the response to −ω is the conjugate")
    one = problem if not problem.batch_shape else problem.sample(0)
    response, resolved = _response(one, given, node)
    if not is_traced(resolved) and not bool(resolved):
        raise SingularHessianError(
            "the Hessian is singular: at the frequency 0 activities would drift without bound; "
            "leave that frequency out, or clamp or predict more"
        )
    ends = [sum(one.free_widths[: k + 1]) for k in range(len(one.free_widths) - 1)]
    return FrequencyResponse(given, tuple(jnp.split(response, ends, axis=1)), one.free_layers)


@compiled
def _response(problem: InferenceProblem, frequencies: Array, node: int) -> tuple[Array, Array]:
    rates, modes, scale = linear_modes(problem)

    def forced(value: Array) -> Array:
        driven = eqx.tree_at(lambda p: p.clamp[node], problem, value)
        return jnp.concatenate(forcing(driven), axis=-1)

    columns = jax.jacfwd(forced)(problem.clamp[node])
    amplitudes = matmul(modes.T, scale[:, None] * columns)
    if not has_errors_of_their_own(problem):
        rates = jnp.where(is_flat(rates), 0, rates)
    squares = rates[None] ** 2 + frequencies[:, None] ** 2
    resolved = jnp.all(squares > 0)
    # 1/(λ + iω), without complex products.
    known = jnp.where(squares > 0, squares, jnp.nan)
    parts = [jnp.broadcast_to(rates, known.shape) / known, -frequencies[:, None] / known]
    rows = [einsum("nm,fm,mj->fnj", scale[:, None] * modes, x, amplitudes) for x in parts]
    return jax.lax.complex(*rows), resolved


def _node(problem: InferenceProblem, drive: str | int) -> int:
    """The index of the layer or node that is driven."""
    if isinstance(drive, str) and problem.graph.nodes and drive in problem.graph.nodes:
        node = index_of(drive, problem.graph.nodes)
    elif isinstance(drive, str) and problem.is_chain:
        check_choice(drive, "drive", ("input", "output", *(problem.graph.nodes or ())))
        node = 0 if drive == "input" else len(problem.widths) - 1
    elif isinstance(drive, str):
        node = index_of(drive, problem.graph.nodes or ())
    else:
        node = checked_integer(drive, "drive", at_least=0, at_most=len(problem.widths) - 1)
    value = problem.clamp[node]
    if value is None or isinstance(value, PartlyClamped):
        raise InputError(
            f"{problem.node_name(node)} cannot be driven, for it is not clamped as a whole: clamp "
            "it, or drive another"
        )
    return node
