"""The layers pass from data to file: what is replaced, that a plan replays it, that it is never worse for it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxprune
from onnxprune.calibration.source import load_calibration
from onnxprune.calibration.stream import stream
from onnxprune.errors import InputError, NothingPrunable, TargetError
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.depth import with_depths
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.layers import Sublayer, find_sublayers, substitute
from onnxprune.graph.model import Model, load
from onnxprune.graph.view import GraphView
from onnxprune.options import settings
from onnxprune.passes import layers, shallow
from onnxprune.passes.decision import Decision
from onnxprune.passes.layers import fitted, site_names
from onnxprune.passes.manager import decide
from onnxprune.passes.rows import split
from onnxprune.passes.scope import Study
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from onnxprune.verification import Yardstick
from tests import zoo
from tests.passes.cases import BERT, VIT, arrays

COUNTED: dict[str, Any] = {"finishing": False, "bench_seconds": 0}
"""Without asking the clock."""


@pytest.fixture
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with random weights have no sublayers that could be spared."""
    monkeypatch.setattr(layers, "COLLAPSE", float("inf"))
    monkeypatch.setattr(shallow, "COLLAPSE", float("inf"))


@pytest.mark.usefixtures("unbounded")
@pytest.mark.parametrize("name", [BERT, VIT])
def test_depth_alone_meets_the_target_and_its_plan_replays_the_bytes(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"passes": "layers", "target_macs": "70%", **COUNTED}
    result = onnxprune.prune(zoo.path(name), calib=arrays(name), output=tmp_path / "out.onnx", run_dir=tmp_path / "run", **options)
    assert result.record["target"]["measured"] <= 0.705 * result.record["target"]["given"]
    assert len(result.record["layers"]) == len(result.plan.layers) > 0
    assert "replaced by" in result.plan.explain()
    onnxprune.apply(zoo.path(name), tmp_path / "run" / "plan.json", output=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


@pytest.mark.usefixtures("unbounded")
def test_what_is_written_computes_the_dense_graph_with_its_substitutes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"passes": "layers", "target_macs": "70%", **COUNTED}
    result = onnxprune.prune(zoo.path(BERT), calib=arrays(BERT), output=tmp_path / "out.onnx", **options)
    model, profile = canonicalise(load(zoo.path(BERT)))
    meaning = substitute(model, find_sublayers(GraphView(model), profile), result.plan.layers)
    feeds = {name: array[:4] for name, array in arrays(BERT).items() if name in model.input_names}
    for want, got in zip(run(open_session(meaning), feeds), run(open_session(load(tmp_path / "out.onnx")), feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.usefixtures("unbounded")
def test_of_the_search_with_all_sublayers_and_the_one_with_fewer_the_better_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shallow, "_HALF", float("inf"))  # any depth is tried
    decisions: list[Decision] = []

    def recorded(*arguments: Any) -> Decision:
        decisions.append(decide(*arguments))
        return decisions[-1]

    monkeypatch.setattr(shallow, "decide", recorded)
    options: dict[str, Any] = {"passes": "layers,heads,ffn", "target_macs": "60%", **COUNTED}
    plan = onnxprune.plan(zoo.path(BERT), calib=arrays(BERT), **options)
    assert [bool(decision.plan.layers) for decision in decisions] == [False, True]
    given, data = load(zoo.path(BERT)), load_calibration(arrays(BERT), load(zoo.path(BERT)))
    _, held = split(data, settings(**{name: value for name, value in options.items() if name != "bench_seconds"}))
    judges = held.take(slice(0, len(held) // 2))  # the others report
    error = Yardstick(given, judges, decisions[0].objective, RuntimeOptions(threads=1))
    errors = [error(decision.shipping.ship(decision.student)) for decision in decisions]
    assert plan.layers == decisions[int(np.argmin(errors))].plan.layers
    assert plan.kept == decisions[int(np.argmin(errors))].plan.kept


def test_maps_come_nearer_to_the_stream_than_thin_maps_and_those_nearer_than_constants() -> None:
    given = load(zoo.path(BERT))
    model, profile = canonicalise(given)
    data = load_calibration(arrays(BERT), given)
    sublayers, options = find_sublayers(GraphView(model), profile), RuntimeOptions(threads=1)

    def stream_of(changed: Model, sublayer: Sublayer) -> np.ndarray:
        (name,) = sublayer.join.outputs
        rows = []
        for batch, values in stream(with_outputs(changed, [name], keep=False), data, [name], options=options):
            found = values[name].reshape(-1, sublayer.width)
            rows.append(found[batch.real_rows(len(found))])
        return np.concatenate(rows)

    for name, kinds in fitted(model, model, sublayers, data, options).items():
        (sublayer,) = (each for each in sublayers if each.name == name)
        wanted = stream_of(model, sublayer)
        errors = [
            float(np.square(stream_of(substitute(model, sublayers, {name: kinds[kind]}), sublayer) - wanted).sum())
            for kind in ("map", "thin map", "constant", "nothing")
        ]
        assert errors == sorted(errors)
        assert errors[0] < 0.9 * errors[2]


def test_protected_sublayers_stay() -> None:
    options: dict[str, Any] = {"passes": "layers", "target_macs": "70%", **COUNTED}
    with pytest.raises(NothingPrunable, match="OP801 layers: no sublayer can be replaced: all of them are protected"):
        onnxprune.plan(zoo.path(BERT), calib=arrays(BERT), keep=["layer"], **options)


def test_an_attention_is_known_by_its_heads_whatever_else_is_cut_in_it() -> None:
    model, profile = canonicalise(load(zoo.path(VIT)))
    known = with_depths(study(model, profile))
    names = [site_names(each, known) for each in find_sublayers(known.view, known.profile)]
    assert ("layer.0.heads", "layer.0.qk", "layer.0.vo") in names
    assert ("layer.0.ffn",) in names


@pytest.mark.parametrize(("pattern", "found"), [("layer.9", "matches no site"), ("(", "is not a regular expression")])
def test_patterns_are_those_of_sublayers_too(pattern: str, found: str) -> None:
    options: dict[str, Any] = {"target_macs": "70%", "calib": arrays(BERT), **COUNTED}
    with pytest.raises(InputError, match=found):
        onnxprune.plan(zoo.path(BERT), passes="layers", keep=[pattern], **options)


@pytest.mark.usefixtures("unbounded")
def test_rows_that_choose_what_goes_are_not_in_the_report_and_polish_follows_the_model_as_given() -> None:
    options: dict[str, Any] = {"passes": "layers,polish", "target_macs": "70%", "calib": arrays(BERT, 64), **COUNTED}
    result = onnxprune.prune(zoo.path(BERT), **options)
    assert result.comparison is not None
    assert result.comparison.samples == 8
    assert result.record["polish"]["after"] < result.record["polish"]["before"]


@pytest.mark.usefixtures("unbounded")
def test_a_target_out_of_reach_says_how_far_depth_goes() -> None:
    with pytest.raises(TargetError, match=r"with 5 of the sublayers replaced the model still takes"):
        onnxprune.plan(zoo.path(BERT), calib=arrays(BERT), passes="layers", target_macs="0.1%", **COUNTED)


@pytest.mark.usefixtures("unbounded")
def test_without_a_target_depth_steps_back_where_other_rows_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []

    def refused(study_: Study, *arguments: Any) -> Decision:
        depths.append(len(study_.shallow.replaced) if study_.shallow else 0)
        raise TargetError("other rows lose more")

    monkeypatch.setattr(shallow, "decide", refused)
    with pytest.raises(TargetError):
        onnxprune.plan(zoo.path(BERT), calib=arrays(BERT), passes="layers", max_drop="99%", finishing=False)
    assert depths == list(range(depths[0], -1, -1))
    assert depths[0] > 1


def test_families_are_decided_without_depth(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layers is decided anew for every target"):
        onnxprune.family(
            zoo.path(BERT), targets="80%", quantity="macs", calib=arrays(BERT), output=tmp_path / "small.onnx", passes="layers,ffn"
        )
