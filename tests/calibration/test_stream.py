"""Streaming a model over calibration data."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import onnxprune.calibration.stream as stream_module
from onnxprune.calibration import Batch, CalibrationData, load_calibration
from onnxprune.calibration.statistics import Statistics
from onnxprune.calibration.stream import stream
from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.runtime.session import Feeds
from tests.calibration.models import Dims, build, image_model, text_arrays, text_model

PIXELS = np.random.default_rng(0).standard_normal((21, 3)).astype(np.float32)


def collect(model: Any, data: Any, outputs: list[str], **options: Any) -> Statistics:
    """Outputs that are sums over the batch, added up over all rows."""
    statistics = Statistics()
    for batch, values in stream(model, data, outputs, **options):
        for name, value in values.items():
            statistics.add(name, value, int(batch.valid.sum()))
    return statistics


def image_data(batch: int | str = "batch") -> CalibrationData:
    return load_calibration({"pixels": PIXELS}, image_model(batch))


@pytest.mark.parametrize("batch", ["batch", 4])
def test_trimmed_and_filled_batches_give_the_outputs_of_the_whole(batch: int | str) -> None:
    model = text_model(batch)
    data = load_calibration(text_arrays(), model)
    got = np.full((10, 4), np.nan, np.float32)
    for part, outputs in stream(model, data, ["logits"], rows=4):
        got[part.index] = outputs["logits"]
    arrays, table = text_arrays(), model.initializer("table")
    assert table is not None
    mask = arrays["attention_mask"][..., None]
    np.testing.assert_allclose(got, (table[arrays["input_ids"]] * mask).sum(axis=1) / mask.sum(axis=1), rtol=1e-5, atol=1e-6)


def test_only_the_outputs_asked_for_come() -> None:
    assert [set(outputs) for _, outputs in stream(image_model(), image_data(), ["total"], rows=21)] == [{"total"}]
    assert [set(outputs) for _, outputs in stream(image_model(), image_data(), rows=21)] == [{"energy", "total"}]


def test_progress_counts_rows() -> None:
    seen: list[tuple[int, int]] = []
    list(stream(image_model(4), image_data(4), progress=lambda done, rows: seen.append((done, rows))))
    assert seen == [(4, 21), (8, 21), (12, 21), (16, 21), (20, 21), (21, 21)]


def weighted() -> tuple[Model, CalibrationData]:
    """Sum over the batch of weight * pixels, in a model of fixed batch size, with the weights as a further input."""
    nodes = [
        helper.make_node("Mul", ["pixels", "weight"], ["scaled"]),
        helper.make_node("ReduceSum", ["scaled", "zero"], ["s"], keepdims=0),
    ]
    inputs: list[tuple[str, int, Dims]] = [("pixels", TensorProto.FLOAT, [4, 3]), ("weight", TensorProto.FLOAT, [4, 1])]
    model = build(nodes, inputs, {"s": TensorProto.FLOAT}, {"zero": np.array([0])})
    return model, CalibrationData({"pixels": PIXELS}, None, "test", fixed_rows=4)


def test_collect_leaves_out_rows_that_fill_a_batch() -> None:
    model, data = weighted()

    def weights(batch: Batch) -> Feeds:
        return {"weight": batch.valid.astype(np.float32)[:, None]}

    statistics = collect(model, data, ["s"], extra=weights)
    np.testing.assert_allclose(statistics["s"], PIXELS.sum(axis=0), rtol=1e-5)
    assert statistics.count("s") == 21


def test_collect_does_not_depend_on_how_rows_are_batched() -> None:
    sums = [collect(image_model(), image_data(), ["total"], rows=rows)["total"] for rows in (1, 5, 21)]
    np.testing.assert_allclose(sums[0], (PIXELS.astype(np.float64) ** 2).sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-6)
    np.testing.assert_allclose(sums[2], sums[0], rtol=1e-6)


def short_of_memory_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let runs of more than ``limit`` rows fail as onnxruntime does; returns the sizes tried."""
    real, tried = stream_module.run, []

    def run(session, feeds, names):  # type: ignore[no-untyped-def]
        tried.append(len(feeds["pixels"]))
        if tried[-1] > limit:
            raise InputError("onnxruntime failed on inputs pixels: Failed to allocate memory for requested buffer of size 1")
        return real(session, feeds, names)

    monkeypatch.setattr(stream_module, "run", run)
    return tried


def test_batches_are_halved_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried = short_of_memory_above(5, monkeypatch)
    with caplog.at_level(logging.WARNING):
        total = collect(image_model(), image_data(), ["total"], rows=16)
    assert tried == [16, 8, 4, 4, 4, 4, 4, 1]
    np.testing.assert_allclose(total["total"], (PIXELS**2).sum(axis=0), rtol=1e-5)
    assert total.count("total") == 21
    assert "going on with 4 rows" in caplog.text


@pytest.mark.parametrize("batch", ["batch", 4])
def test_a_batch_that_cannot_shrink_ends_with_the_error(monkeypatch: pytest.MonkeyPatch, batch: int | str) -> None:
    tried = short_of_memory_above(0, monkeypatch)
    with pytest.raises(InputError, match="Failed to allocate"):
        list(stream(image_model(batch), image_data(batch)))
    assert tried == ([4] if batch == 4 else [16, 8, 4, 2, 1])


def test_other_failures_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = short_of_memory_above(99, monkeypatch)
    with pytest.raises(InputError, match="onnxruntime failed on inputs pixels"):
        list(stream(image_model(), image_data(), ["nothing of that name"]))
    assert tried == [16]


def test_sums_that_overflow_are_refused() -> None:
    data = load_calibration({"pixels": np.full((8, 3), 1e30, np.float32)}, image_model())
    with pytest.raises(InputError, match="'total' is not finite"):
        collect(image_model(), data, ["total"])


def test_outputs_with_a_row_axis_cannot_be_summed() -> None:
    with pytest.raises(InputError, match=r"'energy' has shape \[5\], before \[16\]"):
        collect(image_model(), image_data(), ["energy"])
