"""Operators that pick elements: their adjoints put the picked ones back among zeros and add up repeats."""

from __future__ import annotations

import numpy as np

from onnxprune.graph.autodiff.rules import Adjoints, MissingGradient, Tape, rule
from onnxprune.graph.view import Node

_SCATTER_ADD_FROM = 16


@rule("Slice")
def slice_(tape: Tape, node: Node, dy: str) -> Adjoints:
    x, y = node.inputs[0], node.outputs[0]
    rank = tape.rank(x)
    starts, axes, steps = _slice_arguments(tape, node, rank)
    strided = [axis for axis, step in zip(axes, steps, strict=True) if step != 1]
    if strided and len(axes) > 1:
        raise MissingGradient(node, "steps other than 1 on several axes")
    if strided:
        return {0: _unslice_strided(tape, node, dy, axes[0])}
    zero = tape.int64([0])
    left, right = [zero] * rank, [zero] * rank
    for position, axis in enumerate(axes):
        whole = tape.size_of(x, axis)
        left[axis] = _start(tape, starts, position, whole)
        # Bounds that are data may have been the same in both profile runs by chance.
        settled = "starts" in node.attrs or all(tape.constant(name) is not None for name in node.inputs[1:3])
        taken = tape.size_of(y, axis) if settled else tape.op("Gather", tape.shape_of(y), tape.int64([axis]), axis=0)
        right[axis] = _minus(tape, _minus(tape, whole, left[axis]), taken)
    return {0: _pad(tape, dy, left, right)}


def _slice_arguments(tape: Tape, node: Node, rank: int) -> tuple[np.ndarray | str, list[int], list[int]]:
    """(starts as values or, if they vary, as a tensor, axes, steps)."""
    if "starts" in node.attrs:
        starts = np.array(node.attrs["starts"])
        axes = list(node.attrs.get("axes", range(len(starts))))
        return starts, [int(axis) % rank for axis in axes], [1] * len(axes)
    values = [tape.constant(name) if name else None for name in node.inputs[1:]]
    count = tape.dims(node.inputs[1])[0][0]
    if any(name and value is None for name, value in zip(node.inputs[3:], values[2:], strict=True)):
        raise MissingGradient(node, "axes or steps are not constant")
    named = values[2] if len(values) > 2 and values[2] is not None else range(count)
    steps = values[3] if len(values) > 3 and values[3] is not None else [1] * count
    return values[0] if values[0] is not None else node.inputs[1], [int(axis) % rank for axis in named], [int(step) for step in steps]


def _start(tape: Tape, starts: np.ndarray | str, position: int, whole: str) -> str:
    """First index taken, as int64 [1]: negative counts from the end, and everything is clamped to the axis."""
    if not isinstance(starts, str) and starts[position] == 0:
        return tape.int64([0])
    size = tape.known(whole)
    if not isinstance(starts, str):
        start = int(starts[position])
        if size is not None:
            return tape.int64([min(max(start + size if start < 0 else start, 0), size)])
        # Against a dynamic size the clamp is left to the runtime.
        if start > 0:
            return _smaller(tape, tape.int64([start]), whole)
        return _at_least_zero(tape, tape.op("Add", tape.int64([max(start, -(2**40))]), whole))
    given = tape.op("Gather", starts, tape.int64([position]), axis=0)
    counted = tape.op("Where", tape.op("Less", given, tape.int64([0])), tape.op("Add", given, whole), given)
    return _smaller(tape, _at_least_zero(tape, counted), whole)


def _smaller(tape: Tape, left: str, right: str) -> str:
    """Min of two integer tensors, in operators that take integers at every opset."""
    return tape.op("Where", tape.op("Less", left, right), left, right)


def _at_least_zero(tape: Tape, tensor: str) -> str:
    zero = tape.int64([0])
    return tape.op("Where", tape.op("Less", tensor, zero), zero, tensor)


def _minus(tape: Tape, left: str, right: str) -> str:
    a, b = tape.known(left), tape.known(right)
    return tape.int64([a - b]) if a is not None and b is not None else tape.op("Sub", left, right)


def _pad(tape: Tape, tensor: str, left: list[str], right: list[str]) -> str:
    known = [tape.known(name) for name in (*left, *right)]
    if all(value is not None for value in known):
        return tape.op("Pad", tensor, tape.int64([value for value in known if value is not None]))
    return tape.op("Pad", tensor, tape.op("Concat", *left, *right, axis=0))


def _unslice_strided(tape: Tape, node: Node, dy: str, axis: int) -> str:
    """Slice the positions of the axis the same way, and scatter to them."""
    x = node.inputs[0]
    whole = tape.squeeze(tape.size_of(x, axis), 0)
    positions = tape.op("Range", tape.int64(0), whole, tape.int64(1))
    taken = tape.op("Slice", positions, *node.inputs[1:3], tape.int64([0]), node.inputs[4])
    return _scatter_axis(tape, node, dy, taken, axis)


def _scatter_axis(tape: Tape, node: Node, dy: str, indices: str, axis: int) -> str:
    x = node.inputs[0]
    ones = [1] * tape.rank(x)
    ones[axis] = -1
    spread = tape.op("Expand", tape.op("Reshape", indices, tape.int64(ones)), tape.shape_of(dy))
    return tape.op("ScatterElements", tape.zeros(tape.shape_of(x), like=x), spread, dy, axis=axis)


@rule("Gather")
def gather(tape: Tape, node: Node, dy: str) -> Adjoints:
    x, indices = node.inputs
    rank = tape.rank(x)
    axis = int(node.attrs.get("axis", 0)) % rank
    picked = tape.constant(indices)
    if picked is not None and picked.size == 1:
        return {0: _ungather_one(tape, dy, x, picked, axis)}
    return {0: _ungather_many(tape, dy, x, indices, axis)}


def _ungather_one(tape: Tape, dy: str, x: str, picked: np.ndarray, axis: int) -> str:
    """One position, such as the first token of a sequence: zeros on both sides of it."""
    rank = tape.rank(x)
    if picked.ndim != 1:
        dy = tape.unsqueeze(dy, axis) if picked.ndim == 0 else tape.squeeze(dy, *range(axis + 1, axis + picked.ndim))
    whole = tape.size_of(x, axis)
    one, zero, index = tape.int64([1]), tape.int64([0]), int(picked.reshape(()))
    left, right = [zero] * rank, [zero] * rank
    if index >= 0:
        left[axis] = tape.int64([index])
        right[axis] = _minus(tape, _minus(tape, whole, one), left[axis])
    else:
        right[axis] = tape.int64([-1 - index])
        left[axis] = _minus(tape, _minus(tape, whole, one), right[axis])
    return _pad(tape, dy, left, right)


def _ungather_many(tape: Tape, dy: str, x: str, indices: str, axis: int) -> str:
    """Any indices: a product with their one-hot matrix adds up repeats, at every opset."""
    rank, width = tape.rank(x), tape.rank(indices)
    flat = tape.op("Reshape", indices, tape.int64([-1]))
    if tape.type_of(indices) not in (None, 7):
        flat = tape.op("Cast", flat, to=7)
    hot = tape.op("OneHot", flat, tape.size_of(x, axis), tape.int64([0, 1]), axis=-1)
    hot = tape.op("Cast", hot, to=tape.type_of(x) or 1)
    shape = tape.shape_of(dy)
    before = tape.op("Slice", shape, tape.int64([0]), tape.int64([axis]), tape.int64([0]))
    after = tape.op("Slice", shape, tape.int64([axis + width]), tape.int64([2**31]), tape.int64([0]))
    grouped = tape.op("Reshape", dy, tape.op("Concat", before, tape.shape_of(flat), after, axis=0))
    to_last = [*(other for other in range(rank) if other != axis), axis]
    moved = tape.op("MatMul", tape.op("Transpose", grouped, perm=to_last), hot)
    return tape.op("Transpose", moved, perm=[to_last.index(other) for other in range(rank)])


@rule("GatherElements")
def gather_elements(tape: Tape, node: Node, dy: str) -> Adjoints:
    _require_scatter_add(tape, node)
    x, indices = node.inputs
    zeros = tape.zeros(tape.shape_of(x), like=x)
    return {0: tape.op("ScatterElements", zeros, indices, dy, axis=int(node.attrs.get("axis", 0)), reduction="add")}


@rule("GatherND")
def gather_nd(tape: Tape, node: Node, dy: str) -> Adjoints:
    _require_scatter_add(tape, node)
    if int(node.attrs.get("batch_dims", 0)):
        raise MissingGradient(node, "batch_dims is not 0")
    x, indices = node.inputs
    return {0: tape.op("ScatterND", tape.zeros(tape.shape_of(x), like=x), indices, dy, reduction="add")}


@rule("TopK")
def top_k(tape: Tape, node: Node, dy: str) -> Adjoints:
    """The largest values go back to where they were found (routers of experts); the rest of the axis gets nothing."""
    nothing = tape.zeros(tape.shape_of(node.inputs[0]), like=node.inputs[0])
    return {0: tape.op("ScatterElements", nothing, node.outputs[1], dy, axis=int(node.attrs.get("axis", -1)))}


@rule("ScatterElements")
def scatter_elements(tape: Tape, node: Node, dy: str) -> Adjoints:
    """As :func:`scatter_nd`, along one axis."""
    if node.attrs.get("reduction", b"none") != b"none":
        raise MissingGradient(node, "only writing is covered, no reduction")
    indices, updates = node.inputs[1:]
    axis = int(node.attrs.get("axis", 0))
    adjoints = {2: tape.op("GatherElements", dy, indices, axis=axis)} if tape.wants(node, 2) else {}
    if tape.wants(node, 0):
        nothing = tape.zeros(tape.shape_of(updates), like=updates)
        adjoints[0] = tape.op("ScatterElements", dy, indices, nothing, axis=axis)
    return adjoints


@rule("ScatterND")
def scatter_nd(tape: Tape, node: Node, dy: str) -> Adjoints:
    """What is written gets the adjoint of its places; what is overwritten gets none. Places are taken to be written once."""
    reduction = node.attrs.get("reduction", b"none")
    if reduction not in (b"none", b"add"):
        raise MissingGradient(node, f"reduction {reduction.decode()} is not covered")
    indices, updates = node.inputs[1:]
    adjoints = {2: tape.op("GatherND", dy, indices)} if tape.wants(node, 2) else {}
    if tape.wants(node, 0):
        nothing = tape.zeros(tape.shape_of(updates), like=updates)
        adjoints[0] = dy if reduction == b"add" else tape.op("ScatterND", dy, indices, nothing)
    return adjoints


def _require_scatter_add(tape: Tape, node: Node) -> None:
    if tape.opset < _SCATTER_ADD_FROM:
        raise MissingGradient(node, f"adding up repeated indices needs opset {_SCATTER_ADD_FROM}, the model has {tape.opset}")
