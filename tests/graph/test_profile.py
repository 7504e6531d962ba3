"""Two-run shape profiles."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.graph.profile import shapes_of, synthetic_feeds, take_profile


def model_of(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], output: str, constants: dict[str, np.ndarray]) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def detour() -> Model:
    """[b, s, 12] -> [b * s, 4, 3] -> [b, s, 12], with the shape computed in the graph."""
    return model_of(
        [
            helper.make_node("Reshape", ["x", "heads"], ["split"]),
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("Reshape", ["split", "size"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 12])],
        "y",
        {"heads": np.array([-1, 4, 3])},
    )


def ids(limit: int, length: int | str = "s") -> Model:
    """An embedding of ``limit`` rows, indexed by ids + 4: the zeros of made-up inputs are a valid index only if ``limit`` > 4."""
    return model_of(
        [helper.make_node("Add", ["ids", "four"], ["place"]), helper.make_node("Gather", ["table", "place"], ["y"])],
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", length])],
        "y",
        {"four": np.array(4), "table": np.ones((limit, 6), np.float32)},
    )


def test_equal_dimensions_are_constant_and_others_dynamic() -> None:
    profile = take_profile(detour())
    assert profile.dim("split", 0) is None
    assert (profile.dim("split", 1), profile.dim("split", 2), profile.dim("y", 2)) == (4, 3, 12)
    assert profile.shape("split") == (profile.shapes[0]["x"][0] * profile.shapes[0]["x"][1], 4, 3)
    assert profile.shape("nobody") is None


def test_integer_tensors_tell_which_elements_are_constant() -> None:
    found = take_profile(detour()).constant_elements("size")
    assert found is not None
    values, constant = found
    assert constant.tolist() == [False, False, True]
    assert values[2] == 12


def test_real_samples_are_used_when_made_up_inputs_do_not_run_and_dynamic_axes_stay_dynamic() -> None:
    samples = {"ids": np.full((5, 9), -3)}
    profile = take_profile(ids(3), samples)
    assert profile.shapes[0]["y"] == (3, 9, 6)
    assert profile.dim("y", 0) is None
    assert profile.dim("y", 1) is None
    assert profile.dim("y", 2) == 6


def test_a_model_that_does_not_run_asks_for_data() -> None:
    with pytest.raises(InputError, match="give calibration data"):
        take_profile(ids(3))


def test_samples_that_do_not_run_either_are_an_input_error() -> None:
    with pytest.raises(InputError, match="onnxruntime failed on inputs ids"):
        take_profile(ids(3), {"ids": np.full((5, 9), 7)})


def test_a_failure_at_one_size_only_is_not_taken_for_a_constant_shape() -> None:
    # Adding a constant of 7 columns runs at the first made-up length (7) and fails at the second (5).
    model = model_of(
        [helper.make_node("Add", ["x", "seven"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s"])],
        "y",
        {"seven": np.ones((1, 7), np.float32)},
    )
    with pytest.raises(InputError, match="give calibration data"):
        take_profile(model)
    profile = take_profile(model, {"x": np.ones((4, 7), np.float32)})
    assert profile.dim("y", 0) is None
    assert profile.dim("y", 1) == 7


def test_a_node_with_an_output_too_many_is_an_input_error() -> None:
    model = detour()
    model.proto.graph.node[0].output.append("surplus")
    with pytest.raises(InputError):
        take_profile(model)


def test_shapes_of_gives_inputs_and_all_node_outputs() -> None:
    shapes = shapes_of(detour(), {"x": np.zeros((2, 5, 12), np.float32)})
    assert shapes == {"split": (10, 4, 3), "size": (3,), "y": (2, 5, 12), "x": (2, 5, 12)}
    assert all(isinstance(size, int) for size in shapes["y"])


def test_synthetic_feeds_share_symbols_and_open_masks() -> None:
    inputs = [
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "s"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["b", "s"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, "s"]),
    ]
    model = model_of([helper.make_node("Identity", ["x"], ["y"])], inputs, "y", {})
    feeds = synthetic_feeds(model)
    batch, length = feeds["attention_mask"].shape
    assert batch != length
    assert feeds["attention_mask"].all()
    assert feeds["x"].shape == (batch, 3, length)
    np.testing.assert_array_equal(feeds["position_ids"][1], np.arange(length))


def test_sequences_have_no_shape_and_do_no_harm() -> None:
    """torch writes tensor.split and unbind of unknown length as sequences."""
    model = model_of(
        [
            helper.make_node("SplitToSequence", ["x", "three"], ["pieces"], axis=2),
            helper.make_node("SequenceAt", ["pieces", "one"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 12])],
        "y",
        {"three": np.array(3), "one": np.array(1)},
    )
    profile = take_profile(model)
    assert profile.shape("pieces") is None
    assert profile.shape("y") == (2, 7, 3)
