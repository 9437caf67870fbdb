"""TOML files: the table of a chain or of a graph, with all keys and kinds of values checked."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pcdyn._support.files import read_bytes
from pcdyn.errors import DataError

Settings = dict[str, Any]
# Whether a value fits, and what would.
_Kind = tuple[Callable[[object], bool], str]


def read_toml(path: Path) -> Settings:
    """Read the table `[network]` or `[graph]`, in which files are paths beside that of the table.

    Raises `DataError` for a file that is missing, is no TOML, or has a key or a value that does not
    fit.
    """
    document = _document(path)
    for name in document:
        if name not in _TABLES:
            raise DataError(
                f"{path}: unknown entry {name!r} at the top: the options stand in the table "
                "[network], or in [graph]"
            )
    if len(document) > 1:
        raise DataError(
            f"{path} has a table [network] and a table [graph], but describes one network: leave "
            "one of them out"
        )
    name, table = next(iter(document.items()), ("network", None))
    if not isinstance(table, dict):
        other = ", and no [graph]" if name == "network" else ""
        raise DataError(f"{path} has no table [{name}]{other}")
    _check(table, _TABLES[name], path, f"[{name}]")
    if name == "network":
        beside = {end: _beside(path, table[end]) for end in ("input", "output") if end in table}
        return table | beside
    _check_graph(table, path)
    return table | {"clamp": _beside(path, table.get("clamp", {}))}


def _document(path: Path) -> Settings:
    content = read_bytes(path)
    try:
        # Windows' editors begin a text with a byte order mark.
        document = tomllib.loads(content.decode("utf-8-sig"))
        repr(document)  # which Python refuses for thousands of hexadecimal digits
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not in UTF-8 ({error}): save it as UTF-8, which editors call an encoding"
        ) from error
    # Among them numbers of thousands of digits, and lists within lists without end.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid TOML: {error}") from error
    return document


def _check(table: Settings, kinds: Mapping[str, _Kind], path: Path, where: str) -> None:
    for name, value in table.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(kinds)}"
            raise DataError(f"{path}: unknown key {name!r} in {where}; {hint}")
        fits, expected = kinds[name]
        if not fits(value):
            raise DataError(f"{path}: in {where}, {name} must be {expected}, got {value!r:.60}")


def _check_graph(table: Settings, path: Path) -> None:
    for name in ("nodes", "predictions"):
        if name not in table:
            raise DataError(f"{path}: [graph] lacks {name}, {_GRAPH[name][1]}")
    for node, source in table.get("clamp", {}).items():
        where = f"clamp of {node!r}"
        if isinstance(source, dict):
            _check(source, _PARTIAL, path, where)
            if len(source) < len(_PARTIAL):
                raise DataError(f"{path}: {where} needs both {' and '.join(_PARTIAL)}")
        elif not _is_source(source):
            raise DataError(
                f'{path}: {where} must be "random", "free", a file, a list of numbers or a table '
                f"of {' and '.join(_PARTIAL)}, got {source!r:.60}"
            )
    for number, each in enumerate(table["predictions"], start=1):
        target, is_prior = each.get("target"), "mean" in each
        if not _is_text(target):
            raise DataError(f"{path}: prediction {number} needs a target, the name of a node")
        where = f"prediction {number}, of {target!r}"
        if is_prior == ("given" in each):
            raise DataError(
                f"{path}: {where} needs either given, the nodes that it is predicted from, or "
                "mean, that of a prior"
            )
        _check(each, _PRIOR if is_prior else _DENSE, path, where)


def _beside(path: Path, source: Any) -> Any:  # noqa: ANN401
    """Data stand beside the file that names them, wherever the command is run."""
    if isinstance(source, dict):
        return {name: _beside(path, each) for name, each in source.items()}
    is_file = isinstance(source, str) and source not in ("random", "free")
    return str(path.parent / source) if is_file else source


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_source(value: object) -> bool:
    return isinstance(value, str | list)


def _is_array(value: object) -> bool:
    return _is_source(value) and value not in ("random", "free")


def _is_list(value: object, each: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(each, value))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_numbers(value: object) -> bool:
    return _is_number(value) or (isinstance(value, list) and bool(value))


_NAME: _Kind = (_is_text, "a name")
_NUMBER: _Kind = (_is_number, "a number")
_INTEGER: _Kind = (_is_integer, "an integer")
_FLAG: _Kind = (_is_flag, "true or false")
_END: _Kind = (_is_text, '"random", "free" or a file')
_OF_PREDICTIONS: dict[str, _Kind] = {
    "activation": _NAME,
    "weight_std": _NUMBER,
    "bias": _NUMBER,
    "energy": (_is_text, "a name, or a name:parameter"),
}
_NETWORK: dict[str, _Kind] = {
    "widths": (lambda value: _is_list(value, _is_integer), "a list of integers"),
    **_OF_PREDICTIONS,
    "output_activation": _NAME,
    "residual": _FLAG,
    "parameterisation": _NAME,
    "precisions": (_is_numbers, "a number or a list"),
    "prior": (_is_pair, "a list of two numbers, mean and precision"),
    "input": _END,
    "output": _END,
    "batch": _INTEGER,
    "seed": _INTEGER,
    "float32": _FLAG,
}
_GRAPH: dict[str, _Kind] = {
    "nodes": (_is_table, "a table from names to numbers of units or shapes"),
    "predictions": (lambda value: _is_list(value, _is_table), "tables [[graph.predictions]]"),
    "clamp": (_is_table, "a table from names of nodes to data"),
    **_OF_PREDICTIONS,
    "batch": _INTEGER,
    "seed": _INTEGER,
    "float32": _FLAG,
}
_TABLES = {"network": _NETWORK, "graph": _GRAPH}
_PRECISION: _Kind = (_is_numbers, "a number, a vector or a matrix")
_DENSE: dict[str, _Kind] = {
    "target": _NAME,
    "given": (
        lambda value: _is_text(value) or _is_list(value, _is_text), "the name of a node, or a list"
    ),
    **_OF_PREDICTIONS,
    "precision": _PRECISION,
}  # fmt: skip
_PRIOR: dict[str, _Kind] = {
    "target": _NAME,
    "mean": (_is_numbers, "a number or a list of numbers"),
    "energy": _OF_PREDICTIONS["energy"],
    "precision": _PRECISION,
}
_ARRAY: _Kind = (_is_array, "a file or a list")
_PARTIAL: dict[str, _Kind] = {"values": _ARRAY, "mask": _ARRAY}

OF_PREDICTIONS = tuple(_OF_PREDICTIONS)
"""What a graph has for all predictions that do not have it themselves."""

OF_GRAPHS = (*_OF_PREDICTIONS, "batch", "seed", "float32")
"""The options of the command line that can be given beside a graph."""
