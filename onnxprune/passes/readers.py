"""Readers of a pruned axis, as the re-fit sees them: a linear map from rows of what is read to rows of what should come out.

A matrix reads positions; a convolution reads patches, one row per place of its output. What should come out is compared where the branch
joins the residual stream, or, if it joins none, right behind the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from onnxprune.compensate.ridge import Fit
from onnxprune.graph.anatomy import Consumer
from onnxprune.graph.branch import Branch, follow_branch
from onnxprune.graph.channels import CONVOLUTIONS
from onnxprune.graph.view import GraphView, Node

_DEAD_GAIN = 1e-6

Constants = dict[tuple[int, int], np.ndarray]
"""New constants by (node index, slot) of the student."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A product of the student, ``node``, and how an error at ``target`` (activation [samples, ...]) is an error of its output.

    ``channels`` is the axis of ``target`` that holds what the product makes, which other sites may have cut.
    """

    node: Node
    slot: int
    tensor: str
    axis: int
    labels: np.ndarray
    branch: Branch
    channels: int

    @property
    def target(self) -> str:
        return self.branch.total

    def pairs(self, x: np.ndarray, error: np.ndarray, places: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the map: what is read [rows, inputs] and the error at the target [rows, outputs], sample by sample.

        ``places`` bounds the rows that a sample gives; convolutions draw as many, matrices give all.
        """
        del places, rng
        gain = np.asarray(self.branch.gain, np.float64)
        dead = np.abs(gain) <= _DEAD_GAIN * np.abs(gain).max(initial=1e-30)
        inverse = np.where(dead, 0.0, 1 / np.where(dead, 1.0, gain))  # nothing passes a dead scale, so nothing is asked of it
        return self.rows(x), self._made(error, inverse)

    def rows(self, x: np.ndarray) -> np.ndarray:
        """Rows of what a matrix reads, [rows, inputs]."""
        return x.reshape(-1, x.shape[-1])

    def gradients(self, adjoint: np.ndarray) -> np.ndarray:
        """The adjoint at what a matrix makes, [rows, outputs], from that at the target."""
        return self._made(adjoint, np.asarray(self.branch.gain, np.float64))

    def _made(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        if self.branch.order is not None:
            values = values.transpose(np.argsort(self.branch.order))
        return np.asarray((values * scale).astype(np.float32).reshape(-1, values.shape[-1]))

    @property
    def inputs(self) -> int:
        """Inputs of the map."""
        return len(self.units())

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The weight as [inputs, outputs]."""
        return weight if self.axis == 0 else weight.T

    def units(self) -> np.ndarray:
        """Unit of every input."""
        return self.labels

    def changed(self, view: GraphView, fit: Fit) -> Constants:
        """The constants after a fit."""
        weight = view.value(view.nodes[self.node.index].inputs[self.slot])
        assert weight is not None
        constants = {(self.node.index, self.slot): (weight + self._unfold(fit.weights, weight)).astype(weight.dtype)}
        if self.branch.bias is not None and fit.bias.any():
            index, slot = self.branch.bias
            bias = view.value(view.nodes[index].inputs[slot])
            assert bias is not None
            step = (fit.bias * self.branch.bias_gain).reshape(bias.shape)
            constants[index, slot] = (bias + step).astype(bias.dtype)
        return constants

    def _unfold(self, change: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return change if self.axis == 0 else change.T


@dataclass(frozen=True, eq=False)
class Patches(Reader):
    """A convolution, transposed or not, of one group: rows are patches of its input."""

    def pairs(self, x: np.ndarray, error: np.ndarray, places: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sides = error.shape[2:]
        chosen = rng.permutation(prod(sides))[:places]
        at = np.unravel_index(chosen, sides)
        sources, inside = self._sources(at, x.shape[2:])
        every: list[Any] = [slice(None), slice(None)]
        picked = x[tuple(every + sources)] * inside  # [samples, channels, places, window...]
        rows = np.moveaxis(picked, 2, 1).reshape(len(x) * len(chosen), -1)
        wrong = np.moveaxis(error[tuple(every + list(at))], 2, 1)
        return rows.astype(np.float32, copy=False), wrong.reshape(len(rows), -1)

    def _sources(self, at: tuple[np.ndarray, ...], sides: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
        """Index of every patch along each axis of the input, broadcast to [places, window...], and 0 where the patch is padding."""
        attrs, count = self.node.attrs, len(sides)
        strides, dilations = attrs.get("strides", [1] * count), attrs.get("dilations", [1] * count)
        pads = attrs.get("pads", [0] * (2 * count))
        sources, inside = [], np.ones((1,) * (count + 1), np.float32)
        for axis, size in enumerate(sides):
            steps = np.arange(attrs["kernel_shape"][axis]) * dilations[axis]
            if self.node.op == "Conv":
                index = at[axis][:, None] * strides[axis] + steps - pads[axis]
                valid = np.ones(index.shape, bool)
            else:
                index, left = np.divmod(at[axis][:, None] + pads[axis] - steps, strides[axis])
                valid = left == 0
            valid &= (index >= 0) & (index < size)
            shape = [len(index)] + [1] * count
            shape[1 + axis] = -1
            sources.append(np.clip(index, 0, size - 1).reshape(shape))
            inside = inside * valid.reshape(shape)
        return sources, inside.astype(np.float32)

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        return np.moveaxis(weight, self._outputs, -1).reshape(-1, weight.shape[self._outputs])

    def units(self) -> np.ndarray:
        return np.repeat(self.labels, prod(self.node.attrs["kernel_shape"]))

    def _unfold(self, change: np.ndarray, weight: np.ndarray) -> np.ndarray:
        folded = np.moveaxis(weight, self._outputs, -1).shape
        return np.moveaxis(change.reshape(folded), -1, self._outputs)

    @property
    def _outputs(self) -> int:
        return 0 if self.node.op == "Conv" else 1


def reader_of(view: GraphView, consumer: Consumer, node: Node, rank: int, labels: np.ndarray, *, chain: bool) -> Reader | str:
    """The reader of a site's consumer, or why it cannot be re-fitted.

    Args:
        view: the student.
        consumer: as the unpruned model has it; ``rank`` is that of its activation.
        node: its node in the student.
        labels: unit of every position of the axis read, in the student.
        chain: whether a matrix that ends in no residual branch is compared behind its own output.
    """
    slot = consumer.leaf.slot
    weight = view.value(node.inputs[slot])
    if node.op in CONVOLUTIONS:
        if weight is None or "kernel_shape" not in node.attrs or node.attrs.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return "its padding or window is not written down"
        width = weight.shape[0 if node.op == "Conv" else 1]
        return Patches(node, slot, consumer.tensor, consumer.leaf.axis, labels, _joined(view, node, width), 1)
    if weight is None or weight.ndim != 2 or consumer.axis != rank - 1:
        return "its consumer is not a plain matrix product"
    width = weight.shape[1 - consumer.leaf.axis]
    branch = follow_branch(view, node, width) or (_behind(view, node, width) if chain else None)
    if branch is None:
        return "the way to the residual stream is not linear"
    made = -1 if branch.order is None else branch.order.index(rank - 1)
    return Reader(node, slot, consumer.tensor, consumer.leaf.axis, labels, branch, made)


def _behind(view: GraphView, node: Node, width: int) -> Branch | None:
    """The output of a matrix product, its bias included."""
    gain = np.full(width, float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0)
    if node.op == "Gemm":
        biased = len(node.inputs) > 2 and node.inputs[2] and node.attrs.get("beta", 1.0) == 1.0
        return Branch(node.outputs[0], gain, (node.index, 2) if biased else None, np.ones(width))
    readers = view.consumers.get(node.outputs[0], [])
    if len(readers) == 1 and readers[0][0].op == "Add":
        added, slot = readers[0]
        constant = view.value(added.inputs[1 - slot])
        if constant is not None and constant.size == width:
            return Branch(added.outputs[0], gain, (added.index, 1 - slot), gain)
    return Branch(node.outputs[0], gain, None, gain)


def _joined(view: GraphView, node: Node, width: int) -> Branch:
    """The sum that reads a convolution alone, or its own output."""
    gain, bias = np.ones(width), (node.index, 2) if len(node.inputs) > 2 and node.inputs[2] else None
    readers = view.consumers.get(node.outputs[0], [])
    if len(readers) == 1 and readers[0][0].op in ("Add", "Sum") and node.outputs[0] not in view.graph_outputs:
        join, slot = readers[0]
        if not any(view.is_constant(name) for position, name in enumerate(join.inputs) if position != slot):
            return Branch(join.outputs[0], gain, bias, gain)
    return Branch(node.outputs[0], gain, bias, gain)
