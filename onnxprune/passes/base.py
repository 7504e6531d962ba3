"""What a pass is: a width pass offers sites to the one search, a rewrite pass changes the finished graph without changing its meaning."""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from onnxprune.errors import InputError
from onnxprune.graph.model import Model

ENTRY_POINTS = "onnxprune.passes"


@dataclass(frozen=True)
class WidthPass:
    """Offers the sites of one kind; the search decides how many units of each stay."""

    name: str
    kind: str
    summary: str
    detail: str
    needs: tuple[Literal["calibration", "gradients"], ...] = ("calibration", "gradients")


@dataclass(frozen=True)
class RewritePass:
    """``apply`` returns the rewritten model and how many places changed; the outputs stay the same up to rounding."""

    name: str
    apply: Callable[[Model], tuple[Model, int]]
    summary: str
    detail: str
    needs: tuple[str, ...] = ()


Pass = WidthPass | RewritePass


@cache
def registry() -> Mapping[str, Pass]:
    """All passes by name: the built-in ones, then those that installed packages offer as entry points of group ``onnxprune.passes``."""
    from onnxprune.passes.ffn import FFN
    from onnxprune.passes.heads import HEADS
    from onnxprune.passes.residual_sum import RESIDUAL_SUM

    found: dict[str, Pass] = {item.name: item for item in (HEADS, FFN, RESIDUAL_SUM)}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        item = entry.load()
        if not isinstance(item, WidthPass | RewritePass):
            raise InputError(f"entry point {entry.name} of {entry.dist} is not an onnxprune pass")
        found.setdefault(item.name, item)
    return found


def select(names: Iterable[str]) -> tuple[Pass, ...]:
    """Passes by name, in the order given, each once.

    Raises:
        InputError: an unknown name; the message suggests the nearest known one.
    """
    known = registry()
    chosen = []
    for name in dict.fromkeys(word.strip() for word in names if word.strip()):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(f"unknown pass {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}known passes: {', '.join(known)}")
        chosen.append(known[name])
    if not chosen:
        raise InputError(f"no pass named; known passes: {', '.join(known)}")
    return tuple(chosen)
