"""Norms along the last axis of an activation, as one operator or spelled out in sums and products."""

from __future__ import annotations

import numpy as np

from onnxprune.graph.profile import Profile
from onnxprune.graph.view import GraphView, Node

NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
"""Operators that normalise by the length of a row; the first one removes its mean as well."""


def begins_norm(view: GraphView, profile: Profile, node: Node) -> bool:
    """Whether ``node`` is the first node of a norm along the last axis of its first input."""
    shape = profile.shape(node.inputs[0]) if node.inputs else None
    if shape is None or len(shape) < 2 or node.domain:
        return False
    last = len(shape) - 1
    if node.op in NORMS:
        return bool(node.attrs.get("axis", -1) % len(shape) == last)
    if is_centring(view, profile, node, last):
        return True
    return squares(view, profile, node, last) and not _is_centred(view, profile, node.inputs[0], last)


def is_centring(view: GraphView, profile: Profile, mean: Node, axis: int) -> bool:
    """A mean along ``axis`` that is only subtracted again from what it is the mean of."""
    if not _means(view, profile, mean, axis):
        return False
    readers = view.consumers.get(mean.outputs[0], [])
    return bool(readers) and all(reader.op == "Sub" and slot == 1 and reader.inputs[0] == mean.inputs[0] for reader, slot in readers)


def squares(view: GraphView, profile: Profile, node: Node, axis: int) -> bool:
    """x * x, or x to the power of two, whose readers all take the mean along ``axis``."""
    if node.op == "Mul":
        square = node.inputs[0] == node.inputs[1]
    else:
        exponent = view.value(node.inputs[1]) if node.op == "Pow" else None
        square = exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 2
    readers = view.consumers.get(node.outputs[0], [])
    return square and bool(readers) and all(_means(view, profile, reader, axis) for reader, _ in readers)


def _is_centred(view: GraphView, profile: Profile, tensor: str, axis: int) -> bool:
    maker = view.producer.get(tensor)
    mean = view.producer.get(maker.inputs[1]) if maker is not None and maker.op == "Sub" else None
    return mean is not None and is_centring(view, profile, mean, axis)


def _means(view: GraphView, profile: Profile, node: Node, axis: int) -> bool:
    """A mean along ``axis`` and no other, which it keeps."""
    if node.op != "ReduceMean" or not node.attrs.get("keepdims", 1):
        return False
    axes = node.attrs.get("axes")
    axes = view.value(node.inputs[1]) if axes is None and len(node.inputs) > 1 else axes
    rank = len(profile.shape(node.inputs[0]) or ())
    return axes is not None and [int(value) % rank for value in np.atleast_1d(axes)] == [axis]
