"""What `simulate` returns: activities in time, what follows from them, and how it was computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from pcdyn._support.arrays import as_host_array, is_traced
from pcdyn._support.checks import as_sequence, checked_number
from pcdyn._support.namespaces import array_namespace
from pcdyn._support.states import cosine
from pcdyn._support.types import Activities, Numbers, Scalar, Values
from pcdyn.errors import (
    DenseOutputError,
    ShapeError,
    Status,
    Statuses,
    TimesError,
    all_well,
    status_counts,
    worst_status,
)
from pcdyn.integrators.statistics import Statistics, WithStatistics
from pcdyn.model.energies.energy import LayerEnergies
from pcdyn.model.named import checked_layer
from pcdyn.model.network import Network

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.lines
    import xarray


@runtime_checkable
class HasActivities(Protocol):
    """What has activities x_0 … x_L, such as an equilibrium or a trajectory."""

    @property
    def activities(self) -> Activities:
        """The activities of all layers, the units on the last axis."""
        ...


# Activities x_0 … x_L, with `None` where they are not needed, or what has them.
Reference = Sequence[Numbers | None] | HasActivities
# Layers by their numbers, or nodes by their names.
Layers = Sequence[int | str]


class Trajectory(LayerEnergies, WithStatistics):
    """The activities of a network in time.

    Arrays are NumPy arrays on the host (JAX arrays under a transformation such as `jax.vmap`).
    Axes are time first, then the sample if there is a batch, then units or layers.

    - `times`: shape `(time,)`, in units of the activity time constant.
    - `activities`: `activities[l]` is layer l = 0 … L, shape `(time, [batch,] n_l)`, clamped
      layers included.
    - `prediction_errors`: `prediction_errors[l - 1]` is ε_l of layer l = 1 … L. With a prior on
      the input that of layer 0 comes first, here and in `energies`.
    - `energies`: E_1 … E_L, shape `(time, [batch,] L)`.
    - `vector_field_norms`: ‖dx_l/dt‖ of each free layer, shape `(time, [batch,] free layers)`.
    - `status_codes`: a `pcdyn.Status` as an integer, one for all or one per sample.
    - `end_time`: where integration ended, one for all or one per sample.
    - `statistics`: the `pcdyn.integrators.Statistics`, whose names are attributes here as well:
      `vector_field_evaluations`, `jacobian_evaluations`, `accepted_steps`, `rejected_steps`,
      `compile_seconds`, `run_seconds`.
    - `integrator`: its name; `fallback`: why another one took over, or an empty string.
    - `message`: how it ended, with the remedy if it failed.
    - `temperature`: that of the noise (`pcdyn.Langevin`), `None` without noise.
    - `free_layers`: the indices of the layers that were not clamped.
    - `targets`: those of the layers that prediction errors are of, in a graph of the nodes.
    - `outputs`: where the energies of the output stand, −1 in a chain.
    - `moving`: what moved besides activities, by name, with the time axis first: the flow's
      `pcdyn.Flow.moving`.
    - `network`: of those the network, where weights move; otherwise `None`.
    - `precisions`: where precisions move, `precisions[l - 1]` is Π_l with the time axis first, as
      in `pcdyn.Gaussian`: a number, a diagonal or a matrix; otherwise `None`.
    - `round_off`: by how much round-off may have moved any activity, estimated, where the
      integrator knows (`pcdyn.Exact`); otherwise `None`. It is not written to files.

    With `per_sample=True` a sample that ended at equilibrium keeps its last state at later times,
    and one that failed is NaN after its end; so does each network under `jax.vmap`. A trajectory
    of several networks (`networks` of them) has their axis before all others: it prints, draws and
    is saved as a whole, and `jax.tree.map(lambda x: x[0], trajectory)` is that of the first.
    """

    times: Values
    activities: Activities
    prediction_errors: Activities
    energies: Values
    vector_field_norms: Values
    status_codes: Values
    end_time: Scalar
    statistics: Statistics = Statistics()
    interpolation: Callable[[Scalar], Activities] | None = None
    moving: dict[str, PyTree] = eqx.field(default_factory=dict)
    round_off: Values | None = None
    temperature: Scalar | None = None
    integrator: str = eqx.field(static=True, default="")
    fallback: str = eqx.field(static=True, default="")
    message: str = eqx.field(static=True, default="")
    free_layers: tuple[int, ...] = eqx.field(static=True, default=())
    targets: tuple[int, ...] = eqx.field(static=True, default=())
    outputs: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    def _outputs(self) -> tuple[int, ...]:
        return self.outputs

    @property
    def network(self) -> Network | None:
        """Network in time where weights moved, otherwise `None`."""
        return self.moving.get("network")

    @property
    def precisions(self) -> tuple[Values, ...] | None:
        """Precisions Π_1 … Π_L in time where they moved, otherwise `None`."""
        return self.moving.get("precisions")

    @property
    def status(self) -> Status | tuple[Status, ...]:
        """Outcome: one `pcdyn.Status`, or one per sample with `per_sample=True`.

        Those of several networks stand one after the other.
        """
        codes = np.asarray(self.status_codes)
        if codes.ndim == 0:
            return Status(int(codes))
        return Statuses(Status(int(code)) for code in codes.ravel())

    @property
    def networks(self) -> int | None:
        """Number of networks, where `jax.vmap` made it of several; otherwise `None`."""
        return np.shape(self.times)[0] if np.ndim(self.times) == 2 else None

    @property
    def without_failure(self) -> np.ndarray | None:
        """Mask of the networks that ended well in every sample; `None` of one network."""
        return None if self.networks is None else all_well(Status, self.status_codes)

    @property
    def ok(self) -> bool:
        """Whether every sample was integrated to its end without a failure."""
        return worst_status(self.status_codes).ok

    @property
    def final(self) -> Activities:
        """Activities x_0 … x_L at the last saved time; raises `TimesError` if there is none."""
        # Before the axis of time is that of several networks, if there are any.
        *networks, count = np.shape(self.times)
        if count == 0:
            raise TimesError(f"no time was saved before the run ended: {self.message}")
        last = (*[slice(None)] * len(networks), -1)
        return jax.tree.map(lambda x: x[last], self.activities)

    def distance_to(self, reference: Reference, *, layers: Layers | None = None) -> Values:
        """Compute the Euclidean distance of the activities from `reference`.

        **Arguments:**

        - `reference`: activities x_0 … x_L (entries may be `None` where not needed), or anything
          with such `activities`. Without a time axis it is held constant in time.
        - `layers`: those to compare, by number or by name; the free ones unless given.

        **Returns:**

        The distances, shape `(time, [batch])`.

        **Raises:**

        - `ShapeError` for a reference or layers that do not fit, and for several networks.
        - `TimesError` for a trajectory saved at other times.
        """
        here, there = self._pair(reference, layers)
        return array_namespace(here).linalg.norm(here - there, axis=-1)

    def cosine_to(self, reference: Reference, *, layers: Layers | None = None) -> Values:
        """Compute the cosine similarity with `reference`; arguments as for `distance_to`.

        NaN where either vanishes, for it has no direction there.
        """
        return cosine(*self._pair(reference, layers))

    def angle_to(self, reference: Reference, *, layers: Layers | None = None) -> Values:
        """Compute the angle to `reference` in radians; arguments as for `distance_to`."""
        cosines = self.cosine_to(reference, layers=layers)
        xp = array_namespace(cosines)
        return xp.arccos(xp.clip(cosines, -1, 1))

    def _pair(self, reference: Reference, layers: Layers | None) -> tuple[Values, Values]:
        """Both as arrays of shape (time, [batch,] units) that fit together."""
        self._one_network()
        wanted = "activities x_0 … x_L, or what has them, such as an Equilibrium or a Trajectory"
        there = as_sequence(getattr(reference, "activities", reference), "reference", wanted)
        if len(there) != len(self.activities):
            raise ShapeError(
                f"the reference has {len(there)} layers, the trajectory {len(self.activities)}; "
                "give all activities x_0 … x_L, with None where not needed"
            )
        self._check_same_times(reference)
        chosen = self.free_layers if layers is None else self._checked_layers(layers)
        xp = jnp if is_traced(there) else array_namespace(self.times)
        here = xp.concatenate([self.activities[i] for i in chosen], axis=-1)
        parts = [_layer_of(there[i], i, xp) for i in chosen]
        if len({part.shape[:-1] for part in parts}) != 1:
            raise ShapeError(
                f"the layers of the reference have the shapes {[part.shape for part in parts]}, "
                "which differ in their times or samples"
            )
        stacked = xp.concatenate(parts, axis=-1)
        if isinstance(reference, Trajectory):
            # One sample against a batch: the same for every sample, time by time.
            if (here.ndim, stacked.ndim) == (3, 2):
                stacked = stacked[:, None]
            fits = stacked.ndim == here.ndim and stacked.shape[1:] in (
                here.shape[1:],
                (1, here.shape[-1]),
            )
        else:
            fits = stacked.shape in (here.shape, here.shape[1:], here.shape[-1:])
        if not fits:
            raise ShapeError(
                f"the reference of shape {stacked.shape} does not fit the trajectory of shape "
                f"{here.shape}: (time, [batch,] units of the layers that are compared)"
            )
        return here, xp.broadcast_to(stacked, here.shape)

    def _checked_layers(self, layers: Layers) -> tuple[int, ...]:
        most = len(self.activities) - 1
        chosen = tuple(
            checked_layer(self.activities, index, "each of layers")
            for index in as_sequence(layers, "layers", "a list of layers, by number or name")
        )
        if not chosen:
            raise ShapeError(f"layers is empty: name some of 0 … {most}, or leave it out")
        return chosen

    def _check_same_times(self, reference: Reference) -> None:
        if not isinstance(reference, Trajectory) or is_traced(self.times, reference.times):
            return
        mine, theirs = np.asarray(self.times), np.asarray(reference.times)
        if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=1e-6, atol=0):
            raise TimesError(
                "the two trajectories are saved at different times; simulate both with the same "
                "t1 and times"
            )

    def _one_network(self) -> None:
        if not is_traced(self.times) and np.ndim(self.times) != 1:
            raise ShapeError(
                "this is asked of one network, and the trajectory is of several networks: take "
                "one, such as "
                "jax.tree.map(lambda x: x[0], trajectory)"
            )

    def __call__(self, t: Scalar) -> Activities:
        """Evaluate the activities x_0 … x_L at a time between 0 and the end, by dense output.

        A sample that ended before the others is held, or NaN if it failed.

        **Raises:**

        - `DenseOutputError` without `dense=True`.
        - `TimesError` outside that range.
        """
        self._one_network()
        if self.interpolation is None:
            raise DenseOutputError(
                "this trajectory holds its saved times only: simulate with dense=True, or name "
                "the times you need"
            )
        if not is_traced(t, self.end_time):
            end = float(np.max(np.asarray(self.end_time)))
            what = "t, a time of the integrated range,"
            known = checked_number(t, what, at_least=0, error=TimesError)
            latest = end * (1 + round_off(t))
            t = min(checked_number(known, what, at_most=latest, error=TimesError), end)
        return self.interpolation(t)

    def plot(
        self,
        ax: matplotlib.axes.Axes | None = None,
        *,
        layer: int | str | None = None,
        sample: int = 0,
        equilibrium: Reference | None = None,
    ) -> list[matplotlib.lines.Line2D]:
        """Draw the activities of the free layers; see `pcdyn.plotting.activities`."""
        # plotting stands above this module: importing it here keeps matplotlib out of start-up.
        import pcdyn

        return pcdyn.plotting.activities(
            self, ax=ax, layer=layer, sample=sample, equilibrium=equilibrium
        )

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled data set with named dimensions and units (`pcdyn.io.trajectories`)."""
        import pcdyn

        return pcdyn.io.trajectories.to_xarray(self)

    def to_netcdf(self, path: str | os.PathLike[str]) -> None:
        """Write to a NetCDF file, at once or not at all: `pcdyn.save`."""
        import pcdyn

        pcdyn.save(self, path)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Write a readable account, for all samples together."""
        if is_traced(self.times):
            return f"Trajectory with {self.integrator} inside of a JAX transformation"
        if self.networks is not None:
            return self._summary_of_networks(self.networks)
        widths = [x.shape[-1] for x in self.activities]
        batch = self.energies.shape[1] if np.ndim(self.energies) == 3 else None
        samples = "one sample" if batch is None else f"{batch} samples"
        if len(self.times) == 0:
            return f"Trajectory of {widths} units, {samples}, no saved times: {self.message}"
        energy = ""
        if self.energies.shape[-1]:
            first, last = np.mean(self.free_energy[0]), np.mean(self.free_energy[-1])
            energy = f"free energy {first:.4g} -> {last:.4g}, "
        lines = [
            f"Trajectory of {widths} units, {samples}, {len(self.times)} times from "
            f"{self.times[0]:g} to {self.times[-1]:g}",
            f"  {self.integrator}: {self.message}",
            f"  evaluations {_total(self.vector_field_evaluations)}, steps accepted "
            f"{_total(self.accepted_steps)}, rejected {_total(self.rejected_steps)}",
            f"  {energy}largest vector field at the end {np.max(self.vector_field_norms[-1]):.2g}",
            f"  compiled in {self.compile_seconds:.2f} s, ran in {self.run_seconds:.3g} s",
        ]
        if self.fallback:
            lines.insert(2, f"  fell back to {self.fallback}")
        if self.temperature is not None:
            lines.insert(2, _of_noise(self.temperature))
        return "\n".join(lines)

    def _summary_of_networks(self, networks: int) -> str:
        """Counts of how they ended, and medians over those without a failure."""
        widths, ok = [x.shape[-1] for x in self.activities], all_well(Status, self.status_codes)
        samples = f"{self.energies.shape[2]} samples" if self.energies.ndim == 4 else "one sample"
        lines = [
            f"Trajectory of {networks} networks of {widths} units, {samples}, "
            f"{self.times.shape[1]} times to {np.max(self.times[:, -1]):g}",
            f"  {self.integrator}: {status_counts(self.status)}",
        ]
        if self.temperature is not None:
            lines.append(_of_noise(self.temperature))
        if not ok.any():
            return "\n".join([*lines, "  no network without a failure"])

        def median(values: Scalar | None) -> str:
            return "not reported" if values is None else f"{np.median(np.asarray(values)[ok]):.4g}"

        lines.append(
            f"  medians: evaluations {median(self.vector_field_evaluations)}, steps accepted "
            f"{median(self.accepted_steps)}, rejected {median(self.rejected_steps)}"
        )
        if self.energies.shape[-1]:
            first, last = median(self.free_energy[:, 0]), median(self.free_energy[:, -1])
            lines.append(f"  median free energy {first} -> {last}")
        return "\n".join(lines)


def _of_noise(temperature: Scalar) -> str:
    low, high = float(np.min(np.asarray(temperature))), float(np.max(np.asarray(temperature)))
    each = f"{low:g}" if low == high else f"{low:g} … {high:g}"
    return f"  with noise of the temperature {each}"


def round_off(*times: Numbers) -> float:
    """By how much, relative to them, times that are meant to be equal can differ in their dtypes.

    A few eps: 3 · 0.1 > 0.3, and every second float32 is above its decimal.
    """
    dtypes = [np.asarray(t).dtype for t in times]
    floats = [dtype if jnp.issubdtype(dtype, jnp.floating) else np.dtype(float) for dtype in dtypes]
    return 4 * max(float(jnp.finfo(dtype).eps) for dtype in floats)


def _layer_of(values: Numbers | None, index: int, xp: ModuleType) -> Values:
    """A layer of a reference as an array of JAX or NumPy with an axis of units."""
    if values is None:
        raise ShapeError(f"the reference has no layer {index}, which is compared")
    name = f"layer {index} of the reference"
    is_array = isinstance(values, np.ndarray | jax.Array)
    if is_array and jnp.issubdtype(values.dtype, jnp.floating):
        array = xp.asarray(values)
    else:
        array = xp.asarray(as_host_array(values, name, finite=False))
    if array.ndim == 0:
        raise ShapeError(f"{name} is a single number, not one for each unit")
    return array


def _total(count: Scalar | None) -> str:
    return "not reported" if count is None else str(int(np.sum(count)))
