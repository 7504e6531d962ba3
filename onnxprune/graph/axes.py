"""The axis tracer: which positions along which axes must go together.

Everything prunable is an axis. A trace starts with one label per position of a seed axis and lets labels flow through the operators,
forwards and backwards, by the rules of :mod:`onnxprune.graph.axis_rules`. Where two labels meet at one position they become one unit (a
key/value head shared by four query heads makes the four one unit). Where an axis is split in two, as [768] into [12, 64], units must be
made coarser, and there are several ways: the trace forks and returns one group per way (whole heads; the same dimension of every head).
Labels stop at constants, which is where a model can be cut, and fail at barriers, which is where it can not.

What lies beside the features (:mod:`onnxprune.graph.side`) is followed backwards as far as the group alone reads it. Where others read it
as well, or where it cannot be followed, it is cut in front of the group's own readers: a bias shared by all layers couples none of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from onnxprune.graph.axis_links import Barrier, Link, Regroup, Shapes, Tie
from onnxprune.graph.axis_rules import MEASURES, links
from onnxprune.graph.axis_state import Blocked, Fork, Group, Hold, Leaf, Place, Role, State, Stop, coarser
from onnxprune.graph.caches import cache_pairs
from onnxprune.graph.profile import Profile
from onnxprune.graph.side import side_tensors
from onnxprune.graph.view import GraphView, Node

MAX_FORKS = 4


class Tracer:
    """Traces groups in one graph; rules are evaluated once per node."""

    def __init__(self, view: GraphView, profile: Profile) -> None:
        self.view, self.profile = view, profile
        self.side = side_tensors(view)
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
            except Fork as fork:
                pending.extend(fork.alternatives)
            except Stop as stop:
                results.append(stop.blocked)
        return results

    def _flow(self, tensor: str, axis: int, parent: np.ndarray) -> Group:
        held: frozenset[str] = frozenset()
        while True:
            try:
                return self._attempt(tensor, axis, State(parent.copy(), held))
            except Hold as hold:
                held |= {hold.tensor}

    def _attempt(self, tensor: str, axis: int, state: State) -> Group:
        queue: deque[tuple[str, int]] = deque()
        self._set(state, queue, tensor, axis, np.arange(len(state.parent)), None, 0)
        deferred: dict[tuple[int, str, int], tuple[Node, Regroup, int, int]] = {}
        while queue or deferred or self._merge(state, queue):
            while queue:
                name, ax = queue.popleft()
                with self._holding(state, name):
                    for node, operand in self._touching(name):
                        self._visit(state, queue, deferred, node, operand, ax, state.places[name, ax].labels)
            waiting, deferred = deferred, {}
            for (_, name, _), (node, regroup, operand, ax) in waiting.items():
                with self._holding(state, name):
                    self._regroup(state, queue, deferred, node, regroup, operand, ax, final=True)
        return self._finish(state)

    @contextmanager
    def _holding(self, state: State, name: str) -> Iterator[None]:
        """Where a side tensor cannot be followed it need not be, unless the trace began at it."""
        try:
            yield
        except (Fork, Stop) as error:
            if name in self.side and name not in state.held:
                raise Hold(name) from error
            raise

    def _per_use(self, state: State, name: str, node: Node | None, slot: int) -> bool:
        """Whether labels at this use of a tensor say nothing about its other uses."""
        if self.view.is_constant(name) and (name not in self.side or (node is not None and _is_matrix(node, slot, self._rank(node, slot)))):
            return True
        if name not in self.side or node is None or slot < 0:
            return False
        if name in state.held:
            return True
        return name not in state.merged and (len(self._readers(name)) > 1 or len(self.view.producer[name].outputs) > 1)

    def _rank(self, node: Node, slot: int) -> int:
        return Shapes(self.view, self.profile, node).rank(slot)

    def _readers(self, name: str) -> set[tuple[int, int]]:
        return {(node.index, slot) for node, slot in self.view.consumers.get(name, ()) if node.op not in MEASURES}

    def _merge(self, state: State, queue: deque) -> bool:  # type: ignore[type-arg]
        """Follow a side tensor after all, if every reader of it turned out to belong to the group, with the same units."""
        found: dict[tuple[str, int], dict[tuple[int, int], np.ndarray]] = {}
        for (index, slot, axis), place in state.uses.items():
            name = self.view.nodes[index].inputs[slot]
            if name in self.side and name not in state.held and state.roles.get((index, slot, axis)) == "rides":
                found.setdefault((name, axis), {})[index, slot] = state.canon(place.labels)
        for (name, axis), uses in found.items():
            first, *others = uses.values()
            if set(uses) != self._readers(name) or len(self.view.producer[name].outputs) > 1 or name in self.view.graph_outputs:
                continue
            if all(np.array_equal(first, other) for other in others):
                state.merged.add(name)
                for index, slot in uses:
                    for key in [key for key in state.uses if key[:2] == (index, slot)]:
                        del state.uses[key]
                self._set(state, queue, name, axis, first, None, 0)
                return True
        return False

    def _touching(self, name: str) -> Iterator[tuple[Node, int]]:
        producer = self.view.producer.get(name)
        if producer is not None:
            yield producer, -1 - producer.outputs.index(name)
        if name in self._open:
            pass
        elif producer is None:
            raise Stop(Blocked("", "", f"the axis reaches the graph input {name}"))
        elif name in self.view.graph_outputs:
            raise Stop(Blocked(producer.name, producer.op, f"the axis reaches the graph output {name}"))
        for node, slot in self.view.consumers.get(name, ()):
            if slot < 0:
                raise Stop(Blocked(node.name, node.op, "the tensor is read inside a control-flow subgraph"))
            yield node, slot

    def _visit(self, state, queue, deferred, node: Node, operand: int, axis: int, labels: np.ndarray) -> None:  # type: ignore[no-untyped-def]
        state.nodes[node.index] = node
        if node.op in MEASURES:
            return
        known = False
        for link in self._links_of(node):
            if isinstance(link, Barrier):
                if (link.operand, link.axis) == (operand, axis):
                    raise Stop(Blocked(node.name, node.op, link.reason, "normalises" in link.reason))
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
            raise Stop(Blocked(node.name, node.op, f"no rule follows this axis through {node.op}"))

    def _links_of(self, node: Node) -> Sequence[Link]:
        if node.index not in self._links:
            try:
                self._links[node.index] = links(node, Shapes(self.view, self.profile, node))
            except LookupError:
                self._links[node.index] = ()
        found = self._links[node.index]
        if found is None:
            raise Stop(Blocked(node.name, node.op, f"operator {node.op} has no axis rule"))
        return found

    def _tie(self, state: State, queue: deque, node: Node, tie: Tie, labels: np.ndarray, forward: bool) -> None:  # type: ignore[type-arg]
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
        if target >= 0 and self._per_use(state, name, node, target):
            matrix = _is_matrix(node, target, self._rank(node, target))
            role: Role = "consumes" if tie.contracts else "produces" if matrix else "rides"
            state.roles[node.index, target, target_axis] = role
        self._set(state, queue, name, target_axis, found, node, target)

    @staticmethod
    def _map(state: State, labels: np.ndarray, source: np.ndarray, target: np.ndarray, size: int) -> np.ndarray:
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

    def _set(self, state: State, queue: deque, name: str, axis: int, labels: np.ndarray, node: Node | None, slot: int) -> None:  # type: ignore[type-arg]
        per_use = self._per_use(state, name, node, slot)
        if per_use:
            assert node is not None
            place = state.uses.setdefault((node.index, slot, axis), Place(np.full(len(labels), -1), node, slot))
        else:
            place = state.places.setdefault((name, axis), Place(np.full(len(labels), -1), node, slot))
        both = (place.labels >= 0) & (labels >= 0)
        if both.any():
            a, b = state.canon(place.labels[both]), state.canon(labels[both])
            if (a != b).any():
                state.unite(a[a != b], b[a != b])
        new = (place.labels < 0) & (labels >= 0)
        if new.any():
            place.labels = np.where(new, labels, place.labels)
            if per_use:
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
        place = state.uses[node.index, 0, axis] if (node.index, 0, axis) in state.uses and operand == 0 else state.places[name, axis]
        labels = state.canon(place.labels)
        partial = bool((labels < 0).any())
        if partial and not final:
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
        if partial:
            raise Stop(Blocked(node.name, node.op, "only a part of an axis that is split or merged here belongs to the group"))
        raise Fork(coarser(state, block))

    def _finish(self, state: State) -> Group:
        used = np.unique(state.canon(np.concatenate([place.labels for place in state.places.values()])))
        used = used[used >= 0]
        number = np.full(len(state.parent) + 1, -1)
        number[used] = np.arange(len(used))
        places = {key: number[state.canon(place.labels)] for key, place in state.places.items()}
        self._check_caches(places)
        leaves: list[Leaf] = []
        picks: list[Leaf] = []
        for (index, slot, axis), place in sorted(state.uses.items()):
            node = self.view.nodes[index]
            role = state.roles.get((index, slot, axis), "rides")
            leaf = Leaf(node, slot, node.inputs[slot], axis, number[state.canon(place.labels)], role)
            (leaves if self.view.is_constant(leaf.tensor) and (role != "rides" or leaf.tensor not in self.side) else picks).append(leaf)
        nodes = tuple(node for _, node in sorted(state.nodes.items()))
        contracted = tuple(node for _, node in sorted(state.contracted.items()))
        return Group(len(used), places, tuple(leaves), tuple(picks), nodes, state.batched, contracted)

    def _check_caches(self, places: dict[tuple[str, int], np.ndarray]) -> None:
        """What leaves a cache must leave it on both sides, along an axis that always has the same size."""
        for source, output in self.caches.items():
            axes = {axis for name, axis in places if name in (source, output)}
            for axis in axes:
                read, made = places.get((source, axis)), places.get((output, axis))
                if read is None or made is None or not np.array_equal(read, made) or self.profile.dim(source, axis) is None:
                    maker = self.view.producer[output]
                    raise Stop(Blocked(maker.name, maker.op, f"the axis reaches the cache {source}, but not as one of its heads"))


_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Attention"})


def _is_matrix(node: Node, slot: int, rank: int) -> bool:
    return node.op in _PRODUCTS and 0 <= slot < 2 and rank > 1
