"""How much of the target fewer tokens take: schedules by what they should lose together with narrower layers.

A schedule that is cheap in the whole model need not be so in a narrow one: its small operators take as long there, and a model that has
lost units may miss tokens more. So each is measured again in a model about as narrow as the target asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.errors import Refusal, TargetError
from onnxprune.graph.model import Model
from onnxprune.passes.aim import Aim, Outcome
from onnxprune.passes.anchor import MISS
from onnxprune.passes.choice import choose
from onnxprune.passes.exchange import exchange
from onnxprune.passes.premises import Premises
from onnxprune.passes.tokens import FASTER, Schedule, timed_shares
from onnxprune.runtime.session import Feeds, RuntimeOptions
from onnxprune.verification import Yardstick

log = logging.getLogger(__name__)

TRIED = 2
"""Beside how many schedules, and beside all tokens, the rest of the target is searched for."""


def search_beside_tokens(premises: Premises, aim: Aim, search: Callable[[Premises, Aim], Outcome]) -> Outcome:
    """The search beside each of a few schedules; of what comes out, what loses least on the rows that judge."""
    whole = aim.shipping
    schedules, enough = _promising(premises, aim)
    rivalry = enough > 1

    def attempt(schedule: Schedule | None) -> Rival:
        own = replace(aim, trail=aim.trail.of(_named(schedule, whole.schedules))) if rivalry else aim
        if schedule is not None:
            shipping = whole.with_tokens(schedule.plan)
            after, again = premises.meter.tables(shipping)
            own = replace(own, shipping=shipping, tables=after.scaled(aim.given / again))
        outcome = search(premises, own)
        reached = outcome.reached
        over = 0.0 if aim.goal is None else max(reached.measured / aim.goal - (1 + MISS), 0.0)
        lost = premises.yardstick(outcome.shipping.ship(reached.student)) if rivalry else 0.0
        if rivalry:
            own.trail.note("result", reached.student, reached.predicted, reached.measured, divergence=lost)
        return Rival(schedule, outcome, over, lost)

    taken, tried = contest(schedules, attempt, enough)
    outcome = taken.outcome
    if rivalry:
        reached = outcome.reached
        trail = aim.trail.of(_named(taken.schedule, whole.schedules))
        trail.note("taken", reached.student, reached.predicted, reached.measured, divergence=taken.lost)
    if taken.schedule is None:
        count = len(whole.schedules)
        reason = f"all tokens serve this target best: the {tried - 1} of {count} schedules that promise most lose more or miss the goal"
        if aim.goal is None:
            reason = f"any of {count} schedules loses more than half of --max-drop"
        outcome = replace(outcome, refusals=(*outcome.refusals, Refusal("OP707", "tokens", reason)))
    return outcome


def _promising(premises: Premises, aim: Aim) -> tuple[Sequence[Schedule | None], int]:
    """Schedules in the order in which they should be tried, None for that of all tokens; and how many results are enough."""
    shipping, goal, dense = aim.shipping, aim.goal, premises.dense
    schedules, tables = shipping.schedules, aim.tables
    if goal is None:

        def loss(schedule: Schedule) -> float:
            return premises.judge(shipping.with_tokens(schedule.plan), dense, premises.judges).loss[1]

        # Half of what may be lost is for widths.
        return [fastest_within(schedules, premises.limit / 2, loss)], 1
    if not premises.study.sites:

        def measure(schedule: Schedule) -> float:
            return premises.meter.measure(dense, aim.given, shipping.with_tokens(schedule.plan))

        full = min(tables.floats.full, tables.integers.full)
        return fast_enough(schedules, full, goal, measure if shipping.scheme is None else None), 1
    table = tables.integers if shipping.scheme else tables.floats
    known = exchange(premises, table, goal)
    sliced = shipping.sliced(known.trial)

    def narrow(schedule: Schedule | None) -> Model:
        return (shipping if schedule is None else shipping.with_tokens(schedule.plan)).ship(known.trial, sliced)

    def error_of_widths(share: float) -> float | None:
        kept = choose(premises.bench, dense, known.scores, table, goal / share)
        return None if kept is None else known.divergence(kept)

    settings = premises.settings
    again = in_narrow(schedules, narrow, premises.yardstick, premises.request, settings.runtime, settings.recipe.seed)
    return [None, *by_promise(again, error_of_widths)], 1 + TRIED


def fastest_within(schedules: Sequence[Schedule], limit: float, loss: Callable[[Schedule], float]) -> Schedule | None:
    """Of schedules from slow to fast, the fastest that loses no more than ``limit``."""
    return next((schedule for schedule in reversed(schedules) if loss(schedule) <= limit), None)


def fast_enough(schedules: Sequence[Schedule], full: float, goal: float, measure: Callable[[Schedule], float] | None) -> Sequence[Schedule]:
    """Of schedules from slow to fast, those from the first on that meets the goal; the last one if none does.

    Args:
        full: what the model takes with all tokens.
        measure: what it takes with a schedule; None if something else will make it faster still.
    """
    for number, schedule in enumerate(schedules):
        if full * schedule.share <= goal and (measure is None or measure(schedule) <= goal):
            return schedules[number:]
    return schedules[-1:]


def in_narrow(
    schedules: Sequence[Schedule],
    narrow: Callable[[Schedule | None], Model],
    yardstick: Yardstick,
    request: Feeds,
    options: RuntimeOptions,
    seed: int,
) -> list[Schedule]:
    """The schedules with the share of time that they leave, and the divergence that they add, in a narrower model; none that gains no time.

    Args:
        narrow: that model as it would be shipped with a schedule, or with all tokens.
    """
    whole = narrow(None)
    models = {f"{number}": narrow(schedule) for number, schedule in enumerate(schedules)}
    shares = timed_shares(whole, models, request, options, seed)
    without = yardstick(whole)
    return [
        replace(schedule, share=shares[f"{number}"], error=max(yardstick(models[f"{number}"]) - without, 0.0))
        for number, schedule in enumerate(schedules)
        if shares[f"{number}"] <= FASTER
    ]


def by_promise(schedules: Sequence[Schedule], error_of_widths: Callable[[float], float | None]) -> list[Schedule]:
    """The schedules by what tokens and widths together should cost; those last that leave no way to the goal.

    Args:
        error_of_widths: divergence expected of narrowing the model until it takes no more than the goal, if everything takes this share of
            its time; None if it cannot.
    """

    def expected(schedule: Schedule) -> float:
        rest = error_of_widths(schedule.share)
        return np.inf if rest is None else rest + schedule.error

    ranked = sorted(schedules, key=expected)
    for schedule in ranked:
        log.info("tokens: %.0f%% of the time, %.3g and widths: %.3g", 100 * schedule.share, schedule.error, expected(schedule))
    return ranked


@dataclass(frozen=True, eq=False)
class Rival:
    """What the search came to beside a schedule (None: all tokens): how far over the goal, as a share of it, and what is lost."""

    schedule: Schedule | None
    outcome: Outcome
    over: float
    lost: float


def contest(schedules: Sequence[Schedule | None], attempt: Callable[[Schedule | None], Rival], enough: int) -> tuple[Rival, int]:
    """Of the first ``enough`` rivals that meet the goal the one that loses least, else the one nearest to it; and how many there were.

    Of more than one, twice as many are tried at most.

    Raises:
        TargetError: the goal is out of reach beside all of them.
    """
    found: list[Rival] = []
    failure: TargetError | None = None
    for schedule in schedules:
        try:
            found.append(attempt(schedule))
        except TargetError as error:
            failure = error
        if sum(not rival.over for rival in found) == enough or (enough > 1 and len(found) == 2 * enough):
            break
    if not found:
        assert failure is not None
        raise failure
    return min(found, key=lambda rival: (rival.over, rival.lost)), len(found)


def _named(schedule: Schedule | None, schedules: Sequence[Schedule]) -> str:
    """How the trail calls a rival: by the place of its schedule among all."""
    if schedule is None:
        return "all tokens: "
    return f"schedule {1 + [other.plan for other in schedules].index(schedule.plan)}: "
