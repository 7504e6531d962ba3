"""The residual addition in front of a LayerNormalization written as Sum.

onnxruntime fuses Add + LayerNormalization into SkipLayerNormalization, which on its CPU provider is about seven times slower than the two
operators; pruning cannot touch that cost. Sum computes the same and is not fused, in anybody's default session.
"""

from __future__ import annotations

from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView


def residual_sum(model: Model) -> tuple[Model, int]:
    """Rewrite every Add of activations that a LayerNormalization reads; returns the model and how many were rewritten."""
    view = GraphView(model)
    proto = model.copy_proto()
    count = 0
    for node in view.nodes:
        if node.op != "Add" or node.domain or any(view.is_constant(name) for name in node.inputs):
            continue
        if any(reader.op == "LayerNormalization" for reader, _ in view.consumers.get(node.outputs[0], ())):
            proto.graph.node[node.index].op_type = "Sum"
            count += 1
    return (model.with_proto(proto), count) if count else (model, 0)
