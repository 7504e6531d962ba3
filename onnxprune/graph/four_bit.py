"""Weights in four bits: products with a constant matrix become ``MatMulNBits`` of onnxruntime, which reads an eighth of the bytes.

A column of the weight is cut into blocks along the reduced axis. Each block keeps one float32 scale and a code from 0 to 15 per weight,
``weight = (code - 8) scale``. The packing follows the operator's description in onnxruntime (docs/ContribOperators.md); its own quantizer
is not used, as importing it configures the logging of the whole process.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxprune.errors import InputError
from onnxprune.graph.clean import without_dead
from onnxprune.graph.initializers import placeholder
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView, Node

MICROSOFT = "com.microsoft"
BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that the operator takes."""

_ZERO = 8
"""The code of weight 0 where no zero points are given."""

_SHRINK = (1.0, 0.95, 0.9, 0.85)
"""Scales tried for every block, as shares of the one that clips nothing: rounding the many finer pays for clipping the largest."""

_CHUNK_BYTES = 1 << 26
"""Columns of a weight are packed in pieces of about this size, so that little memory is needed besides the weight itself."""


def to_four_bit(model: Model, block: int = 32, products: Collection[str] | None = None, *, accuracy_level: int = 4) -> tuple[Model, int]:
    """Keep the weights of matrix products in four bits; activations stay float32 between operators.

    MatMul and plain Gemm (alpha and beta 1, first operand not transposed) with a constant float32 matrix are rewritten; names of nodes and
    tensors stay. A weight that something else reads too, such as a tied embedding, also stays as it is.

    Args:
        block: weights per scale. A reduced axis that it does not divide is padded with zeros.
        products: names of the nodes to rewrite; None takes all that can be.
        accuracy_level: lowest precision the kernel may compute in: 1 float32, 2 float16, 3 bfloat16, 4 int8 (activations are rounded to
            int8 per block inside the product; several times faster on CPU), 0 leaves the choice to the provider.

    Returns:
        the rewritten model and the number of products in it; the model itself if there are none.

    Raises:
        InputError: the operator does not take this block size, a product named is not there or cannot be rewritten, or a weight is NaN or
            infinite.
    """
    if block not in BLOCKS:
        raise InputError(f"4-bit weights come in blocks of {', '.join(map(str, BLOCKS))}, not {block}")
    view = GraphView(model)
    chosen = _chosen(view, products)
    if not chosen:
        return model, 0
    proto = model.copy_proto()
    taken = set(view.producer) | model.initializer_names | view.graph_inputs
    packed: dict[tuple[str, bool], tuple[str, str]] = {}
    weights: dict[str, np.ndarray] = {}
    replaced: dict[int, list[NodeProto]] = {}
    for node in chosen:
        weight, transposed = node.inputs[1], bool(node.attrs.get("transB", 0))
        matrix = view.value(weight)
        assert matrix is not None
        matrix = matrix.T if transposed else matrix
        if (weight, transposed) not in packed:
            codes, scales = _pack(matrix, block, weight)
            names = _fresh(f"{weight}.int4", taken), _fresh(f"{weight}.scales", taken)
            packed[weight, transposed] = names
            for name, array in zip(names, (codes, scales), strict=True):
                tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
                placeholder(tensor, array.nbytes)
                proto.graph.initializer.append(tensor)
                weights[name] = array
        attributes = {"K": matrix.shape[0], "N": matrix.shape[1], "bits": 4, "block_size": block, "accuracy_level": accuracy_level}
        replaced[node.index] = _product(node, packed[weight, transposed], attributes, taken)
    nodes = [new for index, node in enumerate(view.nodes) for new in replaced.get(index, [node.proto])]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    # A weight that could be fed, as old files declare all of them, no longer decides the result.
    rewritten = {weight for weight, _ in packed}
    for index in reversed(range(len(proto.graph.input))):
        if proto.graph.input[index].name in rewritten:
            del proto.graph.input[index]
    if not model.opset(MICROSOFT):
        proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return without_dead(model.with_proto(proto, weights)), len(chosen)


def _chosen(view: GraphView, products: Collection[str] | None) -> list[Node]:
    """The nodes to rewrite, in order of the graph."""
    if products is None:
        return [node for node in view.nodes if _obstacle(view, node) is None]
    missing = sorted(set(products) - {node.name for node in view.nodes})
    if missing:
        raise InputError(f"the model has no node {missing[0]!r} to keep in 4 bits")
    chosen = [node for node in view.nodes if node.name in products]
    for node in chosen:
        obstacle = _obstacle(view, node)
        if obstacle is not None:
            raise InputError(f"{node} cannot have 4-bit weights: {obstacle}")
    return chosen


def _obstacle(view: GraphView, node: Node) -> str | None:
    """Why the weights of a node cannot be kept in four bits."""
    if node.domain or node.op not in ("MatMul", "Gemm"):
        return "it is neither MatMul nor Gemm"
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0), node.attrs.get("transA", 0)) != (1.0, 1.0, 0):
        return "its alpha, beta or transA is set"
    if view.is_constant(node.inputs[0]):
        return "its first operand is constant"
    weight = view.value(node.inputs[1])
    if weight is None or weight.ndim != 2 or not weight.size:
        return "its second operand is no constant matrix"
    if weight.dtype != np.float32:
        return f"its weights are {weight.dtype}, not float32"
    return None


def _product(node: Node, weight: tuple[str, str], attributes: dict[str, Any], taken: set[str]) -> list[NodeProto]:
    """The rewritten node, followed by an Add if it was a Gemm with a third operand."""
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    output = _fresh(f"{node.outputs[0]}.product", taken) if bias else node.outputs[0]
    product = helper.make_node("MatMulNBits", [node.inputs[0], *weight], [output], name=node.name, domain=MICROSOFT, **attributes)
    product.doc_string = node.proto.doc_string
    product.metadata_props.extend(node.proto.metadata_props)
    if not bias:
        return [product]
    return [product, helper.make_node("Add", [output, bias], [node.outputs[0]], name=f"{node.name}.bias" if node.name else "")]


def _pack(matrix: np.ndarray, block: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [N, blocks, block / 2], two to a byte with the earlier one in the low half, and scales float32 [N, blocks] of [K, N]."""
    depth, width = matrix.shape
    blocks = -(-depth // block)
    packed = np.empty((width, blocks, block // 2), np.uint8)
    scales = np.empty((width, blocks), np.float32)
    step = max(1, _CHUNK_BYTES // (4 * blocks * block))
    for start in range(0, width, step):
        columns = matrix[:, start : start + step].T
        padded = np.zeros((len(columns), blocks * block), np.float32)
        padded[:, :depth] = columns
        codes, scales[start : start + step] = _codes(padded.reshape(len(columns), blocks, block))
        packed[start : start + step] = codes[..., 0::2] | codes[..., 1::2] << 4
    if not np.isfinite(scales).all():
        raise InputError(f"weight {name!r} holds NaN or infinite values, or values beyond float32 in 4 bits; it cannot be quantised")
    return packed, scales


def _codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [..., block] and scales float32 [...] of float32 [..., block], with the least squared error of the scales tried.

    Codes reach one step further below zero than above: the sign of a scale puts the largest weight on the long side.
    """
    largest = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)
    best = np.full(largest.shape, np.inf, np.float32)
    codes, scales = np.full(values.shape, _ZERO, np.uint8), np.zeros_like(largest)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales[~np.isfinite(largest)] = np.nan
        for share in _SHRINK:
            scale = largest * np.float32(-share / _ZERO)
            steps = np.nan_to_num(np.clip(np.rint(values / scale), -_ZERO, _ZERO - 1))
            error = np.square(values - steps * scale).sum(-1, keepdims=True)
            better = error < best
            best = np.where(better, error, best)
            scales = np.where(better, scale, scales)
            codes = np.where(better, (steps + _ZERO).astype(np.uint8), codes)
    return codes, scales[..., 0]


def _fresh(name: str, taken: set[str]) -> str:
    """``name``, or the first of its numbered forms that nobody uses; taken from now on."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    taken.add(candidate)
    return candidate
