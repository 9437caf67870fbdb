"""The options of every subcommand, as dataclasses that tyro turns into flags and help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

SAVED_TIMES = 101


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What is inferred: a network, its precisions and the data clamped at its ends."""

    network: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(optional)")] = None
    """Take the network from a TOML file, whose table [network] has these options as keys (with _
    for -), or from a NetCDF file that pcdyn wrote. Options given beside a TOML file win; beside a
    NetCDF file only precisions, data and dtype can be given."""
    widths: Annotated[
        tuple[int, ...], arg(metavar="N …", help_behavior_hint="(default: 5 5 5)")
    ] = ()
    """Units of each layer, from the input to the output."""
    activation: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: tanh)")] = (
        None
    )
    """identity, tanh, sigmoid, relu, leaky_relu or softplus; layer l predicts f(W x + b)."""
    output_activation: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: as the others)")
    ] = None
    """Activation of the output layer."""
    weight_std: Annotated[
        float | None, arg(metavar="STD", help_behavior_hint="(default: 1/sqrt(units below))")
    ] = None
    """Standard deviation of the Gaussian weights (not their variance)."""
    bias: Annotated[float | None, arg(metavar="STD", help_behavior_hint="(default: none)")] = None
    """Standard deviation of Gaussian biases."""
    precisions: Annotated[
        tuple[float, ...], arg(metavar="P …", help_behavior_hint="(default: 1)")
    ] = ()
    """Precision of the prediction errors: one for all layers, or one for each layer from the
    first hidden layer to the output. A TOML file can hold vectors and matrices as well."""
    input: Annotated[str | None, arg(metavar="DATA", help_behavior_hint="(default: random)")] = None
    """What the input is clamped to: random (standard normal), free, or a file .npy, .npz or .nc
    of shape (units,) or (samples, units); FILE:NAME picks one array of several."""
    output: Annotated[str | None, arg(metavar="DATA", help_behavior_hint="(default: random)")] = (
        None
    )
    """What the output is clamped to, as the input."""
    batch: Annotated[
        int | None, arg(metavar="SAMPLES", help_behavior_hint="(default: a single sample)")
    ] = None
    """How many random samples."""
    seed: Annotated[int | None, arg(metavar="SEED", help_behavior_hint="(default: 0)")] = None
    """Of everything random."""
    float32: bool = False
    """Compute in float32; float64 is switched on otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written and printed. Nothing is written unless asked."""

    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(optional)")] = None
    """Write data and picture into this folder, named after the command."""
    data: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(optional)")] = None
    """Write the data to this NetCDF file (compare: .nc or .csv), network included."""
    picture: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(optional)")] = None
    """Write the picture to this file (.png, .pdf or .svg)."""
    overwrite: bool = False
    """Replace files that exist."""
    json: bool = False
    """Print one JSON object instead of text."""
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulate:
    """Options of `pcdyn simulate`."""

    t1: float = 20.0
    """End time, in units of the activity time constant."""
    times: int = SAVED_TIMES
    """How many evenly spaced times to save."""
    integrator: str = "tsit5"
    """tsit5, dopri5, dopri8, bosh3, heun, midpoint, ralston, kvaerno3, kvaerno4, kvaerno5,
    implicit_euler, rk23, rk45, dop853, radau, bdf, lsoda, exact (linear networks) or euler."""
    rtol: float | None = None
    """Relative tolerance of an adaptive step (default: 1e-6, in float32 1e-4)."""
    atol: float | None = None
    """Absolute tolerance of an adaptive step (default: 1e-9, in float32 1e-6)."""
    dt: float | None = None
    """A fixed step instead, in units of the activity time constant; euler needs one."""
    initial: Literal["feedforward", "zeros"] = "feedforward"
    """Where the activities start."""
    until_equilibrium: bool = False
    """Stop before t1 where the vector field vanishes in every layer."""
    per_sample: bool = False
    """Give every sample of a batch its own step size and status."""
    network: NetworkOptions
    output: OutputOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equilibrium:
    """Options of `pcdyn equilibrium`."""

    method: tuple[str, ...] = ()
    """One or several in turn: closed_form, gauss_newton, nesterov, pseudo_transient, fixed_point,
    flow (default: what suits the network)."""
    tolerance: float | None = None
    """Of the gradient of the free energy in every layer (default: 1e-6, in float32 1e-4)."""
    initial: Literal["feedforward", "zeros"] = "feedforward"
    """Where the search starts; a nonlinear network can have several equilibria."""
    network: NetworkOptions
    output: OutputOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Options of `pcdyn compare`."""

    integrators: tuple[str, ...] = ("tsit5", "dopri8", "kvaerno5", "lsoda", "euler")
    """Names as for pcdyn simulate."""
    t1: float = 20.0
    """End time, in units of the activity time constant."""
    tolerances: Annotated[
        tuple[float, ...], arg(metavar="RTOL …", help_behavior_hint="(default: of pcdyn.compare)")
    ] = ()
    """Relative tolerances of the adaptive integrators."""
    steps: Annotated[
        tuple[float, ...], arg(metavar="DT …", help_behavior_hint="(default: of pcdyn.compare)")
    ] = ()
    """Fixed steps, in units of the activity time constant."""
    repeats: int = 3
    """Runs of which the median time is taken, after compilation."""
    error: float = 1e-3
    """The error that the recommendation must meet."""
    initial: Literal["feedforward", "zeros"] = "feedforward"
    """Where the activities start."""
    per_sample: bool = False
    """Give every sample of a batch its own step size."""
    network: NetworkOptions
    output: OutputOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stability:
    """Options of `pcdyn stability`."""

    at: str = "equilibrium"
    """Where the flow is linearised: equilibrium, feedforward, or a NetCDF file of pcdyn simulate,
    whose end is taken (and its network, unless another is given)."""
    network: NetworkOptions
    output: OutputOptions


Command = Simulate | Equilibrium | Compare | Stability

_DESCRIPTION = """Predictive coding networks as continuous-time dynamical systems.

Time is in units of the activity time constant. Exit codes: 0 done, 1 the run failed, 2 bad
input, 130 interrupted. `pcdyn COMMAND --help` explains each command, `pcdyn --version` prints the
version."""

_SIMULATE = """Integrate inference, dx/dt = -dF/dx, from t = 0 to t1.

Prints how it ended, the free energy at start and end (mean over samples), and what it cost.

Example: pcdyn simulate --widths 5 5 5 --activation tanh --t1 50 --out run"""

_EQUILIBRIUM = """Find where inference ends, with its residual.

Solves for a vanishing gradient of the free energy and says for how many samples it was found.

Example: pcdyn equilibrium --network run/simulate.nc --tolerance 1e-9"""

_COMPARE = """Measure integrators against a reference and recommend one.

Prints error, evaluations and seconds of every run, failed ones included.

Example: pcdyn compare --precisions 1 100 --integrators tsit5 kvaerno5 lsoda --out comparison"""

_STABILITY = """Spectrum, relaxation times and the largest stable steps.

Linearises inference at its equilibrium, at the feedforward state or at the end of a saved run.

Example: pcdyn stability --widths 5 20 5 --precisions 1 100 --json"""


def parse(arguments: list[str]) -> Command:
    """The command of these arguments; tyro exits with its own message where there is none."""
    subcommand = tyro.conf.subcommand
    chosen = (
        Annotated[Simulate, subcommand("simulate", description=_SIMULATE)]
        | Annotated[Equilibrium, subcommand("equilibrium", description=_EQUILIBRIUM)]
        | Annotated[Compare, subcommand("compare", description=_COMPARE)]
        | Annotated[Stability, subcommand("stability", description=_STABILITY)]
    )
    return tyro.cli(
        chosen,  # pyright: ignore[reportArgumentType]
        prog="pcdyn",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
