"""Where the tokens that stay stood at first: what each place keeps of every sample, as outputs beside those of the model."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from onnxprune.graph.emitter import Emitter
from onnxprune.graph.model import Model
from onnxprune.graph.token_policy import Choice, Stretch

TRACE = "onnxprune.positions"
"""Outputs of this name with a number: int64 [B, K], all tokens first, then those behind each cut; -1 is padding, or a package."""

_END = 2**62


class Trace:
    """Follows tokens from place to place."""

    def __init__(self, emitter: Emitter, choice: Choice, batch: str, count: str) -> None:
        self.e, self.choice = emitter, choice
        zero, one = (emitter.array(np.array(value, np.int64)) for value in (0, 1))
        places = emitter.unsqueeze(emitter.op("Range", zero, emitter.squeeze(count, 0), one), 0)
        everywhere = emitter.op("Expand", places, emitter.op("Concat", batch, count, axis=0))
        self.now = self._shown(everywhere, choice.real)
        self.found = [self.now]

    def pass_place(self, *after: Stretch) -> None:
        """Note where those stood that stay, which become ``after`` in one or several steps."""
        for stretch in after:
            self._follow(stretch)
        self.found.append(self.now)

    def _follow(self, after: Stretch) -> None:
        """What merged is where the token stood that took the others in."""
        e, lead = self.e, self.choice.leading
        if after.fixed is not None:
            self.now = e.op("Gather", self.now, e.array(after.fixed), axis=1)
        elif after.staying is not None:
            first, second = (e.slice(self.now, 1, e.int64([lead + start]), e.int64([_END]), 2) for start in (0, 1))
            leading = [e.slice(self.now, 1, e.int64([0]), e.int64([lead]))] if lead else []
            self.now = e.op("Concat", *leading, self.choice.take(first, after.staying), second, axis=1)
        else:
            assert after.index is not None
            self.now = self.choice.take(self.now, after.index)
        if after.packages:
            self.now = e.op("Pad", self.now, e.int64([0, 0, 0, 1]), e.array(np.array(-1, np.int64)))
        self.now = self._shown(self.now, after.sizes)

    def _shown(self, positions: str, sizes: str | None) -> str:
        if sizes is None:
            return positions
        e = self.e
        return e.op("Where", e.op("Greater", sizes, self.choice.number(0.0)), positions, e.int64([-1]))

    def told_by(self, model: Model) -> Model:
        """The model with what was found as further outputs."""
        proto = model.copy_proto()
        for number, tensor in enumerate(self.found):
            proto.graph.node.append(helper.make_node("Identity", [tensor], [f"{TRACE}.{number}"], name=f"{TRACE}.{number}"))
            proto.graph.output.append(helper.make_tensor_value_info(f"{TRACE}.{number}", TensorProto.INT64, None))
        return model.with_proto(proto)
