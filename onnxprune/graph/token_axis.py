"""Where tokens may leave a graph: tensors that all features pass through, and everything behind them that has an axis of tokens.

The same rules of axes that find heads and neurons (:mod:`onnxprune.graph.axis_rules`) carry the axis of tokens forwards from the first
attention. What meets it from the side, masks and tables of positions, has to follow; what treats tokens by their places, a grid or a
window, forbids it, unless that is done behind the last block: there all tokens can be back (:mod:`onnxprune.graph.token_return`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from onnx import helper

from onnxprune.errors import Refusal
from onnxprune.graph.axis_links import Barrier, Regroup, Shapes, Tie
from onnxprune.graph.axis_rules import MEASURES, links, slice_ranges
from onnxprune.graph.clean import without_dead
from onnxprune.graph.profile import Profile, synthetic_feeds
from onnxprune.graph.view import GraphView, Node
from onnxprune.runtime.session import open_session, run

_POOLS = frozenset({"ReduceMean", "ReduceSum"})
_SIZED = frozenset({"Reshape", "Expand"})
"""Operators that are told the sizes of what they make."""


@dataclass(frozen=True)
class Along:
    """What an axis holds: all tokens from ``start`` on. ``factors``: the sizes, in both runs, that are merged into it, tokens at ``at``."""

    start: int = 0
    factors: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    at: int = 0


@dataclass(frozen=True)
class Place:
    """A tensor [B, N, C] behind an attention that all features pass through, and the Softmax of that attention."""

    tensor: str
    softmax: Node


@dataclass(frozen=True, eq=False)
class TokenAxis:
    """The axis of tokens in the part of the graph behind the first place.

    Attributes:
        places: where tokens may leave, in order.
        along: what every axis of tokens holds, by (tensor, axis).
        sides: tensors from elsewhere that meet the features along tokens, with their axes of tokens.
        leading: how many of the first tokens somebody reads by their place; they always stay.
        pools: reductions over tokens, by node index, with the axis.
        attentions: nodes (Softmax over tokens) by index.
        count: number of tokens if it is fixed.
        returned: the tensor [B, N, C] in which all tokens are back, because what is behind needs a row for each; None if nothing does.
    """

    places: tuple[Place, ...]
    along: dict[tuple[str, int], Along]
    sides: dict[str, tuple[int, ...]]
    leading: int
    pools: dict[int, int]
    attentions: frozenset[int]
    count: int | None
    returned: str | None = None
    region: frozenset[int] = field(repr=False, default=frozenset())

    def axes(self, tensor: str) -> tuple[int, ...]:
        """Axes of a tensor that hold tokens."""
        return tuple(sorted(axis for name, axis in self.along if name == tensor))


class _Forbidden(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


def token_axis(view: GraphView, profile: Profile) -> TokenAxis | Refusal:
    """Find the places, or say why no token can leave."""
    try:
        places = find_places(view, profile)
        if not places:
            raise _Forbidden("OP702", "no attention is followed by one tensor [batch, tokens, width] that all features pass through")
        try:
            return _Flow(view, profile, places).run()
        except _Forbidden as found:
            returning = _returning(view, profile, places, found)
            if returning is None:
                raise
            return returning
    except _Forbidden as found:
        return Refusal(found.code, "tokens", found.reason)


def _returning(view: GraphView, profile: Profile, places: tuple[Place, ...], needed: _Forbidden) -> TokenAxis | None:
    """The axis between the first place and the last sum of the residual stream, in which all tokens are back; None if they are one.

    Raises:
        _Forbidden: tokens are told apart in front of it, or may not know of later ones: which of them leave would tell.
    """
    end = _last_sum(view, profile, places[-1])
    inner = tuple(place for place in places if place.tensor != end)
    if not inner:
        return None
    axis = _Flow(view, profile, inner, end, _Flow(view, profile, (Place(end, places[-1].softmax),)).read_by_place()).run()
    maps = [view.nodes[index].outputs[0] for index in sorted(axis.attentions | {place.softmax.index for place in inner})]
    if _one_way(view, maps):
        raise _Forbidden("OP703", f"{needed}, and tokens that may not know of later ones") if needed.code == "OP703" else needed
    return axis


def _last_sum(view: GraphView, profile: Profile, place: Place) -> str:
    """The last tensor of the residual stream that all features pass through: behind it a head begins, whose features are others."""
    shape = profile.shape(place.tensor)
    behind = values_behind(view, [place.tensor])
    for index in sorted(behind, reverse=True):
        node = view.nodes[index]
        summands = [name for name in node.inputs if profile.shape(name) == shape and not view.is_constant(name)]
        if node.op in ("Add", "Sum") and len(summands) > 1 and profile.shape(node.outputs[0]) == shape and _all_behind(view, node, behind):
            return node.outputs[0]
    return place.tensor


def _all_behind(view: GraphView, node: Node, behind: set[int]) -> bool:
    """Whether nothing reads values made behind the place and not behind this node, but through this node."""
    later = values_behind(view, node.outputs)
    earlier = {name for index in behind - later - {node.index} for name in view.nodes[index].outputs}
    return not earlier.intersection(view.graph_outputs) and not any(
        earlier.intersection(view.nodes[index].inputs) for index in later if view.nodes[index].op not in MEASURES
    )


def _one_way(view: GraphView, maps: list[str]) -> bool:
    """Whether in any of these attention maps no token sees a later one."""
    proto = view.model.copy_proto()
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in maps)
    model = without_dead(view.model.with_proto(proto))
    return any(not np.triu(table, 1).any() for table in run(open_session(model), synthetic_feeds(model)))


def values_behind(view: GraphView, names: Iterable[str]) -> set[int]:
    """Nodes whose values depend on those of ``names``. A size is not a value."""
    found: set[int] = set()
    pending = list(names)
    while pending:
        for node, _ in view.consumers.get(pending.pop(), ()):
            if node.index not in found and node.op not in MEASURES:
                found.add(node.index)
                pending.extend(node.outputs)
    return found


def find_places(view: GraphView, profile: Profile) -> tuple[Place, ...]:
    """After each attention of tokens among themselves, the first tensor that separates what comes behind it from the features before."""
    maps = [node for node in view.nodes if node.op == "Softmax" and _is_square(profile, node.outputs[0])]
    reach = {node.index: values_behind(view, node.outputs) for node in maps}
    mixed: set[int] = set().union(*reach.values()) if reach else set()
    places: list[Place] = []
    for node in maps:
        later = {index for other in maps if other.index in reach[node.index] for index in (*reach[other.index], other.index)}
        for index in sorted(reach[node.index] - later):
            candidate = view.nodes[index]
            if candidate.op in ("Add", "Sum") and _separates(view, profile, candidate.outputs[0], mixed, profile.shape(node.outputs[0])):
                places.append(Place(candidate.outputs[0], node))
                break
    return tuple(places)


def _is_square(profile: Profile, tensor: str) -> bool:
    shapes = [run.get(tensor, ()) for run in profile.shapes]
    return all(len(shape) in (3, 4) and shape[-1] == shape[-2] > 1 for shape in shapes)


def _separates(view: GraphView, profile: Profile, tensor: str, mixed: set[int], scores: tuple[int, ...] | None) -> bool:
    shape = profile.shape(tensor)
    if shape is None or len(shape) != 3 or scores is None or shape[1] != scores[-1] or tensor in view.graph_outputs:
        return False
    behind = values_behind(view, [tensor])
    for index in behind:
        for name in view.nodes[index].inputs:
            maker = view.producer.get(name)
            if not name or name == tensor or maker is None or maker.index in behind or view.is_constant(name):
                continue
            if maker.index in mixed and maker.op not in MEASURES and profile.shapes[0].get(name, ()) and name not in profile.integers[0]:
                return False
            if profile.shape(name) == shape:
                return False
    return True


class _Flow:
    """Carries the axis of tokens through the region behind the first place."""

    def __init__(self, view: GraphView, profile: Profile, places: tuple[Place, ...], end: str | None = None, leading: int = 0) -> None:
        """
        Args:
            end: where the region ends; everything behind it sees all tokens.
            leading: how many tokens are read by their places behind it.
        """
        self.view, self.profile, self.places, self.end = view, profile, places, end
        self.region = values_behind(view, [places[0].tensor]) - (values_behind(view, [end]) if end else set())
        self.along: dict[tuple[str, int], Along] = {}
        self.sides: dict[str, set[int]] = {}
        self.pools: dict[int, int] = {}
        self.attentions: set[int] = set()
        self.leading = leading
        self.pending: list[tuple[str, int]] = []

    def run(self) -> TokenAxis:
        self._walk(strict=True)
        outputs = sorted(name for name, _ in self.along if name in self.view.graph_outputs and name != self.end)
        if outputs:
            raise _Forbidden("OP703", f"output {outputs[0]} has a row for each token")
        count = self.profile.dim(self.places[0].tensor, 1)
        if count is not None and 2 * self.leading > count:
            raise _Forbidden("OP704", f"{self.leading} of {count} tokens are read by their places")
        return TokenAxis(
            places=tuple(place for place in self.places if self.along.get((place.tensor, 1)) == Along()),
            along=self.along,
            sides={name: tuple(sorted(axes)) for name, axes in self.sides.items()},
            leading=self.leading,
            pools=self.pools,
            attentions=frozenset(self.attentions),
            count=count,
            returned=self.end,
            region=frozenset(self.region),
        )

    def read_by_place(self) -> int:
        """How many first tokens are read by their places, as far as the axis can be followed."""
        self._walk(strict=False)
        return self.leading

    def _walk(self, strict: bool) -> None:
        self._mark(self.places[0].tensor, 1, Along())
        while self.pending:
            tensor, axis = self.pending.pop()
            touching = [node for node, _ in self.view.consumers.get(tensor, ())]
            maker = self.view.producer.get(tensor)
            for node in dict.fromkeys([*touching, *([maker] if maker is not None else [])]):
                if node.index in self.region:
                    try:
                        self._pass(node, tensor, axis)
                    except _Forbidden:
                        if strict:
                            raise

    def _mark(self, tensor: str, axis: int, along: Along) -> None:
        known = self.along.get((tensor, axis))
        if known is not None:
            if known != along:
                raise _Forbidden("OP704", f"{tensor} holds tokens in two ways along axis {axis}")
            return
        self.along[tensor, axis] = along
        maker = self.view.producer.get(tensor)
        if tensor != self.places[0].tensor and (maker is None or maker.index not in self.region):
            self.sides.setdefault(tensor, set()).add(axis)
            return  # what made it does not concern us
        self.pending.append((tensor, axis))

    def _pass(self, node: Node, tensor: str, axis: int) -> None:
        """Carry one axis of one operand through a node, in either direction."""
        if node.op in MEASURES:
            return
        along = self.along[tensor, axis]
        shapes = Shapes(self.view, self.profile, node)
        try:
            found = links(node, shapes)
        except LookupError:
            found = None
        here = [slot for slot, name in enumerate(node.inputs) if name == tensor]
        here += [-1 - slot for slot, name in enumerate(node.outputs) if name == tensor]
        for operand in here:
            if not self._follow(node, shapes, found or (), operand, axis, along):
                raise _Forbidden("OP704", f"{node} mixes tokens or picks them by their places")

    def _follow(self, node: Node, shapes: Shapes, found: Iterable[object], operand: int, axis: int, along: Along) -> bool:
        """Whether what the node does along the axis is understood."""
        if node.op == "Softmax" and axis == shapes.rank(0) - 1:
            if along != Along():
                return False
            self.attentions.add(node.index)
            self._mark(node.inputs[0], axis, along)
            self._mark(node.outputs[0], axis, along)
            return True
        if node.op in _POOLS and any(isinstance(link, Barrier) and link.axis == axis for link in found):
            if along.factors is not None:
                return False
            self.pools[node.index] = axis
            return True
        if node.op in ("Gather", "Slice") and (picked := self._picked(node, shapes, axis)) is not None:
            return operand < 0 or self._pick(node, shapes, axis, along, picked)
        if node.op == "Split" and node.attrs.get("axis", 0) % shapes.rank(0) == axis:
            return operand < 0 or self._parted(node, shapes, axis, along)
        if node.op == "Concat" and node.attrs["axis"] % shapes.rank(-1) == axis:
            return operand < 0 or self._joined(node, shapes, operand, axis, along)
        understood = False
        for link in found:
            if isinstance(link, Tie):
                for (a, axis_a), (b, axis_b) in (
                    ((link.a, link.axis_a), (link.b, link.axis_b)),
                    ((link.b, link.axis_b), (link.a, link.axis_a)),
                ):
                    if (a, axis_a) != (operand, axis):
                        continue
                    if link.index_a is not None or link.index_b is not None:
                        return False
                    if link.contracts and self.view.is_constant(shapes.name(b)):
                        return False
                    understood = True
                    self._mark(shapes.name(b), axis_b, along)
            elif isinstance(link, Barrier) and (link.operand, link.axis) == (operand, axis):
                return False
            elif isinstance(link, Regroup) and operand == 0 and axis in link.axes_a:
                if not self._regroup(node, link, axis, along):
                    return False
                understood = True
            elif isinstance(link, Regroup) and operand == -1 and axis in link.axes_b:
                understood = True  # it came from the input
        return understood

    def _picked(self, node: Node, shapes: Shapes, axis: int) -> np.ndarray | None:
        """Positions that a Gather or Slice takes along this axis, if it takes any there."""
        if node.op == "Gather":
            if node.attrs.get("axis", 0) % shapes.rank(0) != axis:
                return None
            indices = shapes.integers(1)
            return None if indices is None else indices.reshape(-1) % shapes.of(0)[axis] if (indices >= 0).all() else np.array([-1])
        ranges = slice_ranges(node, shapes)
        return None if ranges is None else ranges.get(axis)

    def _pick(self, node: Node, shapes: Shapes, axis: int, along: Along, picked: np.ndarray) -> bool:
        """Fixed first tokens stay and are read by place; all but the first few is an axis of tokens again."""
        size = shapes.of(0)[axis]
        if along.factors is not None or not picked.size or picked.min() < 0:
            return False
        if np.array_equal(picked, np.arange(picked[0], size)) and (node.op == "Slice" or self.view.value(node.inputs[1]) is not None):
            self.leading = max(self.leading, along.start + int(picked[0]))
            self._mark(node.outputs[0], axis, Along(along.start + int(picked[0])))
            return True
        other = self.profile.shapes[1][node.inputs[0]][axis]
        if int(picked.max()) >= min(size, other) or (node.op == "Slice" and self.profile.dim(node.outputs[0], axis) is None):
            return False
        self.leading = max(self.leading, along.start + int(picked.max()) + 1)
        return True

    def _parted(self, node: Node, shapes: Shapes, axis: int, along: Along) -> bool:
        """The first few tokens, read by their places, and all others."""
        sizes = [shapes.of(-1 - slot)[axis] for slot in range(len(node.outputs))]
        if along.factors is not None or any(self.profile.dim(name, axis) is None for name in node.outputs[:-1]):
            return False
        start = along.start + sum(sizes[:-1])
        self.leading = max(self.leading, start)
        self._mark(node.outputs[-1], axis, Along(start))
        return True

    def _joined(self, node: Node, shapes: Shapes, operand: int, axis: int, along: Along) -> bool:
        """First tokens, and all others behind them: every token again."""
        before = sum(shapes.of(other)[axis] for other in range(operand))
        if operand != len(node.inputs) - 1 or along.factors is not None or along.start != before:
            return False
        self._mark(node.outputs[0], axis, Along())
        return True

    def _regroup(self, node: Node, link: Regroup, axis: int, along: Along) -> bool:
        """Tokens may be merged with their batch into one axis, and taken apart again; they may not be cut into windows or grids."""
        source, made = node.inputs[0], node.outputs[0]
        before = tuple(tuple(run[source][a] for a in link.axes_a) for run in self.profile.shapes)
        after = tuple(tuple(run[made][b] for b in link.axes_b) for run in self.profile.shapes)
        if along.factors is None and len(link.axes_b) == 1:
            self._mark(made, link.axes_b[0], Along(along.start, (before[0], before[1]), link.axes_a.index(axis)))
            return True
        if along.factors is not None and len(link.axes_a) == 1 and after == along.factors:
            self._mark(made, link.axes_b[along.at], Along(along.start))
            return True
        return False
