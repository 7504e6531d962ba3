"""From one norm to everything that is the same stream, everything that writes it and everything that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from onnxprune.graph.axis_links import Shapes, Tie
from onnxprune.graph.axis_rules import links
from onnxprune.graph.norms import NORMS, begins_norm, is_centring, squares
from onnxprune.graph.profile import Profile
from onnxprune.graph.stream_parts import Bridge, Fold, Stream, Unrotatable
from onnxprune.graph.view import GraphView, Node

SUMS = frozenset({"Add", "Sum"})
_MOVES = frozenset("Identity Cast Dropout Reshape Flatten Squeeze Unsqueeze Transpose Slice Split Gather Expand ReduceMean".split())
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_SCALES = frozenset({"Mul", "Div"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})


@dataclass(frozen=True, eq=False)
class _Way:
    """From the stream to a tensor that is read: rows in the basis, times a number, are turned back, times ``scale`` plus ``shift``."""

    scale: np.ndarray | None = None
    shift: np.ndarray | None = None

    @property
    def plain(self) -> bool:
        return self.scale is None and self.shift is None

    def times(self, values: np.ndarray) -> _Way:
        """The way past a multiplication by a constant; one number stays in the graph, but multiplies what is added behind it now."""
        scale = self.scale if values.size == 1 else values if self.scale is None else self.scale * values
        return _Way(scale, None if self.shift is None else self.shift * values)

    def plus(self, values: np.ndarray) -> _Way:
        return _Way(self.scale, values if self.shift is None else self.shift + values)


_STREAM = _Way()


class Walk:
    """One walk from the tensor ``seed``, which a norm reads along its last axis; :attr:`stream` is what was found."""

    def __init__(self, view: GraphView, profile: Profile, seed: str) -> None:
        self.view, self.profile = view, profile
        self.raw: list[Node] = []
        self.outputs: list[str] = []
        self.written: set[tuple[int, int]] = set()
        self.pending: list[str] = []
        shape = profile.shape(seed) or ()
        self.stream = Stream("", shape[-1])
        self.join(seed, len(shape) - 1)

    def run(self, name: str) -> None:
        """Walk.

        Raises:
            Unrotatable: no rotation can pass.
        """
        self.stream.name = name
        while self.pending:
            tensor = self.pending.pop()
            self.made(tensor, self.stream.places[tensor], None)
            self.read(tensor)
        if self.stream.centred and (self.raw or self.outputs):
            reader = self.raw[0] if self.raw else f"the graph output {self.outputs[0]}"
            raise Unrotatable(f"{reader} reads the sum itself, with the mean that norms remove")
        places = [(fold.node, fold.slot) for fold in self.stream.folds]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise Unrotatable(f"{self.view.nodes[twice[0]]} reads and writes the stream with one matrix")
        self.part_bridges()

    def join(self, tensor: str, axis: int) -> None:
        if self.place(tensor, axis):
            self.stream.members.add(tensor)
            self.pending.append(tensor)

    def place(self, tensor: str, axis: int) -> bool:
        """Note along which axis a tensor holds the stream; False if it is known as a part of it."""
        known = self.stream.places.setdefault(tensor, axis)
        if known != axis:
            raise Unrotatable(f"{tensor} holds the stream along two axes")
        if tensor in self.stream.members:
            return False
        size = self.profile.dim(tensor, axis)
        if size != self.stream.width:
            raise Unrotatable(f"{tensor} has {size} of the {self.stream.width} positions of the stream")
        return True

    def part_bridges(self) -> None:
        """What enters the basis is read outside of it as it was."""
        bridges = self.stream.bridges
        leaving = {bridge.tensor: bridge for bridge in bridges if not bridge.inward}
        entering = {bridge.tensor for bridge in bridges if bridge.inward}
        self.stream.bridges = [
            replace(bridge, readers=leaving[bridge.tensor].readers) if bridge.inward and bridge.tensor in leaving else bridge
            for bridge in bridges
            if bridge.inward or bridge.tensor not in entering
        ]

    # --- who writes ------------------------------------------------------------------------------------------------------------------

    def made(self, tensor: str, axis: int, scale: np.ndarray | None) -> None:
        """What makes ``tensor``: more of the stream, constants to fold the basis into, or something foreign."""
        node = self.view.producer.get(tensor)
        if node is None or node.domain:
            return self.enter(tensor, axis, scale)
        ties = self.ties(node, tensor, axis)
        if node.op in _PRODUCTS or (node.op in ("Conv", "Gather") and self.view.is_constant(node.inputs[1 if node.op == "Conv" else 0])):
            return self.product(node, tensor, axis, scale, ties)
        if node.op in SUMS or node.op == "Concat":
            for slot, name in enumerate(node.inputs):
                self.operand(node, slot, name, axis, scale, ties)
            return None
        if moves(node) and ties and not self.foreign(node.inputs[0], ties[0].axis_a):
            return self.operand(node, 0, node.inputs[0], axis, scale, ties)
        if node.op in _SCALES and (factor := self.factor(node, tensor, axis)) is not None:
            data, slot, values = factor
            if values is None or values.size == 1:
                return self.operand(node, 1 - slot, data, axis, scale, ties)
            self.neutralise(node, slot, 1.0)
            return self.operand(node, 1 - slot, data, axis, values if scale is None else values * scale, ties)
        return self.enter(tensor, axis, scale)

    def foreign(self, tensor: str, axis: int) -> bool:
        """Whether no product could turn ``tensor``, for the stream is not its last axis, and nothing it is made of could be turned."""
        while not self.view.is_constant(tensor) and axis != self.rank(tensor) - 1:
            node = self.view.producer.get(tensor)
            if node is None or node.domain:
                return True
            factor = self.factor(node, tensor, axis) if node.op in _SCALES else None
            if factor is None and not moves(node):
                return node.op not in _PRODUCTS | SUMS | {"Conv", "Gather", "Concat"}
            slot = 0 if factor is None else 1 - factor[1]
            tie = next((tie for tie in self.ties(node, tensor, axis) if tie.a == slot), None)
            if tie is None:
                return True
            tensor, axis = node.inputs[slot], tie.axis_a
        return False

    def operand(self, node: Node, slot: int, name: str, axis: int, scale: np.ndarray | None, ties: Sequence[Tie]) -> None:
        tie = next((tie for tie in ties if tie.a == slot), None)
        if self.view.is_constant(name):
            self.fold(node, slot, tie.axis_a if tie else None, scale, axis)
        elif tie is None:
            raise Unrotatable(f"{node} adds the same number along the whole stream")
        elif scale is None:
            self.join(name, tie.axis_a)
        else:
            if len(self.view.consumers.get(name, ())) > 1 or name in self.view.graph_outputs:
                raise Unrotatable(f"what {node} scales is read elsewhere as well")
            self.place(name, tie.axis_a)
            self.made(name, tie.axis_a, scale)

    def product(self, node: Node, tensor: str, axis: int, scale: np.ndarray | None, ties: Sequence[Tie]) -> None:
        constants = [tie for tie in ties if self.view.value(node.inputs[tie.a]) is not None]
        weight = 0 if node.op == "Gather" else 1
        tied = node.op == "Gather" and any(reader.op != "Gather" for reader, _ in self.view.consumers[node.inputs[0]])
        if len(constants) < len(ties) or weight not in [tie.a for tie in ties] or tied or node.attrs.get("group", 1) != 1:
            return self.enter(tensor, axis, scale)
        for tie in constants:
            self.fold(node, tie.a, tie.axis_a, scale, axis)
        if len(node.inputs) > 2 and node.inputs[2] and 2 not in [tie.a for tie in ties]:
            raise Unrotatable(f"{node} adds one number to the whole stream")
        return None

    def fold(self, node: Node, slot: int, axis: int | None, scale: np.ndarray | None, along: int) -> None:
        """The basis goes into a constant; one without the axis of the stream adds along the whole of it."""
        value = self.view.value(node.inputs[slot])
        if value is None or value.dtype.kind != "f":
            raise Unrotatable(f"{node} writes the stream with a constant that is computed")
        if axis is None:
            rank = self.rank(node.outputs[0])
            axis = along - rank + value.ndim
        if (node.index, slot) not in self.written:
            self.written.add((node.index, slot))
            self.stream.folds.append(Fold(node.index, slot, axis, True, scale))

    def enter(self, tensor: str, axis: int, scale: np.ndarray | None) -> None:
        if axis != self.rank(tensor) - 1 or tensor in self.view.constants:
            raise Unrotatable(f"{self.view.producer.get(tensor) or f'the graph input {tensor}'} writes the stream")
        self.stream.bridges.append(Bridge(tensor, inward=True, scale=scale))

    # --- who reads -------------------------------------------------------------------------------------------------------------------

    def read(self, tensor: str) -> None:
        """Readers of a tensor of the stream itself."""
        axis = self.stream.places[tensor]
        if tensor in self.view.graph_outputs:
            self.leave(tensor, None, _STREAM)
        for node, slot in dict.fromkeys(self.view.consumers.get(tensor, ())):
            if slot >= 0 and not node.domain and (node.op in SUMS or node.op == "Concat" or (moves(node) and slot == 0)):
                outputs = [(tie.b, tie.axis_b) for tie in self.ties_from(node, slot, axis)]
                if outputs:
                    for output, other in outputs:
                        self.join(node.outputs[-1 - output], other)
                    continue
            if slot >= 0 and node.op == "Mul" and (number := self.view.value(node.inputs[1 - slot])) is not None and number.size == 1:
                self.join(node.outputs[0], axis)
                continue
            self.reader(node, slot, tensor, axis, _STREAM)

    def reads(self, tensor: str, axis: int, way: _Way) -> None:
        """Readers of something that the stream was made into."""
        if not self.place(tensor, axis):
            raise Unrotatable(f"{tensor} is read and written")
        if tensor in self.view.graph_outputs:
            self.leave(tensor, None, way)
        for node, slot in dict.fromkeys(self.view.consumers.get(tensor, ())):
            self.reader(node, slot, tensor, axis, way)

    def reader(self, node: Node, slot: int, tensor: str, axis: int, way: _Way) -> None:
        stream = tensor in self.stream.members
        if slot < 0 or node.domain:
            return self.leave(tensor, (node, slot), way)
        if node.op == "Shape":
            self.stream.shapes.append(node)
            return None
        if way.plain and self.normalises(node, slot, tensor, axis):
            return None
        if node.op in _PRODUCTS and (tie := self.contracted(node, slot, axis)) is not None:
            self.raw += [node] if stream else []
            weight, along = (tie.b, tie.axis_b) if tie.a == slot else (tie.a, tie.axis_a)
            self.stream.folds.append(Fold(node.index, weight, along, False, way.scale, way.shift))
            return None
        if node.op in _SCALES and (factor := self.factor(node, node.outputs[0], axis)) is not None and factor[0] == tensor:
            _, place, values = factor
            if values is not None and values.size > 1:
                self.neutralise(node, place, 1.0)
            if values is not None or way.shift is None:
                self.raw += [node] if stream else []
                return self.reads(node.outputs[0], axis, way if values is None else way.times(values))
        if not stream and node.op == "Add" and (added := self.aligned(node, 1 - slot, axis)) is not None:
            self.neutralise(node, 1 - slot, 0.0)
            return self.reads(node.outputs[0], axis, way.plus(np.broadcast_to(added, (self.stream.width,))))
        outputs = self.ties_from(node, slot, axis) if moves(node) and slot == 0 and not stream else []
        if not outputs:
            return self.leave(tensor, (node, slot), way)
        for tie in outputs:
            self.reads(node.outputs[-1 - tie.b], tie.axis_b, way)
        return None

    def normalises(self, node: Node, slot: int, tensor: str, axis: int) -> bool:
        """Whether ``node`` is a norm of ``tensor`` or the first part of one; what it makes has been followed then."""
        if squares(self.view, self.profile, node, axis):
            self.stream.norms.append(tensor)
            self.raw += [node] if tensor in self.stream.members else []
            return True
        if self.centres(node, tensor, axis):
            self.stream.centred = True
            if node.op == "Sub":
                self.reads(node.outputs[0], axis, _STREAM)
            return True
        single = node.op in NORMS and slot == 0 and len(list(filter(None, node.outputs))) == 1
        if not single or not begins_norm(self.view, self.profile, node):
            return False
        self.stream.norms.append(tensor)
        if node.op == "LayerNormalization":
            self.stream.centred = True
        else:
            self.raw.append(node)
        self.reads(node.outputs[0], axis, self.affine(node))
        return True

    def affine(self, node: Node) -> _Way:
        """The scale and bias of a norm, which move into what reads it."""
        way = _STREAM
        for slot, neutral in ((1, 1.0), (2, 0.0)):
            if len(node.inputs) <= slot or not node.inputs[slot]:
                continue
            value = self.view.value(node.inputs[slot])
            if value is None:
                raise Unrotatable(f"the scale or bias of {node} is computed")
            self.neutralise(node, slot, neutral, wide=True)
            flat = np.broadcast_to(value.astype(np.float64).reshape(-1), (self.stream.width,))
            way = way.times(flat) if slot == 1 else way.plus(flat)
        return way

    def centres(self, node: Node, tensor: str, axis: int) -> bool:
        """The mean along the stream that is only subtracted again, or the subtraction."""
        mean = self.view.producer.get(node.inputs[1]) if node.op == "Sub" and node.inputs[0] == tensor else node
        return mean is not None and mean.inputs[:1] == (tensor,) and is_centring(self.view, self.profile, mean, axis)

    def leave(self, tensor: str, reader: tuple[Node, int] | None, way: _Way) -> None:
        """``reader``, or the graph output, takes what has no basis of the stream."""
        node, slot = reader if reader else (None, 0)
        if self.stream.places[tensor] != self.rank(tensor) - 1 or slot < 0:
            raise Unrotatable(f"{node or 'the graph output'} reads the stream")
        stream = tensor in self.stream.members
        self.raw += [node] if stream and node is not None else []
        self.outputs += [tensor] if stream and node is None else []
        places = {(bridge.tensor, bridge.inward): place for place, bridge in enumerate(self.stream.bridges)}
        known = places.get((tensor, False))
        if known is None:
            known = len(self.stream.bridges)
            self.stream.bridges.append(Bridge(tensor, inward=False, scale=way.scale, shift=way.shift))
        bridge = self.stream.bridges[known]
        readers = (*bridge.readers, (node.index, slot)) if node else bridge.readers
        self.stream.bridges[known] = replace(bridge, readers=readers, output=bridge.output or node is None)

    # --- small questions -------------------------------------------------------------------------------------------------------------

    def ties(self, node: Node, tensor: str, axis: int) -> list[Tie]:
        """Ties from inputs to ``axis`` of the output ``tensor``."""
        output = -1 - node.outputs.index(tensor)
        return [tie for tie in self.whole(node) if tie.a >= 0 and (tie.b, tie.axis_b) == (output, axis)]

    def ties_from(self, node: Node, slot: int, axis: int) -> list[Tie]:
        """Ties from ``axis`` of one input to outputs."""
        return [tie for tie in self.whole(node) if (tie.a, tie.axis_a) == (slot, axis) and tie.b < 0]

    def whole(self, node: Node) -> Iterator[Tie]:
        """Ties of all positions in order."""
        found = links(node, Shapes(self.view, self.profile, node)) or ()
        return (link for link in found if isinstance(link, Tie) and link.index_a is None and not link.contracts)

    def contracted(self, node: Node, slot: int, axis: int) -> Tie | None:
        """The contraction of this axis with the rows of a constant matrix."""
        for link in links(node, Shapes(self.view, self.profile, node)) or ():
            if isinstance(link, Tie) and link.contracts and (link.a, link.axis_a) == (slot, axis) and link.b == 1:
                value = self.view.value(node.inputs[1])
                return link if value is not None and value.ndim == 2 and value.dtype.kind == "f" else None
        return None

    def factor(self, node: Node, tensor: str, axis: int) -> tuple[str, int, np.ndarray | None] | None:
        """(data, slot of the factor, its values) of a multiplication by a constant along the stream, or by one number a row (no values)."""
        for slot in (1,) if node.op == "Div" else (1, 0):
            values = self.aligned(node, slot, axis)
            if values is not None:
                return node.inputs[1 - slot], slot, 1 / values if node.op == "Div" else values
            name = node.inputs[slot]
            shape = self.profile.shape(name) or ()
            place = axis - self.rank(tensor) + len(shape)
            if self.view.value(name) is None and (place < 0 or shape[place : place + 1] == (1,)):
                return node.inputs[1 - slot], slot, None
        return None

    def aligned(self, node: Node, slot: int, axis: int) -> np.ndarray | None:
        """Values, flat, of a constant operand of one number, or of one for each position of the stream; None for anything else."""
        value, rank = self.view.value(node.inputs[slot]), self.rank(node.outputs[0])
        if value is None or self.rank(node.inputs[1 - slot]) != rank:
            return None
        place = axis - rank + value.ndim
        along = value.size == self.stream.width and place >= 0 and value.shape[place] == value.size
        return value.astype(np.float64).reshape(-1) if value.size == 1 or along else None

    def rank(self, tensor: str) -> int:
        return len(self.profile.shape(tensor) or ())

    def neutralise(self, node: Node, slot: int, value: float, *, wide: bool = False) -> None:
        self.stream.neutral.append((node.index, slot, value, wide))


def moves(node: Node) -> bool:
    """Whether ``node`` only rearranges rows (or averages them), as numbers of any precision."""
    return node.op in _MOVES and (node.op != "Cast" or node.attrs["to"] in _FLOATS)
