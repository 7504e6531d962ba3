"""Axis rules of the attention operators: heads are tied across queries, keys, values, biases and results."""

from __future__ import annotations

import numpy as np

from onnxprune.graph.axis_links import Barrier, Index, Link, Shapes, Tie, rule
from onnxprune.graph.view import Node


def _heads_of(size: int, heads: int, kv_heads: int) -> Index:
    """Query head of every position of a flattened ``[heads, size / heads]`` axis, in units of key/value heads."""
    return (np.arange(size) // (size // heads)) // (heads // kv_heads)


@rule("Attention")
def _attention(node: Node, s: Shapes) -> list[Link]:
    """Opset 23: Q, K, V as [B, H, S, D] or [B, S, H*D]; heads are tied, query heads in whole groups of their key/value head."""
    if any(s.name(slot) for slot in (4, 5)) or any(s.name(-1 - slot) for slot in (1, 2)):
        return []  # a KV cache is a graph input and output of its own
    heads, kv_heads, flat = attention_heads(node, s)
    axis = 2 if flat else 1
    key_index = np.arange(s.of(1)[axis])
    key_head = _heads_of(key_index.size, kv_heads, kv_heads)
    result: list[Link] = []
    for operand in (0, 2, -1):
        count = kv_heads if operand == 2 else heads
        index = np.arange(s.of(operand)[axis])
        # Ties relate positions; relating every position to the first one of its head in K makes the head the unit.
        first = np.searchsorted(key_head, _heads_of(index.size, count, kv_heads))
        result.append(Tie(operand, axis, 1, axis, index, first, batch=True))
    result.append(Tie(1, axis, 1, axis, key_index, np.searchsorted(key_head, key_head), batch=True))
    result += [Tie(operand, 0, -1, 0) for operand in (0, 1, 2)]
    if s.name(3):
        mask = s.of(3)  # broadcast to [B, H, S, L] from the right
        if len(mask) >= 3 and mask[-3] == heads > 1:
            first = np.searchsorted(key_head, np.arange(heads) // (heads // kv_heads))
            result.append(Tie(3, len(mask) - 3, 1, axis, np.arange(heads), first, batch=True))
        if len(mask) >= 2 and not flat and mask[-2] == s.of(0)[2] != 1:
            result.append(Tie(3, len(mask) - 2, -1, 2))
    if not flat:
        result += [Tie(0, 3, 1, 3, contracts=True), Tie(2, 3, -1, 3), Tie(0, 2, -1, 2), Tie(1, 2, 2, 2, contracts=True)]
    return result


def attention_heads(node: Node, s: Shapes) -> tuple[int, int, bool]:
    """(query heads, key/value heads, whether heads and head size share one axis) of an opset-23 Attention."""
    if s.rank(0) == 4:
        return s.of(0)[1], s.of(1)[1], False
    return node.attrs["q_num_heads"], node.attrs["kv_num_heads"], True


@rule("MultiHeadAttention", domain="com.microsoft")
def _multi_head_attention(node: Node, s: Shapes) -> list[Link]:
    """Q [B, S, H*D], K [B, L, H*D], V [B, L, H*Dv], bias of all three in a row, optional mask and per-head attention bias."""
    if any(s.name(slot) for slot in range(6, len(node.inputs))) or any(s.rank(slot) != 3 for slot in (0, 1, 2)):
        return []
    heads = node.attrs["num_heads"]
    result: list[Link] = []
    offset = 0
    for operand in (0, 1, 2, -1):
        size = s.of(operand)[2]
        first = _heads_of(size, heads, heads) * (s.of(0)[2] // heads)
        result.append(Tie(operand, 2, 0, 2, np.arange(size), first, batch=True))
        result.append(Tie(operand, 0, 0, 0))
        if operand >= 0 and s.name(3):
            result.append(Tie(3, 0, 0, 2, np.arange(offset, offset + size), first))
            offset += size
    if s.name(5) and s.of(5)[1] == heads > 1:
        result.append(Tie(5, 1, 0, 2, np.arange(heads), np.arange(heads) * (s.of(0)[2] // heads), batch=True))
    return result


@rule("Attention", domain="com.microsoft")
def _packed_attention(node: Node, s: Shapes) -> list[Link]:
    """X [B, S, E], W [E, q|k|v], bias [q|k|v]: the projection is inside the operator."""
    if any(s.name(slot) for slot in (4, 6)) or s.name(-2):
        return []
    heads = node.attrs["num_heads"]
    sizes = packed_sizes(node, s)
    first = np.concatenate([_heads_of(size, heads, heads) for size in sizes]) * (sizes[0] // heads)
    everything = np.arange(sum(sizes))
    result: list[Link] = [Tie(1, 1, 1, 1, everything, first, batch=True), Tie(0, 2, 1, 0, contracts=True)]
    if s.name(2):
        result.append(Tie(2, 0, 1, 1, everything, first))
    size = s.of(-1)[2]
    result.append(Tie(-1, 2, 1, 1, np.arange(size), _heads_of(size, heads, heads) * (sizes[0] // heads), batch=True))
    if s.name(5) and s.of(5)[1] == heads > 1:
        result.append(Tie(5, 1, 1, 1, np.arange(heads), np.arange(heads) * (sizes[0] // heads)))
    return result


def packed_sizes(node: Node, s: Shapes) -> list[int]:
    """Widths of Q, K and V inside the packed weight of a com.microsoft Attention."""
    given = node.attrs.get("qkv_hidden_sizes")
    return list(given) if given else [s.of(1)[1] // 3] * 3


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", domain="com.microsoft")
def _rotary(node: Node, s: Shapes) -> list[Link]:
    shape = s.of(0)
    if len(shape) == 4:
        barrier = Barrier(0, 3, "rotary embedding pairs positions of this axis")
        return [*(Tie(0, axis, -1, axis) for axis in (0, 1, 2)), barrier]
    heads = node.attrs.get("num_heads", 0)
    if not heads:
        return []
    first = _heads_of(shape[2], heads, heads) * (shape[2] // heads)
    paired = [Tie(operand, 2, -1, 2, np.arange(shape[2]), first) for operand in (0, -1)]
    return [*paired, *(Tie(0, axis, -1, axis) for axis in (0, 1))]
