"""Closed forms of linear networks against dense NumPy, SciPy and JAX's automatic differentiation.

The oracles take H = AᵀΠA and b = −AᵀΠc from the affine map ε = A y + c of `Case.affine_errors`,
which knows nothing of block-tridiagonal matrices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from pcdyn.errors import InputError, NotLinearError, SingularHessianError
from pcdyn.linearisation.whitened import is_linear
from pcdyn.model.network import Dense, Network, mlp
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.linear import (
    exact_flow,
    forcing,
    hessian,
    linear_equilibrium,
    relaxation_times,
    single_layer_flow,
    spectrum,
)
from tests.networks import (
    CLAMPS,
    EPS,
    SHAPES,
    Case,
    assert_close,
    build_case,
    cases,
    few,
    jax_free_energy,
)

# Sums of fewer than 100 products of numbers of order 1 (assert_close scales with the largest).
ROUND_OFF = 1e3 * EPS


def equilibrium_of(case: Case) -> tuple[list[np.ndarray], float]:
    """All layers at equilibrium by a dense solve, and cond(H)."""
    matrix, drive, _ = case.linear_flow()
    layers = case.split(np.linalg.solve(matrix, drive.T).T)
    free = dict(zip(case.free, layers, strict=True))
    everything = [free.get(i, case.activities[i]) for i in range(case.depth + 1)]
    return everything, float(np.linalg.cond(matrix))


def propagate(matrix: np.ndarray, drive: np.ndarray, start: np.ndarray, t: float) -> np.ndarray:
    """y(t) of ẏ = −M y + v by expm of the augmented matrix, for singular M as well."""
    size = len(matrix)
    augmented = np.zeros((size + 1, size + 1))
    augmented[:size, :size], augmented[:size, size] = -matrix, drive
    return (scipy.linalg.expm(augmented * t) @ np.append(start, 1.0))[:size]


def propagate_rows(case: Case, t: float) -> np.ndarray:
    """The stacked state at time t from the case's state, sample by sample."""
    matrix, drive, tau = case.linear_flow()
    start = case.stack(case.state)
    drive = np.broadcast_to(drive, start.shape)
    rows = zip(
        drive.reshape(-1, len(tau)), start.reshape(-1, len(tau)), strict=True
    )  # fmt: skip
    ends = [propagate(matrix / tau[:, None], b / tau, y, t) for b, y in rows]
    return np.stack(ends).reshape(start.shape)


@few(max_examples=7)
@given(case=cases(batches=(None,)))
def test_hessian_is_second_derivative_of_free_energy(case: Case) -> None:
    """H = jax.hessian of an independent F on the stacked state, and AᵀΠA, at any state."""
    sample = case.sample(0) if case.batched else case

    def energy(stacked: Any) -> Any:
        cuts = np.cumsum([case.widths[i] for i in case.free])[:-1]
        free = dict(zip(case.free, jnp.split(stacked, cuts), strict=True))
        return jax_free_energy(
            sample, [free.get(i, jnp.asarray(sample.activities[i])) for i in range(case.depth + 1)]
        )

    found = hessian(case.problem).dense()
    expected = jax.jit(jax.hessian(energy))(jnp.asarray(sample.stack(sample.state)))
    assert_close(found, expected, ROUND_OFF)
    assert_close(found, case.linear_flow()[0], ROUND_OFF)


@few(max_examples=7)
@given(case=cases())
def test_forcing_is_the_flow_at_zero(case: Case) -> None:
    """τ ẏ = −H y + b: b = −AᵀΠc, and the vector field is T⁻¹(b − H y)."""
    matrix, drive, tau = case.linear_flow()
    problem, state = case.problem, case.state
    start = case.stack(state)
    found = forcing(problem, like=state)
    assert_close(found, case.split(np.broadcast_to(drive, start.shape)), ROUND_OFF)
    if case.clamp != "none":
        assert_close(forcing(problem), found, 0)
    field = (drive - start @ matrix) / tau
    assert_close(problem.vector_field(0.0, state), case.split(field), ROUND_OFF)


@few(max_examples=7)
@given(case=cases(batches=(None,)))
def test_block_solve_is_dense_solve(case: Case) -> None:
    """Block Cholesky solves H y = b like numpy.linalg.solve where H is regular."""
    matrix, drive, _ = case.linear_flow()
    condition = np.linalg.cond(matrix)
    if condition > 1e8:
        return
    solution = hessian(case.problem).cholesky().solve(forcing(case.problem, like=case.state))
    drive = np.broadcast_to(drive, case.stack(case.state).shape)
    expected = case.split(np.linalg.solve(matrix, drive.T).T)
    # A backward stable solve is accurate to cond(H) EPS times the order of the matrix.
    assert_close(solution, expected, 10 * len(matrix) * condition * EPS)


@few(max_examples=8)
@given(case=cases(clamps=("both", "input")))
def test_equilibrium_is_the_dense_solve(case: Case) -> None:
    """H⁻¹b by both methods equals numpy.linalg.solve; the field vanishes there."""
    expected, condition = equilibrium_of(case)
    # Backward stable: cond(H) EPS times the order of the matrix, at most 9.
    tolerance = 100 * condition * EPS
    problem = case.problem
    found = linear_equilibrium(problem)
    assert_close(found, expected, tolerance)
    # The residual of a backward stable solve is small whatever the condition of H.
    scale = max(1.0, *(float(np.max(np.abs(x))) for x in expected))
    field = problem.vector_field(0.0, problem.state_of(found))
    assert max(float(np.max(np.abs(v))) for v in field) <= 1e4 * EPS * scale
    if case.clamp == "both":
        # S has the condition of F in output space: no worse than H's squared, and modest here.
        spread = linear_equilibrium(problem, method="output_space")
        assert_close(spread, expected, 10 * tolerance)


@few(max_examples=7)
@given(case=cases(clamps=("output",), shapes=((1, 1), (2, 2, 2), (3, 3, 3))))
def test_equilibrium_with_free_input(case: Case) -> None:
    """With square weights and the input free, H is regular and every error vanishes (TP)."""
    expected, condition = equilibrium_of(case)
    if condition > 1e8:
        return
    found = linear_equilibrium(case.problem)
    assert_close(found, expected, 100 * condition * EPS)
    targets = [case.activities[-1]]
    for weight, bias in zip(reversed(case.weights), reversed(case.biases), strict=True):
        centred = targets[0] - (0.0 if bias is None else bias)
        targets.insert(0, np.linalg.solve(weight, centred.T).T)
    assert_close(found, targets, 100 * condition * EPS)


@few(max_examples=7)
@given(case=cases(clamps=("both",)))
def test_theorems_3_4_and_3_5(case: Case) -> None:
    """x_l* = (I + Π_l⁻¹WᵀΠ_{l+1}W)⁻¹[μ_l + Π_l⁻¹WᵀΠ_{l+1}(x_{l+1}* − b_{l+1})], W = W_{l+1}."""
    x = [np.asarray(a) for a in linear_equilibrium(case.problem)]
    condition = equilibrium_of(case)[1]
    for index in range(1, case.depth):
        weight, bias = case.weights[index], case.biases[index]
        back = np.linalg.solve(case.precision(index), weight.T @ case.precision(index + 1))
        above = x[index + 1] - (0.0 if bias is None else bias)
        pull = case.predict(index, x[index - 1]) + above @ back.T
        expected = np.linalg.solve(np.eye(len(back)) + back @ weight, pull.T).T
        assert_close(x[index], expected, 100 * condition * EPS)


@few(max_examples=8)
@given(case=cases(clamps=("both",)))
def test_s_matrix_identities(case: Case) -> None:
    """With S = Σ P_lΠ_l⁻¹P_lᵀ: Π_l ε_l* = P_lᵀS⁻¹e0 for every l, and F* = ½ e0ᵀS⁻¹e0."""
    products = [np.eye(case.widths[-1])]
    for weight in reversed(case.weights[1:]):
        products.insert(0, products[0] @ weight)
    s_matrix = sum(
        p @ np.linalg.solve(case.precision(index), p.T) for index, p in enumerate(products, start=1)
    )
    error = case.activities[-1] - case.feedforward(case.activities[0])[-1]
    weighted = np.linalg.solve(s_matrix, error.T).T
    tolerance = 1e3 * equilibrium_of(case)[1] * EPS
    for method in ("cholesky", "output_space"):
        found = linear_equilibrium(case.problem, method=method)
        errors = case.errors([np.asarray(x) for x in found])
        for index, product in enumerate(products, start=1):
            assert_close(errors[index - 1] @ case.precision(index), weighted @ product, tolerance)
        energy = case.problem.free_energy(case.problem.state_of(found))
        assert_close(energy, 0.5 * np.sum(error * weighted, axis=-1), tolerance)


@few(max_examples=8)
@given(case=cases(clamps=("input",)))
def test_theorem_3_1(case: Case) -> None:
    """With the output free the equilibrium is the feedforward pass, and F* = 0."""
    found = linear_equilibrium(case.problem)
    condition = equilibrium_of(case)[1]
    assert_close(found, case.feedforward(case.activities[0]), 100 * condition * EPS)


@few(max_examples=8)
@given(case=cases())
def test_exact_flow_is_the_matrix_exponential(case: Case) -> None:
    """y(t) by SciPy's expm of the augmented system, for regular and for singular H."""
    flow = exact_flow(case.problem, case.state)
    assert_close(flow(jnp.asarray(0.0)), case.state, ROUND_OFF)
    for t in (0.3, 4.0):
        # Eigenvalues below 100: both sides lose |H| t EPS at most, where modes still move.
        assert_close(flow(jnp.asarray(t)), case.split(propagate_rows(case, t)), 1e5 * EPS)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("slow", [False, True], ids=["unit-tau", "tau"])
def test_exact_flow_is_a_tight_ode_solve(clamp: str, slow: bool) -> None:
    """y(t) by DOP853 of the NumPy vector field at rtol = atol = 1e-12, biases included."""
    case = build_case(
        seed=11, widths=(3, 2, 3, 2), clamp=clamp, precision="full", bias=True, slow=slow
    )  # fmt: skip
    if clamp in ("output", "none"):
        matrix = case.linear_flow()[0]
        assert np.linalg.matrix_rank(matrix) < len(matrix)  # A free wide input: flat directions.

    def field(t: float, stacked: np.ndarray) -> np.ndarray:
        layers = dict(zip(case.free, case.split(stacked), strict=True))
        everything = tuple(layers.get(i, case.activities[i]) for i in range(case.depth + 1))
        return case.stack(case.replace(activities=everything).field())

    times = [0.5, 2.0, 8.0]
    solution = scipy.integrate.solve_ivp(
        field, (0, 8), case.stack(case.state), "DOP853", times, rtol=1e-12, atol=1e-12
    )
    flow = exact_flow(case.problem, case.state)
    for t, expected in zip(times, solution.y.T, strict=True):
        # A contraction does not amplify local errors; a few hundred steps of 1e-12 each.
        assert_close(flow(jnp.asarray(t)), case.split(expected), 1e-10)


@few(max_examples=8)
@given(case=cases(clamps=("both", "input")))
def test_exact_flow_ends_at_the_equilibrium(case: Case) -> None:
    """y(t) → y* = H⁻¹b; at t = 50 / λ_min what is left is e⁻⁵⁰ = 2e-22."""
    expected, condition = equilibrium_of(case)
    slowest = float(spectrum(case.problem)[0])
    end = exact_flow(case.problem, case.state)(jnp.asarray(50 / slowest))
    # Amplitudes divided by eigenvalues: accurate to cond(H), with τ between 1/e and e (e² more).
    tolerance = 1e3 * condition * EPS
    assert_close(end, [expected[i] for i in case.free], tolerance)


@few(max_examples=7)
@given(case=cases(clamps=("both", "output"), shapes=SHAPES[3:]), data=st.data())
def test_single_layer_flow_is_a_4(case: Case, data: st.DataObject) -> None:
    """τ_l ẋ = −A x + Π_l μ_l + WᵀΠ_{l+1}(x_{l+1} − b_{l+1}), A = Π_l + WᵀΠ_{l+1}W (A.4).

    x(t) = e^{−At}x(0) + (I − e^{−At})A⁻¹[…], with scipy.linalg.expm and W = W_{l+1}.
    """
    layer = data.draw(st.integers(1, case.depth - 1))
    x, weight, bias = case.activities, case.weights[layer], case.biases[layer]
    back = weight.T @ case.precision(layer + 1)
    above = x[layer + 1] - (0.0 if bias is None else bias)
    pull = case.predict(layer, x[layer - 1]) @ case.precision(layer) + above @ back.T
    matrix = case.precision(layer) + back @ weight
    tau = 1.0 if case.time_constants is None else case.time_constants[layer]
    flow = single_layer_flow(case.problem, layer, x)
    rest = np.linalg.solve(matrix, pull.T).T
    for t in (0.0, 0.7, 5.0):
        decay = scipy.linalg.expm(-matrix * t / tau)
        expected = x[layer] @ decay + rest @ (np.eye(len(matrix)) - decay)
        # cond(A) is below 1e3 (precisions within 1/e … e, weights of order 1).
        assert_close(flow(jnp.asarray(t)), [expected], 1e5 * EPS)


@few(max_examples=8)
@given(case=cases(batches=(None,)))
def test_spectrum_is_the_eigenvalues(case: Case) -> None:
    """Ascending eigenvalues of T⁻¹H by numpy.linalg.eigvals; their inverses are the times."""
    matrix, _, tau = case.linear_flow()
    expected = np.sort(np.linalg.eigvals(matrix / tau[:, None]).real)
    found = np.asarray(spectrum(case.problem))
    assert np.all(np.diff(found) >= 0)
    # Relative to the largest eigenvalue; T⁻¹H is similar to a symmetric matrix by T^½, whose
    # condition number is at most e.
    assert_close(found / expected[-1], expected / expected[-1], ROUND_OFF)


@few(max_examples=15)
@given(case=cases(batches=(None,)))
def test_flat_directions_never_relax(case: Case) -> None:
    """As many infinite times as AᵀΠA has a null space; the others are 1/eigenvalue, descending."""
    times = np.asarray(relaxation_times(case.problem))
    a_matrix = case.affine_errors()[0]
    nullity = a_matrix.shape[1] - np.linalg.matrix_rank(a_matrix)
    assert np.isinf(times).sum() == nullity
    assert np.all(np.isinf(times[:nullity]))
    finite = times[nullity:]
    assert np.all(finite > 0)
    assert np.all(np.diff(finite) <= 0)
    np.testing.assert_allclose(1 / finite, np.asarray(spectrum(case.problem))[nullity:])


@pytest.mark.slow
@pytest.mark.parametrize("clamp", ["both", "input"])
def test_vmap_over_networks_is_a_loop(clamp: str) -> None:
    """Equilibrium, spectrum and exact flow of stacked networks are those of each one."""
    made = [
        build_case(
            seed=s, widths=(2, 3, 2), clamp=clamp, precision="full", bias=True
        )
        for s in range(3)
    ]  # fmt: skip
    problems = [case.problem for case in made]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[case.state for case in made])

    def closed_forms(problem: InferenceProblem, state: Any) -> Any:
        flow = exact_flow(problem, state)(jnp.asarray(0.5))
        return linear_equilibrium(problem), spectrum(problem), flow

    together = jax.vmap(closed_forms)(stacked, states)
    for row, case in enumerate(made):
        one = jax.tree.map(lambda leaf, row=row: leaf[row], together)
        # Batched LAPACK calls may round differently, by cond(H) EPS.
        tolerance = 100 * equilibrium_of(case)[1] * EPS
        assert_close(one, closed_forms(case.problem, case.state), tolerance)


def test_closed_forms_are_differentiable_under_jit() -> None:
    """∂F*/∂T = S⁻¹e0 (envelope theorem) through the jitted equilibrium."""
    case = build_case(seed=4, widths=(3, 4, 2), precision="full", bias=True)

    def optimum(target: Any) -> Any:
        problem = eqx.tree_at(lambda p: p.output, case.problem, target)
        return problem.free_energy(problem.state_of(linear_equilibrium(problem)))

    found = jax.jit(jax.grad(optimum))(jnp.asarray(case.output))
    activities, condition = equilibrium_of(case)
    weighted = case.errors(activities)[-1] @ case.precision(2)
    assert_close(found, weighted, 100 * condition * EPS)


def test_traced_singular_problem_gives_nan() -> None:
    """Under jit a singular Hessian gives NaN, never a point that is no equilibrium."""
    case = build_case(seed=0, widths=(3, 2, 2), clamp="output")
    found = jax.jit(lambda problem: linear_equilibrium(problem))(case.problem)
    assert all(np.all(np.isnan(found[i])) for i in case.free)


@few(max_examples=15)
@given(case=cases(batches=(None,), clamps=("output",)))
def test_singular_hessian_is_refused(case: Case) -> None:
    """A free input with a null space of A has no unique equilibrium; without, it has one."""
    a_matrix = case.affine_errors()[0]
    singular_values = np.linalg.svd(a_matrix, compute_uv=False)
    if np.linalg.matrix_rank(a_matrix) < a_matrix.shape[1]:
        with pytest.raises(SingularHessianError, match="free layers"):
            linear_equilibrium(case.problem)
    elif singular_values[-1] > 1e-4 * singular_values[0]:
        # Between regular and singular to round-off, cond(H) = cond(A)², either answer is fair.
        linear_equilibrium(case.problem)


def test_singular_hessian_is_never_missed() -> None:
    """With n_0 > n_1 and the input free H is singular, whatever the weights: all 500 give NaN.

    A small last Cholesky pivot is not enough to see it: where an earlier pivot is small the last
    one is round-off divided by it.
    """
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(500, 2, 3)) / np.sqrt(3))
    targets = jnp.asarray(rng.normal(size=(500, 2)))

    def equilibrium(weight: Any, target: Any) -> Any:
        return linear_equilibrium(InferenceProblem(Network([Dense(weight)]), output=target))[0]

    found = np.asarray(jax.jit(jax.vmap(equilibrium))(weights, targets))
    missed = np.flatnonzero(~np.isnan(found).any(axis=-1))
    for row in missed[:1]:
        with pytest.raises(SingularHessianError):
            equilibrium(weights[row], targets[row])
    assert missed.size == 0


def test_only_linear_gaussian_networks_have_closed_forms() -> None:
    """The layer and its activation are named."""
    curved = mlp([2, 2, 2], activation="identity", output_activation="tanh", key=jr.key(0))
    foreign = Network([Dense(np.eye(2)), eqx.nn.Linear(2, 2, key=jr.key(0))])
    data = {"input": np.ones(2), "output": np.ones(2)}
    functions: list[Callable[[InferenceProblem], Any]] = [
        hessian, forcing, linear_equilibrium, spectrum, relaxation_times,
        lambda p: linear_equilibrium(p, method="output_space"),
        lambda p: exact_flow(p, p.zeros_state()),
        lambda p: single_layer_flow(p, 1, [np.ones(2)] * 3),
    ]  # fmt: skip
    for network, named in ((curved, "layer 2.*'tanh'"), (foreign, "layer 2 is a Linear")):
        assert not is_linear(network)
        for function in functions:
            with pytest.raises(NotLinearError, match=named):
                function(InferenceProblem(network, **data))
    assert is_linear(mlp([2, 2], activation="identity", key=jr.key(0)))


def test_options_that_do_not_apply_are_refused() -> None:
    """Unknown methods, output_space with a free end, and layers that are not hidden."""
    case = build_case(seed=0, widths=(2, 3, 2))
    # Without the type checks of the test run, as users have it.
    unchecked = inspect.unwrap(linear_equilibrium)
    with pytest.raises(InputError, match="'dense'"):
        unchecked(case.problem, method="dense")
    for clamp in ("input", "output", "none"):
        with pytest.raises(InputError, match="both ends clamped"):
            linear_equilibrium(case.replace(clamp=clamp).problem, method="output_space")
    for layer in (0, 2, -1):
        with pytest.raises(InputError, match=f"layer, a hidden one, .* got {layer} "):
            single_layer_flow(case.problem, layer, case.activities)
