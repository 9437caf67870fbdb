"""Numbers and texts that no machine has room for: one line and exit code 2, nothing has run."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import pcdyn
from pcdyn.cli import main

LARGE = {
    "a seed of 65 bits": ("simulate --seed 9223372036854775808", "--seed must be an integer from"),
    "a seed of thousands of digits": (f"simulate --seed {'9' * 4000}", "--seed must be"),
    "a seed that float32 would cut": ("simulate --float32 --seed 4294967296", "to 4294967295"),
    "times": ("simulate --times 2000000000", "2000000000 times would take .* GiB"),
    "times of thousands of digits": (f"simulate --times {'9' * 4000}", "--times must be"),
    "a batch": ("simulate --batch 3000000000", "--batch must be .* at most"),
    "a batch that memory lacks": ("equilibrium --batch 2000000000", "would take .* GiB"),
    "widths": ("equilibrium --widths 1000000 1000000", "would take .* GiB"),
    "widths of thousands of digits": (f"stability --widths {'9' * 4000} 2", "widths"),
    "networks": (f"verify A.2 --networks {10**30}", "networks must be"),
    "one network": ("verify A.2 --networks 1", "networks must be an integer at least 2"),
    "a precision beyond floats": ("simulate --network huge.toml", "neither a number"),
    "a seed in a file": ("simulate --network seed.toml", "seed.toml is not valid TOML.*limit"),
    "a seed in hexadecimal": ("simulate --network hex.toml", "hex.toml is not valid TOML.*limit"),
    "lists within lists": ("simulate --network deep.toml", "deep.toml is not valid TOML.*recursi"),
    "UTF-16": ("simulate --network utf16.toml", "utf16.toml is not in UTF-8.*save it as UTF-8"),
    "a device": ("simulate --network device.toml", "device.toml is not a file"),
}


@pytest.mark.parametrize(("command", "message"), LARGE.values(), ids=LARGE.keys())
def test_what_is_too_large_is_one_line(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "huge": f"precisions = 1{'0' * 400}", "seed": f"seed = {'9' * 5000}",
        "hex": f"seed = 0x{'f' * 6000}", "deep": f"widths = {'[' * 100_000}",
    }.items():  # fmt: skip
        Path(f"{name}.toml").write_text(f"[network]\n{text}")
    Path("utf16.toml").write_bytes("[network]\n".encode("utf-16"))
    Path("device.toml").symlink_to("/dev/zero")
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", printed.err)


def test_a_byte_order_mark_is_no_part_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Windows' editors save it, with their ends of lines."""
    monkeypatch.chdir(tmp_path)
    text = '[network]\r\nwidths = [2, 3, 2]\r\nactivation = "identity"\r\n'
    Path("net.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert main(["equilibrium", "--network", "net.toml"]) == 0
    assert "2-3-2 network, identity" in capsys.readouterr().out


def test_input_and_output_are_drawn_from_different_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal widths they would be equal if they were not; the weights have a third."""
    monkeypatch.chdir(tmp_path)
    command = ["equilibrium", "--activation", "identity", "--widths", "4", "4", "4",
               "--batch", "100", "--quiet", "--data"]  # fmt: skip
    assert main([*command, "a.nc"]) == 0
    problem = pcdyn.load_problem("a.nc")
    numbers = np.concatenate([np.ravel(problem.input), np.ravel(problem.output)])
    assert len(set(numbers.tolist())) == 800
    # 400 products of independent standard normal numbers: within 5 standard errors 1/√400.
    assert abs(np.mean(np.asarray(problem.input) * np.asarray(problem.output))) < 0.25
    for index, values in ((1, problem.input), (2, problem.output)):
        key = jax.random.fold_in(jax.random.key(0), index)
        np.testing.assert_array_equal(values, jax.random.normal(key, (100, 4)))
