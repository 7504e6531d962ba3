"""Pieces of a graph: the part between what is known already and what is wanted next, as a model of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from onnxprune.graph.initializers import placeholder
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, captured


@dataclass(frozen=True)
class Piece:
    """``model`` computes ``outputs`` from ``inputs``; None for the model if everything wanted is known already."""

    model: Model | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Frontier:
    """Walks a graph from its inputs to its outputs in pieces; tracks which nodes are done and which tensors later pieces still need."""

    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.done: set[int] = set()

    def advance(self, wanted: Iterable[str], passed: Iterable[str]) -> tuple[list[int], tuple[str, ...]]:
        """Plan one piece.

        Args:
            wanted: tensors this piece must deliver.
            passed: tensors whose ancestors count as done afterwards (a subset of what is computed).

        Returns:
            Indices of the nodes to run, and the tensors that nodes still to come will read.
        """
        wanted, passed = list(wanted), list(passed)
        todo = sorted((self.view.ancestors(wanted) | self.view.ancestors(passed)) - self.done)
        self.done |= self.view.ancestors(passed)
        live = {name for index in self.done for name in self.view.nodes[index].outputs if name and self._needed(name)}
        return todo, tuple(sorted(live))

    def _needed(self, name: str) -> bool:
        return name in self.view.graph_outputs or any(node.index not in self.done for node, _ in self.view.consumers.get(name, ()))


def cut_piece(
    view: GraphView, nodes: list[int], outputs: Iterable[str], known: Mapping[str, np.ndarray], fixed: Collection[str] = ()
) -> Piece:
    """A model of some nodes of a graph; ``known`` gives an example of every tensor that may be fed, ``fixed`` those always of its shape."""
    model = view.model
    chosen = [view.nodes[index] for index in nodes]
    made = {name for node in chosen for name in node.outputs if name}
    delivered = tuple(name for name in dict.fromkeys(outputs) if name in made)
    if not delivered:
        return Piece(None, (), ())
    needed = (name for node in chosen for name in (*node.inputs, *sorted(captured(node.proto))))
    read = dict.fromkeys(name for name in needed if name and name not in made)
    fed = [name for name in read if name in known]
    proto = onnx.ModelProto(ir_version=model.proto.ir_version, opset_import=model.proto.opset_import)
    proto.functions.extend(model.proto.functions)
    proto.graph.name = "piece"
    proto.graph.node.extend(node.proto for node in chosen)
    proto.graph.initializer.extend(tensor for tensor in model.proto.graph.initializer if tensor.name in read)
    for name in fed:
        example = known[name]
        dims = list(example.shape) if name in fixed else [f"{name}.{axis}" for axis in range(example.ndim)]
        proto.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(example.dtype), dims))
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in delivered)
    weights = {name: model.weights[name] for name in read if name in model.weights}
    return Piece(Model(proto, weights), tuple(fed), delivered)


def sizes_among(known: Sequence[Mapping[str, np.ndarray]]) -> set[str]:
    """Lists of whole numbers that are equally long in every batch: sizes of images among them.

    A piece that reads them must know their number: of unknown number, shape inference takes them for none and refuses a Resize.
    """
    lists = {name: value.shape for name, value in known[0].items() if value.ndim == 1 and value.dtype == np.int64} if known else {}
    return {name for name, shape in lists.items() if all(other[name].shape == shape for other in known)}


def replace_constants(model: Model, changes: Mapping[tuple[int, int], np.ndarray], suffix: str) -> Model:
    """New values for the constants that node ``index`` reads at ``slot``; other readers of the same initializer keep the old ones.

    Readers of one initializer that are given equal values share one again.
    """
    proto = model.copy_proto()
    made: dict[str, list[tuple[str, np.ndarray]]] = {}
    taken = {tensor.name for tensor in proto.graph.initializer}
    weights: dict[str, np.ndarray] = {}
    for (index, slot), array in sorted(changes.items()):
        node = proto.graph.node[index]
        twins = made.setdefault(node.input[slot], [])
        if twin := next((name for name, values in twins if values is array or np.array_equal(values, array)), None):
            node.input[slot] = twin
            continue
        name = f"{node.input[slot]}{suffix}"
        while name in taken:
            name += "'"
        taken.add(name)
        twins.append((name, array))
        node.input[slot] = name
        tensor = onnx.TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        placeholder(tensor, array.nbytes)
        proto.graph.initializer.append(tensor)
        weights[name] = np.ascontiguousarray(array)
    read = {name for node in proto.graph.node for name in (*node.input, *captured(node))} | {value.name for value in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return model.with_proto(proto, weights)
