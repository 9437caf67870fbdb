"""What a numbered statement of the paper is: its words, its verdict, and what measures it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pcdyn.theory.evidence import Evidence

Verdict = Literal["holds", "holds with a condition", "does not hold", "not in the paper"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """A numbered statement of the paper, with the function that measures it.

    **Arguments:**

    - `number` and `title`: "Theorem 3.4" and what it is about.
    - `says`: what the paper says, in one sentence.
    - `as_printed`: whether that holds as printed.
    - `form`: the form that does hold.
    - `measure`: a function of `seed` and `networks`, keyword-only, that returns the evidence.
    - `also`: further numbers that it covers, such as the steps of its proof, written as `number`.
    - `definitions`: further numbers that claim nothing but define what it is about.
    """

    number: str
    title: str
    says: str
    as_printed: Verdict
    form: str
    measure: Callable[..., tuple[Evidence, ...]]
    also: str = ""
    definitions: str = ""

    @property
    def further(self) -> str:
        """The further numbers in words; empty if there are none."""
        covered = [f"Covers {self.also} too."] if self.also else []
        defined = [f"Definitions: {self.definitions}."] if self.definitions else []
        return " ".join([*covered, *defined])

    @property
    def source(self) -> tuple[str, str]:
        """The file of `measure`, relative to the folder that holds pcdyn, and its name."""
        function = inspect.unwrap(self.measure)
        file = Path(inspect.getsourcefile(function) or "")
        parts = file.parts
        start = len(parts) - 1 - parts[::-1].index("pcdyn") if "pcdyn" in parts else 0
        return "/".join(parts[start:]), function.__name__

    @property
    def snippet(self) -> str:
        """A Python snippet that prints the evidence."""
        name, module = self.measure.__name__, self.measure.__module__
        return (
            "import jax\n\n"
            'jax.config.update("jax_enable_x64", True)\n'
            f"from {module} import {name}\n\n"
            f'print(*{name}(seed=0), sep="\\n")'
        )
