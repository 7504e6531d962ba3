"""A read-only index of a graph: who makes a tensor, who reads it, which tensors are constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from onnxprune.graph.model import Model


@dataclass(frozen=True, eq=False)
class Node:
    """One node. Compared by identity: two nodes of the same text are two nodes."""

    index: int
    proto: onnx.NodeProto

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def op(self) -> str:
        return self.proto.op_type

    @property
    def domain(self) -> str:
        return "" if self.proto.domain == "ai.onnx" else self.proto.domain

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Input tensors by position; an omitted optional input is the empty string."""
        return tuple(self.proto.input)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.proto.output)

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in self.proto.attribute}

    def __str__(self) -> str:
        return f"{self.op}({self.name})"


class GraphView:
    """Index of the top-level graph of a :class:`Model`. Build it once; it does not follow later edits."""

    def __init__(self, model: Model) -> None:
        self.model = model
        graph = model.proto.graph
        self.nodes: tuple[Node, ...] = tuple(Node(index, proto) for index, proto in enumerate(graph.node))
        self.producer: dict[str, Node] = {name: node for node in self.nodes for name in node.outputs if name}
        self.consumers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for slot, name in enumerate(node.inputs):
                if name:
                    self.consumers.setdefault(name, []).append((node, slot))
            for name in sorted(captured(node.proto)):
                self.consumers.setdefault(name, []).append((node, -1))
        self.graph_inputs = frozenset(model.input_names)
        self.graph_outputs = frozenset(model.output_names)
        self._initializers = model.initializer_names

    @cached_property
    def constants(self) -> frozenset[str]:
        """Initializers and everything computed from them alone."""
        known = set(self._initializers)
        for node in self.nodes:
            if node.op.startswith("Random"):
                continue
            if all(name in known for name in node.inputs if name) and captured(node.proto) <= known:
                known.update(name for name in node.outputs if name)
        return frozenset(known)

    def is_constant(self, name: str) -> bool:
        return name in self.constants

    def value(self, name: str) -> np.ndarray | None:
        """Values of an initializer or of a Constant node; None for anything else."""
        array = self.model.initializer(name)
        if array is not None:
            return array
        node = self.producer.get(name)
        if node is not None and node.op == "Constant" and "value" in node.attrs:
            return onnx.numpy_helper.to_array(node.attrs["value"])
        return None

    def ancestors(self, names: Iterator[str] | list[str] | tuple[str, ...] | set[str] | frozenset[str]) -> set[int]:
        """Indices of the nodes that ``names`` depend on."""
        found: set[int] = set()
        pending = list(names)
        while pending:
            node = self.producer.get(pending.pop())
            if node is not None and node.index not in found:
                found.add(node.index)
                pending.extend(name for name in node.inputs if name)
                pending.extend(captured(node.proto))
        return found

    def descendants(self, names: Iterator[str] | list[str] | tuple[str, ...] | set[str] | frozenset[str]) -> set[int]:
        """Indices of the nodes that depend on any of ``names``."""
        found: set[int] = set()
        pending = list(names)
        while pending:
            for node, _ in self.consumers.get(pending.pop(), ()):
                if node.index not in found:
                    found.add(node.index)
                    pending.extend(node.outputs)
        return found


def inner_views(view: GraphView) -> Iterator[tuple[Node, GraphView]]:
    """(node, view of one of its bodies), at any depth. What is constant outside is an initializer without values inside."""
    for node in view.nodes:
        for body in bodies(node.proto):
            proto = onnx.ModelProto(opset_import=view.model.proto.opset_import, graph=body)
            proto.graph.initializer.extend(onnx.TensorProto(name=name) for name in sorted(captured(node.proto) & view.constants))
            inner = GraphView(Model(proto, {}))
            yield node, inner
            yield from inner_views(inner)


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Subgraphs of a node (If, Loop, Scan)."""
    graphs = [[attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs for attribute in node.attribute]
    return [graph for group in graphs for graph in group]


def captured(node: onnx.NodeProto) -> set[str]:
    """Outer tensors that the subgraphs of a node (If, Loop, Scan) read, at any depth."""
    names: set[str] = set()
    for graph in bodies(node):
        inner = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
        inner.update(name for child in graph.node for name in child.output)
        for child in graph.node:
            names.update(name for name in child.input if name and name not in inner)
            names.update(captured(child) - inner)
        names.update(value.name for value in graph.output if value.name not in inner)
    return names
