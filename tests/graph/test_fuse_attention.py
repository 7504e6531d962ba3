"""Fused attention: every layer with its own head count, equal to the unfused graph, and nothing fused that is not exactly attention."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.graph.canonical import canonicalise, with_fresh_shapes
from onnxprune.graph.depth import with_depths
from onnxprune.graph.fuse_attention import fuse_attention
from onnxprune.graph.model import Model, load
from onnxprune.graph.slicing import slice_model
from onnxprune.runtime.session import open_session, run
from tests import zoo
from tests.graph.net import DEPTH, HEADS, WIDTH, Net
from tests.graph.pruning import anatomy_of

TOLERANCE = 1e-5
"""Largest difference, relative to the largest output."""

LEFT_ALONE = {name for name in zoo.NAMES if name.startswith("llama") or name.endswith("sdpa-do23")}
"""Grouped key-value heads, and exports that hold the Attention operator of ONNX."""

TEXT = [name for name in zoo.NAMES if name not in LEFT_ALONE and name.split("-")[0] in ("bert", "minilm", "gpt2")]


def head_counts(model: Model) -> list[int]:
    """Heads of the fused attentions, in graph order."""
    nodes = [node for node in model.proto.graph.node if node.op_type == "MultiHeadAttention"]
    return [helper.get_node_attr_value(node, "num_heads") for node in nodes]


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    # A comparison with NaN is false, and so would pass a test of "not greater".
    assert np.isfinite(want).all()
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


def assert_same(fused: Model, plain: Model, *feeds: dict[str, np.ndarray]) -> None:
    onnx.checker.check_model(fused.to_proto())
    ours, theirs = open_session(with_fresh_shapes(fused)), open_session(plain, optimize=False)
    for inputs in feeds:
        for got, want in zip(run(ours, inputs), run(theirs, inputs), strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("name", ["bert-eager-ts17", "bert-sdpa-do18", "vit-eager-ts17", "vit-sdpa-do18"])
def test_one_head_of_one_dimension_is_not_taken_for_one_token(name: str) -> None:
    known = with_depths(anatomy_of(load(zoo.path(name))))
    least = {site.name: np.arange(1) for site in known.of_kind(["heads", "qk", "vo"])}
    plain = slice_model(known, least)
    assert_same(fuse_attention(plain)[0], plain, zoo.feeds(name, batch=3, seq=11), zoo.feeds(name, batch=1, seq=6, seed=1))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_export_keeps_its_numbers_and_each_layer_its_heads(name: str) -> None:
    anatomy = anatomy_of(load(zoo.path(name)))
    heads = [site for site in anatomy.sites if site.kind == "heads"]
    units = heads[0].units
    assert len(heads) == zoo.LAYERS
    for counts in ([units] * 3, [units - 1, 1, units], [1, 0, units - 1]):
        plain = slice_model(
            anatomy, {site.name: np.arange(site.units)[-count or site.units :] for site, count in zip(heads, counts, strict=True)}
        )
        fused, number = fuse_attention(plain)
        expected = [] if name in LEFT_ALONE else [count for count in counts if count]
        assert head_counts(fused) == expected
        assert number == len(expected)
        assert_same(fused, plain, zoo.feeds(name, batch=3, seq=11), zoo.feeds(name, batch=1, seq=6, seed=1))


@pytest.mark.parametrize("name", TEXT)
def test_rows_without_any_visible_token_are_what_they_were(name: str) -> None:
    """A row of padding alone, and padding on the left, which hides every key from the first tokens of a causal model."""
    plain, _ = canonicalise(load(zoo.path(name)))
    fused, number = fuse_attention(plain)
    assert number == zoo.LAYERS
    inputs = zoo.feeds(name, batch=4, seq=7)
    inputs["attention_mask"] = inputs["attention_mask"].copy()
    inputs["attention_mask"][0] = 0
    inputs["attention_mask"][1, :3] = 0
    assert_same(fused, plain, inputs)


@pytest.mark.parametrize("name", ["bert-sdpa-ts17", "bert-eager-ts17", "bert-sdpa-do18", "bert-eager-do23"])
def test_padding_changes_nothing_for_the_tokens_before_it(name: str) -> None:
    fused, _ = fuse_attention(canonicalise(load(zoo.path(name)))[0])
    session = open_session(fused)
    padded = zoo.feeds(name, batch=1, seq=11)
    padded["attention_mask"][:, 6:] = 0
    cut = {key: value[:, :6] for key, value in padded.items()}
    assert_close(run(session, padded)[0], run(session, cut)[0])
    visible = {**padded, "attention_mask": np.ones_like(padded["attention_mask"])}
    assert np.abs(run(session, visible)[0] - run(session, cut)[0]).max() > 0.01


@pytest.mark.parametrize(("attribute", "value"), [("num_heads", 2), ("scale", 0.3)])
def test_a_wrong_attribute_is_noticed(attribute: str, value: float) -> None:
    """The comparison itself can fail."""
    plain, _ = canonicalise(load(zoo.path("bert-sdpa-do18")))
    fused, _ = fuse_attention(plain)
    proto = fused.copy_proto()
    for node in proto.graph.node:
        for item in node.attribute:
            if node.op_type == "MultiHeadAttention" and item.name == attribute:
                item.CopyFrom(helper.make_attribute(attribute, value))
    with pytest.raises(AssertionError):
        assert_same(fused.with_proto(proto), plain, zoo.feeds("bert-sdpa-do18"))


# Against the stock optimizer.


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 1, 4]])
def test_the_stock_optimizer_is_silently_wrong_where_this_is_right(counts: list[int], tmp_path: Path) -> None:
    """Heads removed before a TorchScript export: the shapes in the file are computed, so the head count given is taken on trust."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    name = "bert-eager-ts17"
    inputs = zoo.feeds(name, batch=2, seq=9)
    path = tmp_path / "pruned.onnx"
    want = _export_pruned(name, counts, inputs, path)
    stock = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=zoo.HEADS["bert"], hidden_size=zoo.HIDDEN["bert"], opt_level=0
    ).model
    assert sum(node.op_type == "Attention" for node in stock.graph.node) == zoo.LAYERS
    assert np.abs(run(open_session(stock), inputs)[0] - want).max() > 0.05 * np.abs(want).max()
    fused, _ = fuse_attention(canonicalise(load(path))[0])
    assert head_counts(fused) == counts
    assert_close(run(open_session(fused), inputs)[0], want)


def _export_pruned(name: str, counts: list[int], inputs: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """Write a BERT whose layers keep their first ``counts`` heads; returns what torch computes with it."""
    import torch

    module = copy.deepcopy(zoo.torch_model(name))
    size = zoo.HIDDEN["bert"] // zoo.HEADS["bert"]
    for layer, count in zip(module.bert.encoder.layer, counts, strict=True):
        attention, kept = layer.attention.self, count * size
        for linear in (attention.query, attention.key, attention.value):
            linear.weight = torch.nn.Parameter(linear.weight[:kept].clone())
            linear.bias = torch.nn.Parameter(linear.bias[:kept].clone())
        dense = layer.attention.output.dense
        dense.weight = torch.nn.Parameter(dense.weight[:, :kept].clone())
        attention.num_attention_heads, attention.all_head_size = count, kept
    names = list(inputs)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.inner(**dict(zip(names, tensors, strict=True))).logits

    wrapper = Positional().eval()
    tensors = tuple(torch.from_numpy(array) for array in inputs.values())
    axes = {key: {0: "batch", 1: "seq"} for key in names}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapper, tensors, str(path), dynamo=False, opset_version=17, input_names=names, output_names=["logits"], dynamic_axes=axes
        )
        return np.asarray(wrapper(*tensors).numpy())


# Masks and spellings, node by node.


def tokens(batch: int, seq: int, **masks: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch + seq)
    shapes = {"x": (batch, seq, WIDTH), **masks}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def fused_net(net: Net, output: str, **shapes: Any) -> tuple[Model, Model, int]:
    plain = load(net.done(output, **shapes))
    fused, number = fuse_attention(plain)
    return fused, plain, number


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (["seq", "seq"], lambda b, s: (s, s)),
        ([HEADS, "seq", "seq"], lambda b, s: (HEADS, s, s)),
        ([1, 1, "seq", "seq"], lambda b, s: (1, 1, s, s)),
        (["batch", HEADS, "seq", "seq"], lambda b, s: (b, HEADS, s, s)),
        (["batch", 1, 1, "seq"], lambda b, s: (b, 1, 1, s)),
    ],
    ids=["SS", "HSS", "11SS", "BHSS", "B11S"],
)
def test_masks_that_broadcast_are_taken_along(shape: list[int | str], sizes: Any) -> None:
    net = Net()
    first = net.add("x", net.attention("x", net.input("mask", shape)))
    fused, plain, number = fused_net(net, net.add(first, net.attention(first, "mask")))
    assert number == 2
    assert_same(fused, plain, tokens(2, 5, mask=sizes(2, 5)), tokens(3, 4, mask=sizes(3, 4)), tokens(1, 1, mask=sizes(1, 1)))


def test_a_mask_over_queries_alone_is_not_taken_along() -> None:
    net = Net()
    _, _, number = fused_net(net, net.attention("x", net.input("mask", ["batch", 1, "seq", 1])))
    assert number == 0


def test_a_mask_of_zeros_whatever_is_fed_goes() -> None:
    net = Net()
    zeros = net("ConstantOfShape", net("Concat", *_batch_and_one(net), axis=0))
    fused, plain, number = fused_net(net, net.attention("x", zeros))
    assert number == 1
    assert not any(len(node.input) > 3 for node in fused.proto.graph.node if node.op_type == "MultiHeadAttention")
    assert_same(fused, plain, tokens(2, 5))


def _batch_and_one(net: Net) -> list[str]:
    shape = net("Shape", "x")
    batch = net("Slice", shape, net.ints(0), net.ints(1))
    length = net("Slice", shape, net.ints(1), net.ints(2))
    return [batch, net.ints(1), length, length]


def test_values_of_another_width_than_keys_are_fused() -> None:
    net = Net()
    q, k = (net.heads(net.linear("x")) for _ in range(2))
    v = net("Transpose", net("Reshape", net.linear("x", outputs=HEADS * 5), net.ints(0, 0, HEADS, 5)), perm=[0, 2, 1, 3])
    context = net("MatMul", net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2])), axis=-1), v)
    merged = net("Reshape", net("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, HEADS * 5))
    fused, plain, number = fused_net(net, net.linear(merged, HEADS * 5, WIDTH))
    assert number == 1
    assert_same(fused, plain, tokens(2, 5), tokens(3, 4))


def test_heads_that_are_interleaved_are_left_alone() -> None:
    """Position d * H + h instead of h * D + d: the same shapes, another meaning."""
    net = Net()
    q, k, v = (net("Transpose", net("Reshape", net.linear("x"), net.ints(0, 0, DEPTH, HEADS)), perm=[0, 3, 1, 2]) for _ in range(3))
    _, _, number = fused_net(net, net.attend(q, k, v))
    assert number == 0


def test_contexts_that_are_merged_in_another_order_are_left_alone() -> None:
    net = Net()
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    scores = net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2]))
    context = net("MatMul", net("Softmax", scores, axis=-1), v)
    merged = net("Reshape", net("Transpose", context, perm=[0, 2, 3, 1]), net.ints(0, 0, HEADS * DEPTH))
    _, _, number = fused_net(net, merged)
    assert number == 0


def test_a_scale_after_the_mask_is_left_alone() -> None:
    net = Net()
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    scores = net("Add", net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2])), net.input("mask", ["seq", "seq"]))
    context = net("MatMul", net("Softmax", net("Mul", scores, net.constant(np.float32(0.5))), axis=-1), v)
    _, _, number = fused_net(net, net("Reshape", net("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, WIDTH)))
    assert number == 0


def test_attention_maps_that_are_an_output_are_left_alone() -> None:
    net = Net()
    output = net.attention("x")
    maps = next(node.output[0] for node in net.nodes if node.op_type == "Softmax")
    proto = net.done(output, maps, **{maps: ["batch", HEADS, "seq", "seq"]})
    assert fuse_attention(load(proto))[1] == 0


def test_half_precision_is_left_alone() -> None:
    net = Net()
    half = net("Cast", "x", to=TensorProto.FLOAT16)
    q = net("Transpose", net("Reshape", half, net.ints(0, 0, HEADS, DEPTH)), perm=[0, 2, 1, 3])
    context = net("MatMul", net("Softmax", net("MatMul", q, net("Transpose", q, perm=[0, 1, 3, 2])), axis=-1), q)
    merged = net("Reshape", net("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, WIDTH))
    _, _, number = fused_net(net, net("Cast", merged, to=TensorProto.FLOAT))
    assert number == 0


def test_fusing_twice_changes_nothing_more() -> None:
    fused, _ = fuse_attention(canonicalise(load(zoo.path("vit-sdpa-do18")))[0])
    again, number = fuse_attention(fused)
    assert number == 0
    assert again is fused


def test_guarded_masks_keep_finite_values_of_any_size() -> None:
    """Only minus infinity hides a key: -2e4 beside -2.0001e4 is a difference of ten, and a row of -inf alone gives zeros."""
    net = Net()
    q, k, v = (net.heads(net.linear("x")) for _ in range(3))
    scores = net("Add", net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2])), net.input("mask", ["seq", "seq"]))
    probabilities = net("Softmax", scores, axis=-1)
    safe = net("Where", net("IsNaN", probabilities), net.constant(np.float32(0)), probabilities)
    context = net("MatMul", safe, v)
    fused, plain, number = fused_net(net, net("Reshape", net("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, WIDTH)))
    assert number == 1
    inputs = tokens(2, 4)
    rows = [[-2e4, -2.0001e4, -np.inf, -2.0002e4], [-np.inf] * 4, [0, 0, -np.inf, 0], [-3e38, -np.inf, -np.inf, -np.inf]]
    inputs["mask"] = np.array(rows, np.float32)
    assert_same(fused, plain, inputs)
    assert not run(open_session(fused), inputs)[0][:, 1].any()
