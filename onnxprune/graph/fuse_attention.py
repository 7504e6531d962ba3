"""Attention spelled out in primitives, written as one ``com.microsoft.MultiHeadAttention`` with the head count of its own layer.

onnxruntime's transformer optimizer takes one head count for the whole model, and after pruning writes wrong numbers without a word. Here
nothing is assumed: whatever chain of reshapes and transpositions lies between a projection and the products is run on an array of indices
at two sizes (a :class:`Profile`), and only an attention whose indices come out as ``[B, S, H * D] -> [B, H, S, D]`` is fused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from onnxprune.errors import InputError
from onnxprune.graph.clean import without_dead
from onnxprune.graph.emitter import Emitter
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, take_profile
from onnxprune.graph.uniform import is_finite, uniform_value
from onnxprune.graph.view import GraphView, Node

log = logging.getLogger(__name__)

MICROSOFT = "com.microsoft"
MINIMUM_OPSET = 13
"""Before it, Softmax flattened its trailing axes."""

_LAYOUT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
Layout = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""(flat index array [B, S, E], shape of the operand [B, H, ., .]) -> the operand that split heads would give."""


def fuse_attention(model: Model) -> tuple[Model, int]:
    """Fuse every attention that is certain to be one; returns the model and how many were fused.

    Queries, keys and values stay projected outside; additive masks become the bias of the fused operator (expanded over the queries if they
    are not), masks that are zero everywhere go. Left as they are: grouped key-value heads, rotary embeddings between projection and
    product, attention maps that are read elsewhere, types other than float32, masks that do not broadcast to ``[B, H, S, T]``.
    """
    if model.opset() < MINIMUM_OPSET or not any(node.op_type == "Softmax" for node in model.proto.graph.node):
        return model, 0
    try:
        profile = take_profile(model)
    except InputError as error:
        log.warning("attention is not fused: %s", error)
        return model, 0
    emitter = Emitter(model, profile, prefix="onnxprune.mha")
    finder = _Finder(emitter, profile)
    found = {match.output: match for node in emitter.view.nodes if (match := finder.attention(node)) is not None}
    if not found:
        return model, 0
    writer = _Writer(emitter, profile)
    for node in emitter.view.nodes:
        match = found.get(node.outputs[0])
        if match is None:
            emitter.nodes.append(node.proto)
        else:
            writer.write(match)
    emitter.require_domain(MICROSOFT)
    proto = model.copy_proto()
    for field, values in (
        (proto.graph.node, emitter.nodes),
        (proto.graph.initializer, emitter.proto.graph.initializer),
        (proto.opset_import, emitter.proto.opset_import),
    ):
        del field[:]
        field.extend(values)
    del proto.graph.value_info[:]
    return without_dead(model.with_proto(proto)), len(found)


class _Mask(NamedTuple):
    tensor: str
    shape: tuple[int, ...]
    """Padded on the left to rank 4, in the first run."""
    guarded: bool
    """Whether a row without any visible key must come out as zeros."""


@dataclass(frozen=True)
class _Attention:
    """softmax(scale q k' + mask) v, from ``[B, S, H * D]`` operands to ``output`` (``[B, S, H * D]``, or flat ``[B * S, H * D]``)."""

    q: str
    k: str
    v: str
    heads: int
    scale: float
    mask: _Mask | None
    output: str
    flat: int | None
    """Width of the output if batch and sequence are one axis."""


class _Product(NamedTuple):
    node: Node
    scale: float
    mask: str | None


class _Finder:
    """Matches one Softmax at a time; every method gives None where something is not exactly as it must be."""

    def __init__(self, emitter: Emitter, profile: Profile) -> None:
        self.view: GraphView = emitter.view
        self.type_of = emitter.type_of
        self.profile = profile

    def attention(self, softmax: Node) -> _Attention | None:
        if softmax.op != "Softmax" or softmax.domain or softmax.attrs.get("axis", -1) not in (-1, 3):
            return None
        product = self._product(softmax.inputs[0])
        weighted = self._context(softmax)
        if product is None or weighted is None:
            return None
        context, guarded = weighted
        if not self._consistent(softmax, product, context):
            return None
        q = self._projected(product.node.inputs[0], _queries)
        k = self._projected(product.node.inputs[1], _transposed_keys)
        v = self._projected(context.inputs[1], _queries)
        output = self._merged(context.outputs[0])
        if q is None or k is None or v is None or output is None or v[1] != 1.0:
            return None
        scale = product.scale * q[1] * k[1]
        scores = self._shapes(product.node.outputs[0])
        heads = scores[0][1]
        mask = self._mask(product.mask, scores, guarded)
        # A scale of 0 would ask the operator for its default.
        if mask is None or not (np.isfinite(np.float32(scale)) and np.float32(scale) != 0) or scores[1][1] != heads:
            return None
        return _Attention(q[0], k[0], v[0], heads, scale, mask or None, *output)

    def _consistent(self, softmax: Node, product: _Product, context: Node) -> bool:
        """Four axes, no broadcasting between operands, and float32 throughout."""
        queries, keys = (self._shapes(name) for name in product.node.inputs)
        scores, values = self._shapes(product.node.outputs[0]), self._shapes(context.inputs[1])
        for q, k, s, v in zip(queries, keys, scores, values, strict=True):
            if not len(q) == len(k) == len(s) == len(v) == 4:
                return False
            if not (q[:2] == k[:2] == v[:2] and s == (*q[:3], k[3]) and v[2] == k[3]):
                return False
        if self._shapes(softmax.outputs[0]) != scores:
            return False
        return all(self.type_of(name) == TensorProto.FLOAT for name in (*product.node.inputs, *context.inputs, softmax.inputs[0]))

    def _shapes(self, tensor: str) -> list[tuple[int, ...]]:
        array = self.view.value(tensor)
        if array is not None:
            return [array.shape] * 2
        return [run.get(tensor, ()) for run in self.profile.shapes]

    # From the Softmax back to the product of queries and keys.

    def _product(self, tensor: str, mask: str | None = None, scale: float = 1.0) -> _Product | None:
        node = self.view.producer.get(tensor)
        if node is None or node.domain or not self._private(tensor):
            return None
        if node.op == "MatMul":
            both_computed = not any(self.view.is_constant(name) for name in node.inputs)
            return _Product(node, scale, mask) if both_computed else None
        if node.op == "Add" and mask is None and scale == 1.0:
            # Either side may hold the scores.
            first, second = node.inputs
            return self._product(first, mask=second) or self._product(second, mask=first)
        if self._unchanged(node):
            return self._product(node.inputs[0], mask, scale)
        factor = self._factor(node)
        return None if factor is None else self._product(factor[0], mask, scale * factor[1])

    def _private(self, tensor: str) -> bool:
        return len(self.view.consumers.get(tensor, ())) == 1 and tensor not in self.view.graph_outputs

    def _unchanged(self, node: Node) -> bool:
        """Identity, or a Cast from float32 to itself."""
        same = node.attrs.get("to") == TensorProto.FLOAT and self.type_of(node.inputs[0]) == TensorProto.FLOAT
        return node.op == "Identity" or (node.op == "Cast" and same)

    def _factor(self, node: Node) -> tuple[str, float] | None:
        """(tensor, c) if a node computes c times a tensor of the same shape."""
        if node.op not in ("Mul", "Div") or node.domain:
            return None
        for slot in (0, 1) if node.op == "Mul" else (1,):
            array, other = self.view.value(node.inputs[slot]), node.inputs[1 - slot]
            if array is not None and array.size == 1 and self._shapes(other) == self._shapes(node.outputs[0]):
                value = float(array.reshape(()))
                if node.op == "Div":
                    return (other, 1 / value) if value else None
                return other, value
        return None

    # From the Softmax on to the product with the values.

    def _context(self, softmax: Node) -> tuple[Node, bool] | None:
        """(the product with the values, whether rows that are not a number are replaced by zeros before it)."""
        tensor, guarded = softmax.outputs[0], False
        while tensor not in self.view.graph_outputs:
            readers = self.view.consumers.get(tensor, [])
            if len(readers) == 1:
                node, slot = readers[0]
                if node.op == "MatMul" and slot == 0 and not self.view.is_constant(node.inputs[1]):
                    return node, guarded
                if not self._unchanged(node):
                    return None
                tensor = node.outputs[0]
            else:
                chosen = self._guard(tensor, [node for node, _ in readers])
                if guarded or chosen is None:
                    return None
                tensor, guarded = chosen, True
        return None

    def _guard(self, tensor: str, readers: list[Node]) -> str | None:
        """Output of Where(IsNaN(tensor), 0, tensor) if that is all that reads the tensor."""
        by_op = {node.op: node for node in readers}
        if len(readers) != 2 or set(by_op) != {"IsNaN", "Where"}:
            return None
        test, choice = by_op["IsNaN"], by_op["Where"]
        zero = self.view.value(choice.inputs[1])
        if choice.inputs[0] != test.outputs[0] or choice.inputs[2] != tensor or not self._private(test.outputs[0]):
            return None
        return choice.outputs[0] if zero is not None and zero.size == 1 and not zero.any() else None

    # Layouts.

    def _projected(self, operand: str, split: Layout) -> tuple[str, float] | None:
        """(nearest tensor [B, S, H * D] whose heads the operand holds, factor applied on the way)."""
        chain: list[Node] = []
        factor, tensor = 1.0, operand
        while True:
            if chain and all(len(shape) == 3 for shape in self._shapes(tensor)) and self._splits(tensor, chain, operand, split):
                return tensor, factor
            node = self.view.producer.get(tensor)
            if node is None or node.domain:
                return None
            scaled = self._factor(node)
            if scaled is not None:
                tensor, factor = scaled[0], factor * scaled[1]
                continue
            if node.op not in _LAYOUT:
                return None
            chain.insert(0, node)
            tensor = node.inputs[0]

    def _splits(self, tensor: str, chain: list[Node], operand: str, split: Layout) -> bool:
        for run, (source, target) in enumerate(zip(self._shapes(tensor), self._shapes(operand), strict=True)):
            index = np.arange(np.prod(source)).reshape(source)
            # Of one head of one dimension the order of values does not tell tokens from features.
            length = target[3] if split is _transposed_keys else target[2]
            if source[:2] != (target[0], length) or index.size != np.prod(target):
                return False
            if not np.array_equal(self._carried(index, chain, run), split(index, target)):
                return False
        return True

    def _carried(self, index: np.ndarray, chain: list[Node], run: int) -> np.ndarray:
        """An array of indices after the layout operators of a chain, with the shapes that one profile run had."""
        for node in chain:
            if node.op == "Transpose":
                index = np.transpose(index, node.attrs.get("perm"))
            else:
                index = index.reshape(self.profile.shapes[run][node.outputs[0]])
        return index

    def _merged(self, context: str) -> tuple[str, int | None] | None:
        """(tensor that holds the heads of the context side by side, its width if batch and sequence are one axis in it)."""
        chain: list[Node] = []
        flat: tuple[str, int] | None = None
        tensor = context
        shapes = self._shapes(context)
        while self._private(tensor):
            node = self.view.consumers[tensor][0][0]
            if node.op not in _LAYOUT or node.domain or self.view.consumers[tensor][0][1] != 0:
                break
            chain.append(node)
            tensor = node.outputs[0]
            widths = {shape[1] * shape[3] for shape in shapes}
            if not all(self._merges(shape, chain, run) for run, shape in enumerate(shapes)) or len(widths) > 1:
                continue
            ranks = [len(shape) for shape in self._shapes(tensor)]
            if ranks == [3, 3]:
                return tensor, None
            if flat is None:
                flat = tensor, widths.pop()
        return flat

    def _merges(self, shape: tuple[int, ...], chain: list[Node], run: int) -> bool:
        batch, heads, length, size = shape
        index = np.arange(np.prod(shape)).reshape(shape)
        result = self._carried(index, chain, run)
        wanted = index.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)
        return any(np.array_equal(result, form) for form in (wanted, wanted.reshape(batch * length, heads * size)))

    # Masks.

    def _mask(self, tensor: str | None, scores: list[tuple[int, ...]], guarded: bool) -> _Mask | tuple[()] | None:
        """The additive mask in a form that the operator accepts, an empty tuple if there is none, None if it does not fit."""
        if tensor is None or uniform_value(self.view, tensor) == 0:
            return ()
        shapes = [(1,) * (4 - len(shape)) + tuple(shape) for shape in self._shapes(tensor)]
        if self.type_of(tensor) != TensorProto.FLOAT or any(len(shape) != 4 for shape in shapes):
            return None
        for axis in range(4):
            full = all(shape[axis] == score[axis] for shape, score in zip(shapes, scores, strict=True))
            single = all(shape[axis] == 1 for shape in shapes)
            if not full and (axis == 3 or not single):
                return None
        guarded = guarded and not is_finite(self.view, tensor)
        if guarded and shapes[0][1] != 1:
            return None  # a row may be hidden from one head and not from another
        return _Mask(tensor, shapes[0], guarded)


class _Writer:
    """Emits fused operators; what several layers need of the same mask is emitted once."""

    def __init__(self, emitter: Emitter, profile: Profile) -> None:
        self.emitter = emitter
        self.profile = profile
        self._biases: dict[tuple[str, bool, int], str] = {}

    def write(self, match: _Attention) -> None:
        g = self.emitter
        inputs = [match.q, match.k, match.v]
        if match.mask is not None:
            inputs += ["", "", self._bias(match, match.mask)]
        steps = list(self._finishing(match))
        settings = {"num_heads": match.heads, "scale": match.scale}
        name = g.op("MultiHeadAttention", *inputs, output=None if steps else match.output, domain=MICROSOFT, **settings)
        for position, step in enumerate(steps):
            name = step(name, match.output if position == len(steps) - 1 else None)

    def _finishing(self, match: _Attention) -> Iterator[Callable[[str, str | None], str]]:
        g = self.emitter
        if match.mask is not None and match.mask.guarded:
            alive = self._alive(match.mask)
            yield lambda name, output: g.op("Mul", name, alive, output=output)
        if match.flat is not None:
            target = g.int64([-1, match.flat])
            yield lambda name, output: g.op("Reshape", name, target, output=output)

    def _bias(self, match: _Attention, mask: _Mask) -> str:
        """The mask as [B or 1, H or 1, S, T], finite where rows without any visible key are handled apart."""
        length = self.profile.shapes[0][match.q][1]
        key = mask.tensor, mask.guarded, length
        if key not in self._biases:
            g = self.emitter
            bias = self._whole(mask)
            if mask.guarded:
                bias = g.op("Max", bias, g.scalar(float(np.finfo(np.float32).min), match.q))
            if mask.shape[2] != length:
                size = g.slice(g.shape_of(match.q), 0, g.int64([1]), g.int64([2]))
                bias = g.op("Expand", bias, g.op("Concat", g.int64([1, 1]), size, g.int64([1]), axis=0))
            self._biases[key] = bias
        return self._biases[key]

    def _whole(self, mask: _Mask) -> str:
        missing = 4 - self.emitter.rank(mask.tensor)
        return self.emitter.unsqueeze(mask.tensor, *range(missing)) if missing else mask.tensor

    def _alive(self, mask: _Mask) -> str:
        """1 for every row [B or 1, S or 1, 1] that sees a key, else 0."""
        g = self.emitter
        best = g.reduce("ReduceMax", self._whole(mask), [3], keepdims=True)
        seen = g.op("Greater", best, g.array(np.array(-np.inf, np.float32)))
        return g.squeeze(g.op("Cast", seen, to=TensorProto.FLOAT), 1)


def _queries(index: np.ndarray, target: tuple[int, ...]) -> np.ndarray:
    batch, heads, length, size = target
    return index.reshape(batch, length, heads, size).transpose(0, 2, 1, 3)


def _transposed_keys(index: np.ndarray, target: tuple[int, ...]) -> np.ndarray:
    batch, heads, size, length = target
    return index.reshape(batch, length, heads, size).transpose(0, 2, 3, 1)
