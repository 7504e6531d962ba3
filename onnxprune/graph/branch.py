"""From the product that reads a site to the residual stream: what lies between is linear, so an error there is an error here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.graph.tail import MEASURES, MOVING, follow_tail, is_norm
from onnxprune.graph.view import GraphView, Node

_PASSING = frozenset("Identity Cast Dropout Reshape Squeeze Unsqueeze Flatten".split())


@dataclass(frozen=True, eq=False)
class Branch:
    """The way from a product to the sum it joins.

    ``total`` is the tensor after the residual addition, or in front of what normalises the branch or moves its rows otherwise than by one
    permutation of axes (``order``, None if there is none). ``gain`` is the product of the scales on the way (LayerScale, alpha), ``bias``
    the (node index, slot) of the first bias on the way that is as wide as the product, ``bias_gain`` the scales before it.
    """

    total: str
    gain: np.ndarray
    bias: tuple[int, int] | None
    bias_gain: np.ndarray
    order: tuple[int, ...] | None = None


def follow_branch(view: GraphView, node: Node, width: int) -> Branch | None:
    """Follow the output of ``node`` to the first addition with another activation, or to the first node that normalises or moves rows.

    None if something else comes first.
    """
    gain = np.full(width, float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0)
    bias: tuple[int, int] | None = None
    bias_gain = gain
    if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2] and node.attrs.get("beta", 1.0) == 1.0:
        bias = (node.index, 2)
    order: tuple[int, ...] | None = None
    front: Branch | None = None
    tensor = node.outputs[0]
    for _ in range(12):
        readers = [reader for reader in view.consumers.get(tensor, []) if reader[0].op not in MEASURES]
        if any(is_norm(reader) or reader.op in MOVING for reader, _ in readers):
            if front is None and follow_tail(view, tensor) is None:
                return None
            front = front or Branch(tensor, gain, bias, bias_gain)
        if len(readers) != 1 or readers[0][1] < 0:
            return front
        reader, slot = readers[0]
        others = [(position, name) for position, name in enumerate(reader.inputs) if name and position != slot]
        if reader.op in ("Add", "Sum"):
            if any(not view.is_constant(name) for _, name in others):
                return Branch(reader.outputs[0], gain, bias, bias_gain, order)
            constant = view.value(others[0][1]) if len(others) == 1 and order is None else None
            if constant is None:
                return front
            if bias is None and constant.size == width and constant.shape[-1] == width:
                bias, bias_gain = (reader.index, others[0][0]), gain
        elif reader.op == "Transpose" and "perm" in reader.attrs and order is None:
            order = tuple(reader.attrs["perm"])
        elif reader.op == "Mul" or (reader.op == "Div" and slot == 0):
            constant = view.value(others[0][1])
            if constant is None or order is not None or not (constant.size == 1 or constant.shape[-1] == constant.size == width):
                return front
            gain = gain * constant.reshape(-1) if reader.op == "Mul" else gain / constant.reshape(-1)
        elif reader.op not in _PASSING or order is not None:
            return front
        tensor = reader.outputs[0]
    return front
