"""Energies other than the Gaussian: `E = Σ_i Π_i h(ε_i)`, or `h(g(x_i, μ_i))` (A.8 of the paper).

The weight gradient becomes `−(f'_l ∘ Π_l h'(ε_l)) x_{l−1}ᵀ`, and equilibria satisfy the recursion
`Π_l h'(ε_l) = J_{l+1}ᵀ Π_{l+1} h'(ε_{l+1})` of backpropagation for every h, since the prediction
error x_l − μ_l has ∂ε_l/∂x_l = 1 (`pcdyn.adjoint_condition`). Where h' is bounded, so is what one
unit can say: its influence, in the words of robust statistics.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pcdyn._support.arrays import is_traced
from pcdyn._support.checks import check_callable, check_instance
from pcdyn._support.functions import as_part
from pcdyn._support.types import Numbers, Scalar, Values
from pcdyn.errors import (
    EnergyWarning,
    IllPosedEnergyError,
    InputError,
    PrecisionError,
    ShapeError,
)
from pcdyn.model.energies.energy import (
    CrossEntropy,
    Energy,
    Gaussian,
    Weighted,
)
from pcdyn.model.energies.precision import Precision, Precisions, checked_precisions, positive
from pcdyn.model.energies.well_posedness import WellPosedness, well_posedness

# The least curvature of the solvers' model, in parts of h'(ε)/ε. At 1 each step of the model lowers
# F for certain but converges linearly; below, it is Newton's wherever h'' is above this.
_LEAST_CURVATURE = 0.1
_FLOOR = 1e-6


class Separable(Weighted):
    """Base of the energies `E = Σ_i Π_i h(ε_i)`, summed over the units of a layer.

    A new one is a class with an `h`.

    **Arguments:**

    - `precision`: Π as for `pcdyn.Gaussian`, but a number or one per unit: a matrix mixes units.
    """

    @abc.abstractmethod
    def h(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """Compute h(ε), elementwise."""

    def __check_init__(self) -> None:
        given = self.precision if isinstance(self.precision, tuple) else (self.precision,)
        for index, each in enumerate(given, start=1):
            if each is not None and each.ndim == 2:
                where = f" of layer {index}" if isinstance(self.precision, tuple) else ""
                raise ShapeError(
                    f"precision{where} is a matrix, but this energy is a sum over units: give a "
                    "number or one per unit"
                )

    def value(self, error: Array, target: Array | None) -> Array:
        return jnp.sum(self.weights.weigh(self.h(error)), axis=-1)

    def gradient(self, error: Array, target: Array | None) -> Array:
        return self.weights.weigh(self.slope(error))

    def curvature(self, error: Array, target: Array | None) -> Precision:
        return Precision(self.weights.weigh(self.bend(error)))

    def slope(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """Compute h'(ε), elementwise: the influence of an error."""
        return jax.grad(lambda e: jnp.sum(self.h(e)))(error)

    def second_derivative(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """Compute h''(ε), elementwise; negative where h is not convex."""
        return jax.jvp(self.slope, (error,), (jnp.ones_like(error),))[1]

    def bend(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """Compute a positive stand-in for h''(ε), elementwise: the precision of solvers' models.

        h'' where it is large enough, otherwise a part of h'(ε)/ε, the weight of iteratively
        reweighted least squares; that is positive also where h is not convex.
        """
        slope, second = jax.jvp(self.slope, (error,), (jnp.ones_like(error),))
        nonzero = jnp.abs(error) > jnp.sqrt(jnp.finfo(error.dtype).tiny)
        secant = jnp.where(nonzero, slope / jnp.where(nonzero, error, 1), second)
        return jnp.maximum(jnp.maximum(second, _LEAST_CURVATURE * secant), _FLOOR)


class LogCosh(Separable):
    """`h(ε) = log cosh ε`: ½ε² for small errors, |ε| − log 2 for large; convex, |h'| < 1.

    **Arguments:**

    - `precision`: see `pcdyn.energies.Separable`.
    """

    name: ClassVar[str | None] = "log_cosh"
    # By position as well.
    precision: Precisions = eqx.field(default=None, converter=checked_precisions)

    def h(self, error: Array) -> Array:
        return _log_cosh(error)


class _WithParameter(Separable):
    """Base of those with a parameter, the one field beside the precision."""

    @property
    def parameter(self) -> Float[Array, ""]:
        """The field that is given first, and that files hold."""
        (name,) = (f.name for f in dataclasses.fields(self) if f.name != "precision")
        return getattr(self, name)

    def check(self, width: int, target: Array | None) -> None:
        """Refuse a parameter whose square, which h'' has, is out of the range of the dtype."""
        super().check(width, target)
        value, name = self.parameter, f"the parameter of {type(self).__name__}"
        positive(name)(value)
        least = float(jnp.finfo(value.dtype).tiny) ** 0.5
        if not is_traced(value) and not least <= float(value) <= 1 / least:
            raise PrecisionError(
                f"{name} is {float(value):g}, whose square or its inverse is out of the range of "
                f"{value.dtype}: take one between {least:.1e} and {1 / least:.1e}, or other units"
            )


class PseudoHuber(_WithParameter):
    """`h(ε) = δ² (√(1 + ε²/δ²) − 1)`: ½ε² below δ, about δ|ε| above; convex, |h'| < δ.

    **Arguments:**

    - `delta`: δ > 0, in units of the errors.
    - `precision`: see `pcdyn.energies.Separable`.
    """

    name: ClassVar[str | None] = "pseudo_huber"
    delta: Float[Array, ""] = eqx.field(default=1.0, converter=positive("delta of PseudoHuber"))

    def h(self, error: Array) -> Array:
        # The root minus 1, without the cancellation. Far out, where 1 is nothing beside the square,
        # without the square, which overflows.
        far = jnp.abs(error) > self.delta / float(jnp.finfo(error.dtype).eps) ** 0.5
        near = jnp.where(far, 0, error)
        root = 1 + jnp.sqrt(1 + (near / self.delta) ** 2)
        return jnp.where(far, self.delta * (jnp.abs(error) - self.delta), near**2 / root)


class Student(_WithParameter):
    """`h(ε) = log(1 + ε²/s²)`: the negative log density of Student's t, up to factors.

    Bounded below and well posed but not convex beyond |ε| = s, so that even a linear network can
    have several equilibria; |h'| ≤ 1/s, and an error far above s has little influence: h' → 2/ε.
    With ν degrees of freedom and a scale σ it is s = σ√ν and precision (ν + 1)/2.

    **Arguments:**

    - `scale`: s > 0, in units of the errors.
    - `precision`: see `pcdyn.energies.Separable`.
    """

    name: ClassVar[str | None] = "student"
    scale: Float[Array, ""] = eqx.field(default=1.0, converter=positive("scale of Student"))

    def h(self, error: Array) -> Array:
        return jnp.log1p((error / self.scale) ** 2)


class Divisive(_WithParameter):
    """`h(ε) = ½ log(1 + ε²/δ)`: divisive prediction errors in a form that is well posed.

    It is ½ log(δ + ε²) with its minimum at 0, and h' = ε/(δ + ε²) tends to the 1/ε of the paper's
    log ε as δ → 0. That one is undefined for ε < 0, has no minimum, and its flow ends in finite
    time, ε₀²/2. Here |h'| ≤ 1/(2√δ); not convex beyond |ε| = √δ.

    **Arguments:**

    - `delta`: δ > 0, in units of squared errors.
    - `precision`: see `pcdyn.energies.Separable`.
    """

    name: ClassVar[str | None] = "divisive"
    delta: Float[Array, ""] = eqx.field(default=1.0, converter=positive("delta of Divisive"))

    def h(self, error: Array) -> Array:
        return 0.5 * jnp.log1p(error**2 / self.delta)


def _checked_function(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    check_callable(function, "h", "a function of an array")
    return as_part(function)


def check_interaction(
    function: Callable[[Array, Array], Array], layer: Array, where: str = ""
) -> None:
    """Raise `ShapeError` unless g of a layer and its prediction is shaped like the layer."""
    try:
        found = eqx.filter_eval_shape(function, layer, layer)
    # What a function of the user does with arrays is its own affair.
    except Exception as error:
        raise ShapeError(
            f"the interaction cannot take x_l and μ_l{where}, of shape {layer.shape}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, jax.ShapeDtypeStruct) or found.shape != layer.shape:
        shape = found.shape if isinstance(found, jax.ShapeDtypeStruct) else type(found).__name__
        raise ShapeError(
            f"the interaction{where} must map x_l and μ_l, of shape {layer.shape}, to an array of "
            f"that shape, one entry per unit, but gives {shape}"
        )


def _checked_interaction(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    check_callable(function, "function", "a function of activities and predictions")
    return as_part(function)


class CustomEnergy(Separable):
    """`E = Σ_i Π_i h(ε_i)` with any elementwise `function` h in terms of JAX.

    Build it once and reuse it: what is compiled for a function is kept for that very function. h is
    tested in float64 on a grid of errors from −1e4 to 1e4 (`pcdyn.model.energies.well_posedness`),
    with an `EnergyWarning` if h' is not Lipschitz, like that of |ε|^p with 1 < p < 2.

    **Arguments:**

    - `function`: h, in terms of JAX.
    - `precision`: see `pcdyn.energies.Separable`.

    **Raises:**

    - `IllPosedEnergyError` if h is not elementwise, not finite or not bounded below on the grid.
    - `InputError` for what is no function.
    """

    function: Callable[[Array], Array] = eqx.field(converter=_checked_function)

    def __check_init__(self) -> None:
        if not is_traced(self.function):
            _refuse_ill_posed(well_posedness(self.function))

    def h(self, error: Array) -> Array:
        return self.function(error)


class Interaction(Energy):
    """`E = h(g(x, μ))` with another interaction g of activity and prediction than x − μ (Eq 49).

    `energy` is h: `Interaction(lambda x, mu: x / mu - 1)` has divisive prediction errors and
    `E = ½ Σ_i (x_i/μ_i − 1)²`. What a problem calls its prediction errors stays x − μ. Such
    networks are simulated, come to rest by the solvers that need no curvature, and learn by −∂E/∂μ.
    Their equilibria have the recursion of backpropagation where `pcdyn.adjoint_condition` holds
    (Eq 51): if g acts unit by unit, for multiples of x − μ only, once layers have several units.

    Build it once and reuse it: what is compiled for a function is kept for that very function. Of
    its domain nothing is known: where g has a pole or a logarithm, choose activations whose
    predictions stay away from it.

    **Arguments:**

    - `function`: g of arrays of activities and predictions, in terms of JAX, to an array of the
      same shape. Its last axis is over units, which it may mix.
    - `energy`: h, with its precision: `pcdyn.Gaussian`, or an energy that is a sum over units.

    **Raises:**

    - `InputError` for what is no function or no such energy.
    - `ShapeError`, by the problem, for a g that does not keep the shape.
    """

    function: Callable[[Array, Array], Array] = eqx.field(converter=_checked_interaction)
    energy: Energy = eqx.field(default_factory=Gaussian)

    def __check_init__(self) -> None:
        wanted = "the energy h of the interaction, such as pcdyn.Gaussian()"
        check_instance(self.energy, "energy", Weighted, wanted)

    def value(self, error: Array, target: Array | None) -> Array:
        if target is None:
            raise InputError(
                "the energy of an interaction depends on the activity, which was not given: this "
                "needs an energy of the prediction error alone"
            )
        return self.energy.value(self.function(target, target - error), target)

    def scaled(self, factor: Scalar) -> Interaction:
        return Interaction(self.function, self.energy.scaled(factor))

    def check(self, width: int, target: Array | None) -> None:
        self.energy.check(width, target)
        leaves = jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array))
        check_interaction(self.function, jnp.zeros((2, width), leaves[0].dtype if leaves else None))

    def per_prediction(self, depth: int) -> tuple[Energy, ...]:
        return tuple(Interaction(self.function, e) for e in self.energy.per_prediction(depth))


_NAMED: dict[str | None, Any] = {
    kind.name: kind for kind in (Gaussian, LogCosh, PseudoHuber, Student, Divisive, CrossEntropy)
}


def named_energy(
    name: str, *, precision: Numbers | None = None, parameter: Numbers | None = None
) -> Energy:
    """Build the energy of that name.

    **Arguments:**

    - `name`: `"gaussian"`, `"log_cosh"`, `"pseudo_huber"`, `"student"`, `"divisive"` or
      `"cross_entropy"`. Another h is a `CustomEnergy`, which has no name.
    - `precision`: for `"cross_entropy"` its weight.
    - `parameter`: the δ of `"pseudo_huber"` and `"divisive"`, the scale of `"student"`; 1 unless
      given.

    **Raises:**

    - `IllPosedEnergyError` for the paper's `"log"` and for `"power"`, with the reason.
    - `InputError` for other names, and for a parameter of an energy that has none.
    """
    check_instance(name, "name", str, "the name of an energy")
    if name in _ILL_POSED:
        raise IllPosedEnergyError(_ILL_POSED[name])
    if name not in _NAMED:
        raise InputError(f"unknown energy {name!r}; known are {', '.join(map(str, _NAMED))}")
    kind, arguments = _NAMED[name], [] if parameter is None else [parameter]
    if arguments and not issubclass(kind, _WithParameter):
        raise InputError(f"the energy {name} has no parameter, but {parameter} was given")
    if kind is CrossEntropy:
        return CrossEntropy() if precision is None else CrossEntropy(precision)
    return kind(*arguments, precision=precision)


def arguments_of(energy: Energy) -> tuple[str, Values | None, Values | None]:
    """Name, precision and parameter from which `named_energy` makes this energy.

    Raises `InputError` if it has no name that `named_energy` knows.
    """
    if energy.name is None or _NAMED.get(energy.name) is not type(energy):
        raise InputError(
            f"{type(energy).__name__} is no energy that pcdyn knows by name (its `name` is none "
            f"of {', '.join(map(str, _NAMED))}), so that no file can hold it"
        )
    known: Any = energy
    parameter = known.parameter if isinstance(energy, _WithParameter) else None
    return energy.name, known.precision, parameter


_ILL_POSED = {
    "log": (
        "h(ε) = log ε is undefined for ε < 0 and has no minimum: the flow dε/dt = −1/ε reaches "
        "ε = 0 with infinite speed at the time ε₀²/2 and has no continuation; use divisive with a "
        "small parameter δ, h = ½ log(1 + ε²/δ), whose slope ε/(δ + ε²) tends to 1/ε as δ → 0"
    ),
    "power": (
        "h(ε) = |ε|^p with 1 < p < 2 has h' ~ |ε|^(p−1), which is not Lipschitz at 0: curvature is "
        "infinite where inference should rest; use pseudo_huber or log_cosh"
    ),
}


def _refuse_ill_posed(test: WellPosedness) -> None:
    if not test.finite:
        raise IllPosedEnergyError(
            f"h or h' is not finite at ε = {test.where:g}: prediction errors take any value and "
            f"sign. {_remedy(test.where)}"
        )
    if not test.bounded_below:
        raise IllPosedEnergyError(
            f"h still falls at ε = {test.where:g}: an energy that is not bounded below has no "
            "equilibrium, and its flow runs away"
        )
    if test.lipschitz is False:
        warnings.warn(
            f"h' is not Lipschitz near ε = {test.where:g}: explicit steps chatter there, and "
            "equilibrium may not be found; smooth h, as PseudoHuber smooths |ε|",
            EnergyWarning,
            stacklevel=4,
        )


def _remedy(where: float | None) -> str:
    if where is not None and abs(where) > 1:
        return "if it overflows, as cosh ε does, let h grow no faster than a power of ε"
    return (
        "log ε is so, use Divisive(delta); if h uses jnp.where, see that neither branch has an "
        "infinite derivative"
    )


@jax.custom_jvp
def _log_cosh(error: Array) -> Array:
    # Near 0 log cosh is a difference of numbers near log 2; far out sinh overflows.
    size = jnp.abs(error)
    near = jnp.log1p(jnp.sinh(jnp.minimum(size, 1)) ** 2) / 2
    far = size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(jnp.asarray(2, error.dtype))
    return jnp.where(size < 1, near, far)


@_log_cosh.defjvp
def _log_cosh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (error,), (tangent,) = primals, tangents
    return _log_cosh(error), jnp.tanh(error) * tangent
