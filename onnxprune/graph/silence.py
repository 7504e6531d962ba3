"""Sites that keep nothing: each product over an empty axis is replaced by the constant it computes, where its branch joins the residual."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.graph.axis_links import Shapes, Tie
from onnxprune.graph.axis_rules import links
from onnxprune.graph.axis_state import Leaf
from onnxprune.graph.cutting import cut_piece
from onnxprune.graph.profile import Profile
from onnxprune.graph.surgery import SlicingError, Surgeon
from onnxprune.graph.tail import FUSED_RESIDUAL, MEASURES, MOVING, follow_tail, is_norm
from onnxprune.graph.view import GraphView, Node
from onnxprune.runtime.session import open_session, run


def silence(view: GraphView, profile: Profile, leaf: Leaf, surgeon: Surgeon) -> None:
    """Replace the product of ``leaf``, over an axis of which nothing is left, by the constant it computes, where its branch ends.

    Raises:
        SlicingError: what stands between is not understood; :func:`can_be_silent` tells beforehand.
    """
    rest = _resting_place(view, profile, leaf)
    name = rest.node.inputs[rest.slot]
    full = surgeon.constant(rest.array, name)
    if rest.node.op in FUSED_RESIDUAL:
        shape, expanded = surgeon.variable(name, np.int64), surgeon.variable(name, rest.array.dtype)
        surgeon.add("Shape", [surgeon.nodes[rest.node.index].inputs[1 - rest.slot]], shape, name)
        surgeon.add("Expand", [full, shape], expanded, name)
        full = expanded
    surgeon.nodes[rest.node.index].inputs[rest.slot] = full


def can_be_silent(view: GraphView, profile: Profile, leaves: Iterable[Leaf]) -> bool:
    """Whether the branches that begin with the products of ``leaves`` may keep nothing."""
    try:
        for leaf in leaves:
            _resting_place(view, profile, leaf)
    except SlicingError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class _Rest:
    """``array``, which broadcasts to operand ``slot`` of ``node``, the addition that joins the residual stream."""

    node: Node
    slot: int
    array: np.ndarray


def _resting_place(view: GraphView, profile: Profile, leaf: Leaf) -> _Rest:
    """Carry what a product over nothing gives through biases and scales to the addition that joins the residual."""
    node, name = leaf.node, leaf.node.outputs[0]
    weight, shape = view.value(leaf.tensor), profile.shape(name)
    assert weight is not None
    assert shape
    array = np.zeros(shape[-1], weight.dtype)
    if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2]:
        bias = view.value(node.inputs[2])
        if bias is None:
            raise _cannot_empty(node)
        array = array + bias * np.asarray(node.attrs.get("beta", 1.0), weight.dtype)
    while True:
        name = _reunited(view, profile, name, array.size)
        readers = [reader for reader in view.consumers[name] if reader[0].op not in MEASURES]
        if len(readers) > 1 or any(is_norm(node) for node, _ in readers):
            name, array = _normalised(view, profile, name, array)
        readers = [reader for reader in view.consumers[name] if reader[0].op not in MEASURES]
        if len(readers) != 1:
            raise _cannot_empty(view.producer[name])
        ((node, slot),) = readers
        others = [other for position, other in enumerate(node.inputs) if other and position != slot]
        values = [value for other in others if (value := view.value(other)) is not None]
        if (node.op in ("Add", "Sum") and not all(view.is_constant(other) for other in others)) or node.op in FUSED_RESIDUAL:
            return _Rest(node, slot, array)
        if node.op in _ARITHMETIC and len(values) == len(others) and not (node.op == "Div" and slot):
            for value in values:
                array = np.asarray(_ARITHMETIC[node.op](array, value), array.dtype)
        elif node.op == "Cast":
            array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
        elif _keeps_last_axis(view, profile, node, array.size):
            array = array.reshape(-1)
        elif node.op == "Transpose" and array.ndim == 1:
            order = node.attrs.get("perm") or list(reversed(range(len(profile.shape(name) or ()))))
            array = array.reshape([1] * (len(order) - 1) + [-1]).transpose(order)
        else:
            raise _cannot_empty(node)
        name = node.outputs[0]


_ARITHMETIC: Mapping[str, np.ufunc] = {"Add": np.add, "Sum": np.add, "Mul": np.multiply, "Div": np.divide}


def _normalised(view: GraphView, profile: Profile, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What the rest of the branch, from the tensor ``name`` on, makes of one row: the tensor that joins the residual, and its row."""
    tail = follow_tail(view, name)
    shape = profile.shape(name)
    if tail is None or not shape or any(node.op in _NOT_BY_ROWS for node in tail.nodes):
        raise _cannot_empty(view.consumers[name][0][0])
    known = {name: array.reshape([1] * (len(shape) - 1) + [-1])}
    constants = [operand for node in tail.nodes for operand in node.inputs if view.is_constant(operand)]
    needed = {node.index for node in tail.nodes} | view.ancestors(constants)
    piece = cut_piece(view, sorted(needed), [tail.end], known)
    assert piece.model is not None
    (row,) = run(open_session(piece.model, optimize=False), known)
    return tail.end, row.reshape(-1)


_NOT_BY_ROWS = frozenset("Reshape Flatten Squeeze Unsqueeze Transpose BatchNormalization".split())


def _reunited(view: GraphView, profile: Profile, name: str, width: int) -> str:
    """Where a tensor is cut in pieces that are joined again, as a roll does: the tensor in which they are."""
    while True:
        pieces = {node.index: node for node, _ in view.consumers[name] if node.op not in MEASURES}
        joins = {reader.index: reader for node in pieces.values() for piece in node.outputs for reader, _ in view.consumers.get(piece, ())}
        if len(pieces) < 2 or len(joins) != 1 or not all(_keeps_last_axis(view, profile, node, width) for node in pieces.values()):
            return name
        (join,) = joins.values()
        if join.op != "Concat" or not _keeps_last_axis(view, profile, join, width):
            return name
        name = join.outputs[0]


def _keeps_last_axis(view: GraphView, profile: Profile, node: Node, width: int) -> bool:
    before, after = profile.shape(node.inputs[0]), profile.shape(node.outputs[0])
    if not before or not after or before[-1] != width or after[-1] != width:
        return False
    if node.op == "Transpose":
        return bool(node.attrs.get("perm", [0])[-1] == len(before) - 1)
    if node.op in MOVING:
        found = links(node, Shapes(view, profile, node)) or ()
        ties = [link for link in found if isinstance(link, Tie) and (link.a, link.axis_a) == (0, len(before) - 1)]
        return any(tie.index_a is None and tie.axis_b == len(after) - 1 for tie in ties)
    return node.op in ("Identity", "Dropout", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


def _cannot_empty(node: Node) -> SlicingError:
    return SlicingError(f"{node} stands between a branch that keeps nothing and the residual sum and is not understood; keep a unit there")
