"""Only the rows that the output reads: a selection of positions, moved up through the graph as far as it goes.

A classifier reads one token of the last hidden state, yet the whole last block computes all of them. Every operator that treats positions
one by one (products with weights, normalisations, activations, the queries of attention) gives the same rows when it is given only those.
The selection stops where something else needs all positions: at the keys and values of the last block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.graph.axis_links import Barrier, Shapes, Tie
from onnxprune.graph.axis_rules import links, slice_ranges
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView, Node

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_SHAPED = frozenset({"Expand", "Tile", "Pad", "ConstantOfShape", "Slice", "Gather", "Concat", "Split"})
"""Operators that carry a size of their own, or read several positions: a selection stops below them."""


@dataclass(frozen=True)
class Demand:
    """The only positions that anybody reads along an axis of a tensor."""

    axis: int
    positions: tuple[int, ...]


def demanded_rows(model: Model, profile: Profile) -> tuple[Model, int]:
    """Compute only what the outputs read; returns the model and the number of products with weights that got smaller."""
    view = GraphView(model)
    narrowed, demands = _propagate(view, profile)
    smaller = [node for node in narrowed if node.op in _PRODUCTS and any(view.is_constant(name) for name in node.inputs[:2])]
    if not smaller:
        return model, 0
    return _rewrite(view, profile, narrowed, demands), len(smaller)


def _picks(node: Node) -> bool:
    return node.op in ("Gather", "Slice") and not node.domain


def _selection(node: Node, view: GraphView, profile: Profile) -> Demand | None:
    """What a Gather or Slice of fixed positions reads of its first input, if that is less than all of it."""
    shapes = Shapes(view, profile, node)
    try:
        if node.op == "Gather":
            axis = node.attrs.get("axis", 0) % shapes.rank(0)
            indices = view.value(node.inputs[1])
            if indices is None or indices.ndim > 1:
                return None
            picked = np.atleast_1d(indices)
        else:
            if any(view.value(name) is None for name in node.inputs[1:] if name):
                return None
            ranges = {axis: found for axis, found in (slice_ranges(node, shapes) or {}).items() if len(found) < shapes.of(0)[axis]}
            if len(ranges) != 1 or node.attrs or not _from_the_start(node, view):
                return None
            ((axis, picked),) = ranges.items()
    except LookupError:
        return None
    if len(picked) >= shapes.of(0)[axis] or view.is_constant(node.inputs[0]):
        return None
    return Demand(axis, tuple(int(position) for position in picked))


def _from_the_start(node: Node, view: GraphView) -> bool:
    """Bounds that do not depend on the length, and single steps."""
    starts, ends, *rest = (view.value(name) for name in node.inputs[1:] if name)
    steps = rest[1] if len(rest) > 1 else np.ones(1)
    return bool(starts is not None and ends is not None and (starts >= 0).all() and (ends >= 0).all() and (np.asarray(steps) == 1).all())


def _propagate(view: GraphView, profile: Profile) -> tuple[dict[Node, Demand], dict[tuple[int, int], Demand]]:
    """Nodes whose output shrinks, and what each (node, input slot) reads where it does not read everything."""
    demands: dict[tuple[int, int], Demand] = {}
    narrowed: dict[Node, Demand] = {}
    for node in reversed(view.nodes):
        wanted = _wanted(node, view, demands)
        below = _inputs_of(node, wanted, view, profile) if wanted else None
        if wanted and below:
            narrowed[node] = wanted
            demands.update({(node.index, slot): demand for slot, demand in below.items()})
        elif _picks(node) and (selection := _selection(node, view, profile)):
            demands[node.index, 0] = selection
    return narrowed, demands


def _wanted(node: Node, view: GraphView, demands: dict[tuple[int, int], Demand]) -> Demand | None:
    """The one demand that all readers of a node's only output share."""
    (output, *more) = node.outputs
    if any(more) or output in view.graph_outputs or view.is_constant(output):
        return None
    found = {demands.get((reader.index, slot)) for reader, slot in view.consumers.get(output, ())}
    return found.pop() if len(found) == 1 else None


def _inputs_of(node: Node, wanted: Demand, view: GraphView, profile: Profile) -> dict[int, Demand] | None:
    """What a node reads when only ``wanted`` of its output is needed; None if it has to compute everything."""
    if node.op in _SHAPED or node.attrs.get("is_causal", 0):
        return None
    try:
        found = links(node, Shapes(view, profile, node)) or ()
    except LookupError:
        return None
    result: dict[int, Demand] = {}
    for link in found:
        if isinstance(link, Barrier) and link.operand == -1 and link.axis == wanted.axis:
            return None
        if not isinstance(link, Tie):
            continue
        for (side, axis), (other, other_axis) in (
            ((link.a, link.axis_a), (link.b, link.axis_b)),
            ((link.b, link.axis_b), (link.a, link.axis_a)),
        ):
            if (side, axis) != (-1, wanted.axis) or other < 0:
                continue
            if link.index_a is not None or link.index_b is not None or other in result:
                return None
            result[other] = Demand(other_axis, wanted.positions)
    touched = {(slot, demand.axis) for slot, demand in result.items()}
    for link in found:  # the axis must pass through, and do nothing else
        if isinstance(link, Barrier) and (link.operand, link.axis) in touched:
            return None
        if isinstance(link, Tie) and link.contracts and {(link.a, link.axis_a), (link.b, link.axis_b)} & touched:
            return None
    if node.op == "Reshape" and result and not _resizable(node, wanted.axis, profile, view):
        return None
    return result or None


def _resizable(node: Node, axis: int, profile: Profile, view: GraphView) -> bool:
    target = view.value(node.inputs[1])
    return target is not None or profile.constant_elements(node.inputs[1]) is not None


def _rewrite(view: GraphView, profile: Profile, narrowed: dict[Node, Demand], demands: dict[tuple[int, int], Demand]) -> Model:
    surgeon = Surgeon(view.model)
    gathered: dict[tuple[str, Demand], object] = {}
    for (index, slot), demand in sorted(demands.items(), key=lambda item: item[0]):
        node, edit = view.nodes[index], surgeon.nodes[index]
        name = node.inputs[slot]
        shrunk = view.producer.get(name) in narrowed
        if node not in narrowed:  # the selection itself
            if shrunk:
                _renumber(node, demand, view, surgeon)
            continue
        if shrunk:
            continue
        key = name, demand
        if key not in gathered:
            array = view.value(name)
            positions = np.array(demand.positions, np.int64)
            if array is not None:
                gathered[key] = surgeon.constant(np.take(array, positions, axis=demand.axis), name)
            else:
                rows = gathered[key] = surgeon.variable(name)
                surgeon.add("Gather", [surgeon.tensors[name], surgeon.constant(positions, name)], rows, name, axis=demand.axis)
        edit.inputs[slot] = gathered[key]
    for node, demand in narrowed.items():
        if node.op == "Reshape":
            _resize(node, demand, view, profile, surgeon)
    return surgeon.close()


def _renumber(node: Node, demand: Demand, view: GraphView, surgeon: Surgeon) -> None:
    """A selection from a tensor that holds nothing else any more."""
    edit, count = surgeon.nodes[node.index], len(demand.positions)
    if node.op == "Gather":
        indices = view.value(node.inputs[1])
        assert indices is not None
        if demand.positions == (-1,):
            return  # the last row is still the last
        edit.inputs[1] = surgeon.constant(np.arange(count, dtype=indices.dtype).reshape(indices.shape), node.inputs[1])
    else:
        bounds = (np.array([bound], np.int64) for bound in (0, count, demand.axis))
        edit.inputs = [edit.inputs[0], *(surgeon.constant(bound, node.name + ".rows") for bound in bounds)]


def _resize(node: Node, demand: Demand, view: GraphView, profile: Profile, surgeon: Surgeon) -> None:
    """Write the number of rows into the target of a Reshape, unless it is inferred or copied there."""
    edit, name, axis, count = surgeon.nodes[node.index], node.inputs[1], demand.axis, len(demand.positions)
    constant = view.value(name)
    if constant is not None:
        if constant[axis] > 0:
            values = np.array(constant)
            values[axis] = count
            edit.inputs[1] = surgeon.constant(values, name)
        return
    seen = profile.constant_elements(name)
    assert seen is not None
    values, known = seen
    if known[axis] and values[axis] <= 0:
        return
    change = np.arange(len(values)) == axis
    fixed = surgeon.variable(name, np.int64)
    row_count = surgeon.constant(np.array([count], np.int64), name)
    surgeon.add("Where", [surgeon.constant(change, name), row_count, edit.inputs[1]], fixed, node.name)
    edit.inputs[1] = fixed
