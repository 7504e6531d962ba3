"""What each operator does to an axis: one small rule per operator, shared by the tracer and the slicer.

A rule looks at one node and says how positions along the axes of its inputs and outputs belong together. Operands are numbered like the
node's inputs (0, 1, ...) and, for outputs, -1, -2, ... . Whatever a rule does not mention is unknown and stops the tracer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView, Node

Index = np.ndarray


@dataclass(frozen=True, eq=False)
class Tie:
    """Position ``index_a[k]`` of one axis goes with position ``index_b[k]`` of another; None stands for all positions in order.

    ``contracts``: the operator sums over this axis, so a unit that is zero on one side may leave both.
    ``batch``: both axes are batch axes of a product of two activations; that is what makes a unit an attention head.
    """

    a: int
    axis_a: int
    b: int
    axis_b: int
    index_a: Index | None = None
    index_b: Index | None = None
    contracts: bool = False
    batch: bool = False


@dataclass(frozen=True)
class Regroup:
    """The axes ``axes_a`` of input 0, read in row-major order, are the axes ``axes_b`` of output 0."""

    axes_a: tuple[int, ...]
    axes_b: tuple[int, ...]


@dataclass(frozen=True)
class Barrier:
    """Removing positions along this axis would change the result of the operator."""

    operand: int
    axis: int
    reason: str


Link = Tie | Regroup | Barrier


class Shapes:
    """Concrete shapes of one node's operands."""

    def __init__(self, view: GraphView, profile: Profile, node: Node) -> None:
        self.view, self.profile, self.node = view, profile, node

    def name(self, operand: int) -> str:
        names = self.node.inputs if operand >= 0 else self.node.outputs
        position = operand if operand >= 0 else -1 - operand
        return names[position] if position < len(names) else ""

    def of(self, operand: int) -> tuple[int, ...]:
        name = self.name(operand)
        shape = self.profile.shape(name)
        if shape is None:
            array = self.view.value(name)
            if array is None:
                raise LookupError(name)
            shape = array.shape
        return shape

    def rank(self, operand: int) -> int:
        return len(self.of(operand))

    def integers(self, operand: int) -> np.ndarray | None:
        """Values of a small integer operand, if constant in both runs of the profile."""
        name = self.name(operand)
        if not name:
            return None
        array = self.view.value(name)
        if array is not None:
            return np.atleast_1d(array)
        seen = self.profile.constant_elements(name)
        return np.atleast_1d(seen[0]) if seen is not None and bool(np.all(seen[1])) else None


Rule = Callable[[Node, Shapes], Sequence[Link]]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[domain, name] = function
        return function

    return register


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
    """Ties of a numpy-broadcast operand: aligned from the right, axes of size one are free."""
    small, large = s.of(operand), s.of(output)
    offset = len(large) - len(small)
    return [Tie(operand, axis, output, axis + offset) for axis in range(len(small)) if small[axis] == large[axis + offset] != 1]


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
        if axis in ranges:
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


# --- attention ---------------------------------------------------------------------------------------------------------------------


def _heads_of(size: int, heads: int, kv_heads: int) -> Index:
    """Query head of every position of a flattened ``[heads, size / heads]`` axis, in units of key/value heads."""
    return (np.arange(size) // (size // heads)) // (heads // kv_heads)


@rule("Attention")
def _attention(node: Node, s: Shapes) -> list[Link]:
    """Opset 23: Q, K, V as [B, H, S, D] or [B, S, H*D]; heads are tied, query heads in whole groups of their key/value head."""
    if any(s.name(slot) for slot in (4, 5)) or any(s.name(-1 - slot) for slot in (1, 2)):
        return []  # a KV cache is a graph input and output of its own
    heads, kv_heads, flat = attention_heads(node, s)
    axis = 2 if flat else 1
    key_index = np.arange(s.of(1)[axis])
    key_head = _heads_of(key_index.size, kv_heads, kv_heads)
    result: list[Link] = []
    for operand in (0, 2, -1):
        count = kv_heads if operand == 2 else heads
        index = np.arange(s.of(operand)[axis])
        # Ties relate positions; relating every position to the first one of its head in K makes the head the unit.
        first = np.searchsorted(key_head, _heads_of(index.size, count, kv_heads))
        result.append(Tie(operand, axis, 1, axis, index, first, batch=True))
    result.append(Tie(1, axis, 1, axis, key_index, np.searchsorted(key_head, key_head), batch=True))
    result += [Tie(operand, 0, -1, 0) for operand in (0, 1, 2)]
    if s.name(3):
        mask = s.of(3)  # broadcast to [B, H, S, L] from the right
        if len(mask) >= 3 and mask[-3] == heads > 1:
            first = np.searchsorted(key_head, np.arange(heads) // (heads // kv_heads))
            result.append(Tie(3, len(mask) - 3, 1, axis, np.arange(heads), first, batch=True))
    if not flat:
        result += [Tie(0, 3, 1, 3, contracts=True), Tie(2, 3, -1, 3), Tie(0, 2, -1, 2), Tie(1, 2, 2, 2, contracts=True)]
    return result


def attention_heads(node: Node, s: Shapes) -> tuple[int, int, bool]:
    """(query heads, key/value heads, whether heads and head size share one axis) of an opset-23 Attention."""
    if s.rank(0) == 4:
        return s.of(0)[1], s.of(1)[1], False
    return node.attrs["q_num_heads"], node.attrs["kv_num_heads"], True


@rule("MultiHeadAttention", domain="com.microsoft")
def _multi_head_attention(node: Node, s: Shapes) -> list[Link]:
    """Q [B, S, H*D], K [B, L, H*D], V [B, L, H*Dv], bias of all three in a row, optional mask and per-head attention bias."""
    if any(s.name(slot) for slot in range(6, len(node.inputs))) or any(s.rank(slot) != 3 for slot in (0, 1, 2)):
        return []
    heads = node.attrs["num_heads"]
    result: list[Link] = []
    offset = 0
    for operand in (0, 1, 2, -1):
        size = s.of(operand)[2]
        first = _heads_of(size, heads, heads) * (s.of(0)[2] // heads)
        result.append(Tie(operand, 2, 0, 2, np.arange(size), first, batch=True))
        result.append(Tie(operand, 0, 0, 0))
        if operand >= 0 and s.name(3):
            result.append(Tie(3, 0, 0, 2, np.arange(offset, offset + size), first))
            offset += size
    if s.name(5) and s.of(5)[1] == heads > 1:
        result.append(Tie(5, 1, 0, 2, np.arange(heads), np.arange(heads) * (s.of(0)[2] // heads), batch=True))
    return result


@rule("Attention", domain="com.microsoft")
def _packed_attention(node: Node, s: Shapes) -> list[Link]:
    """X [B, S, E], W [E, q|k|v], bias [q|k|v]: the projection is inside the operator."""
    if any(s.name(slot) for slot in (4, 6)) or s.name(-2):
        return []
    heads = node.attrs["num_heads"]
    sizes = packed_sizes(node, s)
    first = np.concatenate([_heads_of(size, heads, heads) for size in sizes]) * (sizes[0] // heads)
    everything = np.arange(sum(sizes))
    result: list[Link] = [Tie(1, 1, 1, 1, everything, first, batch=True), Tie(0, 2, 1, 0, contracts=True)]
    if s.name(2):
        result.append(Tie(2, 0, 1, 1, everything, first))
    size = s.of(-1)[2]
    result.append(Tie(-1, 2, 1, 1, np.arange(size), _heads_of(size, heads, heads) * (sizes[0] // heads), batch=True))
    if s.name(5) and s.of(5)[1] == heads > 1:
        result.append(Tie(5, 1, 1, 1, np.arange(heads), np.arange(heads) * (sizes[0] // heads)))
    return result


def packed_sizes(node: Node, s: Shapes) -> list[int]:
    """Widths of Q, K and V inside the packed weight of a com.microsoft Attention."""
    given = node.attrs.get("qkv_hidden_sizes")
    return list(given) if given else [s.of(1)[1] // 3] * 3


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", domain="com.microsoft")
def _rotary(node: Node, s: Shapes) -> list[Link]:
    shape = s.of(0)
    if len(shape) == 4:
        barrier = Barrier(0, 3, "rotary embedding pairs positions of this axis")
        return [*(Tie(0, axis, -1, axis) for axis in (0, 1, 2)), barrier]
    heads = node.attrs.get("num_heads", 0)
    if not heads:
        return []
    first = _heads_of(shape[2], heads, heads) * (shape[2] // heads)
    paired = [Tie(operand, 2, -1, 2, np.arange(shape[2]), first) for operand in (0, -1)]
    return [*paired, *(Tie(0, axis, -1, axis) for axis in (0, 1))]
