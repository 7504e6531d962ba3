"""A float32 graph in half precision, written by onnxruntime's converter around what must not be rounded.

The converter changes types and places casts. It never sees large weights: they stand in its graph as inputs, and are rounded one by one
here. It is told which nodes stay in float32. Squares under a root, as in a spelled-out normalisation, leave the range of float16 where a
state passes 256; and the angle of a rotary position is a product with the position itself, of which float16 is exact up to 2048 only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.errors import InputError
from onnxprune.graph.initializers import placeholder
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, Node, captured
from onnxprune.runtime.session import open_session, require_onnxruntime

LARGEST = np.finfo(np.float16).max
SMALLEST = np.finfo(np.float16).smallest_subnormal

_UNDER_ROOT = frozenset({"ReduceMean", "ReduceSum", "Add", "Mul", "Div", "Max", "Clip", "Identity", "Cast"})
"""What may stand between a square and its root."""

_OVER_ROOT = frozenset({"Reciprocal", "Div", "Mul", "Add", "Max", "Clip", "Expand", "Identity", "Cast"})
"""What may stand between a root and the activation that it divides."""


def to_float16(model: Model) -> tuple[Model, int]:
    """The model computing in float16, with the float32 inputs and outputs it has.

    Weights beyond the range of float16 are clipped to it, those that would vanish become its smallest number, infinities stay.

    Returns:
        the converted model, and how many of its nodes compute in float16; the model itself if none does.

    Raises:
        InputError: the graph is not valid ONNX or has weights in half precision already, or the converter cannot process it.
        RuntimeUnavailable: onnxruntime is not installed.
    """
    require_onnxruntime()
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    if any(tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) and tensor.dims for tensor in model.proto.graph.initializer):
        raise InputError("the model has half-precision weights already; convert the float32 model")
    named = _named(model)
    view = GraphView(named)
    kept = _kept(view, frozenset(DEFAULT_OP_BLOCK_LIST))
    floats = _float_tensors(view, kept)
    rounded = [node for node in view.nodes if node.index not in kept and floats.intersection(node.inputs + node.outputs)]
    if not rounded:
        return model, 0
    # A weight that only nodes in float32 read stays in float32.
    read = {name for node in view.nodes if node.index not in kept for name in (*node.inputs, *captured(node.proto))}
    halved = [name for name, array in named.weights.items() if array.dtype == np.float32 and name in read]
    hidden = _without_weights(view, kept, floats, halved)
    try:
        converted = convert_float_to_float16(
            hidden,
            keep_io_types=[*named.input_names, *named.output_names],
            disable_shape_infer=True,
            node_block_list=[view.nodes[index].name for index in sorted(kept)],
        )
    except Exception as error:  # the converter states its assumptions as assertions
        raise InputError(f"onnxruntime's float16 converter cannot process the graph: {error!r}") from error
    _restore(converted, named, halved)
    _sort(converted.graph)
    return named.with_proto(converted, {name: _half(named.weights[name]) for name in halved}), len(rounded)


def _named(model: Model) -> Model:
    """Every node with a unique name, as the converter is told by name what to leave alone."""
    proto = model.copy_proto()
    seen: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}#{index}"
        seen.add(node.name)
    return model.with_proto(proto)


def _kept(view: GraphView, refused: frozenset[str]) -> set[int]:
    """Indices of the nodes that stay in float32: operators without float16, normalisations, angles, and Constants only these read."""
    kept = {node.index for node in view.nodes if node.op in refused}
    for node in view.nodes:
        if node.op in ("Cos", "Sin") and not node.domain:
            kept |= {node.index} | _angle(view, node)
        elif _is_root(view, node):
            kept |= _under(view, node) | ({node.index} if _under(view, node) or node.op == "ReduceL2" else set())
            if node.index in kept:
                kept |= set(_over(view, node))
    for node in view.nodes:
        if node.op == "Constant" and all(reader.index in kept for reader, _ in view.consumers.get(node.outputs[0], ())):
            kept.add(node.index)
    return kept


def _angle(view: GraphView, node: Node) -> set[int]:
    """The nodes that compute the argument of a sine or cosine. Sizes are no part of it, and what is measured for them even less."""
    found: set[int] = set()
    pending = list(node.inputs)
    while pending:
        maker = view.producer.get(pending.pop())
        if maker is not None and maker.index not in found and maker.op not in ("Shape", "Size"):
            found.add(maker.index)
            pending.extend(name for name in maker.inputs if name)
    return found


def _scalar(view: GraphView, name: str) -> float | None:
    array = view.value(name)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _is_root(view: GraphView, node: Node) -> bool:
    if node.domain:
        return False
    return node.op in ("Sqrt", "ReduceL2") or (node.op == "Pow" and _scalar(view, node.inputs[1]) in (0.5, -0.5))


def _is_square(view: GraphView, node: Node) -> bool:
    if node.op == "Pow":
        return _scalar(view, node.inputs[1]) == 2
    return node.op == "ReduceSumSquare" or (node.op == "Mul" and node.inputs[0] == node.inputs[1])


def _under(view: GraphView, root: Node) -> set[int]:
    """The nodes from the square of an activation, and its centring, up to the root; none if there is no square."""
    found: set[int] = set()
    squared = False
    pending = [root.inputs[0]]
    while pending:
        node = view.producer.get(pending.pop())
        if node is None or node.domain or node.index in found:
            continue
        if _is_square(view, node):
            squared = True
            found |= {node.index} | _centring(view, node.inputs[0])
        elif node.op in _UNDER_ROOT:
            found.add(node.index)
            pending.extend(name for name in node.inputs if name)
    return found if squared else set()


def _centring(view: GraphView, name: str) -> set[int]:
    """The subtraction that makes a tensor, and the mean it subtracts: a sum over a row of float16 may not fit in float16."""
    difference = view.producer.get(name)
    if difference is None or difference.op != "Sub" or difference.domain:
        return set()
    mean = view.producer.get(difference.inputs[1])
    return {difference.index} | ({mean.index} if mean is not None and mean.op == "ReduceMean" else set())


def _over(view: GraphView, root: Node) -> Iterator[int]:
    """The nodes that lead from a root to the division of an activation by it, inclusive."""
    pending = [root.outputs[0]]
    while pending:
        name = pending.pop()
        for node, _ in view.consumers.get(name, ()):
            if node.domain or node.op not in _OVER_ROOT:
                continue
            yield node.index
            others = [other for other in node.inputs if other and other != name]
            if node.op == "Expand" or all(view.is_constant(other) for other in others):
                pending.extend(node.outputs)


def _float_tensors(view: GraphView, kept: set[int]) -> frozenset[str]:
    """Names of all float32 tensors, as far as inference knows; none that a node in ``kept`` touches is left out."""
    try:
        inferred = onnx.shape_inference.infer_shapes(view.model.proto)
    except Exception as error:
        raise InputError(f"the graph is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    touched = {name for index in kept for name in view.nodes[index].inputs + view.nodes[index].outputs if name}
    if unknown := sorted(name for name in touched if not types.get(name)):
        # Outputs of onnxruntime's own operators, which it alone knows.
        probe = view.model.copy_proto()
        declared = {value.name for value in probe.graph.output}
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown if name not in declared)
        session = open_session(probe, weights=view.model.weights, optimize=False)
        types |= {value.name: TensorProto.FLOAT for value in session.get_outputs() if value.type == "tensor(float)"}
    return frozenset(name for name, kind in types.items() if kind == TensorProto.FLOAT)


def _without_weights(view: GraphView, kept: set[int], floats: Iterable[str], halved: Iterable[str]) -> onnx.ModelProto:
    """The graph for the converter: weights it shall turn to float16 as inputs, and a type for every tensor it may cast."""
    model = view.model
    proto = model.copy_proto()
    graph = proto.graph
    inline = [tensor for tensor in graph.initializer if tensor.name not in model.weights]
    inputs = [value for value in graph.input if value.name not in model.initializer_names]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in halved]
    del graph.initializer[:], graph.input[:], graph.value_info[:]
    graph.initializer.extend(inline)
    graph.input.extend(inputs)
    # The converter would round what passes between two nodes in float32, unless it does not know its type.
    inner = {name for index in kept for name in view.nodes[index].outputs if _is_inner(view, kept, name)}
    made = set(view.producer) - inner - view.graph_outputs
    graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(made.intersection(floats)))
    return proto


def _is_inner(view: GraphView, kept: set[int], name: str) -> bool:
    """Whether only nodes in float32 read a tensor."""
    return name not in view.graph_outputs and all(reader.index in kept for reader, _ in view.consumers.get(name, ()))


def _restore(converted: onnx.ModelProto, model: Model, halved: Iterable[str]) -> None:
    """Put the initializers and input declarations of ``model`` back with their new types, and forget the types of tensors (in place)."""
    graph, new = converted.graph, set(halved)
    inline = {tensor.name: tensor for tensor in graph.initializer}
    initializers = []
    for original in model.proto.graph.initializer:
        tensor = TensorProto()
        tensor.CopyFrom(inline.get(original.name, original))
        if original.name in new:
            tensor.data_type = TensorProto.FLOAT16
            placeholder(tensor, model.weights[original.name].nbytes // 2)
        initializers.append(tensor)
    types = {tensor.name: tensor.data_type for tensor in initializers}
    inputs = []
    for declared in model.proto.graph.input:
        value = onnx.ValueInfoProto()
        value.CopyFrom(declared)
        if value.name in types:
            value.type.tensor_type.elem_type = types[value.name]
        inputs.append(value)
    del graph.initializer[:], graph.input[:], graph.value_info[:]
    graph.initializer.extend(initializers)
    graph.input.extend(inputs)


def _sort(graph: onnx.GraphProto) -> None:
    """Move the casts that the converter appended to where they are needed first; other nodes keep their order (in place)."""
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    order: dict[int, None] = {}

    def emit(index: int) -> None:
        node = graph.node[index]
        # Nodes of the original graph stand in order: what is missing is a cast, or the cast of a cast.
        for name in (*node.input, *sorted(captured(node))):
            if name in producer and producer[name] not in order:
                emit(producer[name])
        order[index] = None

    for index in range(len(graph.node)):
        if index not in order:
            emit(index)
    nodes = [onnx.NodeProto.FromString(graph.node[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(nodes)


def _half(array: np.ndarray) -> np.ndarray:
    """float16 of float32, finite where it was finite and not zero where it was not zero."""
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    beyond = np.isinf(half) & np.isfinite(array)
    half[beyond] = np.copysign(LARGEST, array[beyond])
    vanished = (half == 0) & (array != 0)
    half[vanished] = np.copysign(SMALLEST, array[vanished])
    return half
