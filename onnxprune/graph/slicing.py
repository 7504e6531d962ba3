"""From kept units to a smaller graph: the one place where weights are cut and shapes rewritten.

Kept positions are computed per axis from the labels of the group; every constant is cut along its axes, every node that carries a shape
(Reshape, Split, Slice, head counts) is reset. A site that keeps nothing is replaced by the constant it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs

from onnxprune.errors import InputError
from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.attention_rules import packed_sizes
from onnxprune.graph.axis_links import Shapes
from onnxprune.graph.axis_rules import slice_ranges
from onnxprune.graph.caches import CacheCut, cache_pairs, fills_a_cache, record_cuts
from onnxprune.graph.model import Model
from onnxprune.graph.silence import silence
from onnxprune.graph.surgery import SlicingError, Surgeon
from onnxprune.graph.view import Node

Kept = Mapping[str, np.ndarray]
"""Site name -> sorted indices of the units that stay. Sites that are not named keep everything."""


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
            silence(anatomy, site, surgeon)
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
            merged = any(anatomy.profile.dim(*place) is None for place in site.group.places)
            if not len(kept[site.name]) and (merged or fills_a_cache(anatomy.view, caches, site.group.nodes, places)):
                # Nobody reads what it computes any more, but a cache without heads is one that few can allocate, and nobody can tell
                # the batch from an axis that held batch x heads.
                alive[0] = True
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
            tensor = _picked(anatomy, surgeon, tensor, name, axis, kept)
    return tensor


def _picked(anatomy: Anatomy, surgeon: Surgeon, tensor: gs.Tensor, name: str, axis: int, kept: np.ndarray) -> gs.Tensor:
    """Positions of an axis; where it holds batch x heads, it is taken apart first, as its size is not known before."""
    first, second = (run[name] for run in anatomy.profile.shapes)
    period = int(np.gcd(first[axis], second[axis]))
    bounds = {value: surgeon.constant(np.array([value], np.int64), name) for value in (0, axis, axis + 1, len(first), -1)}

    def regrouped(source: gs.Tensor, sizes: list[int]) -> gs.Tensor:
        before, after, target, result = (surgeon.variable(name, np.int64) for _ in range(4))
        surgeon.add("Slice", [shape, bounds[0], bounds[axis]], before, name)
        surgeon.add("Slice", [shape, bounds[axis + 1], bounds[len(first)]], after, name)
        surgeon.add("Concat", [before, surgeon.constant(np.array(sizes, np.int64), name), after], target, name, axis=0)
        result.dtype = tensor.dtype
        surgeon.add("Reshape", [source, target], result, name)
        return result

    def gathered(source: gs.Tensor, places: np.ndarray, along: int) -> gs.Tensor:
        result = surgeon.variable(name, tensor.dtype)
        surgeon.add("Gather", [source, surgeon.constant(places.astype(np.int64), name)], result, name, axis=along)
        return result

    if first[axis] == second[axis]:
        return gathered(tensor, kept, axis)
    stays = np.zeros(first[axis], bool)
    stays[kept] = True
    if (stays.reshape(-1, period) != stays[:period]).any():
        raise SlicingError(f"the units of {name} do not repeat along axis {axis}, whose size varies; they cannot be picked at every size")
    shape = surgeon.variable(name, np.int64)
    surgeon.add("Shape", [tensor], shape, name)
    return regrouped(gathered(regrouped(tensor, [-1, period]), np.flatnonzero(stays[:period]), axis + 1), [-1])


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
            if node.op != "Reshape" or (values[known] == -1).any():
                shares[:, position] = stays.sum(), len(stays)
            else:
                values[position], change[position] = -1, True  # a merged dynamic axis, batch x heads: let the runtime infer it
    free = np.flatnonzero(~known & ~change & (shares == 1).all(axis=0))
    if node.op == "Reshape" and change.any() and len(free) and not (values[known | change] == -1).any():
        # It may be computed from the shape of what is cut, as batch = rows / heads; inferring one size is always right.
        values[free[0]], change[free[0]] = -1, True
    surgeon = patient.surgeon
    if (shares != 1).any():  # a merged dynamic axis that cannot be inferred: batch x heads times the share of heads that stay
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


def _resize_shape(patient: _Patient) -> None:
    """What is computed from the shape of a cut tensor is computed from its shape before; nodes that need the new one are reset."""
    sizes = patient.shapes.of(0)
    axes = range(len(sizes))[slice(patient.node.attrs.get("start"), patient.node.attrs.get("end"))]
    stays = [patient.stays(0, axis) for axis in axes]
    left = np.array([sizes[axis] if kept is None else int(kept.sum()) for axis, kept in zip(axes, stays, strict=True)], np.int64)
    whole = np.array([sizes[axis] for axis in axes], np.int64)
    if (left == whole).all():
        return
    surgeon, name = patient.surgeon, patient.node.outputs[0]
    fixed = np.array([patient.anatomy.profile.dim(patient.node.inputs[0], axis) is not None for axis in axes])
    varies = (left != whole) & ~fixed
    known, scaled, after = patient.edit.outputs[0], surgeon.variable(name, np.int64), surgeon.variable(name, np.int64)
    patient.edit.outputs = [after]
    surgeon.add("Where", [surgeon.constant(fixed, name), surgeon.constant(whole, name), after], scaled if varies.any() else known, name)
    if varies.any():
        more = surgeon.variable(name, np.int64)
        surgeon.add("Mul", [scaled, surgeon.constant(np.where(varies, whole, 1), name)], more, name)
        surgeon.add("Div", [more, surgeon.constant(np.where(varies, left, 1), name)], known, name)


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


def _resize_concat(patient: _Patient) -> None:
    """Leave out the parts of which nothing is left: what makes them may not run on an axis of length 0 (a Reshape reads 0 as "copy")."""
    axis = patient.node.attrs["axis"] % patient.shapes.rank(-1)
    gone = [stays is not None and not stays.any() for stays in (patient.stays(slot, axis) for slot in range(len(patient.node.inputs)))]
    if any(gone) and not all(gone):
        patient.edit.inputs = [tensor for tensor, empty in zip(patient.edit.inputs, gone, strict=True) if not empty]


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
    elif (depth := patient.stays(0, 3)) is not None and not depth.all():
        attrs.setdefault("scale", len(depth) ** -0.5)  # it would follow the smaller depth


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
    ("", "Shape"): _resize_shape,
    ("", "Reshape"): _resize_reshape,
    ("", "Expand"): _resize_expand,
    ("", "ConstantOfShape"): _resize_constant_of_shape,
    ("", "Split"): _resize_split,
    ("", "Slice"): _resize_slice,
    ("", "Concat"): _resize_concat,
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
