"""What the convergence theorem (Theorem 3.6) claims and what holds, in words, from the data."""

from __future__ import annotations

import numpy as np
import xarray

from pcdyn.references.output_error import LARGEST_RISE


def inference_page(data: xarray.Dataset) -> str:
    """The first half of the proof: the output loss during inference."""
    squares, bound = data.squared_error.values, data.bound.values
    deep = data.depth_rise.sel(depth=data.depth > 2)
    shares = (deep > 1e-6).mean("network")
    tanh = data.tanh_rise.sel(output=data.attrs["width_of_all"])
    scalar = data.tanh_rise.sel(output=1)
    worst = "; ".join(
        f"{name} {100 * float(part.max()):.2f} %"
        for name, part in zip(data.searched.values, data.worst_rise, strict=True)
    )
    energy = 2 * data.free_energy.values
    return f"""# The convergence theorem, first half: the output loss during inference

Theorem 3.6 says that a network trained by predictive coding converges to a critical point of the
loss ℒ of backpropagation. The proof needs ℒ to fall during inference, and gives a condition, the
energy gradient bound −∂ℒ/∂xᵀ ∂Ẽ/∂x < ‖∂ℒ/∂x‖² (A.6.3), which is nothing but dℒ/dt < 0 for the last
hidden layer; below it both sides are zero. The second half is in
[learning_limits.md](learning_limits.md). Drawn by `python -m experiments loss_along_inference`.

![The output loss along inference](loss_along_inference.png)

**The bound holds at the start.** At the feedforward pass Ẽ has no slope, so that the left side is
zero. In the counterexample below it is {bound[0]:.3f} of the right side at t = .01.

**It is not preserved, and the loss can rise.** In a linear 2-2-2-2 network ‖ε_L‖² falls from 1 to
{squares.min():.4f} and then rises to {squares[-1]:.4f}, by closed form and by an ODE solver, while
the ratio of the two sides passes 1 and reaches {bound.max():.4f}. No learning rate enters; the
"overshoot" that a small rate was to prevent happens along the exact flow.

**Why.** In a linear network ε_L(t) = M(t) e0. Whitened by the output precision, M is a symmetric
N(t) = N(∞) + Σ e^(−λt)/λ v vᵀ, a completely monotone function: it falls from I to N(∞), which is
positive, in every direction at once. The loss is ½‖N(t) z‖², and squares of matrices need not fall
with the matrices. They do where N(s) and N(t) commute: with a scalar output, with one hidden layer
of scalar precision, and with weights whose singular vectors are aligned. The largest rise found
there, over all targets and from any time to any later one, is
{float(data.width_worst_target.sel(width=1).max()):.0e} in the first case and
{float(data.depth_worst_target.sel(depth=2).max()):.0e} in the second. One hidden layer is not
enough with a full precision Π₁: there the searched rise is as large as in deep networks.

**How often.** In the end only the slowest mode v that the output sees moves, and ℒ rises if the
whitened error lies between the planes orthogonal to v and to N(∞)v: a share θ/π of directions, θ
the angle of the two.
That is an open set in every network where v is no eigenvector of N(∞); the exception is the rule.
Of random linear networks with more than one hidden layer, {float(shares.min()):.1%} to
{float(shares.max()):.1%} of draws, by depth and gain, rise by more than a millionth of ℒ at the
start. Tanh networks do so in {float((tanh > 1e-6).mean("tanh_network").min()):.1%} to
{float((tanh > 1e-6).mean("tanh_network").max()):.1%}, at worst by {float(tanh.max()):.2%}; with a
scalar output, where the linear proof does not reach, in {float((scalar > 1e-6).mean()):.1%}, at
worst by {float(scalar.max()):.1e}.

**How much.** Little. Among linear draws the worst is {float(deep.max()):.2%} of ℒ at the start. A
rise need not last: ℒ can fall again after it. But from no time to any later one does a linear
network, with any precisions, time constants and target, exceed (√5 − 2)/4 = {LARGEST_RISE:.2%} of
ℒ at the start: the largest eigenvalue of B² − A² over 0 ≼ B ≼ A ≼ I, which is attained in two
dimensions. A search over weights comes close ({worst}).

**What is always true.** ℒ(x*) ≤ F(x*) ≤ F(feedforward) = ℒ(feedforward): inference never ends above
the loss at which it started. In the counterexample {squares[-1]:.3f} ≤ {energy[-1]:.3f} ≤ 1. So
the constrained minimisation of Eqs 13 and 15 is not what inference does, yet the loss with which
each inference ends is no larger than that of the feedforward pass.
"""


def learning_page(data: xarray.Dataset) -> str:
    """The second half: where learning ends, and what helps."""
    shares = 100 * _at_saddle(data, "plane").mean(-1)
    header = "| λ | " + " | ".join(f"c = {c:g}" for c in data.noise.values) + " |"
    rows = [
        f"| {p:.2g} | " + " | ".join(f"{x:.0f}" for x in row) + " |"
        for p, row in zip(data.precision.values, shares, strict=True)
    ]
    table = "\n".join([header, "|---" * (1 + len(data.noise)) + "|", *rows])
    decay = _excess(data, "weight_decay").max(-1)
    ends = "; ".join(
        f"λ = {p:g}: {row.min():.2g} above the least ℒ at ω = {data.decay.values[row.argmin()]:.2g}"
        for p, row in zip(data.remedy_precision.values, decay, strict=True)
    )
    noise = data.attrs["remedy_noise"]
    norm = data.weight_norm.values
    gap = data.gradient_gap.values
    return f"""# The convergence theorem, second half: where learning ends

Learning follows −∂F*/∂W with F*(W) = min_x F. Its limit points are critical points of F*, not of ℒ.
The [first half](loss_along_inference.md) is about the loss during inference. Drawn by
`python -m experiments learning_limits`; `critical_points` shows a network that can interpolate its
data, where both gradients vanish together.

![Where learning ends](learning_limits.png)

**When they agree.** Where the data are interpolated F* = ℒ = 0. At finite weights
∇F*/λ = ∇ℒ + O(λ) for the output precision λ: in a tanh 3-8-2 network the relative gap is
{gap[-1]:.1e} at λ = {float(data.order_precision[-1]):g}, in proportion to λ.

**Learning need not end.** A linear 1-1-2 network whose targets are (x, cξ), ξ unrelated to x, has a
saddle of ℒ at W₁ = 0. There F* = λ/2 [1 + c²/(1 + λb²)] falls as W₂ = (0, b) grows, for ever:
b → (4c²t)^¼ in time t times samples, whatever λ is. Measured from {norm[0]:g} to {norm[-1]:.1f},
within {abs(norm / data.reduced_weight_norm.values - 1).max():.0e} of the reduced ODE; ℒ stays at
{float(data.growing_loss[-1]):.3f}, the least is 4.5. The infimum of F* is not attained, which
Proposition 3.1 assumes.

**Which end wins.** Per sample, F* is at least λ/2 near the saddle and λc²/2 at the fit of the first
output, whose ℒ is least. So the saddle can win only for c > 1. The fit W₂ = (a, 0), W₁ = 1/a is
stable where λa²(c² − 1) < 1, and since every a is as good, there is a stable part for any λ;
small weights find it at small λ. Starts (of {data.sizes["start"]}, N(0, 1)) that end at the saddle,
in per cent:

{table}

**Weight decay** ½ω‖W‖² added to F*/λ ends the growth, not the preference. With
D = c√(λ/ω) = 1 + λb² the saddle is stable as long as (c² − 1)(D − 1 + λ²c²/D) > 1, and the fit is
biased by ω. For c = {noise:g}, worst of all starts: {ends}. It helps at
small λ only, and what it finds is a critical point of ℒ plus decay, not of ℒ.

**A fixed norm R of W₂** is the better remedy here: the fit, unbiased because W₁ is free, is the
only stable end for λR²(c² − 1) < 1, and is never found above. It is no general cure: it asks for
a bound that depends on λ and on the noise, and in deeper networks S = Σ P Π⁻¹Pᵀ still varies at
fixed norms, with a bias O(λ).
"""


def _excess(data: xarray.Dataset, name: str) -> np.ndarray:
    """ℒ above the least, per sample, for weights (w, a, b)."""
    w, a, b = np.moveaxis(data[f"{name}_weights"].values, -1, 0)
    return 0.5 * ((1 - w * a) ** 2 + (w * b) ** 2)


def _at_saddle(data: xarray.Dataset, name: str) -> np.ndarray:
    return _excess(data, name) > 0.25
