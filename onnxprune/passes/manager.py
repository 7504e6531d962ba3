"""The pass manager: from a model, data and a target to a plan.

Load and understand, measure costs, decide in rounds, measure the winner, re-anchor and decide again if it misses: every step is a function
of the values before it, and all random draws come from one seed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import check_labels_of, check_loss, choose_objective
from onnxprune.errors import InputError, NothingPrunable, Refusal, TargetError
from onnxprune.graph.autodiff import NoGradient
from onnxprune.graph.model import Model
from onnxprune.graph.slicing import Kept
from onnxprune.passes.anchor import MISS, REPEATS, Reached, reach
from onnxprune.passes.auto import walk_down
from onnxprune.passes.choice import choose, offers_of, without_nothing
from onnxprune.passes.decision import JUDGES, Decision, judging_rows, split, write_plan
from onnxprune.passes.depth import with_turned_heads
from onnxprune.passes.meter import Meter
from onnxprune.passes.polish import Polished, polish
from onnxprune.passes.precision import Tables, assign, most_sensitive
from onnxprune.passes.rounds import cut, score
from onnxprune.passes.scope import Settings, Study, leading_to
from onnxprune.passes.shipping import choose_shipping
from onnxprune.passes.token_budget import TRIED, Rival, by_promise, contest, fast_enough, fastest_within, in_narrow, named
from onnxprune.passes.tokens import Schedule, choose_schedules
from onnxprune.passes.workbench import Progress, Scores, Student, Workbench, dense_student, set_up
from onnxprune.request import examples, request_feeds
from onnxprune.search.costs import GRANULARITY, CostTable
from onnxprune.search.target import Target
from onnxprune.verification import Comparison, Yardstick, compare

log = logging.getLogger(__name__)

MOST_DROP = 0.01
"""What may be lost where neither a target nor a limit was given."""

_TRIAL_SHARE = 0.8
_SENSITIVE_SHARES = (0.0, 0.125, 0.25, 0.5)


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
    return next(_Search(study_, data, settings, progress).run([settings.target]))


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
    yield from _Search(study_, data, settings, progress).run(targets)


class _Search:
    """One search; attributes are set once, in the order of :meth:`run`."""

    def __init__(self, study_: Study, data: CalibrationData, settings: Settings, progress: Progress | None) -> None:
        self.settings = settings
        if study_.tokens and settings.target.quantity != "latency":
            asked = {"macs": "multiply-adds", "params": "parameters", "size": "bytes"}[settings.target.quantity]
            raise InputError(f"fewer tokens save time, not {asked}: give --target-latency, or no target and --max-drop")
        self.objective = choose_objective(study_.anatomy, settings.output, data.labels, settings.purpose)
        check_loss(self.objective, data, settings.loss)
        check_labels_of(self.objective, data)
        self.calibration, self.held_back = split(data, settings)
        self.study = study_ = with_turned_heads(leading_to(study_, self.objective), self.calibration, settings.runtime)
        # What is chosen by looking at some rows must be reported on others.
        middle = judging_rows(study_, settings, len(self.held_back))
        self.judges, self.held_back = self.held_back.take(slice(0, middle)), self.held_back.take(slice(middle, None))
        self.request = request_feeds(study_.given, data, settings.input_shapes)
        self.example = {name: tuple(array.shape) for name, array in examples(data).items()}
        align = GRANULARITY.get(settings.runtime.short_provider, settings.recipe.align)
        self.bench = set_up(
            study_.anatomy,
            study_.sites,
            self.objective,
            self.calibration,
            self.request,
            settings.loss,
            settings.runtime,
            replace(settings.recipe, align=align),
            progress,
        )
        if settings.protect_classes:
            self.bench.targets.classes()
        self.meter = Meter(study_, self.bench, self.request, settings)
        self.dense = dense_student(study_.anatomy, study_.sites)
        self.trail: list[dict[str, Any]] = []
        self._rival = ""
        self.polished: Polished | None = None
        self._known_scores: Scores | None = None
        self.refusals = study_.refusals
        self.shipping, refusal = choose_shipping(study_, self.bench, self.objective, self.calibration, self.judges, self.request, settings)
        found = self._schedules() if study_.tokens else ()
        if isinstance(found, Refusal):
            self._refuse(found, others=self.shipping.scheme is not None)
        else:
            self.shipping = replace(self.shipping, schedules=found)
        if refusal:
            self._refuse(refusal, others=bool(self.shipping.schedules))

    def _refuse(self, refusal: Refusal, *, others: bool) -> None:
        """Say that a pass does not do its part; an error if there is nothing else to do."""
        self.refusals = (*self.refusals, refusal)
        if not (others or self.study.sites or self.study.rewrites or self.study.smaller):
            raise NothingPrunable(str(refusal))

    def _schedules(self) -> tuple[Schedule, ...] | Refusal:
        """How tokens may leave, from slow to fast, or why they do not."""
        settings = self.settings
        return choose_schedules(
            self.study.anatomy.model,
            self.shipping.rewrites,
            Yardstick(self.study.given, self.judges.take(slice(0, JUDGES)), self.objective, settings.runtime),
            self.calibration,
            self.request,
            settings.runtime,
            policy=settings.token_policy,
            seed=settings.recipe.seed,
            progress=self.bench.report("token schedules"),
        )

    def run(self, targets: Sequence[Target]) -> Iterator[Decision]:
        """A decision for every target, each beginning at the units that the one before kept."""
        tables, given = self.meter.tables(self.shipping)
        shipping, refusals, start = self.shipping, self.refusals, self.dense
        for target in targets:
            self.settings, self.shipping, self.refusals = replace(self.settings, target=target), shipping, refusals
            self.trail, self.polished = [], None
            try:
                decision = self._towards(tables, given, start)
            except NoGradient as missing:
                self._score_without_gradients(missing)
                self.shipping, self.refusals, self.trail = shipping, refusals, []
                decision = self._towards(tables, given, start)
            start = decision.student
            yield decision

    def _score_without_gradients(self, missing: NoGradient) -> None:
        """Take the nearest relative of the default criterion that needs none, and say so; other criteria were asked for by name.

        Raises:
            NoGradient: another criterion.
        """
        if self.bench.recipe.importance != "kfac":
            raise missing
        leaves = [site.consumers[0].leaf for site in self.bench.sites]
        plain = all((value := self.study.anatomy.view.value(leaf.tensor)) is not None and value.ndim == 2 for leaf in leaves)
        substitute = "obs" if plain else "energy"
        log.warning("%s; units are scored by %s instead, which knows the layer and not the loss", missing.found, substitute)
        self.bench = replace(self.bench, recipe=replace(self.bench.recipe, importance=substitute))

    def _towards(self, tables: Tables, given: float, start: Student) -> Decision:
        target = self.settings.target
        goal = None if target.auto else target.absolute(given)
        full = tables.floats.full
        if goal is not None and full <= goal:
            self.shipping = self.shipping.in_float()
            student = self._polished(self.dense) if self.study.polish else self.dense
            return self._decision(Reached(student, tables.floats, full, full), given, full, goal, already_met=True)
        if self.shipping.schedules:
            found = self._beside_tokens(tables, given, goal, start)
        else:
            found = self._search(tables, given, goal, start)
        if self.study.polish:
            found = replace(found, student=self._polished(found.student))
        return self._decision(found, given, full, goal, already_met=False)

    def _reachable(self, tables: Tables, goal: float) -> bool:
        """Whether something is left to decide: with no units to remove, a miss that counts as none must do."""
        return min(tables.floats.floor, tables.integers.floor) <= goal * (1 if self.study.sites else 1 + MISS)

    def _polished(self, student: Student) -> Student:
        if not self.study.smaller and all(student.counts[site.name] == site.units for site in self.study.sites):
            self._refuse(Refusal("OP903", "polish", "the model lost nothing, so that there is nothing to learn"), others=True)
            return student
        found = polish(self.bench, student, self.study.whole, self.calibration, self.yardstick, hinted=not self.study.narrower)
        if isinstance(found, Refusal):
            self._refuse(found, others=True)
            return student
        student, self.polished = found
        return student

    def _search(self, tables: Tables, given: float, goal: float | None, start: Student) -> Reached:
        """Units, and which products compute in integers, for the tokens that :attr:`shipping` leaves.

        Raises:
            TargetError: the goal is below what they reach.
        """
        if goal is None:
            return self._auto(tables, given)
        if not self._reachable(tables, goal):
            self._impossible(tables.integers if self.shipping.scheme else tables.floats, given, goal)
        if not self.study.sites and tables.floats.unit == "ms":
            return self._quantise(tables, given, goal)
        table, first = self._precision(tables, given, goal)
        shape = tables.floats if self.shipping.scheme else None
        return self._reach_for_all_classes(table, given, goal, start, first if start is self.dense else None, shape)

    def _beside_tokens(self, tables: Tables, given: float, goal: float | None, start: Student) -> Reached:
        """The search beside each of a few schedules; of what comes out, what loses least on the rows that judge."""
        whole = self.shipping
        schedules, enough = self._promising_schedules(tables, given, goal)

        def attempt(schedule: Schedule | None) -> Rival:
            self.shipping, beside = whole, tables
            if schedule is not None:
                self.shipping = whole.with_tokens(schedule.plan)
                after, again = self.meter.tables(self.shipping)
                beside = after.scaled(given / again)
            self._rival = named(schedule, whole.schedules) if enough > 1 else ""
            reached = self._search(beside, given, goal, start)
            over = 0.0 if goal is None else max(reached.measured / goal - (1 + MISS), 0.0)
            lost = self.yardstick(self.shipping.ship(reached.student)) if enough > 1 else 0.0
            if enough > 1:
                self._note("result", reached.student, reached.predicted, reached.measured, divergence=lost)
            return Rival(schedule, self.shipping, reached, over, lost)

        taken, tried = contest(schedules, attempt, enough)
        self.shipping, reached = taken.shipping, taken.reached
        if enough > 1:
            self._rival = named(taken.schedule, whole.schedules)
            self._note("taken", reached.student, reached.predicted, reached.measured, divergence=taken.lost)
        self._rival = ""
        if taken.schedule is None:
            count = len(whole.schedules)
            reason = f"all tokens serve this target best: the {tried - 1} of {count} schedules that promise most lose more or miss the goal"
            if goal is None:
                reason = f"any of {count} schedules loses more than half of --max-drop"
            self._refuse(Refusal("OP707", "tokens", reason), others=True)
        return reached

    def _promising_schedules(self, tables: Tables, given: float, goal: float | None) -> tuple[Sequence[Schedule | None], int]:
        """Schedules in the order in which they should be tried, None for that of all tokens; and how many results are enough."""
        shipping, schedules = self.shipping, self.shipping.schedules
        if goal is None:
            # Half of what may be lost is for widths.
            return [fastest_within(schedules, self._limit / 2, lambda item: self.judge(self.dense, self.judges, item).loss[1])], 1
        if not self.study.sites:

            def measure(schedule: Schedule) -> float:
                return self.meter.measure(self.dense, given, shipping.with_tokens(schedule.plan))

            full = min(tables.floats.full, tables.integers.full)
            return fast_enough(schedules, full, goal, measure if shipping.scheme is None else None), 1
        table = tables.integers if shipping.scheme else tables.floats
        scores = self._first_scores()
        trial, factor = self._trial(table, goal, scores)
        sliced = shipping.sliced(trial)

        def narrow(schedule: Schedule | None) -> Model:
            return (shipping if schedule is None else shipping.with_tokens(schedule.plan)).ship(trial, sliced)

        def error_of_widths(share: float) -> float | None:
            kept = choose(self.bench, self.dense, scores, table, goal / share)
            return None if kept is None else factor * self._lost(scores, kept)

        again = in_narrow(schedules, narrow, self.yardstick, self.request, self.settings.runtime, self.settings.recipe.seed)
        return [None, *by_promise(again, error_of_widths)], 1 + TRIED

    def _first_scores(self) -> Scores:
        """Scores of the dense model."""
        if self._known_scores is None:
            self._known_scores = score(self.bench, self.dense, 1)
        return self._known_scores

    def _precision(self, tables: Tables, given: float, goal: float) -> tuple[CostTable, Scores | None]:
        """Decide which products compute in integers for this goal; the table that follows, and the scores it took."""
        if self.shipping.scheme is None:
            return tables.floats, self._known_scores
        if tables.integers.unit != "ms":
            return tables.integers, None
        tables = tables.plausible()
        groups = self.shipping.groups
        scores, factor = None, 0.0
        if self.bench.sites:
            scores = self._first_scores()
            _, factor = self._trial(tables.integers, goal, scores)
        found = offers_of(self.bench, scores, timed=True) if scores else {}
        offers = {name: (kept, factor * lost) for name, (kept, lost) in found.items()}
        # A site that goes empty here may stay in the end, and then it must not have counted for nothing in either precision.
        spared = without_nothing(offers)
        units = {site.name: site.units for site in self.bench.sites}
        floats = assign(tables, groups, spared, units, goal)
        floats = floats if floats is not None else assign(tables, groups, offers, units, goal)
        if floats is None:
            self._impossible(tables.integers, given, goal)
        self.shipping = self.shipping.with_floats(floats)
        log.info("%d of %d products stay in float", len(floats), sum(len(group.products) for group in groups))
        return tables.blend(groups, floats), scores

    def _quantise(self, tables: Tables, given: float, goal: float) -> Reached:
        """Integers alone: which products, for this goal; measured, re-anchored and decided again while it is too slow."""
        for attempt in range(REPEATS + 1):
            table, _ = self._precision(tables, given, max(goal, tables.integers.full) if attempt else goal)
            measured = self.meter.measure(self.dense, given, self.shipping)
            self._note(f"anchor {attempt}", self.dense, table.full, measured)
            if measured <= goal * (1 + MISS) or self.shipping.scheme is None or attempt == REPEATS:
                break
            tables = tables.scaled(measured / table.full)
        return Reached(self.dense, table, table.full, measured)

    def _trial(self, table: CostTable, goal: float, scores: Scores) -> tuple[Student, float]:
        """A model narrowed to the region of the goal in one cut, and its divergence per unit of saliency removed.

        By that tokens, int8 and pruning are counted alike.
        """
        budget = min(goal, table.fixed + _TRIAL_SHARE * (table.full - table.fixed))
        kept = choose(self.bench, self.dense, scores, table, max(budget, table.floor))
        assert kept is not None
        trial = cut(self.bench, kept)
        return trial, self.yardstick(trial.model) / max(self._lost(scores, kept), 1e-30)

    def _lost(self, scores: Scores, kept: Kept) -> float:
        """Saliency of what ``kept`` leaves out."""
        found = (scores.saliency[site.name][np.setdiff1d(np.arange(site.units), kept[site.name])].sum() for site in self.bench.sites)
        return float(sum(found))

    def _impossible(self, table: CostTable, given: float, goal: float) -> NoReturn:
        words = {"ms": "ms", "macs": "multiply-adds", "params": "parameters", "bytes": "bytes"}[table.unit]
        kinds = " and ".join(sorted({site.kind for site in self.bench.sites}))
        most = [f"every {kinds} unit removed"] if kinds else []
        most += ["every product in int8"] if self.shipping.scheme else []
        most += [f"{len(self.study.shallow.replaced)} of the sublayers replaced"] if self.study.shallow else []
        raise TargetError(
            f"target {self.settings.target} cannot be met: it asks for {goal:.4g} {words}, and with {' and '.join(most) or 'the rewrites'} "
            f"the model still takes {table.floor:.4g} {words} ({100 * table.floor / given:.0f}% of the file as given). "
            f"Ask for at least {math.ceil(100 * table.floor / given)}%, or allow more passes"
        )

    def _reach_for_all_classes(
        self, table: CostTable, given: float, goal: float, start: Student, first: Scores | None, shape: CostTable | None
    ) -> Reached:
        """The search as asked for, and if classes are to be protected the one by class: of the two the better for its worst class."""
        error = self.yardstick if len(self.judges) else None

        def by(bench: Workbench, first: Scores | None) -> Reached:
            found = reach(
                bench,
                table,
                goal,
                start,
                first=first,
                shape=shape,
                error=error,
                measure=lambda student: self.meter.measure(student, given, self.shipping),
                note=self._note,
            )
            return found if found is not None else self._impossible(table, given, goal)

        found = by(self.bench, first)
        if not self.settings.protect_classes:
            return found
        other = by(replace(self.bench, recipe=replace(self.bench.recipe, importance="classwise")), None)
        worst = []
        for name, candidate in ((self.bench.recipe.importance, found), ("classwise", other)):
            known = self.judge(candidate.student, self.judges).worst_class
            if known is None:
                raise InputError(f"--protect-classes: of {len(self.judges)} rows that judge no class has five; give more calibration rows")
            worst.append(known.agreement)
            told = {"agreement of the worst class": known.agreement}
            self._note(f"worst class by {name}", candidate.student, candidate.predicted, None, **told)
        return other if worst[1] > worst[0] else found

    def _auto(self, tables: Tables, given: float) -> Reached:
        """Go down in steps while the judging rows allow it, then half a step more; step back if the other held-back rows disagree."""
        limit = self._limit
        passed = [self.dense] if self._integers_within(self.dense, limit) or not self.bench.sites else []
        # Which products stay in float is settled now, and with it what everything costs.
        table = tables.blend(self.shipping.groups, self.shipping.floats) if self.shipping.scheme else tables.floats
        passed += walk_down(self.bench, self.dense, table, lambda *found: self._acceptable(limit, *found))
        while passed and not self.judge(passed[-1], self.held_back).loss[1] <= limit:
            passed.pop()
        if not passed:
            raise TargetError(
                f"no pruned model stays within --max-drop {100 * limit:g}% on {len(self.judges) + len(self.held_back)} held-back rows; "
                "allow a larger drop or give more calibration rows"
            )
        chosen = passed[-1]
        return Reached(chosen, table, table.predict(chosen.counts), self.meter.measure(chosen, given, self.shipping))

    def _integers_within(self, student: Student, limit: float) -> bool:
        """Leave the most sensitive products in float until the unpruned model in int8 loses no more than ``limit``; in the end, all."""
        if self.shipping.scheme is None:
            return False
        for share in _SENSITIVE_SHARES:
            if share:
                groups = self.shipping.groups
                self.shipping = self.shipping.with_floats(most_sensitive(groups, math.ceil(share * len(groups))))
            if self.shipping.scheme is None:
                break
            if self._acceptable(limit, student, f"int8 {100 * (1 - share):.0f}%", None):
                return True
        reason = f"int8 loses more than {100 * limit:g}% even with half of the products in float"
        self._refuse(Refusal("OP402", "int8", reason), others=bool(self.shipping.schedules))
        self.shipping = self.shipping.in_float()
        return False

    def _acceptable(self, limit: float, student: Student, step: str, predicted: float | None) -> bool:
        judged = self.judge(student, self.judges)
        name, loss = judged.loss
        # A count of hits on a few hundred rows is too noisy to steer by; the expected drop is not, and needs no labels.
        expected = judged.expected_drop.value if judged.drop is not None and judged.expected_drop is not None else 0.0
        self._note(step, student, predicted, None, **{name: loss, "expected drop": expected})
        return max(loss, expected) <= limit

    @cached_property
    def yardstick(self) -> Yardstick:
        """Divergence from the file as given, on the rows that judge."""
        return Yardstick(self.study.given, self.judges, self.objective, self.settings.runtime)

    @property
    def _limit(self) -> float:
        return self.settings.max_drop if self.settings.max_drop is not None else MOST_DROP

    def judge(self, student: Student, rows: CalibrationData, schedule: Schedule | None = None) -> Comparison:
        settings = self.settings
        shipping = self.shipping if schedule is None else self.shipping.with_tokens(schedule.plan)
        return compare(self.study.given, shipping.ship(student), rows, self.objective, settings.runtime, settings.recipe.seed)

    def _note(self, step: str, student: Student, predicted: float | None, measured: float | None, **losses: float) -> None:
        self.trail.append({"step": self._rival + step, "kept": student.counts, "predicted": predicted, "measured": measured, **losses})
        words = [f"{value:.4g}" if value else "-" for value in (predicted, measured)]
        log.info("%s: predicted %s, measured %s %s", step, *words, losses or "")

    def _decision(self, found: Reached, given: float, finished: float, goal: float | None, *, already_met: bool) -> Decision:
        student, table = found.student, found.table
        plan = write_plan(
            self.study,
            self.settings,
            self.bench.recipe,
            self.objective,
            self.calibration,
            self.shipping,
            student,
            {table.unit: found.predicted},
            self.example,
            self.refusals,
        )
        return Decision(
            self.study,
            self.objective,
            plan,
            table,
            self.calibration,
            self.held_back,
            self.request,
            given,
            finished,
            goal,
            found.predicted,
            found.measured,
            already_met,
            student,
            student.fits,
            tuple(self.trail),
            self.shipping,
            self.refusals,
            self.polished,
        )
