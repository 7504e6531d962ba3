"""Mask gradients without masks.

Multiply a unit's activation a by a mask m. At m = 1 the derivative of the loss by m is the sum of a * dL/da over all positions of the unit,
so one backward pass to the activations serves every kind of unit. Samples do not interact, so the gradient of the summed loss, kept
apart by sample, is each sample's own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.errors import InputError
from onnxprune.graph.autodiff.reverse import differentiate
from onnxprune.graph.autodiff.rules import NoGradient, Tape
from onnxprune.graph.lowering import lower
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.view import GraphView

Link = Literal["softmax", "identity"]
TARGET = "onnxprune.target"
WEIGHT = "onnxprune.weight"
GRADIENT = "onnxprune.grad."
ADJOINT = "onnxprune.adjoint."


@dataclass(frozen=True)
class Tap:
    """Where a mask would be multiplied.

    Attributes:
        name: the gradient is the output ``onnxprune.grad.<name>``.
        tensor: the activation.
        axis: the axis the mask lives on.
        labels: int64 [size of the axis], the unit that each position belongs to, -1 for none.
        units: number of units.
    """

    name: str
    tensor: str
    axis: int
    labels: np.ndarray
    units: int


def gradient_model(
    model: Model,
    taps: Sequence[Tap],
    output: str,
    link: Link,
    profile: Profile | None = None,
    samples: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """A model that computes per-sample mask gradients of a loss at ``output``.

    Its inputs are the model's own, ``onnxprune.target`` (float, shape of ``output``) and ``onnxprune.weight`` (float, shape of ``output``
    without its last axis; 0 drops a padded position). The loss of a sample is the weighted sum over its positions of the cross-entropy of
    softmax(output) to the target (link ``softmax``) or of half the squared distance to it (link ``identity``). The outputs are
    ``onnxprune.grad.<tap>``, float [batch, units]. Dynamic sizes stay dynamic; weights are shared with ``model``.

    Args:
        profile: a profile of ``model``, if there is one already; of no use where composites are spelled out first.
        samples: real inputs (axis 0 = samples) to profile with where made-up ones do not run.

    Raises:
        InputError: a tensor does not exist or a tap does not fit it; an operator has no rule (:class:`MissingGradient`).
    """
    tape = tape_of(model, [output, *(tap.tensor for tap in taps)], profile, samples)
    seed = seed_of(tape, output, link)
    adjoints = differentiate(tape, {output: seed}, list(dict.fromkeys(tap.tensor for tap in taps)))
    for tap in taps:
        emit_tap(tape, tap, adjoints.get(tap.tensor))
    made = [helper.make_tensor_value_info(GRADIENT + tap.name, TensorProto.FLOAT, [None, tap.units]) for tap in taps]
    return _closed(tape, output, made)


def adjoint_model(
    model: Model,
    tensors: Sequence[str],
    read: Sequence[str],
    output: str,
    link: Link,
    samples: Mapping[str, np.ndarray] | None = None,
) -> tuple[Model, frozenset[str]]:
    """A model of the inputs and the loss of :func:`gradient_model` that returns adjoints and activations as they are.

    Its outputs are ``onnxprune.adjoint.<tensor>``, the derivative of the summed loss by each of ``tensors``, and the activations ``read``.

    Returns:
        The model, and the ``tensors`` that the loss depends on: the others have no adjoint among the outputs.

    Raises:
        InputError: as for :func:`gradient_model`.
    """
    tape = tape_of(model, [output, *tensors, *read], None, samples)
    adjoints = differentiate(tape, {output: seed_of(tape, output, link)}, list(dict.fromkeys(tensors)))
    felt = [tensor for tensor in dict.fromkeys(tensors) if tensor in adjoints]
    for tensor in felt:
        tape.op("Identity", adjoints[tensor], output=ADJOINT + tensor)
    names = [*(ADJOINT + tensor for tensor in felt), *dict.fromkeys(read)]
    return _closed(tape, output, [helper.make_empty_tensor_value_info(name) for name in names]), frozenset(felt)


def tape_of(model: Model, tensors: Sequence[str], profile: Profile | None, samples: Mapping[str, np.ndarray] | None) -> Tape:
    lowered = _with_scatter_add(lower(model))
    if profile is None or lowered is not model:
        profile = take_profile(lowered, samples)
    return Tape(_alive(lowered, tensors), profile)


def _closed(tape: Tape, output: str, made: Sequence[onnx.ValueInfoProto]) -> Model:
    """The graph with what was emitted, the inputs of the loss, and these outputs alone."""
    graph = tape.proto.graph
    graph.node.extend(tape.nodes)
    rank = len(tape.dims(output)[0])
    graph.input.append(helper.make_tensor_value_info(TARGET, TensorProto.FLOAT, [None] * rank))
    graph.input.append(helper.make_tensor_value_info(WEIGHT, TensorProto.FLOAT, [None] * (rank - 1)))
    del graph.output[:]
    graph.output.extend(made)
    return drop_dead(tape.model.with_proto(tape.proto))


def seed_of(tape: Tape, output: str, link: Link) -> str:
    """Adjoint of the output: weight * (prediction - target)."""
    dtype = tape.type_of(output) or TensorProto.FLOAT
    target, weight = (TARGET, WEIGHT) if dtype == TensorProto.FLOAT else (tape.op("Cast", name, to=dtype) for name in (TARGET, WEIGHT))
    rank = len(tape.dims(output)[0])
    prediction = tape.op("Softmax", output, axis=rank - 1) if link == "softmax" else output
    return tape.op("Mul", tape.op("Sub", prediction, target), tape.unsqueeze(weight, rank - 1))


_ELEMENTWISE_LOOKUPS = frozenset({"GatherElements", "GatherND"})


def _with_scatter_add(model: Model) -> Model:
    """Opset 16, whose scatters add up, where elements are gathered: from 13 on the definitions of what inference uses only grew."""
    if not 13 <= model.opset() < 16 or not any(node.op_type in _ELEMENTWISE_LOOKUPS for node in model.proto.graph.node):
        return model
    proto = model.copy_proto()
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = 16
    return model.with_proto(proto)


def emit_tap(tape: Tape, tap: Tap, adjoint: str | None) -> None:
    """activation * adjoint, summed over everything but sample and unit."""
    dims = tape.dims(tap.tensor)
    rank = len(dims[0])
    axis = tap.axis % rank
    output = GRADIENT + tap.name
    if axis == 0 or len(tap.labels) != dims[0][axis]:
        raise InputError(
            f"tap {tap.name!r} has {len(tap.labels)} labels for axis {tap.axis} of {tap.tensor!r}, whose shape is {list(dims[0])}; "
            "labels must cover an axis other than the first"
        )
    sample = _sample_input(tape, tap.tensor)
    batches = (tape.dims(sample)[0][0], tape.dims(sample)[1][0])
    batch = tape.op("Gather", tape.shape_of(sample), tape.int64([0]), axis=0)
    if adjoint is None:
        nothing = tape.op("Concat", batch, tape.int64([tap.units]), axis=0)
        tape.op("Expand", tape.array(np.zeros(1, np.float32)), nothing, output=output)
        return
    product = tape.op("Mul", tap.tensor, adjoint)
    if (dims[0][0], dims[1][0]) != batches:
        _require_batches(tap, dims, batches)
        rest = [tape.size_of(tap.tensor, other) for other in range(1, rank)]
        product = tape.op("Reshape", product, tape.op("Concat", batch, tape.int64([-1]), *rest, axis=0))
        rank, axis = rank + 1, axis + 1
    total = tape.reduce("ReduceSum", product, [other for other in range(1, rank) if other != axis], keepdims=False)
    _by_unit(tape, tap, total, output)


def _sample_input(tape: Tape, tensor: str) -> str:
    """A graph input whose leading axis counts the samples: one that ``tensor`` is computed from, as two towers have a batch each."""
    read = {name for index in tape.view.ancestors([tensor]) for name in tape.view.nodes[index].inputs}
    for name in sorted(tape.model.input_names, key=lambda name: name not in read):
        if len(tape.dims(name)[0]) > 0:
            return name
    raise InputError("no input of the model has a sample axis, so gradients cannot be told apart by sample")


def _by_unit(tape: Tape, tap: Tap, total: str, output: str) -> None:
    dtype = tape.type_of(tap.tensor) or TensorProto.FLOAT
    if dtype != TensorProto.FLOAT:
        total = tape.op("Cast", total, to=TensorProto.FLOAT)
    if tap.units == len(tap.labels) and np.array_equal(tap.labels, np.arange(tap.units)):
        tape.op("Identity", total, output=output)
        return
    membership = (tap.labels[:, None] == np.arange(tap.units)[None, :]).astype(np.float32)
    tape.op("MatMul", total, tape.array(membership), output=output)


def _require_batches(tap: Tap, dims: tuple[tuple[int, ...], ...], batches: tuple[int, int]) -> None:
    if any(shape[0] % batch for shape, batch in zip(dims, batches, strict=True)):
        raise NoGradient(
            f"tap {tap.name!r}: the first axis of {tap.tensor!r} (sizes {dims[0][0]} and {dims[1][0]}) is no multiple of the "
            f"batch sizes {batches[0]} and {batches[1]}, so its rows cannot be told apart by sample"
        )


def _alive(model: Model, tensors: Sequence[str]) -> Model:
    """The part of a model that computes ``tensors``; all graph inputs stay."""
    view = GraphView(model)
    for name in tensors:
        if name not in view.producer and name not in view.graph_inputs:
            raise InputError(f"the graph has no tensor {name!r} that depends on its inputs")
    kept = view.ancestors(list(tensors))
    proto = model.copy_proto()
    del proto.graph.node[:]
    proto.graph.node.extend(node.proto for node in view.nodes if node.index in kept)
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(tensors))
    return model.with_proto(proto)


def drop_dead(model: Model) -> Model:
    """Without nodes and initializers that no output needs."""
    view = GraphView(model)
    kept = view.ancestors(list(model.output_names))
    proto = model.copy_proto()
    del proto.graph.node[:]
    proto.graph.node.extend(node.proto for node in view.nodes if node.index in kept)
    del proto.graph.value_info[:]
    used = {name for node in view.nodes if node.index in kept for name in node.inputs} | _captured_names(view, kept)
    initializers: list[onnx.TensorProto] = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(initializers)
    return model.with_proto(proto)


def _captured_names(view: GraphView, kept: set[int]) -> set[str]:
    return {name for name, uses in view.consumers.items() for node, slot in uses if slot < 0 and node.index in kept}
