"""Samples of the generative model that a problem stands for, drawn layer after layer."""

from __future__ import annotations

import math

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from pcdyn._support.arrays import check_size
from pcdyn._support.checks import check_key, checked_integer
from pcdyn._support.compiling import compiled
from pcdyn._support.types import Activities
from pcdyn.errors import InputError
from pcdyn.linearisation.whitened import precisions_of
from pcdyn.model.problem import InferenceProblem, check_problem


def generate(
    problem: InferenceProblem, key: PRNGKeyArray, *, samples: int | None = None
) -> Activities:
    """Draw x_0 … x_L: each layer is its prediction with Gaussian noise of covariance Π_l⁻¹ added.

    x_0 is clamped, or drawn from the prior. What the output is without its last noise is
    `problem.network.predict(L, x)` of x_{L−1}, and without noise in any layer but x_0
    `problem.network.feedforward(x)` of x_0.

    **Arguments:**

    - `problem`: with a free output.
    - `key`: for all noise.
    - `samples`: how many, with a prior; without it one sample of no batch is drawn. A clamped input
      gives one for each of its own.

    **Returns:**

    Activities of all layers, each `(n_l,)` or `(samples, n_l)`.

    **Raises:**

    - `InputError` for a clamped output, a free input without a prior, a number of samples where the
      input has its own, and energies that are no densities (only `pcdyn.Gaussian` is one).
    - `SizeError` for more samples than fit into memory.
    """
    check_problem(problem)
    check_key(key)
    if problem.output is not None:
        raise InputError("the clamped output would be ignored: leave the output free to draw it")
    if problem.input is None and problem.prior is None:
        raise InputError("there is nothing to draw the input from: clamp it, or give a prior")
    batch = () if problem.input is None else problem.input.shape[:-1]
    if samples is not None:
        if problem.input is not None:
            raise InputError("samples would be ignored: the clamped input has its own")
        batch = (checked_integer(samples, "samples", at_least=1),)
    numbers = math.prod(batch) * sum(problem.network.widths)
    check_size(problem.dtype.itemsize * numbers, "the drawn activities")
    return _draw(problem, key, batch)


@compiled
def _draw(problem: InferenceProblem, key: PRNGKeyArray, batch: tuple[int, ...]) -> Activities:
    precisions = precisions_of(problem, "samples of a density need")
    predicted, network = problem.predicted_layers, problem.network
    keys = jr.split(key, len(predicted))
    activities = [] if problem.input is None else [problem.input]
    for index, precision, each in zip(predicted, precisions, keys, strict=True):
        shape = (*batch, network.widths[index])
        if problem.prior is not None and index == 0:
            mean = jnp.broadcast_to(problem.prior.mean, shape)
        else:
            mean = network.predict(index, activities[-1])
        activities.append(mean + precision.noise(each, shape, problem.dtype))
    return tuple(activities)
