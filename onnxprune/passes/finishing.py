"""Finishing is measured: an exact rewrite is left out where the graph is slower with it, here and now, or does not compute the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxprune.graph.model import Model
from onnxprune.passes.apply import finish
from onnxprune.passes.base import RewritePass, exact, finishing, ordered, registry
from onnxprune.passes.int8 import timed
from onnxprune.runtime.measure import clock_for, ratio, time_sessions
from onnxprune.runtime.session import Feeds, RuntimeOptions, open_session, run

log = logging.getLogger(__name__)

EQUAL = 1e-4
"""Largest accepted difference to the graph without a part, relative to the largest output."""

SLOWER = 0.99
"""A part must not leave the graph slower than this: rewrites help by what they do, the clock has a veto, and less is its noise."""


@dataclass(frozen=True)
class Part:
    """What was found out about one rewrite: places changed, times faster with it than without, kept or not and why."""

    name: str
    places: int
    speedup: float | None
    kept: bool
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_parts(
    model: Model,
    asked: Sequence[str],
    feeds: Feeds,
    options: RuntimeOptions,
    seed: int,
    samples: Sequence[Feeds],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[str, ...], tuple[Part, ...]]:
    """Rewrites for this model: those asked for by name, and all others that do not make it slower.

    Parts are tried one after the other, each on top of those kept so far, all in one interleaved measurement per part.

    Args:
        samples: real inputs on which every part must give the same outputs.

    Returns:
        names in the order in which they run, and what was found out about each part tried.
    """
    kept = exact(asked)
    parts: list[Part] = []
    reference = [run(open_session(model, options), batch) for batch in samples]
    tried = [name for name in finishing(options.short_provider) if name not in kept]
    for number, name in enumerate(tried):
        if progress:
            progress(number, len(tried))
        item = registry()[name]
        assert isinstance(item, RewritePass)
        before = finish(model, kept)
        _, places = item.apply(before)
        if not places:
            parts.append(Part(name, 0, None, False, "nothing to change"))
            continue
        after = finish(model, ordered((*kept, name)))
        if not _same(after, reference, samples, options):
            log.warning("rewrite %s changes the outputs; left out", name)
            parts.append(Part(name, places, None, False, "changes the outputs"))
            continue
        timings = time_sessions(
            {"before": timed(before, feeds, options), "after": timed(after, feeds, options)},
            clock=clock_for(options),
            seed=seed,
            rounds=61,
            tolerance=0.004,
            max_seconds=10.0,
        )
        speedup = ratio(timings, "before", "after").median
        pays = speedup >= SLOWER
        parts.append(Part(name, places, speedup, pays, "" if pays else "slower here"))
        log.info("finishing with %s: %d places, %.3fx, %s", name, places, speedup, "kept" if pays else "left out")
        if pays:
            kept = ordered((*kept, name))
    if progress:
        progress(len(tried), len(tried))
    return ordered((*asked, *kept)), tuple(parts)


def _same(model: Model, reference: Sequence[Sequence[np.ndarray]], samples: Sequence[Feeds], options: RuntimeOptions) -> bool:
    session = open_session(model, options)
    for batch, expected in zip(samples, reference, strict=True):
        for a, b in zip(expected, run(session, batch), strict=True):
            if a.shape != b.shape or not np.allclose(a, b, rtol=EQUAL, atol=EQUAL * float(np.abs(a).max(initial=0)), equal_nan=True):
                return False
    return True
