"""A batch norm right behind a convolution folded into it, as every runtime does when a session starts.

With g = scale / sqrt(variance + epsilon), per output channel: W' = g W, b' = g (b - mean) + shift. Done here, the convolution ends in its
sum or its activation, and a re-fit has a bias to write to.
"""

from __future__ import annotations

import numpy as np

from onnxprune.graph.model import Model
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView, Node


def fold_batch_norms(model: Model) -> Model:
    """Fold where the weights are initializers and nothing else reads the convolution; the model itself if there is no such place."""
    view = GraphView(model)
    pairs = [(conv, norm) for norm in view.nodes if (conv := _foldable(view, norm)) is not None]
    if not pairs:
        return model
    surgeon = Surgeon(model)
    for conv, norm in pairs:
        weight, bias, scale, shift, mean, variance = (
            _value(view, conv, 1),
            _value(view, conv, 2),
            *(_value(view, norm, s) for s in range(1, 5)),
        )
        assert weight is not None
        assert scale is not None
        assert shift is not None
        assert mean is not None
        assert variance is not None
        gain = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + norm.attrs.get("epsilon", 1e-5))
        folded = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
        moved = gain * ((0.0 if bias is None else bias) - mean) + shift
        node, after = surgeon.nodes[conv.index], surgeon.nodes[norm.index]
        constants = [surgeon.constant(array.astype(weight.dtype), norm.name) for array in (folded, moved)]
        node.inputs = [node.inputs[0], *constants]
        node.outputs = [after.outputs[0]]
        after.outputs = []
    return surgeon.close()


def _foldable(view: GraphView, norm: Node) -> Node | None:
    if norm.op != "BatchNormalization" or norm.domain or any(norm.outputs[1:]) or norm.attrs.get("training_mode", 0):
        return None
    conv = view.producer.get(norm.inputs[0])
    if conv is None or conv.op != "Conv" or conv.domain:
        return None
    if len(view.consumers[conv.outputs[0]]) > 1 or conv.outputs[0] in view.graph_outputs:
        return None
    operands = [(conv, 1), *((norm, slot) for slot in range(1, 5))]
    operands += [(conv, 2)] if len(conv.inputs) > 2 and conv.inputs[2] else []
    return conv if all(_value(view, node, slot) is not None for node, slot in operands) else None


def _value(view: GraphView, node: Node, slot: int) -> np.ndarray | None:
    return view.value(node.inputs[slot]) if slot < len(node.inputs) and node.inputs[slot] else None
