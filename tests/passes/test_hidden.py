"""The hidden pass from data to file: what is narrowed, that a plan replays it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxprune
from onnxprune.calibration.source import load_calibration
from onnxprune.errors import InputError, NothingPrunable
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import Model, load
from onnxprune.graph.stream import find_streams
from onnxprune.graph.view import GraphView
from onnxprune.passes import hidden
from onnxprune.passes.hidden import second_moments
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests import zoo
from tests.passes.cases import BERT, GPT2, VIT, arrays

UNPRUNED: dict[str, Any] = {"target_params": "100%", "finishing": False, "bench_seconds": 0}
"""Only what hidden removes, without asking the clock."""


def outputs(model: Model, rows: dict[str, np.ndarray]) -> list[np.ndarray]:
    return run(open_session(model), {name: rows[name][:4] for name in model.input_names})


@pytest.fixture
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with random weights have no directions that could be spared."""
    monkeypatch.setattr(hidden, "COLLAPSE", float("inf"))


@pytest.mark.usefixtures("unbounded")
def test_a_narrow_file_is_written_and_its_plan_replays_the_bytes(tmp_path: Path) -> None:
    rows = arrays(VIT)
    result = onnxprune.prune(
        zoo.path(VIT), calib=rows, output=tmp_path / "out.onnx", run_dir=tmp_path / "run", passes="hidden", hidden_keep="50%", **UNPRUNED
    )
    (basis,) = result.plan.streams.values()
    assert basis.shape == (64, 32)
    assert load(tmp_path / "out.onnx").parameters < 0.55 * load(zoo.path(VIT)).parameters
    (told,) = result.record["hidden"]
    assert (told["before"], told["after"]) == (64, 32)
    assert 0 < told["left_out"] < 0.5
    again = onnxprune.apply(zoo.path(VIT), tmp_path / "run" / "plan.json", output=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert "32 of 64 directions stay" in result.plan.explain()
    assert all(np.isfinite(array).all() for array in outputs(again, rows))


@pytest.mark.usefixtures("unbounded")
def test_what_follows_sees_the_narrow_model(tmp_path: Path) -> None:
    brief: dict[str, Any] = {**UNPRUNED, "target_params": "40%"}
    result = onnxprune.prune(zoo.path(VIT), calib=arrays(VIT), output=tmp_path / "out.onnx", passes="hidden,ffn", hidden_keep=0.5, **brief)
    assert any(result.plan.removed.values())
    assert load(tmp_path / "out.onnx").parameters <= 0.41 * load(zoo.path(VIT)).parameters


def test_what_collapses_is_refused_with_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "COLLAPSE", 1e-9)
    with pytest.raises(NothingPrunable, match=r"OP604 hidden: with 32 of 64 directions the outputs are off by .* more than 1e-09"):
        onnxprune.prune(zoo.path(VIT), calib=arrays(VIT), output=tmp_path / "out.onnx", passes="hidden", hidden_keep="50%", **UNPRUNED)


@pytest.mark.parametrize(("name", "keep", "code"), [(BERT, "50%", "OP602"), (VIT, "90%", "OP605")])
def test_what_cannot_be_narrowed_is_refused(name: str, keep: str, code: str) -> None:
    with pytest.raises(NothingPrunable, match=code):
        onnxprune.prune(zoo.path(name), calib=arrays(name), passes="hidden", hidden_keep=keep, **UNPRUNED)


def test_a_refusal_leaves_the_other_passes_to_work() -> None:
    plan = onnxprune.plan(zoo.path(BERT), calib=arrays(BERT), passes="hidden,ffn", **{**UNPRUNED, "target_params": "80%"})
    assert "OP602" in {refusal.code for refusal in plan.refusals}
    assert any(plan.removed.values())
    assert not plan.streams


def test_padding_does_not_count() -> None:
    model, profile = canonicalise(load(zoo.path(GPT2)))
    streams, _ = find_streams(GraphView(model), profile)
    rows = arrays(GPT2, count=8)
    rows["attention_mask"][::2, 8:] = 0
    changed = {**rows, "input_ids": np.where(rows["attention_mask"] == 0, 7, rows["input_ids"])}
    found = [second_moments(model, streams, load_calibration(item, model), RuntimeOptions())["stream.0"] for item in (rows, changed)]
    assert (rows["input_ids"] != changed["input_ids"]).any()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": "heads", "hidden_keep": "50%"}, "hidden is not among the passes"),
        ({"passes": "hidden", "hidden_keep": "0%"}, "leaves nothing"),
        ({"passes": "hidden", "calib": "random"}, "real data"),
    ],
)
def test_contradictions_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        onnxprune.prune(zoo.path(VIT), **{"calib": arrays(VIT, count=8), **UNPRUNED, **options})


def test_inspect_tells_which_streams_can_be_narrowed() -> None:
    (stream,) = onnxprune.inspect(zoo.path(VIT))["streams"]
    assert (stream["stream"], stream["width"], stream["norms"]) == ("stream.0", 64, 7)
    answer = onnxprune.inspect(zoo.path(BERT), why="OP602")
    assert not answer["streams"]
    assert "1 place" in answer["why"][0]["summary"]
