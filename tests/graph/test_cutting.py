"""Pieces of a graph run one after the other give what the whole graph gives; constants change for one reader only."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxprune.calibration import Batch
from onnxprune.calibration.prefix import Prefix
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.model import Model, load
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import RuntimeOptions, open_session, run
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import anatomy_of


def cut(feeds: dict[str, np.ndarray], rows: int) -> list[Batch]:
    count = len(next(iter(feeds.values())))
    index = [np.arange(start, min(start + rows, count)) for start in range(0, count, rows)]
    return [Batch({name: array[rows] for name, array in feeds.items()}, rows, np.ones(len(rows), bool), None, None) for rows in index]


@pytest.mark.parametrize("name", ["bert-sdpa-do18", "gpt2-eager-ts17", "llama-sdpa-do23"])
def test_a_prefix_reaches_every_site_with_the_values_of_the_whole_graph(name: str) -> None:
    anatomy = anatomy_of(load(zoo.path(name)))
    feeds = zoo.feeds(name, batch=5, seq=9)
    batches = cut({key: feeds[key] for key in anatomy.model.input_names}, 2)
    tensors = [site.consumers[0].tensor for site in anatomy.sites]
    whole = open_session(with_outputs(anatomy.model, tensors, keep=False), optimize=False)
    expected = [run(whole, batch.feeds, tensors) for batch in batches]
    prefix = Prefix(anatomy.model, batches, RuntimeOptions())
    for position, tensor in enumerate(tensors):
        for number, (value,) in enumerate(prefix.advance([tensor], [tensor])):
            np.testing.assert_allclose(value, expected[number][position], rtol=1e-4, atol=1e-5)
    outputs = list(prefix.advance(list(anatomy.model.output_names), list(anatomy.model.output_names)))
    direct = open_session(anatomy.model)
    for batch, values in zip(batches, outputs, strict=True):
        np.testing.assert_allclose(values[0], run(direct, batch.feeds)[0], rtol=1e-4, atol=1e-5)


def test_sizes_computed_in_one_piece_are_read_in_the_next() -> None:
    """Shape inference takes sizes of unknown number for none, and onnxruntime refuses the graph."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 2, h, w] x) => (float[N, 2, p, q] y) {
        shape = Shape (x)
        half = Sigmoid (x)
        first, last = Split (shape)
        double = Add (last, last)
        relu = Relu (half)
        sizes = Concat <axis = 0> (first, double)
        y = Resize <mode = "linear"> (relu, , , sizes)
    }""")
    x = np.random.default_rng(0).standard_normal((4, 2, 3, 5)).astype(np.float32)
    prefix = Prefix(load(model), cut({"x": x}, 2), RuntimeOptions())
    for stop in (["half", "first", "double"], ["relu"], ["y"]):
        values = [value for *_, value in prefix.advance(stop, stop)]
    expected = run(open_session(load(model)), {"x": x})[0]
    np.testing.assert_allclose(np.concatenate(values), expected, rtol=1e-5)


def test_a_prefix_keeps_the_boundary_only() -> None:
    name = "bert-sdpa-do18"
    anatomy = anatomy_of(load(zoo.path(name)))
    prefix = Prefix(anatomy.model, cut(zoo.feeds(name, batch=4, seq=9), 4), RuntimeOptions())
    held = []
    for site in anatomy.sites:
        list(prefix.advance([site.consumers[0].tensor], [site.consumers[0].tensor]))
        held.append(sum(array.nbytes for array in prefix.known[0].values()))
    everything = sum(int(np.prod(shape)) * 4 for shape in anatomy.profile.shapes[0].values())
    assert max(held) < everything / 5
    assert held[-1] < 2 * held[1]


def test_weights_replaced_on_the_way_count_from_there_on() -> None:
    net = Net()
    first = net("MatMul", "x", net.weight(WIDTH, WIDTH))
    second = net("MatMul", net("Relu", first), net.weight(WIDTH, WIDTH))
    model = load(net.done(second))
    x = np.random.default_rng(0).standard_normal((4, 5, WIDTH)).astype(np.float32)
    batches = cut({"x": x}, 2)
    prefix = Prefix(model, batches, RuntimeOptions())
    seen = np.concatenate([values[0] for values in prefix.advance([first], [first])])
    change = {(0, 1): np.zeros((WIDTH, WIDTH), np.float32), (2, 1): np.eye(WIDTH, dtype=np.float32)}
    prefix.replace(replace_constants(model, change, "~new"))
    after = np.concatenate([values[0] for values in prefix.advance([second], [second])])
    np.testing.assert_allclose(after, np.maximum(seen, 0), rtol=1e-6)


def shared() -> Model:
    """Two products of one weight."""
    net = Net()
    weight = net.weight(WIDTH, WIDTH)
    return load(net.done(net("MatMul", net("MatMul", "x", weight), weight)))


def test_a_constant_is_replaced_for_one_reader() -> None:
    model = shared()
    new = replace_constants(model, {(1, 1): np.eye(WIDTH, dtype=np.float32)}, "~refit")
    x = np.random.default_rng(0).standard_normal((1, 2, WIDTH)).astype(np.float32)
    weight = model.initializer(model.proto.graph.node[0].input[1])
    np.testing.assert_allclose(run(open_session(new), {"x": x})[0], x @ weight, rtol=1e-5)
    assert len(model.proto.graph.initializer) == 1
    onnx.checker.check_model(new.to_proto())


def test_replacing_again_drops_what_nobody_reads_and_finds_a_free_name() -> None:
    model = shared()
    once = replace_constants(model, {(0, 1): np.eye(WIDTH, dtype=np.float32), (1, 1): np.eye(WIDTH, dtype=np.float32)}, "~refit")
    twice = replace_constants(once, {(0, 1): 2 * np.eye(WIDTH, dtype=np.float32)}, "~refit")
    names = [tensor.name for tensor in twice.proto.graph.initializer]
    assert len(names) == len(set(names)) == len(twice.weights) == 2
    x = np.ones((1, 1, WIDTH), np.float32)
    np.testing.assert_allclose(run(open_session(twice), {"x": x})[0], 2 * x)


def test_tensors_that_only_a_control_flow_body_reads_are_not_lost() -> None:
    net = Net()
    y = net.add("x", net.ffn("x"))
    shift = net.weight(WIDTH)
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", [y, shift], ["out"], name="inner")],
        "inner",
        [],
        [onnx.helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    flag = net("Greater", net("ReduceSum", "x", keepdims=0), net.constant(np.float32(0)))
    nested = onnx.helper.make_graph(
        [onnx.helper.make_node("If", [flag], ["nested_out"], then_branch=inner, else_branch=inner, name="nested")],
        "nested",
        [],
        [onnx.helper.make_tensor_value_info("nested_out", TensorProto.FLOAT, None)],
    )
    out = net("If", flag, then_branch=nested, else_branch=nested)
    model = load(net.done(out))
    assert shift in {name for name, readers in GraphView(model).consumers.items() if readers[0][1] == -1}
    x = np.random.default_rng(0).standard_normal((4, 3, WIDTH)).astype(np.float32)
    expected = run(open_session(model), {"x": x})[0]
    product = next(node.index for node in GraphView(model).nodes if node.op == "MatMul")
    weight = model.initializer(model.proto.graph.node[product].input[1])
    assert weight is not None
    assert weight.shape == (WIDTH, FFN)
    same = replace_constants(model, {(product, 1): weight}, "~same")
    np.testing.assert_allclose(run(open_session(same), {"x": x})[0], expected, rtol=1e-6)
    prefix = Prefix(model, cut({"x": x}, 4), RuntimeOptions())
    ((before,),) = prefix.advance([y], [y])
    ((after,),) = prefix.advance([out], [out])
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    assert before.shape == after.shape
