"""Graphs on the command line: from TOML and NetCDF files, through every command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
import pytest

import pcdyn
from pcdyn import Dense, Gaussian, Graph, InferenceProblem, Partial, Prediction
from pcdyn.cli import main

ROOT = Path(__file__).parents[2]
EYE = np.array([[[0.5, -1.0], [0.2, 0.1]], [[1.0, 0.25], [-0.3, 0.6]]])
LABEL = np.array([[0.2, -0.4], [-0.3, 0.6]])
FILE = """
[graph]
seed = 3
activation = "identity"
clamp = {eye = "eye.npy", label = "data.npz:one_hot", ear = PART}
[graph.nodes]
eye = [2, 2]
ear = 3
high = 5
label = 2
[[graph.predictions]]
target = "high"
given = ["eye", "ear"]
bias = 0.5
[[graph.predictions]]
target = "label"
given = "high"
weight_std = 0.3
precision = [1.0, 4.0]
[[graph.predictions]]
target = "ear"
given = ["high"]
precision = 0.1
[[graph.predictions]]
target = "ear"
mean = [0.0, 0.5, 1.0]
precision = 2
"""
VALUES, MASK = "[[1, 0, 2], [3, 4, 5.5]]", "[[true, false, true], [false, true, true]]"
FILE = FILE.replace("PART", f"{{values = {VALUES}, mask = {MASK}}}")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, beside the one of the graph and its data."""
    (tmp_path / "here").mkdir()
    np.save(tmp_path / "eye.npy", EYE)
    np.savez(tmp_path / "data.npz", one_hot=LABEL, other=EYE)
    (tmp_path / "graph.toml").write_text(FILE, "utf-8")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def in_python(activation: str = "identity", seed: int = 3) -> InferenceProblem:
    """What `FILE` means, by calls of the library."""
    weights, biases, _ = jr.split(jr.key(seed), 3)

    def dense(index: int, rows: int, columns: int, std: float, bias: Any = None) -> Dense:
        weight = std * jr.normal(jr.fold_in(weights, index), (rows, columns))
        return Dense(weight, bias, activation)

    bias = 0.5 * jr.normal(jr.fold_in(biases, 0), (5,))
    graph = Graph(
        {"eye": (2, 2), "ear": 3, "high": 5, "label": 2},
        [
            Prediction("high", given=("eye", "ear"), by=dense(0, 5, 7, 7**-0.5, bias)),
            Prediction(
                "label",
                given="high",
                by=dense(1, 2, 5, 0.3),
                energy=Gaussian(np.array([1.0, 4.0])),
            ),
            Prediction("ear", given="high", by=dense(2, 3, 5, 5**-0.5), energy=Gaussian(0.1)),
            Prediction("ear", by=[0.0, 0.5, 1.0], energy=Gaussian(2.0)),
        ],
    )
    mask = [[True, False, True], [False, True, True]]
    ear = Partial([[1.0, 0.0, 2.0], [3.0, 4.0, 5.5]], mask)
    return InferenceProblem(graph, clamp={"eye": EYE, "label": LABEL, "ear": ear})


def same(found: Any, expected: Any) -> None:
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_the_equilibrium_of_a_file_is_that_of_the_graph(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = ["--network", "../graph.toml"]
    start = ["--initial", "zeros"]
    found = record(capsys, "equilibrium", *network, *start, "--data", "rest.nc")
    problem = in_python()
    same(pcdyn.load_problem("rest.nc"), problem)
    rest = pcdyn.equilibrium(problem, initial="zeros")
    assert found["free_energy"] == np.mean(rest.free_energy)
    assert found["problem"]["nodes"] == {"eye": [2, 2], "ear": [3], "high": [5], "label": [2]}
    saved: Any = pcdyn.load("rest.nc")
    same(saved.activities, rest.activities)
    exact = pcdyn.linear_equilibrium(problem)
    for mine, other in zip(saved.activities, exact, strict=True):
        # A closed form: round-off of 10 free units.
        np.testing.assert_allclose(mine, other, atol=1e-12)
    # Options beside the file win where a prediction has nothing of its own.
    options = ["--activation", "tanh", "--seed", "5", "--overwrite", "--data", "rest.nc"]
    record(capsys, "equilibrium", *network, *start, *options)
    same(pcdyn.load_problem("rest.nc"), in_python("tanh", 5))


COMMANDS: dict[str, tuple[list[str], str]] = {
    "simulate": (["--t1", "2", "--times", "3", "--initial", "zeros"], "free_energy_end"),
    "equilibrium": (["--initial", "zeros"], "free_energy"),
    "compare": (
        ["--t1", "1", "--initial", "zeros", "--integrators", "exact", "tsit5", "--tolerances",
         "1e-3", "--repeats", "1"], "reference",
    ),
    "stability": (["--at", "zeros"], "slowest_rate"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_graph_from_toml_and_from_netcdf(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, number = COMMANDS[command]
    first = record(capsys, command, "--network", "../graph.toml", *options, "--out", "a")
    assert Path(f"a/{command}.png").read_bytes().startswith(b"\x89PNG")
    # A file of a result is a network again, partly clamped nodes included, as is one of a problem.
    pcdyn.save_problem(in_python(), "problem.nc")
    for file in (f"a/{command}.nc", "problem.nc"):
        again = record(capsys, command, "--network", file, *options)
        assert again[number] == first[number]
        assert again["problem"] == first["problem"]
    assert main([command, "--network", "problem.nc", *options]) == 0
    shown = capsys.readouterr().out
    words = "graph of eye 2×2, ear 3, high 5, label 2, 3 identity, 1 prior, 2 samples, float64"
    assert words in shown


def test_a_state_of_a_graph_on_file(capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--network", "../graph.toml", "--initial", "zeros"]
    rates = np.asarray(pcdyn.stability(in_python(), at="zeros").slowest_rate)
    for command in (["simulate", "--t1", "1"], ["equilibrium"]):
        record(capsys, *command, *network, "--overwrite", "--data", "run.nc")
        found = record(capsys, "stability", "--at", "run.nc")
        # The Hessian of a linear graph is the same everywhere.
        np.testing.assert_allclose(found["slowest_rate"], rates, rtol=1e-9)


def test_energies_and_precisions_beside_a_graph_on_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    problem = in_python()
    pcdyn.save_problem(problem, "problem.nc")
    graph, data = problem.graph, {"eye": EYE, "label": LABEL}
    assert isinstance(graph, Graph)
    whole = InferenceProblem(
        graph, clamp=data, energy=pcdyn.Student(0.5, precision=[1.0, 2.0, 3.0, 4.0])
    )
    pcdyn.save_problem(whole, "whole.nc")
    options = ["--network", "whole.nc", "--initial", "zeros", "--precisions", "1", "2", "3", "4"]
    rest = ["equilibrium", *options, "--energy", "gaussian", "--data", "rest.nc"]
    record(capsys, *rest)
    wanted = InferenceProblem(graph, clamp=data, energy=Gaussian([1.0, 2.0, 3.0, 4.0]))
    same(pcdyn.load_problem("rest.nc"), wanted)
    assert main(["equilibrium", *options]) == 2
    assert "--energy beside --precisions" in capsys.readouterr().err
    for option, flag in (
        ("--input=free", "--input"),
        ("--batch=3", "--batch"),
        ("--seed=1", "--s"),
    ):
        assert main(["equilibrium", "--network", "problem.nc", option]) == 2
        assert re.search(rf"holds a graph and its data: leave {flag}", capsys.readouterr().err)


def test_random_data_have_the_batch_that_is_asked_for_or_given(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = FILE.replace('"eye.npy"', '"random"')
    clamp = ", ".join(['{eye = "random"', 'high = "free"', 'label = "random"}'])
    for name, content, options, samples in (
        ("given.toml", text, [], 2),
        ("all.toml", re.sub("clamp = .*", f"clamp = {clamp}", text), ["--batch", "400"], 400),
    ):
        (folder / name).write_text(content)
        start = ["--initial", "zeros", "--overwrite", "--data", "a.nc"]
        record(capsys, "equilibrium", "--network", f"../{name}", *start, *options)
        drawn: Any = pcdyn.load_problem("a.nc").clamp
        assert drawn[0].shape == (samples, 4)
    numbers = np.concatenate([np.ravel(drawn[0]), np.ravel(drawn[3])])
    assert np.unique(numbers).size == numbers.size == 2400
    # The mean square of 2400 standard normal numbers is 1 to within 5 standard errors √(2/2400).
    assert abs(np.mean(numbers**2) - 1) < 0.145


def test_a_graph_that_is_a_chain_is_the_chain(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "chain.toml").write_text(
        '[graph]\nclamp = {a = [1, 0.5], c = [0.25]}\nnodes = {a = 2, b = 3, c = 1}\n'
        '[[graph.predictions]]\ntarget = "b"\ngiven = "a"\n'
        '[[graph.predictions]]\ntarget = "c"\ngiven = "b"\n'
    )  # fmt: skip
    assert main(["equilibrium", "--network", "../chain.toml", "--data", "a.nc"]) == 0
    assert "2-3-1 network, tanh, one sample" in capsys.readouterr().out
    found = pcdyn.load_problem("a.nc")
    np.testing.assert_array_equal(found.input, [1.0, 0.5])
    assert main(["equilibrium", "--network", "a.nc", "--float32"]) == 0
    assert "float32" in capsys.readouterr().out


def test_float32_is_that_of_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    # Commands are processes of their own: JAX keeps indices of 64 bits when float64 goes.
    jax.clear_caches()
    command = ["equilibrium", "--network", "../graph.toml", "--initial", "zeros", "--float32"]
    assert record(capsys, *command)["problem"]["dtype"] == "float32"


def test_the_table_of_the_guide(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "graphs.md").read_text("utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    (folder / "guide.toml").write_text(block)
    draw = np.random.default_rng(0)
    np.save(folder / "images.npy", draw.normal(size=(2, 784)))
    np.savez(folder / "labels.npz", one_hot=np.eye(10)[:2], labels=np.arange(2.0))
    found = record(capsys, "equilibrium", "--network", "../guide.toml")
    assert found["status_counts"] == {"CONVERGED": 2}
    assert found["problem"]["nodes"]["high"] == [8, 7, 7]


def changed(old: str, new: str) -> str:
    assert old in FILE, old
    return FILE.replace(old, new, 1)


BAD: dict[str, tuple[str, str]] = {
    "both tables": (FILE + "[network]\nwidths = [2, 2]\n", r"a table \[network\] and a table"),
    "neither": ("", r"has no table \[network\], and no \[graph\]"),
    "another table": (FILE + "[grap]\n", "unknown entry 'grap' at the top"),
    "no table": ("graph = 3", r"has no table \[graph\]"),
    "unknown key": (
        changed("seed =", "sed ="), r"unknown key 'sed' in \[graph\]; did you mean 'seed'"),
    "no nodes": ("[graph]\nseed = 1", r"\[graph\] lacks nodes, a table"),
    "no predictions": ("[graph]\nnodes = {a = 1}", r"\[graph\] lacks predictions, tables"),
    "predictions that are none": (
        "[graph]\nnodes = {a = 1}\npredictions = [1]", r"in \[graph\], predictions must be tables"),
    "a node of no size": (changed("ear = 3", 'ear = "3"'), "size of node 'ear' must be an integer"),
    "a node without units": (changed("high = 5", "high = 0"), "node 'high' must be .* at least 1"),
    "a shape of no sizes": (changed("[2, 2]", "[2, 2.5]"), "size of node 'eye' must be an integer"),
    "a node too large": (changed("high = 5", "high = 2000000000"),
                         "prediction 1, of 'high': a weight of .* would take"),
    "no target": (changed('target = "label"', ""), "prediction 2 needs a target"),
    "unknown target": (changed('target = "label"', 'target = "lable"'),
                       "prediction 2, of 'lable': there is no node 'lable'"),
    "unknown target of a prior": (changed('target = "ear"\nmean', 'target = "nose"\nmean'),
                                  "prediction 4, of 'nose': there is no node 'nose'"),
    "unknown source": (changed('given = ["high"]', 'given = ["low"]'),
                       "prediction 3, of 'ear': there is no node 'low'"),
    "a source twice": (changed('["eye", "ear"]', '["ear", "ear"]'),
                       "prediction 1, of 'high': .* given a node twice"),
    "given nothing": (changed('given = "high"', ""), "prediction 2, of 'label' needs either given"),
    "given and a mean": (changed("bias = 0.5", "mean = 0"), "prediction 1, of 'high' needs either"),
    "unknown key of a prediction": (
        changed("weight_std", "weigth_std"),
        "unknown key 'weigth_std' in prediction 2, of 'label'; did you mean 'weight_std'"),
    "a prior with an activation": (
        FILE + 'activation = "tanh"', "unknown key 'activation' in prediction 4, of 'ear'; known"),
    "wrong type": (changed("weight_std = 0.3", 'weight_std = "small"'),
                   "in prediction 2, of 'label', weight_std must be a number, got 'small'"),
    "negative deviation": (changed("weight_std = 0.3", "weight_std = -1"),
                           "prediction 2, of 'label': weight_std must be .* at least 0"),
    "unknown activation": (changed("bias = 0.5", 'activation = "tanhh"'),
                           "prediction 1, of 'high': unknown activation 'tanhh'"),
    "unknown energy": (changed("bias = 0.5", 'energy = "huber"'),
                       "prediction 1, of 'high': unknown energy 'huber'"),
    "precision of another size": (changed("[1.0, 4.0]", "[1.0, 4.0, 2.0]"), "energy of 'label': "),
    "negative precision": (changed("precision = 0.1", "precision = -1"),
                          "prediction 3, of 'ear': .*positive"),
    "a mean of another size": (changed("[0.0, 0.5, 1.0]", "[0.0, 0.5]"),
                          "the prediction of 'ear' has shape"),
    "clamp of an unknown node": (changed("{eye =", "{nose ="), "there is no node 'nose'"),
    "clamp of a wrong type": (changed('"eye.npy"', "true"), "clamp of 'eye' must be .*got True"),
    "a missing file": (changed("eye.npy", "no.npy"), "clamp of 'eye': there is no file .*no.npy"),
    "another kind of file": (changed("eye.npy", "eye.csv"), "eye '.*eye.csv' is neither"),
    "a missing array": (changed(":one_hot", ":x"), "clamp of 'label': .* has no array 'x'"),
    "data of another shape": (changed(":one_hot", ":other"),
                          r"clamp of 'label' has shape \(2, 2, 2\)"),
    "another number of samples": (changed('"eye.npy"', "[[1, 2], [3, 4]]"), "same batch size"),
    "texts for data": (changed(VALUES, '["a", "b", "c"]'), "clamp of 'ear': .*values"),
    "half of a partial clamp": (changed(f"values = {VALUES}, ", ""),
                                "clamp of 'ear' needs both values and mask"),
    "a mask of another shape": (changed(MASK, "[true]"),
                                r"clamp of 'ear': mask has shape \(1,\)"),
    "a mask of numbers": (changed(MASK, "[1, 0, 1]"),
                          "clamp of 'ear': mask must be of booleans"),
    "random values in part": (changed(f"values = {VALUES}", 'values = "random"'),
                              "in clamp of 'ear', values must be a file or a list"),
    "a graph in pieces": (changed('["eye", "ear"]', '["ear"]'), "in pieces: .*'eye'"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_every_bad_file_is_one_line(
    text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.toml").write_text(text, "utf-8")
    assert main(["simulate", "--network", "../bad.toml", "--out", "run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: .*({message}).*\n", printed.err), printed.err
    assert not Path("run").exists()


REFUSED = {
    "options of chains": ("equilibrium --widths 2 2 --input free", "leave --input, --widths out"),
    "precisions of chains": ("equilibrium --precisions 2", "leave --precisions out"),
    "a batch that the data contradict": ("equilibrium --batch 5", "a batch of 5 contradicts"),
    "a seed of 65 bits": ("equilibrium --seed 9223372036854775808", "--seed must be"),
    "no feedforward pass": ("simulate", "no feedforward pass: .* initial=.zeros"),
    "a method of chains": (
        "equilibrium --initial zeros --method fixed_point",
        "known for a chain of layers alone",
    ),
}


@pytest.mark.parametrize(("command", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_graph_does_not_have_is_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = command.split()
    assert main([first, "--network", "../graph.toml", *rest]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{message}.*\n", printed.err), printed.err
