"""The table of claims and the index page of `paper_figures`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.shared.saving import save_text
from pcdyn.theory import Evidence, expectation


def table(claims: Sequence[Evidence]) -> str:
    """The claims as plain text, one line each."""
    texts = [_text(e) for e in claims]
    width = max(map(len, texts), default=0)
    return "\n".join(
        f"{text:<{width}}  {e.verdict:<24}  {e.measured:.3g} (expected {expectation(e)})"
        + f"; {e.note}" * bool(e.note)
        for text, e in zip(texts, claims, strict=True)
    )


def _text(e: Evidence) -> str:
    return f"{e.statement}: {e.claim}"


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
        lines += _section(manifest)
    save_text(folder / "index.md", "\n".join(lines) + "\n")


def _section(manifest: dict[str, Any]) -> list[str]:
    name = manifest["experiment"]
    settings = f"preset `{manifest['preset']}`{', fast' if manifest['fast'] else ''}"
    lines = ["", f"## {manifest['panels']}", "", f"![{name}]({name}/figure.png)", ""]
    lines += [f"`{name}`, {settings}.", ""]
    if summary := manifest["summary"]:
        return [*lines, summary]
    lines += ["| claim | measured | expected | verdict | |", "|---|---|---|---|---|"]
    for fields in manifest["claims"]:
        e = Evidence(**fields)
        cells = (_text(e), f"{e.measured:.3g}", expectation(e), e.verdict, e.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines
