"""Normalizations and softmax, by closed formulas in terms of what the forward pass saves."""

from __future__ import annotations

from onnx import TensorProto

from onnxprune.graph.autodiff.rules import Adjoints, MissingGradient, Tape, rule
from onnxprune.graph.view import Node


@rule("LayerNormalization")
def layer_normalization(tape: Tape, node: Node, dy: str) -> Adjoints:
    """With g = dy * scale, c = x - mean, r = 1/std: dx = r (g - mean(g) - c r^2 mean(g c)). Mean and r are outputs of the node."""
    x, axes = _normalized(tape, node)
    outputs = node.proto.output
    while len(outputs) < 3:
        outputs.append("")
    for position, hint in ((1, "mean"), (2, "inverse_std")):
        if not outputs[position]:
            outputs[position] = tape.fresh(hint)
    # Saved statistics are single precision whatever the type of x.
    dtype = tape.type_of(x) or TensorProto.FLOAT
    mean, inverse = (name if dtype == TensorProto.FLOAT else tape.op("Cast", name, to=dtype) for name in outputs[1:3])
    centred = tape.op("Sub", x, mean)
    adjoints = _affine(tape, node, dy, tape.op("Mul", centred, inverse), axes)
    if not tape.wants(node, 0):
        return adjoints
    scaled = tape.op("Mul", dy, node.inputs[1])
    shift = tape.reduce("ReduceMean", scaled, axes, keepdims=True)
    along = tape.reduce("ReduceMean", tape.op("Mul", scaled, centred), axes, keepdims=True)
    pull = tape.op("Mul", centred, tape.op("Mul", along, tape.op("Mul", inverse, inverse)))
    adjoints[0] = tape.op("Mul", tape.op("Sub", tape.op("Sub", scaled, shift), pull), inverse)
    return adjoints


@rule("RMSNormalization")
def rms_normalization(tape: Tape, node: Node, dy: str) -> Adjoints:
    """With g = dy * scale, r = 1 / sqrt(mean(x^2) + epsilon): dx = r (g - x r^2 mean(g x))."""
    x, axes = _normalized(tape, node)
    square = tape.reduce("ReduceMean", tape.op("Mul", x, x), axes, keepdims=True)
    shifted = tape.op("Add", square, tape.scalar(float(node.attrs.get("epsilon", 1e-5)), x))
    inverse = tape.op("Reciprocal", tape.op("Sqrt", shifted))
    adjoints = _affine(tape, node, dy, tape.op("Mul", x, inverse), axes)
    if not tape.wants(node, 0):
        return adjoints
    scaled = tape.op("Mul", dy, node.inputs[1])
    along = tape.reduce("ReduceMean", tape.op("Mul", scaled, x), axes, keepdims=True)
    pull = tape.op("Mul", x, tape.op("Div", along, shifted))
    adjoints[0] = tape.op("Mul", tape.op("Sub", scaled, pull), inverse)
    return adjoints


@rule("InstanceNormalization")
def instance_normalization(tape: Tape, node: Node, dy: str) -> Adjoints:
    """Over the places of each channel, as LayerNormalization is over its axes; group norms are written so, with a group for a channel."""
    x, rank = node.inputs[0], tape.rank(node.inputs[0])
    places = list(range(2, rank))
    centred = tape.op("Sub", x, tape.reduce("ReduceMean", x, places, keepdims=True))
    variance = tape.reduce("ReduceMean", tape.op("Mul", centred, centred), places, keepdims=True)
    spread = tape.op("Sqrt", tape.op("Add", variance, tape.scalar(float(node.attrs.get("epsilon", 1e-5)), x)))
    unit = tape.op("Div", centred, spread)
    adjoints = {}
    for slot in (1, 2):
        if tape.wants(node, slot):
            part = tape.op("Mul", dy, unit) if slot == 1 else dy
            adjoints[slot] = tape.reduce("ReduceSum", part, [0, *places], keepdims=False)
    if tape.wants(node, 0):
        scaled = tape.op("Mul", dy, tape.unsqueeze(node.inputs[1], *range(1, rank - 1)))
        shift = tape.reduce("ReduceMean", scaled, places, keepdims=True)
        along = tape.reduce("ReduceMean", tape.op("Mul", scaled, unit), places, keepdims=True)
        adjoints[0] = tape.op("Div", tape.op("Sub", tape.op("Sub", scaled, shift), tape.op("Mul", unit, along)), spread)
    return adjoints


def _affine(tape: Tape, node: Node, dy: str, unit: str, axes: list[int]) -> dict[int, str]:
    """Adjoints of the scale and the shift that follow the normalized value ``unit``."""
    adjoints = {}
    for slot in (1, 2):
        if tape.wants(node, slot):
            if tape.rank(node.inputs[slot]) != len(axes):
                raise MissingGradient(node, "its scale or shift is broadcast along normalized axes")
            part = tape.op("Mul", dy, unit) if slot == 1 else dy
            adjoints[slot] = tape.sum_to(part, node.inputs[slot], node.outputs[0])
    return adjoints


def _normalized(tape: Tape, node: Node) -> tuple[str, list[int]]:
    """(input, normalized axes)."""
    rank = tape.rank(node.inputs[0])
    return node.inputs[0], list(range(int(node.attrs.get("axis", -1)) % rank, rank))


@rule("Softmax")
def softmax(tape: Tape, node: Node, dy: str) -> Adjoints:
    """dx = y (dy - sum(y dy)). Rows that the graph replaces because they are NaN (fully masked) get zero instead."""
    y = _guarded(tape, node.outputs[0])
    product = tape.op("Mul", y, dy)
    total = tape.reduce("ReduceSum", product, _softmax_axes(tape, node), keepdims=True)
    return {0: tape.op("Mul", y, tape.op("Sub", dy, total))}


@rule("LogSoftmax")
def log_softmax(tape: Tape, node: Node, dy: str) -> Adjoints:
    total = tape.reduce("ReduceSum", dy, _softmax_axes(tape, node), keepdims=True)
    return {0: tape.op("Sub", dy, tape.op("Mul", tape.op("Exp", node.outputs[0]), total))}


def _softmax_axes(tape: Tape, node: Node) -> list[int]:
    """Before opset 13 the operator flattens everything from its axis on."""
    rank = tape.rank(node.inputs[0])
    if tape.opset < 13:
        return list(range(int(node.attrs.get("axis", 1)) % rank, rank))
    return [int(node.attrs.get("axis", -1)) % rank]


def _guarded(tape: Tape, y: str) -> str:
    """The output of Where(IsNaN(y), c, y), if that is how y is used, else y."""
    for reader, slot in tape.view.consumers.get(y, ()):
        if reader.op == "Where" and slot == 2:
            guard = tape.view.producer.get(reader.inputs[0])
            if guard is not None and guard.op == "IsNaN" and guard.inputs[0] == y:
                return reader.outputs[0]
    return y


@rule("LpNormalization")
def lp_normalization(tape: Tape, node: Node, dy: str) -> Adjoints:
    """p = 2: with n = |x|, dx = (dy - y sum(dy y)) / n."""
    if int(node.attrs.get("p", 2)) != 2:
        raise MissingGradient(node, "only p = 2 is covered")
    x, y = node.inputs[0], node.outputs[0]
    axes = [int(node.attrs.get("axis", -1)) % tape.rank(x)]
    norm = tape.reduce("ReduceL2", x, axes, keepdims=True)
    total = tape.reduce("ReduceSum", tape.op("Mul", dy, y), axes, keepdims=True)
    return {0: tape.op("Div", tape.op("Sub", dy, tape.op("Mul", y, total)), norm)}
