"""Run a model over calibration data, batch by batch; nothing but the outputs asked for is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.errors import InputError
from onnxprune.graph.caches import cut_feeds
from onnxprune.graph.model import Model
from onnxprune.graph.paged import run_batches
from onnxprune.runtime.session import Feeds, RuntimeOptions, open_session, run

log = logging.getLogger(__name__)

DEFAULT_ROWS = 16
"""Rows per run if the caller names none. A constant, as sums inside the graph depend on it in the last bits."""

_MEMORY_WORDS = ("allocate memory", "bad_alloc", "out of memory", "out_of_memory", "bfcarena", "failed to allocate")


def stream(
    model: Model,
    data: CalibrationData,
    outputs: Sequence[str] | None = None,
    *,
    options: RuntimeOptions | None = None,
    extra: Callable[[Batch], Feeds] | None = None,
    rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Yield ``(batch, outputs by name)`` for all rows of ``data``: in one session, of a paged model in one after the other.

    A model that lost heads of its cache gets the caches of ``data`` without them. Batches are trimmed to their longest row and come in
    order of length; ``batch.index`` says which rows they are.

    Args:
        outputs: names of graph outputs to fetch, None for all.
        extra: further feeds computed from a batch (masks, labels, token weights).
        rows: rows per run at the start (:data:`DEFAULT_ROWS` if None); halved when a run is short of memory.
        progress: called with (rows done, rows in all) after each run.

    Raises:
        InputError: the model fails on a batch, or a single row does not fit in memory.
        RuntimeUnavailable: the provider did not start.
    """
    names = list(outputs) if outputs is not None else list(model.output_names)
    order = data.order(trim=True)
    size = data.fixed_rows or rows or DEFAULT_ROWS
    if model.paged:
        yield from _in_pieces(
            model,
            [data.batch(order[start : start + size], trim=True) for start in range(0, len(order), size)],
            names,
            options,
            extra,
            progress,
        )
        return
    session = open_session(model, options)
    done = 0
    while done < len(order):
        batch = data.batch(order[done : done + size], trim=True)
        feeds = {**cut_feeds(model, batch.feeds), **(extra(batch) if extra else {})}
        try:
            values = run(session, feeds, names)
        except (InputError, MemoryError) as error:
            if not _short_of_memory(error) or size == 1 or data.fixed_rows:
                raise
            size //= 2
            log.warning("short of memory; going on with %d rows per run", size)
            continue
        yield batch, dict(zip(names, values, strict=True))
        done += int(batch.valid.sum())
        if progress:
            progress(done, len(order))


def _in_pieces(
    model: Model,
    batches: Sequence[Batch],
    names: Sequence[str],
    options: RuntimeOptions | None,
    extra: Callable[[Batch], Feeds] | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    feeds = [{**cut_feeds(model, batch.feeds), **(extra(batch) if extra else {})} for batch in batches]
    total, done = sum(int(batch.valid.sum()) for batch in batches), 0
    for batch, values in zip(batches, run_batches(model, feeds, names, options), strict=True):
        yield batch, dict(zip(names, values, strict=True))
        done += int(batch.valid.sum())
        if progress:
            progress(done, total)


def _short_of_memory(error: BaseException) -> bool:
    text = f"{error} {error.__cause__ or ''}".lower()
    return isinstance(error, MemoryError) or any(word in text for word in _MEMORY_WORDS)
