"""Phase portraits: linear flows by NumPy, decoupled chains by bisection, kinks by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from matplotlib import pyplot as plt

from pcdyn.analysis.phase_portrait import phase_portrait
from pcdyn.errors import InputError, ShapeError
from pcdyn.model.energies.energy import CrossEntropy, Gaussian
from pcdyn.model.network import Dense, Network
from pcdyn.model.problem import InferenceProblem
from pcdyn.plotting.portrait import NULLCLINE_COLORS
from tests.networks import build_case


def test_a_linear_chain_with_time_constants() -> None:
    """The field, equilibrium, rates and modes are those of τ⁻¹H; nullclines are its lines."""
    case = build_case(seed=3, widths=(1, 1, 1, 1), precision="scalar", bias=True, slow=True)
    matrix, forcing, tau = case.linear_flow()
    portrait = phase_portrait(case.problem, resolution=9)
    points = np.stack(np.meshgrid(portrait.x, portrait.y), axis=-1)
    np.testing.assert_allclose(portrait.velocity, (forcing - points @ matrix) / tau, atol=1e-12)
    rest = np.linalg.solve(matrix, forcing)
    # The gradient is below 1e-9, and an error of the state that over the smallest eigenvalue.
    bound = 2e-9 / np.linalg.eigvalsh(matrix)[0]
    np.testing.assert_allclose(portrait.equilibria, [rest], atol=bound)
    assert portrait.kinds == ("minimum",)
    flow = np.diag(1 / tau) @ matrix
    np.testing.assert_allclose(portrait.rates[0], np.sort(np.linalg.eigvals(flow)), rtol=1e-12)
    for rate, mode in zip(portrait.rates[0], portrait.modes[0], strict=True):
        np.testing.assert_allclose(flow @ mode, rate * mode, atol=1e-12 * portrait.rates.max())
        assert np.linalg.norm(mode) == pytest.approx(1, abs=1e-12)
    assert (portrait.ends == 0).all()
    assert (portrait.basin == 0).all()
    ax = portrait.plot()[0].axes
    nullclines = [c for c in ax.collections if c.get_zorder() == 3]
    assert len(nullclines) == len(NULLCLINE_COLORS) == 2
    for component, lines in enumerate(nullclines):
        vertices = np.concatenate([path.vertices for path in lines.get_paths()])
        # Linear interpolation of a linear field is exact.
        assert len(vertices) > 2
        np.testing.assert_allclose(vertices @ matrix[component], forcing[component], atol=1e-10)
    plt.close("all")


def decoupled(activation: str, energy: Any = None, output: Any = (1.5, -1.5)) -> InferenceProblem:
    """Two scalar chains x ↦ f(6x) side by side, as one network 2-2-2."""
    layers = [Dense(np.eye(2)), Dense(6 * np.eye(2), activation=activation)]
    return InferenceProblem(
        Network(layers), input=np.array([-1.2, 1.2]), output=np.array(output),
        energy=Gaussian([1.0, 4.0]) if energy is None else energy,
    )  # fmt: skip


@pytest.mark.slow
def test_two_chains_with_three_stationary_points_each_make_nine() -> None:
    """Four minima, four saddles and a maximum, at the pairs of roots that bisection finds."""

    def slope(x: float) -> float:
        f = np.tanh(6 * x)
        return x + 1.2 - 24 * (1 - f**2) * (1.5 - f)

    grid = np.linspace(-4, 4, 4001)
    signs = np.array([slope(x) for x in grid])
    roots = [
        scipy.optimize.brentq(slope, grid[i], grid[i + 1], xtol=1e-14)
        for i in np.flatnonzero(signs[:-1] * signs[1:] < 0)
    ]
    expected = np.array(list(itertools.product(roots, [-r for r in roots])))
    portrait = phase_portrait(decoupled("tanh"), extent=(-2, 2, -2, 2), resolution=12)
    assert len(portrait.equilibria) == 9
    distances = np.linalg.norm(expected[:, None] - portrait.equilibria, axis=-1)
    assert distances.min(axis=1).max() < 1e-8
    assert (portrait.residuals <= 1e-9).all()
    counts = [portrait.kinds.count(kind) for kind in ("minimum", "saddle", "maximum")]
    assert counts == [4, 4, 1]
    assert portrait.index_sum == 1
    # The unstable root of each chain parts the plane, whatever the other chain does.
    lines = np.array([roots[1], -roots[1]])
    x, y = np.meshgrid(portrait.x, portrait.y)
    sides = np.stack([x > lines[0], y > lines[1]], axis=-1)
    assert (portrait.basin >= 0).all()
    rests = portrait.equilibria[portrait.basin] > lines
    assert (rests == sides).all()
    assert len(portrait.separatrices) == 8
    # The tolerance of the solver is 1e-6 of the longest curve, 3 √32, for each of many steps.
    for curve in portrait.separatrices:
        assert np.abs(curve - lines).max(axis=0).min() < 1e-4
    assert portrait.stable.sum() == 4


@pytest.mark.slow
def test_kinks_are_found_and_arrived_at() -> None:
    """The second chain rests at its kink: x − 1.2 < 0 below 0, 145x + 34.8 > 0 above.

    The first has a ridge at 0 between its minima, −1.2 and the root 0.24 of 145x − 34.8.
    """
    portrait = phase_portrait(decoupled("relu"), extent=(-2, 0.6, -0.6, 1.5), resolution=5)
    assert portrait.kinds == ("at a kink", "at a kink")
    assert str(portrait) == portrait.summary() and "at a kink: 2" in portrait.summary()
    data = portrait.to_xarray()
    assert data.sizes["separatrix"] == len(portrait.separatrices)
    column, row = 1, 3
    at = data.velocity.sel(x=portrait.x[column], y=portrait.y[row])
    np.testing.assert_array_equal(at, portrait.velocity[row, column])
    ends = data.trajectories.isel(time=-1)
    np.testing.assert_array_equal(ends, portrait.trajectories[:, -1])
    assert list(zip(data.layer.values, data.unit.values, strict=True)) == list(portrait.coordinates)
    np.testing.assert_allclose(portrait.equilibria, [[0.24, 0.0], [-1.2, 0.0]], atol=1e-8)
    assert np.isnan(portrait.rates).all()
    assert portrait.stable.all()
    assert (portrait.ends == np.where(portrait.trajectories[:, 0, 0] > 0, 0, 1)).all()


@pytest.mark.slow
def test_any_energy_will_do() -> None:
    """With cross-entropy the minimum is that of SciPy's simplex search, which needs no gradient."""
    problem = decoupled("identity", CrossEntropy(weight=2.0), output=(0.3, 0.7))
    portrait = phase_portrait(problem, resolution=5)
    assert portrait.kinds == ("minimum",)

    def energy(x: Any) -> float:
        logits = 6 * np.asarray(x)
        log_softmax = logits - np.logaddexp(*logits)
        return 0.5 * np.sum((x - np.array([-1.2, 1.2])) ** 2) - 2 * log_softmax @ [0.3, 0.7]

    best = scipy.optimize.minimize(
        energy, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-15}
    )
    # Values of F tell a minimum to the square root of their round-off.
    np.testing.assert_allclose(portrait.equilibria[0], best.x, atol=1e-6)
    assert portrait.equilibrium_energies[0] == pytest.approx(best.fun, abs=1e-12)


@pytest.mark.unchecked
def test_what_does_not_fit_is_refused() -> None:
    """Other numbers of free units, batches, extents, resolutions and starts, each by name."""
    problem = decoupled("tanh")
    wide = build_case(seed=0, widths=(2, 3, 2)).problem
    batch = build_case(seed=0, widths=(2, 2, 2), batch=3).problem
    with pytest.raises(ShapeError, match=r"two free units in all.*\{1: 3\}"):
        phase_portrait(wide)
    with pytest.raises(ShapeError, match="batch of 3"):
        phase_portrait(batch)
    with pytest.raises(InputError, match=r"must be a pcdyn\.InferenceProblem, got 'problem'"):
        phase_portrait("problem")  # type: ignore[arg-type]
    for extent in ((1, 0, 0, 1), (0, 1, 0, np.inf), (0, 1)):
        with pytest.raises(InputError, match="four finite numbers"):
            phase_portrait(problem, extent=extent)
    with pytest.raises(InputError, match="at least 2"):
        phase_portrait(problem, resolution=1)
    with pytest.raises(ShapeError, match=r"\(starts, 2\)"):
        phase_portrait(problem, starts=np.zeros(2))
