"""What can be said of a computed tensor without running it: that all its elements are one value, or that none is infinite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from onnxprune.graph.view import GraphView

_MOVING = frozenset(
    {"Expand", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Slice", "Tile", "Gather", "ReduceMax", "ReduceMin"}
)
"""Operators whose result holds elements of their first operand and nothing else."""

_ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    "Add": np.add,
    "And": np.logical_and,
    "Greater": np.greater,
    "Max": np.maximum,
    "Mul": np.multiply,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Sub": np.subtract,
}


def uniform_value(view: GraphView, tensor: str) -> Any:
    """The value (a numpy scalar) of every element of a tensor if it is the same whatever is fed, else None."""
    array = view.value(tensor)
    if array is not None:
        return array.flat[0] if array.size and bool((array == array.flat[0]).all()) else None
    node = view.producer.get(tensor)
    if node is None or node.domain or not node.inputs:
        return None
    if node.op in _MOVING:
        return uniform_value(view, node.inputs[0])
    if node.op == "ConstantOfShape":
        return numpy_helper.to_array(node.attrs["value"]).flat[0] if "value" in node.attrs else np.float32(0)
    if node.op == "Where":
        chosen = uniform_value(view, node.inputs[0])
        return None if chosen is None else uniform_value(view, node.inputs[1 if chosen else 2])
    if node.op != "Cast" and node.op not in _ELEMENTWISE:
        return None
    operands = [uniform_value(view, name) for name in node.inputs]
    if any(value is None for value in operands):
        return None
    if node.op == "Cast":
        return np.asarray(operands[0]).astype(helper.tensor_dtype_to_np_dtype(node.attrs["to"]))[()]
    with np.errstate(all="ignore"):
        return np.asarray(_ELEMENTWISE[node.op](*operands))[()]


def is_finite(view: GraphView, tensor: str) -> bool:
    """Whether no element of a float tensor can be infinite or not a number, whatever is fed. False if that is not known."""
    array = view.value(tensor)
    if array is not None:
        return bool(np.isfinite(array).all())
    node = view.producer.get(tensor)
    if node is None or node.domain:
        return False
    if node.op in _MOVING:
        return is_finite(view, node.inputs[0])
    return node.op == "Where" and all(is_finite(view, name) for name in node.inputs[1:])
