"""Multiply-adds against counts done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph.macs import count_macs, total_macs
from onnxprune.graph.model import Model, load
from onnxprune.graph.profile import shapes_of
from tests import zoo


def one_node(op: str, inputs: dict[str, tuple[int, ...] | None], output: tuple[int, ...], domain: str = "", **attributes: Any) -> int:
    """Multiply-adds of a single node; an input of shape None is left out."""
    node = helper.make_node(op, [name if shape else "" for name, shape in inputs.items()], ["y"], name="it", domain=domain, **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items() if shape]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)])
    model = Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    shapes = {name: shape for name, shape in inputs.items() if shape}
    counts = count_macs(model, {**shapes, "y": output})
    assert set(counts) <= {"it"}
    return counts.get("it", 0)


def test_matrix_products() -> None:
    assert one_node("MatMul", {"a": (2, 5, 7), "b": (7, 3)}, (2, 5, 3)) == 2 * 5 * 7 * 3
    assert one_node("MatMul", {"a": (2, 4, 5, 7), "b": (2, 4, 7, 5)}, (2, 4, 5, 5)) == 2 * 4 * 5 * 7 * 5
    assert one_node("MatMul", {"a": (7,), "b": (7,)}, ()) == 7
    assert one_node("MatMulInteger", {"a": (2, 7), "b": (7, 3)}, (2, 3)) == 2 * 7 * 3
    assert one_node("MatMulNBits", {"a": (2, 64), "b": (3, 2, 16)}, (2, 3), "com.microsoft", K=64, N=3, bits=4, block_size=32) == 2 * 64 * 3
    assert one_node("FusedMatMul", {"a": (7, 2), "b": (7, 3)}, (2, 3), "com.microsoft", transA=1) == 2 * 7 * 3


def test_quantized_product_takes_the_activation_as_inner_size() -> None:
    inputs = {"a": (2, 7), "as": (1,), "az": (1,), "b": (7, 3), "bs": (1,), "bz": (1,), "ys": (1,), "yz": (1,)}
    assert one_node("QLinearMatMul", inputs, (2, 3)) == 2 * 7 * 3


@pytest.mark.parametrize(("trans_a", "shape"), [(0, (2, 7)), (1, (7, 2))])
def test_gemm(trans_a: int, shape: tuple[int, int]) -> None:
    assert one_node("Gemm", {"a": shape, "b": (7, 3), "c": (3,)}, (2, 3), transA=trans_a) == 2 * 7 * 3


def test_convolutions() -> None:
    assert one_node("Conv", {"x": (1, 8, 10, 10), "w": (6, 8, 3, 3)}, (1, 6, 8, 8)) == 6 * 8 * 8 * 8 * 3 * 3
    assert one_node("Conv", {"x": (1, 8, 10, 10), "w": (8, 1, 3, 3)}, (1, 8, 8, 8), group=8) == 8 * 8 * 8 * 3 * 3
    assert one_node("ConvTranspose", {"x": (1, 8, 4, 4), "w": (8, 6, 2, 2)}, (1, 6, 8, 8), strides=[2, 2]) == 8 * 4 * 4 * 6 * 2 * 2


@pytest.mark.parametrize(
    ("equation", "first", "second", "output", "expected"),
    [
        ("bhqd,bhkd->bhqk", (2, 4, 5, 7), (2, 4, 6, 7), (2, 4, 5, 6), 2 * 4 * 5 * 6 * 7),
        ("bsi,io->bso", (2, 5, 7), (7, 3), (2, 5, 3), 2 * 5 * 7 * 3),
        ("...i, io -> ...o", (2, 5, 7), (7, 3), (2, 5, 3), 2 * 5 * 7 * 3),
    ],
)
def test_einsum(equation: str, first: tuple[int, ...], second: tuple[int, ...], output: tuple[int, ...], expected: int) -> None:
    assert one_node("Einsum", {"a": first, "b": second}, output, equation=equation) == expected


B, S, K, H, D, P = 2, 5, 9, 4, 8, 3


def test_attention_of_opset_23_in_both_layouts() -> None:
    expected = B * H * S * K * (D + D)
    four = {"q": (B, H, S, D), "k": (B, 2, K, D), "v": (B, 2, K, D)}
    assert one_node("Attention", four, (B, H, S, D)) == expected
    three = {"q": (B, S, H * D), "k": (B, K, 2 * D), "v": (B, K, 2 * D)}
    assert one_node("Attention", three, (B, S, H * D), q_num_heads=H, kv_num_heads=2) == expected


def test_attention_counts_the_past_and_an_uneven_value_depth() -> None:
    inputs = {"q": (B, H, S, D), "k": (B, H, K, D), "v": (B, H, K, 6), "mask": None, "pk": (B, H, P, D), "pv": (B, H, P, 6)}
    assert one_node("Attention", inputs, (B, H, S, 6)) == B * H * S * (K + P) * (D + 6)


def test_contrib_attention_contains_its_projections() -> None:
    hidden = H * D
    inputs = {"x": (B, S, 20), "w": (20, 3 * hidden), "b": (3 * hidden,)}
    expected = B * S * 20 * 3 * hidden + 2 * B * S * S * hidden
    assert one_node("Attention", inputs, (B, S, hidden), "com.microsoft", num_heads=H) == expected
    assert one_node("QAttention", inputs, (B, S, hidden), "com.microsoft", num_heads=H) == expected
    uneven = {"x": (B, S, 20), "w": (20, 80), "b": (80,)}
    count = one_node("Attention", uneven, (B, S, 48), "com.microsoft", num_heads=H, qkv_hidden_sizes=[16, 16, 48])
    assert count == B * S * 20 * 80 + B * S * S * (16 + 48)


@pytest.mark.parametrize(
    "inputs",
    [
        {"q": (B, S, H * D), "k": (B, K, H * D), "v": (B, K, H * D)},
        {"q": (B, S, H * D), "k": (B, H, K, D), "v": (B, H, K, D)},
        {"q": (B, S, H * D), "k": (B, K, H, 2, D)},
        {"q": (B, K, H, 3, D)},
    ],
    ids=["apart", "cross", "packed kv", "packed qkv"],
)
def test_multi_head_attention_layouts(inputs: dict[str, tuple[int, ...] | None]) -> None:
    tokens = inputs["q"][1]  # type: ignore[index]
    assert one_node("MultiHeadAttention", inputs, (B, tokens, H * D), "com.microsoft", num_heads=H) == B * H * tokens * K * (D + D)


def test_grouped_attention_multiplies_every_query_head() -> None:
    inputs = {"q": (B, S, H * D), "k": (B, S, 2 * D), "v": (B, S, 2 * D), "pk": (B, 2, P, D), "pv": (B, 2, P, D)}
    count = one_node("GroupQueryAttention", inputs, (B, S, H * D), "com.microsoft", num_heads=H, kv_num_heads=2)
    assert count == B * H * S * (S + P) * (D + D)


def test_other_operators_count_nothing() -> None:
    assert one_node("Softmax", {"x": (2, 3)}, (2, 3)) == 0


def two_layers() -> Model:
    """Two unnamed products with initializers, and one of a shared name."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "v"], ["y"], name="out")]
    weights = [numpy_helper.from_array(np.zeros((4, 6), np.float32), "w"), numpy_helper.from_array(np.zeros((6, 2), np.float32), "v")]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["n", 4])], [value("y", 1, ["n", 2])], weights)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_counts_by_node_at_shapes_that_were_run() -> None:
    model = two_layers()
    shapes = shapes_of(model, {"x": np.zeros((3, 4), np.float32)})
    assert count_macs(model, shapes) == {"MatMul_0": 3 * 4 * 6, "out": 3 * 6 * 2}
    assert total_macs(model, shapes) == 3 * 4 * 6 + 3 * 6 * 2


def test_nodes_of_one_name_are_added_up() -> None:
    model = two_layers()
    model.proto.graph.node[0].name = "out"
    assert count_macs(model, {"x": (3, 4), "a": (3, 6), "y": (3, 2)}) == {"out": 3 * 4 * 6 + 3 * 6 * 2}


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(InputError, match="shape of 'a' at MatMul"):
        count_macs(two_layers(), {"x": (3, 4), "y": (3, 2)})


@pytest.mark.parametrize("name", ["bert-sdpa-do23", "bert-eager-ts17"])
def test_real_exports_count_what_the_architecture_says(name: str) -> None:
    feeds = zoo.feeds(name, batch=2, seq=7)
    model = load(zoo.path(name))
    hidden, ffn, tokens = zoo.HIDDEN["bert"], zoo.FFN["bert"], 2 * 7
    layer = tokens * (4 * hidden * hidden + 2 * hidden * ffn) + 2 * 2 * 7 * 7 * hidden
    shapes = shapes_of(model, feeds)
    classes = shapes[model.output_names[0]][-1]
    assert total_macs(model, shapes) == zoo.LAYERS * layer + 2 * hidden * hidden + 2 * hidden * classes
