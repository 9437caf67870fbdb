"""`equilibrium` and `multiple_equilibria`, the solvers that find them, and kinks."""

from pcdyn.equilibria import solvers

__all__ = ["solvers"]
