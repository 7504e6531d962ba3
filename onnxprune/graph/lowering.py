"""Composite operators spelled out in primitives, so that later rooms need one rule per primitive and none per composite.

Covered are the attention and rotary operators of ONNX (opset 23 on) and the fused operators that onnxruntime's transformer optimizer
writes (domain ``com.microsoft``). Output names stay what they were. A form that is not covered is an error; nothing is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnxprune.errors import InputError
from onnxprune.graph import lowering_attention as attentions
from onnxprune.graph.emitter import Emitter
from onnxprune.graph.lowering_forms import CannotLower, check_form, operand
from onnxprune.graph.model import Model
from onnxprune.graph.profile import take_profile
from onnxprune.graph.view import Node

MICROSOFT = "com.microsoft"
Key = tuple[str, str]
"""(domain, operator)."""


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


def _skip_norm(g: Emitter, node: Node) -> None:
    """Residual sum, then LayerNormalization (inputs x, skip, scale, shift, bias) or RMS (x, skip, scale, bias)."""
    simplified = node.op == "SkipSimplifiedLayerNormalization"
    check_form(node, {"epsilon"}, inputs=4 if simplified else 5, outputs=4)
    if any(g.view.consumers.get(name) or name in g.view.graph_outputs for name in node.outputs[1:3]):
        raise CannotLower(node, "its mean or inverse deviation is used")
    bias = operand(node, 3 if simplified else 4)
    total_name = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else None
    total = g.op("Add", node.inputs[0], node.inputs[1], output=None if bias else total_name)
    if bias:
        total = g.op("Add", total, bias, output=total_name)
    epsilon = float(node.attrs.get("epsilon", 1e-12 if not simplified else 1e-5))
    _normalize(g, total, node.inputs[2], None if simplified else operand(node, 3), epsilon, not simplified, node.inputs[0], node.outputs[0])


def _simplified_norm(g: Emitter, node: Node) -> None:
    check_form(node, {"epsilon", "axis", "stash_type"}, inputs=2, outputs=1)
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
    bias = operand(node, 1)
    return g.op("Add", node.inputs[0], bias) if bias else node.inputs[0]


def _erf_gelu(g: Emitter, node: Node) -> None:
    check_form(node, (), inputs=2, outputs=1)
    like = node.inputs[0]
    x = _biased(g, node)
    grown = g.op("Add", g.op("Erf", g.op("Mul", x, g.scalar(math.sqrt(0.5), like))), g.scalar(1.0, like))
    g.op("Mul", g.op("Mul", x, grown), g.scalar(0.5, like), output=node.outputs[0])


def _fast_gelu(g: Emitter, node: Node) -> None:
    """x/2 (1 + tanh(a x (1 + b x^2))), a = sqrt(2/pi), b = 0.044715."""
    check_form(node, (), inputs=2, outputs=1)
    like = node.inputs[0]
    x = _biased(g, node)
    a = math.sqrt(2 / math.pi)
    inner = g.op("Mul", x, g.op("Add", g.op("Mul", g.op("Mul", x, x), g.scalar(a * 0.044715, like)), g.scalar(a, like)))
    grown = g.op("Add", g.op("Tanh", inner), g.scalar(1.0, like))
    g.op("Mul", g.op("Mul", x, grown), g.scalar(0.5, like), output=node.outputs[0])


def _quick_gelu(g: Emitter, node: Node) -> None:
    check_form(node, {"alpha"}, inputs=1, outputs=1)
    x = node.inputs[0]
    gate = g.op("Sigmoid", g.op("Mul", x, g.scalar(float(node.attrs.get("alpha", 1.702)), x)))
    g.op("Mul", x, gate, output=node.outputs[0])


_LOWERINGS: dict[Key, Callable[[Emitter, Node], None]] = {
    ("", "Attention"): attentions.attention,
    ("", "RotaryEmbedding"): attentions.rotary,
    ("", "SimplifiedLayerNormalization"): _simplified_norm,
    (MICROSOFT, "Attention"): attentions.packed_attention,
    (MICROSOFT, "GroupQueryAttention"): attentions.group_query_attention,
    (MICROSOFT, "MultiHeadAttention"): attentions.multi_head_attention,
    (MICROSOFT, "RotaryEmbedding"): attentions.fused_rotary,
    (MICROSOFT, "SkipLayerNormalization"): _skip_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (MICROSOFT, "BiasGelu"): _erf_gelu,
    (MICROSOFT, "Gelu"): _erf_gelu,
    (MICROSOFT, "FastGelu"): _fast_gelu,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
}
__all__ = ["COVERED", "MICROSOFT", "CannotLower", "Key", "lower"]

COVERED: frozenset[Key] = frozenset(_LOWERINGS)
