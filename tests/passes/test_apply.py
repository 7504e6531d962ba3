"""Replaying a plan: the same bytes wherever and whenever, and only for the file it was made for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxprune
from onnxprune.api import PruneResult
from onnxprune.errors import InputError
from onnxprune.graph.anatomy import study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from onnxprune.passes import shipping
from onnxprune.passes.apply import execute, finish, install
from onnxprune.passes.int8 import Scheme, products_of, tailor
from onnxprune.passes.rounding import round_weights
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.search.plan import Plan, load_plan
from onnxprune.verification import masked_equals_sliced
from tests import zoo
from tests.passes.cases import BERT, GPT2, LLAMA, VIT, anatomy, arrays, brief_benchmarks, calibration

NAMES = [BERT, VIT, GPT2, LLAMA]
REPLAY = """
import sys, onnxprune
model, plan, output = sys.argv[1:]
onnxprune.apply(model, plan, output=output)
"""


@cache
def pruned(name: str) -> PruneResult:
    return onnxprune.prune(zoo.path(name), calib=arrays(name, 128), target_macs="60%", rounds=2, bench_seconds=0)


def keeping(name: str, kept: dict[str, tuple[int, ...]]) -> Plan:
    """A plan of one's own: these units, nothing compensated."""
    units = {site.name: site.units for site in anatomy(name).sites}
    everything = {site: tuple(range(count)) for site, count in units.items()}
    return dataclasses.replace(pruned(name).plan, kept={**everything, **kept}, units=units, changes={})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_gives_the_bytes_that_prune_gave(name: str, tmp_path: Path) -> None:
    result = pruned(name)
    assert result.model is not None
    written = result.model.save(tmp_path / "pruned.onnx")
    assert result.plan.changes, "the plan has compensated weights, so their way through the file is tested as well"
    saved = load_plan(result.plan.save(tmp_path / "plan.json"))
    replayed = execute(study(*canonicalise(load(zoo.path(name)))), saved).save(tmp_path / "replayed.onnx")
    assert sha256(replayed) == sha256(written)


@pytest.mark.parametrize("name", [BERT, LLAMA])
def test_another_process_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    result = pruned(name)
    assert result.model is not None
    written = result.model.save(tmp_path / "pruned.onnx")
    plan = result.plan.save(tmp_path / "plan.json")
    output = tmp_path / "replayed.onnx"
    subprocess.run([sys.executable, "-c", REPLAY, str(zoo.path(name)), str(plan), str(output)], check=True, env={"PYTHONHASHSEED": "7"})
    assert sha256(output) == sha256(written)


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_a_valid_model_of_the_same_signature(name: str, tmp_path: Path) -> None:
    result = pruned(name)
    assert result.model is not None
    path = result.model.save(tmp_path / "pruned.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    sessions = [onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"]) for source in (zoo.path(name), path)]
    for side in ("get_inputs", "get_outputs"):
        before, after = ([(item.name, item.type, item.shape) for item in getattr(session, side)()] for session in sessions)
        assert before == after
    feeds = zoo.feeds(name, batch=2, seq=5)
    given = {item.name: feeds[item.name] for item in sessions[1].get_inputs()}
    assert np.isfinite(sessions[1].run(None, given)[0]).all()


def test_the_file_says_where_it_comes_from() -> None:
    result = pruned(BERT)
    assert result.model is not None
    entries = {entry.key: entry.value for entry in result.model.proto.metadata_props}
    assert entries["onnxprune.version"] == onnxprune.__version__
    assert entries["onnxprune.plan_sha256"] == result.plan.sha256
    assert entries["onnxprune.input_sha256"] == sha256(zoo.path(BERT))
    assert json.loads(entries["onnxprune.kept"]) == {site: len(units) for site, units in result.plan.kept.items()}
    given = {entry.key: entry.value for entry in load(zoo.path(BERT)).proto.metadata_props}
    assert given.items() <= entries.items()


def test_pruning_again_replaces_the_stamp(tmp_path: Path) -> None:
    first = pruned(BERT).model
    assert first is not None
    path = first.save(tmp_path / "once.onnx")
    again = onnxprune.prune(path, calib=arrays(BERT), target_macs="80%", rounds=1, bench_seconds=0, compensation="none")
    assert again.model is not None
    keys = [entry.key for entry in again.model.proto.metadata_props if entry.key.startswith("onnxprune.")]
    assert len(keys) == len(set(keys)) == 4
    assert {entry.key: entry.value for entry in again.model.proto.metadata_props}["onnxprune.input_sha256"] == sha256(path)


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_keep_nothing_can_be_shipped(name: str, tmp_path: Path) -> None:
    kept: dict[str, tuple[int, ...]] = {"layer.0.heads": (), "layer.1.ffn": (), "layer.2.heads": (0,), "layer.2.ffn": (3, 7)}
    plan = keeping(name, kept)
    path = execute(anatomy(name), plan).save(tmp_path / "pruned.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = zoo.feeds(name, batch=2, seq=5)
    assert np.isfinite(session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})[0]).all()
    decision = {site: np.array(units, np.int64) for site, units in plan.kept.items()}
    fidelity = masked_equals_sliced(anatomy(name), decision, calibration(name, 8), RuntimeOptions(), "logits")
    assert fidelity.passed, fidelity


@pytest.mark.parametrize("name", NAMES)
def test_nothing_at_all_can_be_kept(name: str) -> None:
    model = execute(anatomy(name), keeping(name, {site.name: () for site in anatomy(name).sites}))
    session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = zoo.feeds(name, batch=2, seq=5)
    assert np.isfinite(session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})[0]).all()


def test_a_plan_for_other_units_is_refused() -> None:
    plan = pruned(BERT).plan
    with pytest.raises(InputError, match=r"the plan expects 5 units at layer\.0\.heads, the model has 4; it was made for another file"):
        execute(anatomy(BERT), dataclasses.replace(plan, units={**plan.units, "layer.0.heads": 5}))
    with pytest.raises(InputError, match=r"expects 4 units at layer\.9\.heads, the model has no such site"):
        execute(anatomy(BERT), dataclasses.replace(plan, units={**plan.units, "layer.9.heads": 4}))


@pytest.mark.parametrize("units", [(0, 0), (2, 1), (-1,), (0, 99)])
def test_a_plan_with_impossible_units_is_refused(units: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"kept units of layer\.0\.heads must be ascending numbers from 0 to 3"):
        execute(anatomy(BERT), keeping(BERT, {"layer.0.heads": units}))


def test_compensated_nodes_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="the plan compensates node 'nowhere', which this model does not have"):
        install(anatomy(BERT).model, {("nowhere", 1): np.zeros(3, np.float32)})


def test_nothing_to_install_changes_nothing() -> None:
    assert install(anatomy(BERT).model, {}) is anatomy(BERT).model


def test_another_file_is_refused(tmp_path: Path) -> None:
    plan = pruned(BERT).plan.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"the plan was made for another file \(sha256 .*make a new plan for this model"):
        onnxprune.apply(zoo.path("bert-eager-do18"), plan, output=tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.glob("*.onnx")] == []


def test_finishing_runs_the_rewrites_and_keeps_what_is_computed() -> None:
    finished = finish(anatomy(BERT).model, ["residual-sum"])
    plain = finish(anatomy(BERT).model, [])
    counts = [sum(node.op_type == "Sum" for node in model.proto.graph.node) for model in (finished, plain)]
    assert counts[0] > counts[1]
    feeds = zoo.feeds(BERT)
    outputs = []
    for model in (plain, finished):
        session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})[0])
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


# --- integers ----------------------------------------------------------------------------------------------------------------------


def in_integers(name: str, scheme: Scheme, kept: dict[str, tuple[int, ...]]) -> Plan:
    """A plan of one's own in int8, its outliers smoothed."""
    plan = keeping(name, kept)
    indices = {site: np.array(units, np.int64) for site, units in plan.kept.items()}
    model = slice_model(anatomy(name), indices)
    tensors = {node.inputs[0] for node in products_of(model)}
    form = tailor(model, scheme, calibration(name, 8), RuntimeOptions(), smoothed=tensors)
    form = dataclasses.replace(form, integers=round_weights(model, form, calibration(name, 8), RuntimeOptions()))
    assert form.integers
    assert bool(form.factors) == (scheme.kind == "dynamic"), "so that their way through the file is tested as well"
    return dataclasses.replace(plan, int8=form, rewrites=("clean", "residual-sum", "int8", "fuse-attention"))


@pytest.mark.parametrize("scheme", [Scheme("dynamic", True), Scheme("static", True, "mse")], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_in_integers_gives_the_same_bytes_from_its_file(name: str, scheme: Scheme, tmp_path: Path) -> None:
    plan = in_integers(name, scheme, {"layer.0.heads": (1,), "layer.1.ffn": (), "layer.2.ffn": tuple(range(48))})
    written = execute(anatomy(name), plan).save(tmp_path / "pruned.onnx")
    replayed = execute(study(*canonicalise(load(zoo.path(name)))), load_plan(plan.save(tmp_path / "plan.json")))
    assert sha256(replayed.save(tmp_path / "replayed.onnx")) == sha256(written)
    onnx.checker.check_model(str(written))
    feeds = zoo.feeds(name, batch=2, seq=5)
    session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
    got = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})[0]
    in_float = onnxruntime.InferenceSession(
        execute(anatomy(name), dataclasses.replace(plan, int8=None, rewrites=())).to_proto().SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    want = in_float.run(None, {item.name: feeds[item.name] for item in in_float.get_inputs()})[0]
    assert 0 < np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("scheme", [Scheme("dynamic", False), Scheme("static", True)], ids=str)
def test_products_that_went_with_their_site_are_passed_over(scheme: Scheme) -> None:
    """The same form serves a plan that keeps less: what it says of products that are gone does not matter."""
    whole = in_integers(BERT, scheme, {})
    pruned = dataclasses.replace(whole, kept={**whole.kept, "layer.1.heads": (), "layer.0.ffn": ()})
    assert whole.int8 is not None
    pruned = dataclasses.replace(pruned, int8=dataclasses.replace(whole.int8, factors={}, integers={}))
    model = execute(anatomy(BERT), pruned)
    names = {node.name for node in model.proto.graph.node}
    gone = set(whole.int8.products) - names
    assert len(gone) == 4 + 2, "four projections and two of the FFN"
    assert {node.name for node in model.proto.graph.node if node.op_type == "MatMulInteger"} in (set(), set(whole.int8.products) - gone)
    session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, zoo.feeds(BERT))[0]).all()


def test_a_plan_that_lists_integers_without_a_form_computes_in_float() -> None:
    plan = dataclasses.replace(keeping(VIT, {}), rewrites=("int8",), int8=None)
    assert not [node for node in execute(anatomy(VIT), plan).proto.graph.node if "Integer" in node.op_type or "Quantize" in node.op_type]


def test_prune_and_apply_write_the_same_integers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    brief_benchmarks(monkeypatch)
    monkeypatch.setattr(shipping, "choose_scheme", lambda *_, **__: (Scheme("dynamic", True), ()))
    result = onnxprune.prune(zoo.path(VIT), calib=arrays(VIT, 64), passes="heads,ffn,int8", target_macs="60%", rounds=1, bench_seconds=0)
    assert result.model is not None
    assert result.plan.int8 is not None
    assert "int8" in result.plan.rewrites
    written = result.model.save(tmp_path / "pruned.onnx")
    output = tmp_path / "replayed.onnx"
    onnxprune.apply(zoo.path(VIT), result.plan.save(tmp_path / "plan.json"), output=output)
    assert sha256(output) == sha256(written)
