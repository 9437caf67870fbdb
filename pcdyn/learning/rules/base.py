"""What a learning rule is: from a network and a batch to a weight gradient."""

from __future__ import annotations

import abc

import equinox as eqx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from pcdyn._support.checks import checked_integer, checked_number
from pcdyn._support.types import Activities, State
from pcdyn.errors import GraphError, InputError
from pcdyn.model.graph import Graph
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.algorithms import NetworkOrGraph


class BatchGradient(eqx.Module):
    """The weight gradient of a batch, and the activities that it comes from.

    - `gradient`: a network or graph whose arrays are the gradients, summed over the batch.
    - `activities`: x_0 … x_L, of a graph those of all nodes, after inference; the feedforward pass
      with the target as x_L for rules without inference.
    - `residual`: how far inference is from its equilibrium, relative and per sample; zero for
      rules that need none.
    - `handed_over`: which samples a fallback took over, or would have; `None` for rules that have
      none.
    """

    gradient: NetworkOrGraph
    activities: Activities
    residual: Float[Array, " batch"]
    handed_over: Bool[Array, " batch"] | None = None


class Rule(eqx.Module):
    """The base of all learning rules.

    A rule may carry a state from batch to batch, such as the inverse weights of target propagation;
    most have none.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of the rule, as tables and figures print it."""

    @property
    def without_fallback(self) -> Rule:
        """The same rule without what only few samples need, which compiles sooner; or itself.

        Where it says that samples would have been handed over, `pcdyn.learning.train` runs the
        epoch again by the rule itself.
        """
        return self

    @abc.abstractmethod
    def check(self, problem: InferenceProblem) -> None:
        """Raise the named error for a problem that this rule cannot learn from."""

    @abc.abstractmethod
    def init(self, network: NetworkOrGraph, key: PRNGKeyArray) -> PyTree:
        """Return the state of the rule before the first batch; `()` if it has none."""

    @abc.abstractmethod
    def learn(self, problem: InferenceProblem, state: PyTree) -> tuple[BatchGradient, PyTree]:
        """Compute the weight gradient of a batch, both ends clamped, and the next state.

        Where the input is latent it is free, with a prior.
        """


def check_clamped_input(name: str, problem: InferenceProblem) -> None:
    """Raise an error where there is no feedforward pass, `InputError` for a latent input.

    Of a graph it is the `GraphError` of the pass, or that nothing is there to learn from.
    """
    if isinstance(problem.graph, Graph):
        problem.graph.feedforward_order(problem.free_layers)
        if not problem.outputs:
            raise GraphError(f"{name} needs a target: nothing that is predicted is clamped")
    elif problem.input is None:
        raise InputError(
            f"{name} learns at the feedforward pass of an input: give inputs, or infer latent ones "
            "by pcdyn.learning.PredictiveCoding()"
        )


def start_of(problem: InferenceProblem) -> State:
    """Where inference starts: the feedforward pass, or zero in a graph that has none."""
    if isinstance(problem.graph, Graph) and not problem.graph.has_order(problem.free_layers):
        return problem.zeros_state()
    return problem.feedforward_state()


def check_steps(name: str, dt: float, steps: int) -> None:
    """Raise `InputError` unless there is at least one step, positive and finite."""
    checked_number(dt, f"{name}: the step", above=0)
    checked_integer(steps, f"{name}: the number of steps", at_least=1)
