"""The spectrum of the linearised flow against NumPy's of a Hessian that is assembled elsewhere."""

import functools
import sys
import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt

import pcdyn
from networks import EPS, build_case, jax_free_energy
from pcdyn import (
    Diffrax,
    Euler,
    SciPy,
    StepSizeWarning,
    equilibrium,
    simulate,
    stability,
    stability_along,
)
from pcdyn.errors import InputError, IntegratorError, NonFiniteError, NotConvergedError, ShapeError
from pcdyn.integrators.stability_function import stability_interval
from pcdyn.learning import JointFlow
from pcdyn.linearisation.spectrum import estimated_fastest_rate, extreme_spectrum

# Real stability intervals from the literature (Hairer & Wanner II, IV.2; the third-order
# polynomial 1 + z + z²/2 + z³/6 ends at 2.5127, Dormand–Prince 5 at 3.3066), to their digits.
INTERVALS = {
    "euler": (2.0, 1e-12),
    "heun": (2.0, 1e-12),
    "midpoint": (2.0, 1e-12),
    "ralston": (2.0, 1e-12),
    "bosh3": (2.5127453266, 1e-9),
    "dopri5": (3.3066, 5e-5),
}

LINEAR = build_case(seed=3, widths=(3, 3, 3), precision="mixed", bias=True, slow=True, batch=3)
TANH = build_case(
    seed=5, widths=(3, 2, 3, 2), precision="mixed", bias=True, activations=("tanh",), slow=True,
    batch=3,
)  # fmt: skip


def hessians(case, state):
    """∂²F/∂y² of each sample at a state, by differentiating the oracle's F twice."""

    def energy(stacked, layers):
        parts = jnp.split(stacked, np.cumsum([case.widths[i] for i in case.free])[:-1])
        given = dict(zip(case.free, parts, strict=True))
        return jax_free_energy(case, [given.get(i, x) for i, x in enumerate(layers)])

    stacked = jnp.concatenate(state, axis=-1)
    layers = tuple(jnp.asarray(x) for x in case.activities)
    return np.asarray(jax.vmap(jax.hessian(energy))(stacked, layers))


def scales(case):
    """τ^{-½} of every free unit."""
    constants = case.time_constants or (1.0,) * (case.depth + 1)
    return np.concatenate([np.full(case.widths[i], constants[i] ** -0.5) for i in case.free])


def expected(case, state):
    """Rates and modes of each sample, in the units of the activities."""
    scale = scales(case)
    rates, modes = np.linalg.eigh(scale[:, None] * hessians(case, state) * scale)
    return rates, scale[:, None] * modes


def shares(case, mode):
    parts = np.split(mode**2, np.cumsum([case.widths[i] for i in case.free])[:-1], axis=-1)
    sums = np.stack([part.sum(-1) for part in parts], axis=-1)
    return sums / sums.sum(-1, keepdims=True)


def test_a_linear_network_has_the_eigenvalues_of_its_hessian_at_rest():
    matrix, _, tau = LINEAR.linear_flow()
    rates = np.sort(np.linalg.eigvals(matrix / tau[:, None]).real)
    found = stability(LINEAR.problem)
    tolerance = 100 * EPS * rates[-1]
    np.testing.assert_allclose(found.rates, np.broadcast_to(rates, (3, 3)), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.condition_number, rates[-1] / rates[0], rtol=1e-12)
    np.testing.assert_allclose(found.stiffness, rates[-1] / rates[0], rtol=1e-12)
    np.testing.assert_allclose(found.largest_euler_step, 2 / rates[-1], rtol=1e-12)
    np.testing.assert_allclose(found.relaxation_times[0], 1 / rates, rtol=1e-12)
    assert not found.unstable.any() and found.complete and found.at == "equilibrium"


@pytest.mark.slow
def test_a_tanh_network_has_them_at_any_state_with_the_modes_of_its_layers():
    found = stability(TANH.problem, at=TANH.state)
    rates, modes = expected(TANH, TANH.state)
    np.testing.assert_allclose(found.rates, rates, rtol=0, atol=1000 * EPS * rates.max())
    # The modes are as exact as round-off over the gap to the next rate.
    for mode, column in ((found.slowest_mode, 0), (found.fastest_mode, -1)):
        np.testing.assert_allclose(mode, shares(TANH, modes[..., column]), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found.unstable, rates[:, 0] < 0)


@functools.cache
def tanh_run():
    return simulate(TANH.problem, t1=2.0, times=[0.0, 1.0, 2.0], initial=TANH.state)


@pytest.mark.slow
def test_it_is_taken_along_and_at_the_end_of_a_trajectory():
    run = tanh_run()
    along = stability_along(TANH.problem, run)
    assert along.rates.shape == (3, 3, 5)
    for row in range(3):
        state = TANH.problem.state_of([x[row] for x in run.activities])
        rates, _ = expected(TANH, state)
        np.testing.assert_allclose(along.rates[row], rates, rtol=0, atol=1000 * EPS * rates.max())
    end = stability(TANH.problem, at=run)
    np.testing.assert_allclose(end.rates, along.rates[-1], rtol=1e-12)
    data = along.to_xarray()
    assert data.rates.dims == ("time", "sample", "rate")
    np.testing.assert_array_equal(data.time, run.times)
    np.testing.assert_array_equal(data.slowest_mode.sum("free_layer").round(12), 1)
    assert "3 times" in str(along)


def test_a_single_sample_has_no_sample_axis_and_vmap_gives_one_for_each_network():
    case = LINEAR.sample(0)
    one = stability(case.problem, at="feedforward")
    assert one.rates.shape == (3,) and one.to_xarray().rates.dims == ("rate",)
    figure, ax = plt.subplots()
    (line,) = one.plot(ax)
    np.testing.assert_array_equal(line.get_ydata(), one.rates)
    plt.close(figure)
    assert str(one) == repr(one) == one.summary()

    def fastest(data):
        return stability(LINEAR.problem.with_data(*data), at="feedforward").largest_euler_step

    many = jax.vmap(fastest)((jnp.asarray(LINEAR.input), jnp.asarray(LINEAR.output)))
    np.testing.assert_allclose(many, np.full(3, one.largest_euler_step), rtol=1e-12)


def test_several_networks_print_draw_and_come_back_from_a_file(tmp_path):
    """Each is what its own network has; the first axis is that of the networks."""
    factors = np.array([1.0, 2.0])

    def scaled(factor):
        return pcdyn.InferenceProblem(
            LINEAR.problem.network, input=LINEAR.input, output=LINEAR.output,
            energy=pcdyn.Gaussian([factor, 1.0]),
        )  # fmt: skip

    many = jax.tree.map(
        np.asarray, jax.vmap(lambda p: stability(scaled(p), at="feedforward"))(factors)
    )
    singles = [stability(scaled(p), at="feedforward") for p in factors]
    assert many.networks == 2 and singles[0].networks is None
    assert "2 networks, 3 samples" in str(many)
    for i, single in enumerate(singles):
        np.testing.assert_allclose(many.rates[i], single.rates, rtol=1e-12)
    figure, ax = plt.subplots()
    drawn = np.array([line.get_ydata() for line in many.plot(ax)])
    np.testing.assert_array_equal(drawn, many.rates.reshape(6, 3))
    plt.close(figure)
    pcdyn.save(many, tmp_path / "many.nc")
    assert many.to_xarray().rates.dims == ("network", "sample", "rate")
    again = pcdyn.load(tmp_path / "many.nc")
    assert str(again) == str(many)
    jax.tree.map(np.testing.assert_array_equal, again, many)
    jax.jit(lambda p: [repr(stability(scaled(p), at="feedforward")), p][1])(1.0)


def saddle():
    """1-1-1 tanh with F = ½(x − tanh 0)² + ½ p (T − tanh x)² at a maximum of the curvature term."""
    network = pcdyn.Network(
        [pcdyn.Dense(np.ones((1, 1)), activation="tanh") for _ in range(2)]
    )  # fmt: skip
    return pcdyn.InferenceProblem(
        network, input=np.zeros(1), output=np.full(1, 4.0), energy=pcdyn.Gaussian([1.0, 30.0])
    )


def test_a_state_with_negative_curvature_is_called_unstable():
    x = 0.9
    t, slope = np.tanh(x), 1 - np.tanh(x) ** 2
    # d²/dx² ½p(T − tanh x)² = p (slope² + 2 t slope (T − t)).
    curvature = 1 + 30 * (slope**2 + 2 * t * slope * (4 - t))
    assert curvature > 0
    negative = 1 + 30 * (slope**2 + 2 * np.tanh(-x) * slope * (4 + t))
    found = stability(saddle(), at=(np.full(1, -x),))
    np.testing.assert_allclose(found.rates, [negative], rtol=1e-12)
    assert found.unstable and negative < 0
    assert np.isinf(found.relaxation_times).all() and np.isinf(found.largest_euler_step)
    assert "UNSTABLE" in str(found)
    assert not stability(saddle(), at=(np.full(1, x),)).unstable


def test_a_flat_direction_relaxes_in_infinite_time_and_is_no_instability():
    case = build_case(seed=1, widths=(3, 2), clamp="output", batch=3)
    found = stability(case.problem, at=case.state)
    assert np.isinf(found.relaxation_times[:, 0]).all() and not found.unstable.any()
    assert np.isinf(found.condition_number).all() and np.isfinite(found.stiffness).all()


@pytest.mark.parametrize("name", INTERVALS)
def test_stability_intervals_are_those_of_the_literature(name):
    value, tolerance = INTERVALS[name]
    assert abs(stability_interval(name) - value) <= tolerance * value


def test_the_classical_runge_kutta_method_and_any_tableau_have_theirs():
    tableau = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.array([1, 0, 0, -1]) / 6,
    )
    classical = type("Classical", (diffrax.Heun,), {"tableau": tableau})
    assert abs(stability_interval(classical()) - 2.785293563405282) < 1e-9
    # On the imaginary axis |R(iy)|² = 1 − y⁶/72 + y⁸/576, which is 1 again at y = √8.
    assert abs(stability_interval(classical(), 1j) - 8**0.5) < 1e-9


@pytest.mark.unchecked
def test_the_interval_along_a_ray():
    """Of Euler, |1 − s e^{iφ}| = 1 at s = 2 cos φ; a ray that grows has none."""
    for angle in (0.0, 0.4, np.pi / 3, -1.2):
        ray = complex(np.exp(1j * angle))
        assert abs(stability_interval("euler", ray) - 2 * np.cos(angle)) < 1e-9
    assert stability_interval("euler", 1j) == 0
    assert np.isinf(stability_interval("kvaerno3", 1j))
    for wrong in (2, -1, complex(-0.6, 0.8), "x", None, True, float("nan")):
        with pytest.raises(InputError, match="direction"):
            stability_interval("euler", wrong)  # pyright: ignore[reportArgumentType]


def test_implicit_methods_have_no_bound_and_others_are_refused_by_name():
    for method in ("implicit_euler", "kvaerno3", "kvaerno5", Diffrax("kvaerno4", dt=0.1)):
        assert np.isinf(stability_interval(method))
    assert stability_interval(Euler(dt=0.1)) == 2
    assert stability_interval(Diffrax("dopri8")) == stability_interval(diffrax.Dopri8())
    for method, text in (
        (diffrax.LeapfrogMidpoint(), "LeapfrogMidpoint"),
        (diffrax.KenCarp4(), "KenCarp4"),
        (SciPy("LSODA"), "LSODA|lsoda"),
        ("adams", "adams"),
    ):
        with pytest.raises(IntegratorError, match=text):
            stability(LINEAR.problem, at="feedforward").largest_step(method)


@pytest.mark.parametrize("name", ["euler", "bosh3"])
def test_just_below_the_bound_a_fixed_step_decays_and_just_above_it_grows(name):
    case = LINEAR.sample(0)
    rest = equilibrium(case.problem)
    matrix, _, tau = case.linear_flow()
    _, modes = np.linalg.eigh(matrix / np.sqrt(np.outer(tau, tau)))
    mode = modes[:, -1] / np.sqrt(tau)
    start = (np.asarray(rest.state[0]) + mode,)
    bound = stability(case.problem).largest_step(name)
    steps = 40
    for factor in (0.99, 1.01):
        dt = factor * bound
        integrator = Euler(dt=dt) if name == "euler" else Diffrax(name, dt=dt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StepSizeWarning)
            run = simulate(case.problem, t1=steps * dt, times=[steps * dt], initial=start,
                           integrator=integrator, throw=False)  # fmt: skip
        growth = np.linalg.norm(run.final[1] - rest.activities[1]) / np.linalg.norm(mode)
        assert (growth < 1) == (factor < 1), (name, factor, growth)


@pytest.mark.slow
def test_a_fixed_step_above_the_bound_is_warned_of_with_the_number():
    bound = stability(TANH.problem, at=TANH.state).largest_euler_step.min()
    options = {"t1": 4 * bound, "times": [2 * bound], "initial": TANH.state, "throw": False}
    with pytest.warns(
        StepSizeWarning, match=f"is above {bound:.3g}, the largest stable step of eu"
    ):
        simulate(TANH.problem, integrator=Euler(dt=1.01 * bound), **options)
    # Warnings are errors in these tests.
    simulate(TANH.problem, integrator=Euler(dt=0.99 * bound), **options)
    simulate(TANH.problem, integrator=Diffrax("kvaerno3", dt=2 * bound), **options)
    simulate(TANH.problem, integrator=Diffrax("tsit5"), **options)
    with pytest.warns(StepSizeWarning, match=r"of heun .* initial state of 1 of 3 samples"):
        simulate(TANH.problem, integrator=Diffrax("heun", dt=1.01 * bound), **options)


def test_the_cheap_estimate_and_lanczos_agree_with_the_full_spectrum():
    rates, modes = expected(TANH, TANH.state)
    # The 5 iterations of 5 units are exact but for round-off.
    found = estimated_fastest_rate(TANH.problem, TANH.state)
    np.testing.assert_allclose(found, rates[:, -1], rtol=1e-8)
    for row in range(3):
        case = TANH.sample(row)
        found = extreme_spectrum(case.problem, case.state)
        np.testing.assert_allclose(found.rates, rates[row, [0, -1]], rtol=1e-9)
        np.testing.assert_allclose(found.slowest_mode, shares(TANH, modes[row, :, 0]), atol=1e-6)


def test_above_the_limit_only_extreme_rates_are_given_and_said_so(monkeypatch):
    # `pcdyn.stability` is the function, which hides the module of that name.
    monkeypatch.setattr(sys.modules["pcdyn.analysis.stability"], "MOST_DENSE_UNITS", 4)
    found = stability(TANH.problem, at=TANH.state)
    rates, _ = expected(TANH, TANH.state)
    assert not found.complete and "Lanczos" in str(found)
    np.testing.assert_allclose(found.rates, rates[:, [0, -1]], rtol=1e-9)


def test_samples_resting_at_a_kink_have_no_linearisation():
    network = pcdyn.Network(
        [pcdyn.Dense(np.ones((1, 1))), pcdyn.Dense(np.array([[1.0]]), activation="relu")]
    )
    # μ_1 = −.1 and T = −1: below the kink F pulls up, above it pulls down only if T < −μ_1.
    problem = pcdyn.InferenceProblem(
        network, input=np.array([[0.5], [0.3]]), output=np.array([[-1.0], [2.0]])
    )
    found = stability(problem)
    np.testing.assert_array_equal(found.at_kink, [True, False])
    assert np.isnan(found.rates[0]).all() and "kink" in str(found)
    np.testing.assert_allclose(found.rates[1], [2.0], rtol=1e-12)


def test_the_verdict_follows_the_stiffness():
    for ratio, family in ((30.0, "explicit"), (300.0, "either"), (1e5, "implicit")):
        rates, mode, smooth = np.array([[1.0, 2.0], [1.0, ratio]]), np.ones((2, 1)), np.zeros(2)
        found = pcdyn.Stability(rates, mode, mode, smooth.astype(bool), units=2, free_layers=(1,))
        assert found.recommended == family, found.verdict
        assert f"{ratio:.3g}" in found.verdict


BAD = {
    "another problem": (
        lambda: stability(JointFlow(TANH.problem, 0.1)), InputError, "JointFlow",
    ),
    "an unknown name": (lambda: stability(TANH.problem, at="rest"), InputError, "rest"),
    "a state of other widths": (
        lambda: stability(TANH.problem, at=LINEAR.state), ShapeError, "free layers",
    ),
    "a state with NaN": (
        lambda: stability(TANH.problem, at=tuple(x * np.nan for x in TANH.state)),
        NonFiniteError, "non-finite",
    ),
    "a trajectory of another network": (
        lambda: stability(LINEAR.problem, at=tanh_run()), ShapeError, "layers",
    ),
    "a trajectory of other data": (
        lambda: stability(
            TANH.replace(activities=tuple(2 * x for x in TANH.activities)).problem,
            at=tanh_run(),
        ), InputError, "other data in layer 0",
    ),
    "no equilibrium": (
        lambda: stability(
            TANH.problem,
            at=equilibrium(TANH.problem, method=pcdyn.solvers.GradientDescent(
                dt=1e-6, max_iterations=1), throw=False),
        ), NotConvergedError, "no equilibrium",
    ),
    "along no trajectory": (
        lambda: stability_along(TANH.problem, TANH.state), InputError, "Trajectory",
    ),
}  # fmt: skip


@pytest.mark.unchecked
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(what):
    call, error, text = BAD[what]
    with pytest.raises(error, match=text):
        call()
