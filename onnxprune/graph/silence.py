"""Sites that keep nothing: each product over an empty axis is replaced by the constant it computes, where its branch joins the residual."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.axis_links import Shapes, Tie
from onnxprune.graph.axis_rules import links
from onnxprune.graph.cutting import cut_piece
from onnxprune.graph.surgery import SlicingError, Surgeon
from onnxprune.graph.tail import FUSED_RESIDUAL, MEASURES, MOVING, follow_tail, is_norm
from onnxprune.graph.view import Node
from onnxprune.runtime.session import open_session, run


def silence(anatomy: Anatomy, site: Site, surgeon: Surgeon) -> None:
    """Replace each product over an empty axis by the constant it computes, at the addition where the branch ends."""
    for consumer in site.consumers:
        node = consumer.leaf.node
        weight = anatomy.view.value(consumer.leaf.tensor)
        shape = anatomy.profile.shape(node.outputs[0])
        assert weight is not None
        assert shape
        array = np.zeros(shape[-1], weight.dtype)
        if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2]:
            bias = anatomy.view.value(node.inputs[2])
            if bias is None:
                raise _cannot_empty(node)
            array = array + bias * np.asarray(node.attrs.get("beta", 1.0), weight.dtype)
        _push_constant(anatomy, node.outputs[0], array, surgeon)


_ARITHMETIC: Mapping[str, np.ufunc] = {"Add": np.add, "Sum": np.add, "Mul": np.multiply, "Div": np.divide}


def _push_constant(anatomy: Anatomy, name: str, array: np.ndarray, surgeon: Surgeon) -> None:
    """Carry ``array``, which broadcasts to what ``name`` holds, through biases and scales to the addition that joins the residual."""
    view = anatomy.view
    while True:
        name = _reunited(anatomy, name, array.size)
        readers = [reader for reader in view.consumers[name] if reader[0].op not in MEASURES]
        if len(readers) > 1 or any(is_norm(node) for node, _ in readers):
            name, array = _normalised(anatomy, name, array)
        ((node, slot),) = [reader for reader in view.consumers[name] if reader[0].op not in MEASURES]
        others = [other for position, other in enumerate(node.inputs) if other and position != slot]
        values = [value for other in others if (value := view.value(other)) is not None]
        if node.op in ("Add", "Sum") and not all(view.is_constant(other) for other in others):
            surgeon.nodes[node.index].inputs[slot] = surgeon.constant(array, name)
            return
        if node.op in FUSED_RESIDUAL:
            shape, full = surgeon.variable(name, np.int64), surgeon.variable(name, array.dtype)
            surgeon.add("Shape", [surgeon.nodes[node.index].inputs[1 - slot]], shape, name)
            surgeon.add("Expand", [surgeon.constant(array, name), shape], full, name)
            surgeon.nodes[node.index].inputs[slot] = full
            return
        if node.op in _ARITHMETIC and len(values) == len(others) and not (node.op == "Div" and slot):
            for value in values:
                array = np.asarray(_ARITHMETIC[node.op](array, value), array.dtype)
        elif node.op == "Cast":
            array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
        elif _keeps_last_axis(anatomy, node, array.size):
            array = array.reshape(-1)
        elif node.op == "Transpose" and array.ndim == 1:
            order = node.attrs.get("perm") or list(reversed(range(len(anatomy.profile.shape(name) or ()))))
            array = array.reshape([1] * (len(order) - 1) + [-1]).transpose(order)
        else:
            raise _cannot_empty(node)
        name = node.outputs[0]


def _normalised(anatomy: Anatomy, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What the rest of the branch, from the tensor ``name`` on, makes of one row: the tensor that joins the residual, and its row."""
    view = anatomy.view
    tail = follow_tail(view, name)
    shape = anatomy.profile.shape(name)
    if tail is None or not shape or any(node.op in _RESHAPING for node in tail.nodes):
        raise _cannot_empty(view.consumers[name][0][0])
    known = {name: array.reshape([1] * (len(shape) - 1) + [-1])}
    constants = [operand for node in tail.nodes for operand in node.inputs if view.is_constant(operand)]
    needed = {node.index for node in tail.nodes} | view.ancestors(constants)
    piece = cut_piece(view, sorted(needed), [tail.end], known)
    assert piece.model is not None
    (row,) = run(open_session(piece.model, optimize=False), known)
    return tail.end, row.reshape(-1)


_RESHAPING = frozenset("Reshape Flatten Squeeze Unsqueeze Transpose".split())


def _reunited(anatomy: Anatomy, name: str, width: int) -> str:
    """Where a tensor is cut in pieces that are joined again, as a roll does: the tensor in which they are."""
    view = anatomy.view
    while True:
        pieces = {node.index: node for node, _ in view.consumers[name] if node.op not in MEASURES}
        joins = {reader.index: reader for node in pieces.values() for piece in node.outputs for reader, _ in view.consumers.get(piece, ())}
        if len(pieces) < 2 or len(joins) != 1 or not all(_keeps_last_axis(anatomy, node, width) for node in pieces.values()):
            return name
        (join,) = joins.values()
        if join.op != "Concat" or not _keeps_last_axis(anatomy, join, width):
            return name
        name = join.outputs[0]


def _keeps_last_axis(anatomy: Anatomy, node: Node, width: int) -> bool:
    before, after = anatomy.profile.shape(node.inputs[0]), anatomy.profile.shape(node.outputs[0])
    if not before or not after or before[-1] != width or after[-1] != width:
        return False
    if node.op == "Transpose":
        return bool(node.attrs.get("perm", [0])[-1] == len(before) - 1)
    if node.op in MOVING:
        found = links(node, Shapes(anatomy.view, anatomy.profile, node)) or ()
        ties = [link for link in found if isinstance(link, Tie) and (link.a, link.axis_a) == (0, len(before) - 1)]
        return any(tie.index_a is None and tie.axis_b == len(after) - 1 for tie in ties)
    return node.op in ("Identity", "Dropout", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


def _cannot_empty(node: Node) -> SlicingError:
    return SlicingError(f"{node} stands between a branch that keeps nothing and the residual sum and is not understood; keep a unit there")
