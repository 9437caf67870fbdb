"""Methods agree wherever they must, over random networks; residuals are recomputed in NumPy.

Shapes are fixed and only numbers are drawn, so that each program is compiled once. Weights are so
small that F has one equilibrium: then every method ends within ‖gradient‖ / λ_min of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcdyn.equilibria.equilibrium import equilibrium
from pcdyn.equilibria.solvers import (
    ConjugateGradients,
    ErrorDescent,
    GaussNewton,
    GradientDescent,
    PseudoTransient,
)
from tests.networks import EPS, Case, assert_close, build_case, few, least_curvature

SEEDS = st.integers(0, 2**32 - 1)
TOLERANCE = 1e-8
FREE_OUTPUT = (GaussNewton(), PseudoTransient(), GradientDescent(dt=0.02))
BOTH = (
    *FREE_OUTPUT,
    GaussNewton(explicit_width=1),
    ErrorDescent(),
    ErrorDescent(nesterov=False),
    ConjugateGradients(),
)

# What is clamped, the methods that apply, and the network.
KINDS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "tanh, full precisions": ("both", BOTH, {
        "widths": (3, 4, 4, 2), "activations": ("tanh",), "precision": "full", "bias": True}),
    "deep sigmoid, diagonal precisions": ("both", BOTH, {
        "widths": (3, *[4] * 7, 2), "activations": ("sigmoid",), "precision": "diagonal"}),
    "wide output, softplus": ("both", BOTH, {
        "widths": (3, 4, 6), "activations": ("softplus",), "precision": "scalar"}),
    "free output": ("input", FREE_OUTPUT, {
        "widths": (3, 4, 4, 2), "activations": ("tanh",), "precision": "full", "bias": True}),
}  # fmt: skip


def drawn(name: str, seed: int) -> Case:
    """Weights a third of the usual size."""
    clamp, _, options = KINDS[name]
    case = build_case(seed=seed, clamp=clamp, batch=3, **options)
    return case.replace(weights=tuple(0.3 * weight for weight in case.weights))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_methods_agree(name: str) -> None:
    """Two points with gradients g and g' lie within (‖g‖ + ‖g'‖) / λ_min of each other."""

    @few(max_examples=4)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        case = drawn(name, seed)
        ends = []
        for method in KINDS[name][1]:
            found = equilibrium(case.problem, method=method, tolerance=TOLERANCE)
            at = case.replace(activities=tuple(np.asarray(x) for x in found.activities))
            sizes = np.stack([np.linalg.norm(g, axis=-1) for g in at.field()], axis=-1)
            assert np.all(sizes <= TOLERANCE)
            assert_close(found.residual_norms, sizes, 1e3 * EPS)
            ends.append(found)
        # Halved, for it is that between the two points that counts.
        curvature = least_curvature(case.problem, ends[0].state) / 2
        assert curvature > 0.01
        bound = 2 * TOLERANCE * len(case.free) ** 0.5 / curvature
        for other in ends[1:]:
            for ours, theirs in zip(ends[0].state, other.state, strict=True):
                assert np.all(np.linalg.norm(np.asarray(ours) - theirs, axis=-1) <= bound)

    check()
