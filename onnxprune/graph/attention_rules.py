"""Axis rules of the attention operators: heads are tied across queries, keys, values, biases and results."""

from __future__ import annotations

import numpy as np

from onnxprune.graph.axis_links import Barrier, Index, Link, Shapes, Tie, rule
from onnxprune.graph.view import Node


def _heads_of(size: int, heads: int, kv_heads: int) -> Index:
    """Query head of every position of a flattened ``[heads, size / heads]`` axis, in units of key/value heads."""
    return (np.arange(size) // (size // heads)) // (heads // kv_heads)


Part = tuple[int, int, Index]
"""(operand, axis, unit of every position along it, -1 for none)."""


def _one_unit(parts: list[Part]) -> list[Link]:
    """Ties that make positions of equal units go together, over all parts and inside each; the first part holds every unit."""
    anchor, axis, units = parts[0]
    first = {int(unit): int(position) for position, unit in reversed(list(enumerate(units))) if unit >= 0}
    result: list[Link] = []
    for operand, other, of in parts:
        index = np.flatnonzero(of >= 0)
        target = np.array([first[int(unit)] for unit in of[index]], np.int64)
        result.append(Tie(operand, other, anchor, axis, index, target, batch=True))
    return result


def _blocks(heads: int, depth: int, per_unit: int = 1) -> Index:
    """Unit of every position of ``heads`` blocks of ``depth``."""
    return np.repeat(np.arange(heads) // per_unit, depth)


def _grouped(queries: list[Part], shared: list[Part], heads: int, kv_heads: int) -> list[Link]:
    """Units are key/value heads with their queries; query heads alone where one key/value head serves all of them.

    Args:
        queries: parts with one block per query head, numbered by query head.
        shared: parts with one block per key/value head, numbered by key/value head.
    """
    if kv_heads == 1 and heads > 1:
        return _one_unit(queries)
    group = heads // kv_heads
    return _one_unit([*shared, *((operand, axis, np.where(of >= 0, of // group, -1)) for operand, axis, of in queries)])


@rule("Attention")
def _attention(node: Node, s: Shapes) -> list[Link]:
    """Opset 23: Q, K, V as [B, H, S, D] or [B, S, H*D], past and present keys and values [B, H, T, D]."""
    if s.name(-4) or any(s.name(slot) for slot in range(6, len(node.inputs))):
        return []
    heads, kv_heads, flat = attention_heads(node, s)
    axis = 2 if flat else 1

    def part(operand: int, count: int) -> Part:
        return operand, axis, _blocks(count, s.of(operand)[axis] // count)

    queries, shared = [part(0, heads), part(-1, heads)], [part(1, kv_heads), part(2, kv_heads)]
    shared += [(operand, 1, np.arange(kv_heads)) for operand in (4, 5, -2, -3) if s.name(operand)]
    if s.name(3):
        mask = s.of(3)  # broadcast to [B, H, S, L] from the right
        if len(mask) >= 3 and mask[-3] == heads > 1:
            queries.append((3, len(mask) - 3, np.arange(heads)))
    result = _grouped(queries, shared, heads, kv_heads)
    result += [Tie(operand, 0, -1, 0) for operand in (0, 1, 2)]
    if not flat and s.name(3) and len(s.of(3)) >= 2 and s.of(3)[-2] == s.of(0)[2] != 1:
        result.append(Tie(3, len(s.of(3)) - 2, -1, 2))
    if not flat and not s.name(4):
        result += [Tie(0, 3, 1, 3, contracts=True), Tie(2, 3, -1, 3), Tie(0, 2, -1, 2), Tie(1, 2, 2, 2, contracts=True)]
    return result


def attention_heads(node: Node, s: Shapes) -> tuple[int, int, bool]:
    """(query heads, key/value heads, whether heads and head size share one axis) of an opset-23 Attention."""
    if s.rank(0) == 4:
        return s.of(0)[1], s.of(1)[1], False
    return node.attrs["q_num_heads"], node.attrs["kv_num_heads"], True


@rule("GroupQueryAttention", domain="com.microsoft")
def _group_query_attention(node: Node, s: Shapes) -> list[Link]:
    """Q [B, S, H*D], K and V [B, S, G*D], or all three in a row as Q; past and present keys and values [B, G, T, D]."""
    heads, kv_heads = node.attrs["num_heads"], node.attrs["kv_num_heads"]
    if s.name(-4) or any(s.name(slot) for slot in range(12, len(node.inputs))):
        return []
    result: list[Link] = []
    if s.name(1):
        depth = s.of(0)[2] // heads
        queries: list[Part] = [(0, 2, _blocks(heads, depth))]
        shared: list[Part] = [(operand, 2, _blocks(kv_heads, depth)) for operand in (1, 2)]
    else:
        depth = s.of(0)[2] // (heads + 2 * kv_heads)
        q, k = _blocks(heads, depth), _blocks(kv_heads, depth)
        none = np.full(2 * len(k), -1)
        queries = [(0, 2, np.concatenate([q, none]))]
        shared = [(0, 2, np.concatenate([np.full(len(q), -1), k, k]))]
    queries.append((-1, 2, _blocks(heads, depth)))
    shared += [(operand, 1, np.arange(kv_heads)) for operand in (3, 4, -2, -3) if s.name(operand)]
    if s.name(10) and s.of(10)[1] == heads > 1:
        queries.append((10, 1, np.arange(heads)))
    if s.name(11):
        queries.append((11, 0, np.arange(heads)))
    result += _grouped(queries, shared, heads, kv_heads)
    return [*result, Tie(0, 0, -1, 0)]


@rule("MultiHeadAttention", domain="com.microsoft")
def _multi_head_attention(node: Node, s: Shapes) -> list[Link]:
    """Q [B, S, H*D], K [B, L, H*D], V [B, L, H*Dv], bias of all three in a row, optional mask, per-head attention bias and cache."""
    if s.name(-4) or any(s.name(slot) for slot in range(8, len(node.inputs))) or any(s.rank(slot) != 3 for slot in (0, 1, 2)):
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
    for operand in (6, 7, -2, -3):  # [B, H, T, D]
        if s.name(operand):
            result.append(Tie(operand, 1, 0, 2, np.arange(heads), np.arange(heads) * (s.of(0)[2] // heads), batch=True))
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
    if not heads and node.domain and not node.attrs.get("rotary_embedding_dim", 0):
        heads = shape[2] // (2 * s.of(2)[-1])  # caches of cosines are half as wide as a head
    if not heads:
        return []
    first = _heads_of(shape[2], heads, heads) * (shape[2] // heads)
    paired = [Tie(operand, 2, -1, 2, np.arange(shape[2]), first) for operand in (0, -1)]
    return [*paired, *(Tie(0, axis, -1, axis) for axis in (0, 1))]
