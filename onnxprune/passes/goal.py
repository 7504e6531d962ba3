"""Towards a goal: which products compute in integers, which units stay, measured and decided again while the goal is missed."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import NoReturn

from onnxprune.errors import TargetError
from onnxprune.passes.aim import Aim, Outcome
from onnxprune.passes.anchor import MISS, REPEATS, Reached, reach
from onnxprune.passes.choice import offers_of, without_nothing
from onnxprune.passes.exchange import exchange
from onnxprune.passes.precision import assign
from onnxprune.passes.premises import Premises
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.workbench import Workbench
from onnxprune.search.costs import CostTable

log = logging.getLogger(__name__)


def search_to_goal(premises: Premises, aim: Aim, goal: float) -> Outcome:
    """Units, and which products compute in integers, for the tokens that the shipping of ``aim`` leaves.

    Raises:
        TargetError: the goal is below what they reach.
    """
    tables = aim.tables
    # With no units to remove, a miss that counts as none must do.
    if min(tables.floats.floor, tables.integers.floor) > goal * (1 if premises.study.sites else 1 + MISS):
        _impossible(premises, aim, goal)
    if not premises.study.sites and tables.floats.unit == "ms":
        return _integers_alone(premises, aim, goal)
    shipping, table = _precision(premises, aim, goal)
    aim = replace(aim, shipping=shipping)
    reached = _reach(premises, premises.bench, aim, table, goal)
    if premises.settings.protect_classes:
        reached = _kinder_to_classes(premises, aim, table, goal, reached)
    return Outcome(reached, shipping)


def _reach(premises: Premises, bench: Workbench, aim: Aim, table: CostTable, goal: float) -> Reached:
    """Rounds to the goal with the criterion of ``bench``."""
    known = aim.start is premises.dense and bench is premises.bench and table.full > goal
    found = reach(
        bench,
        table,
        goal,
        aim.start,
        first=premises.first_scores if known else None,
        shape=aim.tables.floats if aim.shipping.scheme else None,
        error=premises.yardstick if len(premises.judges) else None,
        measure=lambda student: premises.meter.measure(student, aim.given, aim.shipping),
        note=aim.trail.note,
    )
    return found if found is not None else _impossible(premises, aim, goal)


def _kinder_to_classes(premises: Premises, aim: Aim, table: CostTable, goal: float, found: Reached) -> Reached:
    """The same search by class, and of the two results the better for its worst class."""
    recipe = premises.bench.recipe
    other = _reach(premises, replace(premises.bench, recipe=replace(recipe, importance="classwise")), aim, table, goal)
    worst = []
    for name, candidate in ((recipe.importance, found), ("classwise", other)):
        known = premises.judge(aim.shipping, candidate.student, premises.judges).worst_class
        assert known is not None
        worst.append(known.agreement)
        told = {"agreement of the worst class": known.agreement}
        aim.trail.note(f"worst class by {name}", candidate.student, candidate.predicted, None, **told)
    return other if worst[1] > worst[0] else found


def _precision(premises: Premises, aim: Aim, goal: float) -> tuple[Shipping, CostTable]:
    """Decide which products compute in integers for this goal; and the table that follows."""
    shipping, tables = aim.shipping, aim.tables
    if shipping.scheme is None:
        return shipping, tables.floats
    if tables.integers.unit != "ms":
        return shipping, tables.integers
    tables = tables.plausible()
    groups, sites = shipping.groups, premises.bench.sites
    offers = {}
    if sites:
        known = exchange(premises, tables.integers, goal)
        offers = {name: (kept, known.rate * lost) for name, (kept, lost) in offers_of(premises.bench, known.scores, timed=True).items()}
    # A site that goes empty here may stay in the end, and then it must not have counted for nothing in either precision.
    spared = without_nothing(offers)
    units = {site.name: site.units for site in sites}
    floats = assign(tables, groups, spared, units, goal)
    floats = floats if floats is not None else assign(tables, groups, offers, units, goal)
    if floats is None:
        _impossible(premises, aim, goal)
    log.info("%d of %d products stay in float", len(floats), sum(len(group.products) for group in groups))
    return shipping.with_floats(floats), tables.blend(groups, floats)


def _integers_alone(premises: Premises, aim: Aim, goal: float) -> Outcome:
    """Which products compute in integers, for this goal; measured, re-anchored and decided again while it is too slow."""
    dense = premises.dense
    for attempt in range(REPEATS + 1):
        shipping, table = _precision(premises, aim, max(goal, aim.tables.integers.full) if attempt else goal)
        measured = premises.meter.measure(dense, aim.given, shipping)
        aim.trail.note(f"anchor {attempt}", dense, table.full, measured)
        if measured <= goal * (1 + MISS) or shipping.scheme is None or attempt == REPEATS:
            break
        aim = replace(aim, shipping=shipping, tables=aim.tables.scaled(measured / table.full))
    return Outcome(Reached(dense, table, table.full, measured), shipping)


def _impossible(premises: Premises, aim: Aim, goal: float) -> NoReturn:
    table = aim.tables.integers if aim.shipping.scheme else aim.tables.floats
    words = {"ms": "ms", "macs": "multiply-adds", "params": "parameters", "bytes": "bytes"}[table.unit]
    kinds = " and ".join(sorted({site.kind for site in premises.bench.sites}))
    most = [f"every {kinds} unit removed"] if kinds else []
    most += ["every product in int8"] if aim.shipping.scheme else []
    most += [f"{len(premises.study.shallow.replaced)} of the sublayers replaced"] if premises.study.shallow else []
    raise TargetError(
        f"target {aim.target} cannot be met: it asks for {goal:.4g} {words}, and with {' and '.join(most) or 'the rewrites'} "
        f"the model still takes {table.floor:.4g} {words} ({100 * table.floor / aim.given:.0f}% of the file as given). "
        f"Ask for at least {math.ceil(100 * table.floor / aim.given)}%, or allow more passes"
    )
