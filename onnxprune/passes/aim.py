"""What one search is asked, what it notes on its way, and what it comes back with."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from onnxprune.errors import Refusal
from onnxprune.passes.anchor import Reached
from onnxprune.passes.precision import Tables
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Student
from onnxprune.search.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trail:
    """The log of a search, for the report: one list that all its parts write to. ``whose`` a step is stands in front of its name."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    whose: str = ""

    def of(self, whose: str) -> Trail:
        """The same trail, on which one of several searches goes on."""
        return Trail(self.steps, whose)

    def note(self, step: str, student: Student, predicted: float | None, measured: float | None, **losses: float) -> None:
        self.steps.append({"step": self.whose + step, "kept": student.counts, "predicted": predicted, "measured": measured, **losses})
        words = [f"{value:.4g}" if value else "-" for value in (predicted, measured)]
        log.info("%s%s: predicted %s, measured %s %s", self.whose, step, *words, losses or "")


@dataclass(frozen=True, eq=False)
class Aim:
    """From ``start`` to ``goal``, or as far as the loss allows where that is None.

    ``tables`` hold the costs of students as ``shipping`` makes files of them, ``given`` is that of the file as given.
    """

    target: Target
    goal: float | None
    given: float
    tables: Tables
    start: Student
    shipping: Shipping
    trail: Trail


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was reached, how it is shipped, and which passes did not do their part."""

    reached: Reached
    shipping: Shipping
    refusals: tuple[Refusal, ...] = ()
