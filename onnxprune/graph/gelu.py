"""GELU spelled so that onnxruntime recognises it.

A default session fuses ``(x (1 + erf(x / sqrt 2))) 0.5`` into one operator, with the bias in front of it, and the tanh form too. It does
not see ``x (0.5 (1 + erf(x / sqrt 2)))``, which dynamo exports below opset 20 write: then five passes over the widest activation of the
model stay. Reordering the factors keeps standard operators, so that other runtimes and quantizers still read the file.
"""

from __future__ import annotations

import math

import numpy as np

from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, Node

_TOLERANCE = 1e-6
"""Exporters write sqrt 2 in float32."""


def fusable_gelu(model: Model) -> tuple[Model, int]:
    """Move the factor 0.5 of every erf GELU to the end; returns the model and how many were rewritten. Exact: 0.5 only shifts exponents."""
    view = GraphView(model)
    proto = model.copy_proto()
    count = 0
    for node in view.nodes:
        found = _unrecognised(view, node)
        if found is None:
            continue
        halved, half, grown, x = found
        first, second = proto.graph.node[halved.index], proto.graph.node[node.index]
        del first.input[:], second.input[:]
        first.input.extend([x, grown])
        second.input.extend([halved.outputs[0], half])
        count += 1
    return (model.with_proto(proto), count) if count else (model, 0)


def _unrecognised(view: GraphView, node: Node) -> tuple[Node, str, str, str] | None:
    """(inner product, its constant 0.5, 1 + erf(x / sqrt 2), x) if ``node`` computes x (0.5 (1 + erf(x / sqrt 2)))."""
    if node.op != "Mul" or node.domain:
        return None
    for slot in (0, 1):
        x, halved = node.inputs[slot], view.producer.get(node.inputs[1 - slot])
        parts = _with_scalar(view, halved, "Mul", 0.5)
        if halved is None or parts is None or not _private(view, halved):
            continue
        grown = view.producer.get(parts[0])
        erf = _with_scalar(view, grown, "Add", 1.0)
        if erf is not None and _erf_argument(view, erf[0]) == x and not view.is_constant(x):
            return halved, parts[1], parts[0], x
    return None


def _erf_argument(view: GraphView, tensor: str) -> str | None:
    """x if the tensor is erf(x / sqrt 2)."""
    erf = view.producer.get(tensor)
    if erf is None or erf.op != "Erf":
        return None
    inner = view.producer.get(erf.inputs[0])
    divided = _with_scalar(view, inner, "Div", math.sqrt(2)) or _with_scalar(view, inner, "Mul", math.sqrt(0.5))
    return divided[0] if divided else None


def _with_scalar(view: GraphView, node: Node | None, op: str, value: float) -> tuple[str, str] | None:
    """(other operand, constant) if a node applies ``op`` to a tensor and this scalar; a divisor stands second."""
    if node is None or node.op != op or node.domain:
        return None
    for slot in (1,) if op == "Div" else (0, 1):
        array = view.value(node.inputs[slot])
        # A constant of more axes than its partner would change the shape of the result.
        if array is not None and array.ndim == 0 and np.isclose(float(array), value, rtol=_TOLERANCE, atol=0):
            return node.inputs[1 - slot], node.inputs[slot]
    return None


def _private(view: GraphView, node: Node) -> bool:
    return len(view.consumers.get(node.outputs[0], ())) == 1 and node.outputs[0] not in view.graph_outputs
