"""Fused attentions that keep a cache themselves: heads leave queries, keys, values, cache and attributes together."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxprune.graph.profile import past_symbols, synthetic_feeds
from tests.graph.net import WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases

HEADS, DEPTH = 4, 8


def done(net: Net, context: str, shared: int, presents: list[str]) -> onnx.ModelProto:
    out = net.add("x", net.linear(context, HEADS * DEPTH, WIDTH))
    shape: list[int | str] = ["batch", shared, "total", DEPTH]
    return net.done(out, *presents, **dict.fromkeys(presents, shape))


def past(net: Net, shared: int) -> list[str]:
    return [net.input(f"past.{word}", ["batch", shared, "past", DEPTH]) for word in ("key", "value")]


def projected(net: Net, *heads: int) -> list[str]:
    return [net.linear("x", WIDTH, count * DEPTH) for count in heads]


def group_query(shared: int, packed: bool = False) -> onnx.ModelProto:
    net = Net()
    mask = net.input("attention_mask", ["batch", "past + seq"], TensorProto.INT64)
    last = net("Cast", net("Sub", net("ReduceSum", mask, net.ints(1), keepdims=0), net.ints(1)), to=TensorProto.INT32)
    total = net("Cast", net("Gather", net("Shape", mask), net.constant(np.array(1)), axis=0), to=TensorProto.INT32)
    parts = [*projected(net, HEADS + 2 * shared), "", ""] if packed else projected(net, HEADS, shared, shared)
    sizes = {"num_heads": HEADS, "kv_num_heads": shared}
    context, *presents = net.ms("GroupQueryAttention", *parts, *past(net, shared), last, total, outputs=3, **sizes)
    return done(net, context, shared, presents)


def multi_head() -> onnx.ModelProto:
    net = Net()
    parts = projected(net, HEADS, HEADS, HEADS)
    context, *presents = net.ms("MultiHeadAttention", *parts, "", "", "", *past(net, HEADS), outputs=3, num_heads=HEADS)
    return done(net, context, HEADS, presents)


def standard(shared: int, flat: bool) -> onnx.ModelProto:
    """Attention of opset 23, of three axes or of four."""
    net = Net(23)
    parts = projected(net, HEADS, shared, shared)
    if not flat:
        counts = (HEADS, shared, shared)
        shaped = [net("Reshape", part, net.ints(0, 0, count, DEPTH)) for part, count in zip(parts, counts, strict=True)]
        parts = [str(net("Transpose", part, perm=[0, 2, 1, 3])) for part in shaped]
    sizes = {"q_num_heads": HEADS, "kv_num_heads": shared} if flat else {}
    context, *presents = net("Attention", *parts, "", *past(net, shared), outputs=3, **sizes)
    if not flat:
        context = net("Reshape", net("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, HEADS * DEPTH))
    return done(net, context, shared, presents)


FORMS = {
    "multi-head": (multi_head, HEADS),
    **{f"group-query {shared}": (lambda shared=shared: group_query(shared), shared) for shared in (1, 2, HEADS)},
    **{f"group-query packed {shared}": (lambda shared=shared: group_query(shared, True), shared) for shared in (1, 2)},
    **{f"opset 23 flat {shared}": (lambda shared=shared: standard(shared, True), shared) for shared in (1, 2)},
    **{f"opset 23 {shared}": (lambda shared=shared: standard(shared, False), shared) for shared in (1, HEADS)},
}


@pytest.mark.parametrize("form", FORMS)
def test_heads_leave_a_fused_attention_and_its_cache(form: str) -> None:
    """Where all queries share one key/value head they go one by one, and the cache stays."""
    make, shared = FORMS[form]
    anatomy = anatomy_of(make())
    assert [(site.kind, site.units) for site in anatomy.sites] == [("heads", shared if shared > 1 else HEADS)]
    # Several tokens of several rows at once are more than GroupQueryAttention takes with a past.
    cases = [synthetic_feeds(anatomy.model, (1, 3, 5)), synthetic_feeds(anatomy.model, empty=past_symbols(anatomy.model))]
    for feeds in cases:
        compare = Comparison(anatomy, feeds)
        for kept in corner_cases(anatomy.sites):
            compare.check(kept)
