"""Side tensors: masks, position tables and biases, which shape an attention but carry nothing that another layer has learned of the input.

A side tensor depends on shapes, on constants and on which tokens are real, never on a float input of the graph or on an embedded token.
What several layers read of it may be cut for each of them apart, as a constant may: units of two layers do not become one by it.
"""

from __future__ import annotations

from onnx import TensorProto

from onnxprune.graph.view import GraphView, Node, captured

_MEASURES = frozenset({"Shape", "Size"})
_LOOKUPS = frozenset({"Gather", "GatherElements", "GatherND"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})


def side_tensors(view: GraphView) -> frozenset[str]:
    """Outputs of nodes that are neither stored constants nor features of the input."""
    inputs = [value for value in view.model.proto.graph.input if value.name in view.graph_inputs]
    features = {value.name for value in inputs if value.type.tensor_type.elem_type in _FLOATS}
    values = {value.name for value in inputs}
    side: set[str] = set()
    for node in view.nodes:
        read = {name for name in node.inputs if name} | captured(node.proto)
        if node.op in _MEASURES:
            continue
        if read & values:
            values.update(node.outputs)
        if read & features or node.op.startswith("Random") or _embeds(view, node, values):
            features.update(node.outputs)
        else:
            side.update(name for name in node.outputs if name and view.value(name) is None)
    return frozenset(side)


def _embeds(view: GraphView, node: Node, values: set[str]) -> bool:
    """Whether rows of a table are looked up by what an input says."""
    if node.op not in _LOOKUPS or node.inputs[1] not in values:
        return False
    table = view.value(node.inputs[0])
    return view.is_constant(node.inputs[0]) and (table is None or table.dtype.kind == "f")
