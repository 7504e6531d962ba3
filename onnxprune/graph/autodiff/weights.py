"""Gradients of weights: one graph for all steps of an optimiser, the weights among its inputs.

An initializer that becomes an input is fed anew with every run, so a step of the optimiser builds no session and copies no graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from onnxprune.graph.autodiff.gradient import GRADIENT, TARGET, WEIGHT, Link, drop_dead, seed_of, tape_of
from onnxprune.graph.autodiff.reverse import differentiate
from onnxprune.graph.autodiff.rules import Tape
from onnxprune.graph.lowering import lower
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, Node


@dataclass(frozen=True)
class Parameter:
    """A weight that can be trained.

    Attributes:
        name: the initializer.
        kind: ``matrix`` of a product, or ``vector``, one value per channel: a bias, or the scale or shift of a norm.
        uses: every (node name, input slot) that reads it.
    """

    name: str
    kind: str
    uses: tuple[tuple[str, int], ...]


def parameters_of(model: Model) -> tuple[Parameter, ...]:
    """The float weights that every reader uses as a matrix of a product, or every reader as a value per channel, in order of the graph.

    Tables that are looked up, constants of one element and weights of convolutions are none.
    """
    view, plain = GraphView(model), GraphView(lower(model))
    types = {tensor.name: tensor.data_type for tensor in model.proto.graph.initializer}
    found: dict[str, Parameter] = {}
    for node in view.nodes:
        for name in node.inputs:
            if types.get(name) == TensorProto.FLOAT and name not in found:
                kinds = {_kind(plain, reader, slot) for reader, slot in plain.consumers.get(name, ())}
                uses = tuple((reader.name, slot) for reader, slot in view.consumers[name])
                if len(kinds) == 1 and (kind := kinds.pop()) is not None and name not in view.graph_outputs:
                    found[name] = Parameter(name, kind, uses)
    return tuple(found.values())


def _kind(view: GraphView, node: Node, slot: int) -> str | None:
    """What the constant at ``slot`` of a node is, None if it is nothing to train."""
    if slot < 0:
        return None
    value = view.value(node.inputs[slot])
    assert value is not None
    if node.op == "Transpose" and value.ndim == 2:
        kinds = {_product(reader, at) for reader, at in view.consumers.get(node.outputs[0], ())}
        return "matrix" if kinds == {True} and node.outputs[0] not in view.graph_outputs else None
    if value.ndim == 2 and _product(node, slot):
        return "matrix"
    if value.size < 2 or value.ndim != 1:
        return None
    vectors = {"Gemm": (2,), "LayerNormalization": (1, 2), "RMSNormalization": (1,), "Conv": (2,)}
    if slot in vectors.get(node.op, ()):
        return "vector"
    varies = any(not view.is_constant(name) for name in node.inputs)
    return "vector" if node.op in ("Add", "Sub", "Mul") and varies else None


def _product(node: Node, slot: int) -> bool:
    return (node.op == "MatMul" and slot < 2) or (node.op == "Gemm" and slot < 2)


def weight_gradient_model(
    model: Model,
    names: Sequence[str],
    output: str,
    link: Link,
    hints: Sequence[str] = (),
    samples: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """A model that computes gradients of a loss, summed over the batch, by weights that are inputs.

    The inputs are those of ``model``, ``onnxprune.target`` and ``onnxprune.weight`` (see
    :func:`~onnxprune.graph.autodiff.gradient.gradient_model`), and under their own names those of the initializers ``names`` that the
    gradients depend on. The outputs are ``onnxprune.grad.<name>`` in the shapes of the weights; a weight that the loss does not depend on
    has none.

    Args:
        names: initializers, as :func:`parameters_of` finds them.
        hints: tensors whose weighted half squared distance to ``onnxprune.target.<tensor>`` adds to the loss, by weights
            ``onnxprune.weight.<tensor>`` of their shape without its last axis: what a teacher has there (Romero et al., ICLR 2015).
        samples: real inputs (axis 0 = samples) to profile with where made-up ones do not run.

    Raises:
        InputError: a tensor does not exist; an operator has no rule (:class:`MissingGradient`).
    """
    tape = tape_of(model, [output, *hints], None, samples)
    seeds = {output: seed_of(tape, output, link)} | {hint: _pull(tape, hint) for hint in hints}
    adjoints = differentiate(tape, seeds, list(names))
    felt = [name for name in names if name in adjoints]
    for name in felt:
        tape.op("Identity", adjoints[name], output=GRADIENT + name)
    return _closed(tape, output, felt, hints)


def _pull(tape: Tape, hint: str) -> str:
    """Adjoint of a hint: weight * (what is there - what should be)."""
    weight = tape.unsqueeze(f"{WEIGHT}.{hint}", tape.rank(hint) - 1)
    return tape.op("Mul", tape.op("Sub", hint, f"{TARGET}.{hint}"), weight)


def _closed(tape: Tape, output: str, felt: Sequence[str], hints: Sequence[str]) -> Model:
    graph = tape.proto.graph
    graph.node.extend(tape.nodes)
    rank = tape.rank(output)
    graph.input.append(helper.make_tensor_value_info(TARGET, TensorProto.FLOAT, [None] * rank))
    graph.input.append(helper.make_tensor_value_info(WEIGHT, TensorProto.FLOAT, [None] * (rank - 1)))
    for hint in hints:
        ranks = tape.rank(hint)
        graph.input.append(helper.make_tensor_value_info(f"{TARGET}.{hint}", TensorProto.FLOAT, [None] * ranks))
        graph.input.append(helper.make_tensor_value_info(f"{WEIGHT}.{hint}", TensorProto.FLOAT, [None] * (ranks - 1)))
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(GRADIENT + name, TensorProto.FLOAT, tape.dims(name)[0]) for name in felt)
    closed = drop_dead(tape.model.with_proto(tape.proto)).copy_proto()
    kept = [tensor for tensor in closed.graph.initializer if tensor.name not in felt]
    fed = {value.name for value in closed.graph.input}
    for tensor in closed.graph.initializer:
        if tensor.name in felt and tensor.name not in fed:
            closed.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del closed.graph.initializer[:]
    closed.graph.initializer.extend(kept)
    return tape.model.with_proto(closed)
