"""The int8 form of a float32 graph, written by onnxruntime's own quantizers.

A quantizer never sees the graph. Products that read the same activation are handed to it as a small graph of their own, and what comes back
takes their place: nothing else can be quantised by accident, operators it does not know do not stop it, and no more float weights are
copied at a time than such a group holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper, version_converter

from onnxprune.errors import InputError
from onnxprune.graph.canonical import check_float, with_fresh_shapes
from onnxprune.graph.model import Model
from onnxprune.graph.smoothing import smooth
from onnxprune.graph.tables import check_tables, tables_to_int8
from onnxprune.graph.view import GraphView, Node, captured
from onnxprune.quantize.form import Int8Form
from onnxprune.quantize.ranges import uint8_parameters
from onnxprune.runtime.session import require_onnxruntime

_DYNAMIC_OPSET = 11
_STATIC_OPSET = 10
_STATIC_PER_CHANNEL_OPSET = 13


def int8_products(view: GraphView) -> tuple[Node, ...]:
    """The nodes that can compute in integers: products of an activation with a float32 matrix, in order of the graph.

    A Gemm counts if it is plain (alpha and beta 1, first operand not transposed). A Conv does not: without a quantised output onnxruntime
    computes it in float all the same.
    """
    return tuple(node for node in view.nodes if _obstacle(view, node) is None)


def _obstacle(view: GraphView, node: Node) -> str | None:
    """Why a node cannot compute in integers."""
    if node.domain or node.op not in ("MatMul", "Gemm"):
        return "it is neither MatMul nor Gemm"
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0), node.attrs.get("transA", 0)) != (1.0, 1.0, 0):
        return "its alpha, beta or transA is set, which the quantizer does not support"
    if view.is_constant(node.inputs[0]):
        return "its first operand is constant"
    weight = view.value(node.inputs[1])
    if weight is None or weight.ndim != 2 or not weight.size:
        return "its second operand is no constant matrix"
    if weight.dtype != np.float32:
        return f"its weights are {weight.dtype}, not float32"
    return None


def to_int8(model: Model, form: Int8Form) -> Model:
    """The graph with the products of ``form`` in integers, smoothed first where it says so, and its embedding tables in int8.

    Dynamic products become DynamicQuantizeLinear, MatMulInteger (which keeps the name of the node) and the scaling around it; static ones
    stay MatMul between QuantizeLinear and DequantizeLinear. Biases are added in float. Weights that lie on the int8 grid already, with
    a largest magnitude of 127, become exactly those integers. Tables: see :func:`~onnxprune.graph.tables.tables_to_int8`.

    Raises:
        InputError: the model is not float32 throughout, its opset is too old and cannot be raised, a product or lookup is not in the graph
            or cannot be in integers, or a static form has no finite range for a tensor.
    """
    check_float(model)
    model = _raised(model, form)
    ranges = _checked(GraphView(model), form)
    check_tables(GraphView(model), form.tables)
    model = smooth(model, form.factors, form.products)
    view = GraphView(model)
    groups: dict[str, list[Node]] = {}
    for node in view.nodes:
        if node.name in ranges:
            groups.setdefault(node.inputs[0], []).append(node)
    # onnxruntime would make a float Gemm of a product and the Add behind it, and then not see that its operands are integers.
    splice = _Splice(view, bias_op="Add" if form.scheme == "dynamic" else "Sum")
    for activation, products in groups.items():
        splice.replace(products, _quantised(view, activation, products, form, ranges[products[0].name]))
    return with_fresh_shapes(tables_to_int8(splice.close(), form.tables))


def _checked(view: GraphView, form: Int8Form) -> dict[str, tuple[np.float32, np.uint8] | None]:
    """Product -> scale and zero point of its input; None in a dynamic form."""
    nodes = {node.name: node for node in view.nodes}
    parameters: dict[str, tuple[np.float32, np.uint8] | None] = {}
    for name in form.products:
        node = nodes.get(name)
        if node is None:
            raise InputError(f"node {name!r} of the int8 form is not in the graph: it was pruned, or the form belongs to another model")
        obstacle = _obstacle(view, node)
        if obstacle:
            raise InputError(f"{node} cannot compute in integers: {obstacle}; leave it out of the products")
        parameters[name] = None
        if form.scheme == "static":
            activation = node.inputs[0]
            if activation not in form.ranges:
                raise InputError(f"the static int8 form has no range for tensor {activation!r}, which {node} reads; calibrate it")
            try:
                parameters[name] = uint8_parameters(*form.ranges[activation])
            except InputError as error:
                raise InputError(f"tensor {activation!r}, which {node} reads: {error}") from error
    return parameters


def _raised(model: Model, form: Int8Form) -> Model:
    """The model at an opset that has the operators of the form; as it is, if it has them already."""
    static = _STATIC_PER_CHANNEL_OPSET if form.per_channel else _STATIC_OPSET
    needed = _DYNAMIC_OPSET if form.scheme == "dynamic" else static
    if model.opset() >= needed:
        return model
    proto = model.copy_proto()
    large = [tensor for tensor in proto.graph.initializer if tensor.name in model.weights]
    small = [tensor for tensor in proto.graph.initializer if tensor.name not in model.weights]
    declared = {value.name for value in proto.graph.input}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    # The converter drops placeholders, so that large weights pass as inputs.
    hidden = {tensor.name for tensor in large} - declared
    proto.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in large if t.name in hidden)
    try:
        converted = version_converter.convert_version(proto, needed)
    except Exception as error:  # the converter raises bare RuntimeErrors, which begin with a place in its source
        reason = str(error).split("failed: ")[-1].strip()
        raise InputError(
            f"the model is of opset {model.opset()}, this int8 form needs {needed}, and conversion failed ({reason}); "
            f"export the model again at opset {needed} or later"
        ) from error
    inputs = [value for value in converted.graph.input if value.name not in hidden]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    converted.graph.initializer.extend(large)
    return model.with_proto(converted)


def _quantised(
    view: GraphView, activation: str, products: list[Node], form: Int8Form, parameters: tuple[np.float32, np.uint8] | None
) -> onnx.ModelProto:
    """What the quantizer makes of the products that read one activation, without their biases."""
    group = _group(view, activation, products)
    with _quiet():
        quantizer = _dynamic(group, form) if parameters is None else _static(group, form, activation, *parameters)
        quantizer.quantize_model()
    proto: onnx.ModelProto = quantizer.model.model
    _install_integers(proto, products, form)
    return proto


def _install_integers(proto: onnx.ModelProto, products: list[Node], form: Int8Form) -> None:
    """Weights that were rounded with care in the place of those that the quantizer rounded to nearest."""
    made = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in products:
        rounded = form.integers.get(node.name)
        if rounded is None:
            continue
        tensor = made[_operand(node) + "_quantized"]
        if rounded.dtype != np.int8 or rounded.shape != tuple(tensor.dims):
            raise InputError(
                f"the integers for {node} are {rounded.dtype}{list(rounded.shape)}, its weights need int8{list(tensor.dims)}; "
                "they belong to another model"
            )
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rounded), tensor.name))


def _dynamic(group: onnx.ModelProto, form: Int8Form) -> Any:
    require_onnxruntime()
    from onnxruntime.quantization import QuantizationMode, QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer

    mode, names = QuantizationMode.IntegerOps, [node.name for node in group.graph.node]
    # Told at once that it is dynamic, the quantizer would write the model to a file to infer shapes; all it needs to know is declared.
    quantizer = ONNXQuantizer(group, form.per_channel, False, mode, True, QuantType.QInt8, QuantType.QUInt8, None, names, [], ["MatMul"])
    quantizer.static = False
    return quantizer


def _static(group: onnx.ModelProto, form: Int8Form, activation: str, scale: np.float32, zero_point: np.uint8) -> Any:
    require_onnxruntime()
    from onnxruntime.quantization import QDQQuantizer, QuantType, TensorData

    below = float(zero_point)
    ranges = {activation: TensorData(lowest=np.float32(-below * scale), highest=np.float32((255 - below) * scale))}
    # Scale and zero point besides, as the quantizer's own arithmetic may differ from ours in the last bit.
    exact = {"scale": np.array(scale), "zero_point": np.array(zero_point)}
    options = {"OpTypesToExcludeOutputQuantization": ["MatMul"], "TensorQuantOverrides": {activation: [exact]}}
    names = [node.name for node in group.graph.node]
    return QDQQuantizer(group, form.per_channel, False, QuantType.QInt8, QuantType.QUInt8, ranges, names, [], ["MatMul"], options)


def _group(view: GraphView, activation: str, products: list[Node]) -> onnx.ModelProto:
    """A graph of nothing but these products, as MatMul, with their weights inside."""
    nodes, outputs, weights = [], [], {}
    for node in products:
        operand, output = _operand(node), _product(node)
        weight = view.value(node.inputs[1])
        assert weight is not None
        if not np.isfinite(weight).all():
            raise InputError(f"the weights of {node} hold an infinite or NaN value, for which there is no int8; mend the model")
        weights[operand] = numpy_helper.from_array(np.ascontiguousarray(weight.T if operand != node.inputs[1] else weight), operand)
        nodes.append(helper.make_node("MatMul", [activation, operand], [output], node.name))
        outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    given = helper.make_tensor_value_info(activation, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "products", [given], outputs, list(weights.values()))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", view.model.opset())])
    # Tells the quantizers that there is nothing to infer; they would write the model to a file for it.
    proto.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    return proto


def _operand(node: Node) -> str:
    return node.inputs[1] + ".transposed" if node.attrs.get("transB", 0) else node.inputs[1]


def _has_bias(node: Node) -> bool:
    return node.op == "Gemm" and len(node.inputs) > 2 and bool(node.inputs[2])


def _product(node: Node) -> str:
    return node.outputs[0] + ".product" if _has_bias(node) else node.outputs[0]


class _Splice:
    """Puts quantised products in the place of float ones."""

    def __init__(self, view: GraphView, bias_op: str) -> None:
        self.view = view
        self.bias_op = bias_op
        self.model = view.model
        self.nodes: dict[int, list[NodeProto]] = {node.index: [node.proto] for node in view.nodes}
        self.initializers: dict[str, TensorProto] = {}
        self.weights: dict[str, np.ndarray] = {}
        tensors = {name for node in view.nodes for name in (*node.inputs, *node.outputs)}
        self.taken = tensors | self.model.initializer_names | view.graph_inputs
        self.node_names = {node.name for node in view.nodes}
        self.renamed: dict[str, str] = {}

    def replace(self, products: list[Node], result: onnx.ModelProto) -> None:
        """All of a group stands where its first product stood, as what it reads is known there."""
        part = Model.from_proto(result)
        # protobuf frees a message as a whole, so that a node taken from this one would keep its weights in memory.
        skeleton = part.copy_proto().graph
        kept = {products[0].inputs[0], *(node.outputs[0] for node in products), ""}
        weights = {tensor.name: self._shared(tensor.name) for tensor in skeleton.initializer}
        # What is computed is computed in every group, also from a weight that another group reads too.
        computed = {name for made in skeleton.node for name in made.output} | {_product(node) for node in products}
        names = {name: name for name in kept} | weights | {name: _free(name, self.taken) for name in sorted(computed - kept)}
        for tensor in skeleton.initializer:
            name = names[tensor.name]
            if name not in self.initializers:
                if tensor.name in part.weights:
                    self.weights[name] = part.weights[tensor.name]
                tensor.name = name
                self.initializers[name] = tensor
        by_name = {node.name: node for node in products}
        for node in products:
            self.nodes[node.index] = []
            self.node_names.discard(node.name)
        placed = self.nodes[products[0].index]
        for made in skeleton.node:
            made.input[:] = [names[name] for name in made.input]
            made.output[:] = [names[name] for name in made.output]
            if made.op_type == "MatMulInteger":
                made.name = made.name.removesuffix("_quant")
            if made.op_type in ("MatMul", "MatMulInteger"):
                made.metadata_props.extend(by_name[made.name].proto.metadata_props)
                made.doc_string = by_name[made.name].proto.doc_string
            made.name = self._node_name(made.name)
            placed.append(made)
        for node in products:
            if _has_bias(node):
                name = self._node_name(node.name + "_bias")
                operands = [names[_product(node)], node.inputs[2]]
                self.nodes[node.index].append(helper.make_node(self.bias_op, operands, [node.outputs[0]], name))

    def _shared(self, name: str) -> str:
        """A name for a new initializer that nobody has; the same for the same weight in every group."""
        if name not in self.renamed:
            self.renamed[name] = _free(name, self.taken)
        return self.renamed[name]

    def _node_name(self, name: str) -> str:
        return _free(name, self.node_names)

    def close(self) -> Model:
        """The edited model, without the float weights that nobody reads any more."""
        proto = self.model.copy_proto()
        del proto.graph.node[:]
        proto.graph.node.extend(made for node in self.view.nodes for made in _sorted(self.nodes[node.index]))
        read = {name for node in proto.graph.node for name in (*node.input, *captured(node))} | set(self.model.output_names)
        before = list(proto.graph.initializer)
        gone = {tensor.name for tensor in before} - read
        _refill(proto.graph.initializer, (tensor for tensor in [*before, *self.initializers.values()] if tensor.name in read))
        _refill(proto.graph.input, (value for value in list(proto.graph.input) if value.name not in gone))
        return self.model.with_proto(proto, self.weights)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "'"
    taken.add(name)
    return name


def _refill(field, entries: Iterable[object]) -> None:  # type: ignore[no-untyped-def]
    kept = list(entries)
    del field[:]
    field.extend(kept)


def _sorted(nodes: list[NodeProto]) -> Iterator[NodeProto]:
    """Few nodes in an order in which each finds its inputs made; the quantizer for ranges appends its own at the end."""
    made = {name for node in nodes for name in node.output if name}
    left = list(nodes)
    while left:
        ready = next(node for node in left if not made.intersection(node.input))
        made.difference_update(ready.output)
        left.remove(ready)
        yield ready


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizers speak through the root logger, and set it up when nobody has."""
    root = logging.getLogger()
    silent = logging.NullHandler()

    def foreign(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root.addHandler(silent)
    root.addFilter(foreign)
    try:
        yield
    finally:
        root.removeFilter(foreign)
        root.removeHandler(silent)
