"""Operators that move elements without changing them: reshapes, permutations, broadcasts, splits and joins."""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.graph.autodiff.rules import Adjoints, MissingGradient, Tape, multi_rule, rule
from onnxprune.graph.view import Node


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.like(dy, node.inputs[0])}


@rule("Transpose")
def transpose(tape: Tape, node: Node, dy: str) -> Adjoints:
    rank = tape.rank(node.inputs[0])
    perm = list(node.attrs.get("perm", range(rank - 1, -1, -1)))
    return {0: tape.op("Transpose", dy, perm=[perm.index(axis) for axis in range(rank)])}


@rule("Expand")
def expand(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.sum_to(dy, node.inputs[0], node.outputs[0])}


@rule("Tile")
def tile(tape: Tape, node: Node, dy: str) -> Adjoints:
    """Split every axis into (repeat, size) and sum over the repeats."""
    x, repeats = node.inputs
    rank = tape.rank(x)
    pairs = tape.op("Concat", tape.unsqueeze(repeats, 1), tape.unsqueeze(tape.shape_of(x), 1), axis=1)
    apart = tape.op("Reshape", dy, tape.op("Reshape", pairs, tape.int64([-1])))
    return {0: tape.reduce("ReduceSum", apart, range(0, 2 * rank, 2), keepdims=False)}


@rule("Concat")
def concat(tape: Tape, node: Node, dy: str) -> Adjoints:
    axis = int(node.attrs["axis"]) % tape.rank(node.outputs[0])
    adjoints = {}
    start = tape.int64([0])
    for slot, name in enumerate(node.inputs):
        end = _plus(tape, start, tape.size_of(name, axis))
        if tape.wants(node, slot):
            adjoints[slot] = tape.slice(dy, axis, start, end)
        start = end
    return adjoints


def _plus(tape: Tape, left: str, right: str) -> str:
    """Sum of two int64 [1] tensors, done now where both are constants."""
    values = [tape.known(name) for name in (left, right)]
    if values[0] is not None and values[1] is not None:
        return tape.int64([values[0] + values[1]])
    return tape.op("Add", left, right)


@multi_rule("Split")
def split(tape: Tape, node: Node, adjoints: Sequence[str | None]) -> Adjoints:
    rank = tape.rank(node.inputs[0])
    axis = int(node.attrs.get("axis", 0)) % rank
    parts = [adjoint or tape.zeros(tape.shape_of(name), like=node.inputs[0]) for adjoint, name in zip(adjoints, node.outputs, strict=True)]
    return {0: tape.op("Concat", *parts, axis=axis) if len(parts) > 1 else parts[0]}


@rule("Pad")
def pad(tape: Tape, node: Node, dy: str) -> Adjoints:
    """Padding by the same numbers turned round: what was padded is cut off, what was cut off (a shift of tokens) gets nothing."""
    if node.attrs.get("mode", b"constant") != b"constant" or len(node.inputs) < 2:
        raise MissingGradient(node, "only mode 'constant' with pads as an input is covered")
    pads = tape.constant(node.inputs[1])
    back = tape.op("Neg", node.inputs[1]) if pads is None else tape.int64((-pads).tolist())
    axes = node.inputs[3:4]
    return {0: tape.op("Pad", dy, back, *(["", *axes] if axes and axes[0] else []))}


@rule("Trilu")
def trilu(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Trilu", dy, *node.inputs[1:], upper=int(node.attrs.get("upper", 1)))}
