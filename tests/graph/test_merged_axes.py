"""Attention with batch and heads in one axis: at any batch, what is cut is the heads."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.graph.anatomy import Anatomy
from tests.graph.net import DEPTH, HEADS, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases

BUCKETS = 5


def rows(net: Net, x: str) -> str:
    """[B, S, H*D] -> [B*H, S, D]"""
    sizes = net("Shape", x)
    flat = net("Concat", net.ints(-1), net("Slice", sizes, net.ints(1), net.ints(2)), net.ints(DEPTH), axis=0)
    return str(net("Reshape", net.heads(x), flat))


def context(net: Net, scores: str, v: str) -> str:
    mixed = net("MatMul", net("Softmax", scores, axis=2), v)
    sizes = net("Concat", net.ints(-1, HEADS), net("Slice", net("Shape", "x"), net.ints(1), net.ints(2)), net.ints(DEPTH), axis=0)
    split = net("Transpose", net("Reshape", mixed, sizes), perm=[0, 2, 1, 3])
    return net.linear(str(net("Reshape", split, net.ints(0, 0, WIDTH))))


def distances(net: Net, rows_of: str) -> str:
    """Buckets of all pairs of positions, expanded to the leading axis of ``rows_of``: int64 [B*H, S, S]."""
    length = net("Gather", net("Shape", "x"), net.constant(np.int64(1)))
    places = net("Range", net.constant(np.int64(0)), length, net.constant(np.int64(1)))
    apart = net("Min", net("Abs", net("Sub", net("Unsqueeze", places, net.ints(0)), net("Unsqueeze", places, net.ints(1)))), net.ints(4))
    sizes = net("Shape", rows_of)
    target = net("Concat", *(net("Slice", sizes, net.ints(a), net.ints(a + 1)) for a in (0, 1, 1)), axis=0)
    return str(net("Expand", net("Unsqueeze", apart, net.ints(0)), target))


def disentangled(net: Net, x: str, index: str = "") -> str:
    """Scores of contents plus scores of contents and positions, gathered by distance, as DeBERTa has them."""
    query, key = net.weight(WIDTH, WIDTH), net.weight(WIDTH, WIDTH)
    q, k, v = rows(net, net("MatMul", x, query)), rows(net, net("MatMul", x, key)), rows(net, net.linear(x))
    table = net(
        "Transpose", net("Reshape", net("MatMul", net.weight(BUCKETS, WIDTH), key), net.ints(BUCKETS, HEADS, DEPTH)), perm=[1, 0, 2]
    )
    batch = net("Div", net("Slice", net("Shape", q), net.ints(0), net.ints(1)), net.ints(HEADS))
    positions = net("Tile", table, net("Concat", batch, net.ints(1, 1), axis=0))
    by_position = net("MatMul", q, net("Transpose", positions, perm=[0, 2, 1]))
    scores = net("MatMul", q, net("Transpose", k, perm=[0, 2, 1]))
    return context(net, net.add(scores, net("GatherElements", by_position, index or distances(net, q), axis=2)), v)


def check(anatomy: Anatomy, layers: int) -> None:
    assert [(site.kind, site.units) for site in anatomy.sites] == [("heads", HEADS)] * layers
    assert not anatomy.refusals
    rng = np.random.default_rng(0)
    for batch, tokens in ((1, 6), (4, 3)):
        compare = Comparison(anatomy, {"x": rng.standard_normal((batch, tokens, WIDTH)).astype(np.float32)})
        for kept in corner_cases(anatomy.sites):
            compare.check(kept)


def test_disentangled_attention_is_cut_with_its_position_table() -> None:
    net = Net()
    anatomy = anatomy_of(net.done(net.add("x", disentangled(net, "x"))))
    check(anatomy, 1)


def test_an_index_expanded_once_for_all_layers_is_picked_by_each() -> None:
    """One layer's expanded index, read by the next: the leading axis is batch x heads, which no constant can index."""
    net = Net()
    index = distances(net, rows(net, net.linear("x")))
    x = net.add("x", disentangled(net, "x", index))
    anatomy = anatomy_of(net.done(net.add(x, disentangled(net, x, index))))
    assert all(site.group.picks for site in anatomy.sites)
    check(anatomy, 2)


@pytest.mark.parametrize(("axis", "projections"), [(0, 1), (1, 3)])
def test_elements_picked_along_the_heads_keep_what_they_are_picked_from(axis: int, projections: int) -> None:
    """Where every row may read the scores of any head, only the values leave with a head."""
    net = Net()
    q, k, v = (rows(net, net.linear("x")) for _ in range(3))
    scores = net("MatMul", q, net("Transpose", k, perm=[0, 2, 1]))
    picked = net("GatherElements", scores, distances(net, q), axis=axis)
    anatomy = anatomy_of(net.done(net.add("x", context(net, picked, v))))
    (site,) = anatomy.sites
    assert sum(leaf.role == "produces" for leaf in site.group.leaves) == projections


def test_sizes_computed_from_cut_tensors_are_those_of_the_whole() -> None:
    """A batch that is computed as rows / heads stays the batch."""
    net = Net()
    anatomy = anatomy_of(net.done(net.add("x", disentangled(net, "x"))))
    sliced = Comparison(anatomy, {"x": np.ones((2, 3, WIDTH), np.float32)}).check({"layer.0.heads": np.array([1])})
    onnx.checker.check_model(sliced.to_proto(), full_check=True)
