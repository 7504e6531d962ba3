"""Inputs and outputs of the graph to be written, and made-up values for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["ids", "mask", "types", "pixels", "past"]
Dims = tuple[int | str, ...]

BATCH, TOKENS, PAST, TOTAL = "batch", "tokens", "past", "past + tokens"
"""Names of the dynamic dimensions."""


@dataclass(frozen=True)
class Input:
    """``dims``: a size, or the name of a dynamic dimension. ``high``: integers are below it."""

    name: str
    kind: Kind
    dims: Dims
    high: int = 2

    @property
    def axes(self) -> dict[int, str]:
        """Dynamic axes by position."""
        return {axis: dim for axis, dim in enumerate(self.dims) if isinstance(dim, str)}


@dataclass(frozen=True)
class Signature:
    """``outputs`` maps a name to its dynamic axes. ``pad`` fills hidden positions; ``positions`` is the most tokens the network takes."""

    inputs: tuple[Input, ...]
    outputs: Mapping[str, Mapping[int, str]]
    pad: int = 0
    positions: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.inputs)

    @property
    def cached(self) -> bool:
        return any(item.kind == "past" for item in self.inputs)

    @property
    def is_text(self) -> bool:
        return any(item.kind == "ids" for item in self.inputs)


@dataclass(frozen=True)
class Case:
    """Sizes of one run. ``padded`` hides tokens of every row but the first: the last ones, or the oldest ones of a cache."""

    batch: int
    tokens: int = 1
    past: int = 0
    padded: bool = False


def trace_case(signature: Signature) -> Case:
    """Sizes to trace with. No dynamic one is 0 or 1, which exporters take for constants."""
    if signature.cached:
        return Case(2, 3, 5)
    return Case(2, _fit(signature, 16))


def proof_cases(signature: Signature) -> tuple[Case, ...]:
    """Sizes to compare at: one row and several, several lengths, padding; with a cache its first step and single tokens as well."""
    if signature.cached:
        return Case(1, 7, 0), Case(2, 5, 3, True), Case(1, 1, 6), Case(3, 1, 9, True)
    if not signature.is_text:
        return Case(1), Case(2), Case(3)
    short, middle, long = (_fit(signature, size) for size in (7, 16, 33))
    return Case(1, short), Case(2, middle), Case(2, long, padded=True), Case(3, short, padded=True)


def request_case(signature: Signature) -> Case:
    """What exporters are timed on: one image, one text of 128 tokens, or the next token after 127."""
    if signature.cached:
        return Case(1, 1, _fit(signature, 128) - 1)
    return Case(1, _fit(signature, 128))


def made_up(signature: Signature, case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the sizes of ``case``: a fresh array for each, since exporters merge inputs that are the same object."""
    rng = np.random.default_rng(seed)
    mask = _mask(case, signature.cached)
    shown = mask[:, case.past :]
    sizes = {BATCH: case.batch, TOKENS: case.tokens, PAST: case.past, TOTAL: case.past + case.tokens}
    feeds = {}
    for item in signature.inputs:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in item.dims)
        match item.kind:
            case "ids":
                ids = rng.integers(0, item.high, shape)
                ids = np.where(ids == signature.pad, (ids + 1) % item.high, ids)  # padding inside a text would move positions
                feeds[item.name] = np.where(shown, ids, signature.pad)
            case "mask":
                feeds[item.name] = mask.copy()
            case "types":
                feeds[item.name] = np.where(shown, rng.integers(0, item.high, shape), 0)
            case _:
                feeds[item.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def _mask(case: Case, cached: bool) -> np.ndarray:
    """int64 ``[batch, past + tokens]``, 1 where a token is seen; row r hides r of them (more would hide all of a short row)."""
    mask = np.ones((case.batch, case.past + case.tokens), np.int64)
    for row in range(1, case.batch if case.padded else 0):
        if cached:
            mask[row, :row] = 0
        else:
            mask[row, -min(3 * row, case.tokens - 1) :] = 0
    return mask


def _fit(signature: Signature, size: int) -> int:
    return size if signature.positions is None else min(size, signature.positions)
