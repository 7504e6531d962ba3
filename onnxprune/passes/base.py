"""What a pass is.

A width pass offers sites to the one search, a whole pass decides something about the model as a whole, and a rewrite pass changes the
finished graph: exact ones keep its meaning, the others compute it in other numbers.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Literal

from onnxprune.errors import InputError
from onnxprune.graph.model import Model

ENTRY_POINTS = "onnxprune.passes"

Effect = Literal["removes units", "other numbers", "same numbers"]


@dataclass(frozen=True)
class WidthPass:
    """Offers the sites of one kind; the search decides how many units of each stay."""

    name: str
    kind: str
    summary: str
    detail: str
    needs: tuple[Literal["calibration", "gradients"], ...] = ("calibration", "gradients")

    @property
    def effect(self) -> Effect:
        return "removes units"


class Stage(IntEnum):
    """When a rewrite runs: integers are made of standard operators, which a fusion into the runtime's own would hide from the quantizer."""

    STANDARD = 0
    NUMBERS = 1
    FUSED = 2


@dataclass(frozen=True)
class RewritePass:
    """``apply`` returns the rewritten model and how many places changed.

    ``exact``: the outputs stay the same up to rounding. ``finishing``: providers on which every run tries it, and keeps it if it is faster.
    """

    name: str
    apply: Callable[[Model], tuple[Model, int]]
    summary: str
    detail: str
    stage: Stage = Stage.STANDARD
    exact: bool = True
    finishing: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def effect(self) -> Effect:
        return "same numbers" if self.exact else "other numbers"


@dataclass(frozen=True)
class WholePass:
    """Decides about the model as a whole; what it decides stands in the plan, and ``passes.scope`` and the search know it by ``kind``.

    Words and hidden directions go before anything else is decided, so that the rest of the run sees the smaller model; sublayers do, if
    what comes of it is better. Tokens and integers share the target with widths, and polish trains what the search found.
    """

    name: str
    kind: Literal["words", "hidden", "layers", "tokens", "integers", "polish"]
    summary: str
    detail: str
    needs: tuple[Literal["calibration", "gradients"], ...] = ("calibration",)

    @property
    def effect(self) -> Effect:
        return "other numbers" if self.kind in ("integers", "polish") else "removes units"


Pass = WidthPass | WholePass | RewritePass


@cache
def registry() -> Mapping[str, Pass]:
    """All passes by name: the built-in ones, then those that installed packages offer as entry points of group ``onnxprune.passes``."""
    from onnxprune.passes.channels import CHANNELS
    from onnxprune.passes.depth import QK, VO
    from onnxprune.passes.ffn import FFN
    from onnxprune.passes.finish import CLEAN, FUSABLE_GELU, FUSE_ATTENTION, RESIDUAL_SUM
    from onnxprune.passes.heads import HEADS
    from onnxprune.passes.hidden import HIDDEN
    from onnxprune.passes.layers import LAYERS
    from onnxprune.passes.numbers import FP16, INT4, INT8
    from onnxprune.passes.polish import POLISH
    from onnxprune.passes.tokens import TOKENS
    from onnxprune.passes.vocab import VOCAB

    removing = (HEADS, FFN, CHANNELS, QK, VO, LAYERS, TOKENS, VOCAB, HIDDEN)
    built_in = (*removing, POLISH, INT8, INT4, FP16, CLEAN, RESIDUAL_SUM, FUSABLE_GELU, FUSE_ATTENTION)
    found: dict[str, Pass] = {item.name: item for item in built_in}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        item = entry.load()
        if not isinstance(item, Pass):
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


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Rewrites in the order in which they run: by stage, then as the registry lists them."""
    known = {name: position for position, name in enumerate(registry())}

    def key(name: str) -> tuple[int, int]:
        item = registry()[name]
        return (item.stage if isinstance(item, RewritePass) else Stage.NUMBERS, known[name])

    return tuple(sorted(dict.fromkeys(names), key=key))


def finishing(provider: str) -> tuple[str, ...]:
    """Rewrites that every run on ``provider`` tries."""
    return ordered(name for name, item in registry().items() if isinstance(item, RewritePass) and provider in item.finishing)


def exact(rewrites: Iterable[str]) -> tuple[str, ...]:
    """Those of ``rewrites`` that leave the numbers as they are."""
    known = registry()
    return tuple(name for name in rewrites if isinstance(item := known[name], RewritePass) and item.exact)
