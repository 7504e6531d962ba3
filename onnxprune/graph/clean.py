"""What a graph carries for nothing: nodes nobody reads, initializers nobody reads, and weights stored twice."""

from __future__ import annotations

import hashlib

import onnx

from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, captured


def clean(model: Model) -> tuple[Model, int]:
    """Drop dead nodes and unused initializers, and keep one of every set of bit-identical initializers.

    Graph inputs and outputs stay as they are, and so does everything that a body of If, Loop or Scan reads by name.

    Returns:
        the smaller model, and how many nodes and initializers it lost.
    """
    before = len(model.proto.graph.node) + len(model.proto.graph.initializer)
    model = without_dead(shared_initializers(model)[0])
    return model, before - len(model.proto.graph.node) - len(model.proto.graph.initializer)


def shared_initializers(model: Model) -> tuple[Model, int]:
    """Let all readers of bit-identical initializers (type, shape and bytes) read the first one; returns the model and how many went."""
    view = GraphView(model)
    declared = {value.name for value in (*model.proto.graph.input, *model.proto.graph.output)}
    pinned = declared | {name for node in view.nodes for name in captured(node.proto)}
    first: dict[tuple[object, ...], str] = {}
    renamed: dict[str, str] = {}
    for tensor in model.proto.graph.initializer:
        # An initializer that is also a graph input may be fed other values.
        if tensor.name in declared:
            continue
        name = first.setdefault(_content(model, tensor), tensor.name)
        if name != tensor.name and tensor.name not in pinned:
            renamed[tensor.name] = name
    if not renamed:
        return model, 0
    proto = model.copy_proto()
    for node in proto.graph.node:
        for slot, name in enumerate(node.input):
            if name in renamed:
                node.input[slot] = renamed[name]
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in renamed]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return model.with_proto(proto), len(renamed)


def _content(model: Model, tensor: onnx.TensorProto) -> tuple[object, ...]:
    """What makes two initializers equal. Values are hashed: a group may hold gigabytes."""
    array = model.weights.get(tensor.name)
    if array is not None:
        # Flat bytes, so that 0.0 and -0.0 differ and NaN equals itself.
        return tensor.data_type, tuple(tensor.dims), hashlib.sha256(array.tobytes()).digest()
    anonymous = onnx.TensorProto()
    anonymous.CopyFrom(tensor)
    for field in ("name", "doc_string", "metadata_props"):
        anonymous.ClearField(field)
    return (anonymous.SerializeToString(deterministic=True),)


def without_dead(model: Model) -> Model:
    """The model without nodes that no graph output depends on, and without initializers that nothing reads."""
    view = GraphView(model)
    alive = view.ancestors(view.graph_outputs)
    proto = model.copy_proto()
    nodes = [proto.graph.node[index] for index in sorted(alive)]
    read = {name for node in nodes for name in (*node.input, *captured(node))}
    read |= {value.name for value in (*proto.graph.input, *proto.graph.output)}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    if len(nodes) == len(view.nodes) and len(kept) == len(proto.graph.initializer):
        return model
    _replace(proto.graph.node, nodes)
    _replace(proto.graph.initializer, kept)
    made = read | {name for node in nodes for name in node.output}
    _replace(proto.graph.value_info, [value for value in proto.graph.value_info if value.name in made])
    return model.with_proto(proto)


def _replace(field, values) -> None:  # type: ignore[no-untyped-def]
    # The values live inside the field: copies must exist before it is emptied.
    copies = [type(value)() for value in values]
    for copy, value in zip(copies, values, strict=True):
        copy.CopyFrom(value)
    del field[:]
    field.extend(copies)
