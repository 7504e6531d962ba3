"""``inspect --why``: every name of a graph has an answer that names constants, operators and places."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxprune.graph.anatomy import Anatomy, study
from onnxprune.graph.canonical import canonicalise
from onnxprune.graph.explain import Answer, explain
from onnxprune.graph.model import load
from tests import zoo
from tests.graph.net import FFN, WIDTH, Net
from tests.graph.pruning import anatomy_of

EXPORTS = ("bert-eager-ts17", "llama-sdpa-do18", "gpt2-sdpa-do23")


@cache
def export(name: str) -> Anatomy:
    return study(*canonicalise(load(zoo.path(name))))


def only(anatomy: Anatomy, name: str) -> Answer:
    (answer,) = explain(anatomy, name)
    return answer


def said(answer: Answer, label: str) -> str:
    return "\n".join(text for key, text in answer.details if key == label)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_name_of_a_real_export_is_answered(name: str) -> None:
    anatomy = export(name)
    nodes = anatomy.view.nodes
    for node in nodes[:: max(len(nodes) // 40, 1)]:
        for wanted in (node.name, node.outputs[0]):
            answers = [answer for answer in explain(anatomy, wanted) if answer.about in ("node", "tensor")]
            assert answers
            assert all(answer.details for answer in answers), wanted


def test_a_site_names_its_constants_readers_and_ties() -> None:
    heads, ffn = explain(export("llama-sdpa-do18"), "layer.0")
    assert (heads.name, ffn.name) == ("layer.0.heads", "layer.0.ffn")
    assert said(heads, "cuts").count("makes them") == 3
    assert "axis 1, 32 positions per unit" in said(heads, "cuts")
    assert "all heads of queries that share it" in said(heads, "one unit")
    assert "joins the residual stream at node_add" in said(heads, "read by")
    assert "independently" in said(heads, "tied to")
    assert said(ffn, "one unit") == ""


def test_a_layer_does_not_answer_for_those_whose_number_it_begins() -> None:
    net = Net()
    y = "x"
    for _ in range(11):
        y = net.add(y, net.attention(y))
    assert [answer.name for answer in explain(anatomy_of(net.done(y)), "layer.1")] == ["layer.1.heads"]


def test_layers_that_share_all_weights_are_one_site() -> None:
    net = Net()
    up, down = net.weight(WIDTH, FFN), net.weight(FFN, WIDTH)
    y = "x"
    for _ in range(2):
        y = net.add(y, net("MatMul", net("Tanh", net("MatMul", y, up)), down))
    answer = only(anatomy_of(net.done(y)), "layer.0.ffn")
    assert "4 MatMul" in said(answer, "passes")
    assert "independently" in said(answer, "tied to")


def test_a_shared_weight_is_a_tie() -> None:
    net = Net()
    up = net.weight(WIDTH, FFN)
    y = "x"
    for _ in range(2):
        y = net.add(y, net.linear(net("Tanh", net("MatMul", y, up)), FFN, WIDTH))
    answer = only(anatomy_of(net.done(y)), "layer.0.ffn")
    assert f"layer.1.ffn, which also cuts {up}" in said(answer, "tied to")


def test_a_weight_that_a_node_outside_keeps_whole_is_a_tie() -> None:
    net = Net()
    up = net.weight(WIDTH, FFN)
    y = net.add("x", net.linear(net("Tanh", net("MatMul", "x", up)), FFN, WIDTH))
    logits = net("MatMul", y, up)
    answer = only(anatomy_of(net.done(logits, **{logits: ["batch", "seq", FFN]})), "layer.0.ffn")
    assert f"which reads {up} as well and keeps it whole" in said(answer, "tied to")


def test_a_blocked_axis_names_reason_operator_and_place() -> None:
    anatomy = export("bert-eager-ts17")
    weight = "inner.bert.embeddings.word_embeddings.weight"
    answer = only(anatomy, weight)
    assert answer.summary.endswith("part of no site")
    assert "axis 0 (200): Gather picks positions along this axis (at /inner/bert/embeddings/word_embeddings/Gather)" in said(answer, weight)
    assert "axis 1 (64): blocked: LayerNormalization normalises over this axis (at /inner/bert/embeddings/LayerNorm" in said(answer, weight)


def test_a_table_of_positions_is_answered() -> None:
    anatomy = export("bert-eager-ts17")
    table = anatomy.view.producer["/inner/bert/embeddings/Slice_output_0"].inputs[0]
    assert "axis 1 (64): Slice takes a part of this axis that varies (at /inner/bert/embeddings/Slice)" in said(only(anatomy, table), table)


def test_a_node_outside_every_site_names_the_refusal() -> None:
    answer = only(export("bert-eager-ts17"), "/inner/bert/pooler/dense/Gemm")
    assert "part of no site" in answer.summary
    assert "OP202, the neurons do not end in a residual branch" in said(answer, "inner.bert.pooler.dense.weight")


def test_the_depth_of_queries_and_keys_is_told_from_heads() -> None:
    net = Net()
    model = net.done(net.add("x", net.attention("x")))
    query = next(node.output[0] for node in model.graph.node if node.op_type == "Transpose")
    text = said(only(anatomy_of(model), query), query)
    assert "axis 1 (3): shrinks with layer.0.heads" in text
    assert "axis 3 (4): two activations are multiplied along it" in text


def test_a_code_lists_its_places_or_says_that_there_are_none() -> None:
    anatomy = export("bert-eager-ts17")
    assert said(only(anatomy, "op202"), "/inner/classifier/Gemm") == "the neurons do not end in a residual branch"
    assert only(anatomy, "OP101").summary.endswith("no place of this model")


def test_a_part_of_many_names_lists_them() -> None:
    answer = only(export("bert-eager-ts17"), "LayerNorm")
    assert answer.about == "names"
    assert re.search(r"and \d+ more", answer.summary)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert "'layer.O.heads'; the nearest names are layer." in only(export("gpt2-sdpa-do23"), "layer.O.heads").summary
    assert "sites are named like layer.0.heads" in only(export("gpt2-sdpa-do23"), "elephant").summary
    assert "no site" in only(anatomy_of(Net().done("x")), "elephant").summary


def test_a_name_that_was_simplified_away_is_told_from_an_unknown_one() -> None:
    net = Net()
    spare = net.linear("x")
    total = net("Add", net.constant(np.ones(WIDTH, np.float32)), net.constant(np.ones(WIDTH, np.float32)))
    model = load(net.done(net("Add", net.add("x", net.ffn("x")), total)))
    anatomy = study(*canonicalise(model))
    (gone,) = explain(anatomy, spare, model)
    assert "is in the file, but simplified away" in gone.summary
    (folded,) = explain(anatomy, total.removesuffix(".0"), model)  # the node: its result is a constant now
    assert folded.name == total
    assert folded.summary.startswith("constant")


def test_a_node_inside_a_body_names_its_owner() -> None:
    net = Net()
    y = net.add("x", net.ffn("x"))
    inner = onnx.helper.make_node("Relu", [y], ["inside"], name="inner.relu")
    body = onnx.helper.make_graph([inner], "body", [], [onnx.helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)])
    flag = net("Greater", net("ReduceSum", "x", keepdims=0), net.constant(np.float32(0)))
    model = load(net.done(net("If", flag, then_branch=body, else_branch=body)))
    (answer,) = explain(study(*canonicalise(model)), "inside", model)
    assert "inside the body of If" in answer.summary
    assert y in answer.summary
