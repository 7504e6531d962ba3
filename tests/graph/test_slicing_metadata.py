"""What slicing leaves as it was: metadata, names, the input model, and the arrays of every weight it does not cut."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.instrument import masked_model
from onnxprune.graph.model import load
from onnxprune.graph.slicing import slice_model
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net

KEPT = {"layer.0.heads": np.array([0, 2]), "layer.1.ffn": np.arange(0, 160, 3), "layer.2.heads": np.zeros(0, np.int64)}


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    proto = onnx.load(zoo.path("bert-sdpa-do18"))
    proto.metadata_props.add(key="licence", value="Apache-2.0")
    proto.graph.metadata_props.add(key="origin", value="here")
    proto.graph.doc_string = "a graph"
    for index, node in enumerate(proto.graph.node):
        node.metadata_props.add(key="position", value=str(index))
    return study(*canonicalise(load(proto)))


def test_metadata_of_model_graph_and_nodes_survives(anatomy: Anatomy) -> None:
    sliced = slice_model(anatomy, KEPT).proto
    assert {entry.key: entry.value for entry in sliced.metadata_props}["licence"] == "Apache-2.0"
    assert {entry.key: entry.value for entry in sliced.graph.metadata_props}["origin"] == "here"
    assert sliced.graph.doc_string == "a graph"
    before = {node.name: [(entry.key, entry.value) for entry in node.metadata_props] for node in anatomy.model.proto.graph.node}
    kept = [node for node in sliced.graph.node if node.name in before]
    assert len(kept) > 100
    assert all([(entry.key, entry.value) for entry in node.metadata_props] == before[node.name] for node in kept)
    assert any(dict(before[node.name]).get("position") for node in kept)


def test_names_are_unique_and_the_signature_is_kept(anatomy: Anatomy) -> None:
    sliced = slice_model(anatomy, KEPT)
    graph = sliced.proto.graph
    nodes = [node.name for node in graph.node]
    made = [name for node in graph.node for name in node.output if name] + [tensor.name for tensor in graph.initializer]
    assert len(set(nodes)) == len(nodes)
    assert len(set(made)) == len(made)
    original = anatomy.model.proto.graph
    assert list(graph.input) == list(original.input)
    assert list(graph.output) == list(original.output)
    assert sliced.proto.opset_import == anatomy.model.proto.opset_import
    assert sliced.proto.ir_version == anatomy.model.proto.ir_version


def test_the_model_that_is_sliced_is_not_touched(anatomy: Anatomy) -> None:
    proto = anatomy.model.proto.SerializeToString(deterministic=True)
    weights = {name: array.copy() for name, array in anatomy.model.weights.items()}
    slice_model(anatomy, KEPT)
    masked_model(anatomy)
    assert anatomy.model.proto.SerializeToString(deterministic=True) == proto
    assert anatomy.model.weights.keys() == weights.keys()
    assert all(np.array_equal(anatomy.model.weights[name], array) for name, array in weights.items())


def test_slicing_twice_gives_the_same_bytes(anatomy: Anatomy) -> None:
    first, second = (slice_model(anatomy, KEPT).to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_untouched_weights_are_shared_not_copied(anatomy: Anatomy) -> None:
    sliced = slice_model(anatomy, KEPT)
    same = [name for name in sliced.weights if name in anatomy.model.weights]
    assert len(same) > 10
    assert all(sliced.weights[name] is anatomy.model.weights[name] for name in same)
    assert all(masked_model(anatomy).weights[name] is array for name, array in anatomy.model.weights.items())


def test_the_file_shrinks_by_what_was_removed(anatomy: Anatomy) -> None:
    sliced = slice_model(anatomy, KEPT)
    assert set(sliced.weights) <= {tensor.name for tensor in sliced.proto.graph.initializer}
    read = {name for node in sliced.proto.graph.node for name in node.input}
    assert {tensor.name for tensor in sliced.proto.graph.initializer} <= read
    hidden, heads, ffn = zoo.HIDDEN["bert"], zoo.HEADS["bert"], zoo.FFN["bert"]
    per_head = (4 * hidden + 3) * hidden // heads
    # The emptied block keeps its output bias, as a constant of the residual sum.
    gone = 2 * per_head + heads * per_head + (ffn - len(KEPT["layer.1.ffn"])) * (2 * hidden + 1)
    assert anatomy.model.parameters - sliced.parameters == gone


def test_a_shared_weight_is_cut_for_one_reader_and_whole_for_the_other() -> None:
    net = Net()
    up, first, second = net.weight(WIDTH, FFN), net.weight(FFN, WIDTH), net.weight(FFN, WIDTH)
    y = net.add("x", net("MatMul", net("Relu", net("MatMul", "x", up)), first))
    y = net.add(y, net("MatMul", net("Relu", net("MatMul", y, up)), second))
    anatomy = study(*canonicalise(load(net.done(y))))
    whole = {
        array.shape for tensor in anatomy.model.proto.graph.initializer if (array := anatomy.model.initializer(tensor.name)) is not None
    }
    both = slice_model(anatomy, {"layer.0.ffn": np.arange(4), "layer.1.ffn": np.arange(4)})
    assert sorted(tensor.dims[:] for tensor in both.proto.graph.initializer) == [[4, WIDTH], [4, WIDTH], [WIDTH, 4]]
    one = slice_model(anatomy, {"layer.0.ffn": np.arange(4)})
    assert {tuple(tensor.dims) for tensor in one.proto.graph.initializer} == {(4, WIDTH), (WIDTH, 4)} | whole


def test_a_sliced_model_can_be_studied_and_sliced_again(anatomy: Anatomy) -> None:
    again = study(*canonicalise(slice_model(anatomy, KEPT)))
    assert [site.units for site in again.sites if site.kind == "heads"] == [2, 4]
    assert [site.units for site in again.sites if site.kind == "ffn"] == [160, 54, 160]
    smaller = slice_model(again, {again.sites[0].name: np.array([1])})
    assert smaller.parameters < again.model.parameters
