"""Ranges and powers of activations, in one pass and without padding."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.calibration import CalibrationData, load_calibration
from onnxprune.calibration.activations import summarise
from onnxprune.errors import InputError
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model
from onnxprune.quantize.ranges import BINS
from onnxprune.runtime.session import open_session, run
from tests.calibration.models import build, image_model, text_arrays, text_model


def flattened_text_model(batch: int | str = "batch") -> Model:
    """``embedded [batch, seq, 4]`` and the same rows as ``flat [batch * seq, 4]``."""
    table = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Reshape", ["embedded", "rows"], ["flat"]),
        helper.make_node("Cast", ["attention_mask"], ["float_mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["flat", "one"], ["sums"]),
        helper.make_node("ReduceSum", ["float_mask", "one"], ["lengths"]),
    ]
    inputs = [("input_ids", TensorProto.INT64, [batch, "seq"]), ("attention_mask", TensorProto.INT64, [batch, "seq"])]
    outputs = {"sums": TensorProto.FLOAT, "lengths": TensorProto.FLOAT}
    return build(nodes, inputs, outputs, {"table": table, "rows": np.array([-1, 4]), "one": np.array([1])})


@pytest.mark.parametrize("batch", ["batch", 4])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_padding_and_filler_rows_do_not_count(batch: int | str, rows: int) -> None:
    model, arrays = flattened_text_model(batch), text_arrays()
    found = summarise(model, ["embedded", "flat"], load_calibration(arrays, model), rows=rows)
    table = model.initializer("table")
    assert table is not None
    real = table[arrays["input_ids"]][arrays["attention_mask"] == 1]
    assert len(real) < arrays["input_ids"].size
    for name in ("embedded", "flat"):
        summary = found[name]
        assert summary.count == len(real)
        assert summary.histogram.count == summary.histogram.bins.sum() == real.size
        assert (summary.histogram.low, summary.histogram.high) == (min(real.min(), 0), max(real.max(), 0))
        np.testing.assert_array_equal(summary.low, real.min(axis=0))
        np.testing.assert_array_equal(summary.high, real.max(axis=0))
        np.testing.assert_allclose(summary.power, np.square(real.astype(np.float64)).mean(axis=0), rtol=1e-12)


def test_histograms_do_not_depend_on_the_batches() -> None:
    model = text_model()
    data = load_calibration(text_arrays(), model)
    first, second = (summarise(model, ["embedded"], data, rows=rows)["embedded"].histogram for rows in (1, 7))
    assert (first.first, first.exponent) == (second.first, second.exponent)
    np.testing.assert_array_equal(first.bins, second.bins)


@pytest.mark.parametrize("batch", ["batch", 4])
def test_images_have_no_padding_but_filler_rows(batch: int | str) -> None:
    pixels = np.random.default_rng(0).standard_normal((21, 3)).astype(np.float32)
    model = image_model(batch)
    found = summarise(model, ["squares", "pixels"], load_calibration({"pixels": pixels}, model))
    assert found["squares"].count == found["pixels"].count == 21
    np.testing.assert_allclose(found["squares"].power, np.power(pixels.astype(np.float64), 4).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found["pixels"].low, pixels.min(axis=0))


def test_filler_rows_of_a_flattened_tensor_do_not_count() -> None:
    nodes = [helper.make_node("Reshape", ["pixels", "rows"], ["flat"]), helper.make_node("Relu", ["flat"], ["positive"])]
    model = build(nodes, [("pixels", TensorProto.FLOAT, [4, 5, 3])], {"positive": TensorProto.FLOAT}, {"rows": np.array([-1, 3])})
    pixels = np.random.default_rng(0).standard_normal((10, 5, 3)).astype(np.float32)
    assert summarise(model, ["flat"], load_calibration({"pixels": pixels}, model))["flat"].count == 10 * 5


def test_a_tensor_outside_the_graph_is_named() -> None:
    with pytest.raises(InputError, match="'nowhere' is not in the graph"):
        summarise(text_model(), ["nowhere"], load_calibration(text_arrays(), text_model()))


def test_integers_have_no_range() -> None:
    with pytest.raises(InputError, match="'input_ids' is int64"):
        summarise(text_model(), ["input_ids"], load_calibration(text_arrays(), text_model()))


def test_values_that_are_not_finite_are_refused() -> None:
    model = image_model()
    pixels = np.full((8, 3), 1e30, np.float32)
    with pytest.raises(InputError, match="'squares' holds infinite"):
        summarise(model, ["squares"], load_calibration({"pixels": pixels}, model))


def test_channels_that_change_in_number_are_refused() -> None:
    model = build(
        [helper.make_node("Transpose", ["pixels"], ["turned"], perm=[0, 2, 1]), helper.make_node("Relu", ["turned"], ["y"])],
        [("pixels", TensorProto.FLOAT, ["batch", "tokens", 3])],
        {"y": TensorProto.FLOAT},
        {},
    )
    parts = [CalibrationData({"pixels": np.ones((2, tokens, 3), np.float32)}, None, "test") for tokens in (4, 5)]
    summary = summarise(model, ["turned"], parts[0])["turned"]
    with pytest.raises(InputError, match="5 channels on some calibration rows and 4 on others"):
        summary.add(run(open_session(with_outputs(model, ["turned"])), parts[1].inputs, ["turned"])[0].reshape(-1, 5))


def test_memory_does_not_grow_with_the_rows() -> None:
    model = build(
        [helper.make_node("Sigmoid", ["pixels"], ["y"])], [("pixels", TensorProto.FLOAT, ["batch", 50, 64])], {"y": TensorProto.FLOAT}, {}
    )

    def peak(rows: int) -> int:
        data = load_calibration({"pixels": np.random.default_rng(0).random((rows, 50, 64), np.float32)}, model)
        summarise(model, ["y"], data.take(slice(4)))
        tracemalloc.start()
        try:
            summarise(model, ["y"], data)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    row_bytes = 50 * 64 * 4
    small, large = peak(16), peak(64)
    assert small > 4 * row_bytes + BINS * 8, "nothing was traced"
    assert large < small + 8 * row_bytes, "48 more rows cost more than the memory of 8"
