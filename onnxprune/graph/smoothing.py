"""Range moved from activations to weights: products read ``x / s``, and row i of their weights is multiplied by s[i].

The output stays what it was; what changes is how well uint8 and int8 represent both operands (Xiao et al., "SmoothQuant", arXiv
2211.10438). After a normalisation that nobody else reads, its own scale and bias take the division, which then costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxprune.errors import InputError
from onnxprune.graph.cutting import replace_constants
from onnxprune.graph.model import Model
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView, Node

_NORMS: Mapping[str, tuple[int, ...]] = {"LayerNormalization": (1, 2), "SimplifiedLayerNormalization": (1,), "RMSNormalization": (1,)}
"""Normalisation -> the inputs that scale and shift its result."""

_SUFFIX = ".smooth"


def smooth(model: Model, factors: Mapping[str, np.ndarray], products: Iterable[str]) -> Model:
    """Divide activations by factors, and multiply the weights of the products that read them.

    Args:
        factors: activation tensor -> s, positive, [n_in]. Tensors that none of the products reads are left alone.
        products: names of MatMul or Gemm nodes with constant weights; other readers of the tensor keep ``x``.

    Raises:
        InputError: a tensor is not in the graph, or its factors do not fit the weights.
    """
    view = GraphView(model)
    chosen = set(products)
    changes: dict[tuple[int, int], np.ndarray] = {}
    divided: dict[str, tuple[np.ndarray, list[Node]]] = {}
    for tensor, given in factors.items():
        if tensor not in view.producer and tensor not in view.graph_inputs:
            raise InputError(f"smoothing factors are given for tensor {tensor!r}, which is not in the graph; they belong to another model")
        readers = [node for node, slot in view.consumers.get(tensor, ()) if slot == 0 and node.name in chosen]
        if not readers:
            continue
        factor = _checked(tensor, given)
        for node in readers:
            changes[node.index, 1] = _scaled_weight(view, node, factor)
        folded = _folded_norm(view, tensor, readers, factor)
        if folded:
            changes |= folded
        else:
            divided[tensor] = factor, readers
    if not changes:
        return model
    model = replace_constants(model, changes, _SUFFIX)
    return _divide(model, divided) if divided else model


def _checked(tensor: str, given: np.ndarray) -> np.ndarray:
    factor = np.asarray(given, np.float64)
    with np.errstate(all="ignore"):
        fits = np.isfinite(factor.astype(np.float32)) & np.isfinite((1 / factor).astype(np.float32)) & (factor > 0)
    if factor.ndim != 1 or not fits.all():
        raise InputError(f"the smoothing factors of tensor {tensor!r} are not a list of positive numbers within float32")
    return factor


def _scaled_weight(view: GraphView, node: Node, factor: np.ndarray) -> np.ndarray:
    weight = view.value(node.inputs[1])
    if weight is None or weight.ndim != 2:
        raise InputError(f"{node} has no constant weight matrix and cannot be smoothed; leave it out of the products")
    rows = weight.shape[1 if node.attrs.get("transB", 0) else 0]
    if len(factor) != rows:
        raise InputError(f"{len(factor)} smoothing factors for {node}, whose weights have {rows} input rows; give one per row")
    scaled = weight * (factor if node.attrs.get("transB", 0) else factor[:, None])
    return np.asarray(scaled, weight.dtype)


def _folded_norm(view: GraphView, tensor: str, readers: list[Node], factor: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Scale and bias of the normalisation that makes ``tensor``, divided; empty if it is none, or somebody else reads its result."""
    norm = view.producer.get(tensor)
    if norm is None or not _scaling_slots(view, norm) or norm.outputs[0] != tensor or tensor in view.graph_outputs:
        return {}
    smoothed = {node.index for node in readers}
    if any(node.index not in smoothed or slot != 0 for node, slot in view.consumers[tensor]):
        return {}
    changes = {}
    for slot in _scaling_slots(view, norm):
        name = norm.inputs[slot] if slot < len(norm.inputs) else ""
        if not name:
            continue
        value = view.value(name)
        if value is None or value.shape != factor.shape:
            return {}
        changes[norm.index, slot] = np.asarray(value / factor, value.dtype)
    return changes


def _scaling_slots(view: GraphView, norm: Node) -> tuple[int, ...]:
    """The inputs that scale and shift the result of a normalisation, or of the multiplication that one written in parts ends with."""
    if norm.domain:
        return ()
    if norm.op == "Mul":
        return tuple(slot for slot in (0, 1) if view.is_constant(norm.inputs[slot]))[:1]
    return _NORMS.get(norm.op, ())


def _divide(model: Model, divided: Mapping[str, tuple[np.ndarray, list[Node]]]) -> Model:
    """A multiplication by 1/s in front of the readers."""
    surgeon = Surgeon(model)
    for tensor, (factor, readers) in divided.items():
        smoothed = surgeon.variable(tensor, np.float32)
        inverse = surgeon.constant((1 / factor).astype(np.float32), tensor)
        surgeon.add("Mul", [surgeon.tensors[tensor], inverse], smoothed, tensor)
        for node in readers:
            surgeon.nodes[node.index].inputs[0] = smoothed
    return surgeon.close()
