"""The command that draws the figures, and their claims on fast settings."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from matplotlib import pyplot as plt
from PIL import Image

from experiments.shared.command import main, parse
from experiments.shared.composites import COMPOSITES
from experiments.shared.experiment import Experiment, check_settings, find, names
from experiments.shared.measures import statistics, within
from experiments.shared.saving import values_hash
from pcdyn import plotting
from pcdyn.errors import InputError
from pcdyn.io.netcdf import read_dataset
from pcdyn.theory import Evidence

ROOT = Path(__file__).parents[2]
EVERY = (*names("paper"), *names("beyond"))

pytestmark = pytest.mark.usefixtures("as_users_run")


@pytest.fixture(autouse=True)
def _the_shipped_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast settings are made for the sample, whatever data there are."""
    monkeypatch.delenv("PCDYN_DATA", raising=False)
    monkeypatch.setattr("experiments.shared.command.configure", lambda: None)


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder, but what is declared to differ from run to run; pixels of PNGs."""
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path), int)
        if path.suffix == ".png"
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        # The last of ten decimals in a PDF depends on where arrays lie in memory.
        if path.is_file() and path.name not in ("run.json", "figure.pdf")
    }


def check_the_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same bytes; at the ends of lines that decimal may move a pixel by one level of 256."""
    assert found.keys() == expected.keys()
    for name, content in found.items():
        if name.endswith(".png"):
            np.testing.assert_allclose(content, expected[name], rtol=0, atol=1, err_msg=name)
        else:
            assert content == expected[name], name


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_claims_hold_and_the_saved_data_give_the_saved_files(name: str, tmp_path: Path) -> None:
    """What the command does for every name: claims have their verdicts, files are whole.

    Drawing what lies in the file gives the same files, so that the data are all that it needs. One
    is run once more: dates, seconds and machines are in `run.json` alone.
    """
    command = [name, "--fast", "--output", str(tmp_path)]
    status = main(command)
    folder = tmp_path / name
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    claims = [Evidence(**fields) for fields in manifest["claims"]]
    assert claims
    assert not [c for c in claims if not c.timed and not c.as_known]
    assert status == int(any(not c.as_known for c in claims))
    with xarray.open_dataset(folder / "data.nc", engine="h5netcdf") as saved:
        assert manifest["values_sha256"] == values_hash(saved.load())
    first = contents(tmp_path)
    assert {f"{name}/{file}" for file in ("data.nc", "figure.png", "manifest.json")} < set(first)
    assert (folder / "figure.pdf").read_bytes().rstrip().endswith(b"%%EOF")
    assert not list(folder.glob("*.partial*"))
    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert set(run) == {"time", "seconds", "machine"}
    if name == "figure3_ratios":
        assert main(command) == status
        check_the_same(contents(tmp_path), first)
        return
    for made in ("figure.png", "page.md"):
        (folder / made).unlink(missing_ok=True)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "claims": [], "summary": "?"}))
    before = (folder / "run.json").read_bytes()
    assert main([*command, "--redraw"]) == status
    check_the_same(contents(tmp_path), first)
    # Nothing was run again.
    assert (folder / "run.json").read_bytes() == before


def test_every_experiment_is_found_by_the_name_of_its_module() -> None:
    """Their settings are valid, and those of the figures are the paper's unless asked."""
    assert len(names("paper")) == 10
    for name in EVERY:
        experiment = find(name)
        assert experiment.name == name
        for preset in {"paper", *experiment.presets}:
            for fast in (False, True):
                check_settings(name, experiment.settings(preset, fast=fast))
    five = find("figure5")
    with pytest.raises(InputError, match="two presets of figure5 are equal"):
        dataclasses.replace(five, presets={"paper": five.settings(), "authors": five.settings()})


@pytest.mark.slow
def test_what_is_committed_follows_from_the_committed_data() -> None:
    """Verdicts, pages and the index are those that today's code makes of the data beside them."""
    figures = ROOT / "paper_figures"
    index = (figures / "index.md").read_text("utf-8")
    for name in EVERY:
        experiment, folder = find(name), figures / name
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        data = read_dataset(folder / "data.nc")
        assert manifest["values_sha256"] == values_hash(data)
        recorded = [Evidence(**fields) for fields in manifest["claims"]]
        found = experiment.check(data)
        assert [(e.claim, e.verdict) for e in found] == [(e.claim, e.verdict) for e in recorded]
        assert f"({name}/figure.png)" in index
        if experiment.page is not None:
            assert experiment.page(data, folder) == (folder / "page.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["figure2_interpolation", "figure2_nonlinear", "figure3_precision", "figure3_ratios",
     "fixed_point"],
)  # fmt: skip
def test_another_seed_gives_the_numbers_within_their_errors(name: str, tmp_path: Path) -> None:
    """Fewer draws of another seed against what is committed.

    Both are means of independent draws: four standard errors of the difference are passed once in
    16 000 times, and there are a dozen numbers.
    """
    assert main([name, "--fast", "--seed", "1", "--output", str(tmp_path)]) == 0
    estimates = []
    for folder in (tmp_path, ROOT / "paper_figures"):
        manifest = json.loads((folder / name / "manifest.json").read_text("utf-8"))
        claims = [Evidence(**fields) for fields in manifest["claims"]]
        estimates.append({(c.statement, c.claim): c for c in claims if c.error})
    other, committed = estimates
    assert committed
    assert set(other) == set(committed)
    for key, claim in committed.items():
        error = np.hypot(claim.error, other[key].error)
        assert abs(claim.measured - other[key].measured) <= 4 * error, key


def test_a_number_is_written_to_the_digits_that_its_error_leaves() -> None:
    """One digit of the error; none after the point where it is above one; no minus before zero."""
    assert within(1.7123, 0.0101) == "1.71 ± 0.01"
    assert within(0.78557, 0.0019) == "0.786 ± 0.002"
    assert within(75.6, 1.36) == "76 ± 1"
    assert within(-0.0002, 0.003) == "0.000 ± 0.003"
    assert within(0.12345, 0) == "0.123"


def test_statistics_are_those_of_the_draws() -> None:
    """Mean, its standard error and quantiles, against NumPy's, along another axis than the last."""
    draws = np.random.default_rng(0).normal(size=(3, 101))
    found = statistics(draws, axis=1)
    ordered = np.sort(draws, axis=1)
    expected = [draws.mean(1), np.sqrt(np.cov(draws).diagonal() / 101), *ordered[:, [10, 90]].T]
    np.testing.assert_allclose(found, np.stack(expected, axis=-1), rtol=1e-12)


def test_sentences_follow_from_the_data() -> None:
    """Where the energy gradient bound is kept, the page does not say that it is not."""
    experiment = find("loss_along_inference")
    folder = ROOT / "paper_figures" / "loss_along_inference"
    data = read_dataset(folder / "data.nc")
    assert experiment.page is not None
    assert "**It is not preserved, and the loss can rise.**" in experiment.page(data, folder)
    kept = data.assign(bound=data.bound.clip(max=0.9), squared_error=data.squared_error.clip(0.5))
    assert "**It is preserved, and the loss did not rise.**" in experiment.page(kept, folder)


def _replaced(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> list[Any]:
    """Put an experiment that takes no time, with some changes, in the place of another.

    Returns the list of the settings that it is run with.
    """
    ran: list[Any] = []

    def run(settings: Any) -> xarray.Dataset:
        ran.append(settings)
        return xarray.Dataset({"x": ("t", np.arange(3.0))})

    small = Experiment(
        name=name,
        panels="none",
        presets=find(name).presets,
        fast={},
        run=run,
        check=lambda data: [Evidence("", "a claim", 1.0, "equal", 1.0)],
        plot=lambda data: plt.figure(),
        summary=lambda data: "a summary",
    )
    changed = dataclasses.replace(small, **changes)
    monkeypatch.setattr(f"experiments.paper.{name}.EXPERIMENT", changed)
    return ran


def test_a_failed_claim_makes_the_run_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An expected claim that fails gives exit status 1; a finding that holds does so too."""
    for measured, expected, status in ((1.0, True, 0), (2.0, True, 1), (1.0, False, 1)):
        claim = Evidence("", "a claim", measured, "equal", 1.0, expected_to_hold=expected)
        _replaced(monkeypatch, "figure3_ratios", check=lambda data, claim=claim: [claim])
        assert main(["figure3_ratios", "--output", str(tmp_path)]) == status


@pytest.mark.parametrize("broken", ["run", "check", "plot", "summary"])
def test_one_failing_figure_does_not_take_the_others_with_it(
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next one is drawn, the end names what failed, the exit status is 1.

    Data are saved before anything is made of them.
    """

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    _replaced(monkeypatch, "figure5", **{broken: fail})
    _replaced(monkeypatch, "figure3_ratios")
    assert main(["figure5", "figure3_ratios", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "FAILED: figure5 (ZeroDivisionError: planted)" in printed.out
    assert "Traceback" in printed.err
    assert (tmp_path / "figure5" / "data.nc").is_file() == (broken != "run")
    assert (tmp_path / "figure3_ratios" / "manifest.json").is_file()
    assert "figure3_ratios" in (tmp_path / "index.md").read_text("utf-8")


def test_a_figure_of_two_experiments_is_drawn_once_the_data_of_both_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whichever of them is drawn again; the index shows it above its panels."""
    drawn: list[str] = []
    for name in COMPOSITES["figure3"].parts:
        draw = partial(lambda name, figure, data: drawn.append(name), name)
        _replaced(monkeypatch, name, draw=draw)
    picture = tmp_path / "figure3" / "figure.png"
    assert main(["figure3_ratios", "--output", str(tmp_path)]) == 0
    assert not picture.exists()
    assert main(["figure3_precision", "--output", str(tmp_path)]) == 0
    assert picture.is_file()
    assert tuple(drawn) == COMPOSITES["figure3"].parts
    assert main(["figure3_ratios", "--redraw", "--output", str(tmp_path)]) == 0
    assert len(drawn) == 4
    index = (tmp_path / "index.md").read_text("utf-8")
    assert index.index("(figure3/figure.png)") < index.index("(figure3_precision/figure.png)")


@pytest.mark.parametrize(
    ("name", "letters"),
    [("figure1", "ABCD"), ("figure2", "AB"), ("figure3", "ABCDEF"), ("figure4", "ABC")],
)
def test_a_figure_of_two_experiments_has_every_panel_of_the_paper(name: str, letters: str) -> None:
    """In their order, from the committed data."""
    with plotting.style():
        figure = COMPOSITES[name].plot(ROOT / "paper_figures")
    titles = [ax.get_title().split("  ")[0] for ax in figure.axes]
    plt.close(figure)
    assert "".join(sorted(title for title in titles if len(title) == 1)) == letters


def test_numbers_are_set_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one experiment by their names, of several after that of each; --seed of all."""
    names = ("figure3_ratios", "figure5", "figure1_linear_equilibrium")
    ratios, five, linear = (_replaced(monkeypatch, name) for name in names)
    output = ["--output", str(tmp_path)]
    assert main(["figure3_ratios", "--networks", "7", "--high_ratios", "1e2", "1e4", *output]) == 0
    assert (ratios[0].networks, ratios[0].high_ratios, ratios[0].seed) == (7, (100.0, 10000.0), 0)
    assert main(["figure1_linear_equilibrium", "--seed", "3", "--preset", "authors", *output]) == 0
    assert (linear[0].seed, linear[0].weight_std) == (3, 0.05)
    both = ["figure5", "figure3_ratios", *output]
    assert main([*both, "--seed", "4", "--figure5.width", "6"]) == 0
    assert (five[0].seed, five[0].width, ratios[1].seed) == (4, 6, 4)
    with pytest.raises(SystemExit, match="0"):
        main(["figure3_ratios", "--help"])
    assert "--high_ratios FLOAT FLOAT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("figure9", "unknown experiment figure9; known: figure1_linear_equilibrium, "),
        ("figure5 --preset authors", "figure5 has no preset 'authors': choose 'paper'"),
        ("--preset none", "has no preset 'none': choose 'paper'"),
        ("figure5 --width 0", "figure5: width must be an integer at least 1"),
        ("figure5 --seed -1", "figure5: seed must be an integer at least 0"),
        ("figure5 --weight_std nan", "figure5: weight_std is nan"),
        ("figure6 --example.depth 0", "figure6: example.depth must be an integer at least 1"),
        ("figure5 --width x", "--width: invalid literal for int() with base 10: 'x'"),
        ("figure5 --networks 3", "--networks"),
        ("figure5 --redraw --width 5", "--redraw draws data that are there"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2 and nothing runs, for names, presets and settings that are wrong."""
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_the_list_has_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    """`list` runs nothing."""
    assert main(["list"]) == 0
    assert set(capsys.readouterr().out.split()) >= set(EVERY)


@pytest.mark.parametrize("options", [[], ["--fast"], ["--preset", "authors"]])
def test_the_checkout_stays_clean(options: list[str]) -> None:
    """Without --output nothing is written where git would see it, whatever the settings."""
    folder = parse(["figure4_training", *options])[0].folder
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", folder / "figure4_training" / "figure.png"], cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert ignored.returncode == 0


def test_a_failed_write_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing partial remains when saving breaks in the middle."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    _replaced(monkeypatch, "figure5")
    assert main(["figure5", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "disk full" in printed.out + printed.err
    assert [p.name for p in (tmp_path / "figure5").iterdir()] == ["data.nc"]


@pytest.mark.slow
def test_killed_at_any_moment_whole_files_stay(tmp_path: Path) -> None:
    """SIGKILL at random moments: what is there can be read, and the next run completes it."""
    names = ("figure5", "figure3_ratios")
    command = [sys.executable, "-m", "experiments", *names, "--fast", "--output", str(tmp_path)]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole = time.perf_counter() - started
    rng = random.Random(0)
    for _ in range(3):
        running = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 1) * whole)
        running.kill()
        running.wait()
        for path in tmp_path.rglob("*.*"):
            if ".partial" in path.name:
                continue
            if path.suffix == ".nc":
                xarray.load_dataset(path, engine="h5netcdf")
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".pdf":
                assert path.read_bytes().rstrip().endswith(b"%%EOF")


def test_ctrl_c_ends_the_command_at_once(tmp_path: Path) -> None:
    """Wherever it is, within a second, and no partial file stays."""
    command = [sys.executable, "-m", "experiments", "figure1_linear_equilibrium"]
    for wait in (0.5, 6.0):
        running = subprocess.Popen(
            [*command, "--output", str(tmp_path)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(wait)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
        # As a shell says it: 130.
        assert running.returncode == -signal.SIGINT
        assert "Traceback" not in errors
        assert not list(tmp_path.rglob("*.partial*"))


def test_the_hash_sees_values() -> None:
    """Data that differ in one value have different hashes."""
    data = xarray.Dataset({"x": ("t", np.arange(3.0)), "y": 1.0})
    changed = data.copy(deep=True)
    changed.x.values[0] = np.nextafter(0, 1)
    assert values_hash(data) == values_hash(data.copy(deep=True)) != values_hash(changed)
