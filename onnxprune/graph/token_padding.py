"""Which tokens are padding: what the masks in front of attention hide."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from onnxprune.graph.emitter import Emitter
from onnxprune.graph.profile import Profile
from onnxprune.graph.token_axis import TokenAxis, values_behind
from onnxprune.graph.uniform import uniform_value
from onnxprune.graph.view import GraphView

_HIDDEN = -1e3
"""An additive mask below this hides a token."""


def masks_of(view: GraphView, axis: TokenAxis) -> dict[str, bool]:
    """Sides that hide keys from an attention, and whether True in them means visible (for additive masks: True)."""
    found: dict[str, bool] = {}
    for index in sorted(axis.attentions):
        pending = [view.nodes[index].inputs[0]]
        while pending:
            maker = view.producer.get(pending.pop())
            if maker is None or maker.op not in ("Add", "Where", "Mul", "Div", "Cast"):
                continue
            for slot, name in enumerate(maker.inputs):
                if name not in axis.sides:
                    pending += [name] if axis.axes(name) else []
                elif maker.op == "Add" or (maker.op == "Where" and slot == 0):
                    found[name] = maker.op == "Add" or bool(axis.axes(maker.inputs[1]))
    return {name: visible for name, visible in sorted(found.items()) if uniform_value(view, name) is None}


def depends_on_sample(e: Emitter, masks: Mapping[str, bool]) -> bool:
    """Whether a mask does, so that there may be padding."""
    given = e.model.input_names
    behind = values_behind(e.view, given)
    makers = {name: e.view.producer.get(name) for name in masks}
    return any(name in given or (maker is not None and maker.index in behind) for name, maker in makers.items())


def real_tokens(e: Emitter, profile: Profile, axis: TokenAxis, masks: Mapping[str, bool], batch: str, count: str) -> str | None:
    """Tokens that are not padding, float [B, N]; None if no mask tells.

    Args:
        masks: as :func:`masks_of` gives them.
        batch, count: number of samples and of tokens, int64 [1].
    """
    result = None
    samples = (profile.shape(axis.places[0].tensor) or (0,))[0]
    for name, visible in masks.items():
        shape = profile.shape(name)
        if shape is None:
            continue  # a constant: it hides no padding
        if e.type_of(name) == TensorProto.BOOL:
            shown = e.op("Cast", name if visible else e.op("Not", name), to=TensorProto.FLOAT)
        else:
            shown = e.op("Cast", e.op("Greater", name, e.array(np.array(_HIDDEN, np.float32))), to=TensorProto.FLOAT)
        keys = max(axis.axes(name))
        batched = len(shape) > 2 and shape[0] == samples
        others = [other for other in range(len(shape)) if other != keys and not (batched and other == 0)]
        shown = e.reduce("ReduceMax", shown, others, keepdims=False)
        shown = shown if batched else e.unsqueeze(shown, 0)
        result = shown if result is None else e.op("Mul", result, shown)
    if result is None:
        return None
    return e.op("Expand", result, e.op("Concat", batch, count, axis=0))
