"""Sums, means, maxima and norms over axes."""

from __future__ import annotations

from onnxprune.graph.autodiff.rules import Adjoints, MissingGradient, Tape, rule
from onnxprune.graph.view import Node


def _axes(tape: Tape, node: Node) -> list[int]:
    """Reduced axes, non-negative. Axes came as an attribute first and as an input later."""
    rank = tape.rank(node.inputs[0])
    if len(node.inputs) > 1 and node.inputs[1]:
        values = tape.constant(node.inputs[1])
        if values is None:
            raise MissingGradient(node, "its axes are not constant")
        given = [int(axis) for axis in values.reshape(-1)]
    else:
        given = [int(axis) for axis in node.attrs.get("axes", ())]
    if not given and not int(node.attrs.get("noop_with_empty_axes", 0)):
        given = list(range(rank))
    return sorted(axis % rank for axis in given)


def _kept(tape: Tape, node: Node, tensor: str, axes: list[int]) -> str:
    """The tensor with its reduced axes back as size 1."""
    return tensor if int(node.attrs.get("keepdims", 1)) or not axes else tape.unsqueeze(tensor, *axes)


@rule("ReduceSum")
def reduce_sum(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Expand", _kept(tape, node, dy, _axes(tape, node)), tape.shape_of(node.inputs[0]))}


@rule("ReduceMean")
def reduce_mean(tape: Tape, node: Node, dy: str) -> Adjoints:
    x, axes = node.inputs[0], _axes(tape, node)
    share = _kept(tape, node, dy, axes)
    for axis in axes:
        size = tape.size_of(x, axis)
        fixed = tape.known(size)
        if fixed is not None:
            share = tape.scaled(share, 1 / fixed, x)
        else:
            share = tape.op("Div", share, tape.op("Cast", size, to=tape.type_of(x) or 1))
    return {0: tape.op("Expand", share, tape.shape_of(x))}


@rule("ReduceMax", "ReduceMin")
def reduce_extremum(tape: Tape, node: Node, dy: str) -> Adjoints:
    """Ties share the adjoint evenly, as in torch.amax."""
    x, axes = node.inputs[0], _axes(tape, node)
    winners = tape.op("Cast", tape.op("Equal", x, _kept(tape, node, node.outputs[0], axes)), to=tape.type_of(x) or 1)
    count = tape.reduce("ReduceSum", winners, axes, keepdims=True)
    return {0: tape.op("Mul", winners, tape.op("Div", _kept(tape, node, dy, axes), count))}


@rule("ReduceL2")
def reduce_l2(tape: Tape, node: Node, dy: str) -> Adjoints:
    axes = _axes(tape, node)
    ratio = tape.op("Div", dy, node.outputs[0])
    return {0: tape.op("Mul", node.inputs[0], _kept(tape, node, ratio, axes))}


@rule("ReduceSumSquare")
def reduce_sum_square(tape: Tape, node: Node, dy: str) -> Adjoints:
    x = node.inputs[0]
    return {0: tape.op("Mul", x, _kept(tape, node, tape.scaled(dy, 2.0, x), _axes(tape, node)))}
