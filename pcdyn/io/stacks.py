"""Results of several networks: a data set of each, along the dimension `network`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np

from pcdyn.equilibria.equilibrium import Equilibrium
from pcdyn.errors import ShapeError
from pcdyn.simulation.trajectory import Trajectory

if TYPE_CHECKING:
    import xarray

NETWORK = "network"
# Attributes of one network's data set that may differ between networks.
_SECONDS = ("compile_seconds", "run_seconds")
_Result = TypeVar("_Result", Trajectory, Equilibrium)


def stacked_dataset(
    result: _Result, to_xarray: Callable[[_Result], xarray.Dataset]
) -> xarray.Dataset:
    """Convert a result of several networks; raise `ShapeError` if their times differ."""
    import xarray

    assert result.networks is not None, "of several networks"
    each: list[xarray.Dataset] = []
    for i in range(result.networks):
        # Seconds that nothing has measured are one number for all.
        one = to_xarray(jax.tree.map(lambda x, i=i: np.asarray(x)[i] if np.ndim(x) else x, result))
        each.append(one.assign({name: one.attrs.pop(name) for name in _SECONDS}))
    try:
        return xarray.concat(
            each, NETWORK, data_vars="all", coords="minimal", compat="override", join="exact",
            combine_attrs="override",
        )  # fmt: skip
    except ValueError as error:
        raise ShapeError(f"the networks have no data set in common ({error})") from error


def unstacked_result(
    dataset: xarray.Dataset, from_xarray: Callable[[xarray.Dataset], _Result]
) -> _Result:
    """Make the result of several networks from their data set."""
    each = []
    for i in range(dataset.sizes[NETWORK]):
        one = dataset.isel({NETWORK: i})
        seconds = {name: float(one[name]) for name in _SECONDS if name in one}
        each.append(from_xarray(one.drop_vars(seconds).assign_attrs(seconds)))
    return jax.tree.map(lambda *x: np.stack(x), *each)
