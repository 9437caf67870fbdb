"""The table of claims and the index page of `paper_figures`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.base import Claim, write_atomically


@dataclasses.dataclass(frozen=True)
class Row:
    """One claim of one experiment."""

    experiment: str
    panels: str
    claim: Claim


def table(rows: list[Row]) -> str:
    """The claims as plain text, one line each."""
    width = max(len(row.claim.text) for row in rows)
    return "\n".join(
        f"{row.claim.text:<{width}}  {row.claim.verdict:<24}  {row.claim.measured} "
        f"(expected {row.claim.expected})"
        for row in rows
    )


def write_index(folder: Path, rows: list[Row], *, preset: str, fast: bool) -> None:
    """Write `index.md`: every panel with its claims, what was measured, and the verdict."""
    lines = [
        "# Figures of the paper, regenerated",
        "",
        f"Written by `python -m experiments --preset {preset}{' --fast' if fast else ''}`. Each "
        "figure has its data (`.nc`), picture (`.png`, `.pdf`) and manifest (`.json`: settings, "
        "seed, versions, time, hash) beside it.",
    ]
    for name in dict.fromkeys(row.experiment for row in rows):
        mine = [row for row in rows if row.experiment == name]
        lines += ["", f"## {mine[0].panels}", "", f"![{name}]({name}.png)", ""]
        lines += ["| claim | measured | expected | verdict |", "|---|---|---|---|"]
        lines += [
            "| " + " | ".join(_cell(text) for text in (
                row.claim.text, row.claim.measured, row.claim.expected, row.claim.verdict
            )) + " |"
            for row in mine
        ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    write_atomically(folder / "index.md", lambda path: Path(path).write_text(text, "utf-8"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
