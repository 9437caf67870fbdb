"""One row per bad input to learned precisions, and the error that names it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn import linear
from pcdyn.errors import (
    DtypeError,
    InputError,
    NotLinearError,
    PcdynError,
    PosteriorError,
    PrecisionError,
    ShapeError,
)
from pcdyn.learning import PrecisionFlow, output_noise, variational_free_energy
from pcdyn.model.energies.energy import CrossEntropy, Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem

pytestmark = pytest.mark.unchecked

WEIGHTS = (np.array([[1.0, 0.5], [0.0, 1.0]]), np.array([[1.0, 1.0], [0.0, 1.0]]))
DATA = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def problem(activation: str = "identity", **changes: Any) -> InferenceProblem:
    options: dict[str, Any] = {"input": DATA, "output": DATA[::-1] ** 2 - 0.3, **changes}
    return InferenceProblem(Network([Dense(w, activation=activation) for w in WEIGHTS]), **options)


def flow(*structures: str, posterior: Any = "laplace", **changes: Any) -> Any:
    return PrecisionFlow(problem(**changes), structures, posterior)


def bound(posterior: Any, **changes: Any) -> Any:
    return variational_free_energy(problem(**changes), (jnp.zeros((3, 2)),), posterior=posterior)


BAD: dict[str, tuple[Any, type[PcdynError], str]] = {
    "an unknown structure": (lambda: flow("scalar", "sparse"), InputError, "sparse.*diagonal"),
    "one structure for two layers": (lambda: flow("scalar"), ShapeError, "1 structures"),
    "no structures": (lambda: PrecisionFlow(problem(), None), InputError, "got None"),
    "structures in one word": (
        lambda: PrecisionFlow(problem(), "full"), InputError, "each layer"),
    "structures of two kinds": (lambda: flow("scalar", 1), InputError, "structure 1"),
    "a list as a structure": (
        lambda: flow(["full"], "full"), InputError, r"structure \['full'\]"),
    "a covariance for all time": (
        lambda: flow("scalar", "full", posterior=np.eye(2)), InputError, "ndarray.*laplace"),
    "no posterior": (lambda: bound(None), DtypeError, "posterior is a NoneType"),
    "nothing to learn": (lambda: flow("fixed", "fixed"), InputError, "fixed"),
    "an unknown posterior": (lambda: flow("scalar", "full", posterior="map"), InputError, "map"),
    "a free output": (lambda: flow("scalar", "full", output=None), InputError, "clamp the output"),
    "another energy": (
        lambda: flow("scalar", "full", output=np.eye(3)[:, :2] + [[0, 0], [0, 0], [0.5, 0.5]],
                     energy=CrossEntropy()), InputError, "CrossEntropy"),
    "a matrix as a scalar": (
        lambda: flow("scalar", "full", energy=Gaussian([np.eye(2), 1.0])),
        ShapeError, r"layer 1 .* \(2, 2\).*scalar"),
    "another start": (
        lambda: flow("scalar", "full").initial_state("zeros"), InputError, "unknown initial state"),
    "a covariance of another size": (lambda: bound(np.eye(3)), ShapeError, r"give \(2, 2\)"),
    "a covariance that is not symmetric": (
        lambda: bound([[1.0, 0.2], [0.0, 1.0]]), PosteriorError, r"asymmetry 2.0e-01.*S \+ S.T"),
    "a covariance that is none": (lambda: bound(-np.eye(2)), PosteriorError, "not positive def"),
    "a posterior that is unknown": (lambda: bound("mean field"), InputError, "mean field"),
    "no minimum": (
        lambda: variational_free_energy(
            problem("tanh", output=np.full((3, 2), -0.9)), (np.full((3, 2), 1.0),)),
        PosteriorError, "of 3 samples"),
    "too few samples": (
        lambda: output_noise(problem(input=DATA[:1], output=DATA[:1])),
        PrecisionError, "1 samples do not span the 2 outputs"),
    "noise of a tanh network": (lambda: output_noise(problem("tanh")), NotLinearError, "tanh"),
    "likelihood of a free output": (
        lambda: linear.negative_log_likelihood(problem(output=None)), InputError, "clamp both"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    """The error's class and what it says."""
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
