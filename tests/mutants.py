"""Plant one mistake after another in a copy of the tree, and see that its tests notice.

`python -m tests.mutants` goes through the whole table of `tests/planted_mistakes.py`;
`python -m tests.mutants euler joint` through those whose name has one of these words; `--list`
prints the names. The tests pass without a mistake first, for a test that fails anyway notices
nothing. The exit code is 1 if a mistake is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.planted_mistakes import MISTAKES, Mistake

ROOT = Path(__file__).parents[1]
_PARTS = ("pcdyn", "experiments", "tests", "docs", "paper_figures", "pyproject.toml", "README.md",
          "requirements.lock", "Makefile")  # fmt: skip
# Of one run of tests. Whoever waits notices a mistake that makes them hang.
_SECONDS = 900
_HANGS, _BROKEN = 124, 70
# What takes seconds to import, once for all runs of tests. Nothing of pcdyn, which changes.
_IMPORTED_ONCE = ["jax", "equinox", "diffrax", "optimistix", "lineax", "optax", "beartype",
                  "jaxtyping", "xarray", "tqdm", "scipy.integrate", "scipy.optimize",
                  "scipy.sparse.linalg", "scipy.linalg", "matplotlib.pyplot"]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mistakes whose name has one of these words")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the tests without a mistake first"
    )
    options = parser.parse_args(arguments)
    chosen = [
        m for m in MISTAKES if not options.words or any(word in m.name for word in options.words)
    ]
    if options.list or not chosen:
        print(*(m.name for m in chosen), sep="\n")
        return int(not chosen)
    with tempfile.TemporaryDirectory(prefix="pcdyn-mutants-") as folder:
        return _run(chosen, Path(folder), check_first=not options.unchecked)


def _run(chosen: Sequence[Mistake], folder: Path, *, check_first: bool) -> int:
    root = folder / "tree"
    _copy(root)
    os.environ |= {
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        # What a mistake leaves as it was need not be compiled again.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    if check_first and not _pass_without(chosen, root):
        return 1
    width = max(len(mistake.name) for mistake in chosen)
    failures, started = 0, time.perf_counter()
    for mistake in chosen:
        verdict, seconds = _verdict(mistake, root)
        failures += verdict != "caught"
        print(f"{mistake.name:<{width}}  {verdict:<12} {seconds:6.1f} s", flush=True)
    spent = time.perf_counter() - started
    print(f"{len(chosen) - failures} of {len(chosen)} mistakes caught in {spent:.0f} s")
    return int(failures > 0)


def _copy(root: Path) -> None:
    root.mkdir()
    for part in _PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, root / part)


def _pass_without(chosen: Sequence[Mistake], root: Path) -> bool:
    """Whether all of the tests pass as the tree is, file by file."""
    tests = dict.fromkeys(test for mistake in chosen for test in mistake.tests)
    for file in dict.fromkeys(test.partition("::")[0] for test in tests):
        here = [file] if file in tests else [t for t in tests if t.startswith(f"{file}::")]
        code, seconds, output = _tests(root, here)
        passed = "pass" if code == 0 else "FAIL"
        print(f"{file}: tests {passed} without a mistake in {seconds:.0f} s", flush=True)
        if code != 0:
            print(output)
            return False
    return True


def _verdict(mistake: Mistake, root: Path) -> tuple[str, float]:
    target = root / mistake.file
    right = target.read_text("utf-8")
    try:
        target.write_text(mistake.planted(right), "utf-8")
        code, seconds, output = _tests(root, mistake.tests)
    except ValueError as error:
        print(error)
        return "CANNOT PLANT", 0.0
    finally:
        target.write_text(right, "utf-8")
    # Only failing tests count. A tree that pytest cannot collect is no mistake that could be made.
    verdict = {0: "MISSED", 1: "caught", _HANGS: "caught"}.get(code, "CANNOT RUN")
    if verdict == "CANNOT RUN":
        print(output)
    return verdict, seconds


def _tests(root: Path, tests: Sequence[str]) -> tuple[int, float, str]:
    """The exit code of pytest, the seconds, and what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    printed = root.parent / "printed"
    started = time.perf_counter()
    process = context.Process(target=_pytest, args=(root, list(tests), printed))
    process.start()
    process.join(_SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        code = _HANGS
    return code, time.perf_counter() - started, printed.read_text("utf-8")


def _pytest(root: Path, tests: list[str], printed: Path) -> None:
    """Run tests of the copy in a process of its own."""
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(root)
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    import pytest

    # jaxtyping, a plugin of pytest, is imported already.
    options = ["-x", "-n", "0", "-q", "-p", "no:cacheprovider",
               "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip
    code = _BROKEN
    try:
        code = pytest.main([*options, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        # Threads of JAX would be waited for.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
