"""A model that is walked piece by piece gives what it gives in one go."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import onnxprune
from onnxprune.graph import paged, storage
from onnxprune.graph.model import load
from onnxprune.options import settings
from onnxprune.passes.rounds import cut, score
from onnxprune.passes.workbench import Workbench, dense_student
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.passes.cases import BERT, LLAMA, VIT, arrays, workbench

PIECE = 16384


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PIECE_BYTES", PIECE)


def in_pieces(bench: Workbench) -> Workbench:
    model = replace(bench.anatomy.model, paged=True)
    return replace(bench, anatomy=replace(bench.anatomy, model=model))


@pytest.mark.parametrize(("name", "importance"), [(BERT, "energy"), (VIT, "fisher"), (LLAMA, "fisher")])
def test_scores_are_those_of_one_session(name: str, importance: str) -> None:
    whole = workbench(name, importance=importance)
    parts = in_pieces(whole)
    first = score(whole, dense_student(whole.anatomy, whole.sites), 1).saliency
    second = score(parts, dense_student(parts.anatomy, parts.sites), 1).saliency
    assert first.keys() == second.keys()
    for site, values in first.items():
        np.testing.assert_allclose(second[site], values, rtol=1e-4, atol=1e-5 * values.max())


def test_gradients_of_a_pruned_student_are_those_of_one_session() -> None:
    """Sites without units have no mask, and adjoints pass their layers all the same."""
    whole = workbench(BERT, importance="block-fisher")
    kept = {site.name: np.arange(site.units // 2) for site in whole.sites}
    kept[whole.sites[-1].name] = np.arange(0)
    found = []
    for bench in (whole, in_pieces(whole)):
        student = cut(bench, kept)
        found.append(score(bench, student, 2).gradients)
    assert found[0]
    assert found[1]
    for site, values in found[0].items():
        np.testing.assert_allclose(found[1][site], values, rtol=1e-3, atol=1e-4 * np.abs(values).max(initial=0))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnxprune.PruneResult, onnxprune.PruneResult]:
    """The same run of a small model, as it is and as if it were large."""
    folder = tmp_path_factory.mktemp("both")
    given = load(zoo.path(BERT)).save(folder / "given.onnx", external_data=True)
    options: dict[str, Any] = {"calib": arrays(BERT, 32), "target_macs": "60%", "rounds": 1, "importance": "fisher"}
    with pytest.MonkeyPatch.context() as patch:
        whole = onnxprune.prune(given, output=folder / "whole.onnx", finishing=False, bench_seconds=0, **options)
        patch.setattr(paged, "PIECE_BYTES", PIECE)
        patch.setattr(storage, "LARGE_BYTES", 0)
        parts = onnxprune.prune(given, output=folder / "parts.onnx", **options)
    return whole, parts


def test_the_plan_is_the_same(both: tuple[onnxprune.PruneResult, onnxprune.PruneResult]) -> None:
    whole, parts = both
    assert whole.model is not None
    assert not whole.model.paged
    assert parts.model is not None
    assert parts.model.paged
    assert parts.plan.kept == whole.plan.kept
    assert parts.plan.changes.keys() == whole.plan.changes.keys()
    for place, values in whole.plan.changes.items():
        np.testing.assert_allclose(parts.plan.changes[place], values, rtol=1e-3, atol=1e-3 * np.abs(values).max())


def test_what_is_written_computes_the_same(both: tuple[onnxprune.PruneResult, onnxprune.PruneResult]) -> None:
    whole, parts = both
    assert parts.fidelity is not None
    assert parts.fidelity.passed
    assert parts.output is not None
    assert parts.output.with_name("parts.onnx.data").exists()
    feeds = zoo.feeds(BERT)
    (expected,), (found,) = (run(open_session(str(result.output)), feeds) for result in (whole, parts))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_weights_of_a_large_model_stay_in_files(both: tuple[onnxprune.PruneResult, onnxprune.PruneResult]) -> None:
    _, parts = both
    assert parts.model is not None
    assert parts.plan.changes
    assert [name for name, array in parts.model.weights.items() if not in_a_file(array)] == []
    assert [place for place, array in parts.plan.changes.items() if not in_a_file(array)] == []


def in_a_file(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_a_large_model_is_not_timed_for_a_counted_target(both: tuple[onnxprune.PruneResult, onnxprune.PruneResult]) -> None:
    model = dense_student(in_pieces(workbench(BERT)).anatomy, ()).model
    assert not settings(target_macs="60%").may_time(model)
    assert settings(target_latency="60%").may_time(model)
    assert settings(target_macs="60%").may_time(replace(model, paged=False))


def test_steps_that_a_large_model_goes_without_are_named(both: tuple[onnxprune.PruneResult, onnxprune.PruneResult]) -> None:
    whole, parts = both
    assert whole.record["skipped"] == []
    assert [skipped["step"] for skipped in parts.record["skipped"]] == ["finishing", "benchmark"]
    assert all("1.5 GiB" in skipped["reason"] for skipped in parts.record["skipped"])
    assert parts.record["rewrites"] == []


def test_a_plan_replays_in_pieces(both: tuple[onnxprune.PruneResult, onnxprune.PruneResult], monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts = both
    monkeypatch.setattr(storage, "LARGE_BYTES", 0)
    assert parts.output is not None
    assert parts.model is not None
    again = onnxprune.apply(parts.output.with_name("given.onnx"), parts.plan)
    assert again.weights.keys() == parts.model.weights.keys()
    assert all(np.array_equal(again.weights[name], array) for name, array in parts.model.weights.items())


def test_scores_that_a_large_model_goes_without_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LARGE_BYTES", 0)
    brief: dict[str, Any] = {"calib": arrays(BERT, 32), "target_macs": "60%", "rounds": 1, "finishing": False, "dry_run": True}
    (skipped,) = onnxprune.prune(zoo.path(BERT), **brief).record["skipped"]
    assert skipped["step"] == "elimination under curvature"
    assert "scored by fisher" in skipped["reason"]
