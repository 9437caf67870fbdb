"""The table of claims and the index page of `paper_figures`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.shared.base import Claim, save_text


def table(claims: Sequence[Claim]) -> str:
    """The claims as plain text, one line each."""
    width = max((len(claim.text) for claim in claims), default=0)
    return "\n".join(
        f"{claim.text:<{width}}  {claim.verdict:<24}  {claim.measured} (expected {claim.expected})"
        for claim in claims
    )


def write_index(folder: Path, names: Sequence[str]) -> None:
    """Write `index.md` from the manifests in `folder`: every panel with its claims and verdicts."""
    lines = [
        "# Figures of the paper, regenerated",
        "",
        "Written by `python -m experiments`. Each figure has its data (`.nc`), picture (`.png`, "
        "`.pdf`) and manifest (`.json`: settings, seed, versions, time, hash) beside it.",
    ]
    for name in names:
        path = folder / f"{name}.json"
        if path.is_file():
            lines += _section(name, json.loads(path.read_text("utf-8")))
    save_text(folder / "index.md", "\n".join(lines) + "\n")


def _section(name: str, manifest: dict[str, Any]) -> list[str]:
    settings = f"preset `{manifest['preset']}`{', fast' if manifest['fast'] else ''}"
    lines = ["", f"## {manifest['panels']}", "", f"![{name}]({name}.png)", ""]
    lines += [f"`{name}`, {settings}, {manifest['time'][:10]}.", ""]
    if summary := manifest.get("summary"):
        return [*lines, summary]
    lines += ["| claim | measured | expected | verdict |", "|---|---|---|---|"]
    for fields in manifest["claims"]:
        claim = Claim(**fields)
        cells = (claim.text, claim.measured, claim.expected, claim.verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines
