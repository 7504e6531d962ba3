"""Tokens back at their places: in front of a head with a row for each token, all of them as they were last.

A token that left comes back as it was where it left, one that was merged as the token that it became part of. Only gathers and one scatter
per place, which all providers have; nothing is added up, so that the result does not depend on an order.
"""

from __future__ import annotations

import numpy as np

from onnxprune.graph.emitter import Emitter
from onnxprune.graph.token_policy import Stretch


class Return:
    """Follows every token over the places.

    Args:
        batch: number of samples, int64 [1].
    """

    def __init__(self, emitter: Emitter, batch: str) -> None:
        self.e, self.batch = emitter, batch
        self.states: str | None = None
        """Every token as it was last, float [B, N, C]; those that are still there as they were in front of the last place."""
        self.where: str | None = None
        """Where every token is now, int64 [B, N]; -1 if it left."""

    def pass_place(self, features: str, before: Stretch, *after: Stretch) -> None:
        """Note what becomes of the tokens of the stretch ``before``, with these features, in one or several steps."""
        self.states = self._now(features)
        for stretch in after:
            moves = stretch.moves or self._moves(stretch, before)
            if self.where is None:
                self.where = moves
            else:
                self.where = self.e.op("Where", self._left(), self.where, self._take(moves))
            before = stretch

    def all_back(self, features: str, output: str) -> None:
        """Features [B, K, C] of the tokens that are there, and of all others, as ``output`` [B, N, C]."""
        self._now(features, output)

    def _now(self, features: str, output: str | None = None) -> str:
        if self.where is None or self.states is None:
            return features
        e = self.e
        return e.op("Where", e.unsqueeze(self._left(), 2), self.states, self._take(features), output=output)

    def _left(self) -> str:
        assert self.where is not None
        return self.e.op("Less", self.where, self.e.int64([0]))

    def _take(self, tensor: str) -> str:
        """Rows [B, N, ...] of [B, K, ...] where tokens are; any for those that left."""
        assert self.where is not None
        rows = self.e.op("Max", self.where, self.e.int64([0]))
        return self.e.op("GatherND", tensor, self.e.unsqueeze(rows, 2), batch_dims=1)

    def _moves(self, after: Stretch, before: Stretch) -> str:
        """Where tokens of the stretch before are among those that were chosen, int64 [B, count before]; -1 if they left.

        What a sample hides, because others keep more, has left as well.
        """
        e = self.e
        shape = e.op("Concat", self.batch, after.count, axis=0)
        one, zero = (e.array(np.array(value, np.int64)) for value in (1, 0))
        numbers = e.op("Expand", e.op("Range", zero, e.squeeze(after.count, 0), one), shape)
        if after.sizes is not None:
            there = e.op("Greater", after.sizes, e.array(np.array(0, np.float32)))
            numbers = e.op("Where", there, numbers, e.int64([-1]))
        index = after.index if after.fixed is None else e.op("Expand", e.array(after.fixed[None]), shape)
        assert index is not None
        none = e.op("Expand", e.int64([-1]), e.op("Concat", self.batch, before.count, axis=0))
        return e.op("ScatterElements", none, index, numbers, axis=1)
