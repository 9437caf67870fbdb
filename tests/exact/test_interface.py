"""The public interface, name by name: a change of it is seen in review.

`python -m tests.exact.test_interface` writes the list anew.
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pcdyn

ROOT = Path(__file__).parents[2]
LISTED = ROOT / "tests" / "interface.txt"


def public_names(module: Any = pcdyn, prefix: str = "pcdyn") -> Iterator[tuple[str, Any]]:
    """Each public name once, with the modules that the face shows."""
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if not isinstance(value, types.ModuleType):
            yield f"{prefix}.{name}", value
        elif module is pcdyn:
            if hasattr(value, "__all__"):
                yield from public_names(value, f"{prefix}.{name}")
            else:
                yield f"{prefix}.{name}", value


def described(name: str, value: Any) -> Iterator[str]:
    """Its signature, and those of its public methods."""
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        yield f"class {name}: {', '.join(value.__members__)}"
    elif inspect.isclass(value):
        yield f"class {name}{_signature(value)}"
        for attribute, member in sorted(_members(value).items()):
            if attribute.startswith("_"):
                continue
            if isinstance(member, property):
                yield f"    {attribute}"
            elif inspect.isfunction(member):
                yield f"    {attribute}{_signature(member)}"
    elif inspect.isfunction(value):
        yield f"{name}{_signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def _members(cls: type) -> dict[str, Any]:
    """What a class has of its own, and of bases of pcdyn that are not listed themselves."""
    listed = {value for _, value in public_names() if inspect.isclass(value)}
    ours = [base for base in cls.__mro__ if base.__module__.startswith("pcdyn")]
    members: dict[str, Any] = {}
    for base in reversed([base for base in ours if base is cls or base not in listed]):
        members |= vars(base)
    return members


def _signature(value: Any) -> str:
    """Without annotations, which print otherwise in other versions of JAX and Python."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=parameters, return_annotation=empty))
    return re.sub(r"<function (\w+) at \w+>", r"\1", text)


def listing() -> str:
    """As a user has it: without the checks of annotations that the tests switch on."""
    lines = [line for name, value in public_names() for line in described(name, value)]
    return "\n".join(lines) + "\n"


def test_the_public_names_are_those_listed() -> None:
    code = "from tests.exact.test_interface import listing; print(listing(), end='')"
    now = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert now.splitlines() == LISTED.read_text("utf-8").splitlines()


def test_no_two_public_classes_share_a_name() -> None:
    seen: dict[str, set[Any]] = {}
    for name, value in public_names():
        if inspect.isclass(value):
            seen.setdefault(name.rpartition(".")[2], set()).add(value)
    assert not {name for name, classes in seen.items() if len(classes) > 1}


def test_what_texts_name_is_there() -> None:
    texts = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("pcdyn/**/*.py")]
    named = re.findall(r"`(pcdyn(?:\.\w+)+)", "".join(path.read_text("utf-8") for path in texts))
    missing = {name for name in named if not _exists(name)}
    assert not missing


def _exists(name: str) -> bool:
    value: Any = pcdyn
    for part in name.split(".")[1:]:
        is_field = part in getattr(value, "__dataclass_fields__", ())
        if isinstance(value, types.ModuleType) and not hasattr(value, part):
            if importlib.util.find_spec(f"{value.__name__}.{part}") is None:
                return False
            value = importlib.import_module(f"{value.__name__}.{part}")
        elif is_field or hasattr(value, part):
            value = getattr(value, part, None)
        else:
            return False
    return True


def test_importing_costs_nothing_until_a_name_is_used() -> None:
    code = """
import sys, pcdyn
assert "jax" not in sys.modules and "matplotlib" not in sys.modules
assert pcdyn.plotting.activities and pcdyn.learning.train and pcdyn.theory.verify
assert "matplotlib" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


if __name__ == "__main__":
    LISTED.write_text(listing(), "utf-8")
