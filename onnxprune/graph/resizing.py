"""Nodes that carry a shape along a pruned axis, reset to what is left: targets of Reshape, bounds of Slice, sizes of Split, head counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxprune.graph.attention_rules import packed_sizes
from onnxprune.graph.axis_links import Shapes
from onnxprune.graph.axis_rules import slice_ranges
from onnxprune.graph.axis_state import Group
from onnxprune.graph.profile import Profile
from onnxprune.graph.surgery import SlicingError, Surgeon
from onnxprune.graph.view import GraphView, Node


class Patient:
    """One node under the knife, with what its resizer needs: what stays along every axis of tensors and of uses of constants."""

    def __init__(
        self,
        view: GraphView,
        profile: Profile,
        tensors: Mapping[tuple[str, int], np.ndarray],
        uses: Mapping[tuple[int, int, int], np.ndarray],
        surgeon: Surgeon,
        node: Node,
    ) -> None:
        self.view, self.profile, self.surgeon, self.node = view, profile, surgeon, node
        self.tensors, self.uses = tensors, uses
        self.shapes = Shapes(view, profile, node)
        self.edit: gs.Node = surgeon.nodes[node.index]

    def stays(self, operand: int, axis: int) -> np.ndarray | None:
        """Kept positions along an axis of an operand, None if nothing is cut there."""
        use = self.uses.get((self.node.index, operand, axis))
        return self.tensors.get((self.shapes.name(operand), axis)) if use is None else use

    def kept_heads(self, operand: int, axis: int, heads: int) -> int:
        """Heads left on an axis that holds ``heads`` equal blocks."""
        stays = self.stays(operand, axis)
        return heads if stays is None else int(stays.reshape(heads, -1).any(axis=1).sum())

    def follow(self, op: str, operand: gs.Tensor, axis: int) -> None:
        """Let what the node computes pass another node before anyone reads it."""
        after = self.edit.outputs[0]
        before = self.surgeon.variable(after.name, after.dtype)
        self.edit.outputs = [before]
        self.surgeon.add(op, [before, operand], after, self.node.name, axis=axis)


def resize(patient: Patient) -> None:
    """Reset the shape that a node carries, if it carries one.

    Raises:
        SlicingError: it cannot be reset; :func:`unresizable` tells beforehand.
    """
    found = _RESIZERS.get((patient.node.domain, patient.node.op))
    if found is not None:
        found(patient)


def unresizable(view: GraphView, profile: Profile, group: Group) -> tuple[str, str] | None:
    """(node, reason) of the first node of a group that :func:`resize` or a pick of positions at run time would fail at."""
    for leaf in group.picks:
        first, second = (run.get(leaf.tensor) for run in profile.shapes)
        if first and second and first[leaf.axis] != second[leaf.axis]:
            period = int(np.gcd(first[leaf.axis], second[leaf.axis]))
            if (leaf.labels.reshape(-1, period) != leaf.labels[:period]).any():
                return leaf.node.name, f"its units do not repeat along an axis of {leaf.tensor} whose size varies"
    for node in group.nodes:
        slot = _TARGETS.get(node.op) if not node.domain else None
        name = node.inputs[slot] if slot is not None and slot < len(node.inputs) else ""
        if name and view.value(name) is None and profile.constant_elements(name) is None:
            return node.name, f"the target shape {name} of {node.op} was not seen when the model ran"
    return None


_TARGETS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}
"""Slots of the shapes that operators are told to make."""


def _resize_target(patient: Patient, slot: int, align_right: bool) -> None:
    """Reset the elements of a shape operand that belong to cut axes of the output."""
    shapes, node = patient.shapes, patient.node
    output = shapes.of(-1)
    name = node.inputs[slot]
    constant = patient.view.value(name)
    if constant is not None:
        values, known = np.array(constant), np.ones(constant.shape, bool)
    else:
        seen = patient.profile.constant_elements(name)
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
        elif not known[position] and patient.profile.dim(node.outputs[0], axis) is None:
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


def _resize_shape(patient: Patient) -> None:
    """What is computed from the shape of a cut tensor is computed from its shape before; nodes that need the new one are reset."""
    sizes = patient.shapes.of(0)
    axes = range(len(sizes))[slice(patient.node.attrs.get("start"), patient.node.attrs.get("end"))]
    stays = [patient.stays(0, axis) for axis in axes]
    left = np.array([sizes[axis] if kept is None else int(kept.sum()) for axis, kept in zip(axes, stays, strict=True)], np.int64)
    whole = np.array([sizes[axis] for axis in axes], np.int64)
    if (left == whole).all():
        return
    surgeon, name = patient.surgeon, patient.node.outputs[0]
    fixed = np.array([patient.profile.dim(patient.node.inputs[0], axis) is not None for axis in axes])
    varies = (left != whole) & ~fixed
    known, scaled, after = patient.edit.outputs[0], surgeon.variable(name, np.int64), surgeon.variable(name, np.int64)
    patient.edit.outputs = [after]
    surgeon.add("Where", [surgeon.constant(fixed, name), surgeon.constant(whole, name), after], scaled if varies.any() else known, name)
    if varies.any():
        more = surgeon.variable(name, np.int64)
        surgeon.add("Mul", [scaled, surgeon.constant(np.where(varies, whole, 1), name)], more, name)
        surgeon.add("Div", [more, surgeon.constant(np.where(varies, left, 1), name)], known, name)


def _resize_reshape(patient: Patient) -> None:
    _resize_target(patient, 1, align_right=False)


def _resize_expand(patient: Patient) -> None:
    _resize_target(patient, 1, align_right=True)


def _resize_constant_of_shape(patient: Patient) -> None:
    _resize_target(patient, 0, align_right=False)


def _resize_split(patient: Patient) -> None:
    axis = patient.node.attrs.get("axis", 0) % patient.shapes.rank(0)
    stays = [patient.stays(-1 - position, axis) for position in range(len(patient.node.outputs))]
    if all(kept is None for kept in stays):
        return
    sizes = [patient.shapes.of(-1 - position)[axis] if kept is None else int(kept.sum()) for position, kept in enumerate(stays)]
    patient.edit.attrs.pop("num_outputs", None)
    if patient.view.model.opset() < 13:
        patient.edit.attrs["split"] = sizes
    else:
        patient.edit.inputs = [patient.edit.inputs[0], patient.surgeon.constant(np.array(sizes, np.int64), patient.node.name + ".split")]


def _resize_slice(patient: Patient) -> None:
    """Move the bounds of cut axes; where positions are taken with gaps or backwards, a Gather takes those that stay."""
    ranges = slice_ranges(patient.node, patient.shapes) or {}
    cut = {axis: stays for axis in ranges if (stays := patient.stays(0, axis)) is not None and not stays.all()}
    if not cut:
        return
    bounds = {axis: (0, _EVERYTHING) for axis in cut}
    for axis, stays in cut.items():
        picked = ranges[axis]
        if (np.diff(picked) == 1).all():
            first, last = (picked[0], picked[-1] + 1) if len(picked) else (0, 0)
            bounds[axis] = int(stays[:first].sum()), int(stays[:last].sum())
        else:
            places = (np.cumsum(stays) - 1)[picked[stays[picked]]]
            patient.follow("Gather", patient.surgeon.constant(places.astype(np.int64), patient.node.name + ".indices"), axis=axis)
    named = list(ranges)
    changed = np.array([axis in cut for axis in named])
    low, high = (np.array([bounds[axis][side] if axis in cut else 0 for axis in named], np.int64) for side in (0, 1))
    if patient.view.model.opset() < 10:
        attrs = patient.edit.attrs
        for field, values in (("starts", low), ("ends", high)):
            attrs[field] = np.where(changed, values, attrs[field]).tolist()
        return
    steps = patient.shapes.integers(4)
    one = np.ones(len(named), np.int64)
    operands = [_where(patient, slot, changed, values) for slot, values in ((1, low), (2, high))]
    columns = np.array(named, np.int64), one if steps is None else np.where(changed, one, steps)
    patient.edit.inputs = [
        patient.edit.inputs[0],
        *operands,
        *(patient.surgeon.constant(column, patient.node.name + ".range") for column in columns),
    ]


_EVERYTHING = 2**62


def _where(patient: Patient, slot: int, changed: np.ndarray, values: np.ndarray) -> gs.Tensor:
    """An integer operand with some elements replaced."""
    surgeon, name = patient.surgeon, patient.node.inputs[slot]
    known = patient.view.value(name)
    if changed.all() or known is not None:
        return surgeon.constant(values if known is None else np.where(changed, values, known), name)
    whole, fixed = (surgeon.variable(name, np.int64) for _ in range(2))
    surgeon.add("Cast", [patient.edit.inputs[slot]], whole, patient.node.name, to=int(onnx.TensorProto.INT64))
    surgeon.add("Where", [surgeon.constant(changed, name), surgeon.constant(values, name), whole], fixed, patient.node.name)
    return fixed


def _resize_concat(patient: Patient) -> None:
    """Leave out the parts of which nothing is left: what makes them may not run on an axis of length 0 (a Reshape reads 0 as "copy")."""
    axis = patient.node.attrs["axis"] % patient.shapes.rank(-1)
    gone = [stays is not None and not stays.any() for stays in (patient.stays(slot, axis) for slot in range(len(patient.node.inputs)))]
    if any(gone) and not all(gone):
        patient.edit.inputs = [tensor for tensor, empty in zip(patient.edit.inputs, gone, strict=True) if not empty]


def _resize_gather(patient: Patient) -> None:
    axis = patient.node.attrs.get("axis", 0) % patient.shapes.rank(0)
    stays, out = patient.stays(0, axis), patient.stays(-1, axis)
    indices = patient.shapes.integers(1)
    if stays is None or out is None or indices is None:
        return
    position = np.cumsum(stays) - 1
    remapped = position[indices % len(stays)][out]
    patient.edit.inputs[1] = patient.surgeon.constant(remapped.astype(np.int64), patient.node.name + ".indices")


def _resize_attention(patient: Patient) -> None:
    attrs = patient.edit.attrs
    if "q_num_heads" in attrs:
        attrs["q_num_heads"] = patient.kept_heads(0, 2, attrs["q_num_heads"])
        attrs["kv_num_heads"] = patient.kept_heads(1, 2, attrs["kv_num_heads"])
    elif (depth := patient.stays(0, 3)) is not None and not depth.all():
        attrs.setdefault("scale", len(depth) ** -0.5)  # it would follow the smaller depth


def _resize_group_query_attention(patient: Patient) -> None:
    heads, kv_heads = patient.node.attrs["num_heads"], patient.node.attrs["kv_num_heads"]
    patient.edit.attrs["num_heads"] = patient.kept_heads(-1, 2, heads)
    # Key/value heads go with all their queries, except a single one, which stays.
    patient.edit.attrs["kv_num_heads"] = patient.edit.attrs["num_heads"] // (heads // kv_heads) if kv_heads > 1 else 1


def _resize_multi_head_attention(patient: Patient) -> None:
    patient.edit.attrs["num_heads"] = patient.kept_heads(0, 2, patient.edit.attrs["num_heads"])


def _resize_packed_attention(patient: Patient) -> None:
    stays = patient.stays(1, 1)
    if stays is None:
        return
    heads = patient.node.attrs["num_heads"]
    bounds = np.cumsum([0, *packed_sizes(patient.node, patient.shapes)])
    sizes = [int(stays[a:b].sum()) for a, b in pairwise(bounds)]
    patient.edit.attrs["qkv_hidden_sizes"] = sizes
    patient.edit.attrs["num_heads"] = int(stays[: bounds[1]].reshape(heads, -1).any(axis=1).sum())


def _resize_convolution(patient: Patient) -> None:
    groups = int(patient.node.attrs.get("group", 1))
    if groups > 1:
        patient.edit.attrs["group"] = patient.kept_heads(0, 1, groups)


def _resize_sizes(patient: Patient) -> None:
    if len(patient.node.inputs) > 3 and patient.node.inputs[3] and "axes" not in patient.node.attrs:
        _resize_target(patient, 3, align_right=False)


def _resize_rotary(patient: Patient) -> None:
    heads = patient.edit.attrs.get("num_heads", 0)
    if heads:
        axis = 1 if patient.shapes.rank(0) == 4 else 2
        patient.edit.attrs["num_heads"] = patient.kept_heads(0, axis, heads)


_RESIZERS: dict[tuple[str, str], Callable[[Patient], None]] = {
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
