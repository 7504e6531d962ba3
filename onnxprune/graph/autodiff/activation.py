"""Nonlinearities: each derivative is written with the tensors the forward pass already has."""

from __future__ import annotations

import math

from onnxprune.graph.autodiff.rules import Adjoints, Tape, rule
from onnxprune.graph.view import Node

_SQRT_HALF = math.sqrt(0.5)
_TANH_GELU = (math.sqrt(2 / math.pi), 0.044715)


@rule("Relu")
def relu(tape: Tape, node: Node, dy: str) -> Adjoints:
    zero = tape.scalar(0.0, node.outputs[0])
    return {0: tape.op("Where", tape.op("Greater", node.inputs[0], zero), dy, zero)}


@rule("LeakyRelu")
def leaky_relu(tape: Tape, node: Node, dy: str) -> Adjoints:
    x = node.inputs[0]
    slope = float(node.attrs.get("alpha", 0.01))
    return {0: tape.op("Where", tape.op("Greater", x, tape.scalar(0.0, x)), dy, tape.scaled(dy, slope, x))}


@rule("Elu")
def elu(tape: Tape, node: Node, dy: str) -> Adjoints:
    x, y = node.inputs[0], node.outputs[0]
    slope = tape.op("Add", y, tape.scalar(float(node.attrs.get("alpha", 1.0)), x))
    return {0: tape.op("Where", tape.op("Greater", x, tape.scalar(0.0, x)), dy, tape.op("Mul", dy, slope))}


@rule("Tanh")
def tanh(tape: Tape, node: Node, dy: str) -> Adjoints:
    y = node.outputs[0]
    return {0: tape.op("Mul", dy, tape.op("Sub", tape.scalar(1.0, y), tape.op("Mul", y, y)))}


@rule("Sigmoid")
def sigmoid(tape: Tape, node: Node, dy: str) -> Adjoints:
    y = node.outputs[0]
    return {0: tape.op("Mul", dy, tape.op("Sub", y, tape.op("Mul", y, y)))}


@rule("Softplus")
def softplus(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("Mul", dy, tape.op("Sigmoid", node.inputs[0]))}


@rule("HardSigmoid")
def hard_sigmoid(tape: Tape, node: Node, dy: str) -> Adjoints:
    y = node.outputs[0]
    zero = tape.scalar(0.0, y)
    rising = tape.op("And", tape.op("Greater", y, zero), tape.op("Less", y, tape.scalar(1.0, y)))
    return {0: tape.op("Where", rising, tape.scaled(dy, float(node.attrs.get("alpha", 0.2)), y), zero)}


@rule("HardSwish")
def hard_swish(tape: Tape, node: Node, dy: str) -> Adjoints:
    """y = x * clip(x/6 + 1/2, 0, 1): slope 0 below -3, 1 above 3, x/3 + 1/2 between."""
    x = node.inputs[0]
    middle = tape.op("Add", tape.scaled(x, 1 / 3, x), tape.scalar(0.5, x))
    upper = tape.op("Where", tape.op("Less", x, tape.scalar(3.0, x)), middle, tape.scalar(1.0, x))
    slope = tape.op("Where", tape.op("Greater", x, tape.scalar(-3.0, x)), upper, tape.scalar(0.0, x))
    return {0: tape.op("Mul", dy, slope)}


@rule("Swish")
def swish(tape: Tape, node: Node, dy: str) -> Adjoints:
    """y = x * s, s = sigmoid(alpha x): y' = s + alpha y (1 - s)."""
    x, y = node.inputs[0], node.outputs[0]
    alpha = float(node.attrs.get("alpha", 1.0))
    gate = tape.op("Sigmoid", tape.scaled(x, alpha, x))
    rest = tape.op("Sub", tape.scalar(1.0, x), gate)
    slope = tape.op("Add", gate, tape.op("Mul", tape.scaled(y, alpha, x), rest))
    return {0: tape.op("Mul", dy, slope)}


@rule("Mish")
def mish(tape: Tape, node: Node, dy: str) -> Adjoints:
    """y = x * t, t = tanh(softplus(x)): y' = t + x (1 - t^2) sigmoid(x)."""
    x = node.inputs[0]
    t = tape.op("Tanh", tape.op("Softplus", x))
    bend = tape.op("Sub", tape.scalar(1.0, x), tape.op("Mul", t, t))
    slope = tape.op("Add", t, tape.op("Mul", tape.op("Mul", x, bend), tape.op("Sigmoid", x)))
    return {0: tape.op("Mul", dy, slope)}


@rule("Gelu")
def gelu(tape: Tape, node: Node, dy: str) -> Adjoints:
    x = node.inputs[0]
    if node.attrs.get("approximate", b"none") == b"tanh":
        return {0: _tanh_gelu(tape, x, dy)}
    scaled = tape.scaled(x, _SQRT_HALF, x)
    return {0: erf_gelu(tape, scaled, tape.op("Add", tape.op("Erf", scaled), tape.scalar(1.0, x)), x, dy)}


def erf_gelu(tape: Tape, scaled: str, one_plus_erf: str, x: str, dy: str) -> str:
    """Adjoint of x for y = x/2 (1 + erf u), u = x / sqrt 2: dy/2 [(1 + erf u) + u exp(ln(2 / sqrt pi) - u^2)].

    The constant of the bell curve sits in the exponent, which saves a pass over the widest tensor of the network.
    """
    exponent = tape.op("Sub", tape.scalar(math.log(2 / math.sqrt(math.pi)), x), tape.op("Mul", scaled, scaled))
    bell = tape.op("Mul", scaled, tape.op("Exp", exponent))
    return tape.op("Mul", tape.op("Mul", dy, tape.scalar(0.5, x)), tape.op("Add", one_plus_erf, bell))


def _tanh_gelu(tape: Tape, x: str, dy: str) -> str:
    """y = x/2 (1 + t), t = tanh(a (x + b x^3)): y' = [1 + t + x (1 - t^2) a (1 + 3 b x^2)] / 2."""
    a, b = _TANH_GELU
    square = tape.op("Mul", x, x)
    inner = tape.op("Mul", x, tape.op("Add", tape.scaled(square, a * b, x), tape.scalar(a, x)))
    t = tape.op("Tanh", inner)
    bend = tape.op("Sub", tape.scalar(1.0, x), tape.op("Mul", t, t))
    rate = tape.op("Mul", x, tape.op("Add", tape.scaled(square, 3 * a * b, x), tape.scalar(a, x)))
    slope = tape.op("Add", tape.op("Add", t, tape.scalar(1.0, x)), tape.op("Mul", bend, rate))
    return tape.op("Mul", tape.scaled(dy, 0.5, x), slope)
