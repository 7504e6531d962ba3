"""Embedding tables of words: which tables token ids look rows up in, and the same graph with only some of their rows.

A table is one of words where its indices are a graph input as it was fed: positions and segments are small, computed, or counted up.
Every id stays valid: a map in front of the table says whose row it reads, or the caller maps the ids before it feeds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxprune.errors import InputError, Refusal
from onnxprune.graph.model import Model
from onnxprune.graph.surgery import Surgeon
from onnxprune.graph.view import GraphView, Node

FEW_ROWS = 512
"""Tables up to this many rows are left alone: segments, short positions, bytes."""

VocabMap = Literal["graph", "file"]
"""Who maps ids to rows: the graph, or whoever makes the ids, by a file beside the model."""

MAP = "vocabulary.map"
"""Nodes that map ids are named after it."""

_REARRANGE = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand"})
"""Operators whose output holds the values of their first input and no others."""

_NO_IDS = frozenset(
    {
        "Shape",
        "Size",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Not",
        "And",
        "Or",
        "IsNaN",
        "CumSum",
        "NonZero",
        "ArgMax",
    }
)
"""Operators whose output is no id, whatever they read: sizes, comparisons, counts, places."""

_CHUNK = 1 << 24
"""Similarities of rows that are in memory at one time."""

_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})


@dataclass(frozen=True)
class WordTables:
    """Tables that the same ids look up in: graph inputs that hold ids, Gather nodes, names of tables, and their rows."""

    inputs: tuple[str, ...]
    lookups: tuple[str, ...]
    tables: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Vocabulary:
    """Rows that stay in the tables of ``lookups``. ``reads`` is int32 [rows before]: the id whose row an id reads, itself if that stays."""

    inputs: tuple[str, ...]
    lookups: tuple[str, ...]
    reads: np.ndarray = field(compare=False, repr=False)

    @property
    def rows(self) -> int:
        return len(self.reads)

    @property
    def kept(self) -> np.ndarray:
        """Ids whose rows stay, ascending: int32 [rows after]."""
        return np.unique(self.reads)

    @property
    def map(self) -> np.ndarray:
        """Row after, of every id before: int32 [rows before]."""
        return np.searchsorted(self.kept, self.reads).astype(np.int32)

    def mapped(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``feeds`` with ids as a model without the map wants them."""
        table = self.map
        return {name: table[array].astype(array.dtype) if name in self.inputs else array for name, array in feeds.items()}


def word_tables(view: GraphView) -> tuple[tuple[WordTables, ...], tuple[Refusal, ...]]:
    """Tables of words by the inputs that hold their ids, and what looks like one and cannot lose rows."""
    refusals: list[Refusal] = []
    sources: dict[str, set[str]] = {}
    readers: dict[str, list[str]] = {}
    for name in dict.fromkeys(node.inputs[0] for node in view.nodes if _is_lookup(view, node)):
        found = _sources(view, name)
        if isinstance(found, Refusal):
            refusals.append(found)
        elif found:
            sources[name] = found
            readers[name] = [node.name for node, _ in view.consumers[name]]
    groups = []
    while sources:
        first = next(iter(sources))
        inputs, tables = sources.pop(first), [first]
        while joined := [name for name, ids in sources.items() if ids & inputs]:
            for name in joined:
                inputs |= sources.pop(name)
                tables.append(name)
        rows = {_rows(view, name) for name in tables}
        if len(rows) > 1:
            refusals.append(Refusal("OP502", tables[0], f"{', '.join(sorted(inputs))} look up in tables of {sorted(rows)} rows"))
            continue
        lookups = tuple(reader for name in tables for reader in readers[name])
        groups.append(WordTables(tuple(sorted(inputs)), lookups, tuple(tables), rows.pop()))
    return tuple(groups), (*refusals, *(refusal for group in groups for refusal in _heads(view, group)))


def _is_lookup(view: GraphView, node: Node) -> bool:
    """It picks rows of a constant float matrix of more than :data:`FEW_ROWS`, by indices that are not constant."""
    if node.op != "Gather" or node.domain or view.is_constant(node.inputs[1]):
        return False
    table = view.value(node.inputs[0])
    rows = node.attrs.get("axis", 0) in (0, -2)
    return table is not None and table.ndim == 2 and rows and len(table) > FEW_ROWS and np.issubdtype(table.dtype, np.floating)


def _rows(view: GraphView, name: str) -> int:
    table = view.value(name)
    assert table is not None
    return len(table)


def _sources(view: GraphView, table: str) -> set[str] | Refusal:
    """The inputs whose ids look up in a table; nothing if it is none of words; a refusal if some ids are computed, or it is tied."""
    found: set[str] = set()
    obstacle: Refusal | None = None
    for node, slot in view.consumers[table]:
        if slot != 0 or not _is_lookup(view, node):
            reason = (
                f"table {table} is also the weight of an output layer, or read as a whole (at {node.name}): cutting a copy would add to it"
            )
            obstacle = Refusal("OP503", table, reason)
            continue
        name = _source(view, node.inputs[1])
        if name is not None and "position" not in name.lower():
            found.add(name)
        elif name is None and (origins := _origins(view, node.inputs[1])):
            obstacle = obstacle or Refusal("OP501", table, f"its ids are computed from {', '.join(sorted(origins))} (at {node.name})")
    if table in view.graph_outputs:
        obstacle = Refusal("OP503", table, f"table {table} is an output of the graph")
    # A table that only positions look up in is none of words, whoever else reads it.
    return obstacle if obstacle is not None and (found or obstacle.code == "OP501") else found


def _source(view: GraphView, name: str) -> str | None:
    """The integer graph input that a tensor is, but for its type and shape."""
    while name not in view.graph_inputs:
        node = view.producer.get(name)
        if node is None or node.domain or node.op not in _REARRANGE:
            return None
        name = node.inputs[0]
    return name if name in _integers(view) else None


def _origins(view: GraphView, name: str) -> set[str]:
    """Inputs with ids on which a tensor depends by value: masks and positions hold none."""
    found: set[str] = set()
    pending, seen = [name], set()
    while pending:
        current = pending.pop()
        node = view.producer.get(current)
        if current in seen or view.is_constant(current) or (node is not None and node.op in _NO_IDS):
            continue
        seen.add(current)
        if node is not None:
            pending.extend(operand for operand in node.inputs if operand)
        elif current in _integers(view) and not any(word in current.lower() for word in ("mask", "position")):
            found.add(current)
    return found


def _integers(view: GraphView) -> frozenset[str]:
    return frozenset(
        value.name
        for value in view.model.proto.graph.input
        if value.name in view.graph_inputs and value.type.tensor_type.elem_type in _INTEGERS
    )


def _heads(view: GraphView, group: WordTables) -> list[Refusal]:
    """Output layers over the same words: what they compute is told by its place, so they stay whole."""
    found = []
    for node in view.nodes:
        weight = view.value(node.inputs[1]) if node.op in ("MatMul", "Gemm") and len(node.inputs) > 1 else None
        if weight is not None and weight.ndim == 2 and group.rows in weight.shape:
            found.append(
                Refusal("OP504", node.name, f"it makes a score for each of {group.rows} words: its outputs are told by their place")
            )
    return found


def other_reader(view: GraphView, vocabulary: Vocabulary | WordTables) -> Node | None:
    """A node that reads ids and is no lookup, so that the ids themselves must not change; None if there is none."""
    pending, seen = list(vocabulary.inputs), set()
    while pending:
        name = pending.pop()
        for node, slot in view.consumers.get(name, ()):
            if node.name in vocabulary.lookups or node.op in ("Shape", "Size"):
                continue
            if slot != 0 or node.domain or node.op not in _REARRANGE or node.outputs[0] in view.graph_outputs:
                return node
            if node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                pending.append(node.outputs[0])
    return None


def cut_vocabulary(model: Model, vocabularies: Sequence[Vocabulary]) -> Model:
    """The model with only the rows that stay, and a map in front of every lookup: it takes the ids it took before.

    Raises:
        InputError: a lookup is not there or its table has other rows; the decision belongs to another model.
    """
    view = GraphView(model)
    nodes = {node.name: node for node in view.nodes}
    surgeon = Surgeon(model)
    for vocabulary in vocabularies:
        reads = surgeon.constant(vocabulary.map, MAP)
        tables: dict[str, gs.Tensor] = {}
        mapped: dict[str, gs.Tensor] = {}
        for lookup in vocabulary.lookups:
            node = nodes.get(lookup)
            table = view.value(node.inputs[0]) if node is not None and node.op == "Gather" else None
            if node is None or table is None or len(table) != vocabulary.rows:
                raise InputError(f"{lookup!r} looks up in no table of {vocabulary.rows} rows here: the plan was made for another model")
            edit, name, ids = surgeon.nodes[node.index], node.inputs[0], node.inputs[1]
            if name not in tables:
                tables[name] = surgeon.constant(table[vocabulary.kept], name)
            if ids not in mapped:
                mapped[ids] = surgeon.variable(MAP, np.int32)
                surgeon.add("Gather", [reads, edit.inputs[1]], mapped[ids], MAP, axis=0)
            edit.inputs = [tables[name], mapped[ids]]
    return surgeon.close() if vocabularies else model


def without_map(model: Model) -> Model:
    """The same tables without the map in front of them: the model takes mapped ids."""
    surgeon = Surgeon(model)
    for node in surgeon.nodes:
        if node.op == "Gather" and node.name.startswith(MAP):
            ids, mapped = node.inputs[1], node.outputs[0]
            for reader in list(mapped.outputs):
                reader.inputs = [ids if operand is mapped else operand for operand in reader.inputs]
    return surgeon.close()


def nearest_rows(table: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """For every row of a table [rows, width], the kept row of the most similar direction: int32 [rows], kept rows are their own."""
    result = np.arange(len(table), dtype=np.int32)
    dropped = np.setdiff1d(result, kept)
    centre = table.mean(0)
    among = table[kept] - centre
    among /= np.maximum(np.linalg.norm(among, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    step = max(1, _CHUNK // max(len(kept), 1))
    for start in range(0, len(dropped), step):
        some = dropped[start : start + step]
        result[some] = kept[((table[some] - centre) @ among.T).argmax(1)]
    return result
