"""Running a model piece by piece: only the weights of one piece are in memory at a time.

A graph is cut where few tensors cross, into pieces of bounded weight. All batches go through one piece before the next one is opened, so
each weight is read once per walk; what crosses a cut is kept for every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.graph.cutting import cut_piece, sizes_among
from onnxprune.graph.model import Model
from onnxprune.graph.storage import release
from onnxprune.graph.view import GraphView, captured
from onnxprune.runtime.session import Feeds, RuntimeOptions, open_session, run

if TYPE_CHECKING:
    import onnxruntime

PIECE_BYTES = 1 << 27
"""Most weights of a piece, unless one matrix alone is larger: a session with gradients needs about four times as much."""


@dataclass(frozen=True)
class Segment:
    """Nodes of one piece by index, in order, and the tensors made so far that later pieces or the caller read."""

    nodes: tuple[int, ...]
    live: tuple[str, ...]


def segments(view: GraphView, outputs: Sequence[str], most: int | None = None) -> list[Segment]:
    """Cut the part of a graph that computes ``outputs``: at least half full pieces, ended where the fewest tensors cross.

    Args:
        most: bytes of weights per piece (:data:`PIECE_BYTES` if None).
    """
    most = PIECE_BYTES if most is None else most
    order = sorted(view.ancestors(list(outputs)))
    last = _last_reads(view, order, outputs)
    crossing = _crossing(view, order, last)
    result: list[Segment] = []
    start = 0
    while start < len(order):
        end = _end(view, order, start, crossing, most)
        made = (name for index in order[:end] for name in view.nodes[index].outputs if name)
        result.append(Segment(tuple(order[start:end]), tuple(sorted(name for name in made if last.get(name, -1) >= end))))
        start = end
    return result


def _last_reads(view: GraphView, order: Sequence[int], outputs: Sequence[str]) -> dict[str, int]:
    """Position in ``order`` of the last reader of every tensor; beyond the end for what the caller wants."""
    last: dict[str, int] = {}
    for position, index in enumerate(order):
        node = view.nodes[index]
        last.update((name, position) for name in (*node.inputs, *captured(node.proto)) if name)
    return last | {name: len(order) for name in outputs}


def _crossing(view: GraphView, order: Sequence[int], last: dict[str, int]) -> np.ndarray:
    """How many tensors would cross a cut behind each position: int [nodes]."""
    change = np.zeros(len(order) + 2, np.int64)
    for position, index in enumerate(order):
        for name in view.nodes[index].outputs:
            if name and last.get(name, -1) > position:
                change[position] += 1
                change[last[name]] -= 1
    return np.cumsum(change)[: len(order)]


def _end(view: GraphView, order: Sequence[int], start: int, crossing: np.ndarray, most: int) -> int:
    """Position behind the last node of the piece that begins at ``start``."""
    seen: set[str] = set()
    size = 0
    candidates: list[int] = []
    for position in range(start, len(order)):
        node = view.nodes[order[position]]
        new = {name for name in (*node.inputs, *captured(node.proto)) if name in view.model.weights} - seen
        seen |= new
        size += sum(view.model.weights[name].nbytes for name in new)
        if size > most and position > start:
            return 1 + min(candidates or [position - 1], key=lambda cut: (int(crossing[cut]), -cut))
        if size >= most / 2:
            candidates.append(position)
    return len(order)


def run_batches(
    model: Model, feeds: Sequence[Feeds], outputs: Sequence[str], options: RuntimeOptions | None = None, *, optimize: bool = True
) -> Iterator[list[np.ndarray]]:
    """Yield ``outputs`` of every batch, in order: in one session, piece by piece if the model is paged.

    Outputs of the last piece, such as the scores of a vocabulary, are computed as they are asked for and never kept.

    Raises:
        InputError: the model cannot be loaded or fails on a batch.
    """
    if not feeds:
        return
    if not model.paged:
        session = open_session(model, options, optimize=optimize)
        for batch in feeds:
            yield run(session, batch, outputs)
        return
    view = GraphView(model)
    parts = segments(view, outputs)
    known: list[dict[str, np.ndarray]] = [dict(batch) for batch in feeds]
    for number, part in enumerate(parts):
        for values in run_segment(view, part, known, options, optimize=optimize):
            if number == len(parts) - 1:
                yield [values[name] for name in outputs]
    if not parts:
        yield from ([batch[name] for name in outputs] for batch in known)


def run_segment(
    view: GraphView, part: Segment, known: Sequence[dict[str, np.ndarray]], options: RuntimeOptions | None = None, *, optimize: bool = True
) -> Iterator[dict[str, np.ndarray]]:
    """Take every batch through one piece: yields what is known of it then, and keeps in ``known`` only what is read later."""
    inputs = frozenset(view.graph_inputs)
    piece = cut_piece(view, list(part.nodes), part.live, known[0], sizes_among(known))
    session = open_session(piece.model, options, optimize=optimize) if piece.model is not None else None
    for batch in known:
        if session is not None:
            values = run(session, {name: batch[name] for name in piece.inputs}, piece.outputs)
            batch.update(zip(piece.outputs, values, strict=True))
        yield dict(batch)
        for name in [name for name in batch if name not in part.live and name not in inputs]:
            del batch[name]
    del session
    if piece.model is not None:
        release(piece.model.weights.values())


class PagedSession:
    """What :func:`open_model` gives for a paged model: it runs like a session of onnxruntime, and opens the pieces anew for each run."""

    def __init__(self, model: Model, options: RuntimeOptions | None, optimize: bool) -> None:
        self._model, self._options, self._optimize = model, options, optimize

    def run(self, outputs: Sequence[str] | None, feeds: Feeds) -> list[np.ndarray]:
        """Values of ``outputs``, of all outputs if None."""
        names = list(outputs) if outputs is not None else list(self._model.output_names)
        (values,) = run_batches(self._model, [feeds], names, self._options, optimize=self._optimize)
        return values


def open_model(
    model: Model, options: RuntimeOptions | None = None, *, optimize: bool = True
) -> onnxruntime.InferenceSession | PagedSession:
    """A session of a model; of a paged one, something that runs like it."""
    return PagedSession(model, options, optimize) if model.paged else open_session(model, options, optimize=optimize)
