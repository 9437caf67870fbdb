"""From arguments to the dataclass of a subcommand, with help that is worth reading."""

from __future__ import annotations

from typing import Annotated

import tyro

from pcdyn.cli.options import Command, Compare, Equilibrium, Simulate, Stability, Verify

_DESCRIPTION = """Predictive coding networks as continuous-time dynamical systems.

Time is in units of the activity time constant. Exit codes: 0 done, 1 the run failed, 2 bad
input, 130 interrupted, 143 terminated. `pcdyn COMMAND --help` explains each command, `pcdyn
--version` prints the version."""

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


_VERIFY = """Measure the theorems of Millidge et al. (2023) on random networks.

Prints every numbered statement: whether it holds as printed, and each measured number with what is
expected. Exit code 1 if a verdict is not the one on record.

Example: pcdyn verify "Theorem 3.4" A.2 --networks 50 --json"""


def parse(arguments: list[str]) -> Command:
    """Parse arguments into a command; tyro exits with its own message where there is none."""
    subcommand = tyro.conf.subcommand
    chosen = (
        Annotated[Simulate, subcommand("simulate", description=_SIMULATE)]
        | Annotated[Equilibrium, subcommand("equilibrium", description=_EQUILIBRIUM)]
        | Annotated[Compare, subcommand("compare", description=_COMPARE)]
        | Annotated[Stability, subcommand("stability", description=_STABILITY)]
        | Annotated[Verify, subcommand("verify", description=_VERIFY)]
    )
    return tyro.cli(
        chosen,  # pyright: ignore[reportArgumentType]
        prog="pcdyn",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
