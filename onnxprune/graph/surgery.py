"""Editing a graph with onnx-graphsurgeon, without its two losses: metadata is carried over, and weights are never copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxprune.errors import OnnxPruneError
from onnxprune.graph.initializers import INLINE_BYTES, is_placeholder, placeholder
from onnxprune.graph.model import Model
from onnxprune.graph.storage import Scratch, release
from onnxprune.graph.view import bodies


class SlicingError(OnnxPruneError):
    """A node along a pruned axis cannot be resized; the graph is left as it was."""


class Surgeon:
    """One operation on a copy of a model's graph.

    ``nodes[i]`` is the i-th node of the original graph, so indices of a :class:`GraphView` of the same model stay valid. Call :meth:`close`
    for the edited model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph = gs.import_onnx(model.copy_proto())
        self.nodes: list[gs.Node] = list(self.graph.nodes)
        self.tensors: dict[str, gs.Tensor] = self.graph.tensors()
        self.weights: dict[str, np.ndarray] = {}
        self._scratch = Scratch() if model.paged else None
        self._fresh = 0
        self._node_names = {node.name for node in self.nodes}

    def constant(self, array: np.ndarray, like: str) -> gs.Constant:
        """A new initializer named after ``like``. Large arrays stay outside the graph."""
        name = self.name(like)
        array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
        if array.nbytes <= INLINE_BYTES:
            tensor = gs.Constant(name, array)
        else:
            proto = TensorProto(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
            placeholder(proto, array.nbytes)
            if self._scratch is None:
                self.weights[name] = array
            else:
                self._scratch.add(name, array)
                release([array, *([self.model.weights[like]] if like in self.model.weights else [])])
            tensor = gs.Constant(name, LazyValues(proto), data_location=TensorProto.EXTERNAL)
        self.tensors[name] = tensor
        return tensor

    def variable(self, like: str, dtype: Any = None, shape: Any = None) -> gs.Variable:
        """A new activation tensor named after ``like``."""
        tensor = gs.Variable(self.name(like), dtype=dtype, shape=shape)
        self.tensors[tensor.name] = tensor
        return tensor

    def name(self, like: str) -> str:
        """A name nobody uses yet. Deterministic: the same operation gives the same names."""
        base = like.split("~")[0]
        while True:
            candidate = f"{base}~{self._fresh}"
            self._fresh += 1
            if candidate not in self.tensors and candidate not in self._node_names:
                return candidate

    def add(self, op: str, inputs: list[gs.Tensor], output: gs.Tensor, like: str, domain: str | None = None, **attrs: Any) -> gs.Node:
        """Append a node; :meth:`close` sorts."""
        node = gs.Node(op, name=self.name(like), inputs=inputs, outputs=[output], attrs=attrs, domain=domain)
        self.graph.nodes.append(node)
        return node

    def close(self) -> Model:
        """The edited model: dead nodes removed, nodes in topological order, stale shapes dropped, metadata kept."""
        self.graph.cleanup(remove_unused_graph_inputs=False).toposort()
        before = self.model.proto
        proto = gs.export_onnx(self.graph, do_type_check=False)
        proto.ir_version = before.ir_version
        for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
            setattr(proto, field, getattr(before, field))
        del proto.metadata_props[:]
        proto.metadata_props.extend(before.metadata_props)
        _carry_graph(before.graph, proto.graph)
        _lift_weights(proto.graph)
        if self._scratch is not None:
            self.weights.update(self._scratch.close())
        return self.model.with_proto(proto, self.weights)


def _lift_weights(graph: onnx.GraphProto) -> None:
    """Weights that bodies of If, Loop and Scan read from outside, back to the outside: graphsurgeon copies them into every body."""
    present = {tensor.name for tensor in graph.initializer}
    pending = [body for node in graph.node for body in bodies(node)]
    while pending:
        body = pending.pop()
        inner = [tensor for tensor in body.initializer if not is_placeholder(tensor)]
        for tensor in body.initializer:
            if is_placeholder(tensor) and tensor.name not in present:
                graph.initializer.append(tensor)
                present.add(tensor.name)
        del body.initializer[:]
        body.initializer.extend(inner)
        pending += [below for node in body.node for below in bodies(node)]


def _carry_graph(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Copy what graphsurgeon drops: documentation, metadata, exact input and output declarations. Intermediate shapes are forgotten."""
    after.name = before.name
    after.doc_string = before.doc_string
    after.metadata_props.extend(before.metadata_props)
    del after.value_info[:]
    for kept, declared in ((after.input, before.input), (after.output, before.output)):
        originals = {value.name: value for value in declared}
        for value in kept:
            if value.name in originals:
                value.CopyFrom(originals[value.name])
    nodes = {node.name: node for node in before.node}
    for node in after.node:
        original = nodes.get(node.name)
        if original is not None:
            node.metadata_props.extend(original.metadata_props)
            node.doc_string = original.doc_string
