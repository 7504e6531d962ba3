"""Reverse mode through one piece of a graph: adjoints of what leaves it come in, adjoints of what enters it go out.

Chained from the last piece to the first, pieces give the same mask gradients as one graph would, with the weights of one piece in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from onnxprune.graph.autodiff.gradient import GRADIENT, TARGET, WEIGHT, Link, Tap, drop_dead, emit_tap, seed_of
from onnxprune.graph.autodiff.reverse import differentiate
from onnxprune.graph.autodiff.rules import Tape
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile

_INCOMING = "onnxprune.adjoint."
_OUTGOING = "onnxprune.passed."


@dataclass(frozen=True)
class Backward:
    """``model`` computes mask gradients (outputs ``onnxprune.grad.<tap>``) and adjoints.

    ``seeds`` maps tensors that leave the piece to the inputs that take their adjoints, ``adjoints`` tensors that enter it to the outputs
    that give theirs.
    """

    model: Model
    seeds: Mapping[str, str]
    adjoints: Mapping[str, str]


def piece_gradient(
    piece: Model,
    profile: Profile,
    taps: Sequence[Tap],
    leaving: Sequence[str],
    entering: Sequence[str],
    loss: tuple[str, Link] | None,
) -> Backward:
    """Build the gradient graph of one piece.

    Args:
        piece: nodes of the piece; its first input leads with samples.
        profile: a profile of the whole graph.
        taps: those whose activations this piece makes.
        leaving: tensors made here whose adjoints are known.
        entering: inputs of the piece whose adjoints are wanted.
        loss: output and link where the piece makes the output; it then reads ``onnxprune.target`` and ``onnxprune.weight`` as well.

    Raises:
        InputError: as :func:`onnxprune.graph.autodiff.gradient_model`.
    """
    tape = Tape(_with_known_sizes(piece, profile), profile)
    graph = tape.proto.graph
    seeds: dict[str, str] = {}
    for number, name in enumerate(leaving):
        seeds[name] = f"{_INCOMING}{number}"
        kind = tape.type_of(name) or TensorProto.FLOAT
        graph.input.append(helper.make_tensor_value_info(seeds[name], kind, [None] * len(tape.dims(name)[0])))
    starts = dict(seeds)
    if loss is not None:
        rank = len(tape.dims(loss[0])[0])
        graph.input.append(helper.make_tensor_value_info(TARGET, TensorProto.FLOAT, [None] * rank))
        graph.input.append(helper.make_tensor_value_info(WEIGHT, TensorProto.FLOAT, [None] * (rank - 1)))
        starts[loss[0]] = seed_of(tape, *loss)
    found = differentiate(tape, starts, list(dict.fromkeys([*entering, *(tap.tensor for tap in taps)])))
    for tap in taps:
        emit_tap(tape, tap, found.get(tap.tensor))
    passed = {name: f"{_OUTGOING}{number}" for number, name in enumerate(entering) if name in found}
    for name, output in passed.items():
        tape.op("Identity", found[name], output=output)
    graph.node.extend(tape.nodes)
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(GRADIENT + tap.name, TensorProto.FLOAT, [None, tap.units]) for tap in taps)
    graph.output.extend(helper.make_empty_tensor_value_info(output) for output in passed.values())
    return Backward(drop_dead(tape.model.with_proto(tape.proto)), seeds, passed)


def _with_known_sizes(piece: Model, profile: Profile) -> Model:
    """Sizes of the inputs that were the same in both profile runs, but for the leading one, as constants."""
    proto = piece.copy_proto()
    for value in proto.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            size = profile.dim(value.name, axis)
            if axis and size is not None:
                dim.CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=size))
    return piece.with_proto(proto)
