"""From kept units to a smaller graph: the one place where weights are cut and shapes rewritten.

Kept positions are computed per axis from the labels of the group; every constant is cut along its axes, every node that carries a shape
(Reshape, Split, Slice, head counts) is reset. A site that keeps nothing is replaced by the constant it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxprune.errors import InputError, OnnxPruneError
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.attention_rules import packed_sizes
from onnxprune.graph.axis_links import Shapes, Tie
from onnxprune.graph.axis_rules import links, slice_ranges
from onnxprune.graph.caches import CacheCut, cache_pairs, fills_a_cache, record_cuts
from onnxprune.graph.cutting import cut_piece
from onnxprune.graph.model import Model
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.tail import FUSED_RESIDUAL, MEASURES, MOVING, follow_tail, is_norm
from onnxprune.graph.view import Node
from onnxprune.runtime.session import open_session, run

Kept = Mapping[str, np.ndarray]
"""Site name -> sorted indices of the units that stay. Sites that are not named keep everything."""


class SlicingError(OnnxPruneError):
    """A node along a pruned axis cannot be resized; the graph is left as it was."""


def slice_model(anatomy: Anatomy, kept: Kept) -> Model:
    """Remove every unit that is not kept.

    Equal, up to floating-point rounding, to multiplying the consumers' inputs by the mask of kept units.

    Raises:
        InputError: ``kept`` names a site or a unit that the model does not have.
        SlicingError: a node on the way cannot be resized.
    """
    _check(anatomy, kept)
    cut = [site for site in anatomy.sites if site.name in kept and len(kept[site.name]) < site.units]
    if not cut:
        return anatomy.model
    plan = _Cut(anatomy, cut, kept)
    surgeon = Surgeon(anatomy.model)
    _cut_uses(anatomy, plan, surgeon)
    touched = {node.index: node for site in cut for node in site.group.nodes}
    for _, node in sorted(touched.items()):
        resize = _RESIZERS.get((node.domain, node.op))
        if resize is not None:
            resize(_Patient(anatomy, plan, surgeon, node))
    for site in cut:
        if len(kept[site.name]) == 0:
            _silence(anatomy, site, surgeon)
    return record_cuts(surgeon.close(), _cache_cuts(anatomy, plan))


def _cache_cuts(anatomy: Anatomy, plan: _Cut) -> dict[str, CacheCut]:
    """Caches that lose heads. One is cut along one axis only, as only heads reach it."""
    cuts = {}
    for source, output in cache_pairs(anatomy.view).items():
        for (name, axis), stays in plan.tensors.items():
            if name == source and not stays.all():
                cuts[source] = CacheCut(output, axis, len(stays), tuple(np.flatnonzero(stays).tolist()))
    return cuts


def cuts_of(anatomy: Anatomy, kept: Kept) -> dict[str, CacheCut]:
    """What a decision does to the caches of a model, by input name; caches that keep everything are left out."""
    cut = [site for site in anatomy.sites if site.name in kept and len(kept[site.name]) < site.units]
    return _cache_cuts(anatomy, _Cut(anatomy, cut, kept))


def kept_positions(anatomy: Anatomy, kept: Kept) -> dict[tuple[str, int], np.ndarray]:
    """Which positions stay, bool, by (activation, axis); axes that are not cut are left out."""
    cut = [site for site in anatomy.sites if site.name in kept and len(kept[site.name]) < site.units]
    return {place: stays for place, stays in _Cut(anatomy, cut, kept).tensors.items() if not stays.all()}


def _check(anatomy: Anatomy, kept: Kept) -> None:
    units = {site.name: site.units for site in anatomy.sites}
    least = {site.name: site.least for site in anatomy.sites}
    for name, indices in kept.items():
        if name not in units:
            raise InputError(f"the model has no site {name!r}; it has {', '.join(units) or 'none'}")
        given = np.asarray(indices)
        if len(given) and (given.min() < 0 or given.max() >= units[name] or (np.diff(given) <= 0).any()):
            raise InputError(f"kept units of {name} must be ascending numbers from 0 to {units[name] - 1}, each once")
        if len(given) < least[name]:
            raise InputError(f"{name} must keep at least one unit: nothing can go through the layer without")


class _Cut:
    """Which positions stay, along every axis that any site touches."""

    def __init__(self, anatomy: Anatomy, sites: list[Site], kept: Kept) -> None:
        self.tensors: dict[tuple[str, int], np.ndarray] = {}
        self.uses: dict[tuple[int, int, int], np.ndarray] = {}
        caches = cache_pairs(anatomy.view)
        for site in sites:
            alive = np.zeros(site.units + 1, bool)  # the last entry answers for label -1: not of this group, stays
            alive[-1] = True
            alive[np.asarray(kept[site.name], np.int64)] = True
            places = {name for name, _ in site.group.places}
            if not len(kept[site.name]) and fills_a_cache(anatomy.view, caches, site.group.nodes, places):
                alive[0] = True  # nobody reads its keys and values any more, but a cache without heads is one that few can allocate
            for place, labels in site.group.places.items():
                self._and(self.tensors, place, alive[labels])
            for leaf in (*site.group.leaves, *site.group.picks):
                self._and(self.uses, (leaf.node.index, leaf.slot, leaf.axis), alive[leaf.labels])

    @staticmethod
    def _and(table: dict, key: object, stays: np.ndarray) -> None:  # type: ignore[type-arg]
        table[key] = table[key] & stays if key in table else stays


def _cut_uses(anatomy: Anatomy, plan: _Cut, surgeon: Surgeon) -> None:
    """Cut each use of a constant or a side tensor; uses that end up equal share one tensor again, other uses keep the original."""
    per_use: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for (index, slot, axis), stays in plan.uses.items():
        per_use.setdefault((index, slot), {})[axis] = np.flatnonzero(stays)
    shared: dict[tuple[object, ...], gs.Tensor] = {}
    for (index, slot), axes in sorted(per_use.items()):
        name = anatomy.view.nodes[index].inputs[slot]
        key = (name, *((axis, axes[axis].tobytes()) for axis in sorted(axes)))
        if key not in shared:
            shared[key] = _cut_tensor(anatomy, surgeon, name, axes)
        surgeon.nodes[index].inputs[slot] = shared[key]


def _cut_tensor(anatomy: Anatomy, surgeon: Surgeon, name: str, axes: Mapping[int, np.ndarray]) -> gs.Tensor:
    """The positions that stay of a constant, or, picked at run time, of a side tensor."""
    array = anatomy.view.value(name)
    if array is not None:
        for axis, kept in sorted(axes.items()):
            array = np.take(array, kept, axis=axis)
        return surgeon.constant(array, name)
    tensor = surgeon.tensors[name]
    for axis, kept in sorted(axes.items()):
        if len(kept) < (anatomy.profile.shape(name) or ())[axis]:
            picked = surgeon.variable(name, tensor.dtype)
            surgeon.add("Gather", [tensor, surgeon.constant(kept.astype(np.int64), name)], picked, name, axis=axis)
            tensor = picked
    return tensor


# --- nodes that carry a shape ------------------------------------------------------------------------------------------------------


class _Patient:
    """One node under the knife, with what its resizer needs."""

    def __init__(self, anatomy: Anatomy, plan: _Cut, surgeon: Surgeon, node: Node) -> None:
        self.anatomy, self.plan, self.surgeon, self.node = anatomy, plan, surgeon, node
        self.shapes = Shapes(anatomy.view, anatomy.profile, node)
        self.edit: gs.Node = surgeon.nodes[node.index]

    def stays(self, operand: int, axis: int) -> np.ndarray | None:
        """Kept positions along an axis of an operand, None if nothing is cut there."""
        use = self.plan.uses.get((self.node.index, operand, axis))
        return self.plan.tensors.get((self.shapes.name(operand), axis)) if use is None else use

    def kept_heads(self, operand: int, axis: int, heads: int) -> int:
        """Heads left on an axis that holds ``heads`` equal blocks."""
        stays = self.stays(operand, axis)
        return heads if stays is None else int(stays.reshape(heads, -1).any(axis=1).sum())


def _resize_target(patient: _Patient, slot: int, align_right: bool) -> None:
    """Reset the elements of a shape operand that belong to cut axes of the output."""
    shapes, node = patient.shapes, patient.node
    output = shapes.of(-1)
    name = node.inputs[slot]
    constant = patient.anatomy.view.value(name)
    if constant is not None:
        values, known = np.array(constant), np.ones(constant.shape, bool)
    else:
        seen = patient.anatomy.profile.constant_elements(name)
        if seen is None:
            raise SlicingError(f"{node}: the shape operand {name} was not seen when the model ran")
        values, known = np.array(seen[0]), seen[1]
    change, shares = np.zeros(values.shape, bool), np.ones((2, *values.shape), np.int64)
    for axis in range(len(output)):
        stays = patient.stays(-1, axis)
        position = axis - (len(output) - len(values)) if align_right else axis
        if stays is None or stays.all() or position < 0:
            continue
        if known[position] and values[position] == output[axis] != 1:
            values[position], change[position] = int(stays.sum()), True
        elif not known[position] and patient.anatomy.profile.dim(node.outputs[0], axis) is None:
            if (values[known] == -1).any():
                shares[:, position] = stays.sum(), len(stays)
            else:
                values[position], change[position] = -1, True  # a merged dynamic axis, batch x heads: let the runtime infer it
    free = np.flatnonzero(~known & ~change & (shares == 1).all(axis=0))
    if node.op == "Reshape" and change.any() and len(free) and not (values[known | change] == -1).any():
        # It may be computed from the shape of what is cut, as batch = rows / heads; inferring one size is always right.
        values[free[0]], change[free[0]] = -1, True
    surgeon = patient.surgeon
    if (shares != 1).any():  # a merged dynamic axis whose target infers another one: batch x heads times the share of heads that stay
        part, whole = (surgeon.constant(column, name) for column in shares)
        product, quotient = surgeon.variable(name, np.int64), surgeon.variable(name, np.int64)
        surgeon.add("Mul", [patient.edit.inputs[slot], part], product, node.name)
        surgeon.add("Div", [product, whole], quotient, node.name)
        patient.edit.inputs[slot] = quotient
    if not change.any():
        return
    if known.all():
        patient.edit.inputs[slot] = surgeon.constant(values, name)
        return
    fixed = surgeon.variable(name, np.int64)
    surgeon.add("Where", [surgeon.constant(change, name), surgeon.constant(values, name), patient.edit.inputs[slot]], fixed, node.name)
    patient.edit.inputs[slot] = fixed


def _resize_reshape(patient: _Patient) -> None:
    _resize_target(patient, 1, align_right=False)


def _resize_expand(patient: _Patient) -> None:
    _resize_target(patient, 1, align_right=True)


def _resize_constant_of_shape(patient: _Patient) -> None:
    _resize_target(patient, 0, align_right=False)


def _resize_split(patient: _Patient) -> None:
    axis = patient.node.attrs.get("axis", 0) % patient.shapes.rank(0)
    stays = [patient.stays(-1 - position, axis) for position in range(len(patient.node.outputs))]
    if all(kept is None for kept in stays):
        return
    sizes = [patient.shapes.of(-1 - position)[axis] if kept is None else int(kept.sum()) for position, kept in enumerate(stays)]
    patient.edit.attrs.pop("num_outputs", None)
    if patient.anatomy.model.opset() < 13:
        patient.edit.attrs["split"] = sizes
    else:
        patient.edit.inputs = [patient.edit.inputs[0], patient.surgeon.constant(np.array(sizes, np.int64), patient.node.name + ".split")]


def _resize_slice(patient: _Patient) -> None:
    ranges = slice_ranges(patient.node, patient.shapes) or {}
    cut = {axis: stays for axis in ranges if (stays := patient.stays(0, axis)) is not None and not stays.all()}
    if not cut:
        return
    axes = sorted(ranges)
    bounds = []
    for axis in axes:
        picked = ranges[axis]
        if len(picked) > 1 and (np.diff(picked) != 1).any():
            raise SlicingError(f"{patient.node} takes positions of a pruned tensor out of order or with gaps")
        if axis not in cut and patient.anatomy.profile.dim(patient.node.outputs[0], axis) is None:
            raise SlicingError(f"{patient.node} slices a dynamic axis together with a pruned one")
        stays = cut.get(axis, np.ones(patient.shapes.of(0)[axis], bool))
        first, last = (picked[0], picked[-1] + 1) if len(picked) else (0, 0)
        bounds.append((int(stays[:first].sum()), int(stays[:last].sum()), axis))
    if patient.anatomy.model.opset() < 10:
        patient.edit.attrs.update(zip(("starts", "ends", "axes"), map(list, zip(*bounds, strict=True)), strict=True))
        return
    operands = [patient.surgeon.constant(np.array(column, np.int64), patient.node.name + ".range") for column in zip(*bounds, strict=True)]
    patient.edit.inputs = [patient.edit.inputs[0], *operands]


def _resize_gather(patient: _Patient) -> None:
    axis = patient.node.attrs.get("axis", 0) % patient.shapes.rank(0)
    stays, out = patient.stays(0, axis), patient.stays(-1, axis)
    indices = patient.shapes.integers(1)
    if stays is None or out is None or indices is None:
        return
    position = np.cumsum(stays) - 1
    remapped = position[indices % len(stays)][out]
    patient.edit.inputs[1] = patient.surgeon.constant(remapped.astype(np.int64), patient.node.name + ".indices")


def _resize_attention(patient: _Patient) -> None:
    attrs = patient.edit.attrs
    if "q_num_heads" in attrs:
        attrs["q_num_heads"] = patient.kept_heads(0, 2, attrs["q_num_heads"])
        attrs["kv_num_heads"] = patient.kept_heads(1, 2, attrs["kv_num_heads"])


def _resize_group_query_attention(patient: _Patient) -> None:
    heads, kv_heads = patient.node.attrs["num_heads"], patient.node.attrs["kv_num_heads"]
    patient.edit.attrs["num_heads"] = patient.kept_heads(-1, 2, heads)
    # Key/value heads go with all their queries, except a single one, which stays.
    patient.edit.attrs["kv_num_heads"] = patient.edit.attrs["num_heads"] // (heads // kv_heads) if kv_heads > 1 else 1


def _resize_multi_head_attention(patient: _Patient) -> None:
    patient.edit.attrs["num_heads"] = patient.kept_heads(0, 2, patient.edit.attrs["num_heads"])


def _resize_packed_attention(patient: _Patient) -> None:
    stays = patient.stays(1, 1)
    if stays is None:
        return
    heads = patient.node.attrs["num_heads"]
    bounds = np.cumsum([0, *packed_sizes(patient.node, patient.shapes)])
    sizes = [int(stays[a:b].sum()) for a, b in pairwise(bounds)]
    patient.edit.attrs["qkv_hidden_sizes"] = sizes
    patient.edit.attrs["num_heads"] = int(stays[: bounds[1]].reshape(heads, -1).any(axis=1).sum())


def _resize_convolution(patient: _Patient) -> None:
    groups = int(patient.node.attrs.get("group", 1))
    if groups > 1:
        patient.edit.attrs["group"] = patient.kept_heads(0, 1, groups)


def _resize_sizes(patient: _Patient) -> None:
    if len(patient.node.inputs) > 3 and patient.node.inputs[3] and "axes" not in patient.node.attrs:
        _resize_target(patient, 3, align_right=False)


def _resize_rotary(patient: _Patient) -> None:
    heads = patient.edit.attrs.get("num_heads", 0)
    if heads:
        axis = 1 if patient.shapes.rank(0) == 4 else 2
        patient.edit.attrs["num_heads"] = patient.kept_heads(0, axis, heads)


_RESIZERS: dict[tuple[str, str], Callable[[_Patient], None]] = {
    ("", "Reshape"): _resize_reshape,
    ("", "Expand"): _resize_expand,
    ("", "ConstantOfShape"): _resize_constant_of_shape,
    ("", "Split"): _resize_split,
    ("", "Slice"): _resize_slice,
    ("", "Gather"): _resize_gather,
    ("", "Attention"): _resize_attention,
    ("", "Conv"): _resize_convolution,
    ("", "ConvTranspose"): _resize_convolution,
    ("", "Resize"): _resize_sizes,
    ("", "RotaryEmbedding"): _resize_rotary,
    ("com.microsoft", "RotaryEmbedding"): _resize_rotary,
    ("com.microsoft", "GroupQueryAttention"): _resize_group_query_attention,
    ("com.microsoft", "MultiHeadAttention"): _resize_multi_head_attention,
    ("com.microsoft", "Attention"): _resize_packed_attention,
}


# --- sites that keep nothing -------------------------------------------------------------------------------------------------------


def _silence(anatomy: Anatomy, site: Site, surgeon: Surgeon) -> None:
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
        if any(is_norm(node) for node, _ in view.consumers[name]):
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
