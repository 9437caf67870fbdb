"""The table of `make mutants` fits the code: each mistake can be planted, and its tests exist."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.planted_mistakes import MISTAKES

ROOT = Path(__file__).parents[2]


def test_each_mistake_can_be_planted() -> None:
    """Its text stands in its file exactly once, and the file with the mistake is still Python."""
    for mistake in MISTAKES:
        text = (ROOT / mistake.file).read_text("utf-8")
        planted = mistake.planted(text)
        assert planted != text, mistake.name
        ast.parse(planted)


def test_each_mistake_has_tests_and_a_name_of_its_own() -> None:
    """Every file is there, and every function named after `::` is in it."""
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
    for mistake in MISTAKES:
        assert mistake.tests, mistake.name
        for test in mistake.tests:
            file, _, function = test.partition("::")
            text = (ROOT / file).read_text("utf-8")
            assert f"def {function.partition('[')[0]}" in text, test
