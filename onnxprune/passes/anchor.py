"""To the goal by the clock: rounds down, measure, put the table on the scale of what was measured, cut again while it misses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxprune.graph.model import Model
from onnxprune.passes.rounds import Descent, cut, descend, rounds_to
from onnxprune.passes.workbench import Scores, Student, Workbench
from onnxprune.search.costs import CostTable

MISS = 0.02
"""A target counts as met up to this share over it: what one more step of a width, and the clock's noise, amount to."""

REPEATS = 2
"""How often a search is repeated with a re-anchored table."""

_ANCHORED = 0.01
"""A measured latency may miss its goal by this share before the search is repeated."""


@dataclass(frozen=True, eq=False)
class Reached:
    """A student, the table that predicted it, and its cost: as predicted and as measured."""

    student: Student
    table: CostTable
    predicted: float
    measured: float


def reach(
    bench: Workbench,
    table: CostTable,
    goal: float,
    start: Student,
    *,
    first: Scores | None,
    shape: CostTable | None,
    error: Callable[[Model], float] | None,
    measure: Callable[[Student], float],
    note: Callable[[str, Student, float, float], None],
) -> Reached | None:
    """Rounds from ``start`` to the goal; measure, re-anchor and cut again while it misses. None if nothing gets there.

    Multiply-adds and parameters are what the table says; milliseconds and the bytes of a file are measured.

    Args:
        first, shape, error: as for :func:`~onnxprune.passes.rounds.descend`.
        measure: milliseconds or bytes of a student.
        note: is told the step, the student and its predicted and measured cost.
    """
    rounds = bench.recipe.rounds
    found = descend(bench, table, goal, rounds, start=start, first=first, error=error, shape=shape)
    if found is None:
        return None
    student = found.student
    if table.unit in ("macs", "params"):
        cost = table.predict(student.counts)
        return Reached(student, table, cost, cost)
    allowed = goal * (1 + MISS) if table.unit == "ms" else goal
    best: tuple[float, Reached] | None = None
    for attempt in range(REPEATS + 1):
        predicted = table.predict(student.counts)
        measured = measure(student)
        note(f"anchor {attempt}", student, predicted, measured)
        miss = abs(measured / goal - 1)
        # Less than asked for is no failure: a model over the goal ranks behind every one that is not.
        rank = miss if measured <= allowed else miss + 1
        if best is None or rank < best[0]:
            best = (rank, Reached(student, table, predicted, measured))
        if (miss <= _ANCHORED and measured <= allowed) or attempt == REPEATS:
            break
        table = table.scaled(measured / predicted)
        if not found.rounds or rounds_to(table, goal, rounds, table.predict(start.counts)) > found.rounds:
            # Nothing was cut yet, or one cut would be too deep: down again, in as many rounds as it takes.
            found = descend(bench, table, goal, rounds, start=start, first=first, error=error, shape=shape) or found
            again: Student | None = found.student
        else:
            again = _again(bench, found, table, goal) if found.scores.saliency else None
        if again is None or all(np.array_equal(again.kept[site], student.kept[site]) for site in again.kept):
            break
        student = again
    assert best is not None
    return best[1]


def _again(bench: Workbench, found: Descent, table: CostTable, goal: float) -> Student | None:
    kept = found.taste.choose(bench, found.before, found.scores, table, goal)
    return None if kept is None else cut(bench, kept)
