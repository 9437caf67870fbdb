"""Modules of equinox in NetCDF files: the same to the bit, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import pcdyn
from pcdyn import Graph, InferenceProblem, Prediction
from pcdyn.cli import main
from pcdyn.errors import DataError, InputError
from pcdyn.io.modules import described_module, module_of
from pcdyn.io.problems import problem_from_xarray, problem_to_xarray

nn: Any = eqx.nn
KEY = jax.random.key(3)
MODULES: dict[str, Callable[[], Any]] = {
    "Conv1d": lambda: nn.Conv1d(2, 4, 3, stride=2, groups=2, padding="same", key=KEY),
    "Conv2d": lambda: nn.Conv2d(1, 2, (3, 2), padding=((1, 0), (2, 1)), key=KEY),
    "Conv2d without a bias": lambda: nn.Conv2d(
        1, 2, 3, dilation=2, use_bias=False, padding_mode="circular", key=KEY
    ),
    "Conv3d": lambda: nn.Conv3d(1, 2, 2, key=KEY),
    "float32": lambda: nn.Conv2d(1, 2, 3, dtype=jnp.float32, key=KEY),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(2, 1, 3, stride=2, output_padding=1, key=KEY),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 1, 3, padding="SAME", key=KEY),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 1, 3, key=KEY),
    "AvgPool1d": lambda: nn.AvgPool1d(2, 2),
    "AvgPool2d": lambda: nn.AvgPool2d(2, stride=2, padding=1, use_ceil=True),
    "AvgPool3d": lambda: nn.AvgPool3d(2),
    "MaxPool1d": lambda: nn.MaxPool1d(3),
    "MaxPool2d": lambda: nn.MaxPool2d((2, 3), stride=(1, 2)),
    "MaxPool3d": lambda: nn.MaxPool3d(2),
    "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "AdaptiveMaxPool3d": lambda: nn.AdaptiveMaxPool3d(2),
    "Linear": lambda: nn.Linear(3, 2, key=KEY),
    "Linear of scalars": lambda: nn.Linear("scalar", 2, use_bias=False, key=KEY),
    "LayerNorm": lambda: nn.LayerNorm((2, 3), eps=1e-3),
    "LayerNorm without weights": lambda: nn.LayerNorm(3, use_weight=False, use_bias=False),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "GroupNorm of any": lambda: nn.GroupNorm(2, channelwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(3),
    "Identity": lambda: nn.Identity(),
    "Sequential": lambda: nn.Sequential(
        [
            nn.Conv2d(1, 2, 3, key=KEY),
            nn.Lambda(jnp.tanh),
            nn.Lambda(jax.nn.relu),
            nn.Lambda(pcdyn.activations.leaky_relu()),
            nn.Sequential([nn.AvgPool2d(2), nn.GroupNorm(1, 2)]),
        ]
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_made_again_from_its_text_and_arrays(name: str) -> None:
    module = MODULES[name]()
    text, arrays = described_module(module, "'x'")
    again = module_of(text, lambda index, _: np.asarray(arrays[index]))
    assert eqx.tree_equal(again, module)
    assert json.loads(text)["class"] == type(module).__name__


def convolutional() -> InferenceProblem:
    keys = jax.random.split(jax.random.key(0), 4)
    encode = nn.Sequential(
        [
            nn.Conv2d(1, 2, 3, padding=1, key=keys[0]),
            nn.Lambda(jnp.tanh),
            nn.AvgPool2d(2, stride=2),
            nn.GroupNorm(1, 2),
        ]
    )
    graph = Graph(
        {"image": (1, 4, 4), "features": (2, 2, 2), "label": 3},
        [
            Prediction("features", given="image", by=encode),
            Prediction(
                "image",
                given="features",
                by=nn.ConvTranspose2d(2, 1, 2, stride=2, key=keys[1]),
                energy=pcdyn.Gaussian(0.1),
            ),
            Prediction(
                "label", given="features", by=pcdyn.Dense(jax.random.normal(keys[2], (3, 8)) / 3)
            ),
        ],
    )
    image = jax.random.normal(keys[3], (2, 1, 4, 4))
    shown = np.arange(16).reshape(1, 4, 4) < 12
    clamp = {"image": pcdyn.Partial(image, shown), "label": jnp.eye(3)[:2]}
    return InferenceProblem(graph, clamp=clamp)


def test_a_convolutional_graph_is_the_same_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = convolutional()
    monkeypatch.chdir(tmp_path)
    pcdyn.save(problem, "problem.nc")
    again = pcdyn.load_problem("problem.nc")
    assert eqx.tree_equal(again, problem)
    assert pcdyn.load_problem("problem.nc", dtype=np.float32).dtype == np.float32
    rest = pcdyn.equilibrium(problem, initial="zeros")
    pcdyn.save(rest, "rest.nc")
    found: Any = pcdyn.load("rest.nc")
    for mine, other in zip(found.activities, rest.activities, strict=True):
        np.testing.assert_array_equal(mine, other)
    command = ["equilibrium", "--network", "rest.nc", "--initial", "zeros"]
    assert main([*command, "--picture", "rest.png"]) == 0
    words = "graph of image 1×4×4, features 2×2×2, label 3, 1 Sequential, 1 ConvTranspose2d"
    assert words in capsys.readouterr().out


def test_a_chain_of_modules_is_the_same_from_its_file(tmp_path: Path) -> None:
    layers = [nn.Linear(3, 4, key=KEY), nn.LayerNorm(4), pcdyn.Dense(jnp.ones((2, 4)))]
    network = pcdyn.Network(layers, input_width=3)
    problem = InferenceProblem(network, input=jnp.ones(3), output=jnp.ones(2))
    pcdyn.save(problem, tmp_path / "problem.nc")
    assert eqx.tree_equal(pcdyn.load_problem(tmp_path / "problem.nc"), problem)


class Own(eqx.Module):
    """A module that is not equinox's."""

    def __call__(self, x: jax.Array, *, key: Any = None) -> jax.Array:
        return x


def _with(layer: Any, where: Callable[[Any], Any], value: Any) -> Any:
    return eqx.tree_at(where, layer, value, is_leaf=lambda x: x is None)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "of the user": (lambda: Own(), "that of 'y' is or has a Own"),
    "a function": (lambda: jnp.tanh, "that of 'y' is or has a Function"),
    "inside": (lambda: nn.Sequential([nn.Identity(), Own()]), "that of 'y' is or has a Own"),
    "a Lambda of a function without a name": (
        lambda: nn.Lambda(jnp.sin), "the Lambda that predicts 'y': .* has no name"),
    "another class of equinox": (lambda: nn.Dropout(0.0), "that of 'y' is or has a Dropout"),
    "with a bias put in": (
        lambda: _with(nn.Linear(4, 4, use_bias=False, key=KEY), lambda m: m.bias, jnp.ones(4)),
        "the Linear that predicts 'y' is not as its class makes it"),
    "with a bias taken out": (
        lambda: _with(nn.Linear(4, 4, key=KEY), lambda m: m.bias, None),
        "the Linear that predicts 'y' is not as its class makes it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_holds_is_refused_by_node_and_class(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    graph = Graph({"y": 4, "x": 4}, [Prediction("y", given="x", by=make())])
    problem = InferenceProblem(graph, clamp={"x": jnp.ones(4)})
    with pytest.raises(InputError, match=message):
        pcdyn.save(problem, tmp_path / "problem.nc")
    assert not list(tmp_path.iterdir())


def tampered(change: Callable[[dict[str, Any]], Any]) -> Callable[[xarray.Dataset], Any]:
    """With another text in place of that of the first module."""

    def changed(data: xarray.Dataset) -> xarray.Dataset:
        description = json.loads(data.attrs["module_2"])
        other = change(description) or description
        return data.assign_attrs(module_2=other if isinstance(other, str) else json.dumps(other))

    return changed


def test_settings_that_json_does_not_have_are_refused() -> None:
    with pytest.warns(UserWarning, match="static"):
        pool = nn.AvgPool1d(kernel_size=(np.int64(1),))
    with pytest.raises(InputError, match="the AvgPool1d that predicts 'y' is not as its class"):
        described_module(pool, "'y'")


ARRAY = "module_2_array_0"
TAMPERED: dict[str, tuple[Callable[[xarray.Dataset], Any], str]] = {
    "an unknown class": (tampered(lambda d: d.update({"class": "Dropout"})), "class 'Dropout'"),
    "a class elsewhere": (tampered(lambda d: d.update({"class": "os.system"})), "class 'os.system"),
    "no class": (tampered(lambda d: d.pop("class") and None), "KeyError"),
    "no text of JSON": (tampered(lambda _: "__import__('os')"), "JSONDecodeError"),
    "lists without end": (tampered(lambda _: "[" * 100_000), "RecursionError"),
    "another kind of text": (tampered(lambda _: "[3]"), "no module is described by"),
    "a setting that there is not": (tampered(lambda d: d.update(depth=3)), "unexpected keyword"),
    "a setting of another kind": (tampered(lambda d: d.update(kernel_size="a")), "no module is"),
    "a setting that does not fit": (tampered(lambda d: d.update(groups=3)), "no module is"),
    "a mode that there is not": (tampered(lambda d: d.update(padding_mode="X")), "no module is"),
    "a dilation of words": (
        tampered(lambda d: d.update(dilation=["a", "b"])), "'image' does not accept"),
    "a stride of words": (tampered(lambda d: d.update(stride=["a", "b"])), "no module is"),
    "other channels": (tampered(lambda d: d.update(out_channels=9)), r"needs \(9, "),
    "channels without end": (tampered(lambda d: d.update(out_channels=10**9)), "needs"),
    "no text": (lambda d: d.drop_attrs(deep=False).assign_attrs(
        {k: v for k, v in d.attrs.items() if k != "module_2"}), "lacks 'module_2'"),
    "a missing array": (lambda d: d.drop_vars(ARRAY), f"lacks '{ARRAY}'"),
    "an array of another shape": (
        lambda d: d.isel({f"{ARRAY}_axis_1": [0]}), r"array 0 .* shape \(1, 1, 2, 2\)"),
    "an array of fewer axes": (
        lambda d: d.isel({f"{ARRAY}_axis_0": 0}), f"{ARRAY} has the dimensions"),
    "an array of integers": (lambda d: d.assign({ARRAY: d[ARRAY].astype(int)}), "real numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_file_that_was_tampered_with_is_refused(name: str, tmp_path: Path) -> None:
    change, message = TAMPERED[name]
    data = change(problem_to_xarray(convolutional()))
    with pytest.raises(InputError, match=message):
        problem_from_xarray(data)
    data.to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    with pytest.raises(DataError, match=message):
        pcdyn.load_problem(tmp_path / "bad.nc")
