"""Speed, as ratios measured side by side: `python -m experiments.benchmarks`.

Each module of this package is a part: a function `rows` that measures, one number after another,
each beside its limit if it has one. Each part is printed as it goes, and written to
`paper_figures/benchmarks/<part>.md`; names of parts run only those.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import tyro

import pcdyn
from experiments.shared.experiment import names
from experiments.shared.index import cells, table
from experiments.shared.saving import save_text
from pcdyn.theory import Evidence

_ABOUT = """Written by `python -m experiments.benchmarks {}` on {}. Ratios of the best of
many calls taken in turns in one process, unless it says evaluations or seconds; they move by a
third from run to run on a busy machine."""


def main(parts: tyro.conf.Positional[tuple[str, ...]] = ()) -> int:
    """Print every measurement beside its limit; `parts` run only those."""
    known = names("benchmarks")
    unknown = sorted(set(parts) - set(known))
    if unknown:
        print(f"unknown part {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    jax.config.update("jax_enable_x64", True)
    for name in parts or known:
        print(name)
        rows: Callable[[], Iterator[Evidence]]
        rows = importlib.import_module(f"experiments.benchmarks.{name}").rows
        measured = []
        for each in rows():
            print(table([each]))
            measured.append(each)
        lines = [f"# Benchmark: {name}\n", _ABOUT.format(name, _machine()), "", *cells(measured)]
        folder = Path("paper_figures") / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        save_text(folder / f"{name}.md", "\n".join(lines) + "\n")
    return 0


def _machine() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("jax", "diffrax"))
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {jax.devices()[0]}, Python "
        f"{platform.python_version()}, pcdyn {pcdyn.__version__}, {libraries}, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}"
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m experiments.benchmarks"))
