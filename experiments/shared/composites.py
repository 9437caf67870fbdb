"""The figures of the paper whose panels two experiments draw, put together from their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments.shared.experiment import find
from pcdyn.io.netcdf import read_dataset


@dataclasses.dataclass(frozen=True)
class Composite:
    """Two experiments side by side or one below the other, and the inches that each takes."""

    parts: tuple[str, str]
    widths: tuple[float, ...]
    heights: tuple[float, ...]

    def plot(self, folder: Path) -> Figure:
        """Draw the panels of both from their data below `folder`."""
        figure = plt.figure(figsize=(sum(self.widths), sum(self.heights)))
        places = figure.subfigures(
            len(self.heights), len(self.widths), width_ratios=self.widths,
            height_ratios=self.heights, squeeze=False,
        )  # fmt: skip
        for name, place in zip(self.parts, places.flat, strict=True):
            draw = find(name).draw
            assert draw is not None, "an experiment with other panels of its figure elsewhere"
            draw(place, read_dataset(folder / name / "data.nc"))
        return figure


COMPOSITES = {
    "figure1": Composite(
        ("figure1_target_propagation", "figure1_linear_equilibrium"), (8,), (3.2, 3.2)
    ),
    "figure2": Composite(("figure2_interpolation", "figure2_nonlinear"), (5.5, 4.5), (5,)),
    "figure3": Composite(("figure3_precision", "figure3_ratios"), (8,), (3.2, 6)),
    "figure4": Composite(("figure4_energies", "figure4_training"), (4.5, 7), (5.6,)),
}


def complete(folder: Path, drawn: Collection[str]) -> dict[str, Composite]:
    """Those with a part among the experiments just drawn, and the data of both below `folder`."""
    return {
        name: composite
        for name, composite in COMPOSITES.items()
        if set(drawn) & set(composite.parts)
        and all((folder / part / "data.nc").is_file() for part in composite.parts)
    }
