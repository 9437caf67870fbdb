"""Implicit steps: their block-tridiagonal linear algebra is that of the dense matrix.

Oracles are `jax.hessian`, dense linear algebra in NumPy, the matrix exponential, SciPy's Radau,
and diffrax with a dense linear solver.
"""

from __future__ import annotations

import itertools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from pcdyn.errors import Status, StepLimitError
from pcdyn.integrators import Diffrax, SciPy
from pcdyn.integrators.host_jacobian import ChainPattern, chain_entries
from pcdyn.integrators.rosenbrock import Rodas5P
from pcdyn.integrators.structured import (
    ChainSolver,
    chain_blocks,
    factorise,
    sample_hessians,
    shifted,
)
from pcdyn.simulation.simulate import simulate
from tests.networks import EPS, Case, assert_close, build_case, jax_free_energy

ROUND_OFF = 1e3 * EPS
DEEP = (2, 3, 2, 3, 2)
T1 = 2.0


def stiff(clamp: str, activation: str, batch: int | None, widths: tuple[int, ...] = DEEP) -> Case:
    """Widths that differ, time constants, full precisions, of which that of the output is 100."""
    case = build_case(seed=4, widths=widths, clamp=clamp, precision="full", bias=True, slow=True,
                      activations=(activation,), batch=batch)  # fmt: skip
    return case.replace(precisions=(*case.precisions[:-1], 100.0 * case.precisions[-1]))


def sample_hessian(case: Case) -> np.ndarray:
    """∂²F/∂y² of one sample by `jax.hessian` of F written out, y the free layers side by side."""

    def energy(y: Any) -> Any:
        sizes = np.cumsum([case.widths[i] for i in case.free])[:-1]
        free = dict(zip(case.free, jnp.split(y, sizes), strict=True))
        layers = [free.get(i, jnp.asarray(x)) for i, x in enumerate(case.activities)]
        return jax_free_energy(case, layers)

    return np.asarray(jax.hessian(energy)(jnp.asarray(case.stack(case.state))))


def taus(case: Case) -> np.ndarray:
    constants = case.time_constants or (1.0,) * (case.depth + 1)
    return np.concatenate([np.full(case.widths[i], constants[i]) for i in case.free])


# --- Linear algebra -------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", ["both", "output"])
def test_blocks_are_those_of_the_hessian(clamp: str) -> None:
    """By layer energies, by products of the flow, and as SciPy gets them; for every sample."""
    case = stiff(clamp, "tanh", 2)
    problem, state = case.problem, case.state
    constants = problem.state_time_constants

    @jax.jit
    def products(state: Any) -> Any:
        _, linear = jax.linearize(lambda y: problem.vector_field(0.0, y), state)

        def symmetric(v: Any) -> Any:
            return tuple(-t * x for t, x in zip(constants, linear(v), strict=True))

        return chain_blocks(symmetric, state)

    ours = [eqx.filter_jit(sample_hessians)(problem, state), products(state)]
    expected = [sample_hessian(case.sample(row)) for row in range(2)]
    for blocks in ours:
        for row in range(2):
            one = jax.tree.map(lambda x, row=row: x[row], blocks)
            assert_close(one.dense(), expected[row], ROUND_OFF)
    jacobian = scipy.linalg.block_diag(*[-h / taus(case)[:, None] for h in expected])
    layers = range(len(state))
    pairs = [*zip(layers, layers, strict=True), *itertools.pairwise(layers)]
    pattern = ChainPattern(tuple(x.shape[-1] for x in state), 2, pairs)
    entries = np.asarray(chain_entries(problem, state))
    assert_close(pattern.sparse(entries).toarray(), jacobian, ROUND_OFF)
    i, j = np.indices(jacobian.shape)
    inside = abs(i - j) <= pattern.bandwidth
    assert not jacobian[~inside].any()
    assert_close(pattern.banded(entries)[(i - j + pattern.bandwidth)[inside], j[inside]],
                 jacobian[inside], ROUND_OFF)  # fmt: skip


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_chain_solver_solves_like_numpy(sign: float) -> None:
    """±(1 + c T⁻¹H) and its transpose, of two samples; the condition is below 1e4.

    c is below 1 / 26, for H has a rate of −26 there: the matrix is positive definite.
    """
    case = stiff("both", "tanh", 2)
    problem, state, step = case.problem, case.state, 0.03

    @eqx.filter_jit
    def both(state: Any, rhs: Any) -> Any:
        _, linear = jax.linearize(lambda y: problem.vector_field(0.0, y), state)

        def product(v: Any) -> Any:
            return jax.tree.map(lambda x, jx: sign * (x - step * jx), v, linear(v))

        operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: state))
        solver = ChainSolver(problem.state_time_constants)
        chain = solver.init(operator, {})
        other, _ = solver.transpose(chain, {})
        return solver.compute(chain, rhs, {})[0], solver.compute(other, rhs, {})[0]

    direct, transposed = both(state, state)
    for row in range(2):
        sample = case.sample(row)
        hessian, rhs = sample_hessian(sample), sample.stack(sample.state)
        matrix = sign * (np.eye(len(rhs)) + step * hessian / taus(case)[:, None])
        assert np.linalg.cond(matrix) < 1e4
        for ours, theirs in ((direct, matrix), (transposed, matrix.T)):
            got = case.stack(ours)[row]
            assert_close(got, np.linalg.solve(theirs, rhs), 1e4 * ROUND_OFF)


def test_an_indefinite_matrix_is_nan_for_its_sample_alone() -> None:
    """Rate −μ makes −μT + H indefinite for the sample with the smaller curvature only."""
    case = stiff("both", "tanh", 2).replace(time_constants=None)
    least = [np.linalg.eigvalsh(sample_hessian(case.sample(row)))[0] for row in range(2)]
    assert abs(least[0] - least[1]) > 1e-3
    problem, state = case.problem, case.state

    @eqx.filter_jit
    def solved(rate: Any) -> Any:
        matrix = shifted(sample_hessians(problem, state), problem.state_time_constants, rate)
        return factorise(matrix).solve(state)

    finite = np.isfinite(case.stack(solved(-np.mean(least)))).all(axis=1)
    np.testing.assert_array_equal(finite, np.array(least) > np.mean(least))


# --- Solutions ------------------------------------------------------------------------------------


def dense() -> Any:
    """Kvaerno5 with the dense matrix of the whole batch."""
    finder = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)(linear_solver=lx.LU())
    return diffrax.Kvaerno5(root_finder=finder)


@pytest.mark.slow
def test_structured_and_dense_steps_are_the_same() -> None:
    """The same numbers of steps and, but for the round-off of each, the same states.

    A Newton iteration ends within a hundredth of the tolerance, far above round-off, at the same
    iterate; both are quasi-Newton steps with the same matrix.
    """
    case = stiff("both", "tanh", 2)
    options = {"t1": 0.5, "times": np.array([0.2, 0.5]), "initial": case.state}
    runs = [
        simulate(case.problem, integrator=Diffrax(solver), **options)
        for solver in ("kvaerno5", dense())
    ]
    assert runs[0].accepted_steps == runs[1].accepted_steps
    assert runs[0].rejected_steps == runs[1].rejected_steps
    assert_close(case.stack(runs[0].final), case.stack(runs[1].final), 1e4 * ROUND_OFF)


def linear_solution(case: Case, time: float) -> np.ndarray:
    """y(t) of one sample by the matrix exponential."""
    matrix, drive, tau = case.linear_flow()
    generator = np.block([[-matrix / tau[:, None], (drive / tau)[:, None]],
                          [np.zeros((1, len(tau) + 1))]])  # fmt: skip
    return (scipy.linalg.expm(generator * time) @ np.append(case.stack(case.state), 1.0))[:-1]


def radau(case: Case, times: np.ndarray) -> np.ndarray:
    """y(t) of one sample by SciPy's Radau at 1e-9 on the field in NumPy."""

    def field(t: float, y: np.ndarray) -> np.ndarray:
        free = dict(zip(case.free, case.split(y), strict=True))
        layers = tuple(free.get(i, x) for i, x in enumerate(case.activities))
        return case.stack(case.replace(activities=layers).field())

    return scipy.integrate.solve_ivp(
        field, (0, times[-1]), case.stack(case.state), "Radau", rtol=1e-9, atol=1e-11, t_eval=times
    ).y.T


@pytest.mark.slow
@pytest.mark.parametrize(("clamp", "per_sample"), [("both", False), ("output", True)])
def test_rodas5p_is_the_solution(clamp: str, per_sample: bool) -> None:
    """Linear: expm; tanh: Radau in NumPy; at the end and at times between steps.

    The flow of a linear network contracts, so that local errors of rtol |y| + atol do not grow;
    that of tanh stays within a factor of ten here.
    """
    times = np.array([0.1, 0.77, T1])
    for activation, factor in (("identity", 1), ("tanh", 10)):
        case = stiff(clamp, activation, 2)
        run = simulate(case.problem, t1=T1, times=times, initial=case.state,
                       integrator="rodas5p", per_sample=per_sample)  # fmt: skip
        assert np.all(run.status_codes == Status.REACHED_T1) and run.fallback == ""
        for row in range(2):
            rows = case.stack([run.activities[i] for i in case.free])[:, row]
            sample = case.sample(row)
            if activation == "tanh":
                expected = radau(sample, times)
            else:
                expected = np.stack([linear_solution(sample, t) for t in times])
            assert_close(rows, expected, factor * (1e-6 + 1e-9))
    steps = np.asarray(run.accepted_steps) + np.asarray(run.rejected_steps)
    np.testing.assert_array_equal(run.vector_field_evaluations, 8 * steps)
    np.testing.assert_array_equal(run.jacobian_evaluations, steps)


@pytest.mark.parametrize("widths", [DEEP, (2, 3, 2)])
def test_scipy_with_the_sparse_jacobian_is_the_solution(widths: tuple[int, ...]) -> None:
    """A deep batch, whose bands are narrower than a sample; one hidden layer, half of it zeros."""
    case = stiff("both", "identity", 2, widths)
    for method in ("Radau", "BDF", "LSODA"):
        run = simulate(case.problem, t1=T1, times=np.array([T1]), initial=case.state,
                       integrator=SciPy(method, rtol=1e-8, atol=1e-10))  # fmt: skip
        for row in range(2):
            expected = linear_solution(case.sample(row), T1)
            final = case.stack([run.final[i] for i in case.free])
            assert_close(final[row], expected, 1e-6)


def test_rodas5p_has_order_five_and_its_dense_output_order_four() -> None:
    """Halving the step divides the error at the end by 2⁵, and between steps by 2⁵ (locally 2⁵).

    Within a factor of 1.5 on tanh, against the same method at an eighth of the step, whose error
    is 8⁻⁵ of it.
    """
    case = build_case(seed=8, widths=(3, 3, 2, 2), activations=("tanh",))
    between = T1 - 0.09

    def states(dt: float) -> list[np.ndarray]:
        run = simulate(case.problem, t1=T1, times=np.array([between, T1]), initial=case.state,
                       integrator=Diffrax("rodas5p", dt=dt))  # fmt: skip
        return [case.stack([run.activities[i][k] for i in case.free]) for k in range(2)]

    finest, coarse, fine = states(T1 / 128), states(T1 / 8), states(T1 / 16)
    ratios = [
        np.linalg.norm(c - e) / np.linalg.norm(f - e)
        for c, f, e in zip(coarse, fine, finest, strict=True)
    ]
    assert 2**5 / 1.5 < ratios[1] < 2**5 * 1.5
    assert ratios[0] > 2**4


@pytest.mark.slow
def test_rodas5p_without_structure_takes_the_same_steps() -> None:
    """The dense matrix, which flows of weights need, against the blocks."""
    case = stiff("both", "tanh", 2)
    options = {"t1": 0.5, "times": np.array([0.5]), "initial": case.state}
    runs = [
        simulate(case.problem, integrator=Diffrax(s), **options) for s in ("rodas5p", Rodas5P())
    ]
    assert runs[0].accepted_steps == runs[1].accepted_steps
    assert_close(case.stack(runs[0].final), case.stack(runs[1].final), 1e4 * ROUND_OFF)


@pytest.mark.slow
def test_rodas5p_under_vmap_and_jit_is_the_loop() -> None:
    """Two inputs at once, each against itself alone."""
    case = stiff("both", "tanh", 2)

    def run(problem: Any, input: Any, output: Any, state: Any) -> Any:
        sample = problem.with_data(input, output)
        return simulate(sample, t1=0.5, times=np.array([0.5]), initial=state,
                        integrator="rodas5p").activities  # fmt: skip

    problem = case.problem
    mapped = jax.jit(jax.vmap(run, (None, 0, 0, 0)))(
        problem, problem.input, problem.output, case.state
    )
    alone = simulate(problem, t1=0.5, times=np.array([0.5]), initial=case.state,
                     integrator="rodas5p", per_sample=True)  # fmt: skip
    for index in case.free:
        assert_close(mapped[index][:, 0], alone.activities[index][0], 1e4 * ROUND_OFF)


# --- Failures -------------------------------------------------------------------------------------


def test_too_few_steps_are_reported() -> None:
    """Without a fallback the limit is an error that names its remedy."""
    case = stiff("both", "tanh", 2)
    with pytest.raises(StepLimitError, match="raise max_steps"):
        simulate(case.problem, t1=T1, times=np.array([T1]), initial=case.state,
                 integrator=Diffrax("rodas5p", max_steps=3, fallback=None))  # fmt: skip
