"""Arithmetic and other operators that work element by element."""

from __future__ import annotations

import math

from onnxprune.graph.autodiff.rules import Adjoints, MissingGradient, Tape, rule
from onnxprune.graph.view import Node


def _unbroadcast(tape: Tape, node: Node, parts: dict[int, str]) -> Adjoints:
    return {slot: tape.sum_to(part, node.inputs[slot], node.outputs[0]) for slot, part in parts.items()}


@rule("Identity", "Dropout")
def identity(tape: Tape, node: Node, dy: str) -> Adjoints:
    if node.op == "Dropout" and len(node.inputs) > 2 and node.inputs[2]:
        training = tape.constant(node.inputs[2])
        if training is None or training.any():
            raise MissingGradient(node, "it is in training mode, or may be at run time")
    return {0: dy}


@rule("Cast", "CastLike")
def cast(tape: Tape, node: Node, dy: str) -> Adjoints:
    source = tape.type_of(node.inputs[0])
    return {0: dy if source == tape.type_of(node.outputs[0]) else tape.op("Cast", dy, to=source or 1)}


@rule("Add", "Sum")
def add(tape: Tape, node: Node, dy: str) -> Adjoints:
    return _unbroadcast(tape, node, {slot: dy for slot in range(len(node.inputs)) if tape.wants(node, slot)})


@rule("Mean")
def mean(tape: Tape, node: Node, dy: str) -> Adjoints:
    share = tape.scaled(dy, 1 / len(node.inputs), node.outputs[0])
    return _unbroadcast(tape, node, {slot: share for slot in range(len(node.inputs)) if tape.wants(node, slot)})


@rule("Sub")
def subtract(tape: Tape, node: Node, dy: str) -> Adjoints:
    parts = {0: dy} if tape.wants(node, 0) else {}
    reduced = dict(_unbroadcast(tape, node, parts))
    if tape.wants(node, 1):
        reduced[1] = tape.op("Neg", tape.sum_to(dy, node.inputs[1], node.outputs[0]))
    return reduced


@rule("Mul")
def multiply(tape: Tape, node: Node, dy: str) -> Adjoints:
    left, right = node.inputs
    if left == right:
        return {0: tape.op("Mul", dy, tape.scaled(left, 2.0, left))}
    parts = {slot: tape.op("Mul", dy, other) for slot, other in ((0, right), (1, left)) if tape.wants(node, slot)}
    return _unbroadcast(tape, node, parts)


@rule("Div")
def divide(tape: Tape, node: Node, dy: str) -> Adjoints:
    quotient = tape.op("Div", dy, node.inputs[1])
    parts = {0: quotient} if tape.wants(node, 0) else {}
    if tape.wants(node, 1):
        parts[1] = tape.op("Neg", tape.op("Mul", quotient, node.outputs[0]))
    return _unbroadcast(tape, node, parts)


@rule("Neg")
def negate(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Neg", dy)}


@rule("Abs")
def absolute(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Mul", dy, tape.op("Sign", node.inputs[0]))}


@rule("Pow")
def power(tape: Tape, node: Node, dy: str) -> Adjoints:
    base, exponent = node.inputs
    parts: dict[int, str] = {}
    if tape.wants(node, 0):
        value = tape.view.value(exponent)
        if value is not None and value.size == 1:
            number = float(value.reshape(()))
            slope = tape.scaled(base, 2.0, base) if number == 2 else _power_slope(tape, base, number)
        else:
            if tape.type_of(exponent) != tape.type_of(base):
                exponent = tape.op("Cast", exponent, to=tape.type_of(base) or 1)
            slope = tape.op("Mul", exponent, tape.op("Pow", base, tape.op("Sub", exponent, tape.scalar(1.0, base))))
        parts[0] = tape.op("Mul", dy, slope)
    if tape.wants(node, 1):
        parts[1] = tape.op("Mul", dy, tape.op("Mul", node.outputs[0], tape.op("Log", base)))
    return _unbroadcast(tape, node, parts)


def _power_slope(tape: Tape, base: str, number: float) -> str:
    if number == 3:
        return tape.scaled(tape.op("Mul", base, base), 3.0, base)
    return tape.scaled(tape.op("Pow", base, tape.scalar(number - 1, base)), number, base)


@rule("Sqrt")
def square_root(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Div", tape.scaled(dy, 0.5, node.outputs[0]), node.outputs[0])}


@rule("Reciprocal")
def reciprocal(tape: Tape, node: Node, dy: str) -> Adjoints:
    y = node.outputs[0]
    return {0: tape.op("Neg", tape.op("Mul", dy, tape.op("Mul", y, y)))}


@rule("Exp")
def exponential(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Mul", dy, node.outputs[0])}


@rule("Log")
def logarithm(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Div", dy, node.inputs[0])}


@rule("Sin")
def sine(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Mul", dy, tape.op("Cos", node.inputs[0]))}


@rule("Cos")
def cosine(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Neg", tape.op("Mul", dy, tape.op("Sin", node.inputs[0])))}


@rule("Erf")
def error_function(tape: Tape, node: Node, dy: str) -> Adjoints:
    x = node.inputs[0]
    bell = tape.op("Exp", tape.op("Neg", tape.op("Mul", x, x)))
    return {0: tape.op("Mul", dy, tape.scaled(bell, 2 / math.sqrt(math.pi), x))}


@rule("Where")
def where(tape: Tape, node: Node, dy: str) -> Adjoints:
    condition, _, other = node.inputs
    zero = tape.scalar(0.0, node.outputs[0])
    parts = {}
    if tape.wants(node, 1):
        parts[1] = tape.op("Where", condition, dy, zero)
    if tape.wants(node, 2):
        # Where(IsNaN(x), c, x): an infinite or NaN x gets no gradient in any case, so the guard needs none of its own.
        guard = tape.view.producer.get(condition)
        guarded = guard is not None and guard.op == "IsNaN" and guard.inputs[0] == other and not tape.wants(node, 1)
        parts[2] = dy if guarded and _feeds_from_softmax(tape, other) else tape.op("Where", condition, zero, dy)
    return _unbroadcast(tape, node, parts)


def _feeds_from_softmax(tape: Tape, tensor: str) -> bool:
    source = tape.view.producer.get(tensor)
    return source is not None and source.op == "Softmax"


@rule("Clip")
def clip(tape: Tape, node: Node, dy: str) -> Adjoints:
    if tape.wants(node, 1) or tape.wants(node, 2):
        raise MissingGradient(node, "its bounds depend on a mask")
    inside = tape.op("Equal", node.inputs[0], node.outputs[0])
    return {0: tape.op("Where", inside, dy, tape.scalar(0.0, node.outputs[0]))}


@rule("Max", "Min")
def extremum(tape: Tape, node: Node, dy: str) -> Adjoints:
    """Ties share the adjoint evenly, as in torch.maximum."""
    y = node.outputs[0]
    if len(node.inputs) == 1:
        return {0: dy}
    winners = [tape.op("Cast", tape.op("Equal", name, y), to=tape.type_of(y) or 1) for name in node.inputs]
    share = tape.op("Div", dy, tape.op("Sum", *winners))
    return _unbroadcast(
        tape, node, {slot: tape.op("Mul", share, winners[slot]) for slot in range(len(node.inputs)) if tape.wants(node, slot)}
    )
