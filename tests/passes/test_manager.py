"""From a model, data and a target to a plan: scope, rows, targets, and the two searches that measure."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.source import load_calibration
from onnxprune.errors import InputError, NothingPrunable, TargetError
from onnxprune.graph.autodiff import NoGradient
from onnxprune.graph.model import Model, load
from onnxprune.options import settings
from onnxprune.passes import anchor, meter
from onnxprune.passes.aim import Trail
from onnxprune.passes.apply import execute
from onnxprune.passes.choice import choose
from onnxprune.passes.decision import Decision, summary
from onnxprune.passes.manager import decide
from onnxprune.passes.premises import Premises, prepare
from onnxprune.passes.rows import split
from onnxprune.passes.scope import Settings, Study, understand
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Scores, Student, dense_student
from onnxprune.runtime.measure import Timings
from onnxprune.verification import WorstClass, compare
from tests import zoo
from tests.calibration.models import image_model
from tests.graph.net import FFN, WIDTH, Net
from tests.passes.cases import BERT, GPT2, LLAMA, VIT, arrays, brief_benchmarks, calibration, clockwork, easy_model, linear_table, workbench


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)


def study_of(name: str = BERT, **options: Any) -> Study:
    return understand(load(zoo.path(name)), settings(**options))


def names(study: Study) -> list[str]:
    return [site.name for site in study.sites]


def only_ffn() -> Model:
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    return load(net.done(net.add("x", net.linear(hidden, FFN, WIDTH))))


def behind_a_step() -> Model:
    """A feed-forward block whose result passes an operator without a gradient."""
    net = Net()
    y = net.add("x", net.ffn("x"))
    return load(net.done(net.add(y, net("Hardmax", y))))


def test_where_an_operator_has_no_gradient_the_default_criterion_gives_way(caplog: pytest.LogCaptureFixture) -> None:
    rows = load_calibration({"x": np.random.default_rng(0).standard_normal((32, 5, WIDTH)).astype(np.float32)}, behind_a_step())
    decided = decide(understand(behind_a_step(), settings(target_macs="60%")), rows, settings(target_macs="60%"))
    assert "no gradient through Hardmax" in caplog.text
    assert decided.plan.recipe["importance"] == "obs"
    assert decided.student.counts["layer.0.ffn"] < FFN
    asked = settings(target_macs="60%", importance="fisher")
    with pytest.raises(InputError, match=r"no gradient through Hardmax .* score without gradients"):
        decide(understand(behind_a_step(), asked), rows, asked)


# --- scope -------------------------------------------------------------------------------------------------------------------------


def test_passes_choose_kinds_of_sites() -> None:
    assert {site.kind for site in study_of().sites} == {"heads", "ffn"}
    assert {site.kind for site in study_of(passes=["ffn"]).sites} == {"ffn"}
    assert len(study_of(passes="heads").sites) == zoo.LAYERS


@pytest.mark.parametrize("option", ["keep", "exclude"])
def test_patterns_protect_the_sites_they_match(option: str) -> None:
    everything = names(study_of())
    found = names(study_of(**{option: [r"layer\.0\.", "2.heads$"]}))
    assert found == [name for name in everything if not name.startswith("layer.0.") and name != "layer.2.heads"]


def test_keep_and_exclude_add_up() -> None:
    assert names(study_of(keep=["heads"], exclude=["layer.1"])) == ["layer.0.ffn", "layer.2.ffn"]


@pytest.mark.parametrize("option", ["keep", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str) -> None:
    with pytest.raises(InputError, match=rf"--{option} 'layer.9' matches no site; sites are named like layer\.0\."):
        study_of(**{option: ["layer.9"]})


def test_a_pattern_that_is_no_expression_is_an_error() -> None:
    with pytest.raises(InputError, match=r"--keep 'layer\.\(' is not a regular expression"):
        study_of(keep=["layer.("])


def test_protecting_every_site_leaves_nothing_and_says_so() -> None:
    with pytest.raises(NothingPrunable, match="--keep and --exclude protect all 6 sites"):
        study_of(keep=["."])


def test_an_unknown_pass_is_refused_before_the_graph_is_read() -> None:
    with pytest.raises(InputError, match="did you mean 'heads'"):
        study_of(passes=["head"])


def test_a_graph_without_transformer_blocks_has_nothing_to_prune() -> None:
    with pytest.raises(NothingPrunable, match=r"nothing to prune for ffn, heads: the graph has 3 nodes \(2 ReduceSum, 1 Mul\)"):
        understand(image_model(), settings())


@pytest.mark.parametrize("other", ["fp16", "int4"])
def test_weights_are_put_into_one_kind_of_other_numbers(other: str) -> None:
    with pytest.raises(InputError, match=f"--passes names int8 and {other}, .*; take int8 for CPUs, fp16 for GPUs, int4 for large"):
        study_of(BERT, passes=f"int8,{other}")


def test_sites_of_another_pass_are_pointed_out() -> None:
    with pytest.raises(NothingPrunable, match="it does have ffn sites: add them to --passes"):
        understand(only_ffn(), settings(passes=["heads"]))


def test_rewrites_asked_for_are_told_from_widths_and_integers() -> None:
    assert study_of().rewrites == ()
    assert not study_of().integers
    study = study_of(passes=["fuse-attention", "int8", "ffn", "residual-sum"])
    assert study.rewrites == ("residual-sum", "fuse-attention"), "in the order in which they run"
    assert study.integers
    assert {site.kind for site in study.sites} == {"ffn"}


def test_rewrites_alone_need_no_sites() -> None:
    assert study_of(passes=["residual-sum"]).sites == ()


# --- rows --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "samples", "calibration_rows"), [(32, 1024, 24), (32, 8, 8), (40, 30, 30), (8, 1024, 6), (2048, 1024, 1024)]
)
def test_a_quarter_at_least_judges_and_no_row_does_both(rows: int, samples: int, calibration_rows: int) -> None:
    data = CalibrationData({"x": np.arange(rows)[:, None]}, None, "numbers")
    decides, judges = split(data, settings(samples=samples))
    assert len(decides) == calibration_rows
    assert rows / 4 <= len(judges) <= 1024
    assert not np.isin(decides.inputs["x"], judges.inputs["x"]).any()


def test_the_seed_deals_the_rows() -> None:
    data = CalibrationData({"x": np.arange(64)[:, None]}, None, "numbers")
    first, again, other = (split(data, settings(seed=seed))[0].inputs["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_one_row_is_too_few_to_decide_and_judge() -> None:
    with pytest.raises(InputError, match="both parts need at least one row"):
        split(CalibrationData({"x": np.zeros((1, 2))}, None, "numbers"), settings())


# --- targets -----------------------------------------------------------------------------------------------------------------------


def search(model: Model, data: CalibrationData, chosen: Settings) -> Decision:
    return decide(understand(model, chosen), data, chosen)


@pytest.mark.parametrize("name", [BERT, LLAMA, VIT])
@pytest.mark.parametrize("target", [{"target_macs": "55%"}, {"target_params": "70%"}, {"target_size": "70%"}])
def test_counted_targets_are_kept(name: str, target: dict[str, str]) -> None:
    decision = search(load(zoo.path(name)), calibration(name), settings(**target, compensation="none", rounds=2))  # type: ignore[arg-type]
    assert decision.goal is not None
    assert 0.95 * decision.goal < decision.predicted <= decision.goal * (1 + 1e-9)
    assert not decision.already_met
    assert decision.measured == pytest.approx(decision.predicted, rel=0.005)
    assert set(decision.plan.predicted) == {decision.table.unit}


@pytest.mark.parametrize(("option", "words"), [("target_macs", "multiply-adds"), ("target_params", "parameters"), ("target_size", "bytes")])
def test_an_impossible_target_names_the_least_that_can_be_had(option: str, words: str) -> None:
    def at(share: int) -> Decision:
        chosen = settings(**{option: f"{share}%"}, compensation="none", importance="magnitude", rounds=1)  # type: ignore[arg-type]
        return search(load(zoo.path(VIT)), calibration(VIT), chosen)

    with pytest.raises(TargetError, match=rf"cannot be met: it asks for [\d.e+]+ {words}") as caught:
        at(1)
    least = re.search(r"\((\d+)% of the file as given\)\. Ask for at least (\d+)%", str(caught.value))
    assert least
    assert int(least[2]) - int(least[1]) in (0, 1)  # the share, and the next whole per cent
    with pytest.raises(TargetError):
        at(int(least[1]) - 1)
    decision = at(int(least[1]) + 1)
    assert decision.goal is not None
    assert decision.predicted <= decision.goal


def test_a_target_that_is_met_already_prunes_nothing() -> None:
    decision = search(load(zoo.path(BERT)), calibration(BERT), settings(target_macs="100%"))
    assert decision.already_met
    assert decision.predicted == decision.finished_cost < decision.given_cost, "the last block computes one row"
    assert set(decision.plan.removed.values()) == {0}
    assert decision.plan.changes == {}
    assert decision.trail == ()


def test_a_file_that_finishing_alone_makes_fast_enough_is_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch, given=10.0)
    decision = search(load(zoo.path(BERT)), calibration(BERT), settings(target_latency="70%"))
    assert decision.already_met
    assert (decision.given_cost, decision.finished_cost, decision.goal) == (10.0, pytest.approx(7.0), 7.0)


def test_an_impossible_latency_names_the_fastest_that_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    with pytest.raises(TargetError) as caught:
        search(load(zoo.path(BERT)), calibration(BERT), settings(target_latency="10%"))
    text = str(caught.value)
    assert "target latency=10% cannot be met: it asks for 0.7 ms" in text
    assert "with every ffn and heads unit removed the model still takes 1 ms (14% of the file as given)" in text
    assert "Ask for at least 15%" in text


def test_the_plan_says_what_was_asked_and_how_it_was_decided() -> None:
    data = calibration(BERT)
    chosen = settings(["heads", "ffn", "residual-sum"], target_macs="60%", importance="energy", exclude=["layer.1.ffn"], finishing=False)
    decision = search(load(zoo.path(BERT)), data, chosen)
    plan = decision.plan
    assert (plan.target, plan.passes, plan.rewrites) == ("macs=60%", ("heads", "ffn", "residual-sum"), ("residual-sum",))
    assert plan.int8 is None
    assert plan.example == {name: (8, *array.shape[1:]) for name, array in data.inputs.items()}
    assert plan.recipe["importance"] == "energy"
    assert plan.recipe["calibration_sha256"] == decision.calibration.sha256
    assert plan.objective["output"] == "logits"
    assert "layer.1.ffn" not in plan.kept
    assert plan.units == {site.name: site.units for site in decision.study.sites}
    assert summary(decision.study.sites, plan) == [
        {"site": site.name, "kind": site.kind, "units": site.units, "kept": len(plan.kept[site.name])} for site in decision.study.sites
    ]


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    def plan(seed: int) -> str:
        chosen = settings(target_macs="60%", seed=seed, rounds=2, finishing=False)  # what the clock decides may differ
        return search(load(zoo.path(BERT)), calibration(BERT), chosen).plan.sha256

    assert plan(0) == plan(0) != plan(1)


def test_labels_can_be_the_loss() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 32)
    chosen = settings(target_macs="60%", loss="labels", rounds=1, compensation="none")
    with pytest.raises(InputError, match="--loss labels needs a 'labels' array"):
        search(load(zoo.path(BERT)), calibration(BERT), chosen)
    by_label = search(load(zoo.path(BERT)), calibration(BERT, labels=labels), chosen)
    drawn = search(load(zoo.path(BERT)), calibration(BERT, labels=labels), settings(target_macs="60%", rounds=1, compensation="none"))
    assert by_label.plan.kept != drawn.plan.kept


# --- as fast as the loss allows ----------------------------------------------------------------------------------------------------


def held_back_loss(decision: Decision) -> float:
    shipped = execute(decision.study.anatomy, decision.plan)
    return compare(decision.study.given, shipped, decision.held_back, decision.objective, settings().runtime).loss[1]


def counts(decision: Decision) -> dict[str, int]:
    return {site: len(units) for site, units in decision.plan.kept.items()}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("limit", [0.15, 0.4])
def test_auto_decides_on_the_last_model_that_loses_no_more_than_allowed(
    limit: float, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clockwork(monkeypatch)
    data = calibration(BERT, 64, labels=np.random.default_rng(3).integers(0, 3, 64) if labelled else None)
    decision = search(load(zoo.path(BERT)), data, settings(max_drop=limit))
    losses = [max(entry["accuracy drop" if labelled else "1 - agreement"], entry["expected drop"]) for entry in decision.trail]
    allowed = [entry for entry, loss in zip(decision.trail, losses, strict=True) if loss <= limit]
    assert counts(decision) == allowed[-1]["kept"]
    assert sum(loss > limit for loss in losses) <= 2, "it stops at the first step that loses too much, and tries half of it"
    assert decision.predicted < decision.finished_cost
    assert decision.goal is None


def test_auto_chooses_by_rows_that_neither_decide_nor_report() -> None:
    premises = prepare(study_of(), calibration(BERT), settings(), None)
    parts = [part.inputs["input_ids"] for part in (premises.calibration, premises.judges, premises.held_back)]
    assert [len(part) for part in parts] == [24, 4, 4]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 32
    with_target = prepare(study_of(), calibration(BERT), settings(target_macs="50%"), None)
    assert len(with_target.held_back) == 8


def test_auto_gives_up_when_the_first_step_loses_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    with pytest.raises(TargetError, match="no pruned model stays within --max-drop 0% on 8 held-back rows; allow a larger drop"):
        search(load(zoo.path(GPT2)), calibration(GPT2), settings(max_drop="0%", compensation="none"))


def test_auto_takes_out_all_that_nothing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    decision = search(easy_model(BERT), calibration(BERT, 64), settings(max_drop="1%"))
    assert held_back_loss(decision) <= 0.01
    kept, units = decision.plan.kept, decision.plan.units
    assert sum(map(len, kept.values())) <= 0.5 * sum(units.values())


def test_auto_measures_what_it_decided_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    decision = search(easy_model(BERT), calibration(BERT), settings(max_drop="5%"))
    table = linear_table(decision.study.sites)
    assert decision.measured == pytest.approx(table.predict(counts(decision)))


# --- re-anchoring ------------------------------------------------------------------------------------------------------------------


def test_a_latency_that_misses_is_decided_again_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    slower = 1.15

    def measure(self: Any, student: Student, *rest: Any) -> float:
        return slower * linear_table(self.bench.sites).predict(student.counts)

    monkeypatch.setattr(meter.Meter, "measure", measure)
    decision = search(load(zoo.path(BERT)), calibration(BERT), settings(target_latency="60%", rounds=2))
    first, *more = decision.trail
    assert decision.goal == pytest.approx(4.2)
    assert first["measured"] / decision.goal == pytest.approx(slower, abs=0.03)
    assert more
    assert abs(decision.measured / decision.goal - 1) < abs(first["measured"] / decision.goal - 1)
    assert decision.measured == pytest.approx(decision.goal, rel=0.03)
    assert decision.table.predict({site: len(units) for site, units in decision.plan.kept.items()}) == pytest.approx(
        decision.measured, rel=0.03
    )


def test_a_table_that_was_far_off_leads_to_a_new_descent_of_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    slower, rounds = 1.3, []
    real = anchor.descend

    def measure(self: Any, student: Student, *rest: Any) -> float:
        return slower * linear_table(self.bench.sites).predict(student.counts)

    def watched(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        rounds.append(found.rounds if found else None)
        return found

    monkeypatch.setattr(meter.Meter, "measure", measure)
    monkeypatch.setattr(anchor, "descend", watched)
    decision = search(load(zoo.path(BERT)), calibration(BERT), settings(target_latency="90%", rounds=4))
    assert rounds == [1, 2], "one cut of a third would be too deep"
    assert decision.measured == pytest.approx(decision.goal, rel=0.03)


def test_where_nothing_was_cut_and_the_clock_disagrees_it_is_cut_after_all() -> None:
    bench = workbench(BERT, count=8, importance="magnitude", compensation="none")
    start = dense_student(bench.anatomy, bench.sites)
    table = linear_table(bench.sites)
    real = table.scaled(1.05)
    found = anchor.reach(
        bench,
        table,
        table.full,
        start,
        first=None,
        shape=None,
        error=None,
        measure=lambda student: real.predict(student.counts),
        note=lambda *step: None,
    )
    assert found is not None
    assert 0.9 * table.full < found.measured <= table.full * 1.02
    assert found.table.predict(found.student.counts) == pytest.approx(found.predicted)


@pytest.mark.parametrize(("passes", "used"), [("heads,ffn", 0.98), ("heads,ffn,int8", 0.7)])
def test_bytes_are_those_of_the_file(passes: str, used: float, tmp_path: Path) -> None:
    chosen = settings(passes, target_size="60%", importance="magnitude", compensation="none", rounds=1)
    decision = search(load(zoo.path(BERT)), calibration(BERT), chosen)
    written = execute(decision.study.anatomy, decision.plan).save(tmp_path / "small.onnx")
    assert decision.goal is not None
    assert written.stat().st_size == pytest.approx(decision.measured, rel=0.015), "short of room for a stamp"
    assert used * decision.goal <= decision.measured <= decision.goal


@pytest.mark.parametrize("over", [1.0, 1.004, 1.02])
def test_down_to_the_floor_there_is_a_choice_where_sites_share_a_product(over: float) -> None:
    """Of heads and of directions inside them: the cost of each is bounded as if the other stayed whole."""
    premises = prepare(
        understand(load(zoo.path(VIT)), settings("heads,ffn,qk,vo")), calibration(VIT), settings("heads,ffn,qk,vo", target_macs="60%"), None
    )
    table = premises.meter.tables(Shipping(premises.study.anatomy, (), premises.calibration, premises.settings.runtime))[0].floats
    rng = np.random.default_rng(0)
    scores = Scores({site.name: rng.exponential(size=site.units) for site in premises.bench.sites})
    kept = choose(premises.bench, premises.dense, scores, table, over * table.floor)
    assert kept is not None
    assert table.predict({site: len(units) for site, units in kept.items()}) <= over * table.floor * (1 + 1e-9)


def test_a_latency_that_fits_is_not_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)

    def measure(self: Any, student: Student, *rest: Any) -> float:
        return 4.2

    monkeypatch.setattr(meter.Meter, "measure", measure)
    decision = search(load(zoo.path(BERT)), calibration(BERT), settings(target_latency="60%", rounds=1))
    assert [entry["step"] for entry in decision.trail] == ["anchor 0"]
    assert decision.measured == 4.2


@pytest.mark.parametrize(
    ("answers", "taken"), [((4.6, 4.3, 5.0), 1), ((4.6, 4.0, 4.3), 1), ((3.0, 4.5, 3.8), 2), ((4.4, 4.201, 4.19), 1)], ids=str
)
def test_of_several_tries_the_nearest_is_taken_and_rather_too_fast_than_too_slow(
    answers: tuple[float, ...], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clockwork(monkeypatch)
    measured: list[dict[str, int]] = []

    def measure(self: Any, student: Student, *rest: Any) -> float:
        measured.append(student.counts)
        return answers[len(measured) - 1]

    monkeypatch.setattr(meter.Meter, "measure", measure)
    chosen = settings(target_latency="60%", rounds=1, compensation="none", importance="magnitude")
    decision = search(load(zoo.path(BERT)), calibration(BERT), chosen)
    assert decision.measured == answers[taken]
    assert counts(decision) == measured[taken]


def test_a_student_is_timed_against_the_file_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the ratio of both in one run counts, so a machine that has become slower since the table was made does no harm."""
    premises = prepare(study_of(), calibration(BERT), settings(target_latency="60%"), None)
    shipping = Shipping(premises.study.anatomy, (), premises.calibration, premises.settings.runtime)

    def timing(calls: Any, **options: Any) -> Any:
        assert set(calls) == {"given", "pruned"}
        for call in calls.values():
            call()
        return Timings({"given": np.array([2.0, 4, 6]), "pruned": np.array([1.0, 2, 3])}, "thread", None)

    monkeypatch.setattr(meter, "time_sessions", timing)
    assert premises.meter.measure(premises.dense, 7.0, shipping) == 3.5


def test_arrays_of_the_cases_have_mixed_lengths() -> None:
    assert len(set(arrays(BERT)["attention_mask"].sum(axis=1))) > 4


# --- classes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_protected_classes_agree_as_often_as_without_or_more(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[str, float]] = []
    note = Trail.note

    def noting(self: Any, step: str, *args: Any, **losses: float) -> None:
        judged.extend((step, value) for name, value in losses.items() if name == "agreement of the worst class")
        note(self, step, *args, **losses)

    monkeypatch.setattr(Trail, "note", noting)
    options: dict[str, Any] = {"target_macs": "45%", "importance": importance, "compensation": "none", "rounds": 1, "finishing": False}
    rows = calibration(VIT, 96)
    plain = search(load(zoo.path(VIT)), rows, settings(**options))
    by_class = search(load(zoo.path(VIT)), rows, settings(**{**options, "importance": "classwise"}))
    assert judged == []
    guarded = search(load(zoo.path(VIT)), rows, settings(**options, protect_classes=True))
    (first, without), (second, other) = judged
    assert (first, second) == (f"worst class by {importance}", "worst class by classwise")
    expected = by_class if other > without else plain
    assert guarded.plan.kept == expected.plan.kept
    assert guarded.plan.recipe["protect_classes"]
    assert "protect_classes" not in plain.plan.recipe


@pytest.mark.parametrize(("worst", "chosen"), [((0.5, 0.4), "magnitude"), ((0.4, 0.5), "classwise"), ((0.5, 0.5), "magnitude")])
def test_the_guard_takes_the_better_worst_class_and_changes_nothing_on_a_tie(
    worst: tuple[float, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"target_macs": "45%", "importance": "magnitude", "compensation": "none", "rounds": 1, "finishing": False}
    values = iter(worst)
    with monkeypatch.context() as judged:
        judged.setattr(Premises, "judge", lambda *args: SimpleNamespace(worst_class=WorstClass(0, next(values), 9)))
        decision = search(load(zoo.path(VIT)), calibration(VIT, 96), settings(**options, protect_classes=True))
    alone = search(load(zoo.path(VIT)), calibration(VIT, 96), settings(**{**options, "importance": chosen}))
    assert decision.plan.kept == alone.plan.kept


def test_classes_are_protected_only_where_there_are_some() -> None:
    with pytest.raises(InputError, match="needs one class per sample, and output 'logits' has none"):
        search(load(zoo.path(GPT2)), calibration(GPT2), settings(target_macs="60%", protect_classes=True, rounds=1, finishing=False))
    with pytest.raises(InputError, match="give a target with a value"):
        settings(protect_classes=True)
    with pytest.raises(InputError, match="no pass that removes units runs"):
        search(load(zoo.path(VIT)), calibration(VIT), settings("int8", target_size="50%", protect_classes=True))
    with pytest.raises(InputError, match="of 1 rows that judge no class has five"):
        prepare(study_of(VIT), calibration(VIT, 8), settings(target_macs="60%", protect_classes=True), None)
    premises = prepare(study_of(VIT), calibration(VIT, 96), settings(target_macs="60%", protect_classes=True), None)
    with pytest.raises(InputError, match="this node: why; --protect-classes needs gradients"):
        premises.without_gradients(NoGradient("this node: why"))
