"""What inference is checked against: closed forms of linear networks, feedforward, BP and TP."""

from pcdyn.references import linear, output_error
from pcdyn.references.algorithms import (
    BackpropagationPass,
    TargetPropagationPass,
    backpropagation,
    feedforward,
    local_gradient,
    target_propagation,
)
from pcdyn.references.generation import generate

__all__ = [
    "BackpropagationPass",
    "TargetPropagationPass",
    "backpropagation",
    "feedforward",
    "generate",
    "linear",
    "local_gradient",
    "output_error",
    "target_propagation",
]
