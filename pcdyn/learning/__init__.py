"""Learning, the slow outer timescale: rules as values, and a loop that follows them."""

from pcdyn.equilibria.solvers.truncated import TruncatedGaussNewton
from pcdyn.learning.backpropagation import Backpropagation, FixedPrediction, ZeroDivergence
from pcdyn.learning.base import BatchGradient, Rule
from pcdyn.learning.joint import AdiabaticFlow, JointFlow
from pcdyn.learning.precisions import OutputNoise, PrecisionFlow, output_noise
from pcdyn.learning.predictive_coding import (
    EulerPredictiveCoding,
    IncrementalPredictiveCoding,
    LowPrecisionPredictiveCoding,
    PredictiveCoding,
)
from pcdyn.learning.targets import LearnedTargetPropagation, TargetPropagation
from pcdyn.learning.train import Evaluation, Training, train
from pcdyn.learning.variational import variational_free_energy

__all__ = [
    "AdiabaticFlow",
    "Backpropagation",
    "BatchGradient",
    "EulerPredictiveCoding",
    "Evaluation",
    "FixedPrediction",
    "IncrementalPredictiveCoding",
    "JointFlow",
    "LearnedTargetPropagation",
    "LowPrecisionPredictiveCoding",
    "OutputNoise",
    "PrecisionFlow",
    "PredictiveCoding",
    "Rule",
    "TargetPropagation",
    "Training",
    "TruncatedGaussNewton",
    "ZeroDivergence",
    "output_noise",
    "train",
    "variational_free_energy",
]
