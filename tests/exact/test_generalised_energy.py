"""Energies other than the Gaussian against closed forms, finite differences and SciPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares, minimize

import pcdyn
from pcdyn import learning
from pcdyn.cli.network import build_problem
from pcdyn.errors import (
    DtypeError,
    EnergyWarning,
    IllPosedEnergyError,
    InputError,
    NonFiniteError,
    PrecisionError,
    ShapeError,
)
from pcdyn.model.energies.energy import CrossEntropy, Gaussian
from pcdyn.model.energies.generalised import (
    CustomEnergy,
    Divisive,
    LogCosh,
    PseudoHuber,
    Student,
    named_energy,
)
from pcdyn.model.energies.interpolation import interpolated
from pcdyn.model.energies.well_posedness import well_posedness
from pcdyn.model.network import Dense, Network
from pcdyn.references.adjoint_condition import adjoint_condition
from tests.networks import EPS, assert_close, build_case

ROUND_OFF = 1e3 * EPS


def half_square(error: Any) -> Any:
    return error**2 / 2


# Each energy with h and h' in NumPy.
FUNCTIONS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "log cosh": (LogCosh(), lambda e: np.log(np.cosh(e)), np.tanh),
    "pseudo-Huber": (
        PseudoHuber(0.5),
        lambda e: 0.25 * (np.sqrt(1 + 4 * e**2) - 1),
        lambda e: e / np.sqrt(1 + 4 * e**2),
    ),
    "Student": (
        Student(2.0), lambda e: np.log(1 + e**2 / 4), lambda e: 2 * e / (4 + e**2)),
    "divisive": (
        Divisive(0.3),
        lambda e: 0.5 * np.log(0.3 + e**2) - 0.5 * np.log(0.3),
        lambda e: e / (0.3 + e**2),
    ),
    "custom": (CustomEnergy(half_square), lambda e: e**2 / 2, lambda e: e),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_energy_and_its_slope_are_those_of_numpy(name: str) -> None:
    """h, h' and, by central differences of h', h''; the stand-in curvature is positive."""
    energy, h, slope = FUNCTIONS[name]
    error = np.concatenate([np.linspace(-9, 9, 37), [1e-3, -1e-9]])
    # NumPy's forms cancel near zero, where h is below its own round-off of 1.
    assert_close(energy.h(jnp.asarray(error)), h(error), ROUND_OFF)
    assert_close(energy.slope(jnp.asarray(error)), slope(error), ROUND_OFF)
    step = 1e-5
    numeric = (slope(error + step) - slope(error - step)) / (2 * step)
    # Truncation is step² h''''/6, h'''' of order 1/δ² or less; round-off is EPS / step.
    assert_close(energy.second_derivative(jnp.asarray(error)), numeric, 1e-8)
    assert np.all(np.asarray(energy.bend(jnp.asarray(error))) > 0)


def test_log_cosh_neither_overflows_nor_cancels() -> None:
    """|ε| − log 2 far out, ½ε² to full relative accuracy near zero."""
    found = np.asarray(LogCosh().h(jnp.asarray([1e3, -1e5, 1e-8])))
    assert found == pytest.approx([1e3 - np.log(2), 1e5 - np.log(2), 0.5e-16], rel=1e-14)


def test_pseudo_huber_does_not_overflow() -> None:
    """δ|ε| − δ² far out, where (ε/δ)² is no number; the square root's series where it turns."""
    for dtype, delta in ((np.float32, 1e-18), (np.float64, 1e-150)):
        error = jnp.asarray([-3e7, 2.0, 50.0], dtype)
        energy = jax.tree.map(lambda x, d=dtype: x.astype(d), PseudoHuber(delta))
        np.testing.assert_allclose(energy.h(error), delta * np.abs(error), rtol=1e-6)
        np.testing.assert_allclose(energy.slope(error), delta * np.sign(error), rtol=1e-6)
    for far in (6e7, 7e7):
        assert float(PseudoHuber().h(jnp.asarray(far))) == pytest.approx(far - 1, rel=1e-15)


@pytest.mark.parametrize("kind", [PseudoHuber, Student, Divisive])
def test_parameters_that_the_network_cannot_hold_are_refused(kind: Any) -> None:
    """0 in its dtype, or with a square or its inverse out of range: F and its slope would be 0."""
    case = build_case(seed=1, widths=(3, 4, 2), activations=("tanh",), batch=2)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), case.network)
    for network, value in ((single, 1e-50), (single, 1e-20), (case.network, 1e-200),
                           (case.network, 1e200)):  # fmt: skip
        with pytest.raises(PrecisionError, match=kind.__name__):
            pcdyn.InferenceProblem(network, input=case.input, energy=kind(value))
    made = jax.jit(lambda value: pcdyn.InferenceProblem(single, energy=kind(value)).energy[0])(0.5)
    assert float(jax.tree.leaves(made)[0]) == 0.5


def test_an_energy_that_overflows_is_not_at_equilibrium() -> None:
    """The slope of log(1 + ∞) is computed as 0, but there is no equilibrium to be seen."""
    case = build_case(seed=1, widths=(3, 4, 2), activations=("tanh",), batch=2)
    problem = pcdyn.InferenceProblem(
        case.network, input=case.input, output=[[2e200, 1.0], [0.1, 0.2]], energy=Student()
    )
    found = pcdyn.equilibrium(problem, throw=False)
    assert found.status[0] is pcdyn.EquilibriumStatus.NON_FINITE
    assert found.status[1] is pcdyn.EquilibriumStatus.CONVERGED
    flow = pcdyn.simulate(problem, t1=50.0, until="equilibrium", per_sample=True, throw=False)
    assert flow.status == (pcdyn.Status.NON_FINITE, pcdyn.Status.CONVERGED)


def test_layers_are_summed_with_their_precisions() -> None:
    """E_l = Σ_i Π_i h(ε_i), with a number, one per unit, or none."""
    error = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    expected = np.log(np.cosh(np.asarray(error)))
    diagonal = np.array([2.0, 0.5])
    for precisions, factor in ((None, 1.0), (3.0, 3.0), ([1.0, diagonal], diagonal)):
        energy = LogCosh(precisions).per_prediction(2)[1]
        assert_close(energy.value(error, None), (factor * expected).sum(-1), ROUND_OFF)


def test_half_the_square_is_the_gaussian() -> None:
    """Energies, vector field and equilibrium of ½ε² as a custom energy are those of `Gaussian`."""
    case = build_case(
        seed=1, widths=(3, 4, 2), activations=("tanh",), precision="diagonal", batch=3
    )
    gaussian = case.problem
    custom = pcdyn.InferenceProblem(
        case.network, input=case.input, output=case.output,
        energy=CustomEnergy(half_square, precision=case.precisions),
    )  # fmt: skip
    for one, other in (
        (custom.layer_energies(case.state), gaussian.layer_energies(case.state)),
        (custom.vector_field(0.0, case.state), gaussian.vector_field(0.0, case.state)),
    ):
        assert_close(one, jax.tree.map(np.asarray, other), ROUND_OFF)
    found = pcdyn.equilibrium(custom, method="gauss_newton", tolerance=1e-9)
    slope = gaussian.gradient((jnp.asarray(found.state[0]),))[0]
    assert float(jnp.max(jnp.linalg.norm(slope, axis=-1))) <= 1e-9 + ROUND_OFF


def robust_regression(energy: Any) -> tuple[pcdyn.InferenceProblem, np.ndarray]:
    """A free input seen through a matrix, with an outlier in each sample."""
    rng = np.random.default_rng(0)
    weight, inputs = rng.normal(size=(6, 2)), rng.normal(size=(3, 2))
    shown = inputs @ weight.T + 0.1 * rng.normal(size=(3, 6))
    shown[:, 0] += 5
    network = pcdyn.Network([pcdyn.Dense(jnp.asarray(weight))])
    return pcdyn.InferenceProblem(network, output=shown, energy=energy), weight


def test_inference_of_a_free_input_is_scipys_robust_regression() -> None:
    """SciPy's loss ρ(z²) is 2h: "soft_l1" is pseudo-Huber; the scale is δ."""
    problem, weight = robust_regression(PseudoHuber(0.5))
    ours = pcdyn.equilibrium(
        problem, method="gauss_newton", initial=(np.zeros((3, 2)),), tolerance=1e-9
    )
    assert problem.output is not None
    for row, target in enumerate(np.asarray(problem.output)):
        theirs = least_squares(
            lambda x, t=target: weight @ x - t, np.zeros(2), loss="soft_l1", f_scale=0.5,
            xtol=1e-14, ftol=1e-14, gtol=1e-12,
        )  # fmt: skip
        # Curvature is of the order of WᵀW/√(1 + 100), 0.1: SciPy's tolerance is what is left.
        np.testing.assert_allclose(ours.state[0][row], theirs.x, atol=1e-6)
        assert float(ours.free_energy[row]) == pytest.approx(theirs.cost, rel=1e-9)


def numpy_free_energy(x: np.ndarray, case: Any, residual: Any, output: Any) -> float:
    """F of one tanh sample with one hidden layer, from h in NumPy."""
    first, second = case.weights
    below = x - np.tanh(first @ case.input[0])
    return float(np.sum(residual(below)) + np.sum(output(case.output[0] - np.tanh(second @ x))))


MIXED = {
    "Student": (Student(2.0), FUNCTIONS["Student"][1], FUNCTIONS["Student"][1]),
    "two": ([LogCosh(), Gaussian(2.0)], FUNCTIONS["log cosh"][1], lambda e: e**2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_equilibrium_and_learning_agree_with_scipy(name: str) -> None:
    """The default solvers end at SciPy's minimum.

    With an energy for each layer the weight gradient is dF*/dW by differences, and the truncated
    steps of learning agree with it.
    """
    energy, residual, output = MIXED[name]
    case = build_case(seed=2, widths=(3, 4, 2), activations=("tanh",), batch=1)
    problem = pcdyn.InferenceProblem(
        case.network, input=case.input, output=case.output, energy=energy
    )
    rest = pcdyn.equilibrium(problem, tolerance=1e-9)
    assert rest.ok

    def least(changed: Any) -> Any:
        return minimize(numpy_free_energy, np.asarray(rest.state[0][0]),
                        (changed, residual, output), tol=1e-12, method="BFGS")  # fmt: skip

    theirs = least(case)
    assert float(rest.free_energy[0]) == pytest.approx(theirs.fun, abs=1e-10)
    # BFGS ends where differences of F, known to 1e-16, give no slope: √(1e-16) of its size.
    np.testing.assert_allclose(rest.state[0][0], theirs.x, atol=1e-6)
    if name == "Student":
        return
    rule = learning.PredictiveCoding()
    rule.check(problem)
    truncated, _ = rule.learn(problem, ())
    exact, _ = learning.PredictiveCoding(method="gauss_newton", tolerance=1e-9).learn(problem, ())
    slope = np.asarray(exact.gradient.layers[0].weight)
    near = np.asarray(truncated.gradient.layers[0].weight)
    # A relative residual of 0.02, which bounds the error up to the ratio of curvatures.
    assert np.linalg.norm(near - slope) <= 0.2 * np.linalg.norm(slope)
    for entry in ((0, 0), (3, 1)):
        values = []
        for sign in (1, -1):
            weight = case.weights[0].copy()
            weight[entry] += sign * 1e-3
            values.append(least(case.replace(weights=(weight, case.weights[1]))).fun)
        # Truncation is of order 1e-6, that of BFGS 1e-12 / 1e-3.
        assert slope[entry] == pytest.approx((values[0] - values[1]) / 2e-3, abs=1e-5)


def test_the_weight_gradient_is_local() -> None:
    """−(f' ∘ Π h'(ε)) xᵀ in NumPy is ∂F/∂W by autodiff, away from equilibrium."""
    case = build_case(seed=3, widths=(3, 4, 2), activations=("tanh",))
    problem = case.replace(clamp="both").problem
    energy = Student(2.0, precision=[1.5, 0.5])

    def free_energy(network: pcdyn.Network) -> Any:
        moved = pcdyn.InferenceProblem(network, input=case.input, output=case.output, energy=energy)
        return moved.free_energy(case.state)

    found = jax.grad(free_energy)(problem.network)
    for index, precision in ((1, 1.5), (2, 0.5)):
        below = case.activities[index - 1]
        prediction = np.tanh(case.weights[index - 1] @ below)
        influence = precision * FUNCTIONS["Student"][2](case.activities[index] - prediction)
        expected = -np.outer((1 - prediction**2) * influence, below)
        assert_close(found.layers[index - 1].weight, expected, ROUND_OFF)


def test_the_adjoint_condition_looks_at_every_layer() -> None:
    """A condition broken in one hidden layer only is seen there; wrong shapes are refused."""
    case = build_case(seed=4, widths=(2, 3, 4, 2), activations=("tanh",))

    def odd(here: Any, prediction: Any) -> Any:
        return here - prediction if here.shape != (4,) else 2 * here - prediction

    found = adjoint_condition(case.network, case.activities, interaction=odd)
    # B is doubled in layer 2: A + J B = −J + 2 J against 2 J.
    assert_close(found.residuals, np.array([0.0, 0.5]), ROUND_OFF)
    assert not found.holds
    assert "layer 2" in found.explanation
    with pytest.raises(ShapeError, match="one sample"):
        adjoint_condition(case.network, case.activities[:-1])


KINDS: dict[str, tuple[Any, tuple[bool, bool, bool, bool]]] = {
    "quartic": (lambda e: e**4, (True, True, True, True)),
    "Huber": (
        lambda e: jnp.where(jnp.abs(e) < 1, e**2 / 2, jnp.abs(e) - 0.5), (True, True, True, True)),
    "double well": (lambda e: (e**2 - 1) ** 2, (True, True, True, False)),
    "Welsch": (lambda e: 1 - jnp.exp(-(e**2)), (True, True, True, False)),
    "|e|^1.9": (lambda e: jnp.abs(e) ** 1.9, (True, True, False, True)),
    "|e|": (jnp.abs, (True, True, False, True)),
    "linear": (lambda e: e * 1.0, (True, False, True, True)),
    "-log1p": (lambda e: -jnp.log1p(e**2), (True, False, True, False)),
    "1 + sin": (lambda e: 1 + jnp.sin(e), (True, True, True, False)),
    "1 - cos": (lambda e: 1 - jnp.cos(e), (True, True, True, False)),
    "cosh": (lambda e: jnp.cosh(e) - 1, (False, False, False, False)),
    # Of kinks that lie at no error of the grid.
    "dead zone": (lambda e: jnp.maximum(jnp.abs(e) - 0.3, 0), (True, True, False, True)),
    "its square": (lambda e: jnp.maximum(jnp.abs(e) - 0.3, 0) ** 2, (True, True, True, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_well_posedness_is_seen(name: str) -> None:
    """Finite, bounded below, Lipschitz slope and convex, as calculus says."""
    h, expected = KINDS[name]
    seen = well_posedness(h)
    assert (seen.finite, seen.bounded_below, seen.lipschitz, seen.convex) == expected


def test_well_posedness_does_not_depend_on_the_default_dtype() -> None:
    """Measured in float64 with float64 off as well; not at all where h is of float32."""
    with jax.enable_x64(False):
        with pytest.warns(EnergyWarning, match="not Lipschitz near ε = 0"):
            CustomEnergy(lambda e: jnp.abs(e) ** 1.5)
        seen = well_posedness(lambda e: e**2 * jnp.ones((), jnp.float32))
        assert seen.lipschitz and seen.holds
    seen = well_posedness(jnp.abs, jnp.float32)
    assert seen.lipschitz is None and seen.holds


def test_energies_that_are_ill_posed_are_refused_with_the_reason() -> None:
    """The printed log ε by name and as a function, unbounded ones, and |ε|^p with a warning."""
    for call, words in (
        (lambda: named_energy("log"), "finite|time ε₀²/2"),
        (lambda: named_energy("power"), "not Lipschitz"),
        (lambda: CustomEnergy(jnp.log), "not finite.*Divisive"),
        (lambda: CustomEnergy(lambda e: -(e**2)), "bounded below"),
        (lambda: CustomEnergy(jnp.sum), "elementwise"),
        (lambda: CustomEnergy(lambda e: e**2 * jnp.sum(e**2)), "elementwise.*batch"),
        (lambda: CustomEnergy(lambda e: e**2 + jnp.sum(e**2)), "elementwise.*batch"),
        (lambda: CustomEnergy(lambda e: jnp.cumsum(e) ** 2), "elementwise.*batch"),
        (lambda: CustomEnergy(lambda e: jnp.cosh(e) - 1), "ε = -794.*overflows"),
    ):
        with pytest.raises(IllPosedEnergyError, match=words):
            call()
    with pytest.warns(EnergyWarning, match="not Lipschitz near ε = 0"):
        CustomEnergy(lambda e: jnp.abs(e) ** 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CustomEnergy(half_square)


def test_what_does_not_fit_is_refused() -> None:
    """Parameters, matrices, free outputs, names, and solvers that would not apply."""
    case = build_case(seed=5, widths=(2, 3, 2), activations=("tanh",), batch=2)
    network, data = case.network, {"input": case.input, "output": case.output}
    soft = pcdyn.InferenceProblem(
        network, input=case.input, output=np.eye(2), energy=[LogCosh(), CrossEntropy()]
    )
    robust = pcdyn.InferenceProblem(network, energy=Student(), **data)
    for call, error, words in (
        (lambda: PseudoHuber(0.0), PrecisionError, "delta of PseudoHuber must be positive"),
        (lambda: Student([1.0, 2.0]), ShapeError, "one number"),
        (lambda: LogCosh([1.0, np.eye(2)]), ShapeError, "layer 2 is a matrix"),
        (lambda: LogCosh(-1.0), PrecisionError, "positive"),
        (lambda: pcdyn.InferenceProblem(network, input=case.input, energy=CrossEntropy()),
         InputError, "energy of layer 2: cross-entropy .* clamp the output"),
        (lambda: pcdyn.InferenceProblem(network, energy=[CrossEntropy(), LogCosh()], **data),
         InputError, "energy of layer 1: cross-entropy .* for that alone"),
        (lambda: pcdyn.InferenceProblem(network, energy=[LogCosh()], **data),
         ShapeError, "1 energies for 2 predictions"),
        (lambda: pcdyn.InferenceProblem(network, energy=[LogCosh([1.0, 2.0]), Student()], **data),
         ShapeError, "2 precisions for 1 prediction"),
        (lambda: LogCosh([1.0, 2.0]).value(jnp.ones(2), None), InputError, "of 2 predictions"),
        (lambda: named_energy("cauchy"), InputError, "known are gaussian, log_cosh"),
        (lambda: named_energy("log_cosh", parameter=2.0), InputError, "no parameter"),
        (lambda: pcdyn.equilibrium(soft, method="gauss_newton"), InputError,
         "layer 2, CrossEntropy, has none"),
        (lambda: learning.ZeroDivergence().check(robust), InputError, "unit precision"),
        (lambda: build_problem({"energy": "student:x"}), InputError, "not a number"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()


SMALL = Network([Dense(0.5 * np.ones((3, 2)), activation="tanh"), Dense(0.5 * np.ones((2, 3)))])


def look(interaction: Any = lambda x, mu: x - mu, x: Any = (0.1, 0.2, 0.3)) -> Any:
    """The adjoint condition of a small network."""
    return adjoint_condition(SMALL, [np.ones(2), x, np.ones(2)], interaction=interaction)


@pytest.mark.unchecked
@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: CustomEnergy(3.0), InputError, "function of an array, got 3.0"),
    (lambda: CustomEnergy(lambda e: 1.0), IllPosedEnergyError, "returned a float"),
    (lambda: CustomEnergy(lambda e: None), IllPosedEnergyError, "returned a NoneType"),
    (lambda: CustomEnergy(lambda e: [e]), IllPosedEnergyError, "returned a list"),
    (lambda: CustomEnergy(lambda e: np.asarray(e) ** 2), IllPosedEnergyError, "jax.numpy"),
    (lambda: CustomEnergy(lambda e: e**2 if e > 0 else e), IllPosedEnergyError, "jnp.where"),
    (lambda: pcdyn.InferenceProblem(SMALL, energy=[LogCosh(), None]), InputError,
     "energy of layer 2 must be an energy .* NoneType"),
    (lambda: pcdyn.InferenceProblem(SMALL, energy=[LogCosh(), Student]), InputError,
     "energy of layer 2 is the class Student: call it"),
    (lambda: pcdyn.InferenceProblem(SMALL, energy=[LogCosh(), [LogCosh()]]), InputError,
     "energy of layer 2 is a list"),
    (lambda: pcdyn.InferenceProblem(SMALL, energy=LogCosh), InputError, r"call it, LogCosh"),
    (lambda: pcdyn.InferenceProblem(SMALL, energy="log_cosh"), InputError, "got a str"),
    (lambda: named_energy(["x"]), InputError, r"got \['x'\]"),
    (lambda: PseudoHuber("a"), DtypeError, "delta of PseudoHuber is a str"),
    (lambda: PseudoHuber(None), DtypeError, "delta of PseudoHuber is a NoneType"),
    (lambda: Student([1.0, [2.0, 3.0]]), DtypeError, "equal lengths"),
    (lambda: Student(10**400), DtypeError, "scale of Student"),
    (lambda: pcdyn.Gaussian([[]]), ShapeError, "layer 1 is empty"),
    (lambda: interpolated(0.5, 2.5), InputError, "an integer .* 2.5"),
    (lambda: interpolated("x", 3), DtypeError, "λ is a str"),
    (lambda: look(lambda x, mu: (x - mu)[:1]), ShapeError, r"of shape \(3,\).* gives \(1,\)"),
    (lambda: look(lambda x, mu: (x, mu)), ShapeError, "gives tuple"),
    (lambda: look(x=np.full(3, np.nan)), NonFiniteError, "activities of layer 1"),
    (lambda: look(x=None), DtypeError, "activities of layer 1"),
])  # fmt: skip
def test_what_is_no_energy_or_number_is_named(call: Any, error: Any, words: str) -> None:
    """Without the checks of annotations, as users run it: never an error of JAX or NumPy."""
    with pytest.raises(error, match=words):
        call()


def test_a_named_energy_goes_to_a_file_and_back(tmp_path: Path) -> None:
    """Name, parameter and precisions, as the command line makes them; a custom one is refused."""
    problem = build_problem(
        {"widths": (2, 3, 2), "energy": "student:0.5", "precisions": (2.0, 3.0), "batch": 2}
    )
    file = tmp_path / "problem.nc"
    pcdyn.save_problem(problem, file)
    again = pcdyn.load_problem(file).energy
    assert [type(energy) for energy in again] == [Student, Student]
    assert eqx.tree_equal(again, problem.energy)
    with pytest.raises(InputError, match="--energy beside"):
        build_problem({"network": file, "precisions": (1.0, 1.0)})
    own = pcdyn.InferenceProblem(
        problem.network, input=[1.0, 2.0], energy=CustomEnergy(half_square)
    )
    with pytest.raises(InputError, match="CustomEnergy is no energy that pcdyn knows by name"):
        pcdyn.save_problem(own, tmp_path / "own.nc")
