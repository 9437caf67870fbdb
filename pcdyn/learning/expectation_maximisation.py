"""Learning as expectation maximisation: inference to its end, then the weights to theirs.

The E-step is `pcdyn.equilibrium`, the most probable activities; the M-step lowers F in the weights
with those activities held (Section 3.3; Dempster, Laird & Rubin 1977; Neal & Hinton 1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree
from optimistix import LevenbergMarquardt, least_squares

from pcdyn._support.arrays import check_size, is_traced
from pcdyn._support.checks import check_choice, check_flag, checked_integer, checked_number
from pcdyn._support.states import step
from pcdyn._support.types import Activities, Numbers, State, Values
from pcdyn.equilibria.solvers import GaussNewton, Solver, get_solver
from pcdyn.errors import InputError, MaximisationError, NotConvergedError, ToleranceError
from pcdyn.learning.flows.joint import activities_at_rest
from pcdyn.linearisation.whitened import has_linear_flow, precisions_of
from pcdyn.model.activations import identity
from pcdyn.model.energies.energy import LayerEnergies
from pcdyn.model.energies.precision import Precision
from pcdyn.model.network import Dense, Layer, Network, apply_layer
from pcdyn.model.problem import InferenceProblem, check_problem
from pcdyn.references.algorithms import feedforward, local_gradient
from pcdyn.references.linear import linear_equilibrium

if TYPE_CHECKING:
    import xarray


class MaximisationStep(eqx.Module):
    """The network of least free energy for given activities, and how near it is.

    - `network`: with the new weights and biases.
    - `residual`: of each layer l = 1 … L the norm of ∂F/∂(weights and biases), F averaged over the
      samples, over `√⟨‖Π_l x_l‖²⟩ √⟨‖x_{l−1}‖²⟩`, its size where nothing is predicted.
    """

    network: Network
    residual: Float[Array, " L"]


def maximisation_step(
    problem: InferenceProblem,
    state: Sequence[Numbers],
    *,
    tolerance: float | None = None,
    max_iterations: int = 500,
    throw: bool = True,
) -> MaximisationStep:
    """Find the weights and biases with the least free energy for given activities: the M-step.

    The energy of a layer depends on its own weights alone, so that each layer is a regression of
    x_l on x_{l−1}, over all samples. A `Dense` layer without activation and with a quadratic energy
    is solved by least squares, whatever its precision; where several weights are as good, the one
    nearest to the present weight is taken, which is where gradient descent ends. Any other layer
    goes downhill by Levenberg–Marquardt from its present weights, to a minimum that need not be the
    lowest, with a matrix of errors by weights. Where activities lie beyond the range of an
    activation, there can be none.

    **Arguments:**

    - `problem`: its network is the start.
    - `state`: the free activities, as `pcdyn.equilibrium(problem).state`.
    - `tolerance`: of each layer's `residual`; 1e-8 in float64 and 3e-4 in float32 unless given.
    - `max_iterations`: of Levenberg–Marquardt.
    - `throw`: raise an error where the tolerance is not reached.

    **Raises:**

    - What a state that does not fit raises.
    - `InputError` for an energy that is not quadratic, such as cross-entropy.
    - `MaximisationError` where the tolerance is not reached, unless `throw=False` or under a JAX
      transformation: `residual` says so there.
    """
    check_problem(problem)
    check_flag(throw, "throw")
    tolerance = _checked_tolerance(tolerance, problem)
    max_iterations = checked_integer(max_iterations, "max_iterations", at_least=1)
    activities = problem.activities(problem.initial_state(state))
    found = _maximised(problem, activities, tolerance, max_iterations)
    if throw and not is_traced(found.residual):
        _check_reached(np.asarray(found.residual), tolerance, "the M-step")
    return found


class ExpectationMaximisation(LayerEnergies):
    """A network after some rounds of E-step and M-step, and its energies after each half.

    Energies are means over the samples. `free_energy`, `output_loss` and `residual_energy` follow
    from `energies`; they are those of the activities of the E-step. After a transformation such as
    `jax.vmap` every array has its axes first.

    - `network`: after the last round. `activities`: of the last E-step.
    - `energies`: E_1 … E_L after the E-step and after the M-step of each round, shape
      `(rounds, 2, L)`.
    - `loss`: ℒ of the feedforward pass before the first round and after each, `(rounds + 1,)`.
    - `residual`: that of `MaximisationStep` after each M-step, shape `(rounds, L)`.
    """

    network: Network
    activities: Activities
    energies: Values
    loss: Values
    residual: Values

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return free energy and loss at the start and at the end in words."""
        if is_traced(self.energies):
            return "ExpectationMaximisation inside of a JAX transformation"
        if np.ndim(self.energies) > 3:
            return f"ExpectationMaximisation of several networks, energies {self.energies.shape}"
        free, loss = np.asarray(self.free_energy), np.asarray(self.loss)
        return (
            f"ExpectationMaximisation: {len(free)} rounds\n"
            f"  free energy {free[0, 0]:.4g} after the first E-step, {free[-1, 1]:.4g} at the end\n"
            f"  loss of the feedforward pass {loss[0]:.4g} at the start, {loss[-1]:.4g} at the end"
        )

    def to_xarray(self) -> xarray.Dataset:
        """Return energies, loss and residuals as a labelled data set."""
        import xarray

        more = tuple(f"network_{axis}" for axis in range(np.ndim(self.energies) - 3))
        halves = (*more, "round", "half")
        rounds, _, depth = self.energies.shape[-3:]
        return xarray.Dataset(
            {
                "energy": ((*halves, "layer"), np.asarray(self.energies)),
                "free_energy": (halves, np.asarray(self.free_energy)),
                "output_loss": (halves, np.asarray(self.output_loss)),
                "residual_energy": (halves, np.asarray(self.residual_energy)),
                "residual": ((*more, "round", "layer"), np.asarray(self.residual)),
                "loss": ((*more, "rounds_done"), np.asarray(self.loss)),
            },
            {
                "round": np.arange(1, rounds + 1), "half": ["E", "M"],
                "rounds_done": np.arange(rounds + 1), "layer": np.arange(1, depth + 1),
            },
        )  # fmt: skip


def expectation_maximisation(
    problem: InferenceProblem,
    *,
    rounds: int,
    learning_rate: ArrayLike | None = None,
    initial: Literal["feedforward", "previous"] = "feedforward",
    method: str | Solver | None = None,
    throw: bool = True,
) -> ExpectationMaximisation:
    """Alternate between inference to equilibrium (E-step) and learning (M-step), on all samples.

    F falls in each half: in the E-step where it finds the least F, as in linear networks, or
    starts from the activities of the round before; in the M-step to its end, or if the step along
    the gradient is small enough.

    **Arguments:**

    - `problem`: both ends clamped; its network is the start.
    - `rounds`: how many times both are done.
    - `learning_rate`: `None` for `maximisation_step`, to the end. A number η is one step
      `−η ∂F/∂W` with F averaged over the samples, predictive coding as the paper has it
      (generalised expectation maximisation).
    - `initial`: where inference starts in each round, at the `"feedforward"` pass or at the
      activities of the `"previous"` round.
    - `method`: one solver, as for `pcdyn.equilibrium`; the closed form of a linear network and
      Gauss–Newton for others unless given.
    - `throw`: raise an error for a step that did not reach its end.

    **Raises:**

    - `InputError` for a free end, and what the solver raises for the problem.
    - `NotConvergedError` for a round without equilibrium, and `MaximisationError` for an M-step
      that is not at its end. With `throw=False` or under a JAX transformation energies are NaN from
      the first on, and `residual` tells of the second.
    """
    check_problem(problem)
    check_flag(throw, "throw")
    if not problem.both_ends_clamped:
        raise InputError("expectation maximisation needs both ends clamped")
    rounds = checked_integer(rounds, "rounds", at_least=1)
    check_choice(initial, "initial", ("feedforward", "previous"))
    if learning_rate is not None and not is_traced(learning_rate):
        learning_rate = checked_number(learning_rate, "learning_rate", above=0)
    solver = GaussNewton() if method is None else get_solver(method)
    if method is None and has_linear_flow(problem):
        solver = None
    else:
        solver.check(problem)
    rate = None if learning_rate is None else jnp.asarray(learning_rate, problem.dtype)
    found = _alternated(problem, rounds, rate, initial == "feedforward", solver)
    if is_traced(found.energies):
        return found
    arrays = jax.tree.map(np.asarray, (found.energies, found.loss, found.residual))
    found = ExpectationMaximisation(
        network=found.network, activities=found.activities, energies=arrays[0], loss=arrays[1],
        residual=arrays[2],
    )  # fmt: skip
    if throw:
        _check_finite(arrays[0])
        if rate is None:
            reached = _checked_tolerance(None, problem)
            for index, residual in enumerate(arrays[2], start=1):
                _check_reached(residual, reached, f"the M-step of round {index}")
    return found


@eqx.filter_jit
def _alternated(
    problem: InferenceProblem,
    rounds: int,
    learning_rate: Array | None,
    from_feedforward: bool,
    solver: Solver | None,
) -> ExpectationMaximisation:
    """The rounds as one loop; without a solver the equilibria are those of a linear network."""
    arrays, static = eqx.partition(problem.network, eqx.is_inexact_array)

    def at(arrays: PyTree) -> InferenceProblem:
        return eqx.tree_at(lambda p: p.network, problem, eqx.combine(arrays, static))

    def one(
        carry: tuple[PyTree, State], _: None
    ) -> tuple[tuple[PyTree, State], tuple[Array, Array, Array]]:
        now = at(carry[0])
        start = "feedforward" if from_feedforward else carry[1]
        if solver is None:
            activities = linear_equilibrium(now)
        else:
            activities = activities_at_rest(now, solver, None, start)
        if learning_rate is None:
            found = _maximised(now, activities, _checked_tolerance(None, problem), _ITERATIONS)
        else:
            gradient = eqx.filter(_mean_gradient(now, activities), eqx.is_inexact_array)
            network = eqx.combine(step(carry[0], -learning_rate, gradient), static)
            found = MaximisationStep(network, _residual(problem, network, activities))
        moved = eqx.filter(found.network, eqx.is_inexact_array)
        energies = jnp.stack([_mean_energies(at(each), activities) for each in (carry[0], moved)])
        return (moved, now.state_of(activities)), (energies, _loss(at(moved)), found.residual)

    carry = (arrays, problem.feedforward_state())
    carry, (energies, losses, residual) = jax.lax.scan(one, carry, None, length=rounds)
    last = at(carry[0])
    return ExpectationMaximisation(
        network=last.network, activities=last.activities(carry[1]), energies=energies,
        loss=jnp.concatenate([_loss(problem)[None], losses]), residual=residual,
    )  # fmt: skip


_ITERATIONS = 500


@eqx.filter_jit
def _maximised(
    problem: InferenceProblem, activities: Activities, tolerance: float, max_iterations: int
) -> MaximisationStep:
    layers = list(problem.network.layers)
    precisions = precisions_of(problem, "an M-step to its end needs")
    for index, (layer, precision) in enumerate(zip(layers, precisions, strict=True), start=1):
        below, above = activities[index - 1], activities[index]
        if isinstance(layer, Dense) and layer.activation == identity:
            layers[index - 1] = _least_squares(layer, below, above)
        else:
            layers[index - 1] = _descended(
                layer, below, above, precision, tolerance, max_iterations
            )
    network = eqx.tree_at(lambda n: n.layers, problem.network, tuple(layers))
    return MaximisationStep(network, _residual(problem, network, activities))


def _least_squares(layer: Dense, below: Values, above: Values) -> Dense:
    """The layer that predicts `above` best, of several the nearest to the one given."""
    rows = below.reshape(-1, below.shape[-1])
    error = above.reshape(-1, above.shape[-1]) - jax.vmap(layer)(rows)
    if layer.bias is not None:
        rows = jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1)
    change = jnp.linalg.lstsq(rows, error)[0].T / layer.scale
    width = layer.weight.shape[1]
    weight = layer.weight + change[:, :width] / layer.gain
    if layer.bias is None:
        return eqx.tree_at(lambda l: l.weight, layer, weight)
    return eqx.tree_at(lambda l: (l.weight, l.bias), layer, (weight, layer.bias + change[:, width]))


def _descended(
    layer: Layer,
    below: Values,
    above: Values,
    precision: Precision,
    tolerance: float,
    max_iterations: int,
) -> Layer:
    """The layer at a minimum of its energy, by Levenberg–Marquardt from the one given."""
    given, static = eqx.partition(layer, eqx.is_inexact_array)
    count = sum(x.size for x in jax.tree.leaves(given))
    # Optimistix has its own numbers in JAX's default dtype, and takes no others beside them.
    dtype = jnp.result_type(float)
    # The matrix of the least squares problem of a step, of errors and damped weights.
    size = float(count) * (above.size + count) * dtype.itemsize
    check_size(size, f"an M-step of a layer with {count} weights and an activation")
    arrays, rest = eqx.partition((given, below, above, precision), eqx.is_inexact_array)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)
    start, below, above, precision = eqx.combine(arrays, rest)

    def whitened(arrays: PyTree, _: None) -> Array:
        return precision.whiten(above - apply_layer(eqx.combine(arrays, static), below))

    # The steps are stricter than the gradient, which is measured again afterwards.
    solver = LevenbergMarquardt(rtol=tolerance / 10, atol=tolerance / 10)
    found = least_squares(whitened, solver, start, max_steps=max_iterations, throw=False)
    best = jax.tree.map(lambda x, like: x.astype(like.dtype), found.value, given)
    return eqx.combine(best, static)


def _mean_gradient(problem: InferenceProblem, activities: Activities) -> Network:
    """∂F/∂(weights), F averaged over the samples."""
    errors = problem.prediction_errors(activities)
    deltas = [problem.weighted_error(index, e) for index, e in enumerate(errors, start=1)]
    gradient = local_gradient(problem.network, activities, deltas)
    samples = activities[0].size // activities[0].shape[-1]
    return jax.tree.map(lambda g: g / samples if eqx.is_inexact_array(g) else g, gradient)


def _residual(problem: InferenceProblem, network: Network, activities: Activities) -> Array:
    """The residual of each layer, as `MaximisationStep` has it."""
    gradient = _mean_gradient(eqx.tree_at(lambda p: p.network, problem, network), activities)
    found = []
    for index, layer in enumerate(gradient.layers, start=1):
        arrays = jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
        size = jnp.sqrt(sum((jnp.sum(x**2) for x in arrays), jnp.zeros((), problem.dtype)))
        full = problem.weighted_error(index, jnp.asarray(activities[index]))
        scale = _root_mean_square(full) * _root_mean_square(activities[index - 1])
        found.append(size / jnp.where(scale > 0, scale, 1))
    return jnp.stack(found)


def _root_mean_square(x: Values) -> Array:
    return jnp.sqrt(jnp.mean(jnp.sum(x**2, axis=-1)))


def _mean_energies(problem: InferenceProblem, activities: Activities) -> Array:
    energies = problem.energies_of(problem.prediction_errors(activities), activities)
    return jnp.mean(energies.reshape(-1, energies.shape[-1]), axis=0)


def _loss(problem: InferenceProblem) -> Array:
    error = problem.output_error(feedforward(problem)[-1])
    return jnp.mean(problem.layer_energy(problem.network.depth, error))


def _checked_tolerance(tolerance: float | None, problem: InferenceProblem) -> float:
    if tolerance is None:
        # The root of round-off: to that, values of F tell how far from its minimum they are.
        return 1e-8 if problem.dtype == np.float64 else 3e-4
    return checked_number(tolerance, "tolerance", above=0, error=ToleranceError)


def _check_finite(energies: np.ndarray) -> None:
    finite = np.isfinite(energies).all(axis=(1, 2))
    if not finite.all():
        raise NotConvergedError(
            f"no equilibrium was found in round {int(np.argmin(finite)) + 1}: give another method, "
            "or a smaller learning_rate if the weights have grown"
        )


def _check_reached(residual: np.ndarray, tolerance: float, what: str) -> None:
    # NaN is not reached either.
    missed = np.flatnonzero(~(residual <= tolerance))
    if missed.size:
        raise MaximisationError(
            f"{what} left the residual {residual[missed].max():.1e} in layer "
            f"{', '.join(str(i + 1) for i in missed)}, above its tolerance {tolerance:.1e}: there "
            "may be no minimum, as where activities lie beyond the range of an activation; take "
            "more max_iterations or a larger tolerance in maximisation_step, or gradient steps "
            "(learning_rate) in expectation_maximisation"
        )
