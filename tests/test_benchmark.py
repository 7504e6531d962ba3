"""Benchmarks of models side by side: what is reported and what is refused. No test looks at how long anything took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune import benchmark as bench
from onnxprune.benchmark import benchmark
from onnxprune.errors import InputError, RuntimeUnavailable
from onnxprune.graph.model import Model
from onnxprune.runtime.measure import REPLICAS, Timings
from onnxprune.runtime.session import RuntimeOptions
from tests.calibration.models import build, image_model, text_model

FEEDS = {"x": np.ones((2, 16), np.float32)}


def product(width: int) -> Model:
    """``x [n, 16] @ w [16, width]``."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")]
    return build(nodes, [("x", TensorProto.FLOAT, ["n", 16])], {"y": TensorProto.FLOAT}, {"w": np.ones((16, width), np.float32)})


def test_size_work_and_provider_of_each_variant(tmp_path: Path) -> None:
    dense = product(64).save(tmp_path / "dense.onnx", external_data=True)
    result = benchmark({"dense": dense, "pruned": product(32)}, FEEDS, rounds=3, memory=False)
    assert list(result.variants) == ["dense", "pruned"]
    first, second = result.variants["dense"], result.variants["pruned"]
    assert (first.macs, second.macs) == (2 * 16 * 64, 2 * 16 * 32)
    assert (first.parameters, second.parameters) == (16 * 64, 16 * 32)
    assert first.bytes == dense.stat().st_size + (tmp_path / "dense.onnx.data").stat().st_size
    assert second.bytes == product(32).save(tmp_path / "p.onnx").stat().st_size
    assert first.provider == "CPUExecutionProvider"
    assert first.peak_memory_bytes is None
    assert (result.rounds, result.threads, result.clock) == (3, 1, "thread")
    assert first.speedup.median == 1
    assert sorted(first.quantiles_ms.values()) == list(first.quantiles_ms.values())
    assert result.input_shapes == {"x": (2, 16)}


def test_speedup_and_noise_floor_come_from_paired_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(runs, **options):  # type: ignore[no-untyped-def]
        dense, pruned, again = runs
        return Timings({dense: np.array([4.0, 8, 4]), pruned: np.array([1.0, 2, 1]), again: np.array([5.0, 10, 5])}, "thread", 0.5)

    monkeypatch.setattr(bench, "time_sessions", fake)
    result = benchmark({"dense": product(64), "pruned": product(32)}, FEEDS, memory=False)
    assert result.variants["pruned"].speedup.median == 4
    assert result.variants["pruned"].latency_ms == 1
    assert result.noise_floor.median == 1.25
    assert result.load_average == 0.5


def test_every_variant_is_warmed_up_and_timed_on_a_session_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    real = bench.open_session

    def counting(model, options):  # type: ignore[no-untyped-def]
        opened.append(model)
        return real(model, options)

    monkeypatch.setattr(bench, "open_session", counting)
    models = {"dense": product(64), "pruned": product(32)}
    benchmark(models, FEEDS, rounds=1, memory=False)
    order = [models["dense"], models["pruned"], models["dense"]]
    assert [id(model) for model in opened] == [id(model) for model in order for _ in range(REPLICAS)]


def test_the_result_is_plain_json(tmp_path: Path) -> None:
    result = benchmark({"dense": product(64).save(tmp_path / "m.onnx")}, FEEDS, rounds=2)
    found = json.loads(json.dumps(result.as_dict()))
    assert found["variants"]["dense"]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found["input_shapes"] == {"x": [2, 16]}
    if Path("/proc/self/status").exists():
        assert found["variants"]["dense"]["peak_memory_bytes"] > 10 * 2**20


def test_a_variant_is_fed_only_the_inputs_it_has() -> None:
    result = benchmark({"dense": product(64)}, {**FEEDS, "unused": np.zeros(3)}, rounds=1, memory=False)
    assert result.input_shapes == {"x": (2, 16)}


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(InputError, match="'other' wants input 'pixels'; the benchmark inputs are x"):
        benchmark({"dense": product(64), "other": image_model()}, FEEDS, memory=False)
    with pytest.raises(InputError, match="at least one model"):
        benchmark({}, FEEDS)
    with pytest.raises(InputError, match=r"onnxruntime failed on inputs x float32\[2, 5\]"):
        benchmark({"dense": product(64)}, {"x": np.ones((2, 5), np.float32)}, memory=False)
    with pytest.raises(InputError, match="model not found"):
        benchmark({"dense": "nowhere.onnx"}, FEEDS)
    with pytest.raises(RuntimeUnavailable):
        benchmark({"dense": product(64)}, FEEDS, options=RuntimeOptions("NoSuchProvider"))


def test_inputs_of_another_type_are_refused() -> None:
    half = product(64).copy_proto()
    half.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(InputError, match="variant 'half' takes input 'x' as float16, the benchmark input is float32"):
        benchmark({"dense": product(64), "half": product(64).with_proto(half)}, FEEDS, memory=False)


def test_quality_is_told_only_of_variants_that_were_compared() -> None:
    result = benchmark({"dense": product(64), "pruned": product(32)}, FEEDS, rounds=1, memory=False)
    told = replace(result, variants={**result.variants, "pruned": replace(result.variants["pruned"], quality={"samples": 7})})
    assert told.as_dict()["variants"]["pruned"]["quality"] == {"samples": 7}
    assert "quality" not in told.as_dict()["variants"]["dense"]


def test_operators_that_cannot_be_counted_leave_macs_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(model: Model, feeds: object) -> dict[str, tuple[int, ...]]:
        return {}

    monkeypatch.setattr(bench, "shapes_of", unknown)
    assert benchmark({"dense": product(64)}, FEEDS, rounds=1, memory=False).variants["dense"].macs is None


def test_integer_inputs_run_as_well() -> None:
    feeds = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 0]])}
    assert benchmark({"text": text_model()}, feeds, rounds=1, memory=False).variants["text"].macs == 0
