"""The panels of the figure of `interpolation`.

Blue is the feedforward pass or BP, orange TP; the higher a layer, the darker.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray
from matplotlib import colormaps
from matplotlib.axes import Axes

_SHADES = {"start": "Blues", "tp": "Oranges"}
_WORDS = {"start": "feedforward pass or BP", "tp": "TP"}


def cosines(ax: Axes, here: xarray.Dataset, what: str, start: str) -> None:
    """Cosines of the activities or weight gradients of each layer to those of both ends."""
    for end, name in (("start", start), ("tp", "tp")):
        values = here[f"{what}_cosine_{name}"]
        if what == "gradient" and end == "tp":
            # In the output layer BP and TP are the same.
            values = values.isel(layer=slice(None, -1))
        _layers(ax, here, values.mean("network"), end)
        last = values.isel({values.dims[-1]: -1}, drop=True)
        low, high = last.quantile([0.1, 0.9], dim="network").values
        ax.fill_between(here.path, low, high, color=ax.lines[-1].get_color(), alpha=0.15, lw=0)
    ax.set(ylabel="cosine (mean)", ylim=(-1, 1.05))


def distances(ax: Axes, here: xarray.Dataset) -> None:
    """Relative distances to both ends."""
    _layers(ax, here, here.error_distance_bp.median("network"), "start")
    _layers(ax, here, here.way_to_tp.median("network"), "tp")
    ax.set(yscale="log", ylabel="relative distance (median)")


def _layers(ax: Axes, here: xarray.Dataset, values: xarray.DataArray, end: str) -> None:
    layers = values[str(values.dims[-1])]
    for layer in layers.values:
        shade = colormaps[_SHADES[end]](0.2 + 0.25 * layer)
        curve = values.sel({layers.name: layer})
        ax.plot(here.path, curve, color=shade, label=f"to {_WORDS[end]}, layer {layer}")


def wide(ax: Axes, data: xarray.Dataset, hidden: str, candidates: Mapping[str, str]) -> None:
    """Distances of layer L − 1 to what it might tend to where W is wide."""
    odds = data.path.sel(family="lambda")
    for (name, words), dashes in zip(candidates.items(), ("--", "-"), strict=True):
        curve = data[f"wide_{hidden}_{name}"].median("network")
        ax.loglog(odds, curve, dashes, color="black", label=words)
    ax.set(xlabel="λ/(1 − λ)", ylabel="relative distance (median)")
    ax.legend(loc="lower left", fontsize=8)
