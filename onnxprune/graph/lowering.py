"""Composite operators spelled out in primitives, so that later rooms need one rule per primitive and none per composite.

Covered are the attention and rotary operators of ONNX (opset 23 on) and the fused operators that onnxruntime's transformer optimizer
writes (domain ``com.microsoft``). Output names stay what they were. A form that is not covered is an error; nothing is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
from onnx import TensorProto, helper

from onnxprune.errors import InputError
from onnxprune.graph.emitter import Emitter
from onnxprune.graph.model import Model
from onnxprune.graph.profile import take_profile
from onnxprune.graph.view import Node

MICROSOFT = "com.microsoft"
Key = tuple[str, str]
"""(domain, operator)."""


class CannotLower(InputError):
    """A composite operator is used in a form that has no spelling in primitives here."""

    def __init__(self, node: Node, why: str) -> None:
        domain = f"{node.domain}." if node.domain else ""
        where = f"{domain}{node.op} (node {(node.name or node.outputs[0])!r})"
        super().__init__(f"cannot spell out {where}: {why}; export the model without it")


class Lowering(Emitter):
    """An emitter that takes a profile only when type inference does not know a rank."""

    def rank(self, tensor: str) -> int:
        try:
            return super().rank(tensor)
        except KeyError:
            if self._profile is not None:
                raise
            self._profile = take_profile(self.model)
            return super().rank(tensor)


def lower(model: Model, ops: set[Key] | None = None) -> Model:
    """Replace composite operators by primitives of the same opset.

    Args:
        ops: (domain, operator) pairs to replace, from :data:`COVERED`; None replaces all of them.

    Returns:
        the model itself if it has none of them.

    Raises:
        CannotLower: one of them is used in a form that is not covered.
    """
    chosen = COVERED if ops is None else frozenset(ops)
    if chosen - COVERED:
        raise InputError(f"no lowering for {sorted(chosen - COVERED)}; covered are {sorted(COVERED)}")
    if not any((node.domain, node.op_type) in chosen for node in model.proto.graph.node):
        return model
    emitter = Lowering(model, prefix="onnxprune.low")
    for node in emitter.view.nodes:
        if (node.domain, node.op) in chosen:
            _LOWERINGS[node.domain, node.op](emitter, node)
        else:
            emitter.nodes.append(node.proto)
    proto = model.copy_proto()
    del proto.graph.node[:]
    proto.graph.node.extend(emitter.nodes)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(emitter.proto.graph.initializer)
    return model.with_proto(proto)


def _check(node: Node, attributes: Iterable[str], inputs: int, outputs: int) -> None:
    """Refuse attributes, inputs and outputs beyond the ones a lowering reads."""
    unknown = set(node.attrs) - set(attributes)
    if unknown:
        raise CannotLower(node, f"attribute {sorted(unknown)[0]!r} is not covered")
    if any(node.inputs[inputs:]):
        raise CannotLower(node, f"input {next(slot for slot in range(inputs, len(node.inputs)) if node.inputs[slot])} is not covered")
    if any(node.outputs[outputs:]):
        raise CannotLower(node, f"output {next(slot for slot in range(outputs, len(node.outputs)) if node.outputs[slot])} is not covered")


def _input(node: Node, slot: int) -> str | None:
    return node.inputs[slot] if slot < len(node.inputs) and node.inputs[slot] else None


# Attention.


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


def _attention(g: Emitter, node: Node) -> None:
    covered = {"scale", "is_causal", "q_num_heads", "kv_num_heads", "softcap", "softmax_precision", "qk_matmul_output_mode"}
    windows = {name for name in ("left_window_size", "right_window_size") if int(node.attrs.get(name, -1)) < 0}
    _check(node, covered | windows, inputs=6, outputs=3)
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
    past_key, past_value = _input(node, 4), _input(node, 5)
    if past_key and past_value:
        k, v = g.op("Concat", past_key, k, axis=2), g.op("Concat", past_value, v, axis=2)
    for slot, present in ((1, k), (2, v)):
        if slot < len(node.outputs) and node.outputs[slot]:
            g.op("Identity", present, output=node.outputs[slot])
    if not (flat and q_heads == kv_heads) and not _same_heads(g, node):
        k, v = _repeat_heads(g, k, q), _repeat_heads(g, v, q)
    causal = _causal(g, q, k, past_key) if int(node.attrs.get("is_causal", 0)) else None
    bias, alive = _bias(g, _input(node, 3), causal, like)
    y = None if flat or alive else node.outputs[0]
    softcap = float(node.attrs.get("softcap", 0.0))
    y = _attend(g, q, k, v, scale=_scale(g, node, q, like), bias=bias, like=like, softcap=softcap, output=y)
    if alive:
        y = g.op("Where", alive, y, g.scalar(0.0, like), output=None if flat else node.outputs[0])
    if flat:
        g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.int64([0, 0, -1]), output=node.outputs[0])


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


def _rotary(g: Emitter, node: Node) -> None:
    _check(node, {"interleaved", "num_heads", "rotary_embedding_dim"}, inputs=4, outputs=1)
    x, cos, sin = node.inputs[:3]
    positions = _input(node, 3)
    if positions:
        cos, sin = g.op("Gather", cos, positions, axis=0), g.op("Gather", sin, positions, axis=0)
    flat = g.rank(x) == 3
    # One head axis of size 1 in the angles: axis 2 of [B, S, H, D], axis 1 of [B, H, S, D].
    cos, sin = g.unsqueeze(cos, 2 if flat else 1), g.unsqueeze(sin, 2 if flat else 1)
    whole = g.op("Reshape", x, g.int64([0, 0, int(node.attrs.get("num_heads", 0)), -1])) if flat else x
    turned, size = whole, int(node.attrs.get("rotary_embedding_dim", 0))
    if size:
        turned = g.slice(whole, 3, g.int64([0]), g.int64([size]))
    interleaved = bool(node.attrs.get("interleaved", 0))
    if interleaved:
        pairs = g.op("Reshape", turned, g.int64([0, 0, 0, -1, 2]))
        first, second = (g.op("Gather", pairs, g.int64(side), axis=4) for side in (0, 1))
    else:
        first, second = g.ops(2, "Split", turned, axis=3, num_outputs=2)
    real = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
    imaginary = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
    parts = [real, imaginary]
    if interleaved:
        joined = g.op("Concat", g.unsqueeze(real, 4), g.unsqueeze(imaginary, 4), axis=4)
        parts = [g.op("Reshape", joined, g.int64([0, 0, 0, -1]))]
    if size:
        parts.append(g.slice(whole, 3, g.int64([size]), g.int64([2**31])))
    if flat:
        g.op("Reshape", g.op("Concat", *parts, axis=3), g.int64([0, 0, -1]), output=node.outputs[0])
    else:
        g.op("Concat", *parts, axis=3, output=node.outputs[0])


# Fused operators of onnxruntime.


def _packed_attention(g: Emitter, node: Node) -> None:
    """com.microsoft.Attention: one weight [E, Q + K + V] makes queries, keys and values."""
    _check(node, {"num_heads", "unidirectional", "qkv_hidden_sizes", "scale", "mask_filter_value"}, inputs=6, outputs=1)
    if _input(node, 4):
        raise CannotLower(node, "a past state")
    x, weight = node.inputs[:2]
    packed = g.op("MatMul", x, weight)
    bias = _input(node, 2)
    if bias:
        packed = g.op("Add", packed, bias)
    total = g.static_dim(weight, 1)
    if total is None:
        raise CannotLower(node, "the size of its weight is not known")
    sizes = [int(size) for size in node.attrs.get("qkv_hidden_sizes", ())] or [total // 3] * 3
    bounds = np.cumsum([0, *sizes])
    parts = [g.slice(packed, 2, g.int64([int(start)]), g.int64([int(end)])) for start, end in pairwise(bounds)]
    _fused_heads(g, node, parts, mask=_input(node, 3), extra=_input(node, 5))


def _multi_head_attention(g: Emitter, node: Node) -> None:
    """com.microsoft.MultiHeadAttention with separate [B, S, E] queries, keys and values."""
    _check(node, {"num_heads", "unidirectional", "scale", "mask_filter_value"}, inputs=6, outputs=1)
    parts = [_input(node, slot) for slot in range(3)]
    if any(part is None or g.rank(part) != 3 for part in parts):
        raise CannotLower(node, "packed or 4-D operands")
    named = [str(part) for part in parts]
    bias = _input(node, 3)
    if bias:
        total = g.static_dim(bias, 0)
        if total is None or total % 3:
            raise CannotLower(node, "its bias is not three equal parts")
        third = total // 3
        named = [
            g.op("Add", part, g.slice(bias, 0, g.int64([third * index]), g.int64([third * (index + 1)])))
            for index, part in enumerate(named)
        ]
    _fused_heads(g, node, named, mask=_input(node, 4), extra=_input(node, 5))


def _fused_heads(g: Emitter, node: Node, parts: list[str], mask: str | None, extra: str | None) -> None:
    like = node.inputs[0]
    heads = int(node.attrs["num_heads"])
    q, k, v = (_split_heads(g, part, heads) for part in parts)
    zero, filled = g.scalar(0.0, like), g.scalar(float(node.attrs.get("mask_filter_value", -10000.0)), like)
    terms = [extra] if extra else []
    if mask:
        terms.append(g.op("Where", _visible_keys(g, node, mask, k), zero, filled))
    if int(node.attrs.get("unidirectional", 0)):
        terms.append(g.op("Where", _causal(g, q, k, None), zero, g.scalar(_lowest(g, like), like)))
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


def _skip_norm(g: Emitter, node: Node) -> None:
    """Residual sum, then LayerNormalization (inputs x, skip, scale, shift, bias) or RMS (x, skip, scale, bias)."""
    simplified = node.op == "SkipSimplifiedLayerNormalization"
    _check(node, {"epsilon"}, inputs=4 if simplified else 5, outputs=4)
    if any(g.view.consumers.get(name) or name in g.view.graph_outputs for name in node.outputs[1:3]):
        raise CannotLower(node, "its mean or inverse deviation is used")
    bias = _input(node, 3 if simplified else 4)
    total_name = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else None
    total = g.op("Add", node.inputs[0], node.inputs[1], output=None if bias else total_name)
    if bias:
        total = g.op("Add", total, bias, output=total_name)
    epsilon = float(node.attrs.get("epsilon", 1e-12 if not simplified else 1e-5))
    _normalize(g, total, node.inputs[2], None if simplified else _input(node, 3), epsilon, not simplified, node.inputs[0], node.outputs[0])


def _simplified_norm(g: Emitter, node: Node) -> None:
    _check(node, {"epsilon", "axis", "stash_type"}, inputs=2, outputs=1)
    if int(node.attrs.get("axis", -1)) not in (-1, g.rank(node.inputs[0]) - 1):
        raise CannotLower(node, "it normalizes more than the last axis")
    _normalize(g, node.inputs[0], node.inputs[1], None, float(node.attrs.get("epsilon", 1e-5)), False, node.inputs[0], node.outputs[0])


def _normalize(g: Emitter, x: str, scale: str, shift: str | None, epsilon: float, centre: bool, like: str, output: str) -> None:
    """Over the last axis; one node where the opset has it."""
    if centre and g.opset >= 17:
        g.op("LayerNormalization", x, scale, *([shift] if shift else []), axis=-1, epsilon=epsilon, output=output)
        return
    if not centre and g.opset >= 23:
        g.op("RMSNormalization", x, scale, axis=-1, epsilon=epsilon, output=output)
        return
    centred = g.op("Sub", x, g.reduce("ReduceMean", x, [-1], keepdims=True)) if centre else x
    spread = g.reduce("ReduceMean", g.op("Mul", centred, centred), [-1], keepdims=True)
    unit = g.op("Div", centred, g.op("Sqrt", g.op("Add", spread, g.scalar(epsilon, like))))
    scaled = g.op("Mul", unit, scale, output=None if shift else output)
    if shift:
        g.op("Add", scaled, shift, output=output)


def _biased(g: Emitter, node: Node) -> str:
    bias = _input(node, 1)
    return g.op("Add", node.inputs[0], bias) if bias else node.inputs[0]


def _erf_gelu(g: Emitter, node: Node) -> None:
    _check(node, (), inputs=2, outputs=1)
    like = node.inputs[0]
    x = _biased(g, node)
    grown = g.op("Add", g.op("Erf", g.op("Mul", x, g.scalar(math.sqrt(0.5), like))), g.scalar(1.0, like))
    g.op("Mul", g.op("Mul", x, grown), g.scalar(0.5, like), output=node.outputs[0])


def _fast_gelu(g: Emitter, node: Node) -> None:
    """x/2 (1 + tanh(a x (1 + b x^2))), a = sqrt(2/pi), b = 0.044715."""
    _check(node, (), inputs=2, outputs=1)
    like = node.inputs[0]
    x = _biased(g, node)
    a = math.sqrt(2 / math.pi)
    inner = g.op("Mul", x, g.op("Add", g.op("Mul", g.op("Mul", x, x), g.scalar(a * 0.044715, like)), g.scalar(a, like)))
    grown = g.op("Add", g.op("Tanh", inner), g.scalar(1.0, like))
    g.op("Mul", g.op("Mul", x, grown), g.scalar(0.5, like), output=node.outputs[0])


def _quick_gelu(g: Emitter, node: Node) -> None:
    _check(node, {"alpha"}, inputs=1, outputs=1)
    x = node.inputs[0]
    gate = g.op("Sigmoid", g.op("Mul", x, g.scalar(float(node.attrs.get("alpha", 1.702)), x)))
    g.op("Mul", x, gate, output=node.outputs[0])


_LOWERINGS: dict[Key, Callable[[Emitter, Node], None]] = {
    ("", "Attention"): _attention,
    ("", "RotaryEmbedding"): _rotary,
    ("", "SimplifiedLayerNormalization"): _simplified_norm,
    (MICROSOFT, "Attention"): _packed_attention,
    (MICROSOFT, "MultiHeadAttention"): _multi_head_attention,
    (MICROSOFT, "SkipLayerNormalization"): _skip_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (MICROSOFT, "BiasGelu"): _erf_gelu,
    (MICROSOFT, "Gelu"): _erf_gelu,
    (MICROSOFT, "FastGelu"): _fast_gelu,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
}
COVERED: frozenset[Key] = frozenset(_LOWERINGS)
