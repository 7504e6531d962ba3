"""How much attention each token gets, from the tokens that the output reads or from all of them, or how much it is expected to get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxprune.graph.emitter import Emitter
from onnxprune.graph.profile import Profile
from onnxprune.graph.token_axis import TokenAxis
from onnxprune.graph.uniform import uniform_value
from onnxprune.graph.view import GraphView, Node

_ROWWISE = frozenset({"Softmax", "Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity"})

Biases = Mapping[tuple[int, int], str]
"""By (node, input slot) what an attention reads there: scores of keys with the logarithm of their sizes, or that logarithm alone."""


class Attention:
    """Rows of attention maps, computed beside the maps: a map that somebody else reads could not be fused."""

    def __init__(
        self,
        emitter: Emitter,
        view: GraphView,
        profile: Profile,
        axis: TokenAxis,
        side: Callable[[str, Node], str],
        biases: Biases,
    ) -> None:
        """
        Args:
            side: the version of a side tensor that a node reads.
        """
        self.e, self.view, self.profile, self.axis, self.side, self.biases = emitter, view, profile, axis, side, biases

    def received(self, softmax: Node, batch: str, count: str, weights: str | None) -> str:
        """Mean attention that each token gets over heads and queries, float [B, N].

        Queries are the leading tokens, if there are any. Without them all are, each as often as ``weights`` [B, N] says.
        """
        e, lead = self.e, self.axis.leading
        maps = self._rows(softmax.outputs[0], softmax) if lead else softmax.outputs[0]
        if e.rank(softmax.outputs[0]) == 3:  # heads are part of the batch
            maps = e.op("Reshape", maps, e.op("Concat", batch, e.int64([-1]), e.int64([lead]) if lead else count, count, axis=0))
        if not lead and weights is not None:
            maps = e.op("Mul", maps, e.unsqueeze(weights, 1, 3))
        return e.reduce("ReduceMean", maps, [1, 2], keepdims=False)

    def expected(self, features: str, weights: Sequence[float]) -> str:
        """Weights [C] times unit features [B, N, C], as numbers between 0 and 1, float [B, N].

        As a sum and not as a product of matrices: what prunes or rounds those should leave a ranking alone.
        """
        e = self.e
        total = e.reduce("ReduceSum", e.op("Mul", features, e.array(np.array(weights, np.float32))), [2], keepdims=False)
        return e.op("Sigmoid", e.op("Div", total, e.reduce("ReduceL2", features, [2], keepdims=False)))

    def _rows(self, tensor: str, reader: Node) -> str:
        """The leading rows of a tensor whose last axis but one is that of queries."""
        e, node = self.e, self.view.producer.get(tensor)
        if tensor in self.axis.sides and (same := uniform_value(self.view, tensor)) is not None:
            return e.array(np.full((1,) * e.rank(tensor), same))
        if not self._has_queries(tensor):
            return self.side(tensor, reader)
        first = e.int64(list(range(self.axis.leading)))
        if tensor in self.axis.sides or node is None or self.view.is_constant(tensor):
            return e.op("Gather", self.side(tensor, reader), first, axis=e.rank(tensor) - 2)
        if node.op == "MatMul":
            rows = e.op("Gather", node.inputs[0], first, axis=e.rank(node.inputs[0]) - 2)
            return e.op("MatMul", rows, node.inputs[1])
        if node.op not in _ROWWISE:
            return e.op("Gather", tensor, first, axis=e.rank(tensor) - 2)
        inputs = []
        for slot, name in enumerate(node.inputs):
            bias = self.biases.get((node.index, slot))
            if bias is None:
                inputs.append(self._rows(name, node))
            elif node.op == "Softmax":
                inputs.append(e.op("Add", self._rows(name, node), bias))
            else:
                inputs.append(e.op("Gather", bias, first, axis=2) if self._has_queries(name) else bias)
        return e.op(node.op, *inputs, domain=node.domain, **node.attrs)

    def _has_queries(self, tensor: str) -> bool:
        """Whether a tensor differs between queries."""
        if tensor in self.axis.sides and uniform_value(self.view, tensor) is not None:
            return False
        array = self.view.value(tensor)
        shape = self.profile.shape(tensor) if array is None else array.shape
        return shape is not None and len(shape) > 1 and shape[-2] > 1
