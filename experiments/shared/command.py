"""What `python -m experiments` does: run, save, check, draw, and go on where one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import matplotlib
import tyro
from tqdm import tqdm

import pcdyn
from experiments.shared.composites import complete
from experiments.shared.experiment import Experiment, Settings, check_settings, find, names
from experiments.shared.index import table, write_index
from experiments.shared.saving import (
    facts,
    save_data,
    save_json,
    save_picture,
    save_run,
    save_text,
    values_hash,
)
from pcdyn._support.files import read_bytes
from pcdyn.errors import DataError, InputError
from pcdyn.io.netcdf import read_dataset
from pcdyn.theory import Evidence

_Parsed = TypeVar("_Parsed")

_ABOUT = """Run experiments, save data, pictures and manifests, and print the table of claims.

The settings of an experiment that is named are options as well: `python -m experiments fixed_point
--networks 10`, or of several `python -m experiments fixed_point figure5 --fixed_point.networks 10`.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run, and where to save it."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Experiments to run; the paper's figures unless given. `list` names them all."""
    preset: str = "paper"
    """Settings of the paper (as corrected), or `authors`, those of their code where they differ."""
    fast: bool = False
    """The same code on fewer networks."""
    redraw: bool = False
    """Check, draw and describe the data that are saved already, without running anything."""
    output: Path | None = None
    """Folder for data, pictures and manifests; one of its own under `build` unless given. Those of
    the repository are drawn with `--output paper_figures` and the full data."""

    @property
    def folder(self) -> Path:
        """Where to save."""
        if self.output is not None:
            return self.output
        preset = "" if self.preset == "paper" else f"-{self.preset}"
        return Path("build") / f"figures{preset}{'-fast' if self.fast else ''}"


def configure() -> None:
    """Float64, a persistent compilation cache, and a backend that needs no screen."""
    jax.config.update("jax_enable_x64", True)
    # Without a folder of the user's to write to there is none.
    with contextlib.suppress(DataError):
        pcdyn.compilation_cache()
    matplotlib.use("agg")


def main(arguments: Sequence[str]) -> int:
    """Run; the exit status: 1 if an experiment or a claim that should hold failed, 2 bad input."""
    # Before any module of an experiment is imported, for some make arrays.
    configure()
    try:
        options, chosen = parse(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.names == ("list",):
        print("figures of the paper:", *names("paper"), sep="\n  ")
        print("and beyond:", *names("beyond"), sep="\n  ")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    print("float64 is on; JAX runs on", jax.devices()[0])
    claims: list[Evidence] = []
    failed: list[str] = []
    started = time.perf_counter()
    for experiment, settings in tqdm(chosen, desc="experiments", unit="figure"):
        with _noted(experiment.name, failed):
            claims += run_experiment(experiment, settings, options)
    drawn = [experiment.name for experiment, _ in chosen]
    for name, composite in complete(options.folder, drawn).items():
        with _noted(name, failed):
            (options.folder / name).mkdir(exist_ok=True)
            save_picture(options.folder / name, partial(composite.plot, options.folder))
    print(table(claims))
    write_index(options.folder)
    print(f"{time.perf_counter() - started:.1f} s, saved in {options.folder}")
    for line in failed:
        print(f"FAILED: {line}; its traceback is above, the other figures are complete")
    unexpected = any(not claim.as_known for claim in claims)
    return int(bool(failed) or unexpected)


@contextlib.contextmanager
def _noted(name: str, failed: list[str]) -> Iterator[None]:
    """One that fails must not take the others with it."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failed.append(f"{name} ({type(error).__name__}: {error})")


def parse(arguments: Sequence[str]) -> tuple[Options, list[tuple[Experiment[Any], Any]]]:
    """The options, and the experiments to run with their settings.

    Raises `InputError` for what cannot be run, and leaves after `--help`.
    """
    # Names and presets first: they decide which other options there are, and their defaults.
    asked = [a for a in arguments if a not in ("-h", "--help")]
    options, _ = _parsed(partial(tyro.cli, Options, args=asked, return_unknown_args=True))
    every = (*names("paper"), *names("beyond"))
    named = [name for name in dict.fromkeys(options.names) if name in every]
    chosen = [find(name) for name in named or names("paper")]
    if not named:
        chosen = [each for each in chosen if options.preset in each.presets] or chosen
    given = [(each.name, each.settings(options.preset, fast=options.fast)) for each in chosen]
    seed: list[Any] = []
    if len(named) != 1:
        about = tyro.conf.arg(help="Of everything random, for each experiment that has a seed.")
        seed = [("seed", Annotated[int | None, about], None)]
    prefix = tyro.conf.arg(name="") if len(named) == 1 else None
    fields = [
        (name, Annotated[type(settings), prefix], dataclasses.field(default=settings))
        for name, settings in given if named
    ]  # fmt: skip
    common = ("options", Annotated[Options, tyro.conf.arg(name="")], Options())
    given_options = dataclasses.make_dataclass("Given", [common, *seed, *fields])
    found = vars(_parsed(partial(tyro.cli, given_options, args=arguments)))
    for name in set(found["options"].names) - set(every) - {"list"}:
        find(name)
    settings = [found.get(name, default) for name, default in given]
    if found.get("seed") is not None:
        settings = [
            dataclasses.replace(each, seed=found["seed"]) if "seed" in vars(each) else each
            for each in settings
        ]
    for experiment, each in zip(chosen, settings, strict=True):
        check_settings(experiment.name, each)
    if found["options"].redraw and settings != [default for _, default in given]:
        raise InputError("--redraw draws data that are there: leave out the settings")
    return found["options"], list(zip(chosen, settings, strict=True))


def _parsed(parse: Callable[..., _Parsed]) -> _Parsed:
    """What tyro makes of the arguments; its message in one line where it refuses them."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse(
                prog="python -m experiments", description=_ABOUT, use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )  # fmt: skip
    except SystemExit as leaving:
        if not leaving.code:
            raise
        message = " ".join(re.sub("[╭╮╰╯│─]", " ", printed.getvalue()).split())
        raise InputError(re.split(" (?:Argument|For full) helptext", message)[0]) from None


def run_experiment(
    experiment: Experiment[Any], settings: Settings, options: Options
) -> Sequence[Evidence]:
    """Run one experiment and save its data; then check, draw and describe them."""
    folder = options.folder / experiment.name
    started = time.perf_counter()
    if options.redraw:
        data = read_dataset(folder / "data.nc")
        manifest = folder / "manifest.json"
        about = json.loads(read_bytes(manifest, hint="--redraw takes what a run has saved"))
        about["values_sha256"] = values_hash(data)
    else:
        data = experiment.run(settings)
        folder.mkdir(parents=True, exist_ok=True)
        save_data(folder, data)
        about = {
            "experiment": experiment.name, "panels": experiment.panels, "preset": options.preset,
            "fast": options.fast, **facts(settings, data),
        }  # fmt: skip
    claims = experiment.check(data)
    save_picture(folder, partial(experiment.plot, data))
    summary = "" if experiment.summary is None else experiment.summary(data)
    about |= {"claims": [dataclasses.asdict(claim) for claim in claims], "summary": summary}
    save_json(folder / "manifest.json", about)
    if not options.redraw:
        save_run(folder, time.perf_counter() - started)
    if experiment.page is not None:
        save_text(folder / "page.md", experiment.page(data, folder))
    return claims
