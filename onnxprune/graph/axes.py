"""The axis tracer: which positions along which axes must go together.

Everything prunable is an axis. A trace starts with one label per position of a seed axis and lets labels flow through the operators,
forwards and backwards, by the rules of :mod:`onnxprune.graph.axis_rules`. Where two labels meet at one position they become one unit (a
key/value head shared by four query heads makes the four one unit). Where an axis is split in two, as [768] into [12, 64], units must be
made coarser, and there are several ways: the trace forks and returns one group per way (whole heads; the same dimension of every head).
Labels stop at constants, which is where a model can be cut, and fail at barriers, which is where it can not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxprune.graph.axis_links import Barrier, Link, Regroup, Shapes, Tie
from onnxprune.graph.axis_rules import MEASURES, links
from onnxprune.graph.caches import cache_pairs
from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView, Node

MAX_FORKS = 4

Role = Literal["produces", "consumes", "rides"]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A constant that is cut along ``axis``: ``labels[i]`` is the unit of position i, -1 for positions outside the group.

    ``produces``: its product makes the axis; ``consumes``: its product sums the axis away; ``rides``: a bias or scale along it.
    """

    node: Node
    slot: int
    tensor: str
    axis: int
    labels: np.ndarray
    role: Role


@dataclass(frozen=True, eq=False)
class Group:
    """A coupled group: ``units`` sets of positions that can be removed one by one.

    ``places[tensor, axis]`` are the labels of every activation axis in the group.
    """

    units: int
    places: dict[tuple[str, int], np.ndarray]
    leaves: tuple[Leaf, ...]
    nodes: tuple[Node, ...]
    batched: bool
    contracted: tuple[Node, ...]

    def key(self) -> frozenset[tuple[int, int, int]]:
        """Identity of the group: the constants it cuts."""
        return frozenset((leaf.node.index, leaf.slot, leaf.axis) for leaf in self.leaves)


@dataclass(frozen=True)
class Blocked:
    """Why a trace found no group."""

    node: str
    op: str
    reason: str
    normalises: bool = False


@dataclass
class _Place:
    labels: np.ndarray
    node: Node | None = None
    slot: int = 0


@dataclass
class _State:
    """Labels found so far. Constants are kept per use, so that a shared weight couples nothing."""

    parent: np.ndarray
    places: dict[tuple[str, int], _Place] = field(default_factory=dict)
    leaves: dict[tuple[int, int, int], _Place] = field(default_factory=dict)
    roles: dict[tuple[int, int, int], Role] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    contracted: dict[int, Node] = field(default_factory=dict)
    batched: bool = False

    def canon(self, labels: np.ndarray) -> np.ndarray:
        return np.where(labels >= 0, self.parent[np.maximum(labels, 0)], -1)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Make the labels ``a[i]`` and ``b[i]`` one unit, for all i."""
        for x, y in zip(self.parent[a].tolist(), self.parent[b].tolist(), strict=True):
            x, y = int(self.parent[x]), int(self.parent[y])
            if x != y:
                self.parent[self.parent == max(x, y)] = min(x, y)


class _Fork(Exception):
    """Units are finer than a split of their axis allows; each alternative is a way to make them coarser."""

    def __init__(self, alternatives: list[np.ndarray]) -> None:
        super().__init__()
        self.alternatives = alternatives


class _Stop(Exception):
    def __init__(self, blocked: Blocked) -> None:
        super().__init__()
        self.blocked = blocked


class Tracer:
    """Traces groups in one graph; rules are evaluated once per node."""

    def __init__(self, view: GraphView, profile: Profile) -> None:
        self.view, self.profile = view, profile
        self._links: dict[int, Sequence[Link] | None] = {}
        # A cache may shrink with its heads: what comes in and what goes out are one thing. Other inputs and outputs are promises.
        self.caches = cache_pairs(view)
        self._open = {*self.caches, *self.caches.values()}

    def trace(self, tensor: str, axis: int) -> list[Group | Blocked]:
        """All groups whose units are sets of positions of ``tensor`` along ``axis``; a :class:`Blocked` for each way that fails."""
        shape = self.profile.shape(tensor)
        if shape is None:
            return [Blocked("", "", f"tensor {tensor} was not seen when the model ran")]
        size = shape[axis]
        results: list[Group | Blocked] = []
        pending = [np.arange(size)]
        while pending and len(results) < MAX_FORKS:
            parent = pending.pop(0)
            try:
                results.append(self._flow(tensor, axis, parent.copy()))
            except _Fork as fork:
                pending.extend(fork.alternatives)
            except _Stop as stop:
                results.append(stop.blocked)
        return results

    def _flow(self, tensor: str, axis: int, parent: np.ndarray) -> Group:
        state = _State(parent)
        queue: deque[tuple[str, int]] = deque()
        self._set(state, queue, tensor, axis, np.arange(len(parent)), None, 0)
        deferred: dict[tuple[int, str, int], tuple[Node, Regroup, int, int]] = {}
        while queue or deferred:
            while queue:
                name, ax = queue.popleft()
                for node, operand in self._touching(name):
                    self._visit(state, queue, deferred, node, operand, ax, state.places[name, ax].labels)
            waiting, deferred = deferred, {}
            for node, regroup, operand, ax in waiting.values():
                self._regroup(state, queue, deferred, node, regroup, operand, ax, final=True)
        return self._finish(state)

    def _touching(self, name: str) -> Iterator[tuple[Node, int]]:
        producer = self.view.producer.get(name)
        if producer is not None:
            yield producer, -1 - producer.outputs.index(name)
        if name in self._open:
            pass
        elif producer is None:
            raise _Stop(Blocked("", "", f"the axis reaches the graph input {name}"))
        elif name in self.view.graph_outputs:
            raise _Stop(Blocked(producer.name, producer.op, f"the axis reaches the graph output {name}"))
        for node, slot in self.view.consumers.get(name, ()):
            if slot < 0:
                raise _Stop(Blocked(node.name, node.op, "the tensor is read inside a control-flow subgraph"))
            yield node, slot

    def _visit(self, state, queue, deferred, node: Node, operand: int, axis: int, labels: np.ndarray) -> None:  # type: ignore[no-untyped-def]
        state.nodes[node.index] = node
        if node.op in MEASURES:
            return
        known = False
        for link in self._links_of(node):
            if isinstance(link, Barrier):
                if (link.operand, link.axis) == (operand, axis):
                    raise _Stop(Blocked(node.name, node.op, link.reason, "normalises" in link.reason))
            elif isinstance(link, Regroup):
                if axis in (link.axes_a if operand == 0 else link.axes_b if operand == -1 else ()):
                    known = True
                    self._regroup(state, queue, deferred, node, link, operand, axis, final=False)
            elif (link.a, link.axis_a) == (operand, axis):
                known = True
                self._tie(state, queue, node, link, labels, forward=True)
                if (link.b, link.axis_b) == (operand, axis):
                    self._tie(state, queue, node, link, labels, forward=False)
            elif (link.b, link.axis_b) == (operand, axis):
                known = True
                self._tie(state, queue, node, link, labels, forward=False)
        if not known and len(labels) > 1:
            raise _Stop(Blocked(node.name, node.op, f"no rule follows this axis through {node.op}"))

    def _links_of(self, node: Node) -> Sequence[Link]:
        if node.index not in self._links:
            try:
                self._links[node.index] = links(node, Shapes(self.view, self.profile, node))
            except LookupError:
                self._links[node.index] = ()
        found = self._links[node.index]
        if found is None:
            raise _Stop(Blocked(node.name, node.op, f"operator {node.op} has no axis rule"))
        return found

    def _tie(self, state: _State, queue: deque, node: Node, tie: Tie, labels: np.ndarray, forward: bool) -> None:  # type: ignore[type-arg]
        target, target_axis = (tie.b, tie.axis_b) if forward else (tie.a, tie.axis_a)
        source_index, target_index = (tie.index_a, tie.index_b) if forward else (tie.index_b, tie.index_a)
        size = Shapes(self.view, self.profile, node).of(target)[target_axis]
        if source_index is None or target_index is None:
            found = labels
        else:
            found = self._map(state, labels, source_index, target_index, size)
        if tie.batch:
            state.batched = True
        if tie.contracts:
            state.contracted[node.index] = node
        name = node.inputs[target] if target >= 0 else node.outputs[-1 - target]
        if target >= 0 and self.view.is_constant(name):
            matrix = node.op in _PRODUCTS and Shapes(self.view, self.profile, node).rank(target) > 1
            role: Role = "consumes" if tie.contracts else "produces" if matrix else "rides"
            state.roles[node.index, target, target_axis] = role
        self._set(state, queue, name, target_axis, found, node, target)

    @staticmethod
    def _map(state: _State, labels: np.ndarray, source: np.ndarray, target: np.ndarray, size: int) -> np.ndarray:
        """Carry labels over a relation of positions; labels that land on one position become one unit."""
        found = np.full(size, -1)
        carried = labels[source]
        order = np.flatnonzero(carried >= 0)[::-1]
        found[target[order]] = carried[order]  # the first one wins ...
        landed = found[target]
        both = (carried >= 0) & (landed >= 0) & (carried != landed)
        if both.any():
            state.unite(carried[both], landed[both])  # ... and the others join it
        return found

    def _set(self, state: _State, queue: deque, name: str, axis: int, labels: np.ndarray, node: Node | None, slot: int) -> None:  # type: ignore[type-arg]
        constant = self.view.is_constant(name)
        if constant:
            assert node is not None
            place = state.leaves.get((node.index, slot, axis))
        else:
            place = state.places.get((name, axis))
        if place is None:
            place = _Place(np.full(len(labels), -1), node, slot)
            if constant:
                assert node is not None
                state.leaves[node.index, slot, axis] = place
            else:
                state.places[name, axis] = place
        both = (place.labels >= 0) & (labels >= 0)
        if both.any():
            a, b = state.canon(place.labels[both]), state.canon(labels[both])
            if (a != b).any():
                state.unite(a[a != b], b[a != b])
        new = (place.labels < 0) & (labels >= 0)
        if new.any():
            place.labels = np.where(new, labels, place.labels)
            if constant:
                assert node is not None
                self._visit(state, queue, {}, node, slot, axis, place.labels)
            else:
                queue.append((name, axis))

    def _regroup(self, state, queue, deferred, node: Node, link: Regroup, operand: int, axis: int, *, final: bool) -> None:  # type: ignore[no-untyped-def]
        """Carry labels through a Reshape block of several axes."""
        shapes = Shapes(self.view, self.profile, node)
        source_axes, target_axes = (link.axes_a, link.axes_b) if operand == 0 else (link.axes_b, link.axes_a)
        target = -1 if operand == 0 else 0
        name = node.inputs[0] if operand == 0 else node.outputs[0]
        labels = state.canon(state.places[name, axis].labels)
        if (labels < 0).any():
            if final:
                raise _Stop(Blocked(node.name, node.op, "only a part of an axis that is split or merged here belongs to the group"))
            deferred[node.index, name, axis] = (node, link, operand, axis)
            return
        source_sizes = [shapes.of(operand)[a] for a in source_axes]
        target_sizes = [shapes.of(target)[a] for a in target_axes]
        view = [1] * len(source_sizes)
        view[source_axes.index(axis)] = -1
        block = np.broadcast_to(labels.reshape(view), source_sizes).reshape(target_sizes)
        target_name = node.outputs[0] if target == -1 else node.inputs[0]
        for position, target_axis in enumerate(target_axes):
            rows = np.moveaxis(block, position, 0).reshape(target_sizes[position], -1)
            if (rows == rows[:, :1]).all():
                self._set(state, queue, target_name, target_axis, rows[:, 0], node, target)
                return
        if not final:
            deferred[node.index, name, axis] = (node, link, operand, axis)
            return
        raise _Fork(_coarser(state, block))

    def _finish(self, state: _State) -> Group:
        used = np.unique(state.canon(np.concatenate([place.labels for place in state.places.values()])))
        used = used[used >= 0]
        number = np.full(len(state.parent) + 1, -1)
        number[used] = np.arange(len(used))
        places = {key: number[state.canon(place.labels)] for key, place in state.places.items()}
        self._check_caches(places)
        leaves = []
        for (index, slot, axis), place in sorted(state.leaves.items()):
            assert place.node is not None
            role = state.roles.get((index, slot, axis), "rides")
            leaves.append(Leaf(place.node, slot, place.node.inputs[slot], axis, number[state.canon(place.labels)], role))
        nodes = tuple(node for _, node in sorted(state.nodes.items()))
        contracted = tuple(node for _, node in sorted(state.contracted.items()))
        return Group(len(used), places, tuple(leaves), nodes, state.batched, contracted)

    def _check_caches(self, places: dict[tuple[str, int], np.ndarray]) -> None:
        """What leaves a cache must leave it on both sides, along an axis that always has the same size."""
        for source, output in self.caches.items():
            axes = {axis for name, axis in places if name in (source, output)}
            for axis in axes:
                read, made = places.get((source, axis)), places.get((output, axis))
                if read is None or made is None or not np.array_equal(read, made) or self.profile.dim(source, axis) is None:
                    maker = self.view.producer[output]
                    raise _Stop(Blocked(maker.name, maker.op, f"the axis reaches the cache {source}, but not as one of its heads"))


_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Attention"})


def _coarser(state: _State, block: np.ndarray) -> list[np.ndarray]:
    """For every axis of ``block``: the units after uniting all labels that share an index of that axis. Useless ones are left out."""
    alternatives: list[np.ndarray] = []
    for position in range(block.ndim):
        rows = np.moveaxis(block, position, 0).reshape(block.shape[position], -1)
        trial = _State(state.parent.copy())
        for row in rows:
            trial.unite(np.repeat(row[:1], len(row)), row)
        if len(np.unique(trial.parent)) > 1:
            alternatives.append(trial.parent)
    return alternatives
