"""docs/zoo.md from the cells of benchmarks.zoo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.architectures import ARCHITECTURES, exports

PAGE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"
FAMILIES = {
    "encoder": "Encoders of text and sound",
    "encoder-decoder": "Encoder-decoders",
    "decoder": "Decoders",
    "vision": "Vision",
    "convolution": "Convolutional networks",
}
SHARED = ("heads", "ffn")
"""Kinds whose cells of transformer rows are counted."""
Cell = dict[str, Any]


def write_page(cells: Sequence[Cell]) -> None:
    """Tables by family, footnotes, totals."""
    notes: dict[str, int] = {}
    lines = [_OPENING, "## Totals", "", *_totals(cells), ""]
    for family, title in FAMILIES.items():
        rows = [cell for cell in cells if cell["family"] == family and cell["variant"] in exports.VARIANTS]
        columns = [variant for variant in exports.VARIANTS if any(cell["variant"] == variant for cell in rows)]
        lines += [f"## {title}", "", *_table(rows, "architecture", "variant", columns, notes), ""]
    rows = [cell for cell in cells if cell["variant"] not in exports.VARIANTS]
    columns = list(dict.fromkeys(cell["architecture"] for cell in rows))
    lines += ["## Files made of one export", "", *_table(rows, "variant", "architecture", columns, notes), ""]
    lines += ["## Notes", "", *(f"{number}. {note}" for note, number in notes.items()), ""]
    PAGE.write_text("\n".join(lines))


_OPENING = """# Zoo

What `heads`, `ffn` and other width passes find in small random-weight models of many architectures, as several exporters and
tools write them. Made by `python -m benchmarks.zoo`; the networks are in `tests/architectures`.

`heads 2/2` means that both of the two blocks that the configuration holds were found with their true number of units, and that
random masks, corner cases among them, gave the same outputs masked and sliced (to 1e-4 of the largest output, and with the
runtime's own optimizations in every third case). Otherwise the cell names the refusal, with a note. Blocks that share weights
or tables may be one site, whose units go together. Columns are the exporter (`do` is the dynamo exporter of torch, `ts`
TorchScript), the opset, and the form of attention. A cell is empty where a network has no such form, or a tool was not tried.
Rows that end in `-cache` take and give keys and values of earlier tokens.

"""


def _table(rows: Sequence[Cell], down: str, across: str, columns: Sequence[str], notes: dict[str, int]) -> list[str]:
    """Lines of a table whose rows and columns are two of the names of a cell."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(cell[down] for cell in rows):
        found = {cell[across]: cell for cell in rows if cell[down] == name}
        texts = [_text(found[column], notes) if column in found else _absent(name, column) for column in columns]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def _absent(name: str, column: str) -> str:
    """Nothing where a network has no such form, or a tool is not tried on it."""
    return "not run" if name in ARCHITECTURES and column in exports.variants_of(ARCHITECTURES[name]) else ""


def silent(cell: Cell, kind: str) -> bool:
    """Blocks are there, fewer were found, and no refusal says why. A pooler, refused in any case, is no reason."""
    found = cell["kinds"][kind]
    missing = found["expected"] - len(found["found"])
    told = [refusal for refusal in found["refusals"] if not refusal["code"].endswith("02")]
    return bool(missing > 0 and not told and len(found["refusals"]) < missing)


def pruned(cell: Cell, kind: str) -> bool:
    return bool(cell["kinds"][kind]["as_expected"] == cell["kinds"][kind]["expected"])


def _totals(cells: Sequence[Cell]) -> list[str]:
    studied = [cell for cell in cells if cell["state"] == "studied"]
    counted = [(cell, kind) for cell in studied for kind in SHARED if cell["family"] != "convolution" and cell["kinds"][kind]["expected"]]
    full = sum(pruned(cell, kind) for cell, kind in counted)
    mute = [(cell, kind) for cell in studied for kind in cell["kinds"] if silent(cell, kind)]
    troubles = [trouble for cell in studied for trouble in cell["troubles"]]
    differ = sum(trouble.startswith("masked and sliced differ") for trouble in troubles)
    changed = sum((cell["changed_by_canonical"] or 0) > 1e-4 for cell in studied)
    known = {(cell["architecture"], cell["variant"]) for cell in cells}
    missing = sum((name, variant) not in known for name, entry in ARCHITECTURES.items() for variant in exports.variants_of(entry))
    share = f"{full / len(counted):.1%}" if counted else "none"
    return [
        f"* files studied: {len(studied)} of {len({cell['architecture'] for cell in cells})} architectures; "
        f"exports that fail: {sum(cell['state'] == 'export fails' for cell in cells)}; "
        f"files refused as a whole, with an error: {sum(cell['state'] == 'error' for cell in cells)}; "
        f"exports of the registry not run yet: {missing}",
        f"* cells of heads and ffn of transformers in which every site was found: {full} of {len(counted)} ({share})",
        f"* cells with neither all sites nor a refusal: {len(mute)}",
        f"* masks compared: {sum(cell['masks'] for cell in studied)}; that differ from the slice: {differ}; "
        f"slices that could not be made or loaded: {len(troubles) - differ}",
        f"* files that the canonical form computes otherwise: {changed}",
    ]


def _text(cell: Cell, notes: dict[str, int]) -> str:
    if cell["state"] != "studied":
        return f"{cell['state']} {_note(cell['reason'], notes)}"
    parts = []
    for kind, found in cell["kinds"].items():
        if not found["expected"] and not found["found"]:
            continue
        words = [kind, f"{found['as_expected']}/{found['expected']}" if found["expected"] else str(len(found["found"]))]
        if found["expected"] and (not pruned(cell, kind) or len(found["found"]) > found["expected"]):
            told = dict.fromkeys((refusal["code"], refusal["reason"]) for refusal in found["refusals"])
            words += [f"{code} {_note(reason, notes)}" for code, reason in told]
            if len(found["found"]) != found["as_expected"]:
                words.append(f"found as {found['found']}")
            if silent(cell, kind):
                words.append("**silent**")
        parts.append(" ".join(words))
    if cell["troubles"]:
        parts.append(f"**{len(cell['troubles'])} wrong** {_note(cell['troubles'][0], notes)}")
    return "<br>".join(parts) or "nothing to find"


def _note(reason: str, notes: dict[str, int]) -> str:
    """A number for a reason; names of nodes differ from file to file, and do not matter here."""
    plain = re.sub(r"\(at [^)]*\)?", "", reason).replace("|", "/").strip()
    plain = re.sub(r"(past_key_values|present)\.\d+", r"\1.N", plain)
    return f"[{notes.setdefault(plain, len(notes) + 1)}](#notes)"
