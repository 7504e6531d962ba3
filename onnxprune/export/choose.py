"""Which of several graphs of one network onnxruntime runs faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.graph.model import Model
from onnxprune.runtime.measure import Ratio, clock_for, in_turn, latency_ms, ratio, replicas, time_sessions
from onnxprune.runtime.session import RuntimeOptions, open_session, run

MAX_SECONDS = 20.0


@dataclass(frozen=True)
class Race:
    """Milliseconds by name on one request, time of the others over that of the first, and the name to take."""

    milliseconds: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    winner: str
    input_shapes: Mapping[str, tuple[int, ...]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "latency_ms": dict(self.milliseconds),
            "ratio_to_first": {name: [found.median, found.low, found.high] for name, found in self.ratios.items()},
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "threads": RuntimeOptions().threads,
        }


def faster(models: Mapping[str, Model], feeds: Mapping[str, np.ndarray]) -> Race:
    """Time graphs in turns on the CPU with one thread; the first stays unless another is surely faster (95% interval below 1)."""
    options = RuntimeOptions()
    count = replicas(max(model.weight_bytes for model in models.values()))
    calls = {name: in_turn([_call(model, feeds, options) for _ in range(count)]) for name, model in models.items()}
    timings = time_sessions(calls, clock=clock_for(options), max_seconds=MAX_SECONDS)
    first, *others = models
    ratios = {name: ratio(timings, name, first) for name in others}
    better = {name: found.median for name, found in ratios.items() if found.high < 1}
    winner = min(better, key=better.__getitem__) if better else first
    shapes = {name: tuple(array.shape) for name, array in feeds.items()}
    return Race({name: latency_ms(timings, name) for name in models}, ratios, winner, shapes)


def _call(model: Model, feeds: Mapping[str, np.ndarray], options: RuntimeOptions) -> Callable[[], object]:
    session = open_session(model, options)
    return lambda: run(session, feeds)
