"""The passes qk and vo from the model to the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import onnxprune
from onnxprune.errors import InputError, NothingPrunable
from onnxprune.graph.depth import with_depths
from onnxprune.graph.macs import total_macs
from onnxprune.graph.model import load
from onnxprune.graph.profile import shapes_of
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.turning import turned
from onnxprune.importance.registry import CRITERIA
from onnxprune.options import settings
from onnxprune.passes.choice import choose
from onnxprune.passes.depth import choose_bases
from onnxprune.passes.rounds import cut, score
from onnxprune.passes.scope import understand
from onnxprune.passes.workbench import Scores, dense_student
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.search.costs import counted_costs
from onnxprune.search.plan import load_plan
from tests import zoo
from tests.graph.pruning import random_kept
from tests.passes.cases import BERT, LLAMA, VIT, anatomy, arrays, calibration, linear_table, workbench


@pytest.mark.parametrize(("name", "passes", "share"), [(VIT, "qk", 0.7), (BERT, "heads,ffn,qk,vo", 0.6), (LLAMA, "vo", 0.94)])
def test_a_run_keeps_its_target_and_its_plan_needs_no_data(name: str, passes: str, share: float, tmp_path: Path) -> None:
    result = onnxprune.prune(
        zoo.path(name),
        calib=arrays(name, 64),
        passes=passes,
        target_macs=f"{100 * share:g}%",
        rounds=1,
        output=tmp_path / "small.onnx",
        bench_seconds=0,
    )
    feeds = {key: array[:1] for key, array in arrays(name, 8).items()}
    before, after = (total_macs(model, shapes_of(model, feeds)) for model in (load(zoo.path(name)), load(tmp_path / "small.onnx")))
    assert 0.9 * share * before < after <= share * before
    assert result.record["verification"]["masked_equals_sliced"]["passed"]
    assert {site["kind"] for site in result.record["sites"]} == set(passes.split(","))
    plan = load_plan(result.plan.save(tmp_path / "plan.json"))
    onnxprune.apply(zoo.path(name), plan, output=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "small.onnx").read_bytes()


@pytest.mark.parametrize(("name", "kind"), [(VIT, "qk"), (BERT, "qk"), (BERT, "vo"), (LLAMA, "vo")])
def test_the_first_directions_of_the_chosen_basis_are_worth_more_than_as_many_dimensions(name: str, kind: str) -> None:
    known = with_depths(anatomy(name), {kind})
    batches = list(calibration(name, 32).batches(8, trim=True))
    other = turned(known, choose_bases(known, known.sites, batches, RuntimeOptions()))
    feeds = zoo.feeds(name, batch=8, seed=9)
    kept = {site.name: np.arange(site.units * 3 // 4) for site in known.of_kind([kind])}
    whole, plain, best = (
        run(open_session(model), {key: feeds[key] for key in model.input_names})[0]
        for model in (known.model, slice_model(known, kept), slice_model(other, kept))
    )
    assert np.square(best - whole).sum() < 0.8 * np.square(plain - whole).sum()


@pytest.mark.parametrize("name", [BERT, VIT, LLAMA])
def test_costs_of_heads_and_of_their_depth_multiply(name: str) -> None:
    known = with_depths(anatomy(name))
    feeds = zoo.feeds(name)
    for sites in (known.sites, known.of_kind(["qk", "vo"]), known.of_kind(["heads", "vo"])):
        table = counted_costs(known, sites, "macs", feeds)
        for seed in range(2):
            kept = random_kept(sites, np.random.default_rng(seed))
            sliced = slice_model(known, kept)
            assert table.predict({site: len(units) for site, units in kept.items()}) == pytest.approx(
                total_macs(sliced, shapes_of(sliced, feeds)), rel=1e-9
            )


@pytest.mark.parametrize("importance", [name for name in CRITERIA if name != "leave-one-out"])
def test_depth_of_heads_that_are_gone_is_worth_nothing(importance: str) -> None:
    depths = ("qk", "vo") if CRITERIA[importance].needs in ("gradients", "curvature", "classes") else ("vo",)
    known = with_depths(anatomy(VIT), depths)
    bench = replace(workbench(VIT, importance=importance), anatomy=known, sites=known.of_kind(["heads", "ffn", *depths]))
    kept = {site.name: np.arange(site.units) for site in bench.sites}
    student = cut(bench, {**kept, "layer.1.heads": np.arange(0)})
    scores = score(bench, student, 1).saliency
    assert {site: len(saliency) for site, saliency in scores.items()} == student.counts
    for kind in depths:
        assert not scores[f"layer.1.{kind}"].any()
        assert scores[f"layer.0.{kind}"].any()


def test_time_can_go_down_to_the_least_depth() -> None:
    known = with_depths(anatomy(VIT))
    bench = replace(workbench(VIT), anatomy=known, sites=known.of_kind(["heads", "qk"]))
    scores = Scores({site.name: np.arange(1.0, site.units + 1) for site in bench.sites})
    table = linear_table(bench.sites)
    least = table.predict({site.name: site.least for site in bench.sites})
    kept = choose(bench, dense_student(known, bench.sites), scores, table, least * 1.001)
    assert kept is not None
    assert {site.name: len(kept[site.name]) for site in bench.sites} == {site.name: site.least for site in bench.sites}


def test_scores_without_gradients_do_not_know_directions_of_queries() -> None:
    with pytest.raises(InputError, match=r"importance 'energy' needs a matrix that reads layer\.0\.qk"):
        onnxprune.prune(zoo.path(BERT), calib=arrays(BERT, 32), passes="qk", importance="energy", target_macs="65%", bench_seconds=0)


def test_a_model_of_rotary_embeddings_says_why_qk_has_nothing() -> None:
    with pytest.raises(NothingPrunable, match=r"(?s)nothing to prune for qk: .*OP105"):
        understand(load(zoo.path(LLAMA)), settings("qk", target_macs="90%"))
