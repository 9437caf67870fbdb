"""Every numbered statement that pcdyn measures, by subject, and how to name some."""

from __future__ import annotations

from collections.abc import Sequence

from pcdyn.errors import InputError
from pcdyn.theory import (
    convergence,
    dynamics,
    energies,
    errata,
    inference,
    learning,
    limits,
    precisions,
)
from pcdyn.theory.statement import Statement

# A module with more statements is added here; this order is that of the tables.
STATEMENTS: tuple[Statement, ...] = (
    *inference.STATEMENTS,
    *dynamics.STATEMENTS,
    *limits.STATEMENTS,
    *learning.STATEMENTS,
    *convergence.STATEMENTS,
    *precisions.STATEMENTS,
    *energies.STATEMENTS,
    *errata.STATEMENTS,
)


def select(names: Sequence[str]) -> tuple[Statement, ...]:
    """The statements of these names, all of them if there are none.

    A name is a statement's number or how one begins or ends ("Theorem 3.4", "eq-48", "3.1", "A.2");
    capitals do not matter, and a hyphen is a space. Raises `InputError` for a name of none.
    """
    chosen: list[Statement] = []
    for name in names:
        found = [s for s in STATEMENTS if _matches(name, s.number)]
        if not found:
            known = ", ".join(s.number for s in STATEMENTS)
            raise InputError(f"no statement is called {name!r}; known: {known}")
        chosen += [s for s in found if s not in chosen]
    return tuple(s for s in STATEMENTS if not names or s in chosen)


def _matches(name: str, number: str) -> bool:
    wanted = name.lower().replace("-", " ").strip()
    whole = number.lower()
    return wanted == whole or whole.startswith(f"{wanted} ") or whole.endswith(f" {wanted}")
