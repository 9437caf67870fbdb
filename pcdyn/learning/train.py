"""`train`: move the weights of a network, or of several at once, by a learning rule."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Key, PyTree
from tqdm import tqdm

from pcdyn._support.arrays import as_float_array
from pcdyn._support.checks import check_choice, check_flag, check_instance, check_path
from pcdyn._support.files import check_writable
from pcdyn.errors import (
    CheckpointError,
    InputError,
    ShapeError,
    TrainingDivergedError,
)
from pcdyn.learning import checkpoint as checkpoints
from pcdyn.learning.checks import (
    Data,
    Evaluate,
    check_evaluate,
    checked_numbers,
    checked_optimiser,
    first_of,
    number_of_seeds,
    problem_to_learn,
)
from pcdyn.learning.epoch import (
    TrainingSetup,
    batches_of,
    first_state,
    for_each,
    run_epoch,
    scores,
)
from pcdyn.learning.rules.backpropagation import Backpropagation
from pcdyn.learning.rules.base import Rule
from pcdyn.model.clamps import Clamp
from pcdyn.model.energies.energy import Energy, Gaussian, check_energy
from pcdyn.model.graph import Graph, Prediction, learnable
from pcdyn.model.network import Network
from pcdyn.model.prior import Prior
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import NetworkOrGraph

if TYPE_CHECKING:
    import matplotlib.artist
    import matplotlib.axes
    import xarray

Reduction = Literal["sum", "mean"]


class Training(eqx.Module):
    """A trained network and its history. With several seeds every array has their axis first.

    - `network`: after the last epoch.
    - `history`: what was recorded for each batch, shape `([seeds,] epochs, batches)`, means over
      the batch:
      `loss`, ℒ of the feedforward pass, and `accuracy`, the share of samples whose largest output
      is that of the target (of latent inputs, and of graphs with cycles, there is no pass: `loss`
      is then ℒ after inference, and `accuracy` is not there, nor is it with several targets);
      `free_energy`, `output_loss` and `residual_energy` after inference;
      `median_residual` and `largest_residual` of inference, relative, and `unsettled`, the share
      of samples with a residual above .3;
      by predictive coding, `handed_over`, the share of samples that its fallback took over;
      with `compare`, `cosine` and `row_cosine` of the gradient with that of BP, shape
      `([seeds,] epochs, batches, L)`: of the flattened weight, and the mean over its rows, for
      each layer or prediction that has one.
    - `evaluations`: what `evaluate` returned before the first epoch and after each,
      `([seeds,] epochs + 1)`.
    - `state`: weights, optimiser and rule, as needed to go on.
    """

    network: NetworkOrGraph
    history: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray]
    state: PyTree
    rule: str = eqx.field(static=True)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return the loss of the first and of the last epoch in words, over all seeds."""
        loss = np.asarray(self.history["loss"])
        seeds = f"{len(loss)} seeds, " if loss.ndim == 3 else ""
        epochs, batches = loss.shape[-2:]
        text = f"Training by {self.rule}: {seeds}{epochs} epochs of {batches} batches"
        if epochs:
            first, last = np.mean(loss[..., 0, :]), np.mean(loss[..., -1, :])
            text += f"\n  loss {first:.4g} in the first epoch, {last:.4g} in the last"
        return text

    def plot(
        self, ax: matplotlib.axes.Axes | None = None, *, metric: str = "loss"
    ) -> list[matplotlib.artist.Artist]:
        """Draw the loss of each batch, or another `metric`; see `pcdyn.plotting.training`."""
        import pcdyn

        return pcdyn.plotting.training(self, ax=ax, metric=metric)

    def to_xarray(self) -> xarray.Dataset:
        """Return history and evaluations as a labelled data set."""
        import xarray

        seeds = ("seed",) if self.history["loss"].ndim == 3 else ()
        layers = ("layer",)
        variables = {
            name: ((*seeds, "epoch", "batch", *layers[: values.ndim - len(seeds) - 2]), values)
            for name, values in self.history.items()
        }
        for name, values in self.evaluations.items():
            rest = [f"{name}_{axis}" for axis in range(values.ndim - len(seeds) - 1)]
            variables[f"evaluated_{name}"] = ((*seeds, "epochs_done", *rest), values)
        coordinates = {}
        if "cosine" in self.history:
            coordinates["layer"] = np.arange(1, self.history["cosine"].shape[-1] + 1)
        return xarray.Dataset(variables, coordinates, {"rule": self.rule})


def train(
    network: Network | Graph,
    inputs: Data | None,
    targets: Data,
    *,
    rule: Rule,
    optimiser: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    key: Key[Array, "..."],
    energy: Energy | Sequence[Energy] | None = None,
    prior: Prior | None = None,
    reduction: Reduction = "mean",
    evaluate: Evaluate | None = None,
    compare: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    progress: bool = False,
) -> Training:
    """Train a network for some epochs, each one compiled loop over shuffled batches.

    **Arguments:**

    - `network`: one, or for several seeds at once a stack of networks, as
      `equinox.filter_vmap(lambda k: pcdyn.mlp(…, key=k))(keys)` makes it, with as many keys. Of a
      `pcdyn.Graph` all predictions are learned but the means of priors.
    - `inputs`: shape `(n, n_0)`; `None` where they are latent: each x_0 is then inferred with a
      `prior`, and the network learns to generate its targets, without supervision. Of a graph a
      dictionary from nodes to what they are clamped to, which may be a `pcdyn.Partial`.
    - `targets`: shape `(n, n_L)`, or `(n,)` integer labels, which become one-hot; of a graph a
      dictionary of such.
    - `rule`: such as `pcdyn.learning.PredictiveCoding()`.
    - `optimiser`: any of optax that needs no more than gradient and weights.
    - `epochs`: how many, counted from the beginning also when a checkpoint is resumed.
    - `batch_size`: an epoch is `n // batch_size` batches of samples in a new order; samples that do
      not fill a last batch are dropped.
    - `key`: of the order, and of what the rule draws; `(seeds,)` keys for a stack of networks.
    - `energy`: as for `pcdyn.InferenceProblem`.
    - `prior`: on latent inputs, a `pcdyn.Prior`, which is not learned.
    - `reduction`: the gradient that the optimiser sees is the `"mean"` or the `"sum"` over the
      batch. Inference is the same: energies are per sample.
    - `evaluate`: a function of the network that returns a dictionary of arrays, called before
      the first epoch and after each, such as `pcdyn.learning.Evaluation(inputs, targets)`. If it
      holds arrays, as that one does, let it be an equinox module: they stay out of compiled code.
    - `compare`: record the cosine of each gradient with that of BP, at the cost of BP.
    - `checkpoint`: a file that is written after every `checkpoint_every` epochs and at the end. If
      it is there already, training goes on from it, to the very numbers of an uninterrupted run.
      Training with other data, settings, schedules or code of its optimiser, rule, energy or
      activations, or by another version of JAX is refused.
    - `progress`: show a bar with the current loss.

    **Raises:**

    - `ShapeError`, `NonFiniteError`, `DtypeError`, `LabelError` or `InputError` for data that do
      not fit, and what the rule raises for the network.
    - `DataError` for a checkpoint that cannot be written, `CheckpointError` for one that is damaged
      or of another training.
    - `TrainingDivergedError`, which names the batch, when a loss or a weight is no longer finite.
    """
    energy = Gaussian() if energy is None else energy
    check_energy(energy, "energy")
    for name, value in (("compare", compare), ("progress", progress)):
        check_flag(value, name)
    if not isinstance(network, Graph):
        _check_prior(inputs, prior, compare=compare)
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    seeds = number_of_seeds(key)
    problem, nodes = problem_to_learn(network, inputs, targets, energy, prior, seeds)
    data, count = problem.data, len(jax.tree.leaves(problem.data)[0])
    epochs, batch_size, checkpoint_every = checked_numbers(
        epochs, batch_size, checkpoint_every, count
    )
    check_choice(reduction, "reduction", ("sum", "mean"))
    check_instance(rule, "rule", Rule, "a rule such as pcdyn.learning.PredictiveCoding()")
    batch = problem.sample(np.arange(batch_size))
    rule.check(batch)
    if compare:
        Backpropagation().check(batch)
    weights, static = eqx.partition(_as_in_problem(network, problem), eqx.is_inexact_array)
    bare = eqx.tree_at(
        lambda p: (p.graph, p.clamp), problem, (static, (None,) * len(problem.clamp))
    )
    if not jax.tree.leaves(learnable(weights)):
        raise InputError(
            "there are no weights to learn: arrays inside of a function or a lambda are hidden; "
            "predict by a pcdyn.Dense or by a module, such as equinox.nn.Sequential"
        )
    update = checked_optimiser(optimiser, learnable(weights))
    mean = reduction == "mean"
    setup = TrainingSetup(bare, rule, update, nodes, batch_size, mean, compare)
    # It takes a third of the time to compile, and most trainings need no more.
    least = rule.without_fallback
    sparing = setup if least is rule else dataclasses.replace(setup, rule=least)
    state = for_each(seeds, lambda w, k: first_state(setup, w, k))(weights, key)
    current = _Progress(state, seeds, network)
    path, configuration = None if checkpoint is None else Path(checkpoint), {}
    if path is not None:
        check_writable(path)
        checkpoints.check_state(state)
        configuration = checkpoints.fingerprint(
            _computations(setup, state, data, key, seeds),
            network=(weights, static), rule=rule, energy=problem.energy, data=data, key=key,
            batch_size=batch_size, reduction=reduction, compare=compare, evaluate=evaluate,
            **({} if problem.prior is None else {"prior": problem.prior}),
        )  # fmt: skip
        current.resume(path, configuration, epochs)
    if evaluate is not None:
        check_evaluate(evaluate, network, seeds)
    if not current.evaluations:
        current.evaluations.append(current.evaluate(evaluate, setup, state))
    with tqdm(total=epochs, initial=current.done, disable=not progress, unit="epoch") as bar:
        for epoch in range(current.done, epochs):
            arguments = current.state, data, key, jnp.asarray(epoch), seeds
            chosen = setup if current.needs_fallback else sparing
            new, record = run_epoch(chosen, *arguments)
            if chosen is not setup and _was_needed(record):
                new, record = run_epoch(setup, *arguments)
            current.history.append({name: np.asarray(values) for name, values in record.items()})
            wrong = _divergence(current.history[-1], new)
            if wrong is not None:
                what = _describe(wrong, setup, key, epoch, count)
                raise TrainingDivergedError(f"{rule.name}: {what}", current.training(setup))
            current.state = new
            current.evaluations.append(current.evaluate(evaluate, setup, new))
            if path is not None and ((epoch + 1) % checkpoint_every == 0 or epoch + 1 == epochs):
                checkpoints.save(path, configuration, epoch + 1, new, current.records())
            bar.update()
            bar.set_description(f"loss {np.mean(record['loss'][..., -1]):.4g}")
    return current.training(setup)


def _check_prior(inputs: Data | None, prior: Prior | None, *, compare: bool) -> None:
    """Raise `InputError` unless there are either inputs or a prior on them."""
    if inputs is not None and prior is not None:
        raise InputError("a prior on given inputs would be ignored: leave either out")
    if inputs is None and prior is None:
        raise InputError(
            "without inputs each x_0 is inferred: give a prior on it, such as prior=pcdyn.Prior()"
        )
    if inputs is None and compare:
        raise InputError("compare=True needs inputs: of latent ones there is no gradient of BP")


def _computations(
    setup: TrainingSetup,
    state: PyTree,
    data: tuple[Clamp, ...],
    key: Key[Array, "..."],
    seeds: int | None,
) -> dict[str, str]:
    """What a checkpoint must agree with, as the code that JAX makes of it."""
    weights, optimiser_state, _ = state
    each = for_each(seeds, lambda w, s: setup.optimiser.value.update(w, s, w))
    update = jax.jit(lambda w, s: each(learnable(w), s))
    compiled: Any = run_epoch
    epoch = jnp.asarray(0)
    return {
        "optimiser": update.lower(weights, optimiser_state).as_text(),
        "activations, energy or rule": compiled.lower(
            setup, state, data, key, epoch, seeds
        ).as_text(),
    }


@dataclasses.dataclass
class _Progress:
    """How far a training is: its state, and the records of each epoch."""

    state: PyTree
    seeds: int | None
    given: Network | Graph
    history: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> int:
        """Epochs that are complete."""
        return len(self.history)

    @property
    def needs_fallback(self) -> bool:
        """Whether an epoch has needed it; a training that is resumed knows by its history."""
        return any(map(_was_needed, self.history))

    def resume(self, path: Path, configuration: dict[str, str], epochs: int) -> None:
        """Go on from a checkpoint, if there is one."""
        if not path.exists():
            return
        done, self.state, records = checkpoints.load(path, configuration, self.state, self._axis)
        if done > epochs:
            raise CheckpointError(f"{path} has {done} epochs already, but {epochs} were asked for")
        self.history = self._epochs_of(records["history"], done)
        self.evaluations = self._epochs_of(records["evaluations"], done + 1)

    def records(self) -> dict[str, dict[str, np.ndarray]]:
        """One array for each name, the epoch after the seed."""
        return {
            "history": self._stacked(self.history),
            "evaluations": self._stacked(self.evaluations),
        }

    def training(self, setup: TrainingSetup) -> Training:
        """What `train` returns."""
        network: Any = _as_given(self.given, setup.network(self.state[0]))
        return Training(network, **self.records(), state=self.state, rule=setup.rule.name)

    def evaluate(
        self, evaluate: Evaluate | None, setup: TrainingSetup, state: PyTree
    ) -> dict[str, np.ndarray]:
        """What a user's function says of the network at a state."""
        if evaluate is None:
            return {}
        given = first_of(self.given, self.seeds)
        found = _evaluate_compiled(evaluate, given, setup, state[0], self.seeds)
        return {name: np.asarray(value) for name, value in found.items()}

    @property
    def _axis(self) -> int:
        return 0 if self.seeds is None else 1

    def _stacked(self, records: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        names = records[0] if records else ()
        return {name: np.stack([r[name] for r in records], self._axis) for name in names}

    def _epochs_of(self, stacked: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
        """The inverse of `_stacked`."""
        return [
            {name: np.asarray(np.take(values, i, self._axis)) for name, values in stacked.items()}
            for i in range(count)
        ]


class Evaluation(eqx.Module):
    """A function from a network to its `accuracy` and mean `loss` on given data, for `train`.

    **Arguments:**

    - `inputs`: shape `(n, n_0)`; of a graph a dictionary from nodes to such.
    - `targets`: shape `(n, n_L)`; of a graph a dictionary from nodes to such.
    - `energy`: as for `train`.
    """

    inputs: PyTree
    targets: PyTree
    energy: Energy | Sequence[Energy]

    def __init__(
        self,
        inputs: Data,
        targets: Data,
        *,
        energy: Energy | Sequence[Energy] | None = None,
    ):
        energy = Gaussian() if energy is None else energy
        check_energy(energy, "energy")
        self.energy = energy
        if isinstance(inputs, Mapping) and isinstance(targets, Mapping):
            # By the graph, which knows what fits.
            self.inputs, self.targets = dict(inputs), dict(targets)
            return
        self.inputs = as_float_array(inputs, "inputs")
        self.targets = as_float_array(targets, "targets")
        if (
            self.inputs.ndim != 2
            or self.targets.ndim != 2
            or (len(self.inputs) != len(self.targets) or self.inputs.size == 0)
        ):
            raise ShapeError(
                f"inputs and targets must be (samples, n_0) and (samples, n_L), got "
                f"{self.inputs.shape} and {self.targets.shape}"
            )

    def __call__(self, network: Network | Graph) -> dict[str, Array]:
        problem, nodes = problem_to_learn(
            network, self.inputs, self.targets, self.energy, None, seeds=None
        )
        return scores(problem, nodes)


@eqx.filter_jit
def _evaluate_compiled(
    evaluate: Evaluate,
    given: Network | Graph,
    setup: TrainingSetup,
    weights: PyTree,
    seeds: int | None,
) -> Mapping[str, ArrayLike]:
    return for_each(seeds, lambda w: evaluate(_as_given(given, setup.network(w))))(weights)


def _as_in_problem(given: Network | Graph, problem: InferenceProblem) -> Network | Graph:
    """A network, or a stack of them, in the form that the problem has: a graph may be a chain."""
    if isinstance(given, Network):
        return given
    each = given.predictions
    return problem.graph.with_layers([p.by for p in each if _is_in(problem.graph, p)])


def _as_given(given: Network | Graph, learned: Network | Graph) -> Network | Graph:
    """The inverse of `_as_in_problem`."""
    if isinstance(given, Network):
        return learned
    layers = iter(learned.layers)
    each = given.predictions
    return given.with_layers([next(layers) if _is_in(learned, p) else p.by for p in each])


def _is_in(network: Network | Graph, prediction: Prediction) -> bool:
    """Whether a problem has a prediction among its layers, where a chain has no priors."""
    return isinstance(network, Graph) or bool(prediction.given)


def _was_needed(record: Mapping[str, ArrayLike]) -> bool:
    """Whether any sample was handed over to the rule's fallback, or would have been."""
    return bool(np.any(record.get("handed_over", False)))


def _divergence(record: dict[str, np.ndarray], state: PyTree) -> tuple[list[int], int] | None:
    """The seed, if there are several, and the batch where something was first not finite."""
    bad = np.argwhere(~np.isfinite(record["loss"]) | ~np.isfinite(record["free_energy"]))
    if len(bad):
        *seed, batch = (int(index) for index in bad[np.argmin(bad[:, -1])])
        return seed, batch
    for weights in jax.tree.leaves(state[0]):
        finite = np.isfinite(np.asarray(weights))
        if not finite.all():
            several = record["loss"].ndim == 2
            seed = [int(np.argwhere(~finite)[0, 0])] if several else []
            return seed, record["loss"].shape[-1] - 1
    return None


def _describe(
    problem: tuple[list[int], int],
    setup: TrainingSetup,
    key: Key[Array, "..."],
    epoch: int,
    count: int,
) -> str:
    """Where a training diverged, and what to do."""
    seed, batch = problem
    order = batches_of(key[seed[0]] if seed else key, epoch, count, setup.batch_size)
    rows = np.asarray(order)[batch]
    some = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    of_seed = f" of seed {seed[0]}" if seed else ""
    return (
        f"not finite from epoch {epoch + 1}, batch {batch + 1}{of_seed} (samples {some}). Lower "
        "the learning rate; the network before this epoch is in the exception's training.network"
    )
