"""What each operator does to an axis: one small rule per operator, shared by the tracer and the slicer.

A rule looks at one node and says how positions along the axes of its inputs and outputs belong together. Whatever a rule does not mention
is unknown and stops the tracer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxprune.graph import attention_rules, axis_rules_conv
from onnxprune.graph.axis_links import RULES, Barrier, Link, Regroup, Shapes, Tie, rule
from onnxprune.graph.view import Node

assert attention_rules  # imported so that their rules are registered
assert axis_rules_conv


def links(node: Node, shapes: Shapes) -> Sequence[Link] | None:
    """The links of a node, or None when no rule knows the operator."""
    found = RULES.get((node.domain, node.op))
    return None if found is None else found(node, shapes)


# --- elementwise -------------------------------------------------------------------------------------------------------------------

NONLINEAR = frozenset(
    "Relu Gelu Erf Tanh Sigmoid HardSigmoid HardSwish LeakyRelu Elu Selu Celu Softplus Softsign Mish Swish PRelu ThresholdedRelu "
    "FastGelu BiasGelu QuickGelu Exp Pow Max Min Clip Abs Sqrt Log".split()
)
"""Elementwise operators that make the layer between two matrices more than a product of matrices."""

_UNARY = (
    "Identity Cast CastLike Neg Sqrt Reciprocal Erf Exp Log Tanh Sigmoid Relu Gelu LeakyRelu Elu Selu Celu HardSigmoid HardSwish Softplus "
    "Softsign Mish Swish ThresholdedRelu Abs Sign Floor Ceil Round Not IsNaN IsInf Clip Dropout Sin Cos"
).split()
_NARY = (
    "Add Sub Mul Div Pow Sum Min Max Mean Where And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual Mod PRelu BitwiseAnd BitwiseOr"
).split()


@rule(*_UNARY)
@rule("Gelu", "QuickGelu", domain="com.microsoft")
def _unary(node: Node, s: Shapes) -> list[Link]:
    outputs = [-1 - position for position, name in enumerate(node.outputs) if name]
    return [Tie(0, axis, output, axis) for output in outputs for axis in range(s.rank(0))]


@rule(*_NARY)
@rule("BiasGelu", "FastGelu", domain="com.microsoft")
def _nary(node: Node, s: Shapes) -> list[Link]:
    return [tie for slot, name in enumerate(node.inputs) if name for tie in _broadcast(s, slot, -1)]


def _broadcast(s: Shapes, operand: int, output: int) -> list[Link]:
    """Ties of a numpy-broadcast operand: aligned from the right.

    An axis of size one is free in a constant; in an activation it may be all that is left of a wider one.
    """
    small, large = s.of(operand), s.of(output)
    offset = len(large) - len(small)
    free = s.view.is_constant(s.name(operand))
    equal = (axis for axis in range(len(small)) if small[axis] == large[axis + offset])
    return [Tie(operand, axis, output, axis + offset) for axis in equal if small[axis] != 1 or not free]


# --- products ----------------------------------------------------------------------------------------------------------------------


@rule("MatMul")
def _matmul(node: Node, s: Shapes) -> list[Link]:
    rank_a, rank_b, rank_y = s.rank(0), s.rank(1), s.rank(-1)
    result: list[Link] = [Tie(0, rank_a - 1, 1, max(rank_b - 2, 0), contracts=True)]
    if rank_a > 1:
        result.append(Tie(0, rank_a - 2, -1, rank_y - (2 if rank_b > 1 else 1)))
    if rank_b > 1:
        result.append(Tie(1, rank_b - 1, -1, rank_y - 1))
    activations = not (s.view.is_constant(node.inputs[0]) or s.view.is_constant(node.inputs[1]))
    for operand, rank in ((0, rank_a), (1, rank_b)):
        for axis in range(rank - 2):
            target = axis + rank_y - rank
            if s.of(operand)[axis] == s.of(-1)[target]:
                result.append(Tie(operand, axis, -1, target, batch=activations))
    return result


@rule("Gemm")
def _gemm(node: Node, s: Shapes) -> list[Link]:
    inner_a = 0 if node.attrs.get("transA", 0) else 1
    inner_b = 1 if node.attrs.get("transB", 0) else 0
    result: list[Link] = [Tie(0, inner_a, 1, inner_b, contracts=True), Tie(0, 1 - inner_a, -1, 0), Tie(1, 1 - inner_b, -1, 1)]
    return result + (_broadcast(s, 2, -1) if s.name(2) else [])


@rule("Einsum")
def _einsum(node: Node, s: Shapes) -> list[Link]:
    equation = node.attrs["equation"].decode().replace(" ", "")
    if "." in equation or "->" not in equation:
        return []
    left, right = equation.split("->")
    terms = left.split(",")
    result: list[Link] = []
    for letter in sorted(set(left) - {","}):
        homes = [(operand, term.index(letter)) for operand, term in enumerate(terms) if letter in term]
        if any(term.count(letter) > 1 for term in terms):
            continue
        if letter in right:
            shared = len(homes) > 1 and not any(s.view.is_constant(node.inputs[operand]) for operand, _ in homes)
            result += [Tie(operand, axis, -1, right.index(letter), batch=shared) for operand, axis in homes]
        elif len(homes) > 1:
            (first, axis), *rest = homes
            result += [Tie(first, axis, operand, other, contracts=True) for operand, other in rest]
    return result


# --- shape -------------------------------------------------------------------------------------------------------------------------


@rule("Transpose")
def _transpose(node: Node, s: Shapes) -> list[Link]:
    order = node.attrs.get("perm") or list(reversed(range(s.rank(0))))
    return [Tie(0, source, -1, target) for target, source in enumerate(order)]


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(node: Node, s: Shapes) -> list[Link]:
    name, out = node.inputs[0], node.outputs[0]
    runs = [blocks(run.get(name, s.of(0)), run.get(out, s.of(-1))) for run in s.profile.shapes]
    if runs[0] is None or runs[0] != runs[1]:
        return []
    result: list[Link] = []
    for axes_a, axes_b in runs[0]:
        simple = len(axes_a) == len(axes_b) == 1
        result.append(Tie(0, axes_a[0], -1, axes_b[0]) if simple else Regroup(axes_a, axes_b))
    return result


def blocks(a: Sequence[int], b: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Split two shapes of equal size into the finest consecutive blocks of equal size; axes of size one belong to no block.

    >>> blocks((2, 7, 768), (2, 7, 12, 64))
    [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]
    """
    if math.prod(a) != math.prod(b):
        return None
    left = [axis for axis, size in enumerate(a) if size != 1]
    right = [axis for axis, size in enumerate(b) if size != 1]
    result = []
    while left and right:
        axes_a, axes_b = [left.pop(0)], [right.pop(0)]
        size_a, size_b = a[axes_a[0]], b[axes_b[0]]
        while size_a != size_b:
            if size_a < size_b:
                axes_a.append(left.pop(0))
                size_a *= a[axes_a[-1]]
            else:
                axes_b.append(right.pop(0))
                size_b *= b[axes_b[-1]]
        result.append((tuple(axes_a), tuple(axes_b)))
    return result


@rule("Concat")
def _concat(node: Node, s: Shapes) -> list[Link]:
    axis = node.attrs["axis"] % s.rank(-1)
    result: list[Link] = []
    offset = 0
    for operand in range(len(node.inputs)):
        size = s.of(operand)[axis]
        result.append(Tie(operand, axis, -1, axis, np.arange(size), np.arange(offset, offset + size)))
        result += [Tie(operand, other, -1, other) for other in range(s.rank(-1)) if other != axis]
        offset += size
    return result


@rule("Split")
def _split(node: Node, s: Shapes) -> list[Link]:
    axis = node.attrs.get("axis", 0) % s.rank(0)
    result: list[Link] = []
    offset = 0
    for position, name in enumerate(node.outputs):
        output = -1 - position
        if not name:
            return []
        size = s.of(output)[axis]
        result.append(Tie(0, axis, output, axis, np.arange(offset, offset + size), np.arange(size)))
        result += [Tie(0, other, output, other) for other in range(s.rank(0)) if other != axis]
        offset += size
    return result


@rule("Slice")
def _slice(node: Node, s: Shapes) -> list[Link]:
    ranges = slice_ranges(node, s)
    if ranges is None:
        return []
    result: list[Link] = []
    for axis in range(s.rank(0)):
        if axis in ranges and len(ranges[axis]) < s.of(0)[axis] and s.profile.dim(node.outputs[0], axis) is None:
            result += [Barrier(operand, axis, "Slice takes a part of this axis that varies") for operand in (0, -1)]
        elif axis in ranges:
            picked = ranges[axis]
            result.append(Tie(0, axis, -1, axis, picked, np.arange(len(picked))))
        else:
            result.append(Tie(0, axis, -1, axis))
    return result


def slice_ranges(node: Node, s: Shapes) -> dict[int, np.ndarray] | None:
    """Positions a Slice takes along each axis it names; None when they are not known. A bound that varies makes its axis unknown."""
    rank = s.rank(0)
    if "starts" in node.attrs:
        starts, ends = np.array(node.attrs["starts"]), np.array(node.attrs["ends"])
        axes = np.array(node.attrs.get("axes", range(len(starts))))
        steps = np.ones_like(starts)
    else:
        named = s.integers(3)
        count = len(_seen(s, 1))
        axes = named if named is not None else np.arange(count)
        given = s.integers(4)
        steps = given if given is not None else np.ones(count, np.int64)
        starts, ends = _seen(s, 1), _seen(s, 2)
    if len(starts) != len(axes) or len(ends) != len(axes):
        return None
    shape = s.of(0)
    return {
        int(axis) % rank: np.arange(shape[int(axis) % rank])[slice(int(start), _end(int(end), int(step)), int(step))]
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }


def _seen(s: Shapes, operand: int) -> np.ndarray:
    """Values of an integer operand in the profile's first run."""
    constant = s.integers(operand)
    if constant is not None:
        return constant
    seen = s.profile.constant_elements(s.name(operand))
    return np.zeros(0, np.int64) if seen is None else np.atleast_1d(seen[0])


def _end(end: int, step: int) -> int | None:
    return None if step < 0 and end < -(2**31) + 1 else end


@rule("Gather")
def _gather(node: Node, s: Shapes) -> list[Link]:
    axis = node.attrs.get("axis", 0) % s.rank(0)
    index_rank = s.rank(1)
    result: list[Link] = []
    for other in range(s.rank(0)):
        if other == axis:
            indices = s.integers(1)
            if indices is not None and index_rank == 1:
                result.append(Tie(0, axis, -1, axis, indices % s.of(0)[axis], np.arange(indices.size)))
            else:
                result.append(Barrier(0, axis, "Gather picks positions along this axis"))
        else:
            result.append(Tie(0, other, -1, other if other < axis else other - 1 + index_rank))
    result += [Barrier(1, other, "the axis holds indices") for other in range(index_rank)]
    return result


@rule("GatherElements")
def _gather_elements(node: Node, s: Shapes) -> list[Link]:
    """Every element is picked along one axis; along the others it stays where it is, as far as the indices reach."""
    axis = node.attrs.get("axis", 0) % s.rank(0)
    result: list[Link] = [Tie(1, other, -1, other) for other in range(s.rank(1))]
    for other, (size, taken) in enumerate(zip(s.of(0), s.of(1), strict=True)):
        if other == axis:
            result.append(Barrier(0, axis, "GatherElements picks positions along this axis"))
        elif size == taken:
            result.append(Tie(0, other, -1, other))
        else:
            result.append(Barrier(0, other, "GatherElements takes a part of this axis"))
    return result


@rule("Expand")
def _expand(node: Node, s: Shapes) -> list[Link]:
    tied = _broadcast(s, 0, -1)
    made = set(range(s.rank(-1))) - {link.axis_b for link in tied if isinstance(link, Tie)}
    # An axis that Expand makes has no origin: it may have any length, so it is tied to itself alone.
    return [*tied, *(Tie(-1, axis, -1, axis) for axis in sorted(made))]


@rule("Tile")
def _tile(node: Node, s: Shapes) -> list[Link]:
    result: list[Link] = []
    for axis, (size, total) in enumerate(zip(s.of(0), s.of(-1), strict=True)):
        if size == total:
            result.append(Tie(0, axis, -1, axis))
        elif size > 1:
            result.append(Tie(0, axis, -1, axis, np.arange(total) % size, np.arange(total)))
    return result


@rule("Pad")
def _pad(node: Node, s: Shapes) -> list[Link]:
    pairs = enumerate(zip(s.of(0), s.of(-1), strict=True))
    return [Tie(0, axis, -1, axis) if a == b else Barrier(0, axis, "Pad extends this axis") for axis, (a, b) in pairs]


@rule("Shape", "Size", "ConstantOfShape")
def _shape(node: Node, s: Shapes) -> list[Link]:
    return []


MEASURES = frozenset({"Shape", "Size", "ConstantOfShape"})
"""Operators that read a shape or are made from one; they never stop the tracer, the slicer resets the shapes."""


# --- reductions, normalisations ----------------------------------------------------------------------------------------------------


@rule(*"ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp ArgMax ArgMin".split())
def _reduce(node: Node, s: Shapes) -> list[Link]:
    rank = s.rank(0)
    given = node.attrs.get("axes", node.attrs.get("axis"))
    if given is None and s.name(1):
        values = s.integers(1)
        if values is None:
            return []
        given = values
    if given is None and node.op.startswith("Arg"):
        given = 0
    if given is None:
        reduced = set() if node.attrs.get("noop_with_empty_axes", 0) else set(range(rank))
    else:
        reduced = {int(axis) % rank for axis in np.atleast_1d(given)}
    keep = node.attrs.get("keepdims", 1)
    result: list[Link] = []
    for axis in range(rank):
        if axis in reduced:
            result.append(Barrier(0, axis, f"{node.op} reduces over this axis"))
        else:
            result.append(Tie(0, axis, -1, axis if keep else axis - sum(other < axis for other in reduced)))
    return result


@rule("Softmax", "LogSoftmax", "Hardmax")
def _softmax(node: Node, s: Shapes) -> list[Link]:
    rank = s.rank(0)
    flattens = s.view.model.opset() < 13
    axis = node.attrs.get("axis", 1 if flattens else -1) % rank
    spanned = set(range(axis, rank)) if flattens else {axis}
    barriers = [Barrier(operand, a, f"{node.op} runs over this axis") for a in sorted(spanned) for operand in (0, -1)]
    return [*barriers, *(Tie(0, a, -1, a) for a in range(rank) if a not in spanned)]


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization", "MeanVarianceNormalization")
def _norm(node: Node, s: Shapes) -> list[Link]:
    rank = s.rank(0)
    axis = node.attrs.get("axis", -1) % rank
    spanned = {axis} if node.op == "LpNormalization" else set(range(axis, rank))
    result: list[Link] = [Barrier(0, a, f"{node.op} normalises over this axis") if a in spanned else Tie(0, a, -1, a) for a in range(rank)]
    return result + [Barrier(-1, a, f"{node.op} normalises over this axis") for a in sorted(spanned)]


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain="com.microsoft")
def _skip_norm(node: Node, s: Shapes) -> list[Link]:
    last = s.rank(0) - 1
    reason = f"{node.op} normalises over this axis"
    result: list[Link] = [Barrier(slot, s.rank(slot) - 1, reason) for slot, name in enumerate(node.inputs) if name]
    outputs = [-1 - position for position, name in enumerate(node.outputs) if name]
    result += [Barrier(output, s.rank(output) - 1, reason) for output in outputs]
    return result + [Tie(slot, axis, -1, axis) for slot in (0, 1) for axis in range(last)]
