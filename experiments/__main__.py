"""Regenerate the paper's figures and check its claims: `python -m experiments --help`."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import matplotlib
import tyro
from tqdm import tqdm

from experiments.base import Claim, save
from pcdyn.files import write_atomically

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
    """Folder for data, pictures and manifests; `paper_figures` for the full paper preset, a folder
    of their own under `build` for other settings."""

    @property
    def folder(self) -> Path:
        """Where to save."""
        if self.output is not None:
            return self.output
        if self.preset == "paper" and not self.fast:
            return Path("paper_figures")
        return Path("build") / f"figures-{self.preset}{'-fast' if self.fast else ''}"


def configure() -> None:
    """Float64, a persistent compilation cache, and a backend that needs no screen."""
    jax.config.update("jax_enable_x64", True)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pcdyn" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    matplotlib.use("agg")


def main(options: Options) -> int:
    """Run; returns the exit status, 1 if a claim that should hold does not."""
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
    from experiments.index import table, write_index

    claims = []
    started = time.perf_counter()
    for name in tqdm(options.names or NAMES, desc="experiments", unit="figure"):
        claims += run_experiment(name, options)
    print(table(claims))
    print(f"{time.perf_counter() - started:.1f} s, saved in {options.folder}")
    write_index(options.folder, known)
    return int(any(claim.holds != claim.expected_to_hold for claim in claims))


def run_experiment(name: str, options: Options) -> list[Claim]:
    """Run, check, draw and save one experiment."""
    from matplotlib import pyplot as plt

    module: Any = importlib.import_module(f"experiments.{name}")
    config = module.PRESETS[options.preset]
    if options.fast:
        config = dataclasses.replace(config, **module.FAST)
    started = time.perf_counter()
    data = module.run(config)
    claims = module.check(data)
    figure = module.plot(data)
    save(
        name, options.folder, config, data, figure,
        panels=module.PANELS, preset=options.preset, fast=options.fast,
        seconds=round(time.perf_counter() - started, 2),
        claims=[dataclasses.asdict(claim) for claim in claims],
        summary=module.summary(data) if hasattr(module, "summary") else "",
    )  # fmt: skip
    plt.close(figure)
    if page := getattr(module, "page", None):
        text = page(data)
        write_atomically(options.folder / f"{name}.md", lambda path: path.write_text(text, "utf-8"))
    return claims


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m experiments")))
