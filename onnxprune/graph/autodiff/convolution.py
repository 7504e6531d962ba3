"""Convolutions, pooling, interpolation and batch norms: adjoints of their activations.

Weights have none, biases do. The adjoint of a convolution is the transposed one; at stride 1 that is again a convolution with the window
turned round, which runtimes compute much faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import TensorProto

from onnxprune.graph.autodiff.rules import Adjoints, MissingGradient, Tape, rule
from onnxprune.graph.view import Node


@dataclass(frozen=True)
class _Window:
    """Geometry over the places of an image; one entry per axis."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]

    @property
    def extent(self) -> list[int]:
        """Places that one window spans."""
        return [dilation * (size - 1) + 1 for size, dilation in zip(self.kernel, self.dilations, strict=True)]


def _window(tape: Tape, node: Node, kernel: Sequence[int]) -> _Window:
    count = len(kernel)
    strides = list(node.attrs.get("strides", [1] * count))
    dilations = list(node.attrs.get("dilations", [1] * count))
    pads = list(node.attrs.get("pads", [0] * (2 * count)))
    window = _Window(list(kernel), strides, dilations, pads[:count], pads[count:])
    auto = node.attrs.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        for axis in range(count):
            missing = _same_padding(tape, node, window, axis)
            large, small = missing - missing // 2, missing // 2
            window.before[axis], window.after[axis] = (small, large) if auto == b"SAME_UPPER" else (large, small)
    return window


def _same_padding(tape: Tape, node: Node, window: _Window, axis: int) -> int:
    sizes = {dims[2 + axis] for dims in tape.dims(node.inputs[0])}
    found = {max((-(-size // window.strides[axis]) - 1) * window.strides[axis] + window.extent[axis] - size, 0) for size in sizes}
    if len(found) > 1:
        raise MissingGradient(node, "its padding depends on the size of the image")
    return found.pop()


@rule("Conv")
def conv(tape: Tape, node: Node, dy: str) -> Adjoints:
    if tape.wants(node, 1):
        raise MissingGradient(node, "its weights depend on a mask or are trained")
    adjoints = {}
    if tape.wants(node, 2):
        places = [axis for axis in range(tape.rank(node.outputs[0])) if axis != 1]
        adjoints[2] = tape.reduce("ReduceSum", dy, places, keepdims=False)
    if tape.wants(node, 0):
        weight = node.inputs[1]
        window = _window(tape, node, tape.dims(weight)[0][2:])
        adjoints[0] = _spread(tape, node.inputs[0], dy, weight, window, int(node.attrs.get("group", 1)))
    return adjoints


def _spread(tape: Tape, x: str, dy: str, weight: str, window: _Window, groups: int) -> str:
    """Adjoint of ``x`` [batch, in, places...] for dy [batch, out, places...] and weights [out, in / groups, window]."""
    if all(stride == 1 for stride in window.strides):
        pads = [extent - 1 - pad for extent, pad in zip(window.extent, window.before, strict=True)]
        pads += [extent - 1 - pad for extent, pad in zip(window.extent, window.after, strict=True)]
        if min(pads) >= 0:
            turned = _turned(tape, weight, groups)
            return tape.op("Conv", dy, turned, pads=pads, dilations=window.dilations, group=groups, kernel_shape=window.kernel)
    # The last places of an image may be in no window: make more than there are, and cut.
    extra = [stride - 1 for stride in window.strides]
    full = tape.op(
        "ConvTranspose",
        dy,
        weight,
        strides=window.strides,
        dilations=window.dilations,
        group=groups,
        kernel_shape=window.kernel,
        output_padding=extra,
    )
    for axis, (pad, last) in enumerate(zip(window.before, window.after, strict=True)):
        if pad or last or extra[axis]:
            size = tape.size_of(x, 2 + axis)
            known = tape.known(size)
            end = tape.int64([pad + known]) if known is not None else tape.op("Add", size, tape.int64([pad]))
            full = tape.slice(full, 2 + axis, tape.int64([pad]), end)
    return full


def _turned(tape: Tape, weight: str, groups: int) -> str:
    """Weights [out, in / groups, window] as those of the adjoint, [in, out / groups, window], the window turned round."""
    outputs, inputs, *kernel = tape.dims(weight)[0]
    rank = len(kernel) + 2
    if groups > 1:
        apart = tape.op("Reshape", weight, tape.int64([groups, outputs // groups, inputs, *kernel]))
        swapped = tape.op("Transpose", apart, perm=[0, 2, 1, *range(3, rank + 1)])
        weight = tape.op("Reshape", swapped, tape.int64([groups * inputs, outputs // groups, *kernel]))
    else:
        weight = tape.op("Transpose", weight, perm=[1, 0, *range(2, rank)])
    wide = [axis for axis in range(2, rank) if kernel[axis - 2] > 1]
    if not wide:
        return weight
    count = len(wide)
    ends = tape.int64([-(2**31)] * count)
    return tape.op("Slice", weight, tape.int64([-1] * count), ends, tape.int64(wide), tape.int64([-1] * count))


@rule("ConvTranspose")
def conv_transpose(tape: Tape, node: Node, dy: str) -> Adjoints:
    """The convolution of which it is the adjoint."""
    if tape.wants(node, 1) or tape.wants(node, 2):
        raise MissingGradient(node, "its weights depend on a mask")
    if node.attrs.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or "output_shape" in node.attrs:
        raise MissingGradient(node, "only explicit padding is covered")
    names = ("strides", "pads", "dilations", "group")
    return {0: tape.op("Conv", dy, node.inputs[1], **{name: node.attrs[name] for name in names if name in node.attrs})}


@rule("BatchNormalization")
def batch_normalization(tape: Tape, node: Node, dy: str) -> Adjoints:
    """At inference it is a scale per channel."""
    if int(node.attrs.get("training_mode", 0)):
        raise MissingGradient(node, "it is in training mode")
    variance = tape.op("Add", node.inputs[4], tape.scalar(float(node.attrs.get("epsilon", 1e-5)), node.inputs[4]))
    scale = tape.op("Div", node.inputs[1], tape.op("Sqrt", variance))
    shape = [-1, *[1] * (tape.rank(node.inputs[0]) - 2)]
    return {0: tape.op("Mul", dy, tape.op("Reshape", scale, tape.int64(shape)))}


# --- pooling -----------------------------------------------------------------------------------------------------------------------


@rule("MaxPool")
def max_pool(tape: Tape, node: Node, dy: str) -> Adjoints:
    """The forward pass says which place won.

    MaxUnpool puts values there but does not add where windows overlap, so the windows are taken in turns that do not.
    """
    if int(node.attrs.get("storage_order", 0)):
        raise MissingGradient(node, "only row-major indices are covered")
    x, outputs = node.inputs[0], node.proto.output
    if len(outputs) < 2:
        outputs.append(tape.fresh("winners"))
    winners = outputs[1]
    window = _window(tape, node, node.attrs["kernel_shape"])
    count = len(window.kernel)
    turns = [-(-extent // stride) for extent, stride in zip(window.extent, window.strides, strict=True)]
    parts = []
    for turn in np.ndindex(*turns):
        values, places = dy, winners
        for axis, (start, step) in enumerate(zip(turn, turns, strict=True)):
            if step > 1:
                bounds = tape.int64([start]), tape.int64([2**31])
                values, places = (tape.slice(name, 2 + axis, *bounds, step=step) for name in (values, places))
        unit = [1] * count
        parts.append(tape.op("MaxUnpool", values, places, tape.shape_of(x), kernel_shape=unit, strides=unit))
    return {0: tape.op("Sum", *parts) if len(parts) > 1 else parts[0]}


@rule("AveragePool")
def average_pool(tape: Tape, node: Node, dy: str) -> Adjoints:
    x = node.inputs[0]
    window = _window(tape, node, node.attrs["kernel_shape"])
    padded = any(window.before) or any(window.after)
    if _covers_all(tape, x, window) and not padded:
        return global_average_pool(tape, node, dy)
    if int(node.attrs.get("ceil_mode", 0)) and not _fits(tape, x, window):
        raise MissingGradient(node, "windows that reach over the edge (ceil_mode) are not covered")
    area = prod(window.kernel)
    channels = {dims[1] for dims in tape.dims(x)}
    if len(channels) > 1:
        raise MissingGradient(node, "the number of channels varies")
    width = channels.pop()
    ones = tape.array(np.ones((width, 1, *window.kernel), np.float32))
    share = tape.scaled(dy, 1 / area, x)
    if padded and not int(node.attrs.get("count_include_pad", 0)):
        names = ("kernel_shape", "strides", "pads", "dilations", "auto_pad")
        attributes = {name: node.attrs[name] for name in names if name in node.attrs}
        full = tape.constant_of(1.0, tape.shape_of(x), x)
        share = tape.op("Div", share, tape.op("AveragePool", full, count_include_pad=1, **attributes))
    return {0: _spread(tape, x, share, ones, window, width)}


def _covers_all(tape: Tape, x: str, window: _Window) -> bool:
    """Whether one window holds the whole image, however far it reaches over its edge (EfficientNet)."""
    sizes = [tape.known(tape.size_of(x, 2 + axis)) for axis in range(len(window.extent))]
    return all(size is not None and size <= extent for size, extent in zip(sizes, window.extent, strict=True))


def _fits(tape: Tape, x: str, window: _Window) -> bool:
    """Whether the windows end where the image does, whose size must be known for that."""
    for axis, extent in enumerate(window.extent):
        size = tape.known(tape.size_of(x, 2 + axis))
        if size is None or (size + window.before[axis] + window.after[axis] - extent) % window.strides[axis]:
            return False
    return True


@rule("GlobalAveragePool")
def global_average_pool(tape: Tape, node: Node, dy: str) -> Adjoints:
    x = node.inputs[0]
    share = dy
    for axis in range(2, tape.rank(x)):
        size = tape.size_of(x, axis)
        fixed = tape.known(size)
        share = tape.scaled(share, 1 / fixed, x) if fixed else tape.op("Div", share, tape.op("Cast", size, to=tape.type_of(x) or 1))
    return {0: tape.op("Expand", share, tape.shape_of(x))}


@rule("GlobalMaxPool")
def global_max_pool(tape: Tape, node: Node, dy: str) -> Adjoints:
    """Ties share the adjoint evenly."""
    x = node.inputs[0]
    winners = tape.op("Cast", tape.op("Equal", x, node.outputs[0]), to=tape.type_of(x) or TensorProto.FLOAT)
    count = tape.reduce("ReduceSum", winners, range(2, tape.rank(x)), keepdims=True)
    return {0: tape.op("Mul", winners, tape.op("Div", dy, count))}


# --- places ------------------------------------------------------------------------------------------------------------------------


@rule("Resize", "Upsample")
def resize(tape: Tape, node: Node, dy: str) -> Adjoints:
    """Interpolation is one matrix per axis of places: the adjoint takes the other side of each.

    Nearest neighbours by whole factors need none: every place gets what its copies get.
    """
    x = node.inputs[0]
    before, after = tape.dims(x), tape.dims(node.outputs[0])
    changed = [axis for axis in range(tape.rank(x)) if any(old[axis] != new[axis] for old, new in zip(before, after, strict=True))]
    if any(axis < 2 for axis in changed) or "axes" in node.attrs or node.attrs.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise MissingGradient(node, "only places of an image are covered, one size or scale for each axis")
    if node.attrs.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise MissingGradient(node, "crops of regions are not covered")
    factors = [new // old for old, new in zip(before[0], after[0], strict=True)]
    whole = all(old * factor == new for dims in zip(before, after, strict=True) for old, new, factor in zip(*dims, factors, strict=True))
    if node.attrs.get("mode", b"nearest") == b"nearest" and whole and _copies(node, factors):
        window = factors[2:]
        return {0: tape.scaled(tape.op("AveragePool", dy, kernel_shape=window, strides=window), float(prod(window)), x)}
    for axis in changed:
        dy = _along(tape, dy, axis, tape.rank(x), _interpolation(tape, node, axis))
    return {0: dy}


def _interpolation(tape: Tape, node: Node, axis: int) -> str:
    """[size before, size after]: what the operator makes, along one axis, of every unit vector. Whatever its mode is, it is linear."""
    x, rank, one = node.inputs[0], tape.rank(node.inputs[0]), tape.int64([1])
    size, resized = tape.size_of(x, axis), tape.size_of(node.outputs[0], axis)

    def alone(value: str, other: str) -> list[str]:
        return [value if place == axis else other for place in range(2, rank)]

    units = tape.op("EyeLike", tape.constant_of(1.0, tape.op("Concat", size, size, axis=0), x))
    images = tape.op("Reshape", units, tape.op("Concat", size, one, *alone(size, one), axis=0))
    operands = list(node.inputs[1:])
    if len(operands) > 2 and operands[2]:
        operands[2] = tape.op("Concat", size, one, *alone(resized, one), axis=0)
    else:
        slot = 1 if len(operands) > 1 else 0
        same = tape.array(np.ones(1, np.float32))
        scale = tape.op("Gather", operands[slot], tape.int64([axis]), axis=0)
        operands[slot] = tape.op("Concat", same, same, *alone(scale, same), axis=0)
    made = tape.op(node.op, images, *operands, **node.attrs)
    return tape.op("Reshape", made, tape.op("Concat", size, resized, axis=0))


def _along(tape: Tape, dy: str, axis: int, rank: int, matrix: str) -> str:
    """``dy`` with the places of an axis, [after] in the matrix, summed to [before]."""
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    product = tape.op("MatMul", tape.transpose(dy, order), tape.transpose(matrix, [1, 0]))
    return tape.transpose(product, order)


def _copies(node: Node, factors: list[int]) -> bool:
    """Whether nearest neighbours by whole factors are plain copies; rounding at other places would take a neighbour's neighbour."""
    if node.op == "Upsample":
        return True
    where = node.attrs.get("coordinate_transformation_mode", b"half_pixel")
    rounding = node.attrs.get("nearest_mode", b"round_prefer_floor")
    if where == b"asymmetric":
        return bool(rounding == b"floor" or (max(factors) == 2 and rounding == b"round_prefer_floor"))
    return where in (b"half_pixel", b"pytorch_half_pixel") and rounding in (b"round_prefer_floor", b"round_prefer_ceil")


@rule("DepthToSpace")
def depth_to_space(tape: Tape, node: Node, dy: str) -> Adjoints:
    size = int(node.attrs["blocksize"])
    gathered = tape.op("SpaceToDepth", dy, blocksize=size)
    if node.attrs.get("mode", b"DCR") != b"CRD":
        return {0: gathered}
    channels = tape.dims(node.outputs[0])[0][1]
    order = np.arange(channels * size * size).reshape(size * size, channels).T.reshape(-1)
    return {0: tape.op("Gather", gathered, tape.int64(order.tolist()), axis=1)}


@rule("SpaceToDepth")
def space_to_depth(tape: Tape, node: Node, dy: str) -> Adjoints:
    return {0: tape.op("DepthToSpace", dy, blocksize=int(node.attrs["blocksize"]), mode="DCR")}
