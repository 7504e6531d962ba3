"""Narrowing residual streams: a basis for each, folded into everything that writes and reads it.

With orthonormal columns P of shape [D, d], the scaled basis is B = sqrt(d / D) P: rows z = x B have the mean square of x P P^T, so every
norm, its epsilon included, computes the number it would compute of the projection; the way back is the pseudo-inverse, B^T D / d. A
LayerNormalization also removes the mean: there P spans d - 1 directions that hold no mean and is turned so that its rows sum to zero, so
that z has none either and the operator stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.stream import find_streams
from onnxprune.graph.stream_parts import Bridge, Fold, Stream
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView, Node


@dataclass(frozen=True)
class Narrowing:
    """A stream and its scaled basis B, float32 ``[width before, width after]``."""

    stream: str
    basis: np.ndarray = field(compare=False, repr=False)

    @property
    def before(self) -> int:
        """Width before."""
        return int(self.basis.shape[0])

    @property
    def after(self) -> int:
        """Width after."""
        return int(self.basis.shape[1])

    @property
    def back(self) -> np.ndarray:
        """The way back from rows in the basis, float64 ``[width after, width before]``."""
        return np.asarray(self.basis.astype(np.float64).T * (self.before / self.after))


def narrow(
    model: Model, profile: Profile, narrowings: Sequence[Narrowing], samples: Mapping[str, np.ndarray] | None = None
) -> tuple[Model, Profile]:
    """The model with every named stream in its basis, and its profile.

    A basis as wide as the stream leaves the outputs as they are, up to rounding; a narrower one computes what the stream projected on it
    would (:func:`onnxprune.graph.instrument.projected_model`).

    Args:
        samples: real inputs, for models that do not run on made-up ones.

    Raises:
        InputError: a stream is not there or has another width; the decision belongs to another model.
    """
    for item in narrowings:
        view = GraphView(model)
        model = _Narrower(view, profile, named_stream(view, profile, item), item).run()
        profile = take_profile(model, samples)
    return model, profile


def named_stream(view: GraphView, profile: Profile, item: Narrowing) -> Stream:
    """The stream of a model that a narrowing is for.

    Raises:
        InputError: it has none of this name and width.
    """
    for stream in find_streams(view, profile)[0]:
        if (stream.name, stream.width) == (item.stream, item.before):
            return stream
    raise InputError(f"the model has no {item.stream} of width {item.before}: the basis was made for another file")


class _Narrower:
    """One stream under the knife."""

    def __init__(self, view: GraphView, profile: Profile, stream: Stream, item: Narrowing) -> None:
        self.view, self.profile, self.stream = view, profile, stream
        self.surgeon = Surgeon(view.model)
        self.basis, self.back, self.width = item.basis.astype(np.float64), item.back, item.after

    def run(self) -> Model:
        self._fold()
        for index, slot, value, wide in self.stream.neutral:
            like = self.view.nodes[index].inputs[slot]
            old = self.view.value(like)
            assert old is not None
            filled = np.full(self.width if wide else (1,) * old.ndim, value, old.dtype)
            self.surgeon.nodes[index].inputs[slot] = self.surgeon.constant(filled, like)
        for fold in self.stream.folds:
            if fold.shift is not None and fold.shift.any():
                self._bias(self.view.nodes[fold.node], self._shifted(fold))
        self._resize()
        for bridge in self.stream.bridges:
            if bridge.inward:
                self._enter(bridge)
            else:
                self._leave(bridge)
        return self.surgeon.close()

    def _fold(self) -> None:
        """New constants; what was one initializer in two places stays one if it is the same in both."""
        made = {}
        for fold in self.stream.folds:
            name = self.view.nodes[fold.node].inputs[fold.slot]
            key = (name, fold.axis, fold.writes, None if fold.scale is None else fold.scale.tobytes())
            if key not in made:
                made[key] = self.surgeon.constant(self._folded(fold, name), name)
            self.surgeon.nodes[fold.node].inputs[fold.slot] = made[key]

    def _folded(self, fold: Fold, name: str) -> np.ndarray:
        value = self.view.value(name)
        assert value is not None
        exact, axis = value.astype(np.float64), fold.axis
        if not fold.writes:
            matrix = (self.back if fold.scale is None else self.back * fold.scale).T
        else:
            if axis < 0:  # fewer axes than the stream: the same for all of its positions
                exact, axis = exact.reshape((1,) * -axis + exact.shape), 0
            if exact.shape[axis] == 1:
                exact = np.repeat(exact, self.stream.width, axis=axis)
            matrix = self.basis if fold.scale is None else fold.scale[:, None] * self.basis
        return np.ascontiguousarray(np.moveaxis(np.tensordot(exact, matrix, axes=(axis, 0)), -1, axis).astype(value.dtype))

    def _shifted(self, fold: Fold) -> np.ndarray:
        """What the shift of a norm adds to a product: one number for each of its columns."""
        node = self.view.nodes[fold.node]
        value = self.view.value(node.inputs[fold.slot])
        assert value is not None
        assert fold.shift is not None
        return np.asarray(np.tensordot(fold.shift, value.astype(np.float64), axes=(0, fold.axis)) * float(node.attrs.get("alpha", 1.0)))

    def _bias(self, node: Node, added: np.ndarray) -> None:
        """Add a vector to a product: into its own bias or the one that follows, else by an addition of its own."""
        edit = self.surgeon.nodes[node.index]
        weight = self.view.value(node.inputs[1])
        assert weight is not None
        if node.op == "Gemm" and len(node.inputs) < 3:
            edit.inputs.append(self.surgeon.constant(added.astype(weight.dtype), node.inputs[1]))
            edit.attrs["beta"] = 1.0
            return
        readers = self.view.consumers.get(node.outputs[0], [])
        single = len(readers) == 1 and readers[0][0].op == "Add" and node.outputs[0] not in self.view.graph_outputs
        places = [(node.index, 2, float(node.attrs.get("beta", 1.0)))] if node.op == "Gemm" else []
        places += [(readers[0][0].index, 1 - readers[0][1], 1.0)] if single else []
        for index, slot, rate in places:
            name = self.view.nodes[index].inputs[slot]
            own = self.view.value(name)
            if own is not None and own.ndim <= 1 and own.size in (1, added.size) and rate:
                total = (own.astype(np.float64) + added / rate).astype(own.dtype)
                self.surgeon.nodes[index].inputs[slot] = self.surgeon.constant(total, name)
                return
        output = edit.outputs[0]
        before = self.surgeon.variable(output.name, weight.dtype)
        edit.outputs = [before]
        self.surgeon.add("Add", [before, self.surgeon.constant(added.astype(weight.dtype), node.inputs[1])], output, node.name)

    def _resize(self) -> None:
        """Reset the shapes that nodes carry; whoever measures a narrow tensor is told the full width."""
        entering = {bridge.tensor for bridge in self.stream.bridges if bridge.inward}
        narrow = [name for name in self.stream.places if name in self.view.producer and name not in entering]
        for node in dict.fromkeys(self.view.producer[name] for name in narrow):
            if node.op in ("Reshape", "Expand"):
                self._resize_target(node)
        for node in self.stream.shapes:
            rank = len(self.profile.shape(node.inputs[0]) or ())
            measured = np.arange(rank)[slice(node.attrs.get("start"), node.attrs.get("end"))] == self.stream.places[node.inputs[0]]
            edit = self.surgeon.nodes[node.index]
            known, after = edit.outputs[0], self.surgeon.variable(node.outputs[0], np.int64)
            edit.outputs = [after]
            self._where(measured, self.stream.width, after, known, node.name)

    def _resize_target(self, node: Node) -> None:
        """The element of a target shape that is the width."""
        edit, rank = self.surgeon.nodes[node.index], len(self.profile.shape(node.outputs[0]) or ())
        target = self.view.value(node.inputs[1])
        length = len(target) if target is not None else (self.profile.shape(node.inputs[1]) or (rank,))[0]
        here = np.arange(length) == self.stream.places[node.outputs[0]] - (rank - length)
        if target is not None:
            values = np.where(here & (target == self.stream.width), self.width, target)
            edit.inputs[1] = self.surgeon.constant(values.astype(np.int64), node.inputs[1])
        else:
            fixed = self.surgeon.variable(node.name, np.int64)
            self._where(here, self.width, edit.inputs[1], fixed, node.name)
            edit.inputs[1] = fixed

    def _where(self, chosen: np.ndarray, value: int, other: gs.Tensor, output: gs.Tensor, like: str) -> None:
        constants = [self.surgeon.constant(array, like) for array in (chosen, np.where(chosen, value, 0).astype(np.int64))]
        self.surgeon.add("Where", [*constants, other], output, like)

    def _enter(self, bridge: Bridge) -> None:
        inside = self.surgeon.variable(bridge.tensor, np.float32)
        self._read_by_stream(bridge, inside)
        matrix = self.basis if bridge.scale is None else bridge.scale[:, None] * self.basis
        self._multiply(self.surgeon.tensors[bridge.tensor], matrix, None, inside)

    def _leave(self, bridge: Bridge) -> None:
        matrix = self.back if bridge.scale is None else self.back * bridge.scale
        tensor = self.surgeon.tensors[bridge.tensor]
        other = self.surgeon.variable(bridge.tensor, np.float32)
        if not bridge.output:
            for index, slot in bridge.readers:
                self.surgeon.nodes[index].inputs[slot] = other
            self._multiply(tensor, matrix, bridge.shift, other)
            return
        # The output keeps its name; what is in the basis gets another.
        self._read_by_stream(bridge, other)
        maker = tensor.inputs[0]
        maker.outputs = [other if operand is tensor else operand for operand in maker.outputs]
        self._multiply(other, matrix, bridge.shift, tensor)

    def _read_by_stream(self, bridge: Bridge, inside: gs.Tensor) -> None:
        for node, slot in self.view.consumers.get(bridge.tensor, ()):
            if (node.index, slot) not in bridge.readers:
                self.surgeon.nodes[node.index].inputs[slot] = inside

    def _multiply(self, tensor: gs.Tensor, matrix: np.ndarray, shift: np.ndarray | None, output: gs.Tensor) -> None:
        like = self.stream.name
        constant = self.surgeon.constant(matrix.astype(np.float32), like)
        if shift is None or not shift.any():
            self.surgeon.add("MatMul", [tensor, constant], output, like)
            return
        product = self.surgeon.variable(like, np.float32)
        self.surgeon.add("MatMul", [tensor, constant], product, like)
        self.surgeon.add("Add", [product, self.surgeon.constant(shift.astype(np.float32), like)], output, like)
