"""The statements of the paper as functions that measure them."""

from pcdyn.theory.evidence import Evidence
from pcdyn.theory.registry import STATEMENTS, select
from pcdyn.theory.statement import Statement
from pcdyn.theory.verification import Measured, Verification, expectation, verify

__all__ = [
    "STATEMENTS",
    "Evidence",
    "Measured",
    "Statement",
    "Verification",
    "expectation",
    "select",
    "verify",
]
