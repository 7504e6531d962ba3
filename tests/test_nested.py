"""A family of models: nested units, a manifest that says what there is, and files that compute what they should."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import onnxprune
from onnxprune.errors import GateError, InputError, TargetError
from onnxprune.graph.instrument import mask_feeds, masked_model
from onnxprune.graph.model import load
from onnxprune.nested import Family
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.passes.cases import BERT, anatomy, arrays, brief_benchmarks, clockwork

QUICK: dict[str, Any] = {"quantity": "macs", "rounds": 2, "importance": "fisher", "finishing": False, "bench_seconds": 0}


def made(folder: Path, targets: Any = "45%,80%,60%", **options: Any) -> Family:
    (folder / "model.onnx").write_bytes(zoo.path(BERT).read_bytes())
    return onnxprune.family(folder / "model.onnx", targets=targets, output=folder / "sizes", calib=arrays(BERT), **{**QUICK, **options})


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Without re-fit, so that a file must equal the masked model."""
    return made(tmp_path_factory.mktemp("family"), compensation="none")


def test_smaller_members_keep_a_part_of_what_larger_ones_keep(nested: Family) -> None:
    plans = [member.plan for member in nested.members]
    assert [plan.target for plan in plans] == ["macs=80%", "macs=60%", "macs=45%"]
    for larger, smaller in itertools.pairwise(plans):
        assert all(set(smaller.kept[site]) <= set(units) for site, units in larger.kept.items())
        assert sum(map(len, smaller.kept.values())) < sum(map(len, larger.kept.values()))


def test_every_file_loads_and_equals_its_masked_model(nested: Family) -> None:
    feeds = zoo.feeds(BERT, batch=4, seq=9)
    session = open_session(masked_model(anatomy(BERT)))
    for member in nested.members:
        kept = {site: np.array(units, np.int64) for site, units in member.plan.kept.items()}
        masked = run(session, {**feeds, **mask_feeds(anatomy(BERT).sites, kept)})[0]
        found = onnxruntime.InferenceSession(str(member.output), providers=["CPUExecutionProvider"]).run(None, dict(feeds))[0]
        np.testing.assert_allclose(found, masked, atol=1e-4 * np.abs(masked).max())


def test_the_manifest_names_every_file_with_what_it_reached(nested: Family) -> None:
    manifest = json.loads((nested.folder / "family.json").read_text())
    assert manifest == json.loads(json.dumps(nested.manifest))
    assert manifest["schema"] == "onnxprune.family/1"
    assert manifest["missing"] == []
    assert manifest["benchmark"] is None
    assert [entry["target"] for entry in manifest["members"]] == ["80%", "60%", "45%"]
    for entry, member in zip(manifest["members"], nested.members, strict=True):
        file = nested.folder / entry["file"]
        assert file == member.output
        assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert entry["measured"] <= entry["goal"] == pytest.approx(float(entry["target"][:-1]) / 100 * entry["given"])
        assert entry["kept"] == {site: len(units) for site, units in member.plan.kept.items()}
        assert entry["kl"] > 0
        assert 0 <= entry["agreement"] <= 1
        assert onnxprune.load_plan(nested.folder / entry["run"] / "plan.json").sha256 == member.plan.sha256
    assert {path.name for path in nested.folder.iterdir()} == {
        "family.json", *(entry[name] for entry in manifest["members"] for name in ("file", "run"))
    }  # fmt: skip


def test_members_are_refitted_and_the_largest_is_what_prune_makes(tmp_path: Path) -> None:
    found = made(tmp_path, targets=["70%", "50%"])
    assert all(member.plan.changes for member in found.members)
    options = {name: value for name, value in QUICK.items() if name != "quantity"}
    alone = onnxprune.prune(tmp_path / "model.onnx", calib=arrays(BERT), target_macs="70%", **options)
    assert alone.plan.sha256 == found.members[0].plan.sha256


def test_latency_is_measured_for_all_members_in_one_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)
    clockwork(monkeypatch)
    found = made(tmp_path, targets="5ms,3ms", quantity="latency", rounds=1, compensation="none", bench_seconds=0.3)
    assert found.benchmark is not None
    assert list(found.benchmark.variants) == ["file as given", "model-5ms.onnx", "model-3ms.onnx"]
    assert all(entry["latency_ms"] > 0 and entry["speedup"] > 0 and entry["unit"] == "ms" for entry in found.manifest["members"])
    larger, smaller = (member.plan.kept for member in found.members)
    assert all(set(smaller[site]) <= set(units) for site, units in larger.items())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("80%,auto", "shares such as 80%,50%,30%, or absolute values only; auto is none of them"),
        ("80%,3ms", "absolute values only"),
        ("80%,0.8e2%", "names one target twice"),
        ("80%,,50%", "cannot read '': --targets takes"),
    ],
)
def test_targets_that_have_no_order_are_refused(tmp_path: Path, targets: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(tmp_path, targets=targets, quantity="latency")
    assert not (tmp_path / "sizes").exists()


def test_what_was_finished_before_a_failure_stays_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="target macs=10% cannot be met"):
        made(tmp_path, targets="70%,10%", keep=[r"layer\.0"], importance="magnitude", compensation="none", rounds=1)
    manifest = json.loads((tmp_path / "sizes" / "family.json").read_text())
    assert ([entry["file"] for entry in manifest["members"]], manifest["missing"]) == (["model-70pct.onnx"], ["10%"])
    assert load(tmp_path / "sizes" / "model-70pct.onnx").parameters < load(tmp_path / "model.onnx").parameters


def test_a_member_that_loses_too_much_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"model-10pct\.onnx and smaller ones were not written"):
        made(tmp_path, targets="10%", max_drop="1%", importance="magnitude", compensation="none", rounds=1)
    assert sorted(path.name for path in (tmp_path / "sizes").iterdir()) == ["model-10pct.run"]


def test_a_family_needs_units(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="removes no units, so there is nothing to nest"):
        made(tmp_path, passes="int8")
