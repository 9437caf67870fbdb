"""The figures' claims on fast settings, and the command that draws them."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt

from experiments.__main__ import EXTRA, NAMES, Options, main
from experiments.base import Claim, save, values_hash

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _the_shipped_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast settings are made for the sample, whatever data there are."""
    monkeypatch.delenv("PCDYN_DATA", raising=False)


@pytest.mark.parametrize("name", [*NAMES, *EXTRA])
def test_claims_hold_on_fast_settings_and_equal_data_give_equal_pictures(
    name: str, tmp_path: Path
) -> None:
    """Each claim has its expected verdict; plotting the same data twice gives the same bytes."""
    module = importlib.import_module(f"experiments.{name}")
    config = dataclasses.replace(module.PRESETS["paper"], **module.FAST)
    data = module.run(config)
    claims = [c for c in module.check(data) if not c.timed]
    failed = [c for c in claims if c.holds != c.expected_to_hold]
    assert not failed
    for folder in ("first", "second"):
        figure = module.plot(data)
        save(name, tmp_path / folder, config, data, figure)
        plt.close(figure)
    for suffix in ("png", "pdf"):
        first, second = (tmp_path / f / f"{name}.{suffix}" for f in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    assert not [p for p in (tmp_path / "first").iterdir() if not p.name.startswith(name)]


def test_a_failed_claim_makes_the_run_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An expected claim that fails gives exit status 1; a finding that holds does so too."""
    from experiments import figure3_ratios as module

    options = Options(names=("figure3_ratios",), fast=True, output=tmp_path)
    monkeypatch.setattr("experiments.__main__.configure", lambda: None)
    for holds, expected, status in ((True, True, 0), (False, True, 1), (True, False, 1)):
        claim = Claim("a claim", "1", "2", holds=holds, expected_to_hold=expected)
        monkeypatch.setattr(module, "check", lambda data, claim=claim: [claim])
        assert main(options) == status


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong name gives exit status 2 and runs nothing; `list` names them all."""
    assert main(Options(names=("figure9",))) == 2
    assert "figure9" in capsys.readouterr().out
    assert main(Options(names=("list",))) == 0
    assert set(capsys.readouterr().out.split()) >= {*NAMES, *EXTRA}


def test_a_failed_write_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing partial remains when saving breaks in the middle."""
    module = importlib.import_module("experiments.figure3_ratios")
    config = dataclasses.replace(module.PRESETS["paper"], networks=4)
    data = module.run(config)
    figure = plt.figure()

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        save("broken", tmp_path, config, data, figure)
    plt.close(figure)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.nc"]


def test_the_hash_sees_values() -> None:
    """Data that differ in one value have different hashes."""
    module = importlib.import_module("experiments.figure3_ratios")
    data = module.run(dataclasses.replace(module.PRESETS["paper"], networks=4))
    changed = data.copy(deep=True)
    changed.floor.values[0, 0] = np.nextafter(changed.floor.values[0, 0], 1)
    assert values_hash(data) != values_hash(changed)


def example(naming: str) -> Any:
    """The example of README that has these words, compiled."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = (block for block in blocks if naming in block)
    return compile(found, "README.md", "exec")


def test_the_examples_in_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The ten lines and the comparison run as printed; errors are as small as tolerances say."""
    names: dict[str, Any] = {}
    exec(example("linear_equilibrium"), names)
    printed = capsys.readouterr().out
    assert "REACHED_T1" in printed
    error, rest = (float(x) for x in re.findall(r"(?:error|to equilibrium) ([\d.e-]+)", printed))
    assert error < 1e-5
    assert rest < 1e-5
    exec(example("pcdyn.compare"), names)
    printed = capsys.readouterr().out
    assert "is the fastest" in printed
    order = re.search(r"order (\d\.\d+)", printed)
    assert order
    assert float(order[1]) == pytest.approx(2, abs=0.1)
    exec(example("phase_portrait"), names)
    plt.close("all")


def test_the_learning_example_in_the_readme_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five networks, each much better than chance on the shipped sample."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        exec(example("learning.train"), {})
    numbers = [float(x) for x in re.findall(r"\d\.\d+", capsys.readouterr().out)]
    assert min(numbers) > 0.5
    assert (tmp_path / "run.npz").is_file()
