"""Rounds of scoring, cutting and re-fitting: budgets, widths, and what a round hands to the next."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import InputError
from onnxprune.graph.macs import total_macs
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of
from onnxprune.importance.registry import CRITERIA
from onnxprune.passes import rounds
from onnxprune.passes.choice import choose
from onnxprune.passes.rounds import CLASS_ROW_SHARE, cut, descend, score
from onnxprune.passes.workbench import Scores, Student, Workbench, dense_student
from onnxprune.runtime.session import open_session, run
from onnxprune.search.costs import CostTable, counted_costs
from tests import zoo
from tests.passes.cases import BERT, GPT2, LLAMA, VIT, linear_table, workbench


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """All students that are cut from here on."""
    seen: list[Student] = []

    def cutting(bench: Workbench, kept: Any) -> Student:
        seen.append(cut(bench, kept))
        return seen[-1]

    monkeypatch.setattr(rounds, "cut", cutting)
    return seen


def counted(bench: Workbench, name: str, unit: Any) -> CostTable:
    feeds = zoo.feeds(name, batch=1, seq=12)
    return counted_costs(bench.anatomy, bench.sites, unit, {key: feeds[key] for key in bench.anatomy.model.input_names})


@pytest.mark.parametrize("name", [BERT, LLAMA])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_each_round_keeps_a_part_of_the_one_before_and_the_budget_holds(name: str, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(name, compensation="none")
    table = counted(bench, name, unit)
    seen = watch(monkeypatch)
    budget = table.fixed + 0.4 * (table.full - table.fixed)
    found = descend(bench, table, budget, 3)
    assert found is not None
    assert found.student is seen[-1]
    assert len(seen) == 3
    for before, after in itertools.pairwise([dense_student(bench.anatomy, bench.sites), *seen]):
        for site, units in after.kept.items():
            assert np.isin(units, before.kept[site]).all()
            assert (np.diff(units) > 0).all()
        assert table.predict(after.counts) < table.predict(before.counts)
    assert table.predict(found.student.counts) <= budget * (1 + 1e-9)
    final = found.student.model
    if unit == "macs":
        feeds = {key: value for key, value in zoo.feeds(name, batch=1, seq=12).items() if key in final.input_names}
        assert total_macs(final, shapes_of(final, feeds)) <= budget * (1 + 1e-9)
    else:
        assert final.parameters <= budget * (1 + 1e-9)


def test_rounds_go_down_by_equal_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(GPT2, count=8, importance="magnitude", compensation="none")
    table = counted(bench, GPT2, "macs")
    seen = watch(monkeypatch)
    prunable = table.full - table.fixed
    descend(bench, table, table.fixed + 0.3 * prunable, 4)
    shares = [(table.predict(student.counts) - table.fixed) / prunable for student in seen]
    np.testing.assert_allclose(shares, 0.3 ** (np.arange(1, 5) / 4), atol=0.02)


@pytest.mark.parametrize("goal", [3.0, 4.5, 6.0])
def test_widths_are_whole_tiles_when_time_is_the_cost(goal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(BERT, count=16, align=16, compensation="none")
    table = linear_table(bench.sites)
    seen = watch(monkeypatch)
    found = descend(bench, table, goal, 3)
    assert found is not None
    widths = [student.counts[site.name] for student in seen for site in bench.sites if site.kind == "ffn"]
    assert all(width % 16 == 0 for width in widths)
    assert min(widths) < zoo.FFN["bert"]
    assert table.predict(found.student.counts) <= goal


def test_counted_costs_need_no_tiles() -> None:
    bench = workbench(BERT, count=16, align=16, compensation="none")
    table = counted(bench, BERT, "params")
    found = descend(bench, table, table.fixed + 0.47 * (table.full - table.fixed), 1)
    assert found is not None
    assert any(found.student.counts[site.name] % 16 for site in bench.sites if site.kind == "ffn")


def test_block_fisher_swaps_units_and_keeps_counts() -> None:
    bench = workbench(BERT)
    table = counted(bench, BERT, "macs")
    rng = np.random.default_rng(0)
    dense = dense_student(bench.anatomy, bench.sites)
    # Units worth what they cost, so that every site loses some and keeps some.
    worth = {site.name: float(table.curves[site.name][1]) ** 0.5 for site in bench.sites}
    gradients = {
        site.name: worth[site.name] * (rng.standard_normal((20, site.units)) + rng.standard_normal((20, 1))) for site in bench.sites
    }
    saliency = {site: np.square(values).mean(axis=0) for site, values in gradients.items()}
    budget = table.fixed + 0.5 * (table.full - table.fixed)
    plain = choose(bench, dense, Scores(saliency), table, budget)
    block = choose(bench, dense, Scores(saliency, gradients), table, budget)
    assert plain is not None
    assert block is not None
    assert {site: len(units) for site, units in plain.items()} == {site: len(units) for site, units in block.items()}
    assert any(not np.array_equal(plain[site], block[site]) for site in plain)
    for site, values in gradients.items():
        lost = [np.square(np.delete(values, units, axis=1).sum(axis=1)).sum() for units in (block[site], plain[site])]
        assert lost[0] <= lost[1] * (1 + 1e-9)


@pytest.mark.parametrize("name", [BERT, VIT])
@pytest.mark.parametrize(
    ("importance", "compensation"), [*((name, "refit") for name in CRITERIA), ("kfac", "scale"), ("kfac", "none"), ("energy", "none")]
)
def test_every_criterion_goes_with_every_compensation(name: str, importance: str, compensation: str) -> None:
    bench = workbench(name, count=16, importance=importance, compensation=compensation)
    table = counted(bench, name, "macs")
    found = descend(bench, table, table.fixed + 0.4 * (table.full - table.fixed), 2)
    assert found is not None
    student, before, scores = found.student, found.before, found.scores
    assert sum(student.counts.values()) < sum(before.counts.values()) < sum(site.units for site in bench.sites)
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in scores.saliency.values())
    assert (scores.gradients is not None) == (importance == "block-fisher")
    assert bool(student.fits) == (compensation != "none")
    assert bool(student.changes) == any(fit.applied for fit in student.fits)
    batch = bench.batches[0]
    assert np.isfinite(run(open_session(student.model), batch.feeds)[0]).all()


def test_importance_by_class_refuses_an_output_without_one_class_per_sample() -> None:
    bench = workbench(GPT2, count=8, importance="classwise")
    with pytest.raises(InputError, match="needs one class per sample, and output 'logits' has none"):
        score(bench, dense_student(bench.anatomy, bench.sites), 1)


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "variance"])
def test_scores_without_a_common_unit_are_worth_the_parameters_of_their_site(importance: str) -> None:
    bench = workbench(BERT, count=8, importance=importance)
    scores = score(bench, dense_student(bench.anatomy, bench.sites), 1).saliency
    for site in bench.sites:
        assert scores[site.name].mean() == pytest.approx(site.parameters_per_unit)
        assert scores[site.name].std() > 0


def test_least_important_units_go_first() -> None:
    bench = workbench(BERT, compensation="none")
    table = counted(bench, BERT, "macs")
    saliency = {site.name: np.arange(site.units, dtype=float)[::-1] for site in bench.sites}
    kept = choose(bench, dense_student(bench.anatomy, bench.sites), Scores(saliency), table, table.fixed + 0.6 * (table.full - table.fixed))
    assert kept is not None
    for units in kept.values():
        assert units.tolist() == list(range(len(units)))


def test_positions_of_a_student_are_told_as_units_of_the_dense_model() -> None:
    bench = workbench(BERT, compensation="none")
    table = counted(bench, BERT, "macs")
    student = cut(bench, {site.name: np.arange(1, site.units, 2) for site in bench.sites})
    saliency = {site: np.arange(count, dtype=float) for site, count in student.counts.items()}
    kept = choose(bench, student, Scores(saliency), table, table.fixed + 0.25 * (table.full - table.fixed))
    assert kept is not None
    for site, units in kept.items():
        assert units.tolist() == student.kept[site].tolist()[len(student.kept[site]) - len(units) :]


def test_the_last_cut_can_be_repeated_from_what_descend_returns() -> None:
    bench = workbench(BERT, count=16, compensation="none")
    table = counted(bench, BERT, "macs")
    budget = table.fixed + 0.5 * (table.full - table.fixed)
    found = descend(bench, table, budget, 3)
    assert found is not None
    student, before, scores = found.student, found.before, found.scores
    again = choose(bench, before, scores, table, budget)
    assert again is not None
    assert {site: units.tolist() for site, units in again.items()} == {site: units.tolist() for site, units in student.kept.items()}


def test_a_budget_below_the_floor_is_not_met() -> None:
    bench = workbench(BERT, count=8, compensation="none")
    table = counted(bench, BERT, "macs")
    assert descend(bench, table, table.floor * 0.99, 2) is None
    dense = dense_student(bench.anatomy, bench.sites)
    assert choose(bench, dense, score(bench, dense, 1), table, table.floor * 0.99) is None


@pytest.mark.parametrize("importance", CRITERIA)
def test_later_rounds_go_on_when_a_site_is_empty(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(BERT, count=16, importance=importance)
    # One attention whose presence costs as much as everything else together is the first thing to go.
    table = linear_table(bench.sites, {"layer.1.heads": 1.0})
    table.curves["layer.1.heads"][1:] *= 8.0  # type: ignore[index]
    seen = watch(monkeypatch)
    found = descend(bench, table, 4.0, 3)
    assert found is not None
    assert [student.counts["layer.1.heads"] for student in seen[1:]] == [0, 0]
    assert len(found.scores.saliency["layer.1.heads"]) == 0
    assert table.predict(found.student.counts) <= 4.0


def test_the_class_row_weighs_a_share_of_the_real_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def refit(anatomy: object, model: Model, *args: object, row_weight: Any, **options: object) -> Any:
        taken.append(row_weight)
        return model, {}, ()

    monkeypatch.setattr(rounds, "refit", refit)
    bench_of_images: Any = None
    for name in (BERT, VIT, GPT2):
        bench = workbench(name, count=8)
        cut(bench, {"layer.0.heads": np.arange(2)})
        bench_of_images = bench if name == VIT else bench_of_images
        if name == GPT2:
            assert taken[-1] is None, "every token is read, so all rows weigh alike"
            continue
        batch = bench.batches[0]
        real = np.ones((8, 17), bool) if batch.token_mask is None else batch.token_mask
        weight = taken[-1](batch, (*real.shape, 32)).reshape(real.shape)
        np.testing.assert_allclose(weight[:, 0], CLASS_ROW_SHARE * real.sum(axis=1), rtol=1e-6)
        assert (weight[:, 1:] == 1).all()
    longer = taken[1](bench_of_images.batches[0], (8, 23, 32))
    assert longer.shape == (8 * 23,), "an image may be larger than the one that shapes were taken from"


def test_nothing_is_fitted_to_a_model_that_lost_nothing() -> None:
    bench = workbench(BERT, count=8)
    student = cut(bench, dense_student(bench.anatomy, bench.sites).kept)
    assert student.model is bench.anatomy.model
    assert student.changes == {}


@pytest.mark.parametrize(("importance", "step"), [("kfac", "curvature"), ("fisher", "mask gradients")])
def test_progress_counts_batches_and_sublayers(importance: str, step: str) -> None:
    calls: list[tuple[str, int, int]] = []
    bench = workbench(BERT, count=16, importance=importance, progress=lambda *call: calls.append(call))
    table = counted(bench, BERT, "macs")
    descend(bench, table, table.fixed + 0.6 * (table.full - table.fixed), 2)
    assert [call for call in calls if call[0] == step] == [(step, done, 2) for done in (1, 2)] * 2
    fits = [call for call in calls if call[0] == "re-fit"]
    assert fits[-1][1] == fits[-1][2]


@pytest.mark.parametrize("unit", ["macs", "params", "ms"])
def test_a_uniform_recipe_keeps_equal_numbers_in_all_layers_and_the_budget(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = workbench(BERT, count=16, compensation="none")
    bench = workbench(BERT, count=16, compensation="none", uniform=True)
    table = linear_table(bench.sites) if unit == "ms" else counted(bench, BERT, unit)
    budget = table.fixed + 0.5 * (table.full - table.fixed)
    seen = watch(monkeypatch)
    found = descend(bench, table, budget, 2)
    assert found is not None
    for student in seen:
        for kind in ("heads", "ffn"):
            assert len({student.counts[site.name] for site in bench.sites if site.kind == kind}) == 1
    assert table.predict(found.student.counts) <= budget * (1 + 1e-9)
    # One more unit of either kind in every layer would not fit: no budget is given away.
    for kind in ("heads", "ffn"):
        sites = [site for site in bench.sites if site.kind == kind]
        step = bench.recipe.align if kind == "ffn" and unit == "ms" else 1
        more = {site.name: min(site.units, found.student.counts[site.name] + step) for site in sites}
        assert table.predict({**found.student.counts, **more}) > budget or all(more[s.name] == found.student.counts[s.name] for s in sites)
    free = descend(uneven, table, budget, 2)
    assert free is not None
    assert any(len({free.student.counts[site.name] for site in bench.sites if site.kind == kind}) > 1 for kind in ("heads", "ffn"))
