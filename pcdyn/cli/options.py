"""The options of every subcommand, as dataclasses that tyro turns into flags and help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


def option(text: str, *, metavar: str | None = None, default: str | None = None) -> object:
    """Give the help of a flag, with the default in words where the value does not say it."""
    hint = {None: None, "optional": "(optional)"}.get(default, f"(default: {default})")
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What is inferred: a network, its precisions and the data clamped at its ends."""

    network: Annotated[
        Path | None,
        option(
            "Take the network from a TOML file, whose table [network] has these options as keys "
            "(with _ for -) or whose table [graph] describes a graph, or from a NetCDF file that "
            "pcdyn wrote. Options given beside a TOML file win, those of a graph for predictions "
            "that do not have their own; beside a NetCDF file only energy, precisions, data (of a "
            "chain) and dtype can be given.",
            metavar="FILE",
            default="optional",
        ),
    ] = None
    widths: Annotated[
        tuple[int, ...],
        option(
            "Units of each layer, from the input to the output.", metavar="N …", default="5 5 5"
        ),
    ] = ()
    activation: Annotated[
        str | None,
        option(
            "identity, tanh, sigmoid, relu, leaky_relu or softplus; layer l predicts f(W x + b).",
            metavar="NAME",
            default="tanh",
        ),
    ] = None
    output_activation: Annotated[
        str | None,
        option("Activation of the output layer.", metavar="NAME", default="as the others"),
    ] = None
    weight_std: Annotated[
        float | None,
        option(
            "Standard deviation of the Gaussian weights (not their variance).",
            metavar="STD",
            default="1/sqrt(units below)",
        ),
    ] = None
    bias: Annotated[
        float | None,
        option("Standard deviation of Gaussian biases.", metavar="STD", default="none"),
    ] = None
    residual: Annotated[
        bool, option("Add the layer below to hidden layers that are as wide as it.")
    ] = False
    parameterisation: Annotated[
        str | None,
        option(
            "standard, ntp or mupc: what of the size of weights is learned.",
            metavar="NAME",
            default="standard",
        ),
    ] = None
    precisions: Annotated[
        tuple[float, ...],
        option(
            "Precision of the prediction errors: one for all layers, or one for each layer from "
            "the first hidden layer to the output. A TOML file can hold vectors and matrices as "
            "well.",
            metavar="P …",
            default="1",
        ),
    ] = ()
    energy: Annotated[
        str | None,
        option(
            "Energy of the prediction errors: gaussian, log_cosh, pseudo_huber, student or "
            "divisive; the last three take a parameter, as in student:0.5 (1 unless given).",
            metavar="NAME",
            default="gaussian",
        ),
    ] = None
    input: Annotated[
        str | None,
        option(
            "What the input is clamped to: random (standard normal), free, or a file .npy, .npz "
            "or .nc of shape (units,) or (samples, units); FILE:NAME picks one array of several.",
            metavar="DATA",
            default="random",
        ),
    ] = None
    prior: Annotated[
        tuple[float, float] | None,
        option(
            "Gaussian prior on a free input: the mean and the precision of each of its units.",
            metavar="MEAN PRECISION",
            default="none",
        ),
    ] = None
    output: Annotated[
        str | None,
        option("What the output is clamped to, as the input.", metavar="DATA", default="random"),
    ] = None
    batch: Annotated[
        int | None, option("How many random samples.", metavar="SAMPLES", default="a single sample")
    ] = None
    seed: Annotated[int | None, option("Of everything random.", metavar="SEED", default="0")] = None
    float32: Annotated[bool, option("Compute in float32; float64 is switched on otherwise.")] = (
        False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written and printed. Nothing is written unless asked."""

    out: Annotated[
        Path | None,
        option(
            "Write data and picture into this folder, named after the command.",
            metavar="FOLDER",
            default="optional",
        ),
    ] = None
    data: Annotated[
        Path | None,
        option(
            "Write the data to this NetCDF file (compare: .nc or .csv), network included.",
            metavar="FILE",
            default="optional",
        ),
    ] = None
    picture: Annotated[
        Path | None,
        option(
            "Write the picture to this file (.png, .pdf or .svg).",
            metavar="FILE",
            default="optional",
        ),
    ] = None
    overwrite: Annotated[bool, option("Replace files that exist.")] = False
    json: Annotated[bool, option("Print one JSON object instead of text.")] = False
    quiet: Annotated[bool, option("Print nothing but warnings and errors.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulate:
    """Options of `pcdyn simulate`."""

    t1: Annotated[float, option("End time, in units of the activity time constant.")] = 20.0
    times: Annotated[int, option("How many evenly spaced times to save.")] = 101
    integrator: Annotated[
        str,
        option(
            "tsit5, dopri5, dopri8, bosh3, heun, midpoint, ralston, rodas5p (stiff problems), "
            "kvaerno3, kvaerno4, kvaerno5, implicit_euler, rk23, rk45, dop853, radau, bdf, lsoda, "
            "exact (linear networks) or euler (needs --dt)."
        ),
    ] = "tsit5"
    rtol: Annotated[
        float | None,
        option("Relative tolerance of an adaptive step.", default="1e-6, in float32 1e-4"),
    ] = None
    atol: Annotated[
        float | None,
        option("Absolute tolerance of an adaptive step.", default="1e-9, in float32 1e-6"),
    ] = None
    dt: Annotated[
        float | None,
        option(
            "A fixed step instead, in units of the activity time constant; euler needs one.",
            default="optional",
        ),
    ] = None
    initial: Annotated[Literal["feedforward", "zeros"], option("Where the activities start.")] = (
        "feedforward"
    )
    until_equilibrium: Annotated[
        bool, option("Stop before t1 where the vector field vanishes in every layer.")
    ] = False
    per_sample: Annotated[
        bool, option("Give every sample of a batch its own step size and status.")
    ] = False
    network: NetworkOptions
    output: OutputOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equilibrium:
    """Options of `pcdyn equilibrium`."""

    method: Annotated[
        tuple[str, ...],
        option(
            "One or several in turn: closed_form, conjugate_gradients, gauss_newton, nesterov, "
            "pseudo_transient, fixed_point, flow.",
            metavar="NAME …",
            default="what suits the network",
        ),
    ] = ()
    tolerance: Annotated[
        float | None,
        option(
            "Of the gradient of the free energy in every layer.", default="1e-6, in float32 1e-4"
        ),
    ] = None
    initial: Annotated[
        Literal["feedforward", "zeros"],
        option("Where the search starts; a nonlinear network can have several equilibria."),
    ] = "feedforward"
    network: NetworkOptions
    output: OutputOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Options of `pcdyn compare`."""

    integrators: Annotated[
        tuple[str, ...], option("Names as for pcdyn simulate.", metavar="NAME …")
    ] = ("tsit5", "dopri8", "kvaerno5", "lsoda", "euler")
    t1: Annotated[float, option("End time, in units of the activity time constant.")] = 20.0
    tolerances: Annotated[
        tuple[float, ...],
        option(
            "Relative tolerances of the adaptive integrators.",
            metavar="RTOL …",
            default="1e-2, 1e-3 … 1e-9, in float32 to 1e-5",
        ),
    ] = ()
    steps: Annotated[
        tuple[float, ...],
        option(
            "Fixed steps, in units of the activity time constant.",
            metavar="DT …",
            default="0.2 0.1 0.05 0.02 0.01",
        ),
    ] = ()
    repeats: Annotated[
        int, option("Runs of which the median time is taken, after compilation.")
    ] = 3
    seconds: Annotated[
        float | None, option("Wall time after which no other run starts.", default="no limit")
    ] = None
    error: Annotated[float, option("The error that the recommendation must meet.")] = 1e-3
    initial: Annotated[Literal["feedforward", "zeros"], option("Where the activities start.")] = (
        "feedforward"
    )
    per_sample: Annotated[bool, option("Give every sample of a batch its own step size.")] = False
    network: NetworkOptions
    output: OutputOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stability:
    """Options of `pcdyn stability`."""

    at: Annotated[
        str,
        option(
            "Where the flow is linearised: equilibrium, feedforward, zeros, or a NetCDF file of "
            "pcdyn simulate, whose end is taken, or of pcdyn equilibrium (and the network in it, "
            "unless another is given)."
        ),
    ] = "equilibrium"
    network: NetworkOptions
    output: OutputOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Options of `pcdyn verify`."""

    statements: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        option(
            'Numbers as in the paper, or how they begin or end: "Theorem 3.4", eq-48, A.2, 3.1.',
            metavar="NUMBER …",
            default="all",
        ),
    ] = ()
    seed: Annotated[int, option("Of everything random.", metavar="SEED")] = 0
    networks: Annotated[
        int, option("How many random networks each statement is measured on.", metavar="N")
    ] = 20
    output: OutputOptions


Command = Simulate | Equilibrium | Compare | Stability | Verify
