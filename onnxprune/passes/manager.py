"""The pass manager: from a model, data and a target to a plan.

Measure costs, search, polish, write the plan: every step is a function of the values before it, and all random draws come from one seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import InputError, Refusal
from onnxprune.graph.autodiff import NoGradient
from onnxprune.passes.aim import Aim, Outcome, Trail
from onnxprune.passes.anchor import Reached
from onnxprune.passes.auto import search_within_limit
from onnxprune.passes.decision import Decision, write_plan
from onnxprune.passes.goal import search_to_goal
from onnxprune.passes.polish import Polished, polish
from onnxprune.passes.premises import Premises, prepare
from onnxprune.passes.rows import JUDGES
from onnxprune.passes.scope import Settings, Study
from onnxprune.passes.shipping import Shipping, choose_shipping
from onnxprune.passes.token_budget import search_beside_tokens
from onnxprune.passes.tokens import choose_schedules
from onnxprune.passes.workbench import Progress, Student
from onnxprune.search.target import Target
from onnxprune.verification import Yardstick


def decide(study_: Study, data: CalibrationData, settings: Settings, progress: Progress | None = None) -> Decision:
    """Find the plan.

    Raises:
        TargetError: the target is below what any choice of units reaches.
    """
    if settings.protect_classes and not study_.sites:
        raise InputError("--protect-classes chooses which units go, but no pass that removes units runs: name heads, ffn or channels")
    if not (study_.sites or study_.integers or study_.tokens or study_.smaller or study_.layers or settings.target.auto):
        known = "name heads, ffn, channels, layers, tokens, vocab, hidden or int8 as well"
        raise InputError(f"--passes {','.join(settings.passes)} removes nothing and cannot reach a target: {known}")
    return next(decisions(prepare(study_, data, settings, progress), [settings.target]))


def decide_nested(
    study_: Study, data: CalibrationData, settings: Settings, targets: Sequence[Target], progress: Progress | None = None
) -> Iterator[Decision]:
    """Find a plan for every target, one after the other, on one measurement of costs; each keeps a part of what the one before kept.

    Args:
        targets: of one quantity, the largest first, none of them auto.

    Raises:
        TargetError: a target is below what any choice of units reaches; the ones before were yielded.
        InputError: there are no units that could be nested.
    """
    if not study_.sites:
        raise InputError(f"--passes {','.join(settings.passes)} removes no units, so there is nothing to nest: name heads, ffn or channels")
    if study_.layers:
        raise InputError("layers is decided anew for every target, so that nothing nests: leave it out of --passes")
    yield from decisions(prepare(study_, data, settings, progress), targets)


def decisions(premises: Premises, targets: Sequence[Target]) -> Iterator[Decision]:
    """A decision for every target, each beginning at the units that the one before kept."""
    shipping, refusals = _how_to_ship(premises)
    tables, given = premises.meter.tables(shipping)
    start = premises.dense
    for target in targets:
        goal = None if target.auto else target.absolute(given)
        aim = Aim(target, goal, given, tables, start, shipping, Trail())
        try:
            decision = _towards(premises, aim, refusals)
        except NoGradient as missing:
            premises = premises.without_gradients(missing)
            decision = _towards(premises, replace(aim, trail=Trail()), refusals)
        start = decision.student
        yield decision


def _how_to_ship(premises: Premises) -> tuple[Shipping, tuple[Refusal, ...]]:
    """Finishing rewrites, int8 and schedules of tokens as they pay here, and which of them do not."""
    study_, settings, request = premises.study, premises.settings, premises.request
    refusals = list(study_.refusals)
    shipping, refusal = choose_shipping(
        study_, premises.bench, premises.objective, premises.calibration, premises.judges, request, settings
    )
    if study_.tokens:
        found = choose_schedules(
            study_.anatomy.model,
            shipping.rewrites,
            Yardstick(study_.given, premises.judges.take(slice(0, JUDGES)), premises.objective, settings.runtime),
            premises.calibration,
            request,
            settings.runtime,
            policy=settings.token_policy,
            seed=settings.recipe.seed,
            progress=premises.bench.report("token schedules"),
        )
        if isinstance(found, Refusal):
            refusals.append(study_.refused(found, others=shipping.scheme is not None))
        else:
            shipping = replace(shipping, schedules=found)
    if refusal:
        refusals.append(study_.refused(refusal, others=bool(shipping.schedules)))
    return shipping, tuple(refusals)


def _towards(premises: Premises, aim: Aim, refusals: tuple[Refusal, ...]) -> Decision:
    """The decision for one target. ``refusals`` are those that hold for every target."""
    full = aim.tables.floats.full
    already_met = aim.goal is not None and full <= aim.goal
    if already_met:
        outcome = Outcome(Reached(premises.dense, aim.tables.floats, full, full), aim.shipping.in_float())
    elif aim.shipping.schedules:
        outcome = search_beside_tokens(premises, aim, _search)
    else:
        outcome = _search(premises, aim)
    outcome, polished = _polished(premises, outcome) if premises.study.polish else (outcome, None)
    refusals, reached = (*refusals, *outcome.refusals), outcome.reached
    return Decision(
        study=premises.study,
        objective=premises.objective,
        plan=write_plan(premises, aim.target, outcome, refusals),
        table=reached.table,
        calibration=premises.calibration,
        held_back=premises.held_back,
        request=premises.request,
        given_cost=aim.given,
        finished_cost=full,
        goal=aim.goal,
        predicted=reached.predicted,
        measured=reached.measured,
        already_met=already_met,
        student=reached.student,
        trail=tuple(aim.trail.steps),
        shipping=outcome.shipping,
        refusals=refusals,
        polished=polished,
    )


def _search(premises: Premises, aim: Aim) -> Outcome:
    return search_within_limit(premises, aim) if aim.goal is None else search_to_goal(premises, aim, aim.goal)


def _polished(premises: Premises, outcome: Outcome) -> tuple[Outcome, Polished | None]:
    study_, student = premises.study, outcome.reached.student
    if not study_.smaller and all(student.counts[site.name] == site.units for site in study_.sites):
        found: tuple[Student, Polished] | Refusal = Refusal("OP903", "polish", "the model lost nothing, so that there is nothing to learn")
    else:
        found = polish(premises.bench, student, study_.whole, premises.calibration, premises.yardstick, hinted=not study_.narrower)
    if isinstance(found, Refusal):
        return replace(outcome, refusals=(*outcome.refusals, found)), None
    student, polished = found
    return replace(outcome, reached=replace(outcome.reached, student=student)), polished
