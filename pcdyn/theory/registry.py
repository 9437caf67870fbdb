"""Every numbered statement that pcdyn measures, by subject, and how to name some."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pcdyn.errors import InputError
from pcdyn.theory import (
    algorithms,
    convergence,
    dynamics,
    energies,
    errata,
    expectation_maximisation,
    feedforward,
    inference,
    interactions,
    learning,
    limits,
    posteriors,
    precisions,
)
from pcdyn.theory.statement import Statement

# A module with more statements is added here; this order is that of the tables.
STATEMENTS: tuple[Statement, ...] = (
    *inference.STATEMENTS,
    *dynamics.STATEMENTS,
    *limits.STATEMENTS,
    *feedforward.STATEMENTS,
    *learning.STATEMENTS,
    *expectation_maximisation.STATEMENTS,
    *convergence.STATEMENTS,
    *precisions.STATEMENTS,
    *posteriors.STATEMENTS,
    *energies.STATEMENTS,
    *interactions.STATEMENTS,
    *errata.STATEMENTS,
    *algorithms.STATEMENTS,
)


def select(names: Sequence[str]) -> tuple[Statement, ...]:
    """Select the statements of these names, all of them if there are none.

    A name is a number of a statement, or how one begins or ends ("Theorem 3.4", "eq-30", "3.1",
    "A.2"); capitals do not matter, and a hyphen is a space. Raises `InputError` for others.
    """
    chosen: list[Statement] = []
    for name in names:
        found = [s for s in STATEMENTS if _matches(name, s)]
        if not found:
            known = ", ".join(s.number for s in STATEMENTS)
            raise InputError(f"no statement is called {name!r}; known: {known}")
        chosen += [s for s in found if s not in chosen]
    return tuple(s for s in STATEMENTS if not names or s in chosen)


def _matches(name: str, statement: Statement) -> bool:
    wanted = name.lower().replace("-", " ").strip()
    numbers = (statement.number, statement.also, statement.definitions)
    return any(
        wanted == known or known.startswith(f"{wanted} ") or known.endswith(f" {wanted}")
        for number in numbers
        if number
        for known in _names(number.lower())
    )


def _names(number: str) -> set[str]:
    """What a number can be called: "eqs 6, 30–33" is "eq 6" and "eq 31" too."""
    names = {number, *number.split(", ")}
    for listed in re.findall(r"eqs? ([\d, –]+)", number):
        for first, last in re.findall(r"(\d+)(?:–(\d+))?", listed):
            names |= {f"eq {n}" for n in range(int(first), int(last or first) + 1)}
    return names
