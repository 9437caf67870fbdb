"""Learning, the slow outer timescale: rules as values, and a loop that follows them."""

from pcdyn.learning.backpropagation import Backpropagation, FixedPrediction, ZeroDivergence
from pcdyn.learning.base import Learned, Rule
from pcdyn.learning.joint import AdiabaticFlow, JointFlow
from pcdyn.learning.predictive_coding import (
    EulerPredictiveCoding,
    IncrementalPredictiveCoding,
    LowPrecisionPredictiveCoding,
    PredictiveCoding,
)
from pcdyn.learning.targets import LearnedTargetPropagation, TargetPropagation
from pcdyn.learning.train import Evaluation, Training, train
from pcdyn.solvers.truncated import TruncatedGaussNewton

__all__ = [
    "AdiabaticFlow",
    "Backpropagation",
    "EulerPredictiveCoding",
    "Evaluation",
    "FixedPrediction",
    "IncrementalPredictiveCoding",
    "JointFlow",
    "Learned",
    "LearnedTargetPropagation",
    "LowPrecisionPredictiveCoding",
    "PredictiveCoding",
    "Rule",
    "TargetPropagation",
    "Training",
    "TruncatedGaussNewton",
    "ZeroDivergence",
    "train",
]
