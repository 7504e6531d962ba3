"""Sample rows with the tokens that leave them, for the report."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.tokenizer import read_words
from onnxprune.graph.model import Model
from onnxprune.graph.token_trace import TRACE
from onnxprune.passes.apply import execute
from onnxprune.passes.decision import Decision
from onnxprune.passes.scope import Settings
from onnxprune.runtime.session import RuntimeOptions, open_session, run

_ROWS = 6
_SIDE = 64
"""Pixels of the longer side of a picture."""
_OTHERS = 16
"""Most tokens that an image has besides its patches."""


def token_samples(decision: Decision, chosen: Settings) -> list[dict[str, Any]]:
    """The first held-back rows, and behind how many cuts each of their tokens still is; none if no token leaves or data are made up.

    Returns:
        by row ``stayed``: cuts that each token came through, None for padding; where the tokens are patches of an image, ``picture``; where
        they are ids, ``ids``, and ``words`` if a tokenizer is known.
    """
    cuts = decision.plan.tokens
    if cuts is None or decision.calibration.origin == "random":
        return []
    model = execute(decision.study.anatomy, decision.plan, traced=True)
    words = read_words(chosen.tokenizer) if chosen.tokenizer is not None else {}
    found = []
    for feeds, stayed in stays(model, decision.held_back.take(slice(0, _ROWS)), len(cuts.cuts), chosen.runtime):
        sample: dict[str, Any] = {"stayed": [None if count < 0 else int(count) for count in stayed]}
        found.append(sample | (_picture(feeds, stayed) or _text(feeds, stayed, words)))
    return found


def stays(model: Model, rows: CalibrationData, cuts: int, options: RuntimeOptions) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Of each row by itself, its inputs [1, ...] and the number of cuts that each token came through, int64 [N]; -1 for padding.

    Args:
        model: with the outputs of :data:`~onnxprune.graph.token_trace.TRACE` for so many ``cuts``.
    """
    session = open_session(model, options)
    names = [f"{TRACE}.{number}" for number in range(cuts + 1)]
    found = []
    for row in range(len(rows)):
        feeds = dict(rows.batch(np.array([row]), trim=True).feeds)
        whole, *later = (positions[0] for positions in run(session, feeds, names))
        stayed = np.where(whole < 0, -1, 0)
        for positions in later:
            stayed[positions[positions >= 0]] += 1
        found.append(({name: array[:1] for name, array in feeds.items()}, stayed))
    return found


def grid_of(height: int, width: int, tokens: int) -> tuple[int, int, int] | None:
    """Rows and columns of square patches, and how many other tokens are in front of them; None if tokens are no such grid."""
    for others in range(_OTHERS + 1):
        patches = tokens - others
        rows = round((max(patches, 0) * height / width) ** 0.5)
        if rows > 1 and patches % rows == 0 and height // rows == width // (patches // rows):
            return rows, patches // rows, others
    return None


def _picture(feeds: Mapping[str, np.ndarray], stayed: np.ndarray) -> dict[str, Any] | None:
    """``picture``: rows and columns of patches, tokens in front of them, and the image; None if tokens are no patches of one."""
    images = [array[0] for array in feeds.values() if array.ndim == 4 and array.dtype.kind == "f" and array.shape[1] in (1, 3)]
    if len(images) != 1 or len(feeds) != 1:
        return None
    _, height, width = images[0].shape
    grid = grid_of(height, width, len(stayed))
    if grid is None:
        return None
    small = _shrunk(images[0].astype(np.float64))
    pixels = np.round(255 * (small - small.min()) / max(float(np.ptp(small)), 1e-12)).astype(np.uint8).transpose(1, 2, 0)
    rows, columns, others = grid
    return {"picture": {"rows": rows, "columns": columns, "others": others, "png": base64.b64encode(png(pixels)).decode()}}


def _shrunk(image: np.ndarray) -> np.ndarray:
    """Means over cells [C, h, w] of an image [C, H, W], whose longer side is then 64 at most."""
    _, height, width = image.shape
    scale = min(_SIDE / max(height, width), 1.0)
    for axis, size in ((1, height), (2, width)):
        edges = np.linspace(0, size, max(round(size * scale), 1) + 1).round().astype(int)
        sums = np.add.reduceat(image, edges[:-1], axis=axis)
        image = sums / np.diff(edges).reshape([-1 if other == axis else 1 for other in range(3)])
    return image


def png(pixels: np.ndarray) -> bytes:
    """The file of an image, uint8 [H, W, 1] (grey) or [H, W, 3]."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # each begins with the number of its filter: none
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def _text(feeds: Mapping[str, np.ndarray], stayed: np.ndarray, words: Mapping[int, str]) -> dict[str, Any]:
    """``ids`` of the input that names most different ones, and their ``words``; neither if no input has an id for each token."""
    rows = [array[0] for array in feeds.values() if array.dtype.kind in "iu" and array.shape == (1, len(stayed))]
    rows = [row for row in rows if not (np.diff(row) == 1).all()]  # places count up
    if not rows:
        return {}
    ids = [int(number) for number in max(rows, key=lambda row: len(np.unique(row)))]
    return {"ids": ids} | ({"words": [words.get(number) for number in ids]} if words else {})
