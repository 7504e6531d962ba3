"""Masks as graph inputs: the meaning of a pruning decision, before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from onnxprune.graph.anatomy import Anatomy, Site
from onnxprune.graph.hidden import Narrowing, named_stream
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile
from onnxprune.graph.slicing import Kept
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView

MASK = "onnxprune.mask."


def masked_model(anatomy: Anatomy) -> Model:
    """The dense graph with a mask of every site multiplied in where the site is read.

    Adds one float input ``onnxprune.mask.<site>`` of shape [units] per site; all ones gives the original outputs.
    """
    surgeon = Surgeon(anatomy.model)
    for site in anatomy.sites:
        for consumer in site.consumers:
            leaf = anatomy.view.value(site.group.leaves[0].tensor)
            assert leaf is not None
            name = MASK + site.name
            if name not in surgeon.tensors:
                mask = surgeon.tensors[name] = _input(surgeon, name, leaf.dtype, site.units)
                surgeon.graph.inputs.append(mask)
            _multiply(surgeon, anatomy, consumer.tensor, consumer.axis, consumer.labels, consumer.leaf.node.index, name, leaf.dtype)
    return surgeon.close()


def _input(surgeon: Surgeon, name: str, dtype: np.dtype, units: int):  # type: ignore[no-untyped-def]
    variable = surgeon.variable(name, dtype, [units])
    del surgeon.tensors[variable.name]
    variable.name = name
    return variable


def _multiply(
    surgeon: Surgeon, anatomy: Anatomy, tensor: str, axis: int, labels: np.ndarray, reader: int, mask: str, dtype: np.dtype
) -> None:
    """Insert ``tensor * mask[labels]`` in front of one reader; positions outside the group are multiplied by one."""
    rank = len(anatomy.profile.shape(tensor) or ())
    extended, picked, shaped, masked = (surgeon.variable(mask, dtype) for _ in range(4))
    one = surgeon.constant(np.ones(1, dtype), mask)
    surgeon.add("Concat", [surgeon.tensors[mask], one], extended, mask, axis=0)
    last = int(labels.max()) + 1
    surgeon.add("Gather", [extended, surgeon.constant(np.where(labels < 0, last, labels).astype(np.int64), mask)], picked, mask, axis=0)
    shape = [1] * rank
    shape[axis] = len(labels)
    surgeon.add("Reshape", [picked, surgeon.constant(np.array(shape, np.int64), mask)], shaped, mask)
    edit = surgeon.nodes[reader]
    slots = [slot for slot, name in enumerate(anatomy.view.nodes[reader].inputs) if name == tensor]
    surgeon.add("Mul", [edit.inputs[slots[0]], shaped], masked, mask)  # masked already, if another site has a part of this axis
    for slot in slots:
        edit.inputs[slot] = masked


def projected_model(model: Model, profile: Profile, narrowings: Sequence[Narrowing]) -> Model:
    """The wide model with every tensor of the streams projected on what their bases span: the meaning of narrowing them.

    Raises:
        InputError: a stream is not there or has another width.
    """
    surgeon, view = Surgeon(model), GraphView(model)
    for item in narrowings:
        stream = named_stream(view, profile, item)
        matrix = surgeon.constant((item.basis @ item.back).astype(np.float32), item.stream)
        outside = {place for bridge in stream.bridges if bridge.inward for place in bridge.readers}
        entering = {bridge.tensor for bridge in stream.bridges if bridge.inward}
        for name in sorted(stream.members):
            if stream.places[name] != len(profile.shape(name) or ()) - 1:
                continue  # it is made into a tensor that has the stream along its last axis
            tensor, other = surgeon.tensors[name], surgeon.variable(name, np.float32)
            if name in view.graph_outputs and name not in entering:
                maker = tensor.inputs[0]
                maker.outputs = [other if operand is tensor else operand for operand in maker.outputs]
                surgeon.add("MatMul", [other, matrix], tensor, item.stream)
                continue
            for node, slot in view.consumers.get(name, ()):
                if (node.index, slot) not in outside:
                    surgeon.nodes[node.index].inputs[slot] = other
            surgeon.add("MatMul", [tensor, matrix], other, item.stream)
    return surgeon.close()


def mask_feeds(sites: tuple[Site, ...], kept: Kept, dtype: np.dtype | type = np.float32) -> dict[str, np.ndarray]:
    """Mask inputs for a decision: 1 for kept units, 0 for removed ones; sites that are not named keep everything."""
    feeds = {}
    for site in sites:
        mask = np.ones(site.units, dtype)
        if site.name in kept:
            mask[:] = 0
            mask[np.asarray(kept[site.name], np.int64)] = 1
        feeds[MASK + site.name] = mask
    return feeds


def with_outputs(model: Model, names: Mapping[str, onnx.ValueInfoProto | None] | list[str] | tuple[str, ...], keep: bool = True) -> Model:
    """A copy with extra graph outputs (activations by name); ``keep=False`` drops the original outputs first."""
    proto = model.copy_proto()
    if not keep:
        del proto.graph.output[:]
    present = {value.name for value in proto.graph.output}
    for name in names:
        if name not in present:
            proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    return model.with_proto(proto)
