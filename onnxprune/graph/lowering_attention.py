"""Attentions and rotary embeddings spelled out: of ONNX (opset 23 on) and of onnxruntime, with caches of past keys and values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from onnx import TensorProto, helper

from onnxprune.graph.emitter import Emitter
from onnxprune.graph.lowering_forms import CannotLower, check_form, operand
from onnxprune.graph.view import Node


def _split_heads(g: Emitter, tensor: str, heads: int) -> str:
    """[B, S, H * D] -> [B, H, S, D]."""
    return g.op("Transpose", g.op("Reshape", tensor, g.int64([0, 0, heads, -1])), perm=[0, 2, 1, 3])


def _lowest(g: Emitter, like: str) -> float:
    return float(np.finfo(helper.tensor_dtype_to_np_dtype(g.type_of(like) or TensorProto.FLOAT)).min)


def _causal(g: Emitter, scores_q: str, scores_k: str, past: str | None) -> str:
    """Boolean [S_q, S_k]: key j is visible to query i if j <= i + past."""
    queries = g.op("Range", g.int64(0), _length(g, scores_q), g.int64(1))
    keys = g.op("Range", g.int64(0), _length(g, scores_k), g.int64(1))
    if past is not None:
        queries = g.op("Add", queries, _length(g, past))
    later = g.op("Less", g.unsqueeze(queries, 1), g.unsqueeze(keys, 0))
    return g.op("Not", later)


def _length(g: Emitter, tensor: str) -> str:
    """Size of axis 2 of [B, H, S, D], as a scalar."""
    return g.op("Gather", g.shape_of(tensor), g.int64(2), axis=0)


def _scale(g: Emitter, node: Node, q: str, like: str) -> str:
    """The scale given, or 1 / sqrt(D) read from the last axis of q."""
    given = node.attrs.get("scale")
    if given:
        return g.scalar(float(given), like)
    size = g.op("Cast", g.op("Gather", g.shape_of(q), g.int64(-1), axis=0), to=g.type_of(like) or TensorProto.FLOAT)
    return g.op("Reciprocal", g.op("Sqrt", size))


def _attend(
    g: Emitter, q: str, k: str, v: str, *, scale: str, bias: str | None, like: str, softcap: float = 0.0, output: str | None = None
) -> str:
    """softmax(scale q k' + bias) v for [B, H, S, D] operands."""
    scores = g.op("MatMul", g.op("Mul", q, scale), g.op("Transpose", k, perm=[0, 1, 3, 2]))
    if softcap:
        cap = g.scalar(softcap, like)
        scores = g.op("Mul", cap, g.op("Tanh", g.op("Div", scores, cap)))
    if bias is not None:
        scores = g.op("Add", scores, bias)
    return g.op("MatMul", g.op("Softmax", scores, axis=-1 if g.opset >= 13 else 3), v, output=output)


def attention(g: Emitter, node: Node) -> None:
    covered = {"scale", "is_causal", "q_num_heads", "kv_num_heads", "softcap", "softmax_precision", "qk_matmul_output_mode"}
    windows = {name for name in ("left_window_size", "right_window_size") if int(node.attrs.get(name, -1)) < 0}
    check_form(node, covered | windows, inputs=6, outputs=3)
    like = node.inputs[0]
    dtype = g.type_of(like) or TensorProto.FLOAT
    if dtype not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
        raise CannotLower(node, f"its element type {TensorProto.DataType.Name(dtype)}")
    if int(node.attrs.get("softmax_precision", dtype)) not in (dtype, TensorProto.FLOAT):
        raise CannotLower(node, "softmax in another precision than its inputs")
    flat = g.rank(like) == 3
    q, k, v = node.inputs[:3]
    if flat:
        q_heads, kv_heads = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
        q, k, v = _split_heads(g, q, q_heads), _split_heads(g, k, kv_heads), _split_heads(g, v, kv_heads)
    past_key, k, v = _with_cache(g, node, k, v, (4, 5))
    if not (flat and q_heads == kv_heads) and not _same_heads(g, node):
        k, v = _repeat_heads(g, k, q), _repeat_heads(g, v, q)
    causal = _causal(g, q, k, past_key) if int(node.attrs.get("is_causal", 0)) else None
    bias, alive = _bias(g, operand(node, 3), causal, like)
    y = None if flat or alive else node.outputs[0]
    softcap = float(node.attrs.get("softcap", 0.0))
    y = _attend(g, q, k, v, scale=_scale(g, node, q, like), bias=bias, like=like, softcap=softcap, output=y)
    if alive:
        y = g.op("Where", alive, y, g.scalar(0.0, like), output=None if flat else node.outputs[0])
    if flat:
        g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.int64([0, 0, -1]), output=node.outputs[0])


def _with_cache(g: Emitter, node: Node, k: str, v: str, slots: tuple[int, int]) -> tuple[str | None, str, str]:
    """(past keys if there are any, keys and values behind those of the past), which are written to outputs 1 and 2 as well."""
    past_key, past_value = (operand(node, slot) for slot in slots)
    if past_key and past_value:
        k, v = g.op("Concat", past_key, k, axis=2), g.op("Concat", past_value, v, axis=2)
    for slot, present in ((1, k), (2, v)):
        if slot < len(node.outputs) and node.outputs[slot]:
            g.op("Identity", present, output=node.outputs[slot])
    return past_key, k, v


def _same_heads(g: Emitter, node: Node) -> bool:
    """Whether 4-D queries and keys are known to have the same number of heads."""
    return g.static_dim(node.inputs[0], 1) is not None and g.static_dim(node.inputs[0], 1) == g.static_dim(node.inputs[1], 1)


def _repeat_heads(g: Emitter, tensor: str, q: str) -> str:
    """Every key-value head serves as many consecutive query heads: [B, K, S, D] -> [B, H, S, D]."""
    heads = g.op("Slice", g.shape_of(q), g.int64([1]), g.int64([2]), g.int64([0]))
    own = g.op("Slice", g.shape_of(tensor), g.int64([1]), g.int64([2]), g.int64([0]))
    one = g.int64([1])
    spread = g.op("Expand", g.unsqueeze(tensor, 2), g.op("Concat", one, one, g.op("Div", heads, own), one, one, axis=0))
    last = g.op("Slice", g.shape_of(tensor), g.int64([2]), g.int64([4]), g.int64([0]))
    return g.op("Reshape", spread, g.op("Concat", g.int64([0]), heads, last, axis=0))


def _bias(g: Emitter, mask: str | None, causal: str | None, like: str) -> tuple[str | None, str | None]:
    """(finite additive bias, rows with a key left to attend to, or None if every row has one)."""
    zero, lowest = g.scalar(0.0, like), g.scalar(_lowest(g, like), like)
    if mask is None:
        return (None if causal is None else g.op("Where", causal, zero, lowest)), None
    if g.type_of(mask) == TensorProto.BOOL:
        allowed = mask if causal is None else g.op("And", mask, causal)
        seen = g.reduce("ReduceMax", g.op("Cast", allowed, to=TensorProto.FLOAT), [g.rank(mask) - 1], keepdims=True)
        return g.op("Where", allowed, zero, lowest), g.op("Greater", seen, g.array(np.array(0, np.float32)))
    bias = mask if causal is None else g.op("Where", causal, mask, g.scalar(-np.inf, like))
    best = g.reduce("ReduceMax", bias, [max(g.rank(mask), 2 if causal else 1) - 1], keepdims=True)
    return g.op("Max", bias, lowest), g.op("Greater", best, g.scalar(-np.inf, like))


def rotary(g: Emitter, node: Node) -> None:
    """RotaryEmbedding of ONNX: x [B, H, S, D] or [B, S, H * D], angles for every position or for those that are named."""
    check_form(node, {"interleaved", "num_heads", "rotary_embedding_dim"}, inputs=4, outputs=1)
    x, cos, sin = node.inputs[:3]
    positions = operand(node, 3)
    if positions:
        cos, sin = g.op("Gather", cos, positions, axis=0), g.op("Gather", sin, positions, axis=0)
    flat = g.rank(x) == 3
    whole = g.op("Reshape", x, g.int64([0, 0, int(node.attrs.get("num_heads", 0)), -1])) if flat else x
    _turned_by(g, node, whole, cos, sin, 2 if flat else 1)


def fused_rotary(g: Emitter, node: Node) -> None:
    """RotaryEmbedding of onnxruntime: x [B, H, S, D] or [B, S, H * D], positions [B, S] or the first one [1], angles [most, D / 2]."""
    check_form(
        node, {"interleaved", "num_heads", "rotary_embedding_dim"} | _at_rest(node, "scale", "is_packed_batching"), inputs=4, outputs=1
    )
    x, positions, cos, sin = node.inputs[:4]
    flat, size = g.rank(x) == 3, int(node.attrs.get("rotary_embedding_dim", 0))
    heads, half = int(node.attrs.get("num_heads", 0)), g.static_dim(cos, 1)
    if flat and size and not heads:
        raise CannotLower(node, "a part of heads whose number is not given")
    if flat and not heads and half is None:
        raise CannotLower(node, "the size of its heads is not known")
    target = [0, 0, heads, -1] if heads else [0, 0, -1, 2 * (half or 0)]
    whole = g.op("Reshape", x, g.int64(target)) if flat else x
    if g.rank(positions) == 1:
        length = g.op("Gather", g.shape_of(whole), g.int64(1 if flat else 2), axis=0)
        positions = g.op("Add", g.unsqueeze(g.op("Range", g.int64(0), length, g.int64(1)), 0), positions)
    cos, sin = (g.op("Gather", angles, positions, axis=0) for angles in (cos, sin))
    _turned_by(g, node, whole, cos, sin, 2 if flat else 1)


def _turned_by(g: Emitter, node: Node, whole: str, cos: str, sin: str, heads_axis: int) -> None:
    """Turn ``whole`` by angles [B, S, D / 2] into the output of ``node``, which has heads and depth in one axis where axis 2 is heads."""
    # One head axis of size 1 in the angles: axis 2 of [B, S, H, D], axis 1 of [B, H, S, D].
    cos, sin = g.unsqueeze(cos, heads_axis), g.unsqueeze(sin, heads_axis)
    interleaved, size = bool(node.attrs.get("interleaved", 0)), int(node.attrs.get("rotary_embedding_dim", 0))
    if heads_axis == 1:
        _turned(g, whole, cos, sin, size, interleaved, output=node.outputs[0])
    else:
        g.op("Reshape", _turned(g, whole, cos, sin, size, interleaved), g.int64([0, 0, -1]), output=node.outputs[0])


def _turned(g: Emitter, whole: str, cos: str, sin: str, size: int, interleaved: bool, output: str | None = None) -> str:
    """Pairs of the first ``size`` dimensions of a four-axis tensor (0 for all) turned by angles that broadcast to them."""
    part = g.slice(whole, 3, g.int64([0]), g.int64([size])) if size else whole
    if interleaved:
        pairs = g.op("Reshape", part, g.int64([0, 0, 0, -1, 2]))
        first, second = (g.op("Gather", pairs, g.int64(side), axis=4) for side in (0, 1))
    else:
        first, second = g.ops(2, "Split", part, axis=3, num_outputs=2) if g.opset >= 18 else g.ops(2, "Split", part, axis=3)
    real = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
    imaginary = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
    parts = [real, imaginary]
    if interleaved:
        joined = g.op("Concat", g.unsqueeze(real, 4), g.unsqueeze(imaginary, 4), axis=4)
        parts = [g.op("Reshape", joined, g.int64([0, 0, 0, -1]))]
    if size:
        parts.append(g.slice(whole, 3, g.int64([size]), g.int64([2**31])))
    return g.op("Concat", *parts, axis=3, output=output)


# Fused operators of onnxruntime.


def packed_attention(g: Emitter, node: Node) -> None:
    """com.microsoft.Attention: one weight [E, Q + K + V] makes queries, keys and values."""
    check_form(node, {"num_heads", "unidirectional", "qkv_hidden_sizes", "scale", "mask_filter_value"}, inputs=6, outputs=1)
    if operand(node, 4):
        raise CannotLower(node, "a past state")
    x, weight = node.inputs[:2]
    packed = g.op("MatMul", x, weight)
    bias = operand(node, 2)
    if bias:
        packed = g.op("Add", packed, bias)
    total = g.static_dim(weight, 1)
    if total is None:
        raise CannotLower(node, "the size of its weight is not known")
    sizes = [int(size) for size in node.attrs.get("qkv_hidden_sizes", ())] or [total // 3] * 3
    bounds = np.cumsum([0, *sizes])
    parts = [g.slice(packed, 2, g.int64([int(start)]), g.int64([int(end)])) for start, end in pairwise(bounds)]
    _fused_heads(g, node, parts, mask=operand(node, 3), extra=operand(node, 5))


def multi_head_attention(g: Emitter, node: Node) -> None:
    """com.microsoft.MultiHeadAttention with separate [B, S, E] queries, keys and values, behind past ones [B, H, P, D] if there are any."""
    check_form(node, {"num_heads", "unidirectional", "scale", "mask_filter_value"}, inputs=8, outputs=3)
    parts = [operand(node, slot) for slot in range(3)]
    if any(part is None or g.rank(part) != 3 for part in parts):
        raise CannotLower(node, "packed or 4-D operands")
    named = [str(part) for part in parts]
    bias = operand(node, 3)
    if bias:
        total = g.static_dim(bias, 0)
        if total is None or total % 3:
            raise CannotLower(node, "its bias is not three equal parts")
        third = total // 3
        named = [
            g.op("Add", part, g.slice(bias, 0, g.int64([third * index]), g.int64([third * (index + 1)])))
            for index, part in enumerate(named)
        ]
    _fused_heads(g, node, named, mask=operand(node, 4), extra=operand(node, 5))


def group_query_attention(g: Emitter, node: Node) -> None:
    """com.microsoft.GroupQueryAttention: causal, with a cache that may hold fewer tokens of some rows than of others.

    ``seqlens_k`` (input 5) says how many tokens a row has, less one; the first of its S new ones stands behind the past ones, and positions
    of the past from there on are empty. Present keys and values are the past with the new ones behind, as the operator writes them where
    all rows have the same past.
    """
    known = {"num_heads", "kv_num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved", "local_window_size"}
    resting = _at_rest(node, "smooth_softmax", "qk_output", "k_quant_type", "v_quant_type", "kv_cache_bit_width")
    check_form(node, known | resting, inputs=11, outputs=3)
    like, heads, kv_heads = node.inputs[0], int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
    if operand(node, 1):
        q, k, v = (_split_heads(g, name, count) for name, count in zip(node.inputs, (heads, kv_heads, kv_heads), strict=False))
    else:
        packed, bounds = _split_heads(g, like, heads + 2 * kv_heads), np.cumsum([0, heads, kv_heads, kv_heads]).tolist()
        q, k, v = (g.slice(packed, 1, g.int64([start]), g.int64([end])) for start, end in pairwise(bounds))
    new = g.unsqueeze(g.op("Range", g.int64(0), _length(g, k), g.int64(1)), 0)
    tokens = g.op("Reshape", g.op("Cast", node.inputs[5], to=TensorProto.INT64), g.int64([-1, 1]))
    before = g.op("Max", g.op("Sub", g.op("Add", tokens, g.int64([1])), _length(g, k)), g.int64([0]))  # [B, 1]
    past = operand(node, 3)
    if past:
        before = g.op("Min", before, _length(g, past))
    else:
        before = g.op("Mul", before, g.int64([0]))
    places = g.op("Add", before, new)  # [B, S]
    if int(node.attrs.get("do_rotary", 0)):
        cos, sin = (g.unsqueeze(g.op("Gather", node.inputs[slot], operand(node, 9) or places, axis=0), 1) for slot in (7, 8))
        interleaved = bool(node.attrs.get("rotary_interleaved", 0))
        half = g.static_dim(node.inputs[7], 1)
        if half is None:
            raise CannotLower(node, "the size of what it turns is not known")
        q, k = (_turned(g, part, cos, sin, 2 * half, interleaved) for part in (q, k))
    keys = places
    if past:
        old = g.unsqueeze(g.op("Range", g.int64(0), _length(g, past), g.int64(1)), 0)
        keys = g.op("Concat", g.op("Where", g.op("Less", old, before), old, g.int64([2**40])), places, axis=1)
    _, k, v = _with_cache(g, node, k, v, (3, 4))
    distance = g.op("Sub", g.unsqueeze(places, 1, 3), g.unsqueeze(keys, 1, 2))  # [B, 1, S, P + S]
    hidden = g.op("Less", distance, g.int64([0]))
    window = int(node.attrs.get("local_window_size", -1))
    if window > 0:
        hidden = g.op("Or", hidden, g.op("Greater", distance, g.int64([window - 1])))
    bias = g.op("Where", hidden, g.scalar(_lowest(g, like), like), operand(node, 10) or g.scalar(0.0, like))
    if heads != kv_heads:
        k, v = _repeat_heads(g, k, q), _repeat_heads(g, v, q)
    softcap = float(node.attrs.get("softcap", 0.0))
    y = _attend(g, q, k, v, scale=_scale(g, node, q, like), bias=bias, like=like, softcap=softcap)
    g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.int64([0, 0, -1]), output=node.outputs[0])


def _at_rest(node: Node, *names: str) -> set[str]:
    """Attributes whose value asks for nothing; -1 is what some exporters write for 0."""
    return {name for name in names if node.attrs.get(name) in (-1, 0, b"NONE") or (name == "scale" and node.attrs.get(name) == 1.0)}


def _fused_heads(g: Emitter, node: Node, parts: list[str], mask: str | None, extra: str | None) -> None:
    like = node.inputs[0]
    heads = int(node.attrs["num_heads"])
    q, k, v = (_split_heads(g, part, heads) for part in parts)
    past, k, v = _with_cache(g, node, k, v, (6, 7))
    zero, filled = g.scalar(0.0, like), g.scalar(float(node.attrs.get("mask_filter_value", -10000.0)), like)
    terms = [extra] if extra else []
    if mask:
        terms.append(g.op("Where", _visible_keys(g, node, mask, k), zero, filled))
    if int(node.attrs.get("unidirectional", 0)):
        terms.append(g.op("Where", _causal(g, q, k, past), zero, g.scalar(_lowest(g, like), like)))
    bias: str | None = None
    for term in terms:
        bias = term if bias is None else g.op("Add", bias, term)
    y = _attend(g, q, k, v, scale=_scale(g, node, q, like), bias=bias, like=like)
    g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.int64([0, 0, -1]), output=node.outputs[0])


def _visible_keys(g: Emitter, node: Node, mask: str, k: str) -> str:
    """Boolean mask that broadcasts to [B, H, S_q, S_k] from an integer [B] (lengths), [B, S_k] or [B, S_q, S_k] mask."""
    rank = g.rank(mask)
    if rank == 1:
        keys = g.op("Cast", g.op("Range", g.int64(0), _length(g, k), g.int64(1)), to=g.type_of(mask) or TensorProto.INT32)
        return g.unsqueeze(g.op("Less", keys, g.unsqueeze(mask, 1)), 1, 2)
    if rank > 3:
        raise CannotLower(node, f"a mask of rank {rank}")
    visible = g.op("Cast", mask, to=TensorProto.BOOL)
    return g.unsqueeze(visible, 1, 2) if rank == 2 else g.unsqueeze(visible, 1)
