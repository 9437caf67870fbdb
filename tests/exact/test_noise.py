"""Noise against the law that it should have, computed from H by NumPy and SciPy.

`τ dy = −(H y − b) dt + √(2Tτ) dW` is an Ornstein–Uhlenbeck process with the drift A = −τ⁻¹H and the
diffusion Q = 2T τ⁻¹. Laws of the schemes are those of their maps, without sampling; paths are
compared with them within standard errors.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from hypothesis import given

import pcdyn
from pcdyn import EulerMaruyama, Exact, InferenceProblem, Langevin, Status, StochasticHeun, simulate
from pcdyn.errors import InputError, SingularHessianError
from pcdyn.references.linear import moments, stationary_covariance
from tests.graphs import random_graph
from tests.networks import Case, assert_close, build_case, cases, few

KEY = jax.random.key(17)
T = 0.3
SCHEMES = {"euler_maruyama": EulerMaruyama, "stochastic_heun": StochasticHeun}
EACH = [*(scheme(dt=0.1) for scheme in SCHEMES.values()), Exact()]
CASE = build_case(seed=3, widths=(2, 2, 3, 2), precision="full", bias=True, slow=True)


def drift(case: Case, temperature: float = T) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, its constant and Q of `dy = (A y + a) dt + √Q dW`."""
    matrix, forcing, tau = case.linear_flow()
    return -matrix / tau[:, None], forcing / tau, np.diag(2 * temperature / tau)


def law(
    case: Case, time: float, start: np.ndarray, spread: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance by DOP853 on `m' = A m + a`, `C' = A C + C Aᵀ + Q`, at 1e-12."""
    a, constant, q = drift(case)
    n = len(a)

    def rate(_: float, y: np.ndarray) -> np.ndarray:
        c = y[n:].reshape(n, n)
        return np.concatenate([a @ y[:n] + constant, (a @ c + c @ a.T + q).ravel()])

    begin = np.zeros((n, n)) if spread is None else spread
    y = np.concatenate([start, begin.ravel()])
    if time > 0:
        options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-12}
        y = scipy.integrate.solve_ivp(rate, (0, time), y, **options).y[:, -1]
    return y[:n], y[n:].reshape(n, n)


def start_of(case: Case) -> np.ndarray:
    return case.stack([case.activities[i] for i in case.free])


def run(case: Case = CASE, **options: Any) -> pcdyn.Trajectory:
    given: dict[str, Any] = {
        "t1": 1.0, "key": KEY, "initial": case.state, "noise": Langevin(temperature=T), **options
    }  # fmt: skip
    return simulate(case.problem, **given)


# --- Moments --------------------------------------------------------------------------------------


@given(case=cases(batches=(None,)))
@few(max_examples=12)
def test_moments_solve_their_equations(case: Case) -> None:
    """From a point and from a covariance, for every clamp, flat directions included.

    SciPy keeps 1e-12 in each step, and takes some hundred.
    """
    times = np.array([0.0, 0.4, 3.0])
    rng = np.random.default_rng(5)
    root = rng.normal(size=(len(start_of(case)),) * 2)
    for spread in (None, root @ root.T):
        ours = moments(case.problem, T, times, initial=case.state, covariance=spread)
        for k, time in enumerate(times):
            mean, covariance = law(case, time, start_of(case), spread)
            assert_close(case.stack([x[k] for x in ours.mean]), mean, 1e-8)
            assert_close(ours.covariance[k], covariance, 1e-8)


@given(case=cases(clamps=("both", "input"), batches=(None, 3)))
@few(max_examples=12)
def test_the_stationary_covariance_solves_the_lyapunov_equation(case: Case) -> None:
    """A C + C Aᵀ + Q = 0, whatever τ; C has no τ in it, and moments tend to it."""
    a, _, q = drift(case)
    expected = scipy.linalg.solve_continuous_lyapunov(a, -q)
    ours = stationary_covariance(case.problem, T)
    assert_close(ours, expected, 1e-10)
    slowest = np.max(1 / np.linalg.eigvals(-a).real)
    # e^{−40} of the start is left.
    late = moments(case.problem, T, [20 * slowest], initial=case.state)
    assert_close(late.covariance[0], expected, 1e-10)


@pytest.mark.parametrize("structure", [1, 4, 6])
def test_moments_of_graphs_whose_units_are_clamped_in_part(structure: int) -> None:
    """C(t) = C∞ − e^{At} C∞ e^{Aᵀt} with C∞ = T H⁻¹ by dense algebra."""
    case = random_graph(structure, 2)
    matrix, _ = case.whole()
    free = ~np.concatenate(case.masks)
    hessian = matrix[:, free].T @ matrix[:, free]
    end = T * np.linalg.inv(hessian)
    a = -hessian / np.repeat(case.taus, case.widths)[free][:, None]
    times = [0.3, 2.0]
    ours = moments(case.problem, T, times, initial="zeros")
    _, course = case.solved(np.array(times))
    for k, time in enumerate(times):
        kept = scipy.linalg.expm(a * time)
        assert_close(ours.covariance[k], end - kept @ end @ kept.T, 1e-9)
        mean = np.concatenate([np.asarray(x[k]) for x in ours.mean])
        assert_close(mean, course[k][free], 1e-9)
    assert_close(stationary_covariance(case.problem, T), end, 1e-10)


def test_along_a_flat_direction_the_variance_grows_as_2t() -> None:
    """Two units in, one out: what the output does not see diffuses as free particles do."""
    network = pcdyn.Network([pcdyn.Dense(jnp.array([[3.0, 4.0]]))])
    problem = InferenceProblem(network, output=[1.0], time_constants=[2.0, 1.0])
    times = np.array([1.0, 10.0, 1e4])
    ours = moments(problem, T, times, initial="zeros")
    flat = np.array([0.8, -0.6])
    # The product of √T and a direction that is known to eps.
    np.testing.assert_allclose(
        flat @ np.asarray(ours.covariance) @ flat, 2 * T / 2.0 * times, rtol=1e-12
    )
    with pytest.raises(SingularHessianError, match="flat"):
        stationary_covariance(problem, T)
    paths = simulate(problem.repeated(4000), t1=10.0, times=[10.0], initial="zeros", key=KEY,
                     noise=Langevin(T), integrator=Exact()).activities[0][-1]  # fmt: skip
    # A variance of 4000 draws is known to 2.2 %.
    assert np.var(paths @ flat) == pytest.approx(T * 10.0, rel=0.1)


def test_derivatives_are_right_or_refused() -> None:
    """Of T·H⁻¹ of any order, against differences; those of a law in time are refused by name."""
    problem = CASE.problem

    def scaled(size: Any) -> InferenceProblem:
        layers = [pcdyn.Dense(size * x.weight, x.bias) for x in problem.network.layers]
        return problem.with_layers(layers)

    def total(size: Any) -> Any:
        return jnp.sum(stationary_covariance(scaled(size), T) ** 2)

    h = 1e-4
    slope, bend = jax.grad(total)(1.0), jax.hessian(total)(1.0)
    # Central differences are off by h²/6 of the third derivative.
    np.testing.assert_allclose(slope, (total(1 + h) - total(1 - h)) / (2 * h), rtol=1e-6)
    slopes = jax.grad(total)(1 + h) - jax.grad(total)(1 - h)
    np.testing.assert_allclose(bend, slopes / (2 * h), rtol=1e-6)
    with pytest.raises(InputError, match="stationary_covariance"):
        jax.grad(lambda s: jnp.sum(moments(scaled(s), T, [1.0]).covariance))(1.0)
    warm = jax.grad(lambda t: moments(problem, t, [1.0]).covariance[0, 0, 0])(T)
    np.testing.assert_allclose(warm, moments(problem, 1.0, [1.0]).covariance[0, 0, 0], rtol=1e-12)


# --- The law of the schemes, without sampling -----------------------------------------------------


def one_step(name: str, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """R and G of the map y ↦ R y + r + G k that one step of a scheme is, from the code itself."""
    problem, scheme = CASE.problem, SCHEMES[name](dt=dt)
    split = np.cumsum(problem.free_widths)[:-1]

    @jax.jit
    def step(y: Any, kicks: Any) -> Any:
        state, pushed = tuple(jnp.split(y, split)), tuple(jnp.split(kicks, split))
        return jnp.concatenate(scheme.stepped(problem.vector_field, 0.0, state, pushed))

    zeros = jnp.zeros(sum(problem.free_widths))
    by_state, by_kick = jax.jacfwd(step, (0, 1))(zeros, zeros)
    return np.asarray(by_state), np.asarray(by_kick)


@pytest.mark.parametrize(("name", "order"), [("euler_maruyama", 1), ("stochastic_heun", 2)])
def test_the_stationary_law_converges_with_the_weak_order(name: str, order: int) -> None:
    """C = R C Rᵀ + G (Q dt) Gᵀ, solved by SciPy, against T·H⁻¹: its error falls as dt^order.

    Steps are fractions of 2 over the fastest rate, where the next order is a few per cent.
    """
    matrix, _, _ = CASE.linear_flow()
    a, _, q = drift(CASE)
    steps = np.geomspace(0.002, 0.02, 4) * 2 / np.max(np.linalg.eigvals(-a).real)
    errors = []
    for dt in steps:
        r, g = one_step(name, dt)
        kept = scipy.linalg.solve_discrete_lyapunov(r, g @ (q * dt) @ g.T)
        errors.append(np.linalg.norm(kept - T * np.linalg.inv(matrix)))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.03)


@pytest.mark.parametrize("name", SCHEMES)
def test_each_path_converges_with_order_one(name: str) -> None:
    """The mean square of what one step and two of half its size make of one Wiener process.

    Without sampling: both from 0 are linear in the two halves of the increment of W, whose
    variances are Q dt/2 each.
    """
    _, _, q = drift(CASE)
    counts, errors = np.array([64, 128, 256, 512]), []
    for count in counts:
        (r, g), (half, push) = one_step(name, 1 / count), one_step(name, 0.5 / count)
        zeros = np.zeros_like(r)
        move = np.block([[r, zeros], [zeros, half @ half]])
        first = np.concatenate([g, half @ push])
        last = np.concatenate([g, push])
        gained = (first @ q @ first.T + last @ q @ last.T) / (2 * count)
        joint = np.zeros_like(move)
        for _ in range(count):
            joint = move @ joint @ move.T + gained
        difference = np.concatenate([np.eye(len(r)), -np.eye(len(r))])
        errors.append(np.sqrt(np.trace(difference.T @ joint @ difference)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("name", "order"), [("euler_maruyama", 1), ("stochastic_heun", 2)])
def test_the_law_at_a_time_converges_with_the_weak_order(name: str, order: int) -> None:
    """The covariance after 1/dt steps against `law`, whose own error is 1e-10."""
    _, expected = law(CASE, 1.0, start_of(CASE))
    counts = np.array([64, 128, 256, 512])
    errors = []
    for count in counts:
        errors.append(np.linalg.norm(after_steps(name, 1 / count, count)[1] - expected))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.06)


def after_steps(name: str, dt: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance after some steps of a scheme, written again in NumPy."""
    a, constant, q = drift(CASE)
    eye = np.eye(len(a))
    r, g = eye + dt * a, eye
    if name == "stochastic_heun":
        r, g = r + dt**2 / 2 * a @ a, eye + dt / 2 * a
    mean, covariance = start_of(CASE), np.zeros_like(a)
    for _ in range(count):
        mean = r @ mean + g @ constant * dt
        covariance = r @ covariance @ r.T + g @ (q * dt) @ g.T
    return mean, covariance


# --- Paths ----------------------------------------------------------------------------------------


def check_within_standard_errors(
    samples: np.ndarray, mean: np.ndarray, covariance: np.ndarray
) -> None:
    """Every mean and covariance of n Gaussian draws within 5 standard errors.

    √(C_ii/n) and √((C_ii C_jj + C_ij²)/n): 1.4 % of a variance for 10⁴, where noise that is √2 too
    large is off by 70 of them. Of 20 numbers one is beyond 5 once in 10⁵ seeds.
    """
    count, variances = len(samples), np.diag(covariance)
    errors = np.sqrt(variances / count)
    assert np.max(np.abs(samples.mean(0) - mean) / errors) < 5
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / count)
    assert np.max(np.abs(np.cov(samples.T) - covariance) / errors) < 5


@pytest.mark.parametrize("name", SCHEMES)
def test_paths_of_the_schemes_have_their_law(name: str) -> None:
    """10⁴ samples of one batch, each with noise of its own, at a time and at the end."""
    batch = CASE.problem.repeated(10_000)
    start = tuple(np.broadcast_to(x, (10_000, *x.shape)) for x in CASE.state)
    paths = simulate(batch, t1=1.0, times=[0.25, 1.0], initial=start, key=KEY,
                     noise=Langevin(temperature=T), integrator=SCHEMES[name](dt=0.05))  # fmt: skip
    for row, count in ((0, 5), (1, 20)):
        samples = CASE.stack([paths.activities[i][row] for i in CASE.free])
        check_within_standard_errors(samples, *after_steps(name, 0.05, count))


def test_exact_paths_have_the_law_of_the_process() -> None:
    """10⁴ keys by `jax.vmap`; what two times have in common is the covariance carried on, too."""
    times = [0.3, 1.0]

    def path(key: Any) -> Any:
        found = run(key=key, times=times, integrator=Exact())
        return jnp.concatenate([found.activities[i] for i in CASE.free], axis=-1)

    paths = np.asarray(jax.jit(jax.vmap(path))(jax.random.split(KEY, 10_000)))
    laws = [law(CASE, time, start_of(CASE)) for time in times]
    for row, (mean, covariance) in enumerate(laws):
        check_within_standard_errors(paths[:, row], mean, covariance)
    a, _, _ = drift(CASE)
    kept = scipy.linalg.expm(a * (times[1] - times[0])) @ laws[0][1]
    joint = np.block([[laws[0][1], kept.T], [kept, laws[1][1]]])
    means = np.concatenate([mean for mean, _ in laws])
    check_within_standard_errors(paths.reshape(len(paths), -1), means, joint)


def test_a_nonlinear_network_keeps_the_density() -> None:
    """A unit predicted as 0, which predicts a 1 by tanh(2x): moments of exp(−F/T) by quadrature.

    Its time constant is 3. 4000 samples of a path that has forgotten its start:
    the standard error of a variance is 2.2 %, the bias of Heun at this step .1 %.
    """
    network = pcdyn.Network([pcdyn.Dense([[1.0]]), pcdyn.Dense([[2.0]], activation="tanh")])
    problem = InferenceProblem(
        network, input=[0.0], output=[1.0], time_constants=[1.0, 3.0, 1.0]
    ).repeated(4000)
    end = simulate(problem, t1=12.0, times=[12.0], key=KEY, noise=Langevin(T),
                   integrator=StochasticHeun(dt=0.05)).activities[1][-1][:, 0]  # fmt: skip
    x = np.linspace(-6, 6, 20_001)
    density = np.exp(-(x**2 / 2 + (1 - np.tanh(2 * x)) ** 2 / 2) / T)
    density /= density.sum()
    mean, variance = density @ x, density @ x**2 - (density @ x) ** 2
    assert np.mean(end) == pytest.approx(mean, abs=5 * np.sqrt(variance / 4000))
    assert np.var(end) == pytest.approx(variance, rel=5 * 0.03)


# --- What a path depends on -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_a_path_does_not_depend_on_what_is_saved(name: str) -> None:
    """The same bits, whatever `times`, and beyond an earlier end."""
    scheme = SCHEMES[name](dt=0.1)
    every = run(integrator=scheme, times=np.arange(11) / 10)
    some = run(integrator=scheme, times=[0.3, 1.0])
    longer = run(integrator=scheme, times=[0.3, 1.0], t1=2.0)
    for i in CASE.free:
        np.testing.assert_array_equal(every.activities[i][[3, 10]], some.activities[i])
        np.testing.assert_array_equal(longer.activities[i], some.activities[i])


@pytest.mark.parametrize("integrator", EACH, ids=[each.name for each in EACH])
def test_samples_and_keys_give_the_path_that_they_give_alone(integrator: Any) -> None:
    """Sample b alone has the key folded in b; so has `per_sample`, and each key under `vmap`.

    Products of matrices of other sizes differ by round-off.
    """
    case = build_case(seed=4, widths=(2, 3, 2), slow=True, batch=3)
    options = {"integrator": integrator, "times": [0.4, 1.0]}
    together = run(case, **options)
    apart = run(case, per_sample=True, **options)
    assert not np.allclose(together.final[1][0], together.final[1][1])
    assert_close(apart.activities[1], together.activities[1], 1e-13)
    for b in range(3):
        alone = run(case.sample(b), key=jax.random.fold_in(KEY, b), **options)
        assert_close(alone.activities[1], together.activities[1][:, b], 1e-13)
    keys = jax.random.split(KEY, 3)
    mapped = jax.vmap(lambda k: run(case, key=k, **options).activities[1])(keys)
    for each, key in zip(mapped, keys, strict=True):
        assert_close(run(case, key=key, **options).activities[1], np.asarray(each), 1e-13)
    # A key of the old kind is one.
    old = run(case, key=jax.random.key_data(KEY), **options)
    np.testing.assert_array_equal(old.final[1], together.final[1])


@pytest.mark.parametrize("name", SCHEMES)
def test_without_temperature_it_is_the_flow(name: str) -> None:
    """T = 0 is Euler's method and Heun's; a traced temperature is as good as a known one."""
    quiet = {"integrator": pcdyn.Euler(dt=0.1)}
    if name == "stochastic_heun":
        quiet = {"integrator": pcdyn.Diffrax("heun", dt=0.1)}
    options: dict[str, Any] = {"t1": 1.0, "times": [1.0], "initial": CASE.state}
    flow = simulate(CASE.problem, **options, **quiet)

    def final(temperature: Any) -> Any:
        noise = Langevin(temperature=temperature)
        return simulate(CASE.problem, noise=noise, key=KEY, integrator=SCHEMES[name](dt=0.1),
                        **options).activities  # fmt: skip

    assert_close(tuple(final(0.0)), tuple(flow.activities), 1e-13)
    assert_close(tuple(jax.jit(final)(T)), tuple(final(T)), 1e-13)


def test_deep_networks_run_stacked_draw_the_same_noise() -> None:
    """A chain of 40 layers, with a time constant each, is one array of units inside.

    Against the loop in NumPy with the numbers that the one key of the sample gives.
    """
    case = build_case(seed=6, widths=(2,) * 41, slow=True)
    found = run(case, integrator=EulerMaruyama(dt=0.1), t1=0.5, times=[0.5])
    size = len(start_of(case))
    a, constant, q = drift(case)
    y = start_of(case)
    for step in range(5):
        white = np.asarray(jax.random.normal(jax.random.fold_in(KEY, step), (size,)))
        y = y + 0.1 * (a @ y + constant) + np.sqrt(0.1 * np.diag(q)) * white
    assert_close(case.stack([found.activities[i][-1] for i in case.free]), y, 1e-12)


@pytest.mark.parametrize("integrator", EACH, ids=[each.name for each in EACH])
def test_of_a_graph_free_units_move_and_no_others(integrator: Any) -> None:
    """Samples with other free units each: padding stays 0, what is clamped stays where it is."""
    case = random_graph(4, 3, batch=3, differ=True)
    problem = case.problem
    found = simulate(problem, t1=1.0, times=[0.5, 1.0], initial="zeros", key=KEY,
                     noise=Langevin(T), integrator=integrator)  # fmt: skip
    differs = False
    for i, (mask, value) in enumerate(zip(case.masks, case.values, strict=True)):
        x, clamped = np.asarray(found.activities[f"n{i}"][-1]), np.broadcast_to(mask, value.shape)
        np.testing.assert_array_equal(x[clamped], value[clamped])
        assert np.all(x[~clamped] != 0)
        differs |= mask.ndim == 2
    assert differs
    for x in problem.without_padding(problem.state_of(found.final)):
        assert np.isfinite(x).all()
    again = simulate(problem, t1=1.0, times=[0.5, 1.0], initial="zeros", key=KEY, per_sample=True,
                     noise=Langevin(T), integrator=integrator)  # fmt: skip
    assert_close(tuple(again.activities), tuple(found.activities), 1e-12)


def test_noise_of_samples_that_differ_in_their_units_has_its_law() -> None:
    """The exact draws of one sample of such a batch, against dense algebra for that sample."""
    case = random_graph(4, 3, batch=3, differ=True)
    problem = case.problem.sample(1)
    free = ~np.concatenate([m if m.ndim == 1 else m[1] for m in case.masks])
    matrix, _ = case.whole()
    expected = T * np.linalg.inv(matrix[:, free].T @ matrix[:, free])
    ours = stationary_covariance(problem, T)
    there = np.flatnonzero(np.diag(ours))
    assert_close(np.asarray(ours)[np.ix_(there, there)], expected, 1e-10)
    assert np.count_nonzero(np.asarray(ours)) == expected.size
    late = moments(problem, T, [1e3], initial="zeros")
    assert_close(late.covariance[0], np.asarray(ours), 1e-10)


@pytest.mark.parametrize("integrator", EACH, ids=[each.name for each in EACH])
def test_float32_stays_float32(integrator: Any) -> None:
    layers = [pcdyn.Dense(np.asarray(w, np.float32)) for w in CASE.weights]
    problem = InferenceProblem(pcdyn.Network(layers), input=CASE.input, output=CASE.output)
    noise = Langevin(temperature=T)
    found = simulate(problem, t1=1.0, times=[1.0], noise=noise, key=KEY, integrator=integrator)
    assert {x.dtype for x in found.activities} == {np.dtype("float32")}
    assert found.status is Status.REACHED_T1
    assert moments(problem, T, [1.0]).covariance.dtype == jnp.float32


def test_a_noisy_run_says_so(tmp_path: Any) -> None:
    """In its summary, its field and its file, alone and for several keys; others say nothing."""
    found = run(integrator=EulerMaruyama(dt=0.05))
    assert found.temperature == T and "noise of the temperature 0.3" in repr(found)
    # 101 times in between would lie between steps: those that are saved are steps.
    np.testing.assert_allclose(found.times, np.arange(21) * 0.05, rtol=1e-15)
    path = tmp_path / "run.nc"
    found.to_netcdf(path)
    assert repr(pcdyn.load(path)) == repr(found)
    several = jax.vmap(lambda k: run(key=k, integrator=Exact()))(jax.random.split(KEY, 2))
    assert "noise of the temperature 0.3" in repr(several)
    several.to_netcdf(tmp_path / "several.nc")
    np.testing.assert_array_equal(pcdyn.load(tmp_path / "several.nc").temperature, [T, T])
    warm = jax.vmap(lambda t: run(noise=Langevin(t), integrator=Exact()))(jnp.array([0.1, T]))
    assert "noise of the temperature 0.1 … 0.3" in repr(warm)
    assert simulate(CASE.problem, t1=1.0).temperature is None


def test_moments_say_what_they_are() -> None:
    text = repr(moments(CASE.problem, T, [0.0, 2.0]))
    assert "2 times to 2" in text and "standard deviations" in text
    several = jax.vmap(functools.partial(moments, CASE.problem, times=[1.0]))(jnp.array([0.1, T]))
    assert "2 networks" in repr(several)
