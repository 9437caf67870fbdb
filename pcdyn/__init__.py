"""pcdyn: predictive coding networks as continuous-time dynamical systems.

Conventions. Layer 0 is the input and layer L the output. Layer l predicts `f(W x_{l−1} + b)`,
with the weights inside the activation. The energy of a layer is `½ εᵀ Π ε`, the ½ included, and
is never averaged over a batch. Time is in units of the activity time constant.

pcdyn never changes JAX's configuration. Theorems are checked in float64: switch it on with
`jax.config.update("jax_enable_x64", True)` before building networks.
"""

from pcdyn._support import interrupts as _interrupts  # noqa: F401  first, for the rest takes time

# isort: split
import warnings as _warnings

import lazy_loader as _lazy_loader
from jaxlib import version as _jaxlib

__version__ = "0.1.0"

# The public names are those of `__init__.pyi`.
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)

if _jaxlib.__version__.startswith("0.10.") or _jaxlib.__version__ == "0.11.0":
    from pcdyn.errors import JaxlibDeadlockWarning as _JaxlibDeadlockWarning

    _warnings.warn(
        f"jaxlib {_jaxlib.__version__} can hang for ever on a CPU with few cores, in eigenvalues, "
        "factorisations or solves of many matrices at once: install another version, such as "
        "'jax!=0.10.*,!=0.11.0', or start with the environment variable NPROC=1",
        _JaxlibDeadlockWarning,
        stacklevel=2,
    )
