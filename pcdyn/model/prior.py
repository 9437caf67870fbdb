"""A prior on a free input: what layer 0 is expected to be before any data."""

from __future__ import annotations

import equinox as eqx
from jaxtyping import Array, Float

from pcdyn._support.arrays import as_float_array
from pcdyn._support.checks import check_instance
from pcdyn._support.types import Numbers
from pcdyn.model.energies.energy import Energy, Gaussian


class Prior(eqx.Module):
    """A prior on the input, which adds the energy E_0 of its error ε_0 = x_0 − m to F.

    With `pcdyn.Gaussian(precision)` it is `½ (x_0 − m)ᵀ Π_0 (x_0 − m)`: the network is then a
    generative model p(x_0) p(x_1 | x_0) … p(x_L | x_{L−1}) (A.1.1 of the paper), whose latent
    variables are inferred from the output. As Π_0 grows the input is clamped to m.

    **Arguments:**

    - `mean`: m, a number or of shape `(n_0,)`; 0 unless given. A problem has it as `(n_0,)`.
    - `energy`: of x_0 − m; `pcdyn.Gaussian` with unit precision unless given.

    **Raises:**

    - `ShapeError`, `DtypeError` or `NonFiniteError` for a mean that is none.
    - `InputError` for what is no energy.
    """

    mean: Float[Array, "..."]
    energy: Energy

    def __init__(self, mean: Numbers = 0.0, energy: Energy | None = None):
        self.mean = as_float_array(mean, "mean of the prior")
        energy = Gaussian() if energy is None else energy
        check_instance(energy, "energy of the prior", Energy, "an energy such as pcdyn.Gaussian()")
        self.energy = energy
