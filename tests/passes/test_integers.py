"""The search with integers in it: what a target, or a limit on the loss, makes of a machine on which int8 halves the time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import NothingPrunable, TargetError
from onnxprune.graph.model import load
from onnxprune.options import settings
from onnxprune.passes import meter, shipping
from onnxprune.passes.apply import execute
from onnxprune.passes.decision import Decision
from onnxprune.passes.int8 import Scheme, Trial, products_of
from onnxprune.passes.manager import decide
from onnxprune.passes.precision import Group
from onnxprune.passes.premises import Premises, prepare
from onnxprune.passes.scope import understand
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Student
from onnxprune.search.costs import CostTable
from onnxprune.verification import Comparison, Interval
from tests import zoo
from tests.passes.cases import BERT, VIT, calibration, linear_table

DYNAMIC = Scheme("dynamic", True)
SLOW = (Trial(DYNAMIC, 0.7, 0.1), Trial(Scheme("dynamic", False), 0.8, 0.2))
GAIN = 0.5
GIVEN = 7.0
"""Milliseconds of the file as given: one for each of six sites and one for the rest; in integers all of it takes GAIN times as long."""


def machine(monkeypatch: pytest.MonkeyPatch, error: float | None = None) -> None:
    """A machine of known speed; with ``error``, int8 costs that much divergence in every group of products."""

    def table(sites: Any, known: Shipping) -> CostTable:
        full = linear_table(sites)
        full = full if sites else CostTable("ms", GIVEN, {})
        share = sum(group.macs for group in known.groups if group.products[0] in known.floats)
        whole = sum(group.macs for group in known.groups)
        slower = share / whole if whole and known.scheme else 0.0
        return full if known.scheme is None else full.scaled(GAIN + (1 - GAIN) * slower)

    def timed(self: Any, known: Shipping, what: str) -> tuple[CostTable, float]:
        return table(self.bench.sites, known), GIVEN

    def measure(self: meter.Meter, student: Student, given: float, known: Shipping) -> float:
        if self.unit == "bytes":
            return weighed(self, student, given, known)
        return table(self.bench.sites, known).predict(student.counts)

    def groups(*args: Any, **options: Any) -> tuple[Group, ...]:
        found = real(*args, **options)
        return found if error is None else tuple(dataclasses.replace(group, error=error, smoothed=False) for group in found)

    real, weighed = shipping.measure_groups, meter.Meter.measure
    monkeypatch.setattr(shipping, "measure_groups", groups)
    monkeypatch.setattr(shipping, "choose_scheme", lambda *_, **__: (DYNAMIC, (Trial(DYNAMIC, 2.0, 0.01),)))
    monkeypatch.setattr(meter.Meter, "_timed", timed)
    monkeypatch.setattr(meter.Meter, "measure", measure)


def search(name: str = BERT, rows: int = 32, passes: str = "heads,ffn,int8", **options: Any) -> Decision:
    chosen = settings(passes, **{"compensation": "none", "rounds": 1, "importance": "magnitude", "finishing": False, **options})
    model = load(zoo.path(name))
    return decide(understand(model, chosen), calibration(name, rows), chosen)


def removed(decision: Decision) -> int:
    return sum(decision.plan.removed.values())


def integers(decision: Decision) -> tuple[str, ...]:
    return decision.plan.int8.products if decision.plan.int8 else ()


def everything(decision: Decision) -> set[str]:
    return {node.name for node in products_of(decision.study.anatomy.model)}


# --- targets -----------------------------------------------------------------------------------------------------------------------


def test_integers_that_cost_nothing_are_taken_before_units_go(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, error=1e-12)
    decision = search(target_latency="60%")
    assert decision.trail[0]["kept"] == decision.plan.units, "units go where the clock finds int8 slower than predicted, and no sooner"
    assert removed(decision) < 0.5 * removed(search(passes="heads,ffn", target_latency="60%"))
    assert integers(decision)
    assert decision.predicted <= decision.goal * (1 + 1e-9)  # type: ignore[operator]
    assert "int8" in decision.plan.rewrites


def test_integers_that_cost_too_much_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, error=1e6)
    decision = search(target_latency="60%")
    assert removed(decision) > 0
    assert integers(decision) == ()
    assert decision.plan.int8 is None
    assert "int8" not in decision.plan.rewrites
    assert decision.predicted <= decision.goal * (1 + 1e-9)  # type: ignore[operator]


def test_a_tight_target_takes_both(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, error=1e-12)
    decision = search(target_latency="25%")
    assert removed(decision) > 0
    assert decision.measured <= 0.25 * GIVEN * 1.005
    alive = {node.name for node in execute(decision.study.anatomy, decision.plan).proto.graph.node}
    left = (everything(decision) & alive) - set(integers(decision))
    assert len(left) <= 1  # the classifier, in float, costs nothing that the target would miss


def test_a_target_that_float_meets_takes_no_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    decision = search(target_latency="100%")
    assert decision.already_met
    assert decision.plan.int8 is None
    assert "int8" not in decision.plan.rewrites


@pytest.mark.parametrize(("share", "all_of_them"), [("80%", False), ("50%", True)])
def test_int8_alone_takes_what_the_target_needs(share: str, all_of_them: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    decision = search(passes="int8", target_latency=share)
    assert decision.goal is not None
    assert decision.measured <= decision.goal * (1 + 1e-9)
    assert decision.plan.kept == {}
    assert (set(integers(decision)) == everything(decision)) == all_of_them
    assert integers(decision)


def test_int8_alone_cannot_reach_everything_and_says_how_far_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(TargetError, match=r"with every product in int8 the model still takes 3\.5 ms \(50% of the file as given\)"):
        search(passes="int8", target_latency="20%")


@pytest.mark.parametrize(("name", "share"), [(BERT, "62%"), (VIT, "50%")])
def test_a_size_is_that_of_the_file_in_integers(name: str, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    decision = search(name, target_size=share, rounds=2)
    size = len(execute(decision.study.anatomy, decision.plan).to_proto().SerializeToString())
    assert decision.goal is not None
    assert 0.85 * decision.goal < size <= decision.goal
    in_float = search(name, passes="heads,ffn", target_size=share, rounds=2)
    assert removed(decision) < removed(in_float), "what integers save need not be cut"


def test_multiply_adds_are_as_many_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    decision, in_float = search(target_macs="60%"), search(passes="heads,ffn", target_macs="60%")
    assert decision.plan.kept == in_float.plan.kept
    assert decision.predicted == in_float.predicted <= in_float.goal * (1 + 1e-9)  # type: ignore[operator]
    assert integers(decision)


def test_a_target_is_met_with_as_few_rows_as_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    decision = search(VIT, rows=8, target_macs="60%")
    assert integers(decision)
    assert len(decision.held_back) >= 1


def test_rows_that_chose_the_integers_do_not_report(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    study = understand(load(zoo.path(VIT)), settings("heads,int8"))
    premises = prepare(study, calibration(VIT, 64), settings("heads,int8", target_macs="60%"), None)
    parts = [part.inputs["pixel_values"] for part in (premises.calibration, premises.judges, premises.held_back)]
    assert [len(part) for part in parts] == [48, 4, 12]
    assert len(np.unique(np.concatenate(parts).reshape(64, -1), axis=0)) == 64


# --- refusals ----------------------------------------------------------------------------------------------------------------------


def test_integers_that_are_slower_are_refused_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(shipping, "choose_scheme", lambda *_, **__: (None, SLOW))
    decision = search(target_latency="60%")
    assert decision.plan.int8 is None
    assert removed(decision) > 0
    (refusal,) = [refusal for refusal in decision.plan.refusals if refusal.site == "int8"]
    assert refusal.code == "OP401"
    assert "the best form tried (dynamic, per tensor) runs at 0.80x of its speed" in refusal.reason
    assert decision.shipping.trials == SLOW


def test_a_graph_without_products_is_told_what_int8_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(shipping, "choose_scheme", lambda *_, **__: (None, ()))
    with pytest.raises(NothingPrunable, match=r"OP401 .*no MatMul or plain Gemm of .* float32 matrix; leave int8 out; convolutions"):
        search(passes="int8")


def test_integers_that_are_slower_are_nothing_to_do_where_nothing_else_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(shipping, "choose_scheme", lambda *_, **__: (None, SLOW))
    with pytest.raises(NothingPrunable, match=r"OP401 .*int8 is not faster than float here"):
        search(passes="int8")


# --- as fast as the loss allows ----------------------------------------------------------------------------------------------------


def loses(monkeypatch: pytest.MonkeyPatch, per_group: float) -> None:
    """A model that loses this much for each of its most sensitive groups that computes in integers, and 0.9 for any unit."""

    def judge(self: Any, known: Shipping, student: Student, rows: CalibrationData) -> Comparison:
        left = [group for group in known.groups if known.scheme is not None and group.products[0] not in known.floats]
        pruned = any(len(units) < self.dense.counts[site] for site, units in student.kept.items())
        agreement = 1 - min(1.0, per_group * len(left) + 0.9 * pruned)
        return Comparison(len(rows), "logits", agreement=Interval(agreement, agreement, agreement))

    monkeypatch.setattr(Premises, "judge", judge)


def sensitive(decision: Decision, share: float) -> set[str]:
    """Products of the groups that lose most for their work."""
    groups = sorted(decision.shipping.groups, key=lambda group: -group.error / group.macs)
    return {name for group in groups[: int(np.ceil(share * len(groups)))] for name in group.products}


@pytest.mark.parametrize(("limit", "share"), [(0.99, 0.0), (0.9, 0.125), (0.76, 0.25), (0.51, 0.5)])
def test_the_most_sensitive_products_stay_in_float_as_far_as_it_takes(limit: float, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    number = len(search(target_macs="90%").shipping.groups)
    loses(monkeypatch, 0.99 / number)
    decision = search(max_drop=limit)
    assert set(integers(decision)) == everything(decision) - sensitive(decision, share)
    assert removed(decision) == 0
    assert [entry["step"] for entry in decision.trail if entry["step"].startswith("int8")] == [
        f"int8 {100 * (1 - tried):.0f}%" for tried in (0.0, 0.125, 0.25, 0.5) if tried <= share
    ]


def test_integers_that_lose_too_much_with_half_in_float_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    loses(monkeypatch, 0.5)
    with pytest.raises(TargetError, match="no pruned model stays within --max-drop 1%"):
        search()
    with pytest.raises(NothingPrunable, match=r"OP402 .*int8 loses more than 1% even with half of the products in float"):
        search(passes="int8")
    decision = search(passes="int8,residual-sum")
    assert decision.plan.rewrites == ("residual-sum",)
    assert [refusal.code for refusal in decision.plan.refusals if refusal.site == "int8"] == ["OP402"]


def test_int8_alone_is_as_fast_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    decision = search(passes="int8", max_drop="50%")
    assert set(integers(decision)) == everything(decision)
    assert decision.measured == GAIN * GIVEN
    assert decision.goal is None


def test_what_is_predicted_is_predicted_for_the_numbers_that_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    loses(monkeypatch, 0.5)
    decision = search(passes="int8,residual-sum")
    assert decision.plan.int8 is None
    assert decision.measured == GIVEN
    assert decision.predicted == pytest.approx(GIVEN)
    assert decision.table.full == pytest.approx(GIVEN)


def test_the_only_group_of_products_is_refused_when_it_loses_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    loses(monkeypatch, 0.5)
    measured = shipping.measure_groups
    monkeypatch.setattr(shipping, "measure_groups", lambda *args, **options: measured(*args, **options)[:1])
    with pytest.raises(NothingPrunable, match="OP402"):
        search(passes="int8")
