"""Caches of a decoder: keys and values of earlier tokens come in, those of all tokens go out, and both shrink with the heads.

A pruned model says in its metadata, under :data:`CACHES`, which heads of every cache it kept; inputs made for the unpruned model are cut by
it, and whoever serves the model reads off it, or off the declared shapes, what to allocate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, Node

CACHES = "onnxprune.caches"
"""Key of the metadata: a JSON object of input name -> fields of :class:`CacheCut`."""

_FUSED: Mapping[tuple[str, str], Mapping[int, int]] = {
    ("", "Attention"): {4: 1, 5: 2},
    ("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2},
    ("com.microsoft", "MultiHeadAttention"): {6: 1, 7: 2},
}
"""Slots of past keys and values -> positions of the outputs that hold them with the new ones."""


@dataclass(frozen=True)
class CacheCut:
    """What became of one cache: of ``of`` positions along ``axis`` the model keeps ``kept``, in its input and in ``output``."""

    output: str
    axis: int
    of: int
    kept: tuple[int, ...]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CacheCut:
        """Of the form of :func:`dataclasses.asdict`."""
        return cls(fields["output"], fields["axis"], fields["of"], tuple(fields["kept"]))

    def take(self, array: np.ndarray) -> np.ndarray:
        """``array`` cut to what the model keeps, if it has the size of the unpruned one."""
        return np.take(array, self.kept, self.axis) if array.ndim > self.axis and array.shape[self.axis] == self.of else array


def cache_pairs(view: GraphView) -> dict[str, str]:
    """Graph inputs that come out again with something appended (Concat), written into (scatters) or grown by a fused attention.

    Returns:
        name of the input -> name of the graph output that continues it.
    """
    pairs: dict[str, str] = {}
    for output in view.model.output_names:
        node = _origin(view, output)
        if node is None:
            continue
        for source in _grown_from(view, node, output):
            if source in view.graph_inputs and source not in pairs:
                pairs[source] = output
                break
    return pairs


def _origin(view: GraphView, tensor: str) -> Node | None:
    node = view.producer.get(tensor)
    while node is not None and _passes(node):
        node = view.producer.get(node.inputs[0])
    return node


def _grown_from(view: GraphView, node: Node, output: str) -> list[str]:
    """Tensors, followed back through casts, of which the output of ``node`` is a longer or newer version."""
    if node.op == "Concat":
        sources = list(node.inputs)
    elif node.op in ("ScatterElements", "ScatterND", "TensorScatter"):
        sources = [node.inputs[0]]
    else:
        slots = _FUSED.get((node.domain, node.op), {})
        made = [position for position, name in enumerate(node.outputs) if name and _continues(view, name, output)]
        sources = [node.inputs[slot] for slot, position in slots.items() if position in made and slot < len(node.inputs)]
    return [_behind(view, name) for name in sources]


def _continues(view: GraphView, tensor: str, output: str) -> bool:
    return _behind(view, output, stop=tensor) == tensor


def _behind(view: GraphView, tensor: str, stop: str = "") -> str:
    while tensor != stop and (node := view.producer.get(tensor)) is not None and _passes(node):
        tensor = node.inputs[0]
    return tensor


def _passes(node: Node) -> bool:
    return node.op in ("Identity", "Cast") or (node.op == "Concat" and len(node.inputs) == 1)


def fills_a_cache(view: GraphView, caches: Mapping[str, str], nodes: Iterable[Node], tensors: Iterable[str]) -> bool:
    """Whether a cache lives on what these nodes compute: it is one of the tensors, or made by a fused attention among the nodes."""
    made = {name for node in nodes if (node.domain, node.op) in _FUSED for name in node.outputs[1:] if name}
    return not set(caches).isdisjoint(tensors) or any(_behind(view, output) in made for output in caches.values())


def record_cuts(model: Model, cuts: Mapping[str, CacheCut]) -> Model:
    """Declare the smaller caches of a sliced graph, as inputs, as outputs and in the metadata."""
    if not cuts:
        return model
    proto = model.copy_proto()
    sizes = {name: (cut.axis, len(cut.kept)) for source, cut in cuts.items() for name in (source, cut.output)}
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in sizes:
            axis, size = sizes[value.name]
            dims = value.type.tensor_type.shape.dim
            if axis < len(dims):
                dims[axis].dim_value = size
    kept = [entry for entry in proto.metadata_props if entry.key != CACHES]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key=CACHES, value=json.dumps({name: asdict(cut) for name, cut in cuts.items()}))
    return model.with_proto(proto)


def cache_cuts(model: Model) -> dict[str, CacheCut]:
    """Caches that pruning made smaller, by input name; empty for a model that has none, or whose heads are all there."""
    text = next((entry.value for entry in model.proto.metadata_props if entry.key == CACHES), None)
    if text is None:
        return {}
    found: dict[str, dict[str, Any]] = json.loads(text)
    return {name: CacheCut.from_dict(cut) for name, cut in found.items()}


def cut_feeds(model: Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs made for the unpruned model as ``model`` takes them: caches without the heads it lost. Other inputs pass as they are."""
    cuts = cache_cuts(model)
    return {name: cuts[name].take(array) if name in cuts else array for name, array in feeds.items()}
