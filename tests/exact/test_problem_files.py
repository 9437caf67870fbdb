"""Problems survive the way through a NetCDF file to the bit; what a file cannot hold is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcdyn
from networks import build_case
from pcdyn.errors import ActivationError, DataError, InputError


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "mixed", "bias": True, "slow": True, "batch": 3},
        {"precision": "unit", "clamp": "input"},
        {"precision": "number", "clamp": "output", "activations": ("softplus",)},
    ],
)
def test_a_saved_problem_is_the_same_problem(tmp_path: Path, options: dict[str, Any]) -> None:
    case = build_case(seed=1, widths=(2, 3, 2, 2), **options)
    pcdyn.save_problem(case.problem, tmp_path / "problem.nc")
    found = pcdyn.load_problem(tmp_path / "problem.nc")
    expected = case.problem
    assert found.network.layers[0].activation == expected.network.layers[0].activation
    assert found.free_layers == expected.free_layers
    for index in range(1, 4):
        np.testing.assert_array_equal(
            found.energy[index - 1].weights.matrix(case.widths[index], jnp.float64),
            case.precision(index),
        )
    ours, theirs = (
        jax.tree.leaves((p.network, p.input, p.output, p.time_constants)) for p in (found, expected)
    )
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    weight = np.ones((2, 2))
    own = pcdyn.Activation("own", jnp.sin)
    disguised = pcdyn.Activation("tanh", jnp.sin)
    file = tmp_path / "problem.nc"
    for activation in (own, disguised):
        network = pcdyn.Network([pcdyn.Dense(weight, activation=activation)])
        with pytest.raises(ActivationError, match="no name that a file could hold"):
            pcdyn.save_problem(pcdyn.InferenceProblem(network, input=[1.0, 2.0]), file)
    network = pcdyn.Network([eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))], input_width=2)
    with pytest.raises(InputError, match="layer 1 is or has a MLP"):
        pcdyn.save_problem(pcdyn.InferenceProblem(network, input=[1.0, 2.0]), file)
    network = pcdyn.Network([pcdyn.Dense(weight), pcdyn.Dense(weight)])
    problem = pcdyn.InferenceProblem(
        network, input=[1.0, 2.0], output=[0.0, 1.0], energy=pcdyn.CustomEnergy(jnp.square)
    )
    with pytest.raises(InputError, match="CustomEnergy is no energy that pcdyn knows by name"):
        pcdyn.save_problem(problem, file)
    assert not any(tmp_path.iterdir())


def test_a_run_without_its_network_has_no_problem(tmp_path: Path) -> None:
    problem = build_case(seed=1, widths=(2, 2)).replace(clamp="input").problem
    pcdyn.simulate(problem, t1=1.0, integrator="exact").to_netcdf(tmp_path / "run.nc")
    with pytest.raises(DataError, match=r"run\.nc: there is no network in this file"):
        pcdyn.load_problem(tmp_path / "run.nc")
