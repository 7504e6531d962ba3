"""Attention and FFN in every spelling we know of: found with the right units, and slices equal masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from tests.graph.net import DEPTH, FFN, HEADS, WIDTH, Net
from tests.graph.pruning import Comparison, anatomy_of, corner_cases, random_kept

Form = Callable[[], onnx.ModelProto]
FORMS: list[tuple[str, dict[str, int], Form]] = []
BLOCK = {"layer.0.heads": HEADS}
BOTH = {"layer.0.heads": HEADS, "layer.0.ffn": FFN}
GATED = {"layer.0.ffn": FFN}


def form(sites: dict[str, int], *variants: object) -> Callable[[Callable[..., onnx.ModelProto]], Callable[..., onnx.ModelProto]]:
    def register(function: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
        for variant in variants or (None,):
            name = function.__name__ + ("" if variant is None else f"-{variant}")
            FORMS.append((name, sites, function if variant is None else lambda variant=variant: function(variant)))
        return function

    return register


@form(BOTH, 11, 12, 13, 17, 21)
def plain(opset: int) -> onnx.ModelProto:
    net = Net(opset)
    y = net.add("x", net.attention("x"))
    return net.done(net.add(y, net.ffn(y)))


@form(BLOCK, "attribute", "input", "num_outputs")
def packed_by_split(how: str) -> onnx.ModelProto:
    net = Net({"attribute": 12, "input": 13, "num_outputs": 18}[how])
    packed = net.linear("x", WIDTH, 3 * WIDTH)
    if how == "input":
        parts = net("Split", packed, net.ints(WIDTH, WIDTH, WIDTH), axis=-1, outputs=3)
    elif how == "attribute":
        parts = net("Split", packed, axis=2, split=[WIDTH] * 3, outputs=3)
    else:
        parts = net("Split", packed, axis=2, num_outputs=3, outputs=3)
    return net.done(net.add("x", net.linear(net.attend(*(net.heads(part) for part in parts)))))


@form(BLOCK, 9, 13)
def packed_by_slice(opset: int) -> onnx.ModelProto:
    net = Net(opset)
    packed = net.linear("x", WIDTH, 3 * WIDTH)

    def part(number: int) -> str:
        start, end = number * WIDTH, (number + 1) * WIDTH if number < 2 else 2**31 - 1
        if opset < 10:
            return str(net("Slice", packed, starts=[start], ends=[end], axes=[2]))
        return str(net("Slice", packed, net.ints(start), net.ints(end), net.ints(-1)))

    return net.done(net.add("x", net.linear(net.attend(*(net.heads(part(number)) for number in range(3))))))


@form(BLOCK, "scalar", "split")
def packed_by_reshape(how: str) -> onnx.ModelProto:
    """ViT of timm: [B, S, 3, H, D], then one of three."""
    net = Net()
    packed = net("Reshape", net.linear("x", WIDTH, 3 * WIDTH), net.ints(0, 0, 3, HEADS, DEPTH))
    packed = net("Transpose", packed, perm=[2, 0, 3, 1, 4])
    if how == "scalar":
        parts = [net("Gather", packed, net.constant(np.int64(number)), axis=0) for number in range(3)]
    else:
        parts = [net("Squeeze", part, net.ints(0)) for part in net("Split", packed, num_outputs=3, axis=0, outputs=3)]
    return net.done(net.add("x", net.linear(net.attend(*parts))))


@form(BLOCK, "split", "slice")
def interleaved(how: str) -> onnx.ModelProto:
    """GPT-NeoX: [B, S, H, 3 D], q, k and v of a head side by side."""
    net = Net()
    packed = net("Transpose", net("Reshape", net.linear("x", WIDTH, 3 * WIDTH), net.ints(0, 0, HEADS, 3 * DEPTH)), perm=[0, 2, 1, 3])
    if how == "split":
        parts = net("Split", packed, net.ints(DEPTH, DEPTH, DEPTH), axis=3, outputs=3)
    else:
        parts = [net("Slice", packed, net.ints(i * DEPTH), net.ints((i + 1) * DEPTH), net.ints(3)) for i in range(3)]
    return net.done(net.add("x", net.linear(net.attend(*parts))))


@form(BLOCK)
def slice_of_two_axes() -> onnx.ModelProto:
    """One Slice cuts the packed projections and a static sequence axis."""
    net = Net(seq=6)
    packed = net.linear("x", WIDTH, 3 * WIDTH)
    bounds = [((0, number * WIDTH), (6, (number + 1) * WIDTH)) for number in range(3)]
    parts = [net("Slice", packed, net.ints(*start), net.ints(*end), net.ints(1, 2)) for start, end in bounds]
    return net.done(net.add("x", net.linear(net.attend(*(net.heads(part) for part in parts)))))


@form(BOTH, "transB", "transA", "beta")
def gemm(how: str) -> onnx.ModelProto:
    net = Net()

    def linear(x: str, inputs: int, outputs: int) -> str:
        bias = net.weight(outputs, scale=0.3)
        flat = net("Reshape", x, net.ints(-1, inputs))
        if how == "transA":
            y = net("Gemm", net("Transpose", flat, perm=[1, 0]), net.weight(inputs, outputs), bias, transA=1)
        elif how == "transB":
            y = net("Gemm", flat, net.weight(outputs, inputs), bias, transB=1)
        else:
            y = net("Gemm", flat, net.weight(inputs, outputs), bias, alpha=0.5, beta=2.0)
        shape = net("Concat", net("Slice", net("Shape", "x"), net.ints(0), net.ints(2)), net.ints(outputs), axis=0)
        return str(net("Reshape", y, shape))

    q, k, v = (net.heads(linear("x", WIDTH, WIDTH)) for _ in range(3))
    y = net.add("x", linear(net.attend(q, k, v), WIDTH, WIDTH))
    return net.done(net.add(y, linear(net("Tanh", linear(y, WIDTH, FFN)), FFN, WIDTH)))


@form(BLOCK)
def einsum() -> onnx.ModelProto:
    net = Net()
    q, k, v = (net("Einsum", "x", net.weight(WIDTH, HEADS, DEPTH), equation="bse,ehd->bhsd") for _ in range(3))
    scores = net("Softmax", net("Einsum", q, k, equation="bhsd,bhtd->bhst"), axis=-1)
    context = net("Einsum", scores, v, equation="bhst,bhtd->bshd")
    y = net("Einsum", context, net.weight(HEADS, DEPTH, WIDTH), equation="bshd,hde->bse")
    return net.done(net.add("x", net.add(y, net.weight(WIDTH))))


@form(GATED)
def einsum_ffn() -> onnx.ModelProto:
    net = Net()
    hidden = net("Relu", net("Einsum", "x", net.weight(WIDTH, FFN), equation="bse,ef->bsf"))
    return net.done(net.add("x", net("Einsum", hidden, net.weight(FFN, WIDTH), equation="bsf,fe->bse")))


@form(BOTH)
def weights_behind_other_nodes() -> onnx.ModelProto:
    """Linear layers as Transpose of [out, in], biases through Identity."""
    net = Net()

    def linear(x: str, inputs: int, outputs: int) -> str:
        weight = net("Transpose", net("Identity", net.weight(outputs, inputs)), perm=[1, 0])
        return net.add(net("Identity", net.weight(outputs, scale=0.3)), net("MatMul", x, weight))

    q, k, v = (net.heads(linear("x", WIDTH, WIDTH)) for _ in range(3))
    y = net.add("x", linear(net.attend(q, k, v), WIDTH, WIDTH))
    return net.done(net.add(linear(net("Tanh", linear(y, WIDTH, FFN)), FFN, WIDTH), y))


@form(BOTH)
def weights_in_constant_nodes() -> onnx.ModelProto:
    net = Net()
    model = net.done(net.add(y := net.add("x", net.attention("x")), net.ffn(y)))
    nodes = [onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    kept = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend([*nodes, *kept])
    return model


@form(BOTH)
def shared_weights() -> onnx.ModelProto:
    """ALBERT: both layers read the same initializers."""
    net = Net()
    qkv, out = [net.weight(WIDTH, WIDTH) for _ in range(3)], net.weight(WIDTH, WIDTH)
    up, down, bias = net.weight(WIDTH, FFN), net.weight(FFN, WIDTH), net.weight(WIDTH)
    y = "x"
    for _ in range(2):
        context = net.attend(*(net.heads(net.add(net("MatMul", y, weight), bias)) for weight in qkv))
        y = net.add(y, net.add(net("MatMul", context, out), bias))
        y = net.add(y, net("MatMul", net("Relu", net("MatMul", y, up)), down))
    return net.done(y)


@form(BOTH)
def layer_scale() -> onnx.ModelProto:
    net = Net()
    y = net.add("x", net("Mul", net.attention("x"), net.weight(WIDTH)))
    return net.done(net.add(y, net("Div", net("Mul", net.weight(1, 1, WIDTH), net.ffn(y)), net.constant(np.float32(1.5)))))


@form(GATED, "apart", "packed", "bias")
def gated(how: str) -> onnx.ModelProto:
    net = Net()
    if how == "packed":
        gate, up = net("Split", net.linear("x", WIDTH, 2 * FFN), num_outputs=2, axis=2, outputs=2)
    else:
        gate, up = (net.linear("x", WIDTH, FFN, bias=how == "bias") for _ in range(2))
    hidden = net("Mul", net("Mul", gate, net("Sigmoid", gate)), up)
    return net.done(net.add("x", net.linear(hidden, FFN, WIDTH, bias=how == "bias")))


@form(BOTH, "apart", "one product")
def parallel(how: str) -> onnx.ModelProto:
    """Attention and FFN read the same input and are added together."""
    net = Net()
    if how == "apart":
        return net.done(net.add("x", net.add(net.attention("x"), net.ffn("x"))))
    q, k, v, hidden = net("Split", net.linear("x", WIDTH, 3 * WIDTH + FFN), net.ints(WIDTH, WIDTH, WIDTH, FFN), axis=2, outputs=4)
    attention = net.linear(net.attend(*(net.heads(part) for part in (q, k, v))))
    return net.done(net.add("x", net.add(attention, net.linear(net("Relu", hidden), FFN, WIDTH))))


@form(BLOCK, "dynamic", "static")
def batch_and_heads_merged(how: str) -> onnx.ModelProto:
    """[B * H, S, D], as fairseq and old OPT write it."""
    batch, seq = (2, 5) if how == "static" else ("batch", "seq")
    net = Net(batch=batch, seq=seq)
    shape = net("Shape", "x")
    length = net("Slice", shape, net.ints(1), net.ints(2))
    both = net("Slice", shape, net.ints(0), net.ints(2))
    merged = net("Concat", net.ints(-1), length, net.ints(DEPTH), axis=0)
    q, k, v = (net("Reshape", net.heads(net.linear("x")), merged) for _ in range(3))
    scores = net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 2, 1])), axis=-1)
    apart = net("Concat", net("Slice", shape, net.ints(0), net.ints(1)), net.ints(HEADS), length, net.ints(DEPTH), axis=0)
    context = net("Transpose", net("Reshape", net("MatMul", scores, v), apart), perm=[0, 2, 1, 3])
    flat = net("Reshape", context, net("Concat", both, net.ints(WIDTH), axis=0))
    return net.done(net.add("x", net.linear(flat)))


@form(BLOCK)
def merged_with_computed_batch() -> onnx.ModelProto:
    """The merged size is multiplied from the batch at run time, next to a dynamic length."""
    net = Net()
    shape = net("Shape", "x")
    batch, length = (net("Slice", shape, net.ints(i), net.ints(i + 1)) for i in range(2))
    merged = net("Concat", net("Mul", batch, net.ints(HEADS)), length, net.ints(DEPTH), axis=0)
    q, k, v = (net("Reshape", net.heads(net.linear("x")), merged) for _ in range(3))
    scores = net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 2, 1])), axis=-1)
    apart = net("Concat", batch, net.ints(HEADS), length, net.ints(DEPTH), axis=0)
    context = net("Transpose", net("Reshape", net("MatMul", scores, v), apart), perm=[0, 2, 1, 3])
    return net.done(net.add("x", net.linear(net("Reshape", context, net("Concat", batch, length, net.ints(WIDTH), axis=0)))))


@form(BOTH, 1, 3)
def fixed_shapes(batch: int) -> onnx.ModelProto:
    net = Net(batch=batch, seq=7)
    y = net.add("x", net.attention("x"))
    return net.done(net.add(y, net.ffn(y)))


@form(BLOCK)
def sequence_first() -> onnx.ModelProto:
    """[S, B, E], and the result turned back before the residual sum."""
    net = Net()
    x = net("Transpose", "x", perm=[1, 0, 2])
    y = net("Transpose", net.attention(x), perm=[1, 0, 2])
    return net.done(net.add("x", y))


@form(BLOCK, "constant", "table", "expanded mask", "slopes")
def per_head_bias(how: str) -> onnx.ModelProto:
    """ALiBi slopes, a T5 table of relative positions, and a mask expanded to all heads."""
    net = Net(seq=5 if how in ("constant", "table") else "seq")
    if how == "constant":
        bias = net.weight(1, HEADS, 5, 5)
    elif how == "table":
        index = np.arange(25).reshape(5, 5) % 7
        bias = net(
            "Unsqueeze", net("Transpose", net("Gather", net.weight(7, HEADS), net.constant(index), axis=0), perm=[2, 0, 1]), net.ints(0)
        )
    elif how == "slopes":
        keys = net("Unsqueeze", net("ReduceSum", "x", net.ints(2), keepdims=0), net.ints(1, 2))
        bias = net("Mul", net.weight(HEADS, 1, 1), keys)
    else:
        mask = net("Unsqueeze", net("ReduceSum", "x", net.ints(2), keepdims=0), net.ints(1, 2))
        length = net("Shape", "x", start=1, end=2)
        shape = net("Concat", net("Shape", "x", start=0, end=1), net.ints(HEADS), length, length, axis=0)
        bias = net("Expand", mask, shape)
    return net.done(net.add("x", net.attention("x", bias)))


@form({"layer.0.heads": HEADS, "layer.1.heads": HEADS})
def bias_shared_by_layers() -> onnx.ModelProto:
    """T5: one table of relative positions for all layers, each of which takes the columns of its own heads."""
    net = Net()
    length = net("Squeeze", net("Shape", "x", start=1, end=2), net.ints(0))
    steps = net("Range", net.constant(np.int64(0)), length, net.constant(np.int64(1)))
    apart = net("Mod", net("Sub", net("Unsqueeze", steps, net.ints(0)), net("Unsqueeze", steps, net.ints(1))), net.constant(np.int64(7)))
    bias = net("Unsqueeze", net("Transpose", net("Gather", net.weight(7, HEADS), apart, axis=0), perm=[2, 0, 1]), net.ints(0))
    y = net.add("x", net.attention("x", bias))
    return net.done(net.add(y, net.attention(y, bias)))


@form(BOTH, "SkipLayerNormalization", "swapped")
def fused_residual(how: str) -> onnx.ModelProto:
    net = Net()
    x = "x"
    for branch in (net.attention, net.ffn):
        y = branch(x)
        operands = (y, x) if how == "swapped" else (x, y)
        x = net.ms("SkipLayerNormalization", *operands, net.weight(WIDTH), net.weight(WIDTH), epsilon=1e-5)
    return net.done(x)


@form(BLOCK, "plain", "sizes", "bias")
def contrib_attention(how: str) -> onnx.ModelProto:
    net = Net(seq=5)
    sizes = [WIDTH, WIDTH, 2 * WIDTH] if how == "sizes" else [WIDTH] * 3
    inputs = ["x", net.weight(WIDTH, sum(sizes)), net.weight(sum(sizes), scale=0.3)]
    attributes = {"qkv_hidden_sizes": sizes} if how == "sizes" else {}
    if how == "bias":
        inputs += ["", "", net.weight(1, HEADS, 5, 5)]
    return net.done(net.add("x", net.linear(net.ms("Attention", *inputs, num_heads=HEADS, **attributes), sizes[2], WIDTH)))


@form(BLOCK, "plain", "bias", "attention bias", "wide value")
def contrib_multi_head_attention(how: str) -> onnx.ModelProto:
    net = Net(seq=5)
    value = 2 * WIDTH if how == "wide value" else WIDTH
    inputs = [net.linear("x"), net.linear("x"), net.linear("x", WIDTH, value), net.weight(2 * WIDTH + value) if how == "bias" else ""]
    if how == "attention bias":
        inputs += ["", net.weight(1, HEADS, 5, 5)]
    return net.done(net.add("x", net.linear(net.ms("MultiHeadAttention", *inputs, num_heads=HEADS), value, WIDTH)))


@form(BLOCK, "3-D", "4-D", "3-D mask", "4-D mask")
def standard_attention(how: str) -> onnx.ModelProto:
    net = Net(23, seq=5)
    q, k, v = (net.linear("x") for _ in range(3))
    mask = [net.weight(HEADS, 5, 5)] if how == "3-D mask" else [net.weight(1, HEADS, 5, 5)] if how == "4-D mask" else []
    if how == "4-D":
        context = net("Attention", *(net.heads(part) for part in (q, k, v)))
        context = net("Reshape", net("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, WIDTH))
    else:
        context = net("Attention", q, k, v, *mask, q_num_heads=HEADS, kv_num_heads=HEADS)
    return net.done(net.add("x", net.linear(context)))


@form({"layer.0.heads": 2}, "fused", "expand", "repeated")
def grouped_queries(how: str) -> onnx.ModelProto:
    """Six query heads, two key/value heads: two units."""
    net = Net(23)
    query, groups = 6, 2
    q = net.linear("x", WIDTH, query * DEPTH)
    k, v = (net.linear("x", WIDTH, groups * DEPTH) for _ in range(2))
    if how == "fused":
        context = net("Attention", q, k, v, q_num_heads=query, kv_num_heads=groups)
        return net.done(net.add("x", net.linear(context, query * DEPTH, WIDTH)))
    lengths = net("Shape", "x", start=0, end=1), net("Shape", "x", start=1, end=2)

    def widened(x: str) -> str:
        x = net.heads(x, groups)
        if how == "repeated":
            return str(net("Gather", x, net.ints(0, 0, 0, 1, 1, 1), axis=1))
        shape = net("Concat", lengths[0], net.ints(groups, query // groups), lengths[1], net.ints(DEPTH), axis=0)
        x = net("Expand", net("Unsqueeze", x, net.ints(2)), shape)
        return str(net("Reshape", x, net.ints(0, query, -1, DEPTH)))

    scores = net("MatMul", net.heads(q, query), net("Transpose", widened(k), perm=[0, 1, 3, 2]))
    context = net("Transpose", net("MatMul", net("Softmax", scores, axis=-1), widened(v)), perm=[0, 2, 1, 3])
    return net.done(net.add("x", net.linear(net("Reshape", context, net.ints(0, 0, query * DEPTH)), query * DEPTH, WIDTH)))


@form(BLOCK)
def cross_attention() -> onnx.ModelProto:
    net = Net()
    memory = net.input("memory", ["batch", "words", WIDTH])
    context = net.attend(net.heads(net.linear("x")), *(net.heads(net.linear(memory)) for _ in range(2)))
    return net.done(net.add("x", net.linear(context)))


@form(BLOCK, 0, 1)
def rotary(interleaved: int) -> onnx.ModelProto:
    net = Net(23, seq=5)
    caches = [net.weight(1, 5, DEPTH // 2) for _ in range(2)]
    turned = [net("RotaryEmbedding", net.linear("x"), *caches, num_heads=HEADS, interleaved=interleaved) for _ in range(2)]
    context = net("Attention", *turned, net.linear("x"), q_num_heads=HEADS, kv_num_heads=HEADS)
    return net.done(net.add("x", net.linear(context)))


@form(GATED, "bias of every position", "cast", "output")
def way_to_the_residual(how: str) -> onnx.ModelProto:
    net = Net(seq=5)
    product = net("MatMul", net("Relu", net.linear("x", WIDTH, FFN)), net.weight(FFN, WIDTH))
    if how == "cast":
        return net.done(net.add("x", net("Cast", net.add(product, net.weight(WIDTH)), to=onnx.TensorProto.FLOAT)))
    branch = net.add(product, net.weight(5, WIDTH))
    return net.done(net.add("x", branch), *([branch] if how == "output" else []))


@form(GATED)
def two_matrices_read_the_neurons() -> onnx.ModelProto:
    net = Net()
    hidden = net("Relu", net.linear("x", WIDTH, FFN))
    return net.done(net.add(net.add("x", net.linear(hidden, FFN, WIDTH)), net.linear(hidden, FFN, WIDTH)))


@form(GATED, "BiasGelu", "FastGelu")
def fused_activation(op: str) -> onnx.ModelProto:
    net = Net()
    hidden = net.ms(op, net("MatMul", "x", net.weight(WIDTH, FFN)), net.weight(FFN))
    return net.done(net.add("x", net.linear(hidden, FFN, WIDTH)))


@form(BOTH)
def sum_instead_of_add() -> onnx.ModelProto:
    net = Net()
    y = net("Sum", "x", net.attention("x"))
    return net.done(net("Sum", net.linear(net("Relu", net.linear(y, WIDTH, FFN)), FFN, WIDTH, bias=False), net.weight(WIDTH), y))


@form(BLOCK, "heads inferred", "tokens inferred")
def rows_of_batch_and_heads(how: str) -> onnx.ModelProto:
    """Bloom: [batch x heads, tokens, depth]. TorchScript divides the rows by the heads to get the batch back."""
    net = Net()
    parts = [net.heads(net.linear("x")) for _ in range(3)]
    batch, tokens = (net("Gather", net("Shape", "x"), net.ints(axis), axis=0) for axis in (0, 1))
    rows = net("Mul", batch, net.ints(HEADS))
    if how == "heads inferred":
        target = net("Concat", net.ints(-1), tokens, net.ints(DEPTH), axis=0)
    else:
        target = net("Concat", rows, net.ints(-1), net.ints(DEPTH), axis=0)
    q, k, v = (net("Reshape", part, target) for part in parts)
    probabilities = net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 2, 1])), axis=2)
    context = net("MatMul", probabilities, v)
    found = net("Div", net("Gather", net("Shape", context), net.ints(0), axis=0), net.ints(HEADS))
    back = net("Reshape", context, net("Concat", found, net.ints(HEADS), tokens, net.ints(DEPTH), axis=0))
    flat = net("Reshape", net("Transpose", back, perm=[0, 2, 1, 3]), net.ints(0, 0, HEADS * DEPTH))
    return net.done(net.add("x", net.linear(flat)))


@form(BLOCK, "Gather", "GatherND")
def one_key_for_all_heads_packed_on_the_axis_of_heads(op: str) -> onnx.ModelProto:
    """Falcon: the last two of the heads of one projection are the key and the value of all others; dynamo picks them by GatherND."""
    net = Net()
    packed = net("Reshape", net.linear("x", WIDTH, WIDTH + 2 * DEPTH), net.ints(0, 0, HEADS + 2, DEPTH))
    queries = net("Slice", packed, net.ints(0), net.ints(-2), net.ints(2))
    if op == "Gather":
        shared = [net(op, packed, net.ints(place), axis=2) for place in (-2, -1)]
    else:
        leading = net("Transpose", packed, perm=[2, 0, 1, 3])
        shared = [net("Transpose", net(op, leading, net.constant(np.array([[place]]))), perm=[1, 2, 0, 3]) for place in (-2, -1)]
    q, k, v = (net("Transpose", part, perm=[0, 2, 1, 3]) for part in (queries, *shared))
    return net.done(net.add("x", net.linear(net.attend(q, k, v))))


@form(BOTH, "scale", "sigmoid")
def branches_that_a_gate_multiplies(how: str) -> onnx.ModelProto:
    """Adaptive norms of diffusion transformers scale a branch by numbers per sample, RWKV and shared experts by numbers per token."""
    net = Net()
    if how == "scale":
        gates = [net("Unsqueeze", net.linear(net("ReduceMean", "x", net.ints(1), keepdims=0)), net.ints(1)) for _ in range(2)]
    else:
        gates = [net("Sigmoid", net("MatMul", "x", net.weight(WIDTH, 1))) for _ in range(2)]
    y = net.add("x", net("Mul", gates[0], net.attention("x")))
    return net.done(net.add(y, net("Mul", net.ffn(net("LayerNormalization", y, net.weight(WIDTH))), gates[1])))


@form(BOTH)
def branches_that_a_batch_norm_ends() -> onnx.ModelProto:
    """LeViT: rows of all samples are one axis for the norm."""
    net = Net()

    def normed(y: str) -> str:
        rows = net("Reshape", y, net.ints(-1, WIDTH))
        spread = net.constant(np.linspace(0.5, 2, WIDTH, dtype=np.float32))
        rows = net("BatchNormalization", rows, net.weight(WIDTH), net.weight(WIDTH), net.weight(WIDTH), spread)
        return str(net("Reshape", rows, net("Shape", y)))

    y = net.add("x", normed(net.attention("x")))
    return net.done(net.add(y, normed(net.ffn(y))))


@pytest.mark.parametrize(("name", "sites", "build"), FORMS, ids=[name for name, _, _ in FORMS])
def test_found_and_sliced_as_masked(name: str, sites: dict[str, int], build: Form) -> None:
    anatomy = anatomy_of(build())
    assert {site.name: site.units for site in anatomy.sites} == sites, [str(refusal) for refusal in anatomy.refusals]
    assert anatomy.refusals == ()
    compare = Comparison(anatomy)
    rng = np.random.default_rng(len(name))
    for kept in [*corner_cases(anatomy.sites), *(random_kept(anatomy.sites, rng) for _ in range(8))]:
        compare.check(kept)
