"""Which tokens leave, drawn: counts by place, images with the patches that left, texts with the words that left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxprune.report.numbers import percent

Record = Mapping[str, Any]
_STAGES = 5
"""Places drawn beside an image; of more, some that are evenly spread."""
_FAINTEST, _STRONGEST = 0.4, 0.8
"""Opacity of words that leave first and last."""
_MARKS = ("\u2581", "\u0120")
"""In front of a piece of text that begins a word, as SentencePiece and byte-level BPE write it."""

FATES = {
    "package": "Those that left are one more token together",
    "merge": "Those that left have joined the one most like them",
    "drop-merge": "Of those that left, one half joined the one most like them",
    "static": "The same leave in every sample",
    "grid": "Neighbouring rows and columns have become one, the same in every sample",
}

LEGENDS = {
    "merge": "patches that are part of another one",
    "drop-merge": "patches that left, or are part of another one",
    "grid": "patches that are part of the one above or beside them",
}


@dataclass(frozen=True)
class Drawing:
    """How a report draws them.

    Attributes:
        fate: what became of those that left.
        legend: what is covered in pictures.
        places: rows of a table.
        stages: headings of the pictures' columns.
        texts: pieces of each row.
    """

    fate: str
    legend: str
    places: list[dict[str, Any]]
    stages: list[str]
    pictures: list[dict[str, Any]]
    texts: list[list[dict[str, Any]]]


def tokens(record: Record) -> Drawing | None:
    """None where no token leaves."""
    known = record.get("tokens") or {}
    chosen = known.get("chosen")
    if not chosen or not chosen["cuts"]:
        return None
    samples = known.get("samples", ())
    cuts = chosen["cuts"]
    shown = _spread(len(cuts))
    return Drawing(
        FATES.get(chosen["policy"], ""),
        LEGENDS.get(chosen["policy"], "patches that left"),
        [_place(number, cut, samples) for number, cut in enumerate(cuts)],
        ["all patches", *(f"behind attention {cuts[number]['block']}" for number in shown)],
        [_picture(sample, shown) for sample in samples if "picture" in sample],
        [_pieces(sample, [cut["block"] for cut in cuts]) for sample in samples if "ids" in sample],
    )


def _spread(places: int) -> list[int]:
    """Numbers of the places that are drawn, the first and the last among them."""
    if places <= _STAGES:
        return list(range(places))
    return [round(step * (places - 1) / (_STAGES - 1)) for step in range(_STAGES)]


def _place(number: int, cut: Record, samples: Sequence[Record]) -> dict[str, Any]:
    """Counts in front of and behind a place: of all samples, if they have as many, or the least and the most."""
    counts = [
        [sum(left is not None and left >= least for left in sample["stayed"]) for sample in samples] for least in (number, number + 1)
    ]
    before, after = (_range(found) for found in counts)
    return {"block": cut["block"], "part": cut["share"], "share": percent(cut["share"], 0), "before": before, "after": after}


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _picture(sample: Record, shown: Sequence[int]) -> dict[str, Any]:
    """The image, and by stage what covers the patches that left: a path in units of patches."""
    picture = sample["picture"]
    rows, columns = picture["rows"], picture["columns"]
    patches = sample["stayed"][picture["others"] :]
    grid = [patches[start : start + columns] for start in range(0, rows * columns, columns)]
    return {
        "image": f"data:image/png;base64,{picture['png']}",
        "rows": rows,
        "columns": columns,
        "covers": [_cover(grid, number + 1) for number in shown],
        "kept": [f"{sum(left > number for left in patches)} of {len(patches)} patches" for number in shown],
    }


def _cover(grid: Sequence[Sequence[int]], least: int) -> str:
    """Path over the patches that came through fewer cuts than ``least``, neighbours of a row as one piece."""
    path = []
    for y, line in enumerate(grid):
        x = 0
        while x < len(line):
            width = next((end for end in range(x, len(line)) if line[end] >= least), len(line)) - x
            if width:
                path.append(f"M{x} {y}h{width}v1h-{width}z")
            x += max(width, 1)
    return "".join(path)


def _pieces(sample: Record, blocks: Sequence[int]) -> list[dict[str, Any]]:
    """Pieces of a text in order: ``text``, whether a ``gap`` is in front, the ``block`` behind which it left (None: it stays)."""
    words = sample.get("words") or [None] * len(sample["ids"])
    marked = any(word and word.startswith(_MARKS) for word in words)
    pieces: list[dict[str, Any]] = []
    for word, number, left in zip(words, sample["ids"], sample["stayed"], strict=True):
        if left is None:
            continue
        text = f"#{number}" if word is None else word
        gap = (text.startswith(_MARKS) or text[:1] in ("[", "<")) if marked else word is None or not text.startswith("##")
        stays = left == len(blocks)
        piece = {
            "text": text if word is None else text.removeprefix("##").lstrip("".join(_MARKS)) or " ",
            "gap": gap,
            "block": None if stays else blocks[left],
            "opacity": 1.0 if stays else round(_FAINTEST + (_STRONGEST - _FAINTEST) * left / max(len(blocks) - 1, 1), 2),
        }
        pieces.append(piece)
    return pieces
