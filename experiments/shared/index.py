"""The table of claims and the index page of `paper_figures`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from experiments.shared.composites import COMPOSITES
from experiments.shared.measures import within
from experiments.shared.saving import save_text
from pcdyn.theory import Evidence, expectation


def table(claims: Sequence[Evidence]) -> str:
    """The claims as plain text, one line each."""
    rows = [_row(e) for e in claims]
    width = max((len(row[0]) for row in rows), default=0)
    return "\n".join(
        f"{text:<{width}}  {verdict:<24}  {measured} (expected {expected})"
        + f"; {note}" * bool(note)
        for text, measured, expected, verdict, note in rows
    )


def cells(claims: Sequence[Evidence]) -> list[str]:
    """The claims as the lines of a table of a page."""
    lines = ["| claim | measured | expected | verdict | |", "|---|---|---|---|---|"]
    for e in claims:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in _row(e)) + " |")
    return lines


def _row(e: Evidence) -> tuple[str, str, str, str, str]:
    text = f"{e.statement}: {e.claim}" if e.statement else e.claim
    limited = math.isfinite(e.expected)
    return (
        text, within(e.measured, e.error), expectation(e) if limited else "–",
        e.verdict * limited, e.note,
    )  # fmt: skip


def write_index(folder: Path) -> None:
    """Write `index.md` from the manifests below `folder`: every panel with its claims."""
    manifests = [json.loads(path.read_text("utf-8")) for path in folder.glob("*/manifest.json")]
    lines = [
        "# Figures of the paper, regenerated",
        "",
        "Written by `python -m experiments`. Each figure has its data (`data.nc`), picture "
        "(`figure.png`, `figure.pdf`) and manifest (`manifest.json`: settings, versions, hash, and "
        "each claim with its numbers) in a folder of its own.",
    ]
    for manifest in sorted(manifests, key=lambda m: (m["panels"], m["experiment"])):
        name, fast = manifest["experiment"], ", fast" * manifest["fast"]
        # Above the first of the two that have its panels.
        whole = next((n for n, c in COMPOSITES.items() if c.parts[0] == name), None)
        if whole is not None and (folder / whole / "figure.png").is_file():
            lines += ["", f"## {whole.replace('figure', 'Figure ')}", "",
                      f"![{whole}]({whole}/figure.png)", "",
                      "From the data of the panels that follow."]  # fmt: skip
        lines += ["", f"## {manifest['panels']}", "", f"![{name}]({name}/figure.png)", "",
                  f"`{name}`, preset `{manifest['preset']}`{fast}.", ""]  # fmt: skip
        claims = [Evidence(**fields) for fields in manifest["claims"]]
        lines += [manifest["summary"]] if manifest["summary"] else cells(claims)
    save_text(folder / "index.md", "\n".join(lines) + "\n")
