"""The paper's figures, questions beyond it, and benchmarks, one module each.

Each figure is an `Experiment` (`shared/experiment.py`): settings, run, claims, picture. Its preset
`paper` is the paper's Appendix A.9 with its errors corrected; `code`, where there is one, has the
settings of the authors' published code. Quirks of that code:

- It takes A.9's variance 0.05 of the weights as a standard deviation; so does `code`.
- Its panels of "Euclidean distance" show the squared distance; so do ours, and say so.
- With the input free it drops −ε_1 from the flow, which then is no gradient flow. Figure 1 A, B
  follow the gradient flow.
- It sets NaN and 0 to 1 where Euler diverged. Figure 2 left draws that curve in gray beside the
  exact one and the share of draws that diverge.
- It subtracts a constant 58 from the output loss. Figure 4 A does not.
"""
