"""What `stability` returns: time scales, modes, and the steps and integrators that suit them."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import equinox as eqx
import jax
import numpy as np

from pcdyn._support.arrays import is_traced
from pcdyn._support.namespaces import array_namespace
from pcdyn._support.types import Values
from pcdyn.errors import ShapeError
from pcdyn.integrators import Integrator
from pcdyn.integrators.stability_function import stability_interval

if TYPE_CHECKING:
    import diffrax
    import matplotlib.axes
    import matplotlib.lines
    import xarray

# An explicit method takes about as many steps as the stiffness to cover one slowest relaxation
# time, divided by its stability interval (2 to 5); accuracy asks for some tens anyway.
_MILDLY_STIFF = 100.0
_STIFF = 2000.0
_MOST_LAYERS_NAMED = 4


class Stability(eqx.Module):
    """The linearised flow `τ dδ/dt = −H δ` around states of a problem, H = ∂²F/∂x².

    Of any other flow, `dδ/dt = J δ` with J the Jacobian of its vector field, which need not be
    symmetric: then the rates are complex, and each mode oscillates with the imaginary part of its
    rate as it decays with the real part.

    Arrays are NumPy arrays on the host (JAX arrays under a transformation). Axes are time first,
    for a spectrum along a trajectory, then the sample if there is a batch. Rates are in
    1/(activity time constant).

    - `rates`: the decay rates, eigenvalues of τ⁻¹H or of −J, in ascending order (of their real
      parts) on the last axis. A negative one grows: the state is no minimum. All N of them if
      `complete`, otherwise only the first and the last. NaN where a sample is `at_kink`.
    - `slowest_mode`, `fastest_mode`: the share of each free layer (of each array of the state of
      another flow) in the squared norm of the mode with the smallest and with the largest rate, on
      the last axis.
    - `at_kink`: whether a sample rests where an activation has a kink, so that the flow has no
      linearisation there.
    - `times`: of a spectrum along a trajectory, otherwise `None`.
    - `units`: N, the number of free activities. `free_layers`: their layers; of another flow, the
      numbers of all that moves and the indices of the arrays of its state.
    - `at`: where the flow was linearised.

    Those of several networks with a batch or a trajectory (`networks` of them), which `jax.vmap`
    makes, have their axis before all others; without, networks count as samples.
    """

    rates: Values
    slowest_mode: Values
    fastest_mode: Values
    at_kink: Values
    times: Values | None = None
    units: int = eqx.field(static=True, default=0)
    complete: bool = eqx.field(static=True, default=True)
    free_layers: tuple[int, ...] = eqx.field(static=True, default=())
    at: str = eqx.field(static=True, default="")

    @property
    def slowest_rate(self) -> Values:
        """The smallest rate, or real part of one; negative at a saddle."""
        return self._decay[..., 0]

    @property
    def fastest_rate(self) -> Values:
        """The largest rate, or real part of one, which bounds the step of explicit methods."""
        return self._decay[..., -1]

    @property
    def relaxation_times(self) -> Values:
        """1 / `rates`, or real parts; infinite where one is not positive (within round-off)."""
        return _reciprocal(self._decay, self._decay > self._round_off)

    @property
    def condition_number(self) -> Values:
        """The largest |rate| over the smallest; infinite with a flat direction."""
        xp = self._module
        # The smallest |rate| of a saddle may lie between the extremes: then it is not known.
        known = self.complete or xp.all(self._decay > -self._round_off, axis=-1)
        sizes = xp.abs(self.rates)
        smallest = xp.min(sizes, axis=-1, keepdims=True)
        flat = smallest <= self._round_off
        number = xp.max(sizes, axis=-1) * _reciprocal(smallest, ~flat)[..., 0]
        return xp.where(known, number, xp.nan)

    @property
    def stiffness(self) -> Values:
        """The fastest rate times the longest finite relaxation time: how far time scales lie apart.

        Zero where nothing relaxes; NaN where the smallest positive rate is not known.
        """
        xp = self._module
        positive = self._decay > self._round_off
        smallest = xp.min(xp.where(positive, self._decay, xp.inf), axis=-1)
        ratio = self.fastest_rate * _reciprocal(smallest, xp.ones(smallest.shape, bool))
        known = ~self.at_kink
        if not self.complete:
            known = known & xp.any(positive[..., :1], axis=-1)
        return xp.where(known, xp.where(xp.any(positive, axis=-1), ratio, 0), xp.nan)

    @property
    def unstable(self) -> Values:
        """Whether a rate is negative beyond round-off: the state is a saddle or a maximum."""
        return self._module.any(self._decay < -self._round_off, axis=-1)

    @property
    def largest_euler_step(self) -> Values:
        """2 / `fastest_rate` where rates are real: with any larger step explicit Euler diverges."""
        return self.largest_step("euler")

    def largest_step(self, method: str | Integrator | diffrax.AbstractSolver) -> Values:
        """Compute the largest step with which a method damps every mode that the flow damps.

        The bound is the length of the real stability interval over `fastest_rate` (of complex
        rates, the least over all of how far the stability region reaches in the direction of one);
        it is infinite for implicit methods, and where nothing decays. Accuracy is another matter.

        **Arguments:**

        - `method`: a name (`"heun"`, `"tsit5"`, `"kvaerno5"`, …), a diffrax solver,
          `pcdyn.Euler(dt=…)` or `pcdyn.Diffrax(…)`.

        **Returns:**

        One step for each linearised state, in units of the activity time constant.

        **Raises:**

        - `IntegratorError` for methods that are no Runge–Kutta methods of diffrax.
        """
        if self._is_complex:
            return self._largest_step_of_complex(method)
        xp, interval = self._module, stability_interval(method)
        if np.isinf(interval):
            return xp.where(self.at_kink, xp.nan, xp.full_like(self.fastest_rate, xp.inf))
        decays = self.fastest_rate > self._round_off[..., 0]
        return interval * _reciprocal(self.fastest_rate, decays)

    def _largest_step_of_complex(self, method: str | Integrator | diffrax.AbstractSolver) -> Values:
        """`largest_step` where rates are complex, mode by mode."""
        decays = self._decay > self._round_off
        sizes = np.where(decays, np.abs(self.rates), 1)
        # A rate and its conjugate bound the step alike.
        real = np.abs(self.rates.imag) <= self._round_off
        rays = np.where(real, 1, (self._decay + 1j * np.abs(self.rates.imag)) / sizes)
        rays, places = np.unique(np.where(decays, rays, 1), return_inverse=True)
        intervals = np.array([stability_interval(method, complex(ray)) for ray in rays])
        steps = np.where(decays, intervals[places.reshape(decays.shape)] / sizes, np.inf)
        return cast(Values, steps.min(axis=-1))

    @property
    def verdict(self) -> str:
        """Whether the samples are stiff, by the worst of them, and what to use, in words."""
        worst = _largest(self.stiffness)
        if np.isnan(worst):
            return "stiffness not known"
        if worst < _MILDLY_STIFF:
            word, advice = "not stiff", 'an explicit method such as "tsit5"'
        elif worst < _STIFF:
            word = "mildly stiff"
            advice = 'explicit ("tsit5") or implicit ("kvaerno5"): pcdyn.compare measures both'
        else:
            word, advice = "stiff", 'an implicit method such as "rodas5p" or "lsoda"'
        return f"{word} (fastest over slowest {worst:.3g}): {advice}"

    @property
    def recommended(self) -> str:
        """The family of integrators by the verdict: `"explicit"`, `"either"` or `"implicit"`."""
        worst = _largest(self.stiffness)
        if np.isnan(worst) or _MILDLY_STIFF <= worst < _STIFF:
            return "either"
        return "explicit" if worst < _MILDLY_STIFF else "implicit"

    def summary(self) -> str:
        """Return the rates, the modes and the stable steps in words, over all samples."""
        if is_traced(self.rates):
            return "Stability under a transformation of JAX: no numbers yet"
        lines = [
            f"Stability at {self.at}: {self.units} units in the {self._kind}s {self.free_layers}, "
            f"{self._population}",
            f"  {self.verdict}",
            f"  decay rates {_range(self.slowest_rate)} (slowest) to {_range(self.fastest_rate)} "
            f"(fastest), condition number {_range(self.condition_number)}",
            f"  longest relaxation time {_range(self.relaxation_times[..., 0])}",
            f"  slowest mode {self._layers(self.slowest_mode)}",
            f"  fastest mode {self._layers(self.fastest_mode)}",
            "  largest stable step " + ", ".join(
                f"{name} {_smallest(self.largest_step(name)):.3g}"
                for name in ("euler", "heun", "bosh3", "tsit5", "dopri8")
            ) + "; implicit methods: any",
        ]  # fmt: skip
        count = np.size(self.at_kink)
        if not self.complete:
            lines.insert(1, "  by Lanczos iterations: only the slowest and the fastest rate")
        if np.any(self.unstable):
            where = (
                "left by the flow" if self._is_complex else "saddles or maxima of the free energy"
            )
            lines.insert(1, f"  UNSTABLE: {np.sum(self.unstable)} of {count} states are {where}, "
                            "with rates below zero")  # fmt: skip
        if self._is_complex and np.any(self.rates.imag):
            fastest = _range(np.max(np.abs(self.rates.imag), axis=-1))
            lines.insert(-1, f"  modes oscillate at up to {fastest} radians per unit of time")
        if np.any(self.at_kink):
            lines.insert(1, f"  {np.sum(self.at_kink)} of {count} samples rest at a kink of an "
                            "activation and have no linearisation: left out")  # fmt: skip
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> list[matplotlib.lines.Line2D]:
        """Draw the decay rates of all states, or their real parts; see `plotting.decay_rates`."""
        import pcdyn

        rows = self._decay.reshape(-1, self._decay.shape[-1])
        return pcdyn.plotting.decay_rates(rows, ax=ax)

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled data set: dimensions `time`, `sample`, `rate` and `free_layer`.

        That of several networks has the dimension `network` first; their times must be the same.
        """
        import xarray

        if self.networks is not None:
            each: list[xarray.Dataset] = [
                jax.tree.map(lambda x, i=i: x[i], self).to_xarray() for i in range(self.networks)
            ]
            try:
                return xarray.concat(each, "network", join="exact")
            except ValueError as error:
                raise ShapeError(f"the networks have no data set in common ({error})") from error
        axes = () if self.times is None else ("time",)
        axes += ("sample",) if np.ndim(self.rates) > len(axes) + 1 else ()
        per_state = ("slowest_rate", "fastest_rate", "condition_number", "stiffness", "unstable",
                     "at_kink", "largest_euler_step")  # fmt: skip
        data: dict[str, Any] = {name: (axes, np.asarray(getattr(self, name))) for name in per_state}
        for name in ("rates", "relaxation_times"):
            data[name] = ((*axes, "rate"), np.asarray(getattr(self, name)))
        for name in ("slowest_mode", "fastest_mode"):
            data[name] = ((*axes, "free_layer"), np.asarray(getattr(self, name)))
        coords: dict[str, Any] = {"free_layer": list(self.free_layers)}
        if self.times is not None:
            coords["time"] = np.asarray(self.times)
        attrs = {"at": self.at, "units": self.units, "complete": int(self.complete)}
        return xarray.Dataset(data, coords, attrs)

    @property
    def _decay(self) -> Values:
        """The real parts of the rates."""
        return self.rates.real

    @property
    def networks(self) -> int | None:
        """How many networks it is of; `None` for one."""
        several = np.ndim(self.rates) > 2 if self.times is None else np.ndim(self.times) > 1
        return len(self.rates) if several else None

    @property
    def _is_complex(self) -> bool:
        """Whether the rates are complex numbers: those of any flow but inference."""
        return np.iscomplexobj(self.rates)

    @property
    def _kind(self) -> str:
        """What the state is made of."""
        return "array" if self._is_complex else "layer"

    @property
    def _module(self) -> ModuleType:
        return array_namespace(self.rates)

    @property
    def _round_off(self) -> Values:
        """What is zero within round-off beside the largest rate, with an axis for the rates."""
        largest = self._module.max(self._module.abs(self.rates), axis=-1, keepdims=True)
        return self.units * float(np.finfo(self.rates.dtype).eps) * largest

    @property
    def _population(self) -> str:
        rest = list(np.shape(self.at_kink))
        networks = "" if self.networks is None else f"{rest.pop(0)} networks, "
        times = "" if self.times is None else f"{rest.pop(0)} times, "
        return networks + times + (f"{rest[0]} samples" if rest else "one sample")

    def _layers(self, shares: Values) -> str:
        """The mean share of each layer, over everything that is not NaN."""
        rows = np.reshape(np.asarray(shares), (-1, len(self.free_layers)))
        rows = rows[~np.isnan(rows).any(axis=-1)]
        if not len(rows):
            return "not known"
        means = rows.mean(axis=0)
        largest = sorted(np.argsort(-means, kind="stable")[:_MOST_LAYERS_NAMED])
        return ", ".join(f"{self._kind} {self.free_layers[i]} {means[i]:.0%}" for i in largest)


def _reciprocal(values: Values, finite: Values) -> Values:
    """1 / values, infinite where not `finite`; NaN stays NaN."""
    xp = array_namespace(values)
    safe = xp.where(finite, values, 1)
    return xp.where(finite, 1 / safe, xp.where(xp.isnan(values), xp.nan, xp.inf))


def _known(values: Values) -> np.ndarray:
    flat = np.ravel(np.asarray(values))
    return flat[~np.isnan(flat)]


def _largest(values: Values) -> float:
    known = _known(values)
    return float(known.max()) if known.size else float("nan")


def _smallest(values: Values) -> float:
    known = _known(values)
    return float(known.min()) if known.size else float("nan")


def _range(values: Values) -> str:
    low, high = _smallest(values), _largest(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
