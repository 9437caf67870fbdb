"""Learning, the slow outer timescale: rules as values, and a loop that follows them."""

from pcdyn.equilibria.solvers.truncated import TruncatedGaussNewton
from pcdyn.learning.expectation_maximisation import (
    ExpectationMaximisation,
    MaximisationStep,
    expectation_maximisation,
    maximisation_step,
)
from pcdyn.learning.flows.joint import AdiabaticFlow, JointFlow
from pcdyn.learning.flows.precisions import OutputNoise, PrecisionFlow, output_noise
from pcdyn.learning.flows.variational import variational_free_energy
from pcdyn.learning.rules.backpropagation import Backpropagation, FixedPrediction, ZeroDivergence
from pcdyn.learning.rules.base import BatchGradient, Rule
from pcdyn.learning.rules.predictive_coding import (
    EulerPredictiveCoding,
    IncrementalPredictiveCoding,
    LowPrecisionPredictiveCoding,
    PredictiveCoding,
)
from pcdyn.learning.rules.target_propagation import LearnedTargetPropagation, TargetPropagation
from pcdyn.learning.train import Evaluation, Training, train

__all__ = [
    "AdiabaticFlow",
    "Backpropagation",
    "BatchGradient",
    "EulerPredictiveCoding",
    "Evaluation",
    "ExpectationMaximisation",
    "FixedPrediction",
    "IncrementalPredictiveCoding",
    "JointFlow",
    "LearnedTargetPropagation",
    "LowPrecisionPredictiveCoding",
    "MaximisationStep",
    "OutputNoise",
    "PrecisionFlow",
    "PredictiveCoding",
    "Rule",
    "TargetPropagation",
    "Training",
    "TruncatedGaussNewton",
    "ZeroDivergence",
    "expectation_maximisation",
    "maximisation_step",
    "output_noise",
    "train",
    "variational_free_energy",
]
