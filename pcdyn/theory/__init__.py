"""The statements of the paper as functions that measure them."""

from pcdyn.theory.evidence import Evidence

__all__ = ["Evidence"]
