"""Four-bit weights: against numpy on the same codes, on every kind of export, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import InputError
from onnxprune.graph.clean import without_dead
from onnxprune.graph.four_bit import BLOCKS, to_four_bit
from onnxprune.graph.model import Model, load
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import WIDTH, Net

EXACT = 1e-3
"""Relative error against float products with the same rounded weights; the kernel only sums in another order."""

ROUNDED_ACTIVATIONS = 0.03
"""The same where the kernel rounds activations to int8."""

FLOAT = 0.5
"""Against the dense model: weights drawn independently are the worst case of rounding, three layers of them all the more."""


def dequantised(model: Model) -> dict[str, np.ndarray]:
    """Float weights [K, N] that the codes of every MatMulNBits stand for, by node."""
    view = GraphView(model)
    found = {}
    for node in view.nodes:
        if node.op == "MatMulNBits":
            packed, scales = (view.value(name) for name in node.inputs[1:3])
            assert packed is not None
            assert scales is not None
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1, node.attrs["block_size"])
            weights = (codes.astype(np.float32) - 8) * scales[..., None]
            found[node.name] = weights.reshape(len(packed), -1)[:, : node.attrs["K"]].T
    return found


def with_weights(model: Model, weights: dict[str, np.ndarray]) -> Model:
    """The float model with other weights in the nodes named."""
    proto = model.copy_proto()
    for node in proto.graph.node:
        if node.name in weights:
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            matrix = weights[node.name].T if transposed else weights[node.name]
            node.input[1] = f"rounded.{node.name}"
            proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), node.input[1]))
    return without_dead(model.with_proto(proto))


def distance(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def product(matrix: np.ndarray, *, rank: int = 3, gemm: dict[str, float] | None = None, declared: bool = False) -> Model:
    """x [..., K] times a matrix, as MatMul or as Gemm with a bias."""
    transposed = bool(gemm and gemm.get("transB"))
    depth, width = matrix.shape[::-1] if transposed else matrix.shape
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*"abc"[: rank - 1], depth])]
    initializers = [numpy_helper.from_array(matrix.astype(np.float32), "w")]
    if gemm is not None:
        initializers.append(numpy_helper.from_array(np.linspace(-1, 1, width, dtype=np.float32), "c"))
        node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="p", **gemm)
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="p", doc_string="kept")
        node.metadata_props.add(key="from", value="a test")
    if declared:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, matrix.shape))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*"abc"[: rank - 1], width])
    graph = helper.make_graph([node], "product", inputs, [output], initializers)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_export_computes_with_the_rounded_weights(name: str) -> None:
    model = load(zoo.path(name))
    # onnxruntime runs the rotary caches of opset 23 at batch 1 only.
    feeds = zoo.feeds(name, batch=1 if name.startswith("llama") and name.endswith("do23") else 3)
    dense = run(open_session(model), feeds)[0]
    exact, count = to_four_bit(model, accuracy_level=1)
    weights = dequantised(exact)
    assert len(weights) == count >= 4 * zoo.LAYERS
    wanted = run(open_session(with_weights(model, weights)), feeds)[0]
    assert distance(run(open_session(exact), feeds)[0], wanted) < EXACT
    ours = run(open_session(to_four_bit(model)[0]), feeds)[0]
    assert distance(ours, wanted) < ROUNDED_ACTIVATIONS
    assert distance(ours, dense) < FLOAT


@pytest.mark.parametrize("name", ["gpt2-sdpa-do18", "llama-sdpa-do18"])
def test_decoder_keeps_its_next_tokens(name: str) -> None:
    model = load(zoo.path(name))
    feeds = zoo.feeds(name, batch=8)
    dense = run(open_session(model), feeds)[0]
    ours = run(open_session(to_four_bit(model, 16)[0]), feeds)[0]
    first = dense.argmax(-1)[..., None]
    # Of 200 tokens, in a model of random weights.
    rank = (ours > np.take_along_axis(ours, first, -1)).sum(-1)
    assert np.mean(rank < 5) > 0.9


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("depth", "width"), [(64, 5), (37, 24), (300, 3), (1, 1)])
def test_product_of_any_shape(block: int, depth: int, width: int) -> None:
    rng = np.random.default_rng(0)
    model, count = to_four_bit(product(rng.standard_normal((depth, width))), block, accuracy_level=1)
    x = rng.standard_normal((2, 3, depth)).astype(np.float32)
    assert count == 1
    assert distance(run(open_session(model), {"x": x})[0], x @ dequantised(model)["p"]) < EXACT


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_activation_of_any_rank(rank: int) -> None:
    rng = np.random.default_rng(0)
    model, _ = to_four_bit(product(rng.standard_normal((40, 24)), rank=rank), accuracy_level=1)
    x = rng.standard_normal((2, 3, 2, 40)[-rank:]).astype(np.float32)
    ours = run(open_session(model), {"x": x})[0]
    assert ours.shape == (*x.shape[:-1], 24)
    assert distance(ours, x @ dequantised(model)["p"]) < EXACT


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_keeps_its_bias(transposed: int) -> None:
    rng = np.random.default_rng(0)
    given = product(rng.standard_normal((40, 24)), rank=2, gemm={"transB": transposed})
    model, count = to_four_bit(given, accuracy_level=1)
    x = rng.standard_normal((5, 24 if transposed else 40)).astype(np.float32)
    wanted = run(open_session(with_weights(given, dequantised(model))), {"x": x})[0]
    assert count == 1
    assert distance(run(open_session(model), {"x": x})[0], wanted) < EXACT


def test_rounding_error_is_that_of_four_bits() -> None:
    """Uniform weights in steps of a fifteenth of their range: an error of a step over the square root of twelve, or a little less."""
    matrix = np.random.default_rng(0).uniform(-1, 1, (512, 64)).astype(np.float32)
    model, _ = to_four_bit(product(matrix))
    error = np.sqrt(np.mean(np.square(dequantised(model)["p"] - matrix)))
    assert 0.9 < error / (2 / 15 / 12**0.5) < 1.05


def test_clipping_the_largest_weight_may_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)
    ours = np.square(dequantised(to_four_bit(product(matrix), 128)[0])["p"] - matrix).mean()
    monkeypatch.setattr("onnxprune.graph.four_bit._SHRINK", (1.0,))
    unclipped = np.square(dequantised(to_four_bit(product(matrix), 128)[0])["p"] - matrix).mean()
    assert ours < 0.95 * unclipped


@pytest.mark.parametrize("longer_side", [-8, 8])
def test_weights_on_the_grid_are_kept_exactly(longer_side: int) -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(-7, 8, (64, 6))
    steps[0] = steps[32] = longer_side
    matrix = (steps * np.float32(0.25)).astype(np.float32)
    matrix[:, 3] = 0
    model, _ = to_four_bit(product(matrix))
    np.testing.assert_array_equal(dequantised(model)["p"], matrix)


def test_large_weight_is_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given = product(np.random.default_rng(0).standard_normal((48, 50)))
    whole, _ = to_four_bit(given)
    monkeypatch.setattr("onnxprune.graph.four_bit._CHUNK_BYTES", 2000)
    pieces, _ = to_four_bit(given)
    assert pieces.to_proto() == whole.to_proto()


def test_same_bytes_every_time_and_the_given_model_unchanged() -> None:
    model = load(zoo.path("bert-sdpa-do18"))
    before = model.to_proto().SerializeToString(deterministic=True)
    first, second = (to_four_bit(model)[0].to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_file_is_valid_and_an_eighth_plus_scales() -> None:
    given = product(np.random.default_rng(0).standard_normal((512, 256)))
    model, _ = to_four_bit(given)
    onnx.checker.check_model(model.to_proto())
    assert model.weight_bytes == given.weight_bytes // 8 + given.weight_bytes // 32
    node = model.proto.graph.node[0]
    assert (node.name, node.doc_string, node.metadata_props[0].value) == ("p", "kept", "a test")


def test_shared_weight_is_packed_once_and_a_tied_table_stays() -> None:
    net = Net()
    table, ids = net.weight(20, WIDTH), net.input("ids", ["batch", "seq"], TensorProto.INT64)
    square = net.weight(WIDTH, WIDTH)
    embedded = net.add("x", net("Gather", table, ids))
    tied = net("MatMul", net("MatMul", net("MatMul", embedded, square), square), net("Transpose", table, perm=[1, 0]))
    model, count = to_four_bit(Model.from_proto(net.done(tied, **{tied: ["batch", "seq", 20]})))
    names = model.initializer_names
    assert count == 2
    assert table in names
    assert square not in names
    assert len(names) == 3


def test_only_the_products_named_are_rewritten() -> None:
    model = load(zoo.path("bert-sdpa-do18"))
    name = next(node.name for node in model.proto.graph.node if node.op_type == "MatMul")
    rewritten, count = to_four_bit(model, products={name})
    assert count == 1
    assert [node.name for node in rewritten.proto.graph.node if node.op_type == "MatMulNBits"] == [name]


def test_model_without_products_is_returned_as_it_is() -> None:
    net = Net()
    model = Model.from_proto(net.done(net("Tanh", "x")))
    assert to_four_bit(model) == (model, 0)
    assert to_four_bit(load(zoo.path("bert-sdpa-do18")), products=[])[1] == 0


def test_weight_that_old_files_declare_as_input_can_no_longer_be_fed() -> None:
    model, _ = to_four_bit(product(np.ones((32, 4)), declared=True))
    assert [value.name for value in model.proto.graph.input] == ["x"]
    assert "w" not in model.initializer_names


def test_what_cannot_be_done_is_refused() -> None:
    model = product(np.ones((32, 4)))
    with pytest.raises(InputError, match="blocks of 16, 32, 64, 128, 256, not 20"):
        to_four_bit(model, 20)
    with pytest.raises(InputError, match="no node 'q'"):
        to_four_bit(model, products={"q"})
    scaled = product(np.ones((32, 4)), rank=2, gemm={"alpha": 2.0})
    assert to_four_bit(scaled)[1] == 0
    with pytest.raises(InputError, match=r"Gemm\(p\) cannot have 4-bit weights: its alpha"):
        to_four_bit(scaled, products={"p"})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_weights_are_refused(bad: float) -> None:
    matrix = np.ones((40, 4))
    matrix[35, 2] = bad
    with pytest.raises(InputError, match="weight 'w' holds NaN or infinite"):
        to_four_bit(product(matrix))
