"""Energies other than the Gaussian: `E_l = Σ_i Π_i h(ε_i)` for a scalar h (A.8 of the paper).

The weight gradient becomes `−(f'_l ∘ Π_l h'(ε_l)) x_{l−1}ᵀ`, and equilibria satisfy the recursion
`Π_l h'(ε_l) = J_{l+1}ᵀ Π_{l+1} h'(ε_{l+1})` of backpropagation for every h, since the prediction
error x_l − μ_l has ∂ε_l/∂x_l = 1 (`pcdyn.adjoint_condition`). Where h' is bounded, so is what one
unit can say: its influence, in the words of robust statistics.
"""

# No postponed annotations here: equinox sees an abstract field only as a value.
import abc
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pcdyn._support.checks import Numbers, check_callable, check_instance, is_traced
from pcdyn._support.functions import as_part
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
    check_energy,
    checked_precision,
    scale_output,
    weigh,
)
from pcdyn.model.energies.well_posedness import WellPosedness, well_posedness

# The least curvature of the solvers' model, in parts of h'(ε)/ε. At 1 each step of the model lowers
# F for certain but converges linearly; below, it is Newton's wherever h'' is above this.
_LEAST_CURVATURE = 0.1
_FLOOR = 1e-6


class Separable(Energy):
    """Base of the energies `E_l = Σ_i Π_i h(ε_i)`, summed over the units of a layer.

    `weighting` holds the precisions Π_l as in `pcdyn.Gaussian`: `None`, a positive number, or for
    each layer l = 1 … L a positive number or one per unit; a matrix would mix units.
    """

    weighting: eqx.AbstractVar[Gaussian]

    @abc.abstractmethod
    def h(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """h(ε), elementwise."""

    def precision(self, index: int) -> Float[Array, "..."] | None:
        """Π_l of layer l = `index`: scalar or one per unit; `None` means 1."""
        return self.weighting.precision(index)

    def layer_energy(self, index: int, error: Array, target: Array | None) -> Array:
        return jnp.sum(self.weighting.weigh(index, self.h(error)), axis=-1)

    def slope(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """h'(ε), elementwise: the influence of an error."""
        return jax.grad(lambda e: jnp.sum(self.h(e)))(error)

    def second_derivative(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """h''(ε), elementwise; negative where h is not convex."""
        return jax.jvp(self.slope, (error,), (jnp.ones_like(error),))[1]

    def curvature(self, error: Float[Array, "..."]) -> Float[Array, "..."]:
        """A positive stand-in for h''(ε), elementwise: what Gauss–Newton takes for the precision.

        h'' where it is large enough, otherwise a part of h'(ε)/ε, the weight of iteratively
        reweighted least squares; that is positive also where h is not convex.
        """
        slope, second = jax.jvp(self.slope, (error,), (jnp.ones_like(error),))
        nonzero = jnp.abs(error) > jnp.sqrt(jnp.finfo(error.dtype).tiny)
        secant = jnp.where(nonzero, slope / jnp.where(nonzero, error, 1), second)
        return jnp.maximum(jnp.maximum(second, _LEAST_CURVATURE * secant), _FLOOR)

    def precision_at(self, index: int, error: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """The precision of each unit that stands for this energy at an error: Π_l `curvature`."""
        return weigh(self.precision(index), self.curvature(error))

    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        self.weighting.check(widths, output)


class LogCosh(Separable):
    """`h(ε) = log cosh ε`: ½ε² for small errors, |ε| − log 2 for large; convex, |h'| < 1.

    Arguments: `precisions`, see `pcdyn.energies.Separable`.
    """

    weighting: Gaussian

    def __init__(self, precisions: Numbers | None = None):
        self.weighting = _weighting(precisions)

    def h(self, error: Array) -> Array:
        return _log_cosh(error)


class PseudoHuber(Separable):
    """`h(ε) = δ² (√(1 + ε²/δ²) − 1)`: ½ε² below δ, about δ|ε| above; convex, |h'| < δ.

    Arguments: `delta`, δ > 0, in units of the errors; `precisions`, see `LogCosh`.
    """

    delta: Float[Array, ""]
    weighting: Gaussian

    def __init__(self, delta: Numbers = 1.0, precisions: Numbers | None = None):
        self.delta = _positive_number(delta, "delta of PseudoHuber")
        self.weighting = _weighting(precisions)

    def h(self, error: Array) -> Array:
        # The root minus 1, without the cancellation. Far out, where 1 is nothing beside the square,
        # without the square, which overflows.
        far = jnp.abs(error) > self.delta / float(jnp.finfo(error.dtype).eps) ** 0.5
        near = jnp.where(far, 0, error)
        root = 1 + jnp.sqrt(1 + (near / self.delta) ** 2)
        return jnp.where(far, self.delta * (jnp.abs(error) - self.delta), near**2 / root)

    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        super().check(widths, output)
        _check_resolved(self.delta, "delta of PseudoHuber")


class Student(Separable):
    """`h(ε) = log(1 + ε²/s²)`: the negative log density of Student's t, up to factors.

    Bounded below and well posed but not convex beyond |ε| = s, so that even a linear network can
    have several equilibria; |h'| ≤ 1/s, and an error far above s has little influence: h' → 2/ε.
    With ν degrees of freedom and a scale σ it is s = σ√ν and precision (ν + 1)/2.

    Arguments: `scale`, s > 0, in units of the errors; `precisions`, see `LogCosh`.
    """

    scale: Float[Array, ""]
    weighting: Gaussian

    def __init__(self, scale: Numbers = 1.0, precisions: Numbers | None = None):
        self.scale = _positive_number(scale, "scale of Student")
        self.weighting = _weighting(precisions)

    def h(self, error: Array) -> Array:
        return jnp.log1p((error / self.scale) ** 2)

    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        super().check(widths, output)
        _check_resolved(self.scale, "scale of Student")


class Divisive(Separable):
    """`h(ε) = ½ log(1 + ε²/δ)`: divisive prediction errors in a form that is well posed.

    It is ½ log(δ + ε²) with its minimum at 0, and h' = ε/(δ + ε²) tends to the 1/ε of the paper's
    log ε as δ → 0. That one is undefined for ε < 0, has no minimum, and its flow ends in finite
    time, ε₀²/2. Here |h'| ≤ 1/(2√δ); not convex beyond |ε| = √δ.

    Arguments: `delta`, δ > 0, in units of squared errors; `precisions`, see `LogCosh`.
    """

    delta: Float[Array, ""]
    weighting: Gaussian

    def __init__(self, delta: Numbers = 1.0, precisions: Numbers | None = None):
        self.delta = _positive_number(delta, "delta of Divisive")
        self.weighting = _weighting(precisions)

    def h(self, error: Array) -> Array:
        return 0.5 * jnp.log1p(error**2 / self.delta)

    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        super().check(widths, output)
        _check_resolved(self.delta, "delta of Divisive")


class CustomEnergy(Separable):
    """`E_l = Σ_i Π_i h(ε_i)` with any elementwise `function` h in terms of JAX.

    Build it once and reuse it: what is compiled for a function is kept for that very function. h is
    looked at in float64 on a grid of errors from −1e4 to 1e4 (`pcdyn.well_posedness`): raises
    `IllPosedEnergyError` if it is not elementwise, not finite or not bounded below there, and warns
    with `EnergyWarning` if h' is not Lipschitz, like that of |ε|^p with 1 < p < 2. Raises
    `InputError` for what is no function.

    Arguments: `function`; `precisions`, see `LogCosh`.
    """

    function: Callable[[Array], Array]
    weighting: Gaussian

    def __init__(self, function: Callable[..., Any], precisions: Numbers | None = None):
        check_callable(function, "h", "a function of an array")
        self.function = as_part(function)
        self.weighting = _weighting(precisions)
        if not is_traced(function):
            _refuse_ill_posed(well_posedness(function))

    def h(self, error: Array) -> Array:
        return self.function(error)


class Split(Energy):
    """The split F = Ẽ + ℒ of the paper: one energy for the residual Ẽ, another for the output ℒ.

    Arguments: `residual`, the energy of the layers l = 1 … L − 1, with as many precisions if it has
    one per layer; `output`, that of the output layer alone, with one precision if it has one per
    layer (`Gaussian([p])`), or `CrossEntropy(weight=…)`.

    The output must be clamped, for only then is there a loss: raises `InputError` where it is not,
    and for parts that are no energies, or for a residual that is one of targets, such as
    `CrossEntropy`.
    """

    residual: Energy
    output: Energy

    def __check_init__(self) -> None:
        check_energy(self.residual, "residual of Split")
        check_energy(self.output, "output of Split")
        if isinstance(self.residual, CrossEntropy | Split):
            raise InputError(
                f"{type(self.residual).__name__} compares with a target, which the layers of the "
                "residual do not have: give it as the output of Split"
            )

    def layer_energy(self, index: int, error: Array, target: Array | None) -> Array:
        if target is None:
            return self.residual.layer_energy(index, error, None)
        return self.output.layer_energy(1, error, target)

    def check(self, widths: tuple[int, ...], output: Array | None) -> None:
        if output is None:
            raise InputError("Split has a loss only where the output has a target: clamp it")
        self.residual.check(widths[:-1], None)
        self.output.check(widths[-2:], output)


@scale_output.register(Separable)
def _(energy: Separable, depth: int, factor: Any) -> Separable:
    scaled = scale_output(energy.weighting, depth, factor)
    return eqx.tree_at(lambda e: e.weighting, energy, scaled)


@scale_output.register(Split)
def _(energy: Split, depth: int, factor: Any) -> Split:
    return Split(energy.residual, scale_output(energy.output, 1, factor))


def residual_part(energy: Energy) -> Energy:
    """The energy of the layers below the output."""
    if isinstance(energy, Split):
        return energy.residual
    return energy.hidden if isinstance(energy, CrossEntropy) else energy


def output_part(energy: Energy, depth: int) -> tuple[Energy, int]:
    """The energy of the output layer L = `depth`, and the index by which that knows it."""
    return (energy.output, 1) if isinstance(energy, Split) else (energy, depth)


def curvature(energy: Energy, index: int, error: Array) -> Array | None:
    """A positive definite ∂²E_l/∂ε_l² at the error of one sample, as a precision; `None` is 1."""
    if isinstance(energy, Separable):
        return energy.precision_at(index, error)
    if isinstance(energy, Gaussian):
        return energy.precision(index)
    raise InputError(f"{type(energy).__name__} has no positive definite curvature")


def named_energy(name: str, *, precisions: Numbers | None = None, parameter: Any = None) -> Energy:
    """The energy of that name: gaussian, log_cosh, pseudo_huber, student or divisive.

    Arguments: `precisions`; `parameter`, the δ of pseudo_huber and divisive and the scale of
    student, 1 unless given. Another h is a `CustomEnergy`, which has no name.

    Raises `IllPosedEnergyError` for the paper's `"log"` and for `"power"`, with the reason, and
    `InputError` for other names and a parameter of no use.
    """
    check_instance(name, "name", str, "the name of an energy")
    if name in _ILL_POSED:
        raise IllPosedEnergyError(_ILL_POSED[name])
    if name in _WITH_PARAMETER:
        return _WITH_PARAMETER[name](1.0 if parameter is None else parameter, precisions)
    if name not in _WITHOUT_PARAMETER:
        known = ", ".join((*_WITHOUT_PARAMETER, *_WITH_PARAMETER))
        raise InputError(f"unknown energy {name!r}; known are {known}")
    if parameter is not None:
        raise InputError(f"the energy {name} has no parameter, but {parameter} was given")
    return _WITHOUT_PARAMETER[name](precisions)


def name_of(energy: Energy) -> tuple[str, Array | None] | None:
    """Name and parameter from which `named_energy` makes this energy; `None` if it has no name."""
    for name, kind in _WITHOUT_PARAMETER.items():
        if type(energy) is kind:
            return name, None
    if isinstance(energy, PseudoHuber | Divisive):
        return ("pseudo_huber" if isinstance(energy, PseudoHuber) else "divisive"), energy.delta
    return ("student", energy.scale) if isinstance(energy, Student) else None


_WITHOUT_PARAMETER: dict[str, Any] = {"gaussian": Gaussian, "log_cosh": LogCosh}
_WITH_PARAMETER: dict[str, Any] = {
    "pseudo_huber": PseudoHuber,
    "student": Student,
    "divisive": Divisive,
}
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


def _refuse_ill_posed(seen: WellPosedness) -> None:
    if not seen.finite:
        raise IllPosedEnergyError(
            f"h or h' is not finite at ε = {seen.where:g}: prediction errors take any value and "
            f"sign. {_remedy(seen.where)}"
        )
    if not seen.bounded_below:
        raise IllPosedEnergyError(
            f"h still falls at ε = {seen.where:g}: an energy that is not bounded below has no "
            "equilibrium, and its flow runs away"
        )
    if seen.lipschitz is False:
        warnings.warn(
            f"h' is not Lipschitz near ε = {seen.where:g}: explicit steps chatter there, and "
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


def _weighting(precisions: Numbers | None) -> Gaussian:
    weighting = Gaussian(precisions)
    given = weighting.precisions if isinstance(weighting.precisions, tuple) else ()
    for index, precision in enumerate(given, start=1):
        if precision.ndim == 2:
            raise ShapeError(
                f"precision of layer {index} is a matrix, but this energy is a sum over units: "
                "give a number or one per unit"
            )
    return weighting


def _check_resolved(value: Array, name: str) -> None:
    """Raise `PrecisionError` unless a parameter, its square and their inverses are numbers.

    A problem converts it to the dtype of its network, in which it may vanish; h'' has its square.
    """
    _positive_number(value, name)
    least = float(jnp.finfo(value.dtype).tiny) ** 0.5
    if not is_traced(value) and not least <= float(value) <= 1 / least:
        raise PrecisionError(
            f"{name} is {float(value):g}, whose square or its inverse is out of the range of "
            f"{value.dtype}: take one between {least:.1e} and {1 / least:.1e}, or other units"
        )


def _positive_number(value: Numbers, name: str) -> Float[Array, ""]:
    number = checked_precision(value, name)
    if number.ndim != 0:
        raise ShapeError(f"{name} must be one number, got shape {number.shape}")
    return number


@jax.custom_jvp
def _log_cosh(error: Array) -> Array:
    # Near 0 log cosh is a difference of numbers near log 2; far out sinh overflows.
    size = jnp.abs(error)
    near = jnp.log1p(jnp.sinh(jnp.minimum(size, 1)) ** 2) / 2
    far = size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(jnp.asarray(2, error.dtype))
    return jnp.where(size < 1, near, far)


@_log_cosh.defjvp
def _log_cosh_jvp(primals: Any, tangents: Any) -> Any:
    (error,), (tangent,) = primals, tangents
    return _log_cosh(error), jnp.tanh(error) * tangent
