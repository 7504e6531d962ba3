"""Without a number to reach: integers, then down in steps, for as long as the model stays good enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from onnxprune.errors import Refusal, TargetError
from onnxprune.passes.aim import Aim, Outcome
from onnxprune.passes.anchor import Reached
from onnxprune.passes.choice import choose
from onnxprune.passes.precision import most_sensitive
from onnxprune.passes.premises import Premises
from onnxprune.passes.rounds import cut, score
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Scores, Student, Workbench
from onnxprune.search.costs import CostTable

_STEP = 0.82
_FLOOR = 0.08
_SENSITIVE_SHARES = (0.0, 0.125, 0.25, 0.5)
"""Of the groups of products, those that are tried in float."""


def search_within_limit(premises: Premises, aim: Aim) -> Outcome:
    """Go down in steps while the judging rows allow it, then half a step more; step back if the other held-back rows disagree.

    Raises:
        TargetError: no model is good enough.
        NothingPrunable: int8 loses too much, and there is nothing else to do.
    """
    limit, dense = premises.limit, premises.dense
    passed = [] if premises.bench.sites else [dense.kept]
    refusals: tuple[Refusal, ...] = ()
    if aim.shipping.scheme is not None:
        shipping = _integers_within(premises, aim)
        if shipping is not None:
            passed = [dense.kept]
        else:
            reason = f"int8 loses more than {100 * limit:g}% even with half of the products in float"
            refusals = (premises.study.refused(Refusal("OP402", "int8", reason), others=bool(aim.shipping.schedules)),)
            shipping = aim.shipping.in_float()
        aim = replace(aim, shipping=shipping)
    # Which products stay in float is settled now, and with it what everything costs.
    shipping, tables = aim.shipping, aim.tables
    table = tables.blend(shipping.groups, shipping.floats) if shipping.scheme else tables.floats
    steps, chosen = _walk_down(premises.bench, dense, table, lambda *found: _acceptable(premises, aim, *found))
    passed += steps
    while passed and not premises.judge(shipping, chosen, premises.held_back).loss[1] <= limit:
        passed.pop()
        chosen = cut(premises.bench, passed[-1]) if passed else dense
    if not passed:
        raise TargetError(
            f"no pruned model stays within --max-drop {100 * limit:g}% on {len(premises.judges) + len(premises.held_back)} held-back rows; "
            "allow a larger drop or give more calibration rows"
        )
    measured = premises.meter.measure(chosen, aim.given, shipping)
    return Outcome(Reached(chosen, table, table.predict(chosen.counts), measured), shipping, refusals)


def _integers_within(premises: Premises, aim: Aim) -> Shipping | None:
    """The most sensitive products left in float until the rest of the unpruned model may be in int8; None if half is too few."""
    groups = aim.shipping.groups
    for share in _SENSITIVE_SHARES:
        shipping = aim.shipping.with_floats(most_sensitive(groups, math.ceil(share * len(groups))))
        if shipping.scheme is None:
            break
        if _acceptable(premises, replace(aim, shipping=shipping), premises.dense, f"int8 {100 * (1 - share):.0f}%", None):
            return shipping
    return None


def _acceptable(premises: Premises, aim: Aim, student: Student, step: str, predicted: float | None) -> bool:
    judged = premises.judge(aim.shipping, student, premises.judges)
    name, loss = judged.loss
    # A count of hits on a few hundred rows is too noisy to steer by; the expected drop is not, and needs no labels.
    expected = judged.expected_drop.value if judged.drop is not None and judged.expected_drop is not None else 0.0
    aim.trail.note(step, student, predicted, None, **{name: loss, "expected drop": expected})
    return max(loss, expected) <= premises.limit


def _walk_down(
    bench: Workbench, dense: Student, table: CostTable, acceptable: Callable[[Student, str, float], bool]
) -> tuple[list[dict[str, np.ndarray]], Student]:
    """Units of ever smaller students that are good enough, the last one half a step smaller; and that one, ``dense`` if there is none.

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
    passed: list[dict[str, np.ndarray]] = []
    while bench.sites and share * _STEP >= _FLOOR:
        number += 1
        scores = score(bench, student, number)
        while share * _STEP >= _FLOOR and _unchanged(bench, student, scores, table, table.fixed + prunable * share * _STEP):
            share *= _STEP  # the step is finer than the widths on offer
        whole = tried(student, scores, share * _STEP)
        found = whole or tried(student, scores, share * _STEP**0.5)
        if found is not None:
            passed.append(found.kept)
            student = found
        if whole is None:
            break
        share *= _STEP
    return passed, student


def _unchanged(bench: Workbench, student: Student, scores: Scores, table: CostTable, budget: float) -> bool:
    kept = choose(bench, student, scores, table, budget)
    return kept is not None and all(len(kept[site]) == len(units) for site, units in student.kept.items())
