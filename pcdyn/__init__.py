"""pcdyn: predictive coding networks as continuous-time dynamical systems.

Conventions. Layer 0 is the input and layer L the output. Layer l predicts `f(W x_{l−1} + b)`,
with the weights inside the activation. The energy of a layer is `½ εᵀ Π ε`, the ½ included, and
is never averaged over a batch. Time is in units of the activity time constant.

pcdyn never changes JAX's configuration. Theorems are checked in float64: switch it on with
`jax.config.update("jax_enable_x64", True)` before building networks.
"""

from pcdyn import interrupts  # noqa: F401  first, for the other imports take seconds

# isort: split
import warnings as _warnings

from jaxlib import version as _jaxlib

from pcdyn import (
    activations,
    datasets,
    errors,
    generalised_energy,
    interpolation,
    linear,
    output_error,
    references,
    solvers,
    storage,
)
from pcdyn.activations import Activation
from pcdyn.adjoint import adjoint_condition
from pcdyn.compare import compare
from pcdyn.comparison import Comparison, Recommendation
from pcdyn.convergence import ConvergenceOrder, convergence_order
from pcdyn.energy import CrossEntropy, Energy, Gaussian
from pcdyn.equilibrium import Equilibrium, equilibrium
from pcdyn.errors import (
    EquilibriumStatus,
    JaxlibDeadlockWarning,
    NotConvergedError,
    PcdynError,
    SimulationError,
    Status,
    StepSizeWarning,
)
from pcdyn.generalised_energy import (
    CustomEnergy,
    Divisive,
    LogCosh,
    PseudoHuber,
    Split,
    Student,
    named_energy,
)
from pcdyn.integrators import Diffrax, Euler, Exact, SciPy, UntilEquilibrium
from pcdyn.landscape import Equilibria, multiple_equilibria
from pcdyn.linear import linear_equilibrium
from pcdyn.network import Dense, Network, mlp
from pcdyn.phase_portrait import PhasePortrait, phase_portrait
from pcdyn.problem import InferenceProblem
from pcdyn.problem_files import load_problem, save_problem
from pcdyn.references import backpropagation, feedforward, target_propagation
from pcdyn.simulate import simulate
from pcdyn.stability import Stability, stability, stability_along
from pcdyn.storage import load
from pcdyn.trajectory import Trajectory

__version__ = "0.1.0"

if _jaxlib.__version__.startswith("0.10.") or _jaxlib.__version__ == "0.11.0":
    _warnings.warn(
        f"jaxlib {_jaxlib.__version__} can hang for ever on a CPU with few cores, in eigenvalues, "
        "factorisations or solves of many matrices at once: install another version, such as "
        "'jax!=0.10.*,!=0.11.0', or start with the environment variable NPROC=1",
        JaxlibDeadlockWarning,
        stacklevel=2,
    )

__all__ = [
    "Activation",
    "Comparison",
    "ConvergenceOrder",
    "CrossEntropy",
    "CustomEnergy",
    "Dense",
    "Diffrax",
    "Divisive",
    "Energy",
    "Equilibria",
    "Equilibrium",
    "EquilibriumStatus",
    "Euler",
    "Exact",
    "Gaussian",
    "InferenceProblem",
    "JaxlibDeadlockWarning",
    "LogCosh",
    "Network",
    "NotConvergedError",
    "PcdynError",
    "PhasePortrait",
    "PseudoHuber",
    "Recommendation",
    "SciPy",
    "SimulationError",
    "Split",
    "Stability",
    "Status",
    "StepSizeWarning",
    "Student",
    "Trajectory",
    "UntilEquilibrium",
    "activations",
    "adjoint_condition",
    "backpropagation",
    "compare",
    "convergence_order",
    "datasets",
    "equilibrium",
    "errors",
    "feedforward",
    "generalised_energy",
    "interpolation",
    "linear",
    "linear_equilibrium",
    "load",
    "load_problem",
    "mlp",
    "multiple_equilibria",
    "named_energy",
    "output_error",
    "phase_portrait",
    "references",
    "save_problem",
    "simulate",
    "solvers",
    "stability",
    "stability_along",
    "storage",
    "target_propagation",
]
