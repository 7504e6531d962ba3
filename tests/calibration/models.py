"""Small models with the input signatures that calibration must understand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.graph.model import Model

Dims = Sequence[int | str | None]
Array = np.ndarray


def text_model(
    batch: int | str = "batch", length: int | str = "seq", other_length: int | str | None = None, positions: bool = False
) -> Model:
    """Mean over real tokens of (embedding of the id, plus the position if that is an input): ``[batch, 4]``."""
    table = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    inputs: list[tuple[str, int, Dims]] = [
        ("input_ids", TensorProto.INT64, [batch, length]),
        ("attention_mask", TensorProto.INT64, [batch, length if other_length is None else other_length]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["float_mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float_mask", "last"], ["column"]),
        helper.make_node("Mul", ["embedded", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["float_mask", "one"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["logits"]),
    ]
    if positions:
        inputs.append(("position_ids", TensorProto.INT64, [batch, length]))
    constants = {"table": table, "last": np.array([-1]), "one": np.array([1])}
    return build(nodes, inputs, {"logits": TensorProto.FLOAT}, constants)


def image_model(batch: int | str = "batch") -> Model:
    """Sum of squares of ``pixels [batch, 3]`` by row, and their sum over the batch."""
    nodes = [
        helper.make_node("Mul", ["pixels", "pixels"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "one"], ["energy"], keepdims=0),
        helper.make_node("ReduceSum", ["squares", "zero"], ["total"], keepdims=0),
    ]
    outputs = {"energy": TensorProto.FLOAT, "total": TensorProto.FLOAT}
    return build(nodes, [("pixels", TensorProto.FLOAT, [batch, 3])], outputs, {"one": np.array([1]), "zero": np.array([0])})


def build(nodes: list[onnx.NodeProto], inputs: list[tuple[str, int, Dims]], outputs: dict[str, int], constants: dict[str, Array]) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def text_arrays(rows: int = 10, length: int = 12, seed: int = 0, left: bool = False) -> dict[str, Array]:
    """Ids and mask of rows padded to ``length``; real lengths 1..length - 2, so that some columns are padding everywhere."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length - 1, rows)
    columns = np.arange(length)
    mask = (columns >= length - lengths[:, None]) if left else (columns < lengths[:, None])
    return {"input_ids": rng.integers(1, 50, (rows, length)) * mask, "attention_mask": mask.astype(np.int64)}
