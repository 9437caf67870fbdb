"""Every numbered statement of the paper over random networks: its verdict and its evidence.

`python -m experiments theorems` measures them, draws the verdicts and writes a page. `pcdyn verify`
does the same on fewer networks, as a table.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import xarray
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from experiments.shared.experiment import Experiment
from pcdyn.theory import STATEMENTS, Evidence, Statement, expectation, verify
from pcdyn.theory.evidence import evidence_from_xarray
from pcdyn.theory.pictures import verdicts


@dataclasses.dataclass(frozen=True)
class Config:
    """Random networks for each statement."""

    networks: int = 100
    seed: int = 0
    statements: tuple[str, ...] = ()


ROOT = Path(__file__).parents[2]


def run(config: Config) -> xarray.Dataset:
    """Measure every statement."""
    found = verify(config.statements, seed=config.seed, networks=config.networks)
    return found.to_xarray().assign_attrs(source="random numbers")


def plot(data: xarray.Dataset) -> Figure:
    """The verdict on every claim, a row for each statement, in two columns."""
    evidence = evidence_from_xarray(data)
    shown = _shown(evidence)
    middle = -(-len(shown) // 2)
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.24 * middle), sharex=True)
    for ax, part in zip(axes, (shown[:middle], shown[middle:]), strict=True):
        numbers = [s.number for s in part]
        verdicts([e for e in evidence if e.statement in numbers], ax=ax)
        ax.set_yticks(range(len(part)), [f"{s.title}  ({s.number})" for s in part])
        ax.set_ylim(middle - 0.4, -0.6)
    return figure


NOTATION = (
    "**Notation.** Layers 0 … L with activities x_l, input d, target T, predictions "
    "μ_l = f_l(W_l x_{l−1} + b_l), prediction errors ε_l = x_l − μ_l and precisions Π_l. Free "
    "energy F = ½ Σ ε_lᵀ Π_l ε_l, output loss ℒ = F's term of layer L, residual energy Ẽ = F − ℒ; "
    "x* is the equilibrium and F* the free energy there. x̂, x_ff: the feedforward pass; e_0: its "
    "output error; δ_l: the deltas of BP; t_l: the targets of TP; W⁺: the pseudoinverse; λ: the "
    "output precision (in Eq 48 the weight of ℒ); ρ: the ratio of the precisions of neighbouring "
    "layers. Linear networks: y all free activities together, H = ∂²F/∂y², P_l = W_L … W_{l+1}, "
    "S = Σ P_l Π_l⁻¹ P_lᵀ.",
    "",
    "**Verdicts.** Forms that do not hold as printed are measured too, beside those that do: a "
    "*finding* is a claim of the paper that was measured and is not so. An *oracle* is the "
    "independent computation that a number is held against, without the code that it checks.",
)


def page(data: xarray.Dataset, folder: Path) -> str:
    """The statements as a page: words, verdict, the form that holds, numbers, source."""
    evidence = evidence_from_xarray(data)
    lines = [
        "# The statements of the paper, measured",
        "",
        "Millidge, Song, Salvatori, Lukasiewicz and Bogacz, A theoretical framework for inference "
        "and learning in predictive coding networks (ICLR 2023). Written by `python -m experiments "
        f"theorems` over {data.attrs['networks']} random networks for each statement, seed "
        f"{data.attrs['seed']}; `pcdyn verify` prints verdicts and numbers, over 20 networks "
        "unless given `--networks`.",
        "",
        *NOTATION,
        "",
        "![theorems](figure.png)",
        "",
        "| statement | | as printed |",
        "|---|---|---|",
    ]
    shown = _shown(evidence)
    lines += [f"| [{s.number}](#{_anchor(s)}) | {_cell(s.title)} | {s.as_printed} |" for s in shown]
    for statement in shown:
        lines += _section(statement, evidence, folder)
    return "\n".join(lines) + "\n"


def summary(data: xarray.Dataset) -> str:
    """The statements for the index of all figures: verdicts, what holds, links to the evidence."""
    evidence = evidence_from_xarray(data)
    unexpected = sum(not e.as_known for e in evidence)
    lines = [
        f"{len(evidence)} claims, {sum(e.holds for e in evidence)} of which hold; {unexpected} "
        "verdicts differ from those on record. [Numbers, oracles and code](theorems/page.md).",
        "",
        "| statement | | as printed | what holds |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| [{s.number}](theorems/page.md#{_anchor(s)}) | {_cell(s.title)} | {s.as_printed} | "
        f"{_cell(s.form)} |"
        for s in _shown(evidence)
    ]
    return "\n".join(lines)


def _shown(evidence: list[Evidence]) -> list[Statement]:
    numbers = {e.statement for e in evidence}
    return [s for s in STATEMENTS if s.number in numbers]


def _anchor(statement: Statement) -> str:
    heading = f"{statement.number}: {statement.title}".lower().replace(" ", "-")
    return "".join(c for c in heading if c.isalnum() or c in "-_")


def _section(statement: Statement, evidence: list[Evidence], folder: Path) -> list[str]:
    file, function = statement.source
    link = Path(os.path.relpath(ROOT / file, folder)).as_posix()
    lines = [
        "",
        f"## {statement.number}: {statement.title}",
        "",
        f"The paper: {statement.says}",
        *(["", statement.further] if statement.further else []),
        "",
        f"As printed: **{statement.as_printed}**. What holds: {statement.form}",
        "",
        "| claim | measured | expected | verdict | oracle | settings |",
        "|---|---|---|---|---|---|",
    ]
    for e in evidence:
        if e.statement == statement.number:
            settings = ", ".join(
                f"{key} {_short(value)}" for key, value in e.settings.items()
                if key not in ("sizes", "errors")
            )  # fmt: skip
            cells = (e.claim, f"{e.measured:.3g}", expectation(e), e.verdict, e.oracle, settings)
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return [*lines, "", f"Source: `{function}` in [{file}]({link}). To reproduce:", "", "```python",
            statement.snippet, "```"]  # fmt: skip


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


EXPERIMENT = Experiment(
    "theorems", "extra: every numbered statement, measured", {"paper": Config()},
    {"networks": 4, "statements": ("3.4", "Eq 21", "A.3", "Eq 48")},
    run, evidence_from_xarray, plot, summary, page,
)  # fmt: skip
