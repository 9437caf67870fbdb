"""The command line: `pcdyn simulate | equilibrium | compare | stability | verify`."""

from pcdyn.cli.main import main, run

__all__ = ["main", "run"]
