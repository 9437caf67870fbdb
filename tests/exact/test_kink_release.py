"""A unit that was taken for one at its kink leaves it to the side on which it is pulled."""

from __future__ import annotations

import numpy as np
import pytest

from pcdyn.equilibria.kinks import slide
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem


@pytest.mark.parametrize(
    ("prediction", "target", "rest"), [(-0.05, -1.0, -0.05), (0.3, -0.2, 0.05)]
)
def test_a_unit_leaves_its_kink(prediction: float, target: float, rest: float) -> None:
    """F = ½ (x − a)² + ½ (T − relu(x))², started at 0 with T < 0, where the kink is a valley.

    F' vanishes at 0 for the slope s = −a/T: below 0 the minimum is a < 0, above 1 it is (a + T)/2.
    """
    layers = [Dense(np.eye(1)), Dense(np.eye(1), None, "relu")]
    problem = InferenceProblem(Network(layers), input=[prediction], output=[target])
    found = slide(problem, (np.zeros(1),), 1e-9)
    assert found is not None
    np.testing.assert_allclose(found.state[0], [rest], atol=1e-9)
    assert not any(mask.any() for mask in found.at_kink)
