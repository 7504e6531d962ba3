"""A short distillation: it follows the dense model, and never ships what is worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxprune
from onnxprune.graph.model import load
from onnxprune.passes import polish as module
from onnxprune.passes.polish import Polished, polish
from onnxprune.passes.rounds import cut
from onnxprune.passes.workbench import Student, Workbench
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.verification import Yardstick
from tests import zoo
from tests.passes.cases import BERT, GPT2, VIT, arrays, calibration, workbench

COUNTED: dict[str, Any] = {"target_macs": "70%", "finishing": False, "bench_seconds": 0}


def halved(bench: Workbench) -> Student:
    return cut(bench, {site.name: np.arange(site.units // 2) for site in bench.sites})


@pytest.mark.parametrize("name", [BERT, VIT, GPT2])
def test_a_pruned_model_comes_nearer_to_the_dense_one(name: str) -> None:
    bench = workbench(name)
    student, data = halved(bench), calibration(name)
    yardstick = Yardstick(bench.anatomy.model, calibration(name, 64).take(slice(32, 64)), bench.objective, RuntimeOptions())
    found = polish(bench, student, bench.anatomy.model, data, yardstick, epochs=4)
    assert isinstance(found, tuple)
    better, report = found
    assert report.epoch > 0
    assert report.after < report.before
    assert yardstick(better.model) == pytest.approx(report.after)
    assert better.kept is student.kept


def test_what_did_not_get_better_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP", 10.0)
    bench = workbench(BERT)
    student = halved(bench)
    yardstick = Yardstick(bench.anatomy.model, calibration(BERT), bench.objective, RuntimeOptions())
    found = polish(bench, student, bench.anatomy.model, calibration(BERT), yardstick, epochs=2)
    assert isinstance(found, tuple)
    assert found[0] is student
    assert found[1] == Polished(yardstick(student.model), yardstick(student.model), 0, 2)


def test_a_step_that_is_too_long_becomes_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP", 1.0)
    bench = workbench(BERT)
    yardstick = Yardstick(bench.anatomy.model, calibration(BERT, 64).take(slice(32, 64)), bench.objective, RuntimeOptions())
    found = polish(bench, halved(bench), bench.anatomy.model, calibration(BERT), yardstick, epochs=10)
    assert isinstance(found, tuple)
    assert found[1].epoch > 1
    assert found[1].after < found[1].before


def test_a_run_polishes_and_its_plan_replays_the_bytes(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("out.onnx", "twice.onnx", "again.onnx", "run")}
    brief = {**COUNTED, "calib": arrays(BERT, 64), "passes": "heads,ffn,polish"}
    result = onnxprune.prune(zoo.path(BERT), output=paths["out.onnx"], run_dir=paths["run"], **brief)
    polished = result.record["polish"]
    assert polished["after"] <= polished["before"]
    onnxprune.prune(zoo.path(BERT), output=paths["twice.onnx"], **brief)
    onnxprune.apply(zoo.path(BERT), paths["run"] / "plan.json", output=paths["again.onnx"])
    assert paths["out.onnx"].read_bytes() == paths["twice.onnx"].read_bytes() == paths["again.onnx"].read_bytes()
    unpolished = onnxprune.prune(zoo.path(BERT), **{**brief, "passes": "heads,ffn"})
    assert load(paths["out.onnx"]).parameters == unpolished.model.parameters if unpolished.model else False
    assert unpolished.record["polish"] is None


def test_a_model_that_lost_nothing_has_nothing_to_learn() -> None:
    brief = {**COUNTED, "target_macs": "100%", "calib": arrays(BERT, 32), "passes": "heads,polish", "write_unpruned": True}
    assert onnxprune.prune(zoo.path(BERT), **brief).record["polish"] is None
