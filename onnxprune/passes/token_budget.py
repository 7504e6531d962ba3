"""How much of the target fewer tokens take: schedules by what they should lose together with narrower layers.

A schedule that is cheap in the whole model need not be so in a narrow one: its small operators take as long there, and a model that has
lost units may miss tokens more. So each is measured again in a model about as narrow as the target asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.errors import TargetError
from onnxprune.graph.model import Model
from onnxprune.passes.anchor import Reached
from onnxprune.passes.shipping import Shipping
from onnxprune.passes.tokens import FASTER, Schedule, timed_shares
from onnxprune.runtime.session import Feeds, RuntimeOptions
from onnxprune.verification import Yardstick

log = logging.getLogger(__name__)

TRIED = 2
"""Beside how many schedules, and beside all tokens, the rest of the target is searched for."""


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
    shipping: Shipping
    reached: Reached
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


def named(schedule: Schedule | None, schedules: Sequence[Schedule]) -> str:
    """How the trail calls a rival: by the place of its schedule among all."""
    if schedule is None:
        return "all tokens: "
    return f"schedule {1 + [other.plan for other in schedules].index(schedule.plan)}: "
