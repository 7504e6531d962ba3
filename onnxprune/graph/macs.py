"""Multiply-accumulate counts of a graph at given shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod

from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, Node

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def count_macs(model: Model, shapes: Shapes) -> dict[str, int]:
    """Multiply-accumulates of every node that multiplies matrices; a multiply and its add count as one.

    Counted: matrix products (float and quantized), convolutions, Einsum, and the attention operators (their two products, and the
    projections those of com.microsoft contain). Element-wise work, softmax and normalisation are not, nor bodies of If and Loop.

    Args:
        shapes: true shapes by tensor name, as :func:`onnxprune.graph.profile.shapes_of` gives them; those of initializers are added.

    Returns:
        Node name (``Op_index`` for an unnamed node) -> multiply-accumulates. Nodes that share a name are added up.

    Raises:
        InputError: the shape of a tensor that is needed is unknown.
    """
    known = {**{tensor.name: tuple(tensor.dims) for tensor in model.proto.graph.initializer}, **shapes}
    counts: dict[str, int] = {}
    for node in GraphView(model).nodes:
        rule = _RULES.get(node.op)
        if rule is None:
            continue
        name = node.name or f"{node.op}_{node.index}"
        counts[name] = counts.get(name, 0) + rule(node, _Reader(node, known))
    return counts


def total_macs(model: Model, shapes: Shapes) -> int:
    """Sum of :func:`count_macs`."""
    return sum(count_macs(model, shapes).values())


class _Reader:
    """Shapes of a node's tensors by position; an optional one that is left out is None."""

    def __init__(self, node: Node, shapes: Shapes) -> None:
        self._node = node
        self._shapes = shapes

    def optional(self, slot: int) -> Shape | None:
        names = self._node.inputs
        return self._lookup(names[slot]) if slot < len(names) and names[slot] else None

    def input(self, slot: int) -> Shape:
        shape = self.optional(slot)
        if shape is None:
            raise InputError(f"{self._node} has no input {slot}; its multiply-adds cannot be counted")
        return shape

    def output(self) -> Shape:
        return self._lookup(self._node.outputs[0])

    def _lookup(self, name: str) -> Shape:
        if name not in self._shapes:
            raise InputError(f"the shape of {name!r} at {self._node} is unknown; its multiply-adds cannot be counted")
        return self._shapes[name]


def _matmul(node: Node, shape: _Reader) -> int:
    return prod(shape.output()) * shape.input(0)[-1]


def _fused_matmul(node: Node, shape: _Reader) -> int:
    left = shape.input(0)
    inner = left[-2] if node.attrs.get("transA", 0) and len(left) > 1 else left[-1]
    return prod(shape.output()) * inner


def _gemm(node: Node, shape: _Reader) -> int:
    return prod(shape.output()) * shape.input(0)[0 if node.attrs.get("transA", 0) else 1]


def _conv(weight: int) -> Callable[[Node, _Reader], int]:
    return lambda node, shape: prod(shape.output()) * prod(shape.input(weight)[1:])


def _conv_transpose(node: Node, shape: _Reader) -> int:
    return prod(shape.input(0)) * prod(shape.input(1)[1:])


def _packed_matmul(node: Node, shape: _Reader) -> int:
    """MatMulNBits: weights are packed, so the inner size stands in an attribute."""
    return prod(shape.output()) * int(node.attrs["K"])


def _einsum(node: Node, shape: _Reader) -> int:
    """The size of the joint index space: every index of every operand once."""
    equation = node.attrs["equation"].decode().replace(" ", "")
    sizes: dict[str, int] = {}
    for slot, term in enumerate(equation.split("->")[0].split(",")):
        dims = shape.input(slot)
        labels = re.findall(r"\.\.\.|[A-Za-z]", term)
        broadcast = len(dims) - sum(label != "..." for label in labels)
        position = 0
        for label in labels:
            if label == "...":
                for offset in range(broadcast):
                    # Ellipsis dimensions align on the right.
                    key = f"...{broadcast - offset}"
                    sizes[key] = max(sizes.get(key, 1), dims[position + offset])
                position += broadcast
            else:
                sizes[label] = max(sizes.get(label, 1), dims[position])
                position += 1
    return prod(sizes.values())


def _attention(node: Node, shape: _Reader) -> int:
    """Attention of opset 23 and Attention of com.microsoft, which contains its q/k/v projections."""
    if node.domain == "com.microsoft":
        return _contrib_attention(node, shape)
    query, key, value = shape.input(0), shape.input(1), shape.input(2)
    heads = query[1] if len(query) == 4 else int(node.attrs["q_num_heads"])
    kv_heads = key[1] if len(key) == 4 else int(node.attrs["kv_num_heads"])
    depth = query[3] if len(query) == 4 else query[2] // heads
    value_depth = value[3] if len(value) == 4 else value[2] // kv_heads
    past = shape.optional(4)
    keys = key[-2] + (past[2] if past else 0)
    return query[0] * heads * query[-2] * keys * (depth + value_depth)


def _contrib_attention(node: Node, shape: _Reader) -> int:
    """com.microsoft Attention: input [b, s, in], weights [in, q + k + v], past [2, b, heads, past, depth]."""
    (batch, tokens, width), columns = shape.input(0), shape.input(1)[1]
    sizes = node.attrs.get("qkv_hidden_sizes") or [columns // 3] * 3
    past = shape.optional(4)
    keys = tokens + (past[3] if past else 0)
    return int(batch * tokens * width * columns + batch * tokens * keys * (sizes[0] + sizes[2]))


def _quantized_attention(node: Node, shape: _Reader) -> int:
    (batch, tokens, width), columns = shape.input(0), shape.input(1)[1]
    past = shape.optional(8)
    keys = tokens + (past[3] if past else 0)
    return batch * tokens * width * columns + batch * tokens * keys * 2 * (columns // 3)


def _multi_head_attention(node: Node, shape: _Reader) -> int:
    """com.microsoft MultiHeadAttention: projections are outside; q, k, v apart, k and v packed, or all packed."""
    query, key, value, past = shape.input(0), shape.optional(1), shape.optional(2), shape.optional(6)
    output = shape.output()
    batch, tokens = query[0], query[1]
    hidden = output[-1] if len(query) == 5 else query[2]
    keys = tokens if key is None else key[2] if len(key) == 4 else key[1]
    value_hidden = output[-1] if value is None else value[1] * value[3] if len(value) == 4 else value[2]
    return batch * tokens * (keys + (past[2] if past else 0)) * (hidden + value_hidden)


def _grouped_attention(node: Node, shape: _Reader) -> int:
    """com.microsoft GroupQueryAttention: output [b, s, heads * depth]; past key [b, kv heads, past, depth]."""
    batch, tokens, hidden = shape.output()
    past = shape.optional(3)
    return batch * tokens * (tokens + (past[2] if past else 0)) * 2 * hidden


_RULES: Mapping[str, Callable[[Node, _Reader], int]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _packed_matmul,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "QGemm": _gemm,
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Attention": _attention,
    "QAttention": _quantized_attention,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _grouped_attention,
}
