"""Without a number to reach: down in steps for as long as the model stays good enough."""

from __future__ import annotations

from collections.abc import Callable

from onnxprune.passes.choice import choose
from onnxprune.passes.rounds import cut, score
from onnxprune.passes.workbench import Scores, Student, Workbench
from onnxprune.search.costs import CostTable

_STEP = 0.82
_FLOOR = 0.08


def walk_down(bench: Workbench, dense: Student, table: CostTable, acceptable: Callable[[Student, str, float], bool]) -> list[Student]:
    """Students that are good enough, each smaller than the one before; at the end half a step more.

    Args:
        acceptable: judges a student, given the name of the step and the predicted cost.
    """
    prunable = table.full - table.fixed

    def tried(student: Student, scores: Scores, share: float) -> Student | None:
        kept = choose(bench, student, scores, table, table.fixed + prunable * share)
        if kept is None:
            return None
        candidate = cut(bench, kept)
        return candidate if acceptable(candidate, f"auto {100 * share:.0f}%", table.predict(candidate.counts)) else None

    student, share, number = dense, 1.0, 0
    passed: list[Student] = []
    while bench.sites and share * _STEP >= _FLOOR:
        number += 1
        scores = score(bench, student, number)
        while share * _STEP >= _FLOOR and _unchanged(bench, student, scores, table, table.fixed + prunable * share * _STEP):
            share *= _STEP  # the step is finer than the widths on offer
        found = tried(student, scores, share * _STEP)
        if found is None:
            half = tried(student, scores, share * _STEP**0.5)
            return passed + ([half] if half else [])
        passed.append(found)
        student = found
        share *= _STEP
    return passed


def _unchanged(bench: Workbench, student: Student, scores: Scores, table: CostTable, budget: float) -> bool:
    kept = choose(bench, student, scores, table, budget)
    return kept is not None and all(len(kept[site]) == len(units) for site, units in student.kept.items())
