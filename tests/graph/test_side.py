"""Masks, positions and biases beside the features: shared by layers, they couple none of them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.model import Model, load
from onnxprune.graph.side import side_tensors
from onnxprune.graph.slicing import slice_model
from onnxprune.graph.view import GraphView
from tests.graph.net import HEADS, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases, random_kept

BUCKETS = 5


def distances(net: Net) -> str:
    """Bucket of every pair of positions [S, S], from the length of x alone."""
    length = net("Gather", net("Shape", "x"), net.constant(np.int64(1)))
    places = net("Range", net.constant(np.int64(0)), length, net.constant(np.int64(1)))
    apart = net("Abs", net("Sub", net("Unsqueeze", places, net.ints(0)), net("Unsqueeze", places, net.ints(1))))
    return str(net("Min", apart, net.constant(np.int64(BUCKETS - 1))))


def relative_bias(net: Net) -> str:
    """[1, H, S, S]"""
    looked_up = net("Gather", net.weight(BUCKETS, HEADS), distances(net))
    return str(net("Unsqueeze", net("Transpose", looked_up, perm=[2, 0, 1]), net.ints(0)))


def padding(net: Net) -> str:
    """[B, 1, 1, S]: 0 or very negative, from an input that says which tokens are real."""
    mask = net("Cast", net.input("attention_mask", ["batch", "seq"], TensorProto.INT64), to=TensorProto.FLOAT)
    hidden = net("Mul", net("Sub", net.constant(np.float32(1)), mask), net.constant(np.float32(-1e4)))
    return str(net("Unsqueeze", hidden, net.ints(1, 2)))


def two_layers(net: Net, bias: str) -> onnx.ModelProto:
    x = net.add("x", net.attention("x", bias))
    return net.done(net.add(x, net.attention(x, bias)))


def check_two_sites(anatomy: Anatomy) -> None:
    assert [(site.name, site.units) for site in anatomy.sites] == [("layer.0.heads", HEADS), ("layer.1.heads", HEADS)]
    assert not anatomy.refusals
    compare = Comparison(anatomy)
    rng = np.random.default_rng(0)
    for kept in [*corner_cases(anatomy.sites), *(random_kept(anatomy.sites, rng) for _ in range(3))]:
        compare.check(kept)


def count(model: Model, op: str) -> int:
    return sum(node.op_type == op for node in model.proto.graph.node)


def test_a_bias_shared_by_two_layers_leaves_each_its_own_heads() -> None:
    net = Net()
    check_two_sites(anatomy_of(two_layers(net, net.add(relative_bias(net), padding(net)))))


def test_a_bias_of_one_layer_is_cut_where_it_is_stored() -> None:
    net = Net()
    anatomy = anatomy_of(net.done(net.add("x", net.attention("x", relative_bias(net)))))
    (site,) = anatomy.sites
    assert not site.group.picks
    smaller = Comparison(anatomy).check({site.name: np.array([0, 2])})
    assert count(smaller, "Gather") == count(anatomy.model, "Gather")
    assert any(list(tensor.dims) == [BUCKETS, 2] for tensor in smaller.proto.graph.initializer)


def test_a_bias_that_one_layer_reads_twice_is_cut_where_it_is_stored() -> None:
    net = Net()
    bias = relative_bias(net)
    anatomy = anatomy_of(net.done(net.add("x", net.attention("x", net.add(bias, net("Tanh", bias))))))
    (site,) = anatomy.sites
    assert not site.group.picks
    Comparison(anatomy).check({site.name: np.array([1])})


def test_layers_that_keep_the_same_heads_pick_them_once() -> None:
    net = Net()
    anatomy = anatomy_of(two_layers(net, relative_bias(net)))
    before = count(anatomy.model, "Gather")
    assert count(slice_model(anatomy, {site.name: np.array([0, 2]) for site in anatomy.sites}), "Gather") == before + 1
    assert count(slice_model(anatomy, {"layer.0.heads": np.array([0]), "layer.1.heads": np.array([2])}), "Gather") == before + 2


def test_a_bias_that_is_an_output_keeps_all_its_heads() -> None:
    net = Net()
    bias = relative_bias(net)
    x = net.add("x", net.attention("x", bias))
    model = net.done(x, bias, **{bias: [1, HEADS, "seq", "seq"]})
    anatomy = anatomy_of(model)
    assert [site.units for site in anatomy.sites] == [HEADS]
    Comparison(anatomy).check({"layer.0.heads": np.array([1])})


def test_a_table_computed_by_an_operator_without_a_rule_is_cut_behind_it() -> None:
    net = Net()
    looked_up = net("CumSum", net("Gather", net.weight(BUCKETS, HEADS), distances(net)), net.constant(np.int64(2)))
    bias = net("Unsqueeze", net("Transpose", looked_up, perm=[2, 0, 1]), net.ints(0))
    anatomy = anatomy_of(net.done(net.add("x", net.attention("x", bias))))
    (site,) = anatomy.sites
    assert [pick.role for pick in site.group.picks] == ["rides"]
    compare = Comparison(anatomy)
    for kept in corner_cases(anatomy.sites):
        compare.check(kept)


def test_tables_in_one_tensor_of_all_layers_are_cut_for_each_layer() -> None:
    """A Split hands every layer its own rows: one layer's heads are not another's."""
    net = Net()
    both = net("Gather", net.weight(BUCKETS, 2, HEADS), distances(net))
    first, second = net("Split", net("Transpose", both, perm=[2, 3, 0, 1]), outputs=2, axis=0, num_outputs=2)
    x = net.add("x", net.attention("x", first))
    check_two_sites(anatomy_of(net.done(net.add(x, net.attention(x, second)))))


def test_features_of_tokens_are_no_side_tensors() -> None:
    net = Net()
    mask, bias = padding(net), relative_bias(net)
    ids = net.input("input_ids", ["batch", "seq"], TensorProto.INT64)
    embedded = net("Gather", net.weight(7, WIDTH), ids)
    x = net.add("x", embedded)
    view = GraphView(load(net.done(net.add(x, net.attention(x, net.add(mask, bias))))))
    side = side_tensors(view)
    assert {mask, bias} <= side
    assert not side & {"x", embedded, x}
