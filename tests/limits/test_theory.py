"""The verdicts on record, on small settings; and that a wrong formula changes them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pcdyn.errors import InputError, SimulationError
from pcdyn.learning import AdiabaticFlow
from pcdyn.model.problem import InferenceProblem
from pcdyn.references.output_error import OutputErrorFlow
from pcdyn.theory import STATEMENTS, Evidence, dynamics, inference, learning, limits, select, verify
from pcdyn.theory.evidence import evidence_from_xarray
from pcdyn.theory.flows import integrate
from pcdyn.theory.networks import Networks
from pcdyn.theory.pictures import verdicts as draw_verdicts
from pcdyn.theory.verification import Measured, Verification

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("as_users_run")


@pytest.mark.slow
@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.number)
def test_each_statement_has_the_verdict_on_record(statement: Any) -> None:
    """On three networks; findings among them do not hold, and the corrected forms do."""
    found = statement.measure(seed=1, networks=3)
    assert [e.claim for e in found if not e.as_known] == []
    assert {e.statement for e in found} == {statement.number}
    assert all(math.isfinite(e.measured) for e in found)
    file, name = statement.source
    assert f"\ndef {name}(" in (ROOT / file).read_text("utf-8")
    has_findings = any(not e.expected_to_hold for e in found)
    assert not has_findings or statement.as_printed != "holds"
    assert any(e.expected_to_hold for e in found)


def test_the_page_leads_to_the_code() -> None:
    """The committed page has each statement with the function that measures it."""
    page = (ROOT / "paper_figures" / "theorems" / "page.md").read_text("utf-8")
    for statement in STATEMENTS:
        file, name = statement.source
        assert f"`{name}` in [{file}](../../{file})" in page, statement.number
        assert statement.snippet in page


def verdicts(name: str, networks: int) -> list[bool]:
    """Whether each claim of one statement has its verdict on record."""
    return [e.as_known for e in verify([name], networks=networks).evidence]


def test_a_vector_field_of_the_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences; another number of networks, so that the field is traced anew."""
    right = InferenceProblem.vector_field
    assert all(verdicts("Eq 1", 5))

    def wrong(self: InferenceProblem, t: Any, state: Any) -> Any:
        return jax.tree.map(lambda v: -v, right(self, t, state))

    monkeypatch.setattr(InferenceProblem, "vector_field", wrong)
    assert not all(verdicts("Eq 1", 4))


@pytest.mark.slow
def test_a_wrong_closed_form_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The equilibrium of twice the Hessian, and BP without its slopes."""

    right = Networks.linear_flow

    def doubled(self: Networks, *free: int) -> Any:
        matrix, drive = right(self, *free)
        return 2 * matrix, drive

    with monkeypatch.context() as patch:
        patch.setattr(Networks, "linear_flow", doubled)
        assert not verdicts("Theorem 3.4", 3)[0]
    monkeypatch.setattr(Networks, "slope", lambda self, layer, below: np.ones_like(below))
    assert not all(verdicts("low output precision", 3))


def test_names_select_statements() -> None:
    """Whole numbers, beginnings and ends; order is that of the registry, not of the names."""
    assert [s.number for s in select(["eq-48", "theorem 3.4"])] == ["Theorem 3.4", "Eq 48"]
    assert {s.number for s in select(["3.1"])} == {
        "Theorem 3.1", "Proposition 3.1", "Lemma 3.1"
    }  # fmt: skip
    assert len(select(["a.2"])) == 3
    assert select([]) == STATEMENTS
    assert [s.number for s in select(["eq-41", "A.6.1"])] == ["Proposition 3.1", "Lemma 3.1"]
    assert len({s.number for s in STATEMENTS}) == len(STATEMENTS)


def test_every_equation_is_found() -> None:
    """By its number, in one statement at least; a range has the numbers between its ends."""
    for number in range(1, 53):
        assert select([f"Eq {number}"])
    for unknown in ("Eq 53", "Eq 0", ""):
        with pytest.raises(InputError, match="no statement"):
            select([unknown])


def test_definitions_are_called_so() -> None:
    """In the table and in records, with the further numbers that a statement covers."""
    found = verify(["Eq 38"], networks=2)
    line = found.table().splitlines()[0]
    assert line.startswith("Proposition 3.1: ")
    assert line.endswith(" Covers A.6.1, Eq 37 too. Definitions: Eqs 38–39.")
    (record,) = found.records()
    assert (record["also"], record["definitions"]) == ("A.6.1, Eq 37", "Eqs 38–39")


def test_bad_input_is_refused() -> None:
    """Names, counts and seeds; and float32, in which nothing could be told."""
    for options in ({"names": ["3.9"]}, {"networks": 1}, {"seed": -1}):
        with pytest.raises(InputError, match=r"3\.9|networks|seed"):
            verify(**options)  # pyright: ignore[reportArgumentType]
    with jax.enable_x64(False), pytest.raises(InputError, match="float64"):
        verify(["Eq 21"])


def test_records_and_tables_tell_what_was_measured() -> None:
    """JSON knows them, the table has a line for each claim, and progress is told."""
    told: list[str] = []
    found = verify(["Eq 25", "A.3"], networks=3, progress=lambda s: told.append(s.number))
    assert told == ["A.3", "Eq 25"]
    records = json.loads(json.dumps(found.records()))
    assert [len(r["evidence"]) for r in records] == [2, 2]
    assert len(found.table().splitlines()) == 2 + 4 + 1
    assert str(found) == found.summary() == found.table().splitlines()[-1]
    figure, ax = plt.subplots()
    assert sum(len(line.get_xdata()) for line in found.plot(ax)) == len(found.evidence)
    plt.close(figure)
    data = found.to_xarray()
    assert evidence_from_xarray(data) == list(found.evidence)
    assert found.ok
    wrong = dataclasses.replace(found.evidence[0], expected=math.inf)
    changed = Verification((Measured(found.measured[0].statement, (wrong,), 0.0),), 0, 3)
    assert not changed.ok
    assert len(changed.unexpected) == 1
    assert isinstance(wrong, Evidence)


def test_what_is_not_finite_confirms_nothing() -> None:
    """Neither a claim nor a finding; the verdict says that it fails."""
    for expected_to_hold in (True, False):
        for measured in (math.nan, math.inf, -math.inf):
            row = Evidence("", "", measured, "at most", 0.0, 1.0, "", {}, expected_to_hold)
            assert not row.holds
            assert not row.as_known
            assert row.verdict == "FAILS"


def test_what_diverges_is_measured_while_it_is_small() -> None:
    """The flow of the printed sign has grown much, and is far from the largest number."""
    _, diverges, _ = verify(["Eqs 6, 30, 33"]).evidence
    assert 10 < diverges.measured < 1e20


def test_findings_have_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theorem 3.2's equal f': errors that miss BP's by a millionth would be no finding."""

    def almost(self: Networks, activities: Any) -> Any:
        return [d * (1 + 1e-6) for d in self.deltas()]

    monkeypatch.setattr(Networks, "weighted_errors", almost)
    rows = verify(["Theorem 3.2"], networks=2).evidence[-3:]
    assert [row.verdict for row in rows] == 3 * ["holds (UNEXPECTED)"]


@pytest.mark.parametrize("seed", [3, 9, 11])
def test_the_order_of_incremental_coding_is_that_of_small_ratios(seed: int) -> None:
    """Networks in which ε = .1 and .01 are too large to show an order of one."""
    (row,) = limits.incremental_coding(seed=seed)
    assert row.measured == pytest.approx(1, abs=0.03)


def test_a_wrong_bound_or_hessian_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of A.6.3 and A.3 run pcdyn's margin, its loss in closed form and its Hessian."""
    margin, blocks = learning.energy_gradient_margin, inference.hessian
    with monkeypatch.context() as patch:
        patch.setattr(learning, "energy_gradient_margin", lambda p, s: 2 * margin(p, s))
        patch.setattr(OutputErrorFlow, "whitened", lambda self, t: jax.numpy.exp(t) * self.root)
        seen = [not known for known in verdicts("A.6.3", 7)[:6]]
        assert seen == [True, False, True, True, True, True]
    monkeypatch.setattr(inference, "hessian", lambda p: jax.tree.map(jax.numpy.negative, blocks(p)))
    assert verdicts("A.3", 7) == [False, False]


@pytest.mark.slow
def test_a_wrong_energy_slope_along_the_flow_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """At random activities ∂Ẽ/∂x is not zero: without it A.6.3's rate of ℒ is another."""
    right = learning._parts

    def without(made: Networks, activities: Any) -> Any:
        loss, residual = right(made, activities)
        return loss, [np.zeros_like(r) for r in residual]

    monkeypatch.setattr(learning, "_parts", without)
    assert not verdicts("A.6.3", 3)[1]


def test_one_wrong_network_of_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims of exactness are about every network, and medians would hide it."""
    right = limits.on_each

    def one_wrong(measure: Any, made: Networks, *arrays: Any, **options: Any) -> Any:
        found = right(measure, made, *arrays, **options)
        return found * (1 + 1e-9 * (np.arange(len(found)) == 0)[:, None])

    monkeypatch.setattr(limits, "on_each", one_wrong)
    assert not limits.frozen_predictions(networks=5)[0].as_known
    assert not any(row.as_known for row in limits.first_update(networks=5)[:2])


def test_condition_numbers_are_those_of_the_same_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millionth in each rate is seen, far below the spread of the median of other draws."""
    right = dynamics.linear_spectra

    def wrong(weights: Any) -> Any:
        return right(weights) + 1e-6

    settings = {"depths": (2, 4), "width": 8, "networks": 20}
    assert all(row.as_known for row in dynamics.condition_numbers(**settings)[:-1])
    monkeypatch.setattr(dynamics, "linear_spectra", wrong)
    assert not any(row.as_known for row in dynamics.condition_numbers(**settings)[:-1])


@pytest.mark.slow
def test_a_wrong_learning_flow_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theorem 3.6 integrates NumPy's −dF*/dW; pcdyn's is compared with it."""
    right = AdiabaticFlow.vector_field

    def faster(self: AdiabaticFlow, t: Any, state: Any) -> Any:
        return jax.tree.map(lambda v: 1.001 * v, right(self, t, state))

    monkeypatch.setattr(AdiabaticFlow, "vector_field", faster)
    assert [not known for known in verdicts("Theorem 3.6", 7)] == [False, True, True] + 3 * [False]


def test_a_flow_that_cannot_be_solved_is_named() -> None:
    """SciPy's failure on dy/dt = y², which is infinite at t = 1."""
    with pytest.raises(SimulationError, match="did not reach t = 2"):
        integrate(lambda _, y: y**2, np.ones(1), [2.0], method="DOP853", tolerance=1e-6)


def test_every_claim_has_a_mark_of_its_verdict_in_the_row_of_its_statement() -> None:
    """Those that hold come first; the labels are the verdicts that there are."""
    axes = Figure().subplots()
    measured = {"first": (2.0, 0.0, math.nan), "second": (0.5,)}
    rows = [
        Evidence(number, "", x, "at most", 1.0, expected_to_hold=x != 2)
        for number, each in measured.items()
        for x in each
    ]
    drawn = {
        line.get_label(): np.asarray(line.get_xydata()).tolist()
        for line in draw_verdicts(rows, ax=axes)
    }
    assert drawn == {
        "holds": [[1, 0], [1, 1]], "does not hold (finding)": [[2, 0]], "FAILS": [[3, 0]],
    }  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
