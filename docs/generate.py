"""Pages that are written from the code: ``python -m docs.generate`` (``make docs``). A test fails when one of them is stale."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from onnxprune.refusals import CODES

FOLDER = Path(__file__).parent
FAMILIES = {
    "1": "Heads",
    "2": "Feed-forward neurons",
    "3": "Channels",
    "4": "int8",
    "5": "Vocabulary",
    "6": "Experts and hidden width",
    "7": "Tokens",
    "8": "Sublayers",
    "9": "Polish",
}


def refusals() -> str:
    """Every refusal code with its meaning, an example and the way out."""
    lines = [
        "# Refusals",
        "",
        "<!-- Written by `make docs` from onnxprune/refusals.py. -->",
        "",
        "A refusal says why one place in the graph is left as it is. Codes are stable. `onnxprune inspect MODEL` lists the refusals of a",
        "model; `onnxprune inspect MODEL --why NAME` explains a code, a site, a node or a tensor of it in full.",
        "",
    ]
    for family, codes in groupby(sorted(CODES), key=lambda code: code[2]):
        lines += [f"## {FAMILIES[family]}", ""]
        for code in map(CODES.__getitem__, codes):
            lines += [
                f"### {code.code}: {code.title}",
                "",
                code.explanation,
                "",
                f"* Says: `{code.example}`",
                f"* Way out: {code.hint}.",
                "",
            ]
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {"refusals.md": refusals}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write())
