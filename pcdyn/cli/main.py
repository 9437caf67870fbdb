"""From arguments to an exit code: errors as one line, and interrupts at once."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcdyn.cli.options import Command, Verify
from pcdyn.cli.parser import parse

if TYPE_CHECKING:
    from pcdyn.cli.files import Result

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def run() -> None:
    """Run the command `pcdyn`, and leave the process with its exit code."""
    codecs.register_error("pcdyn", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # there is none where it was closed
            stream.reconfigure(errors="pcdyn")
    # jaxlib 0.9 prints errors, which are none, of programs that it finds in its cache. A level of 1
    # is JAX's own, from a process that has started this one.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    code = main()
    # At once: a computation that was interrupted still runs in its thread.
    os._exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run the command of these arguments, those of the process unless given.

    Returns the exit code: 0 if all is done, 1 if the run failed (it diverged, did not converge, or
    found another verdict than the one on record), 2 for bad input, 130 after Ctrl-C. JAX's settings
    are as before when it returns.
    """
    try:
        code = _code(sys.argv[1:] if arguments is None else arguments)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        return _fail(str(error), BAD_INPUT)


def _code(arguments: list[str]) -> int:
    from pcdyn.errors import InputError, PcdynError

    if arguments == ["--version"]:
        import pcdyn

        print("pcdyn", pcdyn.__version__)
        return DONE
    try:
        with _warnings_as_lines():
            failure = _run(parse(arguments))
        return DONE if failure is None else _fail(failure, FAILED)
    except SystemExit as leaving:  # tyro has printed help, or what is wrong with the arguments
        return leaving.code if isinstance(leaving.code, int) else BAD_INPUT
    except PcdynError as error:
        return _fail(str(error), BAD_INPUT if isinstance(error, InputError) else FAILED)


def _run(command: Command) -> str | None:
    """Execute, write and print; why it failed although there are results, if it did."""
    from tqdm import tqdm

    from pcdyn._support.compiling import cache_settings
    from pcdyn._support.waiting import interruptible
    from pcdyn.cli.commands import COMMANDS
    from pcdyn.cli.files import contents, targets, write
    from pcdyn.cli.network import settings_of
    from pcdyn.cli.report import as_json
    from pcdyn.errors import DataError

    name, execute = COMMANDS[type(command)]
    options = command.output
    files = targets(options, name)
    settings = {} if isinstance(command, Verify) else settings_of(command.network)

    def work() -> tuple[Result, dict[Path, bytes]]:
        result = execute(command, settings, bar)
        return result, contents(result, files)

    configuration: dict[str, Any] = {"jax_enable_x64": not settings.get("float32", False)}
    with contextlib.suppress(DataError):  # the user may have no folder to write to
        configuration |= cache_settings()
    if isinstance(command, Verify):  # of small networks, where to compile takes most of the time
        configuration["jax_disable_most_optimizations"] = True
    with _configured(configuration):
        terminal = sys.stderr is not None and sys.stderr.isatty()  # None where it was closed
        shows = terminal and not (options.json or options.quiet)
        bar = tqdm(desc=name, bar_format="{desc}: {elapsed}", leave=False, disable=not shows)
        with bar:
            result, ready = interruptible(work, bar.refresh)
    if files:
        write(ready, options)
    if options.json:
        record = {"command": name, **result.record, "files": [str(file) for file in files]}
        print(json.dumps(as_json(record), allow_nan=False))
    elif not options.quiet:
        print(result.summary)
        if files:
            print("wrote", ", ".join(map(str, files)))
    return result.failure


@contextlib.contextmanager
def _configured(configuration: dict[str, Any]) -> Iterator[None]:
    # For every thread, which the context managers of JAX are not.
    import jax

    config: Any = jax.config
    before = {name: config.values[name] for name in configuration}
    for name, value in configuration.items():
        config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            config.update(name, value)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *_: object, **options: object) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


_ASCII = str.maketrans({"→": "->", "−": "-", "–": "-", "≤": "<=", "≥": ">=", "±": "+-", "∞": "inf"})


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What an encoding lacks, in letters that all have: `ℒ` is L, and a `?` stands for the rest."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_ASCII)
    plain = "".join(
        unicodedata.normalize("NFKD", each).encode("ascii", "ignore").decode() or "?"
        for each in lacking
    )
    return plain, error.end
