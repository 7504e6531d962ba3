"""Plain ways between a projection and the product of its heads: biases, scales and layout, nothing that would not pass a turn of the basis.

Whatever chain of reshapes and transpositions lies between is run on an array of indices, so no exporter's pattern needs to be known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.graph.axis_links import Shapes
from onnxprune.graph.axis_rules import MEASURES, slice_ranges
from onnxprune.graph.profile import Profile
from onnxprune.graph.tail import is_norm
from onnxprune.graph.view import GraphView, Node

_REGROUPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_MOVING = frozenset({"Transpose", "Identity", "Cast", "Slice", "Split", "Gather", "Expand"})
_ELEMENTWISE = frozenset({"Add", "Mul", "Div", "Identity", "Cast"})
_LONGEST = 40


class Reason(Exception):
    """Why a depth cannot be turned: a refusal code and a text."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, eq=False)
class Use:
    """A constant that a node reads, and the places [blocks, depth] of the depth along ``axis`` (None: in the flattened constant)."""

    index: int
    slot: int
    axis: int | None
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class Plain:
    """One side of a product over the depth.

    ``tensor`` is an activation whose last axis holds dimension i of block b at ``columns[b, i]``; ``rows`` are the blocks of the leading
    positions of the operand, in order (several heads may share a block, the batch repeats them).
    """

    tensor: str
    columns: np.ndarray
    rows: np.ndarray
    constants: tuple[Use, ...]
    nodes: tuple[Node, ...]


def projection_of(view: GraphView, profile: Profile, tensor: str, axis: int) -> Plain:
    """The projection that makes ``tensor``, whose ``axis`` (from the end: -1, or -2 if transposed) is the depth.

    Raises:
        Reason: something on the way is not plain.
    """
    product, chain = _back(view, profile, tensor)
    weight, weight_axis, bias = _weight_of(view, product)
    shape = profile.shape(product.outputs[0]) or ()
    if not shape:
        raise Reason("OP107", f"the output of {product} was not seen when the model ran")
    index = np.broadcast_to(np.arange(shape[-1]), shape)
    made, biases = product.outputs[0], [(product, bias, np.arange(shape[-1]))] if bias is not None else []
    flat = True
    for node, output in chain:
        if node.op == "Add":
            slot = next(slot for slot, name in enumerate(node.inputs) if view.is_constant(name))
            biases.append((node, slot, _bias_places(view, node, slot, index, shape[-1])))
        else:
            index = _carried(view, profile, node, output, index)
        flat = flat and node.op in _ELEMENTWISE
        made = output if flat else made
    heads = np.moveaxis(index, axis, -1)
    if heads.ndim < 3 or (heads != heads[..., :1, :]).any():
        raise Reason("OP107", f"{tensor} does not hold one row per token")
    columns, rows = np.unique(heads[..., 0, :].reshape(-1, heads.shape[-1]), axis=0, return_inverse=True)
    _check_blocks(columns, tensor)
    uses = [Use(product.index, weight, weight_axis, columns)]
    for node, slot, places in biases:
        found = places[columns]
        if (found < 0).any() or len(np.unique(found)) != found.size:
            raise Reason("OP107", f"the bias at {node} is shared by several heads")
        uses.append(Use(node.index, slot, None, found))
    return Plain(made, columns, rows.reshape(-1), tuple(uses), (product, *(node for node, _ in chain)))


def reader_of(view: GraphView, profile: Profile, context: str, rows: np.ndarray) -> Plain:
    """The matrix that reads the heads of ``context`` [..., S, depth]; ``rows`` are the blocks of values of its leading positions.

    Raises:
        Reason: something on the way is not plain.
    """
    shape = profile.shape(context) or ()
    if len(shape) < 3 or int(np.prod(shape[:-2])) != len(rows):
        raise Reason("OP107", "the heads of values and of their sums differ")
    lead = np.arange(int(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)
    head, dim = np.broadcast_to(lead, shape), np.broadcast_to(np.arange(shape[-1]), shape)
    chain: list[Node] = []
    tensor = context
    while True:
        readers = [(node, slot) for node, slot in view.consumers.get(tensor, ()) if node.op not in MEASURES]
        if len(readers) != 1 or tensor in view.graph_outputs or readers[0][1] != 0 or len(chain) > _LONGEST:
            raise Reason("OP107", f"{tensor} is read by more than its output projection")
        node = readers[0][0]
        if node.op in ("MatMul", "Gemm") and len(node.inputs) > 1 and view.is_constant(node.inputs[1]):
            break
        head, dim = (_carried(view, profile, node, node.outputs[0], array) for array in (head, dim))
        chain.append(node)
        tensor = node.outputs[0]
    _, axis, _ = _weight_of(view, node)
    every = dim.reshape(-1, dim.shape[-1])
    if (every != every[:1]).any():
        raise Reason("OP107", f"{tensor} does not hold the same dimensions in every row")
    # Rows of the batch and of tokens name other leading positions of the same heads; the first row names each head once.
    leading = head.reshape(-1, head.shape[-1])
    heads = np.unique(leading[0])
    order = np.lexsort((every[0], leading[0]))
    if len(order) != len(heads) * shape[-1]:
        raise Reason("OP107", f"{tensor} holds more than the heads")
    columns = order.reshape(len(heads), shape[-1])
    if (every[0][columns] != np.arange(shape[-1])).any():
        raise Reason("OP107", f"{tensor} does not hold whole heads")
    blocks = np.full(len(rows), -1)
    blocks[leading] = np.searchsorted(heads, leading[0])
    return Plain(tensor, columns, blocks, (Use(node.index, 1, 1 - axis, columns),), (*chain, node))


def _back(view: GraphView, profile: Profile, tensor: str) -> tuple[Node, list[tuple[Node, str]]]:
    """The product with a constant that makes ``tensor``, and the plain nodes that follow it, each with the output that leads on."""
    chain: list[tuple[Node, str]] = []
    while len(chain) <= _LONGEST:
        node = view.producer.get(tensor)
        if node is None or view.is_constant(tensor):
            raise Reason("OP107", f"{tensor} is not made by a projection")
        data = [name for name in node.inputs if name and not view.is_constant(name)]
        if node.op in ("MatMul", "Gemm") and not node.domain:
            return node, chain
        if node.op in ("Mul", "Div") and len(data) != 1:
            data = [name for name in data if _size(profile, name) != 1]
        plain = node.op in _REGROUPING or node.op in _MOVING
        plain = plain or (node.op == "Add" and len(data) == 1) or (node.op in ("Mul", "Div") and _is_scale(view, profile, node, data))
        if node.domain or not plain:
            raise _strange(view, node)
        chain.insert(0, (node, tensor))
        tensor = data[0] if node.op in ("Add", "Mul", "Div") else node.inputs[0]
    raise Reason("OP107", f"no projection lies near {tensor}")


def _size(profile: Profile, name: str) -> int:
    shape = profile.shape(name)
    return 0 if shape is None else int(np.prod(shape))


def _is_scale(view: GraphView, profile: Profile, node: Node, data: list[str]) -> bool:
    """Whether a Mul or Div has one factor that is one number, and divides by that."""
    if len(data) != 1 or (node.op == "Div" and node.inputs[0] != data[0]):
        return False
    (other,) = [name for name in node.inputs if name != data[0]] or [data[0]]
    array = view.value(other)
    return array.size == 1 if array is not None else _size(profile, other) == 1


def _strange(view: GraphView, node: Node) -> Reason:
    around = [node, *(maker for name in node.inputs if (maker := view.producer.get(name)) is not None)]
    if any("RotaryEmbedding" in near.op for near in around) or any(
        maker.op == "Mul" and near.op == "Add" for near in around for name in near.inputs if (maker := view.producer.get(name)) is not None
    ):
        return Reason("OP105", f"rotary embeddings turn pairs of its dimensions by position (at {node.name})")
    if any(is_norm(near) or near.op.startswith("Reduce") or "Norm" in near.op for near in around):
        return Reason("OP106", f"every head is normalised over its dimensions (at {node.name})")
    return Reason("OP107", f"{node} stands between the projection and the product")


def _weight_of(view: GraphView, product: Node) -> tuple[int, int, int | None]:
    """(slot of the weight, axis of its outputs, slot of the bias)."""
    weight = view.value(product.inputs[1])
    if weight is None or weight.ndim != 2 or view.is_constant(product.inputs[0]) or product.attrs.get("transA", 0):
        raise Reason("OP107", f"{product} is not a plain product with a weight matrix")
    if product.op == "MatMul":
        return 1, 1, None
    width = weight.shape[0 if product.attrs.get("transB", 0) else 1]
    bias = view.value(product.inputs[2]) if len(product.inputs) > 2 and product.inputs[2] else None
    return 1, 0 if product.attrs.get("transB", 0) else 1, 2 if bias is not None and bias.size == width else None


def _bias_places(view: GraphView, node: Node, slot: int, index: np.ndarray, width: int) -> np.ndarray:
    """Where in a flattened bias the addend of every column of the projection stands, -1 for columns that it does not reach."""
    bias = view.value(node.inputs[slot])
    if bias is None or np.broadcast_shapes(bias.shape, index.shape) != index.shape:
        raise Reason("OP107", f"the bias at {node} is no constant vector")
    places = np.full(width, -1)
    at = np.broadcast_to(np.arange(bias.size).reshape(bias.shape), index.shape)
    places[index] = at
    if (places[index] != at).any():
        raise Reason("OP107", f"the bias at {node} differs from token to token")
    return places


def _carried(view: GraphView, profile: Profile, node: Node, output: str, index: np.ndarray) -> np.ndarray:
    """An array of indices after a node that moves elements, at the sizes of the profile's first run."""
    shapes = Shapes(view, profile, node)
    size = profile.shape(output)
    if size is None:
        raise Reason("OP107", f"{output} was not seen when the model ran")
    if node.op in _REGROUPING:
        return index.reshape(size)
    if node.op == "Transpose":
        return np.transpose(index, node.attrs.get("perm"))
    if node.op in _ELEMENTWISE - {"Add"}:
        return index
    if node.op == "Expand":
        return np.broadcast_to(index, size)
    if node.op == "Split":
        axis = node.attrs.get("axis", 0)
        before = node.outputs[: node.outputs.index(output)]
        start = sum((profile.shape(name) or ())[axis] for name in before)
        return np.take(index, np.arange(start, start + size[axis]), axis=axis)
    if node.op == "Gather" and (indices := shapes.integers(1)) is not None:
        return np.take(index, indices.reshape(shapes.of(1)), axis=node.attrs.get("axis", 0))
    if node.op == "Slice" and (ranges := slice_ranges(node, shapes)) is not None:
        for axis, picked in ranges.items():
            index = np.take(index, picked, axis=axis)
        return index
    raise Reason("OP107", f"{node} cannot be followed")


def _check_blocks(columns: np.ndarray, tensor: str) -> None:
    """Blocks must be disjoint: one column may not stand in two heads at different places."""
    if len(np.unique(columns)) != columns.size:
        raise Reason("OP107", f"the heads of {tensor} share columns")
