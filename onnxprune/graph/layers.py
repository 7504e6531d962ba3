"""Sublayers: branches that are computed from a residual stream and added to it, and what a small map in their place makes of the model.

A branch is found by what it reads: it is one operand of a sum of two activations, the other operand is the only feature it reads, and it
holds weights. That is attention and FFN of networks that normalise before the branch and of those that normalise after the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxprune.graph.model import Model
from onnxprune.graph.norms import NORMS, begins_norm
from onnxprune.graph.profile import Profile
from onnxprune.graph.side import side_tensors
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.tail import MEASURES
from onnxprune.graph.view import GraphView, Node

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})


@dataclass(frozen=True, eq=False)
class Sublayer:
    """The branch from ``start`` to ``end``, both [..., width], which ``join`` adds to ``stream``.

    ``start`` is the stream as one norm leaves it where nothing else of the branch reads the stream, otherwise the stream. ``dtype`` is
    that of the weights, ``nodes`` are the indices of the nodes that only the branch needs to be computed from the stream.
    """

    name: str
    stream: str
    start: str
    end: str
    join: Node
    width: int
    dtype: np.dtype
    nodes: frozenset[int]


@dataclass(frozen=True, eq=False)
class Substitute:
    """What stands in for a branch: ``start`` times the ``factors`` in turn, plus ``bias`` [width].

    Without factors it is the constant ``bias``, without either nothing at all.
    """

    factors: tuple[np.ndarray, ...] = ()
    bias: np.ndarray | None = None

    def describe(self) -> str:
        """In words: ``nothing``, ``a constant``, ``a matrix of 384 x 384``."""
        if not self.factors:
            return "nothing" if self.bias is None else "a constant"
        kind = "a matrix" if len(self.factors) == 1 else "matrices"
        return f"{kind} of {' and '.join(f'{factor.shape[0]} x {factor.shape[1]}' for factor in self.factors)}"


def find_sublayers(view: GraphView, profile: Profile) -> tuple[Sublayer, ...]:
    """All sublayers in graph order.

    A branch that holds another sublayer is none, nor is one that writes a graph output, or whose sum is of fewer rows than it reads (the
    last attention where only the class token is asked for).
    """
    side = side_tensors(view)
    found: list[Sublayer] = []
    for node in view.nodes:
        operands = [name for name in node.inputs if name and not view.is_constant(name)]
        if node.op not in ("Add", "Sum") or node.domain or len(node.inputs) != 2 or len(set(operands)) != 2:
            continue
        for stream, end in (operands, operands[::-1]):
            sublayer = _sublayer(view, profile, side, node, stream, end, f"sublayer.{len(found)}")
            if sublayer is not None and not any(other.join.index in sublayer.nodes for other in found):
                found.append(sublayer)
                break
    return tuple(found)


def substitute(model: Model, sublayers: tuple[Sublayer, ...], chosen: Mapping[str, Substitute]) -> Model:
    """The model with the branches of ``chosen``, by name, replaced, and without the nodes that only they needed.

    Raises:
        KeyError: a name is that of no sublayer.
    """
    known = {sublayer.name: sublayer for sublayer in sublayers}
    surgeon = Surgeon(model)
    for name, stand_in in chosen.items():
        sublayer = known[name]
        join = surgeon.nodes[sublayer.join.index]
        value = _written(surgeon, sublayer, stand_in)
        if value is None:
            join.op, join.inputs = "Identity", [surgeon.tensors[sublayer.stream]]
        else:
            join.inputs[sublayer.join.inputs.index(sublayer.end)] = value
    return surgeon.close()


def _written(surgeon: Surgeon, sublayer: Sublayer, stand_in: Substitute) -> gs.Tensor | None:
    """The tensor that a substitute adds to the stream; None for nothing."""
    value: gs.Tensor | None = None
    for factor in stand_in.factors:
        product = surgeon.variable(sublayer.end, sublayer.dtype)
        left = value if value is not None else surgeon.tensors[sublayer.start]
        surgeon.add("MatMul", [left, surgeon.constant(factor.astype(sublayer.dtype), sublayer.end)], product, sublayer.end)
        value = product
    if stand_in.bias is None:
        return value
    bias = surgeon.constant(stand_in.bias.astype(sublayer.dtype), sublayer.end)
    if value is None:
        return bias
    total = surgeon.variable(sublayer.end, sublayer.dtype)
    surgeon.add("Add", [value, bias], total, sublayer.end)
    return total


def _sublayer(view: GraphView, profile: Profile, side: frozenset[str], join: Node, stream: str, end: str, name: str) -> Sublayer | None:
    shape = profile.shape(stream)
    width = profile.dim(stream, len(shape) - 1) if shape else None
    if shape is None or len(shape) < 3 or width is None or profile.shape(end) != shape or len(view.consumers[end]) != 1:
        return None
    inside = view.ancestors([end]) - view.ancestors([stream])
    nodes = [view.nodes[index] for index in sorted(inside)]
    made = {output for node in nodes for output in node.outputs}
    features = {read for node in nodes for read in node.inputs if read and read not in made and _is_feature(view, side, read)}
    written = {output for output in made & view.graph_outputs if output not in side}
    dtypes = {weight.dtype for node in nodes if (weight := _matrix(view, node, width)) is not None}
    if features != {stream} or written or len(dtypes) != 1:
        return None
    return Sublayer(name, stream, _start(view, profile, inside, stream), end, join, width, dtypes.pop(), frozenset(inside))


def _is_feature(view: GraphView, side: frozenset[str], name: str) -> bool:
    """Whether a tensor carries what the network has made of the input; masks, sizes and ids do not."""
    maker = view.producer.get(name)
    if maker is not None:
        return not (name in side or view.is_constant(name) or maker.op in MEASURES)
    return any(value.name == name and value.type.tensor_type.elem_type in _FLOATS for value in view.model.proto.graph.input)


def _matrix(view: GraphView, node: Node, width: int) -> np.ndarray | None:
    """The constant matrix that a node multiplies activations by, if one of its sides is the stream's width."""
    value = view.value(node.inputs[1]) if node.op in ("MatMul", "Gemm") else None
    return value if value is not None and value.ndim == 2 and width in value.shape else None


def _start(view: GraphView, profile: Profile, inside: set[int], stream: str) -> str:
    """The stream as the branch reads it: behind a norm that is one operator, if that is all that reads the stream."""
    readers = [node for node, _ in view.consumers[stream] if node.index in inside and node.op not in MEASURES]
    if len(readers) == 1 and readers[0].op in NORMS and begins_norm(view, profile, readers[0]):
        return readers[0].outputs[0]
    return stream
