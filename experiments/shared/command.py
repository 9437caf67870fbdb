"""What `python -m experiments` does: run, save, check, draw, and go on where one fails."""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
import traceback
from pathlib import Path
from typing import Annotated, Literal

import jax
import matplotlib
import tyro
from tqdm import tqdm

from experiments.shared.base import (
    Claim,
    Experiment,
    save_data,
    save_manifest,
    save_picture,
    save_text,
)

NAMES = (
    "figure1_target_propagation",
    "figure1_linear_equilibrium",
    "figure2_interpolation",
    "figure2_nonlinear",
    "figure3_precision",
    "figure3_ratios",
    "figure4_energies",
    "figure4_training",
    "figure5",
    "figure6",
)
EXTRA = (
    "equilibrium_basins",
    "inference_speed",
    "joint_flow",
    "critical_points",
    "loss_along_inference",
    "learning_limits",
    "learning_rules",
    "learned_precisions",
    "integrators",
    "integrator_choices",
    "theorems",
    "phase_portraits",
    "relaxation_spectrum",
    "energy_landscape",
    "generalised_energies",
    "interpolation",
    "fixed_point",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Run experiments, save data, pictures and manifests, and print the table of claims."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Experiments to run; the paper's figures unless given. `list` names them all."""
    preset: Literal["paper", "code"] = "paper"
    """Settings of the paper (as corrected) or of the authors' code."""
    fast: bool = False
    """The same code on fewer networks."""
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
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pcdyn" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    matplotlib.use("agg")


def main(options: Options) -> int:
    """Run; returns the exit status, 1 if an experiment or a claim that should hold failed."""
    known = (*NAMES, *EXTRA)
    if options.names == ("list",):
        print("figures of the paper:", *NAMES, sep="\n  ")
        print("and beyond:", *EXTRA, sep="\n  ")
        return 0
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        print(f"unknown experiment {', '.join(unknown)}; known: {', '.join(known)}")
        return 2
    configure()
    print("float64 is on; JAX runs on", jax.devices()[0])
    from experiments.shared.index import table, write_index

    options.folder.mkdir(parents=True, exist_ok=True)
    claims: list[Claim] = []
    failed: list[str] = []
    started = time.perf_counter()
    for name in tqdm(options.names or NAMES, desc="experiments", unit="figure"):
        # One that fails must not take the others with it.
        try:
            claims += run_experiment(name, options)
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name} ({type(error).__name__}: {error})")
    print(table(claims))
    write_index(options.folder, known)
    print(f"{time.perf_counter() - started:.1f} s, saved in {options.folder}")
    for line in failed:
        print(f"FAILED: {line}; its traceback is above, the other figures are complete")
    unexpected = any(claim.holds != claim.expected_to_hold for claim in claims)
    return int(bool(failed) or unexpected)


def run_experiment(name: str, options: Options) -> list[Claim]:
    """Run one experiment and save its data; then check, draw and describe them."""
    folder = "paper" if name in NAMES else "beyond"
    experiment: Experiment = importlib.import_module(f"experiments.{folder}.{name}").EXPERIMENT
    settings = experiment.settings(options.preset, fast=options.fast)
    started = time.perf_counter()
    data = experiment.run(settings)
    save_data(name, options.folder, data)
    claims = experiment.check(data)
    save_picture(name, options.folder, experiment.plot, data)
    save_manifest(
        name, options.folder, settings, data,
        panels=experiment.panels, preset=options.preset, fast=options.fast,
        seconds=round(time.perf_counter() - started, 2),
        claims=[dataclasses.asdict(claim) for claim in claims],
        summary="" if experiment.summary is None else experiment.summary(data),
    )  # fmt: skip
    if experiment.page is not None:
        save_text(options.folder / f"{name}.md", experiment.page(data, options.folder))
    return claims
