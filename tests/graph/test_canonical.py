"""One form for what exporters write differently, without growing the model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.errors import InputError
from onnxprune.graph.canonical import canonicalise, with_fresh_shapes
from onnxprune.graph.model import load
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net


def test_copies_of_a_weight_stay_one_weight() -> None:
    """TorchScript gives every reader of a shared weight an Identity of its own."""
    net = Net()
    up, down = net.weight(FFN, WIDTH), net.weight(FFN, WIDTH)
    y = "x"
    for _ in range(3):
        hidden = net("Relu", net("MatMul", y, net("Transpose", net("Identity", up), perm=[1, 0])))
        y = net.add(y, net("MatMul", hidden, net("Identity", down)))
    canonical, _ = canonicalise(load(net.done(y)))
    assert canonical.parameters == 2 * FFN * WIDTH
    assert {node.op_type for node in canonical.proto.graph.node} == {"MatMul", "Relu", "Add"}


def test_a_tied_embedding_is_not_copied() -> None:
    net = Net()
    table = net.weight(50, WIDTH)
    rows = net("Gather", table, net("Cast", net("ReduceSum", "x", net.ints(2), keepdims=0), to=7), axis=0)
    scores = net("MatMul", net.add(rows, "x"), net("Transpose", table, perm=[1, 0]))
    canonical, _ = canonicalise(load(net.done(scores, **{scores: ["batch", "seq", 50]})))
    assert canonical.parameters == 50 * WIDTH


def test_computed_reshape_targets_become_constants() -> None:
    net = Net()
    shape = net("Shape", "x")
    parts = [net("Slice", shape, net.ints(i), net.ints(i + 1)) for i in range(2)]
    y = net("Reshape", "x", net("Concat", *parts, net.ints(3, 4), axis=0))
    y = net("Reshape", net("Relu", y), net("Concat", *parts, net.ints(-1), axis=0))
    model = load(net.done(y))
    canonical, _ = canonicalise(model)
    assert [node.op_type for node in canonical.proto.graph.node] == ["Reshape", "Relu", "Reshape"]
    targets = [canonical.initializer(node.input[1]) for node in canonical.proto.graph.node if node.op_type == "Reshape"]
    assert [target.tolist() for target in targets if target is not None] == [[0, 0, 3, 4], [0, 0, WIDTH]]
    for rows, tokens in ((1, 1), (4, 9)):
        x = np.random.default_rng(0).standard_normal((rows, tokens, WIDTH)).astype(np.float32)
        np.testing.assert_array_equal(run(open_session(canonical), {"x": x})[0], np.maximum(x, 0))


def test_canonical_form_is_reached_at_once() -> None:
    first, _ = canonicalise(load(zoo.path("bert-sdpa-do18")))
    second, _ = canonicalise(first)
    assert [node.op_type for node in second.proto.graph.node] == [node.op_type for node in first.proto.graph.node]
    assert second.parameters == first.parameters


def test_nodes_get_unique_names_and_keep_those_they_have() -> None:
    net = Net()
    model = net.done(net.add("x", net.ffn("x")))
    for node in model.graph.node:
        node.name = "same" if node.op_type == "MatMul" else ""
    canonical, _ = canonicalise(load(model))
    names = [node.name for node in canonical.proto.graph.node]
    assert len(set(names)) == len(names)
    assert "same" in names
    assert all(names)


def test_an_old_file_that_declares_its_weights_as_inputs_becomes_one_that_does_not() -> None:
    net = Net()
    model = net.done(net.add("x", net.ffn("x")))
    model.ir_version = 3
    model.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer)
    canonical, _ = canonicalise(load(model))
    assert canonical.input_names == ("x",)
    onnx.checker.check_model(canonical.to_proto(), full_check=True)


def test_a_graph_that_does_not_run_is_an_input_error() -> None:
    net = Net()
    picked = net("Gather", net.weight(3, WIDTH), net.constant(np.array([5])), axis=0)
    with pytest.raises(InputError, match=r"does not run on small made-up inputs.*give calibration data"):
        canonicalise(load(net.done(net.add("x", picked))))
    net = Net()
    with pytest.raises(InputError, match="cannot load the model"):
        canonicalise(load(net.done(net("MatMul", "x", net.weight(WIDTH + 1, WIDTH)))))


def test_rotary_caches_are_expanded_where_the_runtime_needs_it() -> None:
    name = "llama-sdpa-do23"
    canonical, _ = canonicalise(load(zoo.path(name)))
    feeds = zoo.feeds(name, batch=3, seq=6)
    together = run(open_session(canonical), feeds)[0]
    one_by_one = [run(open_session(canonical), {key: array[i : i + 1] for key, array in feeds.items()})[0] for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(one_by_one), rtol=1e-4, atol=1e-4)


def test_fresh_shapes_replace_stale_ones() -> None:
    net = Net()
    y = net("Relu", "x")
    model = net.done(net.add(y, "x"))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, [1, 2]))
    fresh = with_fresh_shapes(load(model))
    assert [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in fresh.proto.graph.value_info] == [
        ["batch", "seq", WIDTH]
    ]
