"""The drawing of the floors in docs/architecture.md is that of the import contract.

`python -m tests.exact.test_architecture` draws it anew.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
_START, _END = "<!-- floors -->\n", "<!-- end of floors -->"
_WIDTH = 96


def drawing() -> str:
    """One box per floor, from the roof to the ground, with the first lines of its docstrings."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    floors = [
        [room.strip() for room in layer.split("|")]
        for layer in contracts["contracts"][0]["layers"]
        if layer != "__main__"
    ]
    rule = "+" + "-" * (_WIDTH - 2) + "+"
    rows = [rule]
    for floor in floors:
        for room in floor:
            text = textwrap.wrap(_sentence(room), _WIDTH - 20)
            names = [room, *[""] * len(text)]
            rows += [f"| {a:<14} {b:<{_WIDTH - 19}} |" for a, b in zip(names, text, strict=False)]
        rows.append(rule)
    return "```text\n" + "\n".join(rows) + "\n```\n"


def _sentence(room: str) -> str:
    path = ROOT / "pcdyn" / room
    source = (path / "__init__.py") if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text("utf-8"))) or ""
    return docstring.splitlines()[0].replace("`", "")


def test_the_drawing_is_that_of_the_contract() -> None:
    page = PAGE.read_text("utf-8")
    assert page.partition(_START)[2].partition(_END)[0] == drawing()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text("utf-8").partition(_START)
    after = rest.partition(_END)[2]
    PAGE.write_text(before + _START + drawing() + _END + after, "utf-8")
