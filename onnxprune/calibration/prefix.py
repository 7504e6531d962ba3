"""Running a model over all calibration batches piece by piece, keeping only the boundary between two pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxprune.calibration.data import Batch
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.cutting import Frontier, cut_piece, sizes_among
from onnxprune.graph.model import Model
from onnxprune.graph.storage import release
from onnxprune.graph.view import GraphView
from onnxprune.runtime.session import RuntimeOptions, open_session, run


class Prefix:
    """A model half-way through its graph, for every batch of the calibration data.

    After each :meth:`advance` only the tensors that later nodes read are kept, so memory is one layer's boundary, not all activations.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], options: RuntimeOptions) -> None:
        self.options = options
        self.view = GraphView(model)
        self.frontier = Frontier(self.view)
        self.known: list[dict[str, np.ndarray]] = [cut_feeds(model, batch.feeds) for batch in batches]
        self._inputs = frozenset(model.input_names)

    def replace(self, model: Model) -> None:
        """Go on with other weights: ``model`` has the same nodes in the same order."""
        self.view = self.frontier.view = GraphView(model)

    def advance(self, wanted: Sequence[str], passed: Sequence[str]) -> Iterator[list[np.ndarray]]:
        """Yield the tensors ``wanted`` batch by batch; afterwards everything up to ``passed`` is behind us.

        What lies between ``passed`` and ``wanted`` runs again in the next piece, then perhaps with other weights.
        """
        nodes, live = self.frontier.advance(wanted, passed)
        piece = cut_piece(self.view, nodes, [*wanted, *live], self.known[0], sizes_among(self.known))
        session = open_session(piece.model, self.options) if piece.model is not None else None
        for known in self.known:
            if session is not None:
                values = run(session, {name: known[name] for name in piece.inputs}, piece.outputs)
                known.update(zip(piece.outputs, values, strict=True))
            result = [known[name] for name in wanted]
            for name in [name for name in known if name not in live and name not in self._inputs]:
                del known[name]
            yield result
        if piece.model is not None:
            release(piece.model.weights.values())
