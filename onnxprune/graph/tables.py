"""Embedding tables in int8: a row is looked up as integers, and scaled to float32 afterwards.

Every row has a symmetric scale of its own, so that rare tokens of small magnitude keep their precision. What is looked up is a few rows, so
that scaling them costs microseconds; what is saved is three quarters of the table in the file and in memory. Standard operators only: on
CPU, onnxruntime's own ``GatherBlockQuantized`` is no faster, and takes block sizes that are powers of two.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView, Node
from onnxprune.quantize.rounding import round_to_nearest, scales

SMALLEST_BYTES = 1 << 16
"""Tables up to this size stay in float32: there is next to nothing to save."""

_CHUNK_BYTES = 1 << 24
"""Rows are rounded in pieces of about this size, as rounding computes in float64 and tables may fill gigabytes."""


def int8_tables(view: GraphView) -> tuple[Node, ...]:
    """The Gather nodes whose table can be held in int8, in order of the graph.

    They look rows of a constant float32 matrix up, by indices that are not constant. The table is larger than :data:`SMALLEST_BYTES`, and
    nobody reads it in another way: one that is tied to an output layer would have to stay in float32 besides.
    """
    return tuple(node for node in view.nodes if _obstacle(view, node) is None and _pays(view, node.inputs[0]))


def _obstacle(view: GraphView, node: Node) -> str | None:
    """Why what a node reads cannot be a table in int8."""
    if node.domain or node.op != "Gather":
        return "it is no Gather"
    table = view.value(node.inputs[0])
    if table is None or table.ndim != 2 or not table.size:
        return "what it reads is no constant matrix"
    if table.dtype != np.float32:
        return f"its table is {table.dtype}, not float32"
    if node.attrs.get("axis", 0) not in (0, -2):
        return "it picks columns, not rows"
    if view.is_constant(node.inputs[1]):
        return "its indices are constant"
    return None


def _pays(view: GraphView, name: str) -> bool:
    """Whether a table is large, and no longer needed in float32 once all lookups read integers."""
    table = view.value(name)
    assert table is not None
    return (
        table.nbytes > SMALLEST_BYTES
        and name not in view.graph_outputs
        and all(slot == 0 and _obstacle(view, node) is None for node, slot in view.consumers[name])
    )


def tables_to_int8(model: Model, gathers: Collection[str]) -> Model:
    """The tables that these Gather nodes read as int8 [rows, n], with one float32 scale a row [rows, 1].

    The Gather keeps its name and picks integers; a second one picks their scales, and a multiplication makes the tensor that was read
    before. A row's largest magnitude is 127 steps: no value is off by more than half a step, rows on that grid and rows of zeros are exact.
    Whoever else reads a table keeps it in float32. Needs opset 7, whose Mul broadcasts.

    Raises:
        InputError: a node is not in the graph, is no lookup in a constant float32 matrix, or its table holds an infinite or NaN value.
    """
    view = GraphView(model)
    check_tables(view, gathers)
    surgeon = Surgeon(model)
    tables: dict[str, tuple[gs.Constant, gs.Constant]] = {}
    for node in view.nodes:
        if node.name not in gathers:
            continue
        name = node.inputs[0]
        if name not in tables:
            integers, factors = _rounded(view, name)
            tables[name] = surgeon.constant(integers, name), surgeon.constant(factors, f"{name}.scales")
        _look_up(surgeon, surgeon.nodes[node.index], *tables[name])
    return surgeon.close() if tables else model


def _look_up(surgeon: Surgeon, gather: gs.Node, integers: gs.Constant, factors: gs.Constant) -> None:
    """The node picks integers and scales are picked beside it; their product is what it gave before."""
    result, indices = gather.outputs[0], gather.inputs[1]
    picked, floats, scale = (surgeon.variable(result.name, dtype) for dtype in (np.int8, np.float32, np.float32))
    gather.inputs[0], gather.outputs[0] = integers, picked
    surgeon.add("Cast", [picked], floats, gather.name, to=TensorProto.FLOAT)
    surgeon.add("Gather", [factors, indices], scale, gather.name, axis=0)
    surgeon.add("Mul", [floats, scale], result, gather.name)


def check_tables(view: GraphView, gathers: Collection[str]) -> None:
    """Refuse nodes whose table cannot be held in int8.

    Raises:
        InputError: a node is not in the graph, or is no lookup in a constant float32 matrix.
    """
    nodes = {node.name: node for node in view.nodes}
    for name in gathers:
        if name not in nodes:
            raise InputError(f"node {name!r}, whose table is to be int8, is not in the graph: the form belongs to another model")
        obstacle = _obstacle(view, nodes[name])
        if obstacle:
            raise InputError(f"{nodes[name]} cannot read an int8 table: {obstacle}; leave it out of the tables")


def _rounded(view: GraphView, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers, int8 [rows, n], and scales, float32 [rows, 1]."""
    table = view.value(name)
    assert table is not None
    integers, factors = np.empty(table.shape, np.int8), np.empty((len(table), 1), np.float32)
    step = max(1, _CHUNK_BYTES // (table.shape[1] * table.itemsize))
    for start in range(0, len(table), step):
        # Transposed, rows are the columns that have a scale each.
        rows = table[start : start + step].T
        if not np.isfinite(rows).all():
            raise InputError(f"embedding table {name!r} holds an infinite or NaN value, for which there is no int8; mend the model")
        scale = scales(rows, per_channel=True)
        factors[start : start + step, 0] = scale
        integers[start : start + step] = round_to_nearest(rows, scale).T
    return integers, factors
