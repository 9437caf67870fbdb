"""The paper's figures, questions beyond it, and benchmarks, one module each.

Each figure is an `Experiment` (`shared/experiment.py`): settings, run, claims, picture. Its preset
`paper` is A.9 of the paper, its errors corrected. `authors` has all that the code of the authors
(github.com/BerenMillidge/theoretical_framework_predictive_coding) uses for a panel, where that is
a gradient flow and differs. In that code:

- A.9's variance 0.05 of the weights is a standard deviation, the Euler step is .1, and the hidden
  layer starts at random (1 C, D). Digits are in [−1, 1], the loss is log-softmax averaged over the
  batch, with plain momentum (4 B, C).
- 1 A, B and 2 right: with the input free −ε_1 is dropped from the flow, which then is no gradient
  flow; 2 right has the identity for tanh. Ours follow the gradient flow of A.9.
- 2 left and 3 A to C: precisions are the identity plus |Gaussian| noise, not symmetric: no gradient
  flow. 3 D to F: no precisions at all.
- 2 left: NaN and 0 are set to 1 where Euler diverged. Ours draws that curve in gray beside the
  exact one and the share of draws that diverge.
- Panels of "Euclidean distance" show the squared distance; so do ours, and say so.
- 4 A: a constant 58 is subtracted from the output loss. Ours is not.
"""
