"""Clean-up: what nobody reads goes, what is stored twice is stored once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.clean import clean
from onnxprune.graph.model import Model, load
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import WIDTH, Net

FEEDS = {"x": np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)}


def test_equal_weights_are_stored_once_large_and_small() -> None:
    net = Net()
    weight = np.random.default_rng(1).standard_normal((WIDTH, 30)).astype(np.float32)
    bias = np.ones(30, np.float32)
    parts = [net("Add", net("MatMul", "x", net.constant(weight)), net.constant(bias)) for _ in range(3)]
    plain = load(net.done(net("Sum", *parts), **{"Sum.6": ["batch", "seq", 30]}))
    assert len(plain.weights) == 3
    model, number = clean(plain)
    assert number == 4
    assert len(model.weights) == 1
    assert len(model.proto.graph.initializer) == 2
    assert np.array_equal(run(open_session(model), FEEDS)[0], run(open_session(plain), FEEDS)[0])


def test_values_that_only_compare_equal_stay_apart() -> None:
    """0.0 and -0.0, other types, other shapes."""
    arrays = [np.zeros(4, np.float32), -np.zeros(4, np.float32), np.zeros(4, np.int32), np.zeros((2, 2), np.float32)]
    net = Net()
    names = [net("Cast", net("Reshape", net.constant(array), net.ints(-1)), to=TensorProto.FLOAT) for array in arrays]
    total = net("ReduceSum", net("Concat", *names, axis=0))
    model, _ = clean(load(net.done(net("Add", "x", total))))
    assert len(model.proto.graph.initializer) == len(arrays) + 1  # the target of the reshapes is shared


def test_an_initializer_that_may_be_fed_is_not_merged() -> None:
    net = Net()
    fed, fixed = (net.constant(np.ones(WIDTH, np.float32)) for _ in range(2))
    net.input(fed, [WIDTH])
    plain = load(net.done(net("Mul", net("Add", "x", fed), fixed)))
    model, number = clean(plain)
    assert number == 0
    assert model is plain


def test_dead_nodes_and_what_only_they_read_go() -> None:
    net = Net()
    kept = net.linear("x")
    net.linear(net.linear("x"))
    plain = load(net.done(kept))
    model, number = clean(plain)
    assert number == 4 + 4
    assert [node.op_type for node in model.proto.graph.node] == ["MatMul", "Add"]
    assert np.array_equal(run(open_session(model), FEEDS)[0], run(open_session(plain), FEEDS)[0])


def test_what_a_body_reads_by_name_stays() -> None:
    model, _ = clean(_branching())
    for flag in (True, False):
        inputs = {"flag": np.array(flag)}
        assert np.array_equal(run(open_session(model), inputs)[0], run(open_session(_branching()), inputs)[0])


def _branching() -> Model:
    """If whose branches read two equal initializers and a computed tensor of the graph around them."""
    declared = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    bodies = [helper.make_graph([helper.make_node("Add", [name, "computed"], ["y"])], name, [], [declared]) for name in ("a", "b")]
    nodes = [
        helper.make_node("Mul", ["a", "c"], ["computed"], name="computed"),
        helper.make_node("If", ["flag"], ["out"], name="if", then_branch=bodies[0], else_branch=bodies[1]),
    ]
    constants = [numpy_helper.from_array(np.arange(3, dtype=np.float32), name) for name in ("a", "b", "c")]
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [3])
    graph = helper.make_graph(nodes, "branching", [flag], [output], constants)
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.mark.parametrize("name", ["bert-sdpa-ts17", "gpt2-eager-do18", "llama-sdpa-do23"])
def test_exports_compute_the_same_and_are_clean_afterwards(name: str) -> None:
    plain, _ = canonicalise(load(zoo.path(name)))
    model, _ = clean(plain)
    onnx.checker.check_model(model.to_proto())
    assert clean(model)[1] == 0
    inputs = zoo.feeds(name)
    assert np.array_equal(run(open_session(model), inputs)[0], run(open_session(plain), inputs)[0])
