"""An experiment as a value, and all of them, found in their folders."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure, FigureBase

from pcdyn._support.checks import checked_integer
from pcdyn.errors import InputError
from pcdyn.theory import Evidence


class Settings(Protocol):
    """A frozen dataclass: every number that decides what is run."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=Settings)
Draw = Callable[[FigureBase, xarray.Dataset], None]


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[Config]):
    """One figure with its data: what each module of `paper` and `beyond` ends with.

    Arguments:

    - `name`: that of its module, of its folder of outputs, and on the command line.
    - `panels`: which panels of the paper it draws, the heading in the index.
    - `presets`: settings by name, all different; `"paper"` is among them.
    - `fast`: which settings a quick version has instead.
    - `run`: makes the data of some settings.
    - `check`, `plot`: the claims and the picture, in the style of all, of these data alone.
    - `summary`: the text of the index in place of the table of claims.
    - `page`: a page of its own, given the folder it will be in.
    - `draw`: the panels of the paper on a part of a larger figure, for `composites`.
    """

    name: str
    panels: str
    presets: Mapping[str, Config]
    fast: Mapping[str, Any]
    run: Callable[[Config], xarray.Dataset]
    check: Callable[[xarray.Dataset], Sequence[Evidence]]
    plot: Callable[[xarray.Dataset], Figure]
    summary: Callable[[xarray.Dataset], str] | None = None
    page: Callable[[xarray.Dataset, Path], str] | None = None
    draw: Draw | None = None

    def __post_init__(self) -> None:
        chosen = list(self.presets.values())
        if any(one in chosen[:i] for i, one in enumerate(chosen)):
            raise InputError(f"two presets of {self.name} are equal: leave one out")

    def settings(self, preset: str = "paper", *, fast: bool = False) -> Config:
        """The settings of a preset, or of its quick version.

        Raises `InputError` if there is no such preset.
        """
        if preset not in self.presets:
            known = " and ".join(map(repr, self.presets))
            raise InputError(f"{self.name} has no preset {preset!r}: choose {known}")
        chosen = self.presets[preset]
        return dataclasses.replace(chosen, **self.fast) if fast else chosen


def alone(draw: Draw, width: float, height: float) -> Callable[[xarray.Dataset], Figure]:
    """The `plot` that draws on a figure of its own, of this size in inches."""

    def plot(data: xarray.Dataset) -> Figure:
        figure = plt.figure(figsize=(width, height))
        draw(figure, data)
        return figure

    return plot


def names(part: str) -> tuple[str, ...]:
    """Of the modules of `"paper"`, `"beyond"` or `"benchmarks"`, each of which is one of them.

    Other modules there begin with an underscore.
    """
    found = pkgutil.iter_modules([str(Path(__file__).parents[1] / part)])
    return tuple(module.name for module in found if not module.name.startswith("_"))


def find(name: str) -> Experiment[Any]:
    """The experiment of this name, of which only its own module is imported.

    Raises `InputError` if there is none.
    """
    for part in ("paper", "beyond"):
        if name in names(part):
            return importlib.import_module(f"experiments.{part}.{name}").EXPERIMENT
    known = ", ".join((*names("paper"), *names("beyond")))
    raise InputError(f"unknown experiment {name}; known: {known}")


def check_settings(name: str, settings: Settings) -> None:
    """Raise `InputError` for counts below 1, a seed below 0 and numbers that are not finite."""
    for field, value in _numbers(settings):
        where = f"{name}: {field}"
        if isinstance(value, int):
            checked_integer(value, where, at_least=0 if field.endswith("seed") else 1)
        elif not math.isfinite(value):
            raise InputError(f"{where} is {value}: give a finite number")


def _numbers(settings: Settings) -> Iterator[tuple[str, int | float]]:
    """Every number of the settings with the name of its field, those of tuples one by one."""
    for field in dataclasses.fields(settings):
        rest = [vars(settings)[field.name]]
        while rest:
            value = rest.pop()
            if isinstance(value, tuple):
                rest.extend(value)
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                yield from ((f"{field.name}.{n}", v) for n, v in _numbers(value))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield field.name, value
