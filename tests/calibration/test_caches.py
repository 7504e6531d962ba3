"""Data for decoders with a cache: keys and values of no earlier token are empty, and that is no mistake."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.calibration.source import load_calibration
from onnxprune.errors import InputError
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import shapes_of, synthetic_feeds
from onnxprune.request import request_feeds
from tests.architectures import exports
from tests.architectures.entry import HEADS, HIDDEN

ROWS = 9


def decoder(mask: str = "past + tokens") -> Model:
    """ids, mask and one cache; the output is the cache grown by the ids, and fails where the mask is of another length."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "axes"], ["new"]),
        helper.make_node("Concat", ["cache", "new"], ["all"], axis=1),
        helper.make_node("Squeeze", ["all", "axes"], ["flat"]),
        helper.make_node("Cast", ["mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["flat", "weights"], ["out"]),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", mask]),
        helper.make_tensor_value_info("cache", TensorProto.FLOAT, ["batch", "past", 1]),
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    axes = onnx.numpy_helper.from_array(np.array([2]), "axes")
    graph = helper.make_graph(nodes, "decoder", inputs, [output], [axes])
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    ids = np.arange(ROWS * 4).reshape(ROWS, 4)
    return {"ids": ids, "mask": np.ones((ROWS, 4), np.int64), "cache": np.zeros((ROWS, 0, 1), np.float32), **changes}


def test_a_cache_of_no_tokens_is_taken() -> None:
    data = load_calibration(arrays(), decoder())
    assert [batch.feeds["cache"].shape for batch in data.batches(4, trim=True)] == [(4, 0, 1), (4, 0, 1), (1, 0, 1)]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (decoder(), {"cache": np.zeros((0, 0, 1), np.float32)}),
        (decoder(), {"ids": np.zeros((ROWS, 0), np.int64)}),
        (decoder("total"), {}),
    ],
    ids=["no rows", "no tokens", "no sum that stays"],
)
def test_other_empty_arrays_are_refused(model: Model, changes: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="is empty"):
        load_calibration(arrays(**changes), model)


def test_made_up_inputs_keep_sums_of_dimensions() -> None:
    feeds = synthetic_feeds(decoder())
    assert feeds["mask"].shape[1] == feeds["ids"].shape[1] + feeds["cache"].shape[1]
    assert shapes_of(decoder(), feeds)["out"] == feeds["mask"].shape


@pytest.mark.parametrize(("shapes", "total"), [({}, 128), ({"ids": (1, 5)}, 69), ({"ids": (1, 5), "cache": (1, 3, 1)}, 8)])
def test_random_data_keeps_sums_of_dimensions(shapes: dict[str, tuple[int, ...]], total: int) -> None:
    data = load_calibration("random", decoder(), samples=ROWS, input_shapes=shapes)
    assert data.inputs["mask"].shape == (ROWS, total)
    assert data.inputs["ids"].shape[1] + data.inputs["cache"].shape[1] == total


@pytest.mark.parametrize("single", [False, True])
def test_caches_that_are_left_out_are_empty(single: bool) -> None:
    model = load(exports.path("gpt2-cache"))
    rows = {"input_ids": np.ones((ROWS, 4), np.int64), "attention_mask": np.ones((ROWS, 4), np.int64)}
    items = [{name: array[row] for name, array in rows.items()} for row in range(ROWS)]
    data = load_calibration(items if single else rows, model)
    assert data.inputs["past_key_values.1.value"].shape == (ROWS, HEADS, 0, HIDDEN // HEADS)
    grown = request_feeds(model, data, {"input_ids": (1, 1), "past_key_values.0.key": (1, HEADS, 6, 8), "attention_mask": (1, 7)})
    assert grown["past_key_values.1.value"].shape == (1, HEADS, 6, 8)
