"""Deep networks in loops over equal layers are the same networks.

Oracle: docs/maths.md §2 in NumPy, LAPACK on the dense matrix, and the short network written out.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcdyn import mlp
from pcdyn.integrators.structured import PaddedChain
from pcdyn.model import network, stacked
from pcdyn.model.energies.energy import CrossEntropy, Gaussian
from pcdyn.model.energies.generalised import LogCosh, Student
from pcdyn.model.problem import InferenceProblem
from tests.networks import EPS, assert_close, build_case

WIDTHS = (3, 4, 4, 4, 4, 2)
# Sums of a few tens of terms of order 1, in another order.
ROUND_OFF = 1e3 * EPS


@pytest.fixture(autouse=True)
def _short_networks_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "MOST_WRITTEN_OUT", 2)
    monkeypatch.setattr(network, "MOST_WRITTEN_OUT", 2)


@pytest.mark.parametrize("clamp", ["both", "input", "output", "none"])
@pytest.mark.parametrize("precision", ["unit", "mixed"])
@pytest.mark.parametrize("batch", [None, 3])
def test_the_field_is_that_of_numpy(clamp: str, precision: str, batch: int | None) -> None:
    """ẋ, ε, E and the norms by layer, of runs of layers and of layers that stand alone."""
    case = build_case(
        seed=4, widths=WIDTHS, clamp=clamp, precision=precision, bias=True,
        activations=("tanh",), slow=True, batch=batch,
    )  # fmt: skip
    deep = stacked.stacked(case.problem)
    assert isinstance(deep, stacked.StackedProblem)
    if precision == "unit":
        assert len(deep.runs) < case.depth

    @eqx.filter_jit
    def look(deep: Any, state: Any) -> Any:
        deep = deep.prepared()
        field = deep.vector_field(0.0, state)
        return field, *deep.observe(0.0, state), deep.norms(field)

    field, errors, energies, lengths = look(deep, deep.pack(case.state))
    assert_close(deep.unpack(field), case.field(), ROUND_OFF)
    assert_close(deep.unpack_errors(errors), case.errors(case.activities), ROUND_OFF)
    assert_close(energies, case.layer_energies(case.activities), ROUND_OFF)
    norms = np.stack([np.linalg.norm(x, axis=-1) for x in case.field()], axis=-1)
    assert_close(lengths, norms, ROUND_OFF)


@pytest.mark.parametrize(
    "energy",
    [
        LogCosh(2.0),
        [*(Student(precision=float(p)) for p in range(1, 5)), LogCosh()],
        [*[Gaussian(0.5)] * 4, CrossEntropy()],
    ],
)
def test_other_energies_are_those_of_the_problem(energy: Any) -> None:
    """F and its gradient agree with those of the layers one by one."""
    case = build_case(seed=2, widths=WIDTHS, activations=("tanh",))
    problem = InferenceProblem(case.network, input=case.input, output=[0.25, 0.75], energy=energy)
    deep = stacked.stacked(problem)
    assert isinstance(deep, stacked.StackedProblem)
    look = eqx.filter_jit(lambda p, x: (p.free_energy(x), p.gradient(x)))
    energy, gradient = look(deep, deep.pack(case.state))
    expected = look(problem, case.state)
    assert_close((energy, deep.unpack(gradient)), expected, ROUND_OFF)


def test_padded_blocks_solve_as_the_dense_matrix() -> None:
    """A block-tridiagonal matrix of layers of several widths, for two samples, by LAPACK."""
    rng, widths = np.random.default_rng(0), (3, 1, 4, 2)
    total, ends = sum(widths), np.cumsum((0, *widths))
    layer = np.repeat(np.arange(4), widths)
    near = np.abs(layer[:, None] - layer) <= 1
    matrices = rng.normal(size=(2, total, total)) * near
    # Diagonally dominant: positive definite.
    matrices = (matrices + np.swapaxes(matrices, 1, 2)) / 2 + 3 * total * np.eye(total)
    chain, rhs = PaddedChain(widths), rng.normal(size=(2, total))
    blocks = chain.blocks(
        lambda x: jnp.einsum("bij,bj->bi", jnp.asarray(matrices), x), jnp.asarray(rhs),
        symmetric=False,
    )  # fmt: skip
    (solution,) = chain.factorise(blocks).solve((jnp.asarray(rhs),))
    expected = np.stack([np.linalg.solve(m, b) for m, b in zip(matrices, rhs, strict=True)])
    assert_close(solution, expected, ROUND_OFF)
    pairs = [(i, i) for i in range(4)] + [(i, i + 1) for i in range(3)] + [
        (i + 1, i) for i in range(3)
    ]  # fmt: skip
    flat = [
        matrices[:, ends[i] : ends[i + 1], ends[j] : ends[j + 1]].reshape(2, -1) for i, j in pairs
    ]
    parts = [x.reshape(2, -1) for x in (blocks.diagonal, blocks.upper, blocks.lower)]
    found = jnp.concatenate(parts, axis=-1)[:, chain.entries]
    assert_close(found, np.concatenate(flat, axis=-1), ROUND_OFF)


@pytest.mark.slow
def test_weights_and_passes_do_not_depend_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same key draws the same weights, bit for bit; the feedforward pass agrees."""

    def draw() -> network.Network:
        key = jax.random.key(3)
        return mlp(WIDTHS, activation="tanh", initialisation="orthogonal", key=key)

    in_loops, x = draw(), jnp.ones((2, 3))
    passed = in_loops.feedforward(x)
    monkeypatch.setattr(network, "MOST_WRITTEN_OUT", 16)
    jax.clear_caches()
    written_out = draw()
    assert in_loops == written_out
    assert_close(passed, written_out.feedforward(x), ROUND_OFF)
