"""The tail of a branch: what its last product passes before it joins the residual stream.

That is biases and scales, perhaps a normalisation, and in networks that attend in windows the way back of the windows to the image.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView, Node

PASSING = frozenset("Identity Cast Dropout Reshape Transpose Squeeze Unsqueeze Flatten".split())
MOVING = frozenset("Slice Split Concat Gather Transpose".split())
"""Operators that put rows elsewhere: windows back to their image, a shifted image back to its place."""
FUSED_RESIDUAL = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
_NORMS = frozenset("LayerNormalization RMSNormalization SimplifiedLayerNormalization".split())
_NORM_PARTS = frozenset("Pow ReduceMean Sqrt Reciprocal Sub".split())
_ARITHMETIC = frozenset("Add Sum Mul Div".split())
MEASURES = frozenset({"Shape", "Size"})
_LONGEST = 32


@dataclass(frozen=True, eq=False)
class Tail:
    """``nodes`` lead from a product to ``end``, which ``join`` adds to the residual stream."""

    nodes: tuple[Node, ...]
    end: str
    join: Node


def follow_tail(view: GraphView, tensor: str, gated: Profile | None = None) -> Tail | None:
    """Everything that is computed from ``tensor`` and constants alone up to the one addition of another activation.

    A normalisation may stand on the way, as one operator or spelled out (Gemma 2 and 3 normalise the result of every sublayer), and rows
    may move (Swin merges windows and rolls the image back). None if something else comes first, or a node reads the tensor for something
    else.

    Args:
        gated: shapes; with them another activation may scale the branch (adaptive norms of diffusion transformers, RWKV, shared experts).
            A branch that is broadcast there is a gate itself, and ends in no sum.
    """
    inside, nodes, exits = {tensor}, [], []
    pending: list[int] = []
    seen: set[int] = set()

    def reach(name: str) -> bool:
        readers = view.consumers.get(name, ())
        if any(slot < 0 for _, slot in readers):
            return False
        for reader, _ in readers:
            if reader.index not in seen:
                seen.add(reader.index)
                heapq.heappush(pending, reader.index)
        return True

    if not reach(tensor):
        return None
    while pending:
        node = view.nodes[heapq.heappop(pending)]  # in topological order: what leads to a node has been seen before it
        operands = node.inputs if node.op == "Concat" or not _passes(node) else node.inputs[:1]  # a target shape is no value
        foreign = [name for name in operands if name and name not in inside and not view.is_constant(name)]
        if node.op in MEASURES:
            continue
        if (foreign and not (gated and _scales(gated, node, foreign))) or not _belongs(node):
            exits.append(node)
            continue
        nodes.append(node)
        inside.update(name for name in node.outputs if name)
        if len(nodes) > _LONGEST or not all(reach(name) for name in node.outputs if name):
            return None
    if len(exits) != 1:
        return None
    (join,) = exits
    ends = [name for name in join.inputs if name in inside]
    activations = [name for name in join.inputs if name and name not in inside and not view.is_constant(name)]
    if len(ends) != 1 or not activations or not (join.op in ("Add", "Sum") or join.op in FUSED_RESIDUAL):
        return None
    return Tail(tuple(nodes), ends[0], join)


def _passes(node: Node) -> bool:
    return node.op in PASSING or node.op in MOVING


def _scales(profile: Profile, node: Node, foreign: Sequence[str]) -> bool:
    """Whether ``node`` multiplies a branch, as wide as the product, by one ``foreign`` activation."""
    shapes = [profile.shape(name) for name in node.inputs if name not in foreign]
    return node.op == "Mul" and len(foreign) == 1 and shapes == [profile.shape(node.outputs[0])]


def sums_of_their_own(view: GraphView, tensors: Iterable[str]) -> list[str]:
    """Additions in which the branches that start at ``tensors`` meet each other and nothing else; the branch goes on there."""
    tails = [tail for name in tensors if (tail := follow_tail(view, name)) is not None]
    ends = {tail.end for tail in tails}
    joins = dict.fromkeys(tail.join for tail in tails)
    return [join.outputs[0] for join in joins if all(name in ends or not name or view.is_constant(name) for name in join.inputs)]


def joins_stream(view: GraphView, profile: Profile, tensors: Sequence[str]) -> bool:
    """Whether all branches that start at ``tensors`` end in a sum with something that none of them computes."""
    if not all(follow_tail(view, name, profile) for name in tensors):
        return False
    met = sums_of_their_own(view, tensors)
    return not met or joins_stream(view, profile, met)


def _belongs(node: Node) -> bool:
    return _passes(node) or node.op in _ARITHMETIC or node.op == "BatchNormalization" or is_norm(node)


def is_norm(node: Node) -> bool:
    """Whether a node is a normalisation or a piece of a spelled-out one."""
    return node.op in _NORMS or node.op in _NORM_PARTS
